"""Scenes from anywhere and of any kind: stores, lists, mosaics, STAC, control points, areas, pre-annotations."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from flask import Flask
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import from_gcps

from backend.annotations import tasks_in
from backend.client import LabelStudio
from backend.errors import BadScene
from backend.export import ExportOptions, export
from backend.images import ImageStore
from backend.ingest import IngestOptions, IngestReport, ingest
from backend.labelstudio import parse_config, read_annotation
from backend.prelabels import Labelled
from backend.push import push
from backend.server import _tile_route
from backend.settings import Settings
from backend.sources import sources
from backend.stretch import Stretch
from backend.tile import Tile
from backend.tiles import SceneTiles
from demo.label_studio import LabelStudioServer

from .sdk_judge import SdkJudge, sdk_python
from .small_server import Answer, Asked, SmallServer

REPOSITORY = Path(__file__).resolve().parent.parent
PLACE = Affine(0.5, 0, 354_000, 0, -0.5, 3_057_000)
SMALL = IngestOptions(tile_size=64, overlap=16, format="png")
CONFIG = parse_config((REPOSITORY / "configs" / "land.xml").read_text(encoding="utf-8"))


def picture(seed: int = 0, bands: int = 3, rows: int = 100, columns: int = 150) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (bands, rows, columns)).astype(np.uint8)


def write(path: Path, values: np.ndarray, **profile: Any) -> Path:
    place = {"crs": "EPSG:32645", "transform": PLACE, **profile}
    with rasterio.open(
        path, "w", driver="GTiff", count=values.shape[0], height=values.shape[1], width=values.shape[2],
        dtype=values.dtype, **{key: value for key, value in place.items() if value is not None},
    ) as out:  # fmt: skip
        out.write(values)
    return path


def run(
    scenes: Any, out: Path, options: IngestOptions = SMALL, **more: Any
) -> tuple[IngestReport, list[dict[str, Any]]]:
    listed = scenes if isinstance(scenes, list) else [scenes]
    report = ingest(listed, out, tiles_url="http://host:9090/tiles", options=options, **more)
    return report, json.loads((out / "tasks.json").read_text())


def image_of(task: dict[str, Any], out: Path) -> np.ndarray:
    with Image.open(out / "tiles" / task["data"]["image"].removeprefix("http://host:9090/tiles/")) as image:
        return np.moveaxis(np.asarray(image), 2, 0)


def together(tasks: list[dict[str, Any]], out: Path, shape: tuple[int, int]) -> np.ndarray:
    """The scene put together again from its tiles."""
    whole = np.zeros((3, *shape), np.uint8)
    for task in tasks:
        x, y, w, h = task["data"]["tile"]["window"]
        whole[:, y : y + h, x : x + w] = image_of(task, out)
    return whole


# Stores


def stored(files: dict[str, bytes], check: Any = lambda asked: True) -> SmallServer:
    """A server of those files that knows ranges, as object stores do."""

    def answer(asked: Asked) -> Answer:
        body = files.get(unquote(asked.path))
        if body is None or not check(asked):
            return Answer(404 if body is None else 403)
        head = {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        found = re.match(r"bytes=(\d+)-(\d+)", asked.headers.get("Range", ""))
        if not found or asked.method == "HEAD":
            return Answer(200, body, head)
        first, last = int(found[1]), min(int(found[2]), len(body) - 1)
        return Answer(206, body[first : last + 1], {**head, "Content-Range": f"bytes {first}-{last}/{len(body)}"})

    return SmallServer(answer)


def is_signed(asked: Asked, *, key: str, secret: str) -> bool:
    """Whether a request carries AWS's signature (version 4) of that key, worked out anew."""
    given = re.match(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request,SignedHeaders=([^,]+),Signature=(\w+)",
        asked.headers.get("Authorization", "").replace(", ", ","),
    )
    if not given or given[1] != key:
        return False
    headers = {name.casefold(): value.strip() for name, value in asked.headers.items()}
    path, _, query = asked.target.partition("?")
    pairs = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in sorted(parse_qsl(query, True)))
    canonical = "\n".join(
        [asked.method, path, pairs, *(f"{name}:{headers[name]}" for name in given[4].split(";")), "", given[4],
         headers["x-amz-content-sha256"]]
    )  # fmt: skip
    scope = f"{given[2]}/{given[3]}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signing = f"AWS4{secret}".encode()
    for part in (given[2], given[3], "s3", "aws4_request"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    return hmac.compare_digest(hmac.digest(signing, text.encode(), "sha256").hex(), given[5])


def cog(path: Path, side: int = 1024) -> bytes:
    """Noise would make tiles as large as the file: this one is smooth."""
    y, x = np.mgrid[0:side, 0:side]
    values = np.stack([x % 256, y % 256, (x + y) // 8 % 256]).astype(np.uint8)
    write(path, values, tiled=True, blockxsize=256, blockysize=256, compress="deflate", photometric="RGB")
    return path.read_bytes()


def test_a_scene_in_s3_is_read_by_windows_with_the_operators_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = cog(tmp_path / "local.tif")
    padded = body + np.random.default_rng(0).bytes(4_000_000)  # more than a window needs
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret/+key")
    with stored(
        {"/bucket/a/town.tif": padded}, lambda asked: is_signed(asked, key="AKTEST", secret="s3cret/+key")
    ) as s3:
        monkeypatch.setenv("AWS_S3_ENDPOINT", f"127.0.0.1:{s3.port}")
        monkeypatch.setenv("AWS_HTTPS", "NO")
        monkeypatch.setenv("AWS_VIRTUAL_HOSTING", "FALSE")
        report, tasks = run("s3://bucket/a/town.tif", tmp_path / "out", IngestOptions(512, 0, format="png"))
        assert report.tiles == 4
        with rasterio.open(tmp_path / "local.tif") as raster:
            assert np.array_equal(together(tasks, tmp_path / "out", (1024, 1024)), raster.read())
        assert tasks[0]["data"]["tile"]["source"] == {"path": "town.tif"}
        assert all(len(asked.headers.get("Range", "")) or asked.method == "HEAD" for asked in s3.asked)
        again, _ = run("s3://bucket/a/town.tif", tmp_path / "out", IngestOptions(512, 0, format="png"))
        assert (again.kept, again.written) == (4, 0), "what lies in a store is known again"
        with pytest.raises(BadScene, match=r"other\.tif cannot be opened"):
            run("s3://bucket/a/other.tif", tmp_path / "out")


def test_of_a_scene_in_a_store_no_more_is_fetched_than_is_shown(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 2048, 2048), np.uint8)
    scene = write(tmp_path / "local.tif", noise, tiled=True, blockxsize=256, blockysize=256, photometric="RGB")
    with rasterio.open(scene, "r+") as raster:
        raster.build_overviews([2, 4, 8, 16], rasterio.enums.Resampling.average)
    body = scene.read_bytes()
    saved(tmp_path / "area.gpkg", [at(1300, 1300, 1400, 1400)])
    with stored({"/bucket/town.tif": body}) as s3:
        # In a process of its own: some of GDAL's calls keep Python, and so the server here, from running.
        done = subprocess.run(
            [
                sys.executable, "-m", "backend", "ingest", "s3://bucket/town.tif", "--aoi", "area.gpkg", "--json",
                "--tile-size", "256", "--overlap", "0",
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
            env={
                "PYTHONPATH": str(REPOSITORY), "PATH": "", "AWS_NO_SIGN_REQUEST": "YES", "AWS_HTTPS": "NO",
                "AWS_S3_ENDPOINT": f"127.0.0.1:{s3.port}", "AWS_VIRTUAL_HOSTING": "FALSE",
            },
        )  # fmt: skip
        ranges = [re.match(r"bytes=(\d+)-(\d+)", asked.headers.get("Range", "")) for asked in s3.asked]
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["tiles"], said["outside"]) == (1, 63)
    # The overview of 1024 pixels that shows whether the scene has changed, and a few blocks.
    fetched = sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)
    assert fetched < 4_000_000 < len(body) / 4, f"{fetched} of {len(body)} bytes"


STORES = {
    "gs": (
        "gs://bucket/a/town.tif",
        "/bucket/a/town.tif",
        {"GS_NO_SIGN_REQUEST": "YES", "CPL_GS_ENDPOINT": "http://127.0.0.1:{}/"},
    ),
    "az": (
        "az://box/a/town.tif",
        "/acc/box/a/town.tif",
        {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=acc;AccountKey=aHVzaA==;BlobEndpoint=http://127.0.0.1:{}/acc"},
    ),
    "https": ("http://127.0.0.1:{}/a/town.tif", "/a/town.tif", {}),
}


@pytest.mark.parametrize("kind", STORES)
def test_other_stores_are_read_through_gdal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    name, path, variables = STORES[kind]
    with stored({path: cog(tmp_path / "local.tif", side=256)}) as store:
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value.format(store.port))
        _, tasks = run(name.format(store.port), tmp_path / "out", IngestOptions(128, 0, format="png"))
    with rasterio.open(tmp_path / "local.tif") as raster:
        assert np.array_equal(together(tasks, tmp_path / "out", (256, 256)), raster.read())


def test_a_presigned_address_is_kept_out_of_records_and_messages(tmp_path: Path) -> None:
    body = cog(tmp_path / "local.tif", side=128)

    def check(asked: Asked) -> bool:
        return "sig=hush" in asked.target

    with stored({"/town.tif": body}, check) as web:
        report, tasks = run(f"{web.url}/town.tif?sig=hush", tmp_path / "out")
        assert report.tiles == 9
        written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".png")
        assert b"hush" not in written
        assert tasks[0]["data"]["tile"]["source"] == {"path": "town.tif"}
        with pytest.raises(BadScene) as caught:
            run(f"{web.url}/town.tif?sig=hush&no=1".replace("town", "none"), tmp_path / "out")
        assert "hush" not in str(caught.value)


