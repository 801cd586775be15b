"""Single objects from class and border maps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shapely import Polygon
from shapely.affinity import rotate

from backend import instances as module
from backend.errors import BadConfig
from backend.instances import Candidates, candidates, exclusive, expected_f1, find, instances, pooled
from backend.segmenter import DenseMaps
from backend.vectorize import VectorizeOptions, polygons, rasterize
from tests.test_vectorize import EXACT, OPTIONS, assert_sound, coverage, iou


def maps(truths: list[Polygon], height: int, width: int) -> DenseMaps:
    """What a good model says of the shapes: their coverage, and their outlines 2–3 pixels wide."""
    rows, cols = np.mgrid[:height, :width] + 0.5
    away = shapely.distance(shapely.union_all([t.boundary for t in truths]), shapely.points(cols, rows))
    boundary = 0.9 * np.exp(-((away / 1.3) ** 2))
    nothing = np.zeros((height, width))
    probabilities = np.stack((nothing, 0.95 * coverage(truths, height, width))).astype(np.float32)
    return DenseMaps(("tree", "building"), probabilities, np.stack((nothing, boundary)).astype(np.float32))


@pytest.mark.parametrize("angle", [0, 17, 45])
def test_houses_in_a_row_are_told_apart(angle: float) -> None:
    truths = [rotate(shapely.box(20 + 20 * i, 45, 40 + 20 * i, 75), angle, origin=(60, 60)) for i in range(4)]
    found = instances(maps(truths, 120, 120), "building")
    assert len(found) == 4
    for instance in found:
        (polygon,) = instance.polygons
        assert max(iou(polygon, truth) for truth in truths) > 0.96
        assert 0.5 < instance.score <= 1
    drawn = [instance.polygons[0] for instance in found]
    shared = sum(a.intersection(b).area for i, a in enumerate(drawn) for b in drawn[:i])
    assert shared <= 0.005 * sum(p.area for p in drawn)
    assert shapely.union_all(drawn).area == pytest.approx(4 * 600, rel=0.015)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_neighbours_share_their_border_before_simplification(threshold: float) -> None:
    truths = [rotate(shapely.box(20 + 20 * i, 45, 40 + 20 * i, 75), 30, origin=(60, 60)) for i in range(4)]
    found = instances(maps(truths, 120, 120), "building", threshold=threshold, options=EXACT)
    assert len(found) == 4
    assert shapely.coverage_is_valid([instance.polygons[0] for instance in found])
    assert isinstance(shapely.union_all([instance.polygons[0] for instance in found]), Polygon)


def test_objects_apart_are_found_as_if_each_were_alone() -> None:
    truths = [shapely.box(10, 10, 40, 30), rotate(shapely.box(60, 60, 100, 90), 20)]
    dense = maps(truths, 120, 120)
    found = instances(dense, "building")
    assert [i.polygons[0].wkb for i in found] == [p.wkb for p in polygons(dense.probabilities[1])]
    assert instances(dense, "tree") == []


def test_an_object_of_which_nothing_is_core_is_found_all_the_same() -> None:
    probability = np.zeros((1, 40, 40), np.float32)
    probability[0, 10:14, 5:35] = 0.8
    found = instances(DenseMaps(("road",), probability, np.full((1, 40, 40), 0.9, np.float32)), "road")
    assert len(found) == 1
    assert found[0].polygons[0].area == pytest.approx((4 - 0.25) * (30 - 0.25), rel=0.01)


@pytest.mark.parametrize(("rows_of_border", "objects"), [(slice(30, 40), 1), (slice(10, 26), 1), (slice(10, 56), 2)])
def test_a_border_cuts_an_object_where_it_runs_along_most_of_the_way(rows_of_border: slice, objects: int) -> None:
    dense = maps([shapely.box(10, 10, 60, 60)], 70, 70)
    boundary = dense.boundary.copy()
    boundary[1, rows_of_border, 35:37] = 0.95
    assert len(instances(DenseMaps(dense.labels, dense.probabilities, boundary), "building")) == objects


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from(OPTIONS))
@settings(max_examples=20, deadline=None)
def test_instances_of_noise_are_sound_and_cover_all_of_it(seed: int, sigma: float, options: VectorizeOptions) -> None:
    rng = np.random.default_rng(seed)
    noise, boundary = (ndimage.gaussian_filter(rng.random((1, 32, 28)), (0, sigma, sigma)) for _ in range(2))
    noise = np.clip((noise - noise.mean()) / noise.std() / 4 + 0.5, 0, 1).astype(np.float32)
    noise[0, 3, 3], boundary[0, 4, 4] = np.nan, np.inf
    dense = DenseMaps(("x",), noise, boundary.astype(np.float32))
    found = instances(dense, "x", least_score=0, options=options)
    for instance in found:
        assert 0 <= instance.score <= 1
        assert_sound(list(instance.polygons), (32, 28), options)
    if options is EXACT:
        painted = np.zeros((32, 28), int)
        for instance in found:
            painted += rasterize(instance.polygons, 32, 28)
        assert np.array_equal(painted, (np.nan_to_num(noise[0]) >= 0.5).astype(int))


def test_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(BadConfig, match="no class 'lake'; it has tree, building"):
        instances(maps([shapely.box(1, 1, 9, 9)], 10, 10), "lake")


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0, 50))
def test_a_tile_is_the_better_the_surer_its_outlines_and_the_less_was_left_out(chances: list[float], doubt: float):
    whole = expected_f1(chances, doubt)
    assert 0 <= whole <= 1
    assert expected_f1(chances, doubt + 1) < whole
    assert expected_f1([*chances, 0.0], doubt) < whole
    assert expected_f1([1.0] * len(chances), 0.0) == 1.0
    assert expected_f1([], 0.0) == 1.0


def test_what_is_left_out_as_unlikely_is_doubted():
    probability = np.zeros((1, 60, 60), np.float32)
    probability[0, 5:25, 5:25] = 0.95
    probability[0, 35:55, 35:55] = 0.55
    dense = DenseMaps(("house",), probability, np.zeros((1, 60, 60), np.float32))
    every = find(dense, "house", least_score=0.0)
    assert len(every.instances) == 2
    assert every.doubt == 0
    surer, other = sorted((instance.score for instance in every.instances), reverse=True)
    one = find(dense, "house", least_score=(surer + other) / 2)
    assert [instance.score for instance in one.instances] == [surer]
    assert one.doubt == pytest.approx(other)


def pieces_of(found: Candidates, node: int) -> list[int]:
    one, other = found.children[node].tolist()
    return pieces_of(found, one) + pieces_of(found, other) if one else [node]


def noise(seed: int, height: int, width: int, count: int) -> np.ndarray:
    rough = np.random.default_rng(seed).random((count, height, width))
    smooth = np.stack([ndimage.gaussian_filter(one, 2.5) for one in rough])
    low, high = smooth.min((1, 2), keepdims=True), smooth.max((1, 2), keepdims=True)
    return (smooth - low) / (high - low)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_what_lies_in_and_round_a_candidate_is_as_counted_pixel_by_pixel(seed: int) -> None:
    height, width = 40, 34
    probability, boundary, *maps = noise(seed, height, width, 4)
    found = candidates(probability, boundary, min_area_px=4)
    means = pooled(found, np.stack(maps))
    for node in range(1, len(found.children)):
        mask = np.isin(found.pieces, pieces_of(found, node))
        values = []
        for row, column in zip(*np.nonzero(mask), strict=True):
            for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                y, x = row + down, column + right
                if 0 <= y < height and 0 <= x < width and not mask[y, x]:
                    y, x = y + down * module.ROUND_PX, x + right * module.ROUND_PX
                    values.append([one[min(max(y, 0), height - 1), min(max(x, 0), width - 1)] for one in maps])
        assert means[node, 0] == pytest.approx([one[mask].mean() for one in maps])
        assert means[node, 1] == pytest.approx(np.mean(values, axis=0) if values else [0, 0])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_of_candidates_that_overlap_one_at_most_is_likely(seed: int) -> None:
    rng = np.random.default_rng(seed)
    children = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [1, 2], [4, 3]])
    areas = np.array([0.0, 400, 300, 200, 700, 900])
    found = Candidates(np.zeros((1, 1), np.int32), children, areas, np.zeros((6, 16)))
    chances = np.append(0.0, rng.uniform(0.02, 0.98, 5))
    odds = chances / (1 - chances)
    pieces = [set(), {1}, {2}, {3}, {1, 2}, {1, 2, 3}]
    ways = [
        chosen
        for count in range(4)
        for chosen in itertools.combinations(range(1, 6), count)
        if all(not pieces[one] & pieces[other] for one, other in itertools.combinations(chosen, 2))
    ]
    weights = np.array([np.prod(odds[list(chosen)]) for chosen in ways])
    alike = {
        node: [n for n in range(1, 6) if pieces[n] & pieces[node] and 0.5 <= areas[n] / areas[node] <= 2]
        for node in range(1, 6)
    }
    found_chances = exclusive(found, chances, min_area_px=1, factors=(1.0, 0.0, 0.0))
    # Two alike candidates that do not overlap may be taken together: each counts.
    expected = [sum(w * len(set(way) & set(alike[n])) for way, w in zip(ways, weights, strict=True)) / weights.sum()
                for n in range(1, 6)]  # fmt: skip
    assert found_chances[1:] == pytest.approx(np.clip(expected, 1e-4, 1 - 1e-4), abs=1e-9)
    small = exclusive(found, chances, min_area_px=250, factors=(1.0, 0.0, 0.0))
    assert small[3] <= found_chances[3]


def test_evidence_tells_an_object_from_what_looks_like_one() -> None:
    truths = [shapely.box(10, 10, 40, 30), shapely.box(60, 60, 100, 90)]
    dense = maps(truths, 120, 120)
    scoring = {"building": (*module.DEFAULT_SCORING[:-3], 1.0, 1.0, module.DEFAULT_SCORING[-1])}
    evidence = np.zeros((2, 2, 120, 120), np.float32)
    plain = instances(replace(dense, scoring=scoring), "building")
    evidence[1, 0, 60:90, 60:100] = -9
    told = instances(replace(dense, scoring=scoring, evidence=evidence), "building")
    assert len(plain) == 2
    assert [iou(one.polygons[0], truths[0]) > 0.9 for one in told] == [True]
    evidence[1, 1, 55:95, 55:105] = 20
    assert len(instances(replace(dense, scoring=scoring, evidence=evidence), "building")) == 2


def test_the_mean_of_a_tile_and_its_mirror_image_is_seen_from_the_front() -> None:
    dense = replace(maps([shapely.box(5, 10, 30, 30)], 40, 60), evidence=np.ones((2, 2, 40, 60), np.float32))
    mirrored = maps([shapely.box(30, 10, 55, 30)], 40, 60)
    both = dense.mean_with_mirrored(replace(mirrored, evidence=3 * np.ones((2, 2, 40, 60), np.float32)))
    assert np.allclose(both.probabilities, dense.probabilities, atol=1e-6)
    assert np.allclose(both.boundary, dense.boundary, atol=1e-6)
    assert both.evidence is not None
    assert np.all(both.evidence == 2)
    assert both.probabilities.dtype == np.float32
    assert dense.mean_with_mirrored(mirrored).evidence is None
