"""Class and border probabilities to single objects, each with the chance that it is right.

A watershed on the borders cuts a class into pieces, more than there are objects. Neighbours are joined again, those
behind the weakest border first, until all are one: a tree, in which each node is a candidate (Arbeláez et al., "Contour
detection and hierarchical image segmentation", 2011). A logistic model tells from a node's probabilities, borders and
shape, and from what the network's features say inside and round it, how likely it is an object; of those that overlap
only one can be. The nodes are taken that are together worth most and do not overlap. The model's factors come with the
network's weights.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapely import Polygon

from . import vectorize
from .errors import BadConfig
from .segmenter import DenseMaps
from .vectorize import VectorizeOptions

# scipy and scikit-image take most of a second to import: where they are used.

FloatArray = NDArray[np.float64]

DOUBT_AS_BORDER = 0.5
"""How much of a border a pixel counts as where the class is surely absent."""

SMOOTHING_PX = 1.5
BASIN_DEPTH = 0.04
"""Steps in which borders are told apart: a piece of its own is what lies a step below the border around it."""

FEATURES = (
    "mean probability", "its spread", "log area in px", "log elongation", "rectangularity", "roughness",
    "border inside", "border round it", "border to neighbours", "share of neighbours", "border to the ground",
    "share of the image's edge", "strongest border joined", "border to what it would join next",
    "evidence inside", "evidence round it",
)  # fmt: skip
"""What a candidate is judged by, in the order of a scoring's factors; the last factor is the constant."""

DEFAULT_SCORING = (3.0, -1.0, 0.0, 0.0, 0.0, -0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -6.0, 8.0, 0.0, 0.0, -6.5)
"""For maps that come without a scoring: an object is sure, and parted from its neighbours but not within itself."""

ROUND_PX = 2
"""What lies round a candidate is looked at so many pixels beyond its outline."""

ALIKE = 0.5
"""Of two nested candidates, the smaller one stands for the same object if it covers this share of the larger one."""

EXCLUSIVE = (0.557, 0.453, -0.216)
"""Factors of the log odds that a candidate or one alike is taken, of its own log odds, and the constant, from which its
chance is told at last; ``model_weights/calibrate.py`` fits them, over all classes."""

MISSED_PER_DOUBT = 3.5
"""Objects missed for each one that was doubted, the mean of held-out sets, which have from 1.6 to 5.6, as
``model_weights/calibrate.py`` counts: most lie under one outline with a neighbour, or are not even candidates."""

