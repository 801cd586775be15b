"""Two servers that share a database and the models behave as one; what they share holds whoever dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from backend import desk
from backend.database import Database, DatabaseError, execute
from backend.desk import Held, Rows
from backend.findings import Finding, Findings
from backend.jobs import Ask, Jobs
from backend.registry import Registry
from backend.service import Service
from backend.settings import Settings
from demo.backend import BackendServer

from .postgres import running_postgres
from .small_label_studio import PROJECT, SmallLabelStudio

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["backend.desk", "sqlalchemy"])


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(request.getfixturevalue("postgres")) if request.param == "postgres" else f"sqlite:///{tmp_path}/x.sqlite3"
    )


@pytest.fixture
def database(url: str, tmp_path: Path) -> Iterator[Database]:
    shared = Database(Settings(data_dir=tmp_path / "own", database_url=url))
    with contextlib.closing(shared):
        used = ("training", "training_holder", "checkup", "project", "task", "annotation")
        shared.do(lambda base: [execute(base, f"DROP TABLE IF EXISTS {table}") for table in used])
        shared.close()
        yield shared


def until(is_so: Callable[[], bool], *, timeout_s: float = 120) -> float:
    began = time.monotonic()
    while True:
        with contextlib.suppress(KeyError, IndexError):
            if is_so():
                return time.monotonic() - began
        assert time.monotonic() < began + timeout_s
        time.sleep(0.05)


# What they share


def test_records_are_changed_by_one_at_a_time(database: Database) -> None:
    rows = [Rows(database) for _ in range(4)]

    def count(desk: Rows) -> None:
        for _ in range(10):
            desk.change("1.5", "ask", lambda record: {"n": record.get("n", 0) + 1})

    threads = [threading.Thread(target=count, args=(each,)) for each in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows[0].read("1.5", "ask") == {"n": 40}
    assert (rows[0].projects("ask"), rows[0].projects("state")) == (["1.5"], [])
    rows[0].forget("1.5")
    assert rows[1].read("1.5", "ask") == {}


def _hold(url: str, folder: Path, lease_s: float, said: Any, is_slow: bool) -> None:
    desk.LEASE_S = lease_s
    rows = Rows(Database(Settings(data_dir=folder, database_url=url)))
    with rows.held("1.5", wait_s=0):
        said.set()
        if is_slow:
            # It cannot say that it lives, as on a machine that hangs.
            rows._take = lambda project: time.sleep(3600)  # type: ignore[method-assign,assignment,return-value]
        time.sleep(60)


def test_a_project_is_one_processes_until_that_is_dead(
    database: Database, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "LEASE_S", 2.0)
    said, mine = _FORKS.Event(), Rows(database)
    holder = _FORKS.Process(target=_hold, args=(url, tmp_path, 2.0, said, False))
    holder.start()
    try:
        assert said.wait(60)
        # Longer than a lease: it is renewed.
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            assert mine.is_held("1.5")
            with pytest.raises(Held), mine.held("1.5", wait_s=0):
                pass
            time.sleep(0.2)
        assert not mine.is_held("2.5")
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        with mine.held("1.5", wait_s=10):
            assert Rows(database).is_held("1.5")
        assert not mine.is_held("1.5")
    finally:
        holder.kill()
        holder.join()


def test_who_has_lost_a_project_unknown_to_it_ends_itself(
    database: Database, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "LEASE_S", 1.5)
    said = _FORKS.Event()
    holder = _FORKS.Process(target=_hold, args=(url, tmp_path, 1.5, said, False))
    holder.start()
    try:
        assert said.wait(60)
        database.do(lambda base: execute(base, "UPDATE training_holder SET holder = 'somebody else', until = 1e12"))
        holder.join(20)
        assert holder.exitcode == 1
    finally:
        holder.kill()
        holder.join()


@pytest.fixture
def closed() -> Iterator[Callable[[Settings], Database]]:
    """Makes databases that are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda settings: stack.enter_context(contextlib.closing(Database(settings)))


def test_jobs_of_two_servers_count_together(
    url: str, database: Database, tmp_path: Path, closed: Callable[[Settings], Database]
) -> None:
    begun: list[str] = []
    both = []
    for name in ("a", "b"):
        settings = Settings(
            data_dir=tmp_path / name, database_url=url, start_training_each_n_updates=3, training_quiet_s=0
        )
        both.append(Jobs(settings, closed(settings)))
        both[-1]._start = lambda project, name=name: begun.append(name) or True  # type: ignore[method-assign,misc]
    one, other = both
    assert [desk.changed("1.5") for desk in (one, other, one)] == [False, False, True]
    assert begun == ["a"]
    assert asdict(other.ask("1.5")) == asdict(one.ask("1.5"))
    one.work("1.5", lambda progress: ("v1", "done well"))
    assert other.run("1.5").version == "v1"
    assert (other.ask("1.5"), set(other.runs())) == (Ask(), {"1.5"})


