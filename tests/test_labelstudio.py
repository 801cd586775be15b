"""Label Studio's JSON both ways: recorded requests, round trips, and the SDK's validator as the judge."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shapely import Polygon, box

from backend import labelstudio
from backend.errors import BadConfig, BadPrompt, BadRequest, BadTile
from backend.labelstudio import parse_config, read_annotation, read_prompts, results_of
from backend.tile import Region, Tile
from tests import golden_requests
from tests.sdk_judge import SdkJudge, sdk_judge

RECORDED = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "label-studio-1.23.2"

TWO_IMAGES = """
<View>
  <Image name="before" value="$old.url"/><Image name="after" value="$new"/>
  <PolygonLabels name="houses" toName="before,after" model_score_threshold="0.35">
    <View><Label value="Gebäude" predicted_values="building, roof"/></View><Label value="Roads" alias="road_net"/>
  </PolygonLabels>
  <PolygonLabels name="lakes" toName="after" model_skip="true"><Label value="lake"/></PolygonLabels>
  <KeyPoint name="old_click" toName="before" smart="true"/>
  <KeyPointLabels name="new_click" toName="after" smartOnly="true"><Label value="lake"/></KeyPointLabels>
  <RectangleLabels name="plain_box" toName="after"><Label value="lake"/></RectangleLabels>
