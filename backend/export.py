"""Annotations → features: what people accepted on tiles becomes whole objects on Earth, in a file that any GIS reads.

Tiles of one scene are brought into one frame of pixels, there the parts of objects that tiles cut are joined, and only
what is whole goes to lon/lat. Nothing is left out silently: the report counts every reason.

The way goes twice over the outlines, so that a million of them need no more memory than a few numbers each: they are
read page by page and laid down in a file (`spool`); then objects are joined and written batch by batch.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon
from shapely.geometry.base import BaseGeometry

from . import annotations as drawn
from . import labelstudio
from .annotations import Making, PlainOutline, Predicted, TaskFile, is_damage, is_repair
from .datasets import KINDS, FileNames, Picture, SceneFeatures, check_name, write_dataset
from .earth import Area, Lineage, area_of, checked_lineage, lineage_record, versions
from .edits import Edit, Edits
from .errors import BackendError, BadRequest, BadTile, ExportError
from .formats import BETWEEN, FIELDS, Batch, Coded, FeatureText, Remark, check_ending, write, write_text
from .ground import lonlat_outlines, outline_areas_m2
from .hands import Hands
from .labelstudio import LabelConfig
from .report import Conflict, ExportReport, report_page
from .rings import IntArray, Outlines, Rings, runs
from .seams import Pieces, View, WholeObjects, near_pairs, seen, seen_rings, views_of, whole_objects
from .sketch import ImageOf, Repair, Sketch, area_change
from .spool import Spool
from .tile import Tile

__all__ = ["ON_INVALID", "ExportOptions", "ExportReport", "export"]

ON_INVALID = ("repair", "drop", "error")

_MAX_FINDINGS = 200
_MAX_CONFLICTS = 200

_MIN_CONFLICT = 0.5
"""Share of the smaller of two features of different labels that must lie on the other to be called a conflict."""

_BATCH_OUTLINES = 4096

_LARGE_FILE_BYTES = 60_000_000
"""Files above this are worth the seconds that it takes to start processes: some 150,000 outlines."""

_MOST_WORKERS = 4
"""More than these wait for the process that joins what they made."""

_MANY_SCENES = 256
"""Scenes, of those that came last, that others who read are told of."""


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


def workers_for(file: Path | None, *, cores: int) -> int:
    """How many processes an export of that file of tasks is worth; one for tasks that come from Label Studio."""
    is_large = file is not None and file.is_file() and file.stat().st_size > _LARGE_FILE_BYTES
    return min(cores, _MOST_WORKERS) if is_large else 1


def export(
    tasks: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    options: ExportOptions | None = None,
    label_config: str | None = None,
    report_path: Path | None = None,
    image_of: ImageOf | None = None,
    edits: Edits | None = None,
    workers: int = 1,
) -> ExportReport:
    """Write the annotations of Label Studio's JSON tasks as features in EPSG:4326; the ending of ``out`` says how.

    ``label_config`` is the project's, where known: it tells prompts from regions. ``report_path`` takes the report as
    an HTML page, with the tiles as ``image_of`` fetches them. ``edits`` made in a desktop GIS count more
    than annotations. ``workers`` processes share the work, and the file is the same to the byte; they read
    the tasks too where those come as a `TaskFile`. The file appears whole or not at all. Raises ExportError
    where no task has both a place and an annotation, where an outline is invalid and ``on_invalid`` is ``error``, and
    where a CRS cannot be left exactly.
    """
    options = options or ExportOptions()
    if options.format:
        check_name(options.format, out)
    else:
        check_ending(out)
    config = labelstudio.parse_config(label_config) if label_config else None
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_settled())
        # Reports and desktop edits look at single features, and datasets at single tiles.
        is_shared = workers > 1 and not (options.format or report_path or edits)
        hands = stack.enter_context(_hands(workers)) if is_shared else None
        rings, shapes, regions, makings, joined = (stack.enter_context(Spool(out.parent)) for _ in range(5))
        store = _Store(rings, shapes, regions, makings, joined)
        tally = _Tally(sketch=Sketch() if report_path is not None else None)
        edits, pointless = edits or Edits(), _pointless(options.format or out.suffix.lower())
        if pointless:
            if lost := len(edits.added) - len(edits.of_outlines().added):
                tally.dropped[pointless] += lost
            edits = edits.of_outlines()
        reader = _Reader(options, config, store, tally, pointless=pointless)
        if isinstance(tasks, TaskFile):
            _read_file(tasks, reader, hands)
        else:
            for task in tasks:
                reader.read(task)
        scenes = reader.finish()
        if not scenes:
            raise ExportError(_why_nothing(tally))
        for scene in scenes:
            scene.lineage = checked_lineage(scene.anchor, scene.area(), allow_ballpark=options.allow_ballpark)
        lineages = _ways_out([scene.lineage for scene in scenes if scene.lineage])
        pending = _Edits(edits, scenes)
        record = lineage_record(lineages, made_at=made_at)
        written = _write(scenes, store, out, options, config, tally, record, pending, hands)
    pending.finish(tally)
    report = ExportReport(
        out=out,
        tasks=tally.tasks,
        annotations=tally.annotations,
        regions=tally.regions,
        features=written,
        merged=tally.merged,
        duplicates=tally.duplicates,
        repaired=tally.repaired,
        dropped=dict(tally.dropped),
        refused=dict(tally.refused),
        findings=tally.findings,
        crs=lineages,
        versions=versions(),
        conflicts=tally.conflicts,
        conflict_count=tally.conflict_count,
        labels=dict(tally.labels),
        label_area_m2={label: round(area, 3) for label, area in tally.label_area_m2.items()},
        chosen=dict(tally.chosen),
        edits=dict(pending.counts),
        made_at=made_at,
    )
    if report_path is not None:
        write_text(report_path, report_page(report, tally.sketch, image_of=image_of))
    return report


def _pointless(kind: str) -> str:
    """Why a dataset, or a file of that ending, has no points; empty where it has."""
    named = {".shp": "a Shapefile of outlines", "coco": "COCO", "yolo": "YOLO"}.get(kind)
    return f"point, for which {named} has no place" if named else ""


@contextmanager
def _hands(workers: int) -> Iterator[Hands]:
    """That many processes. Raises ExportError where one of them was ended."""
    try:
        with Hands(workers) as hands:
            yield hands
    except BrokenProcessPool as error:
        raise ExportError(
            "a process that shares the export was ended, perhaps for want of memory; run it again with fewer --workers"
        ) from error


@contextmanager
def _settled() -> Iterator[None]:
    """What is in memory before is not searched for garbage while much comes and goes: a sixth of the time."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(slots=True)
