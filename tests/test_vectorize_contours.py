"""Rings along and between pixels, judged by rasterio and scikit-image."""

from __future__ import annotations

import numpy as np
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shapely import Polygon
from skimage.measure import find_contours

from backend.contours import Rings, contours


def faces(rings: Rings) -> list[Polygon]:
    return [Polygon(rings.points_xy[start:end]) for start, end in zip(rings.starts, rings.ends, strict=True)]


masks = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 14), st.floats(0.2, 0.9))


@given(masks)
@settings(max_examples=60, deadline=None)
def test_corners_are_rasterios_shapes(drawn: tuple[int, int, int, float]) -> None:
    seed, height, width, share = drawn
    mask = np.random.default_rng(seed).random((height, width)) < share
    found = contours(mask, size=(width, height), is_exact=True).corners
    ours = faces(found)
    assert all(face.is_valid for face in ours)
    shapes = rasterio.features.shapes(mask.astype(np.uint8), mask=mask, connectivity=4)
    theirs = [Polygon(ring) for shape, _ in shapes for ring in shape["coordinates"]]
    assert sorted(face.area for face in ours) == sorted(face.area for face in theirs)
    assert found.areas().sum() == mask.sum()


@given(masks, st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_crossings_are_those_of_marching_squares(drawn: tuple[int, int, int, float], sigma: float) -> None:
    seed, height, width, share = drawn
    level = np.pad(ndimage.gaussian_filter(np.random.default_rng(seed).random((height, width)), sigma), 1)
    level = level - np.quantile(level, 1 - share) - 1e-6
    level[[0, -1]] = level[:, [0, -1]] = -0.7
    found = contours(level > 0, level, corner_xy=(-1, -1), size=(width, height)).crossings
    theirs = [
        Polygon(np.clip(ring[:, ::-1] - 0.5, 0, (width, height)))
        for ring in find_contours(level, 0.0, fully_connected="low")
    ]
    ours = sorted(faces(found), key=lambda face: (face.area, *face.bounds))
    theirs = sorted(theirs, key=lambda face: (face.area, *face.bounds))
    assert len(ours) == len(theirs)
    assert np.allclose([face.area for face in ours], [face.area for face in theirs])


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_every_object_has_rings_of_its_own_that_touch_and_never_overlap(seed: int, objects: int) -> None:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.repeat(rng.integers(0, objects + 1, (5, 5)), 3, axis=0), 3, axis=1)
    found = contours(owner, rng.uniform(0.1, 1, owner.shape), size=owner.shape)
    areas = np.bincount(found.owners, weights=found.crossings.areas(), minlength=objects + 1)
    whole = [
        shapely.union_all([face for face, own in zip(faces(found.crossings), found.owners, strict=True) if own == one])
        for one in range(1, objects + 1)
    ]
    for number, one in enumerate(whole):
        assert sum(one.intersection(other).area for other in whole[:number]) < areas.sum() * 0.2
    corners = np.bincount(found.owners, weights=found.corners.areas(), minlength=objects + 1)
    assert np.array_equal(corners[1:], np.bincount(owner.ravel(), minlength=objects + 1)[1:])


def test_an_object_at_the_border_is_cut_there() -> None:
    framed = np.ones((9, 11), bool)
    found = contours(framed, corner_xy=(-2, -2), size=(7, 5)).crossings
    (face,) = faces(found)
    assert face.equals(shapely.box(0, 0, 7, 5))


def test_nothing_has_no_rings() -> None:
    found = contours(np.zeros((3, 4), bool), size=(4, 3))
    assert len(found.owners) == len(found.corners.starts) == len(found.crossings.points_xy) == 0
