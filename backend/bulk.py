"""Pre-labels for many tasks, to a file or into Label Studio, going on where an interrupted run stopped.

A run's results lie beside the file that is to become, in ``<out>.blocks``: a Parquet file for each `BLOCK_TASKS` tasks
in a row, and until a block is complete a file of lines. So a process may be killed at any time, what is predicted is
predicted once, and memory does not grow with the number of tasks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import filelock
import httpx

from .client import LabelStudio, NotFound, Unreachable
from .errors import BackendError, LabelStudioError

log = logging.getLogger(__name__)

Json = dict[str, Any]
Task = Mapping[str, Any]

BLOCK_TASKS = 256
"""Tasks whose results share a Parquet file."""

FAILURES_TOLD = 100
"""So many failed tasks are named in a report; all of them are in the Parquet files."""

_PAUSES_S = (2.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Before predictions that Label Studio did not take are offered again. Each of its calls has tried a while itself."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A task that got no prediction."""

    reason: str
    """One sentence, with the way out where there is one."""


Outcome = Json | Failed
PredictMany = Callable[[Iterable[tuple[int, Task]]], Iterable[tuple[int, Outcome]]]
"""Predictions for numbered tasks, each with its task's number, in any order. Tasks are taken as they are needed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that got no prediction, as a report names it."""

    task: str
    """Its id, or else its place in the file and its image."""

    reason: str


@dataclass(slots=True)
class BulkReport:
    """What came of a run."""

    tasks: int = 0
    predicted: int = 0
    failed: int = 0
    polygons: int = 0
    resumed: int = 0
    """Tasks that an earlier, interrupted run had done."""

    failures: list[Failure] = field(default_factory=list)
    """The first of those that failed."""

    def note_failure(self, task: Task, number: int, reason: str) -> None:
        """Count a task that failed."""
        self.failed += 1
        if len(self.failures) < FAILURES_TOLD:
            self.failures.append(Failure(named(task, number), reason))


