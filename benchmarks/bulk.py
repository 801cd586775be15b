"""Bulk prediction on Dask: what it costs beside the bare segmenter, what a second worker brings, and how much memory.

    python -m benchmarks.bulk [--tiles 24] [--rounds 3] [--planned 100000]
    python -m benchmarks.bulk --gigapixels 0.1 1 4

own          the segmenter's own throughput: embed, dense heads, objects and outlines in a loop over decoded tiles, in a
             worker's process with one thread, so that everything else is as it is for the next two
one, two     `geoprelabel predict --workers 1`, `--workers 2`, each process with one thread: images fetched and decoded,
             predicted, written as Label Studio's JSON, sent back and kept. From the first task to the file

Tiles a second by the clock, and tiles a second of processor time of the workers, which others on the machine disturb
less. Goals on two idle cores: one / own >= 0.9, two / one >= 1.7.

peak_mb      most memory that each worker held
plan_*       so many made-up tasks whose prediction costs nothing: tasks a second through Dask one by one and in batches
             of 50, which is what the scheduler can do at most, and most memory of the client
block_bytes  of Parquet a tile with objects of the demo scene

With --gigapixels, only memory: tiled GeoTIFFs of that size as `benchmarks.ingest` makes them, `ingest --dynamic`, then
`geoprelabel predict` of every tile, in one process and with --workers 2, each tile made from the scene, fetched and
decoded, and its outlines written, kept and assembled as ever. The model itself looks at one tile in `--every`, the
others get what it found there last: on every tile it would take hours, and hold no more (`--limit` for machines that
are slow at reading, too). Most memory of all processes together, pages that they share counted once (PSS) and for each
of them (RSS), and of the largest; tiles with a prediction are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backend import cluster
from backend.annotations import tasks_in
from backend.bulk import predict_to_file
from backend.push import DEFAULT_CONFIG

from . import ingest

REPOSITORY = Path(__file__).resolve().parent.parent
MAKE = "from pathlib import Path; from demo.scene import make_scene; make_scene(Path('town.tif'), size_px=({0}, {0}))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=24, help="of 512 px, per round")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    parser.add_argument("--planned", type=int, default=100_000, help="made-up tasks; 0: none")
    parser.add_argument("--gigapixels", type=float, nargs="*", help="memory on scenes of these sizes, and nothing else")
    parser.add_argument("--limit", type=int, default=100_000, help="predict so many tiles, spread over the scene")
    parser.add_argument("--every", type=int, default=100, help="the model looks at one tile of so many")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.gigapixels:
            memory(folder, arguments.gigapixels, arguments.every, arguments.limit)
            return
        os.environ.update({"GEOPRELABEL_DATA_DIR": str(folder / "data"), "GEOPRELABEL_DASK_SCHEDULER": ""})
        os.environ.pop("LABEL_STUDIO_URL", None)
        figures = speed(folder, arguments.tiles, arguments.rounds)
        if arguments.planned:
            # A process's peak is of its whole life: this one's has held no other run.
            command = [
                sys.executable,
                "-c",
                f"from benchmarks.bulk import plan; plan({arguments.planned}, {str(folder)!r})",
            ]
            done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
            figures |= json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=1))


def speed(folder: Path, count: int, rounds: int) -> dict[str, float]:
    side = 64 + 448 * math.ceil(math.sqrt(count))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for command in (["-c", MAKE.format(side)], ["-m", "backend", "ingest", "town.tif"]):
        subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True)
    tasks = [task for task, _ in zip(tasks_in(folder / "data" / "tasks.json"), range(count), strict=False)]
    job = cluster.Job(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    seen: dict[str, list[tuple[float, float]]] = {"own": [], "one": [], "two": []}
    figures: dict[str, float] = {"tiles": len(tasks), "rounds": rounds}
    # One thread each, so that the second worker is all that differs.
    with cluster.local(1, cores=1) as one, cluster.local(2, cores=2) as two:
        crews = {"one": (one, cluster.opened(one, job)), "two": (two, cluster.opened(two, job))}
        for client, begun in crews.values():
            for _ in client.nthreads():
                list(cluster.over_tasks(client, _work(begun), enumerate(tasks[:4])))
        for _ in range(rounds):
            seen["own"].append(timed(one, lambda: one.submit(own, crews["one"][1], tasks, pure=False).result()))
            for name, (client, begun) in crews.items():
                seen[name].append(timed(client, lambda c=client, b=begun: predict(c, b, tasks, folder / "out.json")))
        peaks = {name: max(client.run(peak_mb).values()) for name, (client, _) in crews.items()}
    for name, spent in seen.items():
        for what, times in zip(("clock", "cpu"), zip(*spent, strict=True), strict=True):
            figures[f"{name}_tiles_per_s_{what}"] = len(tasks) / statistics.median(times)
    for what in ("clock", "cpu"):
        figures[f"one_by_own_{what}"] = figures[f"one_tiles_per_s_{what}"] / figures[f"own_tiles_per_s_{what}"]
        figures[f"two_by_one_{what}"] = figures[f"two_tiles_per_s_{what}"] / figures[f"one_tiles_per_s_{what}"]
    blocks = list((folder / "out.json.blocks").glob("*.parquet"))
    figures["block_bytes"] = sum(path.stat().st_size for path in blocks) / len(tasks)
    return figures | {f"{name}_peak_mb": value for name, value in peaks.items()}


def memory(folder: Path, gigapixels: Sequence[float], every: int, limit: int) -> None:
    os.environ["SEEN_BY_MODEL"] = str(every)
    # Dask's workers look away as well.
    os.environ["DASK_DISTRIBUTED__WORKER__PRELOAD"] = '["benchmarks.bulk"]'
    predict = "import sys; from benchmarks import bulk; bulk.dask_setup(None); from backend.cli import main; main()"
    for size in gigapixels:
        side = round(math.sqrt(size * 1e9))
        ingest.python(ingest.MAKE_LARGE.format(side=side), folder)
        begun = ingest.run((*ingest.OURS, "large.tif", "--out", "data", "--dynamic"), folder)
        os.environ["GEOPRELABEL_DATA_DIR"] = str(folder / "data")
        tasks = json.loads((folder / "data" / "tasks.json").read_text())
        print(
            f"{size:5g} Gpx ingest --dynamic: {len(tasks):6d} tiles, peak {begun.peak_mb:5.0f} MB,"
            f" {begun.wall_s:6.1f} s",
            flush=True,
        )
        (folder / "some.json").write_text(json.dumps(tasks[:: -(-len(tasks) // limit)]))
        del tasks
        for how in (("--workers", "0"), ("--workers", "2")):
            command = (sys.executable, "-c", predict, "predict", "some.json", "--out", "out.json", *how)
            ran = ingest.run(command, folder)
            with open(folder / "out.json", encoding="utf-8") as file:
                count = sum(1 for task in map(json.loads, _lines(file)) if task["predictions"])
            print(
                f"{size:5g} Gpx predict {' '.join(how)}: {count:6d} tiles, peak {ran.peak_mb:5.0f} MB of all"
                f" ({ran.rss_mb:5.0f} MB with shared pages counted for each), {ran.largest_mb:5.0f} MB of the largest,"
                f" {ran.wall_s:6.1f} s",
                flush=True,
            )


def _lines(file: Iterable[str]) -> Iterator[str]:
    """The tasks of a file that `predict` wrote, a line each."""
    return (line.strip().rstrip(",") for line in file if line.startswith("{"))


def dask_setup(worker: Any) -> None:
    """In a process that predicts: the model looks at one tile of SEEN_BY_MODEL."""
    from backend.predictor import Predictor

    looks, last, count, every = Predictor.automatic, [], itertools.count(), int(os.environ["SEEN_BY_MODEL"])

    def automatic(*given: Any, **options: Any) -> Any:
        if next(count) % every == 0 or not last:
            last[:] = [looks(*given, **options)]
        return last[0]

    Predictor.automatic = automatic  # type: ignore[method-assign]


def _work(begun: cluster.Job) -> Callable[[Mapping[str, Any]], Any]:
    import functools

    return functools.partial(cluster.predicted, begun)


def predict(client: Any, begun: cluster.Job, tasks: list[dict[str, Any]], out: Path) -> None:
    shutil.rmtree(out.with_name(out.name + ".blocks"), ignore_errors=True)
    work = _work(begun)
    report = predict_to_file(
        lambda: tasks, out, lambda some: cluster.over_tasks(client, work, some), fingerprint=begun.fingerprint,
        keep_blocks=True,
    )  # fmt: skip
    if report.failed:
        raise SystemExit(f"{report.failed} tiles failed: {report.failures[0].reason}")


def own(begun: cluster.Job, tasks: list[dict[str, Any]]) -> float:
    """On a worker: the bare loop; how long it took, in seconds."""
    from backend.predictor import pre_label_options
    from backend.service import parsed_config

    service, model = cluster._opened(begun)
    config = parsed_config(begun.label_config)
    tag = config.wanted_tags[0]
    labels = tag.match(model.segmenter.labels)
    opened = [service._open(task, tag) for task in tasks]
    predictor, begun_s = service.predictor, time.perf_counter()
    for number, (image, tile) in enumerate(opened):
        scale = predictor.working_scale(model, image.rgb, tile.gsd_m, set(labels))
        predictor.automatic(
            model, image.rgb, f"own {number} {begun_s}", labels, options=pre_label_options(tile.gsd_m),
            min_score=service.settings.model_score_threshold, scale=scale,
        )  # fmt: skip
    return time.perf_counter() - begun_s


def timed(client: Any, run: Callable[[], float | None]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of all workers; ``run`` may have a better clock."""
    before = sum(client.run(time.process_time).values())
    begun_s = time.perf_counter()
    told = run()
    wall_s = told or time.perf_counter() - begun_s
    return wall_s, sum(client.run(time.process_time).values()) - before


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def nothing(task: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_version": "none", "score": 0.5, "result": []}


def plan(count: int, folder: str) -> None:
    """Prints what it measured."""
    image = "http://localhost:9090/tiles/town/r{:05}_c00000.jpg"
    tile = {"scene": "town", "window": [0, 0, 512, 512], "crs": "EPSG:32645", "transform": [0.2, 0, 0, 0, -0.2, 0],
            "gsd_m": 0.2, "core": [32, 32, 480, 480], "source": {"path": "town.tif", "sha256": "0" * 64}}  # fmt: skip

    def tasks() -> Iterator[dict[str, Any]]:
        return ({"data": {"image": image.format(n), "tile": tile}} for n in range(count))

    out, figures, before_mb = Path(folder) / "planned.json", {}, 0.0
    with cluster.local(2, cores=2) as client:
        before_mb = peak_mb()
        for name, batch, share in (("one", 1, 10), ("batch", 50, 1)):
            begun_s, some = time.perf_counter(), count // share
            for _ in cluster.over_tasks(
                client, nothing, ((n, task) for n, task in enumerate(tasks()) if n < some), batch=batch
            ):
                pass
            figures[f"plan_{name}_tasks_per_s"] = some / (time.perf_counter() - begun_s)
        begun_s = time.perf_counter()
        predict_to_file(
            tasks, out, lambda some: cluster.over_tasks(client, nothing, some, batch=50), fingerprint="none"
        )
        figures["plan_to_file_tasks_per_s"] = count / (time.perf_counter() - begun_s)
    figures |= {"plan_tasks": count, "plan_client_mb_before": before_mb, "plan_client_mb": peak_mb()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
