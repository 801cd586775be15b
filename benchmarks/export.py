"""How fast annotations become GeoJSON, beside the loop that most scripts use, and how much memory that takes.

    python -m benchmarks.export --annotations 20000 --points 6 12 40

Makes a Label Studio export of a made-up town (rotated and L-shaped buildings on overlapping tiles), then, in one run:

* *loop*: what scripts commonly do: ``json.load``; for each region a ``shapely.Polygon``, for each point a call of
  ``Transformer.transform``; ``json.dump``. Seams are not merged, nothing is checked. Three variants, as scripts differ
  in where they make the transformer: once, for each region, for each point (the slow two on a small input).
* *ours*: `backend.export`, with seams merged and without.
* *floor*: what is left when all else is free: ``json.load`` of the input, PROJ on one array of all points, pyogrio
  writing finished geometries. For comparison also the parser that we read with.

Figures are processor time, of one process that does one thing at a time, and time on the clock beside it.

People draw houses with 4 to 6 points, a model draws 10 to 40: the last table has the ratio to the loop for each. The
loop pays for each point; ours pays for each region its id, checks and attributes, and for each point little more than
reading a number, PROJ and writing a number. The ratio that counts is that to the loop with one transformer, the best
of its kind, at the fewest points, where it is least.

``--memory`` runs only our export of that many annotations and prints its greatest resident size; with two sizes the
slope tells what a million take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyproj
import shapely
from affine import Affine
from shapely.geometry import Polygon, mapping

from backend.annotations import TaskFile
from backend.export import ExportOptions, export
from backend.tile import Tile

TILE_PX, OVERLAP_PX, SPACING_PX = 512, 64, 80
CRS = "EPSG:32645"


def make_export(path: Path, annotations: int, *, points: int = 6, seed: int = 0) -> int:
    """Write a Label Studio export of about that many regions, task by task. Returns how many regions there are.

    Outlines have about ``points`` points where that is more than their corners.
    """
    rng = np.random.default_rng(seed)
    step = TILE_PX - OVERLAP_PX
    per_tile = ((TILE_PX + SPACING_PX / 2) / SPACING_PX) ** 2
    columns = max(1, round(np.sqrt(annotations / per_tile)))
    rows = max(1, round(annotations / per_tile / columns))
    scene = Tile((columns * step + OVERLAP_PX, rows * step + OVERLAP_PX), CRS, Affine(0.2, 0, 354000, 0, -0.2, 3057000))
    written = 0
    with path.open("wb") as file:
        before = b"["
        bands: dict[int, Any] = {}
        for row in range(rows):
            top = row * step
            lines = range(int(top // SPACING_PX) - 1, int((top + TILE_PX) // SPACING_PX) + 2)
            bands = {
                line: bands[line] if line in bands else _buildings(scene.size[0], line * SPACING_PX, points, rng)
                for line in lines
            }
            buildings = np.concatenate([bands[line] for line in lines])
            tree = shapely.STRtree(buildings)
            for column in range(columns):
                tile = scene.crop(column * step, top, TILE_PX, TILE_PX)
                task = _task(row * columns + column + 1, tile, buildings, tree)
                written += len(task["annotations"][0]["result"])
                file.write(before + msgspec.json.encode(task))
                before = b","
        file.write(b"]")
    return written


def _buildings(width: int, y: float, points: int, rng: np.random.Generator) -> Any:
    """A row of turned houses, two in five with four corners and the others L-shaped, with so many points or more."""
    x = np.arange(0, width, SPACING_PX)
    (w, h), (cut_w, cut_h) = rng.uniform(24, 44, (2, len(x))), rng.uniform(0.3, 0.7, (2, len(x)))
    zero = np.zeros(len(x))
    corners = np.array([(zero, zero), (w, zero), (w, cut_h * h), (cut_w * w, cut_h * h), (cut_w * w, h), (zero, h)])
    angle = rng.uniform(0, np.pi / 2, len(x))
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    corners = np.einsum("pcn,cdn->npd", corners - np.array([w, h]) / 2, turn)
    corners += np.column_stack((x, np.full(len(x), y)))[:, None] + rng.uniform(25, 45, (len(x), 1, 2))
    shapes = np.asarray(shapely.polygons(corners))
    has_four = rng.random(len(x)) < 0.4
    shapes[has_four] = shapely.minimum_rotated_rectangle(shapes[has_four])
    if points > 6:
        # As finely drawn as what a model draws, and not quite straight.
        shapes = shapely.segmentize(shapes, shapely.length(shapes) / points)
        shapes = shapely.transform(shapes, lambda xy: xy + 0.15 * np.sin(5 * xy[:, ::-1]))
    return shapes


def _task(number: int, tile: Tile, buildings: Any, tree: shapely.STRtree) -> dict[str, Any]:
    assert tile.window is not None
    column, row = tile.window[:2]
    window = shapely.box(column, row, column + TILE_PX, row + TILE_PX)
    near = buildings[np.sort(tree.query(window, predicate="intersects"))]
    is_cut = ~shapely.covered_by(near, window)
    near[is_cut] = shapely.intersection(near[is_cut], window)
    parts = shapely.get_parts(near)
    parts = parts[(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) > 1)]
    results = [
        {
            "id": f"{number}-{k}",
            "type": "polygonlabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": TILE_PX,
            "original_height": TILE_PX,
            "image_rotation": 0,
            "value": {
                "points": ((shapely.get_coordinates(part)[:-1] - (column, row)) * (100 / TILE_PX)).tolist(),
                "closed": True,
                "polygonlabels": ["building"],
            },
        }
        for k, part in enumerate(parts)
    ]
    return {
        "id": number,
        "data": {"image": f"http://localhost/{number}.jpg", "tile": tile.to_record()},
        "annotations": [
            {
                "id": number,
                "completed_by": number % 5,
                "created_at": "2025-01-01T00:00:00Z",
                "updated_at": "2025-01-01T00:00:00Z",
                "lead_time": 30.0,
                "result": results,
            }
        ],
        "predictions": [],
    }


def regions_of(tasks: list[dict[str, Any]]) -> Iterator[tuple[list[list[float]], list[float], dict[str, Any]]]:
    """Points in percent, the transform of the tile, and the task, of each region."""
    for task in tasks:
        for annotation in task["annotations"]:
            for result in annotation["result"]:
                yield result["value"]["points"], task["data"]["tile"]["transform"], task


def loop(source: Path, out: Path, transformer_made: str) -> int:
    """The common loop. Returns how many regions it wrote."""
    with source.open(encoding="utf-8") as file:
        tasks = json.load(file)
    transformer = pyproj.Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
    features: list[dict[str, Any]] = []
    for points, (a, b, c, d, e, f), task in regions_of(tasks):
        if transformer_made == "for each region":
            transformer = pyproj.Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
        ring = []
        for x_pct, y_pct in points:
            x, y = x_pct / 100 * TILE_PX, y_pct / 100 * TILE_PX
            if transformer_made == "for each point":
                transformer = pyproj.Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
            ring.append(transformer.transform(a * x + b * y + c, d * x + e * y + f))
        properties = {"label": "building", "task": task["id"]}
        features.append({"type": "Feature", "properties": properties, "geometry": mapping(Polygon(ring))})
    with out.open("w", encoding="utf-8") as file:
        json.dump({"type": "FeatureCollection", "features": features}, file)
    return len(features)


class Cost(NamedTuple):
    """What something takes, in seconds."""

    cpu: float
    """Processor time, of this process and of those that it started and ended: other programs change it little."""

    wall: float


def cost(work: Callable[[], Any]) -> Cost:
    """What the work takes, done once."""
    start, before = time.perf_counter(), os.times()
    work()
    spent = np.subtract(os.times(), before)
    return Cost(float(spent[:4].sum()), time.perf_counter() - start)


def compare(annotations: int, sample: int, points_each: int, repeat: int) -> list[float]:
    """Print what each way costs, in microseconds a region, and how many times faster ours is: a row of the last table.

    Each is done several times, one after the other, and the least counts: what else the machine does comes and goes.
    """
    import geopandas
    import pyogrio

    with tempfile.TemporaryDirectory() as folder:
        source, few, out = Path(folder) / "tasks.json", Path(folder) / "few.json", Path(folder) / "out.geojson"
        count = make_export(source, annotations, points=points_each)
        few_count = make_export(few, sample, points=points_each)
        text = source.read_bytes()
        points = np.concatenate([np.array(points) for points, _, _ in regions_of(json.loads(text))])
        print(f"{count} regions of {len(points) / count:.1f} points, {len(text) / 1e6:.1f} MB")
        costs: dict[str, Cost] = {}
        kept: dict[str, tuple[Callable[[], Any], int]] = {}

        def keep(name: str, work: Callable[[], Any], units: int) -> None:
            kept[name] = work, units

        def ours(*, merge_seams: bool) -> Callable[[], Any]:
            options = ExportOptions(merge_seams=merge_seams)
            return lambda: export(TaskFile(source), out, options=options)

        ours(merge_seams=False)()
        frame = geopandas.read_file(out)
        keep("floor: json.load", lambda: json.loads(text), count)
        keep("(msgspec.json.decode)", lambda: msgspec.json.decode(text), count)
        keep("loop, transformer made once", lambda: loop(source, out, "once"), count)
        keep("loop, transformer made for each region", lambda: loop(few, out, "for each region"), few_count)
        keep("loop, transformer made for each point", lambda: loop(few, out, "for each point"), few_count)
        keep("ours, outlines as drawn", ours(merge_seams=False), count)
        keep("ours, seams merged", ours(merge_seams=True), count)
        transformer = pyproj.Transformer.from_crs(CRS, "EPSG:4326", always_xy=True)
        keep("floor: PROJ, one array", lambda: transformer.transform(points[:, 0] + 354000, points[:, 1] + 3e6), count)
        layer_options = {"RFC7946": "YES", "WRITE_BBOX": "YES", "COORDINATE_PRECISION": "7"}
        plain = frame[["id", "label", "score", "area_m2", "scene", "geometry"]]
        keep(
            "floor: pyogrio to GeoJSON, five attributes",
            lambda: pyogrio.write_dataframe(plain, out, use_arrow=True, layer_options=layer_options),
            len(plain),
        )
        for _ in range(repeat):
            for name, (work, units) in kept.items():
                new = Cost(*(spent / units * 1e6 for spent in cost(work)))
                costs[name] = Cost(*np.minimum(new, costs.get(name, new)).tolist())
        for name, (cpu, wall) in costs.items():
            print(f"{name:52} {cpu:9.1f} us a region, {wall:9.1f} on the clock")
        for name in (name for name in costs if name.startswith("ours")):
            for other, (cpu, _) in costs.items():
                if other.startswith("loop"):
                    print(f"{name}: {cpu / costs[name].cpu:.1f} times faster than the {other}")
        floor = sum(cpu for name, (cpu, _) in costs.items() if name.startswith("floor"))
        print(f"seams merged to as drawn: {costs['ours, seams merged'].cpu / costs['ours, outlines as drawn'].cpu:.2f}")
        print(f"distance to the floor (all three): {costs['ours, seams merged'].cpu / floor:.2f}")
        drawn, merged, once, each = (
            costs[name].cpu
            for name in (
                "ours, outlines as drawn",
                "ours, seams merged",
                "loop, transformer made once",
                "loop, transformer made for each region",
            )
        )
        return [len(points) / count, drawn, merged, once / drawn, once / merged, each / drawn, each / merged]


def memory(annotations: int, ending: str, points_each: int) -> None:
    """Print the greatest resident size of an export of that many regions."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tasks.json"
        count = make_export(source, annotations, points=points_each)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent = cost(lambda: export(TaskFile(source), Path(folder) / f"out.{ending}"))
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{count} regions to .{ending}: {most:.0f} MB at most (before: {before:.0f} MB),"
            f" {spent.cpu:.1f} s, {spent.wall:.1f} s on the clock"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=int, default=20_000, help="regions, about")
    parser.add_argument("--points", type=int, nargs="+", default=[6, 12, 40], help="points of an outline, about")
    parser.add_argument("--repeat", type=int, default=3, help="how often each is done")
    parser.add_argument("--sample", type=int, default=200, help="regions for the slow variants of the loop")
    parser.add_argument("--memory", action="store_true", help="only our export, and its greatest resident size")
    parser.add_argument("--ending", default="geojson", help="format of --memory")
    args = parser.parse_args()
    if args.memory:
        memory(args.annotations, args.ending, args.points[0])
    else:
        table = [compare(args.annotations, args.sample, points_each, args.repeat) for points_each in args.points]
        print(
            "points a region | us as drawn, merged | faster than the loop: as drawn, merged | its transformer made anew"
        )
        for points, drawn, merged, *ratios in table:
            once_drawn, once_merged, each_drawn, each_merged = (f"{ratio:5.1f}" for ratio in ratios)
            print(
                f"{points:15.1f} | {drawn:8.1f} {merged:10.1f} | {once_drawn:>29} {once_merged:>7}"
                f" | {each_drawn:>15} {each_merged:>9}"
            )
