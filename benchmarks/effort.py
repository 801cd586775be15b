"""How many clicks it takes to outline every object of labelled tiles, by hand and with the backend's help.

    python benchmarks/effort.py DATA [--match 19_386694 19_386695] [--limit 16] [--weights FILE] [--json OUT]

THE RULE. Every object of the tiles, however small or cut by the tile's edge, shall reach an IoU of .85 with the truth.

by hand      A click for each vertex of the truth and one to close each ring. Outlining by hand always succeeds.
smart click  Each click counts 1, and accepting the result 1. An object that is not there after --most-clicks is given
             up: the clicks are lost, 1 more discards the result, and it is outlined by hand.
box          Dragging it counts 2, accepting the result 1. Where it fails, discarding counts 1, then by hand.
pre-labels   Looking at a tile's pre-labels and accepting those that are good costs 1 click a tile. One that is good
             (IoU .85, one to one) costs its object nothing. Every other one is deleted, with 2 clicks: select, delete.
             The objects that are left are outlined by clicks, by boxes, or by hand.

Zooming, panning, choosing the label, waiting and looking are not counted, nor is moving single vertices offered: a
pre-label that is nearly good is deleted like any other. The clicks are those of a simulated annotator who knows the
truth: the first at the object's deepest point, each further one at the deepest point of the largest error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend.compact import CompactSegmenter
from benchmarks import _judging as judging
from benchmarks._judging import Backend, Target, Tile

CLICK_LIMITS = (1, 2, 3, 4, 5, 6)
LEAST_SCORES = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Object:
    """What outlining one object takes, each way."""

    by_hand: int
    """Clicks."""

    smart_clicks: int | None
    """Clicks to the IoU that is asked for, None where as many as were tried do not reach it."""

    is_boxed: bool
    """A box alone reaches it."""

    def with_clicks(self, most: int) -> int:
        if self.smart_clicks is not None and self.smart_clicks <= most:
            return self.smart_clicks + 1
        return most + 1 + self.by_hand

    def with_box(self) -> int:
        return 2 + 1 + (0 if self.is_boxed else self.by_hand)


@dataclass(frozen=True)
class Worked:
    """A tile's objects, and what its pre-labels leave to do."""

    image: str
    objects: tuple[Object, ...]
    pre_labels: tuple[tuple[float, int | None], ...]
    """Score of each pre-label of any score, and the number of the object that it is good for."""

    def deleted(self, min_score: float) -> int:
        """Pre-labels that are served and not good."""
        return sum(score >= min_score and number is None for score, number in self.pre_labels)

    def left(self, min_score: float) -> list[Object]:
        """The objects that no pre-label is good for."""
        good = {number for score, number in self.pre_labels if score >= min_score}
        return [one for number, one in enumerate(self.objects) if number not in good]


def main() -> None:
    parser = judging.parser(__doc__, limit=16, limited="tiles")
    judging.add_figures(parser)
    parser.add_argument("--most-clicks", type=int, default=5, help="clicks on one object before it is given up")
    parser.add_argument("--iou", type=float, default=0.85, help="the IoU that every object shall reach")
    arguments = parser.parse_args()
    if arguments.data is None:
        print("effort: not measured; it needs a folder of labelled tiles (see --help)")
        return
    tiles = judging.labelled_tiles(arguments.data, arguments.match)[: arguments.limit]
    if not tiles:
        parser.error(f"no labelled images in {arguments.data}")
    print(__doc__[__doc__.index("THE RULE.") :])
    segmenter = CompactSegmenter.load(arguments.weights)
    done = []
    with Backend(arguments.data, arguments.label, segmenter=segmenter, min_score=arguments.min_score) as backend:
        for tile in tiles:
            done.append(worked(backend, tile, max(*CLICK_LIMITS, arguments.most_clicks), arguments.iou))
            print(f"    {tile.image.name}: {len(done[-1].objects)} objects", file=sys.stderr, flush=True)
        about = {"data": arguments.data.name, "match": " ".join(arguments.match), "version": backend.version}
    most, least = arguments.most_clicks, backend.min_score
    figures = {**about, "iou": arguments.iou, "min_score": least, **summary(done, most, least)}
    print(json.dumps(judging.rounded(figures)))
    costs = ways(done, most, least)
    for way, clicks in costs.items():
        print(f"    {way:<28} {clicks:>7} clicks   {saved(clicks, costs['by hand']):>7.1%} saved")
    print("    share saved, by how many clicks are tried before an object is given up:")
    for tried in CLICK_LIMITS:
        print(f"    {tried:>5}  " + in_words(ways(done, tried, least), "smart clicks", "pre-labels, smart clicks"))
    print("    share saved, by least score of a pre-label:")
    for score in LEAST_SCORES:
        found = ways(done, most, score)
        print(
            f"    {score:>5}  "
            + in_words(found, "pre-labels, by hand", "pre-labels, smart clicks", "pre-labels, boxes")
        )
    if arguments.json:
        content = {**figures, "clicks": costs, "tiles": [asdict(one) for one in done]}
        arguments.json.write_text(json.dumps(judging.rounded(content), indent=1) + "\n")


