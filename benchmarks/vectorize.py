"""How true and how fast outlines are, on synthetic buildings: `python -m benchmarks.vectorize`.

Buildings (boxes, L shapes, courtyards, discs of 200–2,500 pixels, turned anyhow) are painted at eight times the
resolution and averaged; the outline of that probability map is compared with the building that was painted. The common
way from a mask is `rasterio.features.shapes`, a GeoDataFrame of what comes of it, and its `simplify`; it runs on the
same masks in turn with ours, and the ratio is of the least processor time of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import geopandas
import numpy as np
import rasterio.features
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from shapely import Polygon
from shapely.affinity import rotate, scale, translate

from backend.coverage import coverage
from backend.instances import instances
from backend.segmenter import DenseMaps
from backend.vectorize import bridge, mask_polygons, polygons, rasterize, unbridge

FINER = 8
SIDE_PX = 512


def building(rng: np.random.Generator) -> Polygon:
    a, b = rng.uniform(7, 22, 2)
    shell = shapely.box(-a, -b, a, b)
    shapes = [
        shell,
        Polygon([(-a, -b), (a, -b), (a, 0), (a / 4, 0), (a / 4, b), (-a, b)]),
        Polygon(shell.exterior, [shapely.box(-a / 2, -b / 2, a / 2, b / 2).exterior]) if a * b > 150 else shell,
        shapely.Point(0, 0).buffer(max(a, 8), quad_segs=32),
    ]
    return rotate(shapes[rng.integers(len(shapes))], rng.uniform(0, 90), origin=(0, 0))


def scene(rng: np.random.Generator, count: int) -> list[Polygon]:
    placed: list[Polygon] = []
    while len(placed) < count:
        candidate = translate(building(rng), *rng.uniform(30, SIDE_PX - 30, 2))
        if all(candidate.distance(other) > 4 for other in placed):
            placed.append(candidate)
    return placed


def covered(shapes: list[Polygon]) -> NDArray[np.float32]:
    fine = rasterize([scale(s, FINER, FINER, origin=(0, 0)) for s in shapes], SIDE_PX * FINER, SIDE_PX * FINER)
    return fine.reshape(SIDE_PX, FINER, SIDE_PX, FINER).mean(axis=(1, 3)).astype(np.float32)


def best_s(work: Callable[[], object], repeats: int) -> float:
    """Least processor time of several runs, which other work on the machine disturbs least."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def common_way(mask: NDArray[np.bool_]) -> list[Polygon]:
    """What most scripts do with a mask, down to the smallest object that ours draws."""
    shapes = rasterio.features.shapes(mask.astype(np.uint8), mask=mask)
    features = [{"geometry": geometry, "properties": {"value": value}} for geometry, value in shapes]
    frame = geopandas.GeoDataFrame.from_features(features)
    frame["geometry"] = frame.geometry.simplify(1.0)
    return list(frame.geometry[frame.area >= 16])


def in_turn_s(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    """Least processor time of each way, run one after the other so that all meet the same load."""
    times = [[best_s(way, 1) for way in ways] for _ in range(repeats)]
    return [min(column) for column in zip(*times, strict=True)]


def compared(found: list[Polygon], truths: list[Polygon]) -> dict[str, float]:
    tree = shapely.STRtree(found)
    ious, bias, points = [], [], 0
    for truth in truths:
        overlapping = [found[i] for i in tree.query(truth, predicate="intersects")]
        best = max(overlapping, key=lambda p: p.intersection(truth).area, default=None)
        ious.append(best.intersection(truth).area / best.union(truth).area if best is not None else 0.0)
        if best is not None:
            bias.append(best.area / truth.area - 1)
            points += len(bridge(best))
    true_points = sum(len(r.coords) - 1 for t in truths for r in (t.exterior, *t.interiors))
    return {
        "mean_iou": float(np.mean(ious)),
        "least_iou": float(np.min(ious)),
        "area_bias_pct": 100 * float(np.mean(bias)),
        "worst_area_pct": 100 * float(np.abs(bias).max()),
        "points_per_polygon": points / len(truths),
        "true_points_per_polygon": true_points / len(truths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--buildings", type=int, default=60, help="in each scene of 512 × 512 pixels")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    rows: dict[str, list[dict[str, float]]] = {"polygons": [], "instances": [], "mask_polygons": [], "common way": []}
    single_s, back_s, shared_s, ratios = [], [], [], []
    for _ in range(args.scenes):
        truths = scene(rng, args.buildings)
        probability = covered(truths)
        border = np.clip(4 * np.abs(ndimage.gaussian_filter(probability, 1.0) - probability), 0, 1).astype(np.float32)
        dense = DenseMaps(("building",), probability[None], border[None])
        ways: dict[str, Callable[[], list[Polygon]]] = {
            "polygons": lambda p=probability: polygons(p),
            "instances": lambda d=dense: [part for instance in instances(d, "building") for part in instance.polygons],
            "mask_polygons": lambda m=probability >= 0.5: mask_polygons(m),
            "common way": lambda m=probability >= 0.5: common_way(m),
        }
        found = {name: way() for name, way in ways.items()}
        timed = dict(zip(ways, in_turn_s(list(ways.values()), args.repeats), strict=True))
        ratios.append(timed["common way"] / timed["mask_polygons"])
        for name, seconds in timed.items():
            figures = compared(found[name], truths)
            rows[name].append(figures | {"tile_ms": 1000 * seconds, "polygons_per_s": len(truths) / seconds})
        one = covered(truths[:1])
        single_s.append(best_s(lambda p=one: polygons(p), args.repeats))
        drawn = polygons(probability)
        shared_s.append(best_s(lambda d=drawn: coverage([[p] for p in d]), args.repeats))
        back_s.append(best_s(lambda d=drawn: [unbridge(bridge(p)) for p in d], args.repeats) / len(drawn))
    for name, figures in rows.items():
        mean = {key: round(float(np.mean([row[key] for row in figures])), 4) for key in figures[0]}
        print(json.dumps({"way": name, **mean}))
    print(json.dumps({"way": "one prompted object", "ms": round(1000 * float(np.mean(single_s)), 2)}))
    print(json.dumps({"way": "shared borders", "tile_ms": round(1000 * float(np.mean(shared_s)), 2)}))
    print(json.dumps({"way": "bridge and unbridge", "polygons_per_s": round(1 / float(np.mean(back_s)))}))
    print(json.dumps({"mask_polygons against the common way": f"{np.mean(ratios):.1f} times as fast"}))


if __name__ == "__main__":
    main()
