"""Saved annotations checked beside the server: at once answered, the newest version, and nobody's work written over."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from backend import review
from backend.client import LabelStudio
from backend.findings import Finding, Findings, digest_of, version_of
from backend.problems import Problems
from backend.review import NOTE, TAB, Reviews, noted
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from demo.backend import BackendServer
from tests import golden_requests
from tests.fakes import BrightSegmenter
from tests.small_server import Answer, Asked, SmallServer, as_json

CROSSING = [[10, 10], [30, 30], [30, 10], [10, 30]]
SOUND = [[10, 10], [30, 10], [30, 30], [10, 30]]
APART = [[50, 10], [70, 10], [70, 30], [50, 30]]
EVENT = golden_requests.load("webhook_annotation_updated")["body"]


def result(points: Any = None, name: str = "a", **more: Any) -> dict[str, Any]:
    return {
        "id": name, "from_name": "outline", "to_name": "photo", "type": "polygonlabels", "original_width": 640,
        "original_height": 512, "value": {"points": points or CROSSING, "polygonlabels": ["building"]}, **more,
    }  # fmt: skip


def event(results: list[Any] | None = None, *, saved_s: int = 10, number: int = 101, **more: Any) -> dict[str, Any]:
    body = copy.deepcopy(EVENT)
    body["annotation"].update(
        id=number, result=[result()] if results is None else results, updated_at=at(saved_s), **more
    )
    return dict(body)


def at(second: int) -> str:
    return f"2026-03-02T09:21:{second:02d}.500000Z"


class FakeLabelStudio:
    """Keeps one annotation as Label Studio's API does, and can be saved to between two of our calls."""

    def __init__(self, annotation: dict[str, Any]) -> None:
        self.annotation: dict[str, Any] | None = annotation
        self.views: list[Any] = [{"data": {"title": "Default", "hiddenColumns": {"explore": ["tasks:inner_id"]}}}]
        self.clock_s = 30
        self.patches: list[dict[str, Any]] = []
        self.before_patch: Callable[[], None] = lambda: None
        self.after_patch: Callable[[], None] = lambda: None

    def save(self, results: list[Any], *, saved_s: int) -> None:
        assert self.annotation is not None
        self.annotation = {**self.annotation, "result": results, "updated_at": at(saved_s)}

    def answer(self, asked: Asked) -> Answer:
        if asked.path.startswith("/api/dm/views/"):
            if asked.method == "POST":
                self.views.append(asked.json)
            return as_json(self.views if asked.method == "GET" else asked.json)
        if self.annotation is None:
            return as_json({"detail": "No Annotation matches the given query."}, 404)
        if asked.path == "/api/tasks/103/":
            return as_json(EVENT["task"])
        if asked.method == "PATCH":
            self.before_patch()
            self.patches.append(asked.json)
            self.save(asked.json["result"], saved_s=self.clock_s)
            self.clock_s += 1
            self.after_patch()
        return as_json(self.annotation)


@pytest.fixture
def label_studio() -> FakeLabelStudio:
    return FakeLabelStudio({"id": 101, "task": 103, "result": [result()], "updated_at": at(10)})


@pytest.fixture
def reviews(tmp_path: Path, label_studio: FakeLabelStudio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reviews]:
    monkeypatch.setattr(review, "_QUIET_S", 0.0)
    with SmallServer(label_studio.answer) as server:
        reviews = made(tmp_path, server.url)
        yield reviews
        reviews.close()


def made(folder: Path, url: str, **settings: Any) -> Reviews:
    settings = {"data_dir": folder, "comment_invalid": True, **settings}
    return Reviews(
        Settings(**settings), Findings(folder), Problems(folder), lambda: LabelStudio(url, "0" * 40, attempts=1)
    )


def checked(reviews: Reviews, body: dict[str, Any]) -> list[str]:
    reviews.note(body, "7.17")
    assert reviews.wait(20)
    return [kept.finding.reason for kept in reviews._findings.recent()]


# --- In line ---


def test_an_annotation_is_checked_after_its_event_and_again_when_it_changes(reviews: Reviews):
    told: list[Finding] = []
    reviews.on_found = told.extend
    assert checked(reviews, event()) == ["self-crossing"]
    assert checked(reviews, event([result(), result(APART, "b")], saved_s=11)) == ["self-crossing"]
    assert [finding.region for finding in told] == ["a"]
    assert checked(reviews, event([result(SOUND)], saved_s=12)) == []
    assert checked(reviews, event(saved_s=11)) == []


