"""Label Studio's tasks → outlines in the frame of their scene: in arrays and files, not in memory."""

from __future__ import annotations

import gc
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon
from shapely.geometry.base import BaseGeometry

from . import annotations as drawn
from . import labelstudio
from .annotations import Making, PlainOutline, Predicted, is_damage, is_repair
from .datasets import KINDS
from .earth import Area, Lineage, area_of
from .errors import BadRequest, BadTile, ExportError
from .labelstudio import LabelConfig
from .report import Conflict
from .rings import Outlines, Rings
from .seams import View, seen, seen_rings, views_of
from .sketch import Repair, Sketch, area_change
from .spool import Spool
from .tile import Tile

ON_INVALID = ("repair", "drop", "error")

MAX_FINDINGS = 200

BATCH_OUTLINES = 4096

_BATCH_BYTES = 1 << 22
"""Of outlines' points as text, at which fewer are a batch: a few long ones take as much memory as many short ones."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How annotations become features."""

    merge_seams: bool = True
    """Join objects that tile borders cut, and count those once that several tiles show."""

    on_invalid: str = "repair"
    """``repair`` outlines that cross themselves, ``drop`` them, or stop with an ``error``."""

    simplify_px: float = 0.5
    """Tolerance for outlines that were joined, in pixels; others stay as they were drawn."""

    allow_ballpark: bool = False
    """Write features although the way to EPSG:4326 is less accurate than a pixel."""

    format: str = ""
    """A dataset for training: ``coco``, ``yolo`` or ``stac``; empty for a file of the kind that its ending says."""

    annotations_from: str = "ground_truth"
    """Of several annotations of a task: the newest ``ground_truth``, else the newest; the ``latest``; or ``all``."""

    def __post_init__(self) -> None:
        if self.on_invalid not in ON_INVALID:
            raise ExportError(f"on_invalid must be one of {', '.join(ON_INVALID)}, got {self.on_invalid!r}")
        if self.annotations_from not in drawn.FROM:
            raise ExportError(f"annotations_from must be one of {', '.join(drawn.FROM)}, got {self.annotations_from!r}")
        if self.format and self.format not in KINDS:
            raise ExportError(f"format must be one of {', '.join(KINDS)}, or empty, got {self.format!r}")
        if self.format in ("coco", "yolo") and not self.merge_seams:
            raise ExportError(f"{self.format} draws whole objects back onto each tile, which takes merged seams")
        if not 0 <= self.simplify_px <= 100:
            raise ExportError(f"simplify_px must be 0 to 100 pixels, got {self.simplify_px}")


