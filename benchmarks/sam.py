"""Segment Anything: our encoder and our "everything" beside those of the package, on the same weights, in one run.

    python benchmarks/sam.py [--only encode masks clicks everything] [--checkpoint sam_vit_b_01ec64.pth]
                             [--network vit_b] [--points 16] [--repeats 3] [--everything-repeats 1]
                             [--dtype float32]

Without a checkpoint the weights are random (seeded); sizes and work are those of the real ones, and masks are compared
pixel by pixel, so that shortcuts which change the answer would show. The two sides take turns in one process, with as
many threads each; figures are medians of the repeats, by the clock and in processor seconds, which a busy machine
disturbs less. Prints one JSON line.

The package's default is 32 clicks along a side. That takes four times as long as the 16 here, and is kinder to us: our
encoder gains less than the rest, and weighs less there.

encode_times_faster      seconds of the package's image encoder by ours
mask_iou                 least IoU of masks drawn from the one and from the other features, over 16 clicks
click_times_faster       encode and decode at each click, as backends around the package do, by a click on a known tile
everything_times_faster  `SamAutomaticMaskGenerator` by `backend.everything`, same settings, encoding included, and on
                         our side the outlines too, as the command draws them
masks_of_everything_…    the same without our outlines, which the package draws none of; of our last run
everything_parts_cpu_s   of our last run: encoding and the first clicks, the other clicks, and the outlines, which
                         random weights make long: their masks are thousands of specks
everything_alike         share of the package's masks of which we have one at IoU 0.9; with a checkpoint only, since the
                         masks of random weights are all one box, of which chance decides what stays
                         (`tests/test_sam.py` holds the two procedures together on small networks)
*_cpu_times_faster       the same in processor seconds
*_s, *_cpu_s             seconds of each by the clock, and of processors

The package's generator needs two functions of torchvision; where that is missing, stand-ins written here do their work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# As the backend is served: threads that wait by spinning take the cores from what they wait for. Both sides gain.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend import sam
from backend.everything import EverythingOptions, Proposal, everything, grid
from backend.segmenter import Prompts
from backend.vectorize import rasterize

GOALS = {"encode_times_faster": 1.8, "mask_iou": 0.99, "click_times_faster": 30.0, "everything_times_faster": 2.0}
PARTS = ("encode", "masks", "clicks", "everything")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; all if not given")
    parser.add_argument("--checkpoint", type=Path, help="empty: random weights")
    parser.add_argument("--network", default="vit_b", choices=("vit_b", "vit_l", "vit_h"))
    parser.add_argument("--points", type=int, default=16, help="clicks along a side, for everything; 0: leave it out")
    parser.add_argument("--repeats", type=int, default=3, help="of encoding")
    parser.add_argument("--everything-repeats", type=int, default=1, help="of everything: a minute or more each")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="what our encoder computes in; if not given: its own choice",
    )
    arguments = parser.parse_args()
    network = network_of(arguments.checkpoint, arguments.network).to(arguments.device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    segmenter = sam.SamSegmenter(network, "bench", device=arguments.device, dtype=dtype)
    image = picture(*arguments.size)
    measured = {"device": arguments.device, "dtype": str(segmenter._dtype), "threads": torch.get_num_threads()}
    package_s = None
    if "encode" in arguments.only:
        measured |= encoding(network, segmenter, image, arguments.repeats)
        package_s = measured["package_encode_s"]
    if "masks" in arguments.only:
        measured["mask_iou"] = mask_iou(network, segmenter, image)
    if "clicks" in arguments.only:
        measured |= clicking(network, segmenter, image, package_s)
    if "everything" in arguments.only and arguments.points:
        measured |= everything_on(network, segmenter, image, arguments.points, arguments.everything_repeats)
        if arguments.checkpoint is None:
            measured["everything_alike"] = None
    measured["goals"] = GOALS
    print(json.dumps(measured))


def network_of(checkpoint: Path | None, name: str) -> Any:
    """The package's network; random weights get relative positions, and masks with clear edges."""
    modeling, build_sam = sam._segment_anything()
    del modeling
    if checkpoint is not None:
        return sam.build(torch.load(checkpoint, weights_only=True), str(checkpoint))
    torch.manual_seed(0)
    network = build_sam.sam_model_registry[name]().requires_grad_(False)
    for parameter_name, parameter in network.named_parameters():
        if "rel_pos" in parameter_name or "pos_embed" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    for hyper in network.mask_decoder.output_hypernetworks_mlps:
        hyper.layers[-1].weight *= 200
    return network


