"""Desk: what is asked of each project's training, how it stands, and who is at work on it.

Two that can do the same: `Files` of the data folder, for the server processes of one machine, and `Rows` of the shared
database, for servers that have nothing else in common. A record is a JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from .database import Database, DatabaseError, execute, now_s
from .whole import write_json

if TYPE_CHECKING:
    from sqlalchemy import Connection

log = logging.getLogger(__name__)

Record = dict[str, Any]
Answer = TypeVar("Answer")

LEASE_S = 20.0
"""Who holds a project in the database says at least so often that it still does; one that is silent has lost it."""

_WAIT_S = 5.0
_HASTE_S = 0.05
_GLANCE_S = 0.2
"""Wait for another's write within an annotator's save."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS training (project TEXT, kind TEXT, record TEXT NOT NULL, PRIMARY KEY (project, kind))",
    "CREATE TABLE IF NOT EXISTS training_holder (project TEXT PRIMARY KEY, holder TEXT NOT NULL,"
    " until DOUBLE PRECISION NOT NULL)",
)
_RELEASE = "DELETE FROM training_holder WHERE project = :project AND holder = :me"


class Held(Exception):
    """Another process is at work on the project."""


class Desk(Protocol):
    """Records of projects by kind, and one holder a project."""

    def read(self, project: str, kind: str) -> Record:
        """The record; empty where there is none, or none that can be read."""

    def write(self, project: str, kind: str, record: Record) -> None:
        """Put a record in place of what there was."""

    def change(self, project: str, kind: str, change: Callable[[Record], Record], *, is_hasty: bool = False) -> Record:
        """Put in place of a record what ``change`` makes of it, with nobody in between; gives that.

        ``is_hasty`` where an annotator's save waits for it. Raises Timeout then, where somebody else is at it for long.
        """

    def projects(self, kind: str) -> list[str]:
        """Projects that have such a record."""

    @contextmanager
    def held(self, project: str, *, wait_s: float) -> Iterator[None]:
        """Be the one process that is at work on the project. Raises Held where another is, for all of ``wait_s``."""

    def is_held(self, project: str) -> bool:
        """Whether a process that lives is at work on the project."""

    def forget(self, project: str) -> None:
        """Leave nothing of a project."""


class Files:
    """Small files in a folder; the system takes the lock from a process that dies."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before the first record."""
        self._folder = folder

    def read(self, project: str, kind: str) -> Record:
        return _read(self._path(project, kind))

    def write(self, project: str, kind: str, record: Record) -> None:
        write_json(self._path(project, kind), record)

    def change(self, project: str, kind: str, change: Callable[[Record], Record], *, is_hasty: bool = False) -> Record:
        path = self._path(project, kind)
        with FileLock(f"{path}.lock", timeout=_HASTE_S if is_hasty else -1, poll_interval=_HASTE_S / 10):
            record = change(_read(path))
            self.write(project, kind, record)
        return record

    def projects(self, kind: str) -> list[str]:
        ending = f".{kind}.json"
        return sorted(path.name.removesuffix(ending) for path in self._folder.glob(f"*{ending}"))

    @contextmanager
    def held(self, project: str, *, wait_s: float) -> Iterator[None]:
        lock = FileLock(self._path(project, "lock", ""))
        try:
            lock.acquire(timeout=wait_s)
        except Timeout as error:
            raise Held from error
        try:
            yield
        finally:
            lock.release()

    def is_held(self, project: str) -> bool:
        path = self._path(project, "lock", "")
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    def forget(self, project: str) -> None:
        for path in self._folder.glob(f"{project}.*"):
            if path.name.removeprefix(f"{project}.").split(".")[0] in ("ask", "state", "log", "lock"):
                path.unlink(missing_ok=True)

    def _path(self, project: str, kind: str, ending: str = ".json") -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{project}.{kind}{ending}"


