"""The compact segmenter: what holds for any weights, and what the shipped ones must manage."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from backend import compact
from backend.compact import CompactNet, CompactSegmenter, DenseHead, save_heads, save_weights
from backend.errors import BadImage, BadPrompt, BadWeights
from backend.segmenter import Embedding, Prompts

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(CompactNet(["building", "road"]), path, {"note": "random"})
    return path


@pytest.fixture(scope="module")
def segmenter(weights) -> CompactSegmenter:
    return CompactSegmenter.load(weights)


@pytest.fixture(scope="module")
def shipped() -> CompactSegmenter:
    return CompactSegmenter.load()


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def roof(height: int = 200, width: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """A bright roof with a shadow on grass, and its mask."""
    rng = np.random.default_rng(1)
    picture = rng.normal((70, 95, 55), 8, (height, width, 3))
    picture[84:134, 96:156] = (30, 35, 30)
    mask = np.zeros((height, width), bool)
    mask[80:130, 90:150] = True
    picture[mask] = rng.normal((205, 200, 195), 5, (mask.sum(), 3))
    return np.clip(picture, 0, 255).astype(np.uint8), mask


def click(*points: tuple[float, float, bool]) -> Prompts:
    return Prompts(np.array([p[:2] for p in points], float), np.array([p[2] for p in points]))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("hw", [(8, 8), (8, 77), (100, 33), (65, 130)])
def test_every_size_gives_maps_of_that_size(segmenter, hw):
    embedding = segmenter.embed(image(*hw))
    assert embedding.image_hw == hw
    masks = segmenter.segment(embedding, click((hw[1] / 2, hw[0] / 2, True)))
    assert masks.probabilities.shape == (1, *hw)
    assert masks.probabilities.dtype == np.float32
    assert ((masks.probabilities >= 0) & (masks.probabilities <= 1)).all()
    assert 0 <= masks.scores[0] <= 1
    maps = segmenter.dense(embedding)
    assert maps.labels == ("building", "road") == segmenter.labels
    assert maps.probabilities.shape == maps.boundary.shape == (2, *hw)
    assert np.isfinite(maps.probabilities).all()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((7, 9, 3), np.uint8)],
)
def test_what_is_no_rgb_image_is_refused(segmenter, wrong):
    with pytest.raises(BadImage):
        segmenter.embed(wrong)


def test_blocks_give_the_same_features_as_one_piece(segmenter, monkeypatch):
    picture = image(64, 1312)
    blocked = segmenter.embed(picture)
    monkeypatch.setattr(compact, "_BLOCK_CELLS", 10_000)
    whole = segmenter.embed(picture)
    for name in ("coarse", "fine"):
        a, b = (e.features[name].astype(float) for e in (blocked, whole))
        assert np.abs(a - b).mean() < 0.02 * np.abs(b).std()


@pytest.mark.parametrize("length", [1, 255, 256, 257, 300, 1000, 1024])
def test_blocks_cover_the_axis_once(length):
    covered = np.zeros(length, int)
    for start, first, end in compact._blocks(length, 256, 32):
        assert start >= 0
        assert start <= first
        assert end <= min(length, start + 256)
        assert first in (0, *range(start + 32, length))
        covered[first:end] += 1
    assert (covered == 1).all()


def test_prompts_that_mean_no_object_are_refused(segmenter):
    embedding = segmenter.embed(image(40, 40))
    for prompts in (Prompts(), click((5, 5, False)), Prompts(box_xyxy=np.array([50.0, 50, 60, 60]))):
        with pytest.raises(BadPrompt):
            segmenter.segment(embedding, prompts)


@pytest.mark.parametrize("seed", range(6))
def test_clicks_are_obeyed_whatever_the_network_thinks(segmenter, seed):
    rng = np.random.default_rng(seed)
    embedding = segmenter.embed(image(90, 70, seed))
    points = np.column_stack([rng.permutation(70)[:6], rng.permutation(90)[:6]]) + 0.5
    flags = np.array([True, False, True, False, True, False])
    mask = segmenter.segment(embedding, Prompts(points, flags)).probabilities[0] > 0.5
    columns, rows = points.astype(int).T
    assert (mask[rows, columns] == flags).all()


def test_every_patch_holds_a_click(segmenter):
    import cv2

    embedding = segmenter.embed(image(120, 120, 3))
    mask = segmenter.segment(embedding, click((30, 30, True), (90, 95, True), (60, 60, False))).probabilities[0] > 0.5
    count, patches = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert set(range(1, count)) == {patches[30, 30], patches[95, 90]}


def test_a_click_outside_the_image_counts_at_its_edge(segmenter):
    embedding = segmenter.embed(image(40, 60))
    mask = segmenter.segment(embedding, click((99, -5, True))).probabilities[0] > 0.5
    assert mask[0, 59]


def test_answers_do_not_depend_on_what_was_asked_before_or_at_the_same_time(segmenter):
    embeddings = [segmenter.embed(image(64, 64, seed)) for seed in range(2)]
    alone = [segmenter.segment(e, click((20, 30, True))).probabilities for e in embeddings]
    answers: dict[int, np.ndarray] = {}

    def ask(i: int) -> None:
        answers[i] = segmenter.segment(embeddings[i % 2], click((20, 30, True))).probabilities

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_allclose(answers[i], alone[i % 2], atol=1e-5)


def test_an_embedding_of_other_weights_is_refused(segmenter):
    embedding = segmenter.embed(image(40, 40))
    stranger = Embedding(embedding.features, embedding.image_hw, "compact-00000000")
    with pytest.raises(ValueError, match="compact-00000000"):
        segmenter.segment(stranger, click((5, 5, True)))
    with pytest.raises(ValueError, match="compact-00000000"):
        segmenter.dense(stranger)


def test_resampling_keeps_places():
    ramp = np.add.outer(np.zeros(40, np.float32), np.arange(40, dtype=np.float32))
    # Value i is 2 px wide and starts at 10 px, so its centre lies at 10 + (i + 0.5) * 2.
    out = compact._resampled(ramp, (10, 0), 2, 12, 0, 60, 20)
    expected = (np.arange(12, 60) + 0.5 - 10) / 2 - 0.5
    np.testing.assert_allclose(out[5], expected, atol=0.05)


def test_versions_name_the_weights(weights, segmenter, tmp_path):
    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    save_weights(CompactNet(["building", "road"]), other, {})
    assert segmenter.version == segmenter.base_version == CompactSegmenter.load(weights).version
    assert segmenter.version.startswith("compact-")
    assert len(segmenter.version) == len("compact-") + 8
    assert CompactSegmenter.load(other).version != segmenter.version
    assert segmenter.embed(image(16, 16)).version == segmenter.base_version


def test_heads_replace_those_of_the_same_name_and_share_the_network(weights, segmenter, tmp_path):
    path = tmp_path / "heads.safetensors"
    torch.manual_seed(2)
    save_heads({"Road": DenseHead(), "pool": DenseHead()}, segmenter.base_version, path)
    project = segmenter.with_heads(path)
    assert project.labels == ("building", "Road", "pool")
    assert project.version.startswith(f"{segmenter.base_version}-")
    assert project.base_version == segmenter.base_version
    assert segmenter.labels == ("building", "road")
    assert segmenter.version == segmenter.base_version
    embedding = segmenter.embed(image(40, 40))
    before, after = segmenter.dense(embedding), project.dense(embedding)
    np.testing.assert_array_equal(before.probabilities[0], after.probabilities[0])
    assert not np.allclose(before.probabilities[1], after.probabilities[after.labels.index("Road")])
    assert CompactSegmenter.load(weights, heads=path).version == project.version


def test_equal_heads_make_equal_files(tmp_path):
    torch.manual_seed(3)
    heads = {"road": DenseHead(), "pool": DenseHead()}
    for name in "abcd":
        save_heads(heads, "compact-00000000", tmp_path / name, {"seed": "0", "tiles": "7"})
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


def test_weights_that_cannot_be_used_are_named(weights, segmenter, tmp_path):
    def refused(path: Path, words: str, heads: Path | None = None) -> None:
        with pytest.raises(BadWeights, match=words):
            CompactSegmenter.load(path, heads=heads)

    refused(tmp_path / "absent.safetensors", "absent.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    refused(garbage, "damaged")
    content, sums = weights.read_bytes(), weights.with_suffix(".sha256").read_text()
    flipped = tmp_path / "flipped.safetensors"
    flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    flipped.with_suffix(".sha256").write_text(sums)
    refused(flipped, "sha256")
    unsigned = tmp_path / "unsigned.safetensors"
    unsigned.write_bytes(content)
    refused(unsigned, "missing")
    alien = tmp_path / "alien.safetensors"
    alien.write_bytes(
        safetensors.torch.save({"x": torch.zeros(1)}, {"architecture": "other", "labels": json.dumps([])})
    )
    refused(alien, "other")
    heads = tmp_path / "heads.safetensors"
    save_heads({"road": DenseHead()}, "compact-12345678", heads)
    refused(weights, "compact-12345678", heads)
    refused(weights, "unnamed kind", weights)


def test_shipped_weights_are_small_and_know_buildings(shipped):
    assert "building" in shipped.labels
    assert compact.SHIPPED_WEIGHTS.stat().st_size <= 12_000_000


def test_shipped_weights_outline_a_clicked_roof(shipped):
    picture, mask = roof()
    embedding = shipped.embed(picture)
    answer = shipped.segment(embedding, click((120.5, 105.5, True)))
    assert iou(answer.probabilities[0] > 0.5, mask) > 0.75


def test_shipped_weights_outline_a_boxed_roof(shipped):
    picture, mask = roof()
    answer = shipped.segment(shipped.embed(picture), Prompts(box_xyxy=np.array([88.0, 79, 152, 131])))
    assert iou(answer.probabilities[0] > 0.5, mask) > 0.75
