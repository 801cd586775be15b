"""Probabilities and masks become valid polygons that cover what they cover."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from shapely import Polygon
from shapely.affinity import rotate, scale, translate

from backend.vectorize import (
    VectorizeOptions,
    bridge,
    mask_polygons,
    polygons,
    rasterize,
    repair,
)

EVERYTHING = VectorizeOptions(min_area_px=0, min_hole_px=0)
EXACT = VectorizeOptions(tolerance_px=0, min_area_px=0, min_hole_px=0, max_vertices=100_000)
COARSE = VectorizeOptions(tolerance_px=2, min_area_px=1, min_hole_px=0, max_vertices=20)
OPTIONS = [VectorizeOptions(), EVERYTHING, EXACT, COARSE]

Mask = NDArray[np.bool_]


def spiral(side: int) -> Mask:
    """A line one pixel wide that winds inwards, one pixel free between its turns."""
    mask = np.zeros((side, side), bool)
    row = col = 0
    mask[0, 0] = True
    length, heading = side - 1, (0, 1)
    for turn in range(2 * side):
        if length <= 0:
            break
        for _ in range(length):
            row, col = row + heading[0], col + heading[1]
            mask[row, col] = True
        heading = heading[1], -heading[0]
        length -= 2 if turn >= 2 and turn % 2 == 0 else 0
    return mask


def lines(side: int) -> Mask:
    mask = np.eye(side, dtype=bool)
    mask[side // 3] = mask[:, side // 4] = True
    return mask


def frame(side: int) -> Mask:
    mask = np.ones((side, side), bool)
    mask[1:-1, 1:-1] = False
    return mask


def smooth_noise(seed: int, side: int, sigma: float, share: float) -> Mask:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((side, side)), sigma)
    return np.asarray(noise > np.quantile(noise, 1 - share))


def speckle(seed: int, side: int, share: float) -> Mask:
    return np.random.default_rng(seed).random((side, side)) < share


MASKS: dict[str, Mask] = {
    "all true": np.ones((20, 31), bool),
    "all false": np.zeros((20, 31), bool),
    "one pixel": np.pad(np.ones((1, 1), bool), 3),
    "an image of one pixel": np.ones((1, 1), bool),
    "an image of one row": np.random.default_rng(0).random((1, 40)) < 0.6,
    "a corner pixel": np.pad(np.ones((1, 1), bool), ((0, 4), (0, 4))),
    "a diagonal": np.eye(9, dtype=bool),
    "checkerboard": np.indices((16, 17)).sum(axis=0) % 2 == 0,
    "coarse checkerboard": (np.indices((24, 24)) // 3).sum(axis=0) % 2 == 0,
    "all but a lattice of single pixels": (np.indices((17, 17)) % 2).sum(axis=0) < 2,
    "holes that touch at corners": ~np.pad(np.eye(6, dtype=bool), 3),
    "thin lines": lines(30),
    "spiral": spiral(40),
    "thick spiral": np.kron(spiral(24), np.ones((3, 3), bool)),
    "along the border": frame(25),
    "grid of streets": (np.indices((40, 40)) % 6 < 2).any(axis=0),
    "speckle 0.3": speckle(1, 30, 0.3),
    "speckle 0.6": speckle(2, 30, 0.6),
    "speckle 0.8": speckle(3, 30, 0.8),
    "blobs": smooth_noise(4, 64, 1.5, 0.5),
    "fine blobs": smooth_noise(5, 48, 0.8, 0.6),
}


def filled(mask: Mask, min_hole_px: float) -> Mask:
    """The mask without holes under the limit, as an independent count of pixels finds them."""
    around, _ = ndimage.label(np.pad(~mask, 1, constant_values=True), structure=np.ones((3, 3)))
    sizes = np.bincount(around.ravel())
    small = sizes < min_hole_px
    small[around[0, 0]] = False
    return mask | (small[around] & (around > 0))[1:-1, 1:-1]


def assert_sound(found: list[Polygon], shape: tuple[int, ...], options: VectorizeOptions) -> None:
    for polygon in found:
        assert isinstance(polygon, Polygon)
        assert polygon.is_valid
        assert polygon.area > 0
        assert shapely.box(0, 0, shape[1], shape[0]).covers(polygon)
        assert len(bridge(polygon)) <= options.max_vertices
    assert [p.area for p in found] == sorted((p.area for p in found), reverse=True)
    for polygon in found:
        coords = shapely.get_coordinates(polygon.exterior)
        assert (coords[1:] != coords[:-1]).any(axis=1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "everything", "exact", "coarse"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_gives_sound_polygons(name: str, options: VectorizeOptions) -> None:
    mask = MASKS[name]
    assert_sound(polygons(mask.astype(np.float32), options=options), mask.shape, options)
    assert_sound(mask_polygons(mask, options=options), mask.shape, options)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.0, 0.7, 1.5, 3.0]),
    st.floats(0.05, 0.95),
    st.sampled_from(OPTIONS),
)
@settings(max_examples=25, deadline=None)
def test_random_probabilities_give_sound_polygons(
    seed: int, height: int, width: int, sigma: float, threshold: float, options: VectorizeOptions
) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((height, width)), sigma)
    noise = np.clip((noise - noise.mean()) / max(float(noise.std()), 1e-9) / 4 + 0.5, 0, 1).astype(np.float32)
    assert_sound(polygons(noise, threshold=threshold, options=options), noise.shape, options)
    assert_sound(mask_polygons(noise > threshold, options=options), noise.shape, options)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_exact_mask_polygons_paint_the_mask_again(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.6
    found = mask_polygons(mask, options=EXACT)
    assert sum(p.area for p in found) == mask.sum()
    assert np.array_equal(rasterize(found, height, width), mask)
    assert len(found) == ndimage.label(mask)[1]


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.sampled_from([0.0, 1.0]))
@settings(max_examples=40, deadline=None)
def test_unsimplified_outlines_split_pixels_at_the_threshold(seed: int, side: int, sigma: float) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((side, side)), sigma)
    found = polygons(noise, threshold=float(np.clip(np.median(noise), 0.01, 0.99)), options=EXACT)
    assert np.array_equal(rasterize(found, side, side), noise >= np.clip(np.median(noise), 0.01, 0.99))


def test_values_that_are_no_numbers_count_as_nothing() -> None:
    dirty = np.zeros((30, 30), np.float32)
    dirty[5:20, 5:20] = 0.9
    clean = dirty.copy()
    dirty[0, :] = np.nan
    dirty[25, :] = np.inf
    dirty[27, :] = -np.inf
    assert [p.wkb for p in polygons(dirty)] == [p.wkb for p in polygons(clean)]
    assert polygons(np.full((8, 8), np.nan, np.float32)) == []


@pytest.mark.parametrize("value", [0.5, 0.50001, 0.4999999])
def test_a_plateau_at_the_threshold_gives_sound_polygons(value: float) -> None:
    plateau = np.full((20, 20), 0.5, np.float32)
    plateau[::3] = value
    plateau[:, ::4] = 0.2
    assert_sound(polygons(plateau, options=EVERYTHING), plateau.shape, EVERYTHING)


def test_an_image_full_of_object_is_its_own_rectangle() -> None:
    for found in (polygons(np.full((20, 30), 0.7, np.float32)), mask_polygons(np.ones((20, 30), bool))):
        assert len(found) == 1
        assert found[0].equals(shapely.box(0, 0, 30, 20))


def test_an_object_at_the_border_reaches_it_whatever_its_probability() -> None:
    half = np.zeros((40, 40), np.float32)
    half[:, :12] = 0.62
    (found,) = polygons(half)
    assert found.bounds[:2] == (0, 0)
    assert found.bounds[3] == 40


# --- size -------------------------------------------------------------------------------------------------------------


def shapes_on_a_canvas(seed: int, count: int) -> list[Polygon]:
    """Boxes, L shapes, courtyards and discs of at least 400 pixels, somewhere on 100 × 100 pixels, turned anyhow."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        a, b = rng.uniform(10.5, 22, 2)
        kind = number % 4
        if kind == 0:
            shape = shapely.box(-a, -b, a, b)
        elif kind == 1:
            shape = Polygon([(-a, -b), (a, -b), (a, 0), (a / 4, 0), (a / 4, b), (-a, b)])
        elif kind == 2:
            shape = Polygon(
                shapely.box(-a - 4, -b - 4, a + 4, b + 4).exterior, [shapely.box(-a / 2, -b / 2, a / 2, b / 2).exterior]
            )
        else:
            shape = shapely.Point(0, 0).buffer(max(a, 11.5), quad_segs=32)
        found.append(translate(rotate(shape, rng.uniform(0, 90), origin=(0, 0)), *rng.uniform(48, 52, 2)))
    return found


