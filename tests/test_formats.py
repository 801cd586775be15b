"""What must hold of files: every format the same features, nothing half, datasets as their readers want them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import pytest
import shapely
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from pyarrow import parquet
from shapely import MultiPolygon, Polygon, affinity

from backend.datasets import FileNames, run_lengths
from backend.edits import read_edits
from backend.errors import ExportError
from backend.export import ExportOptions, export
from backend.formats import ENDINGS, EXPORTED_TABLE, FIELDS, FINDINGS_LAYER, Batch, read_frame, write
from backend.rings import Outlines
from backend.tile import Region
from backend.validation import validate
from tests.test_export import CONFIG, SCENE, annotated, bow_tie, box_at, cut, features_of, iou, task_of

COURT = Polygon(box_at(400, 300, 80, 80).exterior, [box_at(425, 325, 30, 30).exterior.coords])
OBJECTS = [(box_at(250, 100, 80, 40), "building"), (box_at(50, 50, 30, 30, 20), "road"), (COURT, "building")]


def town() -> list[dict[str, Any]]:
    """Overlapping tiles, a house across two of them, a road, a courtyard; told by whom and when."""
    tasks = annotated(SCENE, OBJECTS)
    for task in tasks:
        (annotation,) = task["annotations"]
        annotation |= {
            "completed_by": {"id": 7, "email": "a@b.c"},
            "created_at": f"2025-01-0{1 + task['id'] % 9}T08:00:00Z",
            "updated_at": f"2025-02-0{1 + task['id'] % 9}T08:00:00Z",
            "lead_time": 12.5,
        }
    return tasks


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Attributes of each feature by id, lists as lists."""
    if path.suffix in (".geojson", ".json"):
        return {feature["properties"]["id"]: feature["properties"] for feature in features_of(path)}
    if path.suffix in (".geojsonl", ".ndjson"):
        listed = [json.loads(line)["properties"] for line in path.read_text().splitlines()]
        return {properties["id"]: properties for properties in listed}
    frame = read_frame(path)
    short = {"annots": "annotations", "model_vers": "model_version", "lead_s": "lead_time_s"}
    frame = frame.rename(columns=short) if path.suffix == ".shp" else frame
    rows = {}
    for row in frame[list(FIELDS)].to_dict("records"):
        for name, kind in FIELDS.items():
            if kind == "ids":
                row[name] = json.loads(row[name]) if isinstance(row[name], str) else list(row[name])
            elif row[name] is None or row[name] != row[name]:
                row[name] = None
        rows[row["id"]] = row
    return rows


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for ending in ENDINGS:
        export(town(), folder / f"town{ending}", label_config=CONFIG)
    return folder


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_holds_the_same_features_and_attributes(written: Path, ending: str) -> None:
    truth, got = rows_of(written / "town.geojson"), rows_of(written / f"town{ending}")
    assert len(truth) == len(OBJECTS)
    assert set(got) == set(truth)
    for identity, row in truth.items():
        for name, value in row.items():
            other = got[identity][name]
            assert other == pytest.approx(value) if isinstance(value, float) else other == value, (name, other)
    area = read_frame(written / "town.geojson").to_crs("EPSG:6933").area.sum()
    assert read_frame(written / f"town{ending}").to_crs("EPSG:6933").area.sum() == pytest.approx(area, rel=1e-9)


def test_attributes_say_who_when_and_where(written: Path) -> None:
    rows = rows_of(written / "town.geojson")
    joined = next(row for row in rows.values() if len(row["tasks"]) > 1)
    assert joined["annotators"] == [7]
    assert joined["annotations"] == [task * 10 for task in joined["tasks"]]
    assert joined["lead_time_s"] == 12.5 * len(joined["tasks"])
    assert joined["created"] < joined["updated"]
    assert joined["scene"] == "banepa"
    assert joined["edited"] is False  # Label Studio's word for it: `origin`
    assert joined["model_version"] is None


def test_geojson_lines_are_features_of_their_own(written: Path) -> None:
    lines = (written / "town.geojsonl").read_text().splitlines()
    assert len(lines) == len(OBJECTS)
    assert all(json.loads(line)["type"] == "Feature" for line in lines)


