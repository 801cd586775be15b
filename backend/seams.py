"""Seams: objects that tiles cut, or that several tiles show, come back once.

All in pixels of the scene's first tile, its *anchor*. Objects wholly inside a tile belong to the tile whose core holds
them; parts that reach a border are linked across tiles and joined. Pairs are looked for block by block, and shapes are
fetched when they are needed, so that memory does not grow with the outlines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shapely import Polygon, STRtree
from shapely.geometry.base import BaseGeometry

from . import vectorize
from .rings import BoolArray, IntArray, Outlines, Rings, Shapes, runs
from .tile import FloatArray, Tile

BORDER_PX = 1.5
"""An outline this close to its tile's border is taken to go on beyond it."""

_SLIVER_PX = 3.0
"""An outline that reaches no farther into its tile is hardly enough to tell what it belongs to."""

_MIN_SHARED = 0.3
"""Share of the smaller of two outlines, within the ground that both tiles show, that makes them one object."""

_MIN_DUPLICATE = 0.5
"""The same for two outlines that their tiles show whole."""

_MIN_COVERED = 0.8
"""A part of an object that another tile shows whole is not needed when the whole covers this share of it."""

_MIN_CONTACT = 0.5
"""Share of the shorter contact with the common border of tiles that do not overlap."""

_NOISE_PX2 = 1e-6
"""What arithmetic may make of an area that is none."""

_BLOCK = 10_000
"""Boxes of a block, about, when pairs are looked for."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tile in the frame of its scene."""

    tile: Tile
    outline: Polygon
    core: Polygon | None

    matrix: FloatArray
    """With ``offset`` from pixels of the tile to the frame's: ``points @ matrix + offset``, (2, 2) and (2,)."""

    offset: FloatArray


def views_of(tiles: Sequence[Tile], anchor: Tile) -> list[View]:
    """Where tiles lie in the scene whose frame is the anchor's."""
    if not tiles:
        return []
    sizes = np.array([tile.size for tile in tiles], np.float64)
    corners = anchor.crs_to_px(np.concatenate([tile.px_to_crs(_CORNERS * tile.size) for tile in tiles])).reshape(
        -1, 3, 2
    )
    matrices = (corners[:, 1:] - corners[:, :1]) / sizes[:, :, None]
    # Tiles of one grid are whole pixels apart: what arithmetic lost would leave slivers between their outlines.
    offsets, whole = corners[:, 0], np.rint(corners[:, 0])
    matrices = np.where(np.abs(matrices - np.eye(2)) < 1e-7, np.eye(2), matrices)
    offsets = np.where(np.abs(offsets - whole) < 1e-4, whole, offsets)
    cores = np.array([tile.core or (0, 0, *tile.size) for tile in tiles], np.float64)

    def boxes(first: FloatArray, size: FloatArray) -> Shapes:
        ends_px = first[:, None] + size[:, None] * _BOX
        return np.asarray(shapely.polygons(ends_px @ matrices + offsets[:, None]))

    outlines, inner = boxes(np.zeros_like(sizes), sizes), boxes(cores[:, :2], cores[:, 2:])
    return [
        View(tile, outline, core if tile.core else None, matrix, offset)
        for tile, outline, core, matrix, offset in zip(tiles, outlines, inner, matrices, offsets, strict=True)
    ]


_CORNERS = np.array([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
_BOX = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])


def seen(views: Sequence[View], view: IntArray, shapes: Shapes) -> tuple[BoolArray, BoolArray]:
    """Whether each shape lies whole on its view, and whether it hugs the border; ``view`` (N,) are indices.

    A point is always whole.
    """
    used, which = np.unique(view, return_inverse=True)
    outlines = np.array([views[number].outline for number in used.tolist()], dtype=object)
    inside, deep_inside = (
        shapely.buffer(outlines, -margin, join_style="mitre", quad_segs=1) for margin in (BORDER_PX, _SLIVER_PX)
    )
    shapely.prepare(inside)
    shapely.prepare(deep_inside)
    is_point = shapely.get_type_id(shapes) == shapely.GeometryType.POINT
    return (
        shapely.contains(inside[which], shapes) | is_point,
        ~shapely.intersects(deep_inside[which], shapes) & ~is_point,
    )