# Lists, STAC, mosaics


def parts(folder: Path, values: np.ndarray, **profile: Any) -> list[Path]:
    """The picture in three overlapping files."""
    windows = {"west": (0, 0, 90, 60), "east": (80, 0, 70, 60), "south": (0, 50, 150, 50)}
    return [
        write(
            folder / f"{name}.tif",
            values[:, y : y + h, x : x + w],
            transform=PLACE @ Affine.translation(x, y),
            **profile,
        )
        for name, (x, y, w, h) in windows.items()
    ]


def test_a_mosaic_shows_what_one_scene_would(tmp_path: Path) -> None:
    values = picture()
    files = parts(tmp_path, values)
    report, tasks = run(files, tmp_path / "out", mosaic_name="town")
    assert (report.scenes, report.tiles) == (1, 6)
    assert np.array_equal(together(tasks, tmp_path / "out", (100, 150)), values)
    assert {task["data"]["tile"]["scene"] for task in tasks} == {"town"}
    again, _ = run(files, tmp_path / "out", mosaic_name="town")
    assert again.kept == 6
    write(files[0], picture(5)[:, :60, :90])
    changed, tasks = run(files, tmp_path / "out", mosaic_name="town")
    assert changed.kept == 0, "a part that changed changes the mosaic"
    assert np.array_equal(image_of(tasks[0], tmp_path / "out")[:, :50, :64], picture(5)[:, :50, :64])


