"""QGIS itself opens, shows and edits what was exported, and the edits come back. Skipped where PyQGIS is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import shapely

from backend.edits import read_edits
from backend.export import export
from backend.formats import FINDINGS_LAYER, read_frame

from .test_export import SCENE, annotated, box_at
from .test_formats import COURT, OBJECTS, TREE_CONFIG, rows_of, trees

DESK = Path(__file__).with_name("qgis_desk.py")
PYTHONS = tuple(filter(None, (os.environ.get("GEOPRELABEL_QGIS_PYTHON"), "/usr/bin/python3")))
ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "QT_QPA_PLATFORM": "offscreen", "HOME": os.environ.get("HOME", "/")}


def find_python() -> str:
    for python in PYTHONS:
        found = shutil.which(python)
        asked = [found or "", "-c", "import qgis.core"]
        if found and not subprocess.run(asked, env=ENVIRONMENT, capture_output=True, check=False).returncode:
            return found
    return ""


PYTHON = find_python()
pytestmark = pytest.mark.skipif(
    not PYTHON, reason=f"no PyQGIS in {', '.join(PYTHONS)} (Debian: apt-get install python3-qgis)"
)


def at_the_desk(task: str, *files: Path) -> dict[str, Any]:
    command = [PYTHON, "-W", "ignore::DeprecationWarning", str(DESK), task, *map(str, files)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert "ANSWER " in done.stdout, said
    assert "Warning" not in said, said
    answer = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    found: dict[str, Any] = json.loads(answer.removeprefix("ANSWER "))
    return found


def messy() -> list[dict[str, Any]]:
    """A town with trees, where a house is a road as well, and with five more houses."""
    tasks = trees()
    pond, *houses = (box_at(x, y, w, h) for x, y, w, h in ((251, 100, 78, 40), (60, 300, 50, 40), (200, 400, 30, 60)))
    for task, more in zip(tasks, annotated(SCENE, [(pond, "road"), *((h, "building") for h in houses)]), strict=True):
        for result in more["annotations"][0]["result"]:
            task["annotations"][0]["result"].append({**result, "id": f"more-{result['id']}"})
    return tasks


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qgis")
    for ending in (".gpkg", ".geojson", ".fgb", ".shp"):
        report = export(messy(), folder / f"town{ending}", label_config=TREE_CONFIG)
        assert report.conflict_count == 1
    return folder


def test_qgis_sees_every_layer_in_its_place_and_in_our_style(town: Path) -> None:
    files = [town / f"town{ending}" for ending in (".gpkg", ".geojson", ".fgb", ".shp")]
    seen = at_the_desk("look", *files)
    rows = rows_of(town / "town.gpkg").values()
    areas = [row for row in rows if row["area_m2"] is not None]
    for file in files:
        layers = {(layer["name"], layer["kind"].replace("Multi", "")): layer for layer in seen[str(file)]}
        outlines = layers["town", "Polygon"]
        assert outlines["count"] == len(areas)
        assert outlines["area_m2"] == pytest.approx(sum(row["area_m2"] for row in areas), rel=1e-6)
        assert outlines["is_valid"]
        assert outlines["crs"] == "EPSG:4326"
        points = layers.get(("town_points" if file.suffix == ".gpkg" else "town", "Point"))
        assert (points or {"count": 0})["count"] == (0 if file.suffix == ".shp" else len(rows) - len(areas))
    layers = {layer["name"]: layer for layer in seen[str(files[0])]}
    for name, symbol in (("town", "SimpleFill"), ("town_points", "SimpleMarker")):
        styled = layers[name]
        assert (styled["renderer"], styled["attribute"], styled["symbol"]) == ("categorizedSymbol", "label", symbol)
        # The last takes whatever label is given there.
        assert [value for value, *_ in styled["categories"]] == ["building", "road", "tree", ""]
        assert [colour for *_, colour in styled["categories"]] == ["#e4572e", "#17bebb", "#ffc914", "#5f6b6d"]
    assert layers[FINDINGS_LAYER]["symbol"] == "SimpleMarker"
    assert layers[FINDINGS_LAYER]["count"] == 1


def test_findings_are_a_layer_of_points_when_there_are_none(tmp_path: Path) -> None:
    export(annotated(SCENE, OBJECTS[:1]), tmp_path / "a.gpkg")
    layers = {layer["name"]: layer for layer in at_the_desk("look", tmp_path / "a.gpkg")[str(tmp_path / "a.gpkg")]}
    assert (layers[FINDINGS_LAYER]["kind"], layers[FINDINGS_LAYER]["count"]) == ("Point", 0)


def test_qgis_draws_the_colours_of_the_labels(town: Path, tmp_path: Path) -> None:
    assert at_the_desk("render", town / "town.gpkg", tmp_path / "map.png")["errors"] == []
    rgb = np.asarray(PIL.Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)
    for colour in ("#e4572e", "#17bebb", "#ffc914"):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(rgb.astype(int) - wanted).max(axis=1) < 12).sum() > 40, colour


def test_what_was_edited_in_qgis_is_taken_back(town: Path, tmp_path: Path) -> None:
    file = tmp_path / "town.gpkg"
    shutil.copy(town / "town.gpkg", file)
    assert len(read_edits(file)) == 0
    done = at_the_desk("edit", file)
    edits = read_edits(file)
    (point_id, *point), drawn = done["point_moved"], [edit.label for edit in edits.added.values()]
    assert set(edits.changed) == {done["moved"], done["split"], done["relabelled"], point_id}
    assert edits.deleted == {done["deleted"], done["point_deleted"]}
    # Drawn, split off, copied, and a tree.
    assert len(edits.added) == 4
    assert {"drawn", "tree"} < set(drawn)
    assert not edits.unreadable

    out = tmp_path / "out.gpkg"
    report = export(messy(), out, label_config=TREE_CONFIG, edits=edits)
    assert report.edits == {"changed": 4, "deleted": 2, "added": 4}
    after = rows_of(out)
    assert after[done["relabelled"]]["label"] == "field"
    assert done["deleted"] not in after
    assert done["copied"] in after
    assert not after[done["copied"]]["edited"]
    frame = read_frame(out)
    shapes = dict(zip(frame.id, frame.geometry, strict=True))
    assert shapes[point_id].coords[0] == pytest.approx(point, abs=1e-7)
    assert shapes[done["split"]].area < shapely.transform(COURT, SCENE.px_to_lonlat).area
    assert report.features == len(after) == len(rows_of(town / "town.gpkg")) - 2 + 4
    assert len(read_edits(out)) == 0
