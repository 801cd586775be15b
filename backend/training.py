"""Accepted labels become dense heads of a project, on features that the compact segmenter has already computed.

The shipped network stays as it is; one small head a label is trained, from the shipped head where the label has one.
Tiles of some places are held out to stop in time and to say whether it helped.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import shapely
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from shapely import Polygon
from torch import Tensor

from .compact import CELL_PX, CompactSegmenter, DenseHead, cell_size_xy, save_heads
from .errors import TrainingError
from .segmenter import Embedding

log = logging.getLogger(__name__)

LEAST_TILES_TO_HOLD_OUT = 4
"""With fewer tiles all are learned from, and nothing is known of the quality."""

_WINDOW_CELLS = 64
_WINDOWS_A_STEP = 4
_STEPS = 240
_STEPS_BETWEEN_CHECKS = 20
_CHECKS_WITHOUT_GAIN = 4


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tile whose objects are all outlined, of the labels that are trained."""

    image_rgb: NDArray[np.uint8] | None
    """(H, W, 3), or None where the embedding is given."""

    regions: Sequence[tuple[str, Polygon]]
    """Label and outline in pixel corners of each object."""

    place: str
    """Tiles that share ground, or nearly, have the same place; a place is learned from or held out as a whole."""

    weight: float = 1.0
    """How much the tile counts."""

    embedding: Embedding | None = None
    """Features of the tile, if they are at hand."""

    gsd_m: float | None = None
    """Ground size of a pixel, in metres, where known."""

    def __post_init__(self) -> None:
        if self.image_rgb is None and self.embedding is None:
            raise ValueError("an example needs image_rgb or embedding, got neither")
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True, slots=True)
class LabelReport:
    """How a label's head came out."""

    label: str
    objects: int
    """Outlines with this label, held-out ones counted in."""

    steps: int
    """Training step that the head was taken from; 0 where training did not help and the head stayed as it was."""

    iou_before: float | None
    """IoU of the class map on the held-out tiles with the shipped head; None without such a head or tile."""

    iou_after: float | None
    """The same with the new head; None without held-out tiles."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run learned from and how well."""

    labels: tuple[LabelReport, ...]
    untrained: tuple[str, ...]
    """Labels without any outline, for which nothing was trained."""

    tiles: int
    """Tiles learned from."""

    held_out: tuple[str, ...]
    """Places kept for judging."""

    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    """Features and targets of a label on one tile."""

    embedding: Embedding
    target: NDArray[np.float32]
    """Class and border, (2, 2h, 2w) at half-cells, 0…1."""

    seen: NDArray[np.float32]
    """1 on the image, 0 on its padding, (2h, 2w)."""

    weight: float


