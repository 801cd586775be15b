"""Validation: what is wrong with annotations and with exported files, and that sound ones have no findings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import Polygon, affinity, box
from typer.testing import CliRunner

from backend import cli, labelstudio
from backend.errors import BackendError, BadRequest
from backend.findings import Finding
from backend.tile import Region, Tile
from backend.validation import Limits, annotation_findings, counted, validate
from tests import golden_requests

CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image"><Label value="building"/><Label value="road"/></PolygonLabels>
<RectangleLabels name="frame" toName="image"><Label value="field"/></RectangleLabels>
<KeyPoint name="click" toName="image" smart="true"/><Rectangle name="box" toName="image" smart="true"/></View>"""

PLACED = {
    "id": 5,
    "data": {
        "image": "http://host/tiles/a/b.png",
        "tile": {
            "scene": "a", "window": [0, 0, 500, 400], "crs": "EPSG:32645",
            "transform": [0.1, 0, 400000, 0, -0.1, 3000000],
        },
    },
}  # fmt: skip
PHOTO = {"id": 6, "data": {"image": "http://host/photo.jpg"}}


def region(name: str, ring_pct: Any, *, label: str = "building", **more: Any) -> dict[str, Any]:
    return {
        "id": name, "from_name": "polygon", "to_name": "image", "type": "polygonlabels",
        "original_width": 500, "original_height": 400, "image_rotation": 0,
        "value": {"points": ring_pct, "closed": True, "polygonlabels": [label] if label else []}, **more,
    }  # fmt: skip


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def found(*results: Any, task: Any = PLACED, config: str | None = CONFIG, **limits: float) -> list[tuple[str, str]]:
    annotation = {"id": 7, "result": list(results)}
    listed = annotation_findings(annotation, task, label_config=config, limits=Limits(**limits))
    assert all((finding.task, finding.annotation) == (task["id"], 7) for finding in listed)
    return [(finding.region, finding.reason) for finding in listed]


# --- Annotations ---


def test_sound_regions_have_no_findings():
    assert found(region("a", square(10, 10, 20)), region("b", square(40, 10, 20), label="road")) == []


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (region("a", [[10, 10], [30, 30], [30, 10], [10, 30]]), "self-crossing"),
        (region("a", square(-5, 10, 20)), "outside"),
        (region("a", square(90, 10, 20)), "outside"),
        (region("a", square(120, 10, 20)), "outside"),
        (region("a", square(10, 10, 0.5)), "too small"),
        (region("a", square(10, 10, 20), label="Moon base"), "label"),
        (region("a", square(10, 10, 20), label=""), "label"),
        (region("a", square(10, 10, 20), from_name="other"), "label"),
        (region("a", [[10, 10], [20, 20]]), "unreadable"),
        (region("a", [["x", 10], [20, 20], [20, 10]]), "unreadable"),
        (region("a", [[math.nan, 10], [20, 20], [20, 10]]), "unreadable"),
        (region("a", [[10, 10], [20, 20], [10, 10], [20, 20]]), "unreadable"),
    ],
)
def test_what_is_wrong_with_a_region_is_named(result: Any, reason: str):
    assert found(result, region("b", square(60, 60, 20))) == [("a", reason)]


def test_turned_rectangles_and_ellipses_that_leave_the_image_are_named():
    size = {"original_width": 500, "original_height": 400, "to_name": "image"}
    turned = {"id": "a", "from_name": "frame", "type": "rectanglelabels", **size,
              "value": {"x": 5, "y": 5, "width": 30, "height": 10, "rotation": 45,
                        "rectanglelabels": ["field"]}}  # fmt: skip
    straight = {**turned, "id": "c", "value": {**turned["value"], "x": 50, "y": 50, "rotation": 0}}
    round_one = {"id": "b", "from_name": "polygon", "type": "ellipselabels", **size,
                 "value": {"x": 95, "y": 50, "radiusX": 10, "radiusY": 5, "ellipselabels": ["road"]}}  # fmt: skip
    assert found(turned, straight, round_one) == [("a", "outside"), ("b", "outside")]