class _Tally:
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
    places: list[_Place] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    conflict_count: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    label_area_m2: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    chosen: Counter[str] = field(default_factory=Counter)
    sketch: Sketch | None = None

    def add(self, other: _Tally) -> None:
        """Count what was read elsewhere, after what was counted so far."""
        self.tasks += other.tasks
        self.annotations += other.annotations
        self.regions += other.regions
        self.repaired += other.repaired
        for own, its in ((self.dropped, other.dropped), (self.refused, other.refused), (self.chosen, other.chosen)):
            own.update(its)
        for what, place in zip(other.findings, other.places, strict=True):
            self.find(what, place)

    def find(self, what: str, place: _Place) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(what)
            self.places.append(place)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where something was found wrong with an annotation."""

    reason: str
    task: Any
    region: str
    tile: Tile
    shape_px: BaseGeometry | None
    """In pixels of the tile; None for a region of which nothing is left."""


def _ways_out(lineages: Iterable[Lineage]) -> list[Lineage]:
    """Each way out of a CRS once, in order: scenes far apart may leave one CRS by different operations."""
    found: dict[tuple[str, str], Lineage] = {}
    for lineage in lineages:
        found.setdefault((lineage.crs, lineage.definition), lineage)
    return list(found.values())


def _why_nothing(tally: _Tally) -> str:
    if not tally.tasks:
        return "there is no task to export"
    if tally.refused:
        reason, count = tally.refused.most_common(1)[0]
        return f"none of {tally.tasks} tasks can be exported; {count} because {reason}"
    return f"none of {tally.tasks} tasks has a submitted annotation; submit some in Label Studio first"


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scene:
    """Everything that was drawn on one scene, in pixels of its first tile."""

    anchor: Tile
    name: str
    bounds: NDArray[np.float64] | None = None
    lineage: Lineage | None = None

    outlines: list[NDArray[Any]] = field(default_factory=list)
    """Records of ``_OUTLINE``, batch by batch."""

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


_OUTLINE = np.dtype(
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
class _Store:
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

    @property
    def spools(self) -> tuple[Spool, ...]:
        """What is filled by reading."""
        return self.rings, self.shapes, self.regions, self.makings

    def number_of(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def fetch(self, rows: NDArray[Any]) -> Outlines:
        """The outlines of ``_OUTLINE`` records."""
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
    scene: _Scene
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


class _Reader:
    """Tasks → outlines in the frame of their scene, in the store."""

    def __init__(
        self, options: ExportOptions, config: LabelConfig | None, store: _Store, tally: _Tally, *, pointless: str
    ) -> None:
        """``pointless`` says why the file has no points; empty where it has."""
        self._pointless = pointless
        self.plan = options, config, pointless
        self._options = options
        self._config = config
        self._store = store
        self._tally = tally
        self._scenes: dict[_Key, _Scene] = {}
        self.anchors: dict[_Key, Tile] = {}
        """First tiles of scenes, also of those that came elsewhere."""

        self._waiting: dict[int, list[tuple[_Source, list[PlainOutline] | list[_Outline]]]] = {}
        self._under_way = 0

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
        if self._under_way >= _BATCH_OUTLINES:
            self._store_waiting()

    def finish(self) -> list[_Scene]:
        """Scenes with what was drawn on them so far, in the order in which they came."""
        self._store_waiting()
        return list(self._scenes.values())

    def take(self, part: _Part) -> bool:
        """Go on from what was read elsewhere; False, and nothing is taken, where it began a scene with another tile."""
        anchors = [scene.anchor for scene in part.scenes]
        if any(self.anchors.get(_key(anchor), anchor) != anchor for anchor in anchors):
            return False
        store = self._store
        firsts = [len(spool) for spool in store.spools]
        first_ring, first_shape, first_region, first_making = firsts
        for spool, whole in zip(store.spools, part.spools, strict=True):
            spool.extend(*whole)
        # The last stands for −1, an unknown version.
        texts = np.array([*map(store.number_of, part.texts), -1], np.int32)
        store.ids_are_numbers &= part.ids_are_numbers
        for theirs in part.scenes:
            scene = self._scene(theirs.anchor)
            for rows in theirs.outlines:
                rows["number"] += first_region
                rows["shape"] += np.where(rows["is_ring"], first_ring, first_shape)
                rows["annotation"] += first_making
                rows["task"] += self._tally.tasks
                rows["view"] += len(scene.tiles)
                rows["label"], rows["version"] = texts[rows["label"]], texts[rows["version"]]
            scene.outlines += theirs.outlines
            scene.tiles += theirs.tiles
            scene.addresses += theirs.addresses
            scene.settle()
        self._tally.add(part.tally)
        return True

    def _scene(self, tile: Tile) -> _Scene:
        """The scene that the tile is of."""
        key = _key(tile)
        if key not in self._scenes:
            anchor = self.anchors.setdefault(key, tile)
            self._scenes[key] = _Scene(anchor, anchor.scene.encode(errors="replace").decode())
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
                    edited=_any_edit(edits),
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
                place = _Place(reason, source.task.get("id"), region, source.tile, self._shown(annotation, source, ids))
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
        waiting, self._waiting, self._under_way = self._waiting, {}, 0
        for listed in waiting.values():
            self._lay_down(listed[0][0].scene, listed)

    def _lay_down(self, scene: _Scene, waiting: Sequence[tuple[_Source, list[PlainOutline] | list[_Outline]]]) -> None:
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
        scene: _Scene,
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

    def _other_rows(self, scene: _Scene, outlines: Sequence[_Outline]) -> NDArray[Any]:
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
        rows = np.zeros(count, _OUTLINE)
        rows["number"] = np.arange(len(self._store.regions), len(self._store.regions) + count)
        return rows


_Key = tuple[str, str]
"""Of a scene: its name and CRS."""


def _key(tile: Tile) -> _Key:
    return tile.scene, str(tile.crs)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What was read of some tasks in another process."""

    scenes: list[_Scene]
    """Without their views."""

    spools: list[tuple[bytes, NDArray[np.int64]]]
    texts: list[str]
    ids_are_numbers: bool
    tally: _Tally


