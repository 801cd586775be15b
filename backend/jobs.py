"""Training that runs beside the server: at most one a project, and asked twice counts once.

Everything that must survive a restart is two small records a project, on the `desk`: what is asked (``ask``) and how
the run stands (``state``). They are files in ``DATA_DIR/jobs``, or rows of the database that
GEOPRELABEL_DATABASE_URL names, which servers on several machines share. The server only writes what was asked and
starts a process; the process holds the project while it works, looks again when it is done, and goes on if something
came in meanwhile. What a run has taken on stays owed until the run is over, so a process that was killed leaves an ask
that nobody is at work on: `Jobs.tend`, in any server process, begins it again. So it does not matter which server
process is asked, how often, or which of them dies when.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from filelock import FileLock, Timeout

from .database import Database, DatabaseError
from .desk import Desk, Files, Held, Rows
from .errors import BackendError
from .settings import Settings

log = logging.getLogger(__name__)

State = Literal["idle", "waiting", "training", "done", "failed"]
Record = TypeVar("Record", "Ask", "Run")
Progress = Callable[[float, str], None]
Train = Callable[[Progress], tuple[str, str]]
Trained = TypeVar("Trained", bound="HasVersion")

PAUSES_S = (0.0, 10.0, 60.0, 300.0)
"""Before a run that died is begun again: after the first, second, … time. After one more it is given up."""

_FIRST_DELAY_S, _MAX_DELAY_S = 15.0, 3600.0
"""Before a run is begun again that lacked something from elsewhere; doubled each time."""

_GRACE_S = 300.0
"""A run may take twice the time for learning and so much more, to read and to judge; then it is ended."""

_HANGS_S = 60.0
"""After that limit the process is ended whatever it is at."""

_LOOK_EVERY_S = 0.2
_TEND_EVERY_S = 1.0
_MAX_LOG_BYTES = 2**20


class AtWork(BackendError):
    """Another process trains the project already."""


class HasVersion(Protocol):
    """What came of a run."""

    @property
    def version(self) -> str:
        """Name of the model version."""

    @property
    def message(self) -> str:
        """One sentence for people."""


class NotNow(BackendError):
    """A run lacks something that will be there again, as Label Studio or room on the disk: it stays asked for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a project's training."""

    changes: int = 0
    """Annotations created, updated or deleted since the last run began."""

    last_change: float = 0.0
    """When the newest of them came, seconds since 1970."""

    at_once: bool = False
    """Whether a person asked for training (START_TRAINING), however little changed, and no run began since."""

    is_owed: bool = False
    """Whether a run was begun that is not over. It may be at work, or dead."""

    tries: int = 0
    """How often that run was begun."""

    delays: int = 0
    """How often in a row it had to be put off."""

    not_before: float = 0.0
    """When it may be begun again, seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Run:
    """How the newest run of a project stands."""

    state: State = "idle"
    message: str = ""
    """One sentence for people."""

    progress: float = 0.0
    """0…1"""

    started: float = 0.0
    """Seconds since 1970."""

    finished: float = 0.0
    """Seconds since 1970; 0 while it runs."""

    version: str = ""
    """Model version that came of it."""

    pid: int = 0

    @property
    def duration_s(self) -> float:
        """How long it took, or has taken so far, in seconds."""
        return (self.finished or time.time()) - self.started if self.started else 0.0


class Jobs:
    """The training desk of all projects."""

    def __init__(self, settings: Settings, database: Database | None = None) -> None:
        """Nothing is written before the first request."""
        self._settings = settings
        self._folder = settings.data_dir / "jobs"
        self._database = database or Database(settings)
        self._desk: Desk = Rows(self._database) if self._database.is_shared else Files(self._folder)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._children_lock = threading.Lock()
        self._pauses: dict[str, tuple[float, float]] = {}

    def changed(self, project: str, count: int = 1, *, is_hasty: bool = True) -> bool:
        """Note that annotations changed; start training when enough have. Returns whether it was started."""
        try:
            ask = self._update_ask(
                project,
                lambda ask: replace(ask, changes=ask.changes + count, last_change=time.time()),
                is_hasty=is_hasty,
            )
        except Timeout:
            return self._later(project, lambda: self.changed(project, count, is_hasty=False))
        if ask.changes < self._settings.start_training_each_n_updates or _left_s(ask.not_before) > 0:
            return False
        return self._start(project)

    def start(self, project: str, *, is_hasty: bool = True) -> bool:
        """Train as soon as may be. Returns whether a process was started; False: one is at work and will go on."""
        ask = self.ask(project)
        if not ask.at_once or ask.not_before:  # what is asked already need not be written: an annotator's save waits
            try:
                self._update_ask(project, lambda ask: replace(ask, at_once=True, not_before=0.0), is_hasty=is_hasty)
            except Timeout:
                return self._later(project, lambda: self.start(project, is_hasty=False))
        return self._start(project)

    def _later(self, project: str, ask: Callable[[], bool]) -> bool:
        """Ask as soon as the training process lets go of what is asked: it runs when nobody else does."""

        def wait() -> None:
            try:
                ask()
            except (OSError, DatabaseError) as error:
                log.warning("what is asked of project %s's training cannot be written down: %s", project, error)

        threading.Thread(target=wait, name="ask", daemon=True).start()
        return False

    def run(self, project: str) -> Run:
        """How the project's newest run stands. One whose process is gone waits to be begun again, or has failed."""
        run = _record(self._desk.read(project, "state"), Run)
        if run.state in ("waiting", "training") and not self._desk.is_held(project):
            # It may have ended between the two looks.
            run, ask = _record(self._desk.read(project, "state"), Run), self.ask(project)
            is_given_up = self._due_in(ask) is None
            if run.state == "training" or (run.state == "waiting" and is_given_up):
                return replace(run, state="failed" if is_given_up else "waiting", message=self._died(project, ask))
        return run

    def runs(self) -> dict[str, Run]:
        """The newest run of each project that ever had one."""
        try:
            return {project: self.run(project) for project in self._desk.projects("state")}
        except DatabaseError as error:
            log.warning("how training stands cannot be read: %s", error)
            return {}

    def ask(self, project: str) -> Ask:
        """What is asked and not done yet."""
        return _record(self._desk.read(project, "ask"), Ask)

    def log_path(self, project: str) -> Path:
        """What the training process printed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{project}.log.txt"

    def forget(self, project: str) -> None:
        """Leave nothing of a project."""
        self._desk.forget(project)
        self.log_path(project).unlink(missing_ok=True)

    def tend(self, stop: threading.Event) -> None:
        """Until ``stop``: begin what is asked and nobody is at work on. One of all server processes does, at a time."""
        lock, is_first_look, told = FileLock(self._folder / "tend.lock"), True, ""
        while not stop.wait(_TEND_EVERY_S):
            try:
                if not self._database.is_shared and not self._folder.is_dir():
                    continue
                self._folder.mkdir(parents=True, exist_ok=True)
                if not lock.is_locked:
                    lock.acquire(timeout=0)
                self._begin_due(is_first_look=is_first_look)
                is_first_look, told = False, ""
            except Timeout:
                continue
            except (OSError, DatabaseError) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("training that is asked for cannot be begun: %s", error)
        lock.release(force=True)

    def work(self, project: str, train: Train) -> None:
        """In the training process: call ``train(progress)`` until nothing more is asked, or it must be put off.

        ``train`` returns the new version's name and a sentence for people. What it raises ends the run as failed; after
        `NotNow` it is put off, and after what is no BackendError at all it is begun again a few times. Returns at once
        when another process is at work on the project.
        """
        try:
            # A second, since a glance at a lock (`run`) holds it for a moment.
            with self._desk.held(project, wait_s=1.0):
                while self._due(project):
                    with self._turn(project):
                        is_over = self._train_once(project, train)
                    if not is_over:
                        return
        except Held:
            log.info("training of project %s is at work already", project)
            return
        # Somebody may have asked after our last look and found the lock still held.
        ask = self.ask(project)
        if self._due_in(ask) is not None and _left_s(ask.not_before) <= 0:
            self.work(project, train)

    def train_here(self, project: str, train: Callable[[Progress], Trained], progress: Progress) -> Trained:
        """Train once in this process, where a person waits for it, and show how it stands like any other run.

        Raises AtWork where another process trains the project, and what ``train`` raises.
        """
        run = Run("training", "reading annotations", started=time.time(), pid=os.getpid())

        def tell(done: float, message: str) -> None:
            progress(done, message)
            self._show(project, replace(run, progress=done, message=message))

        with ExitStack() as until_done:
            try:
                until_done.enter_context(self._desk.held(project, wait_s=1.0))
            except Held:
                raise AtWork(f"project {project} is being trained already; /status shows how far that is") from None
            self._show(project, run)
            try:
                trained = train(tell)
            except BaseException as error:
                message = str(error) or type(error).__name__
                self._show(project, replace(run, state="failed", message=message, finished=time.time()))
                raise
            came = {"state": "done", "progress": 1.0, "message": trained.message, "version": trained.version}
            self._show(project, replace(run, finished=time.time(), **came))  # type: ignore[arg-type]
        return trained

    def _due(self, project: str) -> bool:
        """Wait for a person's word or for quiet after enough changes; False where neither is asked, or not yet."""
        while True:
            ask = self.ask(project)
            left_s = self._due_in(ask)
            if left_s is None or _left_s(ask.not_before) > 0:
                return False
            if left_s <= 0:
                return True
            self._show(
                project, Run("waiting", f"{ask.changes} annotations changed; waiting for quiet", pid=os.getpid())
            )
            time.sleep(min(left_s, 0.25))

    def _due_in(self, ask: Ask) -> float | None:
        """Seconds until a run is to begin, 0 or less for now; None where none is asked."""
        if ask.at_once:
            due = 0.0
        elif ask.changes >= self._settings.start_training_each_n_updates:
            quiet_s = self._settings.training_quiet_s
            due = _left_s(ask.last_change + quiet_s, most_s=quiet_s)
        elif ask.is_owed and ask.tries <= len(PAUSES_S):
            due = 0.0
        else:
            return None
        return max(due, _left_s(ask.not_before))

    def _train_once(self, project: str, train: Train) -> bool:
        """Whether the run is over. It is not where it has to be begun again later."""
        ask = self._update_ask(project, self._taken_on)
        run = Run("training", "reading annotations", started=time.time(), pid=os.getpid())
        self._show(project, run)

        is_over = threading.Event()

        def progress(done: float, message: str) -> None:
            if not is_over.is_set():
                self._show(project, replace(run, progress=done, message=message))

        def end(message: str, **how: Any) -> None:
            is_over.set()
            # The ask last: a process that dies in between does the run once more.
            self._show(project, replace(run, message=message, finished=time.time(), **how))
            self._update_ask(project, _over)

        def put_off(delay_s: float, message: str, **how: Any) -> bool:
            self._update_ask(project, lambda ask: replace(ask, not_before=time.time() + delay_s, **how))
            again = f"; tried again in {delay_s / 60:.0f} min" if delay_s > 90 else f"; tried again in {delay_s:.0f} s"
            self._show(project, replace(run, state="waiting", message=message + again, finished=time.time()))
            return False

        try:
            with self._limits(lambda message: end(message, state="failed")):
                version, message = _aside(train, progress)
        except NotNow as error:
            log.warning("training of project %s is put off: %s", project, error)
            delay_s = min(_FIRST_DELAY_S * 2 ** min(ask.delays, 20), _MAX_DELAY_S)
            return put_off(delay_s, str(error), tries=0, delays=ask.delays + 1)
        except BackendError as error:
            log.warning("training of project %s failed: %s", project, error)
            end(str(error), state="failed")
        except Exception as error:
            log.exception("training of project %s failed", project)
            message = f"unexpected {type(error).__name__}: {error}; see {self.log_path(project).name}"
            if ask.tries <= len(PAUSES_S):
                return put_off(PAUSES_S[ask.tries - 1], message)
            end(message, state="failed")
        except BaseException:
            # Interrupted by a person or the system: no fault of the run's.
            self._update_ask(project, lambda ask: replace(ask, tries=max(ask.tries - 1, 0), not_before=0.0))
            raise
        else:
            end(message, state="done", progress=1.0, version=version)
        return True

    def _taken_on(self, ask: Ask) -> Ask:
        is_new = ask.at_once or ask.changes >= self._settings.start_training_each_n_updates
        tries = 1 if is_new or not ask.is_owed else ask.tries + 1
        # For the case that this process dies: while it lives, nobody else looks at the time.
        pause_s = PAUSES_S[min(tries, len(PAUSES_S)) - 1]
        return Ask(is_owed=True, tries=tries, delays=ask.delays, not_before=time.time() + pause_s if pause_s else 0.0)

    def _died(self, project: str, ask: Ask) -> str:
        log_name = self.log_path(project).name
        if self._due_in(ask) is not None:
            return f"the training process ended before it was done ({log_name}); it is begun again"
        how_often = f" {ask.tries} times" if ask.tries else ""
        return (
            f"the training process ended{how_often} before it was done; see {log_name}. START_TRAINING,"
            f" {self._settings.start_training_each_n_updates} more annotations or a restart begin it again"
        )

    @contextmanager
    def _limits(self, end: Callable[[str], None]) -> Iterator[None]:
        """End this process, having called ``end`` with the reason, where the run takes too long or too much memory.

        Not RLIMIT_AS: it counts addresses that are reserved and never used, of which torch has several GB, and what
        fails for lack of them fails anywhere, without a sentence.
        """
        max_s, max_mb = 2 * self._settings.training_max_s + _GRACE_S, self._settings.training_max_mb
        began, is_done = time.monotonic(), threading.Event()

        def look() -> None:
            while not is_done.wait(_LOOK_EVERY_S):
                reason = ""
                if max_mb and _resident_mb() > max_mb:
                    reason = f"it needed more than {max_mb} MB of memory (GEOPRELABEL_TRAINING_MAX_MB)"
                elif time.monotonic() > began + max_s:
                    reason = f"it took more than {max_s:.0f} s (twice GEOPRELABEL_TRAINING_MAX_S and {_GRACE_S:.0f} s)"
                if reason:
                    try:
                        end(f"the run was ended: {reason}")
                    finally:
                        os._exit(1)

        # Should that thread not get its turn, as where native code hangs: this one needs no turn.
        faulthandler.dump_traceback_later(max_s + _HANGS_S, exit=True, file=2)
        watch = threading.Thread(target=look, name="limits", daemon=True)
        watch.start()
        try:
            yield
        finally:
            is_done.set()
            watch.join()
            faulthandler.cancel_dump_traceback_later()

    def _begin_due(self, *, is_first_look: bool) -> None:
        for project in self._desk.projects("ask"):
            ask = self.ask(project)
            if self._desk.is_held(project):
                self._pauses.pop(project, None)
                continue
            if is_first_look and ask.is_owed:
                # A server that was started anew is a reason to hope: once more, and now.
                tries = min(ask.tries, len(PAUSES_S))
                ask = self._update_ask(project, lambda ask, t=tries: replace(ask, tries=t, not_before=0.0))  # type: ignore[misc]
            left_s = self._due_in(ask)
            next_s, pause_s = self._pauses.get(project, (0.0, 2.0))
            if left_s is None:
                self._pauses.pop(project, None)
            elif left_s <= 0 and time.monotonic() >= next_s and self._start(project):
                # Where a process dies before it can write anything, nothing but this keeps us from starting hundreds.
                self._pauses[project] = time.monotonic() + pause_s, min(pause_s * 2, 300.0)

    def _start(self, project: str) -> bool:
        with self._children_lock:
            self._children = {name: child for name, child in self._children.items() if child.poll() is None}
            if project in self._children or self._desk.is_held(project):
                return False
            self._children[project] = self._launched(project)
        log.info("training process %d started for project %s", self._children[project].pid, project)
        return True

    def _launched(self, project: str) -> subprocess.Popen[bytes]:
        """The process that trains the project."""
        command = [sys.executable, "-m", "backend", "train", "--queued", "--project", project]
        path = self.log_path(project)
        is_long = path.exists() and path.stat().st_size > _MAX_LOG_BYTES
        with open(path, "wb" if is_long else "ab") as output:
            # Its own session: a server that is stopped or reloaded does not take the training with it.
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "GEOPRELABEL_DATA_DIR": str(self._settings.data_dir.absolute()),
                     "MODEL_DIR": str(self._settings.model_dir.absolute())},
            )  # fmt: skip
        return child

    def _update_ask(self, project: str, change: Callable[[Ask], Ask], *, is_hasty: bool = False) -> Ask:
        changed = self._desk.change(
            project, "ask", lambda record: asdict(change(_record(record, Ask))), is_hasty=is_hasty
        )
        return _record(changed, Ask)

    def _show(self, project: str, run: Run) -> None:
        """For people only: a full disk must not end a run."""
        try:
            self._desk.write(project, "state", asdict(run))
        except (OSError, DatabaseError) as error:
            log.error("how training of project %s stands cannot be written: %s", project, error)

    @contextmanager
    def _turn(self, project: str) -> Iterator[None]:
        """Wait for one of the places that trainings of all projects share on this machine, and keep it."""
        locks = [FileLock(self._folder / f"place-{n}.lock") for n in range(self._settings.trainings_at_once)]
        while True:
            for lock in locks:
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield
                finally:
                    lock.release()
                return
            self._show(project, Run("waiting", "waiting for another project's training", pid=os.getpid()))
            time.sleep(0.25)


