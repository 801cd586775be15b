"""What must hold of exports: places, seams, holes, RFC 7946, counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import MultiPolygon, Polygon, affinity
from shapely.geometry import shape

from backend import labelstudio
from backend.earth import lonlat_geometry
from backend.errors import ExportError
from backend.evaluation import evaluate, polis
from backend.export import ExportOptions, export
from backend.formats import FIELDS
from backend.ingest import plan
from backend.tile import Region, Tile
from backend.validation import validate
from demo.annotator import Truth
from demo.scene import make_scene

CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image"><Label value="building"/><Label value="road"/></PolygonLabels>
<KeyPoint name="click" toName="image" smart="true"/></View>"""
TAG = labelstudio.parse_config(CONFIG).tags[0]
SCENE = Tile(
    (1000, 800), "EPSG:32645", Affine(0.2, 0, 354166.4, 0, -0.2, 3057067.0), scene="banepa", gsd_m=0.2
)  # fmt: skip


def cut(scene: Tile, *, tile_size: int = 300, overlap: int = 60) -> list[Tile]:
    """The scene's tiles, as ingest makes them."""
    return [
        replace(scene.crop(*spot.window), core=spot.core if overlap else None, gsd_m=scene.gsd_m)
        for spot in plan(*scene.size, tile_size=tile_size, overlap=overlap)
    ]


def task_of(tile: Tile, regions: Sequence[Region], number: int) -> dict[str, Any]:
    results = labelstudio.results_of(regions, TAG, tile, task_id=number)
    return {
        "id": number,
        "data": {"image": f"http://host/tiles/{tile.scene}/{number}.jpg", "tile": tile.to_record()},
        "annotations": [{"id": number * 10, "result": results}],
    }


def annotated(scene: Tile, objects: Sequence[tuple[Polygon, str]], **grid: int) -> list[dict[str, Any]]:
    """Tasks in which somebody outlined everything there is, exactly."""
    tasks = []
    for number, tile in enumerate(cut(scene, **grid), 1):
        assert tile.window is not None
        regions = [
            Region(part, label)
            for polygon, label in objects
            for part in shapely.get_parts(
                affinity.translate(polygon, -tile.window[0], -tile.window[1]).intersection(tile.outline_px())
            )
            if isinstance(part, Polygon) and part.area > 0.5
        ]
        tasks.append(task_of(tile, regions, number))
    return tasks


def features_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["features"]


def in_pixels(path: Path, scene: Tile = SCENE) -> list[shapely.Geometry]:
    return [shapely.transform(shape(f["geometry"]), scene.lonlat_to_px) for f in features_of(path)]


def iou(a: shapely.Geometry, b: shapely.Geometry) -> float:
    return a.intersection(b).area / a.union(b).area


def box_at(x: float, y: float, w: float, h: float, angle: float = 0) -> Polygon:
    return affinity.rotate(shapely.box(x, y, x + w, y + h), angle)


# Seams


@pytest.mark.parametrize("overlap", [60, 0], ids=["overlapping tiles", "tiles that only touch"])
def test_objects_cut_by_tile_borders_come_back_once(tmp_path: Path, overlap: int) -> None:
    rng = np.random.default_rng(3)
    objects: list[tuple[Polygon, str]] = []
    while len(objects) < 60:
        new = box_at(*rng.uniform((5, 5), (900, 700)), *rng.uniform(12, 90, 2), rng.uniform(0, 90))
        if all(new.distance(old) > 3 for old, _ in objects) and SCENE.outline_px().contains(new):
            objects.append((new, "building"))
    out = tmp_path / "labels.geojson"
    report = export(annotated(SCENE, objects, overlap=overlap), out, label_config=CONFIG)

    got = in_pixels(out)
    assert report.merged + report.duplicates > 20
    assert len(got) == len(objects)
    best = [max(iou(polygon, other) for other in got) for polygon, _ in objects]
    assert min(best) >= 0.98
    vertices = shapely.get_num_coordinates(np.array(got)).sum()
    assert vertices <= 1.1 * 5 * len(objects)


