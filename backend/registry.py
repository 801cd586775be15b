"""Model versions of each project, kept by MLflow: which weights there are, where they came from, which one is live.

A version's weights lie in ``MODEL_DIR/versions/<name>/``; they appear whole, by one rename, and are used only while
their sha256 is the one that was registered. MLflow (a SQLite file in MODEL_DIR, or any server by
``MLFLOW_TRACKING_URI``) holds the rest: a run for each training, with its progress and figures, and for each version
its metrics, lineage tags, and the aliases ``champion`` (live) and ``challenger`` (the newest that is not). For backends
on other machines the weights also go where ``GEOPRELABEL_ARTIFACTS`` says, else to MLflow's server if there is one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from .errors import BadScene, BadWeights, RegistryError, UnknownVersion
from .flight import IMPORTING
from .settings import Settings
from .stores import store_at

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.entities.model_registry import RegisteredModel
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

CHAMPION = "champion"
CHALLENGER = "challenger"
HEADS_FILE = "heads.safetensors"
PENDING = "pending"
"""Tag of a version until an alias points to it: a publisher that was killed in between leaves one that nobody sees."""

PROGRESS_EVERY_S = 2.0
_PREFIX = "geoprelabel-project-"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One set of weights that a project's labels made."""

    name: str
    """What Label Studio sees as ``model_version``."""

    project: str
    """Label Studio's project key, ``<id>.<created>``."""

    number: int
    """Counts a project's versions from 1."""

    heads_path: Path
    """The weights, a safetensors file."""

    is_champion: bool
    """Whether this one is live."""

    created: datetime
    """When it was registered, UTC."""

    parent: str = ""
    """Name of the version that was live when it was trained."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What training measured on held-out tiles."""

    tags: Mapping[str, str] = field(default_factory=dict)
    """Lineage: annotation ids, data hash, code version, judged blocks, why it was or was not promoted."""

    sha256: str = ""
    """Of the weights as registered; empty for those of the first release."""

    run_id: str = ""
    """MLflow's run that made it."""

    def check(self) -> None:
        """Raise BadWeights unless the weights are there as they were registered."""
        try:
            found = _sha256(self.heads_path)
        except OSError as error:
            raise BadWeights(f"{self.heads_path} cannot be read: {error.strerror}") from error
        if self.sha256 and found != self.sha256:
            raise BadWeights(
                f"{self.heads_path} is damaged: its sha256 is {found[:8]}…, and {self.sha256[:8]}… was registered"
            )


