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
from backend.instances import ANY_LABEL, FEATURES
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


def test_large_images_are_embedded_in_thirds_with_the_same_features(segmenter, monkeypatch):
    picture = image(96, 128)
    whole = segmenter.embed(picture)
    monkeypatch.setattr(compact, "_WIDE_BYTES", 0)
    in_thirds = segmenter.embed(picture)
    for name in ("coarse", "fine"):
        one, other = (e.features[name].astype(float) for e in (whole, in_thirds))
        np.testing.assert_allclose(one, other, atol=2e-3)


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
    out = compact._resampled(ramp, np.array([10.0, 0]), np.array([2.0, 2]), 12, 0, 60, 20)
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


# --- Working scale ---


@pytest.mark.parametrize("hw", [(64, 96), (101, 75)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 3.0])
def test_an_enlarged_image_is_answered_in_its_own_pixels(shipped, hw, scale):
    embedding = shipped.embed(image(*hw), scale=scale)
    assert embedding.image_hw == hw
    point = (hw[1] - 20.5, 30.5)
    mask = shipped.segment(embedding, click((*point, True), (5.5, 5.5, False))).probabilities[0]
    assert mask.shape == hw
    assert mask[30, hw[1] - 21] > 0.5 > mask[5, 5]
    assert shipped.dense(embedding).probabilities.shape[1:] == hw


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_outline_lies_in_the_same_place_at_every_scale(shipped, scale):
    picture, mask = roof(201, 243)
    embedding = shipped.embed(picture, scale=scale)
    answer = shipped.segment(embedding, click((120.5, 105.5, True))).probabilities[0] > 0.5
    assert iou(answer, mask) > 0.75
    for axis in (0, 1):
        middle, truth = (np.nonzero(m.any(axis))[0].mean() for m in (answer, mask))
        assert abs(middle - truth) < 2


def test_coarse_imagery_is_enlarged_as_far_as_time_allows(segmenter):
    wanted = [
        ((512, 512), None, (), 1.0),
        ((256, 256), None, (), 1.0),
        ((512, 512), 0.13, ("building",), 1.0),
        ((512, 512), 0.3, ("building",), 1.0),
        ((512, 512), 0.5, ("building",), 2.0),
        ((512, 512), 1.36, (), 3.0),
        ((1024, 1024), 1.36, ("building",), 1.5),
        ((4000, 4000), 1.36, ("building",), 1.0),
        ((512, 512), 1.0, ("building", "Field"), 1.0),
        ((512, 512), 4.0, ("field",), 2.0),
    ]
    for hw, gsd_m, classes, scale in wanted:
        assert segmenter.working_scale(hw, gsd_m, classes) == scale, (hw, gsd_m, classes)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(segmenter, scale):
    with pytest.raises(ValueError, match="scale"):
        segmenter.embed(image(16, 16), scale=scale)


# --- Part of a tile, and objects of every size ---


def test_what_runs_out_of_the_first_window_is_looked_at_whole_and_adapted_to_once(
    shipped: CompactSegmenter, monkeypatch: pytest.MonkeyPatch
):
    looked: list[int] = []
    adapted: list[tuple[int, ...]] = []
    look, adapt = CompactSegmenter._decode_window, compact._adapted
    monkeypatch.setattr(
        CompactSegmenter, "_decode_window", lambda self, *args: (looked.append(args[1].width), look(self, *args))[1]
    )
    monkeypatch.setattr(compact, "_adapted", lambda *args: (adapted.append(args[0].shape), adapt(*args))[1])
    picture = np.full((512, 512, 3), (70, 90, 60), np.uint8)
    picture[106:406, 106:406] = (190, 180, 170)
    shipped.segment(shipped.embed(picture), click((256, 256, True)))
    assert looked == [64, 96]
    assert adapted == [(192, 192)]


@pytest.mark.parametrize("window_xyxy", [(0, 0, 90, 70), (13, 21, 14, 22), (40, 3, 90, 70), (31, 30, 60, 47)])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_maps_of_a_part_are_part_of_the_maps(segmenter, window_xyxy, scale):
    embedding = segmenter.embed(image(70, 90), scale=scale)
    left, top, right, bottom = window_xyxy
    whole, part = segmenter.dense(embedding), segmenter.dense(embedding, window_xyxy=window_xyxy)
    for name in ("probabilities", "boundary"):
        expected = getattr(whole, name)[:, top:bottom, left:right]
        np.testing.assert_allclose(getattr(part, name), expected, atol=1e-3)