def test_the_truth_of_a_scene_survives_annotation_and_export(tmp_path: Path) -> None:
    truth_path = make_scene(tmp_path / "town.tif", size_px=(900, 900), seed=4)
    truth = Truth(truth_path)
    from backend.ingest import IngestOptions, ingest

    ingest([tmp_path / "town.tif"], tmp_path / "data", tiles_url="http://h/tiles", options=IngestOptions(512, 64))
    tasks = json.loads((tmp_path / "data" / "tasks.json").read_text())
    assert len(tasks) == 4
    for number, task in enumerate(tasks, 1):
        tile = Tile.from_record(task["data"]["tile"])
        task |= {"id": number, "annotations": [{
            "id": number, "result": labelstudio.results_of(truth.on(tile, ["building"]), TAG, tile, task_id=number)
        }]}  # fmt: skip
    out = tmp_path / "labels.geojson"
    export(tasks, out, label_config=CONFIG)

    drawn = [p for p, label in zip(truth.polygons, truth.labels, strict=True) if label == "building"]
    got = [shape(f["geometry"]) for f in features_of(out)]
    assert len(got) == len(drawn)
    assert min(max(iou(polygon, other) for other in got) for polygon in drawn) >= 0.98
    figures = evaluate(out, _only(truth_path, "building", tmp_path))
    assert figures.f1 == 1.0
    assert figures.mean_iou is not None
    assert figures.mean_iou > 0.99
    assert figures.polis_m is not None
    assert figures.polis_m < 0.05
    assert [finding for finding in validate(out) if finding.reason != "too small"] == []


def _only(path: Path, label: str, folder: Path) -> Path:
    content = json.loads(path.read_text())
    content["features"] = [f for f in content["features"] if f["properties"]["label"] == label]
    (folder / "only.geojson").write_text(json.dumps(content))
    return folder / "only.geojson"


def test_without_merging_every_outline_is_a_feature(tmp_path: Path) -> None:
    tasks = annotated(SCENE, [(box_at(250, 100, 80, 40), "building")])
    outlines = sum(len(task["annotations"][0]["result"]) for task in tasks)
    assert outlines > 1
    report = export(tasks, tmp_path / "a.geojson", options=ExportOptions(merge_seams=False))
    assert report.features == outlines


def test_neighbours_that_share_a_wall_stay_two(tmp_path: Path) -> None:
    left, right = box_at(230, 100, 40, 40), box_at(270, 100, 45, 40)
    for overlap in (0, 60):
        out = tmp_path / f"{overlap}.geojson"
        export(annotated(SCENE, [(left, "building"), (right, "building")], overlap=overlap), out)
        assert sorted(p.area for p in in_pixels(out)) == pytest.approx([1600, 1800], abs=5)


def test_a_shared_wall_at_the_edge_of_an_overlap_joins_nobody(tmp_path: Path) -> None:
    # The second tile begins at column 240. One house ends there by a hair beyond, the next begins there.
    first, second = cut(SCENE)[:2]
    left, right = box_at(200, 100, 40.6, 40), box_at(0, 100, 45, 40)
    out = tmp_path / "a.geojson"
    export([task_of(first, [Region(left, "building")], 1), task_of(second, [Region(right, "building")], 2)], out)
    assert len(in_pixels(out)) == 2


def test_a_sliver_at_a_tiles_border_is_not_an_object_of_its_own(tmp_path: Path) -> None:
    first, second = cut(SCENE)[:2]
    house, sliver = box_at(58.9, 100, 40, 40), box_at(299.2, 102, 0.8, 30)
    tasks = [task_of(first, [Region(sliver, "building")], 1), task_of(second, [Region(house, "building")], 2)]
    out = tmp_path / "a.geojson"
    assert export(tasks, out).duplicates == 1
    (got,) = in_pixels(out)
    assert got.area == pytest.approx(1600, abs=5)


def test_objects_of_two_labels_are_not_joined(tmp_path: Path) -> None:
    out = tmp_path / "a.geojson"
    objects = [(box_at(250, 100, 100, 40), "building"), (box_at(250, 100, 100, 40), "road")]
    export(annotated(SCENE, objects), out)
    assert sorted(f["properties"]["label"] for f in features_of(out)) == ["building", "road"]


