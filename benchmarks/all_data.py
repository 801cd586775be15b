"""Whether every file of a folder of data sets can be ingested, pre-labelled and exported to its right place.

    python -m benchmarks.all_data ../shared/data --files 3 --tiles 2

Below the folder each data set has ``images/`` (and ``scenes/``) of rasters, with a place of their own, named after a
web map's tile, or with none. Of each data set ``--files`` files spread over it (0: all), of each of those ``--tiles``
tiles, made on demand; outlines by the shipped model, one square where it sees nothing. The exported outlines are held
against the same rings put on the ground by rasterio and PROJ from the raster itself: the share of the area that lies
elsewhere is printed, and the run fails above 1 %. Files without a place are refused, and taken with ``--no-place``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import rasterio
import shapely
from rasterio.errors import NotGeoreferencedWarning
from rasterio.warp import transform as to_crs

from backend.annotations import tasks_in
from backend.errors import BackendError, BadScene
from backend.export import ExportOptions, export
from backend.ingest import IngestOptions, ingest

REPOSITORY = Path(__file__).resolve().parent.parent
URL = "http://localhost:9090/tiles"
OPTIONS: dict[str, Any] = {"tile_size": 512, "overlap": 64, "xyz_names": True}


SQUARE = {
    "id": "a", "type": "polygonlabels", "from_name": "label", "to_name": "image",
    "value": {"points": [[10, 10], [60, 10], [60, 60], [10, 60]], "polygonlabels": ["building"], "closed": True},
}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """What came of one data set."""

    name: str
    files: int
    placed: int
    """Files that lie somewhere on Earth; the others were refused, and taken without a place."""

    tasks: int
    outlines: int
    elsewhere: float
    """Share of the outlines' area that was exported to another place; NaN where none has a place."""


def chosen(folder: Path, count: int) -> list[Path]:
    """Files of a data set spread over it, all for 0; each kind of file at least once."""
    found: list[Path] = []
    for kind in ("tif", "jpg", "png"):
        files = sorted(path for part in ("images", "scenes") for path in (folder / part).glob(f"*.{kind}"))
        at = np.unique(np.linspace(0, len(files) - 1, min(count or len(files), len(files)), dtype=int))
        found += [files[i] for i in at] if files else []
    return found


def tried(data: Path, *, files: int, tiles: int, only: Sequence[str] = ()) -> Iterator[Tried]:
    """Each data set, ingested, pre-labelled and exported. Raises BadScene where a file with a place is refused."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        tasks: list[dict[str, Any]] = []
        taken: dict[str, list[Path]] = {}
        sources: dict[str, Path] = {}
        placed: Counter[str] = Counter()
        for folder in sorted(path for path in data.iterdir() if path.is_dir() and (not only or path.name in only)):
            for path in chosen(folder, files):
                taken.setdefault(folder.name, []).append(path)
                try:
                    ingest([path], out, tiles_url=URL, options=IngestOptions(**OPTIONS), is_dynamic=True)
                    placed[folder.name] += 1
                except BadScene as error:
                    if "--no-place" not in str(error):
                        raise
                    ingest([path], out, tiles_url=URL, options=IngestOptions(**OPTIONS, no_place=True), is_dynamic=True)
                # Data sets use the same names.
                scene, cut = f"{folder.name}-{len(sources)}", json.loads((out / "tasks.json").read_text())
                own = cut[0]["data"]["tile"]["scene"]
                (out / "scenes" / f"{own}.json").rename(out / "scenes" / f"{scene}.json")
                for task in cut[:tiles]:
                    task["data"]["image"] = task["data"]["image"].replace(f"/{own}/", f"/{scene}/")
                    task["data"]["tile"]["scene"] = scene
                    tasks.append(task)
                sources[scene] = path
        yield from _held(tasks, taken, sources, placed, out)


def _held(
    tasks: list[dict[str, Any]], taken: dict[str, list[Path]], sources: dict[str, Path], placed: Counter[str], out: Path
) -> Iterator[Tried]:
    (out / "some.json").write_text(json.dumps(tasks))
    command = [sys.executable, "-m", "backend", "predict", "some.json", "--out", "predicted.json"]
    environment = {"GEOPRELABEL_DATA_DIR": str(out), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    predicted = json.loads((out / "predicted.json").read_text())
    for name in taken:
        own = [task for task in predicted if task["data"]["tile"]["scene"].startswith(f"{name}-")]
        outlines, wanted = 0, []
        for number, task in enumerate(own, 1):
            found = task.pop("predictions", [])
            if len(found) != 1:
                raise SystemExit(f"{task['data']['image']} has no prediction")
            results = found[0]["result"] or [SQUARE]
            task |= {"id": number, "annotations": [{"id": number, "result": results, "completed_by": 1}]}
            outlines += len(found[0]["result"])
            if placed[name]:
                wanted += on_earth(task["data"]["tile"], results, sources[task["data"]["tile"]["scene"]])
        (out / "drawn.json").write_text(json.dumps(own))
        back = out / f"{name}.gpkg"
        elsewhere = float("nan")
        try:
            export(tasks_in(out / "drawn.json"), back, options=ExportOptions(allow_ballpark=True, merge_seams=False))
            got = geopandas.read_file(back, layer=back.stem).union_all()
            there = shapely.union_all(wanted)
            elsewhere = got.symmetric_difference(there).area / there.area
        except BackendError as error:
            if placed[name] or "no place on Earth" not in str(error):
                raise
        yield Tried(name, len(taken[name]), placed[name], len(own), outlines, elsewhere)


def on_earth(tile: dict[str, Any], results: list[dict[str, Any]], raster: Path) -> list[shapely.Geometry]:
    """The outlines in longitude and latitude, by rasterio and PROJ from the raster itself."""
    column, row, columns, rows = tile["window"]
    shapes: list[shapely.Geometry] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(raster) as source:
            crs, place, width = source.crs, source.transform, source.width
    if crs is None:
        zoom, x, y = (int(number) for number in raster.stem.split("_"))
        half_m = np.pi * 6_378_137.0
        pixel_m = 2 * half_m / 2**zoom / width
        crs, corner = "EPSG:3857", (x * width * pixel_m - half_m, half_m - y * width * pixel_m)
        place = rasterio.Affine(pixel_m, 0, corner[0], 0, -pixel_m, corner[1])
    for result in results:
        points = np.asarray(result["value"]["points"], float) / 100 * (columns, rows) + (column, row)
        lon, lat = to_crs(crs, "EPSG:4326", *(place * points.T))
        shapes.append(shapely.make_valid(shapely.Polygon(np.column_stack((lon, lat)))))
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--files", type=int, default=3, help="of each data set and kind; 0: all")
    parser.add_argument("--tiles", type=int, default=2, help="of each file")
    parser.add_argument("--only", nargs="+", default=(), help="these data sets")
    asked = parser.parse_args()
    worst = 0.0
    for one in tried(asked.data, files=asked.files, tiles=asked.tiles, only=asked.only):
        where = f"{one.elsewhere:.5%} elsewhere" if one.placed else "no place: GeoJSON refused"
        print(
            f"{one.name:30} {one.files:4d} files, {one.placed:4d} with a place, {one.tasks:5d} tiles,"
            f" {one.outlines:6d} outlines, {where}",
            flush=True,
        )
        worst = max(worst, one.elsewhere if one.placed else 0.0)
    if worst > 0.01:
        raise SystemExit(f"{worst:.2%} of some data set's outlines were exported to another place")


if __name__ == "__main__":
    main()