@pytest.mark.parametrize(
    "deletion",
    [
        {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 101}]},
        {"action": "TASKS_DELETED", "tasks": [{"id": 103}]},
    ],
)
def test_what_was_deleted_or_skipped_has_no_findings(reviews: Reviews, deletion: dict[str, Any]):
    assert checked(reviews, event()) == ["self-crossing"]
    assert checked(reviews, deletion) == []
    assert checked(reviews, event(saved_s=20)) == []
    assert checked(reviews, event(number=102)) == ["self-crossing"]
    assert checked(reviews, event(number=102, saved_s=11, was_cancelled=True)) == []


def test_what_an_event_lacks_is_asked_of_label_studio(reviews: Reviews):
    body = event()
    body["annotation"] = {"id": 101, "task": 103}
    del body["task"]
    assert checked(reviews, body) == ["self-crossing"]


def test_an_annotation_that_is_gone_when_it_is_asked_for_is_forgotten(reviews: Reviews, label_studio: FakeLabelStudio):
    label_studio.annotation = None
    body = event()
    del body["annotation"]["result"]
    assert checked(reviews, body) == []
    assert reviews._problems.recent() == []


def test_a_bulk_event_holds_many(reviews: Reviews):
    body = event()
    body["action"] = "ANNOTATIONS_CREATED"
    body["annotation"] = [{**body["annotation"], "id": number, "task": 103} for number in range(20)]
    body["task"] = [body["task"]]
    assert checked(reviews, body) == ["self-crossing"] * 20


def test_noting_takes_no_time_and_only_the_newest_version_is_checked(reviews: Reviews, monkeypatch: pytest.MonkeyPatch):
    go, seen = threading.Event(), []

    def slow(annotation: Any, task: Any, **_: Any) -> list[Any]:
        seen.append((annotation["id"], version_of(annotation)))
        go.wait(20)
        return []

    monkeypatch.setattr(review, "annotation_findings", slow)
    begun = time.monotonic()
    reviews.note(event(number=1), "7.17")
    for second in range(10, 40):
        reviews.note(event(number=2, saved_s=second), "7.17")
    reviews.note(event(number=2, saved_s=12), "7.17")
    assert time.monotonic() - begun < 1
    assert reviews.waiting <= 2
    go.set()
    assert reviews.wait(20)
    assert seen[-1] == (2, version_of({"updated_at": at(39)}))
    assert len(seen) <= 3


def test_the_line_is_bounded_and_says_so(reviews: Reviews, monkeypatch: pytest.MonkeyPatch):
    begun, go = threading.Event(), threading.Event()
    monkeypatch.setattr(review, "MAX_WAITING", 3)
    monkeypatch.setattr(review, "annotation_findings", lambda *_, **__: begun.set() or (go.wait(20) and []))
    reviews.note(event(number=20), "7.17")
    assert begun.wait(20)
    for number in range(20):
        reviews.note(event(number=number), "7.17")
    assert reviews.waiting == 3
    (problem,) = reviews._problems.recent()
    assert "geoprelabel validate --project 7" in problem.message
    go.set()
    assert reviews.wait(20)


def test_an_annotation_that_cannot_be_checked_costs_only_itself(reviews: Reviews, monkeypatch: pytest.MonkeyPatch):
    check = review.annotation_findings

    def sometimes(annotation: Any, *arguments: Any, **options: Any) -> list[Finding]:
        return check(annotation, *arguments, **options) if annotation["id"] != 1 else [][1]

    monkeypatch.setattr(review, "annotation_findings", sometimes)
    reviews.note(event(number=1), "7.17")
    for broken in ({"action": "ANNOTATION_UPDATED"}, {"action": "ANNOTATION_UPDATED", "annotation": [3, {"id": "x"}]}):
        reviews.note(broken, "7.17")
    assert checked(reviews, event(number=2)) == ["self-crossing"]
    (problem,) = reviews._problems.recent()
    assert "annotation 1" in problem.where
    assert "IndexError" in problem.message


def test_an_image_in_a_task_does_not_wait_with_it(reviews: Reviews):
    body = event()
    body["task"]["data"]["image"] = "data:image/png;base64," + "A" * 10**6
    (version,) = review._versions(body, "7.17")
    assert len(json.dumps(version.task)) < 10_000