def seen_rings(views: Sequence[View], view: IntArray, rings: Rings) -> tuple[BoolArray, BoolArray]:
    """The same as `seen`, of rings."""
    used, which = np.unique(view, return_inverse=True)
    shown = [views[number] for number in used.tolist()]
    outlines = shapely.bounds(np.array([view.outline for view in shown], dtype=object))[which]
    depths = (rings.bounds - outlines) * (1, 1, -1, -1)
    is_upright = np.array([bool((view.matrix == np.eye(2)).all()) for view in shown])[which]
    is_whole, is_sliver = np.ones(len(rings), bool), np.zeros(len(rings), bool)
    near = np.flatnonzero(~(is_upright & (depths.min(axis=1) > _SLIVER_PX)))
    if len(near):
        is_whole[near], is_sliver[near] = seen(views, view[near], rings.take(near).polygons())
    return is_whole, is_sliver


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Objects as single tasks show them, in the frame of their scene. All arrays have one entry for each."""

    boxes: FloatArray
    """Left, top, right, bottom, (N, 4)."""

    label: IntArray
    task: IntArray
    """Equal numbers are equal tasks: what one task shows side by side is never one object."""

    view: IntArray
    """Index into ``views``."""

    is_whole: BoolArray
    """Whether all of the object lies on the tile."""

    is_sliver: BoolArray
    """Whether all that the tile shows hugs its border: hardly enough to tell what it belongs to."""

    views: Sequence[View]

    fetch: Callable[[IntArray], Outlines]
    """The shapes of pieces, by their indices, in the order of those."""

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, slots=True, eq=False)
class WholeObjects:
    """Some whole objects of a scene and the pieces that they were made of."""

    piece: IntArray
    """The piece whose outline is the object's, (N,); −1 where several were joined."""

    joined: Mapping[int, BaseGeometry]
    """Outlines that were joined, by the object's position."""

    members: IntArray
    """Pieces that show each, also those whose outline was not needed, object by object."""

    starts: IntArray
    """Where the members of each begin, and the end, (N + 1,)."""

    outlines: IntArray
    """Of how many pieces the outline was made, (N,)."""

    def __len__(self) -> int:
        return len(self.piece)

    @classmethod
    def alone(cls, pieces: IntArray) -> WholeObjects:
        """Each piece as an object of its own."""
        return cls(pieces, {}, pieces, np.arange(len(pieces) + 1), np.ones(len(pieces), np.int64))

    def take(self, numbers: IntArray) -> WholeObjects:
        """The objects of those numbers, which rise."""
        sizes = np.diff(self.starts)[numbers]
        joined = {new: self.joined[old] for new, old in enumerate(numbers.tolist()) if old in self.joined}
        starts = np.concatenate(([0], np.cumsum(sizes)))
        members = self.members[runs(self.starts[:-1][numbers], sizes)]
        return WholeObjects(self.piece[numbers], joined, members, starts, self.outlines[numbers])


_Joined = tuple[int, BaseGeometry | None, tuple[int, ...], int]
"""The piece or the shape, the pieces that show it, and how many outlines it was made of."""