</View>
"""
LINKED = '<View><Image name="i" {image}/><PolygonLabels name="p" toName="{to}" {more}>{labels}</PolygonLabels></View>'
ONE_TAG = (
    '<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i">{labels}</PolygonLabels>'
    '<KeyPoint name="k" toName="i" smart="true"/><Rectangle name="r" toName="i" smart="true"/></View>'
)


def linked(image: str = 'value="$x"', to: str = "i", more: str = "", labels: str = '<Label value="a"/>') -> str:
    return LINKED.format(image=image, to=to, more=more, labels=labels)


def config_with(*labels: str) -> labelstudio.LabelConfig:
    return parse_config(ONE_TAG.format(labels="".join(f'<Label value="{label}"/>' for label in labels)))


CONFIG = config_with("building", "road", "water")
TAG = CONFIG.tags[0]


@pytest.fixture(scope="module")
def judge() -> Iterator[SdkJudge]:
    with sdk_judge() as started:
        yield started


def body(name: str) -> dict[str, Any]:
    return golden_requests.load(name)["body"]


def annotation_of(case: str) -> dict[str, Any]:
    return golden_requests.load(f"task_{case}")["annotations"][0]


# --- Label config ---


def test_config_lists_a_tag_for_each_image_and_the_smart_tools() -> None:
    config = parse_config(TWO_IMAGES)
    assert [(tag.from_name, tag.to_name, tag.image_key) for tag in config.tags] == [
        ("houses", "before", "old.url"),
        ("houses", "after", "new"),
        ("lakes", "after", "new"),
    ]
    assert [label.value for label in config.tags[0].labels] == ["Gebäude", "road_net"]
    assert config.tags[0].model_score_threshold == 0.35
    assert [tag.from_name for tag in config.wanted_tags] == ["houses", "houses"]
    assert [(prompt.from_name, prompt.kind, prompt.smart_only) for prompt in config.prompts] == [
        ("old_click", "keypoint", False),
        ("new_click", "keypoint", True),
    ]


def test_config_hash_follows_the_text() -> None:
    assert config_with("a").hash == config_with("a").hash != config_with("b").hash


@pytest.mark.parametrize(
    ("xml", "sentence"),
    [
        ("", "no label config"),
        (None, "no label config"),
        ("<View>", "not XML"),
        ("<View>\n<a></b></View>", "not XML: mismatched tag: line 2"),
        ("\ud800", "not plain XML"),
        ('<!DOCTYPE v [<!ENTITY a "b">]><View>&a;</View>', "not plain XML"),
        ("<View/>", "No PolygonLabels tag linked to an Image tag"),
        (linked(to="j"), "No PolygonLabels tag linked to an Image tag"),
        (linked(labels="").replace("PolygonLabels", "Polygon"), "use PolygonLabels"),
        (linked(more='value="$labels"', labels=""), "p has no Label"),
        (linked(image='valueList="$x"'), "valueList"),
        (linked(image='value="x.png"'), 'value such as "$image"'),
        (linked(more='model_score_threshold="high"'), "from 0 to 1"),
        (linked(more='model_score_threshold="1.5"'), "from 0 to 1"),
        (linked(image='value="漢\n字' + "é" * 300 + '"'), "Image i needs"),
        (linked(labels="x" * 200_000), "the limit is 200000"),
    ],
)
def test_a_bad_config_is_told_in_one_short_latin1_line(xml: Any, sentence: str) -> None:
    with pytest.raises(BadConfig) as raised:
        parse_config(xml)
    reason = str(raised.value)
    assert sentence in reason
    assert len(reason.encode("latin-1")) < 120
    assert reason.isprintable()


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=200) | st.text(alphabet='<>/="PolygonLabels Image name toName value$', max_size=200))
def test_no_text_makes_the_config_reader_fail_in_another_way(xml: str) -> None:
    with pytest.raises(BadConfig) as raised:
        parse_config(xml)
    assert len(str(raised.value).encode("latin-1")) < 120


@pytest.mark.parametrize("name", [*golden_requests.names("predict_"), *golden_requests.names("interactive_")])
def test_recorded_configs_are_read(name: str) -> None:
    config = parse_config(body(name)["label_config"])
    assert [label.value for label in config.tags[0].labels] == ["building", "road", "water"]
    assert {prompt.kind for prompt in config.prompts} == {"keypoint", "rectangle"}


def test_classes_go_to_labels_by_predicted_values_then_name_then_synonym() -> None:
    labels = (
        '<Label value="House" predicted_values="building, hut"/><Label value="Buildings"/><Label value="Streets"/>'
        '<Label value="greenery"/><Label value="parcel"/><Label value="volcano"/>'
    )
    tag = parse_config(ONE_TAG.format(labels=labels)).tags[0]
    known = ["building", "road", "water", "vegetation", "field", "hut"]
    assert tag.match(known) == {
        "building": "House", "road": "Streets", "vegetation": "greenery", "field": "parcel", "hut": "House",
    }  # fmt: skip
    assert tag.unmatched(known) == ("Buildings", "volcano")


@pytest.mark.parametrize(
    ("label", "known", "found"),
    [
        ("BUILDING", "building", True),
        ("Buildings", "building", True),
        ("bodies_of_water", "bodies of water", True),
        ("parcels", "parcel", True),
        ("bushes", "shrub", True),
        ("trees", "vegetation", False),
        ("Water body", "water", True),
        ("grass", "glass", False),
        ("s", "building", False),
        ("###", "***", False),
    ],
)
def test_names_match_in_any_case_and_number(label: str, known: str, found: bool) -> None:
    assert config_with(label).tags[0].match([known]) == ({known: label} if found else {})


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["house", "roads", "Water", "greenery", "crop", "lake", "zoo"]), min_size=1, unique=True),
    st.lists(st.sampled_from(["building", "road", "water", "vegetation", "field"]), unique=True),
)
def test_each_label_is_either_matched_or_reported(labels: list[str], known: list[str]) -> None:
    tag = config_with(*labels).tags[0]
    matched = tag.match(known)
    assert set(matched) <= set(known)
    assert {*matched.values()} | {*tag.unmatched(known)} == set(labels)
    assert not {*matched.values()} & {*tag.unmatched(known)}


# --- Task ---


def test_the_image_is_found_under_plain_nested_and_composed_keys() -> None:
    before, after, _ = parse_config(TWO_IMAGES).tags
    task = {"id": 5, "data": {"old": {"url": "http://a/1.png"}, "new": " /data/upload/2.png "}}
    assert labelstudio.image_of(task, before) == "http://a/1.png"
    assert labelstudio.image_of(task, after) == "/data/upload/2.png"
    assert labelstudio.image_of({"data": {"old.url": "x"}}, before) == "x"
    assert (
        labelstudio.image_of({"data": {"old": "x"}}, replace(before, image_value="http://h/$old?$old"))
        == "http://h/x?x"
    )


@pytest.mark.parametrize("data", [None, [], {}, {"image": None}, {"image": ""}, {"image": 7}, {"image": ["a.png"]}])
def test_a_task_without_image_is_named(data: Any) -> None:
    with pytest.raises(BadRequest, match="task 31: data"):
        labelstudio.image_of({"id": 31, "data": data}, TAG)


def test_a_task_gives_its_tile_or_a_plain_one() -> None:
    record = Tile((512, 512), "EPSG:3857", Tile.from_xyz(3, 1, 1).transform).to_record()
    assert labelstudio.tile_of({"data": {"tile": record}}, "", (256, 256)).has_place
    assert labelstudio.tile_of({"data": {}}, "http://h/3/1/1.png", (256, 256)) == Tile.from_xyz(3, 1, 1)
    assert labelstudio.tile_of({"data": {"image": "a.png"}}, "a.png", (64, 48)) == Tile((64, 48))


@pytest.mark.parametrize(
    "record",
    [
        3,
        {},
        {"size": ["a", "b"]},
        {"size": 5},
        {"size": [math.inf, 5]},
        {"window": [0, 0, 5, 5], "gsd_m": "fine"},
        {"window": [0, 0, 5, 5], "crs": "EPSG:3857", "transform": [10**400, 0, 0, 0, 1, 0]},
    ],
)
def test_a_tile_record_that_cannot_be_read_is_refused(record: Any) -> None:
    with pytest.raises(BadTile):
        labelstudio.tile_of({"data": {"tile": record}}, "a.png", (64, 48))


# --- Prompts ---


def keypoint(x: Any, y: Any, **more: Any) -> dict[str, Any]:
    return {"type": "keypoint", "to_name": "i", "from_name": "k", "value": {"x": x, "y": y, "labels": []}, **more}


def rectangle(x: Any, y: Any, width: Any, height: Any, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, **more}
    return {"type": "rectangle", "to_name": "i", "from_name": "r", "value": value}


def asked(*items: dict[str, Any], size: tuple[int, int] = (200, 100)) -> labelstudio.PromptRequest:
    request = read_prompts({"result": list(items)}, CONFIG, size)
    assert request is not None
    return request


@pytest.mark.parametrize("name", [*golden_requests.names("predict_"), "interactive_null_context"])
def test_recorded_batch_requests_have_no_prompts(name: str) -> None:
    request = body(name)
    assert read_prompts(request["params"]["context"], parse_config(request["label_config"]), (640, 512)) is None


@pytest.mark.parametrize(
    ("name", "is_foreground", "label", "has_box"),
    [
        ("interactive_keypoint_positive", [True], "building", False),
        ("interactive_keypoint_pos_neg", [True, False], "building", False),
        ("interactive_keypoint_3_points", [True, False, True], "building", False),
        ("interactive_keypoint_other_label", [True], "water", False),
        ("interactive_keypoint_dragged", [True], "building", False),
        ("interactive_keypoint_with_draft", [True, True], "building", False),
        ("interactive_rectangle", [], "building", True),
        ("interactive_unlabelled_keypoint", [True], None, False),
        ("interactive_unlabelled_keypoint_pos_neg", [True, False], None, False),
        ("interactive_unlabelled_rectangle", [], None, True),
        ("interactive_img_http", [True], "building", False),
        ("interactive_img_localfiles", [True], "building", False),
        ("interactive_img_upload", [True], "building", False),
    ],
)
def test_recorded_prompts_are_read_in_pixels_of_the_real_image(
    name: str, is_foreground: list[bool], label: str | None, has_box: bool
) -> None:
    recorded = body(name)
    # Twice the recorded original_width: the image at hand counts.
    request = read_prompts(recorded["params"]["context"], parse_config(recorded["label_config"]), (1280, 1024))
    assert request is not None
    assert request.prompts.is_foreground.tolist() == is_foreground
    assert (request.label, request.prompts.label) == (label, label)
    assert request.tag.from_name == "outline"
    values = [item["value"] for item in recorded["params"]["context"]["result"]]
    if has_box:
        left, top = values[0]["x"] * 12.8, values[0]["y"] * 10.24
        expected = [left, top, left + values[0]["width"] * 12.8, top + values[0]["height"] * 10.24]
        assert request.prompts.box_xyxy == pytest.approx(expected)
    else:
        expected_points = np.array([(value["x"] * 12.8, value["y"] * 10.24) for value in values])
        assert request.prompts.points_xy == pytest.approx(expected_points)
        assert request.prompts.box_xyxy is None


@pytest.mark.parametrize("context", [None, {}, {"annotation_id": 3}])
def test_no_context_is_a_batch_request(context: Any) -> None:
    assert read_prompts(context, CONFIG, (10, 10)) is None


def test_a_deleted_prompt_asks_for_nothing() -> None:
    request = asked()
    assert request.prompts.is_empty
    assert request.tag == TAG


def test_clicks_and_boxes_together() -> None:
    request = asked(keypoint(50, 50), rectangle(10, 20, 30, 40), keypoint(1, 1, is_positive=False))
    assert request.prompts.points_xy.tolist() == [[100, 50], [2, 1]]
    assert request.prompts.is_foreground.tolist() == [True, False]
    assert request.prompts.box_xyxy is not None
    assert request.prompts.box_xyxy.tolist() == [20, 20, 80, 60]


def test_clicks_outside_move_onto_the_nearest_pixel() -> None:
    points = asked(keypoint(-5, 120), keypoint(100, 0)).prompts.points_xy
    assert np.floor(points).tolist() == [[0, 99], [199, 0]]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (rectangle(50, 50, 20, 20, rotation=90), [80, 50, 100, 90]),
        (rectangle(50, 50, -20, -40), [60, 10, 100, 50]),
        (rectangle(90, 90, 50, 50), [180, 90, 200, 100]),
        (rectangle(50, 50, 20, 20, rotation=None), [100, 50, 140, 70]),
        (rectangle(25, 10, 20, 40, rotation=45), [50 - 40 / 2**0.5, 10, 50 + 40 / 2**0.5, 10 + 80 / 2**0.5]),
    ],
)
def test_boxes_are_upright_and_inside(item: dict[str, Any], expected: list[float]) -> None:
    assert asked(item).prompts.box_xyxy == pytest.approx(expected)


def test_the_newest_box_counts() -> None:
    assert asked(rectangle(0, 0, 10, 10), rectangle(50, 50, 10, 10)).prompts.box_xyxy == pytest.approx(
        [100, 50, 120, 60]
    )


@pytest.mark.parametrize(
    "context",
    [
        "x",
        [1],
        {"result": None},
        {"result": {}},
        {"result": ["a"]},
        {"result": [{"type": "polygonlabels", "value": {}}]},
        {"result": [{"type": 3}]},
        {"result": [{"type": "keypoint"}]},
        {"result": [{"type": "keypoint", "value": []}]},
        *({"result": [keypoint(x, 5)]} for x in (None, "5", math.nan, math.inf, True, [5], 1e300)),
        {"result": [keypoint(5, 5, is_positive="no")]},
        {"result": [keypoint(5, 5, image_rotation=90)]},
        {"result": [rectangle(5, 5, 0, 10)]},
        {"result": [rectangle(150, 5, 10, 10)]},
        {"result": [rectangle(5, 5, "10", 10)]},
        {"result": [rectangle(5, 5, 10, 10, rotation="a")]},
        {"result": [{"type": "brush", "value": {"rle": [1, 2]}, "original_width": 4, "original_height": 4}]},
        {"result": [{"type": "brush", "value": {}}]},
    ],
)
def test_prompts_that_cannot_be_read_are_refused(context: Any) -> None:
    with pytest.raises(BadPrompt):
        read_prompts(context, CONFIG, (200, 100))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from(["", "keypoint", "rectangle", "brush", "i"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "value", "x", "y", "width", "height", "to_name", "rle", "original_width", "labels"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(json_values | st.lists(json_values, max_size=3).map(lambda items: {"result": items}))
def test_whatever_stands_in_the_context_is_read_or_refused(context: Any) -> None:
    try:
        request = read_prompts(context, CONFIG, (200, 100))
    except BadPrompt:
        return
    if request is not None and len(request.prompts.points_xy):
        assert (request.prompts.points_xy >= 0).all()
        assert (request.prompts.points_xy < (200, 100)).all()


def test_prompts_of_another_image_are_left_out() -> None:
    config = parse_config(TWO_IMAGES)
    items = [keypoint(10, 10, to_name="before"), keypoint(50, 50, to_name="after")]
    request = read_prompts({"result": items}, config, (100, 100))
    assert request is not None
    assert request.prompts.points_xy.tolist() == [[50, 50]]
    assert (request.tag.from_name, request.tag.to_name) == ("houses", "after")
    assert labelstudio.prompted_tag({"result": items[:1]}, config).to_name == "before"


def test_a_labelled_prompt_goes_to_the_tag_with_that_label() -> None:
    config = parse_config(TWO_IMAGES.replace('model_skip="true"', ""))
    item = {**keypoint(50, 50), "to_name": "after", "type": "keypointlabels"}
    item["value"] = {"x": 50, "y": 50, "labels": ["lake"], "keypointlabels": ["Lakes"]}
    request = read_prompts({"result": [item]}, config, (100, 100))
    assert request is not None
    assert (request.tag.from_name, request.label) == ("lakes", "lake")


# --- Brush ---


def rle_of(mask: NDArray[np.bool_], run_bits: int = 4) -> list[int]:
    """Label Studio's code of a mask, all runs in the first of the four run sizes."""
    values = np.stack([np.full(mask.size, colour) for colour in (255, 0, 200)] + [mask.ravel() * 255], axis=1).ravel()
    bits = f"{len(values):032b}" + f"{7:05b}" + f"{run_bits - 1:04b}" * 4
    limit, position = 2**run_bits, 0
    while position < len(values):
        same = 1
        while same < limit and position + same < len(values) and values[position + same] == values[position]:
            same += 1
        run = same if same > 2 else min(limit, 3, len(values) - position)
        words = values[position : position + (1 if same > 2 else run)]
        bits += ("1" if same > 2 else "0") + "00" + f"{run - 1:0{run_bits}b}" + "".join(f"{word:08b}" for word in words)
        position += run
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 16), st.data())
def test_any_brush_mask_comes_back(rows: int, columns: int, run_bits: int, data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = np.array(flags).reshape(rows, columns)
    assert (labelstudio.brush_mask(rle_of(mask, run_bits), (columns, rows)) == mask).all()


def ellipse_mask() -> NDArray[np.bool_]:
    row, column = np.mgrid[0:48, 0:64] + 0.5
    return ((column - 30) / 14) ** 2 + ((row - 22) / 9) ** 2 <= 1


def test_a_brush_written_by_label_studios_sdk_is_read() -> None:
    result = annotation_of("brush")["result"][0]
    assert (labelstudio.brush_mask(result["value"]["rle"], (64, 48)) == ellipse_mask()).all()


@pytest.mark.parametrize("rle", [None, [], "abc", [0, 0, 0, 16], [0, 0, 0, 16, 57], [256], [0.5], [-1], ["a"]])
def test_a_damaged_brush_is_refused(rle: Any) -> None:
    with pytest.raises(BadRequest):
        labelstudio.brush_mask(rle, (2, 2))


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_random_bytes_are_a_mask_or_refused(tail: bytes) -> None:
    try:
        mask = labelstudio.brush_mask(list(b"\0\0\0\x40\x39" + tail), (4, 4))
    except BadRequest:
        return
    assert mask.shape == (4, 4)


def test_a_brush_prompt_becomes_a_box_and_clicks_inside() -> None:
    item = {**annotation_of("brush")["result"][0], "to_name": "i"}
    request = asked(item, size=(128, 96))
    assert request.is_brush
    assert request.label == "building"
    assert request.prompts.box_xyxy == pytest.approx([32, 26, 88, 62])
    assert request.prompts.points_xy == pytest.approx(np.array([[60, 44]]), abs=4)
    negative = asked({**item, "is_positive": False}, size=(128, 96))
    assert negative.prompts.is_empty
    assert negative.prompts.is_foreground.tolist() == [False]


# --- Results and back ---


@st.composite
def stars(draw: st.DrawFn, size: tuple[int, int], holes: int = 3) -> Polygon:
    """A star-shaped polygon on the tile with up to three holes."""
    radius = draw(st.floats(12, min(size) / 2))
    centre = np.array([draw(st.floats(radius, side - radius)) for side in size])

    def ring(around: NDArray[np.float64], least: float, most: float) -> NDArray[np.float64]:
        radii = np.array(draw(st.lists(st.floats(least, most), min_size=8, max_size=20)))
        angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
        return around + np.column_stack((np.cos(angles), np.sin(angles))) * radii[:, None]

    places = draw(st.lists(st.integers(0, 2), max_size=holes, unique=True))
    inner = [
        ring(centre + 0.3 * radius * np.array([np.cos(place * 2.1), np.sin(place * 2.1)]), 0.1 * radius, 0.15 * radius)
        for place in places
    ]
    return Polygon(ring(centre, 0.6 * radius, radius), inner)


def assert_same(found: Polygon, expected: Polygon) -> None:
    assert found.is_valid
    assert len(found.interiors) == len(expected.interiors)
    assert found.hausdorff_distance(expected) < 0.01
    assert found.symmetric_difference(expected).area < 0.01 * expected.length


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(200, 100), (512, 512), (97, 1013)]).flatmap(lambda size: st.tuples(st.just(size), stars(size)))
)
def test_polygons_come_back_as_they_went(drawn: tuple[tuple[int, int], Polygon]) -> None:
    tile = Tile(drawn[0])
    region = Region(drawn[1], "road", 0.75, "abc", "whole")
    results = results_of([region], TAG, tile)
    annotation = json.loads(json.dumps({"result": results}, allow_nan=False))
    read = read_annotation(annotation, tile, config=CONFIG)
    assert not read.dropped
    assert [(r.label, r.score, r.id, r.object_id) for r in read.regions] == [("road", 0.75, "abc", "whole")]
    assert_same(read.regions[0].polygon, drawn[1])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(stars((300, 200)), st.sampled_from(["", "road", "water"]), st.none() | st.floats()), max_size=4)
)
def test_whatever_regions_there_are_label_studio_takes_the_results(
    judge: SdkJudge, drawn: list[tuple[Polygon, str, float | None]]
) -> None:
    regions = [Region(polygon, label, score, object_id="o" if label else "") for polygon, label, score in drawn]
    results = results_of(regions, TAG, Tile((300, 200)), meta={"note": "x"}, task_id=4, version="v1")
    assert len({result["id"] for result in results}) == len(results)
    for result in results:
        points = np.array(result["value"]["points"])
        assert points.min() >= 0
        assert points.max() <= 100
        assert points[0].tolist() != points[-1].tolist()
    prediction = labelstudio.prediction_of(results, version="v1")
    xml = ONE_TAG.format(labels='<Label value="building"/><Label value="road"/><Label value="water"/>')
    assert judge.errors(xml, prediction) == []


