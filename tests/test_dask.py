"""Bulk work on Dask's real processes: the same as without them, and whatever dies, no more again than was in flight."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio

from backend import cluster
from backend.bulk import Failed, predict_to_file
from backend.cluster import over_tasks
from backend.errors import BackendError
from backend.jobs import Ask, Jobs
from backend.registry import Registry
from backend.service import Service
from backend.settings import Settings
from demo.label_studio import free_port
from demo.scene import make_scene

from .dask_work import doubled, set_environment
from .fakes import bright_image
from .small_label_studio import PROJECT, SmallLabelStudio

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = (REPOSITORY / "configs" / "buildings.xml").read_text()
# Sockets of processes that were killed are closed by nobody but the collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with cluster.local(2, cores=2, resources={"TILE": 1}) as made:
        yield made


def tasks_of(count: int, **kinds: str) -> list[tuple[int, dict[str, Any]]]:
    return [(n, {"n": n, "kind": kinds.get(f"t{n}", "")}) for n in range(count)]


def test_what_workers_make_comes_with_its_number(client: Any):
    found = dict(over_tasks(client, doubled, tasks_of(50)))
    assert {number: one["twice"] for number, one in found.items()} == {n: 2 * n for n in range(50)}
    assert dict(over_tasks(client, doubled, tasks_of(50), batch=7)) == found
    assert list(over_tasks(client, doubled, [])) == []
    # What is asked of a cluster's workers, processes of this machine have.
    assert dict(over_tasks(client, doubled, tasks_of(50), resources={"TILE": 1})) == found


GIB = 2**30


@pytest.mark.parametrize(
    ("tasks", "cores", "quota", "free", "settings", "processes"),
    [
        (127, 16, 16, 64 * GIB, {}, 0),
        (128, 16, 16, 64 * GIB, {}, 16),
        (128, 16, 3, 64 * GIB, {}, 3),
        (10**6, 16, 16, 5 * GIB, {}, 4),
        (10**6, 16, 16, 10 * GIB, {"segmenter": "sam_vit_b"}, 2),
        (10**6, 2, 2, GIB, {}, 0),
        (10**6, 1, 1, 64 * GIB, {}, 0),
        (10**6, 16, 16, 64 * GIB, {"device": "cuda:1"}, 1),
        (5, 16, 16, 64 * GIB, {"device": "cuda"}, 0),
    ],
)
def test_many_tasks_are_shared_by_as_many_processes_as_have_a_core_and_memory(
    tasks: int, cores: int, quota: int, free: int, settings: dict[str, str], processes: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(Settings, "cores", cores)
    monkeypatch.setattr("dask.system.CPU_COUNT", quota)
    monkeypatch.setattr(cluster, "_free_bytes", lambda: free)
    assert cluster.processes_for(Settings(**settings), tasks) == processes


def test_memory_that_is_free_is_what_this_process_may_have():
    assert 2**26 < cluster._free_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(cluster.processes_for(Settings(), 10**6) < 2, reason="one core, or memory for one process")
def test_a_file_of_many_tasks_is_shared_by_processes_unless_one_says_otherwise(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "tile.png"), bright_image((8, 8, 40, 40), size=(64, 64)))
    tasks = [{"id": n, "data": {"image": f"/data/local-files/?d=tile.png&n={n}"}} for n in range(128)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GEOPRELABEL")} | {
        "GEOPRELABEL_DATA_DIR": str(tmp_path), "LOCAL_FILES_DOCUMENT_ROOT": str(tmp_path), "LABEL_STUDIO_URL": "",
        "PYTHONPATH": str(REPOSITORY), "GEOPRELABEL_DASK_RESOURCES": "TILE=1",
    }  # fmt: skip
    told = []
    for options in (), ("--workers", "0"):
        done = subprocess.run(
            [sys.executable, "-m", "backend", "predict", "tasks.json", "--out", "p.json", "--keep-blocks", "--json",
             *options],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        told.append((done.stderr, json.loads(done.stdout)))
    (shared, first), (alone, second) = told
    assert "processes of this machine; dashboard: http://127.0.0.1:" in shared
    assert len(shared.splitlines()) == 1
    assert (first["predicted"], first["resumed"], first["failed"]) == (128, 0, 0)
    # The same weights, so what they made need not be made again.
    assert alone == ""
    assert (second["predicted"], second["resumed"]) == (128, 128)


def test_tasks_are_taken_as_they_are_needed(client: Any):
    taken = []

    def endless() -> Iterator[tuple[int, dict[str, Any]]]:
        n = 0
        while True:
            taken.append(n)
            yield n, {"n": n}
            n += 1

    results = over_tasks(client, doubled, endless())
    for _ in range(20):
        next(results)
    assert len(taken) <= 20 + 8
    results.close()


@pytest.mark.parametrize("batch", [1, 4])
def test_a_task_that_raises_is_tried_again_and_the_rest_goes_on(client: Any, tmp_path: Path, batch: int):
    log = tmp_path / "log.txt"
    listed = [(n, {**task, "log": str(log)}) for n, task in tasks_of(14, t3="broken")]
    found = dict(over_tasks(client, doubled, listed, batch=batch, retries=1))
    assert {n for n, one in found.items() if isinstance(one, Failed)} == {3}
    assert "unexpected ValueError: no image" in found[3].reason
    assert sorted(found) == list(range(14))
    assert log.read_text().split().count("3") == 2 * (2 if batch > 1 else 1)


def test_a_task_that_kills_its_worker_each_time_is_set_apart_and_the_rest_goes_on(client: Any):
    found = dict(over_tasks(client, doubled, tasks_of(14, t6="deadly"), batch=2))
    assert {n: one if isinstance(one, Failed) else one["twice"] for n, one in found.items() if n != 6} == {
        n: 2 * n for n in range(14) if n != 6
    }
    assert "its worker died" in found[6].reason


def test_a_worker_that_is_killed_costs_but_time(client: Any, tmp_path: Path):
    listed = tasks_of(14, t6="deadly once")
    found = dict(over_tasks(client, doubled, [(n, {**task, "mark": str(tmp_path / "m")}) for n, task in listed]))
    assert {n: one["twice"] for n, one in found.items()} == {n: 2 * n for n in range(14)}


def test_a_worker_that_would_do_something_else_ends_the_run(client: Any):
    with pytest.raises(BackendError, match="another model"):
        list(over_tasks(client, doubled, tasks_of(6, t4="hides")))


def test_workers_that_do_not_share_a_folder_are_known(client: Any, tmp_path: Path):
    client.run(set_environment, {"GEOPRELABEL_DATA_DIR": str(tmp_path / "one")})
    assert cluster.blind_workers(client, tmp_path / "one") == []
    assert cluster.blind_workers(client, tmp_path / "other") == list(client.nthreads())
    assert not list(tmp_path.glob("*/*"))
    settings = Settings(data_dir=tmp_path / "other")
    with pytest.raises(BackendError, match="GEOPRELABEL_DATA_DIR"):
        list(cluster.warm_tasks(client, settings, cluster.Job(CONFIG), []))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:{free}", "nonsense", "http://x:1", "tcp://user@host:1"])
def test_the_scheduler_of_nobody_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    wanted = address.format(free=free_port())
    with pytest.raises(BackendError, match="Dask scheduler") as raised, cluster.remote(wanted):
        pass
    assert wanted in str(raised.value)


# --- Processes that are killed ---


@contextlib.contextmanager
def dask_of_two(folder: Path, *workers: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and workers with these resources as people start them; the address and the scheduler's process."""
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    commands = [
        ["scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"],
        *(
            ["worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny", "--death-timeout", "60", *resources]
            for resources in [("--resources", wanted) for wanted in workers] or [()]
        ),
    ]
    with (folder / "dask.txt").open("wb") as output, contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command], cwd=folder, env=environment, stdout=output, stderr=output
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        yield address, started[0]


