"""What training learns from: a project's annotations, kept on this side of the wire.

Webhooks write into it as annotators save; before each run, and when a server starts, it is reconciled with Label
Studio, which has the last word. So an event that got lost, a restart, or an annotation that was changed or deleted
while nobody listened makes no difference. It is a SQLite file in the data folder, or the database that
GEOPRELABEL_DATABASE_URL names; any number of processes may use it at once.

Each row says when it was last heard of (``seen``). What a reconciliation brings replaces everything from before it
began. What came by webhook since then is newer than the pages that were read, and stays.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .database import WAIT_S, Database, DatabaseError, execute, load_library
from .findings import digest_of, version_of
from .problems import Problems
from .settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

log = logging.getLogger(__name__)

Json = dict[str, Any]
Answer = TypeVar("Answer")

_BATCH = 50
"""Tasks that are written, or read, in one transaction: others wait for no more than that."""

_GLANCE_S = 0.2
"""Wait for another process's write within an annotator's save."""

_PAUSE_S = 30.0
"""After an event that could not be written no other is tried for so long: each would hold up a save."""

_ANNOTATION_FIELDS = (
    "id", "result", "was_cancelled", "ground_truth", "created_at", "updated_at", "completed_by", "lead_time",
    "parent_prediction",
)  # fmt: skip
_PREDICTION_FIELDS = ("id", "result", "score", "model_version", "created_at")

_TABLES = (
    "CREATE TABLE IF NOT EXISTS project (project TEXT PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS task (project TEXT, id BIGINT, seen DOUBLE PRECISION NOT NULL, data TEXT NOT NULL,"
    " predictions TEXT, PRIMARY KEY (project, id))",
    "CREATE TABLE IF NOT EXISTS annotation (project TEXT, id BIGINT, seen DOUBLE PRECISION NOT NULL, task BIGINT NOT"
    " NULL, version DOUBLE PRECISION NOT NULL, digest TEXT NOT NULL, is_submitted BOOLEAN NOT NULL, is_deleted BOOLEAN"
    " NOT NULL, body TEXT NOT NULL, PRIMARY KEY (project, id))",
    "CREATE INDEX IF NOT EXISTS annotation_of_task ON annotation (project, task)",
)
_PUT_PROJECT = "INSERT INTO project (project) VALUES (:project) ON CONFLICT DO NOTHING"
# Events hold no predictions: what Label Studio said of them earlier stays.
_PUT_TASK = (
    "INSERT INTO task (project, id, seen, data, predictions) VALUES (:project, :id, :seen, :data, :predictions)"
    " ON CONFLICT (project, id) DO UPDATE SET seen = excluded.seen, data = excluded.data,"
    " predictions = coalesce(excluded.predictions, task.predictions)"
)
_PUT_ANNOTATION = (
    "INSERT INTO annotation (project, id, seen, task, version, digest, is_submitted, is_deleted, body)"
    " VALUES (:project, :id, :seen, :task, :version, :digest, :is_submitted, :is_deleted, :body)"
    " ON CONFLICT (project, id) DO UPDATE SET seen = excluded.seen, task = excluded.task, version = excluded.version,"
    " digest = excluded.digest, is_submitted = excluded.is_submitted, is_deleted = excluded.is_deleted,"
    " body = excluded.body WHERE "
)
_NOTE_ANNOTATION = (
    _PUT_ANNOTATION + "excluded.is_deleted OR (NOT annotation.is_deleted AND excluded.version >= annotation.version)"
)
_RECONCILE_ANNOTATION = (
    _PUT_ANNOTATION
    + "annotation.seen < :began OR (NOT annotation.is_deleted AND excluded.version > annotation.version)"
)
_DELETE_OF_TASK = (
    "UPDATE annotation SET is_deleted = TRUE, is_submitted = FALSE, seen = :seen"
    " WHERE project = :project AND task = :id"
)
_PAGE = (
    "SELECT id, data, predictions FROM task WHERE project = :project AND id > :above AND EXISTS (SELECT 1 FROM"
    " annotation WHERE annotation.project = task.project AND annotation.task = task.id AND is_submitted)"
    " AND (seen >= :since OR EXISTS (SELECT 1 FROM annotation WHERE annotation.project = task.project"
    " AND annotation.task = task.id AND annotation.seen >= :since)) ORDER BY id LIMIT :count"
)
_TASK_IDS = "SELECT DISTINCT task FROM annotation WHERE project = :project AND is_submitted ORDER BY task"
_KNOWN_PREDICTIONS = "SELECT predictions FROM task WHERE project = :project AND id = :id"
_TELL_PREDICTIONS = "UPDATE task SET predictions = :predictions, seen = :seen WHERE project = :project AND id = :id"
_DRAWN = (
    "SELECT task, body FROM annotation WHERE project = :project AND task BETWEEN :first AND :last AND NOT is_deleted"
    " ORDER BY id"
)


JournalError = DatabaseError
"""The journal's database is missing, full, damaged or not to be reached."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What Label Studio knew better, in submitted annotations."""

    added: int = 0
    """Annotations whose event never came."""

    updated: int = 0
    dropped: int = 0
    """Annotations that were deleted, or skipped after all."""

    kept: int = 0
    """Annotations that were known as they are."""

    @property
    def changes(self) -> int:
        """How many annotations are not as the journal had them."""
        return self.added + self.updated + self.dropped


