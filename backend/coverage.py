"""Outlines that were drawn one by one, to outlines that share their borders: neighbours without overlap or gap."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from .vectorize import GRID_PX, VectorizeOptions, cut_up, repair, ring_points

logger = logging.getLogger(__name__)

GAP_PX = 1.0
"""What lies nearer together than this has one border, in pixels."""

_MOST_RAISES = 2


def coverage(
    objects: Sequence[Sequence[Polygon]], *, gap_px: float = GAP_PX, options: VectorizeOptions | None = None
) -> list[list[Polygon]]:
    """The same objects, each its parts in tile pixels, with one border where they overlap or lie within ``gap_px``.

    Ground that several claim goes to the one that comes first: list the surest first. What is left of another is kept
    unless it is below ``min_area_px``, or a strip no wider than the gap; an object that lies on others' ground
    altogether has no part left. Borders have vertex for vertex the same points on both sides, to the grid; only what
    cannot be drawn with ``max_vertices`` is cut up. Objects apart from all others stay as they are, and so do
    neighbours for which no such borders can be found.
    """
    options = options or VectorizeOptions()
    parts = np.array([part for parts in objects for part in parts], object)
    owner = np.repeat(np.arange(len(objects)), [len(parts) for parts in objects])
    shared: list[list[Polygon]] = [[] for _ in objects]
    for members in _neighbourhoods(parts, gap_px):
        drawn = parts[members].tolist()
        found = _shared(drawn, gap_px, options) if len(members) > 1 else None
        for member, pieces in zip(members, found or [[part] for part in drawn], strict=True):
            shared[owner[member]] += pieces
    return [sorted(pieces, key=lambda piece: -piece.area) for pieces in shared]


def _neighbourhoods(parts: NDArray[np.object_], gap_px: float) -> list[NDArray[np.int64]]:
    """Numbers of the parts that belong together since each is near another, in order; one that is alone, alone."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(parts):
        return []
    one, other = shapely.STRtree(parts).query(parts, predicate="dwithin", distance=gap_px)
    pairs = coo_array((np.ones(len(one)), (one, other)), shape=(len(parts), len(parts)))
    count, group = connected_components(pairs, directed=False)
    return [np.flatnonzero(group == number) for number in range(count)]


def _shared(drawn: list[Polygon], gap_px: float, options: VectorizeOptions) -> list[list[Polygon]] | None:
    """What each of the parts, which are neighbours, has as its own; None where that cannot be told cleanly."""
    try:
        cleaned = shapely.coverage_clean(  # type: ignore[attr-defined]
            _snapped(drawn, gap_px), gap_width=gap_px, merge_strategy="min_index"
        )
        pieces = None
        for raised in range(_MOST_RAISES):
            # The outer border was simplified when it was drawn; the shared one is of both sides' points.
            simple = shapely.coverage_simplify(
                cleaned, 1.5**raised * options.tolerance_px, simplify_boundary=raised > 0
            )
            pieces = _on_grid(simple if options.tolerance_px else cleaned, drawn, gap_px, options)
            if pieces is None or all(ring_points(piece) <= options.max_vertices for own in pieces for piece in own):
                return pieces
        assert pieces is not None
        return [[part for piece in own for part in cut_up(piece, options.max_vertices)] for own in pieces]
    except shapely.GEOSException as error:
        logger.debug("%d neighbours keep their own borders: %s", len(drawn), error)
    return None


def _snapped(drawn: list[Polygon], gap_px: float) -> list[Polygon]:
    """The parts with their corners on each other's borders where those are within the gap."""
    snapped = list(drawn)
    pairs = shapely.STRtree(drawn).query(drawn, predicate="dwithin", distance=gap_px).T.tolist()
    # First onto the neighbours that come before; then both ways, so that each has all points of a border.
    for one, other in [*((one, other) for one, other in pairs if other < one), *pairs]:
        if one != other:
            moved = shapely.snap(snapped[one], snapped[other], gap_px)
            # What is hardly wider than the gap would fold up.
            if isinstance(moved, Polygon) and moved.is_valid and moved.area >= 0.9 * snapped[one].area:
                snapped[one] = moved
    return snapped


def _on_grid(found: Any, drawn: list[Polygon], gap_px: float, options: VectorizeOptions) -> list[list[Polygon]] | None:
    """What is worth keeping of each, on the grid; None where it would not be valid there."""
    rounded = shapely.transform(found, lambda points: np.round(points / GRID_PX) * GRID_PX)
    # Where a corner was all but on a neighbour's edge, rounding can put it over that by less than the grid.
    if not shapely.is_valid(rounded).all() or (
        not shapely.coverage_is_valid(rounded)
        and shapely.area(rounded).sum() - shapely.union_all(rounded).area > GRID_PX * shapely.length(rounded).sum()
    ):
        return None
    pieces = [
        [piece for piece in repair(geometry) if _is_worth(piece, before, gap_px, options)]
        for geometry, before in zip(rounded, drawn, strict=True)
    ]
    return pieces


def _is_worth(piece: Polygon, before: Polygon, gap_px: float, options: VectorizeOptions) -> bool:
    is_strip = _width_px(piece) < min(gap_px, _width_px(before) / 2)
    return piece.area >= min(options.min_area_px, before.area) and not is_strip


def _width_px(polygon: Polygon) -> float:
    """Mean width of a polygon as if it were a strip, in pixels."""
    return 2 * polygon.area / polygon.length
