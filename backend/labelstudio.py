"""Label Studio's JSON and label config, both ways. Pure: values in, values out, no network and no files.

Percent lives here and nowhere else: what comes in leaves as tile pixels, what goes out leaves as percent. What each
message looks like, and what Label Studio does with it, is written down in ``docs/label-studio.md``.

One-way decisions:

* Predictions go to an image's ``<PolygonLabels>``; where it has none, to its ``<BrushLabels>``, else its
  ``<BitmaskLabels>``, else its ``<RectangleLabels>`` that are no smart tool, as the same outlines filled or bounded.
  A bare ``<Polygon>`` with a ``<Labels>`` beside it is read back, never written.
* ``<Image valueList=…>`` (several pages) and ``<Repeater>`` are refused: nothing says which page a polygon belongs to.
* Labels from task data (``<PolygonLabels value="$labels">``) are not read; the labels have to stand in the config.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import shapely
from defusedxml import ElementTree
from numpy.typing import NDArray
from shapely import Polygon

from . import vectorize
from .errors import BadConfig, BadPrompt, BadRequest
from .segmenter import Prompts
from .tile import FloatArray, Region, Tile

MAX_CONFIG_CHARS = 200_000
MAX_REASON_CHARS = 119
"""Room that the HTTP status line has for the sentence Label Studio shows."""

MAX_PNG_CHARS = 10_000_000
MAX_RLE_BYTES = 1_000_000
MAX_RLE_PIXELS = 50_000_000

_AS_PAINTED = vectorize.VectorizeOptions(min_area_px=0.0, min_hole_px=0.0, max_vertices=100_000)
"""What a person painted is read whole, however small and however long its outline."""

_PNG_URL = "data:image/png;base64,"

Result = dict[str, Any]
"""One entry of Label Studio's ``result`` list."""

SYNONYMS: tuple[frozenset[str], ...] = (
    frozenset({"building", "building footprint", "footprint", "structure", "house", "home", "hut", "roof", "rooftop"}),
    frozenset({"road", "street", "highway", "roadway", "lane", "carriageway"}),
    frozenset({"water", "water body", "waterbody", "river", "lake", "pond", "stream", "canal", "reservoir", "sea"}),
    frozenset({"vegetation", "greenery", "green", "green area"}),
    frozenset({"tree", "forest", "wood", "woodland", "canopy", "tree canopy"}),
    frozenset({"shrub", "bush"}),
    frozenset({"field", "agricultural field", "agriculture", "parcel", "crop", "cropland", "farm", "farmland"}),
)
"""Names that mean the same thing on an aerial image, singular and lower case. A lawn is vegetation, and no tree."""


# --- Label config ---


@dataclass(frozen=True, slots=True)
class Label:
    """A class that annotators can pick."""

    value: str
    """The name that results carry: the tag's ``alias`` where there is one, else its ``value``."""

    predicted_values: tuple[str, ...] = ()
    """Names of the model's classes that mean this label, as the config lists them."""


ShapeKind = Literal["polygon", "brush", "bitmask", "rectangle"]
"""How an answer draws an object; what says more of its shape comes first."""


@dataclass(frozen=True, slots=True)
class PolygonTag:
    """A tag that takes answers, on one of its images. A tag with two images in ``toName`` makes two of these."""

    from_name: str
    to_name: str

    image_value: str
    """The image tag's ``value``, such as ``$image``, ``$photo.url`` or ``https://host/$name``."""

    labels: tuple[Label, ...]

    model_score_threshold: float | None = None
    """Regions with a lower score are not wanted, 0…1; None where the config does not say."""

    model_skip: bool = False
    """The project wants no predictions for this tag."""

    kind: ShapeKind = "polygon"
    """``<PolygonLabels>``, or one of the tags that stand in for it on an image that has none."""

    @property
    def image_key(self) -> str:
        """Key in the task's data that holds the image; a path such as ``photo.url`` for nested data."""
        return str(_VARIABLE.findall(self.image_value)[0])

    def match(self, known_classes: Iterable[str]) -> dict[str, str]:
        """Which label each of a model's classes is shown as; classes that no label means are left out.

        A label takes the classes that its ``predicted_values`` name; failing that, the class of the same name
        (case and plural aside); failing that, one of ``SYNONYMS``. No class goes to two labels: the surer rule wins,
        then the label that comes first.
        """
        classes = list(dict.fromkeys(known_classes))
        matched: dict[str, str] = {}
        rules = (
            lambda label, name: any(name.casefold().strip() == value.casefold() for value in label.predicted_values),
            lambda label, name: label.value == name,
            lambda label, name: _stem(label.value) == _stem(name),
            lambda label, name: any(_stem(label.value) in group and _stem(name) in group for group in SYNONYMS),
        )
        for rule in rules:
            served = set(matched.values())
            for label in self.labels:
                for name in classes:
                    if label.value not in served and name not in matched and rule(label, name):
                        matched[name] = label.value
        return {name: matched[name] for name in classes if name in matched}

    def unmatched(self, known_classes: Iterable[str]) -> tuple[str, ...]:
        """Labels that no class of the model means: they get no polygons until they are trained."""
        served = set(self.match(known_classes).values())
        return tuple(label.value for label in self.labels if label.value not in served)

    def label_named(self, name: str | None) -> str | None:
        """The label as the config spells it, or None. Case and plural do not count where the exact name is absent."""
        if not name:
            return None
        exact = (label.value for label in self.labels if label.value == name)
        loose = (label.value for label in self.labels if _stem(label.value) == _stem(name))
        return next(exact, None) or next(loose, None)


@dataclass(frozen=True, slots=True)
class PromptTag:
    """A smart tool: what an annotator draws with it is a question to the model."""

    from_name: str
    to_name: str
    kind: Literal["keypoint", "rectangle"]
    labels: tuple[Label, ...] = ()
    """Empty for ``<KeyPoint>`` and ``<Rectangle>``, the recommended form."""

    smart_only: bool = False
    """The tool draws no regions of its own."""


