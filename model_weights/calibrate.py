"""Fits how likely a candidate object is right, and writes it into the weights.

    python model_weights/calibrate.py --data DIR --weights model_weights/compact.safetensors

What a candidate is judged by is in `backend.instances`: a logistic model over its shape, probabilities and borders, and
over the network's features inside and round it (the evidence, whose weights go into the file), one model a class; then
a chance that knows of the candidates which overlap. The features weigh too many numbers for the few places that
training held out, so the models learn from the places it was trained on as well, where the maps are surer than
elsewhere; how sure the candidates are is then told by held-out places alone, seen as pre-labels see them: with the mean
of a look and its mirror image.

What is printed is cross-validated: each held-out place is judged by models fitted on the others. ``EXCLUSIVE``, and the
mean of what is printed for ``MISSED_PER_DOUBT``, are to be copied into `backend.instances`. Run it after ``train.py``.
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
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import optimize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import train

from backend import compact, instances
from backend.segmenter import Embedding

FloatArray = NDArray[np.float64]

PLACE_PX = 512
SCALES = {
    "hot_banepa_e2e": 1.0, "hot_zanzibar": 1.0, "massachusetts_buildings_figs": 2.0, "agoro_fields": 1.0,
    "naip_urban_trees": 2.0, "dubai_mbrsc": 1.0,
}  # fmt: skip
"""The data folders whose objects are all outlined, and how much they are enlarged: a place is 512 px wide then."""

LABELS = ("building", "field", "water", "vegetation")
"""Classes that are fitted; of the others, what is right is not told by a common outline."""

OUTLINED = ("building", "field")
"""Classes of single objects. The rest comes in patches, and two numbers that hold for all classes are told by these."""

MOST_PLACES = 40
"""Of a data folder that training learned from."""

VIEWS_HELD_OUT, VIEWS_LEARNED = 5, 2
"""How often each place is looked at. The first view of a held-out one is as it is; further ones are turned, and of
another scale and light."""

MIN_AREA_PX, LEAST_OBJECT_PX = 100, 150
FOLDS = 4
RIGHT_IOU = 0.5
LEAST_SCORE = 0.3
HAND = len(instances.FEATURES) - 2
RIDGE, RIDGE_EVIDENCE = 1.0, 30.0


@dataclass(frozen=True)
class View:
    """A place as it was looked at."""

    group: str
    label: str
    fold: int | None
    """None for a place that training learned from."""

    is_plain: bool
    rgb: NDArray[np.uint8]
    truth: NDArray[np.int32]
    """Number of the label's object at each pixel, 0 for none."""


@dataclass(frozen=True)
class Judged:
    """Candidates of a view, and what they are to the objects that are there."""

    view: View
    candidates: instances.Candidates
    features: FloatArray
    """By hand, then inside, then round it, (N, 14 + 2 · 56)."""

    iou: FloatArray
    """With the object that each matches best, (N,)."""

    best: NDArray[np.int64]
    """Number of that object, (N,)."""

    objects: frozenset[int]
    """Objects that count."""

    @property
    def used(self) -> NDArray[np.bool_]:
        return (self.candidates.areas_px >= MIN_AREA_PX) & (np.arange(len(self.iou)) > 0)

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.iou >= RIGHT_IOU