def test_a_mosaic_has_one_stretch_and_its_holes_are_no_data(tmp_path: Path) -> None:
    values = np.broadcast_to(np.linspace(100, 3000, 150), (1, 100, 150)).astype(np.uint16).copy()
    values[0, 20:40, 20:40] = 0
    files = parts(tmp_path, values, nodata=0)
    report, tasks = run([files[0], files[2]], tmp_path / "out", mosaic_name="town")
    stretches = [task["data"]["tile"]["stretch"] for task in tasks]
    assert all(stretch == stretches[0] for stretch in stretches)
    assert stretches[0]["kind"] == "percentile"
    whole = together(tasks, tmp_path / "out", (100, 150))
    assert (whole[:, :50, 100:] == 0).all()
    assert (whole[:, 25:35, 25:35] == 0).all()
    low, high = stretches[0]["low"][0], stretches[0]["high"][0]
    expected = np.rint((np.clip(values[0, 60:, :].astype(float), low, high) - low) * 255 / (high - low))
    assert np.array_equal(whole[0, 60:, :], expected)
    manifest = geopandas.read_parquet(report.manifest_path)
    assert manifest.nodata_share.max() > 0.3


@pytest.mark.filterwarnings("ignore:Use `@` matmul")
def test_a_mosaic_puts_parts_on_other_grids_in_their_place(tmp_path: Path) -> None:
    values = np.full((3, 100, 150), 40, np.uint8)
    values[:, 30:60, 90:130] = 220
    west = write(tmp_path / "west.tif", values[:, :, :75])
    place, width, height = rasterio.warp.calculate_default_transform(
        "EPSG:32645", "EPSG:3857", 75, 100, left=354_037.5, bottom=3_056_950, right=354_075, top=3_057_000
    )
    east_values = np.zeros((3, height, width), np.uint8)
    rasterio.warp.reproject(
        values, east_values, src_transform=PLACE, src_crs="EPSG:32645", dst_transform=place, dst_crs="EPSG:3857"
    )
    east = write(tmp_path / "east.tif", east_values, crs="EPSG:3857", transform=place, nodata=0)
    _, tasks = run([west, east], tmp_path / "out", IngestOptions(256, 0, format="png"), mosaic_name="town")
    (task,) = tasks
    tile = Tile.from_record(task["data"]["tile"])
    rows, columns = np.nonzero(image_of(task, tmp_path / "out")[0] > 130)
    there = tile.px_to_crs(np.array([(columns.mean() + 0.5, rows.mean() + 0.5)]))[0]
    assert there == pytest.approx((354_055, 3_056_977.5), abs=0.5)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"bands": 1}, r"b\.tif has 1 bands of uint8, .*a\.tif 3 of uint8"),
        ({"crs": None}, "no place on Earth"),
        ({"transform": PLACE @ Affine.rotation(10)}, "is rotated"),
    ],
)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_mosaic_of_rasters_that_do_not_fit_is_refused(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    bands = other.pop("bands", 3)
    files = [write(tmp_path / "a.tif", picture()), write(tmp_path / "b.tif", picture(bands=bands), **other)]
    with pytest.raises(BadScene, match=words):
        run(files, tmp_path / "out", mosaic_name="town")
    assert not (tmp_path / "out" / "tasks.json").exists()


def test_a_list_names_scenes_from_its_own_folder(tmp_path: Path) -> None:
    parts(tmp_path, picture())
    (tmp_path / "scenes.txt").write_text("# of May\nwest.tif\n\neast.tif\n")
    report, tasks = run(tmp_path / "scenes.txt", tmp_path / "out")
    assert report.scenes == 2
    assert {task["data"]["tile"]["scene"] for task in tasks} == {"west", "east"}


def test_one_bad_scene_does_not_cost_the_others(tmp_path: Path) -> None:
    files = parts(tmp_path, picture())
    files[0].write_text("hello")
    report, tasks = run(files, tmp_path / "out")
    assert {task["data"]["tile"]["scene"] for task in tasks} == {"east", "south"}
    assert list(report.refused) == [str(files[0])]
    assert "cannot be opened" in report.refused[str(files[0])]
    assert "1 scenes refused" in report.sentence()
    for file in files:
        file.write_text("hello")
    with pytest.raises(BadScene, match=r"west\.tif cannot be opened"):
        run(files, tmp_path / "out")


def test_stac_items_give_their_asset(tmp_path: Path) -> None:
    write(tmp_path / "visual.tif", picture())
    write(tmp_path / "red.tif", picture(bands=1))
    tiff = "image/tiff; application=geotiff; profile=cloud-optimized"
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": "S2_town",
        "assets": {"visual": {"href": "./visual.tif", "type": tiff}, "B04": {"href": "red.tif", "type": tiff}},
    }  # fmt: skip
    path = tmp_path / "item.json"
    path.write_text(json.dumps(item))
    _, tasks = run(path, tmp_path / "out")
    assert tasks[0]["data"]["tile"]["stretch"]["bands"] == [1, 2, 3]
    assert tasks[0]["data"]["tile"]["scene"] == "S2_town"
    _, tasks = run(path, tmp_path / "out", asset="B04")
    assert tasks[0]["data"]["tile"]["stretch"]["bands"] == [1]
    with pytest.raises(BadScene, match="no asset 'B99'; choose with --asset: B04, visual"):
        run(path, tmp_path / "out", asset="B99")
    (tmp_path / "all.json").write_text(json.dumps({"type": "FeatureCollection", "features": [item, item]}))
    assert [source.name for source in sources([tmp_path / "all.json"])] == ["S2_town", "S2_town-2"]


def test_a_remote_stac_item_cannot_name_files_of_this_machine(tmp_path: Path) -> None:
    def item(href: str) -> bytes:
        return json.dumps({"type": "Feature", "id": "x", "assets": {"visual": {"href": href}}}).encode()

    files = {
        "/a/near.json": item("near.tif"),
        "/a/far.json": item("/vsicurl/etc/x"),
        "/a/file.json": item("file:///etc/x"),
    }
    with stored(files) as web:
        (near,) = sources([f"{web.url}/a/near.json"])
        assert near.addresses == (f"/vsicurl/{web.url}/a/near.tif",)
        # Everything is read as an address beside the item.
        (far,) = sources([f"{web.url}/a/far.json"])
        assert far.addresses == (f"/vsicurl/{web.url}/vsicurl/etc/x",)
        with pytest.raises(BadScene, match="cannot name"):
            sources([f"{web.url}/a/file.json"])