def _read_file(file: TaskFile, reader: _Reader, hands: Hands | None) -> None:
    """Take the file's tasks in, part by part, alone or with others."""
    first = 0

    def read(text: bytes) -> None:
        nonlocal first
        for task in file.tasks_of(text, first):
            reader.read(task)
            first += 1
        reader.finish()

    if hands is None:
        for text in file.texts():
            read(text)
        return
    jobs = ((text, dict(islice(reversed(reader.anchors.items()), _MANY_SCENES))) for text in file.texts())
    for (text, _), part in hands.map(partial(_read_part, file, reader.plan), jobs):
        if part is not None and reader.take(part):
            first += part.tally.tasks
        else:
            read(text)


def _read_part(
    file: TaskFile, plan: tuple[ExportOptions, LabelConfig | None, str], job: tuple[bytes, dict[_Key, Tile]]
) -> _Part | None:
    """What some tasks hold; ``job`` is their text and the first tiles of the scenes that are known.

    None where that is for the process to find out that knows what came before.
    """
    options, config, pointless = plan
    text, anchors = job
    tally = _Tally()
    with ExitStack() as stack:
        stack.enter_context(_settled())
        rings, shapes, regions, makings, joined = (
            stack.enter_context(Spool(Path(tempfile.gettempdir()))) for _ in range(5)
        )
        store = _Store(rings, shapes, regions, makings, joined)
        reader = _Reader(options, config, store, tally, pointless=pointless)
        reader.anchors.update(anchors)
        try:
            for task in file.tasks_of(text, 0 if text.lstrip()[:1] != b"," else 1):
                reader.read(task)
            scenes = reader.finish()
        except BackendError:
            return None
        for scene in scenes:
            scene.views = []
        return _Part(scenes, [spool.whole() for spool in store.spools], list(store.texts), store.ids_are_numbers, tally)


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