def whole_objects(pieces: Pieces, *, simplify_px: float, batch: int = 4096) -> Iterator[WholeObjects]:
    """The objects that the pieces of one scene show, each once, in batches, ordered by the first piece of each.

    Outlines that were joined are simplified.
    """
    found = links(pieces)
    pairs = found["pair"]
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(pieces), len(pieces)))
    _, group = connected_components(graph, directed=False)
    # Groups are numbered as their first members come.
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]
    members = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[members], np.arange(len(first) + 1))
    found = found[np.argsort(group[pairs[:, 0]], kind="stable")]
    link_starts = np.searchsorted(group[found["pair"][:, 0]], np.arange(len(first) + 1))
    for begin in range(0, len(first), batch):
        end = min(begin + batch, len(first))
        shown = members[starts[begin] : starts[end]]
        at = starts[begin : end + 1] - starts[begin]
        here = found[link_starts[begin] : link_starts[end]]
        link_at = link_starts[begin : end + 1] - link_starts[begin]
        sizes = np.diff(at)
        several = np.repeat(sizes > 1, sizes)
        outlines = pieces.fetch(shown[several])
        # Where each of those shown has its outline, if it is not alone.
        place = np.cumsum(several) - 1
        winners = _winners(pieces, shown, outlines, place, at, here)
        made = _unions(shown, outlines, place, at, np.flatnonzero(winners == _UNION), simplify_px)
        for number in np.flatnonzero(winners == _UNCLEAR).tolist():
            inner = slice(int(at[number]), int(at[number + 1]))
            tied = here[link_at[number] : link_at[number + 1]]
            ends = zip(map(tuple, tied["pair"].tolist()), tied["at_border"].tolist(), strict=True)
            shapes = outlines.some_shapes(place[inner])
            listed = dict(zip(shown[inner].tolist(), shapes.tolist(), strict=True))
            made[number] = _joined(pieces, listed, dict(ends), simplify_px)
        yield _in_order(shown, at, winners, made)


def _in_order(shown: IntArray, at: IntArray, winners: IntArray, made: Mapping[int, list[_Joined]]) -> WholeObjects:
    """Groups of pieces as objects: those of one winner as they are, the others as they were made."""
    easy = np.flatnonzero(winners >= 0)
    late = [(number, item) for number, items in made.items() for item in items]
    group = np.concatenate((easy, np.array([number for number, _ in late], np.int64)))
    order = np.argsort(group, kind="stable")
    sizes = np.concatenate((np.diff(at)[easy], np.array([len(item[2]) for _, item in late], np.int64)))
    members = np.concatenate(
        (shown[runs(at[easy], np.diff(at)[easy])], *(np.array(item[2], np.int64) for _, item in late))
    )
    piece = np.concatenate((shown[winners[easy]], np.array([item[0] for _, item in late], np.int64)))[order]
    outlines = np.concatenate((np.ones(len(easy), np.int64), np.array([item[3] for _, item in late], np.int64)))[order]
    shapes = {len(easy) + number: item[1] for number, (_, item) in enumerate(late) if item[1] is not None}
    joined = {new: shapes[old] for new, old in enumerate(order.tolist()) if old in shapes} if shapes else {}
    members = members[runs((np.cumsum(sizes) - sizes)[order], sizes[order])]
    return WholeObjects(piece, joined, members, np.concatenate(([0], np.cumsum(sizes[order]))), outlines)


_UNCLEAR, _UNION = -1, -2