@dataclass(frozen=True, slots=True)
class LabelConfig:
    """What of a project's label config concerns predictions."""

    tags: tuple[PolygonTag, ...]
    """In the config's order; never empty."""

    prompts: tuple[PromptTag, ...]

    hash: str
    """Changes exactly when the config's text does."""

    @property
    def wanted_tags(self) -> tuple[PolygonTag, ...]:
        """The tags that pre-labels are wanted for: those without ``model_skip``."""
        return tuple(tag for tag in self.tags if not tag.model_skip)


def parse_config(xml: str) -> LabelConfig:
    """What a project's label config says.

    Raises BadConfig with one short Latin-1 sentence: Label Studio shows the HTTP reason phrase and nothing else.
    """
    root = _root_of(xml)

    # Label Studio's editor reads tag names in any case.
    named = [(element.tag.casefold(), element) for element in root.iter() if isinstance(element.tag, str)]
    images = {element.get("name", ""): element for kind, element in named if kind == "image"}
    takers: list[tuple[ShapeKind, Element, str]] = []
    prompts: list[PromptTag] = []
    for kind, element in named:
        links = [name for name in _names(element.get("toName")) if name in images]
        if kind in _PROMPT_KINDS and (_is_true(element, "smart") or _is_true(element, "smartOnly")):
            labels, smart_only = _labels(element), _is_true(element, "smartOnly")
            prompts += [
                PromptTag(element.get("name", ""), name, _PROMPT_KINDS[kind], labels, smart_only) for name in links
            ]
        elif kind in _SHAPE_KINDS:
            takers += [(_SHAPE_KINDS[kind], element, name) for name in links]
    order = list(_SHAPE_KINDS.values())
    best: dict[str, ShapeKind] = {}
    for shape, _, name in sorted(takers, key=lambda taker: order.index(taker[0])):
        best.setdefault(name, shape)
    tags = [
        _answer_tag_of(element, name, images[name], shape) for shape, element, name in takers if shape == best[name]
    ]
    if not tags:
        bare = any(kind == "polygon" for kind, _ in named)
        raise _bad_config(
            "Polygon with Labels gets no predictions: use PolygonLabels linked to an Image tag"
            if bare and not any(kind == "polygonlabels" for kind, _ in named)
            else "No PolygonLabels tag linked to an Image tag"
        )
    return LabelConfig(tuple(tags), tuple(prompts), hashlib.sha256(xml.encode()).hexdigest()[:16])


def _root_of(xml: str) -> Element:
    if not isinstance(xml, str) or not xml.strip():
        raise _bad_config("The project has no label config; add PolygonLabels linked to an Image")
    if len(xml) > MAX_CONFIG_CHARS:
        raise _bad_config(f"Label config has {len(xml)} characters, the limit is {MAX_CONFIG_CHARS}")
    try:
        root: Element = ElementTree.fromstring(xml, forbid_dtd=True)
    except ParseError as error:
        raise _bad_config(f"Label config is not XML: {error}") from error
    except ValueError as error:  # entities, document types, lone surrogates
        raise _bad_config(f"Label config is not plain XML: {type(error).__name__}") from error
    return root


def labels_by_tag(xml: str) -> dict[str, frozenset[str]]:
    """The labels that each control tag of a config offers, by the tag's name, whatever its kind.

    Empty for a tag whose labels come from task data. Raises BadConfig where the config cannot be read.
    """
    root = _root_of(xml)
    return {
        element.get("name", ""): frozenset(label.value for label in _labels(element))
        for element in root.iter()
        if isinstance(element.tag, str) and element.get("name") and element.get("toName")
    }


_SHAPE_KINDS: dict[str, ShapeKind] = {
    "polygonlabels": "polygon",
    "brushlabels": "brush",
    "bitmasklabels": "bitmask",
    "rectanglelabels": "rectangle",
}
_PROMPT_KINDS: dict[str, Literal["keypoint", "rectangle"]] = {
    "keypoint": "keypoint",
    "keypointlabels": "keypoint",
    "rectangle": "rectangle",
    "rectanglelabels": "rectangle",
}
_VARIABLE = re.compile(r"\$([\w.\[\]]+)")
_FARTHEST = 10_000.0
"""Percent beyond which a coordinate is nonsense and arithmetic could overflow."""


def _bad_config(sentence: str) -> BadConfig:
    one_line = " ".join(sentence.split()).encode("latin-1", "replace").decode("latin-1")
    printable = "".join(character if character.isprintable() else "?" for character in one_line)
    return BadConfig(printable if len(printable) <= MAX_REASON_CHARS else printable[: MAX_REASON_CHARS - 3] + "...")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _is_true(element: Element, name: str) -> bool:
    return element.get(name, "").strip().casefold() == "true"


def _answer_tag_of(element: Element, to_name: str, image: Element, kind: ShapeKind) -> PolygonTag:
    name, image_value, tag = element.get("name", ""), image.get("value", ""), f"{kind.capitalize()}Labels"
    if not name:
        raise _bad_config(f"A {tag} tag has no name")
    if "{{" in name + to_name:
        raise _bad_config(f"{tag} {name} stands in a Repeater, which is not supported")
    if image.get("valueList"):
        raise _bad_config(f'Image {to_name} shows several pages (valueList); only value="$image" is supported')
    if not _VARIABLE.search(image_value):
        raise _bad_config(f'Image {to_name} needs a value such as "$image", got "{image_value}"')
    labels = _labels(element)
    if not labels:
        raise _bad_config(f"{tag} {name} has no Label; labels from task data are not supported")
    # score_threshold is the older name of the same thing.
    text = element.get("model_score_threshold") or element.get("score_threshold")
    threshold = _finite(text)
    if text and (threshold is None or not 0 <= threshold <= 1):
        raise _bad_config(f'model_score_threshold of {name} must be a number from 0 to 1, got "{text}"')
    return PolygonTag(name, to_name, image_value, labels, threshold, _is_true(element, "model_skip"), kind)


