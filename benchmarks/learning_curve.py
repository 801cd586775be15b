"""What labelling teaches: pre-labels on tiles never seen, by how many tiles an annotator has accepted.

    python benchmarks/learning_curve.py DIR [--courses town field …] [--counts 0 5 20] [--out docs/learning-curves]
    python benchmarks/learning_curve.py FOLDER --learn NAME … --judge NAME … [--label building] [--new]

DIR holds data folders, of which five courses are made:

town    buildings, learned in the west of a town that the shipped weights know, judged in its east, which they do not
place   buildings on satellite imagery of a place and a kind that the shipped weights have never seen, in small images:
        five are as much ground as a tile of 512 px
field   fields, with weights that know buildings only: the class is new, its head starts from nothing
green   vegetation by masks that people drew, likewise, on satellite imagery of a town
tree    canopies of trees, likewise; outlined by the points and the near infrared that come with the imagery, of which
        the network sees red, green and blue. Such outlines cut wide crowns and take in lawns: boosted trees on the same
        features, and on the near infrared too, come to no more than .50 of IoU with all tiles and the best threshold

FOLDER is one data folder with ``images/`` and ``labels/``; images are named by how their names begin. ``--new`` takes
the label from the weights first.

How `backend.training` trains was chosen on every second image that `place` learns from, judged on the images between,
on the north-west of Banepa, which the shipped weights were held off, learned in the rest of the west, and on the trees
of Long Beach, learned elsewhere; never on what is judged here.

Tiles are accepted in a random order, the same each time. Training is that of `fit`: with tiles enough it holds some
out by place to judge the new version by, and learns from the rest; of few it learns from all, and judges in turn. Every
version is then judged here on the same other tiles: polygons as they are served, from a look and its mirror image,
matched one to one at IoU .5 (F1@0.5), the IoU of all their pixels, and the calibration error of their scores. Told are
also the time that training and `fit`'s own judging take, on the clock and of processors (of which two are not always
free), and what `fit` would decide.
``--out`` receives a table in JSON and a drawing of each course.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from shapely.affinity import translate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend import vectorize
from backend.compact import CompactSegmenter
from backend.judging import challengers, embedded, judge, looked_at, split, verdict
from backend.predictor import pre_label_options, pre_labels_of
from backend.settings import Settings
from backend.training import Example, train_heads
from benchmarks import _judging as judging
from benchmarks._judging import PreLabel, Tile

Json = dict[str, Any]

COUNTS = (0, 5, 10, 20, 40)
MOST_JUDGED = 24
"""Tiles that a course is judged on, at most."""

VEGETATION = 4
"""Value of vegetation in the masks of `green`."""

CANOPY_NDVI, CANOPY_REACH_PX = 0.15, 9
"""What is green and so near to a tree's point is its canopy."""


