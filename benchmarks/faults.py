"""Each process of ours killed at random points, over and over, and what it leaves looked at after each time.

    python -m benchmarks.faults [--rounds 200] [--seed 0] [--kinds server worker …]

All rounds share one data folder, so that damage would add up. After each kill:

- every event that was acknowledged is in the journal, whose file is sound
- the registry has one live version of the project, whose weights are those that were registered
- no kept embedding has a wrong content under a name that would be served
- a file that a command writes is there whole, as before, or not at all; and once the same command has run to its end,
  what it wrote is what it writes undisturbed, and nothing else is left beside it

server    the master of two workers, while clients post events and ask for outlines; then its next start
worker    one of the workers; the same server goes on
trainer   a project's training; then what a server does that is started anew
export    to GeoJSON, GeoPackage and GeoParquet; ingest, predict, push: the commands, and once more to their end

Prints one JSON line; ends with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import multiprocessing
import os
import random
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import psutil
import safetensors.numpy
from shapely import box

from backend import cli, labelstudio, push
from backend.embeddings import _sum
from backend.jobs import Ask, Jobs
from backend.journal import Journal
from backend.registry import Registry
from backend.segmenter import Embedding
from backend.settings import Settings
from backend.tile import Region, Tile
from demo.backend import BackendServer
from demo.label_studio import free_port
from tests.fakes import BrightSegmenter
from tests.small_label_studio import CONFIG, PROJECT, SmallLabelStudio
from tests.test_push import SmallIntake

KINDS = ("server", "worker", "trainer", "export", "ingest", "predict", "push")
PATIENCE_S = 600.0
SIDE = 128

FORKS = multiprocessing.get_context("forkserver")
# One process imports all this once; those that are to be killed are forked from it, and die at their work instead of
# at their imports.
FORKS.set_forkserver_preload(
    ["benchmarks.faults", "backend.export", "backend.formats", "backend.ingest", "backend.bulk", "backend.cluster",
     "backend.server", "backend.fit", "backend.training", "backend.compact", "backend.judging", "pyogrio", "pyarrow",
     "geopandas", "rasterio", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store",
     "mlflow.store.model_registry.sqlalchemy_store"]
)  # fmt: skip


class Slow(BrightSegmenter):
    """Takes so long that a kill comes in between, and makes embeddings that fill the caches."""

    def embed(self, image_rgb: np.ndarray) -> Embedding:
        time.sleep(0.01)
        plain = super().embed(image_rgb)
        return Embedding({**plain.features, "ballast": np.zeros(2**16, np.float16)}, plain.image_hw, plain.version)


# --- What runs in the processes that are killed ---


def _begun(log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    importlib.import_module("torch").set_num_threads(1)


def command(log: Path, environment: dict[str, str], arguments: list[str]) -> None:
    """``geoprelabel ARGUMENTS``; its end code is the process's."""
    _begun(log, environment)
    importlib.import_module("backend.training")._STEPS = 2
    push.SETTLE_S, push.BATCH = 0.5, 20
    sys.argv = ["geoprelabel", *arguments]
    cli.main()


def serve(log: Path, environment: dict[str, str]) -> None:
    """The server, with a segmenter whose answers are known."""
    _begun(log, environment)
    from backend.server import serve as run

    sys.argv = ["geoprelabel"]
    run(Settings.from_environment(), segmenter=Slow())


# --- The loop ---