@dataclass(slots=True)
class Tally:
    """Counts under way."""

    tasks: int = 0
    annotations: int = 0
    regions: int = 0
    duplicates: int = 0
    merged: int = 0
    repaired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    conflict_count: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    label_area_m2: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    chosen: Counter[str] = field(default_factory=Counter)
    sketch: Sketch | None = None

    def find(self, what: str, place: Place) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(what)
            self.places.append(place)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where something was found wrong with an annotation."""

    reason: str
    task: Any
    region: str
    tile: Tile
    shape_px: BaseGeometry | None
    """In pixels of the tile; None for a region of which nothing is left."""


@dataclass(slots=True)
class DrawnScene:
    """Everything that was drawn on one scene, in pixels of its first tile."""

    anchor: Tile
    name: str
    bounds: NDArray[np.float64] | None = None
    lineage: Lineage | None = None

    outlines: list[NDArray[Any]] = field(default_factory=list)
    """Records of ``OUTLINE``, batch by batch."""

    tiles: list[Tile] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    """Of the tiles; those that came last may still lack theirs."""

    addresses: list[tuple[str, Any]] = field(default_factory=list)
    """Image and task of each view."""

    def pictures(self) -> Iterator[tuple[View, tuple[str, Any]]]:
        """Views with their image and task."""
        return zip(self.views, self.addresses, strict=True)

    def view(self, tile: Tile, address: str, task: Any) -> int:
        """Number of the view that the tile is of the scene; it is there when the scene is settled."""
        self.tiles.append(tile)
        self.addresses.append((address, task))
        return len(self.tiles) - 1

    def settle(self) -> None:
        """Find out where the tiles lie that came since the last time."""
        new = views_of(self.tiles[len(self.views) :], self.anchor)
        self.views += new
        boxes = shapely.bounds(np.array([view.outline for view in new], dtype=object))
        old = boxes if self.bounds is None else np.vstack((self.bounds, boxes))
        self.bounds = np.concatenate((old.min(axis=0)[:2], old.max(axis=0)[2:]))

    def from_lonlat(self, geometry: BaseGeometry) -> BaseGeometry:
        """A shape on Earth in the frame of the scene."""
        return shapely.transform(geometry, self.anchor.lonlat_to_px)

    def shows(self, geometry: BaseGeometry) -> bool:
        """Whether a place on Earth lies on one of the tiles."""
        point = self.from_lonlat(geometry.representative_point())
        return bool(np.any(shapely.covers(np.array([view.outline for view in self.views], dtype=object), point)))

    def area(self) -> Area | None:
        """Where on Earth the scene lies, in whole degrees."""
        assert self.bounds is not None
        left, top, right, bottom = self.bounds.tolist()
        return area_of(self.anchor, (left, top, right, bottom))


OUTLINE = np.dtype(
    [
        ("number", np.int64),  # in the spool of region ids
        ("shape", np.int64),  # in the spool of rings, or of shapes
        ("box", np.float64, 4),
        ("area_px", np.float64),
        ("score", np.float64),  # NaN where unknown
        ("label", np.int32),
        ("version", np.int32),  # -1 where unknown
        ("annotation", np.int32),
        ("task", np.int32),
        ("view", np.int32),
        ("edited", np.int8),  # -1 where unknown
        ("is_whole", bool),
        ("is_sliver", bool),
        ("is_point", bool),
        ("is_ring", bool),
    ]
)
"""What is kept in memory of an outline."""


@dataclass(slots=True)
class Store:
    """What does not fit into memory, by number, and the texts that outlines share."""

    rings: Spool
    """Outlines without holes, in pixels of their scene's anchor, as points."""

    shapes: Spool
    """The others, as WKB."""

    regions: Spool
    """Ids of the regions that an outline was made of, one after the other, a zero byte between them."""

    makings: Spool
    """When and by whom each annotation was made, as a JSON list."""

    joined: Spool
    """Objects that were written, where they may conflict."""

    texts: dict[str, int] = field(default_factory=dict)
    """Labels and model versions, and their numbers."""

    ids_are_numbers: bool = True

    def number_of(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def fetch(self, rows: NDArray[Any]) -> Outlines:
        """The outlines of ``OUTLINE`` records."""
        ring_at, other_at = np.flatnonzero(rows["is_ring"]), np.flatnonzero(~rows["is_ring"])
        rings = Rings(*self.rings.read_rows(rows["shape"][ring_at], _POINT))
        others = shapely.from_wkb(np.array(self.shapes.read(rows["shape"][other_at]), dtype=object))
        return Outlines(rings, ring_at, np.asarray(others), other_at)

    def add_making(self, making: Making) -> int:
        ids = (making.task, making.annotation)
        if not all(item is None or (isinstance(item, int) and not isinstance(item, bool)) for item in ids):
            self.ids_are_numbers = False
        values = [getattr(making, name) for name in _MAKING]
        self.makings.append([_encode(values).encode(errors="replace")])
        return len(self.makings) - 1

    def making(self, number: int) -> Making:
        return Making(*json.loads(self.makings.read([number])[0]))


_encode = json.JSONEncoder(default=str, ensure_ascii=False).encode
_POINT = np.dtype((np.float64, 2))
_MAKING = tuple(Making.__dataclass_fields__)


class _Outline(NamedTuple):
    """The parts of an object, or a point, under way to the store."""

    source: _Source
    label: str
    score: float | None
    regions: tuple[str, ...]
    edited: bool | None
    version: str | None
    shape: BaseGeometry
    """In pixels of the tile."""


@dataclass(frozen=True, eq=False)
class _Source:
    """An annotation on one image."""

    annotation: Mapping[str, Any]
    task: Mapping[str, Any]
    to_name: str | None
    scene: DrawnScene
    view: int
    making: int
    task_number: int
    predicted: Predicted

    @property
    def tile(self) -> Tile:
        return self.scene.tiles[self.view]

    @cached_property
    def results(self) -> Mapping[str, Mapping[str, Any]]:
        """What the annotation holds, by region id, where it is plain."""
        return {result["id"]: result for result in drawn.results_of(self.annotation)}


class Reader:
    """Tasks → outlines in the frame of their scene, in the store."""

    def __init__(
        self, options: ExportOptions, config: LabelConfig | None, store: Store, tally: Tally, *, pointless: str
    ) -> None:
        """``pointless`` says why the file has no points; empty where it has."""
        self._pointless = pointless
        self._options = options
        self._config = config
        self._store = store
        self._tally = tally
        self._scenes: dict[tuple[str, str], DrawnScene] = {}
        self._waiting: dict[int, list[tuple[_Source, list[PlainOutline] | list[_Outline]]]] = {}
        self._under_way = self._under_way_bytes = 0

    def read(self, task: Mapping[str, Any]) -> None:
        """Take a task's outlines in."""
        self._tally.tasks += 1
        chosen = drawn.chosen(task, self._options.annotations_from)
        if not chosen:
            return
        try:
            tiles = list(drawn.tiles_of(task, self._config))
        except (BadTile, BadRequest) as error:
            self._tally.refused[drawn.without_task(str(error), task)] += 1
            return
        self._tally.annotations += len(chosen)
        addresses = {to_name: drawn.image_address(task, self._config, to_name) for to_name, _ in tiles}
        if self._tally.sketch is not None:
            for to_name, tile in tiles:
                self._tally.sketch.add_tile(tile, image_url=addresses[to_name], task_id=task.get("id"))
        for annotation in chosen:
            self._tally.chosen[_why_chosen(annotation, self._options)] += 1
        makings = [self._store.add_making(drawn.making_of(annotation, task)) for annotation in chosen]
        for to_name, tile in tiles:
            scene = self._scene(tile)
            view = scene.view(tile, addresses[to_name], task.get("id"))
            for annotation, making in zip(chosen, makings, strict=True):
                predicted = Predicted.on(task, annotation)
                source = _Source(annotation, task, to_name, scene, view, making, self._tally.tasks, predicted)
                plain = drawn.plain_outlines(annotation, self._config, to_name)
                outlines = plain if plain is not None else self._careful(source, annotation)
                self._waiting.setdefault(id(scene), []).append((source, outlines))
                self._under_way += len(outlines)
                self._under_way_bytes += sum([len(outline.value.points) for outline in plain or ()])
        if self._under_way >= BATCH_OUTLINES or self._under_way_bytes >= _BATCH_BYTES:
            self._store_waiting()

    def finish(self) -> list[DrawnScene]:
        """Scenes with what was drawn on them so far, in the order in which they came."""
        self._store_waiting()
        return list(self._scenes.values())

    def _scene(self, tile: Tile) -> DrawnScene:
        """The scene that the tile is of."""
        key = tile.scene, str(tile.crs)
        if key not in self._scenes:
            self._scenes[key] = DrawnScene(tile, tile.scene.encode(errors="replace").decode())
        return self._scenes[key]

    def _careful(self, source: _Source, annotation: Mapping[str, Any]) -> list[_Outline]:
        """An annotation's objects, each looked at on its own, and what was wrong with them."""
        options, tally = self._options, self._tally
        annotation = {**annotation, "result": drawn.results_of(annotation)}
        try:
            read = labelstudio.read_annotation(annotation, source.tile, config=self._config, to_name=source.to_name)
        except BadRequest as error:
            tally.refused[drawn.without_task(str(error), source.task)] += 1
            return []
        mended = self._count(read.dropped, source, annotation)
        regions = read.regions
        if options.on_invalid == "drop" and mended:
            tally.dropped["invalid outline"] += len(mended)
            regions = [region for region in regions if region.id not in mended]
        points = read.points
        if points and self._pointless:
            tally.dropped[self._pointless] += len(points)
            points = ()
        tally.regions += len(regions) + len(points)
        results = {
            result["id"]: result
            for result in annotation.get("result") or []
            if isinstance(result, Mapping) and isinstance(result.get("id"), str) and result.get("type") != "labels"
        }
        outlines = []
        for parts in drawn.objects_of(regions):
            scores = [part.score for part in parts if part.score is not None]
            ids = tuple(dict.fromkeys(part.id for part in parts))
            edits = [source.predicted.was_edited(results[one]) for one in ids if one in results]
            outlines.append(
                _Outline(
                    source,
                    label=parts[0].label,
                    score=sum(scores) / len(scores) if scores else None,
                    regions=ids,
                    edited=any_edit(edits),
                    version=next((v for v in map(source.predicted.versions.get, ids) if v is not None), None),
                    shape=shapely.union_all([part.polygon for part in parts]),
                )
            )
        for point in points:
            edited = source.predicted.was_edited(results[point.id]) if point.id in results else None
            version = source.predicted.versions.get(point.id)
            # An outline may have the same region id.
            regions_of = (f"{point.id}/point",)
            place = shapely.Point(point.point_xy)
            outlines.append(_Outline(source, point.label, point.score, regions_of, edited, version, shape=place))
        return outlines

    def _count(self, dropped: Mapping[str, int], source: _Source, annotation: Mapping[str, Any]) -> set[str]:
        """Count what was dropped and mended; the ids of the regions that were mended. Raises ExportError."""
        options, tally, config = self._options, self._tally, self._config
        where = f"task {source.task.get('id')}, annotation {source.annotation.get('id')}"
        mended: set[str] = set()
        for reason, count in dropped.items():
            damaged = is_damage(reason)
            if damaged and options.on_invalid == "error":
                way_out = "repair" if is_repair(reason) else "drop"
                raise ExportError(f"{where}: {reason}; correct it in Label Studio, or use --on-invalid {way_out}")
            ids = drawn.mended_ids(annotation, source.tile, config, source.to_name, reason) if damaged else set()
            if is_repair(reason):
                mended |= ids
                tally.repaired += count if options.on_invalid == "repair" else 0
            else:
                tally.dropped[reason] += count
            if damaged:
                region = ", ".join(sorted(ids))
                place = Place(reason, source.task.get("id"), region, source.tile, self._shown(annotation, source, ids))
                tally.find(f"{where}, region {region or '?'}: {reason}", place)
                if tally.sketch is not None and is_repair(reason) and options.on_invalid == "repair":
                    for one in sorted(ids):
                        tally.sketch.add_repair(self._repair(annotation, source, one, reason))
        return mended

    def _shown(self, annotation: Mapping[str, Any], source: _Source, ids: set[str]) -> BaseGeometry | None:
        """What can be shown of regions, in pixels of the tile."""
        kept = [result for result in annotation.get("result") or [] if isinstance(result, Mapping)]
        kept = [result for result in kept if result.get("id") in ids]
        read = labelstudio.read_annotation({"result": kept}, source.tile, config=self._config, to_name=source.to_name)
        shape = shapely.union_all([region.polygon for region in read.regions])
        return None if shape.is_empty else shape

    def _repair(self, annotation: Mapping[str, Any], source: _Source, region: str, reason: str) -> Repair:
        """A region before and after."""
        before = drawn.points_of(annotation, region, source.tile)
        after = self._shown(annotation, source, {region}) or Polygon()
        return Repair(source.task.get("id"), region, reason, before, after, area_change(before, after))

    def _store_waiting(self) -> None:
        """Bring what waits into its scene's frame, all at once, and lay it down."""
        waiting, self._waiting = self._waiting, {}
        self._under_way = self._under_way_bytes = 0
        for listed in waiting.values():
            self._lay_down(listed[0][0].scene, listed)

    def _lay_down(
        self, scene: DrawnScene, waiting: Sequence[tuple[_Source, list[PlainOutline] | list[_Outline]]]
    ) -> None:
        """What was drawn on one scene, in order: rings as arrays, and one by one what takes more care."""
        scene.settle()
        plain: list[PlainOutline] = []
        sources: list[_Source] = []
        sizes: list[int] = []
        # With the number of the plain outline that each comes before, or stands for.
        careful: list[tuple[int, _Outline]] = []
        for source, outlines in waiting:
            if outlines and isinstance(outlines[0], _Outline):
                careful += [(len(plain), outline) for outline in outlines if isinstance(outline, _Outline)]
            elif outlines:
                plain += cast(list[PlainOutline], outlines)
                sources.append(source)
                sizes.append(len(outlines))
        rings, ring_at = _rings_px(plain, sources, sizes)
        of_source = np.repeat(np.arange(len(sources)), sizes)
        is_odd = np.ones(len(plain), bool)
        is_odd[ring_at] = False
        for number in np.flatnonzero(is_odd).tolist():
            source = sources[of_source[number]]
            result = source.results[plain[number].id]
            careful += [(number, one) for one in self._careful(source, {**source.annotation, "result": [result]})]
        self._tally.regions += len(ring_at)
        rows = [
            self._ring_rows(scene, rings, [plain[number] for number in ring_at.tolist()], sources, of_source[ring_at]),
            self._other_rows(scene, [outline for _, outline in careful]),
        ]
        order = np.argsort(
            np.concatenate((ring_at, np.array([at for at, _ in careful], np.int64) - 0.5)), kind="stable"
        )
        scene.outlines.append(np.concatenate(rows)[order])

    def _ring_rows(
        self,
        scene: DrawnScene,
        rings_px: Rings,
        outlines: Sequence[PlainOutline],
        sources: Sequence[_Source],
        of_source: NDArray[np.int64],
    ) -> NDArray[Any]:
        """Records of outlines that are rings, in pixels of their tiles, each of one of the sources; they are stored."""
        store = self._store
        rows = self._rows(len(outlines))
        if not len(outlines):
            return rows
        of_point = of_source[rings_px.owner]
        views = [scene.views[source.view] for source in sources]
        rings = Rings(_moved(rings_px.points, views, of_point), rings_px.lengths)
        rows["shape"] = np.arange(len(store.rings), len(store.rings) + len(rings))
        rows["is_ring"] = True
        rows["box"] = rings.bounds
        rows["area_px"] = np.abs(rings.areas)
        rows["score"] = [outline.score for outline in outlines]
        labels = [outline.value.polygonlabels[0] for outline in outlines]
        numbers = {label: store.number_of(label) for label in dict.fromkeys(labels)}
        rows["label"] = [numbers[label] for label in labels]
        rows["annotation"] = np.array([source.making for source in sources])[of_source]
        rows["task"] = np.array([source.task_number for source in sources])[of_source]
        rows["view"] = np.array([source.view for source in sources])[of_source]
        rows["version"], rows["edited"] = -1, -1
        told = [number for number, outline in enumerate(outlines) if outline.origin is not None]
        predicted = np.array([bool(source.predicted.results) for source in sources])
        for number in sorted({*told, *np.flatnonzero(predicted[of_source]).tolist()}):
            source, outline = sources[of_source[number]], outlines[number]
            version = source.predicted.versions.get(outline.id)
            rows["version"][number] = -1 if version is None else store.number_of(version)
            edited = source.predicted.was_edited(source.results[outline.id])
            rows["edited"][number] = -1 if edited is None else edited
        rows["is_whole"], rows["is_sliver"] = seen_rings(scene.views, rows["view"], rings)
        store.rings.append_rows(rings.points, rings.lengths)
        store.regions.append([outline.id.encode(errors="replace") for outline in outlines])
        return rows

    def _other_rows(self, scene: DrawnScene, outlines: Sequence[_Outline]) -> NDArray[Any]:
        """The same of all other outlines."""
        store = self._store
        rows = self._rows(len(outlines))
        if not outlines:
            return rows
        shapes_px = np.array([outline.shape for outline in outlines], dtype=object)
        points, owner = shapely.get_coordinates(shapes_px, return_index=True)
        views = [scene.views[outline.source.view] for outline in outlines]
        shapes = shapely.set_coordinates(shapes_px.copy(), _moved(points, views, owner))
        rows["shape"] = np.arange(len(store.shapes), len(store.shapes) + len(shapes))
        rows["box"] = shapely.bounds(shapes)
        rows["area_px"] = shapely.area(shapes)
        rows["score"] = [outline.score for outline in outlines]
        rows["label"] = [store.number_of(outline.label) for outline in outlines]
        rows["version"] = [-1 if o.version is None else store.number_of(o.version) for o in outlines]
        rows["annotation"] = [outline.source.making for outline in outlines]
        rows["task"] = [outline.source.task_number for outline in outlines]
        rows["view"] = [outline.source.view for outline in outlines]
        rows["edited"] = [-1 if outline.edited is None else outline.edited for outline in outlines]
        rows["is_whole"], rows["is_sliver"] = seen(scene.views, rows["view"], shapes)
        rows["is_point"] = shapely.get_type_id(shapes) == shapely.GeometryType.POINT
        store.shapes.append(shapely.to_wkb(shapes))
        store.regions.append(_joined_texts(outline.regions) for outline in outlines)
        return rows

    def _rows(self, count: int) -> NDArray[Any]:
        """That many records of outlines, numbered on."""
        rows = np.zeros(count, OUTLINE)
        rows["number"] = np.arange(len(self._store.regions), len(self._store.regions) + count)
        return rows


def _rings_px(
    outlines: Sequence[PlainOutline], sources: Sequence[_Source], sizes: Sequence[int]
) -> tuple[Rings, NDArray[np.int64]]:
    """Those of the outlines that are simple rings within their tiles, in pixels of those; and which they are.

    Of each source come as many outlines as its size says.
    """
    points, lengths = drawn.rings_pct(outlines)
    numbers = np.flatnonzero(lengths)
    lengths = lengths[numbers]
    owner = np.repeat(numbers, lengths)
    px_per_pct = np.array([source.tile.size for source in sources], np.float64).reshape(-1, 2) / 100.0
    of_source = np.repeat(np.arange(len(sources)), sizes)
    rings = Rings.closed(points * px_per_pct[of_source[owner]], lengths)
    # A point twice in a row, as where the last is the first, is for `vectorize.unbridge` to judge.
    is_plain = rings.are_simple()
    outside = owner[~((points >= 0) & (points <= 100)).all(axis=1)]
    if len(outside):
        is_plain &= ~np.isin(numbers, outside)
    if not is_plain.all():
        rings, numbers = rings.take(np.flatnonzero(is_plain)), numbers[is_plain]
    return rings, numbers


def _moved(points: NDArray[np.float64], views: Sequence[View], at: NDArray[np.int64]) -> NDArray[np.float64]:
    """Points (N, 2) in pixels of views' tiles to those of the scene; ``at`` (N,) says of which view each is."""
    matrix, offset = np.array([view.matrix for view in views]), np.array([view.offset for view in views])
    if (matrix == np.eye(2)).all():
        return np.asarray(points + offset[at])
    return np.asarray(np.einsum("ni,nij->nj", points, matrix[at]) + offset[at])


def _why_chosen(annotation: Mapping[str, Any], options: ExportOptions) -> str:
    """In words, for the report."""
    if options.annotations_from == "all":
        return "every annotation that was submitted"
    is_truth = annotation.get("ground_truth") and options.annotations_from == "ground_truth"
    return "the newest ground truth" if is_truth else "the newest annotation"


def any_edit(edits: Sequence[bool | None]) -> bool | None:
    """Whether something was edited, of several; None where that is not known of all that were not."""
    if any(edits):
        return True
    return None if None in edits or not edits else False


@contextmanager
def settled() -> Iterator[None]:
    """What is in memory before is not searched for garbage while much comes and goes: a sixth of the time."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _joined_texts(texts: Sequence[str]) -> bytes:
    return "\0".join(texts).encode(errors="replace")
