"""Training of heads: it learns what it is shown, is judged on other places, and leaves no half-written file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon, box

from backend import training
from backend.compact import CompactSegmenter
from backend.errors import TrainingError
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
def examples(segmenter) -> list[Example]:
    made = []
    for seed in range(5):
        picture, regions = tile(seed)
        made.append(Example(None, regions, f"place {seed % 4}", embedding=segmenter.embed(picture)))
    return made


@pytest.fixture(scope="module")
def trained(segmenter, examples, tmp_path_factory):
    # Half of the usual steps are plenty for such plain pictures.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_STEPS", 120)
        yield run(segmenter, examples, tmp_path_factory)


def run(segmenter, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    heard: list[float] = []
    report = train_heads(
        segmenter, examples, ["pool", "road"], out=out, progress=lambda share, words: heard.append(share)
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


def test_the_report_tells_what_was_held_out_and_what_was_not_trained(trained, examples):
    _, report, heard = trained
    assert report.untrained == ("road",)
    assert report.held_out
    assert set(report.held_out) < {e.place for e in examples}
    assert report.tiles == sum(e.place not in report.held_out for e in examples)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


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


def test_a_shipped_head_that_training_would_spoil_stays(segmenter, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 3)
    monkeypatch.setattr(training, "_loss_on", lambda head, tiles, calls=[]: calls.append(0) or float(len(calls)))
    buildings = [replace(e, regions=[("building", p) for _, p in e.regions]) for e in examples]
    report = train_heads(segmenter, buildings, ["building"], out=tmp_path / "heads")
    assert report.labels[0].steps == 0
    assert report.labels[0].iou_before == report.labels[0].iou_after
    before, after = segmenter.head("building"), segmenter.with_heads(tmp_path / "heads").head("building")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_few_tiles_are_all_learned_from(segmenter, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS", 2)
    report = train_heads(segmenter, examples[:3], ["pool"], out=tmp_path / "heads")
    assert (report.tiles, report.held_out, report.labels[0].iou_after) == (3, (), None)


def test_no_place_is_both_learned_from_and_judged_on(examples):
    one_place = [replace(e, place="here") for e in examples]
    assert training._held_out_places(one_place, ["pool"], 0) == set()
    for seed in range(8):
        held = training._held_out_places(examples, ["pool"], seed)
        assert 0 < sum(e.place in held for e in examples) <= len(examples) // 2


def test_training_ends_in_time(segmenter, examples, tmp_path):
    report = train_heads(segmenter, examples, ["pool"], out=tmp_path / "heads", max_seconds=0)
    assert report.labels[0].steps <= 1


def test_nothing_to_learn_from_is_said_in_a_sentence(segmenter, examples, tmp_path):
    with pytest.raises(TrainingError, match="no annotated tile"):
        train_heads(segmenter, [], ["pool"], out=tmp_path / "heads")
    with pytest.raises(TrainingError, match="labelled road or river"):
        train_heads(segmenter, examples, ["road", "river"], out=tmp_path / "heads")
    stale = replace(examples[0].embedding, version="compact-00000000")
    with pytest.raises(TrainingError, match="other weights"):
        train_heads(segmenter, [replace(examples[0], embedding=stale)], ["pool"], out=tmp_path / "heads")
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
