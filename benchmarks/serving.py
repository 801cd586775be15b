"""How long people and Label Studio wait: start, pre-labels, clicks, and control routes while predictions run.

    python benchmarks/serving.py [--tiles 10] [--clicks 60]

Starts the backend as a person would, with synthetic tiles served by itself, and prints one JSON line: what it measured,
and beside it the target that the project has set for two idle CPU cores (``GOALS``). Absolute times are this machine's;
the control routes are also given as a ratio to the same routes of the idle server.

first_click_*    a click on a tile that the server has never seen: fetch, embed, decode, trace
later_click_*    further clicks on a tile that it knows
kept_click_*     the first click on a tile after a restart, its embedding read from disk
pre_label_*      automatic outlines of a tile that it has never seen
model_load_s     reading and checking the weights, in a process of its own that has imported torch
peak_rss_mb      most memory that the server process held at once
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.backend import BackendServer
from demo.scene import make_scene

CONFIG = (Path(__file__).resolve().parent.parent / "configs" / "buildings.xml").read_text()
PROJECT = "1.1700000000"


GOALS = {
    "first_click_512_s": 0.35,
    "first_click_1024_s": 0.9,
    "later_click_s": 0.06,
    "pre_label_512_s": 0.5,
    "model_load_s": 2.0,
    "peak_rss_mb": 900.0,
}
LOAD = (
    "import time; from backend.compact import CompactSegmenter; begun = time.perf_counter();"
    " CompactSegmenter.load(); print(time.perf_counter() - begun)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=10, help="of 512 px; half of them get a click first")
    parser.add_argument("--clicks", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_scene(folder / "town.tif")
        backend = BackendServer(folder / "data")
        small = ingested(backend, folder / "town.tif", 512)
        large = ingested(backend, folder / "town.tif", 1024)
        begun = time.perf_counter()
        with backend:
            figures = {"start_to_ready_s": time.perf_counter() - begun, "start_to_healthy_s": backend.healthy_after_s}
            figures |= measure(backend, small[: arguments.tiles + 1], large, arguments.clicks)
        with backend:
            figures["kept_click_512_s"] = kept_clicks(backend, small[: arguments.tiles + 1])
    # Of the children, the server is by far the largest; kibibytes on Linux, bytes on macOS.
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    root = Path(__file__).resolve().parent.parent
    loads = [subprocess.run([sys.executable, "-c", LOAD], cwd=root, capture_output=True, check=True) for _ in range(3)]
    figures["model_load_s"] = statistics.median(float(load.stdout) for load in loads)
    report = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({**report, "goals": GOALS, "missed": [name for name in GOALS if figures[name] > GOALS[name]]}))


def ingested(backend: BackendServer, scene: Path, tile_px: int) -> list[dict[str, Any]]:
    """Tasks of a scene that is cut into tiles of that size."""
    renamed = scene.with_name(f"{scene.stem}{tile_px}.tif")
    renamed.hardlink_to(scene)
    backend.command("ingest", str(renamed), "--out", str(backend.data_dir), "--tile-size", str(tile_px))
    tasks = json.loads((backend.data_dir / "tasks.json").read_text())
    return [{"id": tile_px * 1000 + number, **task} for number, task in enumerate(tasks)]


def measure(
    backend: BackendServer, small: list[dict[str, Any]], large: list[dict[str, Any]], clicks: int
) -> dict[str, float]:
    """The figures, in seconds where the name says so."""
    predict(backend, small[:1], click_at(0))  # the first one of a process also sets up the kernels
    tiles = small[1:]
    first = [timed(predict, backend, [task], click_at(i)) for i, task in enumerate(tiles[::2])]
    first_large = [timed(predict, backend, [task], click_at(i)) for i, task in enumerate(large)]
    later = [timed(predict, backend, [tiles[0]], click_at(i)) for i in range(1, clicks + 1)]
    pre_label = [timed(predict, backend, [task]) for task in tiles[1::2]]
    idle = control_times(backend, threading.Event(), 300)
    done = threading.Event()
    busy: list[float] = []
    watch = threading.Thread(target=lambda: busy.extend(control_times(backend, done)))
    watch.start()
    for _ in range(3):
        predict(backend, [{**task, "id": task["id"] + 1000} for task in small])
    done.set()
    watch.join()
    return {
        "first_click_512_s": statistics.median(first),
        "first_click_1024_s": statistics.median(first_large),
        "later_click_s": statistics.median(later),
        "later_click_s_p95": quantile(later, 0.95),
        "pre_label_512_s": statistics.median(pre_label),
        "control_idle_s_p99": quantile(idle, 0.99),
        "control_busy_s_median": statistics.median(busy),
        "control_busy_s_p99": quantile(busy, 0.99),
        "control_busy_calls": len(busy),
        "control_busy_to_idle_p99": quantile(busy, 0.99) / quantile(idle, 0.99),
    }


def kept_clicks(backend: BackendServer, tiles: list[dict[str, Any]]) -> float:
    """The median of one click a tile that was embedded before the server was started, in seconds."""
    predict(backend, tiles[:1], click_at(0))
    return statistics.median(timed(predict, backend, [task], click_at(i)) for i, task in enumerate(tiles[1:]))


def predict(backend: BackendServer, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None) -> Any:
    body = {"tasks": tasks, "project": PROJECT, "label_config": CONFIG, "params": {"context": context}}
    return backend.post("/predict", body)


def click_at(number: int) -> dict[str, Any]:
    value = {"x": 10 + number * 37 % 80, "y": 10 + number * 53 % 80, "width": 0.3}
    return {"result": [{"type": "keypoint", "from_name": "click", "to_name": "image", "value": value}]}


def control_times(backend: BackendServer, done: threading.Event, count: int = 1_000_000) -> list[float]:
    """Times of /health and /setup in turn, until done or so many."""
    times = []
    while not done.is_set() and len(times) < count:
        times.append(timed(backend.get, "/health"))
        times.append(timed(backend.post, "/setup", {"project": PROJECT, "schema": CONFIG}))
        time.sleep(0.005)
    return times


def timed(function: Any, *arguments: Any) -> float:
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


if __name__ == "__main__":
    main()
