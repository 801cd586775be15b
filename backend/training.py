"""Accepted labels become dense heads of a project.

The shipped network stays as it is; one small head a label is trained, from the shipped one where the label has one. It
reads what a segmenter keeps of a tile, or, where the segmenter is `Deep`, what its network has inside. Windows of the
tiles are read once and learned from many times, turned and mirrored. Each tile is left out once, with its neighbours,
and judged by a head that has not learned from it (cross-fitting). That shows how far a shipped head should follow, and
what a changed head's candidates are worth: the scoring that goes with it is fitted on them, with the shipped scoring as
what is believed beforehand. The head itself then learns from all tiles. What the tiles outside a fold teach, these two
choices included, can be kept, so that few tiles are both learned from and judged by.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

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

_Candidates = tuple[FloatArray, NDArray[np.bool_]]
"""Features of a tile's candidates, (N, K), and whether each lies on an object as it should, (N,)."""

LEAST_TILES_TO_HOLD_OUT = 4
"""With fewer tiles none is left out: the head is trained to the end, and scored as the shipped ones are."""

_FOLDS = 2
_WINDOW_CELLS, _WINDOW_STRIDE_CELLS = 64, 8
"""Side of the windows that are learned from, and what their place is a multiple of: the network's coarsest cells."""

_WINDOWS, _MOST_LOOKS, _WINDOWS_A_LOOK = 240, 2, 8
"""Windows that are read for a label, at least one a tile, and times that a tile is read for them: once as it is, ..."""

_CONTRAST, _BRIGHTNESS, _TINT = 0.25, 20.0, 0.08
"""... then in other light, by up to so much."""

_MOST_READ_PX = 1536
"""Of a larger image one part is learned from, in pixels a side as the network sees it."""

_WINDOWS_A_STEP = 4
_STEPS, _LEAST_STEPS, _FULL_LABELS = 120, 60, 2
"""Steps of a label's training where there are no more than so many labels, and at least so many where there are."""

_LONGER_FROM_SHIPPED = 1.7
"""So many times as many steps follow a shipped head where all tiles are learned from. None is stopped earlier: on half
of the tiles, what heads learned from the other half stops rising long before a head of all tiles knows what it can."""

_RATES_FROM_SHIPPED, _RATES_FROM_NOTHING = (2e-3, 2e-3), (3e-3, 1e-3)
"""Learning rates of a head and of the pyramid below it, which is never from nothing."""

_WARM_UP_STEPS, _BETAS, _DECAY = 10, (0.9, 0.999), 1e-3
_AVERAGED = 0.08
"""How fast the head that is kept follows the one that is trained. A single step's head is now surer, now less sure of
all it sees, and what the candidates of one are worth would say little of another's."""

_BETWEEN_PX, _BETWEEN_WEIGHT = 9, 4.0
"""Pixels with two objects within this square count so many times: joined neighbours are most of what goes wrong."""

_MOST_SCORED = 40
"""Tiles left out that shares are compared and the scoring is fitted on, at most."""

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
    ``fine`` ones, (N, c, 2h, 2w), or from what a `Deep` segmenter reads; its last layer is named ``out``.
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

    def with_only(self, heads: Mapping[str, Any]) -> Learner[Any]:
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


