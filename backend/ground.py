"""Ground: many shapes at once from scene pixels to lon/lat, and their areas; the rare hard ones go through `earth`."""

from __future__ import annotations

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from .earth import DECIMALS, Area, area_m2, lonlat_geometry
from .rings import Outlines, Rings
from .tile import FloatArray, Tile, to_lonlat

_SHORT_PX = 16.0
"""Edges up to this length are never bent by the tenth of a pixel that would show."""

_MAX_BEND_PX = 0.05
_SAMPLE = 256
"""Edges, about, that are looked at first where there are many."""

_CAUTION = 8.0
"""How much more than those the others may bend for their length."""

_WIDE_DEG = 0.5
"""Shapes this wide are measured one by one, with edges that are geodesics."""

_WGS84 = pyproj.Geod(ellps="WGS84")


def lonlat_outlines(outlines_px: Outlines, tile: Tile, area: Area | None = None) -> Outlines:
    """Outlines in pixels of a tile as ``earth.lonlat_geometry`` makes them.

    None among the others where nothing is left. ``area`` picks the operation between the CRS and EPSG:4326.
    """
    others = lonlat_geometries(outlines_px.others, tile, area)
    rings_px = outlines_px.rings
    if not len(rings_px):
        return Outlines(rings_px, outlines_px.ring_at, others, outlines_px.other_at)
    rounded, is_hard = _rounded(rings_px.points, rings_px.owner, len(rings_px), tile, area)
    rings = Rings(rounded, rings_px.lengths)
    rings = rings.turned(rings.areas < 0)
    is_hard |= _is_far(rings.bounds)
    is_hard |= ~rings.are_simple()
    if not is_hard.any():
        return Outlines(rings, outlines_px.ring_at, others, outlines_px.other_at)
    hard, easy = np.flatnonzero(is_hard), np.flatnonzero(~is_hard)
    alone = np.full(len(hard), None, dtype=object)
    for number, shape_px in enumerate(rings_px.take(hard).polygons()):
        alone[number] = lonlat_geometry(shape_px, tile, area)
    at = np.concatenate((outlines_px.other_at, outlines_px.ring_at[hard]))
    order = np.argsort(at)
    return Outlines(
        rings.take(easy), outlines_px.ring_at[easy], np.concatenate((others, alone))[order], at[order]
    )  # fmt: skip


def lonlat_geometries(shapes_px: NDArray[np.object_], tile: Tile, area: Area | None = None) -> NDArray[np.object_]:
    """Shapes in pixels of a tile as ``earth.lonlat_geometry`` makes them, all at once; None where nothing is left.

    A shape that is valid when its coordinates are rounded, has only straight edges and keeps clear of the antimeridian
    is done with whole arrays. ``area`` picks the operation between the CRS and EPSG:4326.
    """
    points_px, owner = shapely.get_coordinates(shapes_px, return_index=True)
    if not len(points_px):
        return np.full(len(shapes_px), None, dtype=object)
    rounded, is_hard = _rounded(points_px, owner, len(shapes_px), tile, area)
    ground = shapely.set_coordinates(shapes_px.copy(), rounded)
    is_hard |= _is_far(shapely.bounds(ground))
    is_point = shapely.get_type_id(ground) == shapely.GeometryType.POINT
    is_hard |= ~shapely.is_valid(ground) | ((shapely.area(ground) == 0) & ~is_point)
    # Points that fell together would stay as points twice.
    is_hard[owner[1:][(owner[1:] == owner[:-1]) & (rounded[1:] == rounded[:-1]).all(axis=1)]] = True
    ground = shapely.orient_polygons(ground)
    for number in np.flatnonzero(is_hard).tolist():
        ground[number] = lonlat_geometry(shapes_px[number], tile, area)
    return ground


