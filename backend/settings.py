"""The one reader of the environment. Everything else is handed a `Settings`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from .errors import BackendError

SEGMENTERS = ("compact", "sam_vit_b", "sam_vit_l", "sam_vit_h")

_SECRET_FILE_MAX_BYTES = 64 * 1024
_CAN_HOLD_SECRETS = ("mlflow_tracking_uri",)
"""Settings that are no secret as such: an address may have a password in it."""


class BadSettings(BackendError):
    """An environment variable that cannot be used."""


def _names(*names: str) -> Any:
    return AliasChoices(*names)


class Settings(BaseSettings):
    """What the environment says, checked once at start. Field comments give the variable's meaning.

    Each variable that holds a secret can be named with ``_FILE`` behind it instead, and then holds the path of a file
    with the secret in it, as container engines hand them out.
    """

    model_config = SettingsConfigDict(extra="ignore", frozen=True, populate_by_name=True, env_ignore_empty=True)

    label_studio_url: str = Field("", validation_alias=_names("LABEL_STUDIO_URL", "LABEL_STUDIO_HOST"))
    """Where Label Studio answers, e.g. http://localhost:8080; empty: images by full URL only, and no training."""

    label_studio_api_key: SecretStr = Field(
        SecretStr(""), validation_alias=_names("LABEL_STUDIO_API_KEY", "LABEL_STUDIO_ACCESS_TOKEN")
    )
    """A legacy token or a personal access token. Goes to Label Studio's own origin only, and into no log."""

    basic_auth_user: str = Field("", validation_alias="BASIC_AUTH_USER")
    """Every route but /health and the tile images asks for it, with the password."""

    basic_auth_pass: SecretStr = Field(SecretStr(""), validation_alias="BASIC_AUTH_PASS")
    """Every route but /health and the tile images asks for them. Both, or neither."""

    webhook_secret: SecretStr = Field(SecretStr(""), validation_alias="GEOPRELABEL_WEBHOOK_SECRET")
    """Sent by Label Studio in the X-GeoPrelabel-Secret header, as `push` registers it."""

    data_dir: Path = Field(Path("geoprelabel-data"), validation_alias="GEOPRELABEL_DATA_DIR")
    """Tiles, caches, journals: everything that the backend writes."""

    model_dir_setting: Path | None = Field(None, validation_alias="MODEL_DIR")
    """Trained model versions and checkpoints; empty: DATA_DIR/models."""

    local_files_document_root: Path | None = Field(
        None, validation_alias=_names("LOCAL_FILES_DOCUMENT_ROOT", "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT")
    )
    """Folder behind /data/local-files/?d=…; unset: those images are asked of Label Studio."""

    image_hosts: Annotated[tuple[str, ...], NoDecode] = Field((), validation_alias="GEOPRELABEL_IMAGE_HOSTS")
    """Extra ``host`` or ``host:port`` that images may come from, private addresses included."""

    image_buckets: Annotated[tuple[str, ...], NoDecode] = Field((), validation_alias="GEOPRELABEL_IMAGE_BUCKETS")
    """``s3://bucket/prefix`` of images that are read with the AWS_… keys here, not asked of Label Studio."""

    tiles_secret: SecretStr = Field(SecretStr(""), validation_alias="GEOPRELABEL_TILES_SECRET")
    """Set: `ingest` signs the addresses of tiles with it, and /tiles answers no other. Empty: tiles are open."""

    public_url: str = Field("", validation_alias="GEOPRELABEL_PUBLIC_URL")
    """Where browsers reach this backend, for the tiles it serves; empty: http://localhost:PORT."""

    segmenter: str = Field("compact", validation_alias="GEOPRELABEL_SEGMENTER")
    """What draws the outlines: compact, which is shipped, or sam_vit_b, sam_vit_l, sam_vit_h after `weights get`."""

    device: str = Field("cpu", pattern=r"^(cpu|mps|xpu|cuda)(:\d+)?$", validation_alias="DEVICE")
    """Where the model computes: cpu, cuda, cuda:1, …"""

    model_score_threshold: float = Field(0.3, validation_alias="MODEL_SCORE_THRESHOLD", ge=0, le=1)
    """Automatic polygons less likely right than this are left out, unless the tag's model_score_threshold is set."""

    regularize: bool = Field(False, validation_alias="GEOPRELABEL_REGULARIZE")
    """Make outlines of buildings right-angled, pre-labels and answers to clicks, where that is as good."""

    start_training_each_n_updates: int = Field(20, validation_alias="START_TRAINING_EACH_N_UPDATES", ge=1)
    """Annotations after which training starts by itself."""

    training_quiet_s: float = Field(10.0, validation_alias="GEOPRELABEL_TRAINING_QUIET_S", ge=0)
    """Training after N annotations waits until none came for this long, in seconds."""

    promote: Literal["better", "always", "never"] = Field("better", validation_alias="GEOPRELABEL_PROMOTE")
    """When a trained version goes live by itself: if it is surely better on held-out tiles, or always, or never."""

    training_max_s: float = Field(600.0, validation_alias="GEOPRELABEL_TRAINING_MAX_S", gt=0)
    """Learning ends after this long, in seconds. A run that takes twice as long and 5 minutes in all is ended."""

    training_max_mb: int = Field(6144, validation_alias="GEOPRELABEL_TRAINING_MAX_MB", ge=0)
    """A training process that holds more memory than this is ended; 0: no limit."""

    trainings_at_once: int = Field(1, validation_alias="GEOPRELABEL_TRAININGS_AT_ONCE", ge=1)
    """Projects that train at the same time on one machine; the others wait."""

    database_url: SecretStr = Field(SecretStr(""), validation_alias="GEOPRELABEL_DATABASE_URL")
    """Where annotations to learn from are kept, e.g. postgresql://user:password@host/name; empty: a SQLite file."""

    predict_budget_s: float = Field(80.0, validation_alias="GEOPRELABEL_PREDICT_BUDGET_S", gt=0)
    """A batch stops here and answers ``[]`` for what is left: Label Studio waits 100 s."""

    comment_invalid: bool = Field(False, validation_alias="GEOPRELABEL_COMMENT_INVALID")
    """Write what is wrong with a region into its notes in Label Studio, where its annotator reads it."""

    max_overlap: float = Field(0.1, validation_alias="GEOPRELABEL_MAX_OVERLAP", ge=0, le=1)
    """Share of the smaller of two outlines of one label that the other may cover without being reported."""

    min_area_m2: float = Field(1.0, validation_alias="GEOPRELABEL_MIN_AREA_M2", ge=0)
    """Regions below this are reported where the tile has a place, in square metres."""

    min_area_px: float = Field(10.0, validation_alias="GEOPRELABEL_MIN_AREA_PX", ge=0)
    """The same for images without a place, in square pixels."""

    embedding_cache_mb: int = Field(256, validation_alias="GEOPRELABEL_EMBEDDING_CACHE_MB", ge=0)
    """Memory for embeddings, of each worker."""

    embedding_disk_mb: int = Field(2048, validation_alias="GEOPRELABEL_EMBEDDING_DISK_MB", ge=0)
    """Disk for embeddings, in DATA_DIR/embeddings, of all workers together; 0: none are kept there."""

    image_max_mb: int = Field(100, validation_alias="GEOPRELABEL_IMAGE_MAX_MB", gt=0)
    """Images of more bytes than this are refused, in MB."""

    image_max_megapixels: int = Field(64, validation_alias="GEOPRELABEL_IMAGE_MAX_MEGAPIXELS", gt=0)
    """Images of more pixels than this are refused, in millions."""

    mlflow_tracking_uri: str = Field("", validation_alias="MLFLOW_TRACKING_URI")
    """Model registry; empty: a SQLite file in MODEL_DIR."""

    dask_scheduler: str = Field("", validation_alias="GEOPRELABEL_DASK_SCHEDULER")
    """Address of a Dask scheduler, e.g. tcp://host:8786: predict, prewarm and training go to its workers."""

    dask_resources: str = Field("", validation_alias="GEOPRELABEL_DASK_RESOURCES")
    """What predict and prewarm ask of a Dask worker, e.g. GPU=1; empty: any worker will do."""

    dask_training_resources: str = Field("", validation_alias="GEOPRELABEL_DASK_TRAINING_RESOURCES")
    """The same for training, e.g. TRAINING=1."""

    sam_checkpoint: Path | None = Field(None, validation_alias="GEOPRELABEL_SAM_CHECKPOINT")
    """A checkpoint of Segment Anything of one's own (fine-tuned, say), taken as it is instead of Meta's."""

    weights_mirror: str = Field("", validation_alias="GEOPRELABEL_WEIGHTS_MIRROR")
    """Where `weights get` fetches from instead of Meta: the http(s) URL of a folder, or a folder of this machine."""

    artifacts: str = Field("", validation_alias="GEOPRELABEL_ARTIFACTS")
    """Where trained weights are kept for all servers: ``s3://bucket/prefix``, ``gs://…``, ``az://…`` or a folder that
    all reach. Empty: each server's own MODEL_DIR, and MLflow's server where there is one."""

    log_level: str = Field("INFO", validation_alias="LOG_LEVEL")
    """DEBUG, INFO, WARNING or ERROR."""

    log_format: Literal["text", "json"] = Field("text", validation_alias="LOG_FORMAT")
    """Lines for people, or a JSON object a line, with one for each request."""

    port: int = Field(9090, validation_alias="PORT", ge=1, le=65535)
    """Port that the server listens on."""

    workers: int = Field(1, validation_alias="WORKERS", ge=1)
    """Server processes. They share embeddings, boxes and versions."""

    threads: int = Field(32, validation_alias="THREADS", ge=2)
    """Request threads of each worker. More than cores: most of them wait for images or for their turn at the model."""

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(host.strip().lower() for host in value.split(",") if host.strip())
        return value

    @field_validator("image_buckets", mode="before")
    @classmethod
    def _split_buckets(cls, value: Any) -> Any:
        buckets = [one.strip().rstrip("/") for one in value.split(",")] if isinstance(value, str) else value
        if wrong := [one for one in buckets if one and not re.fullmatch(r"s3://[a-z0-9][^?#\s]+", one)]:
            raise ValueError(f"must be s3://bucket or s3://bucket/prefix, got {wrong[0]!r}")
        return tuple(one for one in buckets if one)

    @field_validator("artifacts", mode="after")
    @classmethod
    def _check_artifacts(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        if "://" in value and not re.fullmatch(r"(s3|gs|az)://[a-z0-9][^?#\s]+", value):
            raise ValueError(
                f"must be s3://bucket/prefix, gs://…, az://… or a folder, got {_without_password(value)!r}"
            )
        return value

    @field_validator("label_studio_url", "public_url", mode="after")
    @classmethod
    def _check_url(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        if value and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError(f"must start with http:// or https:// and name a host, got {_without_password(value)!r}")
        return value

    @field_validator("segmenter", mode="after")
    @classmethod
    def _check_segmenter(cls, value: str) -> str:
        if value not in SEGMENTERS:
            raise ValueError(f"must be one of {', '.join(SEGMENTERS)}, got {value!r}")
        return value

    @model_validator(mode="after")
    def _check_password(self) -> Settings:
        # Half a password would look like a locked door and be an open one.
        if bool(self.basic_auth_user) != bool(self.basic_auth_pass.get_secret_value()):
            raise ValueError("BASIC_AUTH_USER and BASIC_AUTH_PASS are needed both, or neither")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given in code counts first, then the environment, then the files that it names."""
        return init_settings, env_settings, _SecretFiles(settings_cls)

    @classmethod
    def from_environment(cls, **overrides: Any) -> Settings:
        """Settings from the environment; ``overrides`` by field name count first. Raises BadSettings."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            # The value itself may be a secret that was put into the wrong variable; a number is none.
            first = error.errors()[0]
            where = f"{first['loc'][0]}: " if first["loc"] else ""
            # "from None", as a trace with the first error would print what was given.
            got = f", got {first['input']!r:.40}" if first["type"].startswith(("greater_", "less_")) else ""
            raise BadSettings(f"{where}{first['msg'].removeprefix('Value error, ')}{got}") from None

    @property
    def secrets(self) -> frozenset[str]:
        """What must be in no log: passwords and tokens, those within addresses too."""
        values = [getattr(self, name) for name in type(self).model_fields]
        whole = {value.get_secret_value() for value in values if isinstance(value, SecretStr)}
        within = re.findall(r"//[^/@\s]*:([^/@\s]+)@", " ".join([*whole, self.mlflow_tracking_uri]))
        return frozenset({*whole, *within} - {""})

    @property
    def model_dir(self) -> Path:
        """Where model versions live."""
        return self.model_dir_setting or self.data_dir / "models"

    @property
    def sam_dir(self) -> Path:
        """Where Segment Anything's checkpoints lie."""
        return self.model_dir / "sam"

    @property
    def tiles_dir(self) -> Path:
        """Tiles served at /tiles/<scene>/<tile>."""
        return self.data_dir / "tiles"

    @property
    def scenes_dir(self) -> Path:
        """Scenes whose tiles are made when they are asked for."""
        return self.data_dir / "scenes"

    @property
    def has_basic_auth(self) -> bool:
        """Whether requests must carry a user and a password."""
        return bool(self.basic_auth_user and self.basic_auth_pass.get_secret_value())

    @property
    def tiles_url(self) -> str:
        """Where browsers find the tiles."""
        return (self.public_url or f"http://localhost:{self.port}") + "/tiles"

    @property
    def cores(self) -> int:
        """Processors that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _SecretFiles(PydanticBaseSettingsSource):
    """Secrets from the files that ``…_FILE`` variables name."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The content of the file that is named, None where none is; under the name that the environment's has."""
        names = _secret_names(field, field_name)
        files = [f"{name}_FILE" for name in names if os.environ.get(f"{name}_FILE")]
        given = [*(name for name in names if os.environ.get(name)), *files]
        if not files:
            return None, field_name, False
        if len(given) > 1:
            raise BadSettings(f"{' and '.join(given)} are both set; keep one")
        return _secret_in(Path(os.environ[files[0]]), files[0]), names[0], False

    def __call__(self) -> dict[str, Any]:
        read = [self.get_field_value(field, name) for name, field in self.settings_cls.model_fields.items()]
        return {name: secret for secret, name, _ in read if secret is not None}


def _secret_names(field: FieldInfo, field_name: str) -> tuple[str, ...]:
    """Variables of a setting that is, or can hold, a secret; none of any other."""
    alias = field.validation_alias
    if field.annotation is not SecretStr and field_name not in _CAN_HOLD_SECRETS:
        return ()
    return tuple(str(name) for name in alias.choices) if isinstance(alias, AliasChoices) else (str(alias),)


def _secret_in(path: Path, variable: str) -> str:
    """A file's text without the blanks around it. Raises BadSettings, never with what the file holds."""
    try:
        with path.open("rb") as file:
            content = file.read(_SECRET_FILE_MAX_BYTES + 1)
        secret = content.decode("utf-8").strip()
    except OSError as error:
        raise BadSettings(f"{variable}: {path} cannot be read: {error.strerror or type(error).__name__}") from error
    except ValueError:
        raise BadSettings(f"{variable}: {path} is not a text in UTF-8") from None
    if not secret or len(content) > _SECRET_FILE_MAX_BYTES:
        raise BadSettings(f"{variable}: {path} must hold the secret and nothing else; it has {len(content)} bytes")
    return secret


def _without_password(url: str) -> str:
    return re.sub(r"(?<=//)[^/]*@", "…@", url)