ANY_LABEL = "*"
"""Key of the scoring for classes that have none of their own."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One object that a model found."""

    polygons: tuple[Polygon, ...]
    """Its parts, largest first; nearly always one."""

    score: float
    """Chance that it is one object of the class, 0…1."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a model found of a class, and what it left out."""

    instances: list[Instance]
    """Largest first."""

    doubt: float
    """Sum of the chances of the candidates that were left out as unlikely: so many objects were missed knowingly."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Pieces of a class and all that they may be joined to. Nodes are numbered from 1, the pieces first."""

    pieces: NDArray[np.int32]
    """Number of the piece at each pixel, (H, W), 0 for none."""

    children: NDArray[np.int64]
    """The two nodes that a node joins, (N + 1, 2), 0 for pieces; a node comes after its children."""

    areas_px: FloatArray
    """(N + 1,)."""

    features: FloatArray
    """(N + 1, 16), see FEATURES."""

    @property
    def parents(self) -> NDArray[np.int64]:
        """The node that each is joined into, (N + 1,), 0 for none."""
        parents = np.zeros(len(self.children), np.int64)
        nodes = np.flatnonzero(self.children[:, 0])
        parents[self.children[nodes]] = nodes[:, None]
        return parents

    def chosen(self, scores: FloatArray, *, least_score: float, min_area_px: float) -> list[int]:
        """The nodes that are together worth most, each its score less ``least_score``, and that do not overlap."""
        worth = np.where(self.areas_px >= min_area_px, scores - least_score, -1.0)
        best = np.maximum(worth, 0.0)
        best[0] = 0.0
        for node, (one, other) in enumerate(self.children.tolist()):
            if one:
                best[node] = max(worth[node], best[one] + best[other], 0.0)
        found = []
        is_child = np.zeros(len(worth), bool)
        is_child[self.children.ravel()] = True
        waiting = np.flatnonzero(~is_child)[::-1].tolist()
        while waiting:
            node = waiting.pop()
            one, other = self.children[node].tolist()
            if worth[node] >= 0 and worth[node] >= best[one] + best[other]:
                found.append(node)
            elif one:
                waiting += [one, other]
        return found

    def ious(self, objects: NDArray[np.int32]) -> FloatArray:
        """IoU of each node with the object that it matches best, (N + 1,); objects are numbered from 1, (H, W)."""
        areas = np.bincount(objects.ravel())
        common = np.zeros((len(self.areas_px), len(areas)))
        np.add.at(common, (self.pieces.ravel(), objects.ravel()), 1)
        for node, (one, other) in enumerate(self.children.tolist()):
            if one:
                common[node] = common[one] + common[other]
        union = np.maximum(self.areas_px[:, None] + areas - common, 1)
        return np.asarray((common / union)[:, 1:].max(1, initial=0.0))

    def numbers(self, nodes: list[int]) -> NDArray[np.int32]:
        """Number of the node, counted from 1 in the order given, at each pixel, (H, W), 0 for none of them."""
        number_of = np.zeros(len(self.children), np.int32)
        for number, node in enumerate(nodes, start=1):
            number_of[node] = number
        for node in range(len(self.children) - 1, 0, -1):
            if number_of[node]:
                number_of[self.children[node][self.children[node] > 0]] = number_of[node]
        taken: NDArray[np.int32] = number_of[self.pieces]
        return taken


def instances(
    dense: DenseMaps,
    label: str,
    *,
    threshold: float = 0.5,
    least_score: float = 0.3,
    options: VectorizeOptions | None = None,
) -> list[Instance]:
    """Single objects of a class, largest first; see `find`."""
    return find(dense, label, threshold=threshold, least_score=least_score, options=options).instances


def find(
    dense: DenseMaps,
    label: str,
    *,
    threshold: float = 0.5,
    least_score: float = 0.3,
    options: VectorizeOptions | None = None,
) -> Found:
    """Single objects of a class. Neighbours that touch share their border before simplification.

    ``threshold`` is the probability at which outlines run. Objects that are less likely right than ``least_score`` are
    left out; where candidates exclude one another, it decides how many are taken. Raises BadConfig where the maps
    hold no such class.
    """
    if label not in dense.labels:
        raise BadConfig(f"the model has no class {label!r}; it has {', '.join(dense.labels) or 'none'}")
    options = options or VectorizeOptions()
    index = dense.labels.index(label)
    probabilities = _clean(dense.probabilities[index])
    found = candidates_of(dense, label, threshold=threshold, min_area_px=options.min_area_px)
    own = scored(found.features, scoring_of(dense.scoring, label))
    scores = exclusive(found, own, min_area_px=options.min_area_px)
    nodes = found.chosen(scores, least_score=least_score, min_area_px=options.min_area_px)
    outlines = vectorize.numbered_polygons(found.numbers(nodes), probabilities, threshold=threshold, options=options)
    listed = [Instance(tuple(parts), float(scores[node])) for node, parts in zip(nodes, outlines, strict=True) if parts]
    listed.sort(key=lambda instance: -sum(part.area for part in instance.polygons))
    every = scores[found.chosen(scores, least_score=0.0, min_area_px=options.min_area_px)]
    return Found(listed, float(every[every < least_score].sum()))


