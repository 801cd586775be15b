"""Bulk work and training on Dask: processes of this machine, or a cluster of any kind by its scheduler's address.

One task of Label Studio is one task of Dask, and a worker loads the model once. What crosses the wire is tasks, the
label config and what came of them. Settings and secrets do not: each worker has its own environment. Dask takes apart
whatever is sent to it with pickle, so a scheduler belongs into a network of people one trusts, or behind Dask's own
TLS; its address comes from the operator alone. Only what needs Dask imports it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import multiprocessing
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, TypeVar

from .bulk import Failed, Json, PredictMany, Task
from .errors import BackendError, BadRequest, TrainingError, UnknownVersion
from .jobs import NotNow
from .predictor import Loaded
from .problems import Problems
from .registry import ModelVersion, Registry
from .service import Service, prediction_fingerprint
from .settings import Settings

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Progress = Callable[[float, str], None]

RETRIES = 2
"""A task that failed is tried so many times more, on whichever worker is free."""

_CONNECT_S = 10.0
_FIRST_ANSWER_S = 600.0
"""A cluster that grows on demand may first have to get a machine, and that one to load the model."""

_CACHE_MB = 16
"""Of embeddings, and of images, in memory: nobody comes back to a tile of a bulk run."""

_SCENE_CACHE_BYTES = 64 * 2**20
"""Of GDAL's blocks, where tiles are made on demand: the next row of tiles needs some of this one's again."""

_LOCAL_FROM_TASKS = 128
"""From so many tasks on, processes of `local` pay: their start takes 7 s of processor time more than this one's, a tile
a third of a second, and this one keeps two cores busy at most. On two they win little but that they may die."""

_WORKER_BYTES = {"compact": 2**30}
_SAM_WORKER_BYTES = 4 * 2**30
_CLIENT_BYTES = 2**29
"""What a process of `local` may come to hold on large tiles, by its model, and what the one that leads them does."""

_HEAP = {"MALLOC_TRIM_THRESHOLD_": 2**26, "MALLOC_MMAP_THRESHOLD_": 2**25}
"""In bytes, of the C library. Dask has it give back every 64 kB that are free, and ask for a tile's 160,000 pages anew:
twice the processor time."""

_PRELOADED = [
    *(__name__, "distributed.nanny", "backend.compact", "scipy.sparse.csgraph", "scipy.spatial"),
    *("scipy.ndimage", "skimage.morphology", "skimage.segmentation"),
]
"""What each process of `local` needs: imported once, and in memory once."""

_interrupted = threading.Event()
"""Ctrl-C was typed. Python drops what an interrupt raises inside a ``__del__``, and the futures of Dask have one."""

_LOOK_EVERY_S = 2.0
_LOOK_AT_TRAINING_S = 0.2
_ADDRESS = re.compile(r"(tcp|tls|ws|wss|ucx)://[^\s/@]+:\d{1,5}")


class TaskFailed(BackendError):
    """One task failed on its worker; the others go on."""


class Refused(BackendError):
    """A worker that would do something else than was asked: the whole run ends."""


class NoScheduler(BackendError):
    """Nothing answers as a Dask scheduler at the address given, or not any more."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to know beside the task."""

    label_config: str
    project: str = "0"
    version: str = ""
    """Model version that must answer; empty: the one that is live for the project."""

    fingerprint: str = ""
    """What `service.prediction_fingerprint` says where the run began; empty: not asked."""

    keeps_embeddings: bool = False
    """Whether the tiles' embeddings are kept on disk."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Who predicts, and what all of its predictions depend on."""

    predict: PredictMany
    version: str
    fingerprint: str


@contextmanager
def in_process(settings: Settings, job: Job) -> Iterator[Crew]:
    """This process predicts."""
    service = _frugal(settings)
    service.predictor.start()
    try:
        service.predictor.wait(_FIRST_ANSWER_S)
        version = service.predictor.version(job.project)
        fingerprint = prediction_fingerprint(settings, version, job.label_config)
        yield Crew(lambda tasks: service.predict_tasks(tasks, job.label_config, job.project), version, fingerprint)
    finally:
        service.close()


