"""Which of two models serves a project better: both are asked for the same tiles, which neither learned from.

Tiles are held out by blocks of neighbours, since the next tile shows the same roofs and often the same house. Of few
tiles each is left out once: heads that know nothing of it are judged on it, and in the end it is learned from
(cross-validation, Stone 1974). What is judged is what annotators get: polygons as they are served, and clicks as a
person would set them. A difference counts where it holds for nine in ten samples drawn again from the judged tiles
(paired bootstrap, Efron 1979), and with few tiles for more: the interval is widened as a t-interval is (Hesterberg,
"What Teachers Should Know About the Bootstrap", 2015, section 4.4).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from . import vectorize
from .evaluation import overlaps
from .predictor import Mirroring, Outlining, Scalable, outlined, pre_label_options, pre_labels_of
from .segmenter import DenseMaps, Embedding, Prompts, Segmenter
from .tile import Region
from .vectorize import VectorizeOptions

if TYPE_CHECKING:
    from .training import Example, Fold  # brings torch in

JUDGED_SHARE = 0.25
"""Share of the blocks that is held out."""

LEAST_JUDGED = 4
"""Tiles to judge by, at least: with fewer, chance alone makes one model look better on all of them too often."""

MOST_JUDGED = 60
"""Tiles to judge by, at most: enough to see a small gain, and both models need a minute or two for them."""

ENOUGH_HELD_OUT = 10
"""With fewer tiles held out, a gain that annotators feel is often not sure; then all are learned from, and all that the
live version has not learned from are judged by, in turn."""

LEAST_LEARNED = 4
"""Tiles to learn from where others are held out, at least."""

CONFIDENCE = 0.9
"""How sure a difference must be, one-sided."""

CLICKED_OBJECTS = 12
MOST_CLICKS = 10
ENOUGH_IOU = 0.85
"""So many objects are clicked on, each so often at most, until the answer is as good as this."""

LEAST_CLICKED_PX = 150.0
"""Smaller objects are not clicked on, in square pixels."""

_RESAMPLES = 4000
_LEAST_BLOCKS = 6
_BINS = 10

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Progress = Callable[[float, str], None]


# --- Which tiles are held out -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Tiles to learn from, and others to judge by."""

    learn: tuple[Example, ...]
    judge: tuple[Example, ...]
    """None where there are too few to hold any out; then all are learned from."""

    why_not: str = ""
    """Why nothing can be judged, in words."""

    in_turn: bool = False
    """Whether the tiles to judge by are learned from too: in the end, and judged by heads that know nothing of them."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks held out, by `block_id`."""
        return () if self.in_turn else _blocks(self.judge)

    @property
    def learned_blocks(self) -> tuple[str, ...]:
        """The blocks learned from, by `block_id`."""
        return _blocks(self.learn)


