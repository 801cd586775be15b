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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon
from shapely.geometry.base import BaseGeometry

from . import annotations as drawn
from . import labelstudio
from .annotations import Making, Predicted, is_damage, is_repair
from .datasets import KINDS, FileNames, Picture, SceneFeatures, check_name, write_dataset
from .earth import Area, Lineage, area_of, checked_lineage, lineage_record, versions
from .edits import Edit, Edits
from .errors import BadRequest, BadTile, ExportError
from .formats import FIELDS, Batch, Remark, check_ending, write, write_text
from .ground import areas_m2, lonlat_geometries
from .labelstudio import LabelConfig
from .report import Conflict, ExportReport, report_page
from .seams import Pieces, View, WholeObject, near_pairs, seen, view_of, whole_objects
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


def export(
    tasks: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    options: ExportOptions | None = None,
    label_config: str | None = None,
    report_path: Path | None = None,
    image_of: ImageOf | None = None,
    edits: Edits | None = None,
) -> ExportReport:
    """Write the annotations of Label Studio's JSON tasks as features in EPSG:4326; the ending of ``out`` says how.

    ``label_config`` is the project's, where known: it tells prompts from regions. ``report_path`` takes the report as
    an HTML page, with the tiles as ``image_of`` fetches them. ``edits`` made in a desktop GIS count more
    than annotations. The file appears whole or not at all. Raises ExportError
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
        shapes, regions, makings, joined = (stack.enter_context(Spool(out.parent)) for _ in range(4))
        store = _Store(shapes, regions, makings, joined)
        tally = _Tally(sketch=Sketch() if report_path is not None else None)
        edits, pointless = edits or Edits(), _pointless(options.format or out.suffix.lower())
        if pointless:
            if lost := len(edits.added) - len(edits.of_outlines().added):
                tally.dropped[pointless] += lost
            edits = edits.of_outlines()
        reader = _Reader(options, config, store, tally, pointless=pointless)
        for task in tasks:
            reader.read(task)
        scenes = reader.finish()
        if not scenes:
            raise ExportError(_why_nothing(tally))
        for scene in scenes:
            scene.lineage = checked_lineage(scene.anchor, scene.area(), allow_ballpark=options.allow_ballpark)
        lineages = _ways_out([scene.lineage for scene in scenes if scene.lineage])
        pending = _Edits(edits, scenes)
        written = _write(scenes, store, out, options, config, tally, lineage_record(lineages, made_at=made_at), pending)
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

    views: list[View] = field(default_factory=list)
    addresses: list[tuple[str, Any]] = field(default_factory=list)
    """Image and task of each view."""

    def pictures(self) -> Iterator[tuple[View, tuple[str, Any]]]:
        """Views with their image and task."""
        return zip(self.views, self.addresses, strict=True)

    def view(self, tile: Tile, address: str, task: Any) -> int:
        """Number of the view that the tile is of the scene."""
        view = view_of(tile, self.anchor)
        box = np.array(view.outline.bounds)
        old = box if self.bounds is None else self.bounds
        self.bounds = np.concatenate((np.minimum(old, box)[:2], np.maximum(old, box)[2:]))
        self.views.append(view)
        self.addresses.append((address, task))
        return len(self.views) - 1

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
        ("number", np.int64),  # in the spools
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
    ]
)
"""What is kept in memory of an outline."""


@dataclass(slots=True)
class _Store:
    """What does not fit into memory, by number, and the texts that outlines share."""

    shapes: Spool
    """Outlines, in pixels of their scene's anchor, as WKB."""

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

    def fetch(self, numbers: NDArray[np.int64]) -> NDArray[np.object_]:
        return np.asarray(shapely.from_wkb(np.array(self.shapes.read(numbers), dtype=object)))

    def add_making(self, making: Making) -> int:
        ids = (making.task, making.annotation)
        if not all(item is None or (isinstance(item, int) and not isinstance(item, bool)) for item in ids):
            self.ids_are_numbers = False
        values = [getattr(making, name) for name in _MAKING]
        self.makings.append([json.dumps(values, default=str, ensure_ascii=False).encode(errors="replace")])
        return len(self.makings) - 1

    def making(self, number: int) -> Making:
        return Making(*json.loads(self.makings.read([number])[0]))