class Loop:
    """Everything that the rounds share."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.data = folder / "data"
        self.log = folder / "log"
        self.studio = SmallLabelStudio(3)
        self.acknowledged: set[int] = set()
        self.next_task = 1000
        self.server: Any = None
        self.backend = BackendServer(self.data, free_port())
        self.typical_s: dict[str, float] = {}
        self.killed: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.last_words: list[str] = []

    def __enter__(self) -> Loop:
        self.studio.__enter__()
        self.environment = {
            **self.studio.environment, "GEOPRELABEL_DATA_DIR": str(self.data), "GEOPRELABEL_PROMOTE": "always",
            "START_TRAINING_EACH_N_UPDATES": "1000000", "GEOPRELABEL_TRAINING_QUIET_S": "0", "WORKERS": "2",
            "GEOPRELABEL_EMBEDDING_CACHE_MB": "1", "GEOPRELABEL_EMBEDDING_DISK_MB": "4", "THREADS": "8",
            "PORT": str(self.backend.port), "GEOPRELABEL_IMAGE_HOSTS": "127.0.0.1", "LOG_LEVEL": "WARNING",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.settings = Settings(
            data_dir=self.data, label_studio_url=self.studio.server.url, label_studio_api_key="t", promote="always",
            start_training_each_n_updates=1_000_000,
        )  # fmt: skip
        # The process that others are forked from takes its time to import all that.
        self.run(["--version"])
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop_server()
        self.studio.__exit__(*error)

    def round(self, kind: str) -> None:
        """One process killed, and everything looked at. Raises AssertionError with what is wrong."""
        getattr(self, f"_{kind}")()
        self.look_at_all()

    # Commands that write files

    def killed_and_ended(self, kind: str, arguments: list[str], check: Callable[[bool], None], **more: str) -> None:
        """Run a command, kill it somewhere, ``check(False)``; run it to its end, ``check(True)``."""
        if kind not in self.typical_s:
            begun = time.monotonic()
            self.run(arguments, **more)
            self.typical_s[kind] = time.monotonic() - begun
            check(True)
        self.run(arguments, kill_after_s=self.random.uniform(0, 1.1 * self.typical_s[kind]), kind=kind, **more)
        check(False)
        begun = time.monotonic()
        self.run(arguments, **more)
        # The first run is the slowest; kills are to come while there is work.
        self.typical_s[kind] = min(self.typical_s[kind], time.monotonic() - begun)
        check(True)

    def run(self, arguments: list[str], *, kill_after_s: float = 0.0, kind: str = "", **more: str) -> None:
        """Run a command; where it is not killed it has to end well."""
        process = FORKS.Process(target=command, args=(self.log, {**self.environment, **more}, arguments))
        mark = self.log.stat().st_size if self.log.exists() else 0
        process.start()
        process.join(kill_after_s or PATIENCE_S)
        if process.is_alive():
            kill(process)
            assert kill_after_s, f"{arguments[0]} took over {PATIENCE_S:.0f} s"
            self.killed[kind] += 1
            return
        if kill_after_s:
            self.ended[kind] += 1
        assert process.exitcode == 0, f"{arguments} ended with {process.exitcode}: {self._words(mark)}"

    def _words(self, mark: int) -> str:
        return self.log.read_text(errors="replace")[mark:][-1500:]

    def _export(self) -> None:
        folder, source = self.folder / "export", self.folder / "annotated.json"
        if not source.exists():
            folder.mkdir()
            source.write_text(json.dumps(drawn(400)))
        ending = self.random.choice(["geojson", "gpkg", "parquet"])
        out = folder / f"town.{ending}"
        if self.random.random() < 0.5:
            out.unlink(missing_ok=True)

        def check(is_over: bool) -> None:
            assert out.exists() or not is_over
            if out.exists():
                count = features_in(out)
                assert count == 400, f"{out.name} has {count} of 400 features"
            if is_over:
                assert_only(folder, {"town.geojson", "town.gpkg", "town.parquet"})

        self.killed_and_ended(
            f"export-{ending}", ["export", "--annotations", str(source), "--out", str(out), "--no-merge-seams"], check
        )

    def _ingest(self) -> None:
        scene, out = self.folder / "town.tif", self.folder / "ingested"
        if not scene.exists():
            write_scene(scene)
        if self.random.random() < 0.3 and out.exists():
            for path in out.rglob("*.jpg"):
                path.unlink()

        def check(is_over: bool) -> None:
            images = list(out.rglob("*.jpg"))
            for path in images:
                assert cv2.imread(str(path)) is not None, f"{path} is no image"
            listed = out / "tasks.json"
            if listed.exists():
                assert len(json.loads(listed.read_text())) == 64
            if is_over:
                assert len(images) == 64
                assert listed.exists()
                left = [path for path in out.rglob("*") if path.name.endswith((".part", ".tmp", ".new"))]
                assert not left, left

        arguments = ["ingest", str(scene), "--out", str(out), "--tile-size", "128", "--overlap", "0"]
        self.killed_and_ended("ingest", arguments, check)

    def _predict(self) -> None:
        folder, source = self.folder / "predicted", self.folder / "images.json"
        if not source.exists():
            folder.mkdir()
            source.write_text(json.dumps([picture(number) for number in range(12)]))
        out = folder / "out.json"
        if self.random.random() < 0.7:
            out.unlink(missing_ok=True)

        def check(is_over: bool) -> None:
            assert out.exists() or not is_over
            if out.exists():
                listed = json.loads(out.read_text())
                assert [task["id"] for task in listed] == list(range(12))
                assert all(len(task["predictions"]) == 1 for task in listed)
            if is_over:
                assert_only(folder, {"out.json"})

        self.killed_and_ended("predict", ["predict", str(source), "--out", str(out)], check)

    def _push(self) -> None:
        source = self.folder / "push.json"
        if not source.exists():
            source.write_text(json.dumps([{**picture(n), "predictions": [
                {"result": [], "score": 0.5, "model_version": "m1"}]} for n in range(90)]))  # fmt: skip
        with SmallIntake() as intake:
            intake.delay_s = 0.02

            def check(is_over: bool) -> None:
                counts = Counter(task["data"]["image"] for task in intake.tasks)
                assert set(counts.values()) <= {1}, f"{max(counts.values())} times the same task"
                predictions = [len(task["predictions"]) for task in intake.tasks]
                assert max(predictions, default=0) <= 1
                if is_over:
                    assert (len(counts), sum(predictions)) == (90, 90)

            arguments = ["push", str(source), "--project", "town", "--no-connect", "--no-checks"]
            where = {"LABEL_STUDIO_URL": intake.server.url, "LABEL_STUDIO_API_KEY": "0123456789abcdef"}
            if "push" not in self.typical_s:
                with SmallIntake() as other:
                    other.delay_s = 0.02
                    begun = time.monotonic()
                    self.run(arguments, **{**where, "LABEL_STUDIO_URL": other.server.url})
                    self.typical_s["push"] = time.monotonic() - begun
            self.killed_and_ended("push", arguments, check, **where)

    # Training

    def _trainer(self) -> None:
        # A server that runs would begin what is owed before it can be looked at.
        self.stop_server()
        for trainer in [p for p in psutil.process_iter(["cmdline"]) if self._is_trainer(p)]:
            trainer.wait(PATIENCE_S)
        jobs, live = Jobs(self.settings), self.live_version()
        if "trainer" not in self.typical_s:
            with contextlib.closing(Journal(self.settings)) as journal:
                for number in (1, 2, 3):
                    journal.note(PROJECT, self.studio.annotate(number))
            jobs._update_ask(PROJECT, lambda ask: Ask(at_once=True))
            begun = time.monotonic()
            self.run(["train", "--queued", "--project", PROJECT])
            self.typical_s["trainer"] = time.monotonic() - begun
            assert jobs.run(PROJECT).state == "done", jobs.run(PROJECT).message
            live = self.live_version()
            assert live
        # Another outline, so that there is something to learn.
        self.studio.annotate(1 + self.next_task % 3)
        self.next_task += 1
        jobs._update_ask(PROJECT, lambda ask: Ask(at_once=True))
        arguments = ["train", "--queued", "--project", PROJECT]
        after_s = self.random.uniform(0, 1.1 * self.typical_s["trainer"])
        begun, killed = time.monotonic(), self.killed["trainer"]
        self.run(arguments, kill_after_s=after_s, kind="trainer")
        if self.killed["trainer"] == killed:
            self.typical_s["trainer"] = min(self.typical_s["trainer"], time.monotonic() - begun)
        run, ask = jobs.run(PROJECT), jobs.ask(PROJECT)
        assert run.state in ("done", "waiting"), run
        assert (run.state == "done" and ask == Ask()) or ask.is_owed or ask.at_once, (run, ask)
        assert self.live_version() or not live, f"{live} is no longer live: {run}, {ask}"
        # What a server does that is started anew, and the run that it begins.
        jobs._start = lambda project: True  # type: ignore[method-assign]
        if self.random.random() < 0.3:
            jobs._begin_due(is_first_look=True)
            jobs._update_ask(PROJECT, lambda ask: ask)
            if jobs._due_in(jobs.ask(PROJECT)) is not None:
                self.run(arguments)
            after = jobs.run(PROJECT), jobs.ask(PROJECT)
            assert (after[0].state, after[1]) == ("done", Ask()), (run, ask, *after)

    def _is_trainer(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("GEOPRELABEL_DATA_DIR") == str(self.data)
            return is_ours and {"train", "--queued"} <= set(process.info["cmdline"] or ())
        return False

    def live_version(self) -> str:
        """Name of the project's one live version, whose weights are what was registered."""
        versions = [v for v in Registry(self.settings).versions(PROJECT) if v.is_champion]
        assert len(versions) <= 1, versions
        for version in versions:
            version.check()
        return versions[0].name if versions else ""

    # The server

    def _server(self) -> None:
        self.ensure_server()
        workers = psutil.Process(self.server.pid).children()
        with self.annotators():
            time.sleep(self.random.uniform(0, 1.0))
            kill(self.server)
        self.killed["server"] += 1
        self.server = None
        # They see within a second that their master is gone.
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive, "workers outlive their server"
        self.ensure_server()

    def _worker(self) -> None:
        self.ensure_server()
        workers = psutil.Process(self.server.pid).children()
        with self.annotators():
            time.sleep(self.random.uniform(0, 1.0))
            self.random.choice(workers).kill()
            self.killed["worker"] += 1
            time.sleep(0.2)
        until(lambda: len(psutil.Process(self.server.pid).children()) == 2, "no new worker comes")
        assert self.backend.get("/health")["status"] == "UP"

    def ensure_server(self) -> None:
        if self.server is None:
            self.server = FORKS.Process(target=serve, args=(self.log, self.environment))
            self.server.start()
        until(lambda: self.backend.get("/health")["ready"], "the server does not come up")

    def stop_server(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.join(30)
            self.server = None

    @contextlib.contextmanager
    def annotators(self) -> Iterator[None]:
        """Four clients that save and click, and note what they were told to be saved."""
        stop = threading.Event()
        wrong: list[str] = []

        def work(client: int) -> None:
            while not stop.is_set():
                number = self._take_number()
                with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                    self.backend.post("/webhook", self.studio.annotate(number))
                    self.acknowledged.add(100 + number)
                with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                    x, y = 8 + number * 7 % 90, 8 + number * 11 % 90
                    told = self.backend.post("/predict", clicked(number, x, y))
                    if told["results"] and not is_square(told["results"][0], x, y):
                        wrong.append(f"{number}: {told}")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong, wrong[0][:500]

    _turn = threading.Lock()

    def _take_number(self) -> int:
        with self._turn:
            self.next_task += 1
            return self.next_task

    # What must hold after each round

    def _lost(self) -> set[int]:
        """Annotations whose event was acknowledged, and that the journal does not have."""
        with contextlib.closing(Journal(self.settings)) as journal:
            return self.acknowledged - {a["id"] for task in journal.tasks(PROJECT) for a in task["annotations"]}

    def look_at_all(self) -> None:
        database = self.data / "journal.sqlite3"
        if database.exists():
            with contextlib.closing(sqlite3.connect(database, timeout=30)) as base:
                assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if self._lost():
                # An event that could not be written within a fifth of a second is asked of Label Studio: by the process
                # that missed it, or if that was killed by the one that starts in its place.
                self.ensure_server()
                until(lambda: not self._lost(), f"acknowledged annotations are lost: {sorted(self._lost())[:5]}")
        if self.typical_s.get("trainer"):
            assert self.live_version(), "no version is live"
        for path in (self.data / "embeddings").glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError), safetensors.safe_open(str(path), "np") as file:
                features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                assert (file.metadata() or {}).get("sum") == _sum(features), f"{path.name} is damaged"
        for name in ("jobs", "boxes", "embeddings", "push"):
            left = [p.name for p in (self.data / name).glob("*") if is_scratch(p)]
            assert len(left) <= 40, f"{len(left)} pieces pile up in {name}: {left[:3]}"