@runtime_checkable
class Deep(Protocol):
    """A `Learner` whose heads read what its network has inside, and so need the image."""

    def inner(self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0) -> Embedding:
        """What a head reads of an image that is seen ``scale`` times as large: all features but ``scale_xy``."""
        ...

    def embed(self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0) -> Embedding:
        """Features of the image, with what its heads made of them."""
        ...

    def dense_mirrored(self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0) -> DenseMaps:
        """What ``dense`` says of the image's mirror image."""
        ...

    def working_scale(self, image_hw: tuple[int, int], gsd_m: float | None, classes: Collection[str]) -> float:
        """How much to enlarge an image of that ground size a pixel, where objects of those classes count."""
        ...

    def trainable_head(self, label: str) -> Any:
        """A head to be trained, that does the same as the label's own; None where there is none."""
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
class Fold:
    """Tiles that were left out together."""

    tiles: tuple[int, ...]
    """Their numbers among the examples."""

    heads: Path
    """Heads and scoring that know nothing of these tiles, those of labels that cannot be learned without them missing.
    As they know of fewer tiles than what was learned at last, they are rather worse."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What a run learned from and how well."""

    labels: tuple[LabelReport, ...]
    untrained: tuple[str, ...]
    """Labels without any outline, for which no head was trained. What a shipped one finds there counts as wrong."""

    tiles: int
    """Tiles learned from."""

    held_out: tuple[str, ...]
    """Places that were left out once each, to see whether a shipped head should follow, and to fit the scoring; none
    with too few tiles."""

    seconds: float
    folds: tuple[Fold, ...] = ()
    """What was kept of them."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tile:
    """What a head reads of a tile, and what it should say."""

    inputs: tuple[NDArray[np.generic], ...]
    """Features in the order in which a head takes them, (C, h, w) each, of several resolutions."""

    target: NDArray[np.float32]
    """Class and border, (2, 2h, 2w) at half-cells, 0…1."""

    emphasis: NDArray[np.float32]
    """How much each half-cell counts, (2h, 2w): 0 on the image's padding, most between neighbours."""

    weight: float = 1.0

    def part(self, top: int, left: int, side: int) -> _Tile:
        """A square of it; place and size in half-cells, multiples of the network's coarsest cells."""
        rows = len(self.emphasis)

        def cut(values: NDArray[Any]) -> NDArray[Any]:
            each = values.shape[-2] / rows
            y, x, n = (round(v * each) for v in (top, left, side))
            return values[..., y : y + n, x : x + n].copy()

        return _Tile(tuple(cut(v) for v in self.inputs), cut(self.target), cut(self.emphasis), self.weight)


