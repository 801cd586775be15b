"""Annotations → features: what people accepted on tiles becomes whole objects on Earth, in a file that any GIS reads.

Tiles of one scene are brought into one frame of pixels, there the parts of objects that tiles cut are joined, and only
what is whole goes to lon/lat. Nothing is left out silently: the report counts every reason.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray
from pyproj.transformer import TransformerGroup
from shapely import MultiPolygon, Polygon, STRtree
from shapely.geometry.base import BaseGeometry

from . import labelstudio, vectorize
from .errors import BadRequest, BadTile, ExportError
from .labelstudio import LabelConfig
from .tile import FloatArray, Region, Tile, to_lonlat

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

DECIMALS = 7
"""Of degrees in GeoJSON: a centimetre. With six, polygons of 5 cm pixels become invalid."""

ENDINGS = (".geojson", ".json", ".gpkg", ".parquet", ".fgb", ".shp")
ON_INVALID = ("repair", "drop", "error")

_BORDER_PX = 1.5
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

_MAX_BEND_PX = 0.05
"""How far an edge may leave its line on the ground by being drawn straight in lon/lat."""

_MAX_FINDINGS = 200
_GEOD = pyproj.Geod(ellps="WGS84")


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

    def __post_init__(self) -> None:
        if self.on_invalid not in ON_INVALID:
            raise ExportError(f"on_invalid must be one of {', '.join(ON_INVALID)}, got {self.on_invalid!r}")
        if not 0 <= self.simplify_px <= 100:
            raise ExportError(f"simplify_px must be 0 to 100 pixels, got {self.simplify_px}")


@dataclass(frozen=True, slots=True)
class Lineage:
    """How coordinates of one CRS became EPSG:4326."""

    crs: str
    operation: str
    accuracy_m: float | None
    """As PROJ states it; None where it states nothing."""

    is_best: bool
    """False where a better operation needs a grid that is not installed."""

    definition: str


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What came of it."""

    out: Path
    tasks: int
    annotations: int
    regions: int
    """Outlines that were read."""

    features: int
    merged: int
    """Features that were joined from several tiles."""

    duplicates: int
    """Outlines left out because a neighbouring tile shows the same object."""

    repaired: int
    dropped: dict[str, int]
    """Why results of annotations were left out, and how often."""

    refused: dict[str, int]
    """Why whole tasks were left out, and how often."""

    findings: list[str]
    """The first repairs and drops, each with its task."""

    crs: list[Lineage]
    versions: dict[str, str]

    def sentence(self) -> str:
        """For a person."""
        parts = [f"{self.features} features from {self.regions} outlines on {self.tasks} tasks in {self.out}"]
        parts += [f"{self.merged} joined across tiles"] if self.merged else []
        parts += [f"{self.duplicates} duplicates left out"] if self.duplicates else []
        parts += [f"{self.repaired} repaired"] if self.repaired else []
        parts += [f"{count} x {reason}" for reason, count in {**self.dropped, **self.refused}.items()]
        return "; ".join(parts)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _View:
    """A tile in the frame of its scene."""

    tile: Tile
    outline: Polygon
    core: Polygon | None

    @cached_property
    def inside(self) -> BaseGeometry:
        """Where outlines are seen whole."""
        return self.outline.buffer(-_BORDER_PX, join_style="mitre")

    @cached_property
    def deep_inside(self) -> BaseGeometry:
        """Where more than slivers reach."""
        return self.outline.buffer(-_SLIVER_PX, join_style="mitre")


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """An object as one task shows it, in the frame of its scene."""

    shape: BaseGeometry
    label: str
    score: float | None
    view: _View
    task: Any
    annotation: Any
    regions: tuple[str, ...]
    is_whole: bool
    """Whether all of the object lies on the tile."""

    is_sliver: bool
    """Whether all that the tile shows hugs its border: hardly enough to tell what it belongs to."""


@dataclass(slots=True)
class _Scene:
    """Everything that was drawn on one scene, in pixels of its first tile."""

    anchor: Tile
    name: str
    pieces: list[_Piece] = field(default_factory=list)
    bounds: list[tuple[float, float, float, float]] = field(default_factory=list)

    def view(self, tile: Tile) -> _View:
        """Where the tile lies in the scene."""
        corners = self.place(tile.outline_px(), tile)
        assert isinstance(corners, Polygon)
        column, row, columns, rows = tile.core or (0, 0, 0, 0)
        core = self.place(shapely.box(column, row, column + columns, row + rows), tile) if tile.core else None
        self.bounds.append(corners.bounds)
        return _View(tile, corners, core if isinstance(core, Polygon) else None)

    def place(self, shape: BaseGeometry, tile: Tile) -> BaseGeometry:
        """From pixels of a tile to pixels of the scene."""
        matrix, offset = self._between(tile)
        return shapely.transform(shape, lambda points: points @ matrix + offset)

    def _between(self, tile: Tile) -> tuple[FloatArray, FloatArray]:
        width, height = tile.size
        corners = self.anchor.crs_to_px(tile.px_to_crs(np.array([(0.0, 0.0), (width, 0.0), (0.0, height)])))
        matrix = np.array([(corners[1] - corners[0]) / width, (corners[2] - corners[0]) / height])
        # Tiles of one grid are whole pixels apart: what arithmetic lost would leave slivers between their outlines.
        whole, offset = np.rint(corners[0]), corners[0]
        matrix = np.where(np.abs(matrix - np.eye(2)) < 1e-7, np.eye(2), matrix)
        return matrix, np.where(np.abs(offset - whole) < 1e-4, whole, offset)


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

    def find(self, what: str) -> None:
        if len(self.findings) < _MAX_FINDINGS:
            self.findings.append(what)


