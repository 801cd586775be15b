"""The one reader of the environment. Everything else is handed a `Settings`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import BackendError

SEGMENTERS = ("compact", "sam_vit_b", "sam_vit_l", "sam_vit_h")


class BadSettings(BackendError):
    """An environment variable that cannot be used."""


def _names(*names: str) -> Any:
    return AliasChoices(*names)


class Settings(BaseSettings):
    """What the environment says, checked once at start. Field comments give the variable's meaning."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, populate_by_name=True, env_ignore_empty=True)

    label_studio_url: str = Field("", validation_alias=_names("LABEL_STUDIO_URL", "LABEL_STUDIO_HOST"))
    """Where Label Studio answers, e.g. http://localhost:8080; empty: images by full URL only, and no training."""

    label_studio_api_key: SecretStr = Field(
        SecretStr(""), validation_alias=_names("LABEL_STUDIO_API_KEY", "LABEL_STUDIO_ACCESS_TOKEN")
    )
    """A legacy token or a personal access token. Goes to Label Studio's own origin only, and into no log."""

    basic_auth_user: str = Field("", validation_alias="BASIC_AUTH_USER")
    basic_auth_pass: SecretStr = Field(SecretStr(""), validation_alias="BASIC_AUTH_PASS")
    """With both set, every route but /health and the tile images asks for them."""

    webhook_secret: SecretStr = Field(SecretStr(""), validation_alias="GEOPRELABEL_WEBHOOK_SECRET")
    """Sent by Label Studio in the X-GeoPrelabel-Secret header, as `push` registers it."""

    data_dir: Path = Field(Path("geoprelabel-data"), validation_alias="GEOPRELABEL_DATA_DIR")
    """Tiles, caches, journals: everything that the backend writes."""

    model_dir_setting: Path | None = Field(None, validation_alias="MODEL_DIR")
    local_files_document_root: Path | None = Field(
        None, validation_alias=_names("LOCAL_FILES_DOCUMENT_ROOT", "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT")
    )
    """Folder behind /data/local-files/?d=…; unset: those images are asked of Label Studio."""

    image_hosts: Annotated[tuple[str, ...], NoDecode] = Field((), validation_alias="GEOPRELABEL_IMAGE_HOSTS")
    """Extra ``host`` or ``host:port`` that images may come from, private addresses included."""

    public_url: str = Field("", validation_alias="GEOPRELABEL_PUBLIC_URL")
    """Where browsers reach this backend, for the tiles it serves; empty: http://localhost:PORT."""

    segmenter: str = Field("compact", validation_alias="GEOPRELABEL_SEGMENTER")
    device: str = Field("cpu", validation_alias="DEVICE")
    model_score_threshold: float = Field(0.3, validation_alias="MODEL_SCORE_THRESHOLD", ge=0, le=1)
    """Automatic polygons less likely right than this are left out, unless the tag's model_score_threshold is set."""

    regularize: bool = Field(False, validation_alias="GEOPRELABEL_REGULARIZE")
    """Make outlines of buildings right-angled, pre-labels and answers to clicks, where that is as good."""

    start_training_each_n_updates: int = Field(20, validation_alias="START_TRAINING_EACH_N_UPDATES", ge=1)
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
    image_max_megapixels: int = Field(64, validation_alias="GEOPRELABEL_IMAGE_MAX_MEGAPIXELS", gt=0)
    mlflow_tracking_uri: str = Field("", validation_alias="MLFLOW_TRACKING_URI")
    """Model registry; empty: a SQLite file in MODEL_DIR."""

    dask_scheduler: str = Field("", validation_alias="GEOPRELABEL_DASK_SCHEDULER")
    sam_checkpoint: Path | None = Field(None, validation_alias="GEOPRELABEL_SAM_CHECKPOINT")
    """A checkpoint of Segment Anything of one's own (fine-tuned, say), taken as it is instead of Meta's."""

    weights_mirror: str = Field("", validation_alias="GEOPRELABEL_WEIGHTS_MIRROR")
    """Where `weights get` fetches from instead of Meta: the http(s) URL of a folder, or a folder of this machine."""

    log_level: str = Field("INFO", validation_alias="LOG_LEVEL")
    port: int = Field(9090, validation_alias="PORT", ge=1, le=65535)
    workers: int = Field(1, validation_alias="WORKERS", ge=1)
    threads: int = Field(32, validation_alias="THREADS", ge=2)
    """Request threads of each worker. More than cores: most of them wait for images or for their turn at the model."""

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(host.strip().lower() for host in value.split(",") if host.strip())
        return value

    @field_validator("label_studio_url", "public_url", mode="after")
    @classmethod
    def _check_url(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        if value and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError(f"must start with http:// or https:// and name a host, got {value!r}")
        return value

    @field_validator("segmenter", mode="after")
    @classmethod
    def _check_segmenter(cls, value: str) -> str:
        if value not in SEGMENTERS:
            raise ValueError(f"must be one of {', '.join(SEGMENTERS)}, got {value!r}")
        return value

    @classmethod
    def from_environment(cls, **overrides: Any) -> Settings:
        """Settings from the environment; ``overrides`` by field name count first. Raises BadSettings."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadSettings(f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from error

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