_MAKING = tuple(Making.__dataclass_fields__)


class _Outline(NamedTuple):
    """A region, or the parts of an object, under way to the store."""

    source: _Source
    label: str
    score: float | None
    regions: tuple[str, ...]
    edited: bool | None
    version: str | None

    points_pct: list[Any] | None = None
    """Of a single polygon that has not been looked at; None where ``shape`` is known."""

    result: Mapping[str, Any] | None = None
    """What the points were read from."""

    shape: BaseGeometry | None = None
    """In pixels of the tile."""


@dataclass(frozen=True, slots=True, eq=False)
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
        return self.scene.views[self.view].tile


class _Reader:
    """Tasks → outlines in the frame of their scene, in the store."""

    def __init__(
        self, options: ExportOptions, config: LabelConfig | None, store: _Store, tally: _Tally, *, pointless: str
    ) -> None:
        """``pointless`` says why the file has no points; empty where it has."""
        self._pointless = pointless
        self._options = options
        self._config = config
        self._store = store
        self._tally = tally
        self._scenes: dict[tuple[str, str], _Scene] = {}
        self._waiting: list[_Outline] = []

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
            key = (tile.scene, str(tile.crs))
            scene = self._scenes.setdefault(key, _Scene(tile, tile.scene.encode(errors="replace").decode()))
            view = scene.view(tile, addresses[to_name], task.get("id"))
            for annotation, making in zip(chosen, makings, strict=True):
                predicted = Predicted.on(task, annotation)
                source = _Source(annotation, task, to_name, scene, view, making, self._tally.tasks, predicted)
                plain = drawn.plain_outlines(annotation, self._config, to_name)
                self._waiting += self._plain(plain, source) if plain is not None else self._careful(source, annotation)
        if len(self._waiting) >= _BATCH_OUTLINES:
            self._store_waiting()

    def finish(self) -> list[_Scene]:
        """Scenes with what was drawn on them, in the order in which they came."""
        self._store_waiting()
        return list(self._scenes.values())

    @staticmethod
    def _plain(outlines: Iterable[drawn.Outline], source: _Source) -> Iterator[_Outline]:
        was_edited, version_of = source.predicted.was_edited, source.predicted.versions.get
        for points, label, score, result in outlines:
            identity = result["id"]
            yield _Outline(
                source, label, score, (identity,), was_edited(result), version_of(identity), points, result
            )  # fmt: skip

    def _careful(self, source: _Source, annotation: Mapping[str, Any]) -> list[_Outline]:
        """An annotation's objects, each looked at on its own, and what was wrong with them."""
        options, tally = self._options, self._tally
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
        waiting, self._waiting = self._waiting, []
        outlines: list[_Outline] = []
        shapes: list[BaseGeometry | None] = []
        for outline, shape in zip(waiting, _polygons_px(waiting), strict=True):
            if shape is not None:
                # Counted here for what was plain, and before for what was read with care.
                self._tally.regions += outline.points_pct is not None
                outlines.append(outline)
                shapes.append(shape)
            else:
                careful = self._careful(outline.source, {**outline.source.annotation, "result": [outline.result]})
                outlines += careful
                shapes += [one.shape for one in careful]
        if not outlines:
            return
        by_scene: dict[int, list[int]] = {}
        for position, outline in enumerate(outlines):
            by_scene.setdefault(id(outline.source.scene), []).append(position)
        in_px = np.array(shapes, dtype=object)
        for positions in by_scene.values():
            self._lay_down([outlines[i] for i in positions], in_px[positions])

    def _lay_down(self, outlines: list[_Outline], shapes_px: NDArray[np.object_]) -> None:
        """Outlines of one scene."""
        scene, store = outlines[0].source.scene, self._store
        view = np.array([outline.source.view for outline in outlines])
        used, which = np.unique(view, return_inverse=True)
        views = [scene.views[number] for number in used.tolist()]
        matrix, offset = np.array([view.matrix for view in views]), np.array([view.offset for view in views])
        points, owner = shapely.get_coordinates(shapes_px, return_index=True)
        at = which[owner]
        points = np.einsum("ni,nij->nj", points, matrix[at]) + offset[at]
        shapes = shapely.set_coordinates(shapes_px.copy(), points)

        rows = np.zeros(len(outlines), _OUTLINE)
        first = len(store.shapes)
        rows["number"] = np.arange(first, first + len(outlines))
        rows["box"] = shapely.bounds(shapes)
        rows["area_px"] = shapely.area(shapes)
        rows["score"] = [np.nan if outline.score is None else outline.score for outline in outlines]
        rows["label"] = [store.number_of(outline.label) for outline in outlines]
        rows["version"] = [-1 if o.version is None else store.number_of(o.version) for o in outlines]
        rows["annotation"] = [outline.source.making for outline in outlines]
        rows["task"] = [outline.source.task_number for outline in outlines]
        rows["view"] = view
        rows["edited"] = [-1 if outline.edited is None else outline.edited for outline in outlines]
        rows["is_whole"], rows["is_sliver"] = seen(scene.views, view, shapes)
        rows["is_point"] = shapely.get_type_id(shapes) == shapely.GeometryType.POINT
        scene.outlines.append(rows)
        store.shapes.append(shapely.to_wkb(shapes))
        store.regions.append(_joined_texts(outline.regions) for outline in outlines)