def export(
    tasks: Iterable[Mapping[str, Any]],
    out: Path,
    *,
    options: ExportOptions | None = None,
    label_config: str | None = None,
    report_path: Path | None = None,
) -> ExportReport:
    """Write the annotations of Label Studio's JSON tasks as features in EPSG:4326; the ending of ``out`` says how.

    ``label_config`` is the project's, where known: it tells prompts from regions. ``report_path`` takes the report as
    an HTML page. The file appears whole or not at all. Raises ExportError where no task has both a place and an
    annotation, where an outline is invalid and ``on_invalid`` is ``error``, and where a CRS cannot be left exactly.
    """
    options = options or ExportOptions()
    _check_ending(out)
    tally = _Tally()
    scenes = _read(tasks, options, labelstudio.parse_config(label_config) if label_config else None, tally)
    if not scenes:
        raise ExportError(_why_nothing(tally))
    features: list[_Feature] = []
    lineages: dict[str, Lineage] = {}
    for scene in scenes:
        lineage = _checked_lineage(scene, options)
        lineages.setdefault(lineage.crs, lineage)
        features += _on_earth(scene, _whole_objects(scene, options, tally), tally)
    written = write(_frame(features), out)
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
        crs=list(lineages.values()),
        versions={"PROJ": pyproj.proj_version_str, "GEOS": shapely.geos_version_string},
    )
    if report_path is not None:
        _write_text(report_path, report_page(report))
    return report


def _why_nothing(tally: _Tally) -> str:
    if not tally.tasks:
        return "there is no task to export"
    if tally.refused:
        reason, count = tally.refused.most_common(1)[0]
        return f"none of {tally.tasks} tasks can be exported; {count} because {reason}"
    return f"none of {tally.tasks} tasks has a submitted annotation; submit some in Label Studio first"


def _read(
    tasks: Iterable[Mapping[str, Any]], options: ExportOptions, config: LabelConfig | None, tally: _Tally
) -> list[_Scene]:
    """Scenes with what was drawn on them, in the order in which they come."""
    scenes: dict[tuple[str, str], _Scene] = {}
    for task in tasks:
        tally.tasks += 1
        chosen = labelstudio.chosen_annotations(task)
        if not chosen:
            continue
        try:
            views = list(_tiles(task, config))
        except (BadTile, BadRequest) as error:
            tally.refused[_without_task(str(error), task)] += 1
            continue
        tally.annotations += len(chosen)
        for to_name, tile in views:
            key = (tile.scene, str(tile.crs))
            scene = scenes.setdefault(key, _Scene(tile, tile.scene))
            view = scene.view(tile)
            for annotation in chosen:
                _read_annotation(annotation, task, to_name, scene, view, options, config, tally)
    return list(scenes.values())


def _tiles(task: Mapping[str, Any], config: LabelConfig | None) -> Iterator[tuple[str | None, Tile]]:
    """The tile of each of the task's images, with the image's name in the label config. Raises BadTile, BadRequest."""
    data = task.get("data")
    if not isinstance(data, Mapping):
        raise BadRequest(f"task {task.get('id')} has no data object")
    if config is None:
        addresses: dict[str | None, list[str]] = {None: [text for text in data.values() if isinstance(text, str)]}
    else:
        addresses = {tag.to_name: [labelstudio.image_of(task, tag)] for tag in config.tags}
    for to_name, texts in addresses.items():
        tiles = (Tile.from_task(data, image_url=text) for text in texts or [""])
        tile = next((tile for tile in tiles if tile is not None), None)
        tile = tile or Tile(size=(1, 1))
        tile.ground_size_m()  # raises for a photo, and where the CRS does not reach the tile
        yield to_name, tile


def _without_task(sentence: str, task: Mapping[str, Any]) -> str:
    """The sentence without the task's number, so that equal reasons count together."""
    return sentence.replace(f"task {task.get('id')}: ", "").replace(f"task {task.get('id')} ", "the task ")


