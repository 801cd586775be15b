"""Rings: many outlines without holes as arrays, so that all of them are read, checked and measured at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from .tile import FloatArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Shapes = NDArray[np.object_]

_MANY = 30_000
"""Pairs of edges, about, that are looked at in one go."""

_MOST_EDGES = 10_000
"""Pairs of edges of two rings, above which GEOS finds sooner what they share."""

_ROUNDING = 1e-12
"""What the arithmetic of a cross product may be off by, as a share of the box around the ring, and much more."""


@dataclass(frozen=True, eq=False)
class Rings:
    """Closed rings: the last point of each is its first."""

    points: FloatArray
    """Of all rings, one after the other, (M, 2)."""

    lengths: IntArray
    """Points of each ring, four or more, (N,)."""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def closed(cls, points: FloatArray, lengths: IntArray) -> Rings:
        """Rings of points (M, 2) that do not come back to their first; ``lengths`` (N,) are three or more."""
        starts = np.cumsum(lengths) - lengths
        return cls(points[runs(starts, lengths, again=starts)], lengths + 1)

    @cached_property
    def starts(self) -> IntArray:
        """First point of each ring, (N,)."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    @cached_property
    def owner(self) -> IntArray:
        """The ring that each point is of, (M,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @cached_property
    def bounds(self) -> FloatArray:
        """Least x and y, greatest x and y of each, (N, 4)."""
        bounds = np.empty((len(self), 4))
        if len(self):
            for axis, side in enumerate(np.ascontiguousarray(self.points.T)):
                bounds[:, axis] = np.minimum.reduceat(side, self.starts)
                bounds[:, axis + 2] = np.maximum.reduceat(side, self.starts)
        return bounds

    @cached_property
    def areas(self) -> FloatArray:
        """Area of each, greater than zero where it runs counter-clockwise, (N,)."""
        x, y = (np.ascontiguousarray(side) for side in (self.points - self.points[self.starts][self.owner]).T)
        return self._sums(_crosses(x, y))

    def take(self, numbers: IntArray) -> Rings:
        """The rings of those numbers, in their order."""
        lengths = self.lengths[numbers]
        return Rings(self.points[runs(self.starts[numbers], lengths)], lengths)

    def turned(self, which: BoolArray) -> Rings:
        """The same with those that ``which`` (N,) says running the other way, from the same point on."""
        if not which.any():
            return self
        at = np.arange(len(self.points))
        first = self.starts[which]
        turned = which[self.owner]
        at[turned] = np.repeat(2 * first + self.lengths[which] - 1, self.lengths[which]) - at[turned]
        return Rings(self.points[at], self.lengths)

    def polygons(self) -> Shapes:
        """As polygons, (N,)."""
        if not len(self):
            return np.empty(0, dtype=object)
        return np.asarray(shapely.polygons(shapely.linearrings(self.points, indices=self.owner)))

    def common_areas(self, pairs: IntArray) -> FloatArray:
        """The area that both rings of each pair (M, 2) cover, (M,); the rings are simple.

        A ring is the sum of what lies below its edges, with a sign for each edge's direction. What two rings share is
        thus the sum over all pairs of their edges of what lies below both, which is a formula.
        """
        edges = _Edges.of(self.points)
        last = np.cumsum((self.lengths - 1)[pairs].prod(axis=1)) // _MANY
        parts = np.split(pairs, np.flatnonzero(np.diff(last)) + 1)
        return np.concatenate([self._common_areas(part, edges) for part in parts])

    def _common_areas(self, pairs: IntArray, edges: _Edges) -> FloatArray:
        first, second = pairs.T
        counts = self.lengths - 1
        # Edges of the first that do not lie beside the second, each with every edge of that.
        pair = np.repeat(np.arange(len(pairs)), counts[first])
        a = runs(self.starts[first], counts[first])
        left, right = self.bounds[second][:, [0, 2]].T
        near = np.flatnonzero((edges.right[a] > left[pair]) & (edges.left[a] < right[pair]))
        pair, a = pair[near], a[near]
        times = counts[second[pair]]
        b = runs(self.starts[second[pair]], times)
        pair, a = np.repeat(pair, times), np.repeat(a, times)
        left, right = np.maximum(edges.left[a], edges.left[b]), np.minimum(edges.right[a], edges.right[b])
        meet = np.flatnonzero(left < right)
        pair, a, b, left, right = pair[meet], a[meet], b[meet], left[meet], right[meet]
        # Nothing of the two lies below this, and close by no digits are lost.
        base = self.bounds[pairs, 1].min(axis=1)[pair]
        (a_left, a_right), (b_left, b_right) = (
            [edges.y[at] - base + (x - edges.x[at]) * edges.slope[at] for x in (left, right)] for at in (a, b)
        )
        d_left, d_right = a_left - b_left, a_right - b_right
        apart = np.abs(d_left) + np.abs(d_right)
        # Where the two edges cross, the lesser of them has a bend.
        bent = np.flatnonzero(d_left * d_right < 0)
        apart[bent] = (d_left[bent] ** 2 + d_right[bent] ** 2) / apart[bent]
        below = (a_left + b_left + a_right + b_right - apart) / 4 * (right - left) * edges.sign[a] * edges.sign[b]
        turns = np.sign(self.areas)
        return np.asarray(np.bincount(pair, below, minlength=len(pairs)) * turns[first] * turns[second])

    def are_simple(self) -> BoolArray:
        """Which neither touch nor cross themselves, have an area, and no point twice in a row, (N,)."""
        simple = self._are_stars()
        rest = np.flatnonzero(~simple)
        if len(rest):
            rings = self.take(rest)
            twice = (rings.points[1:] == rings.points[:-1]).all(axis=1) & (rings.owner[1:] == rings.owner[:-1])
            simple[rest] = shapely.is_valid(rings.polygons())
            simple[rest[rings.owner[1:][twice]]] = False
        return simple

    def _are_stars(self) -> BoolArray:
        """Which are seen whole from their centroid, as houses mostly are: those are simple, and it is told quickly."""
        origin = self.points[self.starts]
        x, y = (np.ascontiguousarray(side) for side in (self.points - origin[self.owner]).T)
        crosses = _crosses(x, y)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = 3 * self._sums(crosses)
            for side in (x, y):
                middle = self._sums((side[:-1] + side[1:]) * crosses) / weights
                side -= np.where(np.isfinite(middle), middle, 0.0)[self.owner]
        seen = _crosses(x, y) * np.sign(weights)[self.owner[:-1]]
        limit = _ROUNDING * ((self.bounds[:, 2:] - self.bounds[:, :2]) ** 2).sum(axis=1)
        is_step = self.owner[1:] == self.owner[:-1]
        above = y >= 0
        # All the way round once, and each step forward.
        once = np.bincount(self.owner[1:][is_step & above[1:] & ~above[:-1]], minlength=len(self)) == 1
        once[self.owner[1:][is_step & ~(seen > limit[self.owner[:-1]])]] = False
        return np.asarray(once)

    def _sums(self, steps: FloatArray) -> FloatArray:
        """Half of what the steps of each ring come to, (N,)."""
        if not len(self):
            return np.empty(0)
        steps = np.append(steps, 0.0)
        steps[self.starts + self.lengths - 1] = 0.0
        return np.asarray(np.add.reduceat(steps, self.starts)) / 2


@dataclass(frozen=True, slots=True, eq=False)
class _Edges:
    """From each point to the next one, all (M − 1,)."""

    x: FloatArray
    y: FloatArray
    left: FloatArray
    right: FloatArray
    slope: FloatArray
    """Zero where the edge is upright."""

    sign: FloatArray
    """Whether it goes to the left (−1) or to the right."""

    @classmethod
    def of(cls, points: FloatArray) -> _Edges:
        x, y = (np.ascontiguousarray(side) for side in points.T)
        dx, dy = np.diff(x), np.diff(y)
        slope = np.divide(dy, dx, out=np.zeros(len(dx)), where=dx != 0)
        return cls(x[:-1], y[:-1], np.minimum(x[:-1], x[1:]), np.maximum(x[:-1], x[1:]), slope, np.sign(dx))


def _crosses(x: FloatArray, y: FloatArray) -> FloatArray:
    """For each step from a point to the next twice the triangle that it makes with the origin, (M − 1,)."""
    return np.asarray(x[:-1] * y[1:] - x[1:] * y[:-1])


def runs(starts: IntArray, lengths: IntArray, *, again: IntArray | None = None) -> IntArray:
    """Numbers from each start on, as many as its length, one run after the other; each then ``again``, where given."""
    if again is not None:
        lengths = lengths + 1
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
    if again is not None:
        at[ends - 1] = again
    return np.asarray(at)


@dataclass(frozen=True, eq=False)
class Outlines:
    """Shapes of which most are single rings: those lie in arrays, and only the others are geometries."""

    rings: Rings
    ring_at: IntArray
    """Where in the order each ring comes, rising."""

    others: Shapes
    """Polygons with holes, multipolygons and points."""

    other_at: IntArray
    """Where in the order each of the others comes."""

    def __len__(self) -> int:
        return len(self.ring_at) + len(self.other_at)

    @classmethod
    def of(cls, shapes: Shapes | Iterable[shapely.Geometry]) -> Outlines:
        """Geometries, taken as they are."""
        listed = np.array(shapes if isinstance(shapes, np.ndarray) else list(shapes), dtype=object)
        none = np.empty(0, np.int64)
        return cls(Rings(np.empty((0, 2)), none), none, listed, np.arange(len(listed)))

    @cached_property
    def shapes(self) -> Shapes:
        """All as geometries, in order."""
        shapes = np.full(len(self), None, dtype=object)
        shapes[self.ring_at] = self.rings.polygons()
        shapes[self.other_at] = self.others
        return shapes

    @cached_property
    def areas(self) -> FloatArray:
        """Area of each, (N,)."""
        areas = np.empty(len(self))
        areas[self.ring_at] = np.abs(self.rings.areas)
        areas[self.other_at] = shapely.area(self.others)
        return areas

    def some_shapes(self, numbers: IntArray) -> Shapes:
        """Those of these numbers, in any order, as geometries of the numbers' shape."""
        wanted, where = np.unique(numbers, return_inverse=True)
        return np.asarray(self.take(wanted).shapes[where.reshape(numbers.shape)])

    def common_areas(self, pairs: IntArray) -> FloatArray:
        """The area that both of each pair (M, 2) cover, (M,)."""
        ring = np.full(len(self), -1, np.int64)
        ring[self.ring_at] = np.arange(len(self.ring_at))
        rings = ring[pairs]
        common = np.zeros(len(pairs))
        is_easy = np.asarray((rings >= 0).all(axis=1))
        is_easy[is_easy] = self.rings.lengths[rings[is_easy]].prod(axis=1) <= _MOST_EDGES
        common[is_easy] = self.rings.common_areas(rings[is_easy])
        if not is_easy.all():
            common[~is_easy] = shapely.area(shapely.intersection(*self.some_shapes(pairs[~is_easy]).T))
        return common

    def take(self, numbers: IntArray) -> Outlines:
        """Those of these numbers, which rise."""
        wanted = np.full(len(self), -1, np.int64)
        wanted[numbers] = np.arange(len(numbers))
        rings, others = (np.flatnonzero(wanted[at] >= 0) for at in (self.ring_at, self.other_at))
        return Outlines(
            self.rings.take(rings), wanted[self.ring_at[rings]], self.others[others], wanted[self.other_at[others]]
        )