@pytest.mark.parametrize("side", [6, 9, 12])
def test_a_tiny_object_is_outlined(shipped, side):
    rng = np.random.default_rng(2)
    picture = rng.normal((70, 95, 55), 5, (128, 128, 3))
    mask = np.zeros((128, 128), bool)
    mask[60 : 60 + side, 70 : 70 + side] = True
    picture[mask] = (215, 210, 205)
    embedding = shipped.embed(picture.clip(0, 255).astype(np.uint8))
    middle = 60 + side / 2
    boxed = Prompts(box_xyxy=np.array([70.0, 60, 70 + side, 60 + side]))
    for prompts, least in ((click((middle + 10, middle, True)), 0.2), (boxed, 0.5)):
        answer = shipped.segment(embedding, prompts).probabilities[0] > 0.5
        assert iou(answer, mask) > least, (prompts, int(answer.sum()))


def test_a_box_is_never_answered_with_nothing(segmenter):
    """Not even by weights that see no object there."""
    embedding = segmenter.embed(image(90, 70, 4))
    for box in ((10.0, 10, 60, 80), (20.0, 30, 27, 36), (66.0, 86, 70, 90), (0.0, 0, 70, 90)):
        mask = segmenter.segment(embedding, Prompts(box_xyxy=np.array(box))).probabilities[0] > 0.5
        x0, y0, x1, y1 = (int(v) for v in box)
        assert mask[y0:y1, x0:x1].mean() > 0.3, box


def test_an_object_as_large_as_the_tile_is_outlined(shipped):
    rng = np.random.default_rng(3)
    picture = rng.normal((205, 200, 195), 4, (400, 400, 3))
    picture[:12] = rng.normal((40, 60, 30), 4, (12, 400, 3))
    embedding = shipped.embed(picture.clip(0, 255).astype(np.uint8))
    mask = shipped.segment(embedding, Prompts(box_xyxy=np.array([0.0, 12, 400, 400]))).probabilities[0] > 0.5
    assert mask[12:].mean() > 0.8
    assert mask[:8].mean() < 0.1


def test_the_arithmetic_gives_what_it_gave_before_it_was_made_faster():
    torch.manual_seed(5)
    segmenter = CompactSegmenter(CompactNet(["building"]), "compact-00000000")
    embedding = segmenter.embed(image(96, 80, 6))
    masks = segmenter.segment(embedding, click((40.5, 50.5, True), (10.5, 20.5, False)))
    found = [np.abs(embedding.features["coarse"].astype(np.float64)), masks.probabilities]
    found.append(segmenter.dense(embedding).probabilities)
    assert [float(values.mean()) for values in found] == pytest.approx([0.16686, 0.57463, 0.46589], abs=1e-3)


@pytest.mark.parametrize("box", [None, (20.0, 18.0, 52.0, 44.0)])
def test_prompts_read_once_are_as_good_as_prompts_read_in_each_pass(segmenter, box):
    decoder = segmenter._net.decoder
    torch.manual_seed(7)
    context, fine = decoder.context(torch.randn(1, compact.COARSE, 24, 20)), torch.randn(1, compact.FINE, 48, 40)
    colours = torch.rand(1, 3, 24, 20) * 255, torch.rand(1, 3, 48, 40) * 255
    points = torch.tensor([[[9.5, 11.5, 1.0], [3.0, 2.0, -1.0]]])
    edges = torch.tensor([box or (float("nan"),) * 4]) / compact.CELL_PX
    views = context, fine, *colours, points, edges
    with torch.inference_mode():
        first, _ = decoder(*views)
        _, expected = decoder(*views, first)
        prompted = decoder.prompt_maps(context, points, edges)
        _, sharp = decoder(*views, decoder(*views, None, prompted)[0], prompted)
    torch.testing.assert_close(sharp, expected)


def test_the_shipped_weights_bring_a_scoring_for_each_class_and_for_all_others() -> None:
    shipped = CompactSegmenter.load()
    dense = shipped.dense(shipped.embed(np.zeros((64, 64, 3), np.uint8)))
    assert set(dense.scoring) == {*shipped.labels, ANY_LABEL}
    assert {len(factors) for factors in dense.scoring.values()} == {len(FEATURES) + 1}
    assert dense.evidence is not None
    assert all(np.abs(of_class).max() > 0 for of_class in dense.evidence)