class TrainingRun:
    """A training as MLflow's own pages show it. What cannot be noted there is logged, and training goes on."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        """See `Registry.recorded`, which makes them."""
        self._client = client
        self.run_id = run_id
        self._begun = self._noted = time.monotonic()

    def progress(self, done: float, message: str) -> None:
        """The share done, 0…1, by the second; every two seconds at most, as each is a commit."""
        now = time.monotonic()
        if now - self._noted >= PROGRESS_EVERY_S:
            self._noted = now
            self._note(metrics={"progress": done}, tags={"stage": message}, step=round(now - self._begun))

    def figures(self, values: Mapping[str, Any]) -> None:
        """Numbers by name; of nested ones, and of lists by ``label``, the names are joined."""
        self._note(metrics=dict(_numbers(values)))

    def params(self, values: Mapping[str, Any]) -> None:
        """What the training was given."""
        self._note(params={name: str(value)[:500] for name, value in values.items()})

    def end(self, status: str, why: str = "") -> None:
        """Close it, as ``FINISHED`` or ``FAILED``."""
        self._note(tags={"mlflow.note.content": why[:5000]})
        try:
            self._client.set_terminated(self.run_id, status)
        except RegistryError as error:
            log.warning("MLflow run %s: %s", self.run_id, error)

    def _note(
        self,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now_ms = int(time.time() * 1000)
        try:
            self._client.log_batch(
                self.run_id,
                metrics=[Metric(name, value, now_ms, step) for name, value in (metrics or {}).items()],
                params=[Param(name, value) for name, value in (params or {}).items()],
                tags=[RunTag(name, value) for name, value in (tags or {}).items()],
            )
        except RegistryError as error:
            log.warning("MLflow run %s: %s", self.run_id, error)


class Registry:
    """The versions of all projects. Safe to use from several processes at once."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened or written before the first use."""
        self._model_dir = settings.model_dir.absolute()
        self._database = self._model_dir / "mlflow.db"
        self._is_local = not settings.mlflow_tracking_uri
        self._uri = settings.mlflow_tracking_uri or f"sqlite:///{self._database}"
        self._artifacts = settings.artifacts

    @property
    def is_empty(self) -> bool:
        """Whether it is certain, without asking MLflow, that nothing was ever registered."""
        return self._is_local and not self._database.exists()

    def fingerprint(self) -> object:
        """A value that changes when the local database does; a fresh one each time for a registry elsewhere."""
        if not self._is_local:
            return object()
        try:
            stat = self._database.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size

    @cached_property
    def _client(self) -> MlflowClient:
        # Half a second of import and, the first time, the making of the tables: never at start, one process at a time.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Else a server's address goes to standard output, into the midst of what --json prints.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        with IMPORTING:
            import sqlalchemy  # noqa: F401 - which MLflow imports later, for a local database
            from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._model_dir.mkdir(parents=True, exist_ok=True)
        uri = _without_login(self._uri)
        with FileLock(self._model_dir / "mlflow.lock"), _told(uri):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_registered_models(max_results=1)
        return cast("MlflowClient", _Told(client, uri))

    def champions(self) -> dict[str, ModelVersion]:
        """The live version of each project that has one."""
        return {version.project: version for version in self.versions() if version.is_champion}

    def versions(self, project: str | None = None) -> list[ModelVersion]:
        """All versions of a project, or of all projects, newest first."""
        if self.is_empty:
            return []
        wanted = f"LIKE '{_PREFIX}%'" if project is None else f"= '{_model_name(project)}'"
        found = [version for model in self._models(wanted) for version in self._versions_of(model)]
        return sorted(found, key=lambda version: (version.created, version.number), reverse=True)

    def get(self, project: str, name: str) -> ModelVersion:
        """The version of that name. Raises UnknownVersion with the names there are."""
        versions = self.versions(project)
        for version in versions:
            if version.name == name:
                return version
        known = ", ".join(v.name for v in versions) or "none was trained yet"
        raise UnknownVersion(f"project {project} has no model version {name!r}; it has: {known}")

    @contextmanager
    def recorded(self, project: str) -> Iterator[TrainingRun]:
        """A run of MLflow's that lasts as long as the training; one that a killed process left open is closed first."""
        name = _model_name(project)
        experiment = self._experiment(name)
        for dead in self._client.search_runs([experiment], "attributes.status = 'RUNNING'"):
            self._client.set_terminated(dead.info.run_id, "KILLED")
        run_id = self._client.create_run(experiment, tags={"project": project}).info.run_id
        run = TrainingRun(self._client, run_id)
        try:
            yield run
        except Exception as error:
            run.end("FAILED", str(error) or repr(error))
            raise
        run.end("FINISHED")

    def publish(
        self,
        project: str,
        name: str,
        heads: Path,
        *,
        parent: str,
        metrics: Mapping[str, Any],
        tags: Mapping[str, str],
        promote: bool,
        run_id: str = "",
    ) -> ModelVersion:
        """Register weights under ``name`` and, with ``promote``, make them live. The file ``heads`` is copied.

        The file is whole before the registry hears of it, and a version is seen once an alias points to it: a process
        killed in between leaves nothing that anybody loads, and publishing the same again goes on from there.
        """
        sha256 = _sha256(heads)
        folder = self._folder(name)
        _copy_whole(heads, folder / HEADS_FILE)
        source = folder.as_uri()
        if self._artifacts:
            try:
                store_at(self._artifacts).put(f"{folder.name}/{HEADS_FILE}", heads.read_bytes())
            except BadScene as error:
                raise RegistryError(f"the weights of {name} cannot be kept (GEOPRELABEL_ARTIFACTS): {error}") from error
        if "://" in self._artifacts:
            source = f"{self._artifacts}/{folder.name}/{HEADS_FILE}"
        elif not self._is_local and run_id:
            # A server of MLflow's takes no folder of another machine for a source.
            self._client.log_artifact(run_id, str(heads.absolute()))
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{heads.name}"
        model_name = _model_name(project)
        if not any(self._models(f"= '{model_name}'")):
            self._client.create_registered_model(model_name, tags={"project": project})
        noted = {"name": name, "parent": parent, "metrics": json.dumps(metrics), "sha256": sha256, **tags}
        number = next((str(v.version) for v in self._listed(model_name) if _is_pending(v, name)), None)
        if number is None:
            created = self._client.create_model_version(
                model_name, source=source, run_id=run_id or None, tags={**noted, PENDING: "1"}
            )
            number = str(created.version)
        else:
            for tag, value in noted.items():
                self._client.set_model_version_tag(model_name, number, tag, value)
        self._aim(model_name, CHAMPION if promote else CHALLENGER, number)
        self._client.delete_model_version_tag(model_name, number, PENDING)
        log.info("published %s for project %s as %s", name, project, CHAMPION if promote else CHALLENGER)
        return self.get(project, name)

    def obtain(self, version: ModelVersion) -> None:
        """Fetch the weights of a version that another machine made, where they are not here; failing is logged."""
        if version.heads_path.exists() or not (self._artifacts or (version.run_id and not self._is_local)):
            return
        try:
            with tempfile.TemporaryDirectory(prefix="geoprelabel-weights-") as scratch:
                _copy_whole(self._fetched(version, Path(scratch)), version.heads_path)
        except (RegistryError, BadScene, OSError) as error:
            log.warning("the weights of %s cannot be fetched: %s", version.name, error)

    def _fetched(self, version: ModelVersion, scratch: Path) -> Path:
        if not self._artifacts:
            return Path(self._client.download_artifacts(version.run_id, HEADS_FILE, str(scratch)))
        content = store_at(self._artifacts).get(f"{version.heads_path.parent.name}/{HEADS_FILE}")
        if content is None:
            raise RegistryError(f"{self._artifacts} (GEOPRELABEL_ARTIFACTS) does not hold them")
        fetched = scratch / HEADS_FILE
        fetched.write_bytes(content)
        return fetched

    def activate(self, project: str, name: str) -> ModelVersion:
        """Make that version live; the one before stays and can be activated again. Raises UnknownVersion, BadWeights.

        BadWeights where its file is damaged.
        """
        version = self.get(project, name)
        self.obtain(version)
        version.check()
        model_name = _model_name(project)
        self._aim(model_name, CHAMPION, str(version.number))
        if str(next(self._models(f"= '{model_name}'")).aliases.get(CHALLENGER)) == str(version.number):
            self._client.delete_registered_model_alias(model_name, CHALLENGER)
        return self.get(project, name)

    def deactivate(self, project: str) -> None:
        """Go back to the shipped weights; all versions stay."""
        self._aim(_model_name(project), CHAMPION, None)

    def _aim(self, model_name: str, alias: str, number: str | None) -> None:
        """Have an alias point to a version, or to none. The one that it leaves is still seen.

        A process that was killed once its version was live has not taken the mark off that hides versions.
        """
        left = next((model.aliases.get(alias) for model in self._models(f"= '{model_name}'")), None)
        if left is not None and str(left) != number:
            self._client.delete_model_version_tag(model_name, str(left), PENDING)
        if number is not None:
            self._client.set_registered_model_alias(model_name, alias, number)
        elif left is not None:
            self._client.delete_registered_model_alias(model_name, alias)

    def rollback(self, project: str) -> str:
        """Make the version before the live one live; its name, or an empty text where the shipped weights are live now.

        Before means: its parent. Raises UnknownVersion where no version of the project is live.
        """
        live = self.champions().get(project)
        if live is None:
            raise UnknownVersion(f"project {project} has no live version of its own; the shipped model serves it")
        if any(version.name == live.parent for version in self.versions(project)):
            return self.activate(project, live.parent).name
        self.deactivate(project)
        return ""

    def key(self, project: str) -> str:
        """The whole key ``<id>.<created>`` of a project given by its key or number. Raises UnknownVersion."""
        keys = sorted({version.project for version in self.versions()})
        found = [key for key in keys if project in (key, key.split(".")[0])]
        if len(found) != 1:
            raise UnknownVersion(
                f"project {project!r} is not one of those with versions: {', '.join(keys) or 'none yet'}"
            )
        return found[0]

    def _folder(self, name: str) -> Path:
        return self._model_dir / "versions" / re.sub(r"[^A-Za-z0-9._-]", "_", name)

    def _experiment(self, name: str) -> str:
        """Id of the project's experiment, made or brought back where it has to be."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # Without a server of MLflow's, artifacts would go into the folder that this process happens to run in.
            is_server = self._uri.startswith("http")
            return str(self._client.create_experiment(name, None if is_server else self._artifacts_uri()))
        if found.lifecycle_stage != "active":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _artifacts_uri(self) -> str:
        return (self._model_dir / "artifacts").as_uri()

    def _models(self, name_is: str) -> Iterator[RegisteredModel]:
        return _all_pages(
            lambda token: self._client.search_registered_models(f"name {name_is}", max_results=500, page_token=token)
        )

    def _listed(self, model_name: str) -> Iterator[MlflowVersion]:
        return _all_pages(
            lambda token: self._client.search_model_versions(f"name='{model_name}'", max_results=1000, page_token=token)
        )

    def _versions_of(self, model: RegisteredModel) -> Iterator[ModelVersion]:
        aliased = {str(number): alias for alias, number in sorted(model.aliases.items())}  # the champion's counts
        for version in self._listed(model.name):
            alias = aliased.get(str(version.version), "")
            if alias or PENDING not in version.tags:
                yield self._read(version, alias)

    def _read(self, version: MlflowVersion, alias: str) -> ModelVersion:
        tags = dict(version.tags)
        tags.pop(PENDING, None)
        name = tags.pop("name", f"{version.name}-{version.version}")
        return ModelVersion(
            name=name,
            project=version.name.removeprefix(_PREFIX),
            number=int(version.version),
            heads_path=self._folder(name) / HEADS_FILE,
            is_champion=alias == CHAMPION,
            created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            parent=tags.pop("parent", ""),
            metrics=json.loads(tags.pop("metrics", "{}")),
            sha256=tags.pop("sha256", ""),
            run_id=version.run_id or "",
            tags=tags,
        )


class _Told:
    """MLflow's client, which says what went wrong as a `RegistryError`."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client = client
        self._uri = uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with _told(self._uri):
                return getattr(self._client, name)(*given, **named)

        return call


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Raise RegistryError for what MLflow and its database raise: the first line, as the rest is SQL."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        first = str(error).partition("\n")[0][:300]
        where = re.sub("//[^/@]*@", "//", uri)
        raise RegistryError(f"the model registry at {where} (MLFLOW_TRACKING_URI) failed: {first}") from error