def _read_annotation(
    annotation: Mapping[str, Any],
    task: Mapping[str, Any],
    to_name: str | None,
    scene: _Scene,
    view: _View,
    options: ExportOptions,
    config: LabelConfig | None,
    tally: _Tally,
) -> None:
    """Add an annotation's objects to the scene."""
    try:
        read = labelstudio.read_annotation(annotation, view.tile, config=config, to_name=to_name)
    except BadRequest as error:
        tally.refused[_without_task(str(error), task)] += 1
        return
    where = f"task {task.get('id')}, annotation {annotation.get('id')}"
    mended: set[str] = set()
    for reason, count in read.dropped.items():
        if _is_repair(reason):
            mended |= _mended(annotation, view.tile, config, to_name, reason)
            if options.on_invalid == "error":
                raise ExportError(f"{where}: {reason}; correct it in Label Studio, or use --on-invalid repair")
            tally.find(f"{where}, region {', '.join(sorted(mended)) or '?'}: {reason}")
            if options.on_invalid == "repair":
                tally.repaired += count
        else:
            if options.on_invalid == "error" and _is_damage(reason):
                raise ExportError(f"{where}: {reason}; correct it in Label Studio, or use --on-invalid drop")
            tally.dropped[reason] += count
            if _is_damage(reason):
                tally.find(f"{where}: {reason}")
    regions = read.regions
    if options.on_invalid == "drop" and mended:
        tally.dropped["invalid outline"] += len(mended)
        regions = [region for region in regions if region.id not in mended]
    tally.regions += len(regions)
    for parts in _objects(regions):
        scores = [part.score for part in parts if part.score is not None]
        shape = scene.place(shapely.union_all([part.polygon for part in parts]), view.tile)
        scene.pieces.append(
            _Piece(
                shape=shape,
                label=parts[0].label,
                score=sum(scores) / len(scores) if scores else None,
                view=view,
                task=task.get("id"),
                annotation=annotation.get("id"),
                regions=tuple(dict.fromkeys(part.id for part in parts)),
                is_whole=bool(view.inside.contains(shape)),
                is_sliver=not view.deep_inside.intersects(shape),
            )
        )


_NOT_DAMAGE = frozenset(
    (
        labelstudio.CANCELLED,
        labelstudio.PROMPT,
        labelstudio.LEAK,
        labelstudio.OTHER_IMAGE,
        labelstudio.NOT_AN_AREA,
        labelstudio.MORE_LABELS,
    )
)
_LEFT_OUT = frozenset((labelstudio.ROTATED_VIEW, labelstudio.UNREADABLE, labelstudio.OUTSIDE, labelstudio.EMPTY))


def _is_damage(reason: str) -> bool:
    return reason not in _NOT_DAMAGE


def _is_repair(reason: str) -> bool:
    """Whether the outline is there, but not as it was drawn."""
    return _is_damage(reason) and reason not in _LEFT_OUT and not reason.endswith("left out")


def _mended(
    annotation: Mapping[str, Any], tile: Tile, config: LabelConfig | None, to_name: str | None, reason: str
) -> set[str]:
    """Ids of the regions that were repaired for that reason."""
    ids: set[str] = set()
    for result in annotation.get("result") or []:
        if isinstance(result, Mapping) and isinstance(result.get("id"), str):
            alone = labelstudio.read_annotation({"result": [result]}, tile, config=config, to_name=to_name)
            if reason in alone.dropped:
                ids.add(result["id"])
    return ids


def _objects(regions: Sequence[Region]) -> list[list[Region]]:
    """Regions that are parts of one object together, all others alone."""
    objects: dict[tuple[Any, ...], list[Region]] = {}
    for number, region in enumerate(regions):
        key = (region.object_id, region.label) if region.object_id else (number,)
        objects.setdefault(key, []).append(region)
    return list(objects.values())


# Seams ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Object:
    """A whole object of a scene and the outlines it was made of."""

    shape: BaseGeometry
    pieces: list[_Piece]


def _whole_objects(scene: _Scene, options: ExportOptions, tally: _Tally) -> list[_Object]:
    """Objects of the scene, each once."""
    pieces = scene.pieces
    if not options.merge_seams:
        return [_Object(piece.shape, [piece]) for piece in pieces]
    links = _links(pieces)
    objects: list[_Object] = []
    for members, inner in _components(range(len(pieces)), links):
        if inner:
            objects += _joined(pieces, members, inner, options, tally)
        else:
            objects.append(_Object(pieces[members[0]].shape, [pieces[members[0]]]))
    return objects


Links = dict[tuple[int, int], BaseGeometry | None]
"""Pairs of pieces that show one object; with the border where they meet, if their tiles do not overlap."""


def _links(pieces: Sequence[_Piece]) -> Links:
    """Pairs of pieces on different tiles, of one label, that show the same object."""
    links: Links = {}
    shapes = np.array([piece.shape for piece in pieces], dtype=object)
    if len(shapes) < 2:
        return links
    strips: dict[tuple[int, int], BaseGeometry] = {}
    pairs = STRtree(shapes).query(shapes, predicate="dwithin", distance=2 * _BORDER_PX).T
    for i, j in pairs[pairs[:, 0] < pairs[:, 1]].tolist():
        a, b = pieces[i], pieces[j]
        if a.view is b.view or a.label != b.label or (a.task == b.task and a.task is not None):
            continue
        key = (id(a.view), id(b.view))
        if key not in strips:
            strips[key] = a.view.outline.intersection(b.view.outline)
        strip = strips[key]
        if strip.area > strip.length * _BORDER_PX:
            if _is_shared(a, b, strip):
                links[i, j] = None
        elif strip.length > 0 and not a.is_whole and not b.is_whole and _is_continued(a.shape, b.shape, strip):
            links[i, j] = strip
    return links


