"""What must hold of seams and of reading: pairs block by block, quick ways equal to careful ones, whole scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import Polygon

from backend import labelstudio, seams
from backend.annotations import chosen, objects_of, plain_outlines, tasks_in
from backend.earth import lonlat_geometry
from backend.errors import BadRequest, ExportError
from backend.evaluation import evaluate
from backend.export import ExportOptions, export
from backend.ground import areas_m2, lonlat_geometries
from backend.seams import near_pairs
from backend.spool import Spool
from backend.tile import Region, Tile
from demo.annotator import Truth
from demo.scene import make_scene
from tests.test_export import CONFIG, SCENE, TAG, annotated, box_at, cut, features_of, in_pixels, task_of

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "hot_banepa_e2e" / "scenes"


# Pairs


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 120), block=st.integers(1, 40), half=st.integers(0, 40))
def test_pairs_found_block_by_block_are_those_that_are_near(seed: int, count: int, block: int, half: int) -> None:
    reach = half / 2 + 0.25  # never just as far as whole pixels are apart
    rng = np.random.default_rng(seed)
    low = np.round(rng.uniform(-100, 300, (count, 2)))
    boxes = np.hstack((low, low + np.round(rng.exponential(20, (count, 2)))))
    boxes[: count // 20, 2:] += 300
    whole = seams._BLOCK
    seams._BLOCK = block
    try:
        found = [tuple(pair) for pairs in near_pairs(boxes, reach) for pair in pairs.tolist()]
    finally:
        seams._BLOCK = whole
    low, high = boxes[:, :2], boxes[:, 2:] + reach
    near = (low[:, None] <= high[None]).all(2) & (low[None] <= high[:, None]).all(2)
    assert sorted(found) == [(i, j) for i, j in np.argwhere(near).tolist() if i < j]


def test_the_size_of_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    objects = [
        (box_at(*rng.uniform((5, 5), (900, 700)), *rng.uniform(12, 60, 2), rng.uniform(0, 90)), "building")
        for _ in range(40)
    ]
    tasks = annotated(SCENE, objects)
    export(tasks, tmp_path / "a.geojson")
    monkeypatch.setattr(seams, "_BLOCK", 3)
    export(tasks, tmp_path / "b.geojson")
    assert features_of(tmp_path / "a.geojson") == features_of(tmp_path / "b.geojson")


def test_what_lies_in_a_spool_comes_back(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool.append([b"a", b"", b"ccc"])
        spool.append([b"dd"])
        assert len(spool) == 4
        assert spool.read([0, 1, 2, 3]) == [b"a", b"", b"ccc", b"dd"]
        assert spool.read(np.array([3, 0])) == [b"dd", b"a"]
        assert spool.read([]) == []
        spool.append([bytes(9999), b"f"])
        assert spool.read([0, 5, 3, 0]) == [b"a", b"f", b"dd", b"a"]
        assert list(tmp_path.iterdir()) == []


def test_rows_of_arrays_come_back_from_a_spool(tmp_path: Path) -> None:
    rows, row = np.arange(24.0).reshape(12, 2), np.dtype((np.float64, 2))
    with Spool(tmp_path) as spool:
        spool.append_rows(rows[:5], np.array([3, 2]))
        spool.append_rows(rows[5:], np.array([7]))
        for numbers in ([0, 1, 2], [2, 0], [1]):
            found, lengths = spool.read_rows(np.array(numbers), row)
            assert lengths.tolist() == [[3, 2, 7][number] for number in numbers]
            assert found.tolist() == [each for number in numbers for each in np.split(rows, [3, 5])[number].tolist()]
        found, lengths = spool.read_rows(np.empty(0, np.int64), row)
        assert (found.shape, lengths.tolist()) == ((0, 2), [])
        # So far apart that they are not read in one go.
        spool.append_rows(np.ones((500, 2)), np.array([499, 1]))
        assert spool.read_rows(np.array([4, 0]), row)[0].tolist() == [[1.0, 1.0], *rows[:3].tolist()]


# Quick ways and careful ones


POINTS = st.lists(
    st.tuples(st.floats(-5, 105), st.floats(-5, 105)) | st.tuples(st.integers(0, 10), st.integers(0, 10)), max_size=9
)


@settings(deadline=None, max_examples=40)
@given(rings=st.lists(POINTS, max_size=4), odd=st.sampled_from(["", "score", "meta", "label", "text", "nan", "triple"]))
def test_outlines_read_in_bulk_are_those_read_with_care(
    tmp_path_factory: pytest.TempPathFactory, rings: list[list[tuple[float, float]]], odd: str
) -> None:
    results: list[dict[str, Any]] = [
        {
            "id": f"r{number}",
            "type": "polygonlabels",
            "from_name": "polygon",
            "to_name": "image",
            "value": {"points": [list(point) for point in ring], "polygonlabels": ["building"]},
        }
        for number, ring in enumerate(rings)
    ]
    for result in results[:1]:
        points = result["value"]["points"]
        result |= {"score": {"score": 0.5}, "meta": {"meta": {"object": "x"}}}.get(odd, {})
        if odd == "label":
            result["value"]["polygonlabels"] = ["building", "road"]
        if points and odd in ("text", "nan", "triple"):
            points[0] = {"text": ["1", "2"], "nan": [float("nan"), 1], "triple": [1, 2, 3]}[odd]
    tile = cut(SCENE)[0]
    task = {"id": 1, "data": {"image": "http://h/1.jpg", "tile": tile.to_record()}}
    task["annotations"] = [{"id": 1, "result": results}]
    careful = labelstudio.read_annotation(task["annotations"][0], tile, config=labelstudio.parse_config(CONFIG))
    out = tmp_path_factory.mktemp("bulk") / "a.geojson"
    report = export([task], out, label_config=CONFIG, options=ExportOptions(merge_seams=False))
    assert report.regions == len(careful.regions)
    assert sum(report.dropped.values()) + report.repaired >= sum(careful.dropped.values())
    expected = [
        lonlat_geometry(shapely.union_all([part.polygon for part in parts]), tile)
        for parts in objects_of(careful.regions)
    ]
    if odd != "meta":
        got = [shapely.geometry.shape(feature["geometry"]) for feature in features_of(out)]
        wanted = [geometry for geometry in expected if geometry is not None]
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            # Where an outline crosses itself, the place may round to the next step of the grid.
            assert a.symmetric_difference(b).area <= 1e-6 * b.area + 2e-7 * b.length


def test_plain_outlines_are_only_what_needs_no_care() -> None:
    result = {"id": "a", "type": "polygonlabels", "value": {"points": [[0, 0], [1, 0], [1, 1]], "polygonlabels": ["b"]}}
    assert plain_outlines({"result": [result]}, None, None) is not None
    for change in (
        {"type": "rectanglelabels"},
        {"is_positive": True},
        {"image_rotation": 90},
        {"id": None},
        {"meta": {"object": "x"}},
        {"score": "high"},
        {"value": {"points": [[0, 0], [1, 0], [1, 1]]}},
        {"value": {"points": [[0, 0], [1, 0], [1, 1]], "polygonlabels": ["b", "c"]}},
        {"value": "nonsense"},
    ):
        assert plain_outlines({"result": [{**result, **change}]}, None, None) is None, change
    assert plain_outlines({"result": [result, result]}, None, None) is None
    assert plain_outlines({"result": [result]}, None, "another image") is None
    assert plain_outlines({"result": [result], "was_cancelled": True}, None, None) is None


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000),
    size=st.floats(1, 3000),
    crs=st.sampled_from(["EPSG:32645", "EPSG:3857", "EPSG:32760", "EPSG:3413"]),
)
def test_many_shapes_at_once_are_as_one_by_one(seed: int, size: float, crs: str) -> None:
    places = {"EPSG:32645": (354e3, 3.05e6), "EPSG:3857": (9.5e6, 3.2e6), "EPSG:32760": (5e5, 4.9e6)}
    x, y = places.get(crs, (4e5, -9e5))
    tile = Tile((4000, 4000), crs, Affine(1.5, 0, x, 0, -1.5, y), gsd_m=1.5)
    rng = np.random.default_rng(seed)
    shapes = np.array(
        [box_at(*rng.uniform(0, 800, 2), *rng.uniform(0.2, size, 2), rng.uniform(0, 90)) for _ in range(6)]
        + [shapely.box(0, 0, 100, 100).difference(shapely.box(20, 20, 40, 50))]
        + [shapely.union_all([shapely.box(0, 0, 5, 5), shapely.box(9, 9, 12, 12)])],
        dtype=object,
    )
    many = lonlat_geometries(shapes, tile)
    alone = [lonlat_geometry(shape, tile) for shape in shapes]
    for a, b in zip(many, alone, strict=True):
        assert a.is_valid
        assert a.geom_type == b.geom_type
        # An edge may leave its line by 0.05 pixels of 1.5 m, or have points that keep it there.
        assert a.symmetric_difference(b).area <= 2e-6 * b.length
        assert all(part.exterior.is_ccw for part in shapely.get_parts(a))
    from backend.earth import area_m2

    assert areas_m2(many) == pytest.approx([area_m2(one) for one in many], rel=5e-5, abs=2e-3)


# Which annotations


def several() -> dict[str, Any]:
    """One task, three annotators: the second is ground truth, the third the newest."""
    tile = cut(SCENE)[0]
    task = task_of(tile, [], 1)
    task["annotations"] = [
        {
            "id": number,
            "completed_by": number,
            "ground_truth": number == 2,
            "updated_at": f"2025-01-0{number}",
            "result": labelstudio.results_of(
                [Region(box_at(50 * number, 50, 30, 30), "building")], TAG, tile, task_id=number
            ),
        }
        for number in (1, 2, 3)
    ]
    task["annotations"].append({"id": 4, "was_cancelled": True, "updated_at": "2025-01-09", "result": []})
    return task


@pytest.mark.parametrize(("which", "ids"), [("ground_truth", [2]), ("latest", [3]), ("all", [1, 2, 3])])
def test_of_several_annotations_those_count_that_were_asked_for(tmp_path: Path, which: str, ids: list[int]) -> None:
    assert [annotation["id"] for annotation in chosen(several(), which)] == ids
    report = export([several()], tmp_path / "a.geojson", options=ExportOptions(annotations_from=which))
    found = [feature["properties"] for feature in features_of(tmp_path / "a.geojson")]
    assert [properties["annotations"] for properties in found] == [[number] for number in ids]
    assert [properties["annotators"] for properties in found] == [[number] for number in ids]
    assert report.annotations == len(ids)
    with pytest.raises(ExportError, match="annotations_from must be one of"):
        ExportOptions(annotations_from="consensus")


def test_with_all_annotations_each_annotators_objects_are_joined_alone(tmp_path: Path) -> None:
    mine, other = (annotated(SCENE, [(box_at(250, 100, 80, height), "building")]) for height in (40, 44))
    for task, second in zip(mine, other, strict=True):
        task["annotations"][0]["completed_by"] = 1
        second["annotations"][0] |= {"completed_by": 2, "id": 1000 + second["id"]}
        task["annotations"].append(second["annotations"][0])
    export(mine, tmp_path / "a.geojson", options=ExportOptions(annotations_from="all"))
    assert sorted(shape.area for shape in in_pixels(tmp_path / "a.geojson")) == pytest.approx([3200, 3520], rel=0.01)
    assert sorted(f["properties"]["annotators"] for f in features_of(tmp_path / "a.geojson")) == [[1], [2]]


# Files of tasks


@settings(deadline=None, max_examples=60)
@given(
    tasks=st.lists(
        st.fixed_dictionaries({"data": st.dictionaries(st.text(max_size=4), st.text(max_size=9))}), max_size=6
    ),
    indent=st.sampled_from([None, 2]),
    chunk=st.integers(1, 30),
)
def test_tasks_are_read_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory, tasks: list[dict[str, Any]], indent: int | None, chunk: int
) -> None:
    from backend import annotations

    path = tmp_path_factory.mktemp("tasks") / "tasks.json"
    path.write_text(json.dumps(tasks, indent=indent))
    whole = annotations._CHUNK_BYTES
    annotations._CHUNK_BYTES = chunk
    try:
        assert list(tasks_in(path)) == tasks
    finally:
        annotations._CHUNK_BYTES = whole


def test_what_python_writes_and_json_does_not_know_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text('\ufeff [{"data": {"a": NaN, "b": "\\ud83d", "c": 123456789012345678901234567890}},{"data": {}}]')
    first, second = tasks_in(path)
    assert np.isnan(first["data"]["a"])
    assert (first["data"]["b"], first["data"]["c"]) == ("\ud83d", 123456789012345678901234567890)
    assert second == {"data": {}}


def test_tasks_before_the_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text('[{"data": {"n": 1}}, {"data": {"n": 2}}, {"data": {"n: 3}}]')
    reader = tasks_in(path)
    assert [next(reader)["data"]["n"] for _ in range(2)] == [1, 2]
    with pytest.raises(BadRequest, match="task number 2"):
        next(reader)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('[{"data": {}},]', "task number 1"),
        ('[,{"data": {}}]', "task number 0"),
        ("", "must hold a list"),
        ('{"data": {}}', "must hold a list"),
        ('[{"data": {}}', "expected a comma"),
        ('[{"data": {}} {"data": {}}]', "expected a comma"),
        ('[{"data": {}}, {"da', "task number 1"),
        ('[{"data": 5}]', "task number 0 has no data object"),
        ("[1]", "task number 0 has no data object"),
    ],
)
def test_files_that_hold_no_tasks_are_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(BadRequest, match=words):
        list(tasks_in(path))
    with pytest.raises(BadRequest, match="is not there"):
        list(tasks_in(tmp_path / "other.json"))


# Whole scenes


def f1_of_merged(scene: Tile, objects: list[tuple[Polygon, str]], folder: Path, **grid: int) -> float:
    """F1 at IoU 0.5 of tiles cut, annotated exactly and merged again, against the scene as a whole."""
    truth = folder / "truth.geojson"
    geometries = lonlat_geometries(np.array([polygon for polygon, _ in objects], dtype=object), scene)
    truth.write_text(
        json.dumps(
            {
                "type": "FeatureCollection",
                "features": [
                    {"type": "Feature", "properties": {"label": label}, "geometry": shapely.geometry.mapping(geometry)}
                    for geometry, (_, label) in zip(geometries, objects, strict=True)
                ],
            }
        )
    )
    export(annotated(scene, objects, **grid), folder / "merged.geojson")
    return evaluate(folder / "merged.geojson", truth).f1


@pytest.mark.parametrize("overlap", [0, 32, 64])
def test_the_demo_scene_comes_back_from_its_tiles(tmp_path: Path, overlap: int) -> None:
    truth = Truth(make_scene(tmp_path / "town.tif", size_px=(1200, 1200), seed=2))
    import rasterio

    with rasterio.open(tmp_path / "town.tif") as source:
        scene = Tile((source.width, source.height), str(source.crs), source.transform, scene="town")
    objects = [
        (shapely.transform(polygon, scene.lonlat_to_px), label)
        for polygon, label in zip(truth.polygons, truth.labels, strict=True)
        if label == "building"
    ]
    assert len(objects) > 50
    assert f1_of_merged(scene, objects, tmp_path, tile_size=512, overlap=overlap) >= 0.995


@pytest.mark.skipif(not SHARED.exists(), reason="shared/data/hot_banepa_e2e is not beside the repository")
@pytest.mark.parametrize("overlap", [0, 32, 64])
def test_banepa_comes_back_from_its_tiles(tmp_path: Path, overlap: int) -> None:
    import rasterio

    with rasterio.open(SHARED / "hot_banepa_e2e_sceneA.tif") as source:
        scene = Tile((source.width, source.height), "EPSG:3857", source.transform, scene="banepa")
    content = json.loads((SHARED / "hot_banepa_e2e_sceneA_labels_4326.geojson").read_text())
    objects = []
    for feature in content["features"]:
        drawn = shapely.transform(shapely.geometry.shape(feature["geometry"]), scene.lonlat_to_px)
        for part in shapely.get_parts(shapely.intersection(drawn, scene.outline_px())):
            if isinstance(part, Polygon) and part.area > 4:
                objects.append((part, "building"))
    assert len(objects) > 100
    assert f1_of_merged(scene, objects, tmp_path, tile_size=512, overlap=overlap) >= 0.995