def train_heads(
    segmenter: CompactSegmenter,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    out: Path,
    seed: int = 0,
    max_seconds: float = 60,
    progress: Callable[[float, str], None] | None = None,
) -> TrainingReport:
    """Train a head for each label and write them to ``out``, whole or not at all.

    The same data and seed give the same heads, as long as ``max_seconds`` (computing features not counted) is not what
    ends the training. ``progress`` is called with the share done, 0…1, and a few words. Raises TrainingError where
    there is nothing to learn from.
    """
    begun = time.perf_counter()
    tell = progress or (lambda share, words: None)
    counts = {
        label: sum(_same(name, label) for e in examples for name, _ in e.regions) for label in dict.fromkeys(labels)
    }
    trained = [label for label, count in counts.items() if count]
    if not examples:
        raise TrainingError("there is no annotated tile to learn from")
    if not trained:
        raise TrainingError(
            f"none of the {len(examples)} tiles has an outline labelled {' or '.join(counts) or '(no label)'}"
        )

    embeddings = []
    for i, example in enumerate(examples):
        tell(0.3 * i / len(examples), f"features of tile {i + 1} of {len(examples)}")
        embedding = example.embedding
        if embedding is None or embedding.version != segmenter.base_version:
            if example.image_rgb is None:
                raise TrainingError(
                    f"a tile of {example.place} has features of other weights and no image to compute them anew"
                )
            scale = segmenter.working_scale(example.image_rgb.shape[:2], example.gsd_m, labels)
            embedding = segmenter.embed(example.image_rgb, scale=scale)
        embeddings.append(embedding)

    held_out = _held_out_places(examples, trained, seed)
    heads: dict[str, DenseHead] = {}
    reports = []
    deadline = time.perf_counter() + max_seconds
    for i, label in enumerate(trained):
        tell(0.3 + 0.7 * i / len(trained), f"training {label}")
        tiles = [_tile(e, embedding, label) for e, embedding in zip(examples, embeddings, strict=True)]
        learn = [t for t, e in zip(tiles, examples, strict=True) if e.place not in held_out]
        judge = [t for t, e in zip(tiles, examples, strict=True) if e.place in held_out]
        now = time.perf_counter()
        shipped = segmenter.head(label)
        head, steps = _train(shipped, learn, judge, seed=seed, deadline=now + (deadline - now) / (len(trained) - i))
        before = _iou(shipped, judge) if shipped is not None else None
        reports.append(LabelReport(label, counts[label], steps, before, _iou(head, judge)))
        heads[label] = head
        log.info("%s: %s", label, reports[-1])
    save_heads(heads, segmenter.base_version, out, {"seed": str(seed)})
    tell(1.0, "done")
    return TrainingReport(
        tuple(reports),
        tuple(label for label, count in counts.items() if not count),
        sum(e.place not in held_out for e in examples),
        tuple(sorted(held_out)),
        time.perf_counter() - begun,
    )


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _held_out_places(examples: Sequence[Example], labels: Sequence[str], seed: int) -> set[str]:
    """About a quarter of the tiles, by whole places, such that what remains has each label; empty if that cannot be."""
    places = sorted({e.place for e in examples})
    if len(examples) < LEAST_TILES_TO_HOLD_OUT or len(places) < 2:
        return set()
    chosen: set[str] = set()
    for i in np.random.default_rng(seed).permutation(len(places)):
        tried = chosen | {places[i]}
        rest = [e for e in examples if e.place not in tried]
        if not rest or len(examples) - len(rest) > max(1, len(examples) // 2):
            continue
        if all(any(_same(name, label) for e in rest for name, _ in e.regions) for label in labels):
            chosen = tried
        if len(examples) - sum(e.place not in chosen for e in examples) >= len(examples) / 4:
            break
    return chosen


def _tile(example: Example, embedding: Embedding, label: str) -> _Tile:
    rows, columns = embedding.features["coarse"].shape[1:]
    shape = rows * CELL_PX, columns * CELL_PX
    per_px = CELL_PX / cell_size_xy(embedding)  # the network may see the tile enlarged
    instances = np.zeros(shape, np.float32)
    outlines = sorted((p for name, p in example.regions if _same(name, label)), key=lambda p: -p.area)
    for number, outline in enumerate(outlines, 1):
        for part in shapely.get_parts(outline):
            if part.geom_type == "Polygon":
                rings = [np.asarray(ring.coords)[:, :2] * per_px for ring in (part.exterior, *part.interiors)]
                cv2.fillPoly(instances, [np.round(ring * 16 - 8).astype(np.int32) for ring in rings], number, shift=4)
    border = cv2.dilate(instances, np.ones((3, 3))) != cv2.erode(instances, np.ones((3, 3)))
    target = np.stack([_halved(instances > 0), np.minimum(1, 1.5 * _halved(border))])
    width, height = (round(n) for n in embedding.image_hw[::-1] * per_px)
    seen = np.zeros((2 * rows, 2 * columns), np.float32)
    seen[: height // 2, : width // 2] = 1
    return _Tile(embedding, target, seen, example.weight)


def _halved(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    height, width = mask.shape
    return np.asarray(mask.reshape(height // 2, 2, width // 2, 2).mean((1, 3)), np.float32)


def _train(
    start: DenseHead | None, learn: Sequence[_Tile], judge: Sequence[_Tile], *, seed: int, deadline: float
) -> tuple[DenseHead, int]:
    """The best head on the tiles to judge by (the last one where there are none), and the step it is from."""
    rng = np.random.default_rng(seed)
    if start is not None:
        head = copy.deepcopy(start).requires_grad_(True)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = DenseHead()
        torch.nn.init.constant_(head.out.bias, -2.0)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3 if start is not None else 4e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=_STEPS
    )
    best, best_step, best_loss, without_gain = copy.deepcopy(head), 0, float("inf"), 0
    if start is not None and judge:
        best_loss = _loss_on(head, judge)
    for step in range(1, _STEPS + 1):
        coarse, fine, target, weight = _windows(learn, rng)
        loss = _loss(head(coarse, fine), target, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        late = time.perf_counter() > deadline
        if late or step == _STEPS or (judge and step % _STEPS_BETWEEN_CHECKS == 0):
            current = _loss_on(head, judge) if judge else 0.0
            if current < best_loss or not judge:
                best, best_step, best_loss, without_gain = copy.deepcopy(head), step, current, 0
            else:
                without_gain += 1
            if late or without_gain >= _CHECKS_WITHOUT_GAIN:
                break
    return best.requires_grad_(False).eval(), best_step


def _windows(tiles: Sequence[_Tile], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, targets and weights of a few windows, two thirds of them round an object, turned and mirrored."""
    odds = np.array([t.weight * t.seen.sum() for t in tiles])
    side = min(_WINDOW_CELLS, *(min(t.embedding.features["coarse"].shape[1:]) for t in tiles))
    picked: list[list[NDArray[np.float32]]] = [[], [], [], []]
    for _ in range(_WINDOWS_A_STEP):
        tile = tiles[int(rng.choice(len(tiles), p=odds / odds.sum()))]
        features = tile.embedding.features
        last = np.array(features["coarse"].shape[1:]) - side
        top, left = (int(n) for n in rng.integers(0, last + 1))
        rows, columns = np.nonzero(tile.target[0] > 0.5)
        if len(rows) and rng.random() < 2 / 3:
            i = int(rng.integers(len(rows)))
            at = np.array([rows[i], columns[i]]) // 2 - rng.integers(0, side, 2)
            top, left = (int(n) for n in np.clip(at, 0, last))
        turns, mirrored = int(rng.integers(4)), bool(rng.random() < 0.5)
        for values, each, kept in (
            (features["coarse"], 1, picked[0]),
            (features["fine"], 2, picked[1]),
            (tile.target, 2, picked[2]),
            (tile.seen[None], 2, picked[3]),
        ):
            part = values[:, top * each : (top + side) * each, left * each : (left + side) * each].astype(np.float32)
            part = np.rot90(part[:, :, ::-1] if mirrored else part, turns, (1, 2))
            kept.append(np.ascontiguousarray(part))
    coarse, fine, target, weight = (torch.from_numpy(np.stack(parts)) for parts in picked)
    return coarse, fine, target, weight


def _loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy, and dice against the imbalance of object and ground, of class and border."""
    entropy = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum((0, 2, 3))
    entropy = entropy / weight.sum().clamp(min=1)
    probability = torch.sigmoid(logits) * weight
    overlap = 2 * (probability * target).sum((0, 2, 3)) + 100
    dice = 1 - overlap / (probability.sum((0, 2, 3)) + (target * weight).sum((0, 2, 3)) + 100)
    return (entropy + 0.5 * dice).sum()


@torch.inference_mode()
def _logits(head: DenseHead, tile: _Tile) -> Tensor:
    coarse, fine = (
        torch.from_numpy(tile.embedding.features[name].astype(np.float32))[None] for name in ("coarse", "fine")
    )
    logits: Tensor = head(coarse, fine)
    return logits


@torch.inference_mode()
def _loss_on(head: DenseHead, tiles: Sequence[_Tile]) -> float:
    losses = [
        float(_loss(_logits(head, t), torch.from_numpy(t.target)[None], torch.from_numpy(t.seen)[None, None]))
        for t in tiles
    ]
    return float(np.average(losses, weights=[t.weight for t in tiles]))


def _iou(head: DenseHead, tiles: Sequence[_Tile]) -> float | None:
    """IoU of the class map at one half, over all tiles together; None without tiles or objects on them."""
    inter = union = 0
    for tile in tiles:
        found = (_logits(head, tile)[0, 0].numpy() > 0) & (tile.seen > 0)
        truth = (tile.target[0] > 0.5) & (tile.seen > 0)
        inter += int((found & truth).sum())
        union += int((found | truth).sum())
    return inter / union if union else None