def _is_shared(a: _Piece, b: _Piece, strip: BaseGeometry) -> bool:
    """Whether two pieces show one object where their tiles overlap."""
    if a.is_sliver != b.is_sliver:
        return True
    common = a.shape.intersection(b.shape)
    if a.is_whole and b.is_whole:
        return bool(common.area >= _MIN_DUPLICATE * min(a.shape.area, b.shape.area))
    smaller = min(a.shape.intersection(strip).area, b.shape.intersection(strip).area)
    # Two houses that share a wall at the edge of the strip may overlap there, by the width of a line.
    is_thin = common.buffer(-_BORDER_PX / 2).is_empty
    is_much = common.area >= _MIN_SHARED * min(a.shape.area, b.shape.area)
    return bool(common.area > 0 and common.area >= _MIN_SHARED * smaller and (is_much or not is_thin))


def _is_continued(a: BaseGeometry, b: BaseGeometry, border: BaseGeometry) -> bool:
    """Whether two outlines reach the common border of their tiles at the same place."""
    contacts = [shape.buffer(_BORDER_PX, join_style="mitre").intersection(border) for shape in (a, b)]
    # The buffer has added its width at both ends.
    shared = contacts[0].intersection(contacts[1]).length - 2 * _BORDER_PX
    shorter = min(contact.length for contact in contacts) - 2 * _BORDER_PX
    return bool(shared > 0 and shared >= _MIN_CONTACT * shorter)


def _components(members: Iterable[int], links: Links) -> list[tuple[list[int], Links]]:
    """Members that links tie together, and the links between them, in order of each group's first."""
    root = {i: i for i in members}

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, j in links:
        a, b = find(i), find(j)
        root[max(a, b)] = min(a, b)
    groups: dict[int, tuple[list[int], Links]] = {}
    for i in root:
        groups.setdefault(find(i), ([], {}))[0].append(i)
    for (i, j), border in links.items():
        groups[find(i)][1][i, j] = border
    return list(groups.values())


def _joined(
    pieces: Sequence[_Piece], members: list[int], links: Links, options: ExportOptions, tally: _Tally
) -> list[_Object]:
    """The objects that linked pieces show.

    Wholes count once, parts that a whole covers are not needed, what remains and is linked joins.
    """
    stands_for = _owners(pieces, members, links)
    tally.duplicates += sum(i != owner for i, owner in stands_for.items())
    remaining = sorted(set(stands_for.values()))
    joins = {(i, j): border for (i, j), border in links.items() if stands_for[i] == i and stands_for[j] == j}
    objects = []
    for group, inner in _components(remaining, joins):
        shapes = {i: pieces[i].shape for i in group}
        for (i, j), border in inner.items():
            if border is not None:
                shapes[i], shapes[j] = (_snapped(shapes[k], border) for k in (i, j))
        shape = shapes[group[0]]
        if len(group) > 1:
            shape = _union(list(shapes.values()), options.simplify_px)
            tally.merged += 1
        objects.append(_Object(shape, [pieces[i] for i in members if stands_for[i] in shapes]))
    return objects


def _owners(pieces: Sequence[_Piece], members: list[int], links: Links) -> dict[int, int]:
    """For each piece the one whose outline counts: itself, or a whole that shows the same."""
    owners = {i: i for i in members}
    wholes = [i for i in members if pieces[i].is_whole]
    between: Links = {(i, j): None for i, j in links if pieces[i].is_whole and pieces[j].is_whole}
    for same, _ in _components(wholes, between):
        owners.update(dict.fromkeys(same, max(same, key=lambda i: _claim(pieces[i]))))
    kept = sorted({owners[i] for i in wholes})
    if kept:
        ground = shapely.union_all([pieces[i].shape for i in kept])
        for i in set(members).difference(wholes):
            part = pieces[i].shape
            if part.intersection(ground).area >= _MIN_COVERED * part.area:
                shared = [pieces[k].shape.intersection(part).area for k in kept]
                owners[i] = kept[int(np.argmax(shared))]
    for i in members:
        near = [pair[pair[0] == i] for pair, border in links.items() if i in pair and border is None]
        near = [k for k in near if not pieces[k].is_sliver]
        if pieces[i].is_sliver and near:
            reach = pieces[i].shape.buffer(2 * _BORDER_PX)
            shared = [pieces[k].shape.intersection(reach).area for k in near]
            owners[i] = owners[near[int(np.argmax(shared))]]
    return owners


def _claim(piece: _Piece) -> tuple[bool, float]:
    """How good a tile's claim to an object is: its core holds it, else it lies far from the border."""
    point = piece.shape.representative_point()
    core = piece.view.core
    return core is not None and bool(core.covers(point)), float(piece.view.outline.exterior.distance(point))


def _snapped(shape: BaseGeometry, border: BaseGeometry) -> BaseGeometry:
    """The shape with the points that all but touch the border moved onto it."""
    ends = shapely.get_coordinates(border)
    start, length = ends[0], float(np.hypot(*(ends[-1] - ends[0])))
    along = (ends[-1] - start) / length
    across = np.array([-along[1], along[0]])

    def moved(points: NDArray[np.float64]) -> NDArray[np.float64]:
        off, at = (points - start) @ across, (points - start) @ along
        near = (np.abs(off) <= _BORDER_PX) & (at >= -_BORDER_PX) & (at <= length + _BORDER_PX)
        return points - np.outer(np.where(near, off, 0.0), across)

    snapped = shapely.union_all(vectorize.repair(shapely.transform(shape, moved)))
    return shape if snapped.is_empty else snapped