def expected_f1(chances: Sequence[float], doubt: float) -> float:
    """How good the outlines of a tile are likely to be, 0…1: F1, from each one's chance to be right.

    Right ones twice, over all outlines and all objects; the latter are the right ones and those missed, of which there
    are `MISSED_PER_DOUBT` for each one in ``doubt``. One object more is counted as found, so that a tile where nothing
    was found and nothing doubted has 1, and falls the faster the less there is on it.
    """
    right = sum(chances)
    return (2 * right + 1) / (len(chances) + right + MISSED_PER_DOUBT * doubt + 1)


def scoring_of(scoring: Mapping[str, tuple[float, ...]], label: str) -> tuple[float, ...]:
    """The factors for a class out of those by class: its own, those for any, or the default ones."""
    by_name = {name.casefold(): factors for name, factors in scoring.items()}
    return by_name.get(label.casefold()) or by_name.get(ANY_LABEL) or DEFAULT_SCORING


def scored(features: FloatArray, scoring: tuple[float, ...]) -> FloatArray:
    """The chance of each candidate, (N,), that it is one object, from its features, (N, 16), alone."""
    factors = np.asarray(scoring, np.float64)
    return _chances(features @ factors[:-1] + factors[-1])


def exclusive(
    found: Candidates, chances: FloatArray, *, min_area_px: float, factors: tuple[float, float, float] | None = None
) -> FloatArray:
    """The chance of each candidate, (N + 1,), given its own one, where of those that overlap at most one is right.

    Each way to take candidates that do not overlap is as likely as the product of their odds says. From the chance that
    a candidate or one `ALIKE` is taken, and its own one, comes what is given, by `EXCLUSIVE` or the ``factors``.
    """
    odds = log_odds(chances)
    odds[found.areas_px < min_area_px] = odds[0] = -_MOST_LOG_ODDS
    parents, areas = found.parents.tolist(), found.areas_px.tolist()
    ways = np.logaddexp(0, odds)
    joined = [(node, one, other) for node, (one, other) in enumerate(found.children.tolist()) if one]
    for node, one, other in joined:
        ways[node] = np.logaddexp(odds[node], ways[one] + ways[other])
    whole = np.exp(odds - ways)
    left = np.ones(len(odds))
    for node, one, other in reversed(joined):
        left[one] = left[other] = left[node] * (1 - whole[node])
    taken = left * whole
    alike = taken.copy()
    for node, area in enumerate(areas):
        larger = parents[node]
        while larger and area >= ALIKE * areas[larger]:
            alike[node] += taken[larger]
            alike[larger] += taken[node]
            larger = parents[larger]
    of_alike, of_own, constant = factors or EXCLUSIVE
    return _chances(of_alike * log_odds(np.minimum(alike, 1)) + of_own * log_odds(chances) + constant)


_MOST_LOG_ODDS = 30.0


def log_odds(chances: FloatArray) -> FloatArray:
    """Log odds of chances, 0…1, bounded."""
    # Less than certain either way, so that no candidate outweighs any number of others.
    bounded = np.clip(chances, 1e-4, 1 - 1e-4)
    return np.asarray(np.log(bounded / (1 - bounded)), np.float64)


def _chances(log_odds: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -_MOST_LOG_ODDS, _MOST_LOG_ODDS))), np.float64)


def candidates_of(dense: DenseMaps, label: str, *, threshold: float = 0.5, min_area_px: float = 16.0) -> Candidates:
    """All that may be an object of a class that the maps hold."""
    index = dense.labels.index(label)
    return candidates(
        _clean(dense.probabilities[index]),
        _clean(dense.boundary[index]),
        evidence=None if dense.evidence is None else _finite(dense.evidence[index]),
        threshold=threshold,
        min_area_px=min_area_px,
    )


