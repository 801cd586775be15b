"""Validation: what is wrong with an export, or with annotations before they are exported."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import MultiPolygon, Point, Polygon, STRtree
from shapely.geometry.base import BaseGeometry

from . import labelstudio, rfc7946
from .annotations import is_damage, objects_of, tasks_in, tiles_of
from .errors import BackendError, BadConfig, BadRequest, BadTile, ExportError
from .findings import Finding
from .formats import read_frame
from .ground import areas_m2
from .labelstudio import LabelConfig
from .tile import Region, Tile

SELF_CROSSING = "self-crossing"
OVERLAP = "overlap"
DUPLICATE = "duplicate"
OUTSIDE = "outside"
TOO_SMALL = "too small"
LABEL = "label"
UNREADABLE = "unreadable"
PLACE = "place"
SCHEMA = "schema"
RFC_7946 = "RFC 7946"
REASONS = (SELF_CROSSING, OVERLAP, DUPLICATE, OUTSIDE, TOO_SMALL, LABEL, UNREADABLE, PLACE, SCHEMA, RFC_7946)
"""Every `Finding.reason` there is."""

_SAME_IOU = 0.95
"""Two outlines that share so much are one object drawn twice."""

_OUTSIDE_PCT = 0.01
"""What Label Studio's own arithmetic leaves beyond the border of the image, in percent."""

_MAX_PAIRS = 20_000
"""Pairs of outlines of one task that are looked at: one drawn a thousand times must not hold up the rest."""

_BLOCK = 4096
"""Features whose neighbours are looked for at once."""

_LINE_ENDINGS = (".geojsonl", ".geojsons", ".ndjson", ".jsonl")


@dataclass(frozen=True, slots=True)
class Limits:
    """What counts as too much overlap and as too small."""

    max_overlap: float = 0.1
    """Share of the smaller of two outlines of one label that the other may cover, 0…1."""

    min_area_m2: float = 1.0
    """Smallest object where its place on Earth is known, in square metres."""

    min_area_px: float = 10.0
    """Smallest object on a photo without a place, in square pixels of the image."""


# --- Annotations ---


def annotation_findings(
    annotation: Mapping[str, Any],
    task: Mapping[str, Any],
    *,
    label_config: str | None = None,
    limits: Limits | None = None,
) -> list[Finding]:
    """What is wrong with an annotation, region by region; nothing for a skipped one.

    ``label_config`` is the project's, where known: it tells prompts from regions, and which labels there are.
    Raises BadRequest where ``annotation`` is not an annotation at all.
    """
    limits = limits or Limits()
    if not isinstance(annotation, Mapping) or not isinstance(annotation.get("result") or [], list):
        raise BadRequest(f"an annotation must be an object with a list of results, got {annotation!r:.80}")
    if annotation.get("was_cancelled"):
        return []
    check = _AnnotationCheck(annotation, task, limits)
    check.run(label_config)
    return check.found