def train_heads(
    segmenter: Learner[Head],
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    out: Path,
    folds_out: Path | None = None,
    seed: int = 0,
    max_seconds: float = 60,
    progress: Callable[[float, str], None] | None = None,
) -> TrainingReport:
    """Train a head and fit a scoring for each label, and write them to ``out``, whole or not at all.

    ``folds_out`` is a folder that receives what each `Fold` knows, if there are any.

    Examples come with their image where the segmenter is `Deep`, else with their features (`backend.judging.embedded`).
    The same data and seed give the same heads, unless ``max_seconds`` is what ends the training. ``progress`` is called
    with the share done, 0…1, and a few words. Raises TrainingError where there is nothing to learn from.
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

    folds = _folds([e.place for e in examples], seed)
    steps = _STEPS if len(trained) <= _FULL_LABELS else max(_LEAST_STEPS, _STEPS * _FULL_LABELS // len(trained))
    heads: dict[str, Any] = {}
    scoring: dict[str, Scoring] = {}
    folds_heads: list[dict[str, Any]] = [{} for _ in folds]
    folds_scoring: list[dict[str, Scoring]] = [{} for _ in folds]
    reports = []
    kept: dict[int, tuple[Example, Embedding]] = {}
    untrained = tuple(label for label, count in counts.items() if not count)
    deadline = time.perf_counter() + max_seconds
    for i, label in enumerate(trained):
        now = time.perf_counter()
        desk = _Desk(segmenter, label, tuple(counts), seed, kept)
        learned = _learned(
            desk, examples, folds, steps=steps,
            deadline=now + (deadline - now) / (len(trained) - i),
            tell=_part_of(tell, label, i, len(trained)),
        )  # fmt: skip
        heads[label] = learned.head
        if learned.scoring is not None:
            scoring[label] = learned.scoring
        for fold, (head, fitted) in enumerate(learned.without):
            folds_heads[fold][label] = head
            if fitted is not None:
                folds_scoring[fold][label] = fitted
        reports.append(learned.report)
        log.info("%s: %s", label, learned.report)
    for label in untrained:
        head = segmenter.head(label)
        if head is not None and time.perf_counter() < deadline:
            desk = _Desk(segmenter, label, tuple(counts), seed, kept)
            found = desk.candidates([(head, [examples[i] for i in fold]) for fold in folds] or [(head, examples)])
            if fitted := desk.scoring(_all_of(found), [recalibrated_scoring], least_right=0):
                scoring[label] = fitted
            for fold in range(len(folds)):
                if fitted := desk.scoring(_all_of(found, but=fold), [recalibrated_scoring], least_right=0):
                    folds_scoring[fold][label] = fitted
    segmenter.save_heads(heads, out, {"seed": str(seed)}, scoring=scoring)
    parts = []
    if folds_out is not None and any(folds_heads):
        for fold, numbers in enumerate(folds):
            parts.append(Fold(tuple(numbers), folds_out / f"fold-{fold}.safetensors"))
            segmenter.save_heads(folds_heads[fold], parts[-1].heads, scoring=folds_scoring[fold])
    tell(1.0, "done")
    return TrainingReport(
        tuple(reports),
        untrained,
        len(examples),
        tuple(sorted({e.place for e in examples})) if folds else (),
        time.perf_counter() - begun,
        tuple(parts),
    )


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _part_of(tell: Callable[[float, str], None], label: str, number: int, count: int) -> Callable[[float], None]:
    return lambda share: tell((number + share) / count, f"training {label}")


def _folds(places: Sequence[str], seed: int) -> list[list[int]]:
    """Numbers of the tiles that are left out together, each tile once and each place as a whole; none if too few."""
    if len(places) < LEAST_TILES_TO_HOLD_OUT or len(set(places)) < _FOLDS:
        return []
    folds: list[list[int]] = [[] for _ in range(_FOLDS)]
    names = sorted(set(places))
    for i in np.random.default_rng(seed).permutation(len(names)):
        min(folds, key=len).extend(number for number, place in enumerate(places) if place == names[i])
    return [sorted(fold) for fold in folds]


@dataclass(frozen=True, slots=True, eq=False)
class _Learned:
    """What came of a label."""

    head: Any
    scoring: Scoring | None
    report: LabelReport
    without: Sequence[tuple[Any, Scoring | None]] = ()
    """Of each fold, the head and scoring that know nothing of its tiles; none where no tile was left out."""


def _learned(
    desk: _Desk[Head],
    examples: Sequence[Example],
    folds: Sequence[Sequence[int]],
    *,
    steps: int,
    deadline: float,
    tell: Callable[[float], None],
) -> _Learned:
    label, seed = desk.label, desk.seed
    shipped = desk.shipped_head()
    objects = sum(len(_outlines(example, label)) for example in examples)
    parted = [([i for i in range(len(examples)) if i not in set(fold)], [examples[i] for i in fold]) for fold in folds]
    if not all(any(_outlines(examples[i], label) for i in learn) for learn, _ in parted):
        parted = []
    now = time.perf_counter()
    start = shipped or _new_head(desk.segmenter, seed)
    rates = _RATES_FROM_NOTHING if shipped is None else _RATES_FROM_SHIPPED
    windows = desk.windows(examples)
    heads: list[list[Any]] = []  # of each fold, in the order of the shares
    for i, (learn, _) in enumerate(parted):
        tell(i / (len(parted) + 1))
        until = now + (deadline - now) * (i + 1) / (len(parted) + 1)
        some = [window for number in learn for window in windows[number]]
        one, _ = _train(start, some, steps, rates, seed=seed, deadline=until)
        heads.append([one] if shipped is None else [shipped, *(_between(shipped, one, share) for share in _SHARES)])
    tell(len(parted) / (len(parted) + 1))
    every = [window for of_tile in windows for window in of_tile]
    steps_of_all = steps if shipped is None else round(steps * _LONGER_FROM_SHIPPED)
    head, done = _train(start, every, steps_of_all, rates, seed=seed, deadline=deadline)
    del windows, every
    judges = [judge for _, judge in parted]
    if not parted:
        before = _iou(desk.overlaps([([shipped], examples)]))[0] if shipped is not None else None
        return _Learned(head, None, LabelReport(label, objects, done, before, None))
    common = desk.overlaps(list(zip(heads, judges, strict=True)))
    ious = _iou(common)
    best = int(np.argmax(ious))
    before = None if shipped is None else ious[0]
    if shipped is not None:
        if not best:
            kept = desk.segmenter.head(label)
            report = LabelReport(label, objects, 0, before, before)
            return _Learned(kept, None, report, [(kept, None)] * len(parted))
        head = _between(shipped, head, _SHARES[best - 1])
    # What a shipped scoring learned on many places may be worth more than what few tiles say, but for how sure it is.
    ways = [fitted_scoring] if shipped is None else [recalibrated_scoring, fitted_scoring]
    found = desk.candidates([(of_fold[best], judge) for of_fold, judge in zip(heads, judges, strict=True)])
    candidates = _all_of(found)
    scoring = desk.scoring(candidates, ways, least_right=_LEAST_OF_EACH)
    without: list[tuple[Any, Scoring | None]] = []
    for fold, of_fold in enumerate(heads):
        # Both choices, how far to follow and what to believe, are made by the other folds.
        share = int(np.argmax(_iou(np.delete(common, fold, 0))))
        if shipped is not None and not share:
            without.append((desk.segmenter.head(label), None))
        else:
            fitted = desk.scoring(_all_of(found, but=fold), ways, least_right=_LEAST_OF_EACH)
            without.append((of_fold[share], fitted))
    count = 0 if scoring is None else sum(len(right) for _, right in candidates)
    return _Learned(head, scoring, LabelReport(label, objects, done, before, ious[best], count), without)


def _iou(common: FloatArray) -> list[float]:
    """IoU of each head from pixels in common and in all, by fold and head, (F, H, 2)."""
    return [float(both / max(either, 1)) for both, either in common.sum(0)]


@torch.no_grad()
def _between(shipped: Head, trained: Head, share: float) -> Head:
    """The head whose weights lie between two (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022)."""
    head = copy.deepcopy(shipped)
    for kept, other in zip(head.parameters(), trained.parameters(), strict=True):
        kept.lerp_(other, share)
    return head


def _outlines(example: Example, label: str) -> list[Polygon]:
    """The tile's objects of a label, the largest first."""
    return sorted((outline for name, outline in example.regions if _same(name, label)), key=lambda p: -p.area)


