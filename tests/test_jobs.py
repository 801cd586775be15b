"""Training beside the server: at most one a project, asked twice counts once, nothing lost when something dies."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from backend.errors import TrainingError
from backend.jobs import Ask, Jobs
from backend.settings import Settings


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


def test_a_process_that_was_killed_counts_as_failed_and_can_be_asked_again(jobs: Jobs, settings: Settings):
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
    assert jobs.run("1.5").state == "failed"
    jobs.start("1.5")
    jobs.work("1.5", lambda progress: ("v1", "fine"))
    assert jobs.run("1.5").state == "done"


def test_an_interrupted_run_is_still_owed(jobs: Jobs):
    def train(progress):
        raise KeyboardInterrupt

    jobs.start("1.5")
    with pytest.raises(KeyboardInterrupt):
        jobs.work("1.5", train)
    assert jobs.ask("1.5").at_once


def test_a_started_process_is_one_of_its_own(settings: Settings):
    # Without Label Studio it fails with a sentence; that it ran at all, and said so, is what counts here.
    jobs = Jobs(settings)
    assert jobs.start("1.5")
    deadline = time.time() + 60
    while jobs.run("1.5").state not in ("done", "failed") and time.time() < deadline:
        time.sleep(0.2)
    assert "LABEL_STUDIO_URL is not set" in jobs.run("1.5").message
    for child in jobs._children:
        child.wait(30)
