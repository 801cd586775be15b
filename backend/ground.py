"""Ground: many shapes at once from scene pixels to lon/lat, and their areas; the rare hard ones go through `earth`."""

from __future__ import annotations

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from .earth import DECIMALS, Area, area_m2, lonlat_geometry
from .tile import FloatArray, Tile, to_lonlat

_SHORT_PX = 16.0
"""Edges up to this length are never bent by the tenth of a pixel that would show."""

_MAX_BEND_PX = 0.05
_WIDE_DEG = 0.5
"""Shapes this wide are measured one by one, with edges that are geodesics."""

_WGS84 = pyproj.Geod(ellps="WGS84")


def lonlat_geometries(shapes_px: NDArray[np.object_], tile: Tile, area: Area | None = None) -> NDArray[np.object_]:
    """Shapes in pixels of a tile as ``earth.lonlat_geometry`` makes them, all at once; None where nothing is left.

    A shape that is valid when its coordinates are rounded, has only straight edges and keeps clear of the antimeridian
    is done with whole arrays. ``area`` picks the operation between the CRS and EPSG:4326.
    """
    transformer = to_lonlat(str(tile.crs), area)

    def to_ground(points_px: FloatArray) -> FloatArray:
        points = tile.px_to_crs(points_px)
        return np.column_stack(transformer.transform(points[:, 0], points[:, 1]))

    points_px, owner = shapely.get_coordinates(shapes_px, return_index=True)
    if not len(points_px):
        return np.full(len(shapes_px), None, dtype=object)
    lonlat = to_ground(points_px)
    is_hard = np.zeros(len(shapes_px), bool)
    is_hard[owner[~np.isfinite(lonlat).all(axis=1)]] = True

    # Edges run from each point to the next one of its ring; what leads to another ring is no edge, and only costs time.
    is_edge = owner[1:] == owner[:-1]
    long = np.flatnonzero(is_edge & (np.hypot(*np.diff(points_px, axis=0).T) > _SHORT_PX))
    if len(long):
        middle = to_ground((points_px[long] + points_px[long + 1]) / 2)
        bend = middle - (lonlat[long] + lonlat[long + 1]) / 2
        metres = np.hypot(bend[:, 0] * np.cos(np.radians(middle[:, 1])), bend[:, 1]) * 111_320
        limit_m = _MAX_BEND_PX * (tile.gsd_m or tile.ground_size_m())
        is_hard[owner[long[~(metres <= limit_m)]]] = True

    rounded = np.where(np.isfinite(lonlat), np.round(lonlat, DECIMALS), 0.0)
    ground = shapely.set_coordinates(shapes_px.copy(), rounded)
    bounds = shapely.bounds(ground)
    with np.errstate(invalid="ignore"):
        is_hard |= ~((bounds[:, 2] - bounds[:, 0] <= 180) & (np.abs(bounds[:, [0, 2]]).max(axis=1) <= 180))
    is_point = shapely.get_type_id(ground) == shapely.GeometryType.POINT
    is_hard |= ~shapely.is_valid(ground) | ((shapely.area(ground) == 0) & ~is_point)
    # Points that fell together would stay as points twice.
    is_hard[owner[1:][is_edge & (rounded[1:] == rounded[:-1]).all(axis=1)]] = True
    ground = shapely.orient_polygons(ground)
    for number in np.flatnonzero(is_hard).tolist():
        ground[number] = lonlat_geometry(shapes_px[number], tile, area)
    return ground


def areas_m2(geometries: NDArray[np.object_]) -> FloatArray:
    """Areas on the ellipsoid of shapes in lon/lat, in square metres, to the nearest square millimetre or so.

    Measured on the equal-area cylinder, where the ellipsoid's areas are exact and edges are straight as in RFC 7946.
    """
    e = np.sqrt(_WGS84.es)

    def unrolled(lonlat: FloatArray) -> FloatArray:
        sine = np.sin(np.radians(lonlat[:, 1]))
        # Snyder 1987, equation 3-12.
        q = (1 - e**2) * (sine / (1 - (e * sine) ** 2) - np.log((1 - e * sine) / (1 + e * sine)) / (2 * e))
        return np.column_stack((np.radians(lonlat[:, 0]), q / 2)) * _WGS84.a

    areas = np.round(shapely.area(shapely.transform(geometries, unrolled)), 3)
    bounds = shapely.bounds(geometries)
    wide = (bounds[:, 2:] - bounds[:, :2]).max(axis=1) > _WIDE_DEG
    for number in np.flatnonzero(wide).tolist():
        areas[number] = area_m2(geometries[number])
    return np.asarray(areas, np.float64)