def _polygons_px(outlines: Sequence[_Outline]) -> list[BaseGeometry | None]:
    """Each outline as a polygon in pixels of its tile; None for a plain one that has to be looked at with care."""
    shapes: list[BaseGeometry | None] = [outline.shape for outline in outlines]
    plain = [i for i, outline in enumerate(outlines) if outline.points_pct is not None]
    if not plain:
        return shapes
    rings: list[list[Any]] = [outlines[i].points_pct or [] for i in plain]
    lengths = np.fromiter(map(len, rings), np.int64, len(rings))
    try:
        if set(map(len, chain.from_iterable(rings))) != {2}:
            raise ValueError("points must be pairs")
        flat = chain.from_iterable(chain.from_iterable(rings))
        points = np.fromiter(flat, np.float64, 2 * int(lengths.sum())).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        if len(outlines) == 1:
            return [None]
        # One strange outline does not make the others strange.
        middle = len(outlines) // 2
        return _polygons_px(outlines[:middle]) + _polygons_px(outlines[middle:])
    owner = np.repeat(np.arange(len(rings)), lengths)
    sources: dict[_Source, int] = {}
    by = [sources.setdefault(outlines[i].source, len(sources)) for i in plain]
    px_per_pct = np.array([source.tile.size for source in sources], np.float64) / 100.0
    is_odd = np.zeros(len(rings), bool)
    is_odd[owner[~((points >= 0) & (points <= 100)).all(axis=1)]] = True
    # Label Studio's rings are open; a point twice in a row is for `vectorize.unbridge` to judge.
    is_odd[owner[1:][(owner[1:] == owner[:-1]) & (points[1:] == points[:-1]).all(axis=1)]] = True
    starts = np.cumsum(lengths) - lengths
    is_odd |= (points[starts] == points[starts + lengths - 1]).all(axis=1)
    polygons: Any = shapely.polygons(
        shapely.linearrings(np.where(np.isfinite(points), points, 0.0) * px_per_pct[by][owner], indices=owner)
    )
    is_odd |= ~shapely.is_valid(polygons)
    for position, polygon, odd in zip(plain, polygons, is_odd.tolist(), strict=True):
        shapes[position] = None if odd else polygon
    return shapes


def _why_chosen(annotation: Mapping[str, Any], options: ExportOptions) -> str:
    """In words, for the report."""
    if options.annotations_from == "all":
        return "every annotation that was submitted"
    is_truth = annotation.get("ground_truth") and options.annotations_from == "ground_truth"
    return "the newest ground truth" if is_truth else "the newest annotation"