@dataclass(frozen=True)
class Course:
    """A place and a class to learn."""

    name: str
    title: str
    label: str
    learn: Sequence[Tile]
    judge: Sequence[Tile]
    gsd_m: float | None = None
    is_new: bool = False
    """Whether the weights are to forget the label first."""

    counts: Sequence[int] = COUNTS
    """Accepted tiles."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--courses", nargs="+", choices=list(COURSES), default=list(COURSES))
    parser.add_argument("--learn", nargs="+", metavar="NAME", help="images of one folder to learn from")
    parser.add_argument("--judge", nargs="+", metavar="NAME", help="images of one folder to judge on")
    parser.add_argument("--label", default="building")
    parser.add_argument("--new", action="store_true", help="the weights forget the label first")
    parser.add_argument("--gsd", type=float, metavar="M", help="ground size of a pixel of one folder's images")
    parser.add_argument("--counts", type=int, nargs="+", help="accepted tiles, for all courses")
    parser.add_argument("--limit", type=int, default=MOST_JUDGED, help="tiles to judge on")
    parser.add_argument("--weights", type=Path, help="another weights file than the shipped one")
    parser.add_argument(
        "--spoiled", type=float, default=0, metavar="PX", help="half of the accepted outlines lie so far off, all tiles"
    )
    parser.add_argument("--max-seconds", type=float, default=600, help="for each training")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write COURSE.json and COURSE.svg")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("learning_curve: not measured; it needs labelled tiles (see --help)")
        return
    segmenter = CompactSegmenter.load(arguments.weights)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.learn and arguments.judge:
            sides = (judging.labelled_tiles(arguments.data, names) for names in (arguments.learn, arguments.judge))
            courses = [
                Course(arguments.data.name, arguments.data.name, arguments.label, *sides, arguments.gsd, arguments.new)
            ]
        else:
            courses = [COURSES[name](arguments.data, Path(scratch)) for name in COURSES if name in arguments.courses]
        for course in courses:
            rows = learned(course, segmenter, arguments, Path(scratch))
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                written = arguments.out / course.name
                written.with_suffix(".json").write_text(json.dumps(judging.rounded(rows), indent=1) + "\n")
                written.with_suffix(".svg").write_text(drawn(rows, segmenter.base_version), encoding="utf-8")


# --- Courses ----------------------------------------------------------------------------------------------------------


def town(data: Path, scratch: Path) -> Course:
    west, east = (
        judging.labelled_tiles(data / "hot_banepa_e2e", [f"19_{x}" for x in columns])
        for columns in ((386690, 386691, 386692, 386693), (386694, 386695))
    )
    return Course("town", "buildings, the other half of a known town", "building", west, east)


def place(data: Path, scratch: Path) -> Course:
    tiles = judging.labelled_tiles(data / "spacenet6_rotterdam_figs")
    third = len(tiles) // 3
    title = "buildings, satellite imagery of a place never seen"
    # An image is a fifth of a tile of 512 px.
    return Course("place", title, "building", tiles[:-third], tiles[-third:], gsd_m=0.5, counts=(0, 5, 10, 20, 40, 100))


def field(data: Path, scratch: Path) -> Course:
    tiles = judging.labelled_tiles(data / "agoro_fields")
    # What the shipped weights, features included, were held off: every sixth.
    held_out = tiles[5::6]
    rest = [tile for tile in tiles if tile not in held_out]
    return Course("field", "fields, a new class", "field", rest, held_out, is_new=True)


def tree(data: Path, scratch: Path) -> Course:
    folder = scratch / "trees"
    canopies(data / "naip_urban_trees", folder)
    tiles = judging.labelled_tiles(folder)
    judged = [tile for tile in tiles if tile.image.name.startswith(("riverside", "santa_monica"))]
    rest = [tile for tile in tiles if tile not in judged]
    return Course("tree", "tree canopies, a new class", "tree", rest, judged, 0.6, is_new=True)


def green(data: Path, scratch: Path) -> Course:
    folder = scratch / "green"
    patches(data / "dubai_mbrsc", folder, VEGETATION)
    tiles = judging.labelled_tiles(folder)
    # What the shipped weights, features included, were held off.
    judged = [tile for tile in tiles if tile.image.name.startswith("tile6")]
    rest = [tile for tile in tiles if tile not in judged]
    return Course("green", "vegetation, a new class", "vegetation", rest, judged, is_new=True)


COURSES: Mapping[str, Callable[[Path, Path], Course]] = {
    "town": town,
    "place": place,
    "field": field,
    "green": green,
    "tree": tree,
}


def patches(data: Path, out: Path, value: int) -> None:
    """Images, and the patches of one value of their masks as outlines."""
    from shapely.geometry import mapping

    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True)
    for path in sorted((data / "masks").glob("*.png")):
        image = next((data / "images").glob(f"{path.stem}.*"))
        (out / "images" / image.name).write_bytes(image.read_bytes())
        outlines = vectorize.mask_polygons(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) == value)
        features = [{"type": "Feature", "properties": {}, "geometry": mapping(outline)} for outline in outlines]
        (out / "labels" / f"{path.stem}.geojson").write_text(json.dumps({"features": features}))


def canopies(data: Path, out: Path) -> None:
    """Red, green and blue of four-band images as PNG, and canopies by points and near infrared as outlines."""
    import rasterio
    from scipy import ndimage
    from shapely.geometry import mapping

    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True)
    for path in sorted((data / "images").glob("*.tif")):
        with rasterio.open(path) as file:
            bands = file.read((1, 2, 3, 4))
        red, near = bands[0].astype(np.float32), bands[3].astype(np.float32)
        is_green = cv2.GaussianBlur((near - red) / (near + red + 1), (0, 0), 0.8) > CANOPY_NDVI
        off = np.ones(is_green.shape, bool)
        for feature in json.loads((data / "labels" / "px" / f"{path.stem}.geojson").read_text())["features"]:
            column, row = (int(v) for v in feature["geometry"]["coordinates"])
            off[min(row, off.shape[0] - 1), min(column, off.shape[1] - 1)] = False
        reach = ndimage.distance_transform_edt(off) <= CANOPY_REACH_PX
        outlines = vectorize.mask_polygons(is_green & reach)
        features = [{"type": "Feature", "properties": {}, "geometry": mapping(outline)} for outline in outlines]
        cv2.imwrite(str(out / "images" / f"{path.stem}.png"), np.moveaxis(bands[2::-1], 0, -1))
        (out / "labels" / f"{path.stem}.geojson").write_text(json.dumps({"features": features}))


# --- Learning and judging ---------------------------------------------------------------------------------------------


def learned(course: Course, segmenter: CompactSegmenter, arguments: argparse.Namespace, scratch: Path) -> list[Json]:
    """A row for each number of accepted tiles, printed as it comes."""
    if not course.learn or not course.judge or {t.image for t in course.learn} & {t.image for t in course.judge}:
        raise SystemExit(f"{course.name} needs different images to learn from and to judge on")
    base = without(segmenter, course.label) if course.is_new else segmenter
    order = list(course.learn)
    random.Random(judging.SEED).shuffle(order)
    counts = sorted({min(count, len(order)) for count in arguments.counts or course.counts})
    accepted = [example_of(tile, course, off_px=arguments.spoiled) for tile in order[: counts[-1]]]
    others = [example_of(tile, course) for tile in course.judge[: arguments.limit]]
    least = Settings.from_environment(data_dir=scratch, label_studio_url="").model_score_threshold
    print(f"{course.title}: {len(others)} tiles to judge on, weights {segmenter.base_version}", flush=True)
    rows: list[Json] = []
    for count in counts:
        row: Json = {"course": course.name, "title": course.title, "accepted": count}
        model = base
        if count:
            parts = split(accepted[:count])
            heads = scratch / f"{course.name}-{count}.safetensors"
            cpu_s = time.process_time()
            report, seconds = judging.timed(
                lambda parts=parts, heads=heads: train_heads(
                    base,
                    parts.learn,
                    [course.label],
                    out=heads,
                    folds_out=scratch if parts.in_turn else None,
                    max_seconds=arguments.max_seconds,
                )
            )
            model = base.with_heads(heads)
            (label,) = report.labels
            row |= {"learned": len(parts.learn), "steps": label.steps}
            row |= {"left_out_iou_before": label.iou_before, "left_out_iou_after": label.iou_after}
            row |= {"training_s": seconds, "training_cpu_s": time.process_time() - cpu_s}
            told = challengers(parts, model, report.folds, base.with_heads)
            if told:
                cpu_s = time.process_time()
                judged, seconds = judging.timed(
                    lambda told=told: judge(
                        base,
                        [(one, embedded(base, tiles, [course.label])) for one, tiles in told],
                        [course.label],
                        min_score=least,
                    )
                )
                goes_live, why = verdict(judged)
                row |= {"judging_s": seconds, "judging_cpu_s": time.process_time() - cpu_s}
                row |= {"goes_live": goes_live, "why": why}
            else:
                row |= {"goes_live": False, "why": parts.why_not}
        row |= {"version": model.version} | figures(model, course, others, least)
        rows.append(row)
        print(
            "   ",
            json.dumps(judging.rounded({k: v for k, v in row.items() if k not in ("course", "title")})),
            flush=True,
        )
    return rows


def without(segmenter: CompactSegmenter, label: str) -> CompactSegmenter:
    """The same weights, as if they had never known the label."""
    heads = {name: segmenter.head(name) for name in segmenter.labels if name.casefold() != label.casefold()}
    kept = {name: head for name, head in heads.items() if head is not None}
    return segmenter.with_only(kept, {k: v for k, v in segmenter.scoring.items() if k.casefold() != label.casefold()})


def example_of(tile: Tile, course: Course, *, off_px: float = 0) -> Example:
    """A tile as it was accepted; every second object's outline lies ``off_px`` too far right and down."""
    image = np.ascontiguousarray(cv2.imread(str(tile.image))[:, :, ::-1])
    regions = [
        (course.label, translate(part, off_px * (number % 2), off_px * (number % 2)))
        for number, truth in enumerate(tile.truths)
        for part in truth.parts
    ]
    return Example(image_rgb=image, regions=regions, place=place_of(tile), gsd_m=course.gsd_m)


