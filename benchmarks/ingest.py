"""How fast a scene becomes tiles beside gdal2tiles, and how much memory that takes whatever the scene's size.

    python -m benchmarks.ingest --processes 1
    python -m benchmarks.ingest --only memory --gigapixels 0.1 1 4

Speed: both cut the same made-up scene (a town, deflate-compressed tiled GeoTIFF with overviews) with as many processes
or workers, base zoom only, one after the other in this run; the median of ``--repeat`` runs counts. Scene pixels a
second, by the clock and by processor time (which others on the machine disturb less), the start of the program left
out (measured on a scene of one tile). gdal2tiles writes PNG; we write JPEG (the default) and PNG. `native`: tiles of
512 pixels on the scene's own pixels, ours overlapping by 64; `xyz`: web-mercator tiles of 256 pixels. gdal2tiles is
Debian's: ``apt-get install gdal-bin python3-gdal``; without it only ours is timed.

Memory: tiled GeoTIFFs of three bands with overviews, an eighth of their blocks filled with noise, the others sparse;
peak memory of all processes together that cut their tiles, and of one that makes 400 of them on demand in 8 threads.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = (sys.executable, "-m", "backend", "ingest")


@dataclass(frozen=True)
class Ran:
    wall_s: float
    cpu_s: float
    peak_mb: float
    """Of all its processes together."""

    largest_mb: float
    """Of the largest of them."""

    rss_mb: float
    """Of all together with pages that they share counted for each (Linux)."""


def run(command: Sequence[str], folder: Path) -> Ran:
    """Run a child to its end, which must be good."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    with (folder / "output.txt").open("w+b") as output:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        peaks_mb: list[float] = [0.0]
        largest_mb: list[float] = [0.0]
        rss_mb: list[float] = [0.0]
        threading.Thread(target=watch, args=(child.pid, peaks_mb, largest_mb, rss_mb), daemon=True).start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.perf_counter() - begun
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{command[0]} ended with {child.returncode}: {output.read().decode()[-2000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    # Linux keeps the most that any one process held; what all held together is looked at again and again.
    own_mb = usage.ru_maxrss * scale / 2**20
    return Ran(
        wall_s, usage.ru_utime + usage.ru_stime, max(own_mb, *peaks_mb), max(own_mb, *largest_mb), max(own_mb, *rss_mb)
    )


def watch(pid: int, peaks_mb: list[float], largest_mb: list[float], rss_mb: list[float]) -> None:
    """Write down the memory of a process and all that it started, shared pages counted once (PSS) and each time."""
    while Path(f"/proc/{pid}").exists():
        total_kb, resident_kb, left = 0, 0, [pid]
        while left:
            one = left.pop()
            with contextlib.suppress(OSError):
                told = dict(
                    re.findall(r"^(Rss|Pss):\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.MULTILINE)
                )
                held_kb = int(told.get("Pss", 0))
                total_kb += held_kb
                resident_kb += int(told.get("Rss", 0))
                largest_mb.append(held_kb / 1024)
                # A child belongs to the thread that started it.
                for children in Path(f"/proc/{one}/task").glob("*/children"):
                    left += map(int, children.read_text().split())
        peaks_mb.append(total_kb / 1024)
        rss_mb.append(resident_kb / 1024)
        time.sleep(0.2)


def python(code: str, folder: Path) -> None:
    """What needs memory happens in a child: a process's peak would count for those that it starts."""
    run((sys.executable, "-c", code), folder)


def cut(scene: Path, folder: Path, grid: str, format: str, workers: int) -> Ran:
    shutil.rmtree(folder / "ours", ignore_errors=True)
    sides = ("--tile-size", "256") if grid == "xyz" else ()
    command = (
        *OURS,
        str(scene),
        "--out",
        "ours",
        "--grid",
        grid,
        "--format",
        format,
        "--workers",
        str(workers),
        *sides,
    )
    return run(command, folder)


def gdal2tiles(scene: Path, folder: Path, grid: str, zoom: int, processes: int) -> Ran:
    shutil.rmtree(folder / "theirs", ignore_errors=True)
    profile = ("mercator", "256") if grid == "xyz" else ("raster", "512")
    command = (
        "gdal2tiles.py", "-q", "-w", "none", "--xyz", "-p", profile[0], f"--tilesize={profile[1]}", "-z", str(zoom),
        f"--processes={processes}", str(scene), "theirs",
    )  # fmt: skip
    return run(command, folder)


def speed(folder: Path, side_px: int, processes: int, repeat: int) -> None:
    for name, size in (("town", side_px), ("spot", 256)):
        make = f"make_scene(Path('{name}.tif'), size_px=({size}, {size}), seed=1)"
        python(f"from pathlib import Path; from demo.scene import make_scene; {make}", folder)
    town, spot = folder / "town.tif", folder / "spot.tif"
    pixels = side_px**2
    has_peer = shutil.which("gdal2tiles.py") is not None
    print(f"{side_px} x {side_px} pixels, {processes} processes or workers, median of {repeat}")
    for grid in ("native", "xyz"):
        if grid == "native":
            zoom = max(0, math.ceil(math.log2(side_px / 512)))
        else:
            cut(town, folder, grid, "jpg", processes)
            zoom = int(next(path.name for path in (folder / "ours/tiles/town").iterdir()))
        ways: dict[str, Callable[[Path], Ran]] = {
            "ours jpg": functools.partial(cut, folder=folder, grid=grid, format="jpg", workers=processes),
            "ours png": functools.partial(cut, folder=folder, grid=grid, format="png", workers=processes),
        }
        if has_peer:
            ways["gdal2tiles png"] = functools.partial(
                gdal2tiles, folder=folder, grid=grid, zoom=zoom, processes=processes
            )
        rates: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(repeat):
            for way, timed in ways.items():
                small, large = timed(spot), timed(town)
                spent = large.wall_s - small.wall_s, large.cpu_s - small.cpu_s
                rates[way].append((pixels / max(spent[0], 1e-3) / 1e6, pixels / max(spent[1], 1e-3) / 1e6))
        middle = {way: [statistics.median(rate) for rate in zip(*listed, strict=True)] for way, listed in rates.items()}
        for way, (clock, processor) in middle.items():
            theirs = middle.get("gdal2tiles png", [math.nan, math.nan])
            print(
                f"{grid:>7}  {way:15} {clock:6.1f} Mpx/s by the clock ({clock / theirs[0]:5.2f} x gdal2tiles),"
                f" {processor:6.1f} by processor time ({processor / theirs[1]:5.2f} x)",
                flush=True,
            )
    if not has_peer:
        print("gdal2tiles.py is not here: apt-get install gdal-bin python3-gdal")


MAKE_LARGE = """
import numpy as np, rasterio
from affine import Affine
from rasterio.windows import Window
side = {side}
noise = np.random.default_rng(0).integers(0, 255, (3, 512, 512), np.uint8) // 8 * 8
profile = dict(
    driver="GTiff", width=side, height=side, count=3, dtype="uint8", crs="EPSG:32645", photometric="RGB", tiled=True,
    transform=Affine(0.1, 0, 354000, 0, -0.1, 3057000), blockxsize=512, blockysize=512, compress="deflate", zlevel=1,
    sparse_ok=True, bigtiff="YES",
)
corners = [(row, column) for row in range(0, side - 511, 512) for column in range(0, side - 511, 512)]
with rasterio.Env(GDAL_CACHEMAX=128 * 2**20, SPARSE_OK_OVERVIEW="YES"):
    with rasterio.open("large.tif", "w", **profile) as out:
        for row, column in corners[::8]:
            out.write(noise, window=Window(column, row, 512, 512))
    with rasterio.open("large.tif", "r+") as out:
        out.build_overviews([16, 32], rasterio.enums.Resampling.nearest)
"""


MAKE_ON_DEMAND = """
import random, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from backend.errors import Busy
from backend.ingest import ingest
from backend.tiles import SceneTiles
def asked(name):
    while True:
        try:
            return made.image("large", name)
        except Busy:
            print("asked again")
ingest(["large.tif"], Path("asked"), tiles_url="http://h/tiles", is_dynamic=True)
made = SceneTiles(Path("asked/scenes"))
count = -(-({side} - 512) // 448) + 1
names = [f"r{{random.randrange(count):04d}}_c{{random.randrange(count):04d}}.jpg" for _ in range(400)]
begun = time.perf_counter()
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(asked, names))
Path("seconds.txt").write_text(str(time.perf_counter() - begun))
"""


def memory(folder: Path, gigapixels: Sequence[float], workers: int) -> None:
    for size in gigapixels:
        side = round(math.sqrt(size * 1e9))
        python(MAKE_LARGE.format(side=side), folder)
        asked = run((sys.executable, "-c", MAKE_ON_DEMAND.format(side=side)), folder)
        rate = 400 / float((folder / "seconds.txt").read_text())
        print(f"{size:5g} Gpx on demand: {rate:5.1f} tiles/s, peak {asked.peak_mb:5.0f} MB", flush=True)
        ran = cut(folder / "large.tif", folder, "native", "jpg", workers)
        tiles = sum(1 for _ in (folder / "ours/tiles/large").iterdir())
        rate = side**2 / 1e6 / ran.wall_s
        print(
            f"{size:5g} Gpx {tiles:7d} tiles, peak {ran.peak_mb:5.0f} MB, {ran.wall_s:6.1f} s, {rate:5.1f} Mpx/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=3072, help="side of the scene for speed, in pixels")
    parser.add_argument("--processes", type=int, default=1, help="gdal2tiles' processes, our workers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--gigapixels", type=float, nargs="*", default=[0.025, 0.1])
    parser.add_argument("--only", choices=("speed", "memory"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.only != "memory":
            speed(folder, asked.side, asked.processes, asked.repeat)
        if asked.only != "speed":
            memory(folder, asked.gigapixels, asked.processes)


if __name__ == "__main__":
    main()