def test_what_is_too_small_is_so_on_the_ground_where_the_place_is_known():
    # 5 x 4 pixels: 0.2 m² at 10 cm, and 20 square pixels on a photo.
    tiny = region("a", square(10, 10, 1))
    assert found(tiny) == [("a", "too small")]
    assert found(tiny, min_area_m2=0.19) == []
    assert found(tiny, task=PHOTO) == []
    assert found(tiny, task=PHOTO, min_area_px=21) == [("a", "too small")]


def test_the_parts_of_one_object_are_measured_together_and_may_touch():
    parts = [region(name, square(x, 10, 4), meta={"object": "one"}) for name, x in (("a", 10), ("b", 14), ("c", 14))]
    assert found(*parts, min_area_m2=6) == []
    assert found(parts[0], min_area_m2=6) == [("a", "too small")]


@pytest.mark.parametrize(("shift", "label", "reasons"), [
    (20.0, "building", []), (18.5, "building", []), (15.0, "building", ["overlap"]), (15.0, "road", []),
    (0.0, "building", ["duplicate"]), (0.1, "building", ["duplicate"]), (0.0, "road", ["duplicate"]),
])  # fmt: skip
def test_overlap_counts_within_a_label_and_the_same_outline_with_any(shift: float, label: str, reasons: list[str]):
    listed = found(region("a", square(10, 10, 20)), region("b", square(10 + shift, 10, 20), label=label))
    assert listed == [("b", reason) for reason in reasons]


def test_of_an_overlap_the_smaller_is_named_with_the_share_of_it_and_the_other():
    annotation = {"id": 7, "result": [region("small", square(20, 20, 10)), region("large", square(10, 10, 20))]}
    (finding,) = annotation_findings(annotation, PLACED, label_config=CONFIG)
    assert finding == Finding("overlap", "100% of it is also covered by region large (building)", None, 5, 7, "small")


def test_a_courtyard_on_a_bridge_is_sound_and_what_stands_in_it_overlaps_nothing():
    tile = Tile(size=(500, 400))
    yard = box(50, 50, 250, 250).difference(box(100, 100, 200, 200))
    inner = box(120, 120, 180, 180)
    tag = labelstudio.parse_config(CONFIG).tags[0]
    results = labelstudio.results_of([Region(yard, "building"), Region(inner, "building")], tag, tile)
    assert found(*results) == []


def test_prompts_that_were_left_over_and_skipped_annotations_are_no_findings():
    click = {"id": "p", "from_name": "click", "to_name": "image", "type": "keypoint", "value": {"x": 200, "y": 3}}
    prompt = {"id": "q", "from_name": "box", "to_name": "image", "type": "rectangle",
              "value": {"x": -9, "y": 9, "width": 1, "height": 1}}  # fmt: skip
    assert found(click, prompt) == []
    skipped = {"id": 7, "was_cancelled": True, "result": [region("a", square(-5, 10, 20))]}
    assert annotation_findings(skipped, PLACED) == []


def test_a_place_that_cannot_be_read_is_a_finding_and_the_rest_is_checked():
    task = {"id": 5, "data": {"image": "x", "tile": {**PLACED["data"]["tile"], "crs": "EPSG:999999"}}}  # type: ignore[index]
    assert found(region("a", square(-5, 10, 20)), task=task) == [("", "place"), ("a", "outside")]


@pytest.mark.parametrize("config", [None, "", "<View", "<View><Image name='i' value='$i'/></View>", "<!DOCTYPE x>"])
def test_without_a_config_that_can_be_read_labels_are_not_judged(config: str | None):
    reasons = found(region("a", square(10, 10, 20), label="Moon base"), config=config)
    assert reasons == ([("a", "label")] if config and "Image" in config else [])


