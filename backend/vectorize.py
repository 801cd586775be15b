"""Probabilities and masks to valid polygons, and Label Studio's single rings back to polygons with holes.

All coordinates are corner-based tile pixels: x right, y down, pixel 0 spans 0…1. What leaves this module is valid,
not empty and inside the image. The way out is ``polygons``, ``mask_polygons`` or ``numbered_polygons``, then
``bridge``; the way back is ``unbridge``; ``repair`` mends what others drew and ``rasterize`` paints it.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio.features
import shapely
from numpy.typing import NDArray
from shapely import LineString, MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry
from shapely.geometry.polygon import orient

from .contours import Rings, contours

# scipy and scikit-image take most of a second to import. They are imported where they are used, so that a server
# answers its health check before that.

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Polygons = NDArray[np.object_]
Size = tuple[int, int]

GRID_PX = 2.0**-10
"""Coordinates lie on this grid, in pixels: whatever is apart stays apart through percent and back."""

# A crossing this near to a pixel's centre would round onto it, and rings that meet there would touch.
_LEVEL_GAP = 2 * GRID_PX
_AREA_SLACK = 0.005
_COARSEST = 16
_LEAST_IOU = 0.8
_MAX_LOOPS = 1_000
"""Loops of one outline are compared with each other; no object has so many holes."""

_MAX_CROSSING_POINTS = 5_000
"""An outline that crosses itself is mended in a time that grows with the square of its points."""

_MAX_HEAL_POINTS = 2000


@dataclass(frozen=True, slots=True)
class VectorizeOptions:
    """How finely outlines are drawn, and what is too small to draw."""

    tolerance_px: float = 0.75
    """How far a simplified outline may leave the exact one, in pixels; 0 keeps every vertex."""

    max_vertices: int = 200
    """Most points of one polygon's bridged ring: shell, holes and two points for every bridge."""

    min_area_px: float = 16.0
    """Smaller objects are dropped, in square pixels."""

    min_hole_px: float = 16.0
    """Smaller holes are filled, in square pixels."""

    def __post_init__(self) -> None:
        for name in ("tolerance_px", "min_area_px", "min_hole_px"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if self.max_vertices < 8:
            raise ValueError(f"max_vertices must be at least 8, got {self.max_vertices}")

    @classmethod
    def for_gsd(
        cls,
        gsd_m: float,
        *,
        min_area_m2: float,
        min_hole_m2: float,
        tolerance_m: float | None = None,
        max_vertices: int = 200,
    ) -> VectorizeOptions:
        """Limits on the ground as limits in pixels of ``gsd_m`` metres; the tolerance in pixels where none is given."""
        if not (math.isfinite(gsd_m) and gsd_m > 0):
            raise ValueError(f"gsd_m must be a positive number of metres, got {gsd_m}")
        return cls(
            tolerance_px=cls().tolerance_px if tolerance_m is None else tolerance_m / gsd_m,
            max_vertices=max_vertices,
            min_area_px=min_area_m2 / gsd_m**2,
            min_hole_px=min_hole_m2 / gsd_m**2,
        )


_DEFAULTS = VectorizeOptions()


# --- probabilities and masks to polygons ------------------------------------------------------------------------------


def polygons(
    probabilities: NDArray[np.floating[Any]], *, threshold: float = 0.5, options: VectorizeOptions = _DEFAULTS
) -> list[Polygon]:
    """Outlines of where probabilities, (H, W), reach the threshold; sub-pixel, largest first.

    Values that are not finite count as 0. Pixels that touch at a corner only are two objects. An outline that cannot be
    drawn within ``max_vertices`` at any reasonable tolerance is cut in parts, so that nothing of it is lost.
    """
    probabilities = np.asarray(probabilities)
    window = _window_of(probabilities >= _checked_threshold(threshold))
    if window is None:
        return []
    level = _level(_clean(_framed(probabilities, window)), threshold)
    return _largest_first(_outlined(level > 0, level, window, probabilities.shape, options)[0])


def mask_polygons(mask: BoolArray, *, options: VectorizeOptions = _DEFAULTS) -> list[Polygon]:
    """Outlines of a mask, (H, W) bool, along its pixels' edges before simplification; largest first.

    With ``tolerance_px=0`` the outlines follow the pixels' edges exactly. Pixels that touch at a corner only are two
    objects.
    """
    mask = np.asarray(mask).astype(bool)
    window = _window_of(mask)
    if window is None:
        return []
    return _largest_first(_outlined(_framed(mask, window), None, window, mask.shape, options)[0])


def numbered_polygons(
    numbers: NDArray[np.int32],
    probabilities: FloatArray,
    *,
    threshold: float = 0.5,
    options: VectorizeOptions = _DEFAULTS,
) -> list[list[Polygon]]:
    """Outlines of objects 1, 2, … in a map of their numbers, (H, W), 0 for none; of each its parts, largest first.

    The probabilities, (H, W), say where between pixels an outline runs. Neighbours that touch share their border
    before simplification. An object with nothing to draw has no part.
    """
    level = _level(probabilities, _checked_threshold(threshold))
    found: list[list[Polygon]] = [[] for _ in range(int(numbers.max(initial=0)))]
    numbers = np.where(level > 0, numbers, 0)
    window = _window_of(numbers > 0)
    if window is not None:
        parts, which = _outlined(_framed(numbers, window), _framed(level, window), window, level.shape, options)
        for part, number in zip(parts, which.tolist(), strict=True):
            found[number - 1].append(part)
    return [_largest_first(parts) for parts in found]


def _checked_threshold(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    return threshold


def _window_of(mask: BoolArray) -> tuple[slice, slice] | None:
    """Rows and columns that hold the mask's pixels; None where it has none."""
    if mask.ndim != 2:
        raise ValueError(f"probabilities and masks must be (H, W), got {mask.shape}")
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)) if len(rows) else None