def _blocks(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(sorted({block_id(example.place) for example in examples}))


def split(
    examples: Sequence[Example], held_before: Collection[str] = (), learned_before: Collection[str] = ()
) -> Split:
    """About a quarter of the tiles to judge by, in whole blocks and `MOST_JUDGED` at most, and the rest to learn from.

    A block's own name decides, so blocks that come later change nothing for those there are; ``held_before`` has those
    of earlier runs (`Split.blocks`), which stay held out. Where that holds out fewer than `ENOUGH_HELD_OUT` and none
    was before, all are learned from, and those that the live version has not learned from, ``learned_before``, are
    judged in turn. Where it has learned from nearly all, some of them are held out nevertheless, which favours it. A
    block that alone has outlines of a label never is.
    """
    if not any(example.regions for example in examples):
        return Split(tuple(examples), (), f"nothing is outlined on the {len(examples)} tiles to judge it by")
    tiles = Counter(example.place for example in examples)
    held = {place for place in tiles if block_id(place) in held_before}
    parted = _parted(examples, tiles, held, learned_before)
    if not held and len(parted.judge) < ENOUGH_HELD_OUT and len(tiles) > 1:
        fresh = [example for example in examples if block_id(example.place) not in learned_before]
        judge = sorted(fresh, key=lambda example: block_id(example.place))[:MOST_JUDGED]
        if len(judge) >= LEAST_JUDGED and any(example.regions for example in judge):
            return Split(tuple(examples), tuple(judge), in_turn=True)
    return parted


def _parted(
    examples: Sequence[Example], tiles: Mapping[str, int], held_before: Collection[str], learned_before: Collection[str]
) -> Split:
    """Some places, those of ``held_before`` among them, to judge by alone."""
    held = set(held_before)

    def judged_tiles() -> int:
        return sum(tiles[place] for place in held)

    for place in sorted(tiles, key=lambda place: (block_id(place) in learned_before, block_id(place))):
        is_drawn = int(block_id(place), 16) < JUDGED_SHARE * 16**8 and block_id(place) not in learned_before
        is_wanted = (is_drawn and judged_tiles() + tiles[place] <= MOST_JUDGED) or judged_tiles() < LEAST_JUDGED
        left = len(examples) - judged_tiles() - tiles[place]
        if (
            place not in held
            and is_wanted
            and left >= max(LEAST_LEARNED, len(examples) / 2)
            and _labels(examples, held | {place}) == _labels(examples, held)
        ):
            held.add(place)
    judge = tuple(example for example in examples if example.place in held)
    learn = tuple(example for example in examples if example.place not in held)
    if len(judge) < LEAST_JUDGED or len(learn) < LEAST_LEARNED:
        if len(examples) < LEAST_JUDGED:
            why_not = f"{len(examples)} tiles are too few to judge it by, {LEAST_JUDGED} are needed"
        elif len(tiles) == 1:
            why_not = f"the {len(examples)} tiles lie in one block of neighbours, and judging it needs two"
        else:
            why_not = (
                f"the {len(examples)} tiles in {len(tiles)} blocks of neighbours are too few to judge it by, since the"
                f" live version learned from most of them; {LEAST_JUDGED} others are needed"
            )
        return Split(tuple(examples), (), why_not)
    if not any(example.regions for example in judge):
        return Split(tuple(examples), (), f"nothing is outlined on the {len(judge)} tiles to judge it by")
    return Split(learn, judge)


def challengers(
    parts: Split, new: Segmenter, folds: Sequence[Fold], load: Callable[[Path], Segmenter]
) -> list[tuple[Segmenter, list[Example]]]:
    """Who is judged by which tiles: the new version, or in turn what each of its `training.Fold` knows."""
    if not parts.in_turn:
        return [(new, list(parts.judge))] if parts.judge else []
    tiles = [[parts.learn[number] for number in fold.tiles if parts.learn[number] in parts.judge] for fold in folds]
    return [(load(fold.heads), own) for fold, own in zip(folds, tiles, strict=True) if own]


def block_id(place: str) -> str:
    """Eight hexadecimal digits that stand for the name of a block, evenly spread."""
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def _labels(examples: Sequence[Example], held: Collection[str]) -> set[str]:
    """Labels that can be learned without those blocks."""
    return {label.casefold() for e in examples if e.place not in held for label, _ in e.regions}


def embedded(
    segmenter: Segmenter, examples: Sequence[Example], labels: Collection[str], *, progress: Progress | None = None
) -> list[Example]:
    """The same tiles with their features, as training and both models need them; computed where they are missing."""
    base = getattr(segmenter, "base_version", segmenter.version)
    done = []
    for number, example in enumerate(examples):
        if progress:
            progress(number / len(examples), f"features of tile {number + 1} of {len(examples)}")
        image = example.image_rgb
        if image is not None and (example.embedding is None or example.embedding.version != base):
            example = replace(example, embedding=_embed(segmenter, image, example.gsd_m, labels))
        done.append(example)
    return done


def _embed(
    segmenter: Segmenter, image_rgb: NDArray[np.uint8], gsd_m: float | None, labels: Collection[str]
) -> Embedding:
    if not isinstance(segmenter, Scalable):
        return segmenter.embed(image_rgb)
    return segmenter.embed(image_rgb, scale=_scale(segmenter, image_rgb, gsd_m, labels))


def _scale(segmenter: object, image_rgb: NDArray[np.uint8], gsd_m: float | None, labels: Collection[str]) -> float:
    if not isinstance(segmenter, Scalable):
        return 1.0
    return segmenter.working_scale((image_rgb.shape[0], image_rgb.shape[1]), gsd_m, labels)


def looked_at(model: Segmenter, example: Example, labels: Collection[str]) -> DenseMaps:
    """Maps of a tile that has its features, as pre-labels see it: where its image is at hand, also mirrored."""
    dense = model.dense(_embedding(example))
    if isinstance(model, Mirroring) and example.image_rgb is not None:
        scale = _scale(model, example.image_rgb, example.gsd_m, labels)
        dense = dense.mean_with_mirrored(model.dense_mirrored(example.image_rgb, scale=scale))
    return dense


# --- What came of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure of the model before and of the new one, on the same tiles."""

    before: float
    after: float
    low: float
    high: float
    """``after - before`` lies between these, each with `CONFIDENCE`."""

    larger_is_better: bool = True

    @property
    def is_better(self) -> bool:
        """Whether the new model surely is."""
        return self.low > 0 if self.larger_is_better else self.high < 0

    @property
    def is_worse(self) -> bool:
        """Whether the new model surely is."""
        return self.high < 0 if self.larger_is_better else self.low > 0

    def __str__(self) -> str:
        return f"{self.before:.2f} → {self.after:.2f} ({self.low:+.2f} to {self.high:+.2f} at {CONFIDENCE:.0%})"


@dataclass(frozen=True, slots=True)
class LabelJudgement:
    """How a label fares."""

    objects: int
    """Outlines of it on the judged tiles."""

    f1: Comparison
    """Polygon F1 at an IoU of one half; 0 for a model that does not know the label."""

    area_iou: Comparison
    """Ground of the label found and true in common, over all that is either."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Two models on the same tiles."""

    tiles: int
    blocks: int
    objects: int
    labels: Mapping[str, LabelJudgement]
    """Of each label that the judged tiles hold."""

    f1: Comparison
    """Of all labels together, as `backend.evaluation` defines it, in pixels."""

    area_iou: Comparison
    matched_iou: tuple[float | None, float | None]
    """Mean IoU of the polygons that match, before and after."""

    calibration_error: tuple[float | None, float | None]
    """Expected calibration error of the scores, before and after: mean distance of score and share that is right."""

    clicks: Comparison | None
    """Clicks to an IoU of `ENOUGH_IOU`, at most `MOST_CLICKS`; None where the judged tiles have no whole object."""

    clicks_differ: bool
    """False where both models answer clicks alike, so that one of them was measured."""

    in_turn: bool = False
    """Whether each tile was judged by heads that know nothing of it, and learned from in the end."""


def verdict(judged: Judgement) -> tuple[bool, str]:
    """Whether the new model is surely better, and why, in words.

    It is where F1 or the ground in common surely rises, or the clicks surely fall, and none of these surely gets worse,
    nor F1 of a single label, and F1 is no lower at all. The ground counts since woods and water have no objects to
    match.
    """
    figures = [("F1@0.5", judged.f1), ("IoU of the ground", judged.area_iou)]
    if judged.clicks and judged.clicks_differ:
        figures.append((f"clicks to IoU {ENOUGH_IOU:g}", judged.clicks))
    single = [(f"F1@0.5 of {label}", one.f1) for label, one in judged.labels.items()] if len(judged.labels) > 1 else []
    where = f"on {judged.tiles} {'tiles left out in turn' if judged.in_turn else 'held-out tiles'}"
    where += f" with {judged.objects} objects"
    worse = [f"{name} {figure}" for name, figure in (*figures, *single) if figure.is_worse]
    if worse:
        return False, f"worse {where}: {'; '.join(worse)}"
    better = [f"{name} {figure}" for name, figure in figures if figure.is_better]
    if better and judged.f1.after < judged.f1.before:
        return False, f"not surely better {where}: {'; '.join(better)}, yet F1@0.5 {judged.f1}"
    if better:
        also = [] if judged.f1.is_better else [f"F1@0.5 {judged.f1}"]
        return True, f"better {where}: {'; '.join([*better, *also])}"
    return False, f"not surely better {where}: F1@0.5 {judged.f1}"


# --- Judging ----------------------------------------------------------------------------------------------------------


def judge(
    champion: Segmenter,
    challengers: Sequence[tuple[Segmenter, Sequence[Example]]],
    labels: Sequence[str],
    *,
    min_score: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judgement:
    """Ask both models for the tiles, which come with their image or with features that fit both, and compare.

    A challenger is asked for its own tiles: one for all, or of several each for those that it knows nothing of.
    ``labels`` are the classes in question, matched without regard to case; polygons below ``min_score`` are left out,
    as they are where they are served. The same tiles and seed give the same figures.
    """
    tell = progress or (lambda done, words: None)
    labels = list({label.casefold(): label for label in labels}.values())
    examples = [example for _, own in challengers for example in own]
    tell(0.0, "judging the live version")
    before = _tally([(champion, examples)], labels, min_score)
    tell(0.4, "judging the new version")
    after = _tally(challengers, labels, min_score)
    tell(0.8, "judging clicks")
    clicks, clicks_differ = _compared_clicks(champion, challengers, labels, seed)
    blocks = [example.place for example in examples]
    return Judgement(
        tiles=len(examples),
        blocks=len(set(blocks)),
        objects=int(before.counts[..., 2].sum()),
        labels={
            label: LabelJudgement(
                int(before.counts[:, i, 2].sum()),
                compared(before.counts[:, i, :3], after.counts[:, i, :3], _f1, blocks, seed=seed),
                compared(before.counts[:, i, 3:], after.counts[:, i, 3:], _share, blocks, seed=seed),
            )
            for i, label in enumerate(labels)
            if before.counts[:, i, 2].any()
        },
        f1=compared(before.counts[..., :3].sum(1), after.counts[..., :3].sum(1), _f1, blocks, seed=seed),
        area_iou=compared(before.counts[..., 3:].sum(1), after.counts[..., 3:].sum(1), _share, blocks, seed=seed),
        matched_iou=(before.matched_iou, after.matched_iou),
        calibration_error=(before.calibration_error, after.calibration_error),
        clicks=clicks,
        clicks_differ=clicks_differ,
        in_turn=len(challengers) > 1,
    )


def compared(
    before: FloatArray,
    after: FloatArray,
    figure: Callable[[FloatArray], FloatArray],
    blocks: Sequence[str],
    *,
    seed: int = 0,
    larger_is_better: bool = True,
) -> Comparison:
    """A figure of two models, and how sure its difference is.

    Rows of ``before`` and ``after``, (N, K), are counts of the same N tiles; ``figure`` takes sums of them, (R, K), to
    values, (R,). Whole blocks are drawn again where there are at least six, else single tiles.
    """
    from scipy import special

    names = np.unique(np.asarray(blocks), return_inverse=True)[1]
    groups = names if names.max(initial=-1) + 1 >= _LEAST_BLOCKS else np.arange(len(blocks))
    count = int(groups.max(initial=-1)) + 1
    one, other = (np.zeros((count, rows.shape[1])) for rows in (before, after))
    np.add.at(one, groups, before)
    np.add.at(other, groups, after)
    ends = figure(one.sum(0)[None]), figure(other.sum(0)[None])
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    differences = np.sort(figure(drawn @ other) - figure(drawn @ one))
    # With few tiles a percentile interval is too narrow, by what makes a t-interval wider than a normal one.
    freedom = max(count - 1, 1)
    tail = float(special.ndtr(math.sqrt(count / freedom) * special.stdtrit(freedom, 1 - CONFIDENCE)))
    low, high = np.quantile(differences, (tail, 1 - tail), method="inverted_cdf")
    return Comparison(float(ends[0][0]), float(ends[1][0]), float(low), float(high), larger_is_better)


def _f1(sums: FloatArray) -> FloatArray:
    """F1 from matched, predicted and true, (R, 3); nothing found where there is nothing is right."""
    all_of_them = sums[:, 1] + sums[:, 2]
    return np.divide(2 * sums[:, 0], all_of_them, out=np.ones(len(sums)), where=all_of_them > 0)


def _share(sums: FloatArray) -> FloatArray:
    """The first of two over the second, (R, 2)."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.ones(len(sums)), where=sums[:, 1] > 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Tally:
    """What a model found on judged tiles."""

    counts: FloatArray
    """By tile and label: polygons matched, predicted and true, and square pixels in common and in all, (N, L, 5)."""

    matched_iou: float | None
    calibration_error: float | None


def _tally(asked: Sequence[tuple[Segmenter, Sequence[Example]]], labels: Sequence[str], min_score: float) -> _Tally:
    number_of = {label.casefold(): number for number, label in enumerate(labels)}
    listed = [(model, example) for model, examples in asked for example in examples]
    counts = np.zeros((len(listed), len(number_of), 5))
    ious: list[float] = []
    scores: list[float] = []
    hits: list[bool] = []
    for tile, (model, example) in enumerate(listed):
        known = {name: name.casefold() for name in model.labels if name.casefold() in number_of}
        options = pre_label_options(example.gsd_m)
        (seen,) = embedded(model, [example], labels)
        regions = _served(model, seen, known, labels, options, min_score)
        found = [(region.label, region.polygon) for region in regions]
        true = [
            (label.casefold(), outline)
            for label, outline in example.regions
            if outline.area >= options.min_area_px and label.casefold() in number_of
        ]
        pairs = overlaps(found, true).pairs()
        for kind, shapes in enumerate(([found[i] for i, _, _ in pairs], found, true)):
            for label, _ in shapes:
                counts[tile, number_of[label], kind] += 1
        for label, number in number_of.items():
            here, there = (
                shapely.union_all([shape for name, shape in shapes if name == label]) for shapes in (found, true)
            )
            counts[tile, number, 3:] = here.intersection(there).area, here.union(there).area
        ious += [iou for _, _, iou in pairs]
        scores += [region.score or 0.0 for region in regions]
        hits += np.isin(np.arange(len(found)), [i for i, _, _ in pairs]).tolist()
    return _Tally(
        counts,
        float(np.mean(ious)) if ious else None,
        calibration_error(np.array(scores), np.array(hits)) if scores else None,
    )


def _served(
    model: Segmenter,
    seen: Example,
    known: Mapping[str, str],
    labels: Collection[str],
    options: VectorizeOptions,
    min_score: float,
) -> list[Region]:
    """What `Predictor.automatic` gives, but for right angles."""
    embedding = _embedding(seen)

    def redrawn(objects: list[list[Polygon]]) -> list[list[Polygon]]:
        return outlined(model, embedding, objects, options) if isinstance(model, Outlining) and objects else objects

    dense = looked_at(model, seen, labels)
    return pre_labels_of(dense, known, options=options, min_score=min_score, redrawn=redrawn).regions


def calibration_error(scores: FloatArray, is_right: BoolArray, bins: int = _BINS) -> float:
    """Mean distance of score and share that is right, in bins of equal width, each polygon counted once; (P,) both."""
    at = np.minimum((scores * bins).astype(int), bins - 1)
    sums = np.bincount(at, scores, bins), np.bincount(at, is_right, bins)
    return float(np.abs(sums[0] - sums[1]).sum() / max(len(scores), 1))


def _image_hw(example: Example) -> tuple[int, int]:
    if example.image_rgb is None:
        return _embedding(example).image_hw
    return example.image_rgb.shape[0], example.image_rgb.shape[1]


def _embedding(example: Example) -> Embedding:
    if example.embedding is None:
        raise ValueError(f"a tile of {example.place} has no features")
    return example.embedding


# --- A simulated annotator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Click:
    """A click of the annotator, at a pixel's column and row."""

    column: int
    row: int
    is_on: bool
    """On the object, or on what is not the object."""


def clicked_through(
    answer: Callable[[Sequence[Click]], BoolArray], truth: BoolArray, *, most: int, enough: float
) -> list[tuple[Click, float]]:
    """What an annotator clicks, with the IoU after each click, until it is ``enough`` or nothing is wrong.

    The first click is at the deepest point of the object, each further one at that of the error: of what is missing and
    what is too much, the deeper one is clicked. ``answer`` takes all clicks so far to a mask, (H, W) as ``truth``.
    """
    done: list[tuple[Click, float]] = []
    wrong, is_on = truth, True
    while len(done) < most and (not done or done[-1][1] < enough):
        column, row, depth = deepest(wrong)
        if depth <= 0:
            break
        click = Click(column, row, is_on)
        mask = answer([*(earlier for earlier, _ in done), click])
        done.append((click, iou(mask, truth)))
        missed, extra = truth & ~mask, mask & ~truth
        is_on = deepest(missed)[2] >= deepest(extra)[2]
        wrong = missed if is_on else extra
    return done


def deepest(region: BoolArray) -> tuple[int, int, float]:
    """Column and row of the pixel farthest from the region's edge, and how far that is, in pixels."""
    depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(column), int(row), float(depth[row, column])


def iou(one: BoolArray, other: BoolArray) -> float:
    """Pixels in common over all that either covers; 1 where both are empty."""
    union = int(np.logical_or(one, other).sum())
    return float(np.logical_and(one, other).sum() / union) if union else 1.0


def _compared_clicks(
    champion: Segmenter,
    challengers: Sequence[tuple[Segmenter, Sequence[Example]]],
    labels: Collection[str],
    seed: int,
) -> tuple[Comparison | None, bool]:
    """Clicks that both models need for the same objects, and whether the models differ in that at all."""
    objects = [
        (challenger, example, outline)
        for challenger, examples in challengers
        for example in examples
        for _, outline in example.regions
        if outline.area >= LEAST_CLICKED_PX and _is_whole(outline, _image_hw(example))
    ]
    picked = np.random.default_rng(seed).permutation(len(objects))[:CLICKED_OBJECTS]
    objects = [objects[number] for number in picked]
    if not objects:
        return None, False
    truths = [vectorize.rasterize([outline], *_image_hw(example)) for _, example, outline in objects]

    def answered(model: Segmenter, number: int) -> Callable[[Sequence[Click]], NDArray[np.float32]]:
        (seen,) = embedded(model, [objects[number][1]], labels)
        return lambda clicks: _answer(model, seen, clicks)

    first = [[Click(*deepest(truth)[:2], is_on=True)] for truth in truths[:3]]
    differ = not all(
        np.array_equal(answered(champion, number)(clicks), answered(objects[number][0], number)(clicks))
        for number, clicks in enumerate(first)
    )
    models = [[champion] * len(objects), *([[challenger for challenger, *_ in objects]] if differ else [])]
    needed = [
        [
            _clicks_needed(answered(model, number), truth)
            for number, (model, truth) in enumerate(zip(own, truths, strict=True))
        ]
        for own in models
    ]
    before, after = (
        np.column_stack([counts, np.ones(len(counts))]).astype(float) for counts in (needed[0], needed[-1])
    )
    places = [f"object {number}" for number in range(len(objects))]
    return compared(before, after, _share, places, seed=seed, larger_is_better=False), differ


def _answer(model: Segmenter, example: Example, clicks: Sequence[Click]) -> NDArray[np.float32]:
    """Probabilities (H, W) of the object that was clicked on."""
    points = np.array([(click.column + 0.5, click.row + 0.5) for click in clicks])
    prompts = Prompts(points, np.array([click.is_on for click in clicks]))
    return np.asarray(model.segment(_embedding(example), prompts).probabilities[0])


def _clicks_needed(answer: Callable[[Sequence[Click]], NDArray[np.float32]], truth: BoolArray) -> int:
    """Clicks to `ENOUGH_IOU`; `MOST_CLICKS` where it is not reached."""
    series = clicked_through(lambda clicks: answer(clicks) > 0.5, truth, most=MOST_CLICKS, enough=ENOUGH_IOU)
    return next((number for number, (_, value) in enumerate(series, 1) if value >= ENOUGH_IOU), MOST_CLICKS)


def _is_whole(outline: Polygon, image_hw: tuple[int, int]) -> bool:
    """Whether an object is not cut by the edge of its tile."""
    left, top, right, bottom = outline.bounds
    return left > 0.5 and top > 0.5 and right < image_hw[1] - 0.5 and bottom < image_hw[0] - 0.5