@pytest.mark.parametrize("name", golden_requests.names("webhook_annotation"))
def test_every_recorded_event_can_be_checked(name: str):
    body = golden_requests.load(name)["body"]
    listed = body["annotation"] if isinstance(body.get("annotation"), list) else [body.get("annotation")]
    tasks = body["task"] if isinstance(body.get("task"), list) else [body.get("task")]
    for annotation, task in zip(listed, tasks, strict=True):
        if annotation is not None:
            assert annotation_findings(annotation, task, label_config=body["project"]["label_config"]) == []


@pytest.mark.parametrize("annotation", [None, "x", {"result": "x"}, {"result": {"a": 1}}])
def test_what_is_no_annotation_is_refused(annotation: Any):
    with pytest.raises(BadRequest):
        annotation_findings(annotation, PLACED)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "points", "y"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "id": st.sampled_from(["a", "b", 3, None]),
                "type": st.sampled_from(["polygonlabels", "rectangle", "ellipse", "brush", "vector", "labels", 7]),
                "value": JSON_VALUES,
                "original_width": JSON_VALUES,
                "to_name": JSON_VALUES,
                "from_name": JSON_VALUES,
                "meta": JSON_VALUES,
            },
        ) | JSON_VALUES,
        max_size=4,
    ),
    JSON_VALUES,
)  # fmt: skip
def test_nothing_that_comes_over_the_wire_breaks_a_check(results: Any, data: Any):
    for finding in annotation_findings({"id": 1, "result": results}, {"id": 2, "data": data}, label_config=CONFIG):
        assert finding.message


def test_one_outline_drawn_a_thousand_times_does_not_hold_up_the_rest():
    many = [region(f"r{number}", square(10, 10, 20)) for number in range(1000)]
    reasons = {reason for _, reason in found(*many)}
    assert reasons == {"duplicate"}


# --- Files ---


def feature(shape: Any, **properties: Any) -> dict[str, Any]:
    geometry = shape if isinstance(shape, dict) or shape is None else json.loads(json.dumps(shape.__geo_interface__))
    return {"type": "Feature", "properties": {"label": "building", **properties}, "geometry": geometry}


def lot(x: float = 85.5, y: float = 27.6, side: float = 0.001) -> Polygon:
    return box(x, y, x + side, y + side, ccw=True)


def written(path: Path, *features: Any, **members: Any) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", **members, "features": list(features)}))
    return path


def reasons(path: Path, **options: Any) -> dict[int | None, str]:
    return {finding.feature: finding.reason for finding in validate(path, **options)}


def test_a_sound_file_has_no_findings(tmp_path: Path):
    path = written(tmp_path / "a.geojson", feature(lot(), id="a", score=0.9), feature(lot(86), id="b"))
    assert validate(path) == []
    assert validate(written(tmp_path / "none.geojson")) == []


def test_what_is_wrong_with_features_is_named(tmp_path: Path):
    rings = {
        "clockwise": [[0, 0], [0, 1], [1, 1], [1, 0], [0, 0]],
        "not closed": [[10, 0], [11, 0], [11, 1], [10, 1]],
        "Self-intersection": [[20, 0], [21, 1], [21, 0], [20, 1], [20, 0]],
        "off the Earth": [[200, 0], [201, 0], [201, 1], [200, 0]],
    }
    features = [feature({"type": "Polygon", "coordinates": [ring]}) for ring in rings.values()]
    path = written(tmp_path / "a.geojson", *features, feature(None), feature({"type": "Polygon"}), "nothing", crs={})
    listed = [str(finding) for finding in validate(path)]
    for number, words in enumerate([*rings, "no geometry", "cannot be read", "must be an object"]):
        assert any(f"feature {number}:" in text and words in text for text in listed), (words, listed)
    assert any("crs member" in text for text in listed)


