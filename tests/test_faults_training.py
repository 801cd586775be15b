"""Whatever dies, fills up or goes away while a project trains: no annotation is lost, no wrong version goes live."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backend import fit, training
from backend.client import LabelStudio
from backend.errors import BackendError
from backend.jobs import Ask, AtWork, Jobs
from backend.journal import Journal
from backend.registry import Registry
from backend.service import Service
from backend.settings import Settings
from demo.backend import BackendServer
from demo.label_studio import LabelStudioServer

from .fakes import BrightSegmenter
from .small_disk import fill, mounted
from .small_label_studio import CONFIG, NUMBER, PROJECT, SmallLabelStudio
from .small_server import Answer, Asked, as_json

_FORKS = multiprocessing.get_context("forkserver")
# One process imports all this once; those that are to be killed are forked from it.
_FORKS.set_forkserver_preload(
    ["tests.test_faults_training", "backend.training", "backend.compact", "backend.judging", "mlflow.tracking",
     "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"]
)  # fmt: skip


@pytest.fixture
def label_studio_of_three() -> Iterator[SmallLabelStudio]:
    with SmallLabelStudio(3) as running:
        yield running


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a live version that was learned from three tiles: making MLflow's tables takes seconds."""
    folder = tmp_path_factory.mktemp("trained")
    with SmallLabelStudio(3) as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_STEPS", 2)
        settings = settings_of(folder, running)
        ask(settings)
        train(settings)
    assert live(settings)
    return folder