def _mean(values: Sequence[float | None], areas_px: Sequence[float]) -> float | None:
    """The mean, by area, of those that are known; None where none is. Points count the same."""
    known = [(value, area or 1.0) for value, area in zip(values, areas_px, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known else None


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
) -> int:
    """Write the features of all scenes. Returns how many there are."""
    # What came over the wire may hold half characters, which no file can.
    texts = [text.encode(errors="replace").decode() for text in store.texts]
    remarks = [_remark(place) for place in tally.places]
    by_scene = (_features_of(scene, store, texts, options, tally, remarks, edits) for scene in scenes)
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
            features,
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
) -> Iterator[tuple[Batch, NDArray[np.object_]]]:
    """The features of a scene with their shapes in its frame; after the last one its conflicts are in the tally."""
    rows = np.concatenate([*scene.outlines, np.empty(0, _OUTLINE)])
    scene.outlines.clear()
    watches = bool(edits.read) or len(np.unique(rows["label"])) > 1
    features = _Features(scene, rows, store, texts, edits, watch_conflicts=watches)
    batches = (features.batch(objects, tally) for objects in _whole_objects(scene, rows, store, options, tally))
    for batch, shapes_px in chain(batches, (features.drawn_on_desktop() for _ in range(1))):
        if not len(batch):
            continue
        yield batch, shapes_px
        if tally.sketch is not None:
            tally.sketch.add_features(batch.geometry, batch.columns["label"])
        tally.labels.update(batch.columns["label"])
        for label, area_m2 in zip(batch.columns["label"], batch.columns["area_m2"], strict=True):
            tally.label_area_m2[label] += area_m2 or 0.0
    features.find_conflicts(tally, remarks)


