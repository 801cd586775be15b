"""What is wrong with annotations, kept where all server processes find it.

That is ``DATA_DIR/findings.sqlite3``, or the database that several servers share. Bounded: the annotations that were
checked longest ago go first. Nothing here raises; what is found must not stop what finds it, and a page that shows
nothing is better than none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from .database import Database, DatabaseError, PlainConnection

log = logging.getLogger(__name__)

MAX_ANNOTATIONS = 5_000
"""Annotations that are remembered, sound ones included."""

MAX_OF_ONE = 100
"""Findings that are kept of one annotation; the rest is in the count alone."""

_WAIT_S = 5.0
_GLANCE_S = 0.2
"""Wait for another process's write within an annotator's save."""

_NEVER = 1e18
"""Later than any version: what is checked late of a deleted annotation is not kept."""

_TABLE = """
CREATE TABLE IF NOT EXISTS checkup (
    id BIGINT PRIMARY KEY, project TEXT NOT NULL DEFAULT '', task BIGINT, version DOUBLE PRECISION NOT NULL DEFAULT 0,
    findings TEXT NOT NULL DEFAULT '[]', count INTEGER NOT NULL DEFAULT 0,
    checked DOUBLE PRECISION NOT NULL DEFAULT 0, own_digest TEXT NOT NULL DEFAULT '',
    own_base DOUBLE PRECISION NOT NULL DEFAULT 0, own_version DOUBLE PRECISION NOT NULL DEFAULT 0
)"""

Answer = TypeVar("Answer")
_Base = sqlite3.Connection | PlainConnection


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a region, a feature, or a file as a whole."""

    reason: str
    """Which check it failed, in a word or two: what metrics and scripts count by."""

    message: str
    """The sentence for people."""

    feature: int | None = None
    """Number of a file's feature or task, from 0; None where it is the file, or no file."""

    task: int | None = None
    annotation: int | None = None
    region: str = ""
    """Label Studio's id of the region."""

    name: str = ""
    """The feature's ``id`` in the file."""

    def __str__(self) -> str:
        named = (("feature", self.feature), ("task", self.task), ("annotation", self.annotation))
        where = ", ".join([f"{name} {value}" for name, value in named if value is not None])
        where += f" ({self.name})" if self.name else ""
        where += f", region {self.region}" if self.region else ""
        return f"{where.removeprefix(', ')}: {self.message}" if where else self.message


@dataclass(frozen=True, slots=True)
class Kept:
    """A finding as it is remembered."""

    finding: Finding
    project: str
    """Label Studio's ``<id>.<created>``."""

    checked: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class OwnWrite:
    """What we wrote into an annotation last; all zero where we never did."""

    digest: str = ""
    base_version: float = 0.0
    """`version_of` the annotation that our note was added to."""

    version: float = 0.0
    """`version_of` what came of it; later than any where that is not known yet."""