def predict_to_file(
    tasks: Callable[[], Iterable[Task]],
    out: Path,
    predict: PredictMany,
    *,
    fingerprint: str,
    keep_blocks: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> BulkReport:
    """Write the tasks with their predictions to ``out``, in Label Studio's import format; it appears whole at the end.

    ``tasks`` gives them anew each time it is called. ``fingerprint`` names all that a prediction depends on beside its
    task: what an earlier run made with another one is made anew. Tasks that failed are written without a prediction;
    then, or with ``keep_blocks``, the results stay in ``<out>.blocks``, and another run predicts but what is missing.
    Raises BackendError where another run is at it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    report = BulkReport()
    with _Blocks(out.with_name(out.name + ".blocks"), fingerprint) as blocks:
        for number, outcome in predict(blocks.missing(tasks())):
            blocks.add(number, outcome)
            progress(blocks.done)
        report.resumed = blocks.resumed
        # Of runs that were killed: nobody else is at it, as this one holds the lock.
        for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
            left.unlink(missing_ok=True)
        scratch = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            with open(scratch, "w", encoding="utf-8") as file:
                _write(blocks.results(tasks()), file, report)
            os.replace(scratch, out)
        finally:
            scratch.unlink(missing_ok=True)
        if not (report.failed or keep_blocks):
            blocks.remove()
    return report


def _write(results: Iterable[tuple[Task, Outcome]], file: IO[str], report: BulkReport) -> None:
    for number, (task, outcome) in enumerate(results):
        report.tasks += 1
        predictions = []
        if isinstance(outcome, Failed):
            report.note_failure(task, number, outcome.reason)
        else:
            report.predicted += 1
            report.polygons += len(outcome["result"])
            predictions = [outcome]
        file.write(("[\n" if number == 0 else ",\n") + json.dumps({**task, "predictions": predictions}))
    file.write("\n]\n" if report.tasks else "[]\n")


class _Blocks:
    """What a run has done so far, in a folder of its own that one process at a time has."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._open: dict[int, _Open] = {}
        self._lock = filelock.FileLock(folder / ".lock")
        self.done = 0
        """Tasks that have an outcome, of those looked at so far."""

        self.resumed = 0
        """Tasks of which an earlier run had the outcome."""

    def __enter__(self) -> _Blocks:
        self._folder.mkdir(exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise BackendError(f"another run is at work in {self._folder}; wait for it, or write elsewhere") from error
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._open.values():
            block.lines.close()
        self._lock.release()

    def missing(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Task]]:
        """The tasks without a prediction, numbered as they come."""
        for number, (names, block) in enumerate(self._blocks(tasks)):
            done = self._read(number, names)
            kept = {at: outcome for at, outcome in enumerate(done) if outcome and not isinstance(outcome, Failed)}
            self.resumed += len(kept)
            self.done += len(kept)
            if len(kept) == len(names) and self._path(number).exists():
                continue
            lines = open(self._path(number, "jsonl"), "a", encoding="utf-8")  # noqa: SIM115 - closed with the block
            self._open[number] = opened = _Open(names, dict(kept), lines)
            self._close_if_complete(number, opened)
            for at, task in enumerate(block):
                if at not in kept:
                    yield number * BLOCK_TASKS + at, task

    def add(self, number: int, outcome: Outcome) -> None:
        """Keep a task's outcome."""
        block, at = divmod(number, BLOCK_TASKS)
        opened = self._open[block]
        if not isinstance(outcome, Failed):
            _append(opened.lines, {"name": opened.names[at], "prediction": outcome})
        opened.outcomes[at] = outcome
        self.done += 1
        self._close_if_complete(block, opened)

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """All tasks with their outcomes, in order. Raises BackendError where they are not those that were predicted."""
        for number, (names, block) in enumerate(self._blocks(tasks)):
            outcomes = self._read(number, names)
            for at, (task, outcome) in enumerate(zip(block, outcomes, strict=True), number * BLOCK_TASKS):
                if outcome is None:
                    raise BackendError(f"the tasks changed while they were predicted ({named(task, at)}); run it again")
                yield task, outcome

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _blocks(self, tasks: Iterable[Task]) -> Iterator[tuple[list[str], list[Task]]]:
        rest = iter(tasks)
        while block := list(islice(rest, BLOCK_TASKS)):
            yield [self._name(task) for task in block], block

    def _name(self, task: Task) -> str:
        """Another task, or another model or config, has another name."""
        text = json.dumps([self._fingerprint, task.get("id"), task.get("data")], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _path(self, number: int, ending: str = "parquet") -> Path:
        return self._folder / f"{number:07d}.{ending}"

    def _read(self, number: int, names: Sequence[str]) -> list[Outcome | None]:
        """The outcomes there are, each in its task's place."""
        found = {**self._read_table(number), **self._read_lines(number)}
        return [found.get(name) for name in names]

    def _read_table(self, number: int) -> dict[str, Outcome]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            rows = parquet.read_table(self._path(number), columns=["name", "prediction", "error"]).to_pylist()
        except FileNotFoundError:
            return {}
        except (OSError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s); its tasks are predicted again", self._path(number), error)
            return {}
        return {
            row["name"]: Failed(row["error"]) if row["prediction"] is None else json.loads(row["prediction"])
            for row in rows
        }

    def _read_lines(self, number: int) -> dict[str, Outcome]:
        try:
            with open(self._path(number, "jsonl"), "rb") as file:
                return {row["name"]: row["prediction"] for row in _records(file)}
        except FileNotFoundError:
            return {}

    def _close_if_complete(self, number: int, opened: _Open) -> None:
        if len(opened.outcomes) < len(opened.names):
            return
        import pyarrow as pa
        from pyarrow import parquet

        outcomes = [opened.outcomes[at] for at in range(len(opened.names))]
        found = [None if isinstance(outcome, Failed) else outcome for outcome in outcomes]
        columns = {
            "task": pa.array(range(number * BLOCK_TASKS, number * BLOCK_TASKS + len(found)), pa.int64()),
            "name": pa.array(opened.names, pa.string()),
            "polygons": pa.array([None if each is None else len(each["result"]) for each in found], pa.int32()),
            "score": pa.array([None if each is None else each.get("score") for each in found], pa.float64()),
            "prediction": pa.array([None if each is None else json.dumps(each) for each in found], pa.string()),
            "error": pa.array([o.reason if isinstance(o, Failed) else None for o in outcomes], pa.string()),
        }
        table = pa.table(columns).replace_schema_metadata({"fingerprint": self._fingerprint})
        scratch = self._path(number, "scratch")
        parquet.write_table(table, scratch, compression="zstd")
        os.replace(scratch, self._path(number))
        opened.lines.close()
        self._path(number, "jsonl").unlink(missing_ok=True)
        del self._open[number]


@dataclass(frozen=True, slots=True)
class _Open:
    """A block of which not all is done."""

    names: list[str]
    outcomes: dict[int, Outcome]
    """By the task's place in the block."""

    lines: IO[str]


def predict_project(
    label_studio: LabelStudio,
    project_id: int,
    predict: PredictMany,
    *,
    version: str,
    fingerprint: str,
    kept: Path,
    batch: int = 200,
    progress: Callable[[int], None] = lambda done: None,
) -> BulkReport:
    """Predict a project's tasks and import the result in batches; tasks that have this version's prediction are left.

    What is predicted and not imported yet lies in the file ``kept``, and a run after an interrupted one imports it
    first. Where Label Studio goes away it is waited for, and asked what arrived before anything is sent again. Raises
    LabelStudioError where it stays away or refuses, BackendError where another run is at it.
    """
    report = BulkReport()
    ready: dict[int, Json] = {}

    def send() -> None:
        _import(label_studio, project_id, ready, version)
        ready.clear()
        unsent.keep_only_unseen()

    with _Unsent(kept, fingerprint) as unsent:

        def missing() -> Iterator[tuple[int, Task]]:
            for task in label_studio.tasks(project_id):
                report.tasks += 1
                number, before = int(task["id"]), unsent.seen(int(task["id"]))
                if _has_prediction(task, version):
                    report.resumed += 1
                elif before is not None:
                    report.resumed += 1
                    ready[number] = before
                else:
                    yield number, task

        for number, outcome in predict(missing()):
            if isinstance(outcome, Failed):
                report.note_failure({"id": number}, number, outcome.reason)
            else:
                unsent.add(number, outcome)
                ready[number] = outcome
                report.predicted += 1
                report.polygons += len(outcome["result"])
            if len(ready) >= batch:
                send()
            progress(report.resumed + report.predicted + report.failed)
        if ready:
            send()
    return report


def _import(label_studio: LabelStudio, project_id: int, ready: Mapping[int, Json], version: str) -> None:
    """Have these predictions, by task, in Label Studio once each."""
    for attempt, pause_s in enumerate((*_PAUSES_S, None)):
        try:
            # A call that got no answer may have been carried out.
            wanted = [task for task in ready if not attempt or _lacks(label_studio, task, version)]
            if wanted:
                label_studio.import_predictions(project_id, [{**ready[task], "task": task} for task in wanted])
            return
        except LabelStudioError as error:
            is_lost = isinstance(error, Unreachable) or isinstance(error.__cause__, httpx.HTTPError)
            if not is_lost or pause_s is None:
                raise
            log.warning("%s; %d predictions are kept, and offered again in %.0f s", error, len(ready), pause_s)
            time.sleep(pause_s)


def _lacks(label_studio: LabelStudio, task_id: int, version: str) -> bool:
    try:
        return not _has_prediction(label_studio.task(task_id), version)
    except NotFound:
        return False


def _has_prediction(task: Task, version: str) -> bool:
    return any(known.get("model_version") == version for known in task.get("predictions") or ())


class _Unsent:
    """Predictions that Label Studio does not have yet, by task, in a file that one process at a time has."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._lock = filelock.FileLock(f"{path}.lock")
        self._unseen: dict[int, Json] = {}

    def __enter__(self) -> _Unsent:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise BackendError(f"another run is at work on this project ({self._path}); wait for it") from error
        try:
            with open(self._path, "rb") as file:
                self._unseen = {
                    row["task"]: row["prediction"] for row in _records(file) if row["fingerprint"] == self._fingerprint
                }
        except FileNotFoundError:
            pass
        self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._path.unlink(missing_ok=True)
        self._lock.release()

    def seen(self, task: int) -> Json | None:
        """The prediction that an earlier run left for a task that Label Studio has."""
        return self._unseen.pop(task, None)

    def add(self, task: int, prediction: Json) -> None:
        """Keep a prediction until it is sent."""
        _append(self._file, {"task": task, "fingerprint": self._fingerprint, "prediction": prediction})

    def keep_only_unseen(self) -> None:
        """Let go of all that was added and seen: it is sent."""
        self._file.close()
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with open(scratch, "w", encoding="utf-8") as file:
            for task, prediction in self._unseen.items():
                _append(file, {"task": task, "fingerprint": self._fingerprint, "prediction": prediction})
        os.replace(scratch, self._path)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__


def named(task: Task, number: int) -> str:
    """A task in words: its id, or where it stands in its file and what it shows."""
    if isinstance(task.get("id"), int):
        return f"task {task['id']}"
    data = task.get("data")
    shown = next((value for value in data.values() if isinstance(value, str)), "") if isinstance(data, Mapping) else ""
    return f"task number {number} ({shown[:200]})"


def _append(file: IO[str], record: Json) -> None:
    """Write a line that is there once this returns, whatever becomes of this process."""
    # Before rather than behind: what a killed process left of a line does not spoil the next.
    file.write("\n" + json.dumps(record))
    file.flush()


def _records(file: IO[bytes]) -> Iterator[Json]:
    """All lines but those at which a process was killed."""
    for line in file:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
