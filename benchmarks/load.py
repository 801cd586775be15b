"""Fifty annotators at once on one server: does anything fail, how long do they wait, does memory grow?

    python -m benchmarks.load [--minutes 10] [--annotators 50] [--svg load.svg]

The real server in its own process, with the shipped weights and one worker, on the cores that it is given; a small
Label Studio beside it that holds images and annotations. Each annotator opens a tile (predict without prompts), clicks
five times with the pauses that people make, submits (two events, as Label Studio sends them), and takes the next tile.
For the first part of the time the project trains, again and again. Meanwhile a watch asks for the control routes, and
the memory of the server's process is noted. The watch is a process of its own, and where the system allows it one that
is not kept waiting for a processor: in the annotators' process its own turn would be slow in coming, behind their
threads, and would count as the server's time.

Prints one JSON line, and draws latencies and memory over time as SVG. Goals: no error, control routes' p99 ≤ 50 ms,
warm clicks' p95 ≤ 400 ms, memory flat (≤ 10 % more at the end than after the first quarter), less what the caches of
embeddings and images hold, which fill up to their limits in the first minutes. A click is warm where the tile's
pre-labels were answered before. ``busy_cores`` says how many processors each side had: other work on the machine makes
times longer than they are.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import psutil

from demo.backend import BackendServer
from demo.scene import make_scene
from tests.small_label_studio import CREATED, NUMBER, PROJECT, SmallLabelStudio
from tests.small_server import Answer, Asked

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = (REPOSITORY / "configs" / "buildings.xml").read_text()
GOALS = {"errors": 0, "control_p99_ms": 50.0, "warm_click_p95_ms": 400.0, "memory_growth": 0.10}
THINK_S = {"look": (5.0, 15.0), "click": (4.0, 12.0), "submit": (4.0, 10.0)}
"""Pauses of people, from … to, in seconds: after opening a tile, after each click, after submitting. A tile takes them
a minute, so fifty of them open one, and click four times, each second."""

SETUP = {"project": PROJECT, "schema": CONFIG}
CONTROL = (
    ("GET", "/health", None), ("POST", "/setup", SETUP), ("GET", "/versions", None), ("GET", "/metrics", None),
    ("GET", "/status", None),
)  # fmt: skip


@dataclass
class Seen:
    """What came of all requests; shared by all threads."""

    begun: float = field(default_factory=time.monotonic)
    times: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Of each kind: when (seconds from the start), and how long it took (seconds)."""

    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    """When, and the server's memory in MB."""

    cached: list[tuple[float, float]] = field(default_factory=list)
    """When, and what of it the caches held, in MB."""

    training: list[tuple[float, float]] = field(default_factory=list)
    """When each time of training began and ended."""

    busy_cores: dict[str, float] = field(default_factory=dict)
    """How many processors each side had, on average."""

    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, seconds: float) -> None:
        with self.lock:
            self.times.setdefault(kind, []).append((time.monotonic() - self.begun, seconds))

    def fail(self, what: str) -> None:
        with self.lock:
            self.errors.append(f"{time.monotonic() - self.begun:.0f} s: {what}")