def _mean(scores: NDArray[np.float64], areas_px: NDArray[np.float64]) -> float | None:
    """The mean, by area, of those that are known; None where none is. Points count the same."""
    known = [(score, area or 1.0) for score, area in zip(scores.tolist(), areas_px.tolist(), strict=True)]
    known = [(score, weight) for score, weight in known if score == score]
    total = sum(weight for _, weight in known)
    return sum(score * weight for score, weight in known) / total if known else None


def _any_edit(edits: Sequence[bool | None]) -> bool | None:
    """Whether something was edited, of several; None where that is not known of all that were not."""
    if any(edits):
        return True
    return None if None in edits or not edits else False


# Writing --------------------------------------------------------------------------------------------------------------


def _write(
    scenes: Sequence[_Scene],
    store: _Store,
    out: Path,
    options: ExportOptions,
    config: LabelConfig | None,
    tally: _Tally,
    lineage: Mapping[str, Any],
    edits: _Edits,
    hands: Hands | None,
) -> int:
    """Write the features of all scenes. Returns how many there are."""
    # What came over the wire may hold half characters, which no file can.
    texts = [text.encode(errors="replace").decode() for text in store.texts]
    remarks = [_remark(place) for place in tally.places]
    between = BETWEEN.get(out.suffix.lower())
    by_scene = (_features_of(scene, store, texts, options, tally, remarks, edits, hands, between) for scene in scenes)
    if not options.format:
        batches = (batch for features in by_scene for batch, _ in features)
        return write(
            batches,
            out,
            ids_are_numbers=store.ids_are_numbers,
            has_points=any(rows["is_point"].any() for scene in scenes for rows in scene.outlines)
            or any(isinstance(edit.geometry, shapely.Point) for edit in edits.read.added.values()),
            lineage=lineage,
            remarks=remarks,
        )
    names = FileNames()
    labels = _all_labels(scenes, texts, config, edits.read)
    listed = (
        SceneFeatures(
            scene.name,
            [Picture(view, task, address, names.of(address, task)) for view, (address, task) in scene.pictures()],
            ((batch, outlines_px.shapes) for batch, outlines_px in features),
        )
        for scene, features in zip(scenes, by_scene, strict=True)
    )
    return write_dataset(options.format, listed, out, labels=labels, made_at=str(lineage["made_at"]))


def _all_labels(scenes: Sequence[_Scene], texts: Sequence[str], config: LabelConfig | None, edits: Edits) -> list[str]:
    """The labels of the label config in its order, then others that were used, by name.

    So that their numbers stay when annotations come and go.
    """
    known = [label.value for tag in config.tags for label in tag.labels] if config is not None else []
    numbers = {number for scene in scenes for rows in scene.outlines for number in np.unique(rows["label"]).tolist()}
    drawn_on_desktop = {edit.label for edit in (*edits.changed.values(), *edits.added.values())}
    return list(dict.fromkeys([*known, *sorted({*(texts[number] for number in numbers), *drawn_on_desktop})]))


def _features_of(
    scene: _Scene,
    store: _Store,
    texts: Sequence[str],
    options: ExportOptions,
    tally: _Tally,
    remarks: list[Remark],
    edits: _Edits,
    hands: Hands | None,
    between: str | None,
) -> Iterator[tuple[Batch, Outlines]]:
    """The features of a scene with their outlines in its frame; after the last one its conflicts are in the tally.

    ``between`` is what stands between features where the file is GeoJSON.
    """
    rows = np.concatenate([*scene.outlines, np.empty(0, _OUTLINE)])
    scene.outlines.clear()
    watches = bool(edits.read) or len(np.unique(rows["label"])) > 1
    features = _Features(scene, rows, store, texts, edits, watch_conflicts=watches)
    materials = (features.material(objects) for objects in _whole_objects(scene, rows, store, options, tally))
    if hands is None:
        made: Iterator[tuple[_Material, tuple[Batch, IntArray]]] = (
            (material, features.maker.made(material)) for material in materials
        )
    else:
        keep = frozenset({"label", "area_m2", *(("id", "tasks") if watches else ())})
        work = features.maker.made if between is None else partial(features.maker.written, between, keep)
        made = hands.map(work, materials)
    batches = (features.batch(material, batch, left, tally) for material, (batch, left) in made)
    for batch, outlines_px in chain(batches, (features.drawn_on_desktop() for _ in range(1))):
        if not len(batch):
            continue
        yield batch, outlines_px
        labels = Coded.of(batch.columns["label"])
        if tally.sketch is not None:
            tally.sketch.add_features(batch.geometry, labels)
        counts = np.bincount(labels.codes, minlength=len(labels.values)).tolist()
        areas = np.nan_to_num(np.array(batch.columns["area_m2"], np.float64))
        sums = np.bincount(labels.codes, areas, minlength=len(labels.values)).tolist()
        for label, count, area_m2 in zip(labels.values, counts, sums, strict=True):
            tally.labels[label] += count
            tally.label_area_m2[label] += area_m2
    features.find_conflicts(tally, remarks)