def coverage(shapes: list[Polygon], height: int, width: int, finer: int = 8) -> NDArray[np.float32]:
    """Share of each pixel that the shapes cover."""
    fine = rasterize([scale(s, finer, finer, origin=(0, 0)) for s in shapes], height * finer, width * finer)
    return fine.reshape(height, finer, width, finer).mean(axis=(1, 3)).astype(np.float32)


def iou(a: Polygon, b: Polygon) -> float:
    return float(a.intersection(b).area / a.union(b).area)


def test_outlines_from_probabilities_lie_on_the_true_ones() -> None:
    truths = shapes_on_a_canvas(7, 80)
    found = [polygons(coverage([truth], 100, 100)) for truth in truths]
    assert [len(f) for f in found] == [1] * len(truths)
    ious = [iou(f[0], truth) for f, truth in zip(found, truths, strict=True)]
    assert np.mean(ious) >= 0.99
    assert min(ious) >= 0.96
    bias = np.array([f[0].area / truth.area - 1 for f, truth in zip(found, truths, strict=True)])
    assert abs(bias.mean()) <= 0.003
    assert all(len(f[0].interiors) == len(truth.interiors) for f, truth in zip(found, truths, strict=True))


@pytest.mark.parametrize("way", ["mask", "probabilities"])
def test_polygons_have_the_masks_area(way: str) -> None:
    masks = [coverage([truth], 100, 100) >= 0.5 for truth in shapes_on_a_canvas(8, 60)]
    masks += [smooth_noise(seed, 80, 4, 0.4) for seed in range(6)]
    changes = []
    for mask in masks:
        mask = filled(mask, 16)
        for number in range(1, ndimage.label(mask)[1] + 1):
            single = ndimage.label(mask)[0] == number
            if single.sum() < 400:
                continue
            found = mask_polygons(single) if way == "mask" else polygons(single.astype(np.float32))
            changes.append(sum(p.area for p in found) / single.sum() - 1)
    assert len(changes) > 60
    assert np.abs(changes).max() <= 0.01
    assert abs(np.mean(changes)) <= 0.003


