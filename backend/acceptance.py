"""Acceptance: what annotators made of pre-labels, model version by model version.

Label Studio keeps a pre-label's region id through accept, edit and submit, and writes ``origin: prediction`` whether or
not it was edited. So what was submitted is compared with what was predicted, by id: unchanged, edited and how far, or
deleted. Regions under other ids were added. An annotation is judged beside the one prediction that it began from; where
it began from none, nothing is said about any version.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import shapely
from filelock import FileLock, Timeout
from shapely.geometry.base import BaseGeometry

from . import labelstudio
from .annotations import Predicted
from .client import LabelStudio, NotFound
from .errors import BackendError, LabelStudioError
from .evaluation import polis
from .flight import give_way
from .journal import Journal
from .problems import Problems
from .settings import Settings
from .tile import Tile
from .whole import write_json

log = logging.getLogger(__name__)

Json = dict[str, Any]

LEAST_PAUSE_S = 60.0
"""Who only looks has what is shown counted anew at most so often, in seconds."""

SOON_S = 1.0
"""What a save changed is counted so long after it, in seconds: not while the annotator waits."""

REST = 20
"""Counting takes at most one second in so many."""

MAX_SAVED = 1_000
"""Saved tasks in line. Of more at once the predictions come when the journal is reconciled."""

MAX_KEPT = 50_000
"""Annotations whose outcome stays in memory; where there are more, all are judged anew each time."""

_SILENCE_S = 30.0
"""After Label Studio did not answer it is not asked for so long."""

_OVERLAP_S = 10.0
"""What was heard of so shortly before the last count may have been written after it; so far servers' clocks differ."""

MAX_VERSIONS = 30
"""Versions of a project that are shown, the newest ones."""

BUCKETS = 40
"""Points of a curve, at most about so many."""

_UNLABELLED = ("keypoint", "rectangle")
"""Types of a smart tool's prompts, where they have no labels."""

_SPANS_S = (600, 3600, 6 * 3600, 86400, 7 * 86400, 28 * 86400, 364 * 86400)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the pre-labels of one annotation, or of several together."""

    annotations: int = 0
    predicted: int = 0
    """Regions that were there when the annotator began."""

    unchanged: int = 0
    edited: int = 0
    """Submitted with another outline or label."""

    clicked: int = 0
    """Regions added that a model drew: answers to clicks and boxes that were accepted."""

    drawn: int = 0
    """Regions added by hand."""

    distance: float = 0.0
    """Sum of 1 - IoU over the regions whose outline was edited, each with what was predicted."""

    polis_px: float = 0.0
    """Sum over the same of the mean distance of the vertices of each to the outline of the other (PoLiS), in pixels."""

    polis_m: float = 0.0
    """The same in metres, of those on tiles whose pixel size is known ..."""

    placed: int = 0
    """... which are so many, ..."""

    reshaped: int = 0
    """... and of those with another outline at all, so many."""

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Outcome)))

    @property
    def accepted(self) -> int:
        """Regions that were kept, edited or not."""
        return self.unchanged + self.edited

    @property
    def deleted(self) -> int:
        """Regions that were thrown away."""
        return self.predicted - self.accepted

    def figures(self) -> Json:
        """All counts and what follows from them; None where there is nothing to divide by."""
        counts = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        return {
            **counts,
            "deleted": self.deleted,
            "unchanged_rate": _ratio(self.unchanged, self.predicted),
            "accepted_rate": _ratio(self.accepted, self.predicted),
            "added_share": _ratio(self.clicked + self.drawn, self.accepted + self.clicked + self.drawn),
            "edit_distance": _ratio(self.distance, self.accepted),
            "polis_px": _ratio(self.polis_px, self.reshaped),
            "polis_m": _ratio(self.polis_m, self.placed),
        }


@dataclass(frozen=True, slots=True)
class Judged:
    """An annotation beside the prediction that it began from."""

    version: str
    when: float
    """When the annotation was made, seconds since 1970."""

    outcome: Outcome


def judged(task: Mapping[str, Any]) -> Iterator[Judged]:
    """Each submitted annotation of a task, as Label Studio exports it, that began from one of its predictions."""
    for annotation in labelstudio.chosen_annotations(task, which="all"):
        prediction = shown_prediction(task, annotation)
        if prediction is None:
            continue
        version = prediction.get("model_version")
        when = _seconds(annotation.get("created_at"))
        yield Judged(
            version if isinstance(version, str) and version else "unnamed", when, outcome(task, annotation, prediction)
        )


def shown_prediction(task: Mapping[str, Any], annotation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The prediction that an annotation began from: the one it names, or the one whose region ids it still has, if any.

    A prediction that is younger than the annotation was not shown, unless it is named.
    """
    listed = [one for one in _objects(task.get("predictions")) if isinstance(one.get("result"), list)]
    named = annotation.get("parent_prediction")
    for one in listed:
        if named is not None and one.get("id") == named:
            return one
    made = _seconds(annotation.get("created_at"))
    kept = _ids(annotation)
    shared = [(len(kept & _ids(one)), one) for one in listed if not made or _seconds(one.get("created_at")) <= made]
    most, best = max(shared, key=lambda pair: pair[0], default=(0, None))
    return best if most else None


