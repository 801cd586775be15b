"""Killed processes, full disks, wrong clocks, an ill Label Studio, damaged files: nothing is lost, and all is said."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backend import annotations, export, fit
from backend.client import LabelStudio, Unreachable
from backend.embeddings import EmbeddingFiles, EmbeddingKey
from backend.errors import BackendError, LabelStudioError, RegistryError
from backend.findings import Finding, Findings
from backend.flight import Gate
from backend.jobs import Ask, Jobs, NotNow
from backend.journal import Journal, JournalError
from backend.problems import Problems
from backend.registry import Registry
from backend.segmenter import Embedding
from backend.service import PredictRequest, Service, remove_scratch
from backend.settings import Settings
from benchmarks import faults
from demo.label_studio import free_port

from .fakes import BrightSegmenter
from .small_disk import fill, mounted
from .small_label_studio import PROJECT, SmallLabelStudio
from .small_server import Answer, Asked, as_json

REPOSITORY = Path(__file__).resolve().parent.parent
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


# --- Killed ---


def test_whatever_is_killed_nothing_is_lost_and_no_half_file_is_left(tmp_path: Path):
    # `python -m benchmarks.faults` does 200 of these, training included, which tests/test_faults_training.py has here.
    kinds = ("server", "worker", "export", "ingest", "push")
    report = faults.looped(tmp_path, rounds=8, seed=random.randrange(10**6), kinds=kinds)
    assert report["wrong"] == [], f"seed {report['seed']}: {report['wrong']}"
    assert sum(report["killed"].values()) >= 4, report
    assert report["acknowledged_events"] > 0


def test_what_killed_processes_were_writing_is_removed_at_the_next_start(tmp_path: Path):
    settings = Settings(data_dir=tmp_path)
    jobs, version = tmp_path / "jobs", tmp_path / "models" / "versions" / "v1"
    left = [
        jobs / f".{PROJECT}.ask.json.a1b2",
        tmp_path / ".acceptance-x",
        version / ".new-y",
        tmp_path / "boxes/a.1.2",
    ]
    kept = [jobs / f"{PROJECT}.ask.json", version / "heads.safetensors", tmp_path / "boxes" / "a.json"]
    young = jobs / f".{PROJECT}.state.json.c3d4"
    for path in (*left, *kept, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (0, 0)) if path != young else None
    remove_scratch(settings)
    assert [path for path in (*left, *kept, young) if path.exists()] == [*kept, young]


# --- A full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", size_mb=6) as folder:
        yield folder


@pytest.mark.parametrize("ending", ["geojson", "geojsonl", "gpkg", "parquet", "fgb", "shp"])
def test_an_export_that_does_not_fit_on_the_disk_leaves_the_one_before(small_disk: Path, tmp_path: Path, ending: str):
    out = small_disk / f"town.{ending}"
    export.export(faults.drawn(3), out)
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    ballast = fill(small_disk, leave=12 * 1024)
    with pytest.raises((BackendError, OSError), match=r"(?i)no space|disk|room"):
        export.export(faults.drawn(800), out)
    ballast.unlink()
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    export.export(faults.drawn(3), out)


def test_an_ingest_that_does_not_fit_on_the_disk_says_so_and_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
):
    scene = tmp_path / "town.tif"
    faults.write_scene(scene)
    ballast = fill(small_disk, leave=300 * 1024)
    first = geoprelabel("ingest", str(scene), "--out", str(small_disk), "--tile-size", "256", "--overlap", "0")
    assert first.returncode == 1
    assert "No space left" in first.stderr
    assert "Traceback" not in first.stderr
    assert not (small_disk / "tasks.json").exists()
    assert not list(small_disk.rglob("*.part"))
    ballast.unlink()
    again = geoprelabel("ingest", str(scene), "--out", str(small_disk), "--tile-size", "256", "--overlap", "0")
    assert again.returncode == 0, again.stderr
    assert len(json.loads((small_disk / "tasks.json").read_text())) == len(list(small_disk.rglob("*.jpg")))


def test_a_full_disk_costs_embeddings_boxes_findings_and_problems_but_no_answer(small_disk: Path):
    fill(small_disk)
    service = Service(Settings(data_dir=small_disk), segmenter=BrightSegmenter())
    service.predictor.start()
    try:
        found, _ = service.predict(PredictRequest.from_json(faults.clicked(1, 40, 40)))
        assert faults.is_square(found[0], 40, 40)
        service.problems.add("anything", "went wrong")
        assert service.findings.put(1, 1, PROJECT, 1.0, [Finding("overlap", "x")]) is not None
        assert service.status()["disk_free_mb"] == 0
        assert [p for p in small_disk.rglob("*") if p.is_file() and p.name.startswith(".") and p.stat().st_size] == []
    finally:
        service.close()


def geoprelabel(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backend", *arguments], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


# --- Folders that cannot be written ---


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write into, root neither."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    (folder / "there").mkdir()
    if IS_ROOT:
        mounts = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder])
        for mount in mounts:
            done = subprocess.run(mount, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no read-only folder can be made here: {done.stderr.strip()}")
    else:
        folder.chmod(0o555)
    try:
        yield folder
    finally:
        if IS_ROOT:
            subprocess.run(["umount", "-l", folder], check=True)
        else:
            folder.chmod(0o755)


def test_a_server_whose_folder_is_read_only_answers_and_says_what_it_cannot_keep(
    read_only: Path, caplog: pytest.LogCaptureFixture
):
    with SmallLabelStudio(1) as studio:
        settings = Settings(data_dir=read_only, label_studio_url=studio.server.url, label_studio_api_key="t")
        service = Service(settings, segmenter=BrightSegmenter())
        # Before the first look at what Label Studio has, which must not take it for made up for.
        assert service.event(studio.annotate(1))["status"] in ("noted", "started")
        service.start()
        try:
            found, _ = service.predict(PredictRequest.from_json(faults.clicked(1, 40, 40)))
            assert faults.is_square(found[0], 40, 40)
            service.reviews.wait(20)
            assert service.status()["is_journal_behind"]
        finally:
            service.close()
    assert "Read-only" in caplog.text or "Permission" in caplog.text or "unable to open" in caplog.text


def test_commands_into_a_read_only_folder_say_one_sentence(read_only: Path, tmp_path: Path):
    scene, tasks = tmp_path / "town.tif", tmp_path / "tasks.json"
    faults.write_scene(scene)
    tasks.write_text(json.dumps(faults.drawn(2)))
    for arguments in (
        ["ingest", str(scene), "--out", str(read_only)],
        ["export", "--annotations", str(tasks), "--out", str(read_only / "a.geojson")],
    ):
        done = geoprelabel(*arguments)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert str(read_only) in done.stderr.replace("\n", "")
        assert len(done.stderr.strip().splitlines()) <= 3


# --- Clocks ---


def test_a_clock_that_is_set_back_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = Settings(data_dir=tmp_path, start_training_each_n_updates=1, training_quiet_s=5.0)
    jobs, real = Jobs(settings), time.time
    jobs._start = lambda project: True  # type: ignore[method-assign]
    jobs.changed(PROJECT)
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    due = jobs._due_in(jobs.ask(PROJECT))
    assert due is not None
    assert due <= 5.0
    jobs._update_ask(PROJECT, lambda ask: Ask(is_owed=True, tries=2, not_before=real() + 10))
    due = jobs._due_in(jobs.ask(PROJECT))
    assert due is not None
    assert due <= 3600.0
    assert jobs.changed(PROJECT)


def test_a_clock_that_is_set_back_loses_no_annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = time.time
    with SmallLabelStudio(2) as studio, contextlib.closing(Journal(Settings(data_dir=tmp_path))) as journal:
        journal.reconcile(PROJECT, list(studio.tasks.values()))
        monkeypatch.setattr(time, "time", lambda: real() - 86400)
        journal.note(PROJECT, studio.annotate(3))
        # Read after the event: it says what Label Studio says.
        journal.reconcile(PROJECT, list(studio.tasks.values()))
        assert sorted(task["id"] for task in journal.tasks(PROJECT)) == [1, 2, 3]
        del studio.tasks[1]
        monkeypatch.setattr(time, "time", real)
        journal.reconcile(PROJECT, list(studio.tasks.values()))
        assert sorted(task["id"] for task in journal.tasks(PROJECT)) == [2, 3]


def test_waiting_and_deadlines_do_not_look_at_the_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    service = Service(Settings(data_dir=tmp_path), segmenter=BrightSegmenter())
    service.predictor.start()
    waited: list[float] = []
    service.predictor.gate.on_entered = lambda urgency, waited_s: waited.append(waited_s)
    try:
        found, _ = service.predict(PredictRequest.from_json({**faults.clicked(1, 40, 40), "params": {}}))
        assert len(found[0]["result"]) == 1
        assert waited
        assert all(0 <= each < 60 for each in waited)
        assert isinstance(Gate().waiting, int)
    finally:
        service.close()


# --- A Label Studio that is ill ---

HALF = Answer(200, b'{"tasks": [{"id": 1, "da', {"Content-Type": "application/json"}, promised=400)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (as_json({"detail": "broken"}, 500), "500"),
        (as_json({"detail": "slow down"}, 429, Retry_After="0"), "429"),
        (as_json({"detail": "OperationalError: database is locked"}, 500), "locked"),
        (as_json({}, 503), "503"),
        (HALF, ""),
        (Answer(200, b"<html>sign in</html>", {"Content-Type": "text/html"}), "JSON"),
        (Answer(200, b'{"tasks": 7}', {"Content-Type": "application/json"}), "list of tasks"),
        (Answer(200, b'{"tasks": [{"id": "x"}]}', {"Content-Type": "application/json"}), ""),
        (Answer(200, b'{"tasks": [{}]}', {"Content-Type": "application/json"}), ""),
        (Answer(200, b"null", {"Content-Type": "application/json"}), ""),
        (Answer(200, b"\xff\xfe", {"Content-Type": "application/json"}), "JSON"),
    ],
)  # fmt: skip
def test_what_an_ill_label_studio_answers_is_one_sentence_and_drops_nothing(tmp_path: Path, answer: Answer, said: str):
    with SmallLabelStudio(3) as studio, contextlib.closing(Journal(Settings(data_dir=tmp_path))) as journal:
        journal.reconcile(PROJECT, list(studio.tasks.values()))
        studio.fault = lambda asked: answer if asked.path == "/api/tasks/" else None
        with LabelStudio(studio.server.url, "t", attempts=2, first_pause_s=0.001) as api:
            with pytest.raises(LabelStudioError) as raised:
                journal.reconcile(PROJECT, api.tasks(3, only_annotated=True))
            sentence = str(raised.value)
            assert said in sentence
            assert "\n" not in sentence
            assert len(sentence) < 600
            assert len(list(journal.tasks(PROJECT))) == 3
            # The page is ill once; then it is well again.
            ill = iter([answer])
            studio.fault = lambda asked: next(ill, None) if asked.path == "/api/tasks/" else None
            if isinstance(raised.value, Unreachable) and said != "500":
                assert journal.reconcile(PROJECT, api.tasks(3, only_annotated=True)).kept == 3


def test_a_label_studio_that_takes_forever_is_given_up(tmp_path: Path):
    def slow(asked: Asked) -> Answer | None:
        time.sleep(1.5)
        return None

    with SmallLabelStudio(1) as studio:
        studio.fault = slow
        begun = time.monotonic()
        with LabelStudio(studio.server.url, "t", attempts=1, timeout_s=0.3) as api, pytest.raises(Unreachable):
            list(api.tasks(3))
        assert time.monotonic() - begun < 1.4


def test_retry_after_is_kept_to(tmp_path: Path):
    with SmallLabelStudio(1) as studio:
        answers = iter([as_json({}, 429, Retry_After="1")])
        studio.fault = lambda asked: next(answers, None)
        begun = time.monotonic()
        with LabelStudio(studio.server.url, "t", first_pause_s=0.001) as api:
            assert api.project(3)["id"] == 3
        assert time.monotonic() - begun >= 1.0


# --- A locked or damaged database, damaged files ---


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds the SQLite file for itself."""
    code = (
        "import sqlite3, sys\nbase = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "base.execute('BEGIN EXCLUSIVE')\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"locked\n"
        yield
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


def test_while_the_journal_is_locked_a_save_is_answered_at_once(tmp_path: Path):
    with SmallLabelStudio(2) as studio:
        settings = Settings(data_dir=tmp_path, label_studio_url=studio.server.url, label_studio_api_key="t")
        service = Service(settings, segmenter=BrightSegmenter())
        service.event(studio.annotate(1))
        with locked(tmp_path / "journal.sqlite3"):
            begun = time.monotonic()
            assert service.event(studio.annotate(2))["status"] == "noted"
            assert time.monotonic() - begun < 2.0
        assert service.journal.has_missed
        assert "locked" in service.problems.recent()[0].message
        service._reconcile()
        assert not service.journal.has_missed
        assert [task["id"] for task in service.journal.tasks(PROJECT)] == [1, 2]
        service.close()


def test_while_the_registry_is_locked_the_live_version_goes_on_serving(tmp_path: Path):
    settings = Settings(data_dir=tmp_path)
    heads = tmp_path / "heads"
    heads.write_bytes(b"weights")
    Registry(settings).publish(PROJECT, "bright-v1", heads, parent="", metrics={}, tags={}, promote=True)
    service = Service(settings, segmenter=BrightSegmenter())
    service.predictor.start()
    try:
        service.predictor.wait(30)
        with locked(settings.model_dir / "mlflow.db"):
            os.utime(settings.model_dir / "mlflow.db")
            time.sleep(1.5)
            begun = time.monotonic()
            assert service.versions(PROJECT)[0] == "bright-v1"
            _, version = service.predict(PredictRequest.from_json(faults.clicked(1, 40, 40)))
            assert version == "bright-v1"
            assert time.monotonic() - begun < 2.0
    finally:
        service.close()


def test_while_the_registry_is_damaged_or_away_a_command_says_one_sentence_and_a_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(data_dir=tmp_path)
    assert Registry(settings).champions() == {}
    settings.model_dir.mkdir(parents=True, exist_ok=True)
    (settings.model_dir / "mlflow.db").write_bytes(b"no database at all" * 100)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Settings(data_dir=tmp_path, mlflow_tracking_uri=f"http://127.0.0.1:{free_port()}")
    for each in (settings, away):
        with pytest.raises(RegistryError, match=r"^the model registry at \S+ \(MLFLOW_TRACKING_URI\) failed: ") as told:
            Registry(each).versions()
        assert "\n" not in str(told.value)

    def refuse(*given: object, **named: object) -> None:
        raise told.value

    monkeypatch.setattr(fit, "fit_project", refuse)
    with pytest.raises(NotNow, match="the model registry at"):
        fit.fit_queued(settings, 1, lambda done, message: None)


def test_a_damaged_journal_is_said_with_the_way_out(tmp_path: Path):
    settings = Settings(data_dir=tmp_path)
    (tmp_path / "journal.sqlite3").write_bytes(random.randbytes(20_000))
    with contextlib.closing(Journal(settings)) as journal:
        with pytest.raises(JournalError, match="delete it: Label Studio has what it held"):
            list(journal.tasks(PROJECT))
        with SmallLabelStudio(1) as studio:
            journal.note(PROJECT, studio.annotate(1))
            assert "delete it" in Problems(tmp_path).recent()[0].message
            (tmp_path / "journal.sqlite3").unlink()
            journal._paused_until = 0.0
            journal.note(PROJECT, studio.annotate(1))
            assert len(list(journal.tasks(PROJECT))) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"state": 3}', b'"\xff"', b'{"changes": "x"}'])