def _aside(train: Train, progress: Progress) -> tuple[str, str]:
    """What ``train`` gives or raises, from a thread that runs only where nothing else wants to, once it got under way.

    It is under way when it has told of any progress: what was missed is in the journal then. Whatever it tells, the
    calling thread writes. Who is given no processor for seconds keeps what it holds for as long, the database and the
    kernel's locks of folders and files included, and an annotator's save would wait for them.
    """
    told: queue.SimpleQueue[tuple[float, str, Future[None]] | None] = queue.SimpleQueue()
    outcome: Future[tuple[str, str]] = Future()

    def tell(done: float, message: str) -> None:
        if done > 0:
            _give_way()
        written: Future[None] = Future()
        told.put((done, message, written))
        written.result()

    def work() -> None:
        try:
            outcome.set_result(train(tell))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            told.put(None)

    threading.Thread(target=work, name="training", daemon=True).start()
    for done, message, written in iter(told.get, None):
        progress(done, message)
        written.set_result(None)
    return outcome.result()


def _give_way() -> None:
    """Have the calling thread run where nothing else wants to: annotators wait for the server, nobody for training."""
    try:
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, 0, 19)
    except OSError as error:  # the system lets nobody do that
        log.debug("training keeps its priority: %s", error)


def _left_s(when: float, *, most_s: float = _MAX_DELAY_S) -> float:
    """Seconds until then; 0 where that is longer than can be meant, as the clock was set back since."""
    left_s = when - time.time()
    return left_s if left_s <= most_s else 0.0


def _over(ask: Ask) -> Ask:
    """What is left to do after a run: what came in since it began."""
    return Ask(changes=ask.changes, last_change=ask.last_change, at_once=ask.at_once)


def _resident_mb() -> float:
    """Memory that this process holds, in MB; where the system does not tell, the most that it ever held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _record(record: Mapping[str, Any], kind: type[Record]) -> Record:
    """A damaged one is as if it were not there; of one of another release, what is known here counts."""
    plain = kind()
    known = {field.name: record[field.name] for field in dataclasses.fields(kind) if field.name in record}
    is_sound = all(
        isinstance(value, str) if isinstance(getattr(plain, name), str) else isinstance(value, (int, float))
        for name, value in known.items()
    )
    return kind(**known) if is_sound else plain