@contextmanager
def on_workers(
    client: Client, job: Job, *, resources: Mapping[str, float] | None = None, batch: int = 1
) -> Iterator[Crew]:
    """Dask's workers predict, ``batch`` tasks at a time."""
    begun = opened(client, job, resources=resources)
    work = functools.partial(predicted, begun)
    yield Crew(
        lambda tasks: over_tasks(client, work, tasks, resources=resources, batch=batch),
        begun.version,
        begun.fingerprint,
    )


def opened(client: Client, job: Job, *, resources: Mapping[str, float] | None = None) -> Job:
    """The job with the version that the workers' registry has live. Raises BackendError where none can answer."""
    from distributed import TimeoutError as TooLong

    future = client.submit(_identified, job, pure=False, resources=resources or None)
    try:
        version, fingerprint = future.result(timeout=_FIRST_ANSWER_S)
    except TooLong as error:
        wanted = f" with {dict(resources)}" if resources else ""
        raise BackendError(
            f"no worker{wanted} of {_address(client)} answered within {_FIRST_ANSWER_S:.0f} s; are any running?"
        ) from error
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(
            f"a worker of {_address(client)} cannot begin ({type(error).__name__}: {error}); it needs the same"
            " GeoPrelabel as this machine"
        ) from error
    return replace(job, version=version, fingerprint=fingerprint)


def processes_for(settings: Settings, tasks: int) -> int:
    """How many processes of `local` are worth starting for so many tasks; 0: this one does better alone.

    One a core, as far as the memory that is free now, and that a container may have, allows each its `_WORKER_BYTES`.
    On a GPU one, which dies of a bad tile in this one's place.
    """
    if tasks < _LOCAL_FROM_TASKS:
        return 0
    if settings.device != "cpu":
        return 1
    from dask.system import CPU_COUNT

    have_room = (_free_bytes() - _CLIENT_BYTES) // _WORKER_BYTES.get(settings.segmenter, _SAM_WORKER_BYTES)
    most = min(settings.cores, CPU_COUNT, have_room)
    return most if most > 1 else 0


def _free_bytes() -> int:
    """Memory that this machine has left, at most what a container may have."""
    from distributed.system import MEMORY_LIMIT

    with suppress(OSError):
        if found := re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE):
            return min(int(MEMORY_LIMIT), int(found[1]) * 1024)
    return int(MEMORY_LIMIT)


@contextmanager
def local(
    workers: int, *, cores: int, threads: int = 1, resources: Mapping[str, float] | None = None
) -> Iterator[Client]:
    """So many processes of this machine, which share its cores and its memory, with ``threads`` tasks at a time each.

    ``resources`` are what a task will ask for, which they all have.
    """
    import dask
    from distributed import Client, LocalCluster

    # Which it puts back when it is imported: what it says of its own would drown the progress bar.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    share = max(1, cores // workers)
    # Libraries that each take all cores for a tile take them from each other.
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), share) | _HEAP
    preload = dask.config.get("distributed.worker.preload")
    config = {f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in environment.items()} | {
        "distributed.scheduler.allowed-failures": 1,
        # It stops a tile's threads every 10 ms to look where they are.
        "distributed.worker.profile.enabled": False,
        # Or a worker that died and is not back within 15 s never comes back: after the last one the run stands still.
        "distributed.deploy.lost-worker-timeout": "1000h",
        "distributed.worker.preload": [*([preload] if isinstance(preload, str) else preload), __name__],
        "distributed.worker.multiprocessing-method": _forking(environment),
    }
    with dask.config.set(config):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Port .* is already in use")  # another one is taken, and told
            made = LocalCluster(
                n_workers=workers,
                threads_per_worker=threads,
                resources={name: amount * threads for name, amount in (resources or {}).items()},
                processes=True,
                # TLS with a key that only these processes have: everybody with an account here could connect, else.
                security=True,
                dashboard_address="127.0.0.1:8787",
                silence_logs=logging.CRITICAL,
            )
        with _interrupts_noted(), made as cluster, Client(cluster, set_as_default=False) as client:
            yield client