def _clean(values: NDArray[np.floating[Any]]) -> FloatArray:
    return np.where(np.isfinite(values), np.clip(values, 0.0, 1.0), 0.0).astype(np.float64, copy=False)


def _level(probabilities: FloatArray, threshold: float) -> FloatArray:
    """Height above the threshold, never nearer to it than the gap."""
    above = probabilities - threshold
    return np.where(above >= 0, np.maximum(above, _LEVEL_GAP), np.minimum(above, -_LEVEL_GAP))


def _framed(values: NDArray[Any], window: tuple[slice, slice]) -> NDArray[Any]:
    """A window and two more pixels all round; beyond the image, the edge's values."""
    reach = [(part.start - 2, part.stop + 2, length) for part, length in zip(window, values.shape, strict=True)]
    inside = values[tuple(slice(max(start, 0), min(stop, length)) for start, stop, length in reach)]
    return np.pad(inside, [(max(-start, 0), max(stop - length, 0)) for start, stop, length in reach], mode="edge")


def _outlined(
    owner: NDArray[Any],
    level: FloatArray | None,
    window: tuple[slice, slice],
    image_hw: Sequence[int],
    options: VectorizeOptions,
) -> tuple[list[Polygon], NDArray[np.int64]]:
    """Simplified outlines of the objects of a framed window, and the number of each outline's object.

    Without a level the outlines follow the pixels' edges.
    """
    size = (int(image_hw[1]), int(image_hw[0]))
    # The image's edge values run on, so that an object at the border is cut there and not drawn back.
    corner_xy = (window[1].start - 2, window[0].start - 2)
    traced = contours(owner, level, corner_xy=corner_xy, size=size, is_exact=level is None)
    points = np.round(traced.crossings.points_xy / GRID_PX) * GRID_PX
    outline = _tidied(Rings(points, traced.crossings.starts))
    if level is None:
        outline = _without_straights(outline)
    areas_px = (traced.corners if level is None else outline).areas()
    faces = _faces(traced.owners, outline, areas_px, options)
    if not len(faces.rings):
        return [], np.zeros(0, np.int64)
    outline = outline.chosen(faces.rings)
    exact = traced.corners.chosen(faces.rings) if level is None else outline
    found, which = _simplified_faces(exact, outline, faces.starts, size, options)
    return found, traced.owners[faces.rings[faces.starts]][which]


@dataclass(frozen=True, slots=True)
class _Faces:
    """Which rings are polygons together."""

    rings: NDArray[np.int64]
    """Numbers of rings: each polygon's shell, then its holes."""

    starts: NDArray[np.int64]
    """Where each polygon begins."""


def _faces(owners: NDArray[np.int64], outline: Rings, areas_px: FloatArray, options: VectorizeOptions) -> _Faces:
    """The shells that are big enough with the holes that are; what lies in a hole that is filled is left out.

    A hole in which another object is drawn is never filled.
    """
    # Fewer than three points are a ring that clipping at the image's border has left nothing of.
    is_ring = outline.counts >= 3
    shells = np.flatnonzero(is_ring & (areas_px > 0) & (areas_px >= options.min_area_px))
    holes = np.flatnonzero(is_ring & (areas_px < 0))
    if not len(holes) or not len(shells):
        return _Faces(shells, np.arange(len(shells)))
    faces = np.asarray(shapely.polygons(_linear_rings(outline.chosen(shells))))
    points = shapely.points(outline.points_xy[outline.starts[holes]])
    hole, shell = shapely.STRtree(faces).query(points, predicate="within")
    hole, shell = holes[hole], shells[shell]
    # Of the shells of its object, the smallest around a hole is its own.
    own = np.flatnonzero(owners[hole] == owners[shell])
    own = own[np.lexsort((areas_px[shell[own]], hole[own]))]
    own = own[np.unique(hole[own], return_index=True)[1]]
    hole, shell = hole[own], shell[own]

    is_small = -areas_px[hole] < options.min_hole_px
    if is_small.any() and len(shells) > 1:
        small = hole[is_small]
        gaps = np.asarray(shapely.polygons(_linear_rings(outline.chosen(small))))
        inner, around = shapely.STRtree(gaps).query(faces, predicate="covered_by")
        inner, around = shells[inner], small[around]
        is_own = owners[inner] == owners[around]
        is_small &= ~np.isin(hole, around[~is_own])
        shells = shells[~np.isin(shells, inner[is_own])]
    is_drawn = ~is_small & np.isin(shell, shells)
    hole, shell = hole[is_drawn], shell[is_drawn]
    whole_px = areas_px + np.bincount(shell, weights=areas_px[hole], minlength=len(areas_px))
    shells = shells[whole_px[shells] >= options.min_area_px]
    is_drawn = np.isin(shell, shells)
    of_shell = np.concatenate((shells, shell[is_drawn]))
    rings = np.concatenate((shells, hole[is_drawn]))[np.argsort(of_shell, kind="stable")]
    return _Faces(rings, np.flatnonzero(areas_px[rings] > 0))


def _tidied(rings: Rings) -> Rings:
    """The rings without points that equal the one before; of a ring that is one point, that point."""
    x, y = rings.points_xy.T
    is_new = (x != rings.before(x)) | (y != rings.before(y))
    is_new[rings.starts] |= rings.sums(is_new) == 0
    return rings.where(is_new)


def _without_straights(rings: Rings) -> Rings:
    """The rings without points at which they go straight on; of a ring that encloses nothing, its first."""
    points = rings.points_xy
    turns = _cross(points - rings.before(points), rings.after(points) - points) != 0
    turns[rings.starts] |= rings.sums(turns) == 0
    return rings.where(turns)