def _whole_objects(
    scene: _Scene, rows: NDArray[Any], store: _Store, options: ExportOptions, tally: _Tally
) -> Iterator[WholeObjects]:
    """Objects of the scene, each once, in batches."""
    if not options.merge_seams:
        for start in range(0, len(rows), _BATCH_OUTLINES):
            yield WholeObjects.alone(np.arange(start, min(start + _BATCH_OUTLINES, len(rows))))
        return
    # Points and outlines of one label are not joined.
    kind = rows["label"].astype(np.int64) * 2 + rows["is_point"]
    if options.annotations_from == "all":
        # Two people's outlines of one thing are two features; each one's own are joined.
        annotators: dict[int | None, int] = {None: 0}
        by = [
            annotators.setdefault(store.making(number).annotator, len(annotators))
            for number in range(len(store.makings))
        ]
        kind = kind * len(annotators) + np.array(by, np.int64)[rows["annotation"]]
    pieces = Pieces(
        boxes=rows["box"],
        label=kind,
        task=rows["task"].astype(np.int64),
        view=rows["view"].astype(np.int64),
        is_whole=rows["is_whole"],
        is_sliver=rows["is_sliver"],
        views=scene.views,
        fetch=lambda numbers: store.fetch(rows[numbers]),
    )
    for objects in whole_objects(pieces, simplify_px=options.simplify_px):
        tally.merged += int((objects.outlines > 1).sum())
        tally.duplicates += int((np.diff(objects.starts) - objects.outlines).sum())
        yield objects


