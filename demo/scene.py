"""A made-up orthophoto of a small town near Kathmandu, with the exact outline of everything in it.

Fields, roads, a river, a pond, trees and buildings with sun shadows; the same seed draws the same scene. Geometry is
laid out in metres from the scene's north-west corner, x east and y south, and painted with four by four samples to
a pixel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.features import rasterize
from shapely import LineString, MultiPolygon, Polygon, affinity
from shapely.geometry.base import BaseGeometry
from shapely.ops import unary_union

from backend.tile import Tile, to_lonlat

Image = NDArray[np.float32]
"""Brightness 0…255, (rows, columns) or (rows, columns, 3)."""

CENTRE_LONLAT = (85.5219, 27.6298)
"""Where the scene's north-west corner lies: Banepa, east of Kathmandu."""

SAMPLES = 4
"""Samples a pixel along each axis."""

SHADOW_XY = (-0.62, -0.78)
"""Where shadows fall: the sun stands in the south-east, as on a winter morning."""

ASPHALT, EARTH = (112, 112, 114), (176, 158, 128)
TERRACOTTA = [(164, 92, 70), (148, 78, 60), (176, 108, 82)]
CONCRETE = [(186, 182, 174), (168, 164, 158), (204, 198, 188), (176, 160, 146)]
METAL = [(92, 132, 172), (198, 204, 208), (104, 146, 122), (158, 74, 62), (140, 146, 152)]
CROPS = [
    (118, 138, 74),
    (142, 150, 84),
    (168, 154, 102),
    (96, 122, 66),
    (154, 132, 96),
    (186, 172, 118),
    (130, 144, 92),
]


@dataclass(frozen=True, slots=True)
class Building:
    """One building."""

    outline: Polygon
    """In metres."""

    angle: float
    """Of its long side, in radians."""

    height_m: float
    roof: str
    """``gable``, ``hip``, ``flat`` or ``tiers``."""

    colour: tuple[int, int, int]