def _forking(environment: Mapping[str, int]) -> str:
    """How Dask is to start processes. On Linux as forks of one that has imported everything, once for all of them.

    Their pages are shared as long as nobody writes to them, and one that died is back at once.
    """
    if sys.platform != "linux":
        return "spawn"
    import distributed.utils

    # Else Dask adds modules to the list, and imports them here too.
    distributed.utils._forkserver_preload_set = True
    for name, value in environment.items():
        os.environ.setdefault(name, str(value))
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C goes to all processes, and the one that was typed ends them.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return "forkserver"


def dask_setup(worker: Any) -> None:
    """Dask calls this in each process of `local`: Ctrl-C goes to all of them, and the one that was typed ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def dask_teardown(worker: Any) -> None:
    """Dask calls this where such a process ends in order: threads of the service would hold it up."""
    global _service
    with _service_lock:
        if _service is not None:
            _service.close()
            _service = None


@contextmanager
def remote(address: str) -> Iterator[Client]:
    """The cluster of that scheduler; TLS is Dask's own setting. Raises BackendError where none answers."""
    if not _ADDRESS.fullmatch(address):
        raise BackendError(f"a Dask scheduler's address is like tcp://host:8786, got {address[:80]!r}")
    from distributed import Client

    try:
        client = Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise NoScheduler(
            f"no Dask scheduler answers at {address} within {_CONNECT_S:.0f} s; is it running (dask scheduler)?"
        ) from error
    with _interrupts_noted(), client:
        yield client


def over_tasks(
    client: Client,
    work: Callable[[Task], Result],
    tasks: Iterable[tuple[int, Task]],
    *,
    resources: Mapping[str, float] | None = None,
    batch: int = 1,
    retries: int = RETRIES,
) -> Iterator[tuple[int, Result | Failed]]:
    """What ``work`` makes of numbered tasks on the workers, as it comes; few are on their way at any time.

    A task that raises is tried again, then given as failed. One whose workers died, which may be the fault of another
    that they had, is tried once more when nothing else is at work. Raises Refused as ``work`` does, and BackendError
    where the scheduler goes away.
    """
    from distributed import KilledWorker

    done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    held: dict[str, tuple[Future[Any], Sequence[tuple[int, Task]]]] = {}
    again: deque[Sequence[tuple[int, Task]]] = deque()
    suspects: deque[Sequence[tuple[int, Task]]] = deque()
    rest, address = iter(tasks), _address(client)

    def send(group: Sequence[tuple[int, Task]]) -> None:
        future = client.submit(_each, work, group, pure=False, retries=retries, resources=resources or None)
        held[str(future.key)] = future, group
        future.add_done_callback(done.put)

    room = _room(client)
    try:
        while True:
            while len(held) < room():
                group = again.popleft() if again else list(islice(rest, batch))
                if not group:
                    break
                send(group)
            is_alone = not held
            if is_alone:
                if not suspects:
                    return
                send(suspects.popleft())
            future, group = held.pop(str(_next(done, client, address).key))
            try:
                # A worker may die with a result that nobody has fetched yet: then this waits until it is made again.
                found = future.result()
            except Refused:
                raise
            except Exception as error:
                if future.cancelled():
                    raise NoScheduler(_gone(address)) from error
                if isinstance(error, KilledWorker) and not (is_alone and len(group) == 1):
                    suspects.extend([one] for one in group)
                elif len(group) > 1:
                    again.extend([one] for one in group)
                else:
                    yield group[0][0], Failed(_reason(error))
            else:
                yield from found
    finally:
        # Where the caller stops early, by Ctrl-C say, what is not begun need not be.
        with suppress(Exception):
            client.cancel([future for future, _ in held.values()])