def _tile(example: Example, read: Embedding, label: str) -> _Tile:
    """What a head should say of a tile of which that was read."""
    inputs = tuple(values for name, values in read.features.items() if name not in _NO_INPUTS)
    rows, columns = (max(values.shape[axis] for values in inputs) for axis in (1, 2))
    per_px = CELL_PX / cell_size_xy(read)  # the network may see the tile enlarged
    numbers = _drawn(_outlines(example, label), (rows * CELL_PX // 2, columns * CELL_PX // 2), per_px)
    border = cv2.dilate(numbers, np.ones((3, 3))) != cv2.erode(numbers, np.ones((3, 3)))
    reach = np.ones((_BETWEEN_PX, _BETWEEN_PX))
    nearest = cv2.erode(np.where(numbers > 0, numbers, numbers.size).astype(np.float32), reach)
    emphasis = 1 + (_BETWEEN_WEIGHT - 1) * _halved(cv2.dilate(numbers, reach) > nearest)
    width, height = (round(n) for n in read.image_hw[::-1] * per_px)
    emphasis[height // 2 :] = emphasis[:, width // 2 :] = 0
    target = np.stack([_halved(numbers > 0), np.minimum(1, 1.5 * _halved(border))])
    return _Tile(inputs, target, emphasis, example.weight)


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
    (last,) = (module for name, module in head.named_modules() if name.split(".")[-1] == "out")
    torch.nn.init.constant_(last.get_parameter("bias"), -2.0)  # most ground is of no object
    return head


def _train(
    start: Head,
    windows: Sequence[_Tile],
    steps: int,
    rates: tuple[float, float],
    *,
    seed: int,
    deadline: float,
) -> tuple[Head, int]:
    """The trained head, and the steps that were taken: fewer where time ends."""
    rng = np.random.default_rng(seed)
    head, average = copy.deepcopy(start).requires_grad_(True), copy.deepcopy(start).requires_grad_(False).eval()
    for each in (head, average):
        each.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its types
    parameters = list(head.parameters())
    most = [rates[name.startswith("pyramid.")] for name, _ in head.named_parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(1, steps + 1):
        pace = min(1, step / _WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        inputs, target, weight = _batch(windows, rng)
        gradients = torch.autograd.grad(_loss(head(*inputs), target, weight), parameters)
        with torch.no_grad():
            for parameter, gradient, rate, moment in zip(parameters, gradients, most, moments, strict=True):
                _adam_w(parameter, gradient, moment, step, rate * pace)
            for kept, current in zip(average.parameters(), parameters, strict=True):
                kept.lerp_(current, max(_AVERAGED, 1 / (step + 1)))
        if time.perf_counter() > deadline:
            break
    return average, step


def _adam_w(parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, rate: float) -> None:
    """A step of AdamW (Loshchilov and Hutter, 2019), as torch's: that one takes six seconds to be imported."""
    mean, square = moments
    mean.lerp_(gradient, 1 - _BETAS[0])
    square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    spread = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-8)
    parameter.mul_(1 - rate * _DECAY).addcdiv_(mean, spread, value=-rate / (1 - _BETAS[0] ** step))


def _batch(windows: Sequence[_Tile], rng: np.random.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs, targets and weights of a few windows, turned and mirrored."""
    picked: list[list[NDArray[np.float32]]] = []
    for number in rng.integers(0, len(windows), _WINDOWS_A_STEP):
        window, turns, mirrored = windows[number], int(rng.integers(4)), bool(rng.random() < 0.5)
        arrays = (*window.inputs, window.target, window.emphasis[None])
        turned = (np.rot90(a[:, :, ::-1] if mirrored else a, turns, (1, 2)) for a in arrays)
        picked.append([np.ascontiguousarray(a, np.float32) for a in turned])
    # Each place's channels side by side, as is faster.
    *inputs, target, weight = (
        torch.from_numpy(np.stack(arrays)).to(memory_format=torch.channels_last) for arrays in zip(*picked, strict=True)
    )
    return inputs, target, weight


def _loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy, and dice against the imbalance of object and ground, of class and border."""
    entropy = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum((0, 2, 3))
    entropy = entropy / weight.sum().clamp(min=1)
    probability = torch.sigmoid(logits) * weight
    overlap = 2 * (probability * target).sum((0, 2, 3)) + 100
    dice = 1 - overlap / (probability.sum((0, 2, 3)) + (target * weight).sum((0, 2, 3)) + 100)
    return (entropy + 0.5 * dice).sum()


# --- What is read of the tiles ----------------------------------------------------------------------------------------

_NO_INPUTS = ("rgb", "scale_xy")
"""Features that a head does not read."""

_MOST_KEPT_BYTES = 256 * 2**20
"""What was read of tiles is kept up to this, and otherwise read again."""


@dataclass(frozen=True, slots=True, eq=False)
class _Desk(Generic[Head]):
    """A label's training: tiles are read when they are needed, so that memory does not grow with their number."""

    segmenter: Learner[Head]
    label: str
    classes: Collection[str]
    """All labels in question; they decide how large the network sees a tile."""

    seed: int
    kept: dict[int, tuple[Example, Embedding]] = field(default_factory=dict)
    """By the examples' ids, what was read of them as they are; shared by all labels."""

    def shipped_head(self) -> Head | None:
        if isinstance(self.segmenter, Deep):
            return cast("Head | None", self.segmenter.trainable_head(self.label))
        return self.segmenter.head(self.label)

    def read(self, example: Example, rng: np.random.Generator | None = None) -> _Tile:
        """A tile as it is, or with ``rng`` in another light."""
        if not isinstance(self.segmenter, Deep):
            if example.embedding is None or example.embedding.version != self.segmenter.base_version:
                version = self.segmenter.base_version
                raise TrainingError(f"a tile of {example.place} has no features of {version} to learn from")
            return _tile(example, example.embedding, self.label)
        if rng is None and id(example) in self.kept:
            return _tile(*self.kept[id(example)], self.label)
        image, scale = self._image(example)
        most_px = int(_MOST_READ_PX / scale)
        part = example
        if max(image.shape[:2]) > most_px:
            part, image = _some_of(example, image, most_px, rng or np.random.default_rng(self.seed))
        read = self.segmenter.inner(image if rng is None else _relit(image, rng), scale=scale)
        if rng is None and sum(seen.nbytes for _, seen in self.kept.values()) + read.nbytes <= _MOST_KEPT_BYTES:
            self.kept[id(example)] = part, read
        return _tile(part, read, self.label)

    def _image(self, example: Example) -> tuple[NDArray[np.uint8], float]:
        assert isinstance(self.segmenter, Deep)
        if example.image_rgb is None:
            raise TrainingError(f"a tile of {example.place} has no image to learn from")
        rows, columns = example.image_rgb.shape[:2]
        return example.image_rgb, self.segmenter.working_scale((rows, columns), example.gsd_m, self.classes)

    def windows(self, examples: Sequence[Example]) -> list[list[_Tile]]:
        """Of each tile, windows to learn from, two thirds of them round an object; more of weightier ones."""
        rng = np.random.default_rng(self.seed)
        found: list[list[_Tile]] = []
        total = sum(example.weight for example in examples)
        for example in examples:
            count = max(1, round(_WINDOWS * example.weight / total))
            looks = min(_MOST_LOOKS, math.ceil(count / _WINDOWS_A_LOOK)) if isinstance(self.segmenter, Deep) else 1
            found.append([])
            for look in range(looks):
                tile = self.read(example, rng if look else None)
                found[-1] += _windows_of(tile, len(range(look, count, looks)), rng)
        side = min(len(window.emphasis) for of_tile in found for window in of_tile)
        return [[w if len(w.emphasis) == side else w.part(0, 0, side) for w in of_tile] for of_tile in found]

    def overlaps(self, judged: Sequence[tuple[Sequence[nn.Module], Sequence[Example]]]) -> FloatArray:
        """Half-cells that class maps and outlines have in common and in all, by fold and head, (F, H, 2)."""
        common = np.zeros((len(judged), len(judged[0][0]), 2))
        for counts, (heads, examples) in zip(common, judged, strict=True):
            for example in self._some(examples, len(judged)):
                tile = self.read(example)
                seen = tile.emphasis > 0
                truth = (tile.target[0] > 0.5) & seen
                for of_head, head in zip(counts, heads, strict=True):
                    found = (_logits(head, tile)[0, 0].numpy() > 0) & seen
                    of_head += (found & truth).sum(), (found | truth).sum()
        return common

    def _some(self, examples: Sequence[Example], parts: int) -> list[Example]:
        order = np.random.default_rng(self.seed).permutation(len(examples))[: max(1, _MOST_SCORED // parts)]
        return [examples[i] for i in sorted(order.tolist())]

    def candidates(self, told: Sequence[tuple[Any, Sequence[Example]]]) -> list[list[_Candidates]]:
        """Those of tiles that a head has not learned from, by fold and tile."""
        found = []
        for head, examples in told:
            model = self.segmenter.with_only({self.label: head})
            found.append([self._candidates(model, example) for example in self._some(examples, len(told))])
        return found

    def scoring(self, found: Sequence[_Candidates], ways: Sequence[_Fit], *, least_right: int) -> Scoring | None:
        """Scoring by the candidates of some tiles; None where there are too few."""
        if not found:
            return None
        features, right = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if right.sum() < least_right or (~right).sum() < _LEAST_OF_EACH:
            return None
        believed = instances.scoring_of(self.segmenter.scoring, self.label)
        return _likeliest(ways, found, believed)(features, right, believed=believed)

    def _candidates(self, model: Learner[Any], example: Example) -> _Candidates:
        if isinstance(model, Deep):
            image, scale = self._image(example)
            dense = model.dense(model.embed(image, scale=scale))
            dense = dense.mean_with_mirrored(model.dense_mirrored(image, scale=scale))  # as pre-labels see it
        else:
            assert example.embedding is not None
            dense = model.dense(example.embedding)
        found = instances.candidates_of(dense, self.label, min_area_px=_LEAST_CANDIDATE_PX)
        used = found.areas_px >= _LEAST_CANDIDATE_PX
        used[0] = False
        rows, columns = found.pieces.shape
        drawn = _drawn(_outlines(example, self.label), (rows, columns)).astype(np.int32)
        return found.features[used], found.ious(drawn)[used] >= _RIGHT_IOU


def _all_of(found: Sequence[Sequence[_Candidates]], *, but: int | None = None) -> list[_Candidates]:
    """Candidates of all tiles, without those of a fold."""
    return [of_tile for fold, of_fold in enumerate(found) if fold != but for of_tile in of_fold]


def _windows_of(tile: _Tile, count: int, rng: np.random.Generator) -> list[_Tile]:
    """Squares of a tile, two thirds of them round an object."""
    stride = 2 * _WINDOW_STRIDE_CELLS
    side = min(2 * _WINDOW_CELLS, *(n // stride * stride for n in tile.emphasis.shape))
    last = np.array(tile.emphasis.shape) - side
    rows, columns = np.nonzero(tile.target[0] > 0.5)
    found = []
    for _ in range(count):
        at = rng.integers(0, last + 1)
        if len(rows) and rng.random() < 2 / 3:
            i = int(rng.integers(len(rows)))
            at = np.clip(np.array([rows[i], columns[i]]) - rng.integers(0, side, 2), 0, last)
        top, left = (int(n) // stride * stride for n in at)
        found.append(tile.part(top, left, side))
    return found


def _relit(image_rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The same ground in another light."""
    gain = rng.uniform(1 - _CONTRAST, 1 + _CONTRAST) * rng.uniform(1 - _TINT, 1 + _TINT, 3)
    changed = (image_rgb - 128.0) * gain + 128 + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    return np.clip(changed, 0, 255).astype(np.uint8)


def _some_of(
    example: Example, image_rgb: NDArray[np.uint8], most_px: int, rng: np.random.Generator
) -> tuple[Example, NDArray[np.uint8]]:
    """A part of a large tile, round one of its objects if it has any."""
    rows, columns = image_rgb.shape[:2]
    last_xy = np.maximum(np.array([columns, rows]) - most_px, 0)
    corner_xy = rng.integers(0, last_xy + 1)
    if example.regions:
        _, outline = example.regions[int(rng.integers(len(example.regions)))]
        corner_xy = np.clip(np.array(outline.centroid.coords[0]) - most_px / 2, 0, last_xy).astype(int)
    left, top = (int(n) for n in corner_xy)
    moved = [(name, shapely.transform(outline, lambda xy: xy - corner_xy)) for name, outline in example.regions]
    return replace(example, regions=moved), image_rgb[top : top + most_px, left : left + most_px]


@torch.inference_mode()
def _logits(head: nn.Module, tile: _Tile) -> Tensor:
    inputs = (torch.from_numpy(values.astype(np.float32))[None] for values in tile.inputs)
    logits: Tensor = head(*(values.to(memory_format=torch.channels_last) for values in inputs))
    return logits


# --- How likely a candidate is an object ------------------------------------------------------------------------------


class _Fit(Protocol):
    """A way from candidates to a scoring."""

    def __call__(self, features: FloatArray, right: NDArray[np.bool_], *, believed: Scoring) -> Scoring: ...


def _likeliest(ways: Sequence[_Fit], found: Sequence[_Candidates], believed: Scoring) -> _Fit:
    """The way that tells best on half of the tiles what is right, having seen the other half."""
    if len(ways) == 1 or len(found) < 2:
        return ways[0]
    halves = [tuple(np.concatenate(parts) for parts in zip(*found[i::2], strict=True)) for i in (0, 1)]
    losses = []
    for fit in ways:
        loss = 0.0
        for (features, right), (others, truth) in (halves, halves[::-1]):
            chances = np.clip(instances.scored(others, fit(features, right, believed=believed)), 1e-4, 1 - 1e-4)
            loss -= float((truth * np.log(chances) + ~truth * np.log(1 - chances)).sum())
        losses.append(loss)
    return ways[int(np.argmin(losses))]


def fitted_scoring(features: FloatArray, right: NDArray[np.bool_], *, believed: Scoring) -> Scoring:
    """Factors of a logistic model that tells right candidates from wrong ones.

    Features are (N, K), right is (N,). The fewer candidates, the nearer the factors stay to those ``believed``.
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