def _without_login(uri: str) -> str:
    """A server's address without user and password. MLflow gets them as its own variables: its errors say addresses."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _all_pages(page_after: Callable[[str | None], Any]) -> Iterator[Any]:
    """What MLflow lists, page by page; ``page_after`` is given the token of the page before."""
    token: str | None = None
    while True:
        page = page_after(token)
        yield from page
        token = page.token
        if not token:
            return


def _model_name(project: str) -> str:
    return _PREFIX + re.sub(r"[^A-Za-z0-9._-]", "_", project)


def _is_pending(version: MlflowVersion, name: str) -> bool:
    return PENDING in version.tags and version.tags.get("name") == name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _copy_whole(source: Path, target: Path) -> None:
    """The same file under another name, there whole or not at all, even where the power fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".new-", delete=False) as scratch:
        try:
            scratch.write(source.read_bytes())
            scratch.flush()
            os.fsync(scratch.fileno())
            os.replace(scratch.name, target)
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names that MLflow takes, and finite numbers."""
    for name, value in values.items():
        whole = prefix + re.sub(r"[^\w.\- ]", "_", str(name))
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{whole}/")
        elif isinstance(value, (list, tuple)):
            named = {str(one["label"]): one for one in value if isinstance(one, Mapping) and "label" in one}
            yield from _numbers(named, f"{whole}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield whole, float(value)
