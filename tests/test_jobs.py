"""Training beside the server: at most one a project, asked twice counts once, nothing lost when something dies."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from backend import jobs as desk
from backend.errors import TrainingError
from backend.jobs import Ask, Jobs, NotNow, Run
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings

from .fakes import BrightSegmenter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, start_training_each_n_updates=3, training_quiet_s=0.2)


@pytest.fixture
def jobs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    jobs = Jobs(settings)
    monkeypatch.setattr(jobs, "_start", lambda project: True)
    return jobs


def test_training_starts_after_enough_changes_and_not_before(jobs: Jobs):
    assert [jobs.changed("1.5") for _ in range(4)] == [False, False, True, True]
    assert jobs.ask("1.5").changes == 4
    assert jobs.ask("2.5") == Ask()


def test_what_was_asked_is_done_once_and_then_no_more(jobs: Jobs):
    runs: list[int] = []
    jobs.start("1.5")
    jobs.start("1.5")
    jobs.work("1.5", lambda progress: (f"v{len(runs)}", str(runs.append(1))))
    assert len(runs) == 1
    assert jobs.run("1.5").state == "done"
    jobs.work("1.5", lambda progress: (f"v{len(runs)}", str(runs.append(1))))
    assert len(runs) == 1


def test_what_comes_in_while_training_runs_is_trained_afterwards(jobs: Jobs):
    runs: list[int] = []

    def train(progress):
        runs.append(1)
        if len(runs) == 1:
            jobs.start("1.5")
        return f"v{len(runs)}", "fine"

    jobs.start("1.5")
    jobs.work("1.5", train)
    assert len(runs) == 2
    assert jobs.run("1.5").version == "v2"


def test_what_is_asked_already_is_not_written_again(jobs: Jobs, settings: Settings):
    jobs.start("1.5")
    before = {path: path.stat().st_mtime_ns for path in (settings.data_dir / "jobs").glob("*.json")}
    assert before
    jobs.start("1.5")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system knows no SCHED_IDLE")
def test_training_runs_where_nothing_else_wants_to_and_what_writes_does_not(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
):
    policies: dict[str, int] = {}
    written = jobs._show

    def show(project: str, run: Run) -> None:
        policies[f"writes {run.message}"] = os.sched_getscheduler(0)
        written(project, run)

    def train(progress):
        # Here the journal is written, which saves write as well.
        progress(0.0, "asking")
        policies["asks"] = os.sched_getscheduler(0)
        progress(0.1, "learning")
        policies["learns"] = os.sched_getscheduler(0)
        assert jobs.run("1.5").progress == 0.1
        return "v1", "done"

    monkeypatch.setattr(jobs, "_show", show)
    own = os.sched_getscheduler(0)
    # The next run asks Label Studio anew, and so does not begin as the last one ended.
    for _ in range(2):
        jobs.start("1.5")
        jobs.work("1.5", train)
        assert policies.pop("learns") == os.SCHED_IDLE
        assert set(policies.values()) == {own}
        assert {"asks", "writes asking", "writes learning", "writes done"} <= policies.keys()


def test_only_one_works_at_a_time(jobs: Jobs):
    inside, go, overlaps = threading.Event(), threading.Event(), []

    def slow(progress):
        inside.set()
        go.wait(10)
        return "v1", "fine"

    jobs.start("1.5")
    first = threading.Thread(target=jobs.work, args=("1.5", slow))
    first.start()
    inside.wait(10)
    jobs.work("1.5", lambda progress: overlaps.append(1) or ("v2", ""))
    assert jobs.run("1.5").state == "training"
    go.set()
    first.join(10)
    assert overlaps == []
    assert jobs.run("1.5").state == "done"


def test_changes_are_trained_after_a_quiet_time(jobs: Jobs):
    for _ in range(3):
        jobs.changed("1.5")
    begun = time.time()
    jobs.work("1.5", lambda progress: ("v1", "fine"))
    assert time.time() - begun >= 0.19
    assert jobs.ask("1.5") == Ask()


def test_a_failed_run_says_why(jobs: Jobs):
    def train(progress):
        raise TrainingError("nothing to learn from")

    jobs.start("1.5")
    jobs.work("1.5", train)
    run = jobs.run("1.5")
    assert (run.state, run.message) == ("failed", "nothing to learn from")


def test_what_a_killed_process_had_taken_on_is_still_asked_for(jobs: Jobs, settings: Settings):
    script = (
        "import time; from pathlib import Path; from backend.jobs import Jobs; from backend.settings import Settings\n"
        f"jobs = Jobs(Settings(data_dir=Path({str(settings.data_dir)!r})))\n"
        "jobs.work('1.5', lambda progress: (print('in', flush=True), time.sleep(60)))\n"
    )
    jobs.start("1.5")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert jobs.run("1.5").state == "training"
        child.kill()
    run = jobs.run("1.5")
    assert (run.state, jobs.ask("1.5").is_owed) == ("waiting", True)
    assert "ended before it was done" in run.message
    jobs.work("1.5", lambda progress: ("v1", "fine"))
    assert (jobs.run("1.5").state, jobs.ask("1.5")) == ("done", Ask())


def worker(settings: Settings, train: str, **more: object) -> subprocess.Popen[bytes]:
    """A process that works on what is asked: ``train`` is the body of a function of ``progress``."""
    script = (
        "import ctypes, os, sys, time; from pathlib import Path; from backend import jobs as desk\n"
        "from backend.settings import Settings\n"
        + "".join(f"desk.{name} = {value!r}\n" for name, value in more.items())
        + f"jobs = desk.Jobs(Settings(**{settings.model_dump(include={'training_max_s', 'training_max_mb'})!r},"
        f" data_dir=Path({str(settings.data_dir)!r})))\n"
        f"def train(progress):\n    {train}\n    return 'v1', 'fine'\n"
        "print('up', flush=True)\njobs.work('1.5', train)\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)


def restarted(settings: Settings) -> list[str]:
    """What a server that is started anew begins at its first look."""
    jobs, begun = Jobs(settings), []
    jobs._start = lambda project: begun.append(project) or True  # type: ignore[method-assign]
    jobs._begin_due(is_first_look=True)
    return begun


def test_however_often_and_whenever_it_is_killed_the_next_start_goes_on(settings: Settings):
    jobs, chance = Jobs(settings), random.Random(5)
    jobs._start = lambda project: True  # type: ignore[method-assign]
    jobs.start("1.5")
    for _ in range(5):
        with worker(settings, "[(progress(i / 100, 'at it'), time.sleep(0.002)) for i in range(100)]") as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(chance.uniform(0, 0.15))
            child.kill()
        assert jobs.ask("1.5").at_once or jobs.ask("1.5").is_owed
        assert restarted(settings) == ["1.5"]
    with worker(settings, "pass") as child:
        assert child.wait(60) == 0
    assert (jobs.run("1.5").state, jobs.ask("1.5"), restarted(settings)) == ("done", Ask(), [])


def test_a_run_that_keeps_dying_is_not_begun_again_for_ever(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(desk, "PAUSES_S", (0.0, 0.0))
    begun: list[str] = []
    monkeypatch.setattr(jobs, "_start", lambda project: begun.append(project) or True)
    jobs.start("1.5")
    begun.clear()
    for number in range(6):
        jobs._pauses.clear()
        jobs._begin_due(is_first_look=False)
        if len(begun) > number:
            jobs._update_ask("1.5", jobs._taken_on)  # … and there it died
            jobs._show("1.5", desk.Run("training"))
    assert len(begun) == 3
    assert jobs.run("1.5").state == "failed"
    assert "ended 3 times" in jobs.run("1.5").message
    jobs.changed("1.5", 3)
    assert len(begun) == 4


def test_between_two_tries_there_is_a_growing_pause(jobs: Jobs):
    jobs.start("1.5")
    pauses = []
    for _ in range(5):
        ask = jobs._update_ask("1.5", jobs._taken_on)
        pauses.append(round(max(ask.not_before - time.time(), 0)))
    assert pauses == [0, 10, 60, 300, 300]
    assert jobs._due_in(jobs.ask("1.5")) is None


def test_what_has_to_wait_for_something_is_put_off_for_longer_each_time_and_never_given_up(jobs: Jobs):
    def train(progress):
        raise NotNow("Label Studio cannot be reached")

    jobs.start("1.5")
    delays = []
    for _ in range(12):
        jobs._update_ask("1.5", lambda ask: replace(ask, not_before=0.0))
        jobs.work("1.5", train)
        delays.append(round(jobs.ask("1.5").not_before - time.time()))
        assert jobs.ask("1.5").is_owed
    assert delays == [15, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]
    run = jobs.run("1.5")
    assert (run.state, run.message) == ("waiting", "Label Studio cannot be reached; tried again in 60 min")
    runs: list[int] = []
    jobs.work("1.5", lambda progress: (runs.append(1), ("v1", "fine"))[1])
    assert runs == []
    jobs.start("1.5")
    jobs.work("1.5", lambda progress: (runs.append(1), ("v1", "fine"))[1])
    assert (runs, jobs.ask("1.5")) == ([1], Ask())


def test_a_bug_is_tried_a_few_times_and_then_told(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(desk, "PAUSES_S", (0.0, 0.0))
    runs: list[int] = []

    def train(progress):
        runs.append(1)
        raise ZeroDivisionError("no tiles")

    jobs.start("1.5")
    for _ in range(5):
        jobs.work("1.5", train)
    assert (len(runs), jobs.run("1.5").state) == (3, "failed")
    assert "unexpected ZeroDivisionError: no tiles" in jobs.run("1.5").message
    assert jobs.ask("1.5") == Ask()


@pytest.mark.parametrize(
    ("train", "limits", "said"),
    [
        ("held = b'x' * 2**28; time.sleep(90)", {"training_max_mb": 200}, "more than 200 MB"),
        ("time.sleep(90)", {"training_max_s": 0.1}, "took more than 0 s"),
    ],
)
def test_a_run_over_its_limits_ends_with_a_sentence(settings: Settings, train, limits, said):
    jobs = Jobs(settings)
    jobs._update_ask("1.5", lambda ask: Ask(at_once=True))
    with worker(
        settings.model_copy(update=limits), train, _GRACE_S=0.2 if "training_max_s" in limits else 300
    ) as child:
        assert child.wait(60) == 1
    assert (jobs.run("1.5").state, jobs.ask("1.5")) == ("failed", Ask())
    assert said in jobs.run("1.5").message


def test_a_run_that_hangs_where_no_python_thread_gets_its_turn_is_ended_too(settings: Settings):
    jobs = Jobs(settings)
    jobs._update_ask("1.5", lambda ask: Ask(at_once=True))
    hangs = "ctypes.PyDLL(None).sleep(90)"  # PyDLL keeps the interpreter's lock
    with worker(settings.model_copy(update={"training_max_s": 0.1}), hangs, _GRACE_S=0.2, _HANGS_S=0.3) as child:
        assert child.wait(60) == 1
    assert jobs.ask("1.5").is_owed
    assert jobs.run("1.5").state == "waiting"


def test_several_projects_share_the_places_there_are(settings: Settings):
    jobs, inside, most, lock = Jobs(settings.model_copy(update={"trainings_at_once": 2})), [0], [0], threading.Lock()

    def train(progress):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.3)
        with lock:
            inside[0] -= 1
        return "v1", "fine"

    for project in "1234":
        jobs._update_ask(project, lambda ask: Ask(at_once=True))
    threads = [threading.Thread(target=jobs.work, args=(project, train)) for project in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [2]
    assert {run.state for run in jobs.runs().values()} == {"done"}


def test_of_several_servers_one_begins_what_is_asked_and_another_goes_on_when_it_is_gone(settings: Settings):
    desks = [Jobs(settings), Jobs(settings)]
    begun: list[int] = []
    for number, jobs in enumerate(desks):
        jobs._start = lambda project, number=number: begun.append(number) or True  # type: ignore[method-assign]
    desks[0]._update_ask("1.5", lambda ask: Ask(is_owed=True, tries=1))
    stops = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=jobs.tend, args=(stop,)) for jobs, stop in zip(desks, stops, strict=True)]
    for thread in threads:
        thread.start()
    time.sleep(1.6)
    assert len(set(begun)) == 1
    first = begun[0]
    stops[first].set()
    threads[first].join(5)
    begun.clear()
    time.sleep(2.1)
    assert set(begun) == {1 - first}
    stops[1 - first].set()
    threads[1 - first].join(5)


def test_trouble_that_stays_is_told_once(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(desk, "_TEND_EVERY_S", 0.01)
    jobs.start("1.5")
    stop, looks = threading.Event(), iter(["disk full"] * 5 + ["", "", "disk full", "disk full"])

    def begin_due(*, is_first_look: bool) -> None:
        trouble = next(looks, None)
        if trouble is None:
            stop.set()
        if trouble:
            raise OSError(trouble)

    monkeypatch.setattr(jobs, "_begin_due", begin_due)
    jobs.tend(stop)
    assert caplog.text.count("cannot be begun: disk full") == 2


def test_what_is_asked_outlives_a_change_of_its_record(jobs: Jobs, tmp_path: Path):
    jobs.changed("1.5", 2)
    path = tmp_path / "jobs" / "1.5.ask.json"
    path.write_text(path.read_text().replace("{", '{"from_tomorrow": 1, ', 1).replace('"delays": 0, ', ""))
    assert jobs.ask("1.5").changes == 2


def test_a_project_can_be_forgotten(jobs: Jobs, tmp_path: Path):
    for project in ("1.5", "1.55"):
        jobs.start(project)
        jobs.work(project, lambda progress: ("v1", "fine"))
    jobs.forget("1.5")
    assert list(jobs.runs()) == ["1.55"]
    assert not list((tmp_path / "jobs").glob("1.5.*.json"))


def test_an_interrupted_run_is_still_owed(jobs: Jobs):
    def train(progress):
        raise KeyboardInterrupt

    jobs.start("1.5")
    with pytest.raises(KeyboardInterrupt):
        jobs.work("1.5", train)
    assert jobs.ask("1.5") == Ask(is_owed=True)
    jobs.work("1.5", lambda progress: ("v1", "fine"))
    assert jobs.ask("1.5") == Ask()


def test_a_started_process_is_one_of_its_own(settings: Settings):
    # Without Label Studio it fails with a sentence; that it ran at all, and said so, is what counts here.
    jobs = Jobs(settings)
    assert jobs.start("1.5")
    deadline = time.time() + 60
    while "LABEL_STUDIO_URL" not in jobs.run("1.5").message and time.time() < deadline:
        time.sleep(0.2)
    assert "LABEL_STUDIO_URL is not set" in jobs.run("1.5").message
    for child in jobs._children.values():
        child.wait(30)


def test_how_training_stands_is_in_the_metrics_and_on_the_status_page(settings: Settings):
    service = Service(settings, segmenter=BrightSegmenter())
    service.jobs._start = lambda project: True  # type: ignore[method-assign]
    client = create_app(settings, service).test_client()
    try:
        service.jobs.start("1.5")
        service.jobs.work("1.5", lambda progress: (time.sleep(0.3), ("v1", "learned from 3 tiles"))[1])
        service.jobs.changed("1.5", 2)
        text = client.get("/metrics").text
        (seconds,) = re.findall(r'^geoprelabel_training_duration_seconds{project="1.5"} (\S+)$', text, re.MULTILINE)
        assert 0.3 <= float(seconds) < 60
        for name, value in {"running": "0.0", "failed": "0.0", "progress": "1.0", "changes": "2.0"}.items():
            assert f'geoprelabel_training_{name}{{project="1.5"}} {value}\n' in text
        assert "learned from 3 tiles" in client.get("/status", headers={"Accept": "text/html"}).text
        assert client.get("/status").json["training"]["1.5"]["duration_s"] >= 0.3
    finally:
        service.close()
