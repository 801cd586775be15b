"""The journal says what Label Studio says, whatever was lost on the way, and several processes may write at once."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from typer.testing import CliRunner

from backend import cli
from backend.errors import BadRequest
from backend.journal import Journal, JournalError, Reconciled
from backend.labelstudio import chosen_annotations
from backend.problems import Problems
from backend.settings import Settings

PROJECT = "3.1700000000"
RECORDED = Path(__file__).resolve().parent.parent.parent / "shared" / "fixtures" / "label-studio-1.23.2" / "requests"


def drawn(number: int, *, minute: int = 0, points: int = 3, **fields: Any) -> dict[str, Any]:
    """An annotation as Label Studio sends it, saved at that minute."""
    at = f"2026-01-01T00:{minute:02d}:00.000000Z"
    region = {"id": "r", "value": {"points": [[i, i] for i in range(points)]}}
    return {"id": number, "result": [region], "was_cancelled": False, "ground_truth": False, "updated_at": at, **fields}


def task(number: int, *annotations: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": number, "data": {"image": f"/{number}.png"}, "annotations": list(annotations), **fields}


def event(action: str, about: dict[str, Any], annotation: dict[str, Any]) -> dict[str, Any]:
    return {"action": action, "task": {k: v for k, v in about.items() if k != "annotations"},
            "annotation": {**annotation, "task": about["id"]}}  # fmt: skip


def created(number: int, annotation: dict[str, Any]) -> dict[str, Any]:
    return event("ANNOTATION_CREATED", task(number), annotation)


def known(journal: Journal, project: str = PROJECT) -> dict[int, list[tuple[int, int]]]:
    """Of each task, its annotations by number and count of points."""
    return {each["id"]: [(a["id"], len(a["result"][0]["value"]["points"])) for a in each["annotations"]]
            for each in journal.tasks(project)}  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """In SQLite, or in the PostgreSQL that GEOPRELABEL_TEST_DATABASE_URL names."""
    journal = Journal(Settings(data_dir=tmp_path, database_url=os.environ.get("GEOPRELABEL_TEST_DATABASE_URL", "")))
    yield journal
    with contextlib.suppress(JournalError):
        for project in journal.projects():
            journal.forget(project)
    journal.close()


@pytest.fixture
def in_file(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(Settings(data_dir=tmp_path))) as journal:
        yield journal


def test_saved_changed_and_deleted_annotations_are_followed(journal: Journal):
    journal.note(PROJECT, created(1, drawn(11)))
    journal.note(PROJECT, created(2, drawn(12)))
    journal.note("4.5", created(9, drawn(19)))
    journal.note(PROJECT, event("ANNOTATION_UPDATED", task(1), drawn(11, minute=1, points=5)))
    assert known(journal) == {1: [(11, 5)], 2: [(12, 3)]}
    journal.note(PROJECT, {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 12}]})
    assert known(journal) == {1: [(11, 5)]}
    journal.note(PROJECT, {"action": "TASKS_DELETED", "tasks": [{"id": 1}]})
    assert known(journal) == {}
    assert known(journal, "4.5") == {9: [(19, 3)]}
    assert journal.projects() == [PROJECT, "4.5"]


def test_of_two_events_that_overtake_each_other_the_newer_version_stays(journal: Journal):
    journal.note(PROJECT, event("ANNOTATION_UPDATED", task(1), drawn(11, minute=2, points=9)))
    journal.note(PROJECT, created(1, drawn(11, minute=1)))
    assert known(journal) == {1: [(11, 9)]}
    journal.note(PROJECT, {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 11}]})
    journal.note(PROJECT, event("ANNOTATION_UPDATED", task(1), drawn(11, minute=3)))
    assert known(journal) == {}


def test_skipped_annotations_do_not_make_a_task_one_to_learn_from(journal: Journal):
    journal.note(PROJECT, created(1, drawn(11, was_cancelled=True)))
    assert known(journal) == {}
    journal.note(PROJECT, created(1, drawn(12)))
    (only,) = journal.tasks(PROJECT)
    assert [a["id"] for a in chosen_annotations(only)] == [12]


def test_the_ground_truth_is_what_is_learned_from(journal: Journal):
    journal.reconcile(PROJECT, [task(1, drawn(11, minute=1, ground_truth=True), drawn(12, minute=2))])
    (only,) = journal.tasks(PROJECT)
    assert [a["id"] for a in chosen_annotations(only)] == [11]


def test_what_was_missed_is_added_changed_and_dropped_and_counted(journal: Journal):
    for number in (1, 2, 3):
        journal.note(PROJECT, created(number, drawn(10 + number)))
    now = [task(1, drawn(11)), task(2, drawn(12, minute=4, points=7)), task(4, drawn(14)),
           task(5, drawn(15, was_cancelled=True))]  # fmt: skip
    assert journal.reconcile(PROJECT, now) == Reconciled(added=1, updated=1, dropped=1, kept=1)
    assert known(journal) == {1: [(11, 3)], 2: [(12, 7)], 4: [(14, 3)]}
    assert journal.reconcile(PROJECT, now) == Reconciled(kept=3)
    assert journal.reconcile(PROJECT, []) == Reconciled(dropped=3)


def test_label_studio_has_the_last_word_over_events_of_any_date(journal: Journal):
    journal.note(PROJECT, created(1, {**drawn(11, points=8), "updated_at": "2999-01-01T00:00:00Z"}))
    journal.reconcile(PROJECT, [task(1, drawn(11))])
    assert known(journal) == {1: [(11, 3)]}


def test_what_is_saved_while_pages_are_read_is_neither_lost_nor_undone(journal: Journal):
    journal.note(PROJECT, created(2, drawn(12)))

    def pages() -> Iterator[dict[str, Any]]:
        journal.note(PROJECT, event("ANNOTATION_UPDATED", task(1), drawn(11, minute=5, points=6)))
        journal.note(PROJECT, created(7, drawn(17)))
        journal.note(PROJECT, {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 12}]})
        yield task(1, drawn(11))
        yield task(2, drawn(12))

    journal.reconcile(PROJECT, pages())
    assert known(journal) == {1: [(11, 6)], 7: [(17, 3)]}
    journal.reconcile(PROJECT, [task(1, drawn(11, minute=5, points=6)), task(7, drawn(17))])
    assert known(journal) == {1: [(11, 6)], 7: [(17, 3)]}


def test_a_reading_that_breaks_off_drops_nothing(journal: Journal):
    for number in range(100):
        journal.note(PROJECT, created(number, drawn(1000 + number)))

    def pages() -> Iterator[dict[str, Any]]:
        for number in range(60):
            yield task(number, drawn(1000 + number, minute=1, points=4))
        raise JournalError("Label Studio is gone")

    with pytest.raises(JournalError, match="is gone"):
        journal.reconcile(PROJECT, pages())
    assert len(known(journal)) == 100
    assert known(journal)[0] == [(1000, 4)]


def test_predictions_that_label_studio_told_of_outlive_an_event_without_them(journal: Journal):
    made = {"id": 5, "result": [], "model_version": "v1", "score": 0.5, "project": 3}
    journal.reconcile(PROJECT, [task(1, drawn(11), predictions=[made])])
    journal.note(PROJECT, event("ANNOTATION_UPDATED", task(1), drawn(11, minute=1)))
    (only,) = journal.tasks(PROJECT)
    assert only["predictions"] == [{"id": 5, "result": [], "model_version": "v1", "score": 0.5}]


@how(deadline=None, max_examples=15)
@given(
    before=st.dictionaries(st.integers(1, 120), st.integers(3, 9), max_size=120),
    after=st.dictionaries(st.integers(1, 120), st.integers(3, 9), max_size=120),
)
def test_whatever_was_there_before_the_journal_is_what_label_studio_says(tmp_path_factory, before, after):
    with contextlib.closing(Journal(Settings(data_dir=tmp_path_factory.mktemp("journal")))) as journal:
        journal.reconcile(PROJECT, [task(n, drawn(n, points=points)) for n, points in before.items()])
        told = journal.reconcile(PROJECT, [task(n, drawn(n, points=points)) for n, points in after.items()])
        assert known(journal) == {n: [(n, points)] for n, points in sorted(after.items())}
    assert (told.added, told.dropped) == (len(after.keys() - before), len(before.keys() - after))
    assert told.updated == sum(before[n] != after[n] for n in before.keys() & after)


def test_a_project_can_be_forgotten(in_file: Journal, tmp_path: Path):
    journal = in_file
    journal.note(PROJECT, created(1, {**drawn(11), "result": [{"value": "somebody's secret", "id": "r"}]}))
    journal.note("4.5", created(2, drawn(12)))
    assert any(b"somebody's secret" in path.read_bytes() for path in tmp_path.glob("journal*"))
    journal.forget(PROJECT)
    assert journal.projects() == ["4.5"]
    assert list(journal.tasks(PROJECT)) == []
    assert not any(b"somebody's secret" in path.read_bytes() for path in tmp_path.glob("journal*"))


def test_a_person_can_have_a_project_forgotten(tmp_path: Path, in_file: Journal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEOPRELABEL_DATA_DIR", str(tmp_path))
    for project in ("3.7", "3.8", "31.7"):
        in_file.note(project, created(1, drawn(11)))
    assert CliRunner().invoke(cli.app, ["forget", "--project", "3.8"]).exit_code == 0
    assert in_file.projects() == ["3.7", "31.7"]
    assert CliRunner().invoke(cli.app, ["forget", "--project", "3"]).exit_code == 0
    assert in_file.projects() == ["31.7"]
    refused = CliRunner().invoke(cli.app, ["forget", "--project", "3"])
    assert isinstance(refused.exception, BadRequest)
    assert "known: 31.7" in str(refused.exception)


def test_nothing_is_opened_before_the_first_use(in_file: Journal, tmp_path: Path):
    journal = in_file
    assert (journal.projects(), list(journal.tasks(PROJECT))) == ([], [])
    journal.forget(PROJECT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "payload",
    [
        {"action": "ANNOTATION_CREATED"},
        {"action": "ANNOTATION_CREATED", "annotation": "x", "task": 3},
        {"action": "ANNOTATION_CREATED", "annotation": {"id": True, "task": 1}},
        {"action": "ANNOTATION_CREATED", "annotation": {"id": 2**70, "task": 1}},
        {"action": "ANNOTATIONS_CREATED", "annotation": [None, {"id": 4, "task": "7"}], "task": [3]},
        {"action": "ANNOTATION_CREATED", "annotation": {"id": 4, "task": 1, "updated_at": "0001-01-01", "result": 3}},
        {"action": "ANNOTATIONS_DELETED", "annotations": [{}, 3]},
        {"action": "TASKS_DELETED", "tasks": {"id": None}},
        {"action": "PROJECT_UPDATED"},
    ],
)
def test_nonsense_over_the_wire_raises_nothing_and_spoils_nothing(journal: Journal, payload):
    journal.note(PROJECT, created(1, drawn(11)))
    journal.note(PROJECT, payload)
    assert known(journal) == {1: [(11, 3)]}


def test_a_journal_that_cannot_be_written_costs_no_save_and_says_so_once(in_file: Journal, tmp_path: Path):
    journal = in_file
    journal.note(PROJECT, created(1, drawn(11)))
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        for number in range(20):
            journal.note(PROJECT, created(2, drawn(20 + number)))
        assert time.monotonic() - begun < 5
    (problem,) = Problems(tmp_path).recent()
    assert "journal.sqlite3 cannot be used: database is locked" in problem.message


def test_a_damaged_journal_says_the_way_out(in_file: Journal, tmp_path: Path):
    journal = in_file
    (tmp_path / "journal.sqlite3").write_bytes(b"nonsense" * 1000)
    with pytest.raises(JournalError, match=r"journal\.sqlite3 cannot be used: .*; delete it"):
        journal.reconcile(PROJECT, [])
    (tmp_path / "journal.sqlite3").unlink()
    assert journal.reconcile(PROJECT, [task(1, drawn(11))]).added == 1


WRITER = """
import sys
from pathlib import Path
from backend.journal import Journal
from backend.settings import Settings
from tests.test_journal import PROJECT, created, drawn
journal, first = Journal(Settings(data_dir=Path(sys.argv[1]))), int(sys.argv[2])
for number in range(first, first + 60):
    journal.note(PROJECT, created(number, drawn(number)))
    print(number, flush=True)
