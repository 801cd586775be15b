"""How good the outlines are: clicks and boxes of a simulated annotator, and pre-labels, on labelled tiles.

    python benchmarks/quality.py DATA [--match 19_386694 19_386695] [--mode clicks boxes auto] [--limit 100]
    python benchmarks/quality.py --held-out DIR [--weights FILE] [--json OUT]

DATA holds ``images/`` and ``labels/px/*.geojson`` (or ``labels/*.geojson``): polygons in pixels, with ``touches_edge``.
DIR holds the data folders that the weights are trained from, of which the held-out places are judged.

clicks  The first click at the deepest point of the object, each further one at the deepest point of the largest error.
        Mean IoU after 1, 3 and 5 clicks; NoC@85 is the mean number of clicks to IoU .85, at most --max-clicks.
boxes   One box an object, its bounds with 5 % jitter. Mean and median IoU.
auto    No prompt. Polygons matched one to one with the truth at IoU .5: precision, recall, F1; then what became of each
        object (found, merged, split, poor outline, missed) and of each polygon, by size; whether scores are right; and
        whether tasks sorted by their score are sorted by how much there is to mend.

Whole objects of at least 150 px are judged by clicks and boxes, all of at least 150 px by pre-labels. The backend is
asked as Label Studio asks it, without HTTP. ``--weights`` judges another file, whose ``.sha256`` lies beside it.
``--baseline grabcut`` gives the same clicks to OpenCV's GrabCut.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend.compact import CompactSegmenter
from backend.evaluation import OBJECT_FATES, PREDICTION_FATES
from benchmarks import _judging as judging
from benchmarks._judging import Backend, Click, Mask, Outliner, Tile

Json = dict[str, Any]

LEAST_SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def main() -> None:
    parser = judging.parser(__doc__, limit=100, limited="objects (clicks, boxes) or tiles (auto)")
    judging.add_figures(parser)
    parser.add_argument("--held-out", type=Path, metavar="DIR", help="judge what training held out of these folders")
    parser.add_argument("--side", type=int, default=1024, help="with --held-out: largest side of a tile, in pixels")
    parser.add_argument("--mode", nargs="+", default=["clicks", "boxes", "auto"], choices=["clicks", "boxes", "auto"])
    parser.add_argument("--max-clicks", type=int, default=20)
    parser.add_argument("--all-scores", action="store_true", help="F1 by least score of a pre-label, and all scores")
    parser.add_argument("--baseline", choices=["grabcut"])
    arguments = parser.parse_args()
    if arguments.data is None and arguments.held_out is None:
        print("quality: not measured; it needs a folder of labelled tiles (see --help)")
        return
    records: list[Json] = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.held_out is not None:
            for (group, label), tiles in judging.held_out_tiles(
                arguments.held_out, Path(scratch), side_px=arguments.side
            ).items():
                records += judged(arguments, Path(scratch), f"{group}, held out", label, tiles)
        else:
            tiles = judging.labelled_tiles(arguments.data, arguments.match)
            if not tiles:
                parser.error(f"no labelled images in {arguments.data}")
            records += judged(arguments, arguments.data, arguments.data.name, arguments.label, tiles)
    if arguments.json:
        arguments.json.write_text(json.dumps(judging.rounded(records), indent=1) + "\n")


def judged(arguments: argparse.Namespace, folder: Path, name: str, label: str, tiles: Sequence[Tile]) -> list[Json]:
    """Every mode on one set, printed as it is measured."""
    about = {"data": name, "match": " ".join(arguments.match), "label": label}
    records = []
    if arguments.baseline:
        for mode in [mode for mode in arguments.mode if mode != "auto"]:
            figures, details = prompted(GrabCut(), mode, tiles, arguments)
            records.append(printed({**about, "mode": mode, "version": "grabcut"}, figures, details))
        return records
    segmenter = CompactSegmenter.load(arguments.weights)
    with Backend(folder, label, segmenter=segmenter, min_score=arguments.min_score) as backend:
        for mode in arguments.mode:
            if mode != "auto":
                figures, details = prompted(backend, mode, tiles, arguments)
            elif backend.knows:
                figures, details = automatic(backend, tiles[: arguments.limit], all_scores=arguments.all_scores)
            else:
                continue
            records.append(printed({**about, "mode": mode, "version": backend.version}, figures, details))
    return records


def prompted(outliner: Outliner, mode: str, tiles: Sequence[Tile], arguments: argparse.Namespace) -> tuple[Json, Json]:
    """Figures of clicks or boxes, and the same by size."""
    targets = judging.whole_objects(tiles, arguments.limit)
    by_side: dict[str, list[Any]] = defaultdict(list)
    if not targets:
        return {"objects": 0}, {}
    if mode == "clicks":
        series = [judging.click_through(outliner, target, most=arguments.max_clicks) for target in targets]
        for one in series:
            by_side[judging.side_class(one.target.truth.area_px)].append(one)
        sized = {side: judging.click_figures(by_side[side], arguments.max_clicks) for side in sorted_sides(by_side)}
        keys = ("objects", "iou@1", "iou@3", "NoC@85")
        figures: Json = judging.click_figures(series, arguments.max_clicks)
        return figures, {"by size": {side: {key: sized[side][key] for key in keys} for side in sized}}
    ious, seconds = [], []
    for target, box_xyxy in zip(targets, judging.jittered_boxes(targets), strict=True):
        mask, elapsed = judging.timed(lambda target=target, box=box_xyxy: outliner.boxed(target.tile, box))
        ious.append(judging.iou(mask, target.truth.mask(target.tile.image_hw)))
        seconds.append(elapsed)
        by_side[judging.side_class(target.truth.area_px)].append(ious[-1])
    return {
        "objects": len(ious), "mean_iou": statistics.mean(ious), "median_iou": statistics.median(ious),
        "share>=0.8": sum(value >= 0.8 for value in ious) / len(ious), "seconds": statistics.median(seconds),
    }, {"by size": {side: {"objects": len(by_side[side]), "mean_iou": statistics.mean(by_side[side])}
                    for side in sorted_sides(by_side)}}  # fmt: skip


def sorted_sides(found: Sequence[str] | dict[str, Any]) -> list[str]:
    return [side for side in judging.SIDE_CLASSES if side in found]


def automatic(backend: Backend, tiles: Sequence[Tile], *, all_scores: bool = False) -> tuple[Json, Json]:
    """Figures of pre-labels, what went wrong by size, and whether their scores are right."""
    found, seconds, task_scores = [], [], []
    for tile in tiles:
        (pre_labels, task_score), elapsed = judging.timed(lambda tile=tile: backend.scored_pre_labels(tile))
        found.append(judging.matched(tile, pre_labels))
        seconds.append(elapsed)
        task_scores.append(task_score)
    figures = {"min_score": backend.min_score, **judging.auto_figures(found)}
    figures["seconds_per_tile"] = statistics.median(seconds)
    objects: dict[str, Counter[str]] = defaultdict(Counter)
    polygons: dict[str, Counter[str]] = defaultdict(Counter)
    for one in found:
        object_fates, pre_label_fates = one.fates()
        for area, fate in zip(one.overlaps.true_area, object_fates, strict=True):
            objects[judging.side_class(area)][fate] += 1
        for area, fate in zip(one.overlaps.predicted_area, pre_label_fates, strict=True):
            polygons[judging.side_class(area)][fate] += 1
    details: Json = {
        "objects by size": table(objects, OBJECT_FATES),
        "polygons by size": table(polygons, PREDICTION_FATES),
        "order of tasks": {"by score": judging.ordering(list(zip(found, task_scores, strict=True)))},
    }
    if all_scores:
        found = [judging.matched(tile, backend.pre_labels(tile, min_score=0.0)) for tile in tiles]
        details["by least score"] = {
            str(least): judging.auto_figures([at_least(one, least) for one in found]) for least in LEAST_SCORES
        }
    details["reliability"] = asdict(judging.reliability(found))
    return figures, details


def table(counts: dict[str, Counter[str]], columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts by size, and their sum."""
    rows = {side: {column: counts[side][column] for column in columns} for side in sorted_sides(counts)}
    total = sum(counts.values(), Counter())
    return {**rows, "all": {column: total[column] for column in columns}}


