"""What must hold of served tiles: made on demand to the byte, conditional, by ranges, signed, in a bucket."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import rasterio
from affine import Affine
from flask import Flask
from flask.testing import FlaskClient
from rasterio.control import GroundControlPoint

from backend import stores
from backend.errors import BackendError, BadImage, BadScene, Busy
from backend.images import ImageStore
from backend.ingest import IngestOptions, ingest
from backend.server import _tile_route
from backend.settings import BadSettings, Settings
from backend.stores import Bucket, Folder, Store, store_at
from backend.tiles import SceneTiles
from demo.label_studio import free_port
from tests.small_s3 import s3_server

PLACE = Affine(0.5, 0, 354_000, 0, -0.5, 3_057_000)
SMALL = IngestOptions(tile_size=64, overlap=16)
URL = "http://host:9090/tiles"


def write(path: Path, values: np.ndarray, **profile: Any) -> Path:
    palette = profile.pop("palette", None)
    place = {"crs": "EPSG:32645", "transform": PLACE, **profile}
    with rasterio.open(
        path, "w", driver="GTiff", count=values.shape[0], height=values.shape[1], width=values.shape[2],
        dtype=values.dtype, **{key: value for key, value in place.items() if value is not None},
    ) as out:  # fmt: skip
        out.write(values)
        if palette:
            out.write_colormap(1, palette)
    return path


def picture(bands: int = 3, rows: int = 150, columns: int = 200, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (bands, rows, columns)).astype(dtype)


def tasks_of(out: Path) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = json.loads((out / "tasks.json").read_text())
    return tasks


def files_of(out: Path) -> dict[str, bytes]:
    """The images of a run by scene and name."""
    root = out / "tiles"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("*/**/*.*")}


@contextlib.contextmanager
def serving(out: Path, **settings: Any) -> Iterator[FlaskClient]:
    app = Flask("tiles")
    _tile_route(app, Settings.from_environment(data_dir=out, **settings))

    class Client(FlaskClient):
        def open(self, *arguments: Any, **named: Any) -> Any:
            return super().open(*arguments, **{"buffered": True, **named})

    app.test_client_class = Client
    with app.test_client() as client:
        yield client


# On demand


def half_empty(folder: Path) -> Path:
    values = picture(dtype=np.float32)
    values[:, :, 90:] = np.nan
    return write(folder / "a.tif", values)


def tied(folder: Path) -> Path:
    points = [GroundControlPoint(r, c, 354_000 + c / 2, 3_057_000 - r / 2) for r in (0, 150) for c in (0, 200)]
    path = folder / "a.tif"
    with rasterio.open(path, "w", driver="GTiff", count=3, height=150, width=200, dtype="uint8") as out:
        out.write(picture())
        out.gcps = (points, rasterio.crs.CRS.from_epsg(32645))
    return path


SCENES: dict[str, Any] = {
    "bytes": (lambda folder: write(folder / "a.tif", picture()), SMALL),
    "16 bits": (lambda folder: write(folder / "a.tif", picture(4, dtype=np.uint16)), SMALL),
    "float with gaps": (half_empty, SMALL),
    "palette": (
        lambda folder: write(folder / "a.tif", picture(1), palette={i: (i, 255 - i, 9, 255) for i in range(256)}),
        IngestOptions(64, 16, format="png"),
    ),
    "south up": (
        lambda folder: write(folder / "a.tif", picture(), transform=Affine(0.5, 0, 354_000, 0, 0.5, 3_057_000)),
        IngestOptions(64, 16, format="webp"),
    ),
    "control points": (tied, SMALL),
    "web map": (lambda folder: write(folder / "a.tif", picture()), IngestOptions(64, 0, grid="xyz")),
}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", SCENES)
def test_tiles_made_on_demand_are_those_that_ingest_writes(tmp_path: Path, name: str) -> None:
    make, options = SCENES[name]
    scene = make(tmp_path)
    written = ingest([scene], tmp_path / "w", tiles_url=URL, options=options)
    planned = ingest([scene], tmp_path / "d", tiles_url=URL, options=options, is_dynamic=True)
    assert (planned.planned, planned.written, planned.empty) == (written.tiles, 0, written.empty)
    assert "made on demand" in planned.sentence()
    assert tasks_of(tmp_path / "d") == tasks_of(tmp_path / "w")
    files = files_of(tmp_path / "w")
    assert len(files) == written.tiles
    with serving(tmp_path / "d") as client:
        for tile, content in files.items():
            answer = client.get(f"/tiles/{tile}")
            assert (answer.status_code, answer.data) == (200, content)
            assert answer.content_type.startswith("image/")
    assert not files_of(tmp_path / "d")
    settings = Settings.from_environment(data_dir=tmp_path / "d", public_url="http://host:9090")
    with contextlib.closing(ImageStore(settings, None)) as made:
        settings = Settings.from_environment(data_dir=tmp_path / "w", public_url="http://host:9090")
        with contextlib.closing(ImageStore(settings, None)) as read:
            address = tasks_of(tmp_path / "w")[0]["data"]["image"]
            assert made.fetch(address).key == read.fetch(address).key


def test_a_mosaic_is_made_on_demand(tmp_path: Path) -> None:
    left = write(tmp_path / "l.tif", picture(columns=100))
    right = write(tmp_path / "r.tif", picture(columns=100)[:, ::-1], transform=PLACE @ Affine.translation(100, 0))
    for name, is_dynamic in (("w", False), ("d", True)):
        ingest([left, right], tmp_path / name, tiles_url=URL, options=SMALL, mosaic_name="m", is_dynamic=is_dynamic)
    with serving(tmp_path / "d") as client:
        for tile, content in files_of(tmp_path / "w").items():
            assert client.get(f"/tiles/{tile}").data == content


def test_the_server_may_run_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    write(tmp_path / "here" / "a.tif", picture())
    with zipfile.ZipFile(tmp_path / "here" / "z.zip", "w") as file:
        file.write(tmp_path / "here" / "a.tif", "a.tif")
    monkeypatch.chdir(tmp_path / "here")
    ingest(["a.tif", "z.zip"], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=True)
    ingest(["a.tif", "z.zip"], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=True, mosaic_name="m")
    monkeypatch.chdir(tmp_path / "there")
    with serving(tmp_path) as client:
        tiles = [client.get(f"/tiles/{scene}/r0000_c0000.jpg") for scene in ("a", "z-a", "m")]
        assert [answer.status_code for answer in tiles] == [200, 200, 200]
        assert len({answer.data for answer in tiles}) == 1


def test_only_registered_scenes_and_tiles_of_their_grid_are_made(tmp_path: Path) -> None:
    scene = half_empty(tmp_path)
    ingest([scene], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=True)
    wrong = [
        "a/r0000_c0009.jpg", "a/r0000_c0000.png", "a/r00000_c0000.jpg", "a/18/1/1.jpg", "b/r0000_c0000.jpg",
        "a.tif/r0000_c0000.jpg", "..%2fscenes%2fa/r0000_c0000.jpg", "a/a.tif", "a/r0000_c0003.jpg",
    ]  # fmt: skip
    with serving(tmp_path) as client:
        assert client.get("/tiles/a/r0000_c0000.jpg").status_code == 200
        assert {name: client.get(f"/tiles/{name}").status_code for name in wrong} == dict.fromkeys(wrong, 404)
        # Written anew as files, the scene is no longer made.
        ingest([scene], tmp_path, tiles_url=URL, options=SMALL)
        (tmp_path / "tiles/a/r0000_c0000.jpg").unlink()
        assert client.get("/tiles/a/r0000_c0000.jpg").status_code == 404


def test_a_scene_that_has_changed_is_not_shown_in_the_old_ones_place(tmp_path: Path) -> None:
    scene = write(tmp_path / "a.tif", picture())
    ingest([scene], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=True)
    made = SceneTiles(tmp_path / "scenes")
    before, tag = made.image("a", "r0000_c0000.jpg"), made.etag("a", "r0000_c0000.jpg")
    assert before
    assert tag
    write(scene, 255 - picture(rows=160))
    with pytest.raises(BadScene, match=r"a\.tif is gone or has changed; ingest it again"):
        made.image("a", "r0000_c0000.jpg")
    ingest([scene], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=True)
    assert made.image("a", "r0000_c0000.jpg") not in (before, None)
    assert made.etag("a", "r0000_c0000.jpg") != tag
    made.close()


def test_many_threads_share_few_handles_and_get_the_right_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        scene = write(tmp_path / f"{name}.tif", np.roll(picture(), ord(name), axis=2))
        ingest([scene], tmp_path / name, tiles_url=URL, options=SMALL)
    ingest([tmp_path / f"{n}.tif" for n in "abc"], tmp_path / "d", tiles_url=URL, options=SMALL, is_dynamic=True)
    wanted = {tile: content for name in "abc" for tile, content in files_of(tmp_path / name).items()}
    made = SceneTiles(tmp_path / "d" / "scenes", at_once=2, max_open=2)
    from backend import scenes

    counts = {"now": 0, "most": 0}
    lock = threading.Lock()
    read = scenes.Pixels.read

    def counted(*arguments: Any, **named: Any) -> Any:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        try:
            return read(*arguments, **named)
        finally:
            with lock:
                counts["now"] -= 1

    monkeypatch.setattr(scenes.Pixels, "read", counted)
    with ThreadPoolExecutor(8) as pool:
        got = dict(zip(wanted, pool.map(lambda tile: made.image(*tile.split("/", 1)), wanted), strict=True))
    assert got == wanted
    assert counts["most"] <= 2
    assert len(made._idle) <= 2
    made.close()
    assert not made._idle


def test_who_waits_too_long_for_a_turn_is_told_to_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ingest([write(tmp_path / "a.tif", picture())], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=True)
    made = SceneTiles(tmp_path / "scenes", at_once=1)
    monkeypatch.setattr("backend.tiles._WAIT_S", 0.05)
    with made._turns, pytest.raises(Busy, match="ask again"):
        made.image("a", "r0000_c0000.jpg")


# The route


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["written", "on demand"])
def test_tiles_are_conditional_ranged_and_open_to_pages_of_any_origin(tmp_path: Path, is_dynamic: bool) -> None:
    ingest([write(tmp_path / "a.tif", picture())], tmp_path, tiles_url=URL, options=SMALL, is_dynamic=is_dynamic)
    at = "/tiles/a/r0001_c0001.jpg"
    with serving(tmp_path) as client:
        whole = client.get(at)
        etag = whole.headers["ETag"]
        assert re.fullmatch(r'"[^"]+"', etag), "a strong one"
        assert whole.headers["Cache-Control"] == "public, max-age=3600"
        assert whole.headers["Access-Control-Allow-Origin"] == "*"
        assert "ETag" in whole.headers["Access-Control-Expose-Headers"]
        head = client.head(at)
        assert (head.status_code, head.data, head.headers["ETag"]) == (200, b"", etag)
        assert int(head.headers["Content-Length"]) == len(whole.data)
        for tag, status in ((etag, 304), (f'"x", {etag}', 304), ('"x"', 200)):
            answer = client.get(at, headers={"If-None-Match": tag})
            assert (answer.status_code, len(answer.data)) == (status, 0 if status == 304 else len(whole.data))
            assert answer.headers["ETag"] == etag
            assert "Cache-Control" in answer.headers
        part = client.get(at, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.data) == (206, whole.data[10:20])
        assert part.headers["Content-Range"] == f"bytes 10-19/{len(whole.data)}"
        last = client.get(at, headers={"Range": "bytes=-5"})
        assert (last.status_code, last.data) == (206, whole.data[-5:])
        beyond = client.get(at, headers={"Range": f"bytes={len(whole.data)}-"})
        assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(whole.data)}")
        assert beyond.headers["Access-Control-Allow-Origin"] == "*"
        stale = client.get(at, headers={"Range": "bytes=10-19", "If-Range": '"x"'})
        assert (stale.status_code, stale.data) == (200, whole.data)
        asked = {"Origin": "http://labels", "Access-Control-Request-Method": "GET",
                 "Access-Control-Request-Headers": "range"}  # fmt: skip
        before = client.options(at, headers=asked)
        assert before.status_code == 204
        assert "Range" in before.headers["Access-Control-Allow-Headers"]
        assert "GET" in before.headers["Access-Control-Allow-Methods"]
        assert client.post(at).status_code == 405


def test_signed_tiles_need_their_own_signature(tmp_path: Path) -> None:
    ingest([write(tmp_path / "a.tif", picture())], tmp_path, tiles_url=URL, options=SMALL, secret="s3cret")
    addresses = [task["data"]["image"] for task in tasks_of(tmp_path)]
    assert "s3cret" not in (tmp_path / "tasks.json").read_text()
    first, second = (urlsplit(address) for address in addresses[:2])
    with serving(tmp_path, tiles_secret="s3cret") as client:
        for address in addresses:
            answer = client.get(address.removeprefix("http://host:9090"))
            assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "private, max-age=3600")
        for query in ("", "sig=", f"sig={'A' * 32}", second.query, f"{first.query}x", "sig=ä"):
            assert client.get(f"{first.path}?{query}").status_code == 403
    settings = Settings.from_environment(data_dir=tmp_path, public_url="http://host:9090", tiles_secret="s3cret")
    with contextlib.closing(ImageStore(settings, None)) as images:
        assert images.fetch(addresses[0]).rgb.shape == (64, 64, 3)


# A bucket


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server on this machine, with the bucket ``town``; the environment says where it is."""
    with s3_server() as (_, client):
        client.create_bucket(Bucket="town")
        yield client


