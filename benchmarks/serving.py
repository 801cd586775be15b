"""How long people and Label Studio wait: start, pre-label, clicks, and control routes while predictions run.

    python benchmarks/serving.py [--tiles 12] [--clicks 60]

Starts the backend as a person would, with synthetic 512 px tiles served by itself, and prints one JSON line. Absolute
times are this machine's; the control routes are also given as a ratio to the same routes of the idle server.
"""

from __future__ import annotations

import argparse
import json
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=12)
    parser.add_argument("--clicks", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_scene(folder / "town.tif")
        backend = BackendServer(folder / "data")
        backend.command("ingest", str(folder / "town.tif"), "--out", str(backend.data_dir))
        tasks = [{"id": i, **t} for i, t in enumerate(json.loads((backend.data_dir / "tasks.json").read_text()), 1)]
        begun = time.perf_counter()
        with backend:
            figures = {"start_to_ready_s": time.perf_counter() - begun, "start_to_healthy_s": backend.healthy_after_s}
            figures |= measure(backend, tasks[: arguments.tiles], arguments.clicks)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))


def measure(backend: BackendServer, tasks: list[dict[str, Any]], clicks: int) -> dict[str, float]:
    """The figures, in seconds where the name says so."""
    predict(backend, tasks[:1])  # the first one of a process also sets up the kernels
    cold = [timed(predict, backend, [task]) for task in tasks[1:]]
    warm = [timed(predict, backend, [tasks[1]], click_at(i)) for i in range(clicks)]
    idle = control_times(backend, threading.Event(), 300)
    done = threading.Event()
    busy: list[float] = []
    watch = threading.Thread(target=lambda: busy.extend(control_times(backend, done)))
    watch.start()
    for _ in range(3):
        predict(backend, [{**task, "id": task["id"] + 1000} for task in tasks])
    done.set()
    watch.join()
    return {
        "tile_s_median": statistics.median(cold),
        "warm_click_s_median": statistics.median(warm),
        "warm_click_s_p95": quantile(warm, 0.95),
        "control_idle_s_p99": quantile(idle, 0.99),
        "control_busy_s_median": statistics.median(busy),
        "control_busy_s_p99": quantile(busy, 0.99),
        "control_busy_calls": len(busy),
        "control_busy_to_idle_p99": quantile(busy, 0.99) / quantile(idle, 0.99),
    }


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