def predicted(job: Job, task: Task) -> Json:
    """On a worker: a task's prediction."""
    service, model = _opened(job)
    return service.pre_label(model, job.label_config, task)


def warmed(job: Job, task: Task) -> bool:
    """On a worker: whether a task's embeddings had to be made."""
    service, model = _opened(job)
    return service.warm(model, job.label_config, task)


def warm_tasks(client: Client, settings: Settings, job: Job, tasks: Iterable[Task]) -> Iterator[bool | None]:
    """`Service.warm_tasks` on Dask's workers, in any order.

    Raises BadRequest where the server would not find what they make: it lies in DATA_DIR, which must be one for all.
    """
    if not settings.embedding_disk_mb:
        raise BadRequest("GEOPRELABEL_EMBEDDING_DISK_MB is 0; embeddings made now would be gone with the workers")
    resources, problems = resources_of(settings.dask_resources), Problems(settings.data_dir)
    if blind := blind_workers(client, settings.data_dir):
        raise BadRequest(
            f"{len(blind)} workers, such as {blind[0]}, have another GEOPRELABEL_DATA_DIR than"
            f" {settings.data_dir.absolute()} of this machine: the server would not find what they make"
        )
    begun = opened(client, replace(job, keeps_embeddings=True), resources=resources)
    work = functools.partial(warmed, begun)
    for number, outcome in over_tasks(client, work, enumerate(tasks), resources=resources):
        if isinstance(outcome, Failed):
            problems.add(f"prewarm, task number {number}", outcome.reason)
        yield None if isinstance(outcome, Failed) else outcome


def blind_workers(client: Client, folder: Path) -> list[str]:
    """The workers whose DATA_DIR is not this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".seen-") as mark:
        mark.write(text := uuid.uuid4().hex)
        mark.flush()
        found: dict[str, bool] = client.run(_sees, Path(mark.name).name, text)
    return [worker for worker, is_seen in found.items() if not is_seen]


# --- Training ---


def train(settings: Settings, project: str, progress: Progress) -> tuple[str, str]:
    """Train a project on the cluster that settings name: the new version's name, and a sentence for people.

    ``project`` is its key or its number. The caller waits, and holds the project's lock where the queue began it. The
    worker's run ends with its worker and with this process, and at the limits of time and memory; one whose worker died
    is begun again by the scheduler, and at last raises. Raises NotNow where the cluster does not answer, BackendError
    as training does.
    """
    try:
        with remote(settings.dask_scheduler) as client:
            topic = f"geoprelabel-training-{uuid.uuid4().hex}"
            client.subscribe_topic(topic, lambda event: progress(*event[1]))
            progress(0.0, f"waiting for a worker of {settings.dask_scheduler}")
            future = client.submit(
                _train_on_worker, project.split(".")[0], topic, settings.training_max_mb,
                2 * settings.training_max_s + 300, pure=False, priority=10,
                resources=resources_of(settings.dask_training_resources) or None,
            )  # fmt: skip
            told = _waited_for(future, client, settings.dask_scheduler)
    except NoScheduler as error:
        raise NotNow(str(error)) from error
    if told.get("is_not_now"):
        raise NotNow(told["error"])
    if "error" in told:
        raise TrainingError(told["error"])
    if not any(version.name == told["version"] for version in _versions_of(settings, project)):
        raise BackendError(
            f"the worker registered {told['version']} where this machine does not find it; both need the same"
            " MLFLOW_TRACKING_URI"
        )
    return told["version"], told["message"]


def _versions_of(settings: Settings, project: str) -> list[ModelVersion]:
    """Those of a project given by its key or number."""
    return [v for v in Registry(settings).versions() if project in (v.project, v.project.split(".")[0])]


def tell_training(run: Callable[[Progress], tuple[str, str]], out: IO[str], alive: IO[Any]) -> None:
    """In the process that a worker starts: run, and write how it goes line by line; end when ``alive`` does."""

    def tell(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    def watch() -> None:
        alive.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        version, message = run(lambda done, message: tell(progress=done, message=message))
    except BackendError as error:
        tell(error=str(error), is_not_now=isinstance(error, NotNow))
    else:
        tell(version=version, message=message)


def resources_of(text: str) -> dict[str, float]:
    """``GPU=1,MEMORY=2e9`` as Dask takes it. Raises BackendError."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount or 1)
        except ValueError as error:
            raise BackendError(f"resources are like GPU=1, got {part!r}") from error
    return found


