"""Regions that go through arrays, and those that go one by one, come out the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import shape

from backend import annotations as drawn
from backend import collect
from backend.annotations import tasks_in
from backend.errors import ExportError
from backend.export import ExportOptions, export
from backend.formats import _boxes, _features
from backend.rings import Outlines, Rings, runs
from tests.test_export import CONFIG, SCENE, cut

SEEDS = st.integers(0, 100_000)


def mixture(seed: int, *, odd: float) -> list[dict[str, Any]]:
    """Tasks with regions of all kinds; ``odd`` is the share of those that are no plain polygons."""
    rng = np.random.default_rng(seed)
    tasks = []
    for number, tile in enumerate(cut(SCENE)[:4], 1):
        predicted: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for k in range(int(rng.integers(0, 12))):
            result = region(f"{number}-{k}é", rng, "odd" if rng.random() < odd else "plain")
            results.append(result)
            if rng.random() < 0.3:
                before = json.loads(json.dumps(result))
                if "points" in before["value"] and rng.random() < 0.5:
                    before["value"]["points"][0][0] += float(rng.choice([1e-5, 1.0]))
                predicted.append(before)
        annotation = {"id": number * 10, "result": results, "completed_by": int(rng.integers(3)), "lead_time": 3.5}
        tasks.append(
            {
                "id": number,
                "data": {"image": f"http://host/{number}.jpg", "tile": tile.to_record()},
                "annotations": [annotation],
                "predictions": [{"model_version": f"v{number % 2}", "result": predicted}],
            }
        )
    return tasks


def region(identity: str, rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """A region somewhere on the tile, or over its border."""
    label = str(rng.choice(["building", "road"], p=[0.8, 0.2]))
    count = int(rng.integers(3, 14))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    reach = rng.uniform(2, 9, count) if rng.random() < 0.5 else np.full(count, rng.uniform(2, 9))
    points = rng.uniform(0, 100, 2) + np.column_stack((np.cos(angles), np.sin(angles))) * reach[:, None]
    points = np.clip(points, 0, 100)
    result = {
        "id": identity,
        "type": "polygonlabels",
        "from_name": "polygon",
        "to_name": "image",
        "value": {"points": points.tolist(), "polygonlabels": [label], "closed": True},
    }
    if rng.random() < 0.3:
        result["score"] = float(rng.random())
    if rng.random() < 0.2:
        result["origin"] = str(rng.choice(["manual", "prediction", "prediction-changed"]))
    if kind == "odd":
        match int(rng.integers(8)):
            case 0:
                result["value"]["points"] = points[rng.permutation(count)].tolist()
            case 1:
                result["value"]["points"].append(points[0].tolist())
            case 2:
                result["value"]["points"].insert(1, points[0].tolist())
            case 3:
                result["value"]["points"] = (points * 1.4 - 20).tolist()
            case 4:
                box = {"x": 10.0, "y": 20.0, "width": 7.0, "height": 9.0, "rotation": 30}
                result |= {"type": "rectanglelabels", "value": box | {"rectanglelabels": [label]}}
            case 5:
                result |= {"type": "keypointlabels", "value": {"x": 40.0, "y": 50.0, "keypointlabels": [label]}}
            case 6:
                # A square with a hole that hangs on a bridge.
                ring = [
                    (10, 10),
                    (30, 10),
                    (30, 30),
                    (10, 30),
                    (10, 10),
                    (15, 15),
                    (15, 25),
                    (25, 25),
                    (25, 15),
                    (15, 15),
                ]
                result["value"]["points"] = [list(map(float, point)) for point in ring]
            case _:
                result["value"]["points"] = [[1, "x"], {"y": 2}, None, [1e400, 5, 7], []][: count % 5 + 1]
    return result


def exported(tasks: Any, out: Path, **options: Any) -> list[dict[str, Any]]:
    try:
        export(tasks, out, label_config=CONFIG, options=ExportOptions(**options))
    except ExportError:
        return []
    return json.loads(out.read_text())["features"]


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, odd=st.sampled_from([0.0, 0.2, 0.6]), merge=st.booleans())
def test_a_mixture_is_the_same_through_arrays_and_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, odd: float, merge: bool
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    tasks = mixture(seed, odd=odd)
    quick = exported(tasks, folder / "quick.geojson", merge_seams=merge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "plain_outlines", lambda *args: None)
        careful = exported(tasks, folder / "careful.geojson", merge_seams=merge)
    assert [feature["properties"]["id"] for feature in quick] == [feature["properties"]["id"] for feature in careful]
    for a, b in zip(quick, careful, strict=True):
        area_a, area_b = a["properties"].pop("area_m2"), b["properties"].pop("area_m2")
        assert area_a == pytest.approx(area_b, abs=1e-3)
        assert a["properties"] == b["properties"]
        one, other = shape(a["geometry"]), shape(b["geometry"])
        assert one.geom_type == other.geom_type
        assert one.symmetric_difference(other).area <= 1e-7 * max(one.length, 1e-7)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1.1e-7)


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_tasks_from_a_file_and_from_memory_make_the_same_text(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("text")
    tasks = mixture(seed, odd=0.3)
    (folder / "tasks.json").write_text(json.dumps(tasks).replace("Infinity", "1e400"))
    tasks = json.loads((folder / "tasks.json").read_text())
    texts = []
    for number, listed in enumerate((tasks, tasks_in(folder / "tasks.json", unread=True))):
        out = folder / f"{number}.geojsonl"
        try:
            export(listed, out, label_config=CONFIG)
        except ExportError:
            continue
        texts.append(out.read_text())
    assert texts[1:] == texts[:1] * (len(texts) - 1)
    assert len(texts) in (0, 2)


@pytest.mark.parametrize(("name", "limit"), [("BATCH_OUTLINES", 3), ("_BATCH_BYTES", 500)])
def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    tasks = [task | {"id": number} for number, task in enumerate(mixture(1, odd=0.2) + mixture(2, odd=0.2))]
    whole = exported(tasks, tmp_path / "whole.geojson")
    laid_down = []
    before = collect.Reader._lay_down
    monkeypatch.setattr(collect.Reader, "_lay_down", lambda *args: (laid_down.append(1), before(*args))[1])
    monkeypatch.setattr(collect, name, limit)
    assert exported(tasks, tmp_path / "parts.geojson") == whole
    assert len(laid_down) > 2


# Rings


@settings(deadline=None, max_examples=100)
@given(
    rings=st.lists(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=9)
        | st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=3, max_size=9),
        min_size=1,
        max_size=6,
    )
)
def test_rings_are_judged_and_measured_as_geos_does(rings: list[list[tuple[float, float]]]) -> None:
    points = np.array([point for ring in rings for point in ring], np.float64)
    found = Rings.closed(points, np.array([len(ring) for ring in rings]))
    polygons = found.polygons()
    twice = np.array([any(a == b for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)) for ring in rings])
    assert found.are_simple().tolist() == (shapely.is_valid(polygons) & ~twice).tolist()
    assert found.bounds.tolist() == shapely.bounds(polygons).tolist()
    simple = found.are_simple()
    is_ccw = shapely.is_ccw(shapely.get_exterior_ring(polygons))
    expected = np.where(is_ccw, 1, -1) * shapely.area(polygons)
    assert found.areas[simple] == pytest.approx(expected[simple], rel=1e-9, abs=1e-9)
    turned = found.turned(found.areas < 0).polygons()[simple]
    assert all(a.equals_exact(b, 0) for a, b in zip(turned, shapely.orient_polygons(polygons[simple]), strict=True))
    last = found.take(np.array([len(rings) - 1])).polygons()[0]
    assert last.equals_exact(polygons[-1], 0)


def test_runs_follow_each_other() -> None:
    assert runs(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert runs(np.array([5, 9]), np.array([2, 1]), again=np.array([5, 9])).tolist() == [5, 6, 5, 9, 9]
    assert runs(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []


DEGREES = st.integers(-1_800_000_000, 1_800_000_000) | st.integers(-50, 50) | st.sampled_from([870_000_000, 5_000_000])


@settings(deadline=None, max_examples=100)
@given(corner=st.tuples(DEGREES, DEGREES.map(lambda step: step // 2)), side=st.integers(1, 2_000_000))
def test_numbers_are_written_as_they_are_and_no_longer(corner: tuple[int, int], side: int) -> None:
    x, y = (np.clip(np.array([at, at + side]), -limit, limit) for at, limit in zip(corner, (18e8, 9e8), strict=True))
    points = np.array([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[0])]) / 1e7
    outlines = Outlines(Rings(points, np.array([4])), np.array([0]), np.empty(0, object), np.empty(0, np.int64))
    from backend.formats import FIELDS, Batch

    columns = {name: [[] if kind == "ids" else None] for name, kind in FIELDS.items()}
    text = _features(Batch(outlines, columns), _boxes(outlines), between="\n").decode()
    feature = json.loads(text)
    assert feature["geometry"]["coordinates"] == [points.tolist()]
    assert feature["bbox"] == [*points.min(axis=0), *points.max(axis=0)]
    numbers = text.split('"coordinates":')[1].replace("]", ",").replace("[", ",").strip(",}").split(",")
    assert all(len(number.partition(".")[2]) <= 7 for number in numbers if number)


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, far=st.sampled_from([0.0, 1e6]))
def test_what_two_rings_share_is_as_large_as_geos_says(seed: int, far: float) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 15, 20)
    rings = []
    for length in lengths.tolist():
        angles = np.sort(rng.uniform(0, 2 * np.pi, length))[:: int(rng.choice([1, -1]))]
        reach = rng.uniform(1, 9, (length, 1))
        ring = far + rng.uniform(0, 12, 2) + np.column_stack((np.cos(angles), np.sin(angles))) * reach
        # On a grid, edges are upright, equal, and touch.
        rings.append(np.round(ring) if rng.random() < 0.4 else ring)
    found = Rings.closed(np.concatenate(rings), lengths)
    found = found.take(np.flatnonzero(found.are_simple()))
    pairs = np.array([(a, b) for a in range(len(found)) for b in range(len(found))], np.int64).reshape(-1, 2)
    shapes = found.polygons()
    expected = shapely.area(shapely.intersection(shapes[pairs[:, 0]], shapes[pairs[:, 1]]))
    assert found.common_areas(pairs) == pytest.approx(expected, abs=1e-7 if far else 1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backend.rings._MANY", 100)
        assert found.common_areas(pairs) == pytest.approx(expected, abs=1e-7 if far else 1e-9)
    outlines = Outlines.of(shapes)
    assert outlines.common_areas(pairs) == pytest.approx(expected)
    assert outlines.areas == pytest.approx(np.abs(found.areas))


@settings(deadline=None, max_examples=8)
@given(seed=SEEDS, overlap_px=st.sampled_from([0, 16, 64, 200]), noise_pct=st.sampled_from([0.0, 0.2]))
def test_groups_at_seams_are_the_same_at_once_and_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, overlap_px: int, noise_pct: float
) -> None:
    from backend import seams
    from benchmarks import export as bench

    folder, rng = tmp_path_factory.mktemp("seams"), np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "OVERLAP_PX", overlap_px)
        bench.make_export(folder / "tasks.json", 400, seed=seed)
        tasks = json.loads((folder / "tasks.json").read_text())
        for task in tasks:
            for result in task["annotations"][0]["result"]:
                points = np.array(result["value"]["points"])
                is_inside = (points > 0.2) & (points < 99.8)
                result["value"]["points"] = (points + rng.normal(0, noise_pct, points.shape) * is_inside).tolist()
        export(tasks, folder / "quick.geojsonl")
        winners = seams._winners

        def careful(*args: Any) -> Any:
            return np.where(np.diff(args[4]) > 1, seams._UNCLEAR, winners(*args))

        patch.setattr(seams, "_winners", careful)
        export(tasks, folder / "careful.geojsonl")
    assert (folder / "quick.geojsonl").read_text() == (folder / "careful.geojsonl").read_text()