def views(data: Path, seed: int = 1) -> Iterator[View]:
    rng = np.random.default_rng(seed)
    places: dict[tuple[str, str, bool], list[tuple[int, NDArray[np.uint8], NDArray[np.int32]]]] = {}
    for sheet in train.sheets(data):
        for label in (name for name in LABELS if sheet.group in SCALES and train.LABELS.index(name) in sheet.known):
            found = places.setdefault((sheet.group, label, sheet.held_out), [])
            side, (height, width) = round(PLACE_PX / SCALES[sheet.group]), sheet.rgb.shape[:2]
            objects = objects_of(sheet, label)
            # Photographs are places of their own, and scenes are many places.
            number = (found[-1][0] if found else -1) + 1
            for top in range(0, max(1, height - side // 2), side):
                for left in range(0, max(1, width - side // 2), side):
                    part = np.s_[top : top + side, left : left + side]
                    if (objects[part] > 0).sum() > LEAST_OBJECT_PX:
                        found.append((number, sheet.rgb[part], objects[part]))
                        number += 1 if sheet.group.startswith("hot_") else 0
    for (group, label, held_out), found in places.items():
        if not held_out:
            found = [found[i] for i in rng.permutation(len(found))[:MOST_PLACES]]
        for number, rgb, truth in found:
            for i in range(VIEWS_HELD_OUT if held_out else VIEWS_LEARNED):
                is_plain = held_out and i == 0
                scale = SCALES[group] * (1.0 if is_plain else float(np.exp(rng.uniform(np.log(0.6), np.log(1.15)))))
                how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
                seen = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=how)
                there = cv2.resize(truth.astype(np.float32), seen.shape[1::-1], interpolation=cv2.INTER_NEAREST)
                if not is_plain:
                    seen, there = turned(seen, there, rng)
                fold = number % FOLDS if held_out else None
                yield View(
                    group, label, fold, is_plain, np.ascontiguousarray(seen), np.ascontiguousarray(there, np.int32)
                )


def objects_of(sheet: train.Sheet, label: str) -> NDArray[np.int32]:
    """Number of the label's object at each pixel, 0 for none; patches where the sheet does not tell objects apart."""
    is_label = sheet.classes[sheet.instances] == train.LABELS.index(label)
    if not sheet.prompted:
        return np.asarray(cv2.connectedComponents(is_label.astype(np.uint8))[1], np.int32)
    return np.where(is_label, sheet.instances, 0)


def turned(
    rgb: NDArray[np.uint8], truth: NDArray[np.float32], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Another way round, and in another light."""
    quarters, mirrored = int(rng.integers(4)), rng.random() < 0.5
    rgb, truth = np.rot90(rgb, quarters), np.rot90(truth, quarters)
    if mirrored:
        rgb, truth = rgb[:, ::-1], truth[:, ::-1]
    light = ((rgb.astype(np.float32) - 128) * rng.uniform(0.8, 1.2) + 128 + rng.uniform(-25, 25)) * rng.uniform(
        0.92, 1.08, 3
    )
    return np.clip(light, 0, 255).astype(np.uint8), truth


def feature_maps(embedding: Embedding) -> NDArray[np.float32]:
    """Coarse and fine features at each pixel, (56, H, W)."""
    coarse, fine = (torch.from_numpy(embedding.features[name].astype(np.float32))[None] for name in ("coarse", "fine"))
    both = torch.cat([F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False), fine], 1)
    height, width = embedding.image_hw
    return F.interpolate(both, scale_factor=2, mode="bilinear", align_corners=False)[0, :, :height, :width].numpy()


def judged(segmenter: compact.CompactSegmenter, view: View) -> Judged:
    embedding = segmenter.embed(view.rgb)
    dense = segmenter.dense(embedding)
    if view.fold is not None:
        dense = dense.mean_with_mirrored(segmenter.dense_mirrored(view.rgb))
    found = instances.candidates_of(dense, view.label, min_area_px=MIN_AREA_PX)
    seen = instances.pooled(found, feature_maps(embedding))
    truth = view.truth
    common = np.zeros((len(found.areas_px), truth.max() + 1))
    np.add.at(common, (found.pieces.ravel(), truth.ravel()), 1)
    for node, children in enumerate(found.children.tolist()):
        if children[0]:
            common[node] = common[children[0]] + common[children[1]]
    areas = np.bincount(truth.ravel())
    iou = common / np.maximum(found.areas_px[:, None] + areas - common, 1)
    iou[:, 0] = iou[0] = 0
    objects = frozenset((np.flatnonzero(areas[1:] >= LEAST_OBJECT_PX) + 1).tolist())
    features = np.concatenate((found.features[:, :HAND], seen.reshape(len(seen), -1)), axis=1)
    return Judged(view, found, features, iou.max(1), iou.argmax(1), objects)


def logistic(x: FloatArray, right: NDArray[np.bool_], ridge: FloatArray) -> FloatArray:
    """Factors of the columns and the constant, (K + 1,); ``ridge`` is the weight on small ones, of unit spread."""
    mean, spread = x.mean(0), x.std(0) + 1e-6
    z, ridge = np.column_stack(((x - mean) / spread, np.ones(len(x)))), np.append(ridge, 0.0)

    def loss(factors: FloatArray) -> tuple[float, FloatArray]:
        logits = z @ factors
        chances = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
        value = (np.logaddexp(0, logits) - right * logits).sum() + (ridge * factors**2).sum() / 2
        return float(value), z.T @ (chances - right) + ridge * factors

    found = optimize.minimize(loss, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    scaled = found[:-1] / spread
    return np.append(scaled, found[-1] - scaled @ mean)


def fitted(samples: list[Judged], columns: int) -> FloatArray:
    """Factors of the first so many columns and the constant: of all samples, and as sure as held-out ones are."""

    def rows(chosen: list[Judged]) -> tuple[FloatArray, NDArray[np.bool_]]:
        x = np.concatenate([one.features[one.used, :columns] for one in chosen])
        return x, np.concatenate([one.right[one.used] for one in chosen])

    factors = logistic(*rows(samples), np.append(np.full(HAND, RIDGE), np.full(columns - HAND, RIDGE_EVIDENCE)))
    x, right = rows([one for one in samples if one.view.fold is not None])
    scale, shift = logistic((x @ factors[:-1] + factors[-1])[:, None], right, np.array([1e-3]))
    factors = factors * scale
    factors[-1] += shift
    return factors


def own_chances(sample: Judged, factors: FloatArray) -> FloatArray:
    return instances.scored(sample.features[:, : len(factors) - 1], tuple(factors))


def figures(samples: list[Judged], chances: list[FloatArray]) -> dict[str, float]:
    hits = found = true = 0
    scores, right = [], []
    for sample, chance in zip(samples, chances, strict=True):
        nodes = sample.candidates.chosen(chance, least_score=LEAST_SCORE, min_area_px=MIN_AREA_PX)
        hit = {int(sample.best[n]) for n in nodes if sample.right[n]} & sample.objects
        hits, found, true = hits + len(hit), found + len(nodes), true + len(sample.objects)
        scores.append(chance[nodes])
        right.append(sample.right[nodes])
    at, y = np.concatenate(scores), np.concatenate(right)
    tenth = np.minimum((at * 10).astype(int), 9)
    error = np.abs(np.bincount(tenth, at, 10) - np.bincount(tenth, y, 10)).sum() / max(1, len(at))
    shares = {"precision": hits / max(1, found), "recall": hits / max(1, true), "F1": 2 * hits / max(1, found + true)}
    return {name: round(float(value), 3) for name, value in {**shares, "calibration error": error}.items()}


def missed_per_doubt(samples: list[Judged], chances: list[FloatArray]) -> float:
    """Objects that are missed for each one that was knowingly left out, for ``MISSED_PER_DOUBT``."""
    missed = doubt = 0.0
    for sample, chance in zip(samples, chances, strict=True):
        nodes, every = (
            sample.candidates.chosen(chance, least_score=least, min_area_px=MIN_AREA_PX) for least in (LEAST_SCORE, 0.0)
        )
        missed += len(sample.objects - {int(sample.best[n]) for n in nodes if sample.right[n]})
        doubt += chance[every][chance[every] < LEAST_SCORE].sum()
    return missed / max(doubt, 1e-6)


def told(samples: list[Judged], chances: list[FloatArray]) -> tuple[float, float, float]:
    """Factors for ``EXCLUSIVE``, from the candidates' own chances."""
    x = np.concatenate(
        [
            np.stack((instances.log_odds(alike), instances.log_odds(own)), axis=1)[one.used]
            for one, own in zip(samples, chances, strict=True)
            for alike in (instances.exclusive(one.candidates, own, min_area_px=MIN_AREA_PX, factors=(1.0, 0.0, 0.0)),)
        ]
    )
    of_alike, of_own, constant = logistic(x, np.concatenate([one.right[one.used] for one in samples]), np.full(2, 1e-3))
    return round(float(of_alike), 3), round(float(of_own), 3), round(float(constant), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=compact.SHIPPED_WEIGHTS)
    arguments = parser.parse_args()
    segmenter = compact.CompactSegmenter.load(arguments.weights)
    samples = [judged(segmenter, view) for view in views(arguments.data)]
    held_out = [one for one in samples if one.view.fold is not None]
    every = samples[0].features.shape[1]
    ways: dict[str, list[FloatArray]] = {}
    for way, columns, learned in (("shape and maps alone", HAND, False), ("with evidence", every, True)):
        by_fold = {
            (label, fold): fitted(
                [o for o in (samples if learned else held_out) if o.view.label == label and o.view.fold != fold],
                columns,
            )
            for label in LABELS
            for fold in range(FOLDS)
        }
        ways[way] = [own_chances(one, by_fold[one.view.label, one.view.fold or 0]) for one in held_out]
    outlined = [one for one in held_out if one.view.label in OUTLINED]
    of_outlined = [c for one, c in zip(held_out, ways["with evidence"], strict=True) if one.view.label in OUTLINED]
    factors = told(outlined, of_outlined)
    print("EXCLUSIVE =", factors)
    ways["and exclusion"] = [
        instances.exclusive(one.candidates, own, min_area_px=MIN_AREA_PX, factors=factors)
        for one, own in zip(held_out, ways["with evidence"], strict=True)
    ]
    sets = dict.fromkeys((one.view.group, one.view.label) for one in held_out)
    for of in sets:
        own = [
            (o, c) for o, c in zip(held_out, ways["and exclusion"], strict=True) if (o.view.group, o.view.label) == of
        ]
        print("MISSED_PER_DOUBT,", *of, round(missed_per_doubt(*(list(c) for c in zip(*own, strict=True))), 2))
    for way, chances in ways.items():
        for of in sets:
            for views_of, is_all in (("as they are", False), ("all views", True)):
                chosen = [
                    (one, chance)
                    for one, chance in zip(held_out, chances, strict=True)
                    if (one.view.group, one.view.label) == of and (is_all or one.view.is_plain)
                ]
                print(way, *of, views_of, figures(*(list(column) for column in zip(*chosen, strict=True))))
    scoring: dict[str, list[float]] = {}
    evidence: dict[str, list[list[float]]] = {}
    for label in LABELS:
        own = fitted([one for one in samples if one.view.label == label], every)
        scoring[label] = [*own[:HAND].tolist(), 1.0, 1.0, float(own[-1])]
        evidence[label] = own[HAND:-1].reshape(2, -1).tolist()
    alone = fitted(outlined, HAND).tolist()
    scoring[instances.ANY_LABEL] = [*alone[:-1], 0.0, 0.0, alone[-1]]
    content = arguments.weights.read_bytes()
    with safetensors.safe_open(str(arguments.weights), "pt") as file:
        notes = dict(file.metadata())
    net = compact.CompactNet(json.loads(notes["labels"]))
    net.load_state_dict({name: value.float() for name, value in safetensors.torch.load(content).items()})
    notes["scoring"] = json.dumps({label: np.round(factors, 5).tolist() for label, factors in scoring.items()})
    notes["evidence"] = json.dumps({label: np.round(weights, 5).tolist() for label, weights in evidence.items()})
    compact.save_weights(net, arguments.weights, notes)
    print("written to", arguments.weights)


if __name__ == "__main__":
    main()