def candidates(
    probabilities: FloatArray,
    boundary: FloatArray,
    *,
    evidence: FloatArray | None = None,
    threshold: float = 0.5,
    min_area_px: float = 16.0,
) -> Candidates:
    """All that may be an object of a class, from its probability and border maps, (H, W), and evidence, (2, H, W)."""
    # Where the class itself is in doubt, there is a gap between objects more often than the border alone shows.
    barrier = np.clip(boundary + DOUBT_AS_BORDER * (1 - probabilities), 0, 1)
    pieces = _pieces(probabilities >= threshold, barrier)
    areas = np.bincount(pieces.ravel()).astype(np.float64)
    borders = _borders(pieces, barrier)
    joins = _joins(borders, areas.tolist(), min_area_px)
    found = _judged(pieces, probabilities, boundary, borders, joins)
    if evidence is not None:
        # The first map speaks of what a candidate holds, the second one of what lies round it.
        found.features[:, -2:] = np.diagonal(pooled(found, evidence), axis1=1, axis2=2)
    return found


def pooled(found: Candidates, maps: FloatArray) -> FloatArray:
    """Mean of maps, (K, H, W), in each candidate, and round it where its outline lies in the image, (N + 1, 2, K)."""
    pieces, children = found.pieces, found.children
    height, width = pieces.shape
    inner, outer = np.s_[:-1], np.s_[1:]
    steps: tuple[list[NDArray[Any]], ...] = ([], [], [])
    for within, beside, row_by, column_by in (
        (np.s_[:, inner], np.s_[:, outer], 0, 1 + ROUND_PX),
        (np.s_[:, outer], np.s_[:, inner], 0, -ROUND_PX),
        (np.s_[inner], np.s_[outer], 1 + ROUND_PX, 0),
        (np.s_[outer], np.s_[inner], -ROUND_PX, 0),
    ):
        one, two = pieces[within], pieces[beside]
        on_outline = (one > 0) & (one != two)
        rows, columns = np.nonzero(on_outline)
        beyond = np.clip(rows + row_by, 0, height - 1) * width + np.clip(columns + column_by, 0, width - 1)
        for listed, values in zip(steps, (one[on_outline], two[on_outline], beyond), strict=True):
            listed.append(values)
    flat, (of, other, at) = pieces.ravel(), map(np.concatenate, steps)
    pairs, which = _distinct(of, other)
    # Where two pieces touch, the outline ends when they are joined.
    ends = _joined(pairs[:, 0], pairs[:, 1], found.parents)[which]
    count = len(children)
    joined = [(node, *both) for node, both in enumerate(children.tolist()) if both[0]]
    # The sums come first of the ones that they are divided by, then of the maps.
    sums = np.empty((count, 2, 1 + len(maps)))
    for i, values in enumerate((np.ones(pieces.size), *(values.ravel() for values in maps))):
        sums[:, 0, i] = np.bincount(flat, weights=values, minlength=count)
        sums[:, 1, i] = np.bincount(of, weights=values[at], minlength=count)
        sums[1:, 1, i] -= np.bincount(ends, weights=values[at], minlength=count)[1:]
    for node, one, two in joined:
        sums[node] += sums[one] + sums[two]
    return np.asarray(sums[:, :, 1:] / np.maximum(sums[:, :, :1], 1), np.float64)


