"""Fits how likely a candidate object is right, on places held out from training, and writes it into the weights.

    python model_weights/calibrate.py --data DIR --weights model_weights/compact.safetensors

The factors are those of a logistic model over `backend.instances.FEATURES`, one model a class. What is printed is
cross-validated: each tile is judged by factors fitted on the others. Run it after ``train.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import safetensors.torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import train

from backend import compact, instances

TILE_PX = 512
SCALES = {
    "hot_banepa_e2e": (1.0, 0.6),
    "hot_zanzibar": (1.0, 0.6),
    "massachusetts_buildings_figs": (2.0,),
    "agoro_fields": (1.0, 0.6),
}
"""At what sizes the held-out places of a data folder are looked at."""

MIN_AREA_PX = 100
FOLDS = 4
RIGHT_IOU = 0.5
LEAST_SCORE = 0.3


@dataclass(frozen=True)
class Judged:
    """Candidates of a tile, and what they are to the objects that are there."""

    label: str
    group: str
    candidates: instances.Candidates
    iou: NDArray[np.float64]
    """With the object that each matches best, (N,)."""

    best: NDArray[np.int64]
    """Number of that object, (N,)."""

    objects: frozenset[int]
    """Objects that count."""


def tiles(data: Path) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.int32]]]:
    for sheet in train.sheets(data):
        for scale in SCALES.get(sheet.group, ()) if sheet.held_out else ():
            size = round(TILE_PX / scale)
            for top in range(0, sheet.rgb.shape[0] - size // 2, size):
                for left in range(0, sheet.rgb.shape[1] - size // 2, size):
                    part = np.s_[top : top + size, left : left + size]
                    rgb, numbers = sheet.rgb[part], sheet.instances[part].astype(np.float32)
                    how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
                    rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=how)
                    numbers = cv2.resize(numbers, rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(np.int32)
                    if (numbers > 0).any():
                        yield sheet.group, np.ascontiguousarray(rgb), numbers


def judged(segmenter: compact.CompactSegmenter, data: Path) -> list[Judged]:
    found = []
    for group, rgb, truth in tiles(data):
        label = "field" if group == "agoro_fields" else "building"
        dense = segmenter.dense(segmenter.embed(rgb))
        index = dense.labels.index(label)
        maps = dense.probabilities[index].astype(np.float64), dense.boundary[index].astype(np.float64)
        candidates = instances.candidates(*maps, min_area_px=MIN_AREA_PX)
        common = np.zeros((len(candidates.areas_px), truth.max() + 1))
        np.add.at(common, (candidates.pieces.ravel(), truth.ravel()), 1)
        for node, children in enumerate(candidates.children.tolist()):
            if children[0]:
                common[node] = common[children[0]] + common[children[1]]
        areas = np.bincount(truth.ravel())
        iou = common / (candidates.areas_px[:, None] + areas - common)
        iou[:, 0] = 0
        objects = frozenset((np.flatnonzero(areas[1:] >= 150) + 1).tolist())
        found.append(Judged(label, group, candidates, iou.max(1), iou.argmax(1), objects))
    return found


def fitted(samples: list[Judged]) -> tuple[float, ...]:
    """Factors by Newton's method, with a little weight on small ones; each tile counts alike."""
    rows, right, weight = [], [], []
    for sample in samples:
        used = np.flatnonzero(sample.candidates.areas_px >= MIN_AREA_PX)
        used = used[used > 0]
        rows.append(sample.candidates.features[used])
        right.append(sample.iou[used] >= RIGHT_IOU)
        weight.append(np.full(len(used), 1.0))
    features, y, w = np.concatenate(rows), np.concatenate(right).astype(float), np.concatenate(weight)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x = np.column_stack(((features - mean) / spread, np.ones(len(y))))
    ridge = np.append(np.full(features.shape[1], 1.0), 0.0)
    factors = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ factors))
        gradient = x.T @ (w * (p - y)) + ridge * factors
        factors -= np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x + np.diag(ridge), gradient)
    scaled = factors[:-1] / spread
    return tuple(np.round(np.append(scaled, factors[-1] - scaled @ mean), 5).tolist())


def f1(samples: list[Judged], factors: list[tuple[float, ...]]) -> dict[str, float]:
    hits = found = true = 0
    for sample, own in zip(samples, factors, strict=True):
        scores = instances.scored(sample.candidates.features, own)
        nodes = sample.candidates.chosen(scores, least_score=LEAST_SCORE, min_area_px=MIN_AREA_PX)
        hit = {int(sample.best[n]) for n in nodes if sample.iou[n] >= RIGHT_IOU} & sample.objects
        hits, found, true = hits + len(hit), found + len(nodes), true + len(sample.objects)
    return {"precision": hits / max(1, found), "recall": hits / max(1, true), "F1": 2 * hits / max(1, found + true)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=compact.SHIPPED_WEIGHTS)
    arguments = parser.parse_args()
    segmenter = compact.CompactSegmenter.load(arguments.weights)
    samples = judged(segmenter, arguments.data)
    scoring: dict[str, tuple[float, ...]] = {}
    for label in ("building", "field"):
        own = [sample for sample in samples if sample.label == label]
        folds = [fitted([s for i, s in enumerate(own) if i % FOLDS != fold]) for fold in range(FOLDS)]
        for group in dict.fromkeys(sample.group for sample in own):
            chosen = [(sample, folds[i % FOLDS]) for i, sample in enumerate(own) if sample.group == group]
            figures = f1(*(list(column) for column in zip(*chosen, strict=True)))
            print(label, group, {name: round(value, 3) for name, value in figures.items()})
        scoring[label] = fitted(own)
    scoring[instances.ANY_LABEL] = fitted(samples)
    content = arguments.weights.read_bytes()
    with safetensors.safe_open(str(arguments.weights), "pt") as file:
        notes = dict(file.metadata())
    net = compact.CompactNet(json.loads(notes["labels"]))
    net.load_state_dict({name: value.float() for name, value in safetensors.torch.load(content).items()})
    compact.save_weights(net, arguments.weights, {**notes, "scoring": json.dumps(scoring)})
    print("written to", arguments.weights)


if __name__ == "__main__":
    main()