def test_damaged_files_of_jobs_findings_and_problems_are_as_if_not_there(tmp_path: Path, content: bytes):
    jobs = Jobs(Settings(data_dir=tmp_path, start_training_each_n_updates=3))
    jobs._start = lambda project: True  # type: ignore[method-assign]
    jobs.changed(PROJECT)
    for path in (tmp_path / "jobs").glob("*.json"):
        path.write_bytes(content)
    (tmp_path / "jobs" / f"{PROJECT}.state.json").write_bytes(content)
    assert isinstance(jobs.ask(PROJECT), Ask)
    assert jobs.runs()[PROJECT].state in ("idle", "failed", "waiting")
    for _ in range(3):
        jobs.changed(PROJECT)
    assert jobs.ask(PROJECT).changes >= 3
    (tmp_path / "problems.jsonl").write_bytes(content + b'\n{"when": 1, "where": "a", "message": "b"}\n')
    assert [p.message for p in Problems(tmp_path).recent()] == ["b"]
    (tmp_path / "findings.sqlite3").write_bytes(content or b"x" * 100)
    findings = Findings(tmp_path)
    assert (findings.recent(), findings.counts()) == ([], {})


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_embedding_is_made_again(tmp_path: Path, seed: int):
    files, key, chance = EmbeddingFiles(tmp_path, 2**20), EmbeddingKey("a", "w"), random.Random(seed)
    kept = Embedding({"x": np.arange(500, dtype=np.float32)}, (10, 50), "w")
    files.put(key, kept)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    match seed % 3:
        case 0:
            content = content[: chance.randrange(len(content))]
        case 1:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        case 2:
            content = bytearray(chance.randbytes(len(content)))
    path.write_bytes(content)
    found = files.get(key)
    assert found is None or np.array_equal(found.features["x"], kept.features["x"])
    files.put(key, kept)
    again = files.get(key)
    assert again is not None
    assert np.array_equal(again.features["x"], kept.features["x"])


@pytest.mark.parametrize(
    "content", [b"", b"[{]", b'[{"id": 1, "data": {"image": "x"}}', b"\xff\xfe\x00", b"{}", b"[1]", b"null"]
)
def test_a_damaged_tasks_file_is_one_sentence(tmp_path: Path, content: bytes):
    path = tmp_path / "tasks.json"
    path.write_bytes(content)
    with pytest.raises(BackendError) as raised:
        list(annotations.tasks_in(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_damaged_weights_of_a_version_leave_the_shipped_ones_serving(tmp_path: Path):
    settings = Settings(data_dir=tmp_path)
    heads = tmp_path / "heads"
    heads.write_bytes(b"weights")
    version = Registry(settings).publish(PROJECT, "v1", heads, parent="", metrics={}, tags={}, promote=True)
    version.heads_path.write_bytes(b"other")
    service = Service(settings, segmenter=BrightSegmenter())
    service.predictor.start()
    try:
        found, name = service.predict(PredictRequest.from_json(faults.clicked(1, 40, 40)))
        assert (name, len(found[0]["result"])) == ("bright-1", 1)
        (problem,) = service.problems.recent()
        assert "damaged" in problem.message
        assert "models list" in problem.message
    finally:
        service.close()