def test_features_are_checked_against_each_other(tmp_path: Path):
    path = written(
        tmp_path / "a.geojson",
        feature(lot(), id="a"),
        feature(lot(85.5004), id="b"),
        feature(lot(86), id="a"),
        feature(lot(87), score=1.5),
        feature(lot(88, side=1e-6)),
        feature(lot(86)),
        feature(lot(89), label=""),
        feature(lot(90), label="Moon base"),
    )
    listed = validate(path, label_config=CONFIG)
    assert str(listed[0]).startswith("feature 1 (b): ")
    assert str(listed[0]).endswith("feature 0 (a)")
    found = {finding.feature: finding.reason for finding in listed}
    assert found == {1: "overlap", 2: "schema", 3: "schema", 4: "too small", 5: "duplicate", 6: "label", 7: "label"}
    assert reasons(path, limits=Limits(max_overlap=0.7, min_area_m2=0)) == {
        2: "schema", 3: "schema", 5: "duplicate", 6: "label",
    }  # fmt: skip


def test_newline_delimited_features_are_checked_one_by_one(tmp_path: Path):
    path = tmp_path / "a.geojsonl"
    path.write_text("\n".join(json.dumps(feature(lot(85 + k, side=0.1))) for k in range(3)) + "\n")
    assert validate(path) == []
    path.write_text("\x1e" + path.read_text() + json.dumps(feature(lot(86, side=0.1))) + "\n")
    assert reasons(path) == {3: "duplicate"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"type": "FeatureCollection", "features": [', "not JSON"),
        ('{"type": "FeatureCollection", "features": [{}] ', "not JSON"),
        ('{"type": "FeatureCollection", "features": [{} {}]}', "expected , or ]"),
        ('{"type": "FeatureCollection", "features": []} and more', "follows its end"),
        ('{"type": "FeatureCollection", "features": [{"a": NaN}]}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 100_000, "not JSON"),
        ("[1, 2", "no data object"),
    ],
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, text: str, words: str):
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(BackendError, match=words):
        validate(path)
    with pytest.raises(BackendError, match="not there"):
        validate(tmp_path / "none.geojson")


def test_json_is_read_the_same_whatever_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from backend import validation

    path = written(
        tmp_path / "a.geojson", feature(lot(), id=123456, note="ä" * 50), feature(lot(), id=2), bbox=[1, 2, 3, 4]
    )
    whole = validate(path)
    assert [finding.reason for finding in whole] == ["duplicate"]
    for chars in (1, 2, 7, 100):
        monkeypatch.setattr(validation, "_CHUNK_CHARS", chars)
        assert validate(path) == whole


@pytest.mark.parametrize("ending", ["gpkg", "parquet", "fgb", "shp"])
def test_other_formats_are_checked_as_well(tmp_path: Path, ending: str):
    import geopandas

    bow_tie = Polygon([(85, 27), (85.1, 27.1), (85.1, 27), (85, 27.1)])
    shapes = [lot(), affinity.translate(lot(), 0.0004), bow_tie]
    frame = geopandas.GeoDataFrame({"label": ["building"] * 3}, geometry=shapes, crs="EPSG:4326")
    path = tmp_path / f"a.{ending}"
    frame.to_parquet(path) if ending == "parquet" else frame.to_file(path)
    assert "overlap" in counted(validate(path))
    if ending not in ("shp", "fgb"):  # which keep no order
        assert reasons(path) == {1: "overlap", 2: "self-crossing"}
    frame.to_crs("EPSG:3857").to_file(tmp_path / "b.gpkg")
    assert "place" in counted(validate(tmp_path / "b.gpkg"))


def test_label_studios_json_is_checked_task_by_task(tmp_path: Path):
    path = tmp_path / "tasks.json"
    bow_tie = region("a", [[10, 10], [30, 30], [30, 10], [10, 30]])
    tasks = [
        {**PLACED, "annotations": [{"id": 1, "result": [region("a", square(10, 10, 20))]}]},
        {**PLACED, "id": 8, "annotations": [{"id": 2, "result": [bow_tie]}, "nothing"]},
        {**PHOTO, "annotations": []},
    ]
    path.write_text(json.dumps(tasks))
    listed = validate(path, label_config=CONFIG)
    assert [(f.feature, f.task, f.annotation, f.reason) for f in listed] == [
        (1, 8, 2, "self-crossing"), (1, 8, None, "unreadable"), (2, 6, None, "place"),
    ]  # fmt: skip


def test_coco_is_checked_in_the_pixels_of_its_images(tmp_path: Path):
    def outlined(number: int, ring: Any, **more: Any) -> dict[str, Any]:
        segmentation = [np.array(ring, float).ravel().tolist()]
        return {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "segmentation": segmentation,
            "bbox": [0, 0, 1, 1],
            **more,
        }

    sound = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "building"}],
    }
    packed = {"segmentation": {"size": [80, 100], "counts": "abc"}, "bbox": [1, 2, 3, 4]}
    path = tmp_path / "coco.json"
    path.write_text(
        json.dumps(
            {
                "annotations": [outlined(1, square(5, 5, 20)), {"id": 2, "image_id": 1, "category_id": 1, **packed}],
                **sound,
            }
        )
    )
    assert validate(path) == []
    broken = [
        outlined(1, square(5, 5, 20)),
        outlined(1, square(50, 5, 20)),
        outlined(2, square(90, 30, 20)),
        outlined(3, [[5, 50], [25, 70], [25, 50], [5, 70]]),
        outlined(4, square(5, 5, 20)),
        outlined(5, square(40, 40, 2)),
        outlined(6, square(50, 50, 20), image_id=2),
        outlined(7, square(30, 30, 9), category_id=9),
        {"id": 8, "image_id": 1, "category_id": 1},
    ]  # fmt: skip
    path.write_text(json.dumps({**sound, "annotations": broken}))
    assert reasons(path) == {
        1: "schema", 2: "outside", 3: "self-crossing", 4: "duplicate", 5: "too small", 6: "schema", 7: "label",
        8: "unreadable",
    }  # fmt: skip