class _AnnotationCheck:
    """One annotation under examination."""

    def __init__(self, annotation: Mapping[str, Any], task: Mapping[str, Any], limits: Limits) -> None:
        self._results = [item for item in annotation.get("result") or [] if isinstance(item, Mapping)]
        self._skipped = len(annotation.get("result") or []) - len(self._results)
        self._task = task
        self._limits = limits
        self._numbers = _number(task.get("id")), _number(annotation.get("id"))
        self.found: list[Finding] = []

    def run(self, label_config: str | None) -> None:
        if self._skipped:
            self._find(UNREADABLE, f"{self._skipped} results are no objects")
        config, labels = _known(label_config)
        by_image: dict[str, list[Mapping[str, Any]]] = {}
        for item in self._results:
            by_image.setdefault(str(item.get("to_name")), []).append(item)
        for to_name, on_image in by_image.items():
            tile, has_size = self._tile(to_name, on_image, config)
            read = labelstudio.read_annotation({"result": on_image}, tile, config=config)
            if any(is_damage(reason) for reason in read.dropped):
                self._damage(on_image, tile, config)
            self._outside(on_image, tile, {region.id for region in read.regions})
            self._labels(on_image, read.regions, labels)
            if has_size:
                self._too_small(read.regions, tile)
            self._shared_ground(read.regions)

    def _find(self, reason: str, message: str, region: str = "") -> None:
        task, annotation = self._numbers
        # Two checks can see the same thing.
        if not any(item.reason == reason and item.region == region and region for item in self.found):
            self.found.append(Finding(reason, message, task=task, annotation=annotation, region=region))

    def _tile(
        self, to_name: str, results: Sequence[Mapping[str, Any]], config: LabelConfig | None
    ) -> tuple[Tile, bool]:
        """Where the image lies, and whether its size in pixels is known."""
        size = next(
            (
                (item["original_width"], item["original_height"])
                for item in results
                if _is_size(item.get("original_width")) and _is_size(item.get("original_height"))
            ),
            None,
        )
        data = self._task.get("data")
        try:
            if not isinstance(data, Mapping):
                raise BadRequest("the task has no data object")
            tag = next((tag for tag in config.tags if tag.to_name == to_name), None) if config else None
            urls = (
                [labelstudio.image_of(self._task, tag)]
                if tag
                else [text for text in data.values() if isinstance(text, str)]
            )
            tiles = (Tile.from_task(data, image_url=url, size=size) for url in urls or [""])
            tile = next((tile for tile in tiles if tile is not None), None)
            if tile is not None and tile.has_place:
                tile.ground_size_m()  # raises where the CRS does not reach the tile
            if tile is not None:
                return tile, True
        except (BadTile, BadRequest) as error:
            self._find(PLACE, str(error))
        return Tile(size=size or (1000, 1000)), size is not None

    def _damage(self, results: Sequence[Mapping[str, Any]], tile: Tile, config: LabelConfig | None) -> None:
        """Which result had to be mended or left out, and why."""
        seen: set[str] = set()
        for result in results:
            identity = _id_of(result)
            if identity and identity in seen:
                continue
            alone = labelstudio.read_annotation({"result": [result]}, tile, config=config)
            seen |= {region.id for region in alone.regions}
            for reason in filter(is_damage, alone.dropped):
                self._find(*_said(reason), identity)

    def _outside(self, results: Sequence[Mapping[str, Any]], tile: Tile, regions: set[str]) -> None:
        for result in results:
            identity = _id_of(result)
            outline_px = labelstudio.outline_px(result, tile.size) if identity in regions else None
            if outline_px is None:
                continue
            over_pct = np.maximum(-outline_px, outline_px - tile.size) / tile.size * 100
            if (farthest := float(over_pct.max())) > _OUTSIDE_PCT:
                self._find(
                    OUTSIDE, f"reaches {farthest:.2g} % of the image beyond its border; move it inside", identity
                )

    def _labels(
        self,
        results: Sequence[Mapping[str, Any]],
        regions: Sequence[Region],
        labels: Mapping[str, frozenset[str]] | None,
    ) -> None:
        tags: dict[str, set[str]] = {}
        for result in results:
            tags.setdefault(_id_of(result), set()).add(str(result.get("from_name")))
        for region in regions:
            if not region.label:
                self._find(LABEL, "has no label; pick one", region.id)
                continue
            if labels is None:
                continue
            named = tags.get(region.id, set())
            offered = [labels[name] for name in named if name in labels]
            if not offered:
                self._find(LABEL, f"the label config has no tag {' or '.join(sorted(named))!r}", region.id)
            elif not any(region.label in names or not names for names in offered):
                self._find(LABEL, f"the label config has no label {region.label!r}", region.id)

    def _too_small(self, regions: Sequence[Region], tile: Tile) -> None:
        m2_per_px, least, unit = 1.0, self._limits.min_area_px, "square pixels"
        if tile.has_place:
            try:
                m2_per_px, least, unit = tile.ground_size_m() ** 2, self._limits.min_area_m2, "m²"
            except BadTile:
                return
        for parts in objects_of(regions):
            area = sum(part.polygon.area for part in parts) * m2_per_px
            if area < least:
                self._find(TOO_SMALL, f"covers {area:.2g} {unit}, less than {least:g}", parts[0].id)

    def _shared_ground(self, regions: Sequence[Region]) -> None:
        objects = objects_of(regions)
        shapes = np.array([shapely.union_all([part.polygon for part in parts]) for parts in objects], object)
        for first, second, reason, message in _pairs(
            shapes, [parts[0].label for parts in objects], self._limits, most=_MAX_PAIRS
        ):
            other, this = objects[first][0], objects[second][0]
            self._find(reason, f"{message} region {other.id} ({other.label or 'no label'})", this.id)