class Journal:
    """The annotations of all projects. Raises JournalError where its database cannot be used, but for `note`."""

    def __init__(self, settings: Settings, database: Database | None = None) -> None:
        """Nothing is opened or written before the first use."""
        self._settings = settings
        self.database = database or Database(settings)
        self._problems = Problems(settings.data_dir)
        self._paused_until = 0.0
        self._missed: Counter[str] = Counter()
        self._missed_lock = threading.Lock()

    @property
    def has_missed(self) -> bool:
        """Whether this process had an event that it could not write down, and `reconcile` has not made up for it."""
        return bool(self._missed)

    @property
    def missed(self) -> dict[str, int]:
        """How many events of each project those are."""
        with self._missed_lock:
            return dict(self._missed)

    def miss(self, project: str) -> None:
        """Remember that an event of the project could not be written down."""
        with self._missed_lock:
            self._missed[project] += 1

    def made_up_for(self, missed: Mapping[str, int]) -> None:
        """Forget so many; what was missed meanwhile stays."""
        with self._missed_lock:
            self._missed -= Counter(missed)

    @property
    def is_empty(self) -> bool:
        """Whether it is certain, without opening it, that nothing was ever written."""
        return self.database.is_missing

    def note(self, project: str, payload: Mapping[str, Any]) -> None:
        """Write down a webhook event. Never raises: Label Studio keeps what is missed here, and `reconcile` gets it."""
        if time.monotonic() < self._paused_until:
            self.miss(project)
            return
        try:
            self._do(lambda base: _write_event(base, project, payload), wait_s=_GLANCE_S)
        except Exception as error:
            if not isinstance(error, JournalError):
                log.exception("an event of project %s could not be written down", project)
            self.miss(project)
            self._paused_until = time.monotonic() + _PAUSE_S
            self._problems.add(f"journal, project {project}", f"{error}; the next training asks Label Studio instead")

    def reconcile(self, project: str, tasks: Iterable[Mapping[str, Any]]) -> Reconciled:
        """Make the journal say what Label Studio says: ``tasks`` are all of a project's tasks that have annotations.

        Where ``tasks`` raises on its way, what came before is kept and nothing is dropped.
        """
        began, counts = time.time(), {"added": 0, "updated": 0, "kept": 0}
        remaining = (task for task in tasks if _number(task.get("id")) is not None)
        self._do(lambda base: execute(base, _PUT_PROJECT, {"project": project}))
        while batch := list(itertools.islice(remaining, _BATCH)):
            written = self._do(functools.partial(_write_batch, project=project, batch=batch, began=began))
            for name, count in written.items():
                counts[name] += count
        dropped = self._do(functools.partial(_sweep, project=project, began=began))
        return Reconciled(**counts, dropped=dropped)

    def tasks(self, project: str, *, since: float = 0.0) -> Iterator[Json]:
        """Tasks with a submitted annotation, by id, as Label Studio exports them; a few in memory at a time.

        ``since`` leaves out those of which nothing was heard from then on, in seconds since 1970.

        With ``id``, ``data``, ``annotations`` (skipped ones too) and the ``predictions`` that Label Studio had when it
        was last asked.
        """
        last_id = -1
        while not self.is_empty:
            page = self._do(functools.partial(_read_page, project=project, above=last_id, since=since))
            if not page:
                return
            yield from page
            last_id = page[-1]["id"]

    def task_ids(self, project: str) -> list[int]:
        """Numbers of the tasks with a submitted annotation."""
        if self.is_empty:
            return []
        return self._do(lambda base: [int(task) for (task,) in execute(base, _TASK_IDS, {"project": project})])

    def lacks_predictions(self, project: str, task: int) -> bool:
        """Whether annotations of a task began from a prediction that is not known, or nothing is known of it."""

        def look(base: Connection) -> bool:
            told = execute(base, _KNOWN_PREDICTIONS, {"project": project, "id": task}).scalar_one_or_none()
            drawn = execute(base, _DRAWN, {"project": project, "first": task, "last": task})
            named = {_number(json.loads(body).get("parent_prediction")) for _, body in drawn} - {None}
            return bool(told is None or named - {prediction["id"] for prediction in json.loads(told)})

        return not self.is_empty and _number(task) is not None and self._do(look)

    def tell_predictions(self, project: str, task: int, predictions: Any) -> None:
        """Put in what Label Studio says of a task's predictions, where the task is known."""
        row = _task_row(project, {"id": task, "predictions": predictions})
        values = {name: row[name] for name in ("project", "id", "seen", "predictions")}
        self._do(lambda base: execute(base, _TELL_PREDICTIONS, values))

    def projects(self) -> list[str]:
        """Keys of the projects that were ever heard of."""
        if self.is_empty:
            return []
        return self._do(lambda base: [key for (key,) in execute(base, "SELECT project FROM project ORDER BY project")])

    def forget(self, project: str) -> None:
        """Leave nothing of a project."""

        def write(base: Connection) -> None:
            for table in ("project", "task", "annotation"):
                execute(base, f"DELETE FROM {table} WHERE project = :project", {"project": project})

        if not self.is_empty:
            self._do(write)
            if self.database.is_sqlite:
                # It still stands in the log of what was written.
                with self.database.engine.connect() as base:
                    execute(base, "PRAGMA wal_checkpoint(TRUNCATE)")

    def warm_up(self) -> None:
        """Load the database's library now, which would hold up the first event."""
        load_library()

    def close(self) -> None:
        """Let go of all connections; the next use makes new ones."""
        self.database.close()

    def _do(self, work: Callable[[Connection], Answer], *, wait_s: float = WAIT_S) -> Answer:
        return self.database.do(work, tables=_TABLES, wait_s=wait_s)


