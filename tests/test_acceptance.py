"""What annotators made of pre-labels: by region id, beside the prediction that was shown, version by version."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend import acceptance
from backend.acceptance import Acceptance, Outcome, judged
from backend.journal import Journal
from backend.problems import Problems
from backend.settings import Settings
from backend.tile import Tile

SQUARE = [[10.0, 10.0], [20.0, 10.0], [20.0, 20.0], [10.0, 20.0]]
HALF = [[10.0, 10.0], [15.0, 10.0], [15.0, 20.0], [10.0, 20.0]]
PROJECT = "3.1700000000"


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


def test_a_damaged_journal_is_a_problem_on_the_status_page_and_no_error(desk: Acceptance, tmp_path: Path):
    (tmp_path / "journal.sqlite3").write_bytes(b"not a database" * 100)
    desk.facts()
    desk.wait(10)
    assert desk.facts() == {}
    assert "acceptance" in Problems(tmp_path).recent()[0].where
