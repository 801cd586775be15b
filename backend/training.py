"""Accepted labels become dense heads of a project, on features that a segmenter has already computed.

The shipped network stays as it is; one small head a label is trained, from the shipped head where the label has one.
Each tile is left out once, with its neighbours, and judged by a head that has not learned from it (cross-fitting). That
shows when to stop, how far a shipped head should follow, and what a changed head's candidates are worth: the scoring
that goes with it is fitted on them, with the shipped scoring as what is believed beforehand. The head itself then
learns from all tiles.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

import cv2
import numpy as np
import shapely
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from shapely import Polygon
from torch import Tensor, nn

from . import instances
from .compact import CELL_PX, cell_size_xy
from .errors import TrainingError
from .segmenter import DenseMaps, Embedding

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
Scoring = tuple[float, ...]
Head = TypeVar("Head", bound=nn.Module)

LEAST_TILES_TO_HOLD_OUT = 4
"""With fewer tiles none is left out: the head is trained to the end, and scored as the shipped ones are."""

_FOLDS = 2
_WINDOW_CELLS = 64
_WINDOWS_A_STEP = 4
_STEPS, _LEAST_STEPS, _FULL_LABELS = 160, 80, 2
"""Steps of a label's training where there are no more than so many labels, and at least so many where there are."""

_CHECKS = 5
_MOST_CHECKED = 12
"""Looks at tiles left out during a training, and tiles that are looked at: enough to tell when to stop."""

_RATE_FROM_SHIPPED, _RATE_FROM_NOTHING = 1e-3, 4e-3
_WARM_UP_STEPS = 10
_AVERAGED = 0.08
"""How fast the head that is kept follows the one that is trained. A single step's head is now surer, now less sure of
all it sees, and what the candidates of one are worth would say little of another's."""

_BETWEEN_PX, _BETWEEN_WEIGHT = 9, 4.0
"""Pixels with two objects within this square count so many times: joined neighbours are most of what goes wrong."""

_MOST_SCORED = 40
"""Tiles whose candidates the scoring is fitted on."""

_LEAST_CANDIDATE_PX = 100.0
_RIGHT_IOU = 0.5
_RIDGE, _LEAST_SCALE = 3.0, 0.1
"""How firmly the shipped scoring is believed, for each feature."""

_SHARES = (0.5, 1.0)
"""A shipped head goes so far towards what the project made of it, or stays: whichever does best on tiles left out.
Half the way is where it forgets least of what other places taught it."""

_LEAST_OF_EACH = 10
"""Right and wrong candidates that a scoring is fitted on, at least."""


@runtime_checkable
class Learner(Protocol[Head]):
    """A segmenter whose dense heads can be trained.

    A head gives class and border logits, (N, 2, 2h, 2w), from an embedding's ``coarse`` features, (N, C, h, w), and
    ``fine`` ones, (N, c, 2h, 2w); its last layer is ``out``.
    """

    @property
    def base_version(self) -> str:
        """Version of the weights that make embeddings."""
        ...

    @property
    def scoring(self) -> Mapping[str, Scoring]:
        """By label, the factors of `backend.instances`."""
        ...

    def head(self, label: str) -> Head | None:
        """The head of a label, matched without regard to case; None where there is none."""
        ...

    def new_head(self) -> Head:
        """A head to be trained from nothing."""
        ...

    def with_only(self, heads: Mapping[str, Head]) -> Learner[Head]:
        """The same network with these heads alone."""
        ...

    def dense(self, embedding: Embedding) -> DenseMaps:
        """Class and border probabilities of the whole tile."""
        ...

    def save_heads(
        self,
        heads: Mapping[str, Head],
        path: Path,
        notes: Mapping[str, str] | None = None,
        *,
        scoring: Mapping[str, Scoring] | None = None,
    ) -> None:
        """Write a project's heads by label, whole or not at all."""
        ...


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
    """Outlines with this label."""

    steps: int
    """Training steps of the head; 0 where training did not help on tiles left out and the shipped head stays."""

    iou_before: float | None
    """IoU of the shipped head's class map with the outlines, over all tiles; None without such a head."""

    iou_after: float | None
    """The same of heads that had not learned from the tile; None where no tile was left out."""

    candidates: int = 0
    """Candidates of tiles left out that the scoring was fitted on; 0 where the shipped scoring stays."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run learned from and how well."""

    labels: tuple[LabelReport, ...]
    untrained: tuple[str, ...]
    """Labels without any outline, for which nothing was trained."""

    tiles: int
    """Tiles learned from."""

    held_out: tuple[str, ...]
    """Places that were left out once each, to stop in time and to fit the scoring; none with too few tiles."""

    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    """Features and targets of a label on one tile."""

    embedding: Embedding
    target: NDArray[np.float32]
    """Class and border, (2, 2h, 2w) at half-cells, 0…1."""

    emphasis: NDArray[np.float32]
    """How much each half-cell counts, (2h, 2w): 0 on the image's padding, most between neighbours."""

    weight: float
    outlines: tuple[Polygon, ...]
    """In pixels of the image, the largest first."""


