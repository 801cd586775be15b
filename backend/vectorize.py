"""Probabilities and masks to valid polygons, and Label Studio's single rings back to polygons with holes.

All coordinates are corner-based tile pixels: x right, y down, pixel 0 spans 0…1. What leaves this module is valid,
not empty and inside the image. The way out is ``polygons``, ``mask_polygons`` or ``instances``, then ``bridge``;
the way back is ``unbridge``; ``repair`` mends what others drew and ``rasterize`` paints it.
"""

from __future__ import annotations

import heapq
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

from .errors import BadConfig
from .segmenter import DenseMaps

# scipy and scikit-image take most of a second to import. They are imported where they are used, so that a server
# answers its health check before that.

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Size = tuple[int, int]

GRID_PX = 2.0**-10
"""Coordinates lie on this grid, in pixels: whatever is apart stays apart through percent and back."""

DOUBT_AS_BORDER = 0.5
"""How much of a border a pixel counts as where the class is surely absent."""

SMOOTHING_PX = 1.5
BASIN_DEPTH = 0.1
"""A piece of its own is what lies this much below the border around it, before neighbours are joined."""

WEAK_BORDER = 0.45
"""Neighbours are one object where the border between them is weaker than this on average. Chosen on Banepa's west."""

# A crossing this near to a pixel's centre would round onto it, and rings that meet there would touch.
_LEVEL_GAP = 2 * GRID_PX
_AREA_SLACK = 0.005
_COARSEST = 16
_LEAST_IOU = 0.8
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


@dataclass(frozen=True, slots=True)
class Instance:
    """One object that a model found."""

    polygons: tuple[Polygon, ...]
    """Its parts, largest first; nearly always one."""

    score: float
    """Mean probability over its pixels, 0…1."""


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
    return _largest_first(_drawn(_traced(level, window, probabilities.shape, options), probabilities.shape, options))


def mask_polygons(mask: BoolArray, *, options: VectorizeOptions = _DEFAULTS) -> list[Polygon]:
    """Outlines of a mask, (H, W) bool, along its pixels' edges before simplification; largest first.

    With ``tolerance_px=0`` the outlines follow the pixels' edges exactly. Pixels that touch at a corner only are two
    objects.
    """
    mask = np.asarray(mask).astype(bool)
    window = _window_of(mask)
    if window is None:
        return []
    corner_xy = window[1].start, window[0].start
    pixels = mask[window].astype(np.uint8)
    exact = []
    for geometry, _ in rasterio.features.shapes(pixels, mask=pixels.astype(bool), connectivity=4):
        rings = [np.add(ring, corner_xy) for ring in geometry["coordinates"]]
        holes = [ring for ring in rings[1:] if abs(_signed_area(ring[:-1])) >= options.min_hole_px]
        exact += [part for part in repair(Polygon(rings[0], holes)) if part.area >= options.min_area_px]
    exact = _without_buried(exact)
    size = mask.shape[1], mask.shape[0]
    parts = [_simplified(polygon, size, options, outline=_midpoints(polygon, size)) for polygon in exact]
    return _largest_first(itertools.chain.from_iterable(parts))


def instances(
    dense: DenseMaps, label: str, *, threshold: float = 0.5, options: VectorizeOptions = _DEFAULTS
) -> list[Instance]:
    """Single objects of a class, largest first. Neighbours that touch share their border before simplification.

    Raises BadConfig where the maps hold no such class.
    """
    from scipy import ndimage

    if label not in dense.labels:
        raise BadConfig(f"the model has no class {label!r}; it has {', '.join(dense.labels) or 'none'}")
    index = dense.labels.index(label)
    probabilities = _clean(dense.probabilities[index])
    level = _level(probabilities, _checked_threshold(threshold))
    objects = _separated(level > 0, probabilities, _clean(dense.boundary[index]), options.min_area_px)
    sizes = np.bincount(objects.ravel())
    sums = np.bincount(objects.ravel(), weights=probabilities.ravel())
    found = []
    for number, window in enumerate(ndimage.find_objects(objects), start=1):
        if window is None:
            continue
        owner = _framed(objects, window)
        seen = _framed(level, window)
        # A neighbour's pixels count as far below the level as they lie above it: seen from both sides the crossing is
        # then the same point, so that neighbours neither overlap nor leave a gap.
        seen = np.where((owner == number) | (seen < 0), seen, -seen)
        parts = _drawn(_traced(seen, window, level.shape, options), level.shape, options)
        if parts:
            score = float(np.clip(sums[number] / sizes[number], 0, 1))
            found.append(Instance(polygons=tuple(_largest_first(parts)), score=score))
    return sorted(found, key=lambda instance: -sum(part.area for part in instance.polygons))


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
    return np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)


