"""Training of heads: it learns what it is shown, knows what its scores are worth, and leaves no half-written file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon, box

from backend import instances, training
from backend.compact import CompactSegmenter
from backend.errors import BadWeights, TrainingError
from backend.segmenter import Embedding, Prompts
from backend.training import Example, train_heads

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def segmenter() -> CompactSegmenter:
    return CompactSegmenter.load()


def tile(seed: int, label: str = "pool", size: int = 84) -> tuple[np.ndarray, list[tuple[str, Polygon]]]:
    """Bright blue rectangles on brown ground, and their outlines."""
    rng = np.random.default_rng(seed)
    picture = rng.normal((110, 90, 60), 6, (size, size, 3))
    regions = []
    for x in (6, 48):
        y, width, height = int(rng.integers(6, 40)), int(rng.integers(20, 32)), int(rng.integers(20, 40))
        picture[y : y + height, x : x + width] = (40, 120, 230)
        regions.append((label, box(x, y, x + width, y + height)))
    return np.clip(picture, 0, 255).astype(np.uint8), regions


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [Example(*tile(seed), f"place {seed % 4}") for seed in range(5)]


@pytest.fixture(scope="module")
def trained(segmenter, examples, tmp_path_factory):
    # Fewer steps than usual are plenty for such plain pictures, and so are fewer candidates.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_STEPS", 60)
        patch.setattr(training, "_WINDOWS", 10)
        patch.setattr(training, "_LEAST_OF_EACH", 0)
        return run(segmenter, examples, tmp_path_factory)


def run(segmenter, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    heard: list[float] = []
    report = train_heads(
        segmenter,
        examples,
        ["pool", "road"],
        out=out,
        max_seconds=600,
        progress=lambda share, words: heard.append(share),
    )
    return out, report, heard


def test_a_label_never_seen_is_found_on_places_never_seen(segmenter, trained):
    out, report, _ = trained
    (pool,) = report.labels
    assert (pool.label, pool.objects, pool.iou_before) == ("pool", 10, None)
    assert pool.iou_after > 0.7
    picture, regions = tile(99)
    project = segmenter.with_heads(out)
    found = project.dense(project.embed(picture)).probabilities[project.labels.index("pool")] > 0.5
    truth = np.zeros(found.shape, bool)
    for _, outline in regions:
        x0, y0, x1, y1 = (int(v) for v in outline.bounds)
        truth[y0:y1, x0:x1] = True
    assert (found & truth).sum() / (found | truth).sum() > 0.7


def test_the_border_head_finds_borders(segmenter, trained):
    picture, regions = tile(98)
    project = segmenter.with_heads(trained[0])
    border = project.dense(project.embed(picture)).boundary[project.labels.index("pool")]
    x0, y0, x1, y1 = (int(v) for v in regions[0][1].bounds)
    inside = border[y0 + 6 : y1 - 6, x0 + 6 : x1 - 6].mean()
    edge = border[y0:y1, x0].mean()
    assert edge > inside + 0.1


def test_the_report_tells_what_was_left_out_and_what_was_not_trained(trained, examples):
    _, report, heard = trained
    assert report.untrained == ("road",)
    assert set(report.held_out) == {e.place for e in examples}
    assert report.tiles == len(examples)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_what_is_trained_begins_as_what_is_shipped(segmenter):
    picture, _ = tile(96)
    read = segmenter.inner(picture)
    inputs = [torch.from_numpy(v.astype(np.float32))[None] for n, v in read.features.items() if n != "scale_xy"]
    with torch.inference_mode():
        logits = segmenter.trainable_head("BUILDING")(*inputs)[0, 0]
    shipped = segmenter.with_only({"building": segmenter.head("building")})
    own = segmenter.with_only({"building": segmenter.trainable_head("building")})
    before, after = (model.dense(model.embed(picture)).probabilities for model in (shipped, own))
    np.testing.assert_allclose(after, before, atol=5e-3)
    assert logits.shape == (48, 48)
    np.testing.assert_allclose((logits[:42, :42] > 0).float().mean(), (before[0] > 0.5).mean(), atol=0.02)


def test_clicks_stay_to_the_last_bit_and_embeddings_are_told_apart(segmenter, trained):
    picture, regions = tile(95)
    project = segmenter.with_heads(trained[0])
    mine, shipped = project.embed(picture), segmenter.embed(picture)
    assert mine.version != shipped.version
    assert project.base_version == mine.version == segmenter.with_heads(trained[0]).base_version
    click = Prompts(np.array([regions[0][1].centroid.coords[0]]), np.array([True]))
    one, other = (model.segment(seen, click) for model, seen in ((project, mine), (segmenter, shipped)))
    assert np.array_equal(one.probabilities, other.probabilities)
    with pytest.raises(ValueError, match="is loaded"):
        project.dense(shipped)
    assert trained[0].stat().st_size < 300_000


def test_a_shipped_class_without_an_outline_is_believed_less(segmenter, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 2)
    monkeypatch.setattr(training, "_LEAST_OF_EACH", 1)
    pools = [Example(*tile(seed), f"place {seed}") for seed in range(3)]
    report = train_heads(segmenter, pools, ["pool", "building"], out=tmp_path / "heads")
    assert report.untrained == ("building",)
    project = segmenter.with_heads(tmp_path / "heads")
    seen = segmenter.embed(pools[0].image_rgb)
    found = instances.candidates_of(segmenter.dense(seen), "building", min_area_px=100)
    assert found.areas_px[1:].any()
    before, after = (
        instances.scored(found.features, instances.scoring_of(model.scoring, "building"))[1:].max()
        for model in (segmenter, project)
    )
    assert after < before
    assert project.head("building") is not None


def test_scores_are_fitted_on_what_the_project_showed(segmenter, trained):
    out, report, _ = trained
    assert report.labels[0].candidates > 0
    project = segmenter.with_heads(out)
    maps = project.dense(project.embed(tile(97)[0]))
    assert set(project.scoring) >= set(segmenter.scoring)
    assert instances.scoring_of(maps.scoring, "pool") != instances.scoring_of(segmenter.scoring, "pool")
    assert instances.scoring_of(maps.scoring, "building") == instances.scoring_of(segmenter.scoring, "building")


def test_the_same_data_and_seed_give_the_same_file(segmenter, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 10)
    files = []
    for name in "ab":
        train_heads(segmenter, examples, ["pool"], out=tmp_path / name, seed=3)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_labels_are_matched_without_regard_to_case_and_start_from_the_shipped_head(
    segmenter, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "_STEPS", 2)
    buildings = [replace(e, regions=[("BUILDING", p) for _, p in e.regions]) for e in examples]
    report = train_heads(segmenter, buildings, ["Building"], out=tmp_path / "heads")
    assert report.labels[0].objects == 10
    assert report.labels[0].iou_before is not None
    labels = segmenter.with_heads(tmp_path / "heads").labels
    assert "Building" in labels
    assert "building" not in labels
    assert len(labels) == len(segmenter.labels)


@pytest.mark.parametrize(("ious", "steps"), [([0.5, 0.4, 0.3], 0), ([0.3, 0.4, 0.5], 3)], ids=["stays", "follows"])
def test_a_shipped_head_follows_only_where_that_helps_on_tiles_left_out(
    segmenter, examples, tmp_path, monkeypatch, ious, steps
):
    monkeypatch.setattr(training, "_STEPS", 2)
    common = np.array([[(100 * iou, 100) for iou in ious]] * 2)
    monkeypatch.setattr(training._Desk, "overlaps", lambda desk, judged: common)
    buildings = [replace(e, regions=[("building", p) for _, p in e.regions]) for e in examples]
    report = train_heads(segmenter, buildings, ["building"], out=tmp_path / "heads")
    assert (report.labels[0].steps, report.labels[0].iou_before, report.labels[0].iou_after) == (
        steps,
        ious[0],
        max(ious),
    )
    before, after = segmenter.head("building"), segmenter.with_heads(tmp_path / "heads").head("building")
    assert (type(before) is type(after)) is not bool(steps)
    if not steps:
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_few_tiles_are_all_learned_from(segmenter, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 2)
    report = train_heads(segmenter, examples[:3], ["pool"], out=tmp_path / "heads")
    assert (report.tiles, report.held_out, report.labels[0].iou_after) == (3, (), None)


def test_what_a_fold_knows_is_kept_and_does_not_change_with_its_tiles(segmenter, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 4)
    shift = replace(examples[0], regions=[(label, box(2, 2, 40, 40)) for label, _ in examples[0].regions])
    files = []
    for name, first in (("clean", examples[0]), ("spoiled", shift)):
        folder = tmp_path / name
        folder.mkdir()
        report = train_heads(segmenter, [first, *examples[1:]], ["pool"], out=folder / "all", folds_out=folder)
        assert sorted(number for fold in report.folds for number in fold.tiles) == list(range(len(examples)))
        without = next(fold for fold in report.folds if 0 in fold.tiles)
        files.append((without.heads.read_bytes(), (folder / "all").read_bytes()))
        assert segmenter.with_heads(without.heads).head("pool") is not None
    assert files[0][0] == files[1][0]
    assert files[0][1] != files[1][1]


def test_the_optimizer_is_adam_w_of_torch():
    rng = torch.Generator().manual_seed(0)
    mine = torch.randn(3, 4, generator=rng)
    other = mine.clone().requires_grad_(True)
    theirs = torch.optim.AdamW([other], lr=0.01, betas=training._BETAS, weight_decay=training._DECAY)
    moments = torch.zeros(3, 4), torch.zeros(3, 4)
    for step in range(1, 6):
        gradient = torch.randn(3, 4, generator=rng)
        other.grad = gradient.clone()
        theirs.step()
        training._adam_w(mine, gradient, moments, step, 0.01)
    torch.testing.assert_close(mine, other.detach())


def test_each_tile_is_left_out_once_and_never_without_its_neighbours(examples):
    assert training._folds(["here"] * 5, 0) == []
    places = [e.place for e in examples]
    for seed in range(8):
        folds = training._folds(places, seed)
        assert sorted(number for fold in folds for number in fold) == list(range(len(places)))
        assert all(folds)
        assert not set.intersection(*({places[i] for i in fold} for fold in folds))


def test_a_label_that_only_one_place_has_is_learned_without_leaving_tiles_out(
    segmenter, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "_STEPS", 2)
    rare = [replace(e, regions=e.regions if e.place == "place 2" else []) for e in examples]
    report = train_heads(segmenter, rare, ["pool"], out=tmp_path / "heads")
    assert (report.labels[0].objects, report.labels[0].iou_after, report.labels[0].candidates) == (2, None, 0)


def test_classes_may_lie_on_one_another(segmenter, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 2)
    both = [replace(e, regions=[*e.regions, *(("basin", p.buffer(-4)) for _, p in e.regions)]) for e in examples]
    report = train_heads(segmenter, both, ["pool", "basin"], out=tmp_path / "heads")
    assert [(one.label, one.objects) for one in report.labels] == [("pool", 10), ("basin", 10)]
    read = segmenter.inner(both[0].image_rgb)
    inner, outer = (training._tile(both[0], read, label).target[0] for label in ("basin", "pool"))
    assert inner.sum() < outer.sum()
    assert (outer[inner > 0.9] > 0.9).all()


def test_ground_between_neighbours_counts_more_and_padding_nothing():
    embedding = Embedding(
        {"coarse": np.zeros((48, 24, 24)), "fine": np.zeros((8, 48, 48)), "scale_xy": np.ones(2)}, (84, 84), "none"
    )
    neighbours = Example(None, [("a", box(10, 10, 38, 60)), ("a", box(42, 10, 70, 60))], "here", embedding=embedding)
    emphasis = training._tile(neighbours, embedding, "a").emphasis
    assert emphasis[15, 20] > 2 * emphasis[15, 10] == 2
    assert emphasis[15, 2] == 1
    assert not emphasis[42:].any()
    assert not emphasis[:, 42:].any()


def test_a_scoring_follows_many_candidates_and_believes_few():
    believed = instances.DEFAULT_SCORING
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (2000, len(instances.FEATURES)))
    right = rng.random(2000) < 1 / (1 + np.exp(-2 * features[:, 3] + 1))
    fitted = np.array(training.fitted_scoring(features, right, believed=believed))
    assert fitted[3] == pytest.approx(2, abs=0.3)
    assert np.abs(np.delete(fitted[:-1], 3)).max() < 1.5
    few = np.array(training.fitted_scoring(features[:4], right[:4], believed=believed))
    assert np.abs(few - believed).max() < np.abs(fitted - believed).max() / 2
    chances = instances.scored(features, tuple(fitted))
    for low in (0.1, 0.4, 0.7):
        some = (chances > low) & (chances < low + 0.2)
        assert right[some].mean() == pytest.approx(chances[some].mean(), abs=0.1)


def test_a_recalibrated_scoring_keeps_the_order_and_says_how_often_it_is_right():
    believed = (*[0.5] * len(instances.FEATURES), 1.0)
    rng = np.random.default_rng(1)
    features = rng.normal(0, 1, (3000, len(instances.FEATURES)))
    before = instances.scored(features, believed)
    right = rng.random(3000) < before / 3
    after = instances.scored(features, training.recalibrated_scoring(features, right, believed=believed))
    assert (np.argsort(before) == np.argsort(after)).mean() > 0.99
    assert after.mean() == pytest.approx(right.mean(), abs=0.02)


@pytest.mark.parametrize("factors", [[1.0] * 3, [float("nan")] * 15])
def test_heads_whose_scoring_cannot_be_used_are_refused(segmenter, tmp_path, factors):
    path = tmp_path / "heads.safetensors"
    segmenter.save_heads({"pool": segmenter.new_head()}, path, scoring={"pool": factors})
    with pytest.raises(BadWeights, match="to score pool by"):
        segmenter.with_heads(path)


def test_of_a_large_tile_a_part_is_read_with_its_outlines_in_place():
    picture, regions = tile(94, size=300)
    example = Example(picture, regions, "here")
    part, image = training._some_of(example, picture, 100, np.random.default_rng(0))
    assert image.shape == (100, 100, 3)
    blue = image[..., 2] > 180
    drawn = training._drawn([outline for _, outline in part.regions], (100, 100)) > 0
    assert blue.any()
    assert (drawn & blue).sum() / (drawn | blue).sum() > 0.9


def test_the_scoring_is_the_one_that_tells_right_from_wrong_on_other_tiles():
    rng = np.random.default_rng(2)
    tiles = []
    for _ in range(6):
        features = rng.normal(0, 1, (60, 3))
        tiles.append((features, features[:, 0] + rng.normal(0, 0.3, 60) > 0))
    ways = [training.recalibrated_scoring, training.fitted_scoring]
    assert training._likeliest(ways, tiles, (0.0, 1.0, 0.0, 0.0)) is training.fitted_scoring
    assert training._likeliest(ways, tiles, (8.0, 0.0, 0.0, 0.0)) is training.recalibrated_scoring


def test_training_ends_in_time(segmenter, examples, tmp_path):
    report = train_heads(segmenter, examples, ["pool"], out=tmp_path / "heads", max_seconds=0)
    assert report.labels[0].steps <= 1


def test_nothing_to_learn_from_is_said_in_a_sentence(segmenter, examples, tmp_path):
    with pytest.raises(TrainingError, match="no annotated tile"):
        train_heads(segmenter, [], ["pool"], out=tmp_path / "heads")
    with pytest.raises(TrainingError, match="labelled road or river"):
        train_heads(segmenter, examples, ["road", "river"], out=tmp_path / "heads")
    bare = replace(examples[0], image_rgb=None, embedding=segmenter.embed(examples[0].image_rgb))
    with pytest.raises(TrainingError, match="no image"):
        train_heads(segmenter, [bare], ["pool"], out=tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


def test_an_example_needs_an_image_or_an_embedding():
    with pytest.raises(ValueError, match="neither"):
        Example(None, [], "here")
    with pytest.raises(ValueError, match="weight"):
        Example(np.zeros((8, 8, 3), np.uint8), [], "here", weight=0)


def test_targets_lie_where_the_outline_lies(segmenter):
    outline = box(20, 30, 60, 70)
    picture = np.zeros((96, 96, 3), np.uint8)
    made = training._tile(Example(picture, [("a", outline)], "here"), segmenter.embed(picture), "a")
    rows, columns = np.nonzero(made.target[0] > 0.5)
    half = 0.5
    np.testing.assert_allclose(
        [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.array(outline.bounds) * half, atol=0.75
    )
    border = made.target[1]
    assert border[int(50 * half), int(20 * half)] > 0.4
    assert border[int(50 * half), int(40 * half)] == 0


def test_unused_path_is_left_alone(segmenter, examples, tmp_path: Path):
    kept = tmp_path / "heads"
    kept.write_bytes(b"old")
    with pytest.raises(TrainingError):
        train_heads(segmenter, examples, ["road"], out=kept)
    assert kept.read_bytes() == b"old"