# --- Notes in Label Studio ---


def test_a_note_is_written_once_and_taken_back_when_corrected(reviews: Reviews, label_studio: FakeLabelStudio):
    checked(reviews, event())
    (patch,) = label_studio.patches
    assert patch["result"][0]["meta"]["text"] == [f"{NOTE}the outline crosses itself; draw it again"]
    assert label_studio.annotation is not None
    own = {**EVENT, "annotation": label_studio.annotation}
    assert reviews.is_own(own["annotation"])
    assert not reviews.is_own(event(saved_s=31)["annotation"])
    # Even where it were not known for our own, it would settle.
    checked(reviews, own)
    assert len(label_studio.patches) == 1

    corrected = [{**patch["result"][0], "value": result(SOUND)["value"]}]
    label_studio.save(corrected, saved_s=40)
    assert checked(reviews, event(corrected, saved_s=40)) == []
    assert label_studio.annotation["result"] == [result(SOUND)]
    assert reviews._problems.recent() == []


def test_nothing_is_written_over_a_newer_save(reviews: Reviews, label_studio: FakeLabelStudio):
    label_studio.save([result(SOUND)], saved_s=11)
    assert checked(reviews, event(saved_s=10)) == ["self-crossing"]
    assert label_studio.patches == []
    assert checked(reviews, event([result(SOUND)], saved_s=11)) == []


def test_a_save_in_the_moment_of_our_write_is_written_again_and_told(reviews: Reviews, label_studio: FakeLabelStudio):
    newer = [result(SOUND), result([[50, 50], [60, 60], [60, 50], [50, 60]], "b")]
    label_studio.before_patch = lambda: label_studio.save(newer, saved_s=20)
    checked(reviews, event(saved_s=10))
    assert label_studio.annotation is not None
    assert label_studio.annotation["result"][0]["value"]["points"] == CROSSING

    label_studio.before_patch = lambda: None
    assert checked(reviews, event(newer, saved_s=20)) == ["self-crossing"]
    first, second = label_studio.annotation["result"]
    assert first == newer[0]
    assert {**second, "meta": None} == {**newer[1], "meta": None}
    assert second["meta"]["text"][0].startswith(NOTE)
    (problem,) = reviews._problems.recent()
    assert "written again" in problem.message


def test_an_annotator_who_goes_back_to_our_version_is_left_alone(reviews: Reviews, label_studio: FakeLabelStudio):
    checked(reviews, event(saved_s=10))
    ours = label_studio.patches[0]["result"]
    # Saved after our write, then undone: what the server holds is the annotator's last word.
    label_studio.save(ours, saved_s=50)
    checked(reviews, event([result(SOUND)], saved_s=45))
    assert len(label_studio.patches) == 1


def test_a_write_whose_answer_was_lost_still_tells_a_lost_save(reviews: Reviews, label_studio: FakeLabelStudio):
    ours = {"id": 101, "result": noted([result()], [Finding("x", "…", region="a")])}
    reviews._findings.will_write(101, digest_of(ours), base_version=version_of({"updated_at": at(10)}))
    label_studio.save(ours["result"], saved_s=30)
    checked(reviews, event([result(SOUND)], saved_s=20))
    assert label_studio.annotation is not None
    assert label_studio.annotation["result"] == [result(SOUND)]


def test_a_deleted_annotation_takes_no_note(reviews: Reviews, label_studio: FakeLabelStudio):
    label_studio.annotation = None
    checked(reviews, event())
    assert reviews._problems.recent() == []


def test_the_tab_is_made_once_beside_those_there_are(reviews: Reviews, label_studio: FakeLabelStudio):
    label_studio.views, first = [], label_studio.views
    checked(reviews, event())
    assert label_studio.views == []
    label_studio.views = first
    for second in (11, 12):
        moved = [result([[x + second, y] for x, y in CROSSING])]
        label_studio.save(moved, saved_s=second)
        checked(reviews, event(moved, saved_s=second))
    _, tab = label_studio.views
    assert (tab["project"], tab["data"]["title"]) == (7, TAB)
    assert tab["data"]["filters"]["items"][0]["value"] == NOTE.strip()
    assert tab["data"]["hiddenColumns"] == first[0]["data"]["hiddenColumns"]