def _level(probabilities: FloatArray, threshold: float) -> FloatArray:
    """Height above the threshold, never nearer to it than the gap."""
    above = probabilities - threshold
    return np.where(above >= 0, np.maximum(above, _LEVEL_GAP), np.minimum(above, -_LEVEL_GAP))


def _framed(values: NDArray[Any], window: tuple[slice, slice]) -> NDArray[Any]:
    """A window and two more pixels all round; beyond the image, the edge's values."""
    index = [
        np.clip(np.arange(part.start - 2, part.stop + 2), 0, length - 1)
        for part, length in zip(window, values.shape, strict=True)
    ]
    framed: NDArray[Any] = values[np.ix_(*index)]
    return framed


def _separated(
    inside: BoolArray, probabilities: FloatArray, boundary: FloatArray, min_area_px: float
) -> NDArray[np.int32]:
    """Number of the object at each pixel, 0 outside. Every pixel of ``inside`` is of one object.

    A watershed on how strongly a border runs through each pixel cuts too finely; neighbours are then joined, the
    weakest border first, until those that remain are strong along their whole length (Arbeláez et al., "Contour
    detection and hierarchical image segmentation", 2011). Pieces below ``min_area_px`` go to the neighbour behind the
    weakest border.
    """
    from scipy import ndimage
    from skimage.morphology import h_minima
    from skimage.segmentation import watershed

    # Where the class itself is in doubt, there is a gap between objects more often than the border alone shows.
    barrier = np.clip(boundary + DOUBT_AS_BORDER * (1 - probabilities), 0, 1)
    smooth = np.round(ndimage.gaussian_filter(barrier, SMOOTHING_PX) * 255).astype(np.int32)
    # Beyond the class there are no basins, so that none is split off at the rim.
    basins: BoolArray = h_minima(np.where(inside, smooth, 256), round(BASIN_DEPTH * 255)) > 0  # type: ignore[no-untyped-call]
    cores, count = _labelled(inside & basins)
    pieces: NDArray[np.int32] = watershed(smooth, cores, mask=inside)  # type: ignore[no-untyped-call]
    stray, _ = _labelled(inside & (pieces == 0))
    pieces = np.where(stray > 0, stray + count, pieces).astype(np.int32)
    return _joined(pieces, barrier, min_area_px)


def _joined(pieces: NDArray[np.int32], barrier: FloatArray, min_area_px: float) -> NDArray[np.int32]:
    """Neighbouring pieces joined where the border between them is weak or one of them is too small."""
    sides = [
        (pieces[:, :-1], pieces[:, 1:], np.maximum(barrier[:, :-1], barrier[:, 1:])),
        (pieces[:-1], pieces[1:], np.maximum(barrier[:-1], barrier[1:])),
    ]
    ones, others, strengths = (np.concatenate([side[i].ravel() for side in sides]) for i in range(3))
    is_border = (ones != others) & (ones > 0) & (others > 0)
    edges, which = np.unique(np.sort(np.stack((ones, others), axis=1)[is_border], axis=1), axis=0, return_inverse=True)
    lengths = np.bincount(which.ravel(), minlength=len(edges)).astype(float)
    sums = np.bincount(which.ravel(), weights=strengths[is_border], minlength=len(edges))
    sizes = np.bincount(pieces.ravel()).tolist()
    borders: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for (one, other), length, total in zip(edges.tolist(), lengths.tolist(), sums.tolist(), strict=True):
        borders[one][other] = borders[other][one] = (length, total)

    def cost(one: int, other: int) -> float:
        length, total = borders[one][other]
        return total / length - (1 if min(sizes[one], sizes[other]) < min_area_px else 0)

    queue = [(cost(one, other), one, other) for one, other in edges.tolist()]
    heapq.heapify(queue)
    owner = np.arange(len(sizes), dtype=np.int32)
    while queue and queue[0][0] < WEAK_BORDER:
        expected, one, other = heapq.heappop(queue)
        if other not in borders.get(one, ()) or cost(one, other) != expected:
            continue  # one of the two was joined meanwhile; the queue holds what became of it
        owner[owner == other] = one
        sizes[one] += sizes[other]
        for third, (length, total) in borders.pop(other).items():
            del borders[third][other]
            if third != one:
                old_length, old_total = borders[one].get(third, (0.0, 0.0))
                borders[one][third] = borders[third][one] = (old_length + length, old_total + total)
        for third in borders[one]:
            heapq.heappush(queue, (cost(one, third), one, third))
    return owner[pieces]