def _linear_rings(rings: Rings, *, is_numbered: bool = False) -> NDArray[np.object_]:
    """Shapely's rings; where numbered, each point's z is its index."""
    points = rings.points_xy
    if is_numbered:
        points = np.column_stack((points, np.arange(len(points))))
    return np.asarray(shapely.linearrings(points, indices=rings.ring_of))


def _polygons(rings: Rings, polygon_of: NDArray[np.int64], *, is_numbered: bool = False) -> Polygons:
    """Those of numbers 0, 1, …, each of its shell and then its holes; where numbered, each point's z is its index."""
    return np.asarray(shapely.polygons(_linear_rings(rings, is_numbered=is_numbered), indices=polygon_of))


def _rings_of(polygons: Polygons) -> tuple[Rings, NDArray[np.int64]]:
    """Shells and holes, as they run, and at which ring each polygon begins."""
    rings, polygon_of = shapely.get_rings(polygons, return_index=True)
    points, ring_of = shapely.get_coordinates(rings, return_index=True)
    is_last = np.append(ring_of[1:] != ring_of[:-1], True)
    starts = np.append(0, np.cumsum(shapely.get_num_coordinates(rings) - 1)[:-1])
    return Rings(points[~is_last], starts), np.searchsorted(polygon_of, np.arange(len(polygons)))


def _polygon_of(first: NDArray[np.int64], rings: Rings) -> NDArray[np.int64]:
    """Number of each ring's polygon, given the ring at which each begins."""
    return np.repeat(np.arange(len(first)), np.diff(np.append(first, len(rings.starts))))


def _largest_first(found: Iterable[Polygon]) -> list[Polygon]:
    polygons = list(found)
    return [polygons[index] for index in np.argsort(-shapely.area(polygons), kind="stable")] if polygons else []


# --- simplification ---------------------------------------------------------------------------------------------------


def _simplified_faces(
    exact: Rings, outline: Rings, first: NDArray[np.int64], size: Size, options: VectorizeOptions
) -> tuple[list[Polygon], NDArray[np.int64]]:
    """Polygons within tolerance and vertex budget, the area of each ring kept, and which polygon each is of.

    ``first`` is where each polygon's rings begin. One that cannot be drawn whole within the budget comes in parts.
    """
    areas_px = exact.areas()
    drawn: Polygons = np.full(len(first), None, object)
    if options.tolerance_px > 0:
        begun = _begun_far_out(outline)
        picks = _thinned(begun, options.tolerance_px)
        tolerances_px = np.full(len(first), options.tolerance_px, np.float64)
        drawn = _area_kept(areas_px, begun, picks, first, tolerances_px, size, options.max_vertices)
    left = np.flatnonzero(~shapely.is_geometry(drawn))
    whole = np.flatnonzero(shapely.is_geometry(drawn))
    if not len(left):
        return drawn.tolist(), whole
    polygon_of = _polygon_of(first, outline)
    own = np.flatnonzero(np.isin(polygon_of, left))
    of = np.searchsorted(left, polygon_of[own])
    outlines = precise = _polygons(outline.chosen(own), of)
    if exact is not outline:
        precise = _polygons(_without_straights(_tidied(exact.chosen(own))), of)
    parts, part_of = _in_parts(precise, outlines, size, options)
    return [*drawn[whole], *parts], np.concatenate((whole, left[part_of]))


def _in_parts(
    exact: Polygons, outlines: Polygons, size: Size, options: VectorizeOptions
) -> tuple[Polygons, NDArray[np.int64]]:
    """Polygons within the vertex budget, in parts where they fit in no other way; and which each part is of.

    Simplified are the outlines, to the exact polygons' areas. All are worked on at once, and then all halves at once:
    what one takes by itself is mostly the calls.
    """
    found: list[Polygons] = []
    which: list[NDArray[np.int64]] = []
    numbers = np.arange(len(exact))
    while len(numbers):
        drawn = _redrawn(exact, outlines, size, options)
        drawn = np.where(shapely.is_geometry(drawn) | (_ring_points(exact) > options.max_vertices), drawn, exact)
        is_drawn = shapely.is_geometry(drawn)
        found.append(drawn[is_drawn])
        which.append(numbers[is_drawn])
        halves = [_halves(polygon) for polygon in exact[~is_drawn]]
        numbers = np.repeat(numbers[~is_drawn], [len(parts) for parts in halves])
        exact = outlines = np.array([part for parts in halves for part in parts], object)
    return np.concatenate(found), np.concatenate(which)


def _redrawn(exact: Polygons, outlines: Polygons, size: Size, options: VectorizeOptions) -> Polygons:
    """The outlines as fine as the vertex budget lets them be, with the exact polygons' areas; None where that fails."""
    drawn = np.full(len(exact), None, object)
    # However coarse, a ring keeps three corners, and a hole's bridge takes two points more.
    can_fit = 3 + 5 * shapely.get_num_interior_rings(exact) <= options.max_vertices
    if options.tolerance_px == 0:
        can_fit &= _ring_points(exact) > options.max_vertices
    left = np.flatnonzero(can_fit)
    tolerances_px = np.full(len(left), options.tolerance_px or 0.25, np.float64)
    is_raised = np.zeros(len(left), bool)
    # Where moving the corners makes rings meet, a finer outline has more room to give.
    for turn in range(3):
        if not len(left):
            break
        full, first = _rings_of(outlines[left])
        simple = shapely.simplify(_polygons(full, _polygon_of(first, full), is_numbered=True), tolerances_px)
        if turn == 0:
            simple, tolerances_px = _coarser(simple, tolerances_px, options)
            is_raised = tolerances_px > options.tolerance_px
        fits = _ring_points(simple) <= options.max_vertices
        if not fits.any():
            break
        left, tolerances_px, is_raised = left[fits], tolerances_px[fits], is_raised[fits]
        is_pick = np.zeros(len(full.points_xy), bool)
        is_pick[shapely.get_coordinates(simple[fits], include_z=True)[:, 2].astype(np.int64)] = True
        is_of_fit = fits[_polygon_of(first, full)]
        picks = np.flatnonzero(is_pick[is_of_fit[full.ring_of]])
        rings, picks = _begun_at_picks(full.chosen(np.flatnonzero(is_of_fit)), picks)
        precise, first = _rings_of(exact[left])
        found = _area_kept(precise.areas(), rings, picks, first, tolerances_px, size, options.max_vertices)
        is_good = shapely.is_geometry(found)
        raised = np.flatnonzero(is_good & is_raised)
        is_good[raised] = _ious(found[raised], exact[left[raised]]) >= _LEAST_IOU
        drawn[left[is_good]] = found[is_good]
        left, tolerances_px, is_raised = left[~is_good], tolerances_px[~is_good] / 2, is_raised[~is_good]
    return drawn