def test_evidence_is_what_the_weights_say_of_features_and_classes_without_have_none(tmp_path: Path, weights: Path):
    net = CompactNet(["building", "road"])
    net.load_state_dict({name: v.float() for name, v in safetensors.torch.load(weights.read_bytes()).items()})
    weighed = np.random.default_rng(1).normal(0, 0.1, (2, compact.COARSE + compact.FINE))
    path = tmp_path / "told.safetensors"
    save_weights(net, path, {"evidence": json.dumps({"Building": weighed.tolist()})})
    segmenter = CompactSegmenter.load(path)
    embedding = segmenter.embed(image(64, 96, 3))
    evidence = segmenter.dense(embedding).evidence
    assert evidence is not None
    assert evidence.shape == (2, 2, 64, 96)
    assert not evidence[1].any()
    # Four pixels round the corner of a half-cell, and four half-cells round the corner of a cell, lie evenly about it.
    coarse, fine = (embedding.features[name].astype(np.float64) for name in ("coarse", "fine"))
    cells = np.tensordot(weighed[:, : compact.COARSE], coarse[:, 5:7, 8:10].mean((1, 2)), 1)
    halves = np.tensordot(weighed[:, compact.COARSE :], fine[:, 11:13, 17:19].mean((1, 2)), 1)
    assert evidence[0, :, 23:25, 35:37].mean((1, 2)) == pytest.approx(cells + halves, abs=1e-3)
    assert segmenter.dense(embedding, window_xyxy=(10, 10, 40, 40)).evidence is None
    assert CompactSegmenter.load(weights).dense(embedding_of(weights)).evidence is None


def embedding_of(weights: Path) -> Embedding:
    return CompactSegmenter.load(weights).embed(image(64, 96, 3))


@pytest.mark.parametrize("evidence", ["{", '{"building": [[1, 2]]}', '{"building": "x"}', "[1]"])
def test_evidence_that_fits_no_features_is_refused(tmp_path: Path, evidence: str):
    path = tmp_path / "bad.safetensors"
    save_weights(CompactNet(["building"]), path, {"evidence": evidence})
    with pytest.raises(BadWeights, match="evidence"):
        CompactSegmenter.load(path)


def test_a_scoring_from_before_there_was_evidence_still_counts(tmp_path: Path):
    old = [float(n) for n in range(len(FEATURES) - 1)]
    path = tmp_path / "old.safetensors"
    save_weights(CompactNet(["building"]), path, {"scoring": json.dumps({"building": old})})
    assert CompactSegmenter.load(path).scoring["building"] == (*old[:-1], 0.0, 0.0, old[-1])


def test_a_mirror_image_is_seen_as_if_it_were_the_image(segmenter: CompactSegmenter):
    picture = image(64, 96, 8)
    mirrored = segmenter.dense_mirrored(np.ascontiguousarray(picture[:, ::-1]))
    dense = segmenter.dense(segmenter.embed(picture))
    assert np.array_equal(mirrored.probabilities, dense.probabilities)
    assert np.array_equal(dense.mean_with_mirrored(mirrored).boundary, (dense.boundary + dense.boundary[..., ::-1]) / 2)


@pytest.mark.parametrize("window_xyxy", [None, (10, 4, 60, 50)])
def test_maps_of_some_classes_are_those_that_all_have(shipped: CompactSegmenter, window_xyxy):
    picture = image(64, 96, 8)
    embedding = shipped.embed(picture)
    every = shipped.dense(embedding, window_xyxy=window_xyxy)
    some = shipped.dense(embedding, window_xyxy=window_xyxy, labels=["field"])
    which = [every.labels.index("field")]
    assert some.labels == ("field",)
    assert np.array_equal(some.probabilities, every.probabilities[which])
    assert np.array_equal(some.boundary, every.boundary[which])
    assert (some.evidence is None) == (every.evidence is None) == (window_xyxy is not None)
    if some.evidence is not None and every.evidence is not None:
        assert np.array_equal(some.evidence, every.evidence[which])
    assert shipped.dense_mirrored(picture, labels=["building"]).labels == ("building",)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_stride_of_two_sees_the_same_with_and_without_gradients(kernel: int):
    torch.manual_seed(kernel)
    block = compact._InvertedResidual(6, kernel, 2, 4, 8)
    cells = torch.randn(2, 4, 12, 18).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        quick = block(cells)
    torch.testing.assert_close(quick, block(cells).detach())