class _Features:
    """Objects of one scene → batches of features."""

    def __init__(
        self,
        scene: _Scene,
        rows: NDArray[Any],
        store: _Store,
        texts: Sequence[str],
        edits: _Edits,
        *,
        watch_conflicts: bool,
    ) -> None:
        self._scene = scene
        self._rows = rows
        self._store = store
        self._edits = edits
        self._watches = watch_conflicts
        self._labels: dict[str, int] = {}
        self._written: list[NDArray[Any]] = []
        self._first = len(store.joined)
        self.maker = _Maker(scene.name, scene.anchor, scene.area(), texts, store.ids_are_numbers)

    def material(self, objects: WholeObjects) -> _Material:
        """What is known of objects."""
        rows = self._rows[objects.members]
        used, by = np.unique(rows["annotation"], return_inverse=True)
        makings, regions = self._store.makings.read(used.astype(np.int64)), self._store.regions.read(rows["number"])
        return _Material(self._outlines(objects), rows, objects.starts, makings, by, regions)

    def batch(self, material: _Material, batch: Batch, left: IntArray, tally: _Tally) -> tuple[Batch, Outlines]:
        """Features as they are to be written, and their outlines in the scene's frame.

        ``left`` are the objects of which something is left on the grid of coordinates; the others are counted.
        """
        outlines_px = material.outlines_px
        if lost := len(outlines_px) - len(left):
            tally.dropped["smaller than the coordinates can tell"] += lost
            outlines_px = outlines_px.take(left)
        if self._edits.read:
            listed = {name: list(values) for name, values in batch.columns.items()}
            geometry, shapes_px = batch.geometry, outlines_px.shapes
            kept = self._edits.apply(self._scene, listed, geometry, shapes_px)
            outlines, outlines_px = Outlines.of(geometry[kept]), Outlines.of(shapes_px[kept])
            columns: dict[str, Sequence[Any]] = {name: [values[i] for i in kept] for name, values in listed.items()}
            batch = Batch(outlines, columns | {"area_m2": _areas_m2(outlines)})
        self._keep(outlines_px, batch.columns)
        return batch, outlines_px

    def _outlines(self, objects: WholeObjects) -> Outlines:
        """Outlines of objects, in the scene's frame."""
        kept = np.flatnonzero(objects.piece >= 0)
        found = self._store.fetch(self._rows[objects.piece[kept]])
        if not objects.joined:
            return found
        joined = np.full(len(objects.joined), None, dtype=object)
        joined[:] = list(objects.joined.values())
        at = np.concatenate((kept[found.other_at], np.array(list(objects.joined), np.int64)))
        order = np.argsort(at)
        return Outlines(
            found.rings, kept[found.ring_at], np.concatenate((found.others, joined))[order], at[order]
        )  # fmt: skip

    def drawn_on_desktop(self) -> tuple[Batch, Outlines]:
        """Features that a desktop GIS added to the scene."""
        added = self._edits.added_to(self._scene)
        outlines = Outlines.of(edit.geometry for _, edit in added)
        outlines_px = Outlines.of(self._scene.from_lonlat(edit.geometry) for _, edit in added)
        unknown: dict[str, list[Any]] = {
            name: [[] if kind == "ids" else None for _ in added] for name, kind in FIELDS.items()
        }
        columns = unknown | {
            "id": [identity for identity, _ in added],
            "label": [edit.label for _, edit in added],
            "area_m2": _areas_m2(outlines),
            "scene": [self._scene.name] * len(added),
            "edited": [True] * len(added),
        }
        self._keep(outlines_px, columns)
        return Batch(outlines, columns), outlines_px

    def _keep(self, outlines_px: Outlines, columns: Mapping[str, Any]) -> None:
        """Remember what was written, since it may conflict with what comes."""
        if not self._watches or not len(outlines_px):
            return
        shapes = outlines_px.shapes
        numbers = np.flatnonzero(_is_area(shapes))
        ids, tasks, labels = ([columns[name][i] for i in numbers.tolist()] for name in ("id", "tasks", "label"))
        shapes = shapes[numbers]
        kept = np.zeros(len(shapes), np.dtype([("box", np.float64, 4), ("label", np.int32)]))
        kept["box"] = shapely.bounds(shapes)
        kept["label"] = [self._labels.setdefault(label, len(self._labels)) for label in labels]
        self._written.append(kept)
        about = zip(ids, tasks, labels, shapely.to_wkb(shapes), strict=True)
        self._store.joined.append(json.dumps(listed).encode() + b"\0" + wkb for *listed, wkb in about)

    def find_conflicts(self, tally: _Tally, remarks: list[Remark]) -> None:
        """Features of different labels on the same ground, block by block."""
        if not self._written:
            return
        written = np.concatenate(self._written)
        for pairs in near_pairs(written["box"], 0.0):
            label = written["label"][pairs]
            pairs = pairs[label[:, 0] != label[:, 1]]
            if not len(pairs):
                continue
            numbers, where = np.unique(pairs, return_inverse=True)
            kept = [blob.split(b"\0", 1) for blob in self._store.joined.read(numbers + self._first)]
            shapes = shapely.from_wkb(np.array([wkb for _, wkb in kept], dtype=object))
            a, b = shapes[where.reshape(pairs.shape)].T
            smaller = np.minimum(shapely.area(a), shapely.area(b))
            touching = np.flatnonzero(shapely.intersects(a, b))
            share = np.zeros(len(pairs))
            common = shapely.intersection(a[touching], b[touching])
            share[touching] = shapely.area(common) / smaller[touching]
            for at, place in zip(touching.tolist(), common, strict=True):
                if share[at] < _MIN_CONFLICT:
                    continue
                tally.conflict_count += 1
                if len(tally.conflicts) >= _MAX_CONFLICTS:
                    continue
                about = [json.loads(kept[k][0]) for k in where.reshape(pairs.shape)[at].tolist()]
                lonlat = self._scene.anchor.px_to_lonlat(shapely.get_coordinates(place.representative_point()))[0]
                first, second = about[0][2], about[1][2]
                conflict = Conflict(
                    ids=(about[0][0], about[1][0]),
                    labels=(first, second),
                    tasks=tuple(_distinct([*about[0][1], *about[1][1]])),
                    overlap=round(float(share[at]), 3),
                    lonlat=(round(float(lonlat[0]), 7), round(float(lonlat[1]), 7)),
                )
                tally.conflicts.append(conflict)
                reason = f"{first} and {second} cover the same ground ({share[at]:.0%} of the smaller)"
                tasks = ", ".join(map(str, conflict.tasks))
                remarks.append(Remark(shapely.Point(conflict.lonlat), reason, tasks, ", ".join(conflict.ids)))


