"""What must hold of ingest: the plan, values, places, resuming, refusals."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.windows import Window

from backend.annotations import tasks_in
from backend.errors import BackendError, BadScene
from backend.export import ExportOptions, export
from backend.ingest import IngestOptions, IngestReport, ingest, plan
from backend.sources import scene_names
from backend.stretch import Stretch
from backend.tile import Tile

PLACE = Affine(0.5, 0, 354_000, 0, -0.5, 3_057_000)
SMALL = IngestOptions(tile_size=64, overlap=16, format="png")


def write(path: Path, values: np.ndarray, **profile: Any) -> Path:
    """A GeoTIFF of those values, (bands, rows, columns)."""
    palette = profile.pop("palette", None)
    settings = {"crs": "EPSG:32645", "transform": PLACE, **profile}
    with rasterio.open(
        path, "w", driver="GTiff", count=values.shape[0], height=values.shape[1], width=values.shape[2],
        dtype=values.dtype, **{key: value for key, value in settings.items() if value is not None},
    ) as out:  # fmt: skip
        out.write(values)
        if palette:
            out.write_colormap(1, palette)
    return path


def picture(seed: int = 0, bands: int = 3, rows: int = 100, columns: int = 150) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (bands, rows, columns)).astype(np.uint8)


def run(
    scene: Path, out: Path, options: IngestOptions = SMALL, **more: Any
) -> tuple[IngestReport, list[dict[str, Any]]]:
    report = ingest([scene], out, tiles_url="http://host:9090/tiles", options=options, **more)
    return report, json.loads((out / "tasks.json").read_text())


def image_of(task: dict[str, Any], out: Path) -> np.ndarray:
    name = task["data"]["image"].removeprefix("http://host:9090/tiles/")
    with Image.open(out / "tiles" / name) as image:
        return np.moveaxis(np.asarray(image), 2, 0)


# The plan


@given(width=st.integers(1, 900), height=st.integers(1, 900), size=st.integers(16, 300), share=st.floats(0, 0.5))
@settings(deadline=None, max_examples=80)
def test_tiles_cover_the_scene_and_cores_cover_each_pixel_once(
    width: int, height: int, size: int, share: float
) -> None:
    seen = np.zeros((height, width), np.uint16)
    claimed = np.zeros((height, width), np.uint16)
    spots = set()
    for spot in plan(width, height, tile_size=size, overlap=int(size * share)):
        x, y, w, h = spot.window
        assert (w, h) == (min(size, width), min(size, height))
        assert 0 <= x <= width - w
        assert 0 <= y <= height - h
        seen[y : y + h, x : x + w] += 1
        cx, cy, cw, ch = spot.core
        assert 0 <= cx < cx + cw <= w
        assert 0 <= cy < cy + ch <= h
        claimed[y + cy : y + cy + ch, x + cx : x + cx + cw] += 1
        spots.add((spot.row, spot.column))
    assert seen.min() >= 1
    assert (claimed == 1).all()
    assert len(spots) == len(plan(width, height, tile_size=size, overlap=int(size * share)))


def test_neighbours_share_the_overlap() -> None:
    windows = [spot.window for spot in plan(1000, 512, tile_size=512, overlap=64)]
    assert windows == [(0, 0, 512, 512), (448, 0, 512, 512), (488, 0, 512, 512)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_size": 8}, {"overlap": 400}, {"overlap": -1}, {"bands": (1, 2)}, {"bands": (0,)}, {"format": "tiff"},
        {"grid": "hex"}, {"quality": 0}, {"zoom": 18}, {"grid": "webmercator", "zoom": 31},
    ],
)  # fmt: skip
def test_wrong_options_are_refused_with_the_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadScene, match="got"):
        IngestOptions(**wrong)


# Values


def test_tiles_show_what_rasterio_reads(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture())
    report, tasks = run(scene, tmp_path)
    assert report.tiles == len(tasks) == 6
    with rasterio.open(scene) as raster:
        for task in tasks:
            record = task["data"]["tile"]
            assert record["stretch"] == {"kind": "none", "bands": [1, 2, 3]}
            assert np.array_equal(image_of(task, tmp_path), raster.read(window=Window(*record["window"])))


TURNED = Affine.translation(354_000, 3_057_000) @ Affine.rotation(33)
PLACES = {
    "north up": PLACE,
    "turned": TURNED @ Affine.scale(0.5, -0.4),
    "turned and mirrored": TURNED @ Affine.scale(0.5, 0.4),
    "south up": Affine(0.5, 0, 354_000, 0, 0.5, 3_057_000),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_tiles_show_what_lies_where_they_say(tmp_path: Path, place: Affine) -> None:
    scene = write(tmp_path / "town.tif", picture(), transform=place)
    _, tasks = run(scene, tmp_path)
    with rasterio.open(scene) as raster:
        for task in tasks:
            tile = Tile.from_task(task["data"])
            assert tile is not None
            assert tile.crs == "EPSG:32645"
            assert tile.gsd_m == pytest.approx(np.sqrt(abs(place.determinant)), rel=1e-3)
            assert tile.source is not None
            assert tile.source["path"] == "town.tif"
            assert len(tile.source["sha256"]) == 64
            points = np.array([(5.5, 3.5), (0.5, 0.5), (tile.size[0] - 0.5, tile.size[1] - 0.5), (40.5, 20.5)])
            there = np.array(list(raster.sample(tile.px_to_crs(points))))
            columns, rows = np.floor(points).astype(int).T
            assert np.array_equal(image_of(task, tmp_path)[:, rows, columns].T, there)
            # East is right where north is up: nobody can read a mirror image.
            assert tile.transform is not None
            assert tile.transform.determinant < 0


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint8"])
def test_single_bands_of_any_type_are_stretched_once_for_the_scene(tmp_path: Path, dtype: str) -> None:
    ramp = np.linspace(10, 110 if dtype == "uint8" else 4000, 150)
    values = np.broadcast_to(ramp, (1, 100, 150)).astype(dtype)
    _, tasks = run(write(tmp_path / "grey.tif", values), tmp_path)
    low, high = np.quantile(values, (0.02, 0.98))
    records = [task["data"]["tile"]["stretch"] for task in tasks]
    assert all(record == records[0] for record in records)
    assert records[0]["kind"] == "percentile"
    assert records[0]["low"][0] == pytest.approx(low, abs=1)
    assert records[0]["high"][0] == pytest.approx(high, abs=1)
    for task in tasks:
        x, y, w, h = task["data"]["tile"]["window"]
        expected = np.clip((values[0, y : y + h, x : x + w].astype(float) - low) * 255 / (high - low), 0, 255)
        shown = image_of(task, tmp_path)
        assert np.abs(shown - expected).max() <= 1.5
        assert np.array_equal(shown[0], shown[2])


def test_nodata_and_what_is_no_number_do_not_count(tmp_path: Path) -> None:
    values = np.full((1, 100, 150), 500, np.float32)
    values[0, :, 75:] = 900
    values[0, :20] = -9999
    values[0, 30, 30] = np.nan
    _, tasks = run(write(tmp_path / "a.tif", values, nodata=-9999), tmp_path)
    stretch = tasks[0]["data"]["tile"]["stretch"]
    assert (stretch["low"], stretch["high"]) == ([500], [900])
    shown = image_of(tasks[0], tmp_path)
    assert (shown[:, :20] == 0).all()
    assert (shown[:, 30, 30] == 0).all()


def test_tiles_without_data_are_left_out_and_counted(tmp_path: Path) -> None:
    values = picture(bands=4)
    values[3] = 255
    values[3, :, :90] = 0
    report, tasks = run(write(tmp_path / "a.tif", values, alpha="YES", photometric="RGB"), tmp_path)
    assert report.empty == 2
    assert report.tiles == len(tasks) == 4
    manifest = geopandas.read_parquet(report.manifest_path)
    assert len(manifest) == 4
    half = manifest[manifest.name.str.endswith("c0001.png")]
    assert half.nodata_share.iloc[0] == pytest.approx((90 - 48) / 64, abs=1e-6)


def test_a_scene_without_any_data_is_refused(tmp_path: Path) -> None:
    scene = write(tmp_path / "void.tif", np.zeros((1, 80, 80), np.uint16), nodata=0)
    with pytest.raises(BadScene, match=r"void\.tif holds no data"):
        run(scene, tmp_path)
    assert not (tmp_path / "tasks.json").exists()


def test_palettes_become_colours(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 3, (1, 80, 80)).astype(np.uint8)
    colours = {0: (10, 20, 30, 255), 1: (200, 100, 50, 255), 2: (0, 255, 0, 255)}
    _, tasks = run(write(tmp_path / "map.tif", values, palette=colours, photometric="palette"), tmp_path)
    expected = np.array([colours[i][:3] for i in range(3)])[values[0, :64, :64]]
    assert np.array_equal(np.moveaxis(image_of(tasks[0], tmp_path), 0, 2), expected)


def test_bands_are_the_ones_that_were_asked_for(tmp_path: Path) -> None:
    values = picture(bands=5)
    scene = write(tmp_path / "ms.tif", values)
    _, tasks = run(scene, tmp_path, IngestOptions(64, 16, bands=(4, 3, 2), format="png"))
    assert np.array_equal(image_of(tasks[0], tmp_path), values[[3, 2, 1], :64, :64])
    with pytest.raises(BadScene, match=r"ms\.tif has 5 bands; --bands 6,1,2 asks for more"):
        run(scene, tmp_path, IngestOptions(64, 16, bands=(6, 1, 2)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2, unique=True), st.floats(allow_infinity=True))
@settings(deadline=None, max_examples=100)
def test_a_stretch_keeps_the_order_and_the_ends(ends: list[float], value: float) -> None:
    low, high = sorted(ends)
    values = np.array([[[low, (low + high) / 2, high, value]]], np.float64)
    shown = Stretch("percentile", (low,), (high + 1e-3,)).apply(values)[0, 0]
    assert shown[0] == 0
    assert shown[0] <= shown[1] <= shown[2]
    if not np.isfinite(value):
        assert shown[3] == (255 if value > 0 else 0)


# Files


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture())

    class Stop(Exception):
        pass

    seen = []

    def stop(done: float, message: str | None = None) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise Stop

    with pytest.raises(Stop):
        run(scene, tmp_path, progress=stop)
    assert not (tmp_path / "tasks.json").exists()
    assert [path for path in tmp_path.iterdir() if path.suffix == ".part"] == []
    report, _ = run(scene, tmp_path, progress=lambda done, message=None: seen.append(done))
    assert (report.kept, report.written) == (3, 3)
    assert seen[-1] == 1.0
    again, tasks = run(scene, tmp_path)
    assert (again.kept, again.written) == (6, 0)
    assert len(tasks) == 6


def test_other_options_or_another_scene_start_anew(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture())
    run(scene, tmp_path)
    report, _ = run(scene, tmp_path, IngestOptions(96, 16, format="jpg"))
    assert report.kept == 0
    names = {path.name for path in (tmp_path / "tiles" / "town").iterdir()}
    assert len(names) == report.tiles
    assert {Path(name).suffix for name in names} == {".jpg"}
    write(scene, picture(seed=9))
    changed, tasks = run(scene, tmp_path, IngestOptions(96, 16, format="png"))
    assert changed.kept == 0
    with rasterio.open(scene) as raster:
        window = Window(*tasks[0]["data"]["tile"]["window"])
        assert np.array_equal(image_of(tasks[0], tmp_path), raster.read(window=window))


def test_the_report_goes_to_json(tmp_path: Path) -> None:
    report, _ = run(write(tmp_path / "a.tif", picture()), tmp_path)
    assert json.loads(json.dumps(asdict(report), default=str))["tiles"] == 6
    assert "6 tiles of 1 scene" in report.sentence()


def test_the_manifest_says_where_each_tile_lies(tmp_path: Path) -> None:
    report, tasks = run(write(tmp_path / "a.tif", picture()), tmp_path)
    manifest = geopandas.read_parquet(report.manifest_path)
    assert manifest.crs.to_epsg() == 4326
    assert set(manifest.columns) >= {"scene", "name", "window", "west", "south", "east", "north", "nodata_share"}
    tile = Tile.from_record(tasks[2]["data"]["tile"])
    corners = tile.px_to_lonlat(np.array([(0.0, 0.0), (64.0, 0.0), (64.0, 64.0), (0.0, 64.0)]))
    sides = manifest[["west", "south", "east", "north"]].iloc[2].to_list()
    assert sides == pytest.approx([*corners.min(axis=0), *corners.max(axis=0)], abs=1e-9)
    assert list(manifest.window[2]) == tasks[2]["data"]["tile"]["window"]


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_every_format_can_be_shown(tmp_path: Path, format: str) -> None:
    _, tasks = run(write(tmp_path / "a.tif", picture()), tmp_path, IngestOptions(64, 16, format=format))
    assert tasks[0]["data"]["image"] == f"http://host:9090/tiles/a/r0000_c0000.{format}"
    assert image_of(tasks[0], tmp_path).shape == (3, 64, 64)


def test_scenes_get_safe_names_of_their_own() -> None:
    sources = [
        "/a/town.tif",
        "/b/Town.TIF",
        "../../etc/passwd",
        "s3://bucket/x/ünï cøde.tif?sig=1",
        "..",
        "C:\\maps\\v1.2.tif",
    ]
    names = scene_names(sources)
    assert names[:3] == ["town", "Town-2", "passwd"]
    assert names[5] == "v1.2"
    assert len(set(names)) == len(names)
    assert all(
        name and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for name in names
    )
    assert not any(name.startswith(".") for name in names)


def test_two_scenes_go_into_one_list(tmp_path: Path) -> None:
    scenes = [write(tmp_path / f"{name}.tif", picture(seed)) for seed, name in enumerate("ab")]
    report = ingest(scenes, tmp_path, tiles_url="http://host:9090/tiles", options=SMALL)
    tasks = json.loads(report.tasks_path.read_text())
    assert (report.scenes, report.tiles) == (2, 12)
    assert {task["data"]["tile"]["scene"] for task in tasks} == {"a", "b"}


# Grids and refusals


def test_the_web_mercator_grid_shows_the_same_ground(tmp_path: Path) -> None:
    values = np.zeros((3, 400, 400), np.uint8) + 40
    values[:, 180:220, 100:160] = 220
    scene = write(tmp_path / "a.tif", values)
    report, tasks = run(scene, tmp_path, IngestOptions(1024, 0, format="png", grid="webmercator"))
    assert report.tiles == 1
    tile = Tile.from_record(tasks[0]["data"]["tile"])
    assert tile.crs == "EPSG:3857"
    assert tile.transform is not None
    zoom = np.log2(2 * 20_037_508.342789244 / 256 / tile.transform.a)
    assert zoom == pytest.approx(round(zoom), abs=1e-6)
    native = Tile((400, 400), "EPSG:32645", PLACE)
    shown = image_of(tasks[0], tmp_path)[0] > 130
    rows, columns = np.nonzero(shown)
    middle = native.lonlat_to_px(tile.px_to_lonlat(np.array([(columns.mean() + 0.5, rows.mean() + 0.5)])))
    assert middle[0] == pytest.approx((130, 200), abs=0.5)
    assert image_of(tasks[0], tmp_path).min() == 0, "what lies outside the scene holds no data"


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"crs": None}, r"a\.tif has no CRS; say which with --crs EPSG:…"),
        ({"transform": None}, "has a CRS but no geotransform"),
        ({"transform": None, "crs": None}, "has no CRS"),
    ],
)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scenes_without_a_place_are_refused_with_the_way_out(
    tmp_path: Path, profile: dict[str, Any], words: str
) -> None:
    scene = write(tmp_path / "a.tif", picture(), **profile)
    with pytest.raises(BadScene, match=words):
        run(scene, tmp_path)


def test_files_that_are_no_raster_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("hello")
    for name in ("a.tif", "missing.tif"):
        with pytest.raises(BadScene, match=f"{name} cannot be opened"):
            run(tmp_path / name, tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", picture(rows=600, columns=600), compress="deflate", tiled=True)
    scene.write_bytes(scene.read_bytes()[: scene.stat().st_size // 2])
    with pytest.raises(BadScene, match=r"cannot be (read|opened)"):
        run(scene, tmp_path)


def test_a_border_of_one_value_does_not_take_the_stretch(tmp_path: Path) -> None:
    values = np.zeros((1, 600, 600), np.uint16)
    values[0, 300:340, 300:340] = np.linspace(1000, 3000, 1600).reshape(40, 40)
    _, tasks = run(write(tmp_path / "a.tif", values), tmp_path)
    stretch = tasks[0]["data"]["tile"]["stretch"]
    assert stretch["low"][0] == pytest.approx(1040, abs=2)
    assert stretch["high"][0] == pytest.approx(2960, abs=2)


def test_a_float_tile_of_nothing_but_nan_is_left_out_also_where_others_are_kept(tmp_path: Path) -> None:
    values = picture().astype(np.float32)
    values[:, :, 60:] = np.nan
    scene = write(tmp_path / "a.tif", values)
    first, tasks = run(scene, tmp_path)
    again, same = run(scene, tmp_path)
    assert (first.tiles, first.empty, again.kept, again.empty) == (4, 2, 4, 2)
    assert tasks == same


# Places that the file does not say


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("grid", ["native", "webmercator"])
def test_a_world_file_and_a_crs_place_a_photo(tmp_path: Path, grid: str) -> None:
    placed = write(tmp_path / "placed.tif", picture())
    photo = write(tmp_path / "photo.tif", picture(), crs=None, transform=None)
    (tmp_path / "photo.tfw").write_text("0.5\n0\n0\n-0.5\n354000.25\n3056999.75\n")
    _, wanted = run(placed, tmp_path / "placed", IngestOptions(64, 16, grid=grid))
    with pytest.raises(BadScene, match=r"photo\.tif has no CRS; say which with --crs"):
        run(photo, tmp_path / "photo", IngestOptions(64, 16, grid=grid))
    _, found = run(photo, tmp_path / "photo", IngestOptions(64, 16, grid=grid, crs="EPSG:32645"))
    for one, other in zip(wanted, found, strict=True):
        assert one["data"]["tile"]["crs"] == other["data"]["tile"]["crs"]
        assert one["data"]["tile"]["transform"] == pytest.approx(other["data"]["tile"]["transform"])
        assert np.array_equal(image_of(one, tmp_path / "placed"), image_of(other, tmp_path / "photo"))


def test_a_crs_that_proj_does_not_know_is_refused() -> None:
    for wrong in ({"crs": "EPSG:0"}, {"crs": "+proj=merc"}, {"no_place": True, "grid": "xyz"}):
        with pytest.raises(BadScene):
            IngestOptions(**wrong)


def test_a_scene_in_degrees_reaches_over_the_antimeridian(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", picture(), crs="EPSG:4326", transform=Affine(1e-5, 0, 179.9995, 0, -1e-5, 10))
    report, _ = run(scene, tmp_path)
    assert report.tiles == 6
    east = geopandas.read_parquet(report.manifest_path).east
    assert (east < -179.99).any()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_photos_without_a_place_are_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    photo = write(tmp_path / "photo.tif", picture(), crs=None, transform=None)
    placed = write(tmp_path / "placed.tif", picture(seed=1))
    with pytest.raises(BadScene, match="--no-place"):
        run(photo, tmp_path)
    report = ingest(
        [photo, placed], tmp_path, tiles_url="http://host:9090/tiles", options=IngestOptions(64, 16, no_place=True)
    )
    assert (report.tiles, report.refused) == (12, {})
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    tiles = [Tile.from_record(task["data"]["tile"]) for task in tasks]
    assert [tile.has_place for tile in tiles] == [False] * 6 + [True] * 6
    assert (tiles[1].window, tiles[1].core) == ((48, 0, 64, 64), (8, 0, 43, 50))
    assert geopandas.read_parquet(report.manifest_path).geometry.isna().tolist() == [True] * 6 + [False] * 6
    ring = [[10, 10], [60, 10], [60, 60], [10, 60]]
    region = {
        "id": "a", "type": "polygonlabels", "from_name": "label", "to_name": "image", "original_width": 64,
        "original_height": 64, "value": {"points": ring, "polygonlabels": ["building"], "closed": True},
    }  # fmt: skip
    annotated = [task | {"id": n, "annotations": [{"id": n, "result": [region]}]} for n, task in enumerate(tasks[:2])]
    (tmp_path / "drawn.json").write_text(json.dumps(annotated))
    with pytest.raises(BackendError, match="has no place on Earth"):
        export(tasks_in(tmp_path / "drawn.json"), tmp_path / "out.geojson", options=ExportOptions())
    assert not (tmp_path / "out.geojson").exists()


def test_a_zip_gives_the_rasters_in_it(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture())
    with zipfile.ZipFile(tmp_path / "may.zip", "w") as file:
        file.write(scene, "sub/town.tif")
        file.writestr("read.me", "x")
    report, tasks = run(tmp_path / "may.zip", tmp_path / "out")
    assert (report.scenes, report.tiles) == (1, 6)
    assert tasks[0]["data"]["tile"]["scene"] == "may-town"
    _, wanted = run(scene, tmp_path / "plain")
    assert np.array_equal(image_of(tasks[3], tmp_path / "out"), image_of(wanted[3], tmp_path / "plain"))
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as file:
        file.writestr("read.me", "x")
    with pytest.raises(BadScene, match=r"holds no \.tif"):
        run(tmp_path / "none.zip", tmp_path / "out")