def _union(shapes: list[BaseGeometry], tolerance_px: float) -> BaseGeometry:
    """One outline; without the cracks that two hands leave along a seam."""
    joined = shapely.union_all(shapes)
    filled = [
        Polygon(part.exterior, [ring for ring in part.interiors if Polygon(ring).area >= 4 * _BORDER_PX**2])
        for part in vectorize.repair(joined)
    ]
    simple = shapely.simplify(shapely.union_all(filled), tolerance_px, preserve_topology=True)
    return simple if simple.is_valid and not simple.is_empty else joined


# Earth ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Feature:
    """A row of the file."""

    geometry: Polygon | MultiPolygon
    properties: dict[str, Any]


def _checked_lineage(scene: _Scene, options: ExportOptions) -> Lineage:
    """How the scene's CRS is left. Raises ExportError where that is less exact than a pixel."""
    crs = str(scene.anchor.crs)
    used = to_lonlat(crs, _area_of(scene))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said in `is_best`
        group = TransformerGroup(crs, "EPSG:4326", always_xy=True, allow_ballpark=False)
    accuracy = used.accuracy if used.accuracy is not None and used.accuracy >= 0 else None
    pixel_m = scene.anchor.gsd_m or scene.anchor.ground_size_m()
    if accuracy is not None and accuracy > pixel_m and not options.allow_ballpark:
        better = "" if group.best_available else "; a better one needs a PROJ grid (projsync --all)"
        raise ExportError(
            f"{scene.name or 'the scene'}: the way from {crs[:60]} to EPSG:4326 is accurate to {accuracy:g} m,"
            f" worse than its pixel of {pixel_m:.3g} m ({used.description}){better}; accept that with --allow-ballpark"
        )
    return Lineage(crs, used.description, accuracy, group.best_available, used.definition)


def _area_of(scene: _Scene) -> tuple[float, float, float, float] | None:
    """West, south, east, north of the scene in whole degrees, outwards; None where that says nothing."""
    left, top, right, bottom = np.array(scene.bounds).T
    box = shapely.box(left.min(), top.min(), right.max(), bottom.max()).exterior
    points = scene.anchor.px_to_crs(shapely.get_coordinates(box))
    lon, lat = to_lonlat(str(scene.anchor.crs), None).transform(points[:, 0], points[:, 1])
    if not np.isfinite([lon, lat]).all() or np.ptp(lon) >= 180:
        return None
    west, south, east, north = math.floor(min(lon)), math.floor(min(lat)), math.ceil(max(lon)), math.ceil(max(lat))
    return west, max(south, -90), east, min(north, 90)


def _on_earth(scene: _Scene, objects: Iterable[_Object], tally: _Tally) -> Iterator[_Feature]:
    """The scene's objects as features."""
    area = _area_of(scene)
    for item in objects:
        geometry = lonlat_geometry(item.shape, scene.anchor, area)
        if geometry is None:
            tally.dropped["smaller than the coordinates can tell"] += 1
            continue
        first = item.pieces[0]
        scored = [(piece.score, piece.shape.area) for piece in item.pieces if piece.score is not None]
        regions = [f"{piece.task}/{region}" for piece in item.pieces for region in piece.regions]
        yield _Feature(
            geometry,
            {
                "id": _stable_id(scene.name, first.label, regions),
                "label": first.label,
                "score": sum(s * a for s, a in scored) / sum(a for _, a in scored) if scored else None,
                "area_m2": round(abs(_GEOD.geometry_area_perimeter(geometry)[0]), 3),
                "scene": scene.name,
                "tasks": _distinct(piece.task for piece in item.pieces),
                "annotations": _distinct(piece.annotation for piece in item.pieces),
            },
        )


def _distinct(values: Iterable[Any]) -> list[Any]:
    found = list(dict.fromkeys(value for value in values if value is not None))
    return found if all(isinstance(value, int) for value in found) else [str(value) for value in found]


def _stable_id(scene: str, label: str, regions: Sequence[str]) -> str:
    """The same for the same regions, however they were moved since."""
    digest = hashlib.sha256("\n".join([scene, label, *sorted(regions)]).encode())
    return digest.hexdigest()[:16]


def lonlat_geometry(
    shape_px: BaseGeometry, tile: Tile, area: tuple[float, float, float, float] | None = None
) -> Polygon | MultiPolygon | None:
    """A shape in pixels of a tile as RFC 7946 wants it: degrees, shells counter-clockwise, cut at the antimeridian.

    Edges that would bend are given more points. Coordinates lie on the grid of ``DECIMALS`` decimals, on which the
    shape is valid; None where nothing is left of it there. ``area`` picks the operation between the CRS and EPSG:4326.
    """
    transformer = to_lonlat(str(tile.crs), area)

    def ring_lonlat(ring: FloatArray) -> FloatArray:
        points = tile.px_to_crs(_unbent(ring, tile, transformer))
        x, y = transformer.transform(points[:, 0], points[:, 1])
        return np.column_stack((x, y))

    parts: list[Polygon] = []
    for polygon in vectorize.repair(shape_px):
        # In pixels, where the antimeridian is no matter, it is still plain which way round a ring runs.
        seen_from_above = -1.0 if tile.transform is not None and tile.transform.determinant > 0 else 1.0
        turned = shapely.geometry.polygon.orient(polygon, -seen_from_above)
        rings = [ring_lonlat(shapely.get_coordinates(ring)) for ring in (turned.exterior, *turned.interiors)]
        if not all(np.isfinite(ring).all() for ring in rings):
            raise ExportError(f"{tile.scene or 'the scene'}: an outline lies outside the area where its CRS is defined")
        parts += _cut_at_antimeridian(Polygon(rings[0], rings[1:]))
    # Splitting leaves one object in two parts, and so may the grid.
    grid = shapely.set_precision(shapely.make_valid(MultiPolygon(parts)), 10.0**-DECIMALS)
    found = [shapely.geometry.polygon.orient(part) for part in vectorize.repair(grid)]
    if not found:
        return None
    return found[0] if len(found) == 1 else MultiPolygon(found)