def _labels(element: Element) -> tuple[Label, ...]:
    labels: dict[str, Label] = {}
    for inner in element.iter():
        if isinstance(inner.tag, str) and inner.tag.casefold() == "label":
            value = inner.get("alias") or inner.get("value") or ""
            if value and value not in labels:
                labels[value] = Label(value, tuple(_names(inner.get("predicted_values"))))
    return tuple(labels.values())


def _stem(name: str) -> str:
    """The name in lower case, punctuation as blanks, its last word singular."""
    words = re.sub(r"[\W_]+", " ", name.casefold()).split()
    if not words:
        return name
    last = words[-1]
    if last.endswith("ies") and len(last) > 4:
        last = last[:-3] + "y"
    elif re.search(r"(?:ch|sh|ss|x|z)es$", last):
        last = last[:-2]
    elif last.endswith("s") and not last.endswith(("ss", "us", "is")) and len(last) > 2:
        last = last[:-1]
    return " ".join((*words[:-1], last))


# --- Task ---


def image_of(task: Mapping[str, Any], tag: PolygonTag) -> str:
    """Address of the image that the tag's polygons lie on. Raises BadRequest with the task and the key."""
    data = _data_of(task)

    def fill(match: re.Match[str]) -> str:
        value = _value_at(data, match.group(1))
        if not isinstance(value, str) or not value.strip():
            raise BadRequest(
                f"task {task.get('id')}: data.{match.group(1)} must be the image's address, got {value!r:.60};"
                f" Image {tag.to_name} reads it as {tag.image_value}"
            )
        return value.strip()

    return _VARIABLE.sub(fill, tag.image_value)


def tile_of(task: Mapping[str, Any], image_url: str, size: tuple[int, int]) -> Tile:
    """The tile that the task's image is, ``size`` being its true columns and rows; a tile without a place for a photo.

    Raises BadTile where the task has a ``tile`` record that cannot be read.
    """
    return Tile.from_task(_data_of(task), image_url=image_url, size=size) or Tile(size=size)