def test_findings_are_one_list(
    url: str, database: Database, tmp_path: Path, closed: Callable[[Settings], Database]
) -> None:
    one, other = (Findings(tmp_path / name, closed(Settings(database_url=url))) for name in ("a", "b"))
    crosses = Finding("self-crossing", "the outline crosses itself", task=5, annotation=7, region="a")
    assert one.put(7, 5, "3.17", 10.0, [crosses]) == [crosses]
    assert [kept.finding for kept in other.recent()] == [crosses]
    assert other.put(7, 5, "3.17", 9.0, []) is None
    other.will_write(7, "abc", base_version=10.0)
    assert one.own_write(7, at_a_glance=True).digest == "abc"
    one.remove(tasks=[5])
    assert (other.recent(), other.counts()) == ([], {})


def test_a_database_that_is_away_costs_an_annotators_save_next_to_nothing(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url="postgresql://nobody@127.0.0.1:1/none")
    service = Service(settings)
    with SmallLabelStudio(0) as running:
        event = running.annotate(1)
    took = []
    for _ in range(4):
        began = time.monotonic()
        assert service.event(event)["status"] == "noted"
        took.append(time.monotonic() - began)
    assert max(took[1:]) < 0.25, took
    assert service.journal.has_missed
    assert service.jobs.runs() == {}
    assert service.findings.recent() == []
    with pytest.raises(DatabaseError, match="GEOPRELABEL_DATABASE_URL cannot be used"):
        service.journal.projects()
    service.close()


def test_only_one_at_a_time_has_its_turn(database: Database, url: str, tmp_path: Path) -> None:
    other, inside, most = Database(Settings(data_dir=tmp_path / "other", database_url=url)), [0], [0]

    def work(shared: Database) -> None:
        with shared.in_turn("reconcile"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.2)
            inside[0] -= 1

    threads = [threading.Thread(target=work, args=(each,)) for each in (database, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert most == [1]


# Two servers


def _alike(one: BackendServer, other: BackendServer) -> bool:
    def told(server: BackendServer) -> Any:
        status = server.get("/status")
        training = {p: {k: v for k, v in run.items() if k != "duration_s"} for p, run in status["training"].items()}
        kept = ("versions", "finding_counts", "findings", "model_version", "segmenter", "label_studio")
        return [training, {name: status[name] for name in kept}, server.get("/versions")]

    return bool(told(one) == told(other))


def live(server: BackendServer) -> str:
    return next((v["name"] for v in server.get("/status")["versions"] if v["project"] == PROJECT and v["live"]), "")


def test_two_servers_behave_as_one(url: str, database: Database, tmp_path: Path) -> None:
    """Events to either, one training of them, its version live with both; one is killed, and the other goes on."""
    models = tmp_path / "models"
    tracking = f"sqlite:///{models}/mlflow.db" if url.startswith("sqlite") else url.replace("://", "+psycopg://", 1)
    models.mkdir()
    environment = {
        "GEOPRELABEL_DATABASE_URL": url, "MODEL_DIR": str(models), "MLFLOW_TRACKING_URI": tracking,
        "GEOPRELABEL_PROMOTE": "always", "START_TRAINING_EACH_N_UPDATES": "3", "GEOPRELABEL_TRAINING_QUIET_S": "0.5",
        "GEOPRELABEL_TRAINING_MAX_S": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with SmallLabelStudio(0) as running:
        one, other = (BackendServer(tmp_path / name, **environment, **running.environment) for name in ("a", "b"))
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            list(pool.map(stack.enter_context, (one, other)))
            for number, server in enumerate((one, other, one), 1):
                server.post("/webhook", running.annotate(number))
            until(lambda: other.get("/status")["training"][PROJECT]["state"] == "done")
            until(lambda: bool(live(one)) and live(one) == live(other), timeout_s=10)
            version = live(one)
            until(lambda: _alike(one, other), timeout_s=10)
            runs = sqlalchemy.create_engine(tracking)
            with runs.connect() as base:
                assert base.execute(sqlalchemy.text("SELECT count(*) FROM runs")).scalar_one() == 1
            runs.dispose()

            # What is taken off the air is off with both.
            settings = Settings(data_dir=tmp_path / "c", model_dir_setting=models, mlflow_tracking_uri=tracking)
            Registry(settings).rollback(PROJECT)
            assert until(lambda: live(one) == live(other) == "") < 5
            Registry(settings).activate(PROJECT, version)
            assert until(lambda: live(one) == live(other) == version) < 5

            assert one._process is not None
            os.killpg(one._process.pid, signal.SIGKILL)
            one._process.wait()
            for number in (4, 5, 6):
                other.post("/webhook", running.annotate(number))
            until(lambda: len(other.get("/versions")["versions"]) == 3)
            until(lambda: other.get("/status")["training"][PROJECT]["state"] == "done")
            until(lambda: live(other) not in ("", version), timeout_s=10)
            one.start()
            until(lambda: _alike(one, other), timeout_s=20)