CLIENT = """
import signal, sys
from pathlib import Path
from backend import cli, cluster
from backend.bulk import predict_to_file
from tests.dask_work import doubled
def run(address, resources, out, log, gate):
    tasks = [{"n": n, "data": {"image": str(n)}, "log": log, "gate": gate} for n in range(40)]
    with cluster.remote(address) if address else cluster.local(2, cores=2) as client:
        def predict(some):
            return cluster.over_tasks(client, doubled, some, resources=cluster.resources_of(resources))
        predict_to_file(lambda: tasks, Path(out), predict, fingerprint="v1")
if __name__ == "__main__":
    # Who is started in the background ignores Ctrl-C, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.app = lambda: run(*sys.argv[1:])
    cli.main()
"""


class Client:
    """The process that leads a run of 40 tasks; what is done is noted in ``log``."""

    def __init__(self, folder: Path, address: str = "", resources: str = "") -> None:
        self.out, self.log, self._gate = folder / "p.json", folder / "log.txt", folder / "gate.txt"
        (folder / "client.py").write_text(CLIENT)
        arguments = [address, resources, str(self.out), str(self.log), str(self._gate)]
        self._command = [sys.executable, str(folder / "client.py"), *arguments]

    @contextlib.contextmanager
    def start(self) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(
            self._command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def wait_for(self, count: int, process: subprocess.Popen[bytes]) -> None:
        """Until so many tasks are done, and no more are begun."""
        self.let(count)
        until_s = time.monotonic() + 180
        while time.monotonic() < until_s and process.poll() is None:
            if self.log.exists() and len(self.log.read_text().split()) >= count:
                return
            time.sleep(0.01)
        raise AssertionError(
            process.communicate(timeout=1) if process.poll() is not None else "no progress", self.log.read_text()
        )

    def let(self, count: int) -> None:
        """No more tasks than that are begun."""
        self._gate.write_text(str(count))

    def check(self, *, most: int) -> None:
        """All is there, and no more was done."""
        written = json.loads(self.out.read_text())
        assert [task["predictions"][0]["twice"] for task in written] == [2 * n for n in range(40)]
        ran = [int(n) for n in self.log.read_text().split()]
        assert set(ran) == set(range(40))
        assert len(ran) <= most


def test_a_client_or_scheduler_that_is_killed_repeats_at_most_what_was_in_flight(tmp_path: Path):
    with dask_of_two(tmp_path) as (address, scheduler):
        client = Client(tmp_path, address)
        with client.start() as process:
            client.wait_for(10, process)
            process.kill()
        with client.start() as process:
            client.wait_for(25, process)
            scheduler.kill()
            assert b"is gone; once it runs again" in process.communicate(timeout=180)[1]
            assert process.returncode == 1
    client.let(sys.maxsize)
    with dask_of_two(tmp_path) as (address, _), Client(tmp_path, address).start() as process:
        assert process.wait(180) == 0, process.stderr.read() if process.stderr else ""
    # One worker has one thread: four are on their way at a time.
    client.check(most=40 + 2 * 4)


def alive_in(group: int) -> list[str]:
    """Command lines of the group's processes that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, of_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.parametrize("kind", ["processes", "pool"])
def test_ctrl_c_ends_all_of_a_run_with_one_sentence_and_the_next_goes_on(tmp_path: Path, kind: str):
    """As a terminal sends it: to the command and, with ``--workers``, to the processes that it started."""
    with contextlib.ExitStack() as stack:
        address = ""
        if kind == "pool":
            # The second has not what is asked for, and so gets nothing.
            address, _ = stack.enter_context(dask_of_two(tmp_path, "GPU=2", "TILE=2"))
        client = Client(tmp_path, address, "GPU=1" if address else "")
        with client.start() as process:
            client.wait_for(10, process)
            os.killpg(process.pid, signal.SIGINT)
            said = process.communicate(timeout=180)[1].decode()
            assert process.returncode == 130, said
            assert " ".join(said.split()) == "error: interrupted; run the command again to go on"
            # What they leave to be tidied by a process of Python's own, that one tidies once they are gone.
            until_s = time.monotonic() + 60
            while (group := alive_in(process.pid)) and time.monotonic() < until_s:
                time.sleep(0.05)
            assert group == []
        assert not client.out.exists()
        for lines in client.out.with_name("p.json.blocks").glob("*.jsonl"):
            assert all("prediction" in json.loads(line) for line in lines.read_text().split("\n") if line)
        client.let(sys.maxsize)
        with client.start() as process:
            assert process.wait(180) == 0, process.stderr.read() if process.stderr else ""
    # Two threads at most, two tasks of each on their way and two more.
    client.check(most=40 + 6)
    assert not client.out.with_name("p.json.blocks").exists()


class Interrupting:
    """Ctrl-C while it is taken down, where Python drops the exception."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_python_drops_ends_the_run_all_the_same(client: Any, monkeypatch: pytest.MonkeyPatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with cluster._interrupts_noted():
            results = over_tasks(client, doubled, tasks_of(30))
            next(results)
            Interrupting()
            assert dropped == [KeyboardInterrupt]
            with pytest.raises(KeyboardInterrupt):
                list(results)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# --- Training ---


def training(run: str) -> list[str]:
    """A process that does what `train --piped` does, with another training."""
    code = f"import sys, time, os\nfrom backend import cluster, errors, jobs\ndef run(progress):\n    {run}\n"
    return [sys.executable, "-c", code + "cluster.tell_training(run, sys.stdout, sys.stdin)"]


def supervised(run: str, **limits: Any) -> Any:
    seen: list[tuple[float, str]] = []
    found = cluster.supervised(
        training(run), lambda *told: seen.append(told), limits.pop("is_wanted", lambda: True),
        **{"max_mb": 0, "max_s": 300.0, **limits},
    )  # fmt: skip
    return found, seen


def test_a_training_tells_how_it_goes_and_what_came_of_it():
    found, seen = supervised("progress(0.5, 'half'); return 'v1', 'learned'")
    assert found == {"version": "v1", "message": "learned"}
    assert seen == [(0.5, "half")]


@pytest.mark.parametrize(
    ("run", "limits", "told"),
    [
        ("raise errors.TrainingError('too few')", {}, {"error": "too few", "is_not_now": False}),
        ("raise jobs.NotNow('later')", {}, {"error": "later", "is_not_now": True}),
        ("time.sleep(600)", {"max_s": 0.1}, "it took more than 0 s"),
        ("time.sleep(600)", {"max_mb": 5}, "it needed more than 5 MB"),
        ("time.sleep(600)", {"is_wanted": lambda: False}, "wanted by nobody"),
    ],
)
def test_a_training_that_fails_or_breaks_a_limit_says_so(run: str, limits: dict[str, Any], told: Any):
    found, _ = supervised(run, **limits)
    assert found == told if isinstance(told, dict) else told in found["error"]


def test_a_training_that_dies_raises_with_its_last_words():
    with pytest.raises(RuntimeError, match="my last words"):
        supervised("sys.stderr.write('my last words'); sys.stderr.flush(); os._exit(9)")


def test_a_training_ends_with_its_worker():
    with subprocess.Popen(training("time.sleep(600)"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1


# --- The real model ---


def test_processes_predict_what_this_one_does(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiles").mkdir()
    for n in range(3):
        image = bright_image((20 + 9 * n, 30, 60, 70), size=(128, 128))
        cv2.imwrite(str(tmp_path / "tiles" / f"{n}.png"), image)
    images = [f"/data/local-files/?d={n}.png" for n in (0, 1, 2)] + ["/data/local-files/?d=none.png"]
    tasks = [{"id": n + 1, "data": {"image": image}} for n, image in enumerate(images)]
    environment = {"GEOPRELABEL_DATA_DIR": str(tmp_path), "LOCAL_FILES_DOCUMENT_ROOT": str(tmp_path / "tiles")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client.run(set_environment, environment)
    # With the ground of a town in it, so that there is something to see twice and to weigh.
    make_scene(tmp_path / "town.tif", size_px=(256, 256))
    with rasterio.open(tmp_path / "town.tif") as town:
        cv2.imwrite(str(tmp_path / "tiles" / "2.png"), np.moveaxis(town.read(), 0, 2)[..., ::-1])
    settings, job = Settings.from_environment(embedding_disk_mb=0), cluster.Job(CONFIG)
    reports = []
    for name, crew in (
        ("one", cluster.in_process(settings, job)),
        ("two", cluster.on_workers(client, job)),
    ):
        with crew as working:
            reports.append(
                predict_to_file(
                    lambda: tasks, tmp_path / name, working.predict, fingerprint=working.fingerprint, keep_blocks=True
                )
            )
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert list(leaves(one)) == [
        pytest.approx(leaf, abs=1e-3) if isinstance(leaf, float) else leaf for leaf in leaves(two)
    ]
    assert reports[0].predicted == reports[1].predicted == 3
    assert reports[0].polygons == reports[1].polygons >= 3
    assert reports[0].failures == reports[1].failures
    assert reports[1].failures[0].task == "task 4"
    assert "none.png" in reports[1].failures[0].reason
    wrong = cluster.Job(CONFIG, fingerprint="something else")
    with pytest.raises(BackendError, match="same release"):
        cluster.opened(client, wrong)

    # Embeddings that the workers make are those that the server looks for.
    warmed = [list(cluster.warm_tasks(client, Settings.from_environment(), job, tasks)) for _ in range(2)]
    assert [Counter(outcomes) for outcomes in warmed] == [{True: 3, None: 1}, {False: 3, None: 1}]
    with contextlib.closing(Service(Settings.from_environment())) as service:
        service.predictor.start()
        assert list(service.warm_tasks(tasks, CONFIG)) == [False, False, False, None]
        assert any("none.png" in problem.message for problem in service.problems.recent())


def test_a_project_is_trained_on_a_worker_of_the_cluster(tmp_path: Path):
    address = f"tcp://127.0.0.1:{free_port()}"
    with SmallLabelStudio(2) as label_studio, contextlib.ExitStack() as stack:
        environment = os.environ | {
            "LABEL_STUDIO_URL": label_studio.server.url, "LABEL_STUDIO_API_KEY": "t", "OMP_NUM_THREADS": "1",
            "GEOPRELABEL_DATA_DIR": str(tmp_path), "GEOPRELABEL_DASK_SCHEDULER": address,
            # A step of each training, however fast the machine is: the second time is to give the same.
            "GEOPRELABEL_PROMOTE": "always", "GEOPRELABEL_TRAINING_MAX_S": "0.001",
        }  # fmt: skip

        def run(*command: str, **options: Any) -> subprocess.Popen[Any]:
            process = subprocess.Popen([sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, **options)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            return process

        for name, *arguments in (
            ("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]),
            ("worker", address, "--no-nanny", "--nthreads", "1"),
        ):
            run(f"distributed.cli.dask_{name}", *arguments, "--no-dashboard", stderr=subprocess.DEVNULL)
        Jobs(Settings(data_dir=tmp_path))._update_ask(PROJECT, lambda ask: Ask(at_once=True))
        # Here nobody knows of a Label Studio: only the worker can do it.
        del environment["LABEL_STUDIO_URL"]
        assert run("backend", "train", "--queued", "--project", PROJECT).wait(500) == 0
        live = Registry(Settings(data_dir=tmp_path)).champions()[PROJECT]
        # Who types it gets what the worker made of the same annotations.
        typed = run("backend", "train", "--project", PROJECT.split(".")[0], "--json", stdout=subprocess.PIPE)
        told, _ = typed.communicate(timeout=500)
        assert json.loads(told) == {
            "version": live.name,
            "message": f"the annotations are those of {live.name}; nothing new to learn",
            "is_new": False,
        }
        shown = Jobs(Settings(data_dir=tmp_path)).run(PROJECT)
        assert (shown.state, shown.version, shown.message) == ("done", live.name, json.loads(told)["message"])


def leaves(value: Any) -> Iterator[Any]:
    """All values there are, one by one: how many threads add up a sum shows in its last digits."""
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield name
            yield from leaves(each)
    else:
        yield value