def _data_of(task: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(task, Mapping):
        raise BadRequest(f"a task must be an object with id and data, got {type(task).__name__}")
    data = task.get("data")
    if not isinstance(data, Mapping):
        raise BadRequest(f"task {task.get('id')}: data must be an object, got {type(data).__name__}")
    return data


def _value_at(data: Mapping[str, Any], path: str) -> Any:
    if path in data:
        return data[path]
    value: Any = data
    for step in re.findall(r"\w+", path):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


# --- Prompts ---


@dataclass(frozen=True, slots=True, eq=False)
class PromptRequest:
    """What an annotator asks for with clicks and boxes."""

    prompts: Prompts
    """In pixels of the image; its ``label`` equals the request's. Empty when the last prompt was deleted."""

    tag: PolygonTag
    """Where the answer belongs."""

    label: str | None
    """The label that the annotator picked, as ``tag`` spells it; None where the class is the model's to say."""

    is_brush: bool = False
    """The prompts were read off a brush stroke: a sketch, not exact clicks."""

    first_id: str = ""
    """Label Studio's id of the oldest prompt: it stays the same while further clicks refine the answer."""


def read_prompts(context: Any, config: LabelConfig, size: tuple[int, int]) -> PromptRequest | None:
    """The prompts of an interactive request; None for a batch request, which has no context.

    ``size`` is the image's true columns and rows: what the page wrote as ``original_width`` may be stale. Points are
    moved into the image. Of several boxes the newest counts. A rotated box (clockwise about its top-left corner)
    becomes the upright box around it. A brush stroke becomes the box around it and a click in the middle of each of
    its three biggest patches. Prompts on another image than the newest prompt's are left out. Raises BadPrompt.
    """
    items = prompt_items(context)
    if items is None:
        return None
    tag, picked = _answer_tag(config, items)
    label = tag.label_named(picked)

    points: list[FloatArray] = []
    flags: list[bool] = []
    box: FloatArray | None = None
    for item in items:
        clicks, item_box = _read_prompt(item, size)
        points += clicks
        flags += [_is_positive(item)] * len(clicks)
        box = box if item_box is None else item_box
    prompts = Prompts(np.array(points).reshape(-1, 2), np.array(flags, bool), box, label)
    is_brush = any(_kind_of(item) == "brush" for item in items)
    return PromptRequest(prompts, tag, label, is_brush, _id_of(items[0]) if items else "")


def prompted_tag(context: Any, config: LabelConfig) -> PolygonTag:
    """The tag that ``read_prompts`` will answer on, for who has to open its image first. Raises BadPrompt."""
    return _answer_tag(config, prompt_items(context) or [])[0]


def event_of(context: Any) -> str | None:
    """What a context asks for instead of a prediction, of ``EVENTS``, or None."""
    if not isinstance(context, Mapping) or "result" in context:
        return None
    return next((event for name in ("event", "type") for event in EVENTS if context.get(name) == event), None)


EVENTS = ("capabilities", "prewarm")


def capabilities(config: LabelConfig, known_classes: Sequence[str]) -> dict[str, Any]:
    """What the project's annotators can do with this backend, and what they cannot."""
    return {
        "prompts": {"keypoint": True, "negative_keypoint": True, "rectangle": True, "brush": True, "text": False},
        "results": [
            {"from_name": tag.from_name, "to_name": tag.to_name, "type": f"{tag.kind}labels"} for tag in config.tags
        ],
        "pre_labels": sorted({label for tag in config.wanted_tags for label in tag.match(known_classes).values()}),
        "interactive": True,
        "prewarm": True,
        "training": True,
        "video": False,
    }


def region_ids_in(task: Any) -> frozenset[str]:
    """Ids of all regions that are in a task's drafts and annotations already."""
    if not isinstance(task, Mapping):
        return frozenset()
    kept = [each for name in ("drafts", "annotations") if isinstance(task.get(name), list) for each in task[name]]
    results = [each["result"] for each in kept if isinstance(each, Mapping) and isinstance(each.get("result"), list)]
    return frozenset(_id_of(region) for listed in results for region in listed if isinstance(region, Mapping))


def prompt_items(context: Any) -> list[Mapping[str, Any]] | None:
    """The prompts on the newest prompt's image, oldest first; None where there is no context. Raises BadPrompt."""
    if not context:
        return None
    if not isinstance(context, Mapping):
        raise BadPrompt(f"params.context must be an object, got {type(context).__name__}")
    if "result" not in context:
        return None
    items = context["result"]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise BadPrompt(f"params.context.result must be a list of objects, got {items!r:.80}")
    known = [item for item in items if _kind_of(item) in ("keypoint", "rectangle", "brush")]
    if items and not known:
        raise BadPrompt(f"a prompt must be a keypoint, a rectangle or a brush, got {items[-1].get('type')!r:.60}")
    return [item for item in known if item.get("to_name") == known[-1].get("to_name")]


def _answer_tag(config: LabelConfig, items: Sequence[Mapping[str, Any]]) -> tuple[PolygonTag, str | None]:
    """The tag that the prompts ask, and the label that the newest labelled one names."""
    picked = next((name for name in map(_label_in, reversed(items)) if name), None)
    on_image = [tag for tag in config.tags if items and tag.to_name == items[-1].get("to_name")] or config.tags
    wanted = [tag for tag in on_image if not tag.model_skip] or on_image
    return next((tag for tag in wanted if tag.label_named(picked)), wanted[0]), picked


def _kind_of(item: Mapping[str, Any]) -> str:
    """The shape of a result: ``keypoint`` for both keypoint and keypointlabels."""
    kind = item.get("type")
    return kind.casefold().removesuffix("labels") if isinstance(kind, str) else ""


def _read_prompt(item: Mapping[str, Any], size: tuple[int, int]) -> tuple[list[FloatArray], FloatArray | None]:
    """Clicks (each (2,)) and the box (4,) of one prompt, in pixels."""
    value = item.get("value")
    if not isinstance(value, Mapping):
        raise BadPrompt(f"prompt {item.get('id')!r:.40} needs a value object, got {type(value).__name__}")
    if item.get("image_rotation"):
        raise BadPrompt("prompts on a rotated view of the image cannot be read; turn the image back")
    match _kind_of(item):
        case "keypoint":
            return [_inside(np.array([_number(value, "x"), _number(value, "y")]) * size / 100.0, size)], None
        case "rectangle":
            corners = np.clip(_rectangle_px(value, size), 0.0, size)
            box = np.concatenate((corners.min(axis=0), corners.max(axis=0)))
            if box[2] <= box[0] or box[3] <= box[1]:
                raise BadPrompt(f"the box {box.tolist()} has no area inside the image of {size[0]} x {size[1]} pixels")
            return [], box
        case _:
            return _read_brush_prompt(item, value, size)


def _read_brush_prompt(
    item: Mapping[str, Any], value: Mapping[str, Any], size: tuple[int, int]
) -> tuple[list[FloatArray], FloatArray | None]:
    try:
        mask = brush_mask(value.get("rle"), (item.get("original_width"), item.get("original_height")))
    except BadRequest as error:
        raise BadPrompt(str(error)) from error
    if not mask.any():
        raise BadPrompt("the brush stroke is empty")
    scale = np.array(size) / mask.shape[::-1]
    patches = vectorize.mask_polygons(mask, options=vectorize.VectorizeOptions(min_area_px=1.0))[:3]
    middles = [shapely.get_coordinates(shapely.maximum_inscribed_circle(patch))[0] for patch in patches]
    rows, columns = np.nonzero(mask)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * np.tile(scale, 2)
    return [_inside(middle * scale, size) for middle in middles], box if _is_positive(item) else None


def _inside(point_px: FloatArray, size: tuple[int, int]) -> FloatArray:
    # A click on the right or lower edge belongs to the last pixel, not to the one behind it.
    return np.clip(point_px, 0.0, np.nextafter(np.array(size, np.float64), 0.0))


def _is_positive(item: Mapping[str, Any]) -> bool:
    flag = item.get("is_positive")
    if flag is None:
        return True
    if not isinstance(flag, bool):
        raise BadPrompt(f"is_positive must be true or false, got {flag!r:.40}")
    return flag


def _number(value: Mapping[str, Any], name: str, default: float | None = None) -> float:
    number = _finite(value.get(name)) if not isinstance(value.get(name), str) else None
    if number is None and value.get(name) is None and default is not None:
        return default
    if number is None or abs(number) > _FARTHEST:
        raise BadPrompt(f"value.{name} must be a finite number of percent, got {value.get(name)!r:.40}")
    return number


def _finite(value: Any) -> float | None:
    """The value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# --- Results to send ---


def results_of(
    regions: Sequence[Region],
    tag: PolygonTag,
    tile: Tile,
    *,
    meta: Mapping[str, Any] | None = None,
    task_id: Any = None,
    version: str = "",
) -> list[Result]:
    """Regions as Label Studio draws them, one result each, in order.

    Where the tag takes no polygons, one result an object: its parts as one mask, or the box around them. A region keeps
    its ``id``; one without gets ``region_id`` of the task, the version and its outline. Holes go out bridged, rings
    open, in percent, unrounded and inside 0–100. Each result carries ``meta``, to which the version is added, since
    Label Studio loses the one beside the result; the parts of one object are tied by ``meta.object`` and by
    ``parentID``, the first part's id. What lies outside the tile is left out. A region without a label goes out with an
    empty list of labels.
    """
    if tag.kind != "polygon":
        return _whole_results(regions, tag, tile, meta=meta, task_id=task_id, version=version)
    results: list[Result] = []
    first_part: dict[str, str] = {}
    taken: set[str] = set()
    for region in regions:
        for number, polygon in enumerate(_within(region.polygon, tile)):
            ring_px = vectorize.bridge(polygon)
            points = tile.px_to_pct(ring_px)
            if not np.isfinite(points).all() or len(np.unique(points, axis=0)) < 3:
                continue
            identity = region.id if region.id and number == 0 else region_id(task_id, version, ring_px)
            while identity in taken:  # the same outline twice would be one region with two labels
                identity = region_id(task_id, version + identity, ring_px)
            taken.add(identity)
            result = _result(identity, region, tag, tile, {"points": points.tolist(), "closed": True})
            notes = {**(meta or {}), **({"model_version": version} if version else {})}
            if region.object_id:
                notes["object"] = region.object_id
                if region.object_id in first_part:
                    result["parentID"] = first_part[region.object_id]
                first_part.setdefault(region.object_id, identity)
            if notes:
                result["meta"] = notes
            results.append(result)
    return results


def _result(identity: str, region: Region, tag: PolygonTag, tile: Tile, value: dict[str, Any]) -> Result:
    """One entry of the ``result`` list, without ``meta``."""
    kind = f"{tag.kind}labels"
    result: Result = {
        "id": identity,
        "from_name": tag.from_name,
        "to_name": tag.to_name,
        "type": kind,
        "origin": "prediction",
        "original_width": tile.size[0],
        "original_height": tile.size[1],
        "image_rotation": 0,
        "value": {**value, kind: [region.label] if region.label else []},
    }
    if region.score is not None and math.isfinite(region.score):
        result["score"] = min(max(float(region.score), 0.0), 1.0)
    return result


def _whole_results(
    regions: Sequence[Region],
    tag: PolygonTag,
    tile: Tile,
    *,
    meta: Mapping[str, Any] | None,
    task_id: Any,
    version: str,
) -> list[Result]:
    """Objects as masks or boxes, one result each, in the order of their first parts."""
    objects: dict[str, list[Region]] = {}
    for number, region in enumerate(regions):
        objects.setdefault(region.object_id or f"\n{number}", []).append(region)
    notes = {**(meta or {}), **({"model_version": version} if version else {})}
    width, height = tile.size
    results: list[Result] = []
    taken: set[str] = set()
    for parts in objects.values():
        polygons = [part for region in parts for part in _within(region.polygon, tile)]
        if not polygons:
            continue
        if tag.kind == "rectangle":
            left, top, right, bottom = shapely.total_bounds(polygons) / (width, height, width, height) * 100.0
            value = {"x": left, "y": top, "width": right - left, "height": bottom - top, "rotation": 0}
        else:
            mask = vectorize.rasterize(polygons, height, width)
            if not mask.any():
                continue
            is_brush = tag.kind == "brush"
            value = {"format": "rle", "rle": brush_rle(mask)} if is_brush else {"imageDataURL": bitmask_url(mask)}
        identity = parts[0].id or region_id(task_id, version, polygons[0])
        while identity in taken:
            identity = region_id(task_id, version + identity, polygons[0])
        taken.add(identity)
        result = _result(identity, parts[0], tag, tile, value)
        results.append({**result, "meta": notes} if notes else result)
    return results


def prompt_region_id(task_id: Any, prompt_id: str, part: int = 0) -> str:
    """Ten URL-safe characters that depend on the task, the first prompt and the number of the part alone.

    Label Studio puts a region in the place of the one with its id, so an answer that further clicks refine replaces
    the coarser one, also where answers are accepted by themselves.
    """
    digest = hashlib.sha256(f"{task_id}\nprompt\n{prompt_id}\n{part}".encode()).digest()
    return base64.urlsafe_b64encode(digest)[:10].decode()


def region_id(task_id: Any, version: str, outline_px: FloatArray | Polygon) -> str:
    """Ten URL-safe characters that depend on the task, the version and the outline, to a hundredth of a pixel, alone.

    Two predictions of the same task that Label Studio asked for at once therefore name their regions alike.
    """
    ring_px = shapely.get_coordinates(outline_px) if isinstance(outline_px, Polygon) else outline_px
    digest = hashlib.sha256(f"{task_id}\n{version}\n".encode())
    # + 0.0 makes -0.0 and 0.0 the same bytes.
    digest.update((np.round(np.asarray(ring_px, np.float64), 2) + 0.0).astype("<f8").tobytes())
    return base64.urlsafe_b64encode(digest.digest())[:10].decode()


def prediction_of(results: list[Result], *, version: str, score: float | None = None) -> dict[str, Any]:
    """One item of a ``/predict`` answer.

    Label Studio orders tasks by ``score``, the least sure first; for pre-labels it is `instances.expected_f1`. Without
    one it is the mean of the regions' calibrated scores, and none where there are no regions. Never NaN or infinite,
    which break the interactive call.
    """
    if score is None:
        scores = [result["score"] for result in results if "score" in result]
        score = sum(scores) / len(scores) if scores else None
    prediction: dict[str, Any] = {"result": results, "model_version": version}
    if score is not None and math.isfinite(score):
        prediction["score"] = min(max(float(score), 0.0), 1.0)
    return prediction


def _within(polygon: Polygon, tile: Tile) -> list[Polygon]:
    """The parts of a polygon that lie on the tile."""
    if polygon.is_empty:
        return []
    left, top, right, bottom = polygon.bounds
    if left >= 0 and top >= 0 and right <= tile.size[0] and bottom <= tile.size[1]:
        return [polygon]
    return vectorize.repair(shapely.intersection(polygon, tile.outline_px()))


# --- Annotations that come back ---


@dataclass(frozen=True, slots=True)
class LabelledPoint:
    """A keypoint that is no prompt."""

    point_xy: tuple[float, float]
    """In tile pixels, inside the tile."""

    label: str
    """Name of the class, as the label config spells it; empty where it has none."""

    score: float | None = None
    """How sure the model was, 0…1; None for what a person set."""

    id: str = ""
    """Label Studio's region id."""


@dataclass(frozen=True, slots=True)
class AnnotationRead:
    """What a person accepted or drew, and what was left out."""

    regions: list[Region]

    dropped: Counter[str]
    """Why results were left out or changed, and how often."""

    points: tuple[LabelledPoint, ...] = ()
    """Keypoints, which are no areas."""


CANCELLED = "the annotation was cancelled"
PROMPT = "left-over prompt"
LEAK = "label of a prompt on an accepted region"
OTHER_IMAGE = "region on another image"
NOT_AN_AREA = "not an area"
ROTATED_VIEW = "drawn on a rotated view of the image"
UNREADABLE = "geometry that cannot be read"
OUTSIDE = "outside the image"
EMPTY = "nothing big enough to draw"
MORE_LABELS = "second label of a region"


def read_annotation(
    annotation: Mapping[str, Any], tile: Tile, *, config: LabelConfig | None = None, to_name: str | None = None
) -> AnnotationRead:
    """The regions of an annotation, in tile pixels, valid and inside the tile.

    Polygons, rectangles, ellipses, closed vectors, brush strokes and bitmasks become polygons. A bridged ring gets its
    holes back. A result that turns out to be several polygons becomes several regions with one ``object_id``.
    Unlabelled regions keep an empty label. Keypoints become ``points``. Prompts that were left over, labels that leaked
    from a prompt onto an accepted region, and whatever cannot be read are counted in ``dropped``. Rectangles and
    keypoints of a smart tag are prompts, which only ``config`` can tell; without it those with a label are not.
    ``to_name`` keeps the regions of one image.
    Raises BadRequest where ``annotation`` is not an annotation at all.
    """
    if not isinstance(annotation, Mapping):
        raise BadRequest(f"an annotation must be an object, got {type(annotation).__name__}")
    dropped: Counter[str] = Counter()
    if annotation.get("was_cancelled"):
        return AnnotationRead([], Counter({CANCELLED: 1}))
    results = [] if annotation.get("result") is None else annotation["result"]
    if not isinstance(results, list):
        raise BadRequest(f"annotation {annotation.get('id')}: result must be a list, got {type(results).__name__}")
    smart = {(prompt.from_name, prompt.kind) for prompt in config.prompts} if config else set()

    regions: list[Region] = []
    points: list[LabelledPoint] = []
    shapes, labels_beside = _by_region(results, dropped)
    for result in shapes:
        reason = _why_not(result, smart, to_name, has_label=bool(_label_in(result)) or _id_of(result) in labels_beside)
        if reason:
            dropped[reason] += 1
            continue
        names = _labels_in(result) or labels_beside.get(_id_of(result), [])
        label = names[0] if names else ""
        score = None if isinstance(result.get("score"), str) else _finite(result.get("score"))
        try:
            if _kind_of(result) == "keypoint":
                points.append(LabelledPoint(_read_point(result["value"], tile), label, score, _id_of(result)))
                continue
            polygons, reasons = _read_shape(result, tile)
        except _Outside:
            dropped[OUTSIDE] += 1
            continue
        except BadRequest:
            dropped[UNREADABLE] += 1
            continue
        dropped.update(reasons)
        parts = [part for polygon in polygons for part in _within(polygon, tile)]
        if not parts:
            if polygons or not reasons:
                dropped[OUTSIDE if polygons else EMPTY] += 1
            continue
        dropped.update({MORE_LABELS: len(names) - 1} if len(names) > 1 else {})
        object_id = _object_of(result)
        if len(parts) > 1:
            object_id = object_id or _id_of(result)
        whole = Region(parts[0], label, score, _id_of(result), object_id)
        regions += [replace(whole, polygon=part) for part in parts]
    return AnnotationRead(regions, dropped, tuple(points))


WHICH_ANNOTATIONS = ("ground_truth", "latest", "all")
"""Which of a task's annotations can count."""


def chosen_annotations(task: Mapping[str, Any], *, which: str = "ground_truth") -> list[Mapping[str, Any]]:
    """The annotations that count for a task, oldest first; none where nobody submitted one.

    ``ground_truth`` is the newest ground truth, else the newest that was submitted; ``latest`` the newest submitted,
    ground truth or not: one, since two annotators' outlines of the same buildings would count every building twice.
    ``all`` is every one. No consensus is made of several. Cancelled (skipped) annotations never count. Raises
    BadRequest for another choice.
    """
    if which not in WHICH_ANNOTATIONS:
        raise BadRequest(f"annotations must be one of {', '.join(WHICH_ANNOTATIONS)}, got {which!r:.40}")
    annotations = task.get("annotations") or []
    submitted = [item for item in annotations if isinstance(item, Mapping) and not item.get("was_cancelled")]
    submitted.sort(key=age)
    if which == "all":
        return submitted
    truths = [item for item in submitted if item.get("ground_truth")] if which == "ground_truth" else []
    return (truths or submitted)[-1:]


def age(annotation: Mapping[str, Any]) -> tuple[str, float]:
    """Something that is greater for an annotation that was saved later."""
    # One server writes all time stamps in one format, so that their text sorts as they do.
    saved = annotation.get("updated_at") or annotation.get("created_at") or ""
    return str(saved), _finite(annotation.get("id")) or 0.0


def labels_of(annotation: Mapping[str, Any]) -> set[str]:
    """The labels that an annotation uses, whatever they are on."""
    results = annotation.get("result")
    listed = results if isinstance(results, list) else []
    return {name for result in listed if isinstance(result, Mapping) for name in _labels_in(result)}


_SHAPES = {
    "polygon": "points",
    "rectangle": "height",
    "ellipse": "radiusX",
    "brush": "rle",
    "bitmask": "imageDataURL",
    "vector": "vertices",
    "keypoint": "x",
}
"""Each kind of shape and the key in ``value`` that it cannot do without."""


def _by_region(results: list[Any], dropped: Counter[str]) -> tuple[list[Mapping[str, Any]], dict[str, list[str]]]:
    """The results that draw something, and labels that stand in a result of their own, by region id."""
    shapes: list[Mapping[str, Any]] = []
    labels_beside: dict[str, list[str]] = {}
    drawn: set[str] = set()
    for result in results:
        if not isinstance(result, Mapping) or not isinstance(result.get("value"), Mapping):
            dropped[UNREADABLE if not isinstance(result, Mapping) or "value" in result else NOT_AN_AREA] += 1
            continue
        kind, identity = _kind_of(result), _id_of(result)
        if result.get("type") == "labels":
            labels_beside.setdefault(identity, _labels_in(result))
        elif kind not in _SHAPES:
            dropped[NOT_AN_AREA] += 1
        elif (identity and identity in drawn) or _is_leak(kind, result["value"]):
            dropped[LEAK] += 1
        else:
            shapes.append(result)
            if kind != "keypoint":
                drawn.add(identity)
    return shapes, labels_beside


def _is_leak(kind: str, value: Mapping[str, Any]) -> bool:
    """A result that carries another tag's outline instead of its own: a label that leaked, not something drawn."""
    is_foreign = any(key in value for other, key in _SHAPES.items() if other != kind)
    # Every shape but a keypoint has a key that no other has.
    return is_foreign and (kind == "keypoint" or _SHAPES[kind] not in value)


def _why_not(
    result: Mapping[str, Any], smart: Set[tuple[str, str]], to_name: str | None, *, has_label: bool
) -> str | None:
    """Why a result is no region, or None."""
    kind = _kind_of(result)
    if to_name is not None and result.get("to_name") != to_name:
        return OTHER_IMAGE
    if "is_positive" in result or (str(result.get("from_name")), kind) in smart:
        return PROMPT
    if kind in ("rectangle", "keypoint") and not has_label and not smart:
        return PROMPT
    if result.get("image_rotation"):
        return ROTATED_VIEW
    if kind == "vector" and not result["value"].get("closed"):
        return NOT_AN_AREA
    return None


def _id_of(result: Mapping[str, Any]) -> str:
    identity = result.get("id")
    return identity if isinstance(identity, str) else ""


def _object_of(result: Mapping[str, Any]) -> str:
    meta = result.get("meta")
    identity = meta.get("object") if isinstance(meta, Mapping) else None
    return identity if isinstance(identity, str) else ""


def _labels_in(result: Mapping[str, Any]) -> list[str]:
    """The labels of a result: ``value.polygonlabels`` for type polygonlabels, else ``value.labels``."""
    value = result.get("value")
    if not isinstance(value, Mapping):
        return []
    names = value.get(str(result.get("type"))) or value.get(_kind_of(result) + "labels") or value.get("labels") or []
    return [name for name in names if isinstance(name, str) and name] if isinstance(names, list) else []


def _label_in(result: Mapping[str, Any]) -> str | None:
    return next(iter(_labels_in(result)), None)


def _read_shape(result: Mapping[str, Any], tile: Tile) -> tuple[list[Polygon], list[str]]:
    """Valid polygons of a result in tile pixels, and what had to be mended. Raises BadRequest."""
    value = result["value"]
    match _kind_of(result):
        case "polygon":
            return vectorize.unbridge(tile.pct_to_px(_ring(value.get("points"))))
        case "vector":
            vertices = value.get("vertices")
            if not isinstance(vertices, list) or not all(isinstance(vertex, Mapping) for vertex in vertices):
                raise BadRequest(f"value.vertices must be a list of objects, got {vertices!r:.60}")
            ring_pct = _ring([[vertex.get("x"), vertex.get("y")] for vertex in vertices])
            return vectorize.unbridge(tile.pct_to_px(ring_pct))
        case "rectangle":
            return vectorize.repair(Polygon(_rectangle_px(value, tile.size))), []
        case "ellipse":
            return vectorize.repair(Polygon(_ellipse_px(value, tile.size))), []
        case kind:
            if kind == "bitmask":
                mask = bitmask(value.get("imageDataURL"))
            else:
                mask = brush_mask(value.get("rle"), (result.get("original_width"), result.get("original_height")))
            scale = tile.size[0] / mask.shape[1], tile.size[1] / mask.shape[0]
            polygons = vectorize.mask_polygons(mask, options=_AS_PAINTED)
            return [shapely.transform(polygon, lambda points: points * scale) for polygon in polygons], []


class _Outside(Exception):
    pass


def _read_point(value: Mapping[str, Any], tile: Tile) -> tuple[float, float]:
    """A keypoint in tile pixels. Raises BadRequest, or _Outside."""
    x, y = np.array([_number(value, "x"), _number(value, "y")]) * tile.size / 100.0
    if not (0 <= x <= tile.size[0] and 0 <= y <= tile.size[1]):
        raise _Outside
    return float(x), float(y)


def outline_px(result: Mapping[str, Any], size: tuple[int, int]) -> FloatArray | None:
    """Points of a result's outline as it was drawn, (N, 2) in pixels, also where it leaves the image of that size.

    None for what has no outline (a brush stroke) and for what cannot be read.
    """
    value = result.get("value")
    if not isinstance(value, Mapping):
        return None
    try:
        match _kind_of(result):
            case "polygon":
                return _ring(value.get("points")) * size / 100.0
            case "vector":
                return (
                    _ring([[vertex.get("x"), vertex.get("y")] for vertex in value.get("vertices") or []]) * size / 100
                )
            case "rectangle":
                return _rectangle_px(value, size)
            case "ellipse":
                return _ellipse_px(value, size)
            case _:
                return None
    except (BadRequest, AttributeError, TypeError):
        return None


def _ring(points: Any) -> FloatArray:
    """A list of pairs as (N, 2), at least three of them different."""
    try:
        ring = np.array(points, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"points must be pairs of numbers, got {points!r:.60}") from error
    is_ring = ring.ndim == 2 and ring.shape[1] == 2 and len(np.unique(ring, axis=0)) >= 3
    if not is_ring or not (np.abs(ring) <= _FARTHEST).all():
        raise BadRequest(f"points must be at least three different pairs of finite numbers, got {points!r:.60}")
    return ring


def _rectangle_px(value: Mapping[str, Any], size: tuple[int, int]) -> FloatArray:
    """The corners of a rectangle, (4, 2): turned clockwise about its first corner, in pixels, where angles are true."""
    origin = np.array([_number(value, "x"), _number(value, "y")]) * size / 100.0
    width, height = np.array([_number(value, "width"), _number(value, "height")]) * size / 100.0
    corners = np.array([(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)])
    return origin + _turned(corners, _number(value, "rotation", 0.0))


def _ellipse_px(value: Mapping[str, Any], size: tuple[int, int], *, vertices: int = 72) -> FloatArray:
    """The outline of an ellipse, turned clockwise about its centre, (vertices, 2)."""
    centre = np.array([_number(value, "x"), _number(value, "y")]) * size / 100.0
    radii = np.array([_number(value, "radiusX"), _number(value, "radiusY")]) * size / 100.0
    angle = np.linspace(0.0, 2.0 * np.pi, vertices, endpoint=False)
    return centre + _turned(np.column_stack((np.cos(angle), np.sin(angle))) * radii, _number(value, "rotation", 0.0))


def _turned(points: FloatArray, degrees: float) -> FloatArray:
    # With y running down, a positive angle turns clockwise.
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.asarray(points @ np.array([(cosine, sine), (-sine, cosine)]), np.float64)


# --- Brush and bitmask ---

_RUN_BITS = (3, 4, 8, 16)
"""Bits of the four sizes of a run's length: those that Label Studio's own page writes."""


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """A mask, (rows, columns), in Label Studio's run-length code; see ``brush_mask``."""
    flat = np.ascontiguousarray(mask).ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    bits = [f"{4 * flat.size:032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in _RUN_BITS)]
    longest = 1 << _RUN_BITS[-1]
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), flat.size], strict=True):
        word, left = f"{255 if flat[start] else 0:08b}", 4 * (end - start)
        while left:
            length = min(left, longest)
            size = next(number for number, size in enumerate(_RUN_BITS) if length <= 1 << size)
            bits.append(f"1{size:02b}{length - 1:0{_RUN_BITS[size]}b}{word}")
            left -= length
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def bitmask_url(mask: NDArray[np.bool_]) -> str:
    """A mask, (rows, columns), as Label Studio's ``imageDataURL``: a PNG, wholly transparent off the object."""
    from PIL import Image

    packed = io.BytesIO()
    Image.fromarray(np.repeat(mask[..., None].astype(np.uint8) * 255, 4, axis=2)).save(packed, "PNG")
    return _PNG_URL + base64.b64encode(packed.getvalue()).decode()