def _labelled(mask: BoolArray) -> tuple[NDArray[np.int32], int]:
    from scipy import ndimage

    numbers = np.empty(mask.shape, np.int32)
    return numbers, int(ndimage.label(mask, output=numbers))


def _traced(
    framed: FloatArray, window: tuple[slice, slice], image_hw: Sequence[int], options: VectorizeOptions
) -> list[Polygon]:
    """Exact outlines of where a framed level is positive, cut at the image's border, without what is too small."""
    from skimage.measure import find_contours

    # The image's edge values run on for two pixels, so that an object at the border is cut there and not drawn back.
    padded = np.pad(framed, 1, constant_values=-1.0)
    contours: list[FloatArray] = find_contours(padded, 0.0, fully_connected="low")  # type: ignore[no-untyped-call]
    if not contours:
        return []
    counts = np.array([len(contour) for contour in contours])
    offset = (window[1].start - 2.5, window[0].start - 2.5)
    coords = np.round((np.concatenate(contours)[:, ::-1] + offset) / GRID_PX) * GRID_PX
    x, y = (coords - coords[0]).T
    crossed = x[:-1] * y[1:] - x[1:] * y[:-1]
    ends = np.cumsum(counts)
    crossed = np.append(crossed, 0.0)
    crossed[ends - 1] = 0.0
    areas = np.add.reduceat(crossed, ends - counts) / 2
    rings = shapely.linearrings(coords, indices=np.repeat(np.arange(len(counts)), counts))
    is_shell = areas > 0
    shells = rings[is_shell & (areas >= options.min_area_px)]
    holes = rings[~is_shell & (-areas >= options.min_hole_px)]
    if not len(shells):
        return []
    faces = shapely.polygons(shells)
    of_shell: dict[int, list[Any]] = defaultdict(list)
    if len(holes):
        face_areas = shapely.area(faces)
        hole_index, face_index = shapely.STRtree(faces).query(shapely.get_point(holes, 0), predicate="within")
        for hole in np.unique(hole_index):
            around = face_index[hole_index == hole]
            of_shell[int(around[np.argmin(face_areas[around])])].append(holes[hole])
    found = [shapely.polygons(shells[i], of_shell[i]) if i in of_shell else faces[i] for i in range(len(shells))]
    height, width = image_hw
    image = shapely.box(0, 0, width, height)
    inside: list[Polygon] = []
    for polygon in found:
        parts = [polygon] if image.covers(polygon) else _polygonal(polygon.intersection(image))
        inside += [part for part in parts if part.area >= options.min_area_px and not part.is_empty]
    return _without_buried(inside) if options.min_hole_px > options.min_area_px else inside


def _without_buried(found: list[Polygon]) -> list[Polygon]:
    """Without islands whose surrounding hole was filled."""
    if len(found) < 2:
        return found
    inner, outer = shapely.STRtree(found).query(found, predicate="covered_by")
    buried = set(inner[inner != outer].tolist())
    return [polygon for index, polygon in enumerate(found) if index not in buried]


def _largest_first(found: Iterable[Polygon]) -> list[Polygon]:
    return sorted(found, key=lambda polygon: -polygon.area)


