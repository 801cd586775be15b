"""Training that runs beside the server: at most one a project, and asked twice counts once.

Everything that must survive a restart is two small files a project in ``DATA_DIR/jobs``: what was asked (``.ask.json``)
and how the run stands (``.state.json``). The server only writes what was asked and starts a process; the process holds
the project's lock while it works, looks again when it is done, and goes on if something came in meanwhile. So it does
not matter which server process is asked, how often, or whether one of them dies.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout

from .settings import Settings

log = logging.getLogger(__name__)

State = Literal["idle", "waiting", "training", "done", "failed"]
Record = TypeVar("Record", "Ask", "Run")
Progress = Callable[[float, str], None]
Train = Callable[[Progress], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Ask:
    """What was asked of a project's training and is not begun yet."""

    changes: int = 0
    """Annotations created, updated or deleted since the last run began."""

    last_change: float = 0.0
    """When the newest of them came, seconds since 1970."""

    at_once: bool = False
    """Whether a person asked for training (START_TRAINING), however little changed."""


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


class Jobs:
    """The training desk of all projects."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is written before the first request."""
        self._settings = settings
        self._folder = settings.data_dir / "jobs"
        self._children: list[subprocess.Popen[bytes]] = []
        self._children_lock = threading.Lock()

    def changed(self, project: str, count: int = 1) -> bool:
        """Note that annotations changed; start training when enough have. Returns whether it was started."""
        ask = self._update_ask(project, lambda ask: replace(ask, changes=ask.changes + count, last_change=time.time()))
        if ask.changes < self._settings.start_training_each_n_updates:
            return False
        return self._start(project)

    def start(self, project: str) -> bool:
        """Train as soon as may be. Returns whether a process was started; False: one is at work and will go on."""
        self._update_ask(project, lambda ask: replace(ask, at_once=True))
        return self._start(project)

    def run(self, project: str) -> Run:
        """How the project's newest run stands. A run whose process is gone counts as failed."""
        run = _load(self._path(project, "state"), Run)
        if run.state in ("waiting", "training") and not self._is_locked(project):
            # It may have ended between the two looks.
            run = _load(self._path(project, "state"), Run)
            if run.state in ("waiting", "training"):
                return replace(
                    run, state="failed", message=f"the training process ended while {run.state}; see its log"
                )
        return run

    def runs(self) -> dict[str, Run]:
        """The newest run of each project that ever had one."""
        return {path.name.removesuffix(".state.json"): self.run(path.name.removesuffix(".state.json"))
                for path in sorted(self._folder.glob("*.state.json"))}  # fmt: skip

    def ask(self, project: str) -> Ask:
        """What was asked and is not begun yet."""
        return _load(self._path(project, "ask"), Ask)

    def log_path(self, project: str) -> Path:
        """What the training process printed."""
        return self._path(project, "log", "txt")

    def work(self, project: str, train: Train) -> None:
        """In the training process: call ``train(progress)`` until nothing more is asked.

        ``train`` returns the new version's name and a sentence for people. Returns at once when another process does
        the same.
        """
        try:
            # A second, since a glance at the lock (`run`) holds it for a moment.
            with FileLock(self._path(project, "lock", ""), timeout=1):
                while self._due(project):
                    self._train_once(project, train)
        except Timeout:
            log.info("training of project %s is at work already", project)
            return
        # Somebody may have asked after our last look and found the lock still held.
        if self._is_asked(self.ask(project)):
            self.work(project, train)

    def _due(self, project: str) -> bool:
        """Wait for a person's word or for quiet after enough changes; False where neither is asked."""
        while True:
            ask = self.ask(project)
            if ask.at_once:
                return True
            if not self._is_asked(ask):
                return False
            left_s = ask.last_change + self._settings.training_quiet_s - time.time()
            if left_s <= 0:
                return True
            self._write_run(
                project, Run("waiting", f"{ask.changes} annotations changed; waiting for quiet", pid=os.getpid())
            )
            time.sleep(min(left_s, 0.25))

    def _is_asked(self, ask: Ask) -> bool:
        return ask.at_once or ask.changes >= self._settings.start_training_each_n_updates

    def _train_once(self, project: str, train: Train) -> None:
        begun = self._update_ask(project, lambda ask: Ask(), give_old=True)
        run = Run("training", "reading annotations", started=time.time(), pid=os.getpid())
        self._write_run(project, run)

        def progress(done: float, message: str) -> None:
            self._write_run(project, replace(run, progress=done, message=message))

        try:
            version, message = train(progress)
        except Exception as error:
            log.exception("training of project %s failed", project)
            self._write_run(
                project, replace(run, state="failed", message=str(error) or repr(error), finished=time.time())
            )
            return
        except BaseException:
            # Killed or interrupted: what was asked is still owed.
            self._update_ask(
                project,
                lambda ask: replace(ask, changes=ask.changes + begun.changes, at_once=ask.at_once or begun.at_once),
            )
            raise
        self._write_run(
            project, replace(run, state="done", message=message, progress=1.0, finished=time.time(), version=version)
        )

    def _start(self, project: str) -> bool:
        with self._children_lock:
            self._children = [child for child in self._children if child.poll() is None]
            if self._is_locked(project):
                return False
            command = [sys.executable, "-m", "backend", "train", "--queued", "--project", project]
            with open(self.log_path(project), "ab") as output:
                # Its own session: a server that is stopped or reloaded does not take the training with it.
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                    env={**os.environ, "GEOPRELABEL_DATA_DIR": str(self._settings.data_dir.absolute()),
                         "MODEL_DIR": str(self._settings.model_dir.absolute())},
                )  # fmt: skip
            self._children.append(child)
        log.info("training process %d started for project %s", child.pid, project)
        return True

    def _is_locked(self, project: str) -> bool:
        path = self._path(project, "lock", "")
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True

    def _path(self, project: str, kind: str, ending: str = "json") -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / ".".join(part for part in (project, kind, ending) if part)

    def _update_ask(self, project: str, change: Callable[[Ask], Ask], *, give_old: bool = False) -> Ask:
        path = self._path(project, "ask")
        with FileLock(f"{path}.lock"):
            old = _load(path, Ask)
            new = change(old)
            _save(path, new)
        return old if give_old else new

    def _write_run(self, project: str, run: Run) -> None:
        _save(self._path(project, "state"), run)


@contextmanager
def turn_in(folder: Path, places: int) -> Iterator[None]:
    """Wait for one of ``places`` that all processes share, and keep it."""
    folder.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(folder / f"place-{number}.lock") for number in range(places)]
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
        time.sleep(0.2)


def _load(path: Path, kind: type[Record]) -> Record:
    try:
        record: Any = json.loads(path.read_text())
        return kind(**record)
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return kind()


def _save(path: Path, record: Ask | Run) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as scratch:
        json.dump(asdict(record), scratch)
    os.replace(scratch.name, path)