def _coarser(simple: Polygons, tolerances_px: FloatArray, options: VectorizeOptions) -> tuple[Polygons, FloatArray]:
    """Simplified until they fit the vertex budget or no reasonable tolerance is left; and the tolerances."""
    simple, tolerances_px = simple.copy(), tolerances_px.copy()
    coarsest_px = _COARSEST * max(options.tolerance_px or 0.25, 0.75)
    while True:
        long = np.flatnonzero((_ring_points(simple) > options.max_vertices) & (tolerances_px < coarsest_px))
        if not len(long):
            return simple, tolerances_px
        tolerances_px[long] *= 1.5
        # From the last one, not from the outline: a forest of 10,000 points takes seconds otherwise.
        simple[long] = shapely.simplify(simple[long], tolerances_px[long])


def ring_points(polygon: Polygon) -> int:
    """Points of the polygon's bridged ring."""
    return int(_ring_points(polygon))


def _ring_points(polygons: Any) -> Any:
    # Every ring repeats its first point at its end; a bridge takes two more points than the hole's open ring.
    return shapely.get_num_coordinates(polygons) - 1 + shapely.get_num_interior_rings(polygons)


def _thinned(rings: Rings, tolerance_px: float) -> NDArray[np.int64]:
    """Indices of the points that are left by Douglas and Peucker's way, in order, each ring's first among them."""
    # Not of polygons and their topology, which takes ten times as long; what is wrong then is seen in the end.
    lines = shapely.simplify(_linear_rings(rings, is_numbered=True), tolerance_px, preserve_topology=False)
    numbers = shapely.get_coordinates(lines, include_z=True)[:, 2].astype(np.int64)
    return np.unique(np.concatenate((numbers, rings.starts)))


def _begun_far_out(rings: Rings) -> Rings:
    """The rings, each begun at the point farthest from its middle: a corner, whatever the tolerance."""
    ring_of = rings.ring_of
    middles = np.column_stack([rings.sums(values) for values in rings.points_xy.T]) / rings.counts[:, None]
    away = ((rings.points_xy - middles[ring_of]) ** 2).sum(axis=1)
    farthest = np.flatnonzero(away == np.maximum.reduceat(away, rings.starts)[ring_of])
    return _begun_at(rings, farthest[np.unique(ring_of[farthest], return_index=True)[1]])


def _begun_at(rings: Rings, begins: NDArray[np.int64]) -> Rings:
    ring_of = rings.ring_of
    starts, counts = rings.starts[ring_of], rings.counts[ring_of]
    along = np.arange(len(ring_of)) - starts
    return Rings(rings.points_xy[starts + (along + begins[ring_of] - starts) % counts], rings.starts)


def _begun_at_picks(rings: Rings, picks: NDArray[np.int64]) -> tuple[Rings, NDArray[np.int64]]:
    """The rings, each begun at its first pick, and the picks there."""
    begins = picks[np.searchsorted(picks, rings.starts)]
    return _begun_at(rings, begins), picks - (begins - rings.starts)[rings.ring_of[picks]]


def _area_kept(
    areas_px: FloatArray,
    outline: Rings,
    picks: NDArray[np.int64],
    first: NDArray[np.int64],
    tolerances_px: FloatArray,
    size: Size,
    max_vertices: int,
) -> Polygons:
    """The polygons of the picked points, each ring with the area given; None for those whose rings cross or touch.

    Edges lie along the points that they replace where that works, else between two of them. Each ring of the outline
    begins with a pick.
    """
    drawn = np.full(len(first), None, object)
    kept = Rings(outline.points_xy[picks], np.searchsorted(picks, outline.starts))
    polygon_of = _polygon_of(first, kept)
    ring_tolerances_px = tolerances_px[polygon_of]
    wanted_px = np.add.reduceat(areas_px, first)
    free = (kept.points_xy != 0) & (kept.points_xy != size)
    is_open = np.ones(len(first), bool)
    for corners in (_edges_fitted(outline, kept, picks, ring_tolerances_px), kept.points_xy):
        moved = Rings(np.where(free, np.clip(corners, 0, size), kept.points_xy), kept.starts)
        swollen = np.clip(_swollen(moved, free, areas_px, limits_px=ring_tolerances_px + 1), 0, size)
        ringed = _tidied(Rings(np.round(swollen / GRID_PX) * GRID_PX, kept.starts))
        waiting = is_open & (np.minimum.reduceat(ringed.counts, first) >= 3)
        if waiting.any():
            rings = np.flatnonzero(waiting[polygon_of])
            found = np.full(len(first), None, object)
            shapely.polygons(_linear_rings(ringed.chosen(rings)), indices=polygon_of[rings], out=found)
            is_good = waiting & shapely.is_valid(found) & _are_rings_apart(found)
            is_good &= np.abs(shapely.area(found) - wanted_px) <= _AREA_SLACK * wanted_px
            is_good &= _ring_points(found) <= max_vertices
            drawn[is_good] = found[is_good]
            is_open &= ~is_good
            if not is_open.any():
                break
    return drawn