# --- On a worker ---

_service: Service | None = None
_service_lock = threading.Lock()


def _opened(job: Job) -> tuple[Service, Loaded]:
    """The worker's service, made with its first task, and the model that is to answer. Raises Refused."""
    global _service
    with _service_lock:
        if _service is None or (_service.settings.embedding_disk_mb > 0) != job.keeps_embeddings:
            if _service is not None:
                _service.close()
            # Workers would wait for each other to tidy up the folder.
            made = _frugal(Settings.from_environment(**({} if job.keeps_embeddings else {"embedding_disk_mb": 0})))
            made.predictor.start()
            made.predictor.wait(_FIRST_ANSWER_S)
            # The version is the run's: a thousand workers need not ask the registry every second.
            made.predictor.stop()
            _service = made
        try:
            model = _service.predictor.model(job.project, job.version)
        except UnknownVersion:
            _service.predictor.refresh()
            model = _service.predictor.model(job.project, job.version)
    mine = prediction_fingerprint(_service.settings, model.version, job.label_config)
    if job.fingerprint not in ("", mine):
        raise Refused(
            f"the worker on {socket.gethostname()} would predict with {mine}, the run began with {job.fingerprint}: all"
            " workers need the same release, model registry (MLFLOW_TRACKING_URI) and settings"
        )
    return _service, model


def _frugal(settings: Settings) -> Service:
    """A service for tiles that come by once."""
    from rasterio._env import get_gdal_config, set_gdal_config

    set_gdal_config("GDAL_CACHEMAX", min(get_gdal_config("GDAL_CACHEMAX"), _SCENE_CACHE_BYTES))
    less = {"embedding_cache_mb": min(_CACHE_MB, settings.embedding_cache_mb)}
    return Service(settings.model_copy(update=less), image_cache_mb=_CACHE_MB)


def _identified(job: Job) -> tuple[str, str]:
    service, model = _opened(job)
    return model.version, prediction_fingerprint(service.settings, model.version, job.label_config)


def _each(work: Callable[[Task], Result], group: Sequence[tuple[int, Task]]) -> list[tuple[int, Result]]:
    """Raises TaskFailed with a sentence: what else was raised here, the other side might not be able to read."""
    try:
        return [(number, work(task)) for number, task in group]
    except (Refused, TaskFailed):
        raise
    except UnknownVersion as error:
        raise Refused(f"the worker on {socket.gethostname()}: {error}") from None
    except BackendError as error:
        raise TaskFailed(str(error)) from None
    except Exception as error:
        log.exception("a task failed")
        raise TaskFailed(
            f"unexpected {type(error).__name__}: {error}; please report it with the worker's log"
        ) from None


def _sees(name: str, text: str) -> bool:
    try:
        return (Settings.from_environment().data_dir / name).read_text() == text
    except OSError:
        return False


