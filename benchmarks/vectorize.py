"""How true and how fast outlines are, on synthetic buildings: `python -m benchmarks.vectorize`.

Buildings (boxes, L shapes, courtyards, discs of 200–2,500 pixels, turned anyhow) are painted at eight times the
resolution and averaged; the outline of that probability map is compared with the building that was painted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from shapely import Polygon
from shapely.affinity import rotate, scale, translate

from backend.segmenter import DenseMaps
from backend.vectorize import bridge, instances, mask_polygons, polygons, rasterize, unbridge

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


def coverage(shapes: list[Polygon]) -> NDArray[np.float32]:
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    rows: dict[str, list[dict[str, float]]] = {"polygons": [], "instances": [], "mask_polygons": []}
    single_s, back_s = [], []
    for _ in range(args.scenes):
        truths = scene(rng, args.buildings)
        probability = coverage(truths)
        border = np.clip(4 * np.abs(ndimage.gaussian_filter(probability, 1.0) - probability), 0, 1).astype(np.float32)
        dense = DenseMaps(("building",), probability[None], border[None])
        ways: dict[str, Callable[[], list[Polygon]]] = {
            "polygons": lambda p=probability: polygons(p),
            "instances": lambda d=dense: [part for instance in instances(d, "building") for part in instance.polygons],
            "mask_polygons": lambda p=probability: mask_polygons(p >= 0.5),
        }
        for name, way in ways.items():
            figures = compared(way(), truths)
            seconds = best_s(way, args.repeats)
            rows[name].append(figures | {"tile_ms": 1000 * seconds, "polygons_per_s": len(truths) / seconds})
        one = coverage(truths[:1])
        single_s.append(best_s(lambda p=one: polygons(p), args.repeats))
        drawn = polygons(probability)
        back_s.append(best_s(lambda d=drawn: [unbridge(bridge(p)) for p in d], args.repeats) / len(drawn))
    for name, figures in rows.items():
        mean = {key: round(float(np.mean([row[key] for row in figures])), 4) for key in figures[0]}
        print(json.dumps({"way": name, **mean}))
    print(json.dumps({"way": "one prompted object", "ms": round(1000 * float(np.mean(single_s)), 2)}))
    print(json.dumps({"way": "bridge and unbridge", "polygons_per_s": round(1 / float(np.mean(back_s)))}))


if __name__ == "__main__":
    main()