def _edges_fitted(outline: Rings, kept: Rings, picks: NDArray[np.int64], tolerances_px: FloatArray) -> FloatArray:
    """Corners (M, 2) where lines meet that were fitted to the points of the outline between the picked ones."""
    counts = np.diff(np.append(picks, len(outline.points_xy)))
    origins = outline.points_xy[outline.starts]
    start = outline.points_xy - origins[outline.ring_of]
    stop = outline.after(start)
    lengths = np.hypot(*(stop - start).T)
    totals = np.add.reduceat(lengths, picks)
    # Marching squares rounds corners: a pixel next to each corner says little of the edge.
    along = np.cumsum(lengths) - lengths / 2
    along -= np.repeat(np.cumsum(totals) - totals, counts)
    # Less than a whole pixel by more than rounding, which depends on the other outlines of the tile.
    near_corner = np.minimum(along, np.repeat(totals, counts) - along) < 1 - GRID_PX
    weights = np.where(near_corner & np.repeat(totals > 5, counts), 0.0, lengths)
    sums = np.add.reduceat(weights, picks)
    weights = np.where(np.repeat(sums > 0, counts), weights, lengths)
    sums = np.where(sums > 0, sums, totals)

    def mean(values: FloatArray) -> FloatArray:
        averaged: FloatArray = np.add.reduceat(values * weights, picks) / sums
        return averaged

    (px, py), (qx, qy) = start.T, stop.T
    cx, cy = mean((px + qx) / 2), mean((py + qy) / 2)
    cov_xx = mean((px * px + px * qx + qx * qx) / 3) - cx * cx
    cov_yy = mean((py * py + py * qy + qy * qy) / 3) - cy * cy
    cov_xy = mean((2 * px * py + px * qy + qx * py + 2 * qx * qy) / 6) - cx * cy
    angle = np.arctan2(2 * cov_xy, cov_xx - cov_yy) / 2
    corners = kept.points_xy
    chord = kept.after(corners) - corners
    is_short = totals < 2
    direction = np.where(is_short[:, None], chord, np.column_stack((np.cos(angle), np.sin(angle))))
    direction /= np.maximum(np.hypot(*direction.T), GRID_PX)[:, None]
    centre = np.column_stack((cx, cy)) + origins[kept.ring_of]

    centre_before, direction_before = kept.before(centre), kept.before(direction)
    turn = _cross(direction_before, direction)
    is_corner = np.abs(turn) > 0.26
    reach = _cross(centre - centre_before, direction) / np.where(is_corner, turn, 1.0)
    meeting = centre_before + reach[:, None] * direction_before
    beside = (_projected(corners, centre_before, direction_before) + _projected(corners, centre, direction)) / 2
    limit = np.maximum(1.0, 1.5 * tolerances_px)[kept.ring_of]
    fitted = np.where((np.hypot(*(beside - corners).T) <= limit)[:, None], beside, corners)
    is_near = is_corner & (np.hypot(*(meeting - corners).T) <= limit)
    return np.where(is_near[:, None], meeting, fitted)


def _swollen(rings: Rings, free: BoolArray, areas_px: FloatArray, *, limits_px: FloatArray) -> FloatArray:
    """The points with each ring's moved out or in alike until it has its signed area. Only free ones move."""
    points = rings.points_xy
    across = rings.after(points) - rings.before(points)
    lengths = np.hypot(*across.T)
    normal = np.column_stack((across[:, 1], -across[:, 0])) / np.where(lengths > 0, lengths, 1.0)[:, None]
    normal = np.where(free, normal, 0.0)
    # The area is a quadratic function of the distance moved.
    constant, square = rings.areas() - areas_px, Rings(normal, rings.starts).areas()
    linear = rings.sums(_cross(points, rings.after(normal)) + _cross(normal, rings.after(points))) / 2
    moved = np.zeros(len(rings.starts))
    for _ in range(4):
        slope = linear + 2 * square * moved
        is_steep = np.abs(slope) >= 1e-6
        moved = np.where(
            is_steep, moved - (constant + linear * moved + square * moved * moved) / np.where(is_steep, slope, 1.0), 0.0
        )
    moved = np.where(np.abs(moved) <= limits_px, moved, 0.0)
    swollen: FloatArray = points + moved[rings.ring_of][:, None] * normal
    return swollen


def _are_rings_apart(polygons: NDArray[np.object_]) -> BoolArray:
    """Whether no two rings of a polygon touch. Rings on the grid that do not touch survive rounding to percent."""
    apart = np.ones(len(polygons), bool)
    holed = np.flatnonzero(shapely.get_num_interior_rings(polygons) > 0)
    if len(holed):
        rings, which = shapely.get_rings(polygons[holed], return_index=True)
        first, second = shapely.STRtree(rings).query(rings, predicate="intersects")
        apart[holed[which[first[(which[first] == which[second]) & (first != second)]]]] = False
    return apart


def _halves(polygon: Polygon) -> list[Polygon]:
    """The polygon cut in two across its longer side, near the middle."""
    left, top, right, bottom = polygon.bounds
    if right - left >= bottom - top:
        middle = (left + right) / 2
        boxes = (left, top, middle, bottom), (middle, top, right, bottom)
    else:
        middle = (top + bottom) / 2
        boxes = (left, top, right, middle), (left, middle, right, bottom)
    parts = (shapely.set_precision(polygon.intersection(shapely.box(*box)), GRID_PX) for box in boxes)
    return [part for piece in parts for part in _polygonal(piece)]


def cut_up(polygon: Polygon, max_vertices: int) -> list[Polygon]:
    """The polygon in as many parts as it takes for each to fit the vertex budget."""
    if ring_points(polygon) <= max_vertices:
        return [polygon]
    return [part for half in _halves(polygon) for part in cut_up(half, max_vertices)]