def test_tiles_go_to_a_bucket_and_are_read_back_through_the_prefix(tmp_path: Path, s3: Any) -> None:
    scene = write(tmp_path / "a.tif", picture())
    ingest([scene], tmp_path / "w", tiles_url=URL, options=SMALL)
    report = ingest([scene], tmp_path / "s", options=SMALL, upload="s3://town/may/tiles/")
    files = files_of(tmp_path / "w")
    assert report.written == len(files)
    assert not (tmp_path / "s" / "tiles").exists()
    listed = {one["Key"]: one for one in s3.list_objects_v2(Bucket="town", Prefix="may/tiles/a/")["Contents"]}
    assert set(listed) == {f"may/tiles/{name}" for name in files}
    for name, content in files.items():
        got = s3.get_object(Bucket="town", Key=f"may/tiles/{name}")
        assert (got["Body"].read(), got["ContentType"]) == (content, "image/jpeg")
    address = tasks_of(tmp_path / "s")[0]["data"]["image"]
    assert address == "s3://town/may/tiles/a/r0000_c0000.jpg"
    # A second run uploads nothing; one with other options clears away what it does not make.
    again = ingest([scene], tmp_path / "s", options=SMALL, upload="s3://town/may/tiles")
    assert (again.kept, again.written) == (len(files), 0)
    ingest([scene], tmp_path / "s", options=IngestOptions(100, 0, "png"), upload="s3://town/may/tiles")
    kinds = {one["Key"][-3:] for one in s3.list_objects_v2(Bucket="town", Prefix="may/tiles/a/")["Contents"]}
    assert kinds - {"/a/"} == {"png"}