class Caller:
    """One annotator's connection to the server."""

    def __init__(self, port: int, seen: Seen) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._seen = seen

    def ask(self, kind: str, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON or text, timed; None where it is an error."""
        begun = time.perf_counter()
        try:
            data = None if body is None else json.dumps(body)
            self._connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            with closing(self._connection.getresponse()) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            # A connection that the server closed in a pause is opened anew, as every client does.
            if isinstance(error, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)):
                return self.ask(kind, method, path, body)
            self._seen.fail(f"{kind}: {error!r}")
            return None
        self._seen.note(kind, time.perf_counter() - begun)
        if answer.status >= 400:
            self._seen.fail(f"{kind}: {answer.status} {answer.reason}")
            return None
        return json.loads(content) if path != "/metrics" else content


def tiles_of(folder: Path, count: int) -> list[bytes]:
    """Different tiles of 512 px of a made-up town, as PNG."""
    import rasterio

    make_scene(folder / "town.tif")
    with rasterio.open(folder / "town.tif") as scene:
        town = np.moveaxis(scene.read((1, 2, 3)), 0, -1)
    chance, tiles = np.random.default_rng(0), []
    for _ in range(count):
        top, left = (int(chance.integers(0, extent - 511)) for extent in town.shape[:2])
        tiles.append(cv2.imencode(".png", town[top : top + 512, left : left + 512, ::-1])[1].tobytes())
    return tiles


class Annotator(threading.Thread):
    """Opens tiles, clicks, submits, until it is time to go home."""

    def __init__(self, number: int, port: int, seen: Seen, studio: SmallLabelStudio, numbers: Any, end: float) -> None:
        super().__init__(daemon=True)
        self._caller = Caller(port, seen)
        self._seen, self._studio, self._numbers, self._end = seen, studio, numbers, end
        self._chance = random.Random(number)

    def run(self) -> None:
        self._pause((0.0, 60.0))
        while time.monotonic() < self._end:
            self._one_task()

    def _one_task(self) -> None:
        with self._seen.lock:
            number = next(self._numbers)
        # The record first: it is what Label Studio would answer when it is asked.
        event = self._studio.annotate(number)
        task = {"id": number, "data": {"image": event["task"]["data"]["image"]}}
        body = {"tasks": [task], "project": PROJECT, "label_config": CONFIG, "params": {"context": None}}
        opened = self._caller.ask("open", "POST", "/predict", body)
        if opened is not None and opened["results"] == [[]]:
            self._seen.fail(f"open: task {number} got no prediction")
        self._pause(THINK_S["look"])
        points: list[dict[str, Any]] = []
        for click in range(5):
            if time.monotonic() > self._end:
                return
            x, y = self._chance.uniform(5, 95), self._chance.uniform(5, 95)
            points.append({"id": f"k{number}-{click}", "type": "keypoint", "from_name": "click", "to_name": "image",
                           "value": {"x": x, "y": y, "width": 0.3}})  # fmt: skip
            context = {"result": points[-1:] if click % 2 == 0 else points[-2:]}
            self._caller.ask("click", "POST", "/predict", {**body, "params": {"context": context}})
            self._pause(THINK_S["click"])
        self._caller.ask("submit", "POST", "/webhook", event)
        changed = {**event, "action": "ANNOTATION_UPDATED"}
        self._caller.ask("submit", "POST", "/webhook", changed)
        self._pause(THINK_S["submit"])

    def _pause(self, span: tuple[float, float]) -> None:
        time.sleep(max(0.0, min(self._chance.uniform(*span), self._end - time.monotonic())))


def watch(port: int, begun: float, end: float, found: Any) -> None:
    """In a process of its own: ask for the control routes in turn, and send what came of it through ``found``."""
    # Only root and who has CAP_SYS_NICE may.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    seen = Seen(begun)
    caller = Caller(port, seen)
    while time.monotonic() < end:
        for method, path, body in CONTROL:
            caller.ask(path, method, path, body)
        time.sleep(0.25)
    found.send((seen.times, seen.errors))


def monitor(backend: BackendServer, seen: Seen, end: float, training_end: float) -> None:
    """Memory, and trainings that follow each other."""
    caller, process = Caller(backend.port, seen), psutil.Process(backend._process.pid)  # type: ignore[union-attr]
    began = 0.0
    for turn in itertools.count():
        if time.monotonic() >= end:
            break
        family = [process, *(child for child in process.children() if "train" not in child.cmdline())]
        resident = sum(each.memory_info().rss for each in family)
        seen.memory.append((time.monotonic() - seen.begun, resident / 2**20))
        if turn % 4 == 0:
            told = caller.ask("monitor", "GET", "/status") or {}
            held = sum(told.get(cache, {}).get("memory", 0.0) for cache in ("embeddings_mb", "images_mb"))
            seen.cached.append((time.monotonic() - seen.begun, held))
            state = told.get("training", {}).get(PROJECT, {}).get("state", "idle")
            now = time.monotonic() - seen.begun
            if state == "training":
                began = began or now
            else:
                if began:
                    seen.training.append((began, now))
                began = 0.0
                if time.monotonic() < training_end and state != "waiting" and turn > 8:
                    caller.ask("train", "POST", "/train", {"project": {"id": NUMBER, "created_at": CREATED}})
        time.sleep(0.5)
    if began:
        seen.training.append((began, time.monotonic() - seen.begun))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--training", type=float, default=0.4, help="share of the time, from the start, with training")
    parser.add_argument("--svg", type=Path, default=None, help="where to draw it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(Path(folder), arguments)
    report = told(seen, arguments)
    if arguments.svg:
        arguments.svg.write_text(drawn(seen), encoding="utf-8")
    print(json.dumps(report))


def run(folder: Path, arguments: argparse.Namespace) -> Seen:
    tiles = tiles_of(folder, 60)
    with SmallLabelStudio() as studio:

        def images(asked: Asked) -> Answer | None:
            if not asked.path.startswith("/data/upload/"):
                return None
            number = int(asked.path.rpartition("/")[2].removesuffix(".png"))
            # Each task has an image of its own, so that each is encoded once and kept.
            tile = tiles[number % len(tiles)] + number.to_bytes(8, "big")
            return Answer(200, tile, {"Content-Type": "image/png"})

        studio.fault = images
        backend = BackendServer(
            folder / "data", **studio.environment, START_TRAINING_EACH_N_UPDATES="1000000", LOG_LEVEL="WARNING",
            GEOPRELABEL_TRAINING_QUIET_S="0", GEOPRELABEL_TRAINING_MAX_S="90", GEOPRELABEL_EMBEDDING_CACHE_MB="128",
        )  # fmt: skip
        with backend:
            seen = Seen()
            end = seen.begun + arguments.minutes * 60
            ours, theirs = multiprocessing.Pipe(duplex=False)
            # Spawned, so that it shares no lock with the threads here.
            watcher = multiprocessing.get_context("spawn").Process(
                target=watch, args=(backend.port, seen.begun, end, theirs), daemon=True
            )
            watcher.start()
            theirs.close()
            numbers = itertools.count(1)
            people = [
                Annotator(n, backend.port, seen, studio, numbers, end) for n in range(arguments.annotators)
            ]  # fmt: skip
            for each in people:
                each.start()
            server_s, own_s = processor_s(backend), time.process_time()
            monitor(backend, seen, end, seen.begun + arguments.minutes * 60 * arguments.training)
            passed = time.monotonic() - seen.begun
            seen.busy_cores = {"server": round((processor_s(backend) - server_s) / passed, 2),
                               "annotators": round((time.process_time() - own_s) / passed, 2)}  # fmt: skip
            times, errors = ours.recv()
            seen.times |= times
            seen.errors += errors
            watcher.join()
            home = time.monotonic() + 120
            for each in people:
                each.join(max(0.0, home - time.monotonic()))
    return seen


def processor_s(backend: BackendServer) -> float:
    """Processor time that the server's processes have taken, in seconds; training is not among them."""
    server = psutil.Process(backend._process.pid)  # type: ignore[union-attr]
    family = [server, *(child for child in server.children() if "train" not in child.cmdline())]
    return float(sum(sum(each.cpu_times()[:2]) for each in family))


def told(seen: Seen, arguments: argparse.Namespace) -> dict[str, Any]:
    # For people, and longer the more there is to tell: by itself.
    routes = [path for _, path, _ in CONTROL]
    seen.times["control"] = sorted(pair for path in routes if path != "/status" for pair in seen.times.get(path, ()))

    def ms(kind: str, share: float) -> float:
        listed = sorted(seconds for _, seconds in seen.times.get(kind, ()))
        return round(1000 * listed[min(len(listed) - 1, int(share * len(listed)))], 1) if listed else 0.0

    def growth(series: Sequence[tuple[float, float]]) -> float:
        quarter = arguments.minutes * 60 / 4
        early = [mb for when, mb in series if quarter <= when < 2 * quarter]
        late = [mb for when, mb in series if when >= 3 * quarter]
        return statistics.median(late) / statistics.median(early) - 1 if early and late else 0.0

    times, held = zip(*(seen.cached or [(0.0, 0.0)]), strict=True)
    beside_caches = [(when, mb - float(np.interp(when, times, held))) for when, mb in seen.memory]
    figures = {
        "errors": len(seen.errors),
        "control_p99_ms": ms("control", 0.99),
        "warm_click_p95_ms": ms("click", 0.95),
        "memory_growth": round(growth(beside_caches), 3),
    }
    kinds = {kind: len(listed) for kind, listed in sorted(seen.times.items())}
    return {
        "minutes": arguments.minutes, "annotators": arguments.annotators, "requests": kinds, **figures,
        "control_p50_ms": ms("control", 0.5), "routes_p99_ms": {path: ms(path, 0.99) for path in routes},
        "click_p50_ms": ms("click", 0.5),
        "open_p50_ms": ms("open", 0.5), "open_p95_ms": ms("open", 0.95), "submit_p50_ms": ms("submit", 0.5),
        "submit_p99_ms": ms("submit", 0.99), "memory_mb_end": round(seen.memory[-1][1]) if seen.memory else 0,
        "memory_growth_with_caches": round(growth(seen.memory), 3), "caches_mb_end": round(held[-1]),
        "busy_cores": seen.busy_cores, "trainings": len(seen.training),
        "training_s": round(sum(end - begin for begin, end in seen.training)),
        "first_errors": seen.errors[:5], "goals": GOALS,
        "missed": [name for name, goal in GOALS.items() if figures[name] > goal],
    }  # fmt: skip


COLOURS = {"click": "#1f77b4", "open": "#e07b00", "control": "#2e9e44", "submit": "#9a6dd0", "caches": "#9a6dd0"}


def drawn(seen: Seen) -> str:
    """Latencies (the 95th percentile of each tenth of a minute) and memory over time."""
    width, height, left, end = 720, 200, 80, max(when for when, _ in seen.memory)
    parts = []

    def chart(top: int, title: str, curves: dict[str, Sequence[tuple[float, float]]], unit: str) -> None:
        most = max((value for points in curves.values() for _, value in points), default=1.0) * 1.05
        parts.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{title}</text>')
        for began, ended in seen.training:
            x, wide = left + began / end * width, max((ended - began) / end * width, 1)
            parts.append(f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{height}" fill="#8882"/>')
        for share in (0, 0.5, 1):
            y = top + height * (1 - share)
            parts.append(f'<path d="M{left} {y}h{width}" stroke="#8884"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{share * most:.0f} {unit}</text>')
        for number, (name, points) in enumerate(curves.items()):
            line = " ".join(
                f"{left + when / end * width:.1f},{top + height * (1 - value / most):.1f}" for when, value in points
            )
            colour = COLOURS.get(name, "#1f77b4")
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(f'<text x="{left + 320 + number * 90}" y="{top - 8}" fill="{colour}">{name}</text>')

    latencies = {kind: binned(seen.times[kind]) for kind in COLOURS if kind in seen.times}
    chart(40, "95th percentile by time (grey: training)", latencies, "ms")
    chart(300, "Memory of the server", {"memory": seen.memory, "caches": seen.cached}, "MB")
    parts.append(f'<text x="{left + width}" y="520" text-anchor="end">{end / 60:.1f} min</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} 530" font-family="sans-serif"'
        f' font-size="12">{"".join(parts)}</svg>\n'
    )


def binned(times: Sequence[tuple[float, float]], span_s: float = 6.0) -> list[tuple[float, float]]:
    found: dict[int, list[float]] = {}
    for when, seconds in times:
        found.setdefault(int(when / span_s), []).append(seconds * 1000)
    return [(number * span_s, sorted(each)[int(0.95 * len(each))]) for number, each in sorted(found.items())]


if __name__ == "__main__":
    main()