@dataclass(frozen=True, slots=True, eq=False)
class _Material:
    """Some objects, and all that is known of them."""

    outlines_px: Outlines
    """In the scene's frame, N."""

    rows: NDArray[Any]
    """Records of the outlines that they were made of, object by object, (M,)."""

    starts: IntArray
    """Where the records of each begin, and the end, (N + 1,)."""

    makings: Sequence[bytes]
    by: IntArray
    """Which of the makings each record is of, (M,)."""

    regions: Sequence[bytes]
    """Of each record."""

    def __len__(self) -> int:
        return len(self.outlines_px)

    def take(self, numbers: IntArray) -> _Material:
        """The objects of those numbers, which rise."""
        sizes = np.diff(self.starts)[numbers]
        kept = runs(self.starts[:-1][numbers], sizes)
        starts = np.concatenate(([0], np.cumsum(sizes)))
        regions = [self.regions[at] for at in kept.tolist()]
        return _Material(self.outlines_px.take(numbers), self.rows[kept], starts, self.makings, self.by[kept], regions)


@dataclass(frozen=True, slots=True, eq=False)
class _Maker:
    """Makes features of one scene; in any process."""

    scene: str
    anchor: Tile
    area: Area | None
    texts: Sequence[str]
    ids_are_numbers: bool

    def made(self, material: _Material) -> tuple[Batch, IntArray]:
        """Features, and of which of the objects something is left on the grid of coordinates."""
        outlines, left = lonlat_outlines(material.outlines_px, self.anchor, self.area), np.arange(len(material))
        lost = outlines.other_at[shapely.is_missing(outlines.others)]
        if len(lost):
            left = np.setdiff1d(left, lost)
            material, outlines = material.take(left), outlines.take(left)
        return Batch(outlines, self._columns(material) | {"area_m2": _areas_m2(outlines)}), left

    def written(self, between: str, keep: Set[str], material: _Material) -> tuple[Batch, IntArray]:
        """The same as text, with only those columns beside it."""
        batch, left = self.made(material)
        columns = {name: column for name, column in batch.columns.items() if name in keep}
        return Batch(Outlines.of(()), columns, FeatureText.of(batch, between=between)), left

    def _columns(self, material: _Material) -> dict[str, Sequence[Any]]:
        """All attributes but the area."""
        texts, rows, by, regions = self.texts, material.rows, material.by, material.regions
        firsts = material.starts[:-1]
        makings = [Making(*values) for values in _json_lists(material.makings)]
        # What is the same for many features, as of one annotation, is put together once.
        annotations, versions, edits = (column.tolist() for column in (by, rows["version"], rows["edited"]))
        known: dict[tuple[Any, ...], int] = {}
        shared: list[dict[str, Any]] = []

        def shared_by(span: slice) -> int:
            key = (tuple(annotations[span]), tuple(versions[span]), tuple(edits[span]))
            if key not in known:
                known[key] = len(shared)
                shared.append(self._shared([makings[number] for number in dict.fromkeys(key[0])], *key[1:]))
            return known[key]

        kind = ((by * (len(texts) + 1) + rows["version"] + 1) * 3 + rows["edited"] + 1)[firsts]
        _, some, which = np.unique(kind, return_index=True, return_inverse=True)
        codes = np.array([shared_by(slice(at, at + 1)) for at in firsts[some].tolist()], np.int64)[which]
        is_scored = ~np.isnan(rows["score"])
        scores: list[float | None] = [None] * len(material)
        for at in np.flatnonzero(is_scored[firsts]).tolist():
            scores[at] = float(rows["score"][firsts[at]])
        used_labels, labels = np.unique(rows["label"][firsts], return_inverse=True)
        heads = [f"{self.scene}\n{texts[number]}\n".encode(errors="replace") for number in used_labels.tolist()]
        of_task = [f"{making.task}/".encode(errors="replace") for making in makings]
        begins = [head + task for head in heads for task in of_task]
        begin = (labels * len(of_task) + by[firsts]).tolist()
        hashed = [begins[number] + regions[first] for number, first in zip(begin, firsts.tolist(), strict=True)]
        # Most features are made of one region, and for the others that is where to start.
        starts, head_of, known_scores = material.starts.tolist(), labels.tolist(), np.cumsum(is_scored).tolist()
        has_more = np.diff(material.starts) > 1
        for at in np.flatnonzero(has_more | np.array([b"\0" in text for text in hashed], bool)).tolist():
            span = slice(starts[at], starts[at + 1])
            listed = zip(annotations[span], regions[span], strict=True)
            lines = [of_task[number] + region for number, joined in listed for region in joined.split(b"\0")]
            hashed[at] = heads[head_of[at]] + b"\n".join(sorted(lines))
            if span.stop - span.start > 1:
                codes[at] = shared_by(span)
                if scores[at] is not None or known_scores[span.stop - 1] > known_scores[span.start]:
                    scores[at] = _mean(rows["score"][span], rows["area_px"][span])
        names = self._shared([], (), ())
        return {
            "id": _stable_ids(hashed),
            "label": Coded([texts[number] for number in used_labels.tolist()], labels),
            "score": scores,
            **{name: Coded([values[name] for values in shared], codes) for name in names},
        }

    def _shared(self, makings: Sequence[Making], versions: Iterable[int], edits: Iterable[int]) -> dict[str, Any]:
        """What the outlines that make a feature say of it together: their annotations, and their own numbers."""
        named = {self.texts[number] for number in versions if number >= 0}
        return {
            **self._made(makings),
            "scene": self.scene,
            "model_version": ", ".join(sorted(filter(None, named))) or None,
            "edited": _any_edit([None if edited < 0 else edited > 0 for edited in edits]),
        }

    def _made(self, makings: Sequence[Making]) -> dict[str, Any]:
        """What several annotations together say of a feature."""
        leads = [making.lead_time_s for making in makings if making.lead_time_s is not None]
        return {
            "annotators": _distinct(making.annotator for making in makings),
            "tasks": self._ids(making.task for making in makings),
            "annotations": self._ids(making.annotation for making in makings),
            "lead_time_s": sum(leads) if leads else None,
            "created": min((making.created for making in makings if making.created), default=None),
            "updated": max((making.updated for making in makings if making.updated), default=None),
        }

    def _ids(self, values: Iterable[Any]) -> list[Any]:
        found = _distinct(values)
        return found if self.ids_are_numbers else [str(value) for value in found]