# Places and values


@pytest.mark.parametrize("crs", ["EPSG:32645", "EPSG:4326"])
def test_scenes_tied_by_control_points_are_warped_to_their_place(tmp_path: Path, crs: str) -> None:
    values = np.full((3, 200, 300), 40, np.uint8)
    values[:, 50:70, 200:240] = 220
    spots = [(0, 0), (0, 300), (200, 0), (200, 300), (100, 150)]
    where = [PLACE @ Affine.rotation(20) @ (column, row) for row, column in spots]
    xs, ys = rasterio.warp.transform("EPSG:32645", crs, *zip(*where, strict=True))
    points = [GroundControlPoint(row, column, x, y) for (row, column), x, y in zip(spots, xs, ys, strict=True)]
    scene = tmp_path / "a.tif"
    with rasterio.open(
        scene, "w", driver="GTiff", count=3, height=200, width=300, dtype="uint8", gcps=points, crs=crs
    ) as out:
        out.write(values)
    _, tasks = run(scene, tmp_path, IngestOptions(1024, 0, format="png"))
    tile = Tile.from_record(tasks[0]["data"]["tile"])
    assert tile.crs == "EPSG:32645"
    assert tile.source is not None
    assert tile.source["warped_by"] == "5 control points"
    rows, columns = np.nonzero(image_of(tasks[0], tmp_path)[0] > 130)
    there = tile.px_to_crs(np.array([(columns.mean() + 0.5, rows.mean() + 0.5)]))[0]
    assert there == pytest.approx(PLACE @ Affine.rotation(20) @ (220, 60), abs=0.5)


def test_control_points_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    spots = [(r, c, 354_000 + c * 0.5, 3_057_000 - r * 0.5) for r in (0, 500, 1000) for c in (0, 500, 1000)]
    spots[4] = (500, 500, 354_000, 3_057_000)
    points = [GroundControlPoint(*spot) for spot in spots]
    assert from_gcps(points) is not None
    scene = tmp_path / "a.tif"
    with rasterio.open(
        scene, "w", driver="GTiff", count=1, height=1000, width=1000, dtype="uint8", gcps=points, crs="EPSG:32645"
    ):
        pass
    with pytest.raises(BadScene, match="contradict each other by"):
        run(scene, tmp_path)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scenes_with_rpcs_need_the_height_of_the_ground(tmp_path: Path) -> None:
    one = [1.0] + [0.0] * 19
    rpcs = RPC(
        height_off=500, height_scale=500, lat_off=27.6, lat_scale=0.1, line_off=50, line_scale=50, long_off=85.5,
        long_scale=0.1, samp_off=75, samp_scale=75, line_den_coeff=one, samp_den_coeff=one, err_bias=0, err_rand=0,
        line_num_coeff=[0, 0, -1, 0.01] + [0] * 16, samp_num_coeff=[0, 1, 0, 0.02] + [0] * 16,
    )  # fmt: skip
    scene = tmp_path / "a.tif"
    with rasterio.open(scene, "w", driver="GTiff", count=3, height=100, width=150, dtype="uint8") as out:
        out.write(picture())
        out.rpcs = rpcs
    with pytest.raises(BadScene, match=r"RPC.*gdalwarp -rpc.*--rpc-height"):
        run(scene, tmp_path)
    report, tasks = run(scene, tmp_path, IngestOptions(512, 0, rpc_height_m=500.0))
    assert tasks[0]["data"]["tile"]["source"]["warped_by"] == "RPC at 500 m"
    west, south, east, north = geopandas.read_parquet(report.manifest_path).total_bounds
    assert (west, south, east, north) == pytest.approx((85.4, 27.5, 85.6, 27.7), abs=0.02)


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_complex_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    with rasterio.open(
        tmp_path / "sar.tif",
        "w",
        driver="GTiff",
        count=1,
        height=10,
        width=10,
        dtype=dtype,
        crs="EPSG:32645",
        transform=PLACE,
    ):
        pass
    with pytest.raises(BadScene, match="complex"):
        run(tmp_path / "sar.tif", tmp_path)


def test_a_stretch_can_be_given(tmp_path: Path) -> None:
    values = np.broadcast_to(np.linspace(0, 4000, 150), (1, 100, 150)).astype(np.uint16)
    scene = write(tmp_path / "a.tif", values)
    _, tasks = run(scene, tmp_path, IngestOptions(256, 0, format="png", stretch=Stretch.from_text("1000,2000")))
    assert tasks[0]["data"]["tile"]["stretch"] == {"kind": "given", "bands": [1], "low": [1000.0], "high": [2000.0]}
    expected = np.rint(np.clip((values[0].astype(float) - 1000) / 1000, 0, 1) * 255)
    assert np.array_equal(image_of(tasks[0], tmp_path)[0], expected)
    for wrong in ("5", "2,1", "a,b", "1,nan"):
        with pytest.raises(BadScene, match="stretch"):
            Stretch.from_text(wrong)


def test_nodata_can_be_given_where_the_file_is_silent(tmp_path: Path) -> None:
    values = picture()
    values[:, :, :80] = 0
    scene = write(tmp_path / "a.tif", values)
    assert run(scene, tmp_path)[0].empty == 0
    report, _ = run(scene, tmp_path, IngestOptions(64, 16, format="png", nodata=0))
    assert report.empty == 2
    for grid in ("webmercator", "xyz"):
        warped, _ = run(scene, tmp_path, IngestOptions(64, 0, format="png", nodata=0, grid=grid))
        assert warped.empty > 0


# Grids

CORNERS = np.array([(1.0, 1.0), (63.0, 63.0)])