def test_geoparquet_is_1_1_with_a_box_beside_each_shape(written: Path) -> None:
    file = parquet.ParquetFile(written / "town.parquet")
    metadata = json.loads(file.metadata.metadata[b"geo"])
    column = metadata["columns"][metadata["primary_column"]]
    assert metadata["version"] == "1.1.0"
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    table = file.read()
    shapes = shapely.from_wkb(np.array(table["geometry"].to_pylist(), dtype=object))
    boxes = [[box[side] for side in ("xmin", "ymin", "xmax", "ymax")] for box in table["bbox"].to_pylist()]
    assert np.array_equal(boxes, shapely.bounds(shapes))
    assert column["bbox"] == list(shapely.total_bounds(shapes))
    assert json.loads(file.metadata.metadata[b"geoprelabel:lineage"])["target_crs"] == "EPSG:4326"
    west = geopandas.read_parquet(written / "town.parquet", bbox=(*shapely.bounds(shapes)[0][:2], *boxes[0][2:]))
    assert 1 <= len(west) <= len(shapes)


@pytest.mark.skipif(shutil.which("ogrinfo") is None, reason="no ogrinfo: apt-get install gdal-bin")
@pytest.mark.parametrize("ending", [".geojson", ".geojsonl", ".gpkg", ".fgb", ".shp"])
def test_gdal_finds_as_many_features(written: Path, ending: str) -> None:
    done = subprocess.run(
        ["ogrinfo", "-ro", "-so", str(written / f"town{ending}"), "town"], capture_output=True, text=True, check=True
    )
    assert f"Feature Count: {len(OBJECTS)}" in done.stdout
    assert "ERROR" not in done.stdout + done.stderr


def test_a_geopackage_brings_its_style_and_the_places_to_look_at(tmp_path: Path) -> None:
    out = tmp_path / "town.gpkg"
    tasks = [bow_tie(), *town()[1:]]
    report = export(tasks, out, label_config=CONFIG)
    assert report.repaired == 1
    with contextlib.closing(sqlite3.connect(out)) as database:
        styles = dict(database.execute("SELECT f_table_name, styleQML FROM layer_styles"))
        assert database.execute(f"SELECT count(*) FROM {EXPORTED_TABLE}").fetchone() == (report.features,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert 'attr="label"' in styles["town"]
    assert 'value="building"' in styles["town"]
    findings = geopandas.read_file(out, layer=FINDINGS_LAYER)
    assert set(findings.task) == {"1"}
    assert "area changed" in findings.reason[0]
    assert SCENE.outline_px().contains(shapely.transform(findings.geometry[0], SCENE.lonlat_to_px))


def test_conflicts_are_told_and_placed(tmp_path: Path) -> None:
    pond = affinity.translate(OBJECTS[0][0], 3, 0)
    report = export(annotated(SCENE, [*OBJECTS, (pond, "road")]), tmp_path / "a.gpkg")
    (conflict,) = report.conflicts
    assert report.conflict_count == 1
    assert set(conflict.labels) == {"building", "road"}
    assert conflict.overlap > 0.9
    assert len(conflict.tasks) > 1
    rows = rows_of(tmp_path / "a.gpkg")
    assert {rows[identity]["label"] for identity in conflict.ids} == {"building", "road"}
    place = SCENE.lonlat_to_px(np.array([conflict.lonlat]))[0]
    assert pond.intersection(OBJECTS[0][0]).buffer(1).contains(shapely.Point(place))
    assert "same ground" in geopandas.read_file(tmp_path / "a.gpkg", layer=FINDINGS_LAYER).reason[0]


def test_a_shapefile_cuts_what_it_cannot_hold(tmp_path: Path) -> None:
    tasks = town()
    for task in tasks:
        for result in task["annotations"][0]["result"]:
            result["value"]["polygonlabels"] = ["ä" * 200]
    export(tasks, tmp_path / "a.shp")
    frame = geopandas.read_file(tmp_path / "a.shp")
    assert all(len(name) <= 10 for name in frame.columns)
    assert set(frame.label) == {"ä" * 127}


# Points


def trees() -> list[dict[str, Any]]:
    """The town with three trees, one of which two tiles show, and a keypoint that is a prompt."""
    tasks = town()
    spots = [(120.3, 60.1, "one"), (250.0, 40.0, "two"), (500.0, 200.0, "three")]
    for task, tile in zip(tasks, cut(SCENE), strict=True):
        results = task["annotations"][0]["result"]
        for x, y, name in spots:
            column, row = np.array([x, y]) - np.array(tile.window[:2])  # type: ignore[index]
            if 0 <= column <= tile.size[0] and 0 <= row <= tile.size[1]:
                value = {"x": column / tile.size[0] * 100, "y": row / tile.size[1] * 100, "width": 0.5}
                about = {"id": f"{name}-{task['id']}", "type": "keypointlabels", "to_name": "image", "score": 0.5}
                value |= {"keypointlabels": ["tree"]}
                results.append({**about, "from_name": "tree", "origin": "manual", "value": value})
    prompt = {"id": "p", "type": "keypointlabels", "from_name": "click", "to_name": "image"}
    value = {"x": 1, "y": 1, "width": 1, "keypointlabels": ["building"]}
    tasks[0]["annotations"][0]["result"].append({**prompt, "is_positive": True, "value": value})
    return tasks


TREE_CONFIG = CONFIG.replace(
    "</View>", '<KeyPointLabels name="tree" toName="image"><Label value="tree"/></KeyPointLabels></View>'
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    for ending in ENDINGS:
        report = export(trees(), folder / f"town{ending}", label_config=TREE_CONFIG)
        left_out = {reason: count for reason, count in report.dropped.items() if "point" in reason}
        assert left_out == ({"point, for which a Shapefile of outlines has no place": 5} if ending == ".shp" else {})
        assert report.features == (3 if ending == ".shp" else 6)
        assert report.labels.get("tree", 0) == (0 if ending == ".shp" else 3)
    return folder


def test_points_are_features_where_they_were_set(planted: Path) -> None:
    features = features_of(planted / "town.geojson")
    points = [feature for feature in features if feature["geometry"]["type"] == "Point"]
    found = {tuple(feature["geometry"]["coordinates"]): feature["properties"] for feature in points}
    expected = np.round(SCENE.px_to_lonlat(np.array([(120.3, 60.1), (250.0, 40.0), (500.0, 200.0)])), 7)
    assert set(found) == set(map(tuple, expected.tolist()))
    shared = found[tuple(expected[1])]
    assert len(shared["tasks"]) == 2, "a tree that two tiles show is one"
    assert (shared["label"], shared["score"], shared["area_m2"]) == ("tree", 0.5, None)
    assert shared["annotators"] == [7]


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending != ".shp"])
def test_every_format_but_a_shapefile_holds_the_same_points(planted: Path, ending: str) -> None:
    rows = rows_of(planted / f"town{ending}")
    assert rows == rows_of(planted / "town.geojson")
    frame = read_frame(planted / f"town{ending}")
    assert sorted(frame.geometry.geom_type.str.replace("Multi", "")) == ["Point"] * 3 + ["Polygon"] * 3
    assert validate(planted / f"town{ending}") == []


