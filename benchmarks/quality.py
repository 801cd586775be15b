"""How good the outlines are: clicks and boxes of a simulated annotator, and pre-labels, on labelled tiles.

    python benchmarks/quality.py DATA [--match 19_386694] [--mode clicks boxes auto] [--limit 100] [--baseline grabcut]

DATA holds ``images/`` and ``labels/px/*.geojson`` (or ``labels/*.geojson``): polygons in pixels, with ``touches_edge``.

clicks  The first click at the deepest point of the object, each further one at the deepest point of the largest error.
        Mean IoU after 1, 3 and 5 clicks; NoC@85 is the mean number of clicks to IoU .85, at most --max-clicks.
boxes   One box an object, its bounds with 5 % jitter. Mean and median IoU.
auto    No prompt. Polygons matched one to one with the truth at IoU .5: precision, recall, F1.

Whole objects of at least 150 px are judged. ``--baseline grabcut`` gives the same clicks to OpenCV's GrabCut.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from shapely import Polygon
from shapely.geometry import shape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend import vectorize
from backend.compact import CompactSegmenter
from backend.segmenter import Prompts
from backend.service import PRE_LABEL_MIN_PX
from backend.settings import Settings
from backend.vectorize import VectorizeOptions

Mask = np.ndarray
Answer = Callable[[Path, Prompts], Mask]


@dataclass(frozen=True)
class Target:
    """An object to outline."""

    image: Path
    truth: Mask
    bounds_xyxy: tuple[float, float, float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--match", default="", help="only images whose name starts with this")
    parser.add_argument("--mode", nargs="+", default=["clicks", "boxes", "auto"], choices=["clicks", "boxes", "auto"])
    parser.add_argument("--label", default="building")
    parser.add_argument("--limit", type=int, default=100, help="objects (clicks, boxes) or tiles (auto)")
    parser.add_argument("--max-clicks", type=int, default=20)
    parser.add_argument("--baseline", choices=["grabcut"])
    arguments = parser.parse_args()
    if arguments.data is None:
        print("quality: not measured; it needs a folder of labelled tiles (see --help)")
        return
    tiles = list(labelled_tiles(arguments.data, arguments.match))
    if not tiles:
        parser.error(f"no labelled images in {arguments.data}")
    model = None if arguments.baseline else Model(arguments.label)
    answer = model.outline if model else grabcut
    for mode in arguments.mode:
        if mode == "auto":
            figures = judge_auto(model, tiles[: arguments.limit]) if model else {}
        else:
            targets = whole_objects(tiles, arguments.limit)
            judge = judge_clicks if mode == "clicks" else judge_boxes
            figures = judge(answer, targets, arguments.max_clicks)
        rounded = {name: round(value, 4) for name, value in figures.items()}
        print(json.dumps({"data": arguments.data.name, "match": arguments.match, "mode": mode, **rounded}), flush=True)


class Model:
    """The shipped segmenter, as the server uses it, with the embedding of the tile at hand kept."""

    def __init__(self, label: str) -> None:
        self._segmenter = CompactSegmenter.load()
        self._label = label
        self._embeddings: dict[Path, Any] = {}

    def _embedding(self, image: Path) -> Any:
        if image not in self._embeddings:
            self._embeddings = {image: self._segmenter.embed(read_rgb(image))}
        return self._embeddings[image]

    def outline(self, image: Path, prompts: Prompts) -> Mask:
        embedding = self._embedding(image)
        masks = self._segmenter.segment(embedding, prompts)
        return vectorize.rasterize(vectorize.polygons(masks.probabilities[0]), *embedding.image_hw)

    def pre_labels(self, image: Path) -> list[Polygon]:
        dense = self._segmenter.dense(self._embedding(image))
        least = Settings().model_score_threshold
        found = vectorize.instances(dense, self._label, options=VectorizeOptions(min_area_px=PRE_LABEL_MIN_PX))
        return [polygon for instance in found if instance.score >= least for polygon in instance.polygons]


def grabcut(image: Path, prompts: Prompts) -> Mask:
    """OpenCV's GrabCut: round each click on the object a likely disk and a sure spot, or what lies in the box."""
    pixels = cv2.imread(str(image))
    mask = np.full(pixels.shape[:2], cv2.GC_PR_BGD, np.uint8)
    clicks = [((int(x), int(y)), bool(on)) for (x, y), on in zip(prompts.points_xy, prompts.is_foreground, strict=True)]
    for point, on in clicks:
        if on:
            cv2.circle(mask, point, 24, cv2.GC_PR_FGD, -1)
    for point, on in clicks:
        cv2.circle(mask, point, 4, cv2.GC_FGD if on else cv2.GC_BGD, -1)
    box, how = None, cv2.GC_INIT_WITH_MASK
    if prompts.box_xyxy is not None:
        x0, y0, x1, y1 = prompts.box_xyxy.round().astype(int)
        box, how = (int(x0), int(y0), int(max(x1 - x0, 2)), int(max(y1 - y0, 2))), cv2.GC_INIT_WITH_RECT
    try:
        cv2.grabCut(pixels, mask, box, np.zeros((1, 65)), np.zeros((1, 65)), 4, how)
    except cv2.error:
        return np.zeros(mask.shape, bool)
    found = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD))
    _, parts = cv2.connectedComponents(found.astype(np.uint8))
    clicked = {parts[y, x] for (x, y), on in clicks if on} - {0}
    return np.isin(parts, list(clicked)) if clicked else found