def worked(backend: Backend, tile: Tile, most: int, iou: float) -> Worked:
    """Ask for pre-labels, and for each object by clicks and by a box."""
    found = judging.matched(tile, backend.pre_labels(tile, min_score=0.0), least=iou, truths=tile.truths)
    good = {i: j for i, j, _ in found.pairs}
    # One without a score is served at any.
    scores = [1.0 if pre_label.score is None else pre_label.score for pre_label in found.pre_labels]
    targets = [Target(tile, truth) for truth in tile.truths]
    objects = []
    for target, box_xyxy in zip(targets, judging.jittered_boxes(targets), strict=True):
        series = judging.click_through(backend, target, most=most, enough=iou)
        reached = series.ious[-1] >= iou if series.ious else False
        outlined = backend.boxed(tile, box_xyxy)
        objects.append(
            Object(
                by_hand=target.truth.clicks_by_hand,
                smart_clicks=len(series.ious) if reached else None,
                is_boxed=judging.iou(outlined, target.truth.mask(tile.image_hw)) >= iou,
            )
        )
    return Worked(tile.image.name, tuple(objects), tuple((score, good.get(i)) for i, score in enumerate(scores)))


def ways(done: Sequence[Worked], most: int, min_score: float) -> dict[str, int]:
    """Clicks that the tiles take, for each way to work."""
    objects = [one for tile in done for one in tile.objects]
    left = [one for tile in done for one in tile.left(min_score)]
    review = sum(1 + 2 * tile.deleted(min_score) for tile in done)
    return {
        "by hand": sum(one.by_hand for one in objects),
        "smart clicks": sum(one.with_clicks(most) for one in objects),
        "boxes": sum(one.with_box() for one in objects),
        "pre-labels, by hand": review + sum(one.by_hand for one in left),
        "pre-labels, smart clicks": review + sum(one.with_clicks(most) for one in left),
        "pre-labels, boxes": review + sum(one.with_box() for one in left),
    }


def in_words(costs: Mapping[str, int], *ways: str) -> str:
    return "   ".join(f"{way} {saved(costs[way], costs['by hand']):.1%}" for way in ways)


def saved(clicks: int, by_hand: int) -> float:
    return 1 - clicks / by_hand if by_hand else 0.0


def summary(done: Sequence[Worked], most: int, min_score: float) -> dict[str, Any]:
    """How many objects came out which way, and the shares of clicks saved."""
    objects = [one for tile in done for one in tile.objects]
    left = [one for tile in done for one in tile.left(min_score)]
    clicked = [one for one in left if one.smart_clicks is not None and one.smart_clicks <= most]
    costs = ways(done, most, min_score)
    return {
        "tiles": len(done),
        "objects": len(objects),
        "most_clicks": most,
        "pre_labels_accepted": len(objects) - len(left),
        "pre_labels_deleted": sum(tile.deleted(min_score) for tile in done),
        "outlined_by_clicks": len(clicked),
        "redrawn_by_hand": len(left) - len(clicked),
        "clicks_by_hand": costs["by hand"],
        **{f"saved: {way}": saved(clicks, costs["by hand"]) for way, clicks in costs.items() if way != "by hand"},
    }


if __name__ == "__main__":
    main()
