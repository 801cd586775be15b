"""What annotators made of pre-labels: by region id, beside the prediction that was shown, version by version."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend import acceptance
from backend.acceptance import Acceptance, Outcome, judged
from backend.journal import Journal
from backend.problems import Problems
from backend.service import Service
from backend.settings import Settings
from backend.tile import Tile
from tests.fakes import BrightSegmenter
from tests.small_label_studio import CONFIG, CREATED, TOKEN, SmallLabelStudio
from tests.small_server import as_json

SQUARE = [[10.0, 10.0], [20.0, 10.0], [20.0, 20.0], [10.0, 20.0]]
HALF = [[10.0, 10.0], [15.0, 10.0], [15.0, 20.0], [10.0, 20.0]]
PROJECT = "3.1700000000"
ABOUT = {"id": 3, "created_at": CREATED}


def region(name: str, points: list[list[float]] = SQUARE, label: str = "building", **more: Any) -> dict[str, Any]:
    return {
        "id": name, "from_name": "polygon", "to_name": "image", "type": "polygonlabels", "origin": "prediction",
        "original_width": 200, "original_height": 200, "image_rotation": 0, "score": 0.8,
        "value": {"points": points, "closed": True, "polygonlabels": [label]}, **more,
    }  # fmt: skip


def by_hand(name: str) -> dict[str, Any]:
    drawn = region(name, origin="manual")
    del drawn["score"]
    return drawn


def prediction(*results: dict[str, Any], number: int = 1, version: str = "v1", hour: int = 1) -> dict[str, Any]:
    return {"id": number, "result": list(results), "model_version": version, "created_at": at(hour)}


def annotation(*results: dict[str, Any], hour: int = 2, number: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": number, "result": list(results), "created_at": at(hour), "updated_at": at(hour), "task": 1, **more}


def task(annotations: Any, predictions: Any, **data: Any) -> dict[str, Any]:
    return {
        "id": 1, "data": {"image": "x.png", **data}, "annotations": list(annotations), "predictions": list(predictions)
    }  # fmt: skip


def at(hour: float) -> str:
    return f"2026-03-{1 + int(hour // 24):02d}T{int(hour % 24):02d}:00:00.000000Z"


def the_outcome(*arguments: Any, **data: Any) -> Outcome:
    (one,) = judged(task(*arguments, **data))
    return one.outcome


def test_each_region_counts_once_as_what_was_made_of_it():
    before = prediction(region("kept"), region("moved"), region("gone"), region("renamed"))
    after = annotation(
        region("kept"), region("moved", HALF), region("renamed", label="shed"), region("click", HALF), by_hand("hand")
    )
    found = the_outcome([after], [before])
    assert (found.predicted, found.unchanged, found.edited, found.deleted) == (4, 1, 2, 1)
    assert (found.clicked, found.drawn, found.annotations) == (1, 1, 1)
    figures = found.figures()
    assert figures["unchanged_rate"] == 0.25
    assert figures["accepted_rate"] == 0.75
    # Half of one of three outlines that were kept; the one that was renamed did not move.
    assert figures["edit_distance"] == pytest.approx(0.5 / 3, abs=1e-4)
    # Of 20 px by 20: the two vertices on the far side are 10 px from the other outline; all four of the half lie on it,
    # but for the two within, 10 px from the nearest side.
    assert figures["polis_px"] == pytest.approx(((0 + 10 + 10 + 0) / 4 + (0 + 0 + 0 + 0) / 4) / 2)
    assert figures["polis_m"] is None


def test_points_that_the_editor_rounded_are_no_edit():
    rounded = [[x + 5e-4, y] for x, y in SQUARE]
    assert the_outcome([annotation(region("a", rounded))], [prediction(region("a"))]).unchanged == 1


def test_a_tile_with_a_place_gives_the_distance_in_metres():
    tile = Tile.from_xyz(19, 386690, 220241, size=(200, 200))
    found = the_outcome([annotation(region("a", HALF))], [prediction(region("a"))], tile=tile.to_record())
    assert found.placed == 1
    assert found.polis_m == pytest.approx(found.polis_px * (tile.gsd_m or 0))
    broken = the_outcome([annotation(region("a", HALF))], [prediction(region("a"))], tile={"crs": 5})
    assert (broken.edited, broken.placed, broken.reshaped) == (1, 0, 1)


def test_prompts_left_over_and_labels_that_leaked_are_no_regions():
    prompt = {**region("p"), "type": "keypointlabels", "is_positive": True, "value": {"x": 1, "y": 1}}
    bare = {**region("q"), "type": "rectangle", "value": {"x": 1, "y": 1, "width": 2, "height": 2}}
    leak = {**region("a"), "type": "keypointlabels", "value": {"keypointlabels": ["road"]}}
    found = the_outcome([annotation(leak, prompt, bare, region("a"), leak)], [prediction(region("a"))])
    assert found == Outcome(annotations=1, predicted=1, unchanged=1)


@pytest.mark.parametrize(
    ("annotated", "predictions", "version"),
    [
        pytest.param({}, [], None, id="nothing was predicted"),
        pytest.param({"result": [by_hand("x")]}, [prediction(region("a"))], None, id="begun from nothing"),
        pytest.param({"parent_prediction": 1}, [prediction(region("a"))], "v1", id="named, all deleted"),
        pytest.param({"parent_prediction": 9}, [prediction(region("a"))], None, id="named, and gone"),
        pytest.param(
            {"result": [region("b")]},
            [prediction(region("a")), prediction(region("b"), number=2, version="v2")],
            "v2",
            id="by its ids",
        ),
        pytest.param({"result": [region("a")]}, [prediction(region("a"), hour=5)], None, id="predicted later"),
        pytest.param({"was_cancelled": True, "parent_prediction": 1}, [prediction(region("a"))], None, id="skipped"),
        pytest.param({"parent_prediction": 1}, [prediction(version="")], "unnamed", id="without a version"),
    ],
)
def test_an_annotation_is_judged_beside_what_its_annotator_was_shown(
    annotated: dict[str, Any], predictions: list[Any], version: str | None
):
    listed = list(judged(task([{**annotation(), **annotated}], predictions)))
    assert [one.version for one in listed] == ([] if version is None else [version])


def test_what_label_studio_itself_recorded_is_counted_as_it_was():
    folder = Path(__file__).resolve().parents[2] / "shared/fixtures/label-studio-1.23.2/exports"
    if not folder.is_dir():
        pytest.skip("no recordings of Label Studio beside the repository")
    pages = [json.loads(path.read_text())["tasks"] for path in sorted(folder.glob("tasks_fields_all_page*.json"))]
    found = {each["data"]["case"]: one.outcome for page in pages for each in page for one in judged(each)}
    assert sorted(found) == ["prelabel_edited", "prelabel_unchanged"]
    assert found["prelabel_unchanged"] == Outcome(annotations=1, predicted=2, unchanged=2)
    edited = found["prelabel_edited"]
    assert (edited.predicted, edited.edited, edited.deleted, edited.drawn) == (2, 1, 1, 0)
    assert 0 < edited.distance < 1


NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(), lambda inner: st.lists(inner)
    | st.dictionaries(st.sampled_from(["id", "result", "value", "points", "created_at", "original_width"]), inner),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(before=NAMES, after=NAMES, moved=st.sets(st.sampled_from("abcdefgh")))
def test_what_was_predicted_is_unchanged_edited_or_deleted_and_all_else_added(
    before: list[str], after: list[str], moved: set[str]
):
    results = [region(name, HALF if name in moved else SQUARE) for name in after]
    found = the_outcome([annotation(*results, parent_prediction=1)], [prediction(*(region(name) for name in before))])
    assert found.predicted == len(before) == found.unchanged + found.edited + found.deleted
    assert found.clicked + found.drawn == len(set(after) - set(before))
    assert found.edited == len(set(after) & set(before) & moved)
    assert found.distance == pytest.approx(0.5 * found.edited)


@settings(deadline=None, max_examples=60)
@given(first=ANYTHING, second=ANYTHING, third=ANYTHING)
def test_nonsense_from_the_wire_is_counted_or_left_out_but_never_stops(first: Any, second: Any, third: Any):
    results = [{**region("a"), "value": first}, {**region("b"), "original_width": second}, third]
    mixed = task(
        [{**annotation(*results), "created_at": first, "parent_prediction": second}, first],
        [{**prediction(region("a"), region("b")), "created_at": third}, second],
        tile=third,
    )
    facts = acceptance.facts_of(list(judged(mixed)))
    json.dumps(facts, allow_nan=False)


def test_curves_are_bounded_and_add_up_to_the_figures_of_each_version():
    tasks = [
        task([annotation(region("a", HALF if hour % 3 else SQUARE), hour=hour)],
             [prediction(region("a"), version=f"v{hour // 60}", hour=0)])
        for hour in range(0, 180, 2)
    ]  # fmt: skip
    facts = acceptance.facts_of([one for each in tasks for one in judged(each)])
    assert [version["name"] for version in facts["versions"]] == ["v0", "v1", "v2"]
    assert facts["span_s"] == 6 * 3600
    times = sorted({point["from"] for point in facts["curve"]})
    assert len(times) <= acceptance.BUCKETS + 1
    assert all((b - a) % facts["span_s"] == 0 for a, b in itertools.pairwise(times))
    for version in facts["versions"]:
        own = [point for point in facts["curve"] if point["version"] == version["name"]]
        for name in ("predicted", "unchanged", "edited", "deleted"):
            assert sum(point[name] for point in own) == version[name]


def event(number: int, made: dict[str, Any]) -> dict[str, Any]:
    return {"action": "ANNOTATION_CREATED", "project": {"id": 3}, "annotation": {**made, "id": number, "task": number},
            "task": {"id": number, "data": {"image": "x.png"}}}  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path) -> Acceptance:
    settings = Settings(data_dir=tmp_path)
    return Acceptance(settings, Journal(settings), Problems(tmp_path))


def test_figures_come_from_the_journal_beside_the_caller_and_follow_it(desk: Acceptance, tmp_path: Path):
    assert desk.facts() == {}
    desk.wait(10)
    assert desk.facts() == {}
    assert not (tmp_path / "acceptance.json").exists()

    journal = Journal(Settings(data_dir=tmp_path))
    journal.reconcile(PROJECT, [task([annotation(region("a"))], [prediction(region("a"), region("b"))])])
    desk._next_s = 0
    began = time.perf_counter()
    desk.facts()
    assert time.perf_counter() - began < 0.2
    desk.wait(10)
    (version,) = desk.facts()[PROJECT]["versions"]
    assert (version["name"], version["predicted"], version["unchanged"], version["deleted"]) == ("v1", 2, 1, 1)

    # Nothing is counted twice, and what another process counted is seen.
    counted = (tmp_path / "acceptance.json").stat().st_mtime_ns
    os.utime(tmp_path / "acceptance.json")
    desk._next_s = 0
    desk.facts()
    desk.wait(10)
    assert (tmp_path / "acceptance.json").stat().st_mtime_ns != counted
    (tmp_path / "acceptance.json").write_text('{"4.1": {"versions": [], "curve": [], "span_s": 600}}')
    assert list(desk.facts()) == ["4.1"]

    # The journal has no prediction of the task that this event is about, so it adds nothing.
    journal.note(PROJECT, event(2, annotation(by_hand("x"))))
    assert list(desk.count()) == [PROJECT]


def test_only_tasks_that_changed_are_judged_again_and_what_is_gone_is_forgotten(
    desk: Acceptance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(acceptance, "_OVERLAP_S", -0.01)
    seen: list[int] = []
    monkeypatch.setattr(acceptance, "judged", lambda task: seen.append(task["id"]) or judged(task))
    journal = Journal(Settings(data_dir=tmp_path))
    tasks = [{**task([annotation(region("a"), number=n)], [prediction(region("a"))]), "id": n} for n in (1, 2, 3)]
    journal.reconcile(PROJECT, tasks)

    def count() -> tuple[int, list[int]]:
        time.sleep(0.02)
        seen.clear()
        found = desk.count()
        time.sleep(0.02)
        return found[PROJECT]["versions"][0]["annotations"], list(seen)

    assert count() == (3, [1, 2, 3])
    assert count() == (3, [])
    journal.note(PROJECT, event(2, {**annotation(region("a", HALF)), "updated_at": at(5)}))
    assert count() == (3, [2])
    assert desk.count()[PROJECT]["versions"][0]["edited"] == 1
    journal.note(PROJECT, {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 3}]})
    assert count() == (2, [])
    journal.reconcile(PROJECT, tasks)
    assert count() == (3, [1, 2, 3])
    monkeypatch.setattr(acceptance, "MAX_KEPT", 2)
    assert count() == (3, [])
    assert count() == (3, [1, 2, 3])


@pytest.fixture
def around(tmp_path: Path) -> Iterator[tuple[SmallLabelStudio, Service]]:
    with SmallLabelStudio() as label_studio:
        at = {"label_studio_url": label_studio.server.url, "label_studio_api_key": TOKEN}
        service = Service(Settings(data_dir=tmp_path, **at), segmenter=BrightSegmenter())
        yield label_studio, service
        service.close()


def shown_at(service: Service, number: int, *predictions: dict[str, Any], **kept: Any) -> dict[str, Any]:
    """Label Studio has these predictions of a task; the event of its annotation, which began from the last one."""
    made = {**annotation(region("a", **kept), number=number, parent_prediction=predictions[-1]["id"]), "task": number}
    return {"action": "ANNOTATION_CREATED", "project": {**ABOUT, "label_config": CONFIG}, "annotation": made,
            "task": {"id": number, "data": {"image": "x.png"}}}  # fmt: skip


def curves(service: Service, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline, found = time.monotonic() + 20, {}
    while time.monotonic() < deadline:
        found = {each["name"]: each for each in service.acceptance.facts().get(PROJECT, {}).get("versions", [])}
        if until(found):
            break
        time.sleep(0.05)
    return found


def test_a_save_is_on_the_curves_at_once_with_the_prediction_that_label_studio_tells(
    around: tuple[SmallLabelStudio, Service],
):
    label_studio, service = around
    first, second = prediction(region("a"), number=10), prediction(region("a"), number=11, version="v2")
    label_studio.tasks[1] = task([], [first])
    assert service.acceptance.facts() == {}
    began = time.monotonic()
    service.event(shown_at(service, 1, first))
    assert time.monotonic() - began < 1
    found = curves(service, lambda found: "v1" in found)
    assert (found["v1"]["unchanged"], found["v1"]["annotations"]) == (1, 1)

    # Known by now: nobody asks again, until an annotation names another.
    asked = [each.path for each in label_studio.server.asked]
    service.event({**shown_at(service, 1, first), "action": "ANNOTATION_UPDATED"})
    service.acceptance.wait(20)
    assert [each.path for each in label_studio.server.asked] == asked == ["/api/tasks/1/"]
    label_studio.tasks[2] = {**task([], [first, second]), "id": 2}
    service.event(shown_at(service, 2, first, second))
    assert curves(service, lambda found: "v2" in found)["v2"]["unchanged"] == 1
    service.event({"action": "ANNOTATIONS_DELETED", "project": ABOUT,
                   "annotations": [{"id": 2}]})  # fmt: skip
    assert list(curves(service, lambda found: "v2" not in found)) == ["v1"]


def test_label_studio_that_does_not_answer_is_asked_at_reconciliation_and_holds_nothing_up(
    around: tuple[SmallLabelStudio, Service],
):
    label_studio, service = around
    label_studio.fault = lambda asked: as_json({"detail": "no"}, 403)
    first = prediction(region("a"), number=10)
    service.event(shown_at(service, 1, first))
    service.acceptance.wait(20)
    service.event({**shown_at(service, 1, first), "action": "ANNOTATION_UPDATED"})
    service.acceptance.wait(20)
    assert len(label_studio.server.asked) == 1
    assert service.acceptance.facts() == {}
    assert "acceptance" in service.problems.recent()[0].where
    label_studio.fault = lambda asked: None
    label_studio.tasks[1] = task([shown_at(service, 1, first)["annotation"]], [first])
    service._reconcile()
    service.acceptance.note(PROJECT, [])
    assert curves(service, lambda found: "v1" in found)["v1"]["unchanged"] == 1


@pytest.mark.parametrize("number", [True, 2**70, -1, "x", None])
def test_an_event_of_a_task_that_cannot_be_is_no_trouble(around: tuple[SmallLabelStudio, Service], number: Any):
    _, service = around
    odd = shown_at(service, 1, prediction(region("a"), number=10))
    odd["annotation"]["task"] = number
    odd["annotation"]["parent_prediction"] = {"id": 1}
    service.event(odd)
    service.acceptance.wait(20)
    assert service.problems.recent() == []


def test_a_damaged_journal_is_a_problem_on_the_status_page_and_no_error(desk: Acceptance, tmp_path: Path):
    (tmp_path / "journal.sqlite3").write_bytes(b"not a database" * 100)
    desk.facts()
    desk.wait(10)
    assert desk.facts() == {}
    assert "acceptance" in Problems(tmp_path).recent()[0].where