def make_scene(
    path: Path, *, size_px: tuple[int, int] = (2048, 2048), gsd_m: float = 0.2, crs: str = "EPSG:32645", seed: int = 0
) -> Path:
    """Write the scene as a GeoTIFF (RGB, tiled, compressed, with overviews) and its truth beside it.

    ``size_px`` is columns and rows, ``gsd_m`` the pixel's side on the ground. Returns the path of the truth,
    ``<name>_truth.geojson``: polygons in EPSG:4326 with a ``label`` of building, road, water or vegetation.
    """
    rng = np.random.default_rng(seed)
    columns, rows = size_px
    extent = shapely.box(0, 0, columns * gsd_m, rows * gsd_m)
    layout = _layout(extent, rng)
    image = _paint(layout, columns, rows, gsd_m, rng)
    tile = _place(columns, rows, gsd_m, crs)

    path.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {
        "driver": "GTiff", "width": columns, "height": rows, "count": 3, "dtype": "uint8", "crs": crs,
        "transform": tile.transform, "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate",
        "predictor": 2, "zlevel": 4, "photometric": "RGB",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as out:
        out.write(np.moveaxis(image, 2, 0))
        out.build_overviews([factor for factor in (2, 4, 8, 16) if factor * 32 < min(size_px)], Resampling.average)

    truth = path.with_name(f"{path.stem}_truth.geojson")
    truth.write_text(json.dumps(_truth(layout, extent, tile, gsd_m)))
    return truth


# Layout


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything in the scene, in metres. Nothing overlaps but trees' and buildings' shadows."""

    main_road: LineString
    paved: BaseGeometry
    unpaved: BaseGeometry
    water: BaseGeometry
    buildings: list[Building]
    trees: list[tuple[Polygon, float]]
    """Crown and height."""


def _layout(extent: Polygon, rng: np.random.Generator) -> Layout:
    width, height = extent.bounds[2:]
    across = _wavy((-30, height * rng.uniform(0.42, 0.56)), (width + 30, height * rng.uniform(0.36, 0.62)), 14, rng)
    river_line = _wavy((width * rng.uniform(0.7, 0.8), -30), (width * rng.uniform(0.58, 0.9), height + 30), 26, rng)
    river = _ribbon(river_line, 9.0, 3.0, rng)
    pond = _blob(
        (width * rng.uniform(0.16, 0.26), height * rng.uniform(0.84, 0.9)), min(width, height) * 0.055, 0.18, rng
    )
    island = _blob((pond.centroid.x + 2, pond.centroid.y - 1), math.sqrt(pond.area) * 0.13, 0.2, rng)
    water = unary_union([river, pond.difference(island)])

    streets, lanes = _streets(across, extent, river.buffer(7), pond.buffer(8), rng)
    paved = unary_union([across.buffer(3.6), *(line.buffer(2.4) for line in streets)])
    unpaved = unary_union([line.buffer(1.6) for line in lanes]).difference(paved) if lanes else Polygon()
    water = water.difference(paved)

    buildings = _buildings([(across, 3.6), *((s, 2.4) for s in streets), *((s, 1.6) for s in lanes)], extent,
                           unary_union([paved.buffer(0.8), unpaved.buffer(0.6), water.buffer(5)]), rng)  # fmt: skip
    trees = _trees(extent, unary_union([paved, unpaved, water.buffer(0.5)]), buildings, river_line, rng)
    return Layout(across, paved, unpaved, water, buildings, trees)


def _wavy(start: tuple[float, float], end: tuple[float, float], swing_m: float, rng: np.random.Generator) -> LineString:
    """A smooth line from start to end that swings to both sides."""
    along = np.linspace(0, 1, 90)
    a, b = np.asarray(start), np.asarray(end)
    normal = np.array([-(b - a)[1], (b - a)[0]]) / np.hypot(*(b - a))
    swing = sum(swing_m / n * np.sin(2 * np.pi * (n * along + rng.random())) for n in (1, 2, 3))
    return LineString(a + along[:, None] * (b - a) + np.asarray(swing)[:, None] * normal)


def _ribbon(line: LineString, half_m: float, vary_m: float, rng: np.random.Generator) -> Polygon:
    """A band along the line whose width varies."""
    points = np.asarray(line.coords)
    ahead = np.gradient(points, axis=0)
    normal = np.column_stack((-ahead[:, 1], ahead[:, 0])) / np.linalg.norm(ahead, axis=1)[:, None]
    along = np.linspace(0, 1, len(points))
    sides = [half_m + vary_m * np.sin(2 * np.pi * (rng.uniform(2, 4) * along + rng.random())) for _ in range(2)]
    return Polygon([*(points + normal * sides[0][:, None]), *(points - normal * sides[1][:, None])[::-1]]).buffer(0.5)


def _blob(
    centre: tuple[float, float], radius_m: float, wobble: float, rng: np.random.Generator, points: int = 36
) -> Polygon:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radii = 1 + sum(wobble / n * np.sin(n * angles + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 5))
    return Polygon(np.asarray(centre) + radius_m * np.column_stack((radii * np.cos(angles), radii * np.sin(angles))))


def _streets(
    main: LineString, extent: Polygon, river: BaseGeometry, pond: BaseGeometry, rng: np.random.Generator
) -> tuple[list[LineString], list[LineString]]:
    """Streets that leave the main road on both sides, and lanes that join them."""
    streets: list[LineString] = []
    lanes: list[LineString] = []
    reach = extent.bounds[3]
    for side in (-1, 1):
        feet = []
        distance = rng.uniform(35, 60)
        while distance < main.length - 20:
            foot, ahead = _point_and_heading(main, distance)
            heading = ahead + side * math.pi / 2 + rng.normal(0, 0.1)
            length = reach * rng.choice([0.22, 0.34, 0.6], p=[0.3, 0.35, 0.35])
            end = foot + length * np.array([math.cos(heading), math.sin(heading)])
            streets += _parts(_wavy(tuple(foot), tuple(end), 3.5, rng).difference(unary_union([river, pond])), 25, main)
            feet.append((foot, heading, length))
            distance += rng.uniform(62, 105)
        for (foot_a, heading_a, length_a), (foot_b, heading_b, length_b) in pairwise(feet):
            for offset in (58, 112, 168):
                if offset > min(length_a, length_b) or rng.random() < 0.25:
                    continue
                a = foot_a + offset * np.array([math.cos(heading_a), math.sin(heading_a)])
                b = foot_b + offset * np.array([math.cos(heading_b), math.sin(heading_b)])
                lanes += _parts(_wavy(tuple(a), tuple(b), 2, rng).difference(unary_union([river, pond])), 20, None)
    clear = main.buffer(1)
    return [s for s in streets if s.intersects(extent)], [
        s for s in lanes if s.intersects(extent) and not s.intersects(clear)
    ]


def _parts(geometry: BaseGeometry, shortest_m: float, root: LineString | None) -> list[LineString]:
    """The lines of a cut line, without crumbs; with ``root``, the one that starts there alone."""
    lines = [line for line in getattr(geometry, "geoms", [geometry]) if line.length >= shortest_m]
    return [line for line in lines if root is None or line.distance(root) < 0.5]


def _point_and_heading(line: LineString, distance_m: float) -> tuple[NDArray[np.float64], float]:
    a, b = line.interpolate(distance_m), line.interpolate(distance_m + 1)
    return np.array([a.x, a.y]), math.atan2(b.y - a.y, b.x - a.x)


def _buildings(
    roads: list[tuple[LineString, float]], extent: Polygon, taken: BaseGeometry, rng: np.random.Generator
) -> list[Building]:
    """Houses along the roads in two rows, some as terraces that share walls, and a few on their own in the fields."""
    shapely.prepare(taken)
    placed: list[Building] = []
    outlines: list[Polygon] = []

    def place(group: list[Building], gap_m: float) -> None:
        whole = unary_union([b.outline for b in group])
        if not whole.intersects(extent) or whole.intersects(taken):
            return
        if outlines and (shapely.distance(np.array(outlines), whole) < gap_m).any():
            return
        placed.extend(group)
        outlines.extend(b.outline for b in group)

    for line, half_m in roads:
        for row, side in ((row, side) for row in range(2) for side in (-1, 1)):
            distance = rng.uniform(0, 14)
            while distance < line.length:
                foot, ahead = _point_and_heading(line, distance)
                group, width, depth = _group(rng, ahead)
                away = ahead + side * math.pi / 2
                off = half_m + rng.uniform(1.2, 4) + depth / 2 + row * rng.uniform(15, 22)
                centre = (
                    foot
                    + off * np.array([math.cos(away), math.sin(away)])
                    + width / 2 * np.array([math.cos(ahead), math.sin(ahead)])
                )
                if rng.random() < (0.9, 0.65)[row]:
                    place([_moved(b, centre) for b in group], 1.2)
                distance += width + (rng.uniform(0.8, 3) if rng.random() < 0.6 else rng.uniform(5, 18))
    columns, rows = extent.bounds[2:]
    for _ in range(int(extent.area / 4000)):
        group, _, _ = _group(rng, rng.uniform(0, math.pi))
        place([_moved(b, rng.uniform((0, 0), (columns, rows))) for b in group[:1]], 6)
    return placed


def _moved(building: Building, centre: NDArray[np.float64]) -> Building:
    outline = affinity.translate(building.outline, *centre)
    return Building(outline, building.angle, building.height_m, building.roof, building.colour)


def _group(rng: np.random.Generator, angle: float) -> tuple[list[Building], float, float]:
    """One building or a terrace around the origin; its length along ``angle`` and its depth, in metres."""
    angle += rng.normal(0, 0.03)
    if rng.random() < 0.22:
        widths = rng.uniform(5, 8.5, rng.integers(2, 5))
        left = -widths.sum() / 2
        front = 5.0
        houses = []
        for width in widths:
            back = front - rng.uniform(8, 12)
            houses.append(_building(shapely.box(left, back, left + width, front), angle, rng, "flat"))
            left += width
        return houses, float(widths.sum()), 12.0
    kind = rng.choice(
        ["box", "L", "U", "T", "yard", "hall", "temple", "tank"], p=[0.46, 0.17, 0.09, 0.08, 0.06, 0.08, 0.03, 0.03]
    )
    w, d = rng.uniform(8, 15), rng.uniform(7, 11)
    if kind == "hall":
        w, d = rng.uniform(20, 34), rng.uniform(12, 17)
    if kind in ("U", "yard"):
        w, d = rng.uniform(15, 24), rng.uniform(14, 20)
    box = shapely.box(-w / 2, -d / 2, w / 2, d / 2)
    match kind:
        case "L":
            shape = box.difference(
                shapely.box(-w / 2 + w * rng.uniform(0.4, 0.6), -d / 2 - 1, w, -d / 2 + d * rng.uniform(0.4, 0.55))
            )
        case "U":
            shape = box.difference(shapely.box(-w * 0.2, -d, w * 0.2, d * rng.uniform(0.05, 0.2)))
        case "T":
            stem = shapely.box(-w * 0.16, d / 2 - 0.1, w * 0.18, d / 2 + d * rng.uniform(0.35, 0.6))
            shape = box.union(stem)
            d *= 1.6
        case "yard":
            shape = box.difference(shapely.box(-w * 0.22, -d * 0.2, w * 0.24, d * 0.22))
        case "temple":
            w = d = rng.uniform(8, 12)
            shape = shapely.box(-w / 2, -d / 2, w / 2, d / 2)
        case "tank":
            w = d = rng.uniform(6, 9)
            shape = _blob((0, 0), w / 2, 0, rng, 28)
        case _:
            shape = box
    roof = {"hall": "gable", "temple": "tiers", "tank": "flat", "yard": "flat", "U": "flat", "T": "flat"}.get(str(kind))
    roof = roof or str(
        rng.choice(["gable", "hip", "flat"], p=[0.34, 0.16, 0.5])
        if kind == "box"
        else rng.choice(["flat", "gable"], p=[0.7, 0.3])
    )
    if rng.random() < 0.5 and kind != "hall":
        shape = affinity.scale(shape, -1, 1, origin=(0, 0))
    return [_building(shape, angle, rng, roof, kind=str(kind))], w, d


def _building(shape: Polygon, angle: float, rng: np.random.Generator, roof: str, kind: str = "box") -> Building:
    palette = {"flat": CONCRETE if rng.random() < 0.8 else METAL, "tiers": TERRACOTTA, "hip": TERRACOTTA}.get(
        roof, METAL if kind == "hall" or rng.random() < 0.55 else TERRACOTTA
    )
    base = np.array(palette[rng.integers(len(palette))]) * rng.uniform(0.88, 1.1) + rng.normal(0, 4, 3)
    red, green, blue = (int(v) for v in np.clip(base, 20, 240))
    height_m = {"hall": 7.0, "temple": 12.0, "tank": 9.0}.get(kind, 3.1 * rng.integers(1, 4))
    return Building(
        affinity.rotate(shape, angle, origin=(0, 0), use_radians=True), angle, height_m, roof, (red, green, blue)
    )


def _trees(
    extent: Polygon, taken: BaseGeometry, buildings: list[Building], river: LineString, rng: np.random.Generator
) -> list[tuple[Polygon, float]]:
    """Woods, trees along the river and single trees; no crown covers a building, a road or water."""
    columns, rows = extent.bounds[2:]
    centres = [rng.uniform((0, 0), (columns, rows), (int(extent.area / 420), 2))]
    for _ in range(max(2, int(extent.area / 22000))):
        middle = rng.uniform((0, 0), (columns, rows))
        centres.append(middle + rng.normal(0, rng.uniform(7, 17), (rng.integers(25, 80), 2)))
    bank = np.array([river.interpolate(d).coords[0] for d in np.arange(0, river.length, 6)])
    centres.append(bank + rng.choice([-1, 1], (len(bank), 1)) * rng.uniform(13, 22, (len(bank), 1)) * [1, 0.2])
    xy = np.concatenate(centres)
    radii = np.clip(rng.lognormal(0.75, 0.35, len(xy)), 1.1, 5.2)

    inside = shapely.dwithin(shapely.points(xy), extent, 3)
    xy, radii = xy[inside], radii[inside]
    shapely.prepare(taken)
    clear = shapely.distance(shapely.points(xy), taken) > radii * 1.2
    if buildings:
        tree = shapely.STRtree([b.outline for b in buildings])
        near, distance = tree.query_nearest(shapely.points(xy), return_distance=True, all_matches=False)
        clear[near[0][distance <= radii[near[0]] * 1.2]] = False
    crowns = [_blob((x, y), r, 0.16, rng, 18) for (x, y), r in zip(xy[clear], radii[clear], strict=True)]
    return [(crown, float(r * rng.uniform(1.4, 2.2))) for crown, r in zip(crowns, radii[clear], strict=True)]


# Painting


class _Canvas:
    """The picture under way, in 0…255, and how metres become pixels."""

    def __init__(self, image: Image, gsd_m: float) -> None:
        self.image = image
        self.gsd_m = gsd_m

    def cover(
        self, geometry: BaseGeometry, *, grow_px: int = 0, samples: int = SAMPLES
    ) -> tuple[tuple[slice, slice], Image] | None:
        """Where the geometry lies in the image, and the share of each pixel there that it covers, (rows, columns, 1).

        None where nothing of it does. What is blurred afterwards needs fewer samples.
        """
        if geometry.is_empty:
            return None
        rows, columns = self.image.shape[:2]
        left, top, right, bottom = np.asarray(geometry.bounds) / self.gsd_m
        c0, r0 = max(math.floor(left) - grow_px, 0), max(math.floor(top) - grow_px, 0)
        c1, r1 = min(math.ceil(right) + grow_px, columns), min(math.ceil(bottom) + grow_px, rows)
        if c0 >= c1 or r0 >= r1:
            return None
        step = self.gsd_m / samples
        fine = rasterize(
            [geometry],
            out_shape=((r1 - r0) * samples, (c1 - c0) * samples),
            default_value=255,
            dtype="uint8",
            transform=Affine(step, 0, c0 * self.gsd_m, 0, step, r0 * self.gsd_m),
        )
        share = fine if samples == 1 else cv2.resize(fine, (c1 - c0, r1 - r0), interpolation=cv2.INTER_AREA)
        return (slice(r0, r1), slice(c0, c1)), (share.astype(np.float32) / 255)[..., None]

    def blend(self, geometry: BaseGeometry, colour: Any, opacity: float = 1.0) -> None:
        """Paint the geometry with a colour, or with a function of (row slice, column slice) that gives an image."""
        found = self.cover(geometry)
        if found is None:
            return
        where, share = found
        paint = colour(where) if callable(colour) else np.asarray(colour, np.float32)
        self.image[where] += share * opacity * (paint - self.image[where])

    def darken(self, share: Image, where: tuple[slice, slice]) -> None:
        """Put a shadow there: less light, and what is left is the sky's blue."""
        self.image[where] *= 1 - share * np.array([0.60, 0.56, 0.46], np.float32)


def _noise(shape: tuple[int, int], cell_px: float, rng: np.random.Generator) -> Image:
    """Smooth noise of unit spread whose bumps are about ``cell_px`` wide."""
    rows, columns = (max(4, math.ceil(n / cell_px) + 3) for n in shape)
    coarse = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    if cell_px <= 1:
        return coarse[: shape[0], : shape[1]]
    step = 1 / cell_px
    matrix = np.array([[step, 0, rng.random()], [0, step, rng.random()]], np.float32)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(coarse, matrix, (shape[1], shape[0]), flags=flags, borderMode=cv2.BORDER_REFLECT).astype(
        np.float32
    )


def _paint(layout: Layout, columns: int, rows: int, gsd_m: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The orthophoto, (rows, columns, 3)."""
    m = 1 / gsd_m  # pixels a metre
    shape = (rows, columns)
    canvas = _Canvas(_ground(shape, m, rng), gsd_m)
    fine = _noise(shape, 1, rng)[..., None]
    mid = _noise(shape, 1.2 * m, rng)[..., None]
    broad = _noise(shape, 14 * m, rng)[..., None]

    def textured(colour: Any, grain: float, patches: float, drift: float) -> Callable[[tuple[slice, slice]], Image]:
        base = np.asarray(colour, np.float32)
        return lambda where: base + grain * fine[where] + patches * mid[where] + drift * broad[where]

    # Trodden yards round the houses, dusty verges along the roads, sand along the water.
    yards = unary_union([b.outline.buffer(4.5) for b in layout.buildings])
    _soft(canvas, yards, textured((168, 152, 124), 5, 9, 8), 1.6 * m, 0.75, mid)
    _soft(canvas, layout.paved.buffer(2.2), textured((182, 168, 142), 5, 7, 4), 1.0 * m, 0.85, mid)
    _soft(canvas, layout.water.buffer(4), textured((188, 178, 152), 6, 8, 5), 1.6 * m, 0.9, mid)

    canvas.blend(layout.unpaved, textured(EARTH, 4, 6, 5))
    canvas.blend(layout.water, textured((78, 92, 80), 1.0, 2.2, 5))
    _shallows(canvas, layout.water, m)
    canvas.blend(layout.paved, textured(ASPHALT, 3, 4, 6))
    _traffic(canvas, layout, m, rng)

    _shadows(canvas, [(b.outline, b.height_m) for b in layout.buildings])
    for building in layout.buildings:
        _roof(canvas, building, fine, mid, rng)
    _crowns(canvas, layout.trees, fine, rng)

    # What a camera adds: a little blur, grain, and haze that lifts the dark.
    image = cv2.GaussianBlur(canvas.image, (0, 0), 0.55)
    image = 10 + image * 0.95 + 2.2 * rng.standard_normal((*shape, 3), np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _ground(shape: tuple[int, int], m: float, rng: np.random.Generator) -> Image:
    """Fields with ridges between them, and grass and bare soil where noise says so."""
    rows, columns = shape
    # Fields are the cells of scattered points, seen through a bent and turned grid.
    seeds = np.full((rows // 2 + 64, columns // 2 + 64), 255, np.uint8)
    count = max(6, int(rows * columns / (m * m) / 750))
    seeds[rng.integers(0, seeds.shape[0], count), rng.integers(0, seeds.shape[1], count)] = 0
    _, cells = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L1, 5, labelType=cv2.DIST_LABEL_PIXEL)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    turn = rng.uniform(0.2, 0.6)
    bend = 5 * m
    u = (x * math.cos(turn) + y * math.sin(turn) + bend * _noise(shape, 26 * m, rng)) * 0.30 + 16
    v = (y * math.cos(turn) - x * math.sin(turn) + bend * _noise(shape, 26 * m, rng)) * 0.62 + 16
    field = cv2.remap(cells.astype(np.float32), u, v, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT).astype(np.int32)

    tones = np.asarray(CROPS, np.float32)[rng.integers(0, len(CROPS), int(cells.max()) + 1)]
    tones = tones + rng.normal(0, 7, tones.shape).astype(np.float32)
    image: Image = tones[field]
    # Furrows run along the fields, at another spacing and strength in each.
    strength = rng.choice([0, 0, 3, 5, 8], int(cells.max()) + 1).astype(np.float32)[field]
    spacing = rng.uniform(0.9, 1.8, int(cells.max()) + 1).astype(np.float32)[field]
    image += (strength * np.sin(v / 0.62 * (2 * np.pi / m) / spacing))[..., None]

    ridge = (cv2.morphologyEx(field.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0).astype(
        np.float32
    )
    ridge = np.clip(cv2.GaussianBlur(ridge, (0, 0), 0.35 * m) * 1.5, 0, 1)[..., None]
    image += ridge * (np.array([98, 104, 62], np.float32) - image) * 0.75

    wild = np.clip((_noise(shape, 42 * m, rng) + 0.4 * _noise(shape, 8 * m, rng) - 0.5) * 3, 0, 1)[..., None]
    meadow = np.array([104, 118, 68], np.float32) + 12 * _noise(shape, 3 * m, rng)[..., None] * np.array(
        [1, 0.9, 0.7], np.float32
    )
    image += wild * (meadow - image)
    bare = np.clip((_noise(shape, 30 * m, rng) + 0.5 * _noise(shape, 5 * m, rng) - 1.25) * 3, 0, 1)[..., None]
    image += bare * (np.array([178, 158, 126], np.float32) - image) * 0.85
    for cell_m, spread in ((20, 4), (4, 4), (1.0, 5), (0.4, 4)):
        image += spread * _noise(shape, max(cell_m * m, 1), rng)[..., None]
    image += 4 * _noise(shape, 1, rng)[..., None]
    return image


def _soft(canvas: _Canvas, geometry: BaseGeometry, paint: Any, blur_px: float, opacity: float, ragged: Image) -> None:
    """Blend with a frayed edge."""
    found = canvas.cover(geometry, grow_px=math.ceil(3 * blur_px), samples=1)
    if found is None:
        return
    where, share = found
    soft = cv2.GaussianBlur(share, (0, 0), blur_px)[..., None]
    soft = np.clip((soft - 0.5 + 0.18 * ragged[where]) * 2.2 + 0.5, 0, 1) * opacity
    canvas.image[where] += soft * (paint(where) - canvas.image[where])


def _shallows(canvas: _Canvas, water: BaseGeometry, m: float) -> None:
    """Water is lighter and browner at its edge."""
    found = canvas.cover(water, samples=1)
    if found is None:
        return
    where, share = found
    depth = cv2.distanceTransform((share[..., 0] > 0.5).astype(np.uint8), cv2.DIST_L2, 3).astype(np.float32) / m
    shallow = np.exp(-depth / 1.6)[..., None] * share
    canvas.image[where] += shallow * (np.array([138, 134, 110], np.float32) - canvas.image[where]) * 0.6


def _traffic(canvas: _Canvas, layout: Layout, m: float, rng: np.random.Generator) -> None:
    """Wheel tracks, markings, and vehicles with their shadows."""
    main = layout.main_road
    for offset in (-2.4, -1.0, 1.0, 2.4):
        canvas.blend(main.offset_curve(offset).buffer(0.35), (92, 92, 95), 0.35)
    for edge in (-3.2, 3.2):
        canvas.blend(main.offset_curve(edge).buffer(0.07), (226, 222, 212), 0.7)
    dashes = [shapely.ops.substring(main, d, d + 3) for d in np.arange(0, main.length, 8)]
    canvas.blend(unary_union([dash.buffer(0.08, cap_style="flat") for dash in dashes]), (236, 232, 222), 0.85)
    for _ in range(int(main.length / 22)):
        foot, ahead = _point_and_heading(main, rng.uniform(0, main.length))
        length, width = rng.choice([(4.2, 1.8), (2.0, 0.8), (8.5, 2.5)], p=[0.6, 0.25, 0.15])
        side = rng.choice([-1, 1]) * 1.75
        centre = foot + side * np.array([-math.sin(ahead), math.cos(ahead)])
        body = affinity.rotate(
            shapely.box(-length / 2, -width / 2, length / 2, width / 2), ahead, origin=(0, 0), use_radians=True
        )
        body = affinity.translate(body, *centre)
        _shadows(canvas, [(body, 1.6)])
        colour = np.array(
            [(228, 228, 226), (60, 62, 66), (150, 40, 38), (70, 92, 140), (190, 190, 192)][rng.integers(5)]
        )
        canvas.blend(body, colour)
        canvas.blend(affinity.scale(body, 0.5, 0.78), colour * 0.55)


def _swept(outline: Polygon, height_m: float) -> BaseGeometry:
    """The ground that the outline's shadow covers, the outline included."""
    dx, dy = (height_m * 0.75 * v for v in SHADOW_XY)
    shift = np.array([dx, dy])
    points = np.asarray(outline.exterior.coords)
    quads = [Polygon([a, b, b + shift, a + shift]) for a, b in pairwise(points)]
    solid = [q for q in quads if q.is_valid and q.area > 1e-9]
    if len(outline.interiors) == 0:
        return unary_union([outline, affinity.translate(outline, dx, dy), *solid])
    steps = max(8, int(height_m * 4))
    return unary_union([affinity.translate(outline, dx * s / steps, dy * s / steps) for s in range(steps + 1)])


def _shadows(canvas: _Canvas, standing: list[tuple[Polygon, float]]) -> None:
    """Shadows of all at once, so that none is dark twice."""
    found = canvas.cover(unary_union([_swept(outline, height) for outline, height in standing]), samples=2)
    if found:
        canvas.darken(cv2.GaussianBlur(found[1], (0, 0), 0.7)[..., None], found[0])


def _roof(canvas: _Canvas, building: Building, fine: Image, mid: Image, rng: np.random.Generator) -> None:
    found = canvas.cover(building.outline)
    if found is None:
        return
    where, share = found
    y, x = np.mgrid[where].astype(np.float32)
    cx, cy = building.outline.centroid.coords[0]
    dx, dy = (x + 0.5) * canvas.gsd_m - cx, (y + 0.5) * canvas.gsd_m - cy
    along = dx * math.cos(building.angle) + dy * math.sin(building.angle)
    across = dy * math.cos(building.angle) - dx * math.sin(building.angle)
    left, top, right, bottom = affinity.rotate(
        affinity.translate(building.outline, -cx, -cy), -building.angle, origin=(0, 0), use_radians=True
    ).bounds
    if right - left < bottom - top:
        along, across = across, along
        left, top, right, bottom = top, left, bottom, right
        axis = building.angle + math.pi / 2
    else:
        axis = building.angle
    base = np.asarray(building.colour, np.float32)
    # A slope that faces the sun is bright: the part of its normal that points against the shadow.
    normal = np.array([-math.sin(axis), math.cos(axis)])
    if abs(axis - building.angle) > 1:
        normal = -normal
    facing = float(normal @ -np.asarray(SHADOW_XY))
    light = np.ones_like(along)
    middle = (top + bottom) / 2
    half = (bottom - top) / 2
    if building.roof == "gable":
        light = np.where(across > middle, 1 + 0.24 * facing, 1 - 0.24 * facing)
        light = light + 0.10 * (np.abs(across - middle) < canvas.gsd_m * 0.9)
        light = light + 0.035 * np.sin(along * 2 * np.pi / 0.9)
    elif building.roof in ("hip", "tiers"):
        end = half - np.minimum(along - left, right - along)
        side = np.abs(across - middle)
        tilt = np.array([math.cos(axis), math.sin(axis)]) @ -np.asarray(SHADOW_XY)
        by_side = np.sign(across - middle) * 0.2 * facing
        by_end = np.sign(along - (left + right) / 2) * 0.2 * float(tilt)
        light = 1 + np.where(end > side, by_end, by_side)
        light = light + 0.03 * np.sin(np.maximum(end, side) * 2 * np.pi / 0.8)
        if building.roof == "tiers":
            rim = np.maximum(end, side) / half
            light = light * np.where(rim < 0.32, 1.2, np.where(rim < 0.64, 1.06, 0.92)) - 0.25 * (
                (np.abs(rim - 0.66) < 0.05) | (np.abs(rim - 0.34) < 0.05)
            )
    paint = base * light[..., None] + 2.5 * fine[where] + (5 if building.roof == "flat" else 3) * mid[where]
    canvas.image[where] += share * (paint - canvas.image[where])
    if building.roof == "flat":
        _clutter(canvas, building, rng)


def _clutter(canvas: _Canvas, building: Building, rng: np.random.Generator) -> None:
    """What stands on a flat roof: the parapet, a stair head, water tanks, panels."""
    outline = building.outline
    base = np.asarray(building.colour, np.float32)
    parapet = outline.difference(outline.buffer(-0.3, join_style="mitre"))
    floor = outline.buffer(-0.3, join_style="mitre")
    if floor.is_empty:
        return
    canvas.blend(floor.difference(affinity.translate(floor, *(0.5 * v for v in SHADOW_XY))), base * 0.62, 0.8)
    canvas.blend(parapet, np.minimum(base * 1.14, 250), 0.9)
    left, top, right, bottom = outline.bounds
    things: list[tuple[Polygon, tuple[int, int, int], float]] = []
    for _ in range(int(rng.integers(1, 5))):
        kind = rng.choice(["stair", "tank", "panel"], p=[0.35, 0.4, 0.25])
        w, d = {"stair": (3.0, 2.4), "tank": (0.0, 0.0), "panel": (2.0, 1.0)}[str(kind)]
        thing = _blob((0, 0), 0.65, 0, rng, 14) if kind == "tank" else shapely.box(-w / 2, -d / 2, w / 2, d / 2)
        thing = affinity.rotate(thing, building.angle, origin=(0, 0), use_radians=True)
        thing = affinity.translate(thing, rng.uniform(left, right), rng.uniform(top, bottom))
        if not floor.contains(thing) or any(thing.distance(other) < 0.3 for other, _, _ in things):
            continue
        colour = {"stair": tuple(int(v) for v in base * 1.08), "panel": (44, 54, 92)}.get(
            str(kind), ((42, 42, 46), (226, 226, 224), (70, 110, 168))[rng.integers(3)]
        )
        things.append((thing, colour, {"stair": 2.4, "tank": 1.4, "panel": 0.5}[str(kind)]))  # type: ignore[arg-type]
    for thing, colour, height in things:
        found = canvas.cover(_swept(thing, height).intersection(outline))
        if found:
            canvas.darken(found[1], found[0])
        canvas.blend(thing, colour)


def _crowns(canvas: _Canvas, trees: list[tuple[Polygon, float]], fine: Image, rng: np.random.Generator) -> None:
    """Tree crowns, round in the sun's light, over their shadows."""
    if not trees:
        return
    _shadows(canvas, trees)
    for crown, _ in sorted(trees, key=lambda tree: tree[1]):
        found = canvas.cover(crown)
        tint = np.array([(62, 84, 44), (74, 96, 50), (52, 76, 46), (86, 100, 56)][rng.integers(4)]) * rng.uniform(
            0.85, 1.15
        )
        if found is None:
            continue
        where, share = found
        y, x = np.mgrid[where].astype(np.float32)
        radius = math.sqrt(crown.area / math.pi)
        dx = ((x + 0.5) * canvas.gsd_m - crown.centroid.x) / radius
        dy = ((y + 0.5) * canvas.gsd_m - crown.centroid.y) / radius
        bulge = np.sqrt(np.clip(1 - dx * dx - dy * dy, 0, 1))
        lit = 0.62 + 0.35 * bulge - 0.42 * (dx * SHADOW_XY[0] + dy * SHADOW_XY[1])
        leaves = cv2.GaussianBlur(rng.normal(0, 1, dx.shape).astype(np.float32), (0, 0), max(0.22 / canvas.gsd_m, 0.5))
        lit = lit + 0.5 * leaves / max(float(leaves.std()), 1e-6) * 0.28
        paint = tint.astype(np.float32) * lit[..., None] + 3 * fine[where]
        canvas.image[where] += share * (paint - canvas.image[where])


# Place and truth


def _place(columns: int, rows: int, gsd_m: float, crs: str) -> Tile:
    """The whole scene as one tile: north up, pixels of ``gsd_m`` on the ground."""
    x, y = to_lonlat(crs, None).transform(*CENTRE_LONLAT, direction="INVERSE")
    step = 1e-4 if abs(x) <= 360 else 1.0
    unit = Tile(size=(1, 1), crs=crs, transform=Affine(step, 0, x, 0, -step, y)).ground_size_m() / step
    pixel = gsd_m / unit
    if abs(unit - 1) < 0.01:
        pixel = gsd_m
    # On whole pixels, as survey offices cut their scenes.
    x, y = (round(v / pixel) * pixel for v in (x, y))
    return Tile(size=(columns, rows), crs=crs, transform=Affine(pixel, 0, x, 0, -pixel, y))


def _truth(layout: Layout, extent: Polygon, tile: Tile, gsd_m: float) -> dict[str, Any]:
    features = [
        {
            "type": "Feature",
            "properties": {"label": label},
            "geometry": shapely.geometry.mapping(lonlat),
        }
        for label, geometry in _labelled(layout)
        for part in _polygons(geometry.intersection(extent))
        for lonlat in _to_lonlat(part, tile, gsd_m)
    ]
    return {"type": "FeatureCollection", "features": features}


def _labelled(layout: Layout) -> Iterator[tuple[str, BaseGeometry]]:
    for building in layout.buildings:
        yield "building", building.outline
    yield "road", unary_union([layout.paved, layout.unpaved])
    yield "water", layout.water
    yield "vegetation", unary_union([crown for crown, _ in layout.trees])


def _polygons(geometry: BaseGeometry) -> list[Polygon]:
    """The polygons of a geometry that are larger than a pixel's crumb."""
    parts = geometry.geoms if isinstance(geometry, MultiPolygon) or hasattr(geometry, "geoms") else [geometry]
    return [part for part in parts if isinstance(part, Polygon) and part.area > 0.25]


def _to_lonlat(polygon: Polygon, tile: Tile, gsd_m: float) -> list[Polygon]:
    """In degrees to a tenth of a millimetre, on whose grid the polygon may fall apart."""
    moved = shapely.transform(polygon, lambda xy: tile.px_to_lonlat(xy / gsd_m))
    parts = shapely.get_parts(shapely.set_precision(moved, 1e-9))
    # 1e-12 square degrees are a hundred square centimetres: crumbs that the grid broke off.
    return [shapely.geometry.polygon.orient(part) for part in parts if part.area > 1e-12]
