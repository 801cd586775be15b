"""Maps of which object each pixel is of, to closed rings around the objects. Arrays in, arrays out.

Two rings of points come of one walk along the pixels' edges: the *corners* that it passes, which give the pixels
exactly, and the *crossings*, one for each edge, where the level passes through zero between the two pixels' centres
(marching squares). All rings are held in one flat array, since most images hold many small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Walking with the object on the right hand: its top edge to the right, its right edge down, its bottom edge to the
# left, its left edge up. x and y of a step, of the way from the pixel to the one beyond the edge, of the edge's start.
_STEP_XY = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
_BEYOND_XY = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
_START_XY = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])


@dataclass(frozen=True)
class Rings:
    """Closed rings, one behind the other; the first point of none is repeated at its end."""

    points_xy: FloatArray
    """(N, 2), in pixels."""

    starts: IntArray
    """Where each ring begins, (R,)."""

    @cached_property
    def ends(self) -> IntArray:
        """Where each ring ends, (R,), its last point excluded."""
        return np.concatenate((self.starts[1:], [len(self.points_xy)]))[: len(self.starts)]

    @cached_property
    def counts(self) -> IntArray:
        """Points of each ring, (R,)."""
        return self.ends - self.starts

    @cached_property
    def ring_of(self) -> IntArray:
        """Number of each point's ring, (N,)."""
        return np.repeat(np.arange(len(self.starts)), self.counts)

    def after(self, values: NDArray[Any]) -> NDArray[Any]:
        """For each point the value, (N, …), of the next one of its ring."""
        following = np.empty_like(values)
        following[:-1] = values[1:]
        following[self.ends - 1] = values[self.starts]
        return following

    def before(self, values: NDArray[Any]) -> NDArray[Any]:
        """For each point the value, (N, …), of the one before in its ring."""
        leading = np.empty_like(values)
        leading[1:] = values[:-1]
        leading[self.starts] = values[self.ends - 1]
        return leading

    def sums(self, values: NDArray[Any]) -> FloatArray:
        """Sum of the values of each ring's points, (R,)."""
        return np.add.reduceat(values, self.starts) if len(self.starts) else np.zeros(0)

    def areas(self) -> FloatArray:
        """Signed area of each ring, (R,); positive where it turns from x towards y, as rings around objects do."""
        x, y = self.points_xy.T
        return self.sums(x * self.after(y) - self.after(x) * y) / 2

    def where(self, kept: NDArray[np.bool_]) -> Rings:
        """The rings without some of their points, (N,) bool. Each ring must keep one."""
        if kept.all():
            return self
        return Rings(self.points_xy[kept], np.concatenate(([0], np.cumsum(kept)))[self.starts].astype(np.int64))

    def chosen(self, rings: IntArray) -> Rings:
        """Those rings, in that order."""
        counts = self.counts[rings]
        ends = np.cumsum(counts)
        index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[rings] - (ends - counts), counts)
        return Rings(self.points_xy[index], ends - counts)


@dataclass(frozen=True, slots=True)
class Contours:
    """The rings around all objects of a map, and around the holes in them, which run the other way."""

    corners: Rings
    """Along the pixels' edges: a corner at every pixel, also where the ring goes straight on."""

    crossings: Rings
    """Through the zeros of the level, one beside each corner."""

    owners: IntArray
    """Number of the object of each ring, (R,)."""