def test_images_of_named_buckets_are_read_with_the_operators_keys_and_others_are_not(tmp_path: Path, s3: Any) -> None:
    ingest([write(tmp_path / "b.tif", picture())], tmp_path, options=SMALL, upload="s3://town/june")
    address = tasks_of(tmp_path)[0]["data"]["image"]
    s3.put_object(Bucket="town", Key="private/x.jpg", Body=b"no")
    settings = Settings.from_environment(data_dir=tmp_path, image_buckets="s3://town/june/, s3://else")
    with contextlib.closing(ImageStore(settings, None)) as images:
        assert images.fetch(address).rgb.shape == (64, 64, 3)
        with pytest.raises(BadImage, match="no such object"):
            images.fetch("s3://town/june/b/none.jpg")
        for wrong in ("s3://town/private/x.jpg", "s3://town/june2/x.jpg", "s3://town/june/../private/x.jpg"):
            with pytest.raises(BadImage, match=r"stored task only|'\.\.'"):
                images.fetch(wrong)
        with pytest.raises(BadImage, match="no such object"):
            images.fetch("s3://else/x.jpg")
    with pytest.raises(BadSettings, match="s3://bucket"):
        Settings.from_environment(image_buckets="https://town/june")


def test_a_scene_in_a_bucket_is_read_by_windows_and_made_on_demand(tmp_path: Path, s3: Any) -> None:
    scene = write(tmp_path / "c.tif", picture(rows=512, columns=512), tiled=True, blockxsize=128, blockysize=128)
    s3.put_object(Bucket="town", Key="scenes/c.tif", Body=scene.read_bytes())
    options = IngestOptions(128, 0)
    report = ingest(["s3://town/scenes/c.tif"], tmp_path / "d", tiles_url=URL, options=options, is_dynamic=True)
    assert report.planned == 16
    ingest([scene], tmp_path / "w", tiles_url=URL, options=options)
    with serving(tmp_path / "d") as client:
        for name in ("r0000_c0000", "r0003_c0002"):
            made = client.get(f"/tiles/c/{name}.jpg")
            assert made.data == (tmp_path / "w/tiles/c" / f"{name}.jpg").read_bytes()