def _winners(
    pieces: Pieces, shown: IntArray, outlines: Outlines, place: IntArray, at: IntArray, tied: NDArray[Any]
) -> IntArray:
    """For each group of pieces the position of the one whose outline is the object, as `_owners` finds it.

    ``_UNION`` where it is all of theirs together, ``_UNCLEAR`` where that takes a closer look. ``at`` (G + 1,) are the
    groups' first positions, ``place`` says where in ``outlines`` the piece at a position has its own.
    """
    sizes = np.diff(at)
    winners = np.where(sizes == 1, at[:-1], _UNCLEAR)
    if not len(outlines):
        return winners
    group = np.repeat(np.arange(len(sizes)), sizes)
    whole, sliver = pieces.is_whole[shown], pieces.is_sliver[shown]
    order = np.argsort(shown)
    ends = order[np.searchsorted(shown, tied["pair"], sorter=order)]
    wholes = np.bincount(group, whole, minlength=len(sizes)).astype(np.int64)
    # Wholes that all show the same: each is tied to each.
    ties = np.bincount(group[ends[whole[ends].all(axis=1), 0]], minlength=len(sizes))
    is_one = (wholes > 0) & (2 * ties == wholes * (wholes - 1)) & (sizes > 1)
    winner = np.full(len(sizes), -1, np.int64)
    first = np.flatnonzero(whole & is_one[group])
    winner[group[first]] = first
    rivals = first[wholes[group[first]] > 1]
    if len(rivals):
        by_core, distance = _claims(pieces, shown[rivals], outlines.some_shapes(place[rivals]))
        best = rivals[np.lexsort((-rivals, distance, by_core, group[rivals]))]
        winner[group[best]] = best
    # Slivers belong to what they are tied to, across a strip, that is none.
    inner = ends[~tied["at_border"]]
    is_led = np.zeros(len(shown), bool)
    for one, other in (inner.T, inner.T[::-1]):
        is_led[one[sliver[one] & ~sliver[other]]] = True
    parts = np.flatnonzero(~whole & is_one[group])
    common = outlines.common_areas(place[np.column_stack((winner[group[parts]], parts))])
    is_left = (common < _MIN_COVERED * outlines.areas[place[parts]]) & ~is_led[parts]
    is_one[group[parts[is_left]]] = False
    winners[is_one] = winner[is_one]
    # Parts alone, tied across strips: joined, or of two a sliver and what it belongs to.
    at_border = np.bincount(group[ends[tied["at_border"], 0]], minlength=len(sizes)) > 0
    slivers = np.bincount(group, sliver, minlength=len(sizes))
    is_parts = (wholes == 0) & ~at_border & (sizes > 1)
    winners[is_parts & ((slivers == 0) | ((slivers == 2) & (sizes == 2)))] = _UNION
    led_to = np.flatnonzero(~sliver & (is_parts & (slivers == 1) & (sizes == 2))[group])
    winners[group[led_to]] = led_to
    return winners


def _unions(
    shown: IntArray, outlines: Outlines, place: IntArray, at: IntArray, groups: IntArray, simplify_px: float
) -> dict[int, list[_Joined]]:
    """The groups of those numbers, each with all its outlines joined as `_union` joins them."""
    if not len(groups):
        return {}
    sizes = np.diff(at)[groups]
    grid = np.full((len(groups), int(sizes.max())), None, dtype=object)
    grid[np.arange(grid.shape[1]) < sizes[:, None]] = outlines.some_shapes(place[runs(at[groups], sizes)])
    joined = np.asarray(shapely.union_all(grid, axis=1))
    is_plain = (shapely.get_type_id(joined) == shapely.GeometryType.POLYGON) & shapely.is_valid(joined)
    is_plain &= (shapely.get_num_interior_rings(joined) == 0) & (shapely.area(joined) > 0)
    plain = joined[is_plain]
    simple = np.asarray(shapely.union_all(plain[:, None], axis=1))
    simple = np.asarray(shapely.simplify(simple, simplify_px, preserve_topology=True))
    joined[is_plain] = np.where(shapely.is_valid(simple) & ~shapely.is_empty(simple), simple, plain)
    for number in np.flatnonzero(~is_plain).tolist():
        joined[number] = _without_cracks(joined[number], simplify_px)
    ends = zip(groups.tolist(), joined.tolist(), at[groups].tolist(), sizes.tolist(), strict=True)
    return {
        group: [(-1, shape, tuple(shown[start : start + size].tolist()), size)] for group, shape, start, size in ends
    }


def _claims(pieces: Pieces, numbers: IntArray, shapes: Shapes) -> tuple[BoolArray, FloatArray]:
    """How good tiles' claims to objects are, as ``_claim`` has it."""
    views = [pieces.views[number] for number in pieces.view[numbers].tolist()]
    points = shapely.point_on_surface(shapes)
    cores = np.array([view.core or Polygon() for view in views], dtype=object)
    borders = shapely.get_exterior_ring(np.array([view.outline for view in views], dtype=object))
    return np.asarray(shapely.covers(cores, points)), np.asarray(shapely.distance(borders, points))