def _rounded(
    points_px: FloatArray, owner: NDArray[np.int64], count: int, tile: Tile, area: Area | None
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Points (M, 2) in lon/lat on the grid of decimals; and which of the shapes that own them, (count,), are hard.

    Hard are those that leave the CRS, or have edges that bend.
    """
    transformer = to_lonlat(str(tile.crs), area)

    def to_ground(points_px: FloatArray) -> FloatArray:
        points = tile.px_to_crs(points_px)
        return np.column_stack(transformer.transform(points[:, 0], points[:, 1]))

    lonlat = to_ground(points_px)
    is_hard = np.zeros(count, bool)
    is_known = np.isfinite(lonlat)
    if not is_known.all():
        is_hard[owner[~is_known.all(axis=1)]] = True
    # Edges run from each point to the next one of its ring; what leads to another ring is no edge, and only costs time.
    steps = points_px[1:] - points_px[:-1]
    squares = np.where(owner[1:] == owner[:-1], np.einsum("ni,ni->n", steps, steps), 0.0)

    def bends_m(edges: NDArray[np.int64]) -> FloatArray:
        middle = to_ground((points_px[edges] + points_px[edges + 1]) / 2)
        bend = middle - (lonlat[edges] + lonlat[edges + 1]) / 2
        metres = np.hypot(bend[:, 0] * np.cos(np.radians(middle[:, 1])), bend[:, 1]) * 111_320
        return np.where(np.isfinite(metres), metres, np.inf)

    long = np.flatnonzero(squares > _SHORT_PX**2)
    if len(long):
        limit_m = _MAX_BEND_PX * (tile.gsd_m or tile.ground_size_m())
        # A bend grows with the square of its edge: some tell which of the others have to be looked at.
        some = long[:: max(1, len(long) // _SAMPLE)]
        worst = _CAUTION * np.max(bends_m(some) / squares[some])
        long = long[~(worst * squares[long] <= limit_m)]
        is_hard[owner[long[~(bends_m(long) <= limit_m)]]] = True
    return np.where(is_known, np.round(lonlat, DECIMALS), 0.0), is_hard


def _is_far(bounds: FloatArray) -> NDArray[np.bool_]:
    """Which boxes in lon/lat, (N, 4), reach over the antimeridian."""
    with np.errstate(invalid="ignore"):
        is_near = (bounds[:, 2] - bounds[:, 0] <= 180) & (np.abs(bounds[:, [0, 2]]).max(axis=1) <= 180)
    return np.asarray(~is_near)


def outline_areas_m2(outlines: Outlines) -> FloatArray:
    """Areas on the ellipsoid of outlines in lon/lat as `areas_m2` has them, (N,)."""
    areas = np.zeros(len(outlines))
    areas[outlines.other_at] = areas_m2(outlines.others)
    rings = outlines.rings
    if len(rings):
        found = np.round(np.abs(Rings(_unrolled(rings.points), rings.lengths).areas), 3)
        for number in np.flatnonzero(_is_wide(rings.bounds)).tolist():
            found[number] = area_m2(rings.take(np.array([number])).polygons()[0])
        areas[outlines.ring_at] = found
    return areas


def areas_m2(geometries: NDArray[np.object_]) -> FloatArray:
    """Areas on the ellipsoid of shapes in lon/lat, in square metres, to the nearest square millimetre or so.

    Measured on the equal-area cylinder, where the ellipsoid's areas are exact and edges are straight as in RFC 7946.
    """
    areas = np.round(shapely.area(shapely.transform(geometries, _unrolled)), 3)
    for number in np.flatnonzero(_is_wide(shapely.bounds(geometries))).tolist():
        areas[number] = area_m2(geometries[number])
    return np.asarray(areas, np.float64)


def _unrolled(lonlat: FloatArray) -> FloatArray:
    """On the equal-area cylinder, in metres."""
    e = np.sqrt(_WGS84.es)
    sine = np.sin(np.radians(lonlat[:, 1]))
    # Snyder 1987, equation 3-12.
    q = (1 - e**2) * (sine / (1 - (e * sine) ** 2) - np.log((1 - e * sine) / (1 + e * sine)) / (2 * e))
    return np.column_stack((np.radians(lonlat[:, 0]), q / 2)) * _WGS84.a


def _is_wide(bounds: FloatArray) -> NDArray[np.bool_]:
    return np.asarray((bounds[:, 2:] - bounds[:, :2]).max(axis=1, initial=0.0) > _WIDE_DEG)
