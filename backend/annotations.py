"""Annotations: what people drew on a task, tile by tile, and which of it was damaged.

What is shared by those who turn annotations into features and those who check them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import labelstudio
from .errors import BadRequest
from .labelstudio import LabelConfig
from .rings import IntArray
from .tile import FloatArray, Region, Tile, to_lonlat

FROM = labelstudio.WHICH_ANNOTATIONS
"""Which annotations of a task count, where there are several."""

_MOVED_PCT = 1e-3
"""Percent of the image below which a point has not been moved, but rounded by the editor."""

_CHUNK_BYTES = 1 << 20
_BLANK = b"\xef\xbb\xbf \t\r\n"
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_STEP = bytes.maketrans(b'[{]}"', b"\1\1\xff\xff\0")
_NO_MARK = bytes(set(range(256)) - set(b'[]{}"'))
_IMAGE = re.compile(r"\.(?:jpe?g|png|webp|tiff?|bmp|gif)(?:[?#]|$)", re.IGNORECASE)


def tiles_of(task: Mapping[str, Any], config: LabelConfig | None) -> Iterator[tuple[str | None, Tile]]:
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
        if not _is_reached(tile):
            tile.ground_size_m()  # raises for a photo, and where the CRS does not reach the tile
        yield to_name, tile


def _is_reached(tile: Tile) -> bool:
    """Whether the middle of the tile has a place on Earth."""
    if tile.transform is None:
        return False
    x, y = tile.transform @ (tile.size[0] / 2, tile.size[1] / 2)
    return all(map(math.isfinite, to_lonlat(str(tile.crs), None).transform(x, y)))


def image_address(task: Mapping[str, Any], config: LabelConfig | None, to_name: str | None) -> str:
    """Address of the image that the name in the label config means; without a config the first that looks like one."""
    for tag in config.tags if config is not None else ():
        if tag.to_name == to_name:
            return labelstudio.image_of(task, tag)
    data = task.get("data")
    texts = [text for text in data.values() if isinstance(text, str)] if isinstance(data, Mapping) else []
    return next((text for text in texts if _IMAGE.search(text)), texts[0] if texts else "")


def points_of(annotation: Mapping[str, Any], region: str, tile: Tile) -> FloatArray:
    """The points of a polygon region as they were drawn, (N, 2) tile pixels; none where they cannot be read."""
    for result in annotation.get("result") or []:
        if isinstance(result, Mapping) and result.get("id") == region and isinstance(result.get("value"), Mapping):
            try:
                points = np.array(result["value"].get("points"), np.float64)
            except (TypeError, ValueError, OverflowError):
                break
            if points.ndim == 2 and points.shape[1:] == (2,) and np.isfinite(points).all():
                return tile.pct_to_px(points)
    return np.empty((0, 2))


def without_task(sentence: str, task: Mapping[str, Any]) -> str:
    """The sentence without the task's number, so that equal reasons count together."""
    return sentence.replace(f"task {task.get('id')}: ", "").replace(f"task {task.get('id')} ", "the task ")


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


def is_damage(reason: str) -> bool:
    """Whether a reason in ``AnnotationRead.dropped`` means that something drawn was lost or changed."""
    return reason not in _NOT_DAMAGE


def is_repair(reason: str) -> bool:
    """Whether the outline is there, but not as it was drawn."""
    return is_damage(reason) and reason not in _LEFT_OUT and not reason.endswith("left out")


