"""Model versions of each project, kept by MLflow: which weights there are, where they came from, which one is live.

A version's files lie in ``MODEL_DIR/versions/<name>/`` and appear whole, by one rename. The MLflow registry (a SQLite
file in MODEL_DIR, or any server by ``MLFLOW_TRACKING_URI``) holds the rest: metrics, lineage tags, and the aliases
``champion`` (live) and ``challenger`` (the newest that is not).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from .errors import UnknownVersion
from .settings import Settings

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

CHAMPION = "champion"
CHALLENGER = "challenger"
HEADS_FILE = "heads.safetensors"
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
    """Lineage: annotation ids, data hash, code version, why it was or was not promoted."""


class Registry:
    """The versions of all projects. Safe to use from several processes at once."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened or written before the first use."""
        self._model_dir = settings.model_dir.absolute()
        self._database = self._model_dir / "mlflow.db"
        self._is_local = not settings.mlflow_tracking_uri
        self._uri = settings.mlflow_tracking_uri or f"sqlite:///{self._database}"

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
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._model_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self._model_dir / "mlflow.lock"):
            client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
            client.search_registered_models(max_results=1)
        return client

    def champions(self) -> dict[str, ModelVersion]:
        """The live version of each project that has one."""
        if self.is_empty:
            return {}
        found: dict[str, ModelVersion] = {}
        token: str | None = None
        while True:
            page = self._client.search_registered_models(
                filter_string=f"name LIKE '{_PREFIX}%'", max_results=500, page_token=token
            )
            for model in page:
                if CHAMPION in model.aliases:
                    version = self._read(self._client.get_model_version(model.name, model.aliases[CHAMPION]), CHAMPION)
                    found[version.project] = version
            token = page.token
            if not token:
                return found

    def versions(self, project: str | None = None) -> list[ModelVersion]:
        """All versions of a project, or of all projects, newest first."""
        if self.is_empty:
            return []
        if project is None:
            models = self._client.search_registered_models(filter_string=f"name LIKE '{_PREFIX}%'", max_results=1000)
            found = [v for model in models for v in self.versions(model.name.removeprefix(_PREFIX))]
            return sorted(found, key=lambda v: v.created, reverse=True)
        model_name = _model_name(project)
        aliases = self._aliases(model_name)
        listed = self._client.search_model_versions(f"name='{model_name}'", max_results=1000)
        found = [self._read(v, CHAMPION if aliases.get(CHAMPION) == str(v.version) else "") for v in listed]
        return sorted(found, key=lambda v: v.number, reverse=True)

    def get(self, project: str, name: str) -> ModelVersion:
        """The version of that name. Raises UnknownVersion with the names there are."""
        versions = self.versions(project)
        for version in versions:
            if version.name == name:
                return version
        known = ", ".join(v.name for v in versions) or "none was trained yet"
        raise UnknownVersion(f"project {project} has no model version {name!r}; it has: {known}")

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
    ) -> ModelVersion:
        """Register weights under ``name`` and, with ``promote``, make them live. The file ``heads`` is copied.

        The files are whole before the registry hears of them, and the registry knows them before the alias moves: a
        process killed in between leaves at most files that nobody refers to.
        """
        folder = self._store(name, heads)
        model_name = _model_name(project)
        if not self._has_model(model_name):
            self._client.create_registered_model(model_name, tags={"project": project})
        created = self._client.create_model_version(
            model_name,
            source=folder.as_uri(),
            tags={"name": name, "parent": parent, "metrics": json.dumps(metrics), **tags},
        )
        self._client.set_registered_model_alias(model_name, CHAMPION if promote else CHALLENGER, created.version)
        log.info("published %s for project %s as %s", name, project, CHAMPION if promote else CHALLENGER)
        return self._read(created, CHAMPION if promote else "")

    def activate(self, project: str, name: str) -> ModelVersion:
        """Make that version live; the one before stays and can be activated again."""
        version = self.get(project, name)
        self._client.set_registered_model_alias(_model_name(project), CHAMPION, str(version.number))
        return self.get(project, name)

    def deactivate(self, project: str) -> None:
        """Go back to the shipped weights; all versions stay."""
        self._client.delete_registered_model_alias(_model_name(project), CHAMPION)

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

    def _store(self, name: str, heads: Path) -> Path:
        folder = self._model_dir / "versions" / re.sub(r"[^A-Za-z0-9._-]", "_", name)
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
            shutil.copy2(heads, Path(scratch) / HEADS_FILE)
            try:
                Path(scratch).rename(folder)
            except OSError:
                if not folder.exists():
                    raise
            else:
                Path(scratch).mkdir()  # for TemporaryDirectory to remove
        return folder

    def _has_model(self, model_name: str) -> bool:
        return bool(self._client.search_registered_models(filter_string=f"name = '{model_name}'"))

    def _aliases(self, model_name: str) -> dict[str, str]:
        found = self._client.search_registered_models(filter_string=f"name = '{model_name}'")
        return {alias: str(number) for alias, number in found[0].aliases.items()} if found else {}

    def _read(self, version: MlflowVersion, alias: str) -> ModelVersion:
        tags = dict(version.tags)
        name = tags.pop("name", f"{version.name}-{version.version}")
        folder = self._model_dir / "versions" / re.sub(r"[^A-Za-z0-9._-]", "_", name)
        return ModelVersion(
            name=name,
            project=version.name.removeprefix(_PREFIX),
            number=int(version.version),
            heads_path=folder / HEADS_FILE,
            is_champion=alias == CHAMPION,
            created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            parent=tags.pop("parent", ""),
            metrics=json.loads(tags.pop("metrics", "{}")),
            tags=tags,
        )


def _model_name(project: str) -> str:
    return _PREFIX + re.sub(r"[^A-Za-z0-9._-]", "_", project)