def test_a_bucket_that_is_not_there_or_misspelt_is_said(tmp_path: Path, s3: Any) -> None:
    scene = write(tmp_path / "a.tif", picture())
    with pytest.raises(BadScene, match=r"s3://nobucket.*AWS_ACCESS_KEY_ID"):
        ingest([scene], tmp_path, options=SMALL, upload="s3://nobucket/x")
    assert not (tmp_path / "tasks.json").exists()
    for wrong in ("ftp://town/x", "s3://", "s3://a?b", "gs://", "az://a/../../b?c", "https://h/x"):
        with pytest.raises(BadScene, match="s3://bucket/prefix"):
            store_at(wrong)


def assert_holds(store: Store) -> None:
    assert store.names("a") == set()
    assert store.get("a/x.json") is None
    store.remove("a/x.json")
    store.put("a/x.json", b"1")
    store.put("a/1/2/3.png", b"22")
    store.put("a/x.json", b"333")
    assert store.names("a") == {"x.json", "1/2/3.png"}
    assert store.get("a/x.json") == b"333"
    with pytest.raises(BackendError, match="larger than"):
        store.get("a/x.json", max_bytes=2)
    store.remove("a/x.json")
    assert store.names("") == {"a/1/2/3.png"}


def test_stores_do_the_same(tmp_path: Path, s3: Any) -> None:
    for store in (Folder(tmp_path / "new" / "one"), Bucket("town/stores")):
        assert_holds(store)