# --- Made-up input, and looks at output ---


def drawn(count: int) -> list[dict[str, Any]]:
    """Tasks with one house each, as Label Studio exports them."""
    tag = labelstudio.parse_config(CONFIG).tags[0]
    tasks = []
    for number in range(1, count + 1):
        tile = Tile.from_xyz(19, 1000 + number, 2000, size=(SIDE, SIDE))
        result = labelstudio.results_of([Region(box(30, 50, 80, 100), "House")], tag, tile, task_id=number)
        annotation = {"id": number, "was_cancelled": False, "ground_truth": False, "result": result}
        data = {"image": f"/data/upload/3/{number}.png", "tile": tile.to_record()}
        tasks.append({"id": number, "data": data, "annotations": [annotation], "predictions": []})
    return tasks


def picture(number: int) -> dict[str, Any]:
    import base64

    noise = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    png = cv2.imencode(".png", cv2.GaussianBlur(noise, (0, 0), 5))[1].tobytes()
    return {"id": number, "data": {"image": "data:image/png;base64," + base64.b64encode(png).decode()}}


def clicked(number: int, x: int, y: int) -> dict[str, Any]:
    """A click on the one bright square of an image."""
    import base64

    image = np.full((SIDE, SIDE, 3), 30, np.uint8)
    image[y : y + 20, x : x + 20] = 230
    png = cv2.imencode(".png", image)[1].tobytes()
    prompt = {"id": f"k{number}", "type": "keypoint", "from_name": "click", "to_name": "image",
              "value": {"x": (x + 10) / SIDE * 100, "y": (y + 10) / SIDE * 100, "width": 0.3}}  # fmt: skip
    task = {"id": number, "data": {"image": "data:image/png;base64," + base64.b64encode(png).decode()}}
    context = {"result": [prompt]}
    return {"tasks": [task], "project": PROJECT, "label_config": CONFIG, "params": {"context": context}}