def test_a_geopackage_has_points_in_a_layer_of_their_own(planted: Path) -> None:
    layers = dict(pyogrio.list_layers(planted / "town.gpkg"))
    assert (layers["town"], layers["town_points"]) == ("MultiPolygon", "Point")
    with contextlib.closing(sqlite3.connect(planted / "town.gpkg")) as database:
        styled = [name for (name,) in database.execute("SELECT f_table_name FROM layer_styles")]
    assert styled == ["town", FINDINGS_LAYER, "town_points"]
    assert not len(read_edits(planted / "town.gpkg"))


def test_points_without_outlines_are_an_export(tmp_path: Path) -> None:
    tasks = trees()
    for task in tasks:
        (annotation,) = task["annotations"]
        annotation["result"] = [result for result in annotation["result"] if result["type"] == "keypointlabels"]
    for ending in ENDINGS:
        report = export(tasks, tmp_path / f"a{ending}", label_config=TREE_CONFIG)
        assert report.features == (0 if ending == ".shp" else 3)
    assert len(read_frame(tmp_path / "a.gpkg")) == 3


def test_datasets_of_outlines_count_the_points_that_they_leave_out(tmp_path: Path) -> None:
    for kind, name in (("coco", "COCO"), ("yolo", "YOLO")):
        out = tmp_path / (f"{kind}.json" if kind == "coco" else kind)
        report = export(trees(), out, label_config=TREE_CONFIG, options=ExportOptions(format=kind))
        assert report.features == 3
        assert report.dropped[f"point, for which {name} has no place"] == 5
    export(trees(), tmp_path / "stac", label_config=TREE_CONFIG, options=ExportOptions(format="stac"))
    (labels,) = tmp_path.glob("stac/*/labels.geojson")
    assert sum(feature["geometry"]["type"] == "Point" for feature in features_of(labels)) == 3


