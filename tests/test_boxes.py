"""A first click in the last box: on a part that its answer left out, or on a neighbour that happens to lie there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from shapely import Polygon, box

from backend.boxes import LastBoxes
from backend.segmenter import Embedding, Masks, Prompts
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from tests.fakes import BrightSegmenter
from tests.test_serving import AROUND_BOTH, PROJECT, TWO, asked, click, image_task, iou, outlines, rectangle, results

SIDE = 128


class LargestInBox(BrightSegmenter):
    """Takes a box alone for its largest bright patch, and of that the left part."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def segment(self, embedding: Embedding, prompts: Prompts) -> Masks:
        masks = super().segment(embedding, prompts)
        if prompts.box_xyxy is None or len(prompts.points_xy):
            return masks
        _, parts, stats, _ = cv2.connectedComponentsWithStats((masks.probabilities[0] > 0.5).astype(np.uint8))
        best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        inside = parts == best
        inside[:, stats[best, cv2.CC_STAT_LEFT] + int(self.share * stats[best, cv2.CC_STAT_WIDTH]) :] = False
        return Masks(np.where(inside, masks.probabilities, 0), masks.scores)


def answers(folder: Path, segmenter: BrightSegmenter, task: Any, *prompts: list[Any]) -> list[tuple[str, Polygon]]:
    """Id of the first region and all outlines as one, for each of the requests."""
    settings = Settings(data_dir=folder)
    service = Service(settings, segmenter=segmenter)
    try:
        client = create_app(settings, service).test_client()
        service.predictor.wait(20)
        items = [results(client.post("/predict", json=asked(task, prompts=each)))[0] for each in prompts]
        return [(item["result"][0]["id"], shapely.union_all(outlines(item, SIDE))) for item in items]
    finally:
        service.close()


def test_a_first_click_on_a_neighbour_in_the_box_begins_a_new_object(tmp_path: Path):
    on_second = click(64, 31)
    further = [on_second, click(60, 31, id="k2")]
    first, second, more = answers(
        tmp_path, LargestInBox(), image_task(1, *TWO), [AROUND_BOTH], [on_second], further
    )  # fmt: skip
    assert iou(first[1], box(*TWO[0])) > 0.95
    assert iou(second[1], box(*TWO[1])) > 0.95
    assert iou(more[1], box(*TWO[1])) > 0.95
    assert first[0] != second[0] == more[0]


@pytest.mark.parametrize(("share", "x"), [(0.5, 70), (0.5, 45), (0.5, 48), (1.0, 40)])
def test_a_first_click_on_the_same_object_refines_it(tmp_path: Path, share: float, x: float):
    whole = (20, 20, 100, 60)
    prompts = [rectangle(14, 14, 66, 36)], [click(x, 31)]
    first, refined = answers(tmp_path, LargestInBox(share), image_task(1, whole), *prompts)
    assert first[1].area == pytest.approx(share * 3200, rel=0.1)
    assert iou(refined[1], box(*whole)) > 0.95
    assert first[0] == refined[0]


def test_once_refined_a_click_on_a_neighbour_adds_it(tmp_path: Path):
    clicks = [click(30, 31)], [click(30, 31), click(64, 31, id="k2")]
    first, _, both = answers(tmp_path, LargestInBox(), image_task(1, *TWO), [AROUND_BOTH], *clicks)
    assert both[1].area == pytest.approx(1600 + 1440, rel=0.1)
    assert first[0] == both[0]


@pytest.mark.parametrize("spoiled", ["{", "[]", '{"user": "", "box": 5}', '{"user": "", "answer": "0103"}'])
def test_a_damaged_file_is_as_if_there_were_no_box(tmp_path: Path, spoiled: str):
    last = LastBoxes(tmp_path)
    last.remember(PROJECT, 1, AROUND_BOTH)
    (path,) = tmp_path.iterdir()
    kept = last.with_box(PROJECT, 1, [click(30, 30)])
    assert kept is not None
    assert kept.prompt["value"] == AROUND_BOTH["value"]
    is_cut = spoiled.endswith('3"}')
    path.write_text(json.dumps({**json.loads(path.read_text()), **json.loads(spoiled)}) if is_cut else spoiled)
    last.answered(PROJECT, 1, box(0, 0, 1, 1)) if not is_cut else None
    assert last.with_box(PROJECT, 1, [click(30, 30)]) is None