def contours(
    owner: NDArray[np.integer[Any]],
    level: FloatArray | None = None,
    *,
    corner_xy: tuple[int, int] = (0, 0),
    size: tuple[int, int],
    is_exact: bool = False,
) -> Contours:
    """Rings around the objects of a map, in pixels of an image of ``size`` columns and rows, and never beyond it.

    ``owner``, (H, W), numbers the object at each pixel, 0 for none; ``corner_xy`` is where its first pixel lies, which
    may be outside the image: there the edge's pixels are to run on, so that an object is cut at the border and not
    drawn back. ``level``, (H, W), is how far each pixel lies from the border between objects, and never 0; without it
    the crossings are half-way. Seen from both sides of a border they are the same points.

    Pixels that touch at a corner only are apart. No two crossings' rings touch; rings of corners can. With ``is_exact``
    no ring passes a corner twice, which makes an own ring of a hole that touches its object's outline at a corner.
    """
    rows, columns = owner.shape
    width = columns + 2
    padded = np.zeros((rows + 2, width), owner.dtype)
    padded[1:-1, 1:-1] = owner
    flat = padded.ravel()
    step, beyond = (offsets @ (1, width) for offsets in (_STEP_XY, _BEYOND_XY))

    above = np.flatnonzero(padded[:-1] != padded[1:])
    left = np.flatnonzero((padded[:, :-1] != padded[:, 1:]).ravel())
    left += left // (width - 1)
    pixels = [above + width, left, above, left + 1]
    pixels = [found[flat[found] > 0] for found in pixels]
    way = np.repeat(np.arange(4), [len(found) for found in pixels])
    pixel = np.concatenate(pixels)
    number = np.empty((4, len(flat)), np.int32)
    number[way, pixel] = np.arange(len(pixel))

    own = flat[pixel]
    ahead = pixel + step[way]
    across = ahead + beyond[way]
    goes_on, meets = flat[ahead] == own, flat[across] == own
    next_way = np.where(goes_on, np.where(meets, way - 1, way), way + 1) % 4
    following = number[next_way, np.where(goes_on, np.where(meets, across, ahead), pixel)].astype(np.int64)
    del number

    order, starts = _walked(following)
    if is_exact:
        pinches = np.flatnonzero(meets & ~goes_on)
        next_edges = following[pinches]
        corner = pixel[next_edges] + (_START_XY @ (1, width))[way[next_edges]]
        pinched = _pairs(pinches, corner, order, starts)
        if len(pinched):
            following[pinched] = following[pinched[:, ::-1]]
            order, starts = _walked(following)
    pixel, way = pixel[order], way[order]
    pixel_xy = np.column_stack(np.divmod(pixel, width)[::-1]) + np.subtract(corner_xy, 1)
    if level is None:
        share: FloatArray | float = 0.5
    else:
        heights = np.ones((rows + 2, width))
        heights[1:-1, 1:-1] = np.abs(level)
        inner, outer = heights.ravel()[pixel], heights.ravel()[pixel + beyond[way]]
        share = (inner / (inner + outer))[:, None]
    return Contours(
        corners=Rings(np.clip((pixel_xy + _START_XY[way]).astype(np.float64), 0, size), starts),
        crossings=Rings(np.clip(pixel_xy + 0.5 + share * _BEYOND_XY[way], 0, size), starts),
        owners=own[order[starts]].astype(np.int64),
    )


def _walked(following: IntArray) -> tuple[IntArray, IntArray]:
    """All numbers in the order in which they follow each other, round by round, and where each round begins."""
    # scipy is imported late, so that a server answers its health check before that.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, connected_components

    if not len(following):
        return following, following
    graph = csr_array((np.ones(len(following)), following.copy(), np.arange(len(following) + 1)))
    _, ring = connected_components(graph, connection="weak")
    _, firsts, counts = np.unique(ring, return_index=True, return_counts=True)
    # All rounds strung together are one, which is walked outside of Python.
    before = np.empty_like(following)
    before[following] = np.arange(len(following))
    graph.indices[before[firsts]] = np.append(firsts[1:], firsts[0])
    order = breadth_first_order(graph, firsts[0], return_predecessors=False)
    return order.astype(np.int64), np.cumsum(counts) - counts


def _pairs(edges: IntArray, corner: IntArray, order: IntArray, starts: IntArray) -> IntArray:
    """Pairs, (P, 2), of those edges that lead to the same corner and are of the same ring."""
    ring = np.empty(len(order), np.int64)
    ring[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    ring = ring[edges]
    beside = np.lexsort((corner, ring))
    one, other = beside[:-1], beside[1:]
    is_pair = (corner[one] == corner[other]) & (ring[one] == ring[other])
    return np.column_stack((edges[one[is_pair]], edges[other[is_pair]]))