def _unbent(ring_px: FloatArray, tile: Tile, transformer: pyproj.Transformer) -> FloatArray:
    """The ring with points added where an edge that is straight in the CRS is not straight in lon/lat."""
    if _is_geographic(str(tile.crs)):
        return ring_px
    starts, ends = ring_px[:-1], ring_px[1:]
    halves = (starts + ends) / 2
    points = tile.px_to_crs(np.concatenate((ring_px, halves)))
    lon, lat = transformer.transform(points[:, 0], points[:, 1])
    lonlat = np.column_stack((lon, lat))
    ends_lonlat, halves_lonlat = lonlat[: len(ring_px)], lonlat[len(ring_px) :]
    bend = halves_lonlat - (ends_lonlat[:-1] + ends_lonlat[1:]) / 2
    # Over the antimeridian the mean of two longitudes lies on the other side of the Earth.
    bend[:, 0] = (bend[:, 0] + 90) % 180 - 90
    metres = np.hypot(bend[:, 0] * np.cos(np.radians(halves_lonlat[:, 1])), bend[:, 1]) * 111_320
    pixel_m = tile.gsd_m or tile.ground_size_m()
    # The bend falls with the square of the number of pieces.
    pieces = np.clip(np.ceil(np.sqrt(np.nan_to_num(metres) / (_MAX_BEND_PX * pixel_m))), 1, 256).astype(int)
    if (pieces == 1).all():
        return ring_px
    rows = [
        start + (end - start) * np.arange(count)[:, None] / count
        for start, end, count in zip(starts, ends, pieces.tolist(), strict=True)
    ]
    return np.concatenate([*rows, ring_px[-1:]])


@functools.lru_cache(maxsize=64)
def _is_geographic(crs: str) -> bool:
    return bool(pyproj.CRS(crs).is_geographic)


def _cut_at_antimeridian(polygon: Polygon) -> list[Polygon]:
    lon = shapely.get_coordinates(polygon.exterior)[:, 0]
    if (np.abs(np.diff(lon)) <= 180).all() and (np.abs(lon) <= 180).all():
        return [polygon]
    import antimeridian

    fixed = antimeridian.fix_polygon(polygon, fix_winding=False)
    return vectorize.repair(fixed)


# Files ----------------------------------------------------------------------------------------------------------------


def _check_ending(out: Path) -> None:
    if out.suffix.lower() not in ENDINGS:
        raise ExportError(f"{out.name}: no format has this ending; use one of {', '.join(ENDINGS)}")


def _frame(features: Sequence[_Feature]) -> GeoDataFrame:
    import geopandas

    names = ("id", "label", "score", "area_m2", "scene", "tasks", "annotations")
    columns = {name: [feature.properties[name] for feature in features] for name in names}
    frame = geopandas.GeoDataFrame(columns, geometry=[feature.geometry for feature in features], crs="EPSG:4326")
    return frame.astype({"score": float, "area_m2": float})


def write(frame: GeoDataFrame, out: Path) -> int:
    """Write features in EPSG:4326 as the ending of ``out`` says, whole or not at all. Returns how many there are."""
    import pyogrio

    _check_ending(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".export-"))
    try:
        path = folder / out.name
        match out.suffix.lower():
            case ".parquet":
                frame.to_parquet(
                    path, compression="zstd", schema_version="1.1.0", write_covering_bbox=True, index=False
                )
            case ".geojson" | ".json":
                _write_geojson(frame, path)
            case ending:
                flat = frame.assign(**{name: frame[name].map(json.dumps) for name in _list_columns(frame)})
                if ending == ".shp":
                    # The format cuts names at ten characters.
                    flat = flat.rename(columns={"annotations": "annots"})
                pyogrio.write_dataframe(flat, path, geometry_type="MultiPolygon", promote_to_multi=True)
        # A Shapefile is several files; the one that is asked for comes last.
        for part in sorted(folder.iterdir(), key=lambda part: part.name == out.name):
            os.replace(part, out.parent / part.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return len(frame)


def _write_geojson(frame: GeoDataFrame, path: Path) -> None:
    import pyogrio

    if frame.empty:
        path.write_text('{"type": "FeatureCollection", "features": []}\n', encoding="utf-8")
        return
    is_single = bool((frame.geom_type == "Polygon").all())
    pyogrio.write_dataframe(
        frame,
        path,
        driver="GeoJSON",
        use_arrow=True,
        geometry_type="Polygon" if is_single else "Unknown",
        layer_options={"RFC7946": "YES", "WRITE_BBOX": "YES", "COORDINATE_PRECISION": str(DECIMALS)},
    )


def _list_columns(frame: GeoDataFrame) -> list[str]:
    return [name for name in ("tasks", "annotations") if name in frame]


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def report_page(report: ExportReport) -> str:
    """The report as an HTML page that needs nothing else."""
    rows: list[tuple[str, str]] = []
    for name, value in asdict(report).items():
        if isinstance(value, dict):
            rows += [(f"{name}: {key}", str(inner)) for key, inner in value.items()]
        elif isinstance(value, list):
            rows += [
                (
                    f"{name} {number}",
                    "; ".join(f"{k}: {v}" for k, v in entry.items()) if isinstance(entry, dict) else str(entry),
                )
                for number, entry in enumerate(value, 1)
            ]
        else:
            rows.append((name, str(value)))
    cells = "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>GeoPrelabel export</title>\n'
        "<style>body{font:15px system-ui;margin:2rem;max-width:60rem}th{text-align:left;vertical-align:top;"
        "padding:.3rem 1.5rem .3rem 0;font-weight:600}td{padding:.3rem 0;overflow-wrap:anywhere}</style>\n"
        f"<h1>Export</h1>\n<p>{html.escape(report.sentence())}</p>\n<table>\n{cells}\n</table>\n</html>\n"
    )


