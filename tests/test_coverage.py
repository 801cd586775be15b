"""Neighbours share their borders: no overlap, no gap, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shapely import Polygon, box
from shapely.affinity import rotate

from backend.coverage import coverage
from backend.vectorize import GRID_PX, VectorizeOptions, bridge, numbered_polygons, polygons, unbridge


def flat(objects: list[list[Polygon]]) -> list[Polygon]:
    return [part for parts in objects for part in parts]


def overlap_px(parts: list[Polygon]) -> float:
    return float(sum(part.area for part in parts) - shapely.union_all(parts).area)


def assert_sound(shared: list[list[Polygon]], options: VectorizeOptions) -> None:
    for part in flat(shared):
        assert isinstance(part, Polygon)
        assert part.is_valid
        assert len(bridge(part)) <= options.max_vertices
        assert shapely.union_all(unbridge(bridge(part))[0]).symmetric_difference(part).area < 1e-6


@pytest.mark.parametrize("angle", [0, 17, 45])
def test_houses_drawn_one_by_one_share_their_walls(angle: float) -> None:
    rng = np.random.default_rng(4)
    houses = [rotate(box(20 + 20 * i, 45, 40 + 20 * i, 75), angle, origin=(60, 60)) for i in range(4)]
    drawn = [[Polygon(np.add(house.exterior.coords[:-1], rng.uniform(-0.4, 0.4, (4, 2))))] for house in houses]
    assert overlap_px(flat(drawn)) > 1
    shared = coverage(drawn)
    assert overlap_px(flat(shared)) < 1e-9
    assert shapely.coverage_is_valid(flat(shared))
    assert isinstance(shapely.union_all(flat(shared)), Polygon)
    for parts, house in zip(shared, houses, strict=True):
        (part,) = parts
        assert part.intersection(house).area / part.union(house).area > 0.93
        assert len(part.exterior.coords) - 1 <= 8


def test_parcels_become_one_coverage_without_gaps() -> None:
    seeds = shapely.multipoints(np.random.default_rng(3).uniform(0, 128, (14, 2)))
    image = box(0, 0, 128, 128)
    parcels = [cell.intersection(image) for cell in shapely.voronoi_polygons(seeds, extend_to=image).geoms]
    rows, columns = np.mgrid[:128, :128] + 0.5
    numbers = np.zeros((128, 128), np.int32)
    for number, parcel in enumerate(parcels, start=1):
        numbers[shapely.contains_xy(parcel, columns, rows)] = number
    drawn = numbered_polygons(numbers, np.full((128, 128), 0.9))
    assert overlap_px(flat(drawn)) > 5
    shared = coverage(drawn)
    assert shapely.coverage_is_valid(flat(shared))
    assert shapely.union_all(flat(shared)).area >= 0.9995 * 128 * 128
    ious = [p.intersection(q).area / p.union(q).area for (p,), q in zip(shared, parcels, strict=True)]
    assert np.mean(ious) > 0.98


@given(st.integers(0, 2**32 - 1), st.sampled_from([VectorizeOptions(), VectorizeOptions(max_vertices=40)]))
@settings(max_examples=15, deadline=None)
def test_classes_that_overlap_are_parted_and_no_ground_is_lost(seed: int, options: VectorizeOptions) -> None:
    rng = np.random.default_rng(seed)
    drawn: list[list[Polygon]] = []
    for _ in range(3):
        noise = ndimage.gaussian_filter(rng.standard_normal((64, 64)), 3)
        found = polygons(np.clip(noise / noise.std() / 6 + 0.5, 0, 1), threshold=0.55, options=options)
        drawn += [[polygon] for polygon in found]
    shared = coverage(drawn, options=options)
    assert len(shared) == len(drawn)
    assert_sound(shared, options)
    ground = shapely.union_all(flat(drawn))
    assert shapely.union_all(flat(shared)).symmetric_difference(ground).area < 0.1 * ground.area
    assert overlap_px(flat(shared)) < 0.1


def test_the_first_keeps_its_ground_and_what_lies_under_it_altogether_has_no_part() -> None:
    house, meadow, copy = box(20, 20, 50, 50), box(0, 0, 100, 80), box(20.3, 20.2, 50.2, 50.1)
    shared = coverage([[house], [meadow], [copy]])
    assert shared[0][0].equals(house)
    assert len(shared[1][0].interiors) == 1
    assert shared[1][0].area == pytest.approx(meadow.area - house.area, abs=40)
    assert shared[2] == []


def test_what_has_no_neighbour_stays_as_it_is() -> None:
    alone = [[box(0, 0, 10, 10)], [box(20, 0, 30, 10), box(40, 0, 50, 10)], []]
    assert coverage(alone) == alone
    assert coverage([]) == []


def test_corners_lie_on_the_grid() -> None:
    shared = coverage([[box(0, 0, 10, 10)], [rotate(box(9, 2, 22, 9), 33)]])
    points = shapely.get_coordinates(flat(shared)) / GRID_PX
    assert np.array_equal(points, np.round(points))