@pytest.mark.parametrize("name", ["interactive_keypoint_positive", "interactive_unlabelled_keypoint"])
def test_answers_to_recorded_requests_pass_the_judge(judge: SdkJudge, name: str) -> None:
    xml = body(name)["label_config"]
    tag = parse_config(xml).tags[0]
    holed = box(10, 10, 60, 60).difference(box(20, 20, 30, 30))
    results = results_of([Region(holed, "water", 0.5), Region(box(0, 0, 640, 512), "road", 1.0)], tag, Tile((640, 512)))
    assert len(results) == 2
    assert judge.errors(xml, labelstudio.prediction_of(results, version="v")) == []


def test_the_judge_finds_fault(judge: SdkJudge) -> None:
    xml = ONE_TAG.format(labels='<Label value="building"/>')
    results = results_of([Region(box(1, 1, 5, 5), "castle")], TAG, Tile((10, 10)))
    assert "castle" in judge.errors(xml, labelstudio.prediction_of(results, version="v"))[0]
    results[0]["value"] = {"points": [[-1, 0], [150, 0], [3, 3]], "polygonlabels": ["building"]}
    assert judge.errors(xml, {"result": results})


def test_a_result_carries_all_that_label_studio_keeps() -> None:
    results = results_of(
        [Region(box(50, 20, 100, 40), "water", 0.9)], TAG, Tile((200, 100)), meta={"a": 1}, task_id=9, version="v7"
    )
    points = results[0]["value"].pop("points")
    assert sorted(points) == [[25, 20], [25, 40], [50, 20], [50, 40]]
    assert results == [
        {
            "id": results[0]["id"], "from_name": "p", "to_name": "i", "type": "polygonlabels", "origin": "prediction",
            "original_width": 200, "original_height": 100, "image_rotation": 0, "score": 0.9,
            "value": {"closed": True, "polygonlabels": ["water"]}, "meta": {"a": 1, "model_version": "v7"},
        }
    ]  # fmt: skip