def test_the_tile_whose_core_holds_an_object_wins_over_a_sloppy_neighbour(tmp_path: Path) -> None:
    first, second = cut(SCENE)[:2]
    assert first.window is not None
    assert second.window is not None
    exact = box_at(245, 50, 20, 20)  # wholly in both tiles, in the first one's core
    sloppy = affinity.translate(exact.buffer(1.5), -second.window[0], 0)
    tasks = [task_of(first, [Region(exact, "building")], 1), task_of(second, [Region(sloppy, "building")], 2)]
    out = tmp_path / "a.geojson"
    report = export(tasks, out)
    (got,) = in_pixels(out)
    assert report.duplicates == 1
    assert iou(got, exact) > 0.99  # seven decimals are a twentieth of a pixel
    assert features_of(out)[0]["properties"]["tasks"] == [1, 2]


def test_an_object_that_only_one_tile_was_annotated_with_is_kept(tmp_path: Path) -> None:
    first, second = cut(SCENE)[:2]
    in_the_seconds_core = box_at(275, 50, 15, 15)
    tasks = [task_of(first, [Region(in_the_seconds_core, "building")], 1), task_of(second, [], 2)]
    assert export(tasks, tmp_path / "a.geojson").features == 1


def test_a_horseshoe_whose_legs_are_cut_off_is_one_object(tmp_path: Path) -> None:
    horseshoe = box_at(200, 100, 160, 90).difference(box_at(280, 130, 90, 30))
    for overlap in (0, 60):
        out = tmp_path / f"{overlap}.geojson"
        export(annotated(SCENE, [(horseshoe, "building")], overlap=overlap), out)
        (got,) = in_pixels(out)
        assert iou(got, horseshoe) > 0.99


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10_000), overlap=st.sampled_from([0, 40, 60, 80]), noise=st.floats(0, 1.0))
def test_unsteady_hands_do_not_change_the_count(
    tmp_path_factory: pytest.TempPathFactory, seed: int, overlap: int, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    spots = [(60 + 110 * i, 60 + 110 * j) for i in range(8) for j in range(6)]
    objects = [(box_at(*spot, *rng.uniform(30, 55, 2), rng.uniform(0, 90)), "building") for spot in spots]
    tasks = annotated(SCENE, objects, overlap=overlap)
    for task in tasks:
        for result in task["annotations"][0]["result"]:
            points = np.array(result["value"]["points"])
            moved = points + rng.uniform(-noise, noise, points.shape) * 100 / 300
            result["value"]["points"] = np.clip(moved, 0, 100).tolist()
    out = tmp_path_factory.mktemp("noise") / "a.geojson"
    export(tasks, out)
    got = in_pixels(out)
    # Without overlap nothing tells whose the tip of a corner is that two hands drew apart.
    assert len(objects) <= len(got) <= len(objects) + (0 if overlap else 3)
    assert np.mean([max(iou(polygon, other) for other in got) for polygon, _ in objects]) > 0.9


# Places


def test_holes_and_parts_come_back_as_they_went_in(tmp_path: Path) -> None:
    tile = cut(SCENE)[0]
    court = Polygon(box_at(50, 50, 60, 60).exterior, [box_at(70, 70, 20, 20).exterior.coords])
    parts = [Region(box_at(150 + 40 * i, 50, 20, 20), "building", 0.5 + 0.2 * i, "", "wings") for i in range(2)]
    out = tmp_path / "a.geojson"
    export([task_of(tile, [Region(court, "building"), *parts], 1)], out)
    yard, wings = in_pixels(out)
    assert iou(yard, court) > 0.998
    assert len(yard.interiors) == 1
    assert isinstance(wings, MultiPolygon)
    assert features_of(out)[1]["properties"]["score"] == pytest.approx(0.6)


def test_area_is_that_on_the_ellipsoid(tmp_path: Path) -> None:
    mercator = Tile.from_xyz(18, 193_000, 110_000)
    out = tmp_path / "a.geojson"
    export([task_of(mercator, [Region(box_at(50, 50, 100, 100), "building")], 1)], out)
    (feature,) = features_of(out)
    assert feature["properties"]["area_m2"] == pytest.approx((100 * mercator.ground_size_m()) ** 2, rel=2e-3)
    projected = geopandas.read_file(out).to_crs("EPSG:6933").area.iloc[0]
    assert feature["properties"]["area_m2"] == pytest.approx(projected, rel=2e-3)


def test_tiles_named_by_their_url_are_joined(tmp_path: Path) -> None:
    tasks = []
    strips = {193_000: shapely.box(200, 100, 256, 140), 193_001: shapely.box(0, 100, 60, 140)}
    for number, (x, strip) in enumerate(strips.items()):
        task = task_of(Tile.from_xyz(18, x, 110_000), [Region(strip, "building")], number)
        task["data"] = {"image": f"https://tiles.example/18/{x}/110000.png"}
        tasks.append(task)
    out = tmp_path / "a.geojson"
    assert export(tasks, out, label_config=CONFIG).merged == 1
    (got,) = in_pixels(out, Tile.from_xyz(18, 193_000, 110_000))
    assert iou(got, shapely.box(200, 100, 316, 140)) > 0.999
    assert len(got.exterior.coords) == 5


def test_an_object_across_the_antimeridian_is_split(tmp_path: Path) -> None:
    # UTM zone 60 runs on past 180 degrees.
    x, y = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32660", always_xy=True).transform(180.0, 10.0)
    tile = Tile((200, 200), "EPSG:32660", Affine(1, 0, x - 100, 0, -1, y + 100), gsd_m=1.0)
    out = tmp_path / "a.geojson"
    export([task_of(tile, [Region(box_at(60, 60, 80, 50), "building")], 1)], out)
    (feature,) = features_of(out)
    assert feature["geometry"]["type"] == "MultiPolygon"
    assert feature["properties"]["area_m2"] == pytest.approx(4000, rel=2e-3)
    west, _, east, _ = feature["bbox"]
    assert west > 179
    assert east < -179
    assert validate(out) == []


def test_long_edges_follow_the_ground() -> None:
    tile = Tile((4000, 4000), "EPSG:32645", Affine(10, 0, 300_000, 0, -10, 3_600_000), gsd_m=10)
    long = shapely.box(0, 0, 4000, 4000)
    geometry = lonlat_geometry(long, tile)
    assert isinstance(geometry, Polygon)
    back = shapely.transform(geometry.segmentize(0.001), tile.lonlat_to_px)
    assert back.symmetric_difference(long).area < 0.1 * long.length
    assert shapely.hausdorff_distance(back.exterior, long.exterior) < 0.1
    assert len(geometry.exterior.coords) < 400


@settings(deadline=None, max_examples=60)
@given(
    angle=st.floats(0, 360),
    pixel=st.floats(0.05, 2),
    flip=st.booleans(),
    crs=st.sampled_from(["EPSG:32645", "EPSG:3857", "EPSG:4326"]),
)
def test_geometry_is_right_for_any_orientation(angle: float, pixel: float, flip: bool, crs: str) -> None:
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(85.5, 27.6)
    unit = pixel / 111_320 if crs == "EPSG:4326" else pixel
    place = Affine.translation(x, y) @ Affine.rotation(angle) @ Affine.scale(unit, unit if flip else -unit)
    tile = Tile((100, 100), crs, place)
    court = Polygon(box_at(10, 10, 60, 60).exterior, [box_at(30, 30, 20, 20).exterior.coords])
    geometry = lonlat_geometry(court, tile)
    assert isinstance(geometry, Polygon)
    assert geometry.is_valid
    assert geometry.exterior.is_ccw
    assert not geometry.interiors[0].is_ccw
    assert iou(shapely.transform(geometry, tile.lonlat_to_px), court) > 0.98


def test_a_crs_that_cannot_be_left_exactly_is_refused_with_the_way_out(tmp_path: Path) -> None:
    # ED50: the way to WGS 84 is known to some metres.
    tile = Tile((200, 200), "EPSG:23032", Affine(0.2, 0, 500_000, 0, -0.2, 5_400_000), gsd_m=0.2, scene="old")
    tasks = [task_of(tile, [Region(box_at(50, 50, 60, 60), "building")], 1)]
    with pytest.raises(ExportError, match=r"old: .*EPSG:23032.*accurate to .* m.*--allow-ballpark"):
        export(tasks, tmp_path / "a.geojson")
    assert not (tmp_path / "a.geojson").exists()
    report = export(tasks, tmp_path / "a.geojson", options=ExportOptions(allow_ballpark=True))
    assert report.crs[0].crs == "EPSG:23032"
    assert report.crs[0].accuracy_m is not None
    assert report.crs[0].accuracy_m > 0.2


# Counts


def test_tasks_without_a_place_are_refused_and_the_rest_goes_on(tmp_path: Path) -> None:
    placed = annotated(SCENE, [(box_at(50, 50, 40, 40), "building")])[0]
    photo = {**placed, "id": 99, "data": {"image": "http://host/photo.jpg"}}
    wrong = {
        **placed,
        "id": 98,
        "data": {"image": "x", "tile": {"window": [0, 0, 5, 5], "crs": "EPSG:0", "transform": [1]}},
    }
    report = export([photo, wrong, placed], tmp_path / "a.geojson", label_config=CONFIG)
    assert report.features == 1
    assert sum(report.refused.values()) == 2
    assert any("no place on Earth" in reason for reason in report.refused)
    with pytest.raises(ExportError, match="none of 1 tasks can be exported; 1 because the task has no place on Earth"):
        export([photo], tmp_path / "b.geojson")


def test_nothing_to_export_is_said() -> None:
    with pytest.raises(ExportError, match="no task"):
        export([], Path("a.geojson"))
    with pytest.raises(ExportError, match="none of 1 tasks has a submitted annotation"):
        export(
            [{"id": 1, "data": {}, "annotations": [{"id": 1, "was_cancelled": True, "result": []}]}], Path("a.geojson")
        )
    with pytest.raises(ExportError, match=r"a\.dwg: no format has this ending"):
        export([], Path("a.dwg"))


def test_annotated_tiles_without_objects_make_an_empty_file(tmp_path: Path) -> None:
    for ending in ("geojson", "gpkg", "parquet", "fgb"):
        out = tmp_path / f"a.{ending}"
        assert export([task_of(cut(SCENE)[0], [], 1)], out).features == 0
        assert validate(out) == []


def bow_tie() -> dict[str, Any]:
    task = task_of(
        cut(SCENE)[0], [Region(box_at(50, 50, 40, 40), "building"), Region(box_at(120, 50, 9, 9), "building")], 1
    )
    points = task["annotations"][0]["result"][0]["value"]["points"]
    points[1], points[2] = points[2], points[1]
    return task


def test_invalid_outlines_are_repaired_dropped_or_refused_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "a.geojson"
    repaired = export([bow_tie()], out)
    assert repaired.repaired == 1
    assert repaired.features >= 2
    assert "area changed" in repaired.findings[0]
    assert validate(out) == []
    dropped = export([bow_tie()], out, options=ExportOptions(on_invalid="drop"))
    assert (dropped.features, dropped.repaired) == (1, 0)
    assert dropped.dropped == {"invalid outline": 1}
    with pytest.raises(ExportError, match=r"task 1, annotation 10: .*--on-invalid repair"):
        export([bow_tie()], out, options=ExportOptions(on_invalid="error"))


def test_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    task = task_of(cut(SCENE)[0], [Region(box_at(50, 50, 40, 40), "building")], 1)
    task["annotations"][0]["result"].append(
        {"id": "k", "type": "keypoint", "from_name": "click", "to_name": "image", "is_positive": True,
         "value": {"x": 1, "y": 1}}
    )  # fmt: skip
    report = export([task], tmp_path / "a.geojson", label_config=CONFIG)
    assert report.features == 1
    assert report.dropped == {labelstudio.PROMPT: 1}


def test_ids_stay_when_an_outline_is_moved(tmp_path: Path) -> None:
    tasks = annotated(SCENE, [(box_at(250, 100, 80, 40), "building"), (box_at(50, 50, 9, 9), "building")])
    export(tasks, tmp_path / "a.geojson")
    tasks[0]["annotations"][0]["result"][-1]["value"]["points"][0][0] += 0.5
    export(tasks, tmp_path / "b.geojson")
    ids = [[f["properties"]["id"] for f in features_of(tmp_path / name)] for name in ("a.geojson", "b.geojson")]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


# Files


def test_geojson_is_as_rfc_7946_wants_it(tmp_path: Path) -> None:
    out = tmp_path / "a.geojson"
    objects = [(box_at(250, 100, 80, 40), "building"), (box_at(50, 50, 30, 30, 20), "road")]
    export(annotated(SCENE, objects), out)
    content = json.loads(out.read_text())
    assert "crs" not in content
    assert len(content["bbox"]) == 4
    for feature in content["features"]:
        (ring,) = feature["geometry"]["coordinates"]
        assert shapely.linearrings(ring).is_ccw
        assert ring[0] == ring[-1]
        assert all(85 < lon < 86 and 27 < lat < 28 for lon, lat in ring)
        assert all(round(v, 7) == v for point in ring for v in point)
        assert feature["bbox"] == pytest.approx(shape(feature["geometry"]).bounds, abs=1e-7)
        assert list(feature["properties"]) == list(FIELDS)
        assert feature["properties"]["scene"] == "banepa"


@pytest.mark.parametrize("ending", ["geojson", "gpkg", "parquet", "fgb", "shp"])
def test_every_format_holds_the_same(tmp_path: Path, ending: str) -> None:
    objects = [(box_at(250, 100, 80, 40), "building"), (box_at(50, 50, 30, 30, 20), "road")]
    out = tmp_path / f"a.{ending}"
    export(annotated(SCENE, objects), out)
    frame = geopandas.read_parquet(out) if ending == "parquet" else geopandas.read_file(out, layer="a")
    assert frame.crs.to_epsg() == 4326
    assert sorted(frame.label) == ["building", "road"]
    got = [shapely.transform(geometry, SCENE.lonlat_to_px) for geometry in frame.geometry]
    for polygon, _ in objects:
        assert max(iou(polygon, other) for other in got) > 0.99
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_there_stays_when_the_export_fails(tmp_path: Path) -> None:
    out = tmp_path / "a.geojson"
    out.write_text("precious")
    with pytest.raises(ExportError):
        export([bow_tie()], out, options=ExportOptions(on_invalid="error"))
    assert out.read_text() == "precious"


def test_the_report_page_holds_the_counts_and_escapes_what_came_from_outside(tmp_path: Path) -> None:
    task = bow_tie()
    task["data"]["tile"]["scene"] = "<script>alert(1)</script>"
    photo = {**task, "id": "<b id=x>", "data": {"image": "<i id=x>"}}
    page = tmp_path / "report.html"
    report = export([task, photo], tmp_path / "a.geojson", report_path=page)
    text = page.read_text()
    assert str(report.features) in text
    assert "PROJ" in text
    assert "<script>" not in text
    assert "<b id" not in text
    assert "<i id" not in text


# Judging


def _write(path: Path, polygons: Sequence[shapely.Geometry]) -> Path:
    features = [
        {
            "type": "Feature",
            "properties": {},
            "geometry": shapely.geometry.mapping(shapely.transform(p, SCENE.px_to_lonlat)),
        }
        for p in polygons
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_evaluation_counts_hits_misses_and_inventions(tmp_path: Path) -> None:
    truth = [box_at(100 * i, 100, 40, 40) for i in range(4)]
    guess = [truth[0], affinity.translate(truth[1], 8, 0), affinity.translate(truth[2], 30, 0)]
    figures = evaluate(_write(tmp_path / "p.geojson", guess), _write(tmp_path / "t.geojson", truth))
    assert (figures.matched, figures.predicted, figures.truth) == (2, 3, 4)
    assert figures.precision == pytest.approx(2 / 3)
    assert figures.recall == pytest.approx(0.5)
    assert figures.f1 == pytest.approx(4 / 7)
    assert figures.mean_iou == pytest.approx((1 + 32 / 48) / 2, abs=1e-3)
    assert figures.vertex_ratio == 1
    assert figures.invalid_rate == 0


def test_polis_of_a_shifted_square() -> None:
    # Two vertices of each lie 1 off the other's outline, two lie on it.
    square = shapely.box(0, 0, 10, 10)
    ring = np.array([1, 0, 0, 1, 1]).mean()  # the closing vertex counts as the first does
    assert polis(square, square) == 0
    assert 0 < polis(square, affinity.translate(square, 1, 0)) <= max(ring, 1)