class _Edits:
    """What was changed in a desktop GIS and waits for its feature."""

    def __init__(self, read: Edits, scenes: Sequence[_Scene]) -> None:
        self.read = read
        self.counts: Counter[str] = Counter()
        self._changed = dict(read.changed)
        self._deleted = set(read.deleted)
        self._added: dict[int, list[tuple[str, Edit]]] = {}
        for identity, edit in read.added.items():
            near = next((scene for scene in scenes if scene.shows(edit.geometry)), scenes[0])
            self._added.setdefault(id(near), []).append((identity, edit))

    def apply(
        self,
        scene: _Scene,
        columns: dict[str, list[Any]],
        geometry: NDArray[np.object_],
        shapes_px: NDArray[np.object_],
    ) -> list[int]:
        """Put changed outlines and labels in place of the annotated ones. Returns which features were not deleted."""
        kept = []
        for number, identity in enumerate(columns["id"]):
            if identity in self._deleted:
                self._deleted.discard(identity)
                self.counts["deleted"] += 1
                continue
            kept.append(number)
            edit = self._changed.pop(identity, None)
            if edit is not None:
                self.counts["changed"] += 1
                geometry[number], shapes_px[number] = edit.geometry, scene.from_lonlat(edit.geometry)
                columns["label"][number], columns["edited"][number] = edit.label, True
        return kept

    def added_to(self, scene: _Scene) -> list[tuple[str, Edit]]:
        """Features that were drawn on the scene, with their ids."""
        added = self._added.pop(id(scene), [])
        self.counts["added"] += len(added)
        return added

    def finish(self, tally: _Tally) -> None:
        """Count the edits that found nothing to change."""
        lost = len(self._changed) + len(self._deleted)
        if lost:
            tally.dropped["desktop edit of a feature that is no longer there"] += lost
        for reason in self.read.unreadable:
            tally.dropped["desktop edit that cannot be read"] += 1
            if len(tally.findings) < _MAX_FINDINGS:
                tally.findings.append(reason)


def _areas_m2(outlines: Outlines) -> list[float | None]:
    """Area of each; None for points."""
    areas: list[float | None] = outline_areas_m2(outlines).tolist()
    for at in outlines.other_at[~_is_area(outlines.others)].tolist():
        areas[at] = None
    return areas


def _is_area(shapes: NDArray[np.object_]) -> NDArray[np.bool_]:
    return np.asarray(shapely.get_type_id(shapes) != shapely.GeometryType.POINT)


def _remark(place: _Place) -> Remark:
    """A finding where it lies on Earth: the outline, or the middle of the tile where nothing is left of that."""
    width, height = place.tile.size
    shape = place.shape_px or shapely.Point(width / 2, height / 2)
    lonlat = shapely.transform(shape, place.tile.px_to_lonlat)
    return Remark(lonlat, place.reason, str(place.task), place.region)


def _json_lists(texts: Sequence[bytes]) -> list[list[Any]]:
    """Many JSON lists, read in one go."""
    found: list[list[Any]] = json.loads(b"[" + b",".join(texts) + b"]")
    return found


def _joined_texts(texts: Sequence[str]) -> bytes:
    return "\0".join(texts).encode(errors="replace")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _stable_ids(texts: Sequence[bytes]) -> list[str]:
    """The same for the same scene, label and regions, however those were moved since."""
    return [hashlib.sha256(text).hexdigest()[:16] for text in texts]