def _ious(a: Polygons, b: Polygons) -> FloatArray:
    shared = shapely.area(shapely.intersection(a, b))
    return np.asarray(shared / (shapely.area(a) + shapely.area(b) - shared))


def _open_rings(polygon: Polygon) -> list[FloatArray]:
    """Points of the shell and of each hole, (N, 2), the first not repeated at the end."""
    return [shapely.get_coordinates(ring)[:-1] for ring in (polygon.exterior, *polygon.interiors)]


def _without_repeats(ring: FloatArray) -> FloatArray:
    """An open ring without points that equal the one before."""
    kept: FloatArray = ring[(ring != _before(ring)).any(axis=1)]
    return kept


def _after(ring: FloatArray) -> FloatArray:
    """For each point of an open ring the next."""
    return np.concatenate((ring[1:], ring[:1]))


def _before(ring: FloatArray) -> FloatArray:
    """For each point of an open ring the one before."""
    return np.concatenate((ring[-1:], ring[:-1]))


def _cross(a: FloatArray, b: FloatArray) -> FloatArray:
    product: FloatArray = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    return product


def _projected(points: FloatArray, centre: FloatArray, direction: FloatArray) -> FloatArray:
    foot: FloatArray = centre + ((points - centre) * direction).sum(axis=1, keepdims=True) * direction
    return foot


def _signed_area(ring: FloatArray) -> float:
    """Area of an open ring, (N, 2); positive where it turns from x towards y."""
    centred = ring - ring[0]
    return float(_cross(centred, _after(centred)).sum()) / 2


# --- polygons with holes to single rings, and back --------------------------------------------------------------------


def bridge(polygon: Polygon) -> FloatArray:
    """The polygon as one open ring in pixels, (N, 2), counter-clockwise in x and y.

    Every hole is reached over the shortest bridge that crosses nothing, from corner to corner, and left over the same:
    the end points of both passes are bitwise equal, and no point is added. Needs a valid polygon.
    """
    if polygon.is_empty:
        raise ValueError("an empty polygon has no ring")
    polygon = orient(polygon)
    rings = _open_rings(polygon)
    if len(rings) == 1:
        return rings[0]
    points = np.concatenate(rings)
    ends = np.cumsum([len(ring) for ring in rings])
    members = [np.arange(end - len(ring), end) for end, ring in zip(ends, rings, strict=True)]
    shapely.prepare(polygon)
    walk = members[0].tolist()
    bridges: list[LineString] = []
    # Where holes touch, the shortest line can be one that another hole's bridge took: only where there is no other.
    outlines = [polygon.exterior, *polygon.interiors]
    nearest_px = shapely.distance(outlines[0], outlines)
    waiting = set(range(1, len(rings)))
    while waiting:
        by_distance = sorted(waiting, key=lambda number: nearest_px[number])
        for may_repeat, hole in itertools.product((False, True), by_distance):
            joined = np.unique(walk)
            ends_found = _shortest_bridge(polygon, points, joined, members[hole], bridges, may_repeat=may_repeat)
            if ends_found is not None:
                break
        else:
            raise ValueError(f"no bridge reaches {len(waiting)} of the polygon's holes; is it valid?")
        here, there = ends_found
        bridges.append(LineString(points[[here, there]]))
        at = _occurrence(points, walk, here, there)
        around = np.roll(members[hole], -int(np.flatnonzero(members[hole] == there)[0])).tolist()
        walk[at + 1 : at + 1] = [*around, there, here]
        waiting.discard(hole)
        nearest_px = np.minimum(nearest_px, shapely.distance(outlines[hole], outlines))
    ring: FloatArray = points[np.array(walk)]
    return ring


def unbridge(ring_px: FloatArray, *, heal_tolerance_px: float = 1.0) -> tuple[list[Polygon], list[str]]:
    """Valid polygons of a ring, (N, 2), as an annotator left it, and a sentence for everything that was mended.

    Edges walked both ways are taken out, what is left is shell and holes again. A bridge of which one end was pulled
    open by at most the tolerance is closed. A ring that crosses itself is repaired. The closing point and points that
    repeat the one before are dropped without a word, as they change nothing. Fewer than three distinct points make no
    polygon.
    """
    points = np.asarray(ring_px, np.float64)
    if points.ndim != 2 or points.shape[1:] != (2,):
        return [], [f"an outline must be a list of x and y, got an array of shape {points.shape}; left out"]
    if not np.isfinite(points).all():
        bad = points[~np.isfinite(points).all(axis=1)][0]
        return [], [f"the outline holds the point ({bad[0]}, {bad[1]}), which is no place; left out"]
    points = _without_repeats(points)
    distinct = len(np.unique(points, axis=0))
    if distinct < 3:
        return [], [f"an outline needs 3 distinct points, got {max(distinct, len(ring_px) and 1)}; left out"]
    reasons: list[str] = []
    loops: list[FloatArray] = []
    for loop in _loops(points):
        loops += _healed(loop, heal_tolerance_px, reasons)
    loops = [loop for loop in loops if len(loop) >= 3]
    if not loops:
        return [], [*reasons, "the outline walks there and back and encloses nothing; left out"]
    if len(loops) > _MAX_LOOPS:
        return [], [*reasons, f"self-crossing outline of {len(loops)} loops, more than {_MAX_LOOPS}; left out"]
    found = _nested(loops)
    if found is None and (count := sum(map(len, loops))) > _MAX_CROSSING_POINTS:
        return [], [
            *reasons, f"self-crossing outline of {count} points, more than the {_MAX_CROSSING_POINTS} mended; left out"
        ]  # fmt: skip
    if found is None:
        found = _overlaid(loops, reasons)
    if not found:
        reasons.append("the outline encloses no area; left out")
    return _largest_first(found), reasons


