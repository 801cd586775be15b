"""Many pre-labels: to a file that appears whole, or into Label Studio once each; on from where a run was broken off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from backend import bulk
from backend.bulk import Failed, predict_project, predict_to_file
from backend.client import LabelStudio
from backend.errors import BackendError, LabelStudioError

from .small_server import Answer, Asked, SmallServer, as_json

TASKS = [{"data": {"image": f"http://x/{number}.png"}} for number in range(7)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BLOCK_TASKS", 3)
    monkeypatch.setattr(bulk, "_PAUSES_S", (0.05, 0.05, 0.05))


def predicting(
    *, fails_at: int | None = None, breaks_at: int | None = None, seen: list[int] | None = None, version: str = "v1"
) -> Any:
    def predict(tasks: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, bulk.Outcome]]:
        for number, task in tasks:
            if number == breaks_at:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append(number)
            assert task["data"]["image"].endswith(f"/{number}.png")
            found = {"result": [{"id": str(number)}], "model_version": version, "score": 0.5}
            yield number, Failed("no such image") if number == fails_at else found

    return predict


def to_file(out: Path, predict: Any, *, tasks: list[Any] = TASKS, fingerprint: str = "v1", **more: Any) -> Any:
    return predict_to_file(lambda: tasks, out, predict, fingerprint=fingerprint, **more)


def test_all_tasks_are_written_in_order_with_their_predictions(tmp_path: Path):
    out = tmp_path / "predictions.json"
    report = to_file(out, predicting())
    assert (report.tasks, report.predicted, report.failed, report.polygons, report.resumed) == (7, 7, 0, 7, 0)
    written = json.loads(out.read_text())
    assert [task["data"] for task in written] == [task["data"] for task in TASKS]
    assert [task["predictions"][0]["result"][0]["id"] for task in written] == [str(number) for number in range(7)]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_predictions_may_come_in_any_order(tmp_path: Path):
    def shuffled(tasks: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, bulk.Outcome]]:
        yield from reversed(list(predicting()(tasks)))

    to_file(tmp_path / "straight.json", predicting())
    to_file(tmp_path / "shuffled.json", shuffled)
    assert (tmp_path / "shuffled.json").read_bytes() == (tmp_path / "straight.json").read_bytes()


def test_no_tasks_are_an_empty_list(tmp_path: Path):
    assert to_file(tmp_path / "none.json", predicting(), tasks=[]).tasks == 0
    assert json.loads((tmp_path / "none.json").read_text()) == []


@pytest.mark.parametrize("breaks_at", range(7))
def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, breaks_at: int):
    out = tmp_path / "predictions.json"
    with pytest.raises(KeyboardInterrupt):
        to_file(out, predicting(breaks_at=breaks_at))
    assert not out.exists()
    # As a kill in the middle of a line would leave it.
    for lines in tmp_path.glob("*/*.jsonl"):
        with lines.open("a") as file:
            file.write('\n{"name": "abc", "predi')
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        to_file(out, predicting(seen=seen, breaks_at=6) if breaks_at < 6 else predicting(breaks_at=6))
    report = to_file(out, predicting(seen=seen))
    assert seen == list(range(breaks_at, 7))
    assert (report.predicted, report.resumed) == (7, 6)
    assert all(len(task["predictions"]) == 1 for task in json.loads(out.read_text()))
    assert not list(tmp_path.glob("*.blocks"))


def test_what_another_model_or_config_predicted_is_not_taken_over(tmp_path: Path):
    out = tmp_path / "predictions.json"
    with pytest.raises(KeyboardInterrupt):
        to_file(out, predicting(breaks_at=4))
    seen: list[int] = []
    to_file(out, predicting(seen=seen, version="v2"), fingerprint="v2")
    assert seen == list(range(7))
    assert {task["predictions"][0]["model_version"] for task in json.loads(out.read_text())} == {"v2"}


def test_tasks_that_failed_are_named_and_tried_again_by_the_next_run(tmp_path: Path):
    out = tmp_path / "predictions.json"
    report = to_file(out, predicting(fails_at=2))
    assert (report.predicted, report.failed) == (6, 1)
    assert report.failures[0].reason == "no such image"
    assert "http://x/2.png" in report.failures[0].task
    assert [len(task["predictions"]) for task in json.loads(out.read_text())] == [1, 1, 0, 1, 1, 1, 1]
    seen: list[int] = []
    assert to_file(out, predicting(seen=seen)).predicted == 7
    assert seen == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_the_results_can_be_kept_as_parquet(tmp_path: Path):
    to_file(tmp_path / "p.json", predicting(fails_at=4), keep_blocks=True)
    table = pa.concat_tables(parquet.read_table(path) for path in sorted(tmp_path.glob("p.json.blocks/*.parquet")))
    assert table["task"].to_pylist() == list(range(7))
    assert table["polygons"].to_pylist() == [1, 1, 1, 1, None, 1, 1]
    assert table["error"].to_pylist()[4] == "no such image"
    assert table.schema.metadata[b"fingerprint"] == b"v1"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1" * 9)])
def test_a_damaged_block_is_predicted_again(tmp_path: Path, damage: Callable[[Path], Any]):
    out = tmp_path / "predictions.json"
    with pytest.raises(KeyboardInterrupt):
        to_file(out, predicting(breaks_at=6))
    damage(tmp_path / "predictions.json.blocks" / "0000001.parquet")
    seen: list[int] = []
    to_file(out, predicting(seen=seen))
    assert seen == [3, 4, 5, 6]


def test_two_runs_do_not_write_one_file(tmp_path: Path):
    def nested(tasks: Any) -> Any:
        with pytest.raises(BackendError, match="another run is at work"):
            to_file(tmp_path / "p.json", predicting())
        return predicting()(tasks)

    assert to_file(tmp_path / "p.json", nested).predicted == 7


def test_tasks_that_change_meanwhile_are_no_mixture(tmp_path: Path):
    lists = iter([TASKS, [*TASKS[:5], {"data": {"image": "http://x/new.png"}}, TASKS[6]]])
    with pytest.raises(BackendError, match=r"new\.png"):
        predict_to_file(lambda: next(lists), tmp_path / "p.json", predicting(), fingerprint="v1")
    assert not (tmp_path / "p.json").exists()


# --- Into Label Studio ---


class Store:
    """So much of Label Studio as bulk import speaks to; ``cut`` says which imports lose their answer or never come."""

    def __init__(self, count: int) -> None:
        self.predictions: dict[int, list[Any]] = {number: [] for number in range(1, count + 1)}
        self.cut: Callable[[int], str] = lambda imports: ""
        self.imports = 0
        self.server = SmallServer(self._answer)

    def _answer(self, asked: Asked) -> Answer:
        if asked.path.endswith("/import/predictions"):
            self.imports += 1
            cut = self.cut(self.imports)
            if cut == "before":
                return Answer(200, b"", promised=100)
            for one in asked.json:
                self.predictions[one["task"]].append(one)
            return Answer(201, b"{", promised=100) if cut else as_json({"created": len(asked.json)}, 201)
        if asked.path == "/api/tasks/":
            above = json.loads(httpx_query(asked.target)["query"])["filters"]["items"][0]["value"]
            return as_json({"tasks": [self._task(number) for number in self.predictions if number > above][:100]})
        return as_json(self._task(int(asked.path.strip("/").rpartition("/")[2])))

    def _task(self, number: int) -> dict[str, Any]:
        data = {"image": f"http://x/{number}.png"}
        return {"id": number, "data": data, "predictions": self.predictions[number], "annotations": []}


def httpx_query(target: str) -> dict[str, str]:
    from urllib.parse import parse_qsl, urlsplit

    return dict(parse_qsl(urlsplit(target).query))


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(7)
    with made.server:
        yield made


def to_project(store: Store, folder: Path, predict: Any) -> bulk.BulkReport:
    with LabelStudio(store.server.url, "t") as api:
        return predict_project(
            api, 3, predict, version="v1", fingerprint="v1 x", kept=folder / "bulk" / "3.jsonl", batch=2
        )  # fmt: skip


def test_a_project_gets_each_prediction_once_and_a_second_run_adds_nothing(store: Store, tmp_path: Path):
    assert to_project(store, tmp_path, predicting(fails_at=4)).failed == 1
    assert [len(found) for found in store.predictions.values()] == [1, 1, 1, 0, 1, 1, 1]
    assert to_project(store, tmp_path, predicting()).predicted == 1
    report = to_project(store, tmp_path, predicting())
    assert (report.predicted, report.resumed) == (0, 7)
    assert [len(found) for found in store.predictions.values()] == [1] * 7
    assert not (tmp_path / "bulk" / "3.jsonl").exists()


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_network_that_is_cut_loses_nothing_and_adds_nothing_twice(store: Store, tmp_path: Path, cut: str):
    store.cut = lambda imports: cut if imports in (1, 3, 4) else ""
    assert to_project(store, tmp_path, predicting()).predicted == 7
    assert [len(found) for found in store.predictions.values()] == [1] * 7


@pytest.mark.parametrize("cut", ["before", "after"])
def test_what_was_predicted_and_not_imported_is_not_predicted_again(store: Store, tmp_path: Path, cut: str):
    store.cut = lambda imports: cut if imports > 1 else ""
    seen: list[int] = []
    stopped = pytest.raises(LabelStudioError) if cut == "before" else pytest.raises(KeyboardInterrupt)
    with stopped:
        to_project(store, tmp_path, predicting(seen=seen, breaks_at=6))
    store.cut = lambda imports: ""
    report = to_project(store, tmp_path, predicting(seen=seen))
    assert sorted(seen) == list(range(1, 8))
    assert report.resumed + report.predicted == 7
    assert [len(found) for found in store.predictions.values()] == [1] * 7