def is_square(prediction: dict[str, Any], x: int, y: int) -> bool:
    rings = [np.array(r["value"]["points"]) * SIDE / 100 for r in prediction["result"] if "points" in r["value"]]
    found = [(*ring.min(0), *ring.max(0)) for ring in rings]
    return len(found) == 1 and bool(np.abs(np.subtract(found[0], (x, y, x + 20, y + 20))).max() <= 1.5)


def write_scene(path: Path) -> None:
    import rasterio
    from affine import Affine

    values = np.random.default_rng(0).integers(0, 255, (3, 1024, 1024), dtype=np.uint8)
    with rasterio.open(path, "w", driver="GTiff", width=1024, height=1024, count=3, dtype="uint8", crs="EPSG:32645",
                       transform=Affine(0.3, 0, 340000, 0, -0.3, 3060000)) as file:  # fmt: skip
        file.write(values)


def features_in(path: Path) -> int:
    if path.suffix == ".geojson":
        return len(json.loads(path.read_text())["features"])
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        layer, *_ = [name for (name,) in base.execute("SELECT f_table_name FROM layer_styles ORDER BY id")]
        return int(base.execute(f'SELECT count(*) FROM "{layer}"').fetchone()[0])


def assert_only(folder: Path, names: set[str]) -> None:
    left = {path.name for path in folder.iterdir()} - names
    assert not left, f"left behind: {sorted(left)}"