def train_heads(
    segmenter: Learner[Head],
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    out: Path,
    seed: int = 0,
    max_seconds: float = 60,
    progress: Callable[[float, str], None] | None = None,
) -> TrainingReport:
    """Train a head and fit a scoring for each label, and write them to ``out``, whole or not at all.

    Examples come with their features (`backend.judging.embedded`). The same data and seed give the same heads, as long
    as ``max_seconds`` is not what ends the training. ``progress`` is called with the share done, 0…1, and a few words.
    Raises TrainingError where there is nothing to learn from.
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

    embeddings = [_features(segmenter, example) for example in examples]
    folds = _folds([e.place for e in examples], seed)
    steps = _STEPS if len(trained) <= _FULL_LABELS else max(_LEAST_STEPS, _STEPS * _FULL_LABELS // len(trained))
    heads: dict[str, Head] = {}
    scoring: dict[str, Scoring] = {}
    reports = []
    deadline = time.perf_counter() + max_seconds
    for i, label in enumerate(trained):
        tiles = [_tile(e, embedding, label) for e, embedding in zip(examples, embeddings, strict=True)]
        now = time.perf_counter()
        heads[label], fitted, report = _learned(
            segmenter, label, tiles, folds, steps=steps, seed=seed,
            deadline=now + (deadline - now) / (len(trained) - i),
            tell=_part_of(tell, label, i, len(trained)),
        )  # fmt: skip
        if fitted is not None:
            scoring[label] = fitted
        reports.append(report)
        log.info("%s: %s", label, report)
    segmenter.save_heads(heads, out, {"seed": str(seed)}, scoring=scoring)
    tell(1.0, "done")
    return TrainingReport(
        tuple(reports),
        tuple(label for label, count in counts.items() if not count),
        len(examples),
        tuple(sorted({e.place for e in examples})) if folds else (),
        time.perf_counter() - begun,
    )


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _part_of(tell: Callable[[float, str], None], label: str, number: int, count: int) -> Callable[[float], None]:
    return lambda share: tell((number + share) / count, f"training {label}")


def _features(segmenter: Learner[Head], example: Example) -> Embedding:
    if example.embedding is None or example.embedding.version != segmenter.base_version:
        raise TrainingError(f"a tile of {example.place} has no features of {segmenter.base_version} to learn from")
    return example.embedding


def _folds(places: Sequence[str], seed: int) -> list[list[int]]:
    """Numbers of the tiles that are left out together, each tile once and each place as a whole; none if too few."""
    if len(places) < LEAST_TILES_TO_HOLD_OUT or len(set(places)) < _FOLDS:
        return []
    folds: list[list[int]] = [[] for _ in range(_FOLDS)]
    names = sorted(set(places))
    for i in np.random.default_rng(seed).permutation(len(names)):
        min(folds, key=len).extend(number for number, place in enumerate(places) if place == names[i])
    return [sorted(fold) for fold in folds]


def _learned(
    segmenter: Learner[Head],
    label: str,
    tiles: Sequence[_Tile],
    folds: Sequence[Sequence[int]],
    *,
    steps: int,
    seed: int,
    deadline: float,
    tell: Callable[[float], None],
) -> tuple[Head, Scoring | None, LabelReport]:
    """Head and scoring of a label, and how it went."""
    shipped = segmenter.head(label)
    objects = sum(len(tile.outlines) for tile in tiles)
    parted = [([t for i, t in enumerate(tiles) if i not in set(fold)], [tiles[i] for i in fold]) for fold in folds]
    if not all(any(tile.outlines for tile in learn) for learn, _ in parted):
        parted = []
    now = time.perf_counter()
    start = shipped or _new_head(segmenter, seed)
    rate = _RATE_FROM_NOTHING if shipped is None else _RATE_FROM_SHIPPED
    runs = []
    for i, (learn, _) in enumerate(parted):
        tell(i / (len(parted) + 1))
        until = now + (deadline - now) * (i + 1) / (len(parted) + 1)
        runs.append(_train(start, learn, steps, rate, seed=seed, deadline=until))
    tell(len(parted) / (len(parted) + 1))
    chosen = _best_check(runs, [judge for _, judge in parted], has_start=shipped is not None, seed=seed)
    last = _train(start, tiles, steps, rate, seed=seed, deadline=deadline, checks=chosen)[-1]
    head, done = last.head, last.step
    before = _iou([(shipped, tiles)]) if shipped is not None else None
    if not parted:
        return head, None, LabelReport(label, objects, done, before, None)
    told = [(run[min(chosen, len(run) - 1)].head, judge) for run, (_, judge) in zip(runs, parted, strict=True)]
    if shipped is not None and before is not None:
        share = _best_share(shipped, told, before)
        if not share:
            return shipped, None, LabelReport(label, objects, 0, before, before)
        head = _between(shipped, head, share)
        told = [(_between(shipped, one, share), judge) for one, judge in told]
    features, right = _judged_candidates(segmenter, label, told, seed)
    fitted = None
    if min(right.sum(), (~right).sum()) >= _LEAST_OF_EACH:
        believed = instances.scoring_of(segmenter.scoring, label)
        # What a shipped scoring learned on many places is worth more than what few tiles say, but for how sure it is.
        fit = fitted_scoring if shipped is None else recalibrated_scoring
        fitted = fit(features, right, believed=believed)
    return head, fitted, LabelReport(label, objects, done, before, _iou(told), len(right) if fitted else 0)


def _best_share(shipped: Head, told: Sequence[tuple[Head, Sequence[_Tile]]], before: float) -> float:
    """How far to go from the shipped head to the trained one, for the best class map on left-out tiles."""
    ious = {share: _iou([(_between(shipped, head, share), tiles) for head, tiles in told]) for share in _SHARES}
    return max((iou, share) for share, iou in ({0.0: before} | ious).items() if iou is not None)[1]


@torch.no_grad()
def _between(shipped: Head, trained: Head, share: float) -> Head:
    """The head whose weights lie between two (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022)."""
    head = copy.deepcopy(shipped)
    for kept, other in zip(head.parameters(), trained.parameters(), strict=True):
        kept.lerp_(other, share)
    return head


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot(Generic[Head]):
    """A head in the course of its training."""

    head: Head
    step: int


def _tile(example: Example, embedding: Embedding, label: str) -> _Tile:
    rows, columns = embedding.features["coarse"].shape[1:]
    per_px = CELL_PX / cell_size_xy(embedding)  # the network may see the tile enlarged
    outlines = tuple(sorted((p for name, p in example.regions if _same(name, label)), key=lambda p: -p.area))
    numbers = _drawn(outlines, (rows * CELL_PX, columns * CELL_PX), per_px)
    border = cv2.dilate(numbers, np.ones((3, 3))) != cv2.erode(numbers, np.ones((3, 3)))
    reach = np.ones((_BETWEEN_PX, _BETWEEN_PX))
    nearest = cv2.erode(np.where(numbers > 0, numbers, numbers.size).astype(np.float32), reach)
    emphasis = 1 + (_BETWEEN_WEIGHT - 1) * _halved(cv2.dilate(numbers, reach) > nearest)
    width, height = (round(n) for n in embedding.image_hw[::-1] * per_px)
    emphasis[height // 2 :] = emphasis[:, width // 2 :] = 0
    target = np.stack([_halved(numbers > 0), np.minimum(1, 1.5 * _halved(border))])
    return _Tile(embedding, target, emphasis, example.weight, outlines)


def _drawn(
    outlines: Sequence[Polygon], shape: tuple[int, int], per_px: FloatArray | float = 1.0
) -> NDArray[np.float32]:
    """Number of the outline at each pixel, from 1, 0 for none; later ones lie on earlier ones."""
    numbers = np.zeros(shape, np.float32)  # exact, and what OpenCV dilates
    for number, outline in enumerate(outlines, 1):
        for part in shapely.get_parts(outline):
            if part.geom_type == "Polygon":
                rings = [np.asarray(ring.coords)[:, :2] * per_px for ring in (part.exterior, *part.interiors)]
                cv2.fillPoly(numbers, [np.round(ring * 16 - 8).astype(np.int32) for ring in rings], number, shift=4)
    return numbers


def _halved(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    height, width = mask.shape
    return np.asarray(mask.reshape(height // 2, 2, width // 2, 2).mean((1, 3)), np.float32)


def _new_head(segmenter: Learner[Head], seed: int) -> Head:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = segmenter.new_head()
    torch.nn.init.constant_(head.get_submodule("out").get_parameter("bias"), -2.0)  # most ground is of no object
    return head


def _train(
    start: Head,
    learn: Sequence[_Tile],
    steps: int,
    rate: float,
    *,
    seed: int,
    deadline: float,
    checks: int = _CHECKS,
) -> list[_Snapshot[Head]]:
    """The head before training, and at each of so many checks; fewer where time ends."""
    rng = np.random.default_rng(seed)
    head, average = copy.deepcopy(start).requires_grad_(True), copy.deepcopy(start)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=1e-3)
    taken = [_snapshot(average, 0)]
    for step in range(1, steps * checks // _CHECKS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / _WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        coarse, fine, target, weight = _windows(learn, rng)
        loss = _loss(head(coarse, fine), target, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for kept, current in zip(average.parameters(), head.parameters(), strict=True):
                kept.lerp_(current, max(_AVERAGED, 1 / (step + 1)))
        late = time.perf_counter() > deadline
        if late or step >= len(taken) * steps / _CHECKS:
            taken.append(_snapshot(average, step))
        if late:
            break
    return taken


def _snapshot(head: Head, step: int) -> _Snapshot[Head]:
    return _Snapshot(copy.deepcopy(head).requires_grad_(False).eval(), step)


def _best_check(
    runs: Sequence[Sequence[_Snapshot[Head]]], judged: Sequence[Sequence[_Tile]], *, has_start: bool, seed: int
) -> int:
    """Number of the check at which heads do best on the tiles that they have not learned from; the last without any."""
    if not runs:
        return _CHECKS
    rng = np.random.default_rng(seed)
    losses = np.full((len(runs), _CHECKS + 1), np.inf)
    for losses_of_run, run, tiles in zip(losses, runs, judged, strict=True):
        some = [tiles[i] for i in sorted(rng.permutation(len(tiles))[: max(1, _MOST_CHECKED // len(runs))])]
        for check, snapshot in enumerate(run):
            if check or has_start:
                losses_of_run[check] = _loss_on(snapshot.head, some)
    return int(losses.mean(0).argmin())


def _windows(tiles: Sequence[_Tile], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, targets and weights of a few windows, two thirds of them round an object, turned and mirrored."""
    odds = np.array([t.weight * np.count_nonzero(t.emphasis) for t in tiles])
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
            (tile.emphasis[None], 2, picked[3]),
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
def _logits(head: nn.Module, tile: _Tile) -> Tensor:
    coarse, fine = (
        torch.from_numpy(tile.embedding.features[name].astype(np.float32))[None] for name in ("coarse", "fine")
    )
    logits: Tensor = head(coarse, fine)
    return logits


