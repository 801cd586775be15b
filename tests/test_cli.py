"""The command line: exit codes, and one sentence with the way out for each thing that goes wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from demo.label_studio import free_port

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("LABEL_STUDIO", "GEOPRELABEL"))
    }
    return subprocess.run(
        [sys.executable, "-m", "backend", *arguments],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), "GEOPRELABEL_DATA_DIR": str(folder / "data"), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def write_scene(path: Path, **profile: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 160, 200), np.uint8)
    with rasterio.open(path, "w", driver="GTiff", width=200, height=160, count=3, dtype="uint8", **profile) as raster:
        raster.write(pixels)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "town.tif", crs="EPSG:32645", transform=Affine(0.2, 0, 354000, 0, -0.2, 3057000))


def test_a_scene_is_cut_predicted_and_what_was_done_is_done_no_second_time(scene: Path, tmp_path: Path):
    cut = run("ingest", scene.name, "--tile-size", "128", "--overlap", "16", "--json", folder=tmp_path)
    assert cut.returncode == 0, cut.stderr
    assert json.loads(cut.stdout)["tiles"] == 4
    tasks = json.loads((tmp_path / "data/tasks.json").read_text())
    assert tasks[0]["data"]["tile"]["crs"] == "EPSG:32645"
    done = run("predict", "data/tasks.json", "--out", "predictions.json", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted"] == 4
    assert all(len(task["predictions"]) == 1 for task in json.loads((tmp_path / "predictions.json").read_text()))
    again = run("ingest", scene.name, "--tile-size", "128", "--overlap", "16", "--json", folder=tmp_path)
    assert json.loads(again.stdout)["kept"] == 4


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_scene_without_a_crs_is_refused_with_the_way_out(tmp_path: Path):
    write_scene(tmp_path / "photo.tif")
    refused = run("ingest", "photo.tif", folder=tmp_path)
    assert refused.returncode == 1
    assert "photo.tif" in refused.stderr
    assert "gdal_edit.py -a_srs" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (("nonsense",), {}, 2, "No such command"),
        (("export", "--out", "x.geojson"), {}, 2, "--project N or --annotations"),
        (("ingest", "none.tif"), {}, 1, "none.tif"),
        (("push", "none.json"), {"LABEL_STUDIO_URL": "http://localhost:1"}, 1, "none.json is not there"),
        (("train", "--project", "3"), {}, 1, "LABEL_STUDIO_URL is not set"),
        (("train", "--project", "three"), {}, 1, "'three'"),
        (("models", "rollback", "--project", "3"), {}, 1, "'3'"),
        (("serve",), {"PORT": "many"}, 1, "PORT"),
        (("serve",), {"PORT": "0"}, 1, "got '0'"),
        (("serve",), {"DEVICE": "gpu"}, 1, "DEVICE: String should match"),
        (("ingest", "."), {}, 1, ". is a folder; name the rasters in it"),
        (("ingest", "none.tif", "--out", "file"), {}, 1, "file: File exists; a folder is wanted there"),
        (("push", "one.json", "--storage", "file"), {}, 1, "error: file/"),
        (("export", "--annotations", "one.json", "--out", "/proc/town.geojson"), {}, 1, "error: /proc: "),
        (("predict", "tasks.json", "--out", "."), {}, 1, "--out . is a folder; name a file"),
        (("predict", "tasks.json", "--out", "p.json", "--config", "bad.xml"), {}, 1, "bad.xml"),
        (("push", "tasks.json", "--project", " "), {}, 1, "--project must be a title, got ' '"),
        (("push", "tasks.json", "--backend-url", "localhost:9090"), {}, 1, "got 'localhost:9090'"),
        (("serve",), {"GEOPRELABEL_SEGMENTER": "yolo"}, 1, "yolo"),
    ],
)
def test_wrong_use_and_failure_have_their_own_codes_and_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], code: int, words: str
):
    (tmp_path / "tasks.json").write_text("[]")
    (tmp_path / "one.json").write_text('[{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}]')
    (tmp_path / "file").write_text("")
    there = set(tmp_path.iterdir())
    done = run(*arguments, folder=tmp_path, **environment)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not {path.name for path in set(tmp_path.iterdir()) - there} - {"data"}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_metres_that_are_called_degrees_are_refused(tmp_path: Path):
    write_scene(tmp_path / "town.tif", crs="EPSG:4326", transform=Affine(0.2, 0, 354000, 0, -0.2, 3057000))
    refused = run("ingest", "town.tif", folder=tmp_path)
    assert refused.returncode == 1
    assert "longitude 354020" in refused.stderr
    assert "--crs EPSG:" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_polygons_in_place_of_a_raster_are_refused_with_where_they_go(tmp_path: Path):
    (tmp_path / "houses.geojson").write_text('{"type": "FeatureCollection", "features": [{"type": "Feature"}]}')
    refused = run("ingest", "houses.geojson", folder=tmp_path)
    assert refused.returncode == 1
    assert "--prelabels" in refused.stderr


def test_a_taken_port_is_said_once(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run("serve", folder=tmp_path, PORT=port)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: port {port} ")
    assert "set PORT" in refused.stderr


def test_a_device_that_is_not_there_is_said_in_a_sentence(tmp_path: Path):
    (tmp_path / "tasks.json").write_text("[]")
    refused = run("predict", "tasks.json", "--out", "p.json", folder=tmp_path, DEVICE="cuda:63")
    assert refused.returncode == 1
    assert "DEVICE=cuda:63" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_label_config_that_reads_other_data_is_refused_before_anything_is_made(tmp_path: Path):
    (tmp_path / "tasks.json").write_text('[{"data": {"photo": "http://localhost/a.jpg"}}]')
    refused = run("push", "tasks.json", folder=tmp_path, LABEL_STUDIO_URL="http://127.0.0.1:9")
    assert refused.returncode == 1
    assert "does not fit tasks.json: data.image" in refused.stderr


def test_label_studio_being_down_is_said_with_its_address(tmp_path: Path):
    url = f"http://127.0.0.1:{free_port()}"
    (tmp_path / "tasks.json").write_text("[]")
    done = run("push", "tasks.json", folder=tmp_path, LABEL_STUDIO_URL=url, LABEL_STUDIO_API_KEY="a" * 40)
    assert done.returncode == 1
    assert url in done.stderr
    assert "a" * 40 not in done.stderr


def test_a_token_that_label_studio_refuses_is_said_and_not_shown(tmp_path: Path, label_studio: Any):
    (tmp_path / "tasks.json").write_text("[]")
    token = "0" * 40
    done = run("push", "tasks.json", folder=tmp_path, LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=token)
    assert done.returncode == 1
    assert "LABEL_STUDIO_API_KEY" in done.stderr
    assert token not in done.stderr


def test_a_backend_that_is_not_there_is_looked_for_at_port_and_said_with_the_way_out(tmp_path: Path, label_studio: Any):
    (tmp_path / "tasks.json").write_text("[]")
    port = str(free_port())
    there = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token, "PORT": port}
    done = run("push", "tasks.json", "--project", "no backend yet", folder=tmp_path, **there)
    assert done.returncode == 1
    assert f"no backend at http://localhost:{port}; start it there" in done.stderr
