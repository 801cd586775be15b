"""Polygons with holes become one ring that Label Studio draws, and come back whole, also after an annotator's edits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from shapely import LineString, Polygon
from shapely.affinity import rotate, translate
from shapely.ops import polygonize

from backend.tile import Tile
from backend.vectorize import VectorizeOptions, bridge, mask_polygons, polygons, unbridge

Ring = NDArray[np.float64]


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


COURTYARD = Polygon(box(10, 10, 90, 70), [box(30, 25, 60, 50)])
LAKE = Polygon(
    shapely.Point(50, 50).buffer(40).exterior,
    [shapely.Point(38, 45).buffer(8, quad_segs=4).exterior, box(55, 50, 66, 70)],
)
HOUSE = Polygon(box(3, 4, 40, 30))
POLYGONS = {
    "a house": HOUSE,
    "a courtyard": COURTYARD,
    "a lake with two islands": LAKE,
    "a courtyard, shell and hole both clockwise": Polygon(box(10, 10, 90, 70)[::-1], [box(30, 25, 60, 50)[::-1]]),
    "a hole whose nearest corner is the same for two": Polygon(
        [(0, 0), (50, 20), (100, 0), (100, 90), (0, 90)], [box(30, 40, 45, 60), box(55, 40, 70, 60)]
    ),
    "holes in a row": Polygon(box(0, 0, 100, 20), [box(5 + 12 * i, 5, 12 + 12 * i, 15) for i in range(8)]),
    "a lattice of holes": Polygon(
        box(0, 0, 70, 70), [box(5 + 9 * i, 5 + 9 * j, 10 + 9 * i, 10 + 9 * j) for i in range(7) for j in range(7)]
    ),
    "a hole shut in by another": Polygon(
        box(0, 0, 100, 100),
        [[(20, 20), (80, 20), (80, 80), (20, 80), (20, 70), (70, 70), (70, 30), (20, 30)], box(30, 40, 60, 60)],
    ),
    "a hole that touches the shell": Polygon(
        [(0, 0), (10, 0), (10, 10), (0, 10), (0, 5)], [[(0, 5), (3, 3), (6, 5), (3, 7)]]
    ),
    "holes that touch each other": Polygon(
        box(0, 0, 30, 30), [box(5, 5, 10, 10), box(10, 10, 15, 15), box(15, 5, 20, 10)]
    ),
    "a hole in a hair's width of the shell": Polygon(box(0, 0, 30, 30), [box(0.001, 5, 10, 10)]),
}


def is_valid_ring(ring: Ring) -> bool:
    """Whether the ring is simple when edges walked both ways are left out and what they led to is taken as holes."""
    points = list(map(tuple, ring.tolist()))
    edges = list(zip(points, points[1:] + points[:1], strict=True))
    walked = set(edges)
    if len(points) < 3 or len(walked) < len(edges) or any(a == b for a, b in edges):
        return False
    single = [(a, b) for a, b in edges if (b, a) not in walked]
    if len(single) == len(edges):
        return Polygon(ring).is_valid
    faces = sorted(polygonize([LineString(edge) for edge in single]), key=lambda face: -Polygon(face.exterior).area)
    if not faces:
        return False
    shell = Polygon(faces[0].exterior)
    rebuilt = Polygon(shell.exterior, [face.exterior for face in faces[1:] if shell.contains(face)])
    bridges = [
        LineString(edge) for edge in {tuple(sorted(edge)) for edge in edges} if edge[::-1] in walked and edge in walked
    ]
    crossed = any(a.crosses(b) for a, b in itertools.combinations(bridges, 2))
    inside = all(b.relate_pattern(rebuilt, "1FF******") for b in bridges)
    # Holes that touch may shut off faces; the ring's own signed area tells whether any was lost.
    x, y = ring.T
    area = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return bool(rebuilt.is_valid and inside and not crossed and abs(rebuilt.area - area) < 1e-6 * area)


def same(a: Polygon, b: Polygon, within_px: float = 0.0) -> bool:
    """Whether two polygons have the same points in the same order, wherever their rings start and however they turn."""
    return bool(a.normalize().equals_exact(b.normalize(), within_px))


def through_label_studio(ring: Ring, size: tuple[int, int]) -> Ring:
    tile = Tile(size=size)
    return tile.pct_to_px(np.array(json.loads(json.dumps(tile.px_to_pct(ring).tolist()))))


@pytest.mark.parametrize("name", POLYGONS)
def test_a_polygon_goes_out_as_a_valid_ring_and_comes_back(name: str) -> None:
    polygon = POLYGONS[name]
    ring = bridge(polygon)
    assert is_valid_ring(ring)
    assert len(ring) == sum(len(r.coords) - 1 for r in (polygon.exterior, *polygon.interiors)) + 2 * len(
        polygon.interiors
    )
    (back,), reasons = unbridge(ring)
    assert same(back, polygon)
    assert reasons == []


@pytest.mark.parametrize("name", POLYGONS)
@pytest.mark.parametrize("size", [(512, 512), (333, 777), (101, 103)])
def test_percent_and_back_change_nothing_but_the_last_digit(name: str, size: tuple[int, int]) -> None:
    polygon = POLYGONS[name]
    ring = through_label_studio(bridge(polygon), size)
    assert is_valid_ring(ring)
    (back,), reasons = unbridge(ring)
    assert same(back, polygon, within_px=1e-9)
    assert reasons == []


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.8, 1.5, 3.0]),
    st.floats(0.3, 0.9),
    st.sampled_from([
        VectorizeOptions(),
        VectorizeOptions(min_area_px=0, min_hole_px=0),
        VectorizeOptions(tolerance_px=0, min_area_px=0, min_hole_px=0, max_vertices=100_000),
        VectorizeOptions(min_area_px=4, min_hole_px=2, max_vertices=40),
    ]),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_whatever_is_drawn_comes_back(seed: int, sigma: float, share: float, options: VectorizeOptions) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((30, 26)), sigma)
    mask = noise > np.quantile(noise, 1 - share)
    for polygon in (*mask_polygons(mask, options=options), *polygons(mask.astype(np.float32), options=options)):
        ring = bridge(polygon)
        assert is_valid_ring(ring)
        sent = through_label_studio(ring, (26, 30))
        assert is_valid_ring(sent)
        for points, within_px in ((ring, 0.0), (sent, 1e-9)):
            (back,), reasons = unbridge(points)
            assert same(back, polygon, within_px)
            assert reasons == []


def test_the_bridge_is_the_shortest() -> None:
    ring = bridge(Polygon(box(0, 0, 100, 100), [box(70, 5, 95, 50)]))
    points = list(map(tuple, ring.tolist()))
    edges = set(zip(points, points[1:] + points[:1], strict=True))
    (over,) = {frozenset(edge) for edge in edges if edge[::-1] in edges}
    assert over == {(100.0, 0.0), (95.0, 5.0)}


def test_a_ring_may_start_anywhere_and_run_either_way() -> None:
    ring = bridge(LAKE)
    for start in range(0, len(ring), 7):
        turned = np.roll(ring, start, axis=0)
        assert same(unbridge(turned)[0][0], LAKE)
        assert same(unbridge(turned[::-1])[0][0], LAKE)


@pytest.mark.parametrize(
    "name", [name for name, polygon in POLYGONS.items() if polygon.interiors and "touch" not in name]
)
def test_moving_points_that_bear_no_bridge_moves_them_and_leaves_holes_whole(name: str) -> None:
    polygon = POLYGONS[name]
    ring = bridge(polygon)
    points = list(map(tuple, ring.tolist()))
    for index in [i for i, point in enumerate(points) if points.count(point) == 1]:
        shift = np.array((0.3, -0.2)) if "hair" not in name else np.array((0.0003, 0.0))
        moved = ring.copy()
        moved[index] += shift
        (back,), reasons = unbridge(moved)
        expected = shapely.transform(
            polygon, lambda xy, at=points[index], by=shift: xy + by * (xy == at).all(axis=1)[:, None]
        )
        assert same(back, expected)
        assert reasons == []


@pytest.mark.parametrize("name", ["a courtyard", "a lake with two islands", "holes in a row"])
@pytest.mark.parametrize("shift", [(0.3, 0.2), (-0.6, 0.1), (0.0, 0.9)])
def test_a_bridge_pulled_open_a_little_is_closed_and_reported(name: str, shift: tuple[float, float]) -> None:
    polygon = POLYGONS[name]
    ring = bridge(polygon)
    points = list(map(tuple, ring.tolist()))
    for index in [i for i, point in enumerate(points) if points.count(point) > 1]:
        pulled = ring.copy()
        pulled[index] += shift
        back, reasons = unbridge(pulled)
        assert len(back) == 1, (index, reasons)
        assert len(back[0].interiors) == len(polygon.interiors)
        assert shapely.hausdorff_distance(back[0].boundary, polygon.boundary) <= np.hypot(*shift) + 1e-9
        assert len(reasons) == 1
        assert "bridge" in reasons[0]
        assert "pulled open" in reasons[0]


def test_two_bridges_pulled_open_are_both_closed() -> None:
    ring = bridge(LAKE)
    points = list(map(tuple, ring.tolist()))
    ends = [i for i, point in enumerate(points) if points.count(point) > 1]
    assert len(ends) == 8
    ring[ends[0]] += (0.3, 0.1)
    ring[ends[-1]] += (0.2, -0.3)
    (back,), reasons = unbridge(ring)
    assert len(back.interiors) == 2
    assert 1 <= len(reasons) <= 2
    assert shapely.hausdorff_distance(back.boundary, LAKE.boundary) < 0.5


def test_a_bridge_pulled_wide_open_keeps_what_was_drawn_and_is_reported() -> None:
    ring = bridge(COURTYARD)
    points = list(map(tuple, ring.tolist()))
    corner = (10.0, 10.0)
    last = max(i for i, point in enumerate(points) if point == corner)
    ring[last] += (12, 0.5)
    back, reasons = unbridge(ring)
    assert all(p.is_valid for p in back)
    wedge = Polygon([corner, ring[last], ring[last - 1]])
    assert sum(p.area for p in back) == pytest.approx(COURTYARD.area - wedge.area, rel=0.01)
    assert any("pulled open by 12 px, more than the 1 px" in reason for reason in reasons)


def test_a_point_put_on_a_bridge_does_not_cost_the_hole() -> None:
    ring = bridge(COURTYARD)
    points = list(map(tuple, ring.tolist()))
    first = next(i for i, point in enumerate(points) if points.count(point) > 1)
    with_point = np.insert(ring, first + 1, (ring[first] + ring[first + 1]) / 2 + 0.1, axis=0)
    (back,), reasons = unbridge(with_point)
    assert same(back, COURTYARD)
    assert len(reasons) == 1


def test_a_slit_that_someone_drew_stays_open() -> None:
    outer = [(50, 25.2), (50, 50), (0, 50), (0, 0), (50, 0), (50, 24.8)]
    inner = [(30, 24.8), (30, 10), (10, 10), (10, 40), (30, 40), (30, 25.2)]
    slit = Polygon(outer + inner)
    assert slit.is_valid
    (back,), reasons = unbridge(bridge(slit))
    assert same(back, slit)
    assert reasons == []


def test_a_thin_strip_is_no_bridge() -> None:
    strip = rotate(shapely.box(10, 10, 90, 10.4), 30)
    (back,), reasons = unbridge(bridge(strip))
    assert same(back, strip)
    assert reasons == []


def test_two_houses_joined_by_a_line_come_back_as_two() -> None:
    ring = np.array(
        [(0, 0), (10, 0), (10, 5), (20, 5), (20, 0), (30, 0), (30, 10), (20, 10), (20, 5), (10, 5), (10, 10), (0, 10)],
        float,
    )
    back, reasons = unbridge(ring)
    assert sorted(p.bounds for p in back) == [(0, 0, 10, 10), (20, 0, 30, 10)]
    assert reasons == []


def test_closing_points_and_repeated_points_change_nothing() -> None:
    ring = bridge(COURTYARD)
    untidy = np.concatenate((np.repeat(ring, 2, axis=0), ring[:1], ring[:1]))
    (back,), reasons = unbridge(untidy)
    assert same(back, COURTYARD)
    assert reasons == []


def test_a_spike_is_taken_off() -> None:
    ring = np.insert(bridge(HOUSE), 2, [(60, 60), bridge(HOUSE)[1]], axis=0)
    (back,), _ = unbridge(ring)
    assert same(back, HOUSE)


def test_a_bow_tie_keeps_both_halves_and_says_so() -> None:
    back, reasons = unbridge(np.array([(0, 0), (20, 20), (20, 0), (0, 20)], float))
    assert sum(p.area for p in back) == pytest.approx(200)
    assert len(back) == 2
    (reason,) = reasons
    assert reason == "self-crossing outline repaired, area changed by 100.0 %"


def test_a_small_self_crossing_is_repaired_with_its_area_change() -> None:
    ring = np.array([(0, 0), (100, 0), (100, 100), (49, 100), (51, 101), (51, 100), (0, 100)], float)
    back, (reason,) = unbridge(ring)
    assert back[0].area == pytest.approx(10_000, rel=0.001)
    assert reason.startswith("self-crossing outline repaired, area changed by 0.0 %")


def test_a_hole_dragged_over_the_outline_is_cut_there() -> None:
    ring = bridge(COURTYARD)
    hole = [i for i, point in enumerate(map(tuple, ring.tolist())) if point in box(30, 25, 60, 50)]
    ring[hole] += (50, 0)
    back, reasons = unbridge(ring)
    expected = Polygon(COURTYARD.exterior).difference(shapely.box(80, 25, 110, 50))
    assert shapely.union_all(back).symmetric_difference(expected).area < 1e-6
    assert len(reasons) == 1
    assert "repaired, area changed by" in reasons[0]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([], "needs 3 distinct points, got 0"),
        ([(1, 1)], "needs 3 distinct points, got 1"),
        ([(1, 1)] * 5, "needs 3 distinct points, got 1"),
        ([(1, 1), (4, 4)], "needs 3 distinct points, got 2"),
        ([(1, 1), (4, 4), (1, 1)], "needs 3 distinct points, got 2"),
        ([(1, 1), (4, 4), (9, 9)], "encloses n"),
        ([(1, 1), (4, 4), (9, 0), (4, 4)], "encloses nothing"),
        ([(1, 1), (4, float("nan")), (9, 0)], "holds the point (4.0, nan)"),
        ([(1, 1, 1), (2, 2, 2)], "got an array of shape (2, 3)"),
    ],
)
def test_what_is_no_outline_gives_no_polygon_and_a_reason(points: list[tuple[float, ...]], reason: str) -> None:
    back, reasons = unbridge(np.array(points, float).reshape(len(points), -1) if points else np.zeros((0, 2)))
    assert back == []
    assert reason in reasons[-1]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25))
@settings(max_examples=100, deadline=None)
def test_any_scribble_gives_valid_polygons_or_a_reason(points: list[tuple[int, int]]) -> None:
    back, reasons = unbridge(np.array(points, float).reshape(-1, 2))
    assert all(isinstance(p, Polygon) and p.is_valid and p.area > 0 for p in back)
    assert back or reasons
    for a, b in itertools.combinations(back, 2):
        assert a.intersection(b).area < 1e-9


@given(st.integers(0, 2**32 - 1), st.floats(0, 360), st.sampled_from([0.4, 4.0, 40.0]))
@settings(max_examples=40, deadline=None)
def test_edits_of_any_kind_give_valid_polygons(seed: int, angle: float, reach_px: float) -> None:
    rng = np.random.default_rng(seed)
    ring = bridge(translate(rotate(LAKE, angle), 5, 5))
    for _ in range(3):
        edit = rng.integers(3)
        at = int(rng.integers(len(ring)))
        if edit == 0:
            ring[at] += rng.uniform(-reach_px, reach_px, 2)
        elif edit == 1:
            ring = np.delete(ring, at, axis=0)
        else:
            ring = np.insert(ring, at, ring[at] + rng.uniform(-reach_px, reach_px, 2), axis=0)
    back, _ = unbridge(ring)
    assert back
    assert all(p.is_valid and p.area > 0 for p in back)


def test_an_empty_polygon_has_no_ring() -> None:
    with pytest.raises(ValueError, match="empty polygon"):
        bridge(Polygon())