def test_a_disc_keeps_its_area() -> None:
    rows, cols = np.mgrid[:60, :60]
    disc = np.hypot(rows - 30.2, cols - 29.7) < 11.4
    for found in (mask_polygons(disc), polygons(disc.astype(np.float32))):
        assert found[0].area == pytest.approx(disc.sum(), rel=0.005)
        assert len(found[0].exterior.coords) < 40


def test_a_box_needs_few_points_and_gets_its_corners() -> None:
    truth = rotate(shapely.box(20, 30, 70, 60), 25)
    (found,) = polygons(coverage([truth], 100, 100))
    assert len(found.exterior.coords) - 1 <= 6
    assert shapely.hausdorff_distance(found, truth) < 0.75


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vectorize", [lambda m, o: polygons(m.astype(np.float32), options=o), lambda m, o: mask_polygons(m, options=o)]
)
def test_limits_drop_what_is_below_and_nothing_above(vectorize) -> None:
    mask = np.zeros((60, 90), bool)
    mask[2:5, 2:5] = True
    mask[2:7, 20:25] = True
    mask[20:50, 10:80] = True
    mask[25:28, 20:23] = False
    mask[25:35, 40:50] = False
    found = vectorize(mask, VectorizeOptions(min_area_px=16, min_hole_px=16))
    assert [len(p.interiors) for p in found] == [1, 0]
    assert found[0].area == pytest.approx(30 * 70 - 100, abs=1)
    assert found[1].area == pytest.approx(25, abs=1)
    assert [len(p.interiors) for p in vectorize(mask, EVERYTHING)] == [2, 0, 0]


@pytest.mark.parametrize(
    "vectorize", [lambda m, o: polygons(m.astype(np.float32), options=o), lambda m, o: mask_polygons(m, options=o)]
)
def test_an_island_in_a_filled_hole_is_not_drawn_twice(vectorize) -> None:
    mask = np.ones((40, 40), bool)
    mask[10:20, 10:20] = False
    mask[12:18, 12:18] = True
    (found,) = vectorize(mask, VectorizeOptions(min_area_px=4, min_hole_px=200))
    assert found.area == 1600
    kept = vectorize(mask, VectorizeOptions(min_area_px=4, min_hole_px=4))
    assert [len(p.interiors) for p in kept] == [1, 0]


def test_the_vertex_budget_is_met_by_a_coarser_outline_where_that_will_do() -> None:
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    radius = 90 + 4 * np.sin(45 * angle)
    star = Polygon(np.column_stack((100 + radius * np.cos(angle), 100 + radius * np.sin(angle))))
    cover = coverage([star], 200, 200, finer=4)
    budget = VectorizeOptions(max_vertices=60)
    (found,) = polygons(cover, options=budget)
    assert len(bridge(found)) <= 60 < len(bridge(polygons(cover, options=VectorizeOptions(max_vertices=5000))[0]))
    assert iou(found, star) > 0.9