def test_a_stac_item_needs_its_fields(tmp_path: Path):
    item = {**feature(lot()), "stac_version": "1.1.0", "id": "town", "bbox": [85.5, 27.6, 85.501, 27.601], "assets": {},
            "links": [], "properties": {"datetime": "2026-03-02T09:21:30Z"}}  # fmt: skip
    path = tmp_path / "item.json"
    path.write_text(json.dumps(item))
    assert validate(path) == []
    path.write_text(
        json.dumps({**{name: item[name] for name in item if name not in ("assets", "bbox")}, "properties": {}})
    )
    assert [finding.reason for finding in validate(path)] == ["schema"] * 3


# --- The command ---


def test_the_command_ends_with_one_where_something_was_found_and_lists_it(tmp_path: Path):
    run = CliRunner().invoke
    sound, broken = (
        written(tmp_path / "a.geojson", feature(lot())),
        written(tmp_path / "b.geojson", feature(lot()), feature(lot())),
    )
    (tmp_path / "config.xml").write_text(CONFIG.replace("building", "house"))
    assert (result := run(cli.app, ["validate", str(sound)])).exit_code == 0
    assert "nothing found" in result.output
    assert (result := run(cli.app, ["validate", str(broken)])).exit_code == 1
    assert "feature 1: is drawn twice: the same outline as feature 0" in result.output
    result = run(cli.app, ["validate", str(broken), "--json", "--config", str(tmp_path / "config.xml")])
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["counts"] == {"label": 2, "duplicate": 1}
    assert printed["findings"][1]["feature"] == 1
    assert run(cli.app, ["validate"]).exit_code == 2
    assert run(cli.app, ["validate", str(sound), "--project", "3"]).exit_code == 2