@functools.lru_cache(maxsize=64)
def _known(label_config: str | None) -> tuple[LabelConfig | None, Mapping[str, frozenset[str]] | None]:
    """What a label config says of prompts and of labels; None where it cannot be read."""
    if not label_config:
        return None, None
    try:
        labels = labelstudio.labels_by_tag(label_config)
    except BadConfig:
        return None, None
    try:
        return labelstudio.parse_config(label_config), labels
    except BadConfig:  # brushes or boxes only
        return None, labels


def _said(reason: str) -> tuple[str, str]:
    """Kind and sentence for what `labelstudio.read_annotation` had to change."""
    if reason.startswith("self-crossing"):
        return SELF_CROSSING, "the outline crosses itself; draw it again"
    if reason.startswith("hole that reaches"):
        return SELF_CROSSING, "a hole reaches over the outline or another hole; draw it again"
    if reason.startswith("a bridge"):
        return SELF_CROSSING, f"{reason}; draw the hole again"
    if reason == labelstudio.OUTSIDE:
        return OUTSIDE, "lies wholly outside the image; delete it"
    return UNREADABLE, f"{reason}; draw it again"


def _pairs(
    shapes: NDArray[np.object_], labels: Sequence[str], limits: Limits, *, most: int | None = None
) -> Iterator[tuple[int, int, str, str]]:
    """Pairs of shapes that cover the same ground: numbers of the first and of the one at fault, reason, and a sentence.

    The sentence wants the first one's name at its end. The smaller is at fault, of two that are the same the later.
    """
    tree = STRtree(shapes)
    seen = 0
    for start in range(0, len(shapes), _BLOCK if most is None else 64):
        block = shapes[start : start + (_BLOCK if most is None else 64)]
        mine, others = tree.query(block, predicate="intersects")
        mine = mine + start
        keep = mine < others
        mine, others = mine[keep], others[keep]
        if most is not None:
            mine, others = mine[: most - seen], others[: most - seen]
            seen += len(mine)
        a, b = shapes[mine], shapes[others]
        # Invalid shapes are findings of their own, and what they share cannot be told.
        sound = shapely.is_valid(a) & shapely.is_valid(b)
        mine, others, a, b = mine[sound], others[sound], a[sound], b[sound]
        shared = shapely.area(shapely.intersection(a, b))
        of_a, of_b = shapely.area(a), shapely.area(b)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = np.nan_to_num(shared / (of_a + of_b - shared))
            share = np.nan_to_num(shared / np.minimum(of_a, of_b))
        for k in np.flatnonzero((iou >= _SAME_IOU) | (share > limits.max_overlap)).tolist():
            i, j = int(mine[k]), int(others[k])
            if iou[k] >= _SAME_IOU:
                yield i, j, DUPLICATE, "is drawn twice: the same outline as"
            elif labels[i] == labels[j]:
                first, fault = (i, j) if of_b[k] <= of_a[k] else (j, i)
                yield first, fault, OVERLAP, f"{share[k]:.0%} of it is also covered by"
        if most is not None and seen >= most:
            return