def _write_event(base: Connection, project: str, payload: Mapping[str, Any]) -> None:
    action, tasks, made = payload.get("action"), _objects(payload, "task"), _objects(payload, "annotation")
    execute(base, _PUT_PROJECT, {"project": project})
    if action in ("ANNOTATIONS_DELETED", "ANNOTATION_DELETED"):
        # Their rows stay as a sign, so that a reconciliation that is under way does not bring them back.
        gone = [_annotation_row(project, 0, each, is_deleted=True) for each in made + _objects(payload, "annotations")]
        _put(base, _NOTE_ANNOTATION, gone)
    elif action == "TASKS_DELETED":
        gone = [{"project": project, "id": task["id"], "seen": time.time()} for task in _objects(payload, "tasks")]
        _put(base, _DELETE_OF_TASK, gone)
    elif action in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED"):
        made = [a for a in made if _number(a.get("task")) is not None and isinstance(a.get("result"), list)]
        _put(base, _PUT_TASK, [_task_row(project, task) for task in tasks if isinstance(task.get("data"), Mapping)])
        _put(base, _NOTE_ANNOTATION, [_annotation_row(project, a["task"], a) for a in made])


def _write_batch(base: Connection, *, project: str, batch: Sequence[Mapping[str, Any]], began: float) -> dict[str, int]:
    """Write what Label Studio said of some tasks; how many submitted annotations are new, changed and as they were."""
    from sqlalchemy import bindparam, text

    rows = [_annotation_row(project, task["id"], a) for task in batch for a in _objects(task, "annotations")]
    find = text("SELECT id, digest, is_submitted FROM annotation WHERE project = :project AND id IN :ids")
    found = base.execute(
        find.bindparams(bindparam("ids", expanding=True)), {"project": project, "ids": [row["id"] for row in rows]}
    )
    known = {number: (digest, is_submitted) for number, digest, is_submitted in found}
    counted = {"added": 0, "updated": 0, "kept": 0}
    for row in rows:
        digest, was_submitted = known.get(row["id"], ("", False))
        outcome = "kept" if digest == row["digest"] else "updated" if digest else "added"
        counted[outcome] += bool(row["is_submitted"] or (outcome == "updated" and was_submitted))
    _put(base, _PUT_TASK, [_task_row(project, task) for task in batch])
    _put(base, _RECONCILE_ANNOTATION, [{**row, "began": began} for row in rows])
    return counted