@pytest.mark.parametrize("name", ["thick spiral", "grid of streets", "fine blobs"])
def test_what_fits_no_budget_is_cut_in_parts_and_none_of_it_is_lost(name: str) -> None:
    mask = MASKS[name]
    options = VectorizeOptions(max_vertices=24, min_area_px=1, min_hole_px=1)
    found = mask_polygons(mask, options=options)
    assert_sound(found, mask.shape, options)
    assert len(found) > len(mask_polygons(mask, options=EXACT))
    assert sum(p.area for p in found) == pytest.approx(mask.sum(), rel=0.01)
    assert shapely.union_all(found).area == pytest.approx(mask.sum(), rel=0.03)


@pytest.mark.parametrize("max_vertices", [20, 200])
def test_what_else_is_in_the_image_does_not_change_an_outline(max_vertices: int) -> None:
    mask = smooth_noise(0, 384, 4.0, 0.5)
    options = VectorizeOptions(max_vertices=max_vertices)
    numbers, count = ndimage.label(mask)
    alone = [polygon for n in range(1, count + 1) for polygon in mask_polygons(numbers == n, options=options)]
    together = mask_polygons(mask, options=options)
    assert count > 20
    assert {polygon.normalize().wkb for polygon in together} == {polygon.normalize().wkb for polygon in alone}


def test_limits_on_the_ground_become_pixels() -> None:
    options = VectorizeOptions.for_gsd(0.5, min_area_m2=4, min_hole_m2=2, tolerance_m=0.25)
    assert (options.min_area_px, options.min_hole_px, options.tolerance_px) == (16, 8, 0.5)
    assert VectorizeOptions.for_gsd(0.1, min_area_m2=1, min_hole_m2=1).tolerance_px == VectorizeOptions().tolerance_px


@pytest.mark.parametrize(
    "wrong", [{"tolerance_px": -1}, {"min_area_px": float("nan")}, {"min_hole_px": float("inf")}, {"max_vertices": 3}]
)
def test_limits_that_make_no_sense_are_refused_with_their_value(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        VectorizeOptions(**wrong)


@pytest.mark.parametrize("gsd_m", [0, -1, float("nan")])
def test_a_pixel_needs_a_size_on_the_ground(gsd_m: float) -> None:
    with pytest.raises(ValueError, match="gsd_m must be a positive number"):
        VectorizeOptions.for_gsd(gsd_m, min_area_m2=1, min_hole_m2=1)


def test_arrays_and_thresholds_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(H, W\), got \(1, 4, 4\)"):
        polygons(np.ones((1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"must be \(H, W\), got \(4,\)"):
        mask_polygons(np.ones(4, bool))
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 1"):
        polygons(np.ones((4, 4), np.float32), threshold=1)


# --- painting and mending ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_pixel_is_painted_where_its_centre_is_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [
        translate(
            rotate(Polygon(shapely.box(-9, -6, 9, 6).exterior, [shapely.box(-4, -3, 4, 3).exterior]), float(angle)), *at
        )
        for angle, *at in rng.uniform((0, -2, -2), (360, 42, 32), (3, 3))
    ]
    rows, cols = np.mgrid[:30, :40] + 0.5
    expected = shapely.contains_xy(shapely.union_all(shapes), cols, rows)
    assert np.array_equal(rasterize(iter(shapes), 30, 40), expected)


def test_nothing_paints_nothing() -> None:
    assert not rasterize([], 4, 5).any()
    assert not rasterize([Polygon()], 4, 5).any()
    assert rasterize([shapely.box(0, 0, 5, 4)], 4, 5).all()


def test_a_bow_tie_is_repaired_without_losing_a_half() -> None:
    found = repair(Polygon([(0, 0), (10, 10), (10, 0), (0, 10)]))
    assert sum(p.area for p in found) == pytest.approx(50)
    assert all(p.is_valid for p in found)


def test_repair_keeps_polygons_only_and_leaves_valid_ones_alone() -> None:
    box = shapely.box(0, 0, 4, 4)
    mixed = shapely.GeometryCollection([box, shapely.LineString([(9, 9), (12, 12)]), shapely.Point(1, 1)])
    assert [p.wkb for p in repair(mixed)] == [box.wkb]
    assert repair(None) == repair(Polygon()) == repair(Polygon([(0, 0), (5, 5), (9, 9)])) == []