def test_without_the_setting_label_studio_is_not_touched(tmp_path: Path, label_studio: FakeLabelStudio):
    with SmallServer(label_studio.answer) as server:
        reviews = made(tmp_path, server.url, comment_invalid=False)
        assert checked(reviews, event()) == ["self-crossing"]
        assert not reviews.is_own(event()["annotation"])
        reviews.close()
        assert server.asked == []


def test_a_label_studio_that_does_not_answer_is_a_problem_and_not_an_end(tmp_path: Path):
    reviews = made(tmp_path, "http://127.0.0.1:9")
    assert checked(reviews, event()) == ["self-crossing"]
    assert "cannot be reached" in reviews._problems.recent()[0].message
    assert checked(reviews, event([], saved_s=12)) == []
    reviews.close()


# --- Notes themselves ---


def test_notes_keep_what_people_wrote_and_every_other_entry():
    mine = {"text": ["look again\nplease"], "model_version": "compact-1"}
    before = [result(meta=mine), result(SOUND, "b"), "junk", result(name="a", type="labels")]
    after = noted(before, [Finding("x", "one", region="a"), Finding("y", "two", region="a"), Finding("z", "…")])
    assert after[0]["meta"] == {
        "text": [f"look again\nplease\n{NOTE}one\n{NOTE}two"], "model_version": "compact-1",
    }  # fmt: skip
    assert after[1:] == before[1:]
    assert noted(after, [])[0]["meta"] == {"text": ["look again\nplease"], "model_version": "compact-1"}
    assert noted(noted([result()], [Finding("x", "one", region="a")]), []) == [result()]
    assert noted(before, []) == before
    assert before[0]["meta"] is mine


@pytest.mark.parametrize("text", ["as text", ["a", "b"], [], None, 7, {"a": 1}, [7]])
def test_notes_of_any_form_are_left_as_they_are_where_nothing_is_ours(text: Any):
    before = [result(meta={"text": text})]
    assert noted(before, []) == before


# --- Through the server ---


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FlaskClient]:
    settings = Settings(data_dir=tmp_path, label_studio_url="http://studio.test:8080", label_studio_api_key="0" * 40)
    service = Service(settings, segmenter=BrightSegmenter())
    yield create_app(settings, service).test_client()
    service.close()


def test_the_status_page_links_to_what_was_found(client: FlaskClient):
    assert client.post("/webhook", json=event([result(name="<b>&a")])).status_code == 201
    assert client.application.extensions["service"].reviews.wait(20)
    (finding,) = client.get("/status").get_json()["findings"]
    link = "http://studio.test:8080/projects/7/data?task=103&annotation=101&region=%3Cb%3E%26a"
    assert (finding["reason"], finding["url"]) == ("self-crossing", link)
    page = client.get("/status", headers={"Accept": "text/html"}).text
    assert link.replace("&", "&amp;") in page
    assert "&lt;b&gt;&amp;a" in page
    assert "<b>&a" not in page
    assert 'geoprelabel_findings_total{reason="self-crossing"} 1.0' in client.get("/metrics").text


def test_our_own_note_is_no_change_to_learn_from(client: FlaskClient):
    service = client.application.extensions["service"]
    service.reviews._settings = service.settings.model_copy(update={"comment_invalid": True})
    mine = event(noted([result()], [Finding("x", "one", region="a")]))
    service.findings.will_write(101, digest_of(mine["annotation"]), base_version=0.0)
    assert client.post("/webhook", json=mine).get_json() == {"status": "our own note"}
    changes = [json.loads(path.read_text())["changes"] for path in service.settings.data_dir.glob("jobs/*.ask.json")]
    assert changes == []


def test_two_server_processes_show_the_same_findings(tmp_path: Path):
    with BackendServer(tmp_path, WORKERS="2") as backend:
        for number in range(8):
            backend.post("/webhook", event(number=number))
        deadline = time.monotonic() + 30
        while len(backend.get("/status")["findings"]) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        for _ in range(6):
            status = backend.get("/status")
            assert (len(status["findings"]), status["finding_counts"]) == (8, {"self-crossing": 8})

        with urllib.request.urlopen(f"{backend.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert re.findall(r'^geoprelabel_findings_total\{reason="([\w-]+)"\} (\S+)$', text, re.MULTILINE) == [
            ("self-crossing", "8.0")
        ]
