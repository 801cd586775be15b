"""What annotators draw and edit comes back whole, through the JSON that Label Studio saves, or is counted."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from shapely import Point, Polygon, box, union_all

from backend import labelstudio
from backend.errors import BadRequest
from backend.labelstudio import chosen_annotations, parse_config, read_annotation, results_of
from backend.tile import Region, Tile
from tests.test_labelstudio import ONE_TAG, rle_of

TILE = Tile((640, 512))
CONFIG = parse_config(
    ONE_TAG.format(labels='<Label value="building"/><Label value="water"/>').replace(
        "</View>", '<KeyPointLabels name="trees" toName="i"><Label value="tree"/></KeyPointLabels></View>'
    )
)
COURTYARD = box(100, 100, 300, 260).difference(box(160, 140, 240, 220))
LAKE = Point(400, 250).buffer(120).difference(union_all([Point(370, 240).buffer(20), box(420, 260, 460, 300)]))


def sent_and_saved(*polygons: Polygon) -> list[dict[str, Any]]:
    regions = [Region(polygon, "building", object_id="o" if len(polygons) > 1 else "") for polygon in polygons]
    saved: list[dict[str, Any]] = json.loads(json.dumps(results_of(regions, CONFIG.tags[0], TILE, task_id=1)))
    return saved


def read(results: list[Any]) -> labelstudio.AnnotationRead:
    return read_annotation({"result": results}, TILE, config=CONFIG)


def moved_point(points: list[list[float]]) -> list[list[float]]:
    at = next(i for i, point in enumerate(points) if points.count(point) == 1)
    return [[x + 0.05, y - 0.05] if i == at else [x, y] for i, (x, y) in enumerate(points)]


def pulled_bridge(points: list[list[float]]) -> list[list[float]]:
    at = next(i for i, point in enumerate(points) if points.count(point) > 1)
    return [[x + 0.08, y] if i == at else [x, y] for i, (x, y) in enumerate(points)]


EDITS: dict[str, Any] = {
    "nothing": lambda points: points,
    "closed": lambda points: [*points, points[0]],
    "repeated": lambda points: [point for point in points for _ in range(2)],
    "turned round": lambda points: points[::-1],
    "begun elsewhere": lambda points: points[5:] + points[:5],
    "a point moved": moved_point,
    "a bridge pulled open": pulled_bridge,
    "a point put on an edge": lambda points: [
        points[0], [(points[0][k] + points[1][k]) / 2 for k in range(2)], *points[1:],
    ],
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("polygon", [COURTYARD, LAKE], ids=["courtyard", "lake with two islands"])
def test_holes_come_back_after_what_annotators_do_to_the_ring(polygon: Polygon, edit: str) -> None:
    (result,) = sent_and_saved(polygon)
    result["value"]["points"] = EDITS[edit](result["value"]["points"])
    found = read([result])
    (region,) = found.regions
    assert len(region.polygon.interiors) == len(polygon.interiors)
    assert region.polygon.is_valid
    assert region.polygon.symmetric_difference(polygon).area < 0.01 * polygon.area
    assert sum(found.dropped.values()) == (1 if "bridge" in edit else 0)


def test_a_building_in_two_parts_comes_back_as_one_object_in_two_parts() -> None:
    found = read(sent_and_saved(box(10, 10, 60, 60), box(70, 10, 90, 60)))
    assert [region.object_id for region in found.regions] == ["o", "o"]
    assert sum(region.polygon.area for region in found.regions) == pytest.approx(3500)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[-10, -10], [50, -10], [50, 50], [-10, 50]], box(0, 0, 320, 256)),
        ([[10, 10], [10, 10], [20, 10], [20, 20], [20, 20], [10, 20]], box(64, 51.2, 128, 102.4)),
        ([[50, 50], [150, 50], [150, 150], [50, 150]], box(320, 256, 640, 512)),
        ([[10, 10], [20, 10], [20, 20], [10, 20], [10, 10]], box(64, 51.2, 128, 102.4)),
    ],
)
def test_points_outside_and_points_twice_leave_what_lies_inside(points: list[list[float]], expected: Polygon) -> None:
    result = {"id": "x", "type": "polygonlabels", "value": {"points": points, "polygonlabels": ["building"]}}
    (region,) = read([result]).regions
    assert region.polygon.symmetric_difference(expected).area < 1e-6


# --- Masks ---


def data_url(mask: NDArray[np.bool_], mode: str = "RGBA") -> str:
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[..., 3] = mask * 255
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def bitmask_result(url: Any, kind: str = "bitmasklabels") -> dict[str, Any]:
    return {"id": "m", "type": kind, "to_name": "i", "value": {"imageDataURL": url, "bitmasklabels": ["water"]}}


def ring_mask() -> NDArray[np.bool_]:
    mask = np.zeros((256, 320), bool)
    mask[40:120, 30:130] = True
    mask[60:90, 50:100] = False
    return mask


def test_a_bitmask_becomes_polygons_with_holes_on_the_tiles_own_size() -> None:
    found = read([bitmask_result(data_url(ring_mask()))])
    (region,) = found.regions
    assert region.label == "water"
    assert region.polygon.symmetric_difference(box(60, 80, 260, 240).difference(box(100, 120, 200, 180))).area < 20
    assert not found.dropped


def test_every_pixel_of_a_bitmask_that_shows_counts() -> None:
    faint = np.zeros((4, 4, 4), np.uint8)
    faint[1:3, 1:3, 3] = 1
    file = io.BytesIO()
    Image.fromarray(faint).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert labelstudio.bitmask(url).sum() == 4
    assert labelstudio.bitmask(data_url(ring_mask(), "RGB")).all()


def huge_png() -> str:
    packed = bytearray(base64.b64decode(data_url(ring_mask()).split(",")[1]))
    packed[16:24] = (60_000).to_bytes(4) * 2
    return "data:image/png;base64," + base64.b64encode(packed).decode()


@pytest.mark.parametrize(
    "url",
    [
        None, 7, "", "http://host/mask.png", "data:image/png;base64,", "data:image/png;base64,????",
        "data:image/jpeg;base64,AAAA", data_url(ring_mask())[:-200], huge_png(),
        "data:image/png;base64," + "A" * 10_000_001,
    ],
    ids=range(10),
)  # fmt: skip
def test_a_bitmask_that_cannot_be_read_is_counted_and_costs_nothing_else(url: Any) -> None:
    with pytest.raises(BadRequest):
        labelstudio.bitmask(url)
    found = read([bitmask_result(url), *sent_and_saved(COURTYARD)])
    assert len(found.regions) == 1
    assert found.dropped == {labelstudio.UNREADABLE: 1}


@settings(deadline=None)
@given(st.integers(8, 200), st.binary(max_size=30))
def test_a_damaged_png_is_a_mask_or_refused(at: int, patch: bytes) -> None:
    packed = base64.b64decode(data_url(ring_mask()[:60, :60]).split(",")[1])
    damaged = packed[:at] + patch + packed[at + len(patch) :]
    try:
        mask = labelstudio.bitmask("data:image/png;base64," + base64.b64encode(damaged).decode())
    except BadRequest:
        return
    assert mask.dtype == bool
    assert mask.ndim == 2


def test_what_was_painted_is_read_whole_however_small_and_long() -> None:
    mask = np.zeros((128, 160), bool)
    mask[2, 3] = True
    mask[10:120:2, 20:60] = mask[10:119, 20:22] = True
    value = {"rle": rle_of(mask, run_bits=8), "brushlabels": ["water"]}
    result = {"id": "b", "type": "brushlabels", "original_width": 160, "original_height": 128, "value": value}
    found = read([result])
    assert len(found.regions) == 2
    assert {region.object_id for region in found.regions} == {"b"}
    assert sum(region.polygon.area for region in found.regions) == pytest.approx(16 * mask.sum(), rel=0.005)


# --- Points ---


def keypoint(from_name: str, x: Any, y: Any, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": 0.5, "keypointlabels": ["tree"]}
    return {"id": "k", "type": "keypointlabels", "from_name": from_name, "to_name": "i", "value": value, **more}


def test_keypoints_are_points_where_they_are_no_prompts() -> None:
    found = read([keypoint("trees", 25, 50, score=0.5), keypoint("k", 1, 1), keypoint("trees", 2, 2, is_positive=True)])
    assert found.points == (labelstudio.LabelledPoint((160.0, 256.0), "tree", 0.5, "k"),)
    assert found.regions == []
    assert found.dropped == {labelstudio.PROMPT: 2}


def test_without_a_config_labelled_keypoints_are_points() -> None:
    bare = keypoint("trees", 5, 5, type="keypoint", value={"x": 5, "y": 5})
    found = read_annotation({"result": [keypoint("trees", 5, 5), bare]}, TILE)
    assert len(found.points) == 1
    assert found.dropped == {labelstudio.PROMPT: 1}


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (101, 5, labelstudio.OUTSIDE),
        (5, -0.1, labelstudio.OUTSIDE),
        (None, 5, labelstudio.UNREADABLE),
        ("5", 5, labelstudio.UNREADABLE),
        (float("nan"), 5, labelstudio.UNREADABLE),
    ],
)
def test_a_keypoint_that_is_nowhere_is_counted(x: Any, y: Any, reason: str) -> None:
    found = read([keypoint("trees", x, y), keypoint("trees", 100, 0)])
    assert [point.point_xy for point in found.points] == [(640.0, 0.0)]
    assert found.dropped == {reason: 1}


# --- Several annotations ---


def annotation(number: int, day: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "updated_at": f"2026-05-{day:02}T10:00:00Z", "result": [], **more}


TASK = {
    "annotations": [
        annotation(1, 3),
        annotation(2, 1, ground_truth=True),
        annotation(3, 2, ground_truth=True),
        annotation(4, 9, was_cancelled=True),
    ]
}


@pytest.mark.parametrize(("which", "ids"), [("ground_truth", [3]), ("latest", [1]), ("all", [2, 3, 1])])
def test_which_annotations_count_can_be_chosen(which: str, ids: list[int]) -> None:
    assert [item["id"] for item in chosen_annotations(TASK, which=which)] == ids
    assert chosen_annotations({"annotations": None}, which=which) == []


def test_another_choice_is_refused() -> None:
    with pytest.raises(BadRequest, match="one of ground_truth, latest, all, got 'best'"):
        chosen_annotations(TASK, which="best")
