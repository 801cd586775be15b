"""All that Segment Anything sees on an image, without classes: a grid of clicks, the good answers, each object once.

Nothing here knows what an object is of: the outlines carry no label. The procedure and its defaults are those of
Kirillov et al., "Segment Anything" (2023), appendix B. Masks stay at the decoder's resolution, cut to their boxes,
until it is known which of them remain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from . import vectorize
from .errors import BadImage
from .images import decode
from .segmenter import Embedding
from .tile import Region
from .vectorize import VectorizeOptions
from .whole import write_json

FloatArray = NDArray[np.float64]

_EDGE_PX = 20.0
"""A mask that ends so near to a crop's edge, in pixels, was cut by it."""

_STABILITY_OFFSET = 1.0
"""A mask is stable where its logits cut at plus and at minus this make nearly the same shape."""

_MOST_PIXELS = 500_000_000
"""Larger image files are not opened."""

_DEFAULT_OUTLINES = VectorizeOptions()


@runtime_checkable
class Proposer(Protocol):
    """A segmenter that answers many single clicks at once: `backend.sam.SamSegmenter`."""

    @property
    def version(self) -> str:
        """Name of the weights; changes exactly when they do."""
        ...

    def embed(self, image_rgb: NDArray[np.uint8]) -> Embedding:
        """Features of an image, (H, W, 3) uint8 RGB."""
        ...

    def propose(
        self, embedding: Embedding, points_xy: FloatArray, *, least_iou: float
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]]:
        """Index of the click (M,), logits (M, h, w), expected IoU (M,) of the candidates of some clicks at a time."""
        ...

    def logit_size_xy(self, embedding: Embedding) -> FloatArray:
        """Width and height of one of those logits, in pixels of the image."""
        ...


@dataclass(frozen=True, slots=True)
class EverythingOptions:
    """What is looked for how closely."""

    points_per_side: int = 32
    """Clicks along each side of the image, and of each crop of the first layer."""

    least_iou: float = 0.88
    """Candidates that SAM expects to be right to less than this are left out, 0…1."""

    least_stability: float = 0.95
    """Candidates whose shape depends more on where it is cut are left out, 0…1."""

    most_box_iou: float = 0.7
    """Of two candidates whose boxes overlap more, the better one stays, 0…1."""

    crop_layers: int = 0
    """Layer n looks at 2ⁿ by 2ⁿ overlapping crops as well, each encoded for itself: for small objects."""

    crop_overlap: float = 512 / 1500
    """Share of the image's shorter side by which the first layer's crops overlap; half of it in the next, and so on."""

    points_divisor: int = 1
    """Each layer has so many times fewer clicks along a side than the one before."""

    def __post_init__(self) -> None:
        if self.points_per_side < 1 or self.points_divisor < 1 or not 0 <= self.crop_layers <= 4:
            raise ValueError(
                "points_per_side and points_divisor must be at least 1, crop_layers 0 to 4, got "
                f"{self.points_per_side}, {self.points_divisor}, {self.crop_layers}"
            )


_DEFAULTS = EverythingOptions()


@dataclass(frozen=True, slots=True)
class Proposal:
    """An object of no known class."""

    polygons: tuple[Polygon, ...]
    """Its parts, valid, in pixels of the image."""

    score: float
    """The IoU that SAM expects, 0…1."""

    stability: float
    """IoU of the shapes at a higher and a lower cut, 0…1."""

    point_xy: tuple[float, float]
    """The click that found it, in pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    logits: NDArray[np.float32]
    """Those of its box and a margin, (h, w)."""

    first_xy: FloatArray
    """Corner of the first logit, in pixels of the image."""

    each_xy: FloatArray
    """Width and height of a logit, in pixels of the image."""

    box_xyxy: FloatArray
    point_xy: FloatArray
    iou: float
    stability: float
    crop_area: float


def everything(
    segmenter: Proposer,
    image_rgb: NDArray[np.uint8],
    *,
    options: EverythingOptions = _DEFAULTS,
    outlines: VectorizeOptions = _DEFAULT_OUTLINES,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Proposal]:
    """The objects on an image, (H, W, 3) uint8 RGB, the surest first. ``progress`` is told the share done, 0…1."""
    height, width = image_rgb.shape[:2]
    crops = crop_boxes(height, width, options)
    kept: list[_Candidate] = []
    for number, (layer, crop) in enumerate(crops):
        left, top, right, bottom = crop
        side = max(1, options.points_per_side // options.points_divisor**layer)
        points = grid(side) * (right - left, bottom - top)
        embedding = segmenter.embed(np.ascontiguousarray(image_rgb[top:bottom, left:right]))
        each_xy = segmenter.logit_size_xy(embedding)
        found: list[_Candidate] = []
        done = 0
        for which, logits, ious in segmenter.propose(embedding, points, least_iou=options.least_iou):
            found += _candidates(which, logits, ious, points, each_xy, crop, (height, width), options)
            done = int(which.max(initial=done))
            progress((number + done / len(points)) / len(crops))
        best_first = sorted(found, key=lambda one: -one.iou)
        kept += _without_doubles(best_first, options.most_box_iou)
    if len(crops) > 1:
        # A smaller crop shows more of an object.
        kept = _without_doubles(sorted(kept, key=lambda one: (one.crop_area, -one.iou)), options.most_box_iou)
    proposals = [
        Proposal(polygons, min(one.iou, 1.0), one.stability, (float(one.point_xy[0]), float(one.point_xy[1])))
        for one in kept
        if (polygons := _outlined(one, (height, width), outlines))
    ]
    return sorted(proposals, key=lambda one: -one.score)


def everything_in_file(
    segmenter: Proposer,
    image: Path,
    out: Path,
    *,
    options: EverythingOptions,
    progress: Callable[[float], None] = lambda share: None,
) -> int:
    """Write the objects on an image file as JSON, rings in pixels (shell first), whole or not at all; how many.

    Raises BadImage where the file is no image.
    """
    try:
        content = image.read_bytes()
    except OSError as error:
        raise BadImage(f"{image} cannot be read: {error.strerror}") from error
    rgb = decode(content, name=str(image), max_pixels=_MOST_PIXELS)
    found = everything(segmenter, rgb, options=options, progress=progress)
    proposals = [
        {
            "polygons": [
                [np.asarray(ring.coords)[:-1].tolist() for ring in (part.exterior, *part.interiors)]
                for part in one.polygons
            ],
            "score": one.score,
            "stability": one.stability,
        }
        for one in found
    ]
    height, width = rgb.shape[:2]
    written = {"image": image.name, "width": width, "height": height, "proposals": proposals}
    write_json(out, written)
    return len(found)


def regions_of(proposals: Sequence[Proposal]) -> list[Region]:
    """Proposals as regions without a label, the parts of one object tied together."""
    return [
        Region(part, "", one.score, object_id=f"proposal-{number}" if len(one.polygons) > 1 else "")
        for number, one in enumerate(proposals)
        for part in one.polygons
    ]


def grid(side: int) -> FloatArray:
    """Points in the middles of ``side`` by ``side`` squares that cover 0…1 by 0…1, (side², 2), row by row."""
    middles = (np.arange(side) + 0.5) / side
    return np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2)


def crop_boxes(height: int, width: int, options: EverythingOptions) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Layer, and left, top, right, bottom of each crop in pixels, from the whole image to the smallest."""
    crops = [(0, (0, 0, width, height))]
    for layer in range(1, options.crop_layers + 1):
        count = 2**layer
        overlap = int(options.crop_overlap * min(height, width) * 2 / count)
        wide, high = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for i, j in itertools.product(range(count), repeat=2):
            left, top = i * (wide - overlap), j * (high - overlap)
            crops.append((layer, (left, top, min(left + wide, width), min(top + high, height))))
    return crops