"""


def writer(folder: Path, first: int) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", WRITER, str(folder), str(first)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})


def test_several_processes_write_at_once_and_a_killed_one_loses_nothing_it_had_said(in_file: Journal, tmp_path: Path):
    journal = in_file
    with writer(tmp_path, 0) as one, writer(tmp_path, 1000) as other:
        assert one.stdout is not None
        assert other.stdout is not None
        said = [int(one.stdout.readline()) for _ in range(5)]
        one.kill()
        said += [int(line) for line in [*one.stdout, *other.stdout]]
        assert other.wait() == 0
    assert set(said) - set(known(journal)) == set()
    assert len(said) >= 65
    assert Problems(tmp_path).recent() == []


@pytest.mark.skipif(not RECORDED.exists(), reason="no recorded requests of Label Studio beside the repository")
def test_recorded_events_are_understood(journal: Journal):
    numbers = {}
    for name in ("annotation_created", "annotation_created_skipped", "annotations_created_bulk", "annotation_updated"):
        body = json.loads((RECORDED / f"webhook_{name}.json").read_text())["request"]["body"]
        journal.note(PROJECT, body)
        numbers[name] = [a["id"] for each in journal.tasks(PROJECT) for a in each["annotations"]]
    assert numbers == {"annotation_created": [1], "annotation_created_skipped": [1],
                       "annotations_created_bulk": [3, 1], "annotation_updated": [3, 1]}  # fmt: skip
    corners = [len(a["result"][0]["value"]["points"]) for each in journal.tasks(PROJECT) for a in each["annotations"]]
    assert corners == [8, 4]
    journal.note(PROJECT, json.loads((RECORDED / "webhook_annotations_deleted.json").read_text())["request"]["body"])
    assert [each["id"] for each in journal.tasks(PROJECT)] == [2]


def test_a_database_that_is_not_there_costs_no_save_and_its_password_is_told_to_nobody(tmp_path: Path):
    url = "postgresql+psycopg://user:hidden-word@127.0.0.1:1/none"
    journal = Journal(Settings(data_dir=tmp_path, database_url=url))
    journal.note(PROJECT, created(1, drawn(11)))
    (problem,) = Problems(tmp_path).recent()
    assert "GEOPRELABEL_DATABASE_URL" in problem.message
    assert "hidden-word" not in problem.message + repr(journal._settings)
    with pytest.raises(JournalError):
        journal.projects()