def outcome(task: Mapping[str, Any], annotation: Mapping[str, Any], prediction: Mapping[str, Any]) -> Outcome:
    """What an annotation made of a prediction of its task. Prompts left over and results of one id count once."""
    before = Predicted.on({"predictions": [prediction]}, {})
    after: dict[str, Mapping[str, Any]] = {}
    for result in _objects(annotation.get("result")):
        identity = result.get("id")
        is_prompt = "is_positive" in result or result.get("type") in _UNLABELLED
        if not isinstance(identity, str) or not isinstance(result.get("value"), Mapping) or is_prompt:
            continue
        # A label that leaked from a prompt comes beside the region itself, which is the one predicted or drawn.
        if identity not in after or result.get("type") == "polygonlabels":
            after[identity] = result
    total = Outcome(annotations=1, predicted=len(before.results))
    for identity, result in after.items():
        if identity not in before.results:
            is_model = "score" in result or "model_version" in _mapping(result.get("meta"))
            total += Outcome(clicked=1) if is_model else Outcome(drawn=1)
        elif before.was_edited(result):
            total += Outcome(edited=1) + _moved(before.results[identity], result, _gsd_m(task, result))
        else:
            total += Outcome(unchanged=1)
    return total


def _moved(before: Mapping[str, Any], after: Mapping[str, Any], gsd_m: float | None) -> Outcome:
    """How far the outline of a region was moved; nothing where it cannot be read, or only the label is another."""
    if _mapping(before.get("value")).get("points") == _mapping(after.get("value")).get("points"):
        return Outcome()
    one, other = _outline_px(before), _outline_px(after)
    if one.is_empty or other.is_empty:
        return Outcome()
    union = float(shapely.area(shapely.union(one, other)))
    distance = 1 - float(shapely.area(shapely.intersection(one, other))) / union if union else 0.0
    apart_px = polis(one, other)
    placed = gsd_m is not None
    return Outcome(
        distance=distance, polis_px=apart_px, polis_m=apart_px * (gsd_m or 0.0), placed=int(placed), reshaped=1
    )


def _outline_px(result: Mapping[str, Any]) -> BaseGeometry:
    size = _size(result)
    if size is None:
        return shapely.Polygon()
    try:
        read = labelstudio.read_annotation({"result": [result]}, Tile(size=size))
    except BackendError:
        return shapely.Polygon()
    return shapely.union_all([region.polygon for region in read.regions])