def _sweep(base: Connection, *, project: str, began: float) -> int:
    """Drop what Label Studio did not name; how many submitted annotations that were."""
    old = {"project": project, "began": began}
    is_old = "WHERE project = :project AND seen < :began"
    dropped = execute(base, f"SELECT count(*) FROM annotation {is_old} AND is_submitted", old).scalar_one()
    execute(base, f"DELETE FROM annotation {is_old}", old)
    execute(base, f"DELETE FROM task {is_old}", old)
    return int(dropped)


def _read_page(base: Connection, *, project: str, above: int, since: float) -> list[Json]:
    page = {
        number: {"id": number, "data": json.loads(data), "annotations": [], "predictions": json.loads(made or "[]")}
        for number, data, made in execute(
            base, _PAGE, {"project": project, "above": above, "since": since, "count": _BATCH}
        )
    }
    if page:
        span = {"project": project, "first": min(page), "last": max(page)}
        for number, body in execute(base, _DRAWN, span):
            if number in page:
                page[number]["annotations"].append(json.loads(body))
    return list(page.values())


def _put(base: Connection, statement: str, rows: Sequence[Json]) -> None:
    if rows:
        execute(base, statement, rows)


def _annotation_row(project: str, task: int, annotation: Mapping[str, Any], *, is_deleted: bool = False) -> Json:
    return {
        "project": project,
        "id": annotation["id"],
        "seen": time.time(),
        "task": task,
        "version": version_of(annotation),
        "digest": digest_of(annotation),
        "is_submitted": not is_deleted and not annotation.get("was_cancelled"),
        "is_deleted": is_deleted,
        "body": json.dumps({name: annotation[name] for name in _ANNOTATION_FIELDS if name in annotation}),
    }


def _task_row(project: str, task: Mapping[str, Any]) -> Json:
    known = task.get("predictions")
    kept = [{name: p[name] for name in _PREDICTION_FIELDS if name in p} for p in _objects(task, "predictions")]
    return {
        "project": project,
        "id": task["id"],
        "seen": time.time(),
        "data": json.dumps(task.get("data") or {}),
        "predictions": json.dumps(kept) if isinstance(known, list) else None,
    }


def _objects(holder: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects with a number of a list, or the one object."""
    value = holder.get(name)
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, Mapping) and _number(item.get("id")) is not None]


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None
