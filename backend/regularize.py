"""Outlines of buildings made right-angled, where that leaves them in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from .errors import BadTile
from .tile import Tile
from .vectorize import GRID_PX, repair

FloatArray = NDArray[np.float64]

LEAST_IOU = 0.9
"""A right-angled outline that shares less with the plain one is not taken."""

_LEAST_ORDER = 0.5
"""How far edges must agree on two directions, 0 for a circle, 1 for a rectangle."""

_LARGEST_TURN_DEG = 27.5
_SHORTEST_SHARE = 0.09
"""Steps shorter than this share of the square root of the area are evened out."""


def metric_frame(tile: Tile) -> FloatArray:
    """What takes steps in pixels, (N, 2), to metres east and north at the tile's centre, (2, 2).

    Right angles on the ground are right angles there, whatever the CRS. Without a place pixels count as square.
    """
    columns, rows = tile.size[0] / 2, tile.size[1] / 2
    try:
        points = tile.px_to_lonlat(np.array([(columns, rows), (columns + 1, rows), (columns, rows + 1)]))
    except BadTile:
        return np.eye(2)
    lon, lat = points.T
    azimuths, _, metres = pyproj.Geod(ellps="WGS84").inv(lon[[0, 0]], lat[[0, 0]], lon[1:], lat[1:])
    turned = np.radians(azimuths)
    return np.column_stack((metres * np.sin(turned), metres * np.cos(turned)))


def regularized(
    outlines: Sequence[Polygon],
    *,
    frame: FloatArray | None = None,
    size: tuple[int, int] | None = None,
    others: Sequence[Polygon] = (),
) -> list[Polygon]:
    """The outlines in tile pixels, right-angled in the frame's metres where that is as good.

    A right-angled outline is taken where it shares ``LEAST_IOU`` with the plain one and overlaps no other outline, nor
    any of ``others``, more than that did. All others stay as they are: round buildings, and those with holes that would
    touch. ``size`` is the image's columns and rows, which no outline leaves.
    """
    frame = np.eye(2) if frame is None else frame
    back = np.linalg.inv(frame)
    image = shapely.box(0, 0, *size) if size else None
    current = [*outlines, *others]
    if not current:
        return []
    tree = shapely.STRtree(current)
    for number, plain in enumerate(outlines):
        metric = shapely.transform(plain, lambda points: points @ frame)
        squared = _squared(metric)
        if squared is None:
            continue
        found = shapely.transform(squared, lambda points: np.round(points @ back / GRID_PX) * GRID_PX)
        if image is not None and not image.covers(found):
            (found, *more) = repair(shapely.set_precision(found.intersection(image), GRID_PX)) or [found]
            if more:
                continue
        if not found.is_valid or _iou(found, plain) < LEAST_IOU:
            continue
        near = [current[index] for index in tree.query(shapely.union(plain, found).envelope) if index != number]
        if all(found.intersection(other).area <= plain.intersection(other).area + GRID_PX for other in near):
            current[number] = found
    return current[: len(outlines)]


def _iou(one: Polygon, other: Polygon) -> float:
    shared = one.intersection(other).area
    return float(shared / (one.area + other.area - shared))


def _squared(polygon: Polygon) -> Polygon | None:
    """The polygon with its edges along two directions; None where it has no such directions or would fall apart."""
    edges = np.diff(shapely.get_coordinates(polygon.exterior), axis=0)
    lengths = np.hypot(*edges.T)
    angles = np.arctan2(edges[:, 1], edges[:, 0])
    # Four times the angle is the same for all four sides of a rectangle.
    order = (lengths * np.exp(4j * angles)).sum() / lengths.sum()
    if abs(order) < _LEAST_ORDER:
        return None
    turn = np.angle(order) / 4
    turned = np.array([(math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))])
    shortest = _SHORTEST_SHARE * math.sqrt(polygon.area)
    rings = []
    for ring in (polygon.exterior, *polygon.interiors):
        points = _squared_ring(shapely.get_coordinates(ring)[:-1] @ turned, shortest)
        if points is None:
            return None
        rings.append(points @ turned.T)
    squared = Polygon(rings[0], rings[1:])
    if not squared.is_valid:
        return None
    # Sides that moved to where they lie on average keep the area nearly; growing about the middle does the rest.
    middle = np.array(squared.centroid.coords[0])
    grown = math.sqrt(polygon.area / squared.area)
    return Polygon(shapely.transform(squared, lambda points: middle + (points - middle) * grown))


class _Side(NamedTuple):
    """The line that a side lies on."""

    axis: int
    """0 along x, 1 along y, 2 askew."""

    point: complex
    way: complex
    length: float


def _squared_ring(points: FloatArray, shortest: float) -> FloatArray | None:
    """An open ring, (N, 2), with sides along the axes where they nearly are; None where fewer than four are left."""
    corners = points[:, 0] + 1j * points[:, 1]
    sides: list[_Side] = []
    for start, stop in zip(corners, np.roll(corners, -1), strict=True):
        sides = _and_then(sides, _side(start, stop), start, shortest)
    if len(sides) > 4 and sides[0].axis == sides[-1].axis < 2:
        last = sides.pop()
        sides = [*_and_then([last], sides[0], corners[0], shortest), *sides[1:]]
    while True:
        found = _corners(sides)
        if found is None or len(found) < 4:
            return None
        lengths = np.abs(np.roll(found, -1) - found)
        least = int(np.argmin(lengths))
        if len(sides) == 4 or lengths[least] >= shortest:
            return np.column_stack((found.real, found.imag))
        sides = [side._replace(length=float(length)) for side, length in zip(sides, lengths, strict=True)]
        sides = _without(sides, least)


def _side(start: complex, stop: complex) -> _Side:
    along = stop - start
    off_axis = math.degrees(math.atan2(min(abs(along.real), abs(along.imag)), max(abs(along.real), abs(along.imag))))
    if off_axis > _LARGEST_TURN_DEG:
        return _Side(2, (start + stop) / 2, along, abs(along))
    axis = int(abs(along.imag) > abs(along.real))
    return _Side(axis, (start + stop) / 2, (1, 1j)[axis], abs(along))


def _and_then(sides: list[_Side], following: _Side, corner: complex, shortest: float) -> list[_Side]:
    """The sides with one more: in line with the last where the two nearly are, else with a step between them."""
    if not sides or sides[-1].axis != following.axis or following.axis == 2:
        return [*sides, following]
    last = sides[-1]
    if abs(_across(following) - _across(last)) <= shortest:
        return [*sides[:-1], _in_line(last, following)]
    return [*sides, _Side(1 - last.axis, corner, (1j, 1)[last.axis], 0.0), following]


def _without(sides: list[_Side], index: int) -> list[_Side]:
    """The sides without one, its neighbours in line where they run alike."""
    turned = [*sides[index + 1 :], *sides[:index]]
    first, last = turned[0], turned[-1]
    return [*turned[1:-1], _in_line(last, first)] if first.axis == last.axis < 2 else turned


def _in_line(one: _Side, other: _Side) -> _Side:
    length = max(one.length + other.length, 1e-12)
    return one._replace(point=(one.length * one.point + other.length * other.point) / length, length=length)


def _across(side: _Side) -> float:
    return side.point.imag if side.axis == 0 else side.point.real


def _corners(sides: list[_Side]) -> NDArray[np.complex128] | None:
    """Where each side meets the one before; None where two do not meet."""
    point, way = np.array([side.point for side in sides]), np.array([side.way for side in sides])
    point_before, way_before = np.roll(point, 1), np.roll(way, 1)
    turn = (way_before.conj() * way).imag
    if (np.abs(turn) < 0.1 * np.abs(way_before) * np.abs(way)).any():
        return None
    corners: NDArray[np.complex128] = point_before + way_before * (((point - point_before).conj() * way).imag / turn)
    return corners