def place_of(tile: Tile) -> str:
    """Neighbouring web-mercator tiles, two by two, are one place; any other image is its own."""
    parts = tile.image.stem.split("_")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        return f"{parts[0]}_{int(parts[1]) // 2}_{int(parts[2]) // 2}"
    return tile.image.stem


def figures(model: CompactSegmenter, course: Course, others: Sequence[Example], least: float) -> Json:
    """What the model serves on the tiles to judge on, beside what is there."""
    matched = []
    for tile, example in zip(course.judge, others, strict=False):
        found: list[PreLabel] = []
        if model.head(course.label) is not None:
            known = next(name for name in model.labels if name.casefold() == course.label.casefold())
            options = pre_label_options(course.gsd_m)
            (seen,) = embedded(model, [example], [course.label])
            dense = looked_at(model, seen, [course.label])
            served = pre_labels_of(dense, {known: known}, options=options, min_score=least)
            found = [PreLabel(vectorize.bridge(region.polygon), region.score) for region in served.regions]
        matched.append(judging.matched(tile, found))
    measured = judging.auto_figures(matched)
    names = ("objects", "polygons", "F1@0.5", "precision", "recall", "pixel_iou")
    return {name: measured[name] for name in names} | {"calibration_error": judging.reliability(matched).error}