def _gsd_m(task: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    data, size = task.get("data"), _size(result)
    try:
        tile = Tile.from_task(data, size=size) if isinstance(data, Mapping) and size else None
    except BackendError:
        return None
    return tile.gsd_m if tile else None


def _size(result: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = result.get("original_width"), result.get("original_height")
    is_size = isinstance(width, int) and isinstance(height, int) and 0 < width < 100_000 and 0 < height < 100_000
    return (int(width or 0), int(height or 0)) if is_size else None


# --- Together ---


def by_version(listed: Iterable[Judged]) -> dict[str, Outcome]:
    """What annotators made of each version."""
    found: dict[str, Outcome] = defaultdict(Outcome)
    for one in listed:
        found[one.version] += one.outcome
    return dict(found)


def facts_of(listed: Sequence[Judged]) -> Json:
    """What is shown of a project: each version's figures, the newest last, and the same over time, as JSON.

    ``curve`` holds a point for each version and each ``span_s`` seconds in which annotations of it were made.
    """
    last: dict[str, float] = {}
    for one in listed:
        last[one.version] = max(last.get(one.version, 0.0), one.when)
    names = sorted(last, key=lambda name: last[name])[-MAX_VERSIONS:]
    shown = [one for one in listed if one.version in names]
    first, span_s = _grid([one.when for one in shown if one.when > 0])
    points: dict[tuple[float, str], Outcome] = defaultdict(Outcome)
    for one in shown:
        if one.when > 0:
            points[first + (one.when - first) // span_s * span_s, one.version] += one.outcome
    totals = by_version(shown)
    return {
        "versions": [{"name": name, "last": last[name], **totals[name].figures()} for name in names],
        "span_s": span_s,
        "curve": [{"from": when, "version": name, **points[when, name].figures()} for when, name in sorted(points)],
    }


def _grid(times: Sequence[float]) -> tuple[float, float]:
    """Where a curve begins, and the shortest span of which it has few points."""
    if not times:
        return 0.0, float(_SPANS_S[0])
    length_s = max(times) - min(times)
    span_s = next((span for span in _SPANS_S if length_s < BUCKETS * span), _SPANS_S[-1])
    return min(times) // span_s * span_s, float(span_s)


class Acceptance:
    """The figures of all projects, counted beside the server and shared by all its processes."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        problems: Problems,
        connect: Callable[[], LabelStudio] | None = None,
    ) -> None:
        """Nothing is read or written before the first look. Without ``connect`` Label Studio is never asked."""
        self._folder = settings.data_dir
        self._is_local = not settings.database_url.get_secret_value()
        self._path = settings.data_dir / "acceptance.json"
        self._journal, self._problems, self._connect = journal, problems, connect
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_working = False
        self._closing = threading.Event()
        self._saved: dict[tuple[str, int], None] = {}
        self._is_changed = False
        self._next_s = self._silent_until_s = 0.0
        # By project, when it was last counted, and each task's outcomes as of then.
        self._judged: dict[str, tuple[float, dict[int, list[Judged]]]] = {}

    def facts(self) -> Json:
        """By project key what `facts_of` gives, as last counted, at once; has it counted anew where that is due."""
        with self._lock:
            if time.monotonic() >= self._next_s:
                self._begin()
        return _read(self._path, _stamp(self._path))

    def note(self, project: str, tasks: Iterable[int]) -> None:
        """Annotations of these tasks were saved, or some were deleted: have that counted, `SOON_S` from now."""
        with self._lock:
            room = MAX_SAVED - len(self._saved)
            self._saved.update(dict.fromkeys((project, task) for task in itertools.islice(tasks, room)))
            self._is_changed = True
            self._begin()

    def wait(self, timeout_s: float) -> None:
        """Wait until nothing is being counted."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def close(self) -> None:
        """Finish the count that runs, and begin no other."""
        self._closing.set()
        self.wait(10)

    def count(self) -> Json:
        """Count now, and keep it. Raises BackendError where the journal cannot be read."""
        began, found = time.time(), {}
        for project in self._journal.projects():
            if listed := self._listed(project):
                found[project] = facts_of(listed)
        if sum(len(each) for _, tasks in self._judged.values() for each in tasks.values()) > MAX_KEPT:
            self._judged.clear()
        if found or self._path.exists():
            write_json(self._path, found)
            # What is written into the journal meanwhile is newer than this.
            os.utime(self._path, (began, began))
        return found

    def _listed(self, project: str) -> list[Judged]:
        """The outcome of each annotation of a project: judged before, but for those of tasks that changed since."""
        began = time.time()
        since, known = self._judged.get(project, (0.0, {}))
        known = {task: known[task] for task in self._journal.task_ids(project) if task in known}
        for task in self._journal.tasks(project, since=since):
            known[task["id"]] = list(judged(task))
        self._judged[project] = began - _OVERLAP_S, known
        return [one for listed in known.values() for one in listed]

    def _begin(self) -> None:
        """Under the lock: have a thread at work."""
        if not self._is_working and not self._closing.is_set():
            self._is_working = True
            self._thread = threading.Thread(target=self._work, name="acceptance", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        give_way()
        pause_s = SOON_S if self._is_changed else 0.0
        while not self._closing.wait(pause_s):
            with self._lock:
                saved, is_changed = list(self._saved), self._is_changed
                self._saved.clear()
                self._is_changed = False
                self._next_s = time.monotonic() + LEAST_PAUSE_S
            began = time.monotonic()
            self._count_if_due(saved, is_changed)
            pause_s = max(SOON_S, REST * (time.monotonic() - began))
            with self._lock:
                if not self._is_changed:
                    self._next_s = max(self._next_s, time.monotonic() + pause_s)
                    self._is_working = False
                    return

    def _count_if_due(self, saved: Sequence[tuple[str, int]], is_changed: bool) -> None:
        try:
            self._complete(saved)
            if self._is_local and self._counted_s() > self._changed_s():
                return
            # One process at a time; the others read what it found. What it may have missed is counted after it.
            with FileLock(self._folder / "acceptance.lock", timeout=_SILENCE_S if is_changed else 0):
                self.count()
        except Timeout:
            log.debug("another process is counting")
        except (BackendError, OSError) as error:
            self._problems.add("acceptance of pre-labels", error)
        except Exception as error:
            log.exception("acceptance cannot be counted")
            self._problems.add("acceptance of pre-labels", f"unexpected {type(error).__name__}: {error}")

    def _complete(self, saved: Sequence[tuple[str, int]]) -> None:
        """Ask Label Studio which predictions these tasks have, where that is not known: events do not say it."""
        asked = [(project, task) for project, task in saved if self._journal.lacks_predictions(project, task)]
        if not asked or self._connect is None or time.monotonic() < self._silent_until_s:
            return
        try:
            with self._connect() as label_studio:
                for project, task in asked:
                    try:
                        self._journal.tell_predictions(project, task, label_studio.task(task).get("predictions"))
                    except NotFound:
                        continue
        except LabelStudioError as error:
            self._silent_until_s = time.monotonic() + _SILENCE_S
            self._problems.add("acceptance of pre-labels", f"{error}; it is counted once the journal is reconciled")

    def _counted_s(self) -> float:
        return _mtime(self._path)

    def _changed_s(self) -> float:
        """When the journal's database was last written to; before anything else where it is not there."""
        return max(_mtime(self._folder / name) for name in ("journal.sqlite3", "journal.sqlite3-wal")) - 1e-3


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=4)
def _read(path: Path, stamp: tuple[int, int]) -> Json:
    """What a file of ``stamp`` holds, read once."""
    if not any(stamp):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _ids(holder: Mapping[str, Any]) -> set[str]:
    """Ids of the regions of a prediction or an annotation."""
    ids = (result.get("id") for result in _objects(holder.get("result")))
    return {identity for identity in ids if isinstance(identity, str)}


def _seconds(text: Any) -> float:
    """A time stamp of Label Studio's in seconds since 1970; 0 where there is none."""
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else 0.0
    except (ValueError, OverflowError):
        return 0.0