def test_half_characters_and_odd_labels_are_written(tmp_path: Path) -> None:
    tasks = annotated(SCENE, OBJECTS)
    tasks[0]["annotations"][0]["result"][0]["value"]["polygonlabels"] = ['},{"id":"\ud800 <&>\n']
    tasks[0]["annotations"][0]["result"][0]["id"] = "\ud800"
    tasks[0]["annotations"][0] |= {"id": "\ud800", "created_at": "\ud800"}
    for task in tasks:
        task["data"]["tile"]["scene"] = "\ud800"
    for ending in ENDINGS:
        out = tmp_path / f"a{ending}"
        export(tasks, out)
        assert '},{"id":"? <&>\n' in [row["label"] for row in rows_of(out).values()]


def test_ids_that_are_texts_stay_texts(tmp_path: Path) -> None:
    tasks = town()
    tasks[0]["id"] = "first"
    for ending in (".geojson", ".parquet", ".gpkg"):
        export(tasks, tmp_path / f"a{ending}")
        assert {"first"} <= {task for row in rows_of(tmp_path / f"a{ending}").values() for task in row["tasks"]}


# Whole or not at all


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_export_that_fails_in_the_middle_leaves_what_was_there(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"a{ending}"
    out.write_text("precious")

    def batches() -> Iterator[Batch]:
        columns = {name: [[] if kind == "ids" else None] for name, kind in FIELDS.items()}
        columns |= {"id": ["a"], "label": ["b"]}
        yield Batch(Outlines.of([shapely.box(0, 0, 1, 1)]), columns)
        raise ExportError("the disk is full")

    with pytest.raises(ExportError, match="the disk is full"):
        write(batches(), out)
    assert out.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("ending", [".geojson", ".gpkg", ".parquet"])
def test_a_killed_export_leaves_no_half_file(tmp_path: Path, ending: str) -> None:
    script = """
import sys, time
import numpy as np, shapely
from pathlib import Path
from backend.formats import FIELDS, Batch, write
from backend.rings import Outlines
def batches():
    columns = {name: [[] if kind == "ids" else "x" if kind == "text" else None] * 500 for name, kind in FIELDS.items()}
    number = 0
    while True:
        columns["id"] = [str(number := number + 1) for _ in range(500)]
        yield Batch(Outlines.of([shapely.box(0, 0, 1, 1)] * 500), columns)
        print("written", flush=True)
        time.sleep(0.02)
write(batches(), Path(sys.argv[1]))
"""
    out = tmp_path / f"a{ending}"
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "written\n"
        # Another export into the same folder leaves alone what is still being written …
        export(town(), tmp_path / "b.geojson", label_config=CONFIG)
        (folder,) = tmp_path.glob(".export-*")
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    assert folder.exists()
    # … and clears away what nobody writes any more.
    export(town(), tmp_path / "b.geojson", label_config=CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["b.geojson"]


def test_what_stepped_aside_when_an_export_was_killed_comes_back(tmp_path: Path) -> None:
    old = tmp_path / ".export-abc" / "dataset.old"
    old.mkdir(parents=True)
    (old / "data.yaml").write_text("names:")
    (tmp_path / ".export-a file").write_text("somebody else's")
    write(iter(()), tmp_path / "other.geojson")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export-a file", "dataset", "other.geojson"]
    assert (tmp_path / "dataset" / "data.yaml").read_text() == "names:"


# COCO, YOLO, STAC


def test_coco_draws_the_same_features_on_each_tile(tmp_path: Path, written: Path) -> None:
    out = tmp_path / "coco.json"
    report = export(town(), out, options=ExportOptions(format="coco"), label_config=CONFIG)
    content = json.loads(out.read_text())
    assert report.features == len(OBJECTS)
    assert {a["feature_id"] for a in content["annotations"]} == set(rows_of(written / "town.geojson"))
    assert [c["name"] for c in content["categories"]] == ["building", "road"]
    assert [c["id"] for c in content["categories"]] == [1, 2]
    names = [image["file_name"] for image in content["images"]]
    assert len(set(names)) == len(names) == len(town())
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    images = {image["id"]: image for image in content["images"]}
    tiles = {task["id"]: tile for task, tile in zip(town(), cut(SCENE), strict=True)}
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        window = tiles[image["task"]].window
        assert window is not None
        truths = [
            affinity.translate(polygon, -window[0], -window[1]).intersection(shapely.box(0, 0, *window[2:]))
            for polygon, _ in OBJECTS
        ]
        x, y, w, h = annotation["bbox"]
        best = max(truths, key=lambda truth: iou(truth.envelope, shapely.box(x, y, x + w, y + h)))
        assert annotation["area"] == pytest.approx(best.area, rel=0.02)
        if isinstance(annotation["segmentation"], dict):
            mask = unpacked(annotation["segmentation"])
            assert mask.shape == (image["height"], image["width"])
            assert mask.sum() == pytest.approx(best.area, rel=0.03)
            assert best.interiors
        else:
            shape = MultiPolygon([Polygon(np.reshape(ring, (-1, 2))) for ring in annotation["segmentation"]])
            assert iou(shape, best) > 0.98


def unpacked(code: dict[str, Any]) -> np.ndarray:
    """COCO's uncompressed code, read as its description has it."""
    height, width = code["size"]
    values = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
    return values.reshape(width, height).T.astype(bool)


@settings(deadline=None, max_examples=100)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_run_lengths_give_the_mask_back(mask: np.ndarray) -> None:
    counts = run_lengths(mask)
    assert sum(counts) == mask.size
    assert all(count > 0 for count in counts[1:])
    assert np.array_equal(unpacked({"size": mask.shape, "counts": counts}), mask)


def test_yolo_has_a_label_file_for_each_tile(tmp_path: Path) -> None:
    out = tmp_path / "yolo"
    for _ in range(2):  # the second time in place of the first
        report = export(town(), out, options=ExportOptions(format="yolo"), label_config=CONFIG)
    with (out / "images.csv").open() as file:
        images = {row["image"]: row for row in csv.DictReader(file)}
    assert {path.stem for path in (out / "labels").iterdir()} == {Path(name).stem for name in images}
    with (out / "features.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert len({row["id"] for row in listed}) == report.features == len(OBJECTS)
    for row in listed:
        line = (out / "labels" / f"{Path(row['image']).stem}.txt").read_text().splitlines()[int(row["line"]) - 1]
        number, *shares = line.split()
        assert number in ("0", "1")
        assert len(shares) >= 6
        assert len(shares) % 2 == 0
        assert all(0 <= float(share) <= 1 for share in shares)
    assert '  0: "building"' in (out / "data.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["yolo"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    for kind in ("yolo", "stac"):
        with pytest.raises(ExportError, match="name a folder that is not there yet"):
            export(town(), tmp_path, options=ExportOptions(format=kind))
    with pytest.raises(ExportError, match=r"COCO is one \.json file"):
        export(town(), tmp_path / "a.geojson", options=ExportOptions(format="coco"))


def test_stac_items_have_what_the_specification_requires(tmp_path: Path) -> None:
    out = tmp_path / "stac"
    report = export(town(), out, options=ExportOptions(format="stac"), label_config=CONFIG)
    collection = json.loads((out / "collection.json").read_text())
    for name in ("type", "stac_version", "id", "description", "license", "extent", "links"):
        assert name in collection
    (link,) = [link for link in collection["links"] if link["rel"] == "item"]
    item = json.loads((out / link["href"]).read_text())
    checked_item(item, (out / link["href"]).parent)
    assert item["stac_extensions"] == ["https://stac-extensions.github.io/label/v1.0.1/schema.json"]
    properties = item["properties"]
    assert properties["label:type"] == "vector"
    assert properties["label:properties"] == ["label"]
    assert properties["label:description"]
    assert properties["label:classes"] == [{"name": "label", "classes": ["building", "road"]}]
    counts = {entry["name"]: entry["count"] for entry in properties["label:overviews"][0]["counts"]}
    assert counts == {"building": 2, "road": 1}
    labels = (out / link["href"]).parent / item["assets"]["labels"]["href"]
    assert len(rows_of(labels)) == report.features
    sources = [link["href"] for link in item["links"] if link["rel"] == "source"]
    assert len(sources) == len(town())
    for source in sources:
        path = (out / link["href"]).parent / source
        checked_item(json.loads(path.read_text()), path.parent)


def checked_item(item: dict[str, Any], folder: Path) -> None:
    """Required fields of a STAC 1.0 item, and links that lead somewhere."""
    assert item["type"] == "Feature"
    assert item["stac_version"] == "1.0.0"
    assert item["id"]
    assert len(item["bbox"]) == 4
    assert shapely.from_geojson(json.dumps(item["geometry"])).is_valid
    assert item["properties"]["datetime"]
    assert item["collection"]
    assert item["assets"]
    for link in item["links"]:
        assert (folder / link["href"]).resolve().is_file(), link


def test_no_two_images_share_a_label_file() -> None:
    names = FileNames()
    given_names = [
        names.of(address, task)
        for task, address in enumerate(
            [
                "http://h/a/1.jpg",
                "http://h/b/1.jpg",
                "http://h/b/1.png",
                "/data/../../etc/passwd",
                "",
                "x/%2e%2e%2f.jpg",
            ]
        )
    ]
    assert len({Path(name).stem.casefold() for name in given_names}) == len(given_names)
    assert all("/" not in name and not name.startswith(".") for name in given_names)


# Back from the desktop


def edited(path: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        # GeoPackage's triggers ask for functions of SpatiaLite, which a desktop GIS brings.
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f'DROP TRIGGER "{name}"')
        for statement, values in statements:
            database.execute(statement, values)


def blob_of(shape: shapely.Geometry) -> bytes:
    return b"GP\0\1" + (4326).to_bytes(4, "little") + shapely.to_wkb(shape, byte_order=1)


def test_a_geopackage_edited_on_the_desktop_is_taken_back_by_id(tmp_path: Path) -> None:
    path, out = tmp_path / "town.gpkg", tmp_path / "town.geojson"
    export(town(), path, label_config=CONFIG)
    assert len(read_edits(path)) == 0
    before = rows_of(path)
    road = next(i for i, row in before.items() if row["label"] == "road")
    court, house = sorted(set(before) - {road}, key=lambda i: -before[i]["area_m2"])
    moved = shapely.transform(box_at(250, 100, 80, 60), SCENE.px_to_lonlat)
    new = shapely.transform(box_at(600, 600, 50, 50), SCENE.px_to_lonlat)
    edited(
        path,
        ("UPDATE town SET geom = ? WHERE id = ?", (blob_of(MultiPolygon([moved])), house)),
        ("UPDATE town SET label = 'building' WHERE id = ?", (road,)),
        ("DELETE FROM town WHERE id = ?", (court,)),
        ("INSERT INTO town (label, geom) VALUES ('road', ?)", (blob_of(MultiPolygon([new])),)),
    )
    edits = read_edits(path)
    assert set(edits.changed) == {house, road}
    assert edits.deleted == {court}
    assert len(edits.added) == 1

    report = export(town(), out, label_config=CONFIG, edits=edits)
    rows = rows_of(out)
    assert report.edits == {"changed": 2, "deleted": 1, "added": 1}
    assert set(rows) == {house, road, *edits.added}
    assert rows[road]["label"] == "building"
    assert rows[house]["edited"] is True
    assert rows[house]["area_m2"] == pytest.approx(80 * 60 * 0.04, rel=1e-2)
    assert rows[house]["tasks"] == before[house]["tasks"]
    assert rows[next(iter(edits.added))]["label"] == "road"
    # What was exported with edits can be edited again.
    export(town(), tmp_path / "again.gpkg", label_config=CONFIG, edits=edits)
    assert len(read_edits(tmp_path / "again.gpkg")) == 0


def test_points_edited_on_the_desktop_are_taken_back(tmp_path: Path) -> None:
    path, out = tmp_path / "town.gpkg", tmp_path / "out.geojson"
    export(trees(), path, label_config=TREE_CONFIG)
    moved, gone, copied = sorted(i for i, row in rows_of(path).items() if row["label"] == "tree")
    place, new, copy = (blob_of(shapely.Point(lon, 27.6)) for lon in (85.1, 85.2, 85.3))
    edited(
        path,
        ("UPDATE town_points SET geom = ? WHERE id = ?", (place, moved)),
        ("DELETE FROM town_points WHERE id = ?", (gone,)),
        ("INSERT INTO town_points (label, geom) VALUES ('bush', ?)", (new,)),
        ("INSERT INTO town_points (id, label, geom) VALUES (?, 'tree', ?)", (copied, copy)),
    )
    edits = read_edits(path)
    assert (set(edits.changed), edits.deleted, len(edits.added)) == ({moved}, {gone}, 2)
    export(trees(), out, label_config=TREE_CONFIG, edits=edits)
    rows, places = rows_of(out), {f["properties"]["id"]: f["geometry"]["coordinates"] for f in features_of(out)}
    assert places[moved] == [85.1, 27.6]
    assert sorted(row["label"] for i, row in rows.items() if row["area_m2"] is None) == ["bush", "tree", "tree", "tree"]
    assert rows[copied]["edited"] is None
    # Where the file has no place for points, an edit of one is no edit that was lost.
    report = export(trees(), tmp_path / "a.shp", label_config=TREE_CONFIG, edits=edits)
    assert report.dropped["point, for which a Shapefile of outlines has no place"] == 5 + 2
    assert not any("no longer there" in reason for reason in report.dropped)
    # A file of an earlier release does not say what points it had.
    edited(path, (f"ALTER TABLE {EXPORTED_TABLE} DROP COLUMN layer", ()))
    edited(path, (f"DELETE FROM {EXPORTED_TABLE} WHERE id IN (?, ?, ?)", (moved, gone, copied)))
    assert len(read_edits(path)) == 0


def test_a_feature_split_on_the_desktop_keeps_its_id_once(tmp_path: Path) -> None:
    path = tmp_path / "town.gpkg"
    export(town(), path)
    identity = next(i for i, row in rows_of(path).items() if row["label"] == "road")
    parts = [shapely.transform(box_at(x, 50, w, 30), SCENE.px_to_lonlat) for x, w in ((50, 12), (64, 16))]
    edited(
        path,
        ("UPDATE town SET geom = ? WHERE id = ?", (blob_of(parts[0]), identity)),
        ("INSERT INTO town (id, label, geom) VALUES (?, 'road', ?)", (identity, blob_of(parts[1]))),
    )
    edits = read_edits(path)
    assert set(edits.changed) == {identity}
    assert edits.changed[identity].geometry.area == pytest.approx(parts[1].area, rel=1e-2)
    assert len(edits.added) == 1


def test_edits_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "town.gpkg"
    export(town(), path)
    rows = rows_of(path)
    road = next(i for i, row in rows.items() if row["label"] == "road")
    edited(
        path,
        ("UPDATE town SET geom = ? WHERE id = ?", (b"nonsense", road)),
        ("DELETE FROM town WHERE id != ?", (road,)),
    )
    edits = read_edits(path)
    assert len(edits.unreadable) == 1
    assert road not in edits.deleted
    report = export(annotated(SCENE, [OBJECTS[1]]), tmp_path / "a.geojson", edits=edits)
    assert report.features == 1
    assert report.dropped["desktop edit that cannot be read"] == 1
    assert report.dropped["desktop edit of a feature that is no longer there"] == 2


def test_other_files_are_not_taken_for_edits(tmp_path: Path) -> None:
    (tmp_path / "a.gpkg").write_text("not a database")
    geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)], crs=4326).to_file(tmp_path / "b.gpkg")
    for name in ("a.gpkg", "b.gpkg"):
        with pytest.raises(ExportError, match="is not a GeoPackage that `geoprelabel export` wrote"):
            read_edits(tmp_path / name)
    with pytest.raises(ExportError, match="is not there"):
        read_edits(tmp_path / "c.gpkg")


def test_regions_are_told_from_what_was_predicted(tmp_path: Path) -> None:
    tile = cut(SCENE)[0]
    shapes = [box_at(20 + 50 * i, 20, 30, 30) for i in range(4)]
    task = task_of(tile, [Region(shape, "building") for shape in shapes], 1)
    results = task["annotations"][0]["result"]
    predicted = json.loads(json.dumps(results[:3]))
    predicted[1]["value"]["points"][0][0] += 0.5
    predicted[2]["value"]["polygonlabels"] = ["road"]
    results[0]["value"]["points"][0][0] += 1e-7  # the editor's rounding
    results[3]["origin"] = "manual"
    task["predictions"] = [{"id": 1, "model_version": "compact-1", "result": predicted}]
    export([task], tmp_path / "a.geojson")
    rows = list(rows_of(tmp_path / "a.geojson").values())
    assert [row["edited"] for row in rows] == [False, True, True, None]
    assert [row["model_version"] for row in rows] == ["compact-1"] * 3 + [None]
