"""Many pre-labels: to a file that appears whole, and on from where a run was broken off."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from backend.bulk import predict_to_file

TASKS = [{"data": {"image": f"http://x/{number}.png"}} for number in range(5)]


def predicting(*, fails_at: int | None = None, breaks_at: int | None = None, seen: list[str] | None = None) -> Any:
    def predict(tasks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any] | None]]:
        for task in tasks:
            number = int(task["data"]["image"][9:-4])
            if number == breaks_at:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append(task["data"]["image"])
            yield task, None if number == fails_at else {"result": [{"id": str(number)}], "model_version": "v1"}

    return predict


def test_all_tasks_are_written_in_order_with_their_predictions(tmp_path: Path):
    out = tmp_path / "predictions.json"
    report = predict_to_file(TASKS, out, predicting(fails_at=2), version="v1")
    assert (report.tasks, report.predicted, report.failed, report.polygons, report.resumed) == (5, 4, 1, 4, 0)
    written = json.loads(out.read_text())
    assert [task["data"] for task in written] == [task["data"] for task in TASKS]
    assert [len(task["predictions"]) for task in written] == [1, 1, 0, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path):
    out = tmp_path / "predictions.json"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(TASKS, out, predicting(breaks_at=3), version="v1")
    assert not out.exists()
    # As a kill in the middle of a line would leave it.
    with open(tmp_path / "predictions.json.partial", "a") as partial:
        partial.write('{"key": "abc", "versi')
    seen: list[str] = []
    report = predict_to_file(TASKS, out, predicting(seen=seen), version="v1")
    assert seen == ["http://x/3.png", "http://x/4.png"]
    assert (report.predicted, report.resumed) == (5, 3)
    assert all(len(task["predictions"]) == 1 for task in json.loads(out.read_text()))


def test_what_another_model_version_predicted_is_not_taken_over(tmp_path: Path):
    out = tmp_path / "predictions.json"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(TASKS, out, predicting(breaks_at=3), version="v1")
    seen: list[str] = []
    predict_to_file(TASKS, out, predicting(seen=seen), version="v2")
    assert len(seen) == 5
