"""Segment Anything behind our protocol gives the numbers of the package, and says nothing that it does not know.

The networks here are small ones of the package's own classes with seeded random weights: what is tested is that
encoding, prompts and resizing are the package's; that SAM itself is any good, its authors have shown.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from backend import checkpoints, cli, fit, sam, training
from backend.checkpoints import Checkpoint
from backend.errors import BadImage, BadPrompt, BadWeights
from backend.everything import EverythingOptions, crop_boxes, everything, grid
from backend.images import ImageStore
from backend.predictor import load_segmenter, outlined, warmed_up
from backend.sam import SamSegmenter, build, encoded, frame_hw, resized_to
from backend.segmenter import Embedding, Masks, Prompts
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from backend.vectorize import VectorizeOptions, polygons, rasterize
from tests.fakes import bright_image
from tests.small_server import Answer, SmallServer
from tests.test_fit import CONFIG, annotated

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FRAME_PX, CHANNELS = 128, 32


def small_network(seed: int = 0, *, window: int = 3, blocks: int = 3, whole: tuple[int, ...] = (1,)) -> Any:
    """A network of the package's classes, 128 pixels wide, with random weights that let prompts matter."""
    modeling, _ = sam._segment_anything()
    cells = FRAME_PX // 16
    torch.manual_seed(seed)
    network = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=blocks, embed_dim=32, img_size=FRAME_PX, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=4, use_rel_pos=True, global_attn_indexes=whole, window_size=window, out_chans=CHANNELS,
        ),
        prompt_encoder=modeling.PromptEncoder(CHANNELS, (cells, cells), (FRAME_PX, FRAME_PX), 16),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=CHANNELS, iou_head_hidden_dim=32,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=CHANNELS, num_heads=8, mlp_dim=64),
        ),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        # Masks with clear edges that depend on the click, and expected IoUs on both sides of thresholds.
        for hyper in network.mask_decoder.output_hypernetworks_mlps:
            hyper.layers[-1].weight *= 20
        network.mask_decoder.iou_prediction_head.layers[-1].bias.fill_(1.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> Any:
    return small_network()


@pytest.fixture(scope="module")
def checkpoint(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "small.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def segmenter(checkpoint: Path) -> SamSegmenter:
    with pytest.MonkeyPatch.context() as patch:  # a processor that is faster with bfloat16 would be given that
        patch.setattr(sam, "fitting_dtype", lambda device: torch.float32)
        return SamSegmenter.load(checkpoint, name="sam_small")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blots of colour, so that neighbouring pixels resemble each other."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def package_answer(network: Any, image: np.ndarray, prompts: Prompts, several: bool, mask: Any = None) -> Any:
    """What the package's own `Sam.forward` says, in the frame that its SamPredictor gives it."""
    height, width = image.shape[:2]
    scale = FRAME_PX / max(height, width)
    rows, columns = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = np.array(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR))
    factor = np.array([columns / width, rows / height])
    record: dict[str, Any] = {
        "image": torch.from_numpy(resized).permute(2, 0, 1).float(),
        "original_size": (height, width),
    }
    # The package adds half a pixel of its frame: corners become centres.
    if len(prompts.points_xy):
        record["point_coords"] = torch.from_numpy(prompts.points_xy * factor - 0.5).float()[None]
        record["point_labels"] = torch.from_numpy(prompts.is_foreground.astype(int))[None]
    if prompts.box_xyxy is not None:
        record["boxes"] = torch.from_numpy(prompts.box_xyxy * np.tile(factor, 2) - 0.5).float()[None]
    if mask is not None:
        record["mask_inputs"] = mask
    network.mask_threshold = 0.0
    answer = network([record], multimask_output=several)[0]
    logits = network.postprocess_masks(answer["low_res_logits"], (rows, columns), (height, width))
    return logits[0].numpy(), answer["iou_predictions"][0].numpy(), answer["low_res_logits"]


def clicks(*xys: tuple[float, float, bool], box: Any = None) -> Prompts:
    points = np.array([(x, y) for x, y, _ in xys]).reshape(-1, 2)
    return Prompts(points, np.array([flag for *_, flag in xys], bool), None if box is None else np.array(box, float))


@pytest.mark.parametrize("size", [(128, 128), (100, 60), (37, 90), (256, 256), (300, 70), (9, 9)])
def test_encoding_gives_what_the_packages_encoder_gives(network: Any, segmenter: SamSegmenter, size: Any) -> None:
    image = picture(*size)
    resized = resized_to(image, FRAME_PX)
    assert resized.shape[:2] == frame_hw(*size, FRAME_PX)
    frame = network.preprocess(torch.from_numpy(resized).permute(2, 0, 1).float())[None]
    expected = network.image_encoder(frame)[0].numpy()
    embedding = segmenter.embed(image)
    assert embedding.image_hw == size
    # Kept in half precision, which has eleven bits.
    np.testing.assert_allclose(embedding.features["coarse"].astype(np.float32), expected, rtol=2**-10, atol=2e-3)


@pytest.mark.parametrize("window", [3, 4, 5, 8])
@pytest.mark.parametrize("most", [64, 3000, 2**22])
def test_however_attention_is_cut_up_it_stays_the_same(window: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small_network(1, window=window).image_encoder
    frame = torch.randn(1, 3, FRAME_PX, FRAME_PX, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(sam._MAP_VALUES, "cpu", most)
    with torch.inference_mode():
        np.testing.assert_allclose(encoded(encoder, frame), encoder(frame), rtol=1e-4, atol=2e-5)


def test_bfloat16_draws_nearly_the_same_masks(network: Any, segmenter: SamSegmenter) -> None:
    image = picture(100, 128)
    half = SamSegmenter(network, segmenter.base_version, dtype=torch.bfloat16)
    prompts = clicks((50, 50, True))
    one, other = (s.segment(s.embed(image), prompts).probabilities[0] > 0.5 for s in (segmenter, half))
    assert (one & other).sum() >= 0.9 * (one | other).sum()


@pytest.mark.parametrize("able", [{}, {"avx512_f": True}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_bfloat16_is_for_processors_that_multiply_it(able: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    is_made_for_it = any("bf16" in name for name in able)
    assert sam.fitting_dtype(torch.device("cpu")) is (torch.bfloat16 if is_made_for_it else torch.float32)


@pytest.mark.parametrize("size", [(128, 128), (100, 60), (37, 90), (256, 256)])
@pytest.mark.parametrize(
    ("prompts", "several"),
    [
        (clicks((20.5, 15.5, True)), True),
        (clicks(box=(5, 6, 30, 33.5)), False),
        (clicks((20, 15, True), box=(5, 6, 30, 33.5)), False),
    ],
)
def test_masks_are_those_of_the_package(
    network: Any, segmenter: SamSegmenter, size: Any, prompts: Prompts, several: bool
) -> None:
    image = picture(*size)
    logits, ious, _ = package_answer(network, image, prompts, several)
    embedding = segmenter.embed(image)
    low_res, found_ious = segmenter._answered(embedding, prompts.points_xy, prompts.is_foreground, prompts.box_xyxy)
    found = segmenter._to_pixels(low_res, size).numpy()
    np.testing.assert_allclose(found_ious.numpy(), ious, atol=0.02)
    for one, other in zip(found > 0, logits > 0, strict=True):
        assert (one & other).sum() >= 0.995 * (one | other).sum()


def test_a_second_click_refines_the_answer_to_the_first(network: Any, segmenter: SamSegmenter) -> None:
    image, prompts = picture(128, 128), clicks((40, 40, True), (90, 70, False))
    _, ious, low_res = package_answer(network, image, clicks((40, 40, True)), True)
    expected, *_ = package_answer(network, image, prompts, False, low_res[:, ious.argmax()][:, None])
    low, _ = segmenter._answered(segmenter.embed(image), prompts.points_xy, prompts.is_foreground, None)
    found = segmenter._to_pixels(low, (128, 128)).numpy()[0] > 0
    assert (found & (expected[0] > 0)).sum() >= 0.99 * (found | (expected[0] > 0)).sum()
    alone, *_ = package_answer(network, image, prompts, False)
    assert ((alone[0] > 0) != (expected[0] > 0)).any()


def test_one_click_gets_three_candidates_the_surest_with_the_click_first(segmenter: SamSegmenter) -> None:
    embedding = segmenter.embed(picture(100, 80))
    for x, y in [(20.2, 30.7), (60.0, 80.0), (0.0, 0.0), (79.99, 99.99)]:
        masks = segmenter.segment(embedding, clicks((x, y, True)))
        assert masks.probabilities.shape == (3, 100, 80)
        assert (np.diff(masks.scores) <= 0).all()
        assert (masks.scores >= 0).all()
        assert (masks.scores <= 1).all()
        holds = masks.probabilities[:, min(int(y), 99), min(int(x), 79)] > 0.5
        assert (np.diff(holds.astype(int)) <= 0).all()
    assert len(segmenter.segment(embedding, clicks((20, 30, True), (70, 90, False))).scores) == 1


def test_prompts_that_mean_nothing_are_refused(segmenter: SamSegmenter) -> None:
    embedding = segmenter.embed(picture(64, 64))
    with pytest.raises(BadPrompt, match="needed"):
        segmenter.segment(embedding, clicks((3, 3, False)))
    with pytest.raises(BadPrompt, match="64 by 64"):
        segmenter.segment(embedding, clicks(box=(70, 70, 90, 90)))
    with pytest.raises(ValueError, match="is loaded"):
        segmenter.segment(Embedding(embedding.features, (64, 64), "sam-other"), clicks((3, 3, True)))
    with pytest.raises(BadImage, match="uint8"):
        segmenter.embed(np.zeros((3, 3), np.uint8))


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_the_longer_side_fills_the_frame_and_the_shape_stays(height: int, width: int) -> None:
    rows, columns = frame_hw(height, width, 1024)
    assert max(rows, columns) == 1024
    assert abs(rows * width - columns * height) <= max(height, width)


def test_outlines_run_between_the_pixels(segmenter: SamSegmenter) -> None:
    masks = segmenter.segment(segmenter.embed(picture(128, 128)), clicks((50, 50, True)))
    found = polygons(masks.probabilities[0], options=VectorizeOptions(tolerance_px=0))
    assert found
    vertices = np.concatenate([np.asarray(polygon.exterior.coords) for polygon in found])
    inner = vertices[((vertices > 1) & (vertices < 127)).all(1)]
    assert (np.abs(inner * 2 - np.round(inner * 2)) > 0.01).any(axis=1).mean() > 0.5


def test_boxes_are_outlined_the_same_together_and_alone(segmenter: SamSegmenter) -> None:
    embedding = segmenter.embed(picture(96, 128))
    boxes = np.random.default_rng(0).uniform(0, 60, (7, 2))
    boxes = np.hstack([boxes, boxes + 30])
    together = list(segmenter.outline(embedding, boxes))
    assert len(together) == 7
    for box, masks in zip(boxes, together, strict=True):
        alone = segmenter.segment(embedding, Prompts(box_xyxy=box))
        np.testing.assert_allclose(masks.probabilities, alone.probabilities, atol=1e-3)


# --- Class heads ---


def trained(segmenter: SamSegmenter, path: Path) -> SamSegmenter:
    torch.manual_seed(3)
    segmenter.save_heads({"Solar panel": segmenter.new_head(), "roof": segmenter.new_head()}, path)
    return segmenter.with_heads(path)


def test_without_heads_no_class_is_invented(segmenter: SamSegmenter) -> None:
    dense = segmenter.dense(segmenter.embed(picture(60, 90)))
    assert segmenter.labels == ()
    assert dense.labels == ()
    assert dense.probabilities.shape == (0, 60, 90)


def test_a_projects_heads_are_saved_read_and_used(segmenter: SamSegmenter, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    mine = trained(segmenter, path)
    assert mine.labels == ("Solar panel", "roof")
    assert mine.version.startswith(f"{segmenter.base_version}-")
    assert mine.head("solar PANEL") is not None
    assert segmenter.labels == ()
    embedding = segmenter.embed(picture(60, 90))
    dense = mine.dense(embedding)
    assert dense.probabilities.shape == dense.boundary.shape == (2, 60, 90)
    part = mine.dense(embedding, window_xyxy=(10, 20, 50, 60))
    np.testing.assert_allclose(part.probabilities, dense.probabilities[:, 20:60, 10:50], atol=1e-6)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadWeights, match="damaged"):
        segmenter.with_heads(path)


def test_a_project_trains_heads_on_sams_features(segmenter: SamSegmenter, tmp_path: Path) -> None:
    house = shapely.box(40, 30, 90, 70)
    examples = []
    for number in range(4):
        image = picture(128, 128, seed=number) // 2
        image[30:70, 40:90] = 240
        embedding = segmenter.embed(image)
        examples.append(training.Example(None, [("roof", house)], place=str(number), embedding=embedding))
    path = tmp_path / "heads.safetensors"
    training.train_heads(segmenter, examples, ["roof"], out=path)
    mine = segmenter.with_heads(path)
    dense = mine.dense(examples[0].embedding)
    assert dense.labels == ("roof",)
    found, truth = dense.probabilities[0] > 0.5, rasterize([house], 128, 128)
    assert (found & truth).sum() >= 0.6 * (found | truth).sum()


def test_accepted_annotations_teach_it_classes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_STEPS", 80)
    chosen = Settings(
        segmenter="sam_vit_b", sam_checkpoint=checkpoint, data_dir=tmp_path, promote="always", model_score_threshold=0
    )
    tasks = [annotated(number) for number in range(4)]
    fitted = fit.fit(chosen, "1.17", tasks, CONFIG, ImageStore(chosen, None))
    assert fitted.version.startswith("sam_vit_b-")
    service = Service(chosen)
    service.start()
    try:
        service.predictor.wait(60)
        model = service.predictor.model("1.17")
        assert model.version == fitted.version
        assert model.segmenter.labels == ("House",)
        house = bright_image((40, 50, 90, 100), size=(128, 128))
        found = service.predictor.automatic(
            model, house, "house", {"House": "House"}, options=VectorizeOptions(), min_score=0
        )
        assert {region.label for region in found.regions} == {"House"}
        drawn = rasterize([region.polygon for region in found.regions], 128, 128)
        assert drawn[50:100, 40:90].mean() > 0.5
    finally:
        service.close()


def test_heads_of_other_weights_are_refused(segmenter: SamSegmenter, network: Any, tmp_path: Path) -> None:
    trained(segmenter, tmp_path / "heads.safetensors")
    other = SamSegmenter(network, "sam_small-00000000")
    with pytest.raises(BadWeights, match="train the project again"):
        other.with_heads(tmp_path / "heads.safetensors")


class Boxes:
    """Outlines a box by itself, or by something else altogether."""

    def __init__(self, shrink: float) -> None:
        self.shrink = shrink

    def outline(self, embedding: Embedding, boxes_xyxy: np.ndarray) -> list[Masks]:
        drawn = []
        for x0, y0, x1, y1 in boxes_xyxy.round().astype(int):
            mask = np.zeros((1, *embedding.image_hw), np.float32)
            mask[0, y0 : int(y0 + self.shrink * (y1 - y0)), x0 : int(x0 + self.shrink * (x1 - x0))] = 1
            drawn.append(Masks(mask, np.array([0.9], np.float32)))
        return drawn


@pytest.mark.parametrize(("shrink", "area"), [(0.9, 36**2), (0.3, 40**2), (0.0, 40**2)])
def test_an_object_is_drawn_anew_only_where_both_agree_on_what_it_is(shrink: float, area: float) -> None:
    mask = np.zeros((100, 100), np.float32)
    mask[20:60, 30:70] = 1
    embedding = Embedding({}, (100, 100), "any")
    (parts,) = outlined(Boxes(shrink), embedding, [polygons(mask)], VectorizeOptions())
    assert sum(part.area for part in parts) == pytest.approx(area, abs=4)


# --- Everything ---


def reference_everything(network: Any, image: np.ndarray, options: EverythingOptions) -> list[np.ndarray]:
    """The package's procedure, as its paper tells it, one click at a time and at full resolution."""
    found = []
    for _, (x0, y0, x1, y1) in crop_boxes(*image.shape[:2], options):
        crop, kept = image[y0:y1, x0:x1], []
        for x, y in grid(options.points_per_side) * (x1 - x0, y1 - y0):
            logits, ious, _ = package_answer(network, crop, clicks((x, y, True)), True)
            for one, iou in zip(logits, ious, strict=True):
                stable = (one > 1).sum() / max(1, (one > -1).sum())
                rows, columns = np.nonzero(one > 0)
                if iou <= options.least_iou or stable < options.least_stability or not len(rows):
                    continue
                kept.append((iou, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), one > 0))
        kept.sort(key=lambda one: -one[0])
        while kept:
            _, (a0, b0, a1, b1), mask = kept.pop(0)
            found.append(mask)
            rest = []
            for one in kept:
                c0, d0, c1, d1 = one[1]
                both = max(0, min(a1, c1) - max(a0, c0)) * max(0, min(b1, d1) - max(b0, d0))
                if both <= options.most_box_iou * ((a1 - a0) * (b1 - b0) + (c1 - c0) * (d1 - d0) - both):
                    rest.append(one)
            kept = rest
    return found


def test_everything_finds_what_the_packages_procedure_finds(network: Any, segmenter: SamSegmenter) -> None:
    image = picture(128, 96)
    # The masks of random weights all have one box: here none is taken for another's double.
    options = EverythingOptions(points_per_side=6, least_iou=0.6, least_stability=0.2, most_box_iou=1)
    expected = reference_everything(network, image, options)
    found = everything(segmenter, image, options=options, outlines=VectorizeOptions(0.0, 2000, 0, 0))
    assert len(expected) >= 3
    assert abs(len(found) - len(expected)) <= 0.2 * len(expected)
    masks = [rasterize(one.polygons, 128, 96) for one in found]
    alike = [max((m & e).sum() / (m | e).sum() for m in masks) for e in expected]
    assert np.median(alike) > 0.9


class Discs:
    """Knows discs on an image, and answers a click with the one under it, or with the whole image."""

    version = "discs-1"

    def __init__(self, image_hw: tuple[int, int], *discs_xyr: tuple[float, float, float]) -> None:
        ys, xs = np.mgrid[0.5 : image_hw[0], 0.5 : image_hw[1]]
        self.number = np.zeros((*image_hw, 3), np.uint8)
        for number, (x, y, radius) in enumerate(discs_xyr, 1):
            self.number[(xs - x) ** 2 + (ys - y) ** 2 < radius**2] = number

    def embed(self, image_rgb: np.ndarray) -> Embedding:
        return Embedding({"number": image_rgb[:, :, 0]}, image_rgb.shape[:2], self.version)

    def logit_size_xy(self, embedding: Embedding) -> np.ndarray:
        return np.array([2.0, 2.0])

    def propose(self, embedding: Embedding, points_xy: np.ndarray, *, least_iou: float) -> Any:
        number = np.asarray(embedding.features["number"])
        for start in range(0, len(points_xy), 5):
            for i, (x, y) in enumerate(points_xy[start : start + 5], start):
                under = number[int(y), int(x)]
                mask = (number == under)[::2, ::2]
                yield np.array([i]), np.where(mask, 9.0, -9.0).astype(np.float32)[None], np.array([0.9 + under / 100])


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_each_object_is_proposed_once_also_with_crops(layers: int) -> None:
    discs = ((60, 60, 20), (150, 70, 30), (60, 200, 25), (200, 200, 10))
    known = Discs((256, 300), *discs)
    options = EverythingOptions(points_per_side=16, crop_layers=layers)
    found = everything(known, known.number, options=options)
    background, *rest = sorted(found, key=lambda one: -sum(part.area for part in one.polygons))
    assert sum(part.area for part in background.polygons) > 60_000
    areas = sorted(sum(part.area for part in one.polygons) for one in rest)
    assert areas == pytest.approx(sorted(np.pi * radius**2 for *_, radius in discs), rel=0.15)
    for one in rest:
        x, y = one.polygons[0].centroid.coords[0]
        assert min(np.hypot(x - cx, y - cy) for cx, cy, _ in discs) < 1.5


def test_many_clicks_are_decoded_as_one_by_one(segmenter: SamSegmenter) -> None:
    embedding = segmenter.embed(picture(100, 128))
    points = np.random.default_rng(1).uniform(0, 100, (9, 2))
    seen = 0
    for which, logits, ious in segmenter.propose(embedding, points, least_iou=-1e9):
        for click in np.unique(which):
            low_res, expected = segmenter._answered(embedding, points[click][None], np.array([True]), None)
            mine = which == click
            np.testing.assert_allclose(logits[mine], low_res.numpy()[:, : logits.shape[1]], atol=1e-3)
            np.testing.assert_allclose(ious[mine], expected.numpy(), atol=1e-4)
            seen += 1
    assert seen == 9
    middle = np.median(ious)
    few = [i for _, _, ious in segmenter.propose(embedding, points, least_iou=middle) for i in ious]
    assert few
    assert min(few) > middle
    assert not [w for which, *_ in segmenter.propose(embedding, points, least_iou=1e9) for w in which]


def test_crops_cover_the_image_and_lie_within_it() -> None:
    crops = crop_boxes(300, 500, EverythingOptions(crop_layers=2))
    assert [layer for layer, _ in crops] == [0] + [1] * 4 + [2] * 16
    for wanted in (1, 2):
        covered = np.zeros((300, 500), bool)
        for layer, (left, top, right, bottom) in crops:
            assert 0 <= left < right <= 500
            assert 0 <= top < bottom <= 300
            if layer == wanted:
                covered[top:bottom, left:right] = True
        assert covered.all()


def test_with_crops_no_two_proposals_share_a_box(segmenter: SamSegmenter) -> None:
    options = EverythingOptions(points_per_side=4, least_iou=0.4, least_stability=0.1, crop_layers=1, points_divisor=2)
    shares: list[float] = []
    found = everything(segmenter, picture(120, 120), options=options, progress=shares.append)
    assert shares == sorted(shares)
    for one in found:
        assert one.polygons
        assert all(part.is_valid and part.bounds[0] >= 0 and part.bounds[2] <= 120 for part in one.polygons)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


# --- Checkpoints, settings, command line ---


def test_a_checkpoint_says_what_network_it_is_for(network: Any, checkpoint: Path, segmenter: SamSegmenter) -> None:
    built = build(torch.load(checkpoint, weights_only=True))
    assert [block.window_size for block in built.image_encoder.blocks] == [3, 0, 3]
    assert segmenter.version.startswith("sam_small-")
    assert SamSegmenter.load(checkpoint, name="sam_small").version == segmenter.version


@pytest.mark.parametrize(
    ("name", "heads", "whole"),
    [("vit_b", 12, (2, 5, 8, 11)), ("vit_l", 16, (5, 11, 17, 23)), ("vit_h", 16, (7, 15, 23, 31))],
)
def test_the_published_networks_are_known_by_their_shapes(name: str, heads: int, whole: tuple[int, ...]) -> None:
    _, build_sam = sam._segment_anything()
    with torch.device("meta"):
        published = build_sam.sam_model_registry[name]()
    built = build(published.state_dict())
    assert {n: v.shape for n, v in built.state_dict().items()} == {
        n: v.shape for n, v in published.state_dict().items()
    }
    blocks = built.image_encoder.blocks
    assert {block.attn.num_heads for block in blocks} == {heads}
    assert [block.window_size for block in blocks] == [0 if i in whole else 14 for i in range(len(blocks))]
    assert built.prompt_encoder.mask_input_size == (256, 256)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken zip"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sam.pth"
    path.write_bytes(content)
    with pytest.raises(BadWeights, match=r"sam\.pth"):
        SamSegmenter.load(path)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"image_encoder.pos_embed": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BadWeights):
        SamSegmenter.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(network: Any, tmp_path: Path) -> None:
    state = network.state_dict()
    for spoiled in ({"weight": torch.zeros(3)}, {k: v for k, v in state.items() if "iou_token" not in k}):
        torch.save(spoiled, tmp_path / "other.pth")
        with pytest.raises(BadWeights, match="no checkpoint of Segment Anything"):
            SamSegmenter.load(tmp_path / "other.pth")


def test_without_a_checkpoint_the_way_to_get_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="run geoprelabel weights get sam_vit_b"):
        load_segmenter(Settings(segmenter="sam_vit_b", data_dir=tmp_path))


def test_an_own_checkpoint_is_loaded_on_the_operators_word(checkpoint: Path, tmp_path: Path) -> None:
    found = load_segmenter(Settings(segmenter="sam_vit_b", data_dir=tmp_path, sam_checkpoint=checkpoint))
    assert found.version.startswith("sam_vit_b-")
    warmed_up(found)


def test_a_checkpoint_that_was_fetched_answers_clicks_over_http(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = checkpoint.read_bytes()
    published = Checkpoint("sam_vit_b", "small.pth", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", {"sam_vit_b": published})
    monkeypatch.setenv("GEOPRELABEL_DATA_DIR", str(tmp_path))
    with SmallServer(lambda asked: Answer(200, content)) as mirror:
        monkeypatch.setenv("GEOPRELABEL_WEIGHTS_MIRROR", mirror.url)
        done = CliRunner().invoke(cli.app, ["weights", "get", "sam_vit_b"])
    assert done.exit_code == 0, done.output
    chosen = Settings(segmenter="sam_vit_b", data_dir=tmp_path)
    assert (chosen.sam_dir / "small.pth").read_bytes() == content
    service = Service(chosen)
    try:
        client = create_app(chosen, service).test_client()
        scratch = io.BytesIO()
        Image.fromarray(picture(96, 128)).save(scratch, "png")
        image = "data:image/png;base64," + base64.b64encode(scratch.getvalue()).decode()
        config = """<View><Image name="image" value="$image"/><PolygonLabels name="polygon" toName="image">
            <Label value="Building"/></PolygonLabels><KeyPoint name="click" toName="image" smart="true"/></View>"""
        click = {"type": "keypoint", "from_name": "click", "to_name": "image", "is_positive": True,
                 "original_width": 128, "original_height": 96, "value": {"x": 40, "y": 50, "width": 0.3}}  # fmt: skip
        body = {"tasks": [{"id": 1, "data": {"image": image}}], "project": "3.1700000000", "label_config": config}
        service.predictor.wait(60)
        asked = client.post("/predict", json={**body, "params": {"context": {"result": [click]}}})
        assert asked.status_code == 200, asked.status
        assert asked.json["model_version"] == f"sam_vit_b-{published.sha256[:8]}"
        results = asked.json["results"][0]["result"]
        assert results
        assert all(result["value"]["polygonlabels"] == ["Building"] for result in results)
        automatic = client.post("/predict", json={**body, "params": {}}).json["results"]
        assert automatic[0]["result"] == []
    finally:
        service.close()


def test_the_command_line_looks_for_everything(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOPRELABEL_SEGMENTER", "sam_vit_b")
    monkeypatch.setenv("GEOPRELABEL_SAM_CHECKPOINT", str(checkpoint))
    monkeypatch.setenv("GEOPRELABEL_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_FILES_DOCUMENT_ROOT", str(tmp_path))
    Image.fromarray(picture(90, 120)).save(tmp_path / "tile.png")
    run = CliRunner().invoke
    low = ["--points", "4", "--min-iou", "0.3", "--min-stability", "0.05"]
    done = run(cli.app, ["everything", str(tmp_path / "tile.png"), "--out", str(tmp_path / "out.json"), *low])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["width"], written["height"]) == (120, 90)
    assert written["proposals"]

    tasks = [{"data": {"image": "/data/local-files/?d=tile.png"}}, {"data": {"image": "/data/local-files/?d=no.png"}}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    done = run(cli.app, ["everything", str(tmp_path / "tasks.json"), "--out", str(tmp_path / "more.json"), *low])
    assert done.exit_code == 0, done.output
    first, second = json.loads((tmp_path / "more.json").read_text())
    results = first["predictions"][0]["result"]
    assert len(results) >= len(written["proposals"])
    assert all(result["value"]["polygonlabels"] == [] for result in results)
    assert second["predictions"] == []

    monkeypatch.setenv("GEOPRELABEL_SEGMENTER", "compact")
    refused = run(cli.app, ["everything", str(tmp_path / "tile.png"), "--out", str(tmp_path / "x.json")])
    assert "sam_vit_b" in str(refused.exception)