def settings_of(folder: Path, running: SmallLabelStudio, **more: Any) -> Settings:
    # "always", as the version of three tiles is too small a thing to be judged, and this is about what goes live when.
    return Settings(
        data_dir=folder, label_studio_url=running.server.url, label_studio_api_key="t", promote="always",
        start_training_each_n_updates=2, training_quiet_s=0.0, **more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_STEPS", 2)


def train(settings: Settings) -> Jobs:
    """What the training process does, in this one."""
    jobs = Jobs(settings)
    jobs.work(PROJECT, lambda progress: fit.fit_queued(settings, NUMBER, progress))
    return jobs


def live(settings: Settings) -> str:
    version = Registry(settings).champions().get(PROJECT)
    if version is None:
        return ""
    version.check()
    return version.name


def ask(settings: Settings) -> None:
    Jobs(settings)._update_ask(PROJECT, lambda ask: Ask(at_once=True))


def learned_ids(settings: Settings) -> set[int]:
    with contextlib.closing(Journal(settings)) as journal:
        return {a["id"] for task in journal.tasks(PROJECT) for a in task["annotations"]}


def note(settings: Settings, event: dict[str, Any]) -> None:
    with contextlib.closing(Journal(settings)) as journal:
        journal.note(PROJECT, event)


# --- Killed ---


def _train_until(folder: Path, environment: dict[str, Any], point: str, delay_s: float) -> None:
    """Train, and die by kill -9 before or after a call, or after a time."""
    training._STEPS = 2
    importlib.import_module("torch").set_num_threads(1)
    settings = Settings(data_dir=folder, **environment)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point:
        when, _, name = point.partition(" ")
        *owner_name, function_name = name.split(".")
        owner: Any = importlib.import_module(".".join(owner_name[:2]))
        for part in owner_name[2:]:
            owner = getattr(owner, part)
        call = getattr(owner, function_name)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if when == "before":
                die()
            call(*args, **kwargs)
            die()

        setattr(owner, function_name, deadly)
    if delay_s:
        signal.setitimer(signal.ITIMER_REAL, delay_s)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    train(settings)


POINTS = (
    "after backend.registry._copy_whole",
    "after mlflow.tracking.MlflowClient.create_model_version",
    "after mlflow.tracking.MlflowClient.set_registered_model_alias",
    "before backend.jobs._over",
)


def test_a_trainer_that_is_killed_at_any_point_costs_no_annotation_and_leaves_the_right_version_live(
    tmp_path: Path, trained: Path, label_studio_of_three: SmallLabelStudio
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    settings = settings_of(tmp_path, label_studio_of_three)
    before = live(settings)
    label_studio_of_three.annotate(4)
    note(settings, label_studio_of_three.annotate(5))
    ask(settings)
    environment = {"label_studio_url": settings.label_studio_url, "label_studio_api_key": "t", "promote": "always"}
    seen = []
    for point, delay_s in [*((point, 0.0) for point in POINTS), ("", random.uniform(0.1, 1.0))]:
        process = _FORKS.Process(target=_train_until, args=(tmp_path, environment, point, delay_s))
        process.start()
        process.join(120)
        assert process.exitcode in (-signal.SIGKILL, -signal.SIGALRM), point
        jobs = Jobs(settings)
        # What a server does that is started anew.
        jobs._start = lambda project: True  # type: ignore[method-assign]
        jobs._begin_due(is_first_look=True)
        assert jobs.ask(PROJECT).at_once or jobs.ask(PROJECT).is_owed, point
        seen.append(live(settings))
    jobs = train(settings)
    after = live(settings)
    assert (jobs.run(PROJECT).state, jobs.ask(PROJECT)) == ("done", Ask())
    assert learned_ids(settings) == {101, 102, 103, 104, 105}
    assert Registry(settings).get(PROJECT, after).tags["annotations"] == "5"
    # The old one until the alias moved, the new one ever after.
    assert seen == [before] * 2 + [after] * 3
    assert len(Registry(settings).versions(PROJECT)) == 2


def test_server_and_trainer_are_killed_and_the_next_start_goes_on_with_what_label_studio_has_now(
    tmp_path: Path, trained: Path
):
    shutil.copytree(trained, tmp_path / "data")
    waits = [True]

    def slow(asked: Asked) -> Answer | None:
        if waits and asked.path.startswith("/data/upload/"):
            time.sleep(2)
        return None

    with SmallLabelStudio(3) as running:
        running.fault = slow
        backend = BackendServer(
            tmp_path / "data", **running.environment, GEOPRELABEL_PROMOTE="always", START_TRAINING_EACH_N_UPDATES="3",
            GEOPRELABEL_TRAINING_QUIET_S="0", GEOPRELABEL_TRAINING_MAX_S="1", OMP_NUM_THREADS="1",
        )  # fmt: skip
        with backend:
            for number in (1, 2, 3):
                backend.post("/webhook", running.annotate(number))
            until(lambda: backend.get("/status")["training"][PROJECT]["state"] == "training")
            (trainer,) = [json.loads(path.read_text())["pid"] for path in backend.data_dir.glob("jobs/*.state.json")]
            assert backend._process is not None
            os.kill(backend._process.pid, signal.SIGSTOP)
            os.kill(trainer, signal.SIGKILL)
            os.killpg(backend._process.pid, signal.SIGKILL)
        # Nobody listens now.
        waits.clear()
        running.annotate(4)
        del running.tasks[1]
        with backend:
            until(lambda: backend.get("/status")["training"][PROJECT]["state"] == "done")
            training = backend.get("/status")["training"][PROJECT]
            backend.wait_for_version(training["version"])
            (version,) = [v for v in backend.get("/status")["versions"] if v["live"]]
    assert version["name"] == training["version"]
    assert version["note"].startswith("learned from 3 tiles")
    assert learned_ids(Settings(data_dir=backend.data_dir)) == {102, 103, 104}


def until(is_so: Callable[[], bool], *, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(KeyError):
            if is_so():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- Label Studio gone, or ill ---


def at(path: str, answer: Answer, *, after: int = 0) -> Callable[[Asked], Answer | None]:
    """A fault that answers requests whose path begins so, from the one after the first ``after`` on."""
    seen = [0]

    def fault(asked: Asked) -> Answer | None:
        if not asked.path.startswith(path):
            return None
        seen[0] += 1
        return answer if seen[0] > after else None

    return fault


GONE = Answer(200, b"", promised=100)
"""The connection breaks."""


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls made as often, without the pauses in between."""
    make = LabelStudio.__init__
    monkeypatch.setattr(LabelStudio, "__init__", lambda *args, **kw: make(*args, **{**kw, "first_pause_s": 0.001}))


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize(
    "fault",
    [
        at("/api/projects/", GONE),
        at("/api/tasks/", as_json({"detail": "broken"}, 500), after=1),
        at("/api/tasks/", as_json({"detail": "slow down"}, 429), after=1),
        at("/data/upload/", GONE, after=2),
        at("/data/upload/", as_json({}, 503), after=1),
    ],
)
def test_while_label_studio_does_not_answer_the_run_waits_for_it_and_nothing_is_dropped(
    tmp_path: Path, trained: Path, label_studio_of_three: SmallLabelStudio, fault: Any
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    settings = settings_of(tmp_path, label_studio_of_three)
    before = live(settings)
    label_studio_of_three.annotate(4)
    label_studio_of_three.fault = fault
    ask(settings)
    jobs = train(settings)
    run = jobs.run(PROJECT)
    assert run.state == "waiting"
    assert "tried again in 15 s" in run.message
    assert jobs.ask(PROJECT).is_owed
    assert learned_ids(settings) >= {101, 102, 103}
    assert live(settings) == before


@pytest.mark.usefixtures("_hasty")
def test_a_label_studio_that_stumbles_is_asked_again_and_all_pages_are_read(
    tmp_path, label_studio_of_three, monkeypatch
):
    stumbles = iter([as_json({}, 503), as_json({"detail": "database is locked"}, 500), GONE, as_json({}, 429), None])
    label_studio_of_three.fault = lambda asked: next(stumbles, None) if asked.path == "/api/tasks/" else None
    settings = settings_of(tmp_path, label_studio_of_three)
    monkeypatch.setattr(fit, "fit", lambda *args, **kwargs: fit.Fitted("v1", "fine", is_new=True))
    fit.fit_queued(settings, NUMBER, lambda done, message: None)
    assert learned_ids(settings) == {101, 102, 103}


def test_a_project_that_was_deleted_in_label_studio_ends_the_run(tmp_path, label_studio_of_three):
    label_studio_of_three.fault = at("/api/projects/", as_json({"detail": "Not found."}, 404))
    settings = settings_of(tmp_path, label_studio_of_three)
    ask(settings)
    jobs = train(settings)
    assert (jobs.run(PROJECT).state, jobs.ask(PROJECT)) == ("failed", Ask())


def test_a_training_that_is_typed_is_shown_like_any_other_and_is_the_only_one(tmp_path, label_studio_of_three, trained):
    shutil.copytree(trained, tmp_path / "data")
    settings = settings_of(tmp_path / "data", label_studio_of_three)
    label_studio_of_three.annotate(4)
    jobs, shown = Jobs(settings), []

    def progress(done: float, message: str) -> None:
        if not shown:
            with pytest.raises(AtWork, match="/status"):
                fit.fit_typed(settings, NUMBER, progress=lambda *told: None)
        shown.append(jobs.run(PROJECT).state)

    done = fit.fit_typed(settings, NUMBER, progress=progress)
    run = jobs.run(PROJECT)
    assert set(shown) == {"training"}
    assert (run.state, run.version, run.message, jobs.ask(PROJECT)) == ("done", done.version, done.message, Ask())
    label_studio_of_three.fault = at("/api/tasks/", as_json({"detail": "Not found."}, 404))
    with pytest.raises(BackendError) as refused:
        fit.fit_typed(settings, NUMBER, progress=lambda *told: None)
    assert (jobs.run(PROJECT).state, jobs.run(PROJECT).message) == ("failed", str(refused.value))


def test_after_a_start_what_was_missed_is_read_and_training_asked_for(tmp_path, label_studio_of_three):
    settings = settings_of(tmp_path, label_studio_of_three)
    note(settings, label_studio_of_three.annotate(1))
    service = Service(settings, segmenter=BrightSegmenter())
    begun: list[str] = []
    service.jobs._start = lambda project: begun.append(project) or True  # type: ignore[method-assign]
    service.start()
    try:
        until(lambda: bool(begun))
        assert service.jobs.ask(PROJECT).changes == 2
        assert learned_ids(settings) == {101, 102, 103}
    finally:
        service.close()


# --- A full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", size_mb=8) as folder:
        yield folder


def test_on_a_full_disk_saves_are_answered_and_what_was_missed_is_found_later(small_disk, label_studio_of_three):
    settings = settings_of(small_disk, label_studio_of_three)
    service = Service(settings, segmenter=BrightSegmenter())
    service.jobs._start = lambda project: True  # type: ignore[method-assign]
    events = [label_studio_of_three.annotate(number) for number in (1, 2, 3)]
    assert service.event(events[0])["status"] == "noted"
    ballast = fill(small_disk)
    for event in events[1:]:
        assert service.event(event)["status"] == "noted"
    assert service.journal.has_missed
    assert service.jobs.ask(PROJECT).changes == 1
    ballast.unlink()
    service._reconcile()
    assert service.jobs.ask(PROJECT).changes == 3
    assert learned_ids(settings) == {101, 102, 103}
    assert not list(small_disk.glob("jobs/.*"))
    service.close()


@pytest.mark.parametrize("leave", [0, 96 * 1024])
def test_a_run_on_a_full_disk_is_put_off_and_what_was_live_stays_live(
    small_disk, trained, label_studio_of_three, leave
):
    shutil.copytree(trained, small_disk, dirs_exist_ok=True)
    settings = settings_of(small_disk, label_studio_of_three)
    jobs, before = Jobs(settings), live(settings)
    label_studio_of_three.annotate(4)
    ask(settings)
    ballast = fill(small_disk, leave=leave)
    with contextlib.suppress(OSError):
        train(settings)
    assert jobs.ask(PROJECT).at_once or jobs.ask(PROJECT).is_owed
    assert live(settings) == before
    ballast.unlink()
    jobs._update_ask(PROJECT, lambda ask: Ask(is_owed=True))
    train(settings)
    assert jobs.run(PROJECT).state == "done"
    assert Registry(settings).get(PROJECT, live(settings)).tags["annotations"] == "4"


# --- A real Label Studio ---


@pytest.mark.label_studio
def test_what_annotators_change_and_delete_in_label_studio_is_followed(
    tmp_path: Path, label_studio: LabelStudioServer, request: pytest.FixtureRequest
):
    with LabelStudio(label_studio.url, label_studio.token) as api:
        project = int(api.create_project("followed", CONFIG)["id"])
        tasks = api.import_tasks(project, [{"data": {"image": f"http://x/{n}.png"}} for n in range(4)])
        house = {"id": "h", "from_name": "polygon", "to_name": "image", "type": "polygonlabels",
                 "original_width": 9, "original_height": 9, "image_rotation": 0,
                 "value": {"points": [[1, 1], [9, 1], [9, 9]], "polygonlabels": ["House"]}}  # fmt: skip
        made = [int(api.create_annotation(task, [house])["id"]) for task in tasks[:3]]
        api.create_annotation(tasks[3], [], was_cancelled=True)
        journal = Journal(Settings(data_dir=tmp_path))
        request.addfinalizer(journal.close)

        def read() -> tuple[int, int, int]:
            told = journal.reconcile(PROJECT, api.tasks(project, only_annotated=True, page_size=2))
            return told.added, told.updated, told.dropped

        assert read() == (3, 0, 0)
        assert read() == (0, 0, 0)
        api.update_annotation(
            made[0], result=[{**house, "value": {**house["value"], "points": [[1, 1], [9, 1], [5, 9]]}}]
        )
        api.update_annotation(made[2], ground_truth=True)
        api.delete_annotation(made[1])
        assert read() == (0, 2, 1)
        (first, third) = journal.tasks(PROJECT)
        assert first["annotations"][0]["result"][0]["value"]["points"][2] == [5, 9]
        assert third["annotations"][0]["ground_truth"] is True
        assert [first["id"], third["id"]] == [tasks[0], tasks[2]]