# --- Drawing ----------------------------------------------------------------------------------------------------------

CURVES = (("F1@0.5", "F1 of polygons at IoU 0.5", "#2f6fab"), ("pixel_iou", "IoU of all pixels", "#c0504d"))


def drawn(rows: Sequence[Json], version: str) -> str:
    """A course as SVG: accepted tiles to the right, evenly by count, F1 and IoU upwards; full where `fit` goes live."""
    left, top, width, height = 48, 52, 420, 240
    xs = {row["accepted"]: left + 20 + i * (width - 40) / max(len(rows) - 1, 1) for i, row in enumerate(rows)}

    def y_of(value: float) -> float:
        return top + height * (1 - value)

    parts = [
        f'<line x1="{left}" x2="{left + width}" y1="{y_of(v):.0f}" y2="{y_of(v):.0f}" stroke="#ddd"/>'
        f'<text x="{left - 16}" y="{y_of(v) + 4:.0f}">{v:g}</text>'
        for v in (0, 0.2, 0.4, 0.6, 0.8, 1)
    ]
    parts += [f'<text x="{x:.0f}" y="{top + height + 18}">{count}</text>' for count, x in xs.items()]
    below = top + height + 36
    for number, (figure, name, colour) in enumerate(CURVES):
        points = [(xs[row["accepted"]], y_of(row[figure]), row) for row in rows]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, row in points:
            fill = colour if row.get("goes_live") or not row["accepted"] else "#fff"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/>')
            is_upper = row[figure] >= max(row[other] for other, *_ in CURVES)
            at = y - 9 if is_upper else y + 17
            parts.append(f'<text x="{x:.1f}" y="{at:.1f}" style="fill:{colour}">{row[figure]:.2f}</text>')
        y = below + 20 + 17 * number
        parts.append(f'<rect x="{left}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + 16}" y="{y}" class="key">{name}</text>')
    title, weights = escape(rows[0]["title"]), escape(f"pre-labels on tiles never seen, weights {version}")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 16} {below + 66}" width="560">
<style>text{{font:11px sans-serif;text-anchor:middle;fill:#222}}.key{{text-anchor:start}}</style>
<rect width="100%" height="100%" fill="#fff"/>
<text x="{left + width / 2}" y="18">{title}</text><text x="{left + width / 2}" y="34">{weights}</text>
{"".join(parts)}
<text x="{left + width / 2}" y="{below}">tiles that the annotator has accepted</text>
<text x="{left}" y="{below + 54}" class="key">full: shipped, or fit puts it live; hollow: kept as challenger</text>
</svg>
"""


if __name__ == "__main__":
    main()