def _candidates(
    which: NDArray[np.intp],
    logits: NDArray[np.float32],
    ious: NDArray[np.float32],
    points: FloatArray,
    each_xy: FloatArray,
    crop: tuple[int, int, int, int],
    image_hw: tuple[int, int],
    options: EverythingOptions,
) -> Iterator[_Candidate]:
    """Those that are stable and not cut by the crop's edge."""
    first = np.array(crop[:2], np.float64)
    edges = np.array(crop, np.float64)
    is_inner = edges != (0, 0, image_hw[1], image_hw[0])
    for click, values, iou in zip(which, logits, ious, strict=True):
        inner = int(np.count_nonzero(values > _STABILITY_OFFSET))
        stable = inner / max(1, int(np.count_nonzero(values > -_STABILITY_OFFSET)))
        if stable < options.least_stability:
            continue
        inside = values > 0
        columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
        if not len(columns):
            continue
        cells = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        box = np.minimum(np.tile(first, 2) + cells * np.tile(each_xy, 2), np.tile(edges[2:], 2))
        if (is_inner & (np.abs(box - edges) <= _EDGE_PX)).any():
            continue
        x0, y0 = max(0, cells[0] - 1), max(0, cells[1] - 1)
        window = values[y0 : cells[3] + 1, x0 : cells[2] + 1].copy()
        area = float((crop[2] - crop[0]) * (crop[3] - crop[1]))
        yield _Candidate(
            window, first + (x0, y0) * each_xy, each_xy, box, first + points[click], float(iou), stable, area
        )


def _without_doubles(best_first: list[_Candidate], most_iou: float) -> list[_Candidate]:
    """Each candidate whose box does not overlap a better one's by more."""
    if not best_first:
        return []
    boxes = np.stack([one.box_xyxy for one in best_first])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.ones(len(boxes), bool)
    kept = []
    for i, candidate in enumerate(best_first):
        if not left[i]:
            continue
        kept.append(candidate)
        rest = i + 1 + np.flatnonzero(left[i + 1 :])
        low, high = np.maximum(boxes[i, :2], boxes[rest, :2]), np.minimum(boxes[i, 2:], boxes[rest, 2:])
        both = np.prod(np.clip(high - low, 0, None), axis=1)
        left[rest[both > most_iou * (areas[i] + areas[rest] - both)]] = False
    return kept


def _outlined(one: _Candidate, image_hw: tuple[int, int], outlines: VectorizeOptions) -> tuple[Polygon, ...]:
    """The candidate's shape at the image's pixels."""
    import cv2

    last_xy = one.first_xy + np.array(one.logits.shape[::-1]) * one.each_xy
    left, top = (int(v) for v in np.floor(one.first_xy))
    right, bottom = (min(n, math.ceil(v)) for n, v in zip(image_hw[::-1], last_xy, strict=True))
    offset = (np.array([left, top]) + 0.5 - one.first_xy) / one.each_xy - 0.5
    logits = cv2.warpAffine(
        one.logits,
        np.column_stack([np.diag(1 / one.each_xy), offset]),
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    probabilities = 1 / (1 + np.exp(-np.clip(np.asarray(logits, np.float32), -30, 30)))
    return tuple(
        shapely.transform(polygon, lambda xy: xy + np.array([left, top]))
        for polygon in vectorize.polygons(probabilities, options=outlines)
    )