def _whole_objects(
    scene: _Scene, rows: NDArray[Any], store: _Store, options: ExportOptions, tally: _Tally
) -> Iterator[list[WholeObject]]:
    """Objects of the scene, each once, in batches."""

    def fetch(numbers: NDArray[np.int64]) -> NDArray[np.object_]:
        return store.fetch(rows["number"][numbers])

    if not options.merge_seams:
        for start in range(0, len(rows), 4096):
            numbers = np.arange(start, min(start + 4096, len(rows)))
            yield [WholeObject(shape, (i,)) for i, shape in zip(numbers.tolist(), fetch(numbers), strict=True)]
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
        fetch=fetch,
    )
    for objects in whole_objects(pieces, simplify_px=options.simplify_px):
        tally.merged += sum(item.outlines > 1 for item in objects)
        tally.duplicates += sum(len(item.pieces) - item.outlines for item in objects)
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
        self._texts = texts
        self._area = scene.area()
        self._edits = edits
        self._watches = watch_conflicts
        self._labels: dict[str, int] = {}
        self._written: list[NDArray[Any]] = []
        self._first = len(store.joined)

    def batch(self, objects: Sequence[WholeObject], tally: _Tally) -> tuple[Batch, NDArray[np.object_]]:
        """Features of objects, and their shapes in the scene's frame.

        Those of which nothing is left on the grid of coordinates are counted.
        """
        shapes = np.array([item.shape for item in objects], dtype=object)
        geometry = lonlat_geometries(shapes, self._scene.anchor, self._area)
        is_left = np.array([shape is not None for shape in geometry], bool)
        if not is_left.all():
            tally.dropped["smaller than the coordinates can tell"] += int((~is_left).sum())
            objects = [item for item, left in zip(objects, is_left.tolist(), strict=True) if left]
            shapes, geometry = shapes[is_left], geometry[is_left]
        columns = self._columns(objects)
        if self._edits.read:
            kept = self._edits.apply(self._scene, columns, geometry, shapes)
            columns = {name: [values[i] for i in kept] for name, values in columns.items() if name != "area_m2"}
            geometry, shapes = geometry[kept], shapes[kept]
        columns["area_m2"] = _areas_m2(geometry)
        self._keep(shapes, columns)
        return Batch(geometry, columns), shapes

    def drawn_on_desktop(self) -> tuple[Batch, NDArray[np.object_]]:
        """Features that a desktop GIS added to the scene."""
        added = self._edits.added_to(self._scene)
        geometry = np.array([edit.geometry for _, edit in added], dtype=object)
        shapes = np.array([self._scene.from_lonlat(edit.geometry) for _, edit in added], dtype=object)
        unknown: dict[str, list[Any]] = {
            name: [[] if kind == "ids" else None for _ in added] for name, kind in FIELDS.items()
        }
        columns = unknown | {
            "id": [identity for identity, _ in added],
            "label": [edit.label for _, edit in added],
            "area_m2": _areas_m2(geometry),
            "scene": [self._scene.name] * len(added),
            "edited": [True] * len(added),
        }
        self._keep(shapes, columns)
        return Batch(geometry, columns), shapes

    def _columns(self, objects: Sequence[WholeObject]) -> dict[str, list[Any]]:
        """All attributes but the area, in the order of ``formats.FIELDS``."""
        scene, store, texts = self._scene, self._store, self._texts
        counts = np.array([len(item.pieces) for item in objects], np.int64)
        rows = self._rows[np.fromiter(chain.from_iterable(item.pieces for item in objects), np.int64, counts.sum())]
        ends = np.cumsum(counts)
        firsts = ends - counts
        used, which = np.unique(rows["annotation"], return_inverse=True)
        makings = [Making(*values) for values in _json_lists(store.makings.read(used.astype(np.int64)))]
        listed = [text.decode(errors="replace").split("\0") for text in store.regions.read(rows["number"])]
        regions = [
            [f"{makings[number].task}/{region}" for region in some]
            for number, some in zip(which.tolist(), listed, strict=True)
        ]
        spans = [slice(*span) for span in zip(firsts.tolist(), ends.tolist(), strict=True)]
        scores = [score if score == score else None for score in rows["score"].tolist()]
        versions_of = [texts[number] if number >= 0 else None for number in rows["version"].tolist()]
        edits = [None if edited < 0 else edited > 0 for edited in rows["edited"].tolist()]
        areas_px, by = rows["area_px"].tolist(), which.tolist()
        # Most features are made of one outline, and for the others that is where to start.
        alone = [self._made([making]) for making in makings]
        made = [alone[number] for number in which[firsts].tolist()]
        columns: dict[str, list[Any]] = {name: [] for name in FIELDS}
        columns["label"] = [texts[number] for number in rows["label"][firsts].tolist()]
        columns["id"] = [
            _stable_id(scene.name, label, list(chain.from_iterable(regions[span])))
            for label, span in zip(columns["label"], spans, strict=True)
        ]
        columns["scene"] = [scene.name] * len(objects)
        columns["score"], columns["model_version"], columns["edited"] = (
            [values[span.start] for span in spans] for values in (scores, versions_of, edits)
        )
        for at in np.flatnonzero(counts > 1).tolist():
            span = spans[at]
            columns["score"][at] = _mean(scores[span], areas_px[span])
            columns["model_version"][at] = ", ".join(sorted(set(filter(None, versions_of[span])))) or None
            columns["edited"][at] = _any_edit(edits[span])
            if len(numbers := dict.fromkeys(by[span])) > 1:
                made[at] = self._made([makings[number] for number in numbers])
        return columns | {name: [one[name] for one in made] for name in self._made([])}

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
        return found if self._store.ids_are_numbers else [str(value) for value in found]

    def _keep(self, shapes: NDArray[np.object_], columns: Mapping[str, Any]) -> None:
        """Remember what was written, since it may conflict with what comes."""
        if not self._watches or not len(shapes):
            return
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


def _areas_m2(geometry: NDArray[np.object_]) -> list[float | None]:
    """Area of each; None for points."""
    areas = zip(areas_m2(geometry).tolist(), _is_area(geometry).tolist(), strict=True) if len(geometry) else ()
    return [area if is_area else None for area, is_area in areas]


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


def _stable_id(scene: str, label: str, regions: Sequence[str]) -> str:
    """The same for the same regions, however they were moved since."""
    digest = hashlib.sha256("\n".join([scene, label, *sorted(regions)]).encode(errors="replace"))
    return digest.hexdigest()[:16]