def repair(geometry: BaseGeometry | None) -> list[Polygon]:
    """Valid polygons that cover what the geometry's polygons enclose; its lines and points are left out."""
    if geometry is None or geometry.is_empty:
        return []
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry, method="structure", keep_collapsed=False)
    return _polygonal(geometry)


def rasterize(polygons: Iterable[Polygon], height: int, width: int) -> BoolArray:
    """Pixels whose centre lies in one of the polygons and in none of its holes, (H, W) bool."""
    shapes = [polygon for polygon in polygons if not polygon.is_empty]
    if not shapes or not height or not width:
        return np.zeros((height, width), bool)
    painted = rasterio.features.rasterize(shapes, out_shape=(height, width), fill=0, default_value=1, dtype=np.uint8)
    return np.asarray(painted).astype(bool)


def _polygonal(geometry: BaseGeometry) -> list[Polygon]:
    parts = getattr(geometry, "geoms", None)
    if parts is not None:
        return [polygon for part in parts for polygon in _polygonal(part)]
    return [geometry] if isinstance(geometry, Polygon) and geometry.area > 0 else []


def _shortest_bridge(
    polygon: Polygon,
    points: FloatArray,
    joined: NDArray[np.int64],
    hole: NDArray[np.int64],
    bridges: list[LineString],
    *,
    may_repeat: bool,
) -> tuple[int, int] | None:
    """The joined point and the hole's point with the shortest free line between them; None where none sees another."""
    from scipy.spatial import cKDTree

    # Nearest first, a few at a time: the first pair nearly always sees each other.
    nearest = cKDTree(points[joined])
    neighbours = min(8, len(joined))
    while True:
        lengths, near = (np.reshape(found, (len(hole), -1)) for found in nearest.query(points[hole], k=neighbours))
        here, there = joined[near.ravel()], np.repeat(hole, neighbours)
        order = np.argsort(lengths.ravel(), kind="stable")
        if neighbours < len(joined):
            # Beyond this length there may be pairs that were not asked for.
            order = order[lengths.ravel()[order] <= lengths[:, -1].min()]
        for chunk in np.array_split(order, range(64, len(order), 64)):
            lines = [LineString(ends) for ends in np.stack((points[here[chunk]], points[there[chunk]]), axis=1)]
            for at in np.flatnonzero(shapely.covers(polygon, lines)):
                line = lines[at]
                # Inside of the line in the inside of the polygon and nowhere else: it touches no other corner or edge.
                is_free = shapely.relate_pattern(line, polygon, "1FF******") and not any(map(line.crosses, bridges))
                if is_free and (may_repeat or not any(map(line.equals, bridges))):
                    return int(here[chunk[at]]), int(there[chunk[at]])
        if neighbours == len(joined):
            return None
        neighbours = min(8 * neighbours, len(joined))


def _occurrence(points: FloatArray, walk: list[int], here: int, there: int) -> int:
    """Where in the walk a bridge from ``here`` leaves without crossing bridges that leave from the same point."""
    places = [place for place, number in enumerate(walk) if number == here]
    if len(places) == 1:
        return places[0]

    def turn(number: int) -> float:
        return math.atan2(*(points[number] - points[here])[::-1])

    for place in places:
        ahead = turn(walk[(place + 1) % len(walk)])
        opening = (turn(walk[place - 1]) - ahead) % math.tau or math.tau
        if (turn(there) - ahead) % math.tau < opening:
            return place
    return places[0]


def _loops(points: FloatArray) -> list[FloatArray]:
    """The loops that a ring, (N, 2), falls into when edges walked both ways are taken out; each open, (M, 2)."""
    corners = list(map(tuple, points.tolist()))
    count = len(corners)
    before = [(number - 1) % count for number in range(count)]
    after = [(number + 1) % count for number in range(count)]
    is_out = [False] * count
    unpaired: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    for edge in range(count):
        start, stop = corners[edge], corners[(edge + 1) % count]
        if not unpaired[stop, start]:
            unpaired[start, stop].append(edge)
            continue
        back = unpaired[stop, start].pop()
        is_out[edge] = is_out[back] = True
        came, left, back_came, back_left = before[edge], after[edge], before[back], after[back]
        # What led to an end of the two edges goes on with what left from there.
        links = {came: back_left, back_came: left}
        if left == back:
            links = {came: back_left} if back_left != edge else {}
        elif back_left == edge:
            links = {back_came: left}
        for first, second in links.items():
            after[first], before[second] = second, first
    loops = []
    seen = list(is_out)
    for edge in range(count):
        loop = []
        while not seen[edge]:
            seen[edge] = True
            loop.append(edge)
            edge = after[edge]
        if loop:
            loops.append(points[loop])
    return loops


def _healed(loop: FloatArray, tolerance_px: float, reasons: list[str]) -> list[FloatArray]:
    """The open loops that a loop falls into when bridges that were pulled open are closed.

    A loop that is simple stays as it is, narrow slits and all.
    """
    if not 8 <= len(loop) <= _MAX_HEAL_POINTS or Polygon(loop).is_valid:
        return [loop]
    openings = sorted(_openings(loop, tolerance_px), key=lambda opening: opening.width_px)
    for opening in openings[:50]:
        parts = opening.parts(loop)
        if _are_shell_and_hole(*parts) or _are_side_by_side(*parts):
            reasons.append(f"a bridge to a hole, pulled open by {opening.width_px:.2g} px, was closed")
            return [healed for part in parts for healed in _healed(part, tolerance_px, reasons)]
    for opening in sorted(_openings(loop, math.inf), key=lambda opening: opening.width_px)[:50]:
        if _are_shell_and_hole(*opening.parts(loop)):
            reasons.append(
                f"a bridge to a hole was pulled open by {opening.width_px:.2g} px, more than the {tolerance_px:g} px"
                " that are closed; kept as drawn"
            )
            break
    return [loop]