def _joined(one: NDArray[np.int64], other: NDArray[np.int64], parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first node that holds both, 0 where one of them is the ground, 0."""
    low, high = one.copy(), other.copy()
    low[high == 0] = 0
    while (apart := low != high).any():
        lower = low < high
        low, high = np.where(apart & lower, parents[low], low), np.where(apart & ~lower, parents[high], high)
    return low


def _distinct(
    one: NDArray[np.integer[Any]], other: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs that there are, (P, 2), in their order, and which of them each is; numbers are from -1."""
    # As one number: rows are sorted many times slower.
    span = int(other.max(initial=0)) + 2
    keys, which = np.unique((one.astype(np.int64) + 1) * span + (other + 1), return_inverse=True)
    return np.stack((keys // span - 1, keys % span - 1), axis=1), which.ravel()


def _clean(values: NDArray[np.floating[Any]]) -> FloatArray:
    return np.clip(_finite(values, 0.0), 0.0, 1.0)


def _finite(values: NDArray[np.floating[Any]], infinite: float | None = None) -> FloatArray:
    """As float64, 0 for what is no number."""
    as_float = values.astype(np.float64)
    # Looked for first: to replace takes several times as long, and nearly always there is nothing.
    return as_float if np.isfinite(as_float).all() else np.nan_to_num(as_float, posinf=infinite, neginf=infinite)


def _pieces(inside: NDArray[np.bool_], barrier: FloatArray) -> NDArray[np.int32]:
    """Number of the piece at each pixel, 0 outside. Every pixel of ``inside`` is of one piece."""
    from scipy import ndimage
    from skimage.morphology import local_minima
    from skimage.segmentation import watershed

    smooth = np.round(ndimage.gaussian_filter(barrier, SMOOTHING_PX) * 255).astype(np.int32)
    # In steps, so that ripples make no basins. Beyond the class there are none, so that none is split off at the rim.
    steps = np.where(inside, smooth // round(BASIN_DEPTH * 255), 256).astype(np.int16)
    basins = local_minima(steps)  # type: ignore[no-untyped-call]
    cores, count = ndimage.label(inside & basins)
    pieces: NDArray[np.int32] = watershed(smooth, cores, mask=inside)  # type: ignore[no-untyped-call]
    stray, _ = ndimage.label(inside & (pieces == 0))
    return np.where(stray > 0, stray + count, pieces).astype(np.int32)


_EDGE = -1
"""What lies beyond the image, where 0 is ground and 1, 2, … are pieces."""


def _borders(pieces: NDArray[np.int32], barrier: FloatArray) -> dict[tuple[int, int], tuple[float, float]]:
    """Length of the border between each two that touch, and the sum of the barrier along it; the lower number first."""
    around = np.pad(pieces, 1, constant_values=_EDGE)
    height = np.pad(barrier, 1, mode="edge")
    pairs, strengths = [], []
    for one, other in (
        (np.s_[1:-1, :-1], np.s_[1:-1, 1:]),
        (np.s_[:-1, 1:-1], np.s_[1:, 1:-1]),
    ):
        apart = around[one] != around[other]
        pairs.append(np.stack((around[one][apart], around[other][apart]), axis=1))
        strengths.append(np.maximum(height[one][apart], height[other][apart]))
    both = np.concatenate(pairs)
    edges, which = _distinct(both.min(axis=1), both.max(axis=1))
    lengths = np.bincount(which, minlength=len(edges))
    sums = np.bincount(which, weights=np.concatenate(strengths), minlength=len(edges))
    return {
        (one, other): (length, total)
        for (one, other), length, total in zip(edges.tolist(), lengths.tolist(), sums.tolist(), strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Join:
    """Two nodes become one."""

    one: int
    other: int
    strength: float
    """Mean barrier between them; 0 where one is too small to stand alone."""

    length: float
    total: float
    """Length of the border that vanishes, and the barrier along it."""


def _joins(
    borders: dict[tuple[int, int], tuple[float, float]], areas_px: list[float], min_area_px: float
) -> list[_Join]:
    """Neighbours joined, the weakest border first and pieces too small to stand alone before others, until all are."""
    near: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for (one, other), border in borders.items():
        if one > 0:
            near[one][other] = near[other][one] = border
    areas = list(areas_px)

    def cost(one: int, other: int) -> float:
        length, total = near[one][other]
        return total / length - (1 if min(areas[one], areas[other]) < min_area_px else 0)

    queue = [(cost(one, other), one, other) for one in near for other in near[one] if one < other]
    heapq.heapify(queue)
    joins: list[_Join] = []
    while queue:
        expected, one, other = heapq.heappop(queue)
        if other not in near.get(one, ()):
            continue  # one of the two was joined meanwhile; the queue holds what became of it
        length, total = near[one][other]
        node = len(areas)
        joins.append(_Join(one, other, max(expected, 0.0), length, total))
        areas.append(areas[one] + areas[other])
        for gone in (one, other):
            for third, (old_length, old_total) in near.pop(gone).items():
                if third not in (one, other):
                    del near[third][gone]
                    length, total = near[node].get(third, (0.0, 0.0))
                    near[node][third] = near[third][node] = (length + old_length, total + old_total)
        for third in near[node]:
            heapq.heappush(queue, (cost(third, node), third, node))
    return joins


def _judged(
    pieces: NDArray[np.int32],
    probabilities: FloatArray,
    boundary: FloatArray,
    borders: dict[tuple[int, int], tuple[float, float]],
    joins: list[_Join],
) -> Candidates:
    """Candidates with their features, from what adds up when nodes are joined."""
    leaves = int(pieces.max(initial=0)) + 1
    count = leaves + len(joins)
    sums = np.zeros((count, 15))
    # Of the ground, node 0, nothing but its size is asked.
    rows, columns = np.nonzero(pieces)
    of, probability, border = (values[rows, columns] for values in (pieces, probabilities, boundary))
    rows, columns = rows.astype(np.float64), columns.astype(np.float64)
    values = (
        np.ones(len(of)), probability, probability**2, border, columns, rows, columns**2, rows**2, columns * rows,
    )  # fmt: skip
    for i, value in enumerate(values):
        sums[:leaves, i] = np.bincount(of, weights=value, minlength=leaves)
    sums[0, 0] = pieces.size - len(of)
    for (one, other), (length, total) in borders.items():
        if one == _EDGE:
            sums[other, 13] += length if other else 0
        elif one == 0:
            sums[other, 9:11] += length, total
        else:
            sums[[one, other], 11] += length
            sums[[one, other], 12] += total
    children = np.zeros((count, 2), np.int64)
    strongest, next_border = np.zeros(count), np.full(count, 1.2)
    for node, join in enumerate(joins, start=leaves):
        both = [join.one, join.other]
        children[node] = both
        sums[node] = sums[join.one] + sums[join.other]
        sums[node, 11:13] -= 2 * join.length, 2 * join.total
        strongest[node] = max(join.strength, *strongest[both])
        next_border[both] = join.strength
    area = np.maximum(sums[:, 0], 1.0)
    mean = sums[:, 1:9] / area[:, None]
    # A pixel is a square: alone it has a spread of 1/12.
    xx = np.maximum(mean[:, 5] - mean[:, 3] ** 2, 1 / 12)
    yy = np.maximum(mean[:, 6] - mean[:, 4] ** 2, 1 / 12)
    xy = mean[:, 7] - mean[:, 3] * mean[:, 4]
    half = (xx + yy) / 2
    root = np.sqrt(np.maximum(half**2 - (xx * yy - xy**2), 0))
    longer, shorter = half + root, np.maximum(half - root, 1 / 12)
    ground, ground_total, beside, beside_total, edge = sums[:, 9:14].T
    outline = np.maximum(ground + beside + edge, 1.0)
    features = np.stack(
        (
            mean[:, 0], np.sqrt(np.maximum(mean[:, 1] - mean[:, 0] ** 2, 0)), np.log(area), np.log(longer / shorter),
            area / (12 * np.sqrt(longer * shorter)), outline / (4 * np.sqrt(area)), mean[:, 2],
            (ground_total + beside_total) / np.maximum(ground + beside, 1), beside_total / np.maximum(beside, 1),
            beside / outline, ground_total / np.maximum(ground, 1), edge / outline, strongest, next_border,
            np.zeros(count), np.zeros(count),
        ), axis=1,
    )  # fmt: skip
    return Candidates(pieces, children, sums[:, 0], features)