# Judging --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well predicted polygons lie on true ones."""

    f1: float
    precision: float
    recall: float
    mean_iou: float | None
    """Of matched pairs."""

    polis_m: float | None
    """Mean distance of each one's vertices to the other's outline, over matched pairs, in metres (PoLiS)."""

    vertex_ratio: float | None
    """Vertices of matched predictions over those of their truth."""

    invalid_rate: float
    predicted: int
    truth: int
    matched: int


def evaluate(predicted: Path, truth: Path, *, label: str | None = None, iou: float = 0.5) -> Evaluation:
    """Match polygons one to one at that IoU, in the local UTM zone; of one label, where both files name labels.

    ``label`` judges the polygons of that label alone. Raises ExportError where a file cannot be read as polygons.
    """
    guesses, truths = _polygons_of(predicted, label), _polygons_of(truth, label)
    invalid = sum(not shape.is_valid for _, shape in guesses)
    both = [shape for _, shape in (*guesses, *truths)]
    counts = len(guesses), len(truths)
    if not guesses or not truths:
        perfect = float(counts == (0, 0))
        return Evaluation(perfect, perfect, perfect, None, None, None, invalid / max(1, counts[0]), *counts, 0)
    to_utm = _utm(both)
    a, b = ([(name, _metres(shape, to_utm)) for name, shape in listed] for listed in (guesses, truths))
    pairs = _matches(a, b, iou)
    matched = len(pairs)
    vertices = [
        sum(int(shapely.get_num_coordinates(shape)) for shape in side)
        for side in ([a[i][1] for i, _, _ in pairs], [b[j][1] for _, j, _ in pairs])
    ]
    return Evaluation(
        f1=2 * matched / sum(counts),
        precision=matched / counts[0],
        recall=matched / counts[1],
        mean_iou=sum(share for _, _, share in pairs) / matched if matched else None,
        polis_m=sum(polis(a[i][1], b[j][1]) for i, j, _ in pairs) / matched if matched else None,
        vertex_ratio=vertices[0] / vertices[1] if matched else None,
        invalid_rate=invalid / counts[0],
        predicted=counts[0],
        truth=counts[1],
        matched=matched,
    )


def polis(a: BaseGeometry, b: BaseGeometry) -> float:
    """Mean distance of the vertices of each to the outline of the other, in their units (Avbelj and others, 2015)."""
    return sum(
        float(shapely.distance(shapely.points(shapely.get_coordinates(one)), other.boundary).mean()) / 2
        for one, other in ((a, b), (b, a))
    )


def _polygons_of(path: Path, label: str | None) -> list[tuple[str | None, BaseGeometry]]:
    """Label and shape (lon/lat) of each polygon or multipolygon in a vector file."""
    frame = _read_frame(path)
    if frame.crs is not None:
        frame = frame.to_crs("EPSG:4326")
    named = "label" in frame.columns
    rows = zip(frame["label"] if named else [None] * len(frame), frame.geometry, strict=True)
    return [
        (None if name is None else str(name), shape)
        for name, shape in rows
        if isinstance(shape, (Polygon, MultiPolygon)) and not shape.is_empty and (label is None or str(name) == label)
    ]


def _read_frame(path: Path) -> GeoDataFrame:
    import geopandas
    import pyogrio

    if not path.exists():
        raise ExportError(f"{path} is not there")
    try:
        if path.suffix.lower() == ".parquet":
            return geopandas.read_parquet(path)
        return pyogrio.read_dataframe(path)
    except Exception as error:  # each driver raises its own
        raise ExportError(f"{path} cannot be read as vector data: {error}") from error