# --- simplification ---------------------------------------------------------------------------------------------------


def _drawn(exact: Iterable[Polygon], image_hw: Sequence[int], options: VectorizeOptions) -> list[Polygon]:
    size = (int(image_hw[1]), int(image_hw[0]))
    return [part for polygon in exact for part in _simplified(polygon, size, options)]


def _simplified(
    exact: Polygon, size: Size, options: VectorizeOptions, *, outline: Polygon | None = None
) -> list[Polygon]:
    """The polygon within tolerance and vertex budget, its area kept; in parts where it fits in no other way.

    With ``outline``, that is simplified instead, to the exact polygon's area.
    """
    if options.tolerance_px == 0 and ring_points(exact) <= options.max_vertices:
        return [exact]
    outline = outline or exact
    tolerance_px = options.tolerance_px or 0.25
    coarsest_px = _COARSEST * max(tolerance_px, 0.75)
    simple = _coarser(outline, tolerance_px)
    while ring_points(simple) > options.max_vertices and tolerance_px < coarsest_px:
        tolerance_px *= 1.5
        # From the last one, not from the outline: a forest of 10,000 points takes seconds otherwise.
        simple = _coarser(simple, tolerance_px)
    is_raised = tolerance_px > options.tolerance_px
    # Where moving the corners makes rings meet, a finer outline has more room to give.
    for _ in range(3):
        if ring_points(simple) > options.max_vertices:
            break
        for is_fitted in (True, False):
            drawn = _area_kept(exact, outline, simple, tolerance_px, size, is_fitted=is_fitted)
            if drawn is not None and (not is_raised or _iou(drawn, exact) >= _LEAST_IOU):
                return [drawn]
        tolerance_px /= 2
        simple = _coarser(outline, tolerance_px)
    if ring_points(exact) <= options.max_vertices:
        return [exact]
    return [part for half in _halves(exact) for part in _simplified(half, size, options)]


def _coarser(polygon: Polygon, tolerance_px: float) -> Polygon:
    simple = polygon.simplify(tolerance_px)
    # Topology is kept, so that a polygon stays one.
    assert isinstance(simple, Polygon)
    return simple


def ring_points(polygon: Polygon) -> int:
    """Points of the polygon's bridged ring."""
    holes = shapely.get_num_interior_rings(polygon)
    # Every ring repeats its first point at its end; a bridge takes two more points than the hole's open ring.
    return int(shapely.get_num_coordinates(polygon)) - 1 - int(holes) + 2 * int(holes)


def _area_kept(
    exact: Polygon, outline: Polygon, simple: Polygon, tolerance_px: float, size: Size, *, is_fitted: bool
) -> Polygon | None:
    """The simplified outline with the area of each of the exact rings; None where rings would cross or touch.

    With ``is_fitted``, edges lie along the points that they replace rather than between two of them.
    """
    if len(outline.interiors) != len(simple.interiors):
        return None
    rings = []
    for ring_before, full, kept in zip(*map(_open_rings, (exact, outline, simple)), strict=True):
        ring = kept
        if is_fitted:
            fitted = _edges_fitted(full, kept, tolerance_px)
            if fitted is None:
                return None
            ring = fitted
        free = (kept != 0) & (kept != size)
        ring = np.where(free, np.clip(ring, 0, size), kept)
        ring = _swollen(ring, free, _signed_area(ring_before), limit_px=tolerance_px + 1)
        ring = _without_repeats(np.round(np.clip(ring, 0, size) / GRID_PX) * GRID_PX)
        if len(ring) < 3:
            return None
        rings.append(ring)
    drawn = Polygon(rings[0], rings[1:])
    if not drawn.is_valid or abs(drawn.area - exact.area) > _AREA_SLACK * exact.area:
        return None
    return drawn if _are_rings_apart(drawn) else None


