"""Buildings become right-angled only where they stay in their place."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import Point, Polygon, box
from shapely.affinity import rotate, translate

from backend.regularize import LEAST_IOU, metric_frame, regularized
from backend.tile import Tile

SHAPES = {
    "a box": box(0, 0, 60, 34),
    "an L": Polygon([(0, 0), (60, 0), (60, 20), (25, 20), (25, 50), (0, 50)]),
    "a courtyard": box(0, 0, 70, 60).difference(box(20, 18, 50, 42)),
    "a U": Polygon([(0, 0), (70, 0), (70, 50), (50, 50), (50, 20), (20, 20), (20, 50), (0, 50)]),
}


def iou(a: Polygon, b: Polygon) -> float:
    return float(a.intersection(b).area / a.union(b).area)


def wobbly(shape: Polygon, seed: int, by_px: float = 0.7) -> Polygon:
    rng = np.random.default_rng(seed)
    fine = shapely.segmentize(shape, 9)
    rings = [
        shapely.get_coordinates(ring)[:-1] + rng.uniform(-by_px, by_px, (len(ring.coords) - 1, 2))
        for ring in (fine.exterior, *fine.interiors)
    ]
    return Polygon(rings[0], rings[1:])


def angles_deg(polygon: Polygon) -> np.ndarray:
    edges = np.concatenate(
        [np.diff(shapely.get_coordinates(r), axis=0) for r in (polygon.exterior, *polygon.interiors)]
    )
    return np.degrees(np.arctan2(edges[:, 1], edges[:, 0])) % 90


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("turn", [0, 20, 45, 77])
def test_wobbly_outlines_become_right_angled_and_truer(name: str, turn: float) -> None:
    truth = translate(rotate(SHAPES[name], turn), 60, 60)
    plain = wobbly(truth, seed=int(turn))
    (found,) = regularized([plain])
    spread = (angles_deg(found) - angles_deg(found)[0] + 45) % 90 - 45
    assert np.abs(spread).max() < 0.2
    assert shapely.get_num_coordinates(found) == shapely.get_num_coordinates(truth)
    assert len(found.interiors) == len(truth.interiors)
    assert iou(found, truth) >= iou(plain, truth)
    assert found.area == pytest.approx(plain.area, rel=0.002)


def test_a_round_building_stays_round() -> None:
    disc = Point(40, 40).buffer(20, quad_segs=8)
    assert regularized([disc]) == [disc]


@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.floats(0.05, 0.9))
@settings(max_examples=60, deadline=None)
def test_whatever_comes_is_valid_and_in_its_place(seed: int, corners: int, uneven: float) -> None:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = 25 * (1 - uneven * rng.random(corners))
    plain = Polygon(np.column_stack((30 + reach * np.cos(angle), 30 + reach * np.sin(angle))))
    if not plain.is_valid:
        return
    (found,) = regularized([plain], size=(60, 60))
    assert found.is_valid
    assert box(0, 0, 60, 60).buffer(1e-9).covers(found) or found is plain
    assert found is plain or iou(found, plain) >= LEAST_IOU


def test_no_building_is_pushed_over_another() -> None:
    rows = [translate(rotate(box(0, 0, 30, 20), 12), 31 * i, 6 * i) for i in range(4)]
    plain = [wobbly(house, seed) for seed, house in enumerate(rows)]
    found = regularized(plain[:3], others=plain[3:])
    before, after = [*plain], [*found, plain[3]]
    for number, one in enumerate(after[:3]):
        for other_number, other in enumerate(after):
            if number != other_number:
                allowed = before[number].intersection(before[other_number]).area
                assert one.intersection(other).area <= allowed + 0.01


def test_a_building_at_the_images_border_stays_inside() -> None:
    plain = wobbly(rotate(box(5, 5, 60, 40), 8), 3).intersection(box(8, 0, 100, 100))
    (found,) = regularized([translate(plain, -8, 0)], size=(90, 90))
    assert box(0, 0, 90, 90).covers(found)


def test_right_angles_are_those_on_the_ground() -> None:
    # A degree of longitude is half as long as one of latitude at 60° north.
    tile = Tile((400, 400), "EPSG:4326", Affine(1e-5, 0, 10, 0, -1e-5, 60))
    frame = metric_frame(tile)
    assert np.hypot(*frame[0]) == pytest.approx(0.558, abs=0.005)
    assert np.hypot(*frame[1]) == pytest.approx(1.114, abs=0.005)
    on_ground = rotate(box(0, 0, 60, 40), 30, origin=(0, 0))
    in_pixels = shapely.transform(on_ground, lambda metres: metres @ np.linalg.inv(frame) + 150)
    (found,) = regularized([wobbly(in_pixels, 1)], frame=frame)
    ground = shapely.transform(found, lambda points: points @ frame)
    spread = (angles_deg(ground) - angles_deg(ground)[0] + 45) % 90 - 45
    assert np.abs(spread).max() < 0.2
    assert np.array_equal(metric_frame(Tile((10, 10))), np.eye(2))


def test_nothing_becomes_nothing() -> None:
    assert regularized([]) == []
