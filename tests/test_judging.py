"""A new version is judged on tiles that nobody learned from, and is better only where chance does not explain it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely import box

from backend import judging
from backend.judging import Comparison, Judgement, LabelJudgement, calibration_error, clicked_through, compared
from backend.segmenter import DenseMaps, Embedding, Masks, Prompts
from backend.training import Example, Fold
from tests.fakes import BrightSegmenter, bright_image

NOTHING = Embedding({}, (64, 64), "none")


def plain(place: str, label: str = "building") -> Example:
    return Example(None, [(label, box(2, 2, 30, 30))], place, embedding=NOTHING)


class Blind(BrightSegmenter):
    """Answers clicks as `BrightSegmenter` does, and finds nothing by itself."""

    def dense(self, embedding: Embedding, *, window_xyxy: tuple[int, int, int, int] | None = None) -> DenseMaps:
        maps = super().dense(embedding, window_xyxy=window_xyxy)
        return replace(maps, probabilities=maps.probabilities * 0)


class Ignorant(BrightSegmenter):
    """Knows no class at all."""

    labels = ()

    def dense(self, embedding: Embedding, *, window_xyxy: tuple[int, int, int, int] | None = None) -> DenseMaps:
        none = np.zeros((0, *embedding.image_hw), np.float32)
        return DenseMaps((), none, none)


class Squinting(Blind):
    """Finds in a mirror what it does not see otherwise."""

    def dense_mirrored(self, image_rgb: np.ndarray, *, scale: float = 1.0) -> DenseMaps:
        bright = BrightSegmenter()
        maps = bright.dense(bright.embed(np.ascontiguousarray(image_rgb[:, ::-1])))
        return replace(maps, probabilities=2 * maps.probabilities)


class Dull(BrightSegmenter):
    """Answers each click with the left half of the object."""

    def segment(self, embedding: Embedding, prompts: Prompts) -> Masks:
        masks = super().segment(embedding, prompts)
        columns = np.flatnonzero(masks.probabilities[0].max(0) > 0.5)
        cut = masks.probabilities.copy()
        if len(columns):
            cut[:, :, (columns[0] + columns[-1]) // 2 :] = 0
        return Masks(cut, masks.scores)


def bright_examples(count: int) -> list[Example]:
    """Tiles with three bright buildings each, outlined."""
    boxes = [(20, 20, 60, 60), (100, 30, 150, 70), (40, 120, 90, 200)]
    examples = [
        Example(bright_image(*boxes), [("building", box(*b)) for b in boxes], f"place {number}")
        for number in range(count)
    ]
    return judging.embedded(BrightSegmenter(), examples, ["building"])


# --- What is held out -------------------------------------------------------------------------------------------------

PLACES = st.lists(st.integers(0, 40), min_size=1, max_size=60).map(lambda numbers: [f"scene:{n}:0" for n in numbers])


@given(places=PLACES, more=PLACES)
def test_blocks_stay_whole_and_once_held_out_stay_so(places: list[str], more: list[str]):
    first = judging.split([plain(place) for place in places])
    grown = judging.split([plain(place) for place in [*places, *more]], first.blocks)
    for parts, count in ((first, len(places)), (grown, len(places) + len(more))):
        learned, judged = ({example.place for example in part} for part in (parts.learn, parts.judge))
        assert judged <= learned if parts.in_turn else not learned & judged
        assert len(parts.learn) + len(parts.judge) * (not parts.in_turn) == count
        assert bool(parts.judge) != bool(parts.why_not)
        assert not parts.judge or (len(parts.judge) >= judging.LEAST_JUDGED and len(parts.learn) >= 4)
        assert not parts.in_turn or not parts.blocks
    if grown.judge:
        assert set(first.blocks) <= set(grown.blocks)


def test_neither_order_nor_what_comes_later_changes_what_a_block_is_for():
    many = [plain(f"scene:{number}:0") for number in range(60)]
    whole = judging.split(many)
    assert judging.split(many[::-1]).blocks == whole.blocks
    assert set(judging.split(many[:40]).blocks) <= set(whole.blocks)
    assert 8 <= len(whole.judge) <= 24


def test_few_tiles_are_judged_in_turn_but_for_those_that_the_live_version_learned_from():
    few = [plain(f"scene:{number}:0") for number in range(5)]
    first = judging.split(few)
    assert (first.in_turn, set(first.judge), first.learn, first.blocks) == (True, set(few), tuple(few), ())
    more = [plain(f"scene:{number}:0") for number in range(12)]
    grown = judging.split(more, (), first.learned_blocks)
    assert grown.in_turn
    assert _blocks_of(grown.judge) == _blocks_of(more) - _blocks_of(few)
    assert len(grown.learn) == 12
    # What was once held out stays so, and many tiles are held out as a rule.
    assert set(judging.split(more, _blocks_of(more[:4])).blocks) >= _blocks_of(more[:4])
    assert not judging.split([plain(f"scene:{number}:0") for number in range(80)]).in_turn


def test_what_the_live_version_learned_from_is_held_out_only_where_there_is_nothing_else():
    both = [plain(f"scene:{number}:0") for number in range(20)]
    parts = judging.split(both, (), _blocks_of(both))
    assert (len(parts.judge), parts.in_turn) == (judging.LEAST_JUDGED, False)


def _blocks_of(examples: Sequence[Example]) -> set[str]:
    return {judging.block_id(example.place) for example in examples}


@pytest.mark.parametrize(("count", "places", "says"), [(3, 3, "3 tiles are too few"), (20, 1, "one block")])
def test_too_few_tiles_to_judge_by_are_all_learned_from_and_it_is_said(count, places, says):
    parts = judging.split([plain(f"scene:{number % places}:0") for number in range(count)])
    assert (len(parts.learn), parts.judge) == (count, ())
    assert says in parts.why_not


def test_tiles_that_the_live_version_knows_do_not_judge_the_next_one():
    tiles = [plain(f"scene:{number}:0") for number in range(7)]
    parts = judging.split(tiles, (), _blocks_of(tiles[:5]))
    assert (len(parts.learn), parts.judge) == (7, ())
    assert "the live version learned from most of them" in parts.why_not


def test_tiles_without_any_outline_are_nothing_to_judge_by():
    parts = judging.split([replace(plain(f"scene:{number}:0"), regions=[]) for number in range(12)])
    assert "nothing is outlined" in parts.why_not


def test_each_label_keeps_an_outline_to_learn_from():
    rare = sorted((f"scene:{number}:0" for number in range(60)), key=judging.block_id)[0]
    parts = judging.split([plain(f"scene:{n}:0", "tent" if f"scene:{n}:0" == rare else "house") for n in range(60)])
    assert parts.judge
    assert not parts.in_turn
    assert {label for example in parts.learn for label, _ in example.regions} == {"tent", "house"}


# --- How sure a difference is -----------------------------------------------------------------------------------------


def counts(matched: list[int], predicted: int = 20, true: int = 20) -> np.ndarray:
    return np.array([(m, predicted, true) for m in matched], float)


@pytest.mark.parametrize(
    ("before", "after", "is_better", "is_worse"),
    [
        ([10, 11, 9, 10], [14, 15, 14, 13], True, False),
        ([10, 11, 9, 10], [10, 11, 9, 10], False, False),
        ([10, 11, 9, 10], [12, 9, 10, 11], False, False),
        ([10, 11, 9, 10], [20, 11, 9, 10], False, False),  # one tile proves nothing
        ([14, 15, 14, 13], [10, 11, 9, 10], False, True),
        ([0, 0, 0, 0], [9, 8, 0, 9], True, False),  # a label new to the live version
        ([10] * 40, [11, 10] * 20, True, False),  # many tiles show a small gain
    ],
    ids=["better", "equal", "noise", "one tile", "worse", "new label", "many tiles"],
)
def test_a_difference_counts_where_it_holds_on_most_tiles(before, after, is_better, is_worse):
    blocks = [f"block {number}" for number in range(len(before))]
    figure = compared(counts(before), counts(after), judging._f1, blocks)
    assert (figure.is_better, figure.is_worse) == (is_better, is_worse)
    assert figure.low <= figure.after - figure.before <= figure.high
    assert figure == compared(counts(before), counts(after), judging._f1, blocks)


def test_chance_alone_makes_a_version_better_no_more_often_than_promised():
    rng = np.random.default_rng(4)
    times = 150
    better = 0
    for _ in range(times):
        both = rng.binomial(20, 0.6, (2, 4))
        better += compared(*map(counts, both.tolist()), judging._f1, list("abcd")).is_better
    assert better / times < 1 - judging.CONFIDENCE + 0.05


def test_neighbours_count_as_one_where_there_are_blocks_enough():
    # Of twelve blocks one is much better, in all of its ten tiles: that is one piece of evidence, not ten.
    before, after = [10] * 21, [20] * 10 + [10, 9, 11, 10, 9, 10, 11, 10, 9, 11, 10]
    apart = [f"block {number}" for number in range(21)]
    together = ["block"] * 10 + apart[10:]
    assert compared(counts(before), counts(after), judging._f1, apart).is_better
    assert not compared(counts(before), counts(after), judging._f1, together).is_better


SAME, UP, DOWN = Comparison(0.5, 0.5, -0.05, 0.05), Comparison(0.5, 0.6, 0.05, 0.15), Comparison(0.5, 0.4, -0.2, -0.05)
FEWER, MORE = (replace(figure, larger_is_better=False) for figure in (DOWN, UP))


@pytest.mark.parametrize(
    ("f1", "ground", "clicks", "tents", "goes_live", "says"),
    [
        (UP, SAME, None, SAME, True, "better on 5 held-out tiles with 90 objects: F1@0.5 0.50 → 0.60"),
        (SAME, UP, None, SAME, True, "IoU of the ground"),
        (SAME, SAME, FEWER, SAME, True, "clicks to IoU 0.85"),
        (SAME, SAME, SAME, SAME, False, "not surely better"),
        (DOWN, SAME, FEWER, SAME, False, "worse"),
        (UP, SAME, MORE, SAME, False, "worse on 5 held-out tiles with 90 objects: clicks"),
        (UP, UP, None, DOWN, False, "F1@0.5 of tent"),
    ],
)
def test_a_version_is_better_where_something_surely_gained_and_nothing_surely_lost(
    f1, ground, clicks, tents, goes_live, says
):
    labels = {"building": LabelJudgement(60, f1, ground), "tent": LabelJudgement(30, tents, SAME)}
    judged = Judgement(5, 2, 90, labels, f1, ground, (0.7, 0.7), (0.1, 0.1), clicks, True)
    is_better, why = judging.verdict(judged)
    assert is_better is goes_live
    assert says in why


# --- Both models on the same tiles ------------------------------------------------------------------------------------


def judged(
    champion: BrightSegmenter, challenger: BrightSegmenter, labels: tuple[str, ...] = ("building",)
) -> Judgement:
    return judging.judge(champion, [(challenger, bright_examples(4))], labels, min_score=0.3)


def test_a_model_that_finds_everything_is_better_than_one_that_finds_nothing():
    found = judged(Blind(), BrightSegmenter())
    assert (found.tiles, found.blocks, found.objects) == (4, 4, 12)
    assert (found.f1.before, found.f1.after) == (0, 1)
    assert found.area_iou.after > 0.95
    assert found.matched_iou[0] is None
    assert found.matched_iou[1] > 0.95
    assert found.calibration_error[1] < 0.5
    assert judging.verdict(found)[0]
    assert not judging.verdict(judged(BrightSegmenter(), Blind()))[0]
    assert not judging.verdict(judged(BrightSegmenter(), BrightSegmenter()))[0]


def test_each_of_several_challengers_is_asked_for_its_own_tiles():
    tiles = bright_examples(8)
    challengers = [(Blind(), tiles[:4]), (BrightSegmenter(), tiles[4:])]
    found = judging.judge(Blind(), challengers, ["building"], min_score=0.3)
    assert (found.tiles, found.in_turn, found.f1.before) == (8, True, 0)
    assert found.f1.after == pytest.approx(2 * 12 / (12 + 24))
    assert "8 tiles left out in turn" in judging.verdict(found)[1]
    parts = judging.Split(tuple(tiles), tuple(tiles[1:3]), in_turn=True)
    folds = [Fold((0, 1), Path("a")), Fold((2, 3), Path("b")), Fold((4,), Path("c"))]
    asked = judging.challengers(parts, Blind(), folds, lambda path: Dull() if path.name == "a" else Squinting())
    assert [(type(model), own) for model, own in asked] == [(Dull, [tiles[1]]), (Squinting, [tiles[2]])]


def test_models_are_judged_by_both_looks_that_pre_labels_take():
    assert judged(Blind(), Squinting()).f1.after == 1
    (bare, *_) = bright_examples(1)
    for example, is_seen in ((bare, True), (replace(bare, image_rgb=None), False)):
        assert (judging.looked_at(Squinting(), example, ["building"]).probabilities > 0.5).any() == is_seen


def test_a_label_that_the_live_version_does_not_know_counts_as_nothing_found():
    found = judged(Ignorant(), BrightSegmenter(), ("building", "Building", "tent"))
    assert list(found.labels) == ["Building"]
    assert (found.labels["Building"].f1.before, found.labels["Building"].f1.after) == (0, 1)


def test_clicks_are_measured_once_where_both_models_answer_alike():
    found = judged(Blind(), BrightSegmenter())
    assert found.clicks is not None
    assert (found.clicks.before, found.clicks.after, found.clicks_differ) == (1, 1, False)
    found = judged(Dull(), BrightSegmenter())
    assert found.clicks is not None
    assert (found.clicks.before, found.clicks.after, found.clicks_differ) == (judging.MOST_CLICKS, 1, True)
    assert "clicks to IoU 0.85 10.00 → 1.00" in judging.verdict(found)[1]


def test_scores_that_say_how_often_they_are_right_have_no_error():
    scores = np.repeat([0.25, 0.75], 40)
    right = np.concatenate([np.arange(40) < 10, np.arange(40) < 30])
    assert calibration_error(scores, right) == pytest.approx(0)
    assert calibration_error(scores, ~right) == pytest.approx(0.5)
    assert calibration_error(np.array([1.0, 0.0]), np.array([False, True])) == pytest.approx(1)


def test_the_simulated_annotator_clicks_where_the_answer_is_most_wrong():
    truth = np.zeros((40, 40), bool)
    truth[10:30, 5:35] = True
    half = truth & (np.arange(40) < 20)

    def answer(upto: Callable[[int], np.ndarray]) -> list[tuple[judging.Click, float]]:
        return clicked_through(lambda clicks: upto(len(clicks)), truth, most=5, enough=0.85)

    assert [value for _, value in answer(lambda count: truth)] == [1.0]
    (first, before), (second, after) = answer(lambda count: half if count == 1 else truth)
    assert truth[first.row, first.column]
    assert (before, after) == (0.5, 1.0)
    assert second.is_on
    assert second.column >= 20
    too_much = answer(lambda count: np.ones_like(truth))
    assert len(too_much) == 5
    assert not too_much[1][0].is_on