def test_parts_of_one_object_are_tied_and_come_back_tied() -> None:
    regions = [Region(box(x, 0, x + 5, 5), "road", object_id="o1") for x in (0, 10, 20)] + [
        Region(box(50, 50, 60, 60), "road")
    ]
    results = results_of(regions, TAG, Tile((100, 100)))
    first = results[0]["id"]
    assert [result.get("parentID") for result in results] == [None, first, first, None]
    read = read_annotation({"result": results}, Tile((100, 100)))
    assert [region.object_id for region in read.regions] == ["o1", "o1", "o1", ""]


def test_what_lies_outside_the_tile_is_cut_off() -> None:
    tile = Tile((100, 100))
    regions = [
        Region(box(90, 90, 200, 200), "road"),
        Region(box(200, 200, 300, 300), "road"),
        Region(Polygon(), "road"),
    ]
    results = results_of(regions, TAG, tile)
    assert len(results) == 1
    assert read_annotation({"result": results}, tile).regions[0].polygon.equals(box(90, 90, 100, 100))


def test_a_score_that_is_no_number_is_left_out() -> None:
    scores = [math.nan, math.inf, None, 0.25, 7.0]
    regions = [Region(box(i, 0, i + 1, 1), "road", score) for i, score in enumerate(scores)]
    results = results_of(regions, TAG, Tile((100, 100)))
    assert [result.get("score") for result in results] == [None, None, None, 0.25, 1.0]