def _edges_fitted(full: FloatArray, kept: FloatArray, tolerance_px: float) -> FloatArray | None:
    """Corners (M, 2) where lines meet that were fitted to the points of ``full`` (N, 2) between the ``kept`` ones."""
    index = {point: number for number, point in enumerate(map(tuple, full.tolist()))}
    picks = np.array([index.get(point, -1) for point in map(tuple, kept.tolist())])
    if (picks < 0).any():
        return None
    full = np.concatenate((full[picks[0] :], full[: picks[0]]))
    picks = (picks - picks[0]) % len(full)
    counts = np.diff(picks, append=len(full))
    if (counts <= 0).any():
        return None
    origin = full[0]
    start = full - origin
    stop = _after(start)
    lengths = np.hypot(*(stop - start).T)
    totals = np.add.reduceat(lengths, picks)
    # Marching squares rounds corners: a pixel next to each corner says little of the edge.
    along = np.cumsum(lengths) - lengths / 2
    along -= np.repeat(np.cumsum(totals) - totals, counts)
    near_corner = np.minimum(along, np.repeat(totals, counts) - along) < 1
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
    chord = _after(kept) - kept
    is_short = totals < 2
    direction = np.where(is_short[:, None], chord, np.column_stack((np.cos(angle), np.sin(angle))))
    direction /= np.hypot(*direction.T)[:, None]
    centre = np.column_stack((cx, cy)) + origin

    centre_before, direction_before = _before(centre), _before(direction)
    turn = _cross(direction_before, direction)
    is_corner = np.abs(turn) > 0.26
    reach = _cross(centre - centre_before, direction) / np.where(is_corner, turn, 1.0)
    meeting = centre_before + reach[:, None] * direction_before
    beside = (_projected(kept, centre_before, direction_before) + _projected(kept, centre, direction)) / 2
    limit = max(1.0, 1.5 * tolerance_px)
    is_near = np.hypot(*(beside - kept).T) <= limit
    corners = np.where(is_near[:, None], beside, kept)
    is_near = is_corner & (np.hypot(*(meeting - kept).T) <= limit)
    return np.where(is_near[:, None], meeting, corners)


def _swollen(ring: FloatArray, free: BoolArray, area: float, *, limit_px: float) -> FloatArray:
    """The ring, (N, 2), with its corners moved out or in alike until it has that signed area. Only free ones move."""
    across = _after(ring) - _before(ring)
    lengths = np.hypot(*across.T)
    normal = np.column_stack((across[:, 1], -across[:, 0])) / np.where(lengths > 0, lengths, 1.0)[:, None]
    normal = np.where(free, normal, 0.0)
    # The area is a quadratic function of the distance moved.
    constant, square = _signed_area(ring) - area, _signed_area(normal)
    ring_ahead, normal_ahead = _after(ring), _after(normal)
    linear = float((_cross(ring, normal_ahead) + _cross(normal, ring_ahead)).sum()) / 2
    moved = 0.0
    for _ in range(4):
        slope = linear + 2 * square * moved
        if abs(slope) < 1e-6:
            return ring
        moved -= (constant + linear * moved + square * moved * moved) / slope
    return ring + moved * normal if abs(moved) <= limit_px else ring


def _are_rings_apart(polygon: Polygon) -> bool:
    """Whether no two rings touch. Rings on the grid that do not touch survive rounding to percent."""
    if not polygon.interiors:
        return True
    rings = [polygon.exterior, *polygon.interiors]
    first, second = shapely.STRtree(rings).query(rings, predicate="intersects")
    return bool((first == second).all())


def _midpoints(polygon: Polygon, size: Size) -> Polygon:
    """The polygon through the middles of its pixels' edges: half as far from a slanting line, and no rings touch.

    Corners on the image's border stay.
    """
    rings = []
    for points in _open_rings(shapely.segmentize(polygon, 1.0)):
        both = np.stack((points, (points + _after(points)) / 2), axis=1).reshape(-1, 2)
        on_border = ((both == 0) | (both == size)).any(axis=1)
        rings.append(both[on_border | (np.arange(len(both)) % 2 == 1)])
    return Polygon(rings[0], rings[1:])


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


def _iou(a: BaseGeometry, b: BaseGeometry) -> float:
    shared = a.intersection(b).area
    return float(shared / (a.area + b.area - shared))


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
    found = _nested(loops)
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