def picture(rows: int, columns: int) -> np.ndarray:
    """Fields of colour with some noise."""
    rng = np.random.default_rng(0)
    fields = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((columns, rows), Image.Resampling.BOX)
    return np.clip(np.asarray(fields, np.int16) + rng.normal(0, 8, (rows, columns, 3)), 0, 255).astype(np.uint8)


def in_turn(repeats: int, **works: Callable[[], Any]) -> dict[str, tuple[float, float, Any]]:
    """Median wall and processor seconds, and the last result, of pieces of work that take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    last: dict[str, Any] = {}
    for _ in range(repeats):
        for name, work in works.items():
            wall, processor = time.perf_counter(), time.process_time()
            last[name] = work()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken), last[name])
        for name, taken in times.items()
    }


def framed(network: Any, image: np.ndarray) -> torch.Tensor:
    """The image as both encoders take it."""
    frame = torch.from_numpy(sam.resized_to(image, 1024)).permute(2, 0, 1).float().to(network.device)
    return network.preprocess(frame)[None]


def synchronised(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    result = work()
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


@torch.inference_mode()
def encoding(network: Any, segmenter: sam.SamSegmenter, image: np.ndarray, repeats: int) -> dict[str, Any]:
    frame = framed(network, image)

    def ours() -> torch.Tensor:
        with torch.autocast(frame.device.type, segmenter._dtype, enabled=segmenter._dtype != torch.float32):
            return sam.encoded(network.image_encoder, frame)

    runs = in_turn(
        repeats, package=lambda: synchronised(lambda: network.image_encoder(frame)), ours=lambda: synchronised(ours)
    )
    (package_s, package_cpu, _), (ours_s, ours_cpu, _) = runs["package"], runs["ours"]
    return {
        "package_encode_s": round(package_s, 2),
        "ours_encode_s": round(ours_s, 2),
        "package_encode_cpu_s": round(package_cpu, 2),
        "ours_encode_cpu_s": round(ours_cpu, 2),
        "encode_times_faster": round(package_s / ours_s, 2),
        "encode_cpu_times_faster": round(package_cpu / ours_cpu, 2),
    }


@torch.inference_mode()
def mask_iou(network: Any, segmenter: sam.SamSegmenter, image: np.ndarray) -> float:
    embedding = segmenter.embed(image)
    theirs = network.image_encoder(framed(network, image)).float()
    ious = []
    for point in grid(4) * image.shape[1::-1]:
        a, b = (
            segmenter._decode(cells, embedding, point[None, None], np.ones((1, 1), bool), None, True)[0][0] > 0
            for cells in (segmenter._cells_of(embedding), theirs)
        )
        ious += [float((x & y).sum() / max(1, (x | y).sum())) for x, y in zip(a, b, strict=True)]
    return round(min(ious), 4)


@torch.inference_mode()
def clicking(
    network: Any, segmenter: sam.SamSegmenter, image: np.ndarray, package_s: float | None = None
) -> dict[str, Any]:
    """``package_s`` is how long the package takes to encode; it is measured once where it is not known yet."""
    if package_s is None:
        frame = framed(network, image)
        package_s = in_turn(1, package=lambda: synchronised(lambda: network.image_encoder(frame)))["package"][0]
    embedding = segmenter.embed(image)
    click = Prompts(image.shape[1::-1] * np.array([[0.125, 0.125]]), np.array([True]))
    click_s = in_turn(5, click=lambda: segmenter.segment(embedding, click))["click"][0]
    return {"click_s": round(click_s, 3), "click_times_faster": round((package_s + click_s) / click_s, 1)}


def everything_on(
    network: Any, segmenter: sam.SamSegmenter, image: np.ndarray, points: int, repeats: int
) -> dict[str, Any]:
    some = grid(3) * image.shape[1::-1]
    embedding = segmenter.embed(image)
    drawn = list(segmenter.propose(embedding, some, least_iou=-1e9))
    # Random weights expect nonsense: a third of the candidates passes, as with real ones.
    least_iou = float(np.quantile(np.concatenate([ious for _, _, ious in drawn]), 0.67))
    stabilities = np.concatenate([sam.stability(logits) for _, logits, _ in drawn])
    options = EverythingOptions(
        points_per_side=points, least_iou=least_iou, least_stability=float(np.quantile(stabilities, 0.3))
    )
    generator_class = package_generator()
    network.mask_threshold = 0.0
    generator = generator_class(
        network,
        points_per_side=points,
        pred_iou_thresh=options.least_iou,
        stability_score_thresh=options.least_stability,
        box_nms_thresh=options.most_box_iou,
    )
    marks: list[tuple[float, float]] = []

    def mark(share: float) -> None:
        marks.append((time.perf_counter(), time.process_time()))

    def ours() -> list[Proposal]:
        marks.clear()
        mark(0)
        found = everything(segmenter, image, options=options, progress=mark)
        mark(1)
        return found

    runs = in_turn(repeats, package=lambda: generator.generate(image), ours=ours)
    theirs = [found["segmentation"] for found in runs["package"][2]]
    mine = [rasterize(one.polygons, *image.shape[:2]) for one in runs["ours"][2]]
    alike = [max(((m & t).sum() / max(1, (m | t).sum()) for m in mine), default=0.0) for t in theirs]
    (package_s, package_cpu, _), (ours_s, ours_cpu, _) = runs["package"], runs["ours"]
    parts_s, parts_cpu = np.diff([*marks[:2], *marks[-2:]], axis=0).T
    return {
        "points": points**2,
        "everything_repeats": repeats,
        "package_everything_s": round(package_s, 1),
        "ours_everything_s": round(ours_s, 1),
        "package_everything_cpu_s": round(package_cpu, 1),
        "ours_everything_cpu_s": round(ours_cpu, 1),
        "everything_parts_cpu_s": parts_cpu.round(1).tolist(),
        "everything_times_faster": round(package_s / ours_s, 2),
        "everything_cpu_times_faster": round(package_cpu / ours_cpu, 2),
        "masks_of_everything_times_faster": round(package_s / parts_s[:2].sum(), 2),
        "masks_of_everything_cpu_times_faster": round(package_cpu / parts_cpu[:2].sum(), 2),
        "package_masks": len(theirs),
        "our_masks": len(mine),
        "everything_alike": round(float(np.mean(np.array(alike) >= 0.9)), 3) if alike else None,
    }


def package_generator() -> Any:
    """The package's `SamAutomaticMaskGenerator`."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, AttributeError):
        stand_ins()
    return importlib.import_module("segment_anything.automatic_mask_generator").SamAutomaticMaskGenerator


def stand_ins() -> None:
    """What the package asks of torchvision: suppression of overlapping boxes, and Pillow's resizing."""

    def batched_nms(boxes: Any, scores: Any, groups: Any, iou_threshold: float) -> Any:
        # In the compiled original's order and with its areas.
        kept, order = [], scores.argsort(descending=True, stable=True)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        while len(order):
            i, rest = order[0], order[1:]
            kept.append(i)
            low, high = torch.maximum(boxes[i, :2], boxes[rest, :2]), torch.minimum(boxes[i, 2:], boxes[rest, 2:])
            both = (high - low).clamp(min=0).prod(1)
            order = rest[both / (areas[i] + areas[rest] - both) <= iou_threshold]
        return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)

    def resize(image: Any, size: tuple[int, int]) -> Any:
        return image.resize(size[::-1], Image.Resampling.BILINEAR)

    contents = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {
            "batched_nms": batched_nms,
            "box_area": lambda boxes: (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        },
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"resize": resize, "to_pil_image": Image.fromarray},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        module.__path__ = []  # type: ignore[attr-defined]
        sys.modules[name] = module


if __name__ == "__main__":
    main()