def at_least(one: judging.Matched, least: float) -> judging.Matched:
    """The same tile with the pre-labels of that score."""
    return judging.matched(one.tile, [p for p in one.pre_labels if p.score is None or p.score >= least])


def printed(about: Json, figures: Json, details: Json) -> Json:
    """Print a line of figures and the tables below it; the whole as a record."""
    print(json.dumps({**about, **judging.rounded(figures)}), flush=True)
    for name, rows in details.items():
        if name == "reliability":
            print(f"    expected calibration error {rows['error']:.3f}")
            rows = {
                f"{number / 10:.1f}-{(number + 1) / 10:.1f}": {"polygons": count, "mean score": score, "right": share}
                for number, (count, score, share) in enumerate(
                    zip(rows["counts"], rows["scores"], rows["shares"], strict=True)
                )
                if count
            }
        if name == "by least score":
            keys = ("polygons", "precision", "recall", "F1@0.5")
            rows = {least: {key: row[key] for key in keys} for least, row in rows.items()}
        print_table(name, rows)
    return {**about, **figures, **details}


def print_table(name: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values()), {}))
    print(f"    {name:<16} " + " ".join(f"{column:>12}" for column in columns))
    for row, values in rows.items():
        cells = [f"{value:>12.3f}" if isinstance(value, float) else f"{value:>12}" for value in values.values()]
        print(f"    {row:<16} " + " ".join(cells), flush=True)


class GrabCut:
    """OpenCV's GrabCut: round each click on the object a likely disk and a sure spot, or what lies in the box."""

    def clicked(self, tile: Tile, clicks: Sequence[Click]) -> Mask:
        mask = np.full(tile.image_hw, cv2.GC_PR_BGD, np.uint8)
        for click in clicks:
            if click.is_on:
                cv2.circle(mask, (click.column, click.row), 24, cv2.GC_PR_FGD, -1)
        for click in clicks:
            cv2.circle(mask, (click.column, click.row), 4, cv2.GC_FGD if click.is_on else cv2.GC_BGD, -1)
        found = self._cut(tile, mask, None, cv2.GC_INIT_WITH_MASK)
        _, parts = cv2.connectedComponents(found.astype(np.uint8))
        hit = {parts[click.row, click.column] for click in clicks if click.is_on} - {0}
        return np.isin(parts, list(hit)) if hit else found

    def boxed(self, tile: Tile, box_xyxy: tuple[float, float, float, float]) -> Mask:
        x0, y0, x1, y1 = (round(value) for value in box_xyxy)
        mask = np.full(tile.image_hw, cv2.GC_PR_BGD, np.uint8)
        return self._cut(tile, mask, (x0, y0, max(x1 - x0, 2), max(y1 - y0, 2)), cv2.GC_INIT_WITH_RECT)

    def _cut(self, tile: Tile, mask: np.ndarray, box: tuple[int, int, int, int] | None, how: int) -> Mask:
        try:
            cv2.grabCut(cv2.imread(str(tile.image)), mask, box, np.zeros((1, 65)), np.zeros((1, 65)), 4, how)
        except cv2.error:
            return np.zeros(mask.shape, bool)
        return np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD))


if __name__ == "__main__":
    main()