@torch.inference_mode()
def _loss_on(head: nn.Module, tiles: Sequence[_Tile]) -> float:
    losses = [
        float(_loss(_logits(head, t), torch.from_numpy(t.target)[None], torch.from_numpy(t.emphasis)[None, None]))
        for t in tiles
    ]
    return float(np.average(losses, weights=[t.weight for t in tiles]))


def _iou(judged: Sequence[tuple[nn.Module, Sequence[_Tile]]]) -> float | None:
    """IoU of class maps at one half, over all tiles of all heads together; None without tiles or objects on them."""
    inter = union = 0
    for head, tiles in judged:
        for tile in tiles:
            found = (_logits(head, tile)[0, 0].numpy() > 0) & (tile.emphasis > 0)
            truth = (tile.target[0] > 0.5) & (tile.emphasis > 0)
            inter += int((found & truth).sum())
            union += int((found | truth).sum())
    return inter / union if union else None


# --- How likely a candidate is an object ------------------------------------------------------------------------------


def _judged_candidates(
    segmenter: Learner[Head], label: str, judged: Sequence[tuple[Head, Sequence[_Tile]]], seed: int
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Features of all candidates on some tiles, (N, 14), and whether each lies on an object as it should, (N,)."""
    pairs = [(head, tile) for head, tiles in judged for tile in tiles]
    features, right = [np.zeros((0, len(instances.FEATURES)))], [np.zeros(0, bool)]
    for i in sorted(np.random.default_rng(seed).permutation(len(pairs))[:_MOST_SCORED]):
        head, tile = pairs[i]
        dense = segmenter.with_only({label: head}).dense(tile.embedding)
        found = instances.candidates(
            dense.probabilities[0].astype(np.float64), dense.boundary[0].astype(np.float64),
            min_area_px=_LEAST_CANDIDATE_PX,
        )  # fmt: skip
        used = found.areas_px >= _LEAST_CANDIDATE_PX
        used[0] = False
        features.append(found.features[used])
        right.append(found.ious(_drawn(tile.outlines, tile.embedding.image_hw).astype(np.int32))[used] >= _RIGHT_IOU)
    return np.concatenate(features), np.concatenate(right)


def fitted_scoring(features: FloatArray, right: NDArray[np.bool_], *, believed: Scoring) -> Scoring:
    """Factors of a logistic model that tells right candidates from wrong ones.

    Features are (N, 14), right is (N,). The fewer candidates, the nearer the factors stay to those ``believed``.
    """
    mean, spread = features.mean(0), features.std(0) + 1e-6
    x = np.column_stack(((features - mean) / spread, np.ones(len(right))))
    prior = np.asarray(believed, np.float64)
    factors = _logistic(x, right, np.append(prior[:-1] * spread, prior[-1] + prior[:-1] @ mean))
    scaled = factors[:-1] / spread
    return _rounded(np.append(scaled, factors[-1] - scaled @ mean))


def recalibrated_scoring(features: FloatArray, right: NDArray[np.bool_], *, believed: Scoring) -> Scoring:
    """The factors ``believed``, as sure as right candidates show (Platt scaling); which of two is likelier stays."""
    prior = np.asarray(believed, np.float64)
    logits = features @ prior[:-1] + prior[-1]
    scale, shift = _logistic(np.column_stack((logits, np.ones(len(right)))), right, np.array([1.0, 0.0]))
    scaled = max(scale, _LEAST_SCALE) * prior
    scaled[-1] += shift
    return _rounded(scaled)


def _logistic(x: FloatArray, right: NDArray[np.bool_], prior: FloatArray) -> FloatArray:
    """Factors (K,) of rows (N, K), pulled to ``prior``."""
    from scipy import optimize

    def loss(factors: FloatArray) -> tuple[float, FloatArray]:
        logits, off = x @ factors, factors - prior
        chances = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
        value = (np.logaddexp(0, logits) - right * logits).sum() + _RIDGE / 2 * off @ off
        return float(value), x.T @ (chances - right) + _RIDGE * off

    return np.asarray(optimize.minimize(loss, prior, jac=True, method="L-BFGS-B").x, np.float64)


def _rounded(factors: FloatArray) -> Scoring:
    return tuple(np.round(factors, 5).tolist())