def is_scratch(path: Path) -> bool:
    return path.name.startswith(".") and not path.name.endswith(".lock")


def kill(process: Any) -> None:
    process.kill()
    process.join()


def until(is_so: Callable[[], Any], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if is_so():
                return
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def kinds_of(rounds: int, kinds: tuple[str, ...], seed: int) -> list[str]:
    """As many of each kind as there can be, in an order that follows from the seed."""
    listed = [kinds[number % len(kinds)] for number in range(rounds)]
    random.Random(seed).shuffle(listed)
    return listed


def looped(
    folder: Path, *, rounds: int, seed: int, kinds: tuple[str, ...] = KINDS, limit_s: float = float("inf")
) -> dict[str, Any]:
    """So many rounds, or what fits into the time; how many processes were killed, and what was wrong after which."""
    wrong = []
    begun = time.monotonic()
    with Loop(folder, seed) as loop:
        for number, kind in enumerate(kinds_of(rounds, kinds, seed)):
            if time.monotonic() - begun > limit_s:
                rounds = number
                break
            if number % 20 == 19:
                print(f"{number + 1} rounds", file=sys.stderr, flush=True)
            try:
                loop.round(kind)
            except AssertionError as error:
                wrong.append(f"round {number}, {kind}: {error}")
                print(wrong[-1], file=sys.stderr, flush=True)
            except Exception:
                wrong.append(f"round {number}, {kind}: {traceback.format_exc()}")
                print(wrong[-1], file=sys.stderr, flush=True)
    return {"rounds": rounds, "seed": seed, "killed": dict(loop.killed), "ended_before": dict(loop.ended),
            "acknowledged_events": len(loop.acknowledged), "wrong": wrong,
            "undisturbed_s": {kind: round(seconds, 2) for kind, seconds in loop.typical_s.items()},
            "seconds": round(time.monotonic() - begun)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after so long")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        report = looped(
            Path(folder),
            rounds=arguments.rounds,
            seed=arguments.seed,
            kinds=tuple(arguments.kinds),
            limit_s=60 * arguments.minutes,
        )
    print(json.dumps(report))
    sys.exit(bool(report["wrong"]))


if __name__ == "__main__":
    # Under its own name, which the processes that are forked know it by; they need not run this file once more each.
    from benchmarks.faults import main as run

    sys.modules["__main__"].__spec__ = None
    del sys.modules["__main__"].__file__
    run()