def test_region_ids_depend_on_task_version_and_outline() -> None:
    ring = np.array([(1.0, 2.0), (3.0, 4.0), (5.0, 0.0)])
    same = labelstudio.region_id(1, "v", ring)
    assert len(same) == 10
    assert set(same) <= set(string.ascii_letters + string.digits + "-_")
    assert labelstudio.region_id(1, "v", ring + 1e-9) == same
    others = [
        labelstudio.region_id(2, "v", ring),
        labelstudio.region_id(1, "w", ring),
        labelstudio.region_id(1, "v", ring + 1),
    ]
    assert same not in others
    assert len(set(others)) == 3


def test_the_same_outline_twice_gets_two_ids_that_stay() -> None:
    regions = [Region(box(0, 0, 5, 5), "road"), Region(box(0, 0, 5, 5), "water")]
    ids = [[r["id"] for r in results_of(regions, TAG, Tile((9, 9)), task_id=1, version="v")] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_a_prediction_sums_its_scores_up() -> None:
    results = results_of([Region(box(0, 0, 5, 5), "road", s) for s in (0.5, 0.9, None)], TAG, Tile((9, 9)))
    assert labelstudio.prediction_of(results, version="v")["score"] == pytest.approx(0.7)
    assert labelstudio.prediction_of([], version="v") == {"result": [], "model_version": "v"}
    assert labelstudio.prediction_of([], version="v", score=0.4)["score"] == 0.4
    assert "score" not in labelstudio.prediction_of([], version="v", score=math.nan)


# --- Annotations that come back ---


@pytest.mark.parametrize(
    ("case", "labels", "dropped"),
    [
        ("polygon", ["building"], {}),
        ("multi", ["building"] * 3, {}),
        ("closed", ["building"], {}),
        ("meta", ["building"] * 2, {}),
        ("brush", ["building"], {}),
        ("hole_keyhole", ["building"], {}),
        ("vector", [], {labelstudio.NOT_AN_AREA: 1}),
        ("rect_auto", ["building"], {}),
        ("pending_prompt", [], {labelstudio.PROMPT: 2}),
        ("label_leak", ["building"], {labelstudio.LEAK: 1}),
        ("prelabel_unchanged", ["building", "water"], {}),
        ("prelabel_edited", ["water"], {}),
        ("skipped", [], {labelstudio.CANCELLED: 1}),
        ("empty", [], {}),
        ("two_parts", ["building"] * 2, {}),
    ],
)
def test_recorded_annotations_are_read(case: str, labels: list[str], dropped: dict[str, int]) -> None:
    config = parse_config(body("predict_open_task")["label_config"])
    read = read_annotation(annotation_of(case), Tile((640, 512)), config=config)
    assert [region.label for region in read.regions] == labels
    assert read.dropped == Counter(dropped)
    assert all(region.polygon.is_valid and region.polygon.area > 0 for region in read.regions)


def test_every_recorded_task_is_covered() -> None:
    for name in golden_requests.names("task_"):
        for annotation in golden_requests.load(name)["annotations"]:
            read_annotation(annotation, Tile((640, 512)))


def test_a_recorded_bridge_is_a_hole_again() -> None:
    region = read_annotation(annotation_of("hole_keyhole"), Tile((640, 512))).regions[0]
    assert len(region.polygon.interiors) == 1
    assert region.score is not None
    assert len(region.id) == 10


def test_a_recorded_brush_is_a_polygon_on_the_tiles_own_size() -> None:
    polygon = read_annotation(annotation_of("brush"), Tile((128, 96))).regions[0].polygon
    assert polygon.area == pytest.approx(4 * ellipse_mask().sum(), rel=0.02)
    assert polygon.centroid.coords[0] == pytest.approx((60, 44), abs=0.5)


def test_parts_keep_their_object() -> None:
    read = read_annotation(annotation_of("two_parts"), Tile((640, 512)))
    assert {region.object_id for region in read.regions} == {"part000001"}
    assert [region.score for region in read.regions] == [0.875, 0.875]


def test_shapes_drawn_by_hand_become_polygons() -> None:
    config = parse_config(body("predict_open_task")["label_config"])
    read = read_annotation(annotation_of("drawn_by_hand"), Tile((640, 512)), config=config)
    assert [region.label for region in read.regions] == ["building", "road", "water", "building"]
    upright, turned, ellipse, split = (region.polygon for region in read.regions)
    assert upright.equals(box(320, 128, 400, 256))
    assert turned.symmetric_difference(box(192, 128, 320, 208)).area < 1e-6
    assert ellipse.area == pytest.approx(math.pi * 64 * 25.6, rel=0.002)
    assert split.equals(Polygon([(384, 307.2), (512, 307.2), (512, 409.6)]))
    assert read.dropped == Counter({labelstudio.PROMPT: 1, labelstudio.NOT_AN_AREA: 2})


def test_rectangles_of_a_smart_tag_are_prompts() -> None:
    item = annotation_of("drawn_by_hand")["result"][0]
    annotation = {"result": [{**item, "from_name": "box"}]}
    config = parse_config(body("predict_open_task")["label_config"])
    assert read_annotation(annotation, Tile((640, 512)), config=config).dropped == {labelstudio.PROMPT: 1}
    assert len(read_annotation(annotation, Tile((640, 512))).regions) == 1


def polygon_result(points: Any, **more: Any) -> dict[str, Any]:
    value: Any = {"points": points, "closed": True, "polygonlabels": ["road"]}
    return {"id": "x", "type": "polygonlabels", "from_name": "p", "to_name": "i", "value": value, **more}


SQUARE = [[10, 10], [20, 10], [20, 20], [10, 20]]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (polygon_result([]), labelstudio.UNREADABLE),
        (polygon_result(None), labelstudio.UNREADABLE),
        (polygon_result([[1, 1], [2, 2]]), labelstudio.UNREADABLE),
        (polygon_result([[1, 1], [2, math.nan], [3, 3]]), labelstudio.UNREADABLE),
        (polygon_result([SQUARE, SQUARE]), labelstudio.UNREADABLE),
        (polygon_result([[1e300, 1], [2, 2], [3, 3]]), labelstudio.UNREADABLE),
        (polygon_result(SQUARE, image_rotation=90), labelstudio.ROTATED_VIEW),
        (polygon_result(SQUARE, to_name="j"), labelstudio.OTHER_IMAGE),
        (polygon_result([[110, 10], [120, 10], [120, 20]]), labelstudio.OUTSIDE),
        (polygon_result(SQUARE, is_positive=True), labelstudio.PROMPT),
        (polygon_result(SQUARE, type="keypointlabels"), labelstudio.LEAK),
        (polygon_result(SQUARE, type="rectanglelabels"), labelstudio.LEAK),
        (polygon_result(SQUARE, value=3), labelstudio.UNREADABLE),
        (polygon_result(SQUARE, type="choices"), labelstudio.NOT_AN_AREA),
        (polygon_result(None, type="rectanglelabels", value={"height": 5, "labels": ["a"]}), labelstudio.UNREADABLE),
        ("text", labelstudio.UNREADABLE),
    ],
)  # fmt: skip
def test_what_is_no_region_is_counted_with_the_reason(result: Any, reason: str) -> None:
    read = read_annotation({"result": [result, polygon_result(SQUARE, id="good")]}, Tile((100, 100)), to_name="i")
    assert [region.id for region in read.regions] == ["good"]
    assert read.dropped == {reason: 1}