def brush_mask(rle: Any, size: tuple[Any, Any]) -> NDArray[np.bool_]:
    """The pixels that a brush stroke covers, (rows, columns), from Label Studio's run-length code.

    ``size`` is ``original_width`` and ``original_height``. The code is thi.ng's ``rle-pack``: the number of values in
    32 bits, the word size less one in 5, four run sizes less one in 4 bits each; then runs of one flag (repeat or
    literal), two bits that choose the run size, the run's length less one, and one word or as many as the run is long.
    The values are RGBA, row by row; alpha above one half counts. Raises BadRequest.
    """
    columns, rows = size
    if not (isinstance(columns, int) and isinstance(rows, int) and min(columns, rows) > 0):
        raise BadRequest(f"a brush stroke needs original_width and original_height, got {columns!r:.20}, {rows!r:.20}")
    if columns * rows > MAX_RLE_PIXELS:
        raise BadRequest(f"a brush stroke of {columns} x {rows} pixels is over the limit of {MAX_RLE_PIXELS} pixels")
    if not isinstance(rle, list) or not 0 < len(rle) <= MAX_RLE_BYTES:
        raise BadRequest(f"value.rle must be a list of 1 to {MAX_RLE_BYTES} bytes")
    try:
        packed = bytes(rle)
    except (TypeError, ValueError) as error:
        raise BadRequest("value.rle must hold whole numbers from 0 to 255") from error
    values = np.zeros(columns * rows * 4, np.uint8)
    if int.from_bytes(packed[:4]) != len(values):
        raise BadRequest(f"value.rle is not an RGBA image of {columns} x {rows} pixels")
    start = 0
    for length, words in _runs(packed):
        if start + length > len(values):
            raise BadRequest("value.rle holds more values than it says")
        values[start : start + length] = words
        start += length
        if start == len(values):
            return values[3::4].reshape(rows, columns) > 127
    raise BadRequest("value.rle ends too early")


