"""How predicted polygons are judged, on the ground and, by the same definitions, in the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import Polygon, affinity
from shapely.geometry.base import BaseGeometry

from backend.errors import ExportError
from backend.evaluation import OBJECT_FATES, PREDICTION_FATES, Overlaps, evaluate, polis

METRE = 1 / 111_320
"""About one metre at the equator, in degrees."""


def square(x_m: float, y_m: float, side_m: float = 10) -> Polygon:
    return shapely.box(x_m * METRE, y_m * METRE, (x_m + side_m) * METRE, (y_m + side_m) * METRE)


def written(path: Path, shapes: Sequence[BaseGeometry], labels: Sequence[str] | None = None) -> Path:
    names = labels or [None] * len(shapes)
    features = [
        {"type": "Feature", "properties": {"label": name} if name else {}, "geometry": shapely.geometry.mapping(shape)}
        for shape, name in zip(shapes, names, strict=True)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def overlaps_of(guesses: Sequence[Polygon], truths: Sequence[Polygon]) -> Overlaps:
    listed = [(i, j, g.intersection(t).area) for i, g in enumerate(guesses) for j, t in enumerate(truths)]
    i, j, shared = (np.array(column) for column in zip(*[row for row in listed if row[2]], strict=True))
    return Overlaps(i, j, shared, *(np.array([shape.area for shape in shapes]) for shapes in (guesses, truths)))


def test_each_object_and_each_prediction_has_its_fate() -> None:
    box = shapely.box
    truths = [
        box(0, 0, 10, 10),  # outlined well
        box(20, 0, 30, 10), box(31, 0, 41, 10),  # under one outline
        box(50, 0, 70, 10),  # in three pieces
        box(80, 0, 90, 10),  # outlined poorly
        box(100, 0, 110, 10),  # touched in a corner
        box(120, 0, 130, 10),  # not seen
    ]  # fmt: skip
    guesses = [
        box(1, 0, 11, 10),
        box(20, 0, 41, 10),
        box(50, 0, 56, 10), box(57, 0, 63, 10), box(64, 0, 70, 10),
        box(80, 0, 84, 10),
        box(108, 8, 118, 18),
        box(200, 0, 210, 10),
    ]  # fmt: skip
    overlaps = overlaps_of(guesses, truths)
    pairs = overlaps.pairs()
    assert [(i, j) for i, j, _ in pairs] == [(0, 0)]
    objects, predictions = overlaps.fates(pairs)
    assert objects == ["found", "merged", "merged", "split", "poor outline", "missed", "missed"]
    assert predictions == ["right", "merged", *["split"] * 3, "poor outline", "false alarm", "false alarm"]


def test_an_outline_over_two_objects_can_still_be_right_of_the_larger() -> None:
    truths = [shapely.box(0, 0, 20, 10), shapely.box(21, 0, 25, 10)]
    overlaps = overlaps_of([shapely.box(0, 0, 25, 10)], truths)
    objects, predictions = overlaps.fates(overlaps.pairs())
    assert (objects, predictions) == (["found", "merged"], ["right"])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_pairs_are_one_to_one_and_none_better_is_left_out(data: st.DataObject) -> None:
    side = st.integers(1, 6)
    corner = st.tuples(st.integers(0, 12), st.integers(0, 12), side, side)
    boxes = st.lists(corner, min_size=1, max_size=8).map(
        lambda found: [shapely.box(x, y, x + w, y + h) for x, y, w, h in found]
    )
    guesses, truths = data.draw(boxes), data.draw(boxes)
    listed = [(i, j, g.intersection(t).area) for i, g in enumerate(guesses) for j, t in enumerate(truths)]
    i, j, shared = (np.array(column) for column in zip(*listed, strict=True))
    overlaps = Overlaps(i, j, shared, shapely.area(guesses), shapely.area(truths))
    pairs = overlaps.pairs(0.3)
    assert len({i for i, _, _ in pairs}) == len({j for _, j, _ in pairs}) == len(pairs)
    for value, i, j in zip(overlaps.ious, overlaps.predicted, overlaps.true, strict=True):
        rivals = [share for m, n, share in pairs if m == i or n == j]
        assert value < 0.3 or max(rivals, default=0) >= value
    objects, predictions = overlaps.fates(pairs)
    assert objects.count("found") == predictions.count("right") == len(pairs)
    assert set(objects) <= set(OBJECT_FATES)
    assert set(predictions) <= set(PREDICTION_FATES)


def test_figures_of_a_file_beside_its_truth(tmp_path: Path) -> None:
    truth = [square(0, 0), square(20, 0), square(31, 0), square(60, 0)]
    guess = [square(0, 0), shapely.box(20 * METRE, 0, 41 * METRE, 10 * METRE), square(200, 0)]
    figures = evaluate(written(tmp_path / "guess.geojson", guess), written(tmp_path / "truth.geojson", truth))
    assert (figures.matched, figures.predicted, figures.truth) == (1, 3, 4)
    assert figures.objects == {"found": 1, "merged": 2, "split": 0, "poor outline": 0, "missed": 1}
    assert figures.predictions == {"right": 1, "merged": 1, "split": 0, "poor outline": 0, "false alarm": 1}
    # 30 of 100 m wide truths are found; 10 m more are between two of them, 10 m invented.
    assert figures.area_iou == pytest.approx(30 / (40 + 1 + 10), abs=1e-3)
    assert figures.vertices_per_polygon == 4
    assert figures.polis_m == pytest.approx(0, abs=1e-6)


def test_labels_are_not_mixed_up(tmp_path: Path) -> None:
    guess = written(tmp_path / "guess.geojson", [square(0, 0), square(20, 0)], ["building", "road"])
    truth = written(tmp_path / "truth.geojson", [square(0, 0), square(20, 0)], ["building", "building"])
    assert evaluate(guess, truth).matched == 1
    only = evaluate(guess, truth, label="building")
    assert (only.predicted, only.truth, only.matched) == (1, 2, 1)


@pytest.mark.parametrize(("guessed", "true", "f1"), [(0, 0, 1.0), (0, 2, 0.0), (2, 0, 0.0)])
def test_empty_files_are_judged_too(tmp_path: Path, guessed: int, true: int, f1: float) -> None:
    shapes = [square(0, 0), square(20, 0)]
    figures = evaluate(
        written(tmp_path / "guess.geojson", shapes[:guessed]), written(tmp_path / "truth.geojson", shapes[:true])
    )
    assert (figures.f1, figures.predicted, figures.truth) == (f1, guessed, true)
    assert figures.area_iou == f1
    assert figures.objects["missed"] == true
    assert figures.predictions["false alarm"] == guessed


def test_a_file_of_lines_is_refused(tmp_path: Path) -> None:
    sound, lines = tmp_path / "sound.geojson", tmp_path / "lines.geojson"
    written(sound, [square(0, 0)])
    written(lines, [square(0, 0).boundary])
    with pytest.raises(ExportError, match=r"lines\.geojson has 1 features and no polygon"):
        evaluate(lines, sound)


def test_polis_counts_each_vertex_once() -> None:
    # Two vertices of each lie 1 off the other's outline, two lie on it.
    one = shapely.box(0, 0, 10, 10)
    assert polis(one, affinity.translate(one, 1, 0)) == pytest.approx(0.5)
    assert polis(one, one) == 0