Links = dict[tuple[int, int], bool]
"""Pairs of pieces that show one object; whether they meet at the common border of tiles that do not overlap."""


def near_pairs(boxes: FloatArray, reach: float) -> Iterator[IntArray]:
    """Pairs (M, 2) of boxes (left, top, right, bottom) that lie within that reach along both axes, block by block.

    Each pair comes once, the smaller index first.
    """
    if len(boxes) < 2:
        return
    grown = boxes + np.array([-reach, -reach, reach, reach]) / 2
    origin, far = grown[:, :2].min(axis=0), grown[:, 2:].max(axis=0)
    side = max(float(np.sqrt(np.prod(np.maximum(far - origin, 1.0)) * _BLOCK / len(boxes))), 1.0)
    columns = int((far[0] - origin[0]) // side) + 1
    low = ((grown[:, :2] - origin) // side).astype(np.int64)
    spans = ((grown[:, 2:] - origin) // side).astype(np.int64) - low + 1
    copies = np.prod(spans, axis=1)
    number = np.repeat(np.arange(len(boxes)), copies)
    inner = np.arange(len(number)) - np.repeat(np.cumsum(copies) - copies, copies)
    width = spans[number, 0]
    block = (low[number, 1] + inner // width) * columns + low[number, 0] + inner % width
    order = np.argsort(block, kind="stable")
    number, block = number[order], block[order]
    edges = np.flatnonzero(np.diff(block, prepend=-1, append=-1))
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        here = number[start:stop]
        if len(here) < 2:
            continue
        shapes: Any = shapely.box(*grown[here].T)
        i, j = here[STRtree(shapes).query(shapes)]
        # A pair belongs to the block that holds the first corner of what the two share.
        corner = ((np.maximum(grown[i, :2], grown[j, :2]) - origin) // side).astype(np.int64)
        mine = (i < j) & (corner[:, 1] * columns + corner[:, 0] == block[start])
        if mine.any():
            found = np.column_stack((i[mine], j[mine]))
            yield found[np.lexsort((found[:, 1], found[:, 0]))]


LINK = np.dtype([("pair", np.int64, 2), ("at_border", bool)])
"""Two pieces, the smaller index first; whether they meet at the common border of tiles that do not overlap."""


def links(pieces: Pieces) -> NDArray[Any]:
    """Pairs of pieces on different tiles, of one label, that show the same object: records of ``LINK``."""
    found = [np.empty(0, LINK)]
    for near in near_pairs(pieces.boxes, 2 * BORDER_PX):
        i, j = near.T
        apart = (pieces.view[i] != pieces.view[j]) & (pieces.task[i] != pieces.task[j])
        near = near[apart & (pieces.label[i] == pieces.label[j])]
        if len(near):
            found.append(_linked(pieces, near))
    return np.concatenate(found)


def _linked(pieces: Pieces, near: IntArray) -> NDArray[Any]:
    """Those of the pairs that show one object."""
    numbers, where = np.unique(near, return_inverse=True)
    outlines, pairs = pieces.fetch(numbers), where.reshape(near.shape)
    both, which = np.unique(pieces.view[near], axis=0, return_inverse=True)
    first, second = (
        np.array([pieces.views[number].outline for number in side], dtype=object) for side in both.T.tolist()
    )
    strips = shapely.intersection(first, second)
    lengths = shapely.length(strips)
    is_strip = (shapely.area(strips) > lengths * BORDER_PX)[which.ravel()]
    strip = strips[which.ravel()]
    whole, sliver = pieces.is_whole[near], pieces.is_sliver[near]
    at_border = ~is_strip & (lengths[which.ravel()] > 0) & ~whole.any(axis=1)
    one_sliver = is_strip & (sliver[:, 0] != sliver[:, 1])
    common = np.zeros(len(near))
    common[is_strip] = outlines.common_areas(pairs[is_strip])
    common[common < _NOISE_PX2] = 0.0
    smaller = outlines.areas[pairs].min(axis=1)
    # What is enough of the smaller is enough of what the strip shows of it.
    linked = is_strip & (common >= np.where(whole.all(axis=1), _MIN_DUPLICATE, _MIN_SHARED) * smaller)
    rest = np.flatnonzero(is_strip & ~linked & ~whole.all(axis=1) & ~one_sliver & (common > 0))
    linked[rest] = _is_shared(outlines.some_shapes(pairs[rest]), strip[rest])
    # Those that need not overlap have to be close.
    doubtful = np.flatnonzero(at_border | one_sliver | (linked & (common == 0)))
    a, b = outlines.some_shapes(pairs[doubtful]).T
    close = doubtful[shapely.dwithin(a, b, 2 * BORDER_PX)]
    linked[doubtful] = False
    linked[close] = True
    at = close[at_border[close]]
    linked[at] = _is_continued(outlines.some_shapes(pairs[at]), strip[at])
    links = np.zeros(int(linked.sum()), LINK)
    links["pair"], links["at_border"] = near[linked], at_border[linked]
    return links


def _is_shared(pairs: Shapes, strip: Shapes) -> BoolArray:
    """Whether pairs (M, 2) of parts share enough of what the strip, which both their tiles show, has of them."""
    a, b = pairs.T
    common = shapely.intersection(a, b)
    area = shapely.area(common)
    in_strip = np.minimum(*(shapely.area(shapely.intersection(side, strip)) for side in (a, b)))
    shared = np.asarray((area > 0) & (area >= _MIN_SHARED * in_strip))
    # Two houses that share a wall at the edge of the strip may overlap there, by the width of a line.
    doubtful = np.flatnonzero(shared)
    shared[doubtful] = ~shapely.is_empty(shapely.buffer(common[doubtful], -BORDER_PX / 2))
    return shared


def _is_continued(pairs: Shapes, border: Shapes) -> BoolArray:
    """Whether pairs (M, 2) of outlines reach the common border of their tiles at the same place."""
    first, second = (
        shapely.intersection(shapely.buffer(side, BORDER_PX, join_style="mitre"), border) for side in pairs.T
    )
    # The buffer has added its width at both ends.
    shared = shapely.length(shapely.intersection(first, second)) - 2 * BORDER_PX
    shorter = np.minimum(shapely.length(first), shapely.length(second)) - 2 * BORDER_PX
    return np.asarray((shared > 0) & (shared >= _MIN_CONTACT * shorter))


def _components(members: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Members that pairs tie together, in order of each group's first."""
    root = {i: i for i in members}

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in pairs:
        a, b = find(i), find(j)
        root[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in root:
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def _joined(pieces: Pieces, shapes: dict[int, BaseGeometry], tied: Links, simplify_px: float) -> list[_Joined]:
    """The objects that linked pieces show.

    Wholes count once, parts that a whole covers are not needed, what remains and is linked joins.
    """
    members = list(shapes)
    stands_for = _owners(pieces, shapes, members, tied)
    remaining = sorted(set(stands_for.values()))
    joins = {pair: border for pair, border in tied.items() if all(stands_for[i] == i for i in pair)}
    objects: list[_Joined] = []
    for group in _components(remaining, joins):
        outlines = {i: shapes[i] for i in group}
        for (i, j), at_border in joins.items():
            if at_border and i in outlines:
                a, b = (pieces.views[int(pieces.view[k])] for k in (i, j))
                border = a.outline.intersection(b.outline)
                outlines[i], outlines[j] = (_snapped(outlines[k], border) for k in (i, j))
        shown = tuple(i for i in members if stands_for[i] in outlines)
        is_one = len(group) == 1
        shape = None if is_one else _union(list(outlines.values()), simplify_px)
        objects.append((group[0] if is_one else -1, shape, shown, len(group)))
    return objects


def _owners(pieces: Pieces, shapes: dict[int, BaseGeometry], members: list[int], tied: Links) -> dict[int, int]:
    """For each piece the one whose outline counts: itself, or a whole that shows the same."""
    owners = {i: i for i in members}
    wholes = [i for i in members if pieces.is_whole[i]]
    between = [pair for pair in tied if all(pieces.is_whole[i] for i in pair)]
    for same in _components(wholes, between):
        if len(same) > 1:
            owners.update(
                dict.fromkeys(same, max(same, key=lambda i: _claim(shapes[i], pieces.views[int(pieces.view[i])])))
            )
    kept = sorted({owners[i] for i in wholes})
    parts = sorted(set(members).difference(wholes))
    if kept and parts:
        outlines, cut = [shapes[i] for i in kept], np.array([shapes[i] for i in parts], dtype=object)
        covered = shapely.area(shapely.intersection(cut, shapely.union_all(outlines) if len(kept) > 1 else outlines[0]))
        for i, part, area in zip(parts, cut, covered.tolist(), strict=True):
            if area >= _MIN_COVERED * part.area:
                owners[i] = kept[_most_shared(outlines, part)]
    for i in members:
        if not pieces.is_sliver[i]:
            continue
        near = [pair[pair[0] == i] for pair, at_border in tied.items() if i in pair and not at_border]
        near = [k for k in near if not pieces.is_sliver[k]]
        if near:
            reach = shapes[i].buffer(2 * BORDER_PX) if len(near) > 1 else shapes[i]
            owners[i] = owners[near[_most_shared([shapes[k] for k in near], reach)]]
    return owners


def _most_shared(shapes: list[BaseGeometry], ground: BaseGeometry) -> int:
    """Which of the shapes covers most of the ground."""
    return int(np.argmax(shapely.area(shapely.intersection(shapes, ground)))) if len(shapes) > 1 else 0


def _claim(shape: BaseGeometry, view: View) -> tuple[bool, float]:
    """How good a tile's claim to an object is: its core holds it, else it lies far from the border."""
    point = shape.representative_point()
    return view.core is not None and bool(view.core.covers(point)), float(view.outline.exterior.distance(point))


def _snapped(shape: BaseGeometry, border: BaseGeometry) -> BaseGeometry:
    """The shape with the points that all but touch the border moved onto it."""
    ends = shapely.get_coordinates(border)
    start, length = ends[0], float(np.hypot(*(ends[-1] - ends[0])))
    along = (ends[-1] - start) / length
    across = np.array([-along[1], along[0]])

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        off, at = (points - start) @ across, (points - start) @ along
        near = (np.abs(off) <= BORDER_PX) & (at >= -BORDER_PX) & (at <= length + BORDER_PX)
        return points - np.outer(np.where(near, off, 0.0), across)

    snapped = shapely.union_all(vectorize.repair(shapely.transform(shape, moved)))
    return shape if snapped.is_empty else snapped


def _union(shapes: list[BaseGeometry], tolerance_px: float) -> BaseGeometry:
    """One outline."""
    return _without_cracks(shapely.union_all(shapes), tolerance_px)


def _without_cracks(joined: BaseGeometry, tolerance_px: float) -> BaseGeometry:
    """The outline, simplified, without the cracks that two hands leave along a seam."""
    filled = [
        Polygon(part.exterior, [ring for ring in part.interiors if Polygon(ring).area >= 4 * BORDER_PX**2])
        for part in vectorize.repair(joined)
    ]
    simple = shapely.simplify(shapely.union_all(filled), tolerance_px, preserve_topology=True)
    return simple if simple.is_valid and not simple.is_empty else joined
