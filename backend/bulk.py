"""Pre-labels for many tasks, to a file or into Label Studio, going on where an interrupted run stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import LabelStudio

Json = dict[str, Any]
PredictMany = Callable[[Iterable[Mapping[str, Any]]], Iterable[tuple[Mapping[str, Any], Json | None]]]


@dataclass(frozen=True, slots=True)
class BulkReport:
    """What came of a run."""

    tasks: int
    predicted: int
    failed: int
    polygons: int
    resumed: int
    """Tasks that an earlier, interrupted run had done."""


def predict_to_file(
    tasks: Sequence[Mapping[str, Any]],
    out: Path,
    predict: PredictMany,
    *,
    version: str,
    progress: Callable[[int], None] = lambda done: None,
) -> BulkReport:
    """Write the tasks with their predictions to ``out``, in Label Studio's import format.

    Each prediction is kept in ``<out>.partial`` as it comes; ``out`` itself appears whole at the end. A partial file of
    another model version is of no use and is begun anew. Tasks that failed are written without a prediction.
    """
    partial = out.with_name(out.name + ".partial")
    done = _read_partial(partial, version)
    resumed = len(done)
    missing = [task for task in tasks if _key(task) not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "a", encoding="utf-8") as file:
        for number, (task, prediction) in enumerate(predict(missing), 1):
            if prediction is not None:
                done[_key(task)] = prediction
                file.write(json.dumps({"key": _key(task), "version": version, "prediction": prediction}) + "\n")
                file.flush()
            progress(resumed + number)
    written = [{**task, "predictions": [done[_key(task)]] if _key(task) in done else []} for task in tasks]
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.write_text(json.dumps(written), encoding="utf-8")
    os.replace(scratch, out)
    partial.unlink(missing_ok=True)
    predicted = [p for task in written for p in task["predictions"]]
    polygons = sum(len(prediction["result"]) for prediction in predicted)
    return BulkReport(len(tasks), len(predicted), len(tasks) - len(predicted), polygons, resumed)


def predict_project(
    label_studio: LabelStudio,
    project_id: int,
    predict: PredictMany,
    *,
    version: str,
    batch: int = 200,
    progress: Callable[[int], None] = lambda done: None,
) -> BulkReport:
    """Predict a project's tasks and import the result in batches; tasks that have this version's prediction are left.

    An interrupted run has imported whole batches, and goes on behind them. Raises LabelStudioError.
    """
    counts = {"tasks": 0, "resumed": 0, "predicted": 0, "failed": 0, "polygons": 0}

    def missing() -> Iterator[Mapping[str, Any]]:
        for task in label_studio.tasks(project_id):
            counts["tasks"] += 1
            if any(known.get("model_version") == version for known in task.get("predictions") or ()):
                counts["resumed"] += 1
            else:
                yield task

    ready: list[Json] = []
    for task, prediction in predict(missing()):
        if prediction is None:
            counts["failed"] += 1
        else:
            ready.append({**prediction, "task": task["id"]})
            counts["predicted"] += 1
            counts["polygons"] += len(prediction["result"])
        if len(ready) >= batch:
            label_studio.import_predictions(project_id, ready)
            ready = []
        progress(counts["resumed"] + counts["predicted"] + counts["failed"])
    if ready:
        label_studio.import_predictions(project_id, ready)
    return BulkReport(**counts)


def _read_partial(path: Path, version: str) -> dict[str, Json]:
    done: dict[str, Json] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line at which an earlier run was killed
                if record["version"] == version:
                    done[record["key"]] = record["prediction"]
    except FileNotFoundError:
        pass
    return done


def _key(task: Mapping[str, Any]) -> str:
    text = json.dumps([task.get("id"), task.get("data")], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