def test_a_leak_that_stands_first_does_not_push_the_region_out() -> None:
    leak = polygon_result(SQUARE, type="brushlabels")
    read = read_annotation({"result": [leak, polygon_result(SQUARE)]}, Tile((100, 100)))
    assert (len(read.regions), read.dropped) == (1, {labelstudio.LEAK: 1})


def test_a_prompts_label_on_a_rectangle_does_not_push_it_out() -> None:
    value = {"x": 10, "y": 10, "width": 5, "height": 5, "keypointlabels": ["water"], "rectanglelabels": ["road"]}
    results = [{"id": "x", "value": value, "type": kind} for kind in ("keypointlabels", "rectanglelabels")]
    read = read_annotation({"result": results}, Tile((100, 100)))
    assert [region.label for region in read.regions] == ["road"]
    assert sum(read.dropped.values()) == 1


def test_a_crossed_outline_becomes_parts_of_one_object() -> None:
    bow_tie = [[10, 10], [30, 30], [30, 10], [10, 30]]
    read = read_annotation({"result": [polygon_result(bow_tie)]}, Tile((100, 100)))
    assert len(read.regions) == 2
    assert {(region.id, region.object_id, region.label) for region in read.regions} == {("x", "x", "road")}
    assert sum(read.dropped.values()) == 1