def test_the_xyz_grid_is_that_of_web_maps(tmp_path: Path) -> None:
    values = np.full((3, 300, 400), 40, np.uint8)
    values[:, 150:180, 100:160] = 220
    scene = write(tmp_path / "a.tif", values)
    report, tasks = run(scene, tmp_path, IngestOptions(256, 64, format="png", grid="xyz"))
    shown = 0
    for task in tasks:
        tile = Tile.from_record(task["data"]["tile"])
        by_name = Tile.from_xyz_url(task["data"]["image"])
        assert by_name is not None
        assert tile.crs == by_name.crs == "EPSG:3857"
        assert tile.size == by_name.size == (256, 256)
        assert tile.transform is not None
        assert tile.transform.almost_equals(by_name.transform, 1e-6)
        assert tile.core == (0, 0, 256, 256)
        image = image_of(task, tmp_path)
        rows, columns = np.nonzero(image[0] > 130)
        if len(rows):
            inside = Tile((400, 300), "EPSG:32645", PLACE).lonlat_to_px(
                tile.px_to_lonlat(np.column_stack((columns + 0.5, rows + 0.5)))
            )
            assert ((inside > (99, 149)) & (inside < (161, 181))).all()
            shown += len(rows)
    assert shown > 1500
    assert report.tiles == len(tasks) >= 2
    again, _ = run(scene, tmp_path, IngestOptions(256, 64, format="png", grid="xyz"))
    assert again.kept == report.tiles
    # A pixel of the zoom that is chosen is no coarser than the scene's.
    tile = Tile.from_record(tasks[0]["data"]["tile"])
    assert 0.24 < float(tile.gsd_m or 0) <= 0.52


@pytest.mark.parametrize(
    ("crs", "place"),
    [
        ("EPSG:4326", Affine(5e-6, 0, 179.9995, 0, -5e-6, 10)),
        ("EPSG:4167", Affine(5e-6, 0, -180.0010, 0, -5e-6, 10)),
        ("EPSG:32660", Affine(0.5, 0, 828_860, 0, -0.5, 1_106_950)),
    ],
)
@pytest.mark.parametrize("grid", ["xyz", "webmercator"])
def test_web_map_tiles_go_on_over_the_antimeridian(tmp_path: Path, grid: str, crs: str, place: Affine) -> None:
    values = np.full((3, 150, 300), 40, np.uint8)
    values[:, 40:90, 60:240] = 220
    scene = write(tmp_path / "a.tif", values, crs=crs, transform=place)
    whole = Tile((300, 150), crs, place)
    options = IngestOptions(64, 0, format="png", grid=grid)
    report, tasks = run(scene, tmp_path, options)
    sides, shown_m2 = set(), 0.0
    for task in tasks:
        tile = Tile.from_record(task["data"]["tile"])
        if grid == "xyz":
            by_name = Tile.from_xyz_url(task["data"]["image"], size=(64, 64))
            assert by_name is not None
            assert np.allclose(by_name.px_to_lonlat(CORNERS), tile.px_to_lonlat(CORNERS), atol=1e-9)
        rows, columns = np.nonzero(image_of(task, tmp_path)[0] > 130)
        if len(rows):
            lonlat = tile.px_to_lonlat(np.column_stack((columns + 0.5, rows + 0.5)))
            # The scene's own longitudes end elsewhere.
            lonlat[:, 0] += 360 * np.round((place.c - lonlat[:, 0]) / 360) if crs != "EPSG:32660" else 0
            inside = whole.lonlat_to_px(lonlat)
            assert ((inside > (59, 39)) & (inside < (241, 91))).all()
            sides |= set(np.sign(tile.px_to_lonlat(np.array([(32.0, 32.0)]))[:, 0]))
            shown_m2 += len(rows) * float(tile.gsd_m or 0) ** 2
    assert sides == {-1, 1}
    assert shown_m2 == pytest.approx(180 * 50 * whole.ground_size_m() ** 2, rel=0.05)
    assert run(scene, tmp_path, options)[0].kept == report.tiles
    ingest([scene], tmp_path / "d", tiles_url="http://host:9090/tiles", options=options, is_dynamic=True)
    made = SceneTiles(tmp_path / "d" / "scenes")
    for task in tasks:
        name = task["data"]["image"].partition("/a/")[2]
        assert made.image("a", name) == (tmp_path / "tiles" / "a" / name).read_bytes()
    made.close()


def test_the_server_and_the_image_store_find_xyz_tiles_and_nothing_beside_them(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", picture())
    _, tasks = run(scene, tmp_path, IngestOptions(256, 0, format="png", grid="xyz"))
    (tmp_path / "tiles" / "a" / "19").mkdir(exist_ok=True)
    (tmp_path / "tiles" / "a" / "19" / "secret.txt").write_text("x")
    app = Flask("tiles")
    _tile_route(app, Settings.from_environment(data_dir=tmp_path))
    address = tasks[0]["data"]["image"]
    with app.test_client() as client:
        with client.get(address.removeprefix("http://host:9090")) as answer:
            assert answer.status_code == 200
        for wrong in ("a/19/secret.txt", "a/19/../../../a.tif", "a/19/1/2/3.png", "a/..%2f..%2fa.tif", "a/19/9/9.png"):
            assert client.get(f"/tiles/{wrong}").status_code == 404
    settings = Settings.from_environment(data_dir=tmp_path, public_url="http://host:9090")
    with contextlib.closing(ImageStore(settings, None)) as store:
        assert np.array_equal(np.moveaxis(store.fetch(address).rgb, 2, 0), image_of(tasks[0], tmp_path))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_images_named_after_web_map_tiles_lie_where_those_do_if_that_is_asked_for(tmp_path: Path) -> None:
    image = tmp_path / "19_386690_220241.png"
    Image.fromarray(np.moveaxis(picture(rows=512, columns=512), 0, 2)).save(image)
    with pytest.raises(BadScene, match="has no CRS"):
        run(image, tmp_path)
    _, tasks = run(image, tmp_path, IngestOptions(512, 0, format="png", xyz_names=True))
    tile = Tile.from_record(tasks[0]["data"]["tile"])
    assert tile.transform is not None
    assert tile.transform.almost_equals(Tile.from_xyz(19, 386690, 220241, size=(512, 512)).transform)
    assert np.array_equal(image_of(tasks[0], tmp_path), picture(rows=512, columns=512))
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(tmp_path / "2_9_9.png")
    with pytest.raises(BadScene, match="has no CRS"):
        run(tmp_path / "2_9_9.png", tmp_path, IngestOptions(512, 0, xyz_names=True))


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["written", "on demand"])
def test_several_workers_make_the_same_files(tmp_path: Path, is_dynamic: bool) -> None:
    values = np.where(np.arange(400) < 300, picture(rows=300, columns=400), 0).astype(np.uint8)
    scene = write(tmp_path / "a.tif", values, tiled=True, blockxsize=128, blockysize=128, nodata=0)
    one, _ = run(scene, tmp_path / "one", is_dynamic=is_dynamic)
    two, _ = run(scene, tmp_path / "two", workers=2, is_dynamic=is_dynamic)
    assert asdict(one) | {"tasks_path": 0, "manifest_path": 0} == asdict(two) | {"tasks_path": 0, "manifest_path": 0}
    assert one.empty == 6
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")}
    assert names == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*")}
    for name in names - {Path("scenes/a.json")}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to see child processes in")