def mended_ids(
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


def objects_of(regions: Sequence[Region]) -> list[list[Region]]:
    """Regions that are parts of one object together, all others alone."""
    objects: dict[tuple[Any, ...], list[Region]] = {}
    for number, region in enumerate(regions):
        key = (region.object_id, region.label) if region.object_id else (number,)
        objects.setdefault(key, []).append(region)
    return list(objects.values())


def chosen(task: Mapping[str, Any], which: str = "ground_truth") -> list[Mapping[str, Any]]:
    """The annotations that count for a task.

    ``ground_truth``: the newest ground truth, else the newest; ``latest``: the newest; ``all``: all submitted ones.
    """
    return labelstudio.chosen_annotations(task, which=which)


@dataclass(frozen=True, slots=True)
class Making:
    """When and by whom an annotation was made; None where Label Studio does not say."""

    task: Any
    annotation: Any
    annotator: int | None
    lead_time_s: float | None
    created: str | None
    updated: str | None


def making_of(annotation: Mapping[str, Any], task: Mapping[str, Any]) -> Making:
    """When and by whom the task's annotation was made."""
    by = annotation.get("completed_by")
    by = by.get("id") if isinstance(by, Mapping) else by
    lead = annotation.get("lead_time")
    created, updated = annotation.get("created_at"), annotation.get("updated_at")
    return Making(
        task=task.get("id"),
        annotation=annotation.get("id"),
        annotator=by if isinstance(by, int) and not isinstance(by, bool) else None,
        lead_time_s=float(lead) if isinstance(lead, (int, float)) and math.isfinite(lead) else None,
        created=created if isinstance(created, str) else None,
        updated=updated if isinstance(updated, str) else None,
    )


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a model drew on a task, by region id."""

    results: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    """Model version of each region."""

    @classmethod
    def on(cls, task: Mapping[str, Any], annotation: Mapping[str, Any]) -> Predicted:
        """All predictions in the task's JSON, and the one that Label Studio keeps with the annotation."""
        results: dict[str, Mapping[str, Any]] = {}
        versions: dict[str, str] = {}
        listed = task.get("predictions")
        for prediction in (*(listed if isinstance(listed, list) else ()), annotation.get("prediction")):
            if not isinstance(prediction, Mapping) or not isinstance(prediction.get("result"), list):
                continue
            version = prediction.get("model_version")
            for result in prediction["result"]:
                identity = result.get("id") if isinstance(result, Mapping) else None
                if isinstance(identity, str):
                    results[identity] = result
                    if isinstance(version, str):
                        versions[identity] = version
        return cls(results, versions)

    def was_edited(self, result: Mapping[str, Any]) -> bool | None:
        """Whether a region differs from what was predicted under its id; None where nothing of that id is known."""
        before = self.results.get(result.get("id", ""))
        if before is None:
            # Label Studio's own word for it, where an export leaves predictions out.
            origin = result.get("origin")
            return origin == "prediction-changed" if origin in ("prediction", "prediction-changed") else None
        old, new = before.get("value"), result.get("value")
        if old == new:
            return False
        if not isinstance(old, Mapping) or not isinstance(new, Mapping) or result.get("type") != before.get("type"):
            return True
        if any(old.get(key) != new.get(key) for key in {*old, *new} - {"points", "closed"}):
            return True
        if old.get("points") == new.get("points"):
            return False
        try:
            a, b = (np.array(value["points"], np.float64) for value in (old, new))
        except (TypeError, ValueError, KeyError, OverflowError):
            return True
        return a.shape != b.shape or not bool(np.allclose(a, b, rtol=0, atol=_MOVED_PCT))


class _PlainValue(msgspec.Struct, gc=False):
    points: msgspec.Raw
    polygonlabels: tuple[Annotated[str, msgspec.Meta(min_length=1)]]


class PlainOutline(msgspec.Struct, gc=False):
    """A region that is one labelled polygon."""

    id: str
    type: Literal["polygonlabels"]
    value: _PlainValue
    score: float | None = None
    to_name: Any = None
    origin: Any = None
    image_rotation: Literal[0] | None = None
    meta: Any = None
    is_positive: msgspec.UnsetType = msgspec.UNSET


_plain = msgspec.json.Decoder(list[PlainOutline])


def plain_outlines(
    annotation: Mapping[str, Any], config: LabelConfig | None, to_name: str | None
) -> list[PlainOutline] | None:
    """The annotation's regions where each is one labelled polygon and nothing is beside them; else None.

    What ``labelstudio.read_annotation`` would read from such an annotation, as long as the points are numbers from 0 to
    100 and make a valid ring, is just these outlines.
    """
    results = annotation.get("result")
    if annotation.get("was_cancelled"):
        return None
    try:
        if not isinstance(results, msgspec.Raw):
            results = msgspec.json.encode(results)
        outlines = _plain.decode(results)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    if to_name is not None and any(outline.to_name != to_name for outline in outlines):
        return None
    if any([outline.meta and _is_part(outline.meta) for outline in outlines]):
        return None
    return outlines if len({outline.id for outline in outlines}) == len(outlines) else None


def _is_part(meta: Any) -> bool:
    return isinstance(meta, dict) and bool(meta.get("object"))


def results_of(annotation: Mapping[str, Any]) -> Any:
    """The annotation's ``result``, read where it has been left as it came."""
    results = annotation.get("result")
    if not isinstance(results, msgspec.Raw):
        return results
    try:
        return msgspec.json.decode(results)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Numbers beyond all bounds and half characters, which only Python reads.
        return json.loads(bytes(results))


_NO_NUMBER = b"0123456789.eE+- \t\r\n"


def rings_pct(outlines: Sequence[PlainOutline]) -> tuple[FloatArray, IntArray]:
    """The points of all outlines, one after the other, (M, 2) percent; and how many each has, (N,).

    An outline that is not three or more pairs of numbers has none.
    """
    texts = [outline.value.points for outline in outlines]
    counts = _pairs_in(texts)
    listed = [text for text, count in zip(texts, counts, strict=True) if count]
    try:
        flat = _numbers.decode(b"[" + b",".join(listed).translate(None, b"[]") + b"]")
    except msgspec.DecodeError:  # a number that is too great
        if len(outlines) == 1:
            return np.empty((0, 2)), np.zeros(1, np.int64)
        # One strange outline does not make the others strange.
        middle = len(outlines) // 2
        halves = [rings_pct(half) for half in (outlines[:middle], outlines[middle:])]
        return np.concatenate([points for points, _ in halves]), np.concatenate([counts for _, counts in halves])
    return np.frombuffer(struct.pack(f"{len(flat)}d", *flat)).reshape(-1, 2), np.array(counts, np.int64)


_numbers = msgspec.json.Decoder(list[float])


def _pairs_in(texts: Sequence[msgspec.Raw]) -> list[int]:
    """For each text the number of pairs where it is a list of three or more pairs of numbers, else 0."""
    # What is left without the numbers tells how many there are, and that nothing else is there.
    bones = b"\0".join(texts).translate(None, _NO_NUMBER).split(b"\0")
    if len(bones) != len(texts):
        return [_pairs_in([text])[0] if b"\0" not in bytes(text) else 0 for text in texts]
    known: dict[bytes, int] = {}
    for bone in set(bones):
        count = len(bone) // 4
        known[bone] = count if count >= 3 and bone == b"[" + b",".join([b"[,]"] * count) + b"]" else 0
    return [known[bone] for bone in bones]


class _Annotation(TypedDict, total=False):
    """What an export takes from an annotation."""

    id: Any
    result: msgspec.Raw
    was_cancelled: Any
    ground_truth: Any
    completed_by: Any
    created_at: Any
    updated_at: Any
    lead_time: Any
    prediction: Any


class _Task(TypedDict, total=False):
    id: Any
    data: Any
    predictions: Any
    annotations: list[_Annotation] | None


_any_tasks: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder()
_thin_tasks = msgspec.json.Decoder(list[_Task])


class TaskFile:
    """The tasks of a ``tasks.json`` or a Label Studio export, one after the other, as often as they are asked for.

    Annotations' results are left as they came, as ``msgspec.Raw``, which `plain_outlines` and `results_of` read; what
    no export needs is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises BadRequest naming what is wrong with the file."""
        return tasks_in(self.path, unread=True)


def tasks_in(path: Path, *, unread: bool = False) -> Iterator[dict[str, Any]]:
    """The tasks of a ``tasks.json`` or a Label Studio export, one after the other, without reading the file whole.

    ``unread`` leaves annotations' results as they came, as ``msgspec.Raw``, which `plain_outlines` and `results_of`
    read; and leaves out what no export needs. Raises BadRequest naming what is wrong with it.
    """
    number = 0
    with _readable(path):
        for text, is_cut in _texts_in(path):
            for task in _tasks_of(text, number, path, _thin_tasks if unread else _any_tasks):
                yield task
                number += 1
            if is_cut:
                raise BadRequest(f"{path} is not JSON: expected a comma after task number {number - 1}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in a BadRequest what is wrong with the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadRequest(f"{path} is not there") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise BadRequest(f"{path} is nested too deeply to be Label Studio's JSON") from error


def _texts_in(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The inside of the file's list in parts of whole tasks; and whether the file ends before the list does."""
    with path.open("rb") as file:
        text = b""
        while not text and (chunk := file.read(_CHUNK_BYTES)):
            text = chunk.lstrip(_BLANK)
        if text[:1] != b"[":
            kind = f"text that begins with {text[:1].decode(errors='replace')!r}" if text else "nothing"
            raise BadRequest(f"{path} must hold a list of Label Studio tasks, got {kind}")
        text, is_closed = text[1:], False
        while not is_closed:
            end, is_closed = _whole_tasks(text)
            is_cut = False
            if not end and not is_closed:
                # As much again as was not enough: a long task is not looked at over and over.
                chunk = file.read(max(_CHUNK_BYTES, len(text)))
                if chunk:
                    text += chunk
                    continue
                end, is_cut = len(text), True
            yield text[:end], is_cut
            text = text[end:]


def _tasks_of(text: bytes, number: int, path: Path, decoder: msgspec.json.Decoder[Any]) -> Iterator[dict[str, Any]]:
    for task in _decoded(text, number, path, decoder):
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise BadRequest(f"{path}: task number {number} has no data object")
        yield task
        number += 1


def _whole_tasks(text: bytes) -> tuple[int, bool]:
    """Where the last whole task in the inside of a list ends; and whether the list itself does, then where."""
    # An escaped character is no quotation mark; the text keeps its length.
    plain = _ESCAPED.sub(b"__", text) if b"\\" in text else text
    found = plain.translate(None, _NO_MARK)
    marks = np.frombuffer(found, np.uint8)
    is_outside = 1 - (np.cumsum(marks == ord('"'), dtype=np.uint8) & 1).view(np.int8)
    step = np.frombuffer(found.translate(_STEP), np.int8) * is_outside
    depth = np.cumsum(step, dtype=np.int32)
    if len(closed := np.flatnonzero(depth < 0)):
        return _place_of(plain, marks, int(closed[0])), True
    ends = np.flatnonzero((depth == 0) & (step < 0))
    return (_place_of(plain, marks, int(ends[-1])) + 1 if len(ends) else 0), False


def _place_of(text: bytes, marks: NDArray[np.uint8], number: int) -> int:
    """Where in the text the mark of that number stands, counted from the end, near which it is."""
    mark, place = marks[number : number + 1].tobytes(), len(text)
    for _ in range(int(np.count_nonzero(marks[number:] == marks[number]))):
        place = text.rindex(mark, 0, place)
    return place


def _decoded(text: bytes, number: int, path: Path, decoder: msgspec.json.Decoder[Any]) -> Iterable[Any]:
    """The tasks in the inside of a list, from that number on. Raises BadRequest, UnicodeDecodeError."""
    inside = text.strip(_BLANK)
    if not inside:
        return ()
    if inside.startswith(b",") == (number > 0) and inside != b",":
        # Label Studio's own JSON is Python's, which may hold NaN and half characters: the slower reader takes them.
        for reader in (decoder, _any_tasks):
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError), _no_search_for_cycles():
                tasks: list[Any] = reader.decode(b"[" + inside.removeprefix(b",") + b"]")
                return tasks
    return _decoded_one_by_one(text.decode(), number, path)


@contextlib.contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """JSON has no cycles, and its thousands of lists and dicts would set the garbage collector off again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _decoded_one_by_one(text: str, number: int, path: Path) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(), 0
    while (at := _blank_end(text, at)) < len(text):
        if number:
            if text[at] != ",":
                raise BadRequest(f"{path} is not JSON: expected a comma after task number {number - 1}")
            at = _blank_end(text, at + 1)
        try:
            task, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise BadRequest(f"{path} is not JSON: task number {number}: {error}") from error
        yield task
        number += 1


def _blank_end(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