def test_a_region_over_the_edge_is_cut_there() -> None:
    read = read_annotation({"result": [polygon_result([[90, 90], [109, 90], [109, 110], [90, 110]])]}, Tile((100, 100)))
    assert read.regions[0].polygon.equals(box(90, 90, 100, 100))


def test_further_labels_of_a_region_are_counted() -> None:
    result = polygon_result(SQUARE)
    result["value"]["polygonlabels"] = ["road", "water"]
    read = read_annotation({"result": [result]}, Tile((100, 100)))
    assert [region.label for region in read.regions] == ["road"]
    assert read.dropped == {labelstudio.MORE_LABELS: 1}


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional={
    "id": st.sampled_from(["a", "b", 3, None]),
    "type": st.sampled_from(["polygonlabels", "rectangle", "ellipselabels", "brushlabels", "vector", "labels", 4]),
    "value": json_values | st.fixed_dictionaries({}, optional={
        "points": json_values | st.lists(st.lists(st.floats(-20, 120), min_size=2, max_size=2), max_size=6),
        "polygonlabels": json_values, "labels": json_values, "x": json_values, "height": json_values,
        "radiusX": json_values, "rle": json_values, "vertices": json_values, "closed": st.booleans(),
    }),
    "score": json_values, "meta": json_values, "original_width": json_values,
}) | json_values, max_size=4))  # fmt: skip
def test_no_annotation_makes_the_reader_fail(results: list[Any]) -> None:
    for region in read_annotation({"result": results}, Tile((100, 80))).regions:
        assert region.polygon.is_valid
        assert box(-1e-6, -1e-6, 100 + 1e-6, 80 + 1e-6).covers(region.polygon)