def test_a_killed_run_of_several_workers_goes_on_and_leaves_no_process(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", picture(rows=1000, columns=1000), tiled=True, blockxsize=128, blockysize=128)
    command = [
        sys.executable, "-m", "backend", "ingest", scene.name, "--tile-size", "64", "--overlap", "16", "--workers", "2",
        "--format", "png", "--json",
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    tiles = tmp_path / "geoprelabel-data" / "tiles" / "a"
    child = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while sum(1 for _ in tiles.glob("r*")) < 20:
        assert child.poll() is None
        time.sleep(0.02)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.kill()
    child.wait()
    assert len(workers) >= 2
    until = time.monotonic() + 30
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left
    assert not (tmp_path / "geoprelabel-data" / "tasks.json").exists()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    said = json.loads(again.stdout)
    assert said["kept"] >= 20
    assert said["kept"] + said["written"] == said["tiles"] == 441
    run(scene, tmp_path / "one")
    for path in (tmp_path / "one" / "tiles" / "a").iterdir():
        assert path.read_bytes() == (tiles / path.name).read_bytes()


def test_an_error_in_a_worker_ends_the_run_and_leaves_nothing_half(tmp_path: Path) -> None:
    scene = write(
        tmp_path / "a.tif",
        picture(rows=500, columns=500),
        tiled=True,
        blockxsize=128,
        blockysize=128,
        compress="deflate",
    )
    scene.write_bytes(scene.read_bytes()[: scene.stat().st_size // 2])
    with pytest.raises(BadScene, match="is the file damaged"):
        run(scene, tmp_path / "out", workers=3)
    assert not (tmp_path / "out" / "tasks.json").exists()
    assert not list((tmp_path / "out").rglob("*.part"))


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", picture())
    run(scene, tmp_path)
    for folder in (tmp_path, tmp_path / "tiles" / "a"):
        (folder / ".ingest-x.part").write_text("half")
    report, _ = run(scene, tmp_path)
    assert report.kept == 6
    assert not list(tmp_path.rglob("*.part"))


# Areas and pre-annotations


def saved(path: Path, shapes: list[Any], crs: str = "EPSG:32645", **columns: Any) -> Path:
    geopandas.GeoDataFrame(columns or {"n": range(len(shapes))}, geometry=shapes, crs="EPSG:32645").to_crs(crs).to_file(
        path
    )
    return path


def at(*corners_px: float) -> Any:
    """A box of scene pixels in the scene's CRS."""
    x0, y0, x1, y1 = corners_px
    return shapely.transform(shapely.box(x0, y0, x1, y1), lambda xy: np.column_stack(PLACE @ xy.T))


@pytest.mark.parametrize(
    ("name", "crs"), [("a.gpkg", "EPSG:32645"), ("a.geojson", "EPSG:4326"), ("a.gpkg", "EPSG:3857")]
)
def test_only_tiles_that_touch_the_area_are_cut(tmp_path: Path, name: str, crs: str) -> None:
    scene = write(tmp_path / "town.tif", picture())
    area = saved(tmp_path / name, [at(70, 10, 80, 20), at(5000, 5000, 5100, 5100)], crs)
    report, tasks = run(scene, tmp_path, aoi=area)
    assert [tuple(task["data"]["tile"]["window"][:2]) for task in tasks] == [(48, 0)]
    assert (report.tiles, report.outside) == (1, 5)
    assert "5 outside the area left out" in report.sentence()
    assert len(geopandas.read_parquet(report.manifest_path)) == 1
    nowhere = saved(tmp_path / "far.gpkg", [at(5000, 5000, 5100, 5100)])
    with pytest.raises(BadScene, match=r"touches the polygons of far\.gpkg"):
        run(scene, tmp_path, aoi=nowhere)
    roads = saved(tmp_path / "roads.gpkg", [at(70, 10, 80, 20).boundary])
    with pytest.raises(BadScene, match=r"roads\.gpkg has lines or points alone"):
        run(scene, tmp_path, aoi=roads)


COURT = at(20, 20, 60, 50).difference(at(30, 30, 40, 40))
TWINS = shapely.union_all([at(200, 40, 220, 60), at(230, 40, 250, 60)])
ACROSS = at(100, 100, 300, 130)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32601"])
@pytest.mark.parametrize("grid", ["native", "xyz"])
def test_an_area_and_outlines_lie_on_both_sides_of_the_antimeridian(tmp_path: Path, grid: str, crs: str) -> None:
    scene = write(tmp_path / "a.tif", picture(), crs="EPSG:4326", transform=Affine(1e-5, 0, 179.9995, 0, -1e-5, 10))
    # The first 50 columns lie west of it.
    boxes = [shapely.box(179.9996, 9.9991, 179.9999, 9.9999), shapely.box(-179.9999, 9.9991, -179.9992, 9.9999)]
    file = tmp_path / "houses.gpkg"
    geopandas.GeoDataFrame(geometry=boxes, crs="EPSG:4326").to_crs(crs).to_file(file)
    labelled = Labelled.of(file, CONFIG, label="building")
    report = ingest([scene], tmp_path, tiles_url="http://h/tiles", options=IngestOptions(512, 0, grid=grid),
                    aoi=file, prelabels=labelled)  # fmt: skip
    lonlat = []
    for task in json.loads((tmp_path / "tasks.json").read_text()):
        tile = Tile.from_record(task["data"]["tile"])
        for result in task["predictions"][0]["result"]:
            found = tile.px_to_lonlat(tile.pct_to_px(np.array(result["value"]["points"])))
            # One grid counts on beyond 180 degrees.
            found[:, 0] = (found[:, 0] + 180) % 360 - 180
            lonlat.append(found)
    assert report.prelabels == len(lonlat) == 2
    for wanted, found in zip(boxes, sorted(lonlat, key=lambda ring: -ring[0, 0]), strict=True):
        assert np.allclose(wanted.bounds, [*found.min(axis=0), *found.max(axis=0)], atol=2e-6)


def footprints(folder: Path) -> tuple[Labelled, IngestReport, list[dict[str, Any]]]:
    """A house round a court, one in two parts and one across tiles, ingested as pre-annotations."""
    scene = write(folder / "town.tif", picture(rows=300, columns=400))
    file = saved(folder / "footprints.gpkg", [COURT, TWINS, ACROSS], "EPSG:4326")
    labelled = Labelled.of(file, CONFIG, label="buildings")
    return labelled, *run(scene, folder, IngestOptions(256, 64), prelabels=labelled)


def assert_same_houses(exported: Path) -> None:
    back = geopandas.read_file(exported, layer=exported.stem).to_crs("EPSG:32645")
    for wanted in (COURT, TWINS, ACROSS):
        overlaps = back.geometry.intersection(wanted).area
        assert overlaps.max() / back.geometry[overlaps.idxmax()].union(wanted).area > 0.999
    assert len(back) == 3, "holes, parts and seams included"


def test_footprints_become_predictions_that_come_back_in_their_place(tmp_path: Path) -> None:
    labelled, report, tasks = footprints(tmp_path)
    assert report.prelabels >= 5
    for number, task in enumerate(tasks, 1):
        task["id"] = number
        predictions = task.pop("predictions", [])
        for prediction in predictions:
            assert prediction["model_version"] == labelled.version
            assert prediction["model_version"].startswith("footprints.gpkg@")
            for result in prediction["result"]:
                assert result["value"]["polygonlabels"] == ["building"]
                assert result["from_name"] == "polygon"
                assert result["meta"]["source"] == "footprints.gpkg"
                assert np.min(result["value"]["points"]) >= 0
                assert np.max(result["value"]["points"]) <= 100
            read = read_annotation({"result": prediction["result"]}, Tile.from_record(task["data"]["tile"]))
            assert not read.dropped
        results = [result for prediction in predictions for result in prediction["result"]]
        task["annotations"] = [{"id": number, "result": results, "completed_by": 1}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    export(tasks_in(tmp_path / "export.json"), tmp_path / "back.gpkg", options=ExportOptions())
    assert_same_houses(tmp_path / "back.gpkg")


@pytest.mark.label_studio
def test_footprints_go_through_a_real_label_studio_and_come_back_in_their_place(
    tmp_path: Path, label_studio: LabelStudioServer
) -> None:
    labelled, report, tasks = footprints(tmp_path)
    config = (REPOSITORY / "configs" / "land.xml").read_text(encoding="utf-8")
    settings = Settings.from_environment(label_studio_url=label_studio.url, data_dir=tmp_path)
    with LabelStudio(label_studio.url, label_studio.token) as api:
        for added in (len(tasks), 0):
            done = push(api, settings, tasks, title="footprints", label_config=config, backend_url=None)
            assert done.tasks == added
        shown = 0
        for task in list(api.tasks(done.project_id)):
            for prediction in task["predictions"]:
                assert prediction["model_version"] == labelled.version
                shown += len(prediction["result"])
                # What "submit" does with what the page shows.
                api.create_annotation(task["id"], prediction["result"], parent_prediction=prediction["id"])
        assert shown == report.prelabels
        export(api.tasks(done.project_id), tmp_path / "back.gpkg", options=ExportOptions())
    assert_same_houses(tmp_path / "back.gpkg")


def test_labels_can_stand_in_an_attribute(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture())
    shapes = [at(5, 5, 25, 25), at(30, 5, 40, 25), at(5, 30, 25, 50), shapely.Point(PLACE @ (9, 9))]
    file = saved(tmp_path / "landuse.gpkg", shapes, kind=["water", "Buildings", "volcano", "water"])
    labelled = Labelled.of(file, CONFIG, field="kind")
    report, tasks = run(scene, tmp_path, IngestOptions(256, 0), prelabels=labelled)
    labels = [result["value"]["polygonlabels"] for result in tasks[0]["predictions"][0]["result"]]
    assert labels == [["water"], ["building"]]
    assert report.prelabels_left_out == {"no polygons": 1, "a label that the config lacks": 1}
    assert "1 features left out (no polygons)" in report.sentence()


def test_an_outline_of_thousands_of_points_is_cut_into_parts_of_one_object(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture(rows=200, columns=200))
    angle = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    ring = np.column_stack((np.cos(angle), np.sin(angle))) * (60 + 5 * np.sin(40 * angle))[:, None] + 100
    lake = shapely.Polygon(np.column_stack(PLACE @ ring.T))
    labelled = Labelled.of(saved(tmp_path / "lakes.gpkg", [lake]), CONFIG, label="water")
    _, tasks = run(scene, tmp_path, IngestOptions(256, 0), prelabels=labelled)
    results = tasks[0]["predictions"][0]["result"]
    assert len(results) > 1
    assert max(len(result["value"]["points"]) for result in results) <= 200
    assert len({result["meta"]["object"] for result in results}) == 1
    tile = Tile.from_record(tasks[0]["data"]["tile"])
    area_px = sum(region.polygon.area for region in read_annotation({"result": results}, tile).regions)
    assert area_px == pytest.approx(shapely.Polygon(ring).area, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "which label.*building or road"),
        ({"label": "volcano"}, "no label 'volcano'; it has building, road"),
        ({"field": "class"}, "no attribute 'class'; it has n"),
    ],
)
def test_prelabels_that_the_config_cannot_take_are_refused(tmp_path: Path, options: Any, words: str) -> None:
    scene = write(tmp_path / "town.tif", picture())
    file = saved(tmp_path / "f.gpkg", [at(5, 5, 25, 25)])
    with pytest.raises(BadScene, match=words):
        run(scene, tmp_path, prelabels=Labelled.of(file, CONFIG, **options))


def test_vectors_without_a_place_are_refused(tmp_path: Path) -> None:
    scene = write(tmp_path / "town.tif", picture())
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.txt").write_text("nothing")
    for name in ("a.csv", "b.txt", "missing.gpkg"):
        with pytest.raises(BadScene, match=name):
            run(scene, tmp_path, aoi=tmp_path / name)


# The command line, memory


def test_the_command_takes_them_all(tmp_path: Path) -> None:
    files = parts(tmp_path, picture())
    saved(tmp_path / "area.gpkg", [at(0, 0, 150, 100)])
    saved(tmp_path / "f.gpkg", [at(5, 5, 25, 25)])
    done = subprocess.run(
        [
            sys.executable, "-m", "backend", "ingest", *map(str, files), "--mosaic", "town", "--aoi", "area.gpkg",
            "--prelabels", "f.gpkg", "--out", "out", "--tile-size", "64", "--overlap", "0",
            "--stretch", "0,255", "--json",
        ],
        cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["tiles"], said["prelabels"]) == (6, 1)
    assert "Traceback" not in done.stderr


SHARED = REPOSITORY.parent / "shared" / "data"
REAL = {
    "dk_fields_sentinel2/images/dk_s2_rgb_uint16.tif": "dk_fields_sentinel2/labels/marker2016_small.shp",
    "oam_tcd_sample/images/5b3622402b6a08001185f8d8_10_00004.tif": "oam_tcd_sample/labels/4326.geojson",
    "spacenet_samples/images/sn4_atlanta_pan_uint16.tif": "spacenet_samples/labels/sn4_atlanta_buildings_32616.geojson",
    "hot_banepa_e2e/images/19_386690_220241.jpg": "hot_banepa_e2e/labels/labels_4326.geojson",
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with real scenes")
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(("scene", "truth"), REAL.items(), ids=[Path(name).stem for name in REAL])
def test_real_scenes_take_their_truth_as_pre_annotations_and_give_it_back(
    tmp_path: Path, scene: str, truth: str
) -> None:
    labelled = Labelled.of(SHARED / truth, CONFIG, label="building")
    _, tasks = run(SHARED / scene, tmp_path, IngestOptions(512, 64, xyz_names=True), prelabels=labelled)
    for number, task in enumerate(tasks, 1):
        results = [result for prediction in task.pop("predictions", []) for result in prediction["result"]]
        task |= {"id": number, "annotations": [{"id": number, "result": results, "completed_by": 1}]}
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    export(tasks_in(tmp_path / "export.json"), tmp_path / "back.gpkg", options=ExportOptions(allow_ballpark=True))
    back = geopandas.read_file(tmp_path / "back.gpkg", layer="back")
    covered = geopandas.read_parquet(tmp_path / "manifest.parquet").union_all()
    wanted = geopandas.read_file(SHARED / truth).to_crs("EPSG:4326").geometry.make_valid().union_all()
    wanted = wanted.intersection(covered)
    assert back.union_all().symmetric_difference(wanted).area < 0.01 * wanted.area


# Label configs


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.xml")), ids=lambda path: path.stem)
def test_the_label_configs_are_versioned_and_say_what_their_labels_mean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (tag,) = parse_config(text).tags
    names = [label.value for label in tag.labels]
    assert len(set(names)) == len(names)
    head = re.search(r"<!-- Taxonomy: [a-z ]+, version \d+\.\n(.*?)-->", text, re.DOTALL)
    assert head
    assert [line.split(":")[0].strip() for line in head[1].strip().splitlines()] == names
    assert len(set(re.findall(r'background="(#[0-9A-F]{6})"', text))) == len(names)
    # A click needs no label picked before it, and the page may draw images of another origin.
    assert {(prompt.kind, prompt.labels) for prompt in parse_config(text).prompts} == {
        ("keypoint", ()),
        ("rectangle", ()),
    }
    assert 'crossOrigin="anonymous"' in text


@pytest.mark.skipif(not sdk_python().exists(), reason="no .venv-label-studio with label-studio-sdk")
def test_label_studios_own_sdk_takes_the_label_configs_and_what_prelabels_become(tmp_path: Path) -> None:
    _, _, tasks = footprints(tmp_path)
    judge = SdkJudge(sdk_python())
    try:
        (prediction,) = tasks[0]["predictions"]
        for path in sorted((REPOSITORY / "configs").glob("*.xml")):
            errors = judge.errors(path.read_text(encoding="utf-8"), prediction)
            assert (not errors) == (path.stem in ("buildings", "land")), f"{path.name}: {errors}"
    finally:
        judge.close()