@dataclass(frozen=True, slots=True)
class _Opening:
    """Where a loop walks to another part of itself and nearly the same way back."""

    way_in: tuple[int, int]
    """First and last point of the way in, as indices."""

    way_back: tuple[int, int]
    """First and last point of the way back, as indices."""

    width_px: float
    """How far the two ways are apart, in pixels."""

    def parts(self, loop: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The two loops that are left without the two ways, which now meet half-way."""
        (start, inner), (inner_back, stop) = self.way_in, self.way_back
        return _closed_up(loop, stop, start), _closed_up(loop, inner, inner_back)


def _closed_up(loop: FloatArray, first: int, last: int) -> FloatArray:
    part = np.roll(loop, -first, axis=0)[: (last - first) % len(loop) + 1].copy()
    part[0] = (part[0] + part[-1]) / 2
    return part[:-1]


def _openings(loop: FloatArray, tolerance_px: float) -> list[_Opening]:
    """Openings up to the tolerance. Where that is endless, those of which one end is not open at all."""
    from scipy.spatial import cKDTree

    count = len(loop)
    pairs = cKDTree(loop).query_pairs(0.0 if math.isinf(tolerance_px) else tolerance_px, output_type="ndarray")
    found: list[_Opening] = []
    corners = loop.tolist()
    for a, b in pairs[:4000].tolist():
        # An annotator may have put up to two new points on one of the two ways.
        for (inner, back), (steps, steps_back) in itertools.product(
            ((a, b), (b, a)), ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1))
        ):
            start, stop = (inner - steps) % count, (back + steps_back) % count
            if (back - inner) % count < 3 or (back - inner) % count + steps + steps_back > count - 3:
                continue
            ends = math.dist(corners[inner], corners[back]), math.dist(corners[start], corners[stop])
            if max(ends) > tolerance_px:
                continue
            between = [inner - step for step in range(1, steps)] + [back + step for step in range(1, steps_back)]
            line = LineString(loop[[inner, start]])
            off_line = shapely.distance(line, shapely.points(loop[np.array(between, int) % count])).tolist()
            width_px = max(*ends, *off_line)
            if width_px <= tolerance_px and (line.length > 2 * width_px or math.isinf(tolerance_px)):
                found.append(_Opening((start, inner), (back, stop), width_px))
    return found


def _are_shell_and_hole(outer: FloatArray, inner: FloatArray) -> bool:
    if abs(_signed_area(outer)) < abs(_signed_area(inner)):
        outer, inner = inner, outer
    if _signed_area(outer) * _signed_area(inner) >= 0:
        return False
    hole, shell = MultiPolygon(repair(Polygon(inner))), MultiPolygon(repair(Polygon(outer)))
    return bool(hole.intersection(shell).area >= 0.98 * hole.area > 0)


def _are_side_by_side(a: FloatArray, b: FloatArray) -> bool:
    if _signed_area(a) * _signed_area(b) <= 0:
        return False
    first, second = MultiPolygon(repair(Polygon(a))), MultiPolygon(repair(Polygon(b)))
    return bool(first.intersection(second).area <= 0.02 * min(first.area, second.area))


def _nested(loops: list[FloatArray]) -> list[Polygon] | None:
    """Polygons with their holes, every point as it was; None where loops cross themselves or each other."""
    faces = [Polygon(loop) for loop in loops]
    if not all(face.is_valid for face in faces):
        return None
    shells, holes = _by_direction(loops, faces)
    inside: dict[int, list[Polygon]] = defaultdict(list)
    for hole in holes:
        around = [index for index, shell in enumerate(shells) if shell.covers(hole)]
        if not around:
            return None
        inside[min(around, key=lambda index: shells[index].area)].append(hole)
    found = [Polygon(shell.exterior, [hole.exterior for hole in inside[index]]) for index, shell in enumerate(shells)]
    if not all(polygon.is_valid for polygon in found):
        return None
    overlap = any(a.relate_pattern(b, "2********") for a, b in itertools.combinations(found, 2))
    return None if overlap else found


def _by_direction(loops: list[FloatArray], faces: list[Polygon]) -> tuple[list[Polygon], list[Polygon]]:
    """Faces of loops that run like the largest, and of those that run against it."""
    areas = [_signed_area(loop) for loop in loops]
    way = math.copysign(1, max(areas, key=abs))
    along = [face for face, area in zip(faces, areas, strict=True) if area * way >= 0]
    against = [face for face, area in zip(faces, areas, strict=True) if area * way < 0]
    return along, against


def _overlaid(loops: list[FloatArray], reasons: list[str]) -> list[Polygon]:
    """What the loops enclose, painted largest first; those that run against the largest are holes."""
    loops = sorted(loops, key=lambda loop: -abs(_signed_area(loop)))
    crosses = not all(Polygon(loop).is_valid for loop in loops)
    way = math.copysign(1, _signed_area(loops[0]))
    painted: BaseGeometry = MultiPolygon()
    for loop in loops:
        face = shapely.union_all(repair(Polygon(loop)))
        is_hole = _signed_area(loop) * way < 0 and painted.intersection(face).area > 0
        painted = painted.difference(face) if is_hole else painted.union(face)
    drawn_px = abs(sum(_signed_area(loop) for loop in loops))
    found = [part for polygon in _polygonal(painted) for part in repair(polygon)]
    kept_px = sum(polygon.area for polygon in found)
    change = 100 * abs(kept_px - drawn_px) / max(kept_px, drawn_px, 1e-12)
    what = "self-crossing outline" if crosses else "hole that reaches over the outline or another hole"
    reasons.append(f"{what} repaired, area changed by {change:.1f} %")
    return found