def labelled_tiles(folder: Path, match: str) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    labels = folder / "labels" / "px" if (folder / "labels" / "px").is_dir() else folder / "labels"
    for file in sorted(labels.glob(f"{match}*.geojson")):
        for image in sorted((folder / "images").glob(file.stem + ".*")):
            if image.suffix in (".jpg", ".png"):
                yield image, json.loads(file.read_text())["features"]


def whole_objects(tiles: Sequence[tuple[Path, list[dict[str, Any]]]], limit: int) -> list[Target]:
    found = []
    for image, features in tiles:
        height, width = cv2.imread(str(image)).shape[:2]
        for feature in features:
            outline = shape(feature["geometry"])
            if outline.area >= 150 and not feature["properties"].get("touches_edge"):
                found.append(Target(image, truth_mask(outline, height, width), outline.bounds))
    random.Random(7).shuffle(found)
    # By image, so that each is embedded once.
    return sorted(found[:limit], key=lambda target: target.image)


def truth_mask(outline: Any, height: int, width: int) -> Mask:
    parts = [part for part in shapely.get_parts(outline) if isinstance(part, Polygon)]
    return vectorize.rasterize(parts, height, width)


def judge_clicks(answer: Answer, targets: Sequence[Target], max_clicks: int) -> dict[str, float]:
    series, first, later = [], [], []
    for target in targets:
        points, flags, ious = [], [], []
        wrong, on = target.truth, True
        while len(points) < max_clicks and (not ious or ious[-1] < 0.9):
            point, depth = deepest(wrong)
            if depth <= 0:
                break
            points.append(point)
            flags.append(on)
            begun = time.perf_counter()
            mask = answer(target.image, Prompts(np.array(points), np.array(flags)))
            (later if ious else first).append(time.perf_counter() - begun)
            ious.append(iou(mask, target.truth))
            missed, extra = target.truth & ~mask, mask & ~target.truth
            on = deepest(missed)[1] >= deepest(extra)[1]
            wrong = missed if on else extra
        series.append(ious)
    after = {f"iou@{k}": statistics.mean(s[min(k, len(s)) - 1] for s in series) for k in (1, 3, 5)}
    needed = [next((i for i, value in enumerate(s, 1) if value >= 0.85), max_clicks) for s in series]
    return {
        "objects": len(series), **after, "NoC@85": statistics.mean(needed),
        "first_click_s": statistics.median(first), "later_click_s": statistics.median(later or [0]),
    }  # fmt: skip


def judge_boxes(answer: Answer, targets: Sequence[Target], _: int) -> dict[str, float]:
    rng, ious = random.Random(7), []
    for target in targets:
        x0, y0, x1, y1 = target.bounds_xyxy
        height, width = target.truth.shape
        jitter = [rng.uniform(-0.05, 0.05) * span for span in (x1 - x0, y1 - y0, x1 - x0, y1 - y0)]
        box = np.clip(np.array([x0, y0, x1, y1]) + jitter, 0, [width, height] * 2)
        ious.append(iou(answer(target.image, Prompts(box_xyxy=box)), target.truth))
    return {"objects": len(ious), "mean_iou": statistics.mean(ious), "median_iou": statistics.median(ious)}


def judge_auto(model: Model, tiles: Sequence[tuple[Path, list[dict[str, Any]]]]) -> dict[str, float]:
    hits = predicted = true = vertices = invalid = 0
    seconds = []
    for image, features in tiles:
        begun = time.perf_counter()
        outlines = model.pre_labels(image)
        seconds.append(time.perf_counter() - begun)
        height, width = cv2.imread(str(image)).shape[:2]
        masks = [vectorize.rasterize([outline], height, width) for outline in outlines]
        truths = [truth_mask(shape(f["geometry"]), height, width) for f in features]
        truths = [truth for truth in truths if truth.sum() >= 150]
        pairs = sorted(((iou(m, t), i, j) for i, m in enumerate(masks) for j, t in enumerate(truths)), reverse=True)
        used: set[tuple[str, int]] = set()
        for value, i, j in pairs:
            if value >= 0.5 and ("p", i) not in used and ("t", j) not in used:
                used |= {("p", i), ("t", j)}
        hits += len(used) // 2
        predicted, true = predicted + len(masks), true + len(truths)
        vertices += sum(vectorize.ring_points(outline) for outline in outlines)
        invalid += sum(not outline.is_valid for outline in outlines)
    return {
        "tiles": len(seconds), "precision": hits / max(predicted, 1), "recall": hits / max(true, 1),
        "F1@0.5": 2 * hits / max(predicted + true, 1), "invalid": invalid,
        "vertices_per_polygon": vertices / max(predicted, 1), "seconds_per_tile": statistics.median(seconds),
    }  # fmt: skip


def deepest(region: Mask) -> tuple[tuple[float, float], float]:
    """Centre of the pixel farthest from the region's edge, and how far it is."""
    depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return (column + 0.5, row + 0.5), float(depth[row, column])


def iou(one: Mask, other: Mask) -> float:
    union = np.logical_or(one, other).sum()
    return float(np.logical_and(one, other).sum() / union) if union else 1.0


def read_rgb(path: Path) -> np.ndarray:
    return np.ascontiguousarray(cv2.imread(str(path))[:, :, ::-1])


if __name__ == "__main__":
    main()