EMULATORS = {
    "gs": ("gcp-storage-emulator", "start --host 127.0.0.1 --port {port} --in-memory --default-bucket tiles",
           {"CPL_GS_ENDPOINT": "http://127.0.0.1:{port}", "GS_NO_SIGN_REQUEST": "YES"}),
    "az": ("azurite-blob", "--blobPort {port} --inMemoryPersistence --skipApiVersionCheck --disableTelemetry",
           # The emulator's own account and key, the same everywhere.
           {"AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey="
            "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;"
            "BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1"}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", EMULATORS)
def test_googles_and_microsofts_stores_do_the_same(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against emulators, where they are installed: pip's ``gcp-storage-emulator``, npm's ``azurite``."""
    program, arguments, environment = EMULATORS[scheme]
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on PATH")
    port = free_port()
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(port=port))
    stores._files_of.cache_clear()
    with subprocess.Popen([program, *arguments.format(port=port).split()], cwd=tmp_path) as running:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            stores._files_of(scheme, "tiles").create_dir("tiles")
            assert_holds(store_at(f"{scheme}://tiles/stores"))
            scene = write(tmp_path / "a.tif", picture())
            for written in (True, False):
                report = ingest([scene], tmp_path, options=SMALL, upload=f"{scheme}://tiles/may")
                assert bool(report.written) is written
            # As Label Studio spells it.
            spelt = {"az": "azure-blob"}.get(scheme, scheme)
            assert tasks_of(tmp_path)[0]["data"]["image"] == f"{spelt}://tiles/may/a/r0000_c0000.jpg"
            told = stores._files_of(scheme, "tiles").open_input_stream("tiles/may/a/r0000_c0000.jpg").metadata()
            assert told["Content-Type"] == b"image/jpeg"
            with pytest.raises(BadScene, match=rf"{scheme}://none-such/x: .*look at"):
                store_at(f"{scheme}://none-such/x").put("a.png", b"1")
        finally:
            running.terminate()
            stores._files_of.cache_clear()


def test_an_upload_to_azure_without_an_account_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadScene, match=r"no storage account is named.*AZURE_STORAGE_CONNECTION_STRING"):
        store_at("az://tiles/x").put("a.png", b"1")