def _id_of(result: Mapping[str, Any]) -> str:
    identity = result.get("id")
    return identity if isinstance(identity, str) else ""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def task_findings(
    tasks: Iterable[Mapping[str, Any]], *, label_config: str | None = None, limits: Limits | None = None
) -> Iterator[Finding]:
    """What is wrong with the annotations of Label Studio's JSON tasks, one task after the other.

    Also says which tasks have no place on Earth: an export would leave them out.
    """
    config = _known(label_config)[0]
    for number, task in enumerate(tasks):
        try:
            list(tiles_of(task, config))
        except (BadTile, BadRequest) as error:
            yield Finding(PLACE, str(error), number, task=_number(task.get("id")))
            said = {PLACE}
        else:
            said = set()
        listed = task.get("annotations") or []
        for annotation in listed if isinstance(listed, list) else [listed]:
            try:
                found = annotation_findings(annotation, task, label_config=label_config, limits=limits)
            except BackendError as error:
                found = [Finding(UNREADABLE, str(error), task=_number(task.get("id")))]
            yield from (replace(finding, feature=number) for finding in found if finding.reason not in said)


def counted(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each reason, the most frequent first."""
    return dict(Counter(finding.reason for finding in findings).most_common())


# --- Files ---


def validate(path: Path, *, label_config: str | None = None, limits: Limits | None = None) -> list[Finding]:
    """What is wrong with an export or with a Label Studio JSON; an empty list for a sound one.

    Annotations are checked as `annotation_findings` does. Features are checked for invalid and empty shapes, places off
    the Earth, overlaps within a label, what is drawn twice, what is too small, labels (those of ``label_config`` where
    it is given), ids and scores; GeoJSON for what RFC 7946 asks as well. JSON is read piece by piece, and of features
    only their shapes are held. Raises ExportError or BadRequest where the file cannot be read at all.
    """
    limits = limits or Limits()
    if path.suffix.lower() in _LINE_ENDINGS:
        return _Features(limits, label_config).of_geojson(_lines(path))
    if path.suffix.lower() in (".geojson", ".json"):
        if _first_character(path) == "[":
            try:
                return list(task_findings(tasks_in(path), label_config=label_config, limits=limits))
            except RecursionError as error:
                raise ExportError(f"{path} is nested too deeply to be Label Studio's JSON") from error
        return _Features(limits, label_config).of_geojson(_members(path))
    return _Features(limits, label_config).of_table(path)


class _Features:
    """The features of a file under examination."""

    def __init__(self, limits: Limits, label_config: str | None) -> None:
        _, labels = _known(label_config)
        self._offered = frozenset().union(*labels.values()) if labels else frozenset()
        self._limits = limits
        self._shapes: list[BaseGeometry] = []
        self._labels: list[str] = []
        self._numbers: list[int] = []
        self._ids: set[str] = set()
        self._names: list[str] = []
        self._count = 0
        self._without_label: list[int] = []
        self.found: list[Finding] = []

    def of_geojson(self, members: Iterable[tuple[str, Any]]) -> list[Finding]:
        rest: dict[str, Any] = {}
        coco = _Coco(self._limits, self._offered)
        for name, value in members:
            if not isinstance(value, _Item):
                rest[name] = value
            elif name == "features":
                self._geojson_feature(value.value)
            else:
                coco.add(value.value)
        if "annotations" in rest and "categories" in rest:
            return coco.finish(rest.get("images"), rest["categories"])
        if rest.get("type") == "Feature":
            self._geojson_feature(rest)
            self.found += [Finding(SCHEMA, fault) for fault in _stac_faults(rest)]
            self._without_label.clear()
            return self._finish()
        if "type" not in rest and not rest.get("features"):
            self.found.append(Finding(SCHEMA, "must be a GeoJSON FeatureCollection or a list of Label Studio tasks"))
            return self.found
        faults = [Finding(RFC_7946, fault) for fault in rfc7946.collection_faults(rest)]
        return faults + self._finish()

    def of_table(self, path: Path) -> list[Finding]:
        frame = read_frame(path)
        if frame.crs is None or frame.crs.to_epsg() != 4326:
            self.found.append(Finding(PLACE, f"the CRS must be EPSG:4326, got {frame.crs}"))
        names = [name for name in ("id", "label", "score") if name in frame.columns]
        for values in zip(frame.geometry, *(frame[name] for name in names), strict=True):
            self._feature(values[0], dict(zip(names, values[1:], strict=True)), values[0] is not None)
        return self._finish()

    def _geojson_feature(self, feature: Any) -> None:
        for fault in rfc7946.feature_faults(feature):
            self.found.append(Finding(RFC_7946, fault, self._count))
        geometry = feature.get("geometry") if isinstance(feature, Mapping) else None
        properties = feature.get("properties") if isinstance(feature, Mapping) else None
        shape = None
        if isinstance(geometry, Mapping):
            try:
                shape = shapely.geometry.shape(dict(geometry))
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, shapely.errors.ShapelyError):
                self.found.append(Finding(UNREADABLE, "has a geometry that cannot be read", self._count))
        listed = dict(properties) if isinstance(properties, Mapping) else {}
        if isinstance(feature, Mapping) and "id" in feature:
            listed.setdefault("id", feature["id"])
        self._feature(shape, listed, isinstance(geometry, Mapping))

    def _feature(self, shape: BaseGeometry | None, properties: Mapping[str, Any], has_geometry: bool) -> None:
        number = self._count
        self._count += 1

        def find(reason: str, message: str) -> None:
            self.found.append(Finding(reason, message, number))

        identity = properties.get("id")
        if identity is not None and str(identity) in self._ids:
            find(SCHEMA, f"has the id {str(identity)[:60]!r}, which another feature has")
        self._ids.add(str(identity))
        self._names.append("" if identity is None else str(identity)[:60])
        score = properties.get("score")
        if isinstance(score, (int, float)) and not isinstance(score, bool) and (score < 0 or score > 1):
            find(SCHEMA, f"has the score {score:g}, which is not from 0 to 1")
        label = properties.get("label")
        if not isinstance(label, str) or not label:
            self._without_label.append(number)
            label = ""
        elif self._offered and label not in self._offered:
            find(LABEL, f"the label config has no label {label[:60]!r}")
        if shape is None:
            if not has_geometry:
                find(UNREADABLE, "has no geometry")
            return
        if shape.is_empty:
            find(UNREADABLE, "has an empty geometry")
            return
        west, south, east, north = shape.bounds
        if min(west + 180, south + 90, 180 - east, 90 - north) < 0:
            find(OUTSIDE, f"lies off the Earth: west {west:g}, south {south:g}, east {east:g}, north {north:g}")
            return
        if isinstance(shape, Point):
            return
        if not isinstance(shape, (Polygon, MultiPolygon)):
            find(SCHEMA, f"must be a Polygon, MultiPolygon or Point, got {shape.geom_type}")
            return
        if not shape.is_valid:
            find(SELF_CROSSING, f"is invalid: {shapely.is_valid_reason(shape)}")
            return
        self._shapes.append(shape)
        self._labels.append(label)
        self._numbers.append(number)

    def _finish(self) -> list[Finding]:
        if self._count and len(self._without_label) == self._count:
            self.found.append(Finding(SCHEMA, "no feature has a label"))
        else:
            self.found += [Finding(LABEL, "has no label", number) for number in self._without_label]
        shapes = np.array(self._shapes, object)
        for start in range(0, len(shapes), _BLOCK):
            areas = areas_m2(shapes[start : start + _BLOCK])
            for k in np.flatnonzero(areas < self._limits.min_area_m2).tolist():
                message = f"covers {areas[k]:.2g} m², less than {self._limits.min_area_m2:g}"
                self.found.append(Finding(TOO_SMALL, message, self._numbers[start + k]))
        for first, fault, reason, message in _pairs(shapes, self._labels, self._limits):
            other = self._numbers[first]
            named = f" ({self._names[other]})" if self._names[other] else ""
            self.found.append(Finding(reason, f"{message} feature {other}{named}", self._numbers[fault]))
        self.found.sort(key=lambda finding: -1 if finding.feature is None else finding.feature)
        return [f if f.feature is None else replace(f, name=self._names[f.feature]) for f in self.found]


def _stac_faults(item: Mapping[str, Any]) -> list[str]:
    """What a STAC item lacks; nothing for a Feature that is none."""
    if "stac_version" not in item:
        return []
    properties = item.get("properties")
    times = properties if isinstance(properties, Mapping) else {}
    faults = [f"a STAC item needs {name}" for name in ("id", "links", "assets") if name not in item]
    if item.get("geometry") is not None and "bbox" not in item:
        faults.append("a STAC item with a geometry needs bbox")
    if times.get("datetime") is None and not {"start_datetime", "end_datetime"} <= times.keys():
        faults.append("a STAC item needs properties.datetime, or start_datetime and end_datetime")
    return faults


class _Coco:
    """The annotations of a COCO file under examination, in pixels of their images."""

    def __init__(self, limits: Limits, offered: frozenset[str]) -> None:
        self._limits = limits
        self._offered = offered
        self._ids: set[Any] = set()
        self._count = 0
        self._placed: dict[Any, list[tuple[int, Any, BaseGeometry | None]]] = {}
        self._found: list[Finding] = []

    def add(self, annotation: Any) -> None:
        number = self._count
        self._count += 1
        if not isinstance(annotation, Mapping):
            self._found.append(Finding(SCHEMA, "is not an object", number))
            return
        identity, image, category = (_key(annotation.get(name)) for name in ("id", "image_id", "category_id"))
        if identity is None or identity in self._ids:
            self._found.append(Finding(SCHEMA, f"needs an id of its own, got {annotation.get('id')!r:.40}", number))
        self._ids.add(identity)
        shape = None
        outlines = annotation.get("segmentation")
        if isinstance(outlines, list):
            try:
                rings = [np.array(ring, np.float64).reshape(-1, 2) for ring in outlines]
                parts = [Polygon(ring) for ring in rings]
            except (ValueError, TypeError, shapely.errors.ShapelyError):
                self._found.append(Finding(UNREADABLE, "has a segmentation that cannot be read", number))
            else:
                if not parts or not all(part.is_valid for part in parts):
                    self._found.append(Finding(SELF_CROSSING, "has no outline, or one that crosses itself", number))
                else:
                    shape = shapely.union_all(parts)
        elif isinstance(outlines, Mapping):
            size, box = outlines.get("size"), annotation.get("bbox")
            # Run lengths are left packed: where the box lies tells enough of where they do.
            is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)
            if not isinstance(size, list) or len(size) != 2 or "counts" not in outlines:
                self._found.append(Finding(UNREADABLE, "has run lengths without size and counts", number))
            if not is_box:
                self._found.append(Finding(SCHEMA, f"has the bbox {box!r:.40} instead of four numbers", number))
        else:
            self._found.append(Finding(UNREADABLE, "has no segmentation", number))
        self._placed.setdefault(image, []).append((number, category, shape))

    def finish(self, images: Any, categories: Any) -> list[Finding]:
        sizes = {_key(item.get("id")): (item.get("width"), item.get("height")) for item in _objects(images)}
        names = {_key(item.get("id")): str(item.get("name")) for item in _objects(categories)}
        files = Counter(str(item.get("file_name")) for item in _objects(images))
        self._found += [
            Finding(SCHEMA, f"{count} images are called {name[:80]!r}") for name, count in files.items() if count > 1
        ]
        self._found += [
            Finding(LABEL, f"the label config has no label {name[:60]!r}")
            for name in names.values()
            if self._offered and name not in self._offered
        ]
        for image, placed in self._placed.items():
            self._check_image(sizes.get(image), image, placed, names)
        return sorted(self._found, key=lambda finding: -1 if finding.feature is None else finding.feature)

    def _check_image(
        self,
        size: tuple[Any, Any] | None,
        image: Any,
        placed: Sequence[tuple[int, Any, BaseGeometry | None]],
        names: Mapping[Any, str],
    ) -> None:
        for number, category, shape in placed:
            if size is None:
                self._found.append(Finding(SCHEMA, f"names the image {image!r:.40}, which is not there", number))
            if category not in names:
                self._found.append(Finding(LABEL, f"names the category {category!r:.40}, which is not there", number))
            if shape is None:
                continue
            if size is not None and _is_size(size[0]) and _is_size(size[1]):
                tolerance_px = max(size) * _OUTSIDE_PCT / 100
                left, top, right, bottom = shape.bounds
                if min(left, top, size[0] - right, size[1] - bottom) < -tolerance_px:
                    self._found.append(Finding(OUTSIDE, "reaches beyond its image", number))
            if shape.area < self._limits.min_area_px:
                message = f"covers {shape.area:.2g} square pixels, less than {self._limits.min_area_px:g}"
                self._found.append(Finding(TOO_SMALL, message, number))
        whole = [(number, category, shape) for number, category, shape in placed if shape is not None]
        shapes = np.array([shape for _, _, shape in whole], object)
        for first, fault, reason, message in _pairs(shapes, [str(category) for _, category, _ in whole], self._limits):
            self._found.append(Finding(reason, f"{message} annotation {whole[first][0]}", whole[fault][0]))


def _key(value: Any) -> Any:
    """The value where it can be an id; None for anything else."""
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


# --- JSON, piece by piece ---


@dataclass(frozen=True, slots=True)
class _Item:
    """One element of an array that is not held whole."""

    value: Any


_CHUNK_CHARS = 1 << 20


class _Reader:
    """Reads values off a JSON text without holding it whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open(encoding="utf-8")
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder(parse_constant=_no_constant)

    def close(self) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """The next character, which must be one of those."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.bad(f"expected {' or '.join(wanted)}, got {found or 'its end'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise self.bad(str(error)) from error
            except (ValueError, RecursionError) as error:
                raise self.bad(str(error)) from error
            # A number may go on in what is not read yet.
            if end < len(self._text) or not self._more():
                self._at = end
                return found

    def bad(self, why: str) -> ExportError:
        return ExportError(f"{self._path} is not JSON: {why}")

    def _more(self) -> bool:
        try:
            # As much again as was not enough: a long value is not looked at over and over.
            chunk = self._file.read(max(_CHUNK_CHARS, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            raise self.bad(str(error)) from error
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _opened(path: Path) -> _Reader:
    try:
        return _Reader(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path} is not there") from error
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error


def _first_character(path: Path) -> str:
    reader = _opened(path)
    try:
        return reader.peek()
    finally:
        reader.close()


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    """The members of a JSON object in a file; those of an array one by one, as `_Item`."""
    reader = _opened(path)
    try:
        reader.take("{")
        if reader.peek() == "}":
            return
        while True:
            name = reader.value()
            reader.take(":")
            if name in ("features", "annotations") and reader.peek() == "[":
                reader.take("[")
                yield name, []
                if reader.peek() == "]":
                    reader.take("]")
                else:
                    while True:
                        yield name, _Item(reader.value())
                        if reader.take(",]") == "]":
                            break
            else:
                yield str(name), reader.value()
            if reader.take(",}") == "}":
                break
        if reader.peek():
            raise reader.bad("something follows its end")
    finally:
        reader.close()


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The features of newline-delimited GeoJSON, as if they were a collection's."""
    reader = _opened(path)
    try:
        yield "type", "FeatureCollection"
        yield "features", []
        while True:
            # RFC 8142 puts a record separator before each.
            if reader.peek() == "\x1e":
                reader.take("\x1e")
            if not reader.peek():
                return
            yield "features", _Item(reader.value())
    finally:
        reader.close()