@pytest.mark.parametrize("annotation", [None, [], {"result": {}}, {"result": "x"}])
def test_what_is_no_annotation_is_refused(annotation: Any) -> None:
    with pytest.raises(BadRequest):
        read_annotation(annotation, Tile((10, 10)))


def test_ground_truth_counts_first_then_the_latest_submission() -> None:
    task = golden_requests.load("task_ground_truth")
    assert [annotation["id"] for annotation in labelstudio.chosen_annotations(task)] == [302]
    for annotation in task["annotations"]:
        annotation["ground_truth"] = False
    assert [annotation["id"] for annotation in labelstudio.chosen_annotations(task)] == [303]
    task["annotations"][0]["updated_at"] = "2026-03-02T23:00:00.000000Z"
    assert [annotation["id"] for annotation in labelstudio.chosen_annotations(task)] == [301]


@pytest.mark.parametrize("case", ["skipped", "untouched"])
def test_a_task_that_nobody_labelled_has_no_annotation(case: str) -> None:
    assert labelstudio.chosen_annotations(golden_requests.load(f"task_{case}")) == []


# --- The recordings themselves ---


def shape_of(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        if key in ("parsed_label_config", "control_weights"):
            return "a control's name to its settings"
        return {name: shape_of(inner, name) for name, inner in sorted(value.items())}
    if isinstance(value, list):
        if key == "rle":
            return "bytes"
        return [shape_of(inner, key) for inner in value]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@pytest.mark.skipif(not RECORDED.is_dir(), reason=f"the original recordings are not at {RECORDED}")
def test_goldens_have_the_shape_of_the_original_recordings() -> None:
    originals = sorted((RECORDED / "requests").glob("*.json"))
    for path in originals:
        original, ours = json.loads(path.read_text())["request"], golden_requests.load(path.stem)
        assert (original["method"], original["path"]) == (ours["method"], ours["path"])
        assert shape_of(original["body"]) == shape_of(ours["body"]), path.stem
        assert ours["headers"].keys() <= original["headers"].keys()
    exported = {
        task["data"]["case"]: task for task in json.loads((RECORDED / "exports" / "export_JSON_all.json").read_text())
    }
    for case, task in exported.items():
        assert shape_of(task) == shape_of(golden_requests.load(f"task_{case}")), case
    by_hand = {"task_drawn_by_hand", "task_ground_truth", "task_two_parts"}
    recorded = {path.stem for path in originals} | {f"task_{case}" for case in exported}
    assert recorded | by_hand == set(golden_requests.names())