def _utm(shapes: Sequence[BaseGeometry]) -> pyproj.Transformer:
    lon, lat = shapely.get_coordinates(np.array(shapes, dtype=object)).mean(axis=0)
    zone = int((lon + 180) // 6) % 60 + 1
    return pyproj.Transformer.from_crs(
        "EPSG:4326", f"EPSG:{32600 + zone if lat >= 0 else 32700 + zone}", always_xy=True
    )


def _metres(shape: BaseGeometry, to_utm: pyproj.Transformer) -> BaseGeometry:
    moved = shapely.transform(shape, lambda points: np.column_stack(to_utm.transform(points[:, 0], points[:, 1])))
    return shapely.union_all(vectorize.repair(moved))


def _matches(
    a: Sequence[tuple[str | None, BaseGeometry]], b: Sequence[tuple[str | None, BaseGeometry]], least: float
) -> list[tuple[int, int, float]]:
    """Pairs of numbers and their IoU, one to one, the best first."""
    pairs = STRtree([shape for _, shape in b]).query([shape for _, shape in a], predicate="intersects").T.tolist()
    scored = []
    for i, j in pairs:
        names = a[i][0], b[j][0]
        if None not in names and names[0] != names[1]:
            continue
        shared = a[i][1].intersection(b[j][1]).area
        share = shared / (a[i][1].area + b[j][1].area - shared)
        if share >= least:
            scored.append((i, j, share))
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    matched = []
    for i, j, share in sorted(scored, key=lambda pair: -pair[2]):
        if i not in taken_a and j not in taken_b:
            taken_a.add(i)
            taken_b.add(j)
            matched.append((i, j, share))
    return matched


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a file."""

    feature: int | None
    """Number of the feature (or task), from 0; None where it is the file."""

    reason: str

    def __str__(self) -> str:
        return self.reason if self.feature is None else f"feature {self.feature}: {self.reason}"


def validate(path: Path) -> list[Finding]:
    """What is wrong with an export or with a Label Studio JSON; an empty list for a sound one.

    Looks for empty and invalid shapes, places off the Earth and, in GeoJSON, for what RFC 7946 forbids.
    Raises ExportError where the file cannot be read at all.
    """
    if path.suffix.lower() in (".geojson", ".json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ExportError(f"{path} is not there") from error
        except ValueError as error:
            raise ExportError(f"{path} is not JSON: {error}") from error
        if isinstance(content, list):
            return _wrong_tasks(content)
        return _wrong_geojson(content)
    frame = _read_frame(path)
    findings = []
    if frame.crs is None or frame.crs.to_epsg() != 4326:
        findings.append(Finding(None, f"the CRS must be EPSG:4326, got {frame.crs}"))
    for number, shape in enumerate(frame.geometry):
        findings += [Finding(number, reason) for reason in _wrong_shape(shape)]
    return findings


def _wrong_shape(shape: BaseGeometry | None) -> list[str]:
    if shape is None or shape.is_empty:
        return ["has no geometry"]
    if not isinstance(shape, (Polygon, MultiPolygon)):
        return [f"must be a Polygon or MultiPolygon, got {shape.geom_type}"]
    reasons = [] if shape.is_valid else [f"is invalid: {shapely.is_valid_reason(shape)}"]
    west, south, east, north = shape.bounds
    if west < -180 or east > 180 or south < -90 or north > 90:
        reasons.append(f"lies off the Earth: west {west:g}, south {south:g}, east {east:g}, north {north:g}")
    return reasons


def _wrong_geojson(content: Any) -> list[Finding]:
    if not isinstance(content, Mapping) or content.get("type") != "FeatureCollection":
        return [Finding(None, "must be a FeatureCollection")]
    features = content.get("features")
    if not isinstance(features, list):
        return [Finding(None, "features must be a list")]
    findings = [Finding(None, "has a crs member, which RFC 7946 does not allow")] if "crs" in content else []
    for number, feature in enumerate(features):
        geometry = feature.get("geometry") if isinstance(feature, Mapping) else None
        if not isinstance(geometry, Mapping):
            findings.append(Finding(number, "has no geometry"))
            continue
        try:
            rings = _wrong_rings(geometry)
            shape = shapely.geometry.shape(dict(geometry))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, shapely.errors.ShapelyError):
            findings.append(Finding(number, "has a geometry that cannot be read"))
            continue
        findings += [Finding(number, reason) for reason in (*_wrong_shape(shape), *rings)]
    return findings


def _wrong_rings(geometry: Mapping[str, Any]) -> list[str]:
    """What is wrong with how rings are written: closed, shells counter-clockwise, holes clockwise."""
    listed = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}.get(
        str(geometry["type"]), []
    )
    reasons = []
    for rings in listed:
        for number, points in enumerate(rings):
            ring = np.asarray(points, np.float64)[:, :2]
            if len(ring) < 4 or not np.array_equal(ring[0], ring[-1]):
                reasons.append("has a ring that is not closed")
                continue
            if shapely.is_ccw(shapely.linearrings(ring)) != (number == 0):
                reasons.append("has a clockwise shell" if number == 0 else "has a counter-clockwise hole")
    return reasons


def _wrong_tasks(tasks: Sequence[Any]) -> list[Finding]:
    """What an export would stumble over in Label Studio's JSON."""
    findings = []
    for number, task in enumerate(tasks):
        if not isinstance(task, Mapping):
            findings.append(Finding(number, "is not a task"))
            continue
        try:
            _, tile = next(_tiles(task, None))
            for annotation in labelstudio.chosen_annotations(task):
                read = labelstudio.read_annotation(annotation, tile)
                findings += [Finding(number, reason) for reason in read.dropped if _is_damage(reason)]
        except (BadTile, BadRequest) as error:
            findings.append(Finding(number, str(error)))
    return findings