def bitmask(data_url: Any) -> NDArray[np.bool_]:
    """The pixels that a bitmask covers, (rows, columns), from Label Studio's ``imageDataURL``.

    That is a PNG in base64; as in Label Studio's page, every pixel counts that is not wholly transparent. Raises
    BadRequest.
    """
    # Pillow takes a while to import.
    from PIL import Image

    if not isinstance(data_url, str) or not data_url.startswith(_PNG_URL):
        raise BadRequest(f"value.imageDataURL must start with {_PNG_URL}, got {data_url!r:.40}")
    if len(data_url) > MAX_PNG_CHARS:
        raise BadRequest(f"value.imageDataURL has {len(data_url)} characters, the limit is {MAX_PNG_CHARS}")
    try:
        packed = base64.b64decode(data_url[len(_PNG_URL) :], validate=True)
        # The size stands at the same place in every PNG; it is read before anything is unpacked.
        columns, rows = int.from_bytes(packed[16:20]), int.from_bytes(packed[20:24])
        if not 0 < columns * rows <= MAX_RLE_PIXELS:
            raise BadRequest(f"a bitmask must have 1 to {MAX_RLE_PIXELS} pixels, got {columns} x {rows}")
        with Image.open(io.BytesIO(packed), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGBA"))[..., 3] > 0
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise BadRequest(f"value.imageDataURL is not a readable PNG: {error}") from error


def _runs(packed: bytes) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Length and values (one, or as many as the run is long) of each run of a run-length code."""
    position, end = 32, len(packed) * 8

    def read(count: int) -> int:
        nonlocal position
        first, last = position // 8, (position + count + 7) // 8
        chunk = int.from_bytes(packed[first:last]) >> (last * 8 - position - count)
        position += count
        if position > end:
            raise BadRequest("value.rle ends too early")
        return chunk & ((1 << count) - 1)

    if read(5) != 7:
        raise BadRequest("value.rle must have words of eight bits")
    run_sizes = [read(4) + 1 for _ in range(4)]
    # Each turn reads at least 12 bits, and there are no more than MAX_RLE_BYTES.
    while position < end:
        is_repeat = read(1)
        length = read(run_sizes[read(2)]) + 1
        words = 1 if is_repeat else length
        yield length, np.frombuffer(read(8 * words).to_bytes(words), np.uint8)