class Findings:
    """The findings of all annotations, newest version of each."""

    def __init__(self, folder: Path, database: Database | None = None) -> None:
        """Nothing is written before the first annotation is checked. A ``database`` counts where servers share it."""
        self._path = folder / "findings.sqlite3"
        self._shared = database if database is not None and database.is_shared else None

    def put(
        self, annotation: int, task: int | None, project: str, version: float, found: Sequence[Finding]
    ) -> list[Finding] | None:
        """Keep what was found in a version of an annotation in place of what was found before.

        Returns what was not known yet; None, and nothing is kept, where a newer version was checked meanwhile.
        """

        def write(base: _Base) -> list[Finding] | None:
            row = base.execute("SELECT version, findings FROM checkup WHERE id = ?", (annotation,)).fetchone()
            if row and row[0] > version:
                return None
            known = {(item["reason"], item["region"]) for item in json.loads(row[1])} if row else set()
            text = json.dumps([asdict(finding) for finding in found[:MAX_OF_ONE]])
            base.execute(
                "INSERT INTO checkup (id, project, task, version, findings, count, checked)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET project = excluded.project,"
                " task = excluded.task, version = excluded.version, findings = excluded.findings,"
                " count = excluded.count, checked = excluded.checked",
                (annotation, project, task, version, text, len(found), time.time()),
            )
            _forget_oldest(base)
            return [finding for finding in found if (finding.reason, finding.region) not in known]

        unknown: list[Finding] | None = list(found)
        return self._do(write, unknown)

    def remove(self, *, annotations: Iterable[int] = (), tasks: Iterable[int] = ()) -> None:
        """Forget annotations that were deleted, by their own number or by their task's."""

        def write(base: _Base) -> None:
            for number in annotations:
                base.execute(
                    "INSERT INTO checkup (id, version, checked) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                    " version = excluded.version, findings = '[]', count = 0, checked = excluded.checked",
                    (number, _NEVER, time.time()),
                )
            for number in tasks:
                base.execute(
                    "UPDATE checkup SET version = ?, findings = '[]', count = 0 WHERE task = ?",
                    (_NEVER, number),
                )
            _forget_oldest(base)

        self._do(write, None)

    def recent(self, count: int = 200) -> list[Kept]:
        """The findings of the annotations checked last, those first."""

        def read(base: _Base) -> list[Kept]:
            rows = base.execute(
                "SELECT findings, project, checked FROM checkup WHERE count > 0 ORDER BY checked DESC, id DESC LIMIT ?",
                (count,),
            ).fetchall()
            return [Kept(Finding(**item), project, checked) for text, project, checked in rows
                    for item in json.loads(text)][:count]  # fmt: skip

        nothing: list[Kept] = []
        return self._do(read, nothing) if self._is_begun else nothing

    def counts(self) -> dict[str, int]:
        """How many findings there are of each reason."""

        def read(base: _Base) -> dict[str, int]:
            counts: Counter[str] = Counter()
            for (text,) in base.execute("SELECT findings FROM checkup WHERE count > 0"):
                counts.update(item["reason"] for item in json.loads(text))
            return dict(counts)

        nothing: dict[str, int] = {}
        return self._do(read, nothing) if self._is_begun else nothing

    def will_write(self, annotation: int, digest: str, *, base_version: float) -> None:
        """Say before we change an annotation what it will be and what it was made of.

        So that the event of it is known for our own, and a save that we write over is known for lost.
        """
        self._change(
            "INSERT INTO checkup (id, own_digest, own_base, own_version, checked) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET own_digest = excluded.own_digest, own_base = excluded.own_base,"
            " own_version = excluded.own_version",
            (annotation, digest, base_version, _NEVER, time.time()),
        )

    def has_written(self, annotation: int, version: float) -> None:
        """Say which version came of it."""
        self._change("UPDATE checkup SET own_version = ? WHERE id = ?", (version, annotation))

    def own_write(self, annotation: int, *, at_a_glance: bool = False) -> OwnWrite:
        """What we wrote into the annotation last; ``at_a_glance`` where somebody waits for the answer."""
        if not self._is_begun:
            return OwnWrite()

        def read(base: _Base) -> OwnWrite:
            row = base.execute(
                "SELECT own_digest, own_base, own_version FROM checkup WHERE id = ?", (annotation,)
            ).fetchone()
            return OwnWrite(*row) if row else OwnWrite()

        return self._do(read, OwnWrite(), wait_s=_GLANCE_S if at_a_glance else _WAIT_S)

    @property
    def _is_begun(self) -> bool:
        return self._shared is not None or self._path.exists()

    def _change(self, statement: str, values: tuple[Any, ...]) -> None:
        def write(base: _Base) -> None:
            base.execute(statement, values)

        self._do(write, None)

    def _do(self, work: Callable[[_Base], Answer], otherwise: Answer, *, wait_s: float = _WAIT_S) -> Answer:
        try:
            with self._opened(wait_s) as base:
                return work(base)
        except (DatabaseError, sqlite3.Error, OSError, ValueError, TypeError, KeyError) as error:
            log.error("findings cannot be kept in %s: %s", "the database" if self._shared else self._path, error)
            return otherwise

    @contextmanager
    def _opened(self, wait_s: float) -> Iterator[_Base]:
        if self._shared is not None:
            with self._shared.transaction(tables=(_TABLE,), wait_s=wait_s, is_hasty=wait_s <= _GLANCE_S) as shared:
                yield PlainConnection(shared)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A connection of its own for each call: threads and forked processes must not share one.
        with closing(sqlite3.connect(self._path, timeout=wait_s)) as base, base:
            base.execute(_TABLE)
            yield base


def version_of(annotation: Mapping[str, Any]) -> float:
    """When a version of an annotation was saved, seconds since 1970; 0 where it does not say."""
    text = annotation.get("updated_at") or annotation.get("created_at")
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def digest_of(annotation: Mapping[str, Any]) -> str:
    """The same for two versions of an annotation exactly when they say the same."""
    says = [annotation.get("result"), bool(annotation.get("was_cancelled")), bool(annotation.get("ground_truth"))]
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()


def _forget_oldest(base: _Base) -> None:
    (count,) = base.execute("SELECT count(*) FROM checkup").fetchone()
    if count > MAX_ANNOTATIONS:
        # Sound ones first: they are kept only to tell versions apart.
        base.execute(
            "DELETE FROM checkup WHERE id IN (SELECT id FROM checkup ORDER BY count > 0, checked LIMIT ?)",
            (count - MAX_ANNOTATIONS,),
        )