def _train_on_worker(project: str, topic: str, max_mb: int, max_s: float) -> Json:
    """The last line that the training process told; what it told before is passed on."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        state = worker.state.tasks.get(key)
        return state is not None and state.state != "cancelled"

    command = [sys.executable, "-m", "backend", "train", "--piped", "--project", project]
    return supervised(
        command, lambda done, message: worker.log_event(topic, (done, message)), is_wanted, max_mb=max_mb, max_s=max_s
    )  # fmt: skip


def supervised(
    command: Sequence[str], progress: Progress, is_wanted: Callable[[], bool], *, max_mb: int, max_s: float
) -> Json:
    """Run a process that does `tell_training`: what it told last, or the limit that it broke. It ends with this one.

    Raises RuntimeError with the end of its log where it died.
    """
    until_s = time.monotonic() + max_s
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        tempfile.TemporaryFile() as log_file,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_file) as process,
    ):
        assert process.stdout is not None
        pump = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        pump.start()
        try:
            while True:
                try:
                    told: Json = json.loads(lines.get(timeout=_LOOK_AT_TRAINING_S))
                except queue.Empty:
                    if not pump.is_alive() and lines.empty():
                        log_file.seek(0)
                        end = log_file.read()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"the training process ended: {end}") from None
                else:
                    if "progress" not in told:
                        return told
                    progress(told["progress"], told["message"])
                too_much = ""
                if max_mb and _held_mb(process.pid) > max_mb:
                    too_much = f"needed more than {max_mb} MB of memory (GEOPRELABEL_TRAINING_MAX_MB)"
                elif time.monotonic() > until_s:
                    too_much = f"took more than {max_s:.0f} s (twice GEOPRELABEL_TRAINING_MAX_S and 300 s)"
                if too_much or not is_wanted():
                    return {"error": f"the run was ended: it {too_much or 'is wanted by nobody any more'}"}
        finally:
            process.kill()


def _pump(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        if line.startswith(b"{"):
            lines.put(line)


def _held_mb(pid: int) -> float:
    """Memory that a process holds, in MB; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return 0.0


# --- On this side ---


@contextmanager
def _interrupts_noted() -> Iterator[None]:
    """As long as it lasts, an interrupt that is dropped where it comes up is raised once more by the next wait."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def noted(number: int, frame: FrameType | None) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, noted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupted.clear()


def _next(done: queue.SimpleQueue[Future[Any]], client: Client, address: str) -> Future[Any]:
    while True:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        with suppress(queue.Empty):
            return done.get(timeout=_LOOK_EVERY_S)
        if client.status != "running":
            raise NoScheduler(_gone(address))


def _waited_for(future: Future[Any], client: Client, address: str) -> Json:
    """A future's result, however long it takes. Raises NoScheduler."""
    done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    future.add_done_callback(done.put)
    _next(done, client, address)
    try:
        result: Json = future.result()
    except Exception as error:
        if future.cancelled():
            raise NoScheduler(_gone(address)) from error
        raise
    return result


def _room(client: Client) -> Callable[[], int]:
    """How many tasks may be on their way: all workers busy and a few in line, whatever their number is by now."""
    looked_s, room = -math.inf, 4

    def now() -> int:
        nonlocal looked_s, room
        if time.monotonic() - looked_s > _LOOK_EVERY_S:
            with suppress(Exception):
                # Not client.nthreads(), which waits half a minute for a scheduler that is gone.
                assert client.scheduler is not None
                of_workers = client.sync(client.scheduler.ncores, callback_timeout=_LOOK_EVERY_S)
                threads = sum(of_workers.values())
                if not threads:
                    log.warning("%s has no workers at the moment; waiting", _address(client))
                room = max(4, 2 * threads + 2)
            looked_s = time.monotonic()
        return room

    return now


def _gone(address: str) -> str:
    return f"the Dask scheduler {address} is gone; once it runs again, run the command again to go on"


def _reason(error: BaseException) -> str:
    from distributed import KilledWorker

    if isinstance(error, TaskFailed):
        return str(error)
    if isinstance(error, KilledWorker):
        return (
            f"its worker died all {error.allowed_failures + 1} times that it was tried: out of memory, or an image that"
            " crashes what reads it (the workers' log may tell)"
        )
    return f"unexpected {type(error).__name__}: {error}"


def _address(client: Client) -> str:
    return str(client.scheduler.address) if client.scheduler is not None else "the Dask scheduler"