class Rows:
    """Rows of the shared database; who holds a project has to say again and again that it lives, or loses it.

    A process that could not say so in time ends itself: by then another may be at work.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._me = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def read(self, project: str, kind: str) -> Record:
        return self._do(lambda base: _row(base, project, kind))

    def write(self, project: str, kind: str, record: Record) -> None:
        self._do(lambda base: _put(base, project, kind, record))

    def change(self, project: str, kind: str, change: Callable[[Record], Record], *, is_hasty: bool = False) -> Record:
        def work(base: Connection) -> Record:
            # The write comes first, so that two who change the same record do so in turn.
            first = "INSERT INTO training VALUES (:project, :kind, '{}') ON CONFLICT (project, kind) DO UPDATE"
            execute(base, f"{first} SET record = training.record", {"project": project, "kind": kind})
            record = change(_row(base, project, kind))
            _put(base, project, kind, record)
            return record

        return self._do(work, wait_s=_GLANCE_S if is_hasty else _WAIT_S, is_hasty=is_hasty)

    def projects(self, kind: str) -> list[str]:
        found = "SELECT project FROM training WHERE kind = :kind ORDER BY project"
        return self._do(lambda base: [str(project) for (project,) in execute(base, found, {"kind": kind})])

    @contextmanager
    def held(self, project: str, *, wait_s: float) -> Iterator[None]:
        deadline = time.monotonic() + wait_s
        while not self._take(project):
            if time.monotonic() >= deadline:
                raise Held
            time.sleep(0.1)
        is_done = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(project, is_done), name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            is_done.set()
            keeper.join()
            mine = {"project": project, "me": self._me}
            with suppress(DatabaseError):
                self._do(lambda base: execute(base, _RELEASE, mine))

    def is_held(self, project: str) -> bool:
        found = "SELECT until FROM training_holder WHERE project = :project"
        return self._do(
            lambda base: float(execute(base, found, {"project": project}).scalar_one_or_none() or 0.0) > now_s(base)
        )

    def forget(self, project: str) -> None:
        for table in ("training", "training_holder"):
            statement = f"DELETE FROM {table} WHERE project = :project"
            self._do(lambda base, statement=statement: execute(base, statement, {"project": project}))  # type: ignore[misc]

    def _take(self, project: str) -> bool:
        """Whether this process holds the project now, for `LEASE_S`."""

        def work(base: Connection) -> bool:
            now = now_s(base)
            values = {"project": project, "me": self._me, "until": now + LEASE_S, "now": now}
            put = (
                "INSERT INTO training_holder VALUES (:project, :me, :until) ON CONFLICT (project) DO UPDATE"
                " SET holder = excluded.holder, until = excluded.until"
                " WHERE training_holder.holder = :me OR training_holder.until <= :now"
            )
            return bool(execute(base, put, values).rowcount)

        return self._do(work)

    def _keep(self, project: str, is_done: threading.Event) -> None:
        lost_at = time.monotonic() + LEASE_S
        while not is_done.wait(LEASE_S / 5):
            asked = time.monotonic()
            try:
                is_mine = self._take(project)
                lost_at = asked + LEASE_S
            except DatabaseError as error:
                log.warning("training of project %s cannot say that it goes on: %s", project, error)
                is_mine = time.monotonic() + LEASE_S / 5 < lost_at
            if not is_mine and not is_done.is_set():
                log.error("training of project %s is ended: another server may have begun it", project)
                os._exit(1)

    def _do(self, work: Callable[[Connection], Answer], *, wait_s: float = _WAIT_S, is_hasty: bool = False) -> Answer:
        return self._database.do(work, tables=_TABLES, wait_s=wait_s, is_hasty=is_hasty)


def _row(base: Connection, project: str, kind: str) -> Record:
    found = "SELECT record FROM training WHERE project = :project AND kind = :kind"
    text = execute(base, found, {"project": project, "kind": kind}).scalar_one_or_none()
    record = json.loads(text or "{}")
    return record if isinstance(record, dict) else {}


def _put(base: Connection, project: str, kind: str, record: Record) -> None:
    statement = (
        "INSERT INTO training VALUES (:project, :kind, :record)"
        " ON CONFLICT (project, kind) DO UPDATE SET record = excluded.record"
    )
    execute(base, statement, {"project": project, "kind": kind, "record": json.dumps(record)})


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
