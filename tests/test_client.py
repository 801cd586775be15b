"""The client against a real Label Studio, and against a small server for what a healthy one does not do."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from backend.client import SECRET_HEADER, WEBHOOK_ACTIONS, Elsewhere, FileTooLarge, LabelStudio, NotFound
from backend.errors import LabelStudioDenied, LabelStudioError
from demo.label_studio import LabelStudioFailed, LabelStudioServer
from tests.small_server import Answer, Asked, SmallServer, as_json

LEGACY = "c0ffee0000000000000000000000000000c0ffee"
CONFIG = """<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="poly" toName="image"><Label value="building"/></PolygonLabels>
</View>"""
POLYGON = {
    "id": "a1",
    "from_name": "poly",
    "to_name": "image",
    "type": "polygonlabels",
    "original_width": 8,
    "original_height": 6,
    "image_rotation": 0,
    "value": {"points": [[0, 0], [50, 0], [50, 50]], "polygonlabels": ["building"], "closed": True},
}


def jwt(claims: dict[str, Any]) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(claims)}.c2lnbmF0dXJl"


PERSONAL = jwt({"token_type": "refresh", "exp": 8_000_000_000, "iat": 1_700_000_000})


def png_bytes(size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, "PNG")
    return file.getvalue()


def client_of(server: SmallServer, key: str = LEGACY, **options: Any) -> LabelStudio:
    return LabelStudio(server.url, key, **{"first_pause_s": 0.01, "timeout_s": 5.0, **options})


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    """Each answer once; the last one again and again."""
    left = list(answers)
    return lambda asked: left.pop(0) if len(left) > 1 else left[0]


# A real Label Studio


@pytest.fixture(scope="module")
def real(label_studio: LabelStudioServer) -> Iterator[LabelStudio]:
    with LabelStudio(label_studio.url, label_studio.token) as client:
        yield client


@pytest.fixture(scope="module")
def personal_token(label_studio: LabelStudioServer) -> str:
    headers = {"Authorization": f"Token {label_studio.token}"}
    with httpx.Client(base_url=label_studio.url, headers=headers) as http:
        answer = http.post("/api/token/", json={})
        answer.raise_for_status()
        return str(answer.json()["token"])


@pytest.fixture
def project_id(real: LabelStudio, request: pytest.FixtureRequest) -> int:
    return int(real.create_project(f"{request.node.name[:45]}", CONFIG)["id"])


@pytest.fixture
def backend() -> Iterator[SmallServer]:
    """A backend that takes every call and predicts nothing."""

    def answer(asked: Asked) -> Answer:
        if asked.path == "/predict":
            results = [{"result": [], "score": 0.5, "model_version": "v1"} for _ in asked.json["tasks"]]
            return as_json({"results": results, "model_version": "v1"})
        return as_json({"status": "UP", "model_class": "Small", "model_version": "v1"})

    with SmallServer(answer) as server:
        yield server


@pytest.mark.label_studio
class TestRealLabelStudio:
    def test_legacy_token_is_taken(self, real: LabelStudio, label_studio: LabelStudioServer) -> None:
        assert real.whoami()["email"] == label_studio.user
        assert real.version() == "1.23.2"

    def test_personal_token_is_taken_and_exchanged_once(
        self, label_studio: LabelStudioServer, personal_token: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with LabelStudio(label_studio.url, personal_token) as client:
            assert client.whoami()["email"] == label_studio.user
            access = client._access
            client.projects()
            assert client._access == access
            # An access token that the server does not know any more is renewed, and the call made again.
            client._access = jwt({"exp": 300, "iat": 0})
            assert client.whoami()["email"] == label_studio.user
        assert personal_token not in caplog.text
        assert access not in caplog.text

    def test_spoilt_personal_token_is_denied(self, label_studio: LabelStudioServer, personal_token: str) -> None:
        spoilt = personal_token[:-4] + "AAAA"
        with LabelStudio(label_studio.url, spoilt) as client, pytest.raises(LabelStudioDenied) as denied:
            client.whoami()
        assert "LABEL_STUDIO_API_KEY was refused" in str(denied.value)
        assert "401" in str(denied.value)
        assert spoilt not in str(denied.value)

    def test_unknown_legacy_token_is_denied(self, label_studio: LabelStudioServer) -> None:
        with LabelStudio(label_studio.url, LEGACY) as client, pytest.raises(LabelStudioDenied) as denied:
            client.projects()
        assert "Invalid token" in str(denied.value)
        assert LEGACY not in str(denied.value)

    def test_projects_are_found_by_exact_title(self, real: LabelStudio) -> None:
        made = real.create_project("roofs of Banepa", CONFIG, description="d")
        real.create_project("roofs of Banepa, second", CONFIG)
        assert [one["id"] for one in real.projects(title="roofs of Banepa")] == [made["id"]]
        assert len(real.projects()) >= 2
        assert real.update_project(made["id"], description="e")["description"] == "e"
        assert real.project(made["id"])["label_config"].split() == CONFIG.split()

    def test_missing_project_is_not_found(self, real: LabelStudio) -> None:
        with pytest.raises(NotFound, match=r"/api/projects/999999/.*404"):
            real.project(999999)

    def test_bad_config_tells_label_studios_reason(self, real: LabelStudio) -> None:
        with pytest.raises(LabelStudioError, match="label_config"):
            real.create_project("broken", "<View><Image name='i'/>")

    def test_tasks_come_back_page_by_page(self, real: LabelStudio, project_id: int) -> None:
        told: list[int] = []
        sent = [{"data": {"image": f"s3://bucket/{n}.png"}} for n in range(23)]
        ids = real.import_tasks(project_id, sent, batch=10, progress=told.append)
        assert len(set(ids)) == 23
        assert told == [10, 20, 23]
        for page_size in (5, 23, 100):
            came = list(real.tasks(project_id, page_size=page_size))
            assert [task["id"] for task in came] == ids
            assert [task["data"] for task in came] == [task["data"] for task in sent]

    def test_an_empty_project_has_no_tasks(self, real: LabelStudio, project_id: int) -> None:
        assert list(real.tasks(project_id)) == []
        assert list(real.tasks(project_id, only_annotated=True)) == []

    def test_tasks_deleted_while_paging_hide_no_others(
        self, real: LabelStudio, project_id: int, label_studio: LabelStudioServer
    ) -> None:
        ids = real.import_tasks(project_id, [{"data": {"image": f"http://x.org/{n}.png"}} for n in range(9)])
        seen = []
        for task in real.tasks(project_id, page_size=3):
            seen.append(task["id"])
            if task["id"] == ids[1]:
                headers = {"Authorization": f"Token {label_studio.token}"}
                httpx.delete(f"{label_studio.url}/api/tasks/{ids[0]}/", headers=headers).raise_for_status()
        assert seen == ids

    def test_annotations_are_made_found_and_deleted(self, real: LabelStudio, project_id: int) -> None:
        ids = real.import_tasks(project_id, [{"data": {"image": f"http://x.org/{n}.png"}} for n in range(4)])
        made = real.create_annotation(ids[2], [POLYGON], lead_time=1.5)
        real.create_annotation(ids[3], [], was_cancelled=True)
        annotated = list(real.tasks(project_id, only_annotated=True))
        assert [task["id"] for task in annotated] == [ids[2]]
        assert annotated[0]["annotations"][0]["result"][0]["value"] == POLYGON["value"]
        assert real.task(ids[2])["annotations"][0]["id"] == made["id"]
        real.delete_annotation(made["id"])
        real.delete_annotation(made["id"])
        assert list(real.tasks(project_id, only_annotated=True)) == []

    def test_import_error_tells_how_far_it_came(self, real: LabelStudio, project_id: int) -> None:
        tasks = [{"data": {"image": "http://x.org/a.png"}}, {"data": {"picture": "http://x.org/b.png"}}]
        with pytest.raises(LabelStudioError, match=r"\"image\" key is expected.*\(1 of 2 tasks were imported before\)"):
            real.import_tasks(project_id, tasks, batch=1)

    def test_predictions_are_counted(self, real: LabelStudio, project_id: int) -> None:
        [task_id] = real.import_tasks(project_id, [{"data": {"image": "http://x.org/a.png"}}])
        good = {"task": task_id, "result": [POLYGON], "score": 0.5, "model_version": "v1"}
        assert real.import_predictions(project_id, [good, good, good], batch=2) == 3
        assert len(real.task(task_id)["predictions"]) == 3
        bad = {"task": task_id, "result": [{**POLYGON, "from_name": "nothing"}], "model_version": "v1"}
        with pytest.raises(LabelStudioError, match="stored 1 of 3 predictions"):
            real.import_predictions(project_id, [good, bad, bad])

    def test_connecting_twice_adds_nothing(self, real: LabelStudio, project_id: int, backend: SmallServer) -> None:
        first = real.connect(project_id, backend.url, secret="s3cret", title="GeoPrelabel")
        again = real.connect(project_id, backend.url + "/", secret="s3cret", title="GeoPrelabel")
        assert first == again
        [hook] = real.webhooks(project_id)
        assert hook["headers"] == {SECRET_HEADER: "s3cret"}
        assert hook["url"] == f"{backend.url}/webhook"
        assert set(hook["actions"]) == set(WEBHOOK_ACTIONS)
        [joined] = real.ml_backends(project_id)
        assert (joined["state"], joined["is_interactive"]) == ("CO", True)

    def test_events_come_with_the_secret(self, real: LabelStudio, project_id: int, backend: SmallServer) -> None:
        [task_id] = real.import_tasks(project_id, [{"data": {"image": "http://x.org/a.png"}}])
        real.connect(project_id, backend.url, secret="s3cret", title="GeoPrelabel")
        real.create_annotation(task_id, [POLYGON])
        events = [asked for asked in backend.asked if asked.path == "/webhook"]
        assert [asked.json["action"] for asked in events] == ["ANNOTATION_CREATED"]
        assert {name.lower(): value for name, value in events[0].headers.items()}[SECRET_HEADER.lower()] == "s3cret"

    def test_connecting_mends_what_label_studio_made_itself(
        self, real: LabelStudio, project_id: int, backend: SmallServer
    ) -> None:
        made = real.connect_backend(project_id, backend.url, "by hand", is_interactive=False)
        [bare] = real.webhooks(project_id)
        assert bare["send_for_all_actions"]
        joined = real.connect(project_id, backend.url, secret="s", title="GeoPrelabel", basic_auth=("user", "pass"))
        assert (joined.backend_id, joined.webhook_id) == (made["id"], bare["id"])
        [hook] = real.webhooks(project_id)
        assert (hook["headers"], hook["send_for_all_actions"]) == ({SECRET_HEADER: "s"}, False)
        [now] = real.ml_backends(project_id)
        assert (now["title"], now["is_interactive"], now["auth_method"]) == ("GeoPrelabel", True, "BASIC_AUTH")
        expected = "Basic " + base64.b64encode(b"user:pass").decode()
        assert backend.asked[-1].headers["Authorization"] == expected

    def test_training_and_predictions_are_asked_of_the_backend(
        self, real: LabelStudio, project_id: int, backend: SmallServer
    ) -> None:
        ids = real.import_tasks(project_id, [{"data": {"image": f"http://x.org/{n}.png"}} for n in range(3)])
        joined = real.connect(project_id, backend.url, secret="s", title="GeoPrelabel")
        assert real.predict_tasks(project_id, ids[:2])["processed_items"] == 2
        [predict] = [asked for asked in backend.asked if asked.path == "/predict"]
        assert sorted(task["id"] for task in predict.json["tasks"]) == ids[:2]
        real.start_training(joined.backend_id)
        assert [asked.json["action"] for asked in backend.asked if asked.path == "/webhook"] == ["START_TRAINING"]

    def test_backend_that_refuses_the_config_is_quoted(self, real: LabelStudio, project_id: int) -> None:
        def answer(asked: Asked) -> Answer:
            return as_json({}, 500) if asked.path == "/setup" else as_json({"status": "UP"})

        with SmallServer(answer) as refusing, pytest.raises(LabelStudioError, match="500 Server Error") as refused:
            real.connect(project_id, refusing.url, title="GeoPrelabel")
        assert "<a" not in str(refused.value)

    def test_host_name_without_a_dot_is_explained(self, real: LabelStudio, project_id: int) -> None:
        with pytest.raises(LabelStudioError, match=r"http://backend:9090/webhook.*dot"):
            real.connect(project_id, "http://backend:9090", title="GeoPrelabel")
        assert real.ml_backends(project_id) == []

    def test_uploads_come_with_either_token(
        self, real: LabelStudio, label_studio: LabelStudioServer, personal_token: str, project_id: int
    ) -> None:
        content = png_bytes()
        url = f"{label_studio.url}/api/projects/{project_id}/import"
        headers = {"Authorization": f"Token {label_studio.token}"}
        httpx.post(url, files={"file": ("a.png", content)}, headers=headers).raise_for_status()
        [task] = real.tasks(project_id)
        path = task["data"]["image"]
        assert path.startswith("/data/upload/")
        assert real.get_file(path, max_bytes=10_000) == content
        assert real.get_file(label_studio.url + path, max_bytes=10_000) == content
        with LabelStudio(label_studio.url, personal_token) as other:
            assert other.get_file(path, max_bytes=10_000) == content
        with pytest.raises(FileTooLarge):
            real.get_file(path, max_bytes=len(content) - 1)

    def test_signed_link_of_a_storage_is_handed_on(
        self, real: LabelStudio, label_studio: LabelStudioServer, project_id: int
    ) -> None:
        listing = (
            b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
            b"<KeyCount>1</KeyCount><MaxKeys>1</MaxKeys><IsTruncated>false</IsTruncated><Contents><Key>k.png</Key>"
            b"<LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>1</Size></Contents></ListBucketResult>"
        )
        with SmallServer(lambda asked: Answer(200, listing, {"Content-Type": "application/xml"})) as store:
            body = {
                "project": project_id,
                "bucket": "b",
                "aws_access_key_id": "id",
                "aws_secret_access_key": "secret",
                "region_name": "us-east-1",
                "s3_endpoint": store.url,
                "presign": True,
                "use_blob_urls": True,
            }
            headers = {"Authorization": f"Token {label_studio.token}"}
            answer = httpx.post(f"{label_studio.url}/api/storages/s3/", json=body, headers=headers, timeout=30)
            assert answer.status_code == 201, answer.text
            [task_id] = real.import_tasks(project_id, [{"data": {"image": "s3://b/k.png"}}])
            got = real.resolve(task_id, "s3://b/k.png", max_bytes=1000)
            assert isinstance(got, Elsewhere)
            assert got.url.startswith(f"{store.url}/b/k.png?")
            with pytest.raises(NotFound):
                real.resolve(task_id, "s3://elsewhere/k.png", max_bytes=1000)


# A server that is busy, broken or not Label Studio


@pytest.mark.parametrize(
    "refusal",
    [
        as_json({"detail": "slow down"}, 429, Retry_After="0"),
        as_json({"detail": "busy"}, 503),
        Answer(502, b"<html><title>502 Bad Gateway</title></html>"),
        as_json({"detail": "database is locked"}, 500),
    ],
)
def test_a_busy_server_is_asked_again(refusal: Answer) -> None:
    with SmallServer(in_turn(refusal, refusal, as_json({"id": 7}))) as server, client_of(server) as client:
        assert client.project(7) == {"id": 7}
        assert len(server.asked) == 3


def test_retry_after_is_waited_for() -> None:
    answers = in_turn(as_json({}, 429, Retry_After="1"), as_json({"id": 7}))
    with SmallServer(answers) as server, client_of(server) as client:
        began = time.monotonic()
        client.project(7)
        assert 1.0 <= time.monotonic() - began < 5.0


def test_a_locked_database_does_not_lose_an_import() -> None:
    answers = in_turn(as_json({"detail": "database is locked"}, 500), as_json({"task_ids": [1, 2]}, 201))
    with SmallServer(answers) as server, client_of(server) as client:
        assert client.import_tasks(1, [{"data": {}}, {"data": {}}]) == [1, 2]


def test_patience_ends() -> None:
    with SmallServer(lambda asked: as_json({"detail": "busy"}, 503)) as server, client_of(server, attempts=3) as client:
        with pytest.raises(LabelStudioError, match=r"/api/projects/7/ failed \(503: busy\)"):
            client.project(7)
        assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_clear_answer_is_not_asked_for_again(status: int) -> None:
    answer = as_json({"detail": "no", "validation_errors": {"title": ["too short"]}}, status)
    with SmallServer(lambda asked: answer) as server, client_of(server) as client:
        with pytest.raises(LabelStudioError, match=f"{status}: no; title: too short"):
            client.create_project("x", CONFIG)
        assert len(server.asked) == 1


@pytest.mark.parametrize("answer", [Answer(200, b'{"task_ids": [1', promised=500), Answer(504, b"")])
def test_a_call_that_may_have_been_carried_out_is_not_sent_again(answer: Answer) -> None:
    with SmallServer(lambda asked: answer) as server, client_of(server) as client:
        with pytest.raises(LabelStudioError):
            client.import_tasks(1, [{"data": {}}])
        assert len(server.asked) == 1


def test_half_an_answer_to_a_question_is_asked_for_again() -> None:
    answers = in_turn(Answer(200, b'{"id"', promised=500), as_json({"id": 7}))
    with SmallServer(answers) as server, client_of(server) as client:
        assert client.project(7) == {"id": 7}


def test_a_slow_server_ends_in_a_sentence() -> None:
    def answer(asked: Asked) -> Answer:
        time.sleep(0.5)
        return as_json({})

    with (
        SmallServer(answer) as server,
        client_of(server, timeout_s=0.1, attempts=2) as client,
        pytest.raises(LabelStudioError, match=r"no whole answer \(ReadTimeout"),
    ):
        client.project(7)


def test_nobody_there_names_the_address() -> None:
    with SmallServer(lambda asked: Answer()) as server:
        port = server.port
    with (
        LabelStudio(f"http://127.0.0.1:{port}", LEGACY, first_pause_s=0.01, attempts=2) as client,
        pytest.raises(LabelStudioError, match=rf"127.0.0.1:{port} cannot be reached .*LABEL_STUDIO_URL"),
    ):
        client.whoami()


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[1]", b'"text"', b"null", b"\xff\xfe"])
def test_an_answer_of_another_kind_is_an_error(body: bytes) -> None:
    with SmallServer(lambda asked: Answer(200, body)) as server, client_of(server) as client:
        with pytest.raises(LabelStudioError, match="/api/projects/"):
            client.project(7)
        with pytest.raises(LabelStudioError, match="/api/tasks/"):
            list(client.tasks(7))


def test_a_server_that_ignores_the_filter_does_not_page_for_ever() -> None:
    with SmallServer(lambda asked: as_json({"tasks": [{"id": 1}, {"id": 2}]})) as server, client_of(server) as client:
        with pytest.raises(LabelStudioError, match="order and filter"):
            list(client.tasks(7))
        assert len(server.asked) == 2


def test_fewer_ids_than_tasks_is_an_error() -> None:
    with (
        SmallServer(lambda asked: as_json({"import": 5}, 201)) as server,
        client_of(server) as client,
        pytest.raises(LabelStudioError, match="ids of 0 tasks, 2 were sent"),
    ):
        client.import_tasks(1, [{"data": {}}, {"data": {}}])


def test_refused_private_address_names_the_settings() -> None:
    detail = {"detail": "URL resolves to a reserved network address (block: 127.0.0.0/8)"}
    with (
        SmallServer(in_turn(as_json([]), as_json(detail, 403))) as server,
        client_of(server) as client,
        pytest.raises(LabelStudioError, match=r"ML_BLOCK_LOCAL_IP=false and\s+SSRF_PROTECTION_ENABLED=false"),
    ):
        client.connect(1, "http://127.0.0.1:9090")


# The token


@pytest.mark.parametrize("key", [LEGACY, PERSONAL])
def test_the_token_does_not_follow_a_redirect(key: str) -> None:
    def exchange_or(answer: Callable[[Asked], Answer]) -> Callable[[Asked], Answer]:
        access = jwt({"exp": 300, "iat": 0})
        return lambda asked: as_json({"access": access}) if "refresh" in asked.path else answer(asked)

    with SmallServer(lambda asked: as_json({"id": 7})) as other:
        target = f"{other.url}/x?signature=hush"
        with (
            SmallServer(exchange_or(lambda asked: Answer(302, headers={"Location": target}))) as server,
            client_of(server, key) as client,
        ):
            with pytest.raises(LabelStudioError, match=f"redirects to {other.url}/x; set LABEL_STUDIO_URL"):
                client.project(7)
            assert client.get_file("/data/upload/1/a.png", max_bytes=100) == Elsewhere(target)
        assert other.asked == []


def test_redirects_on_label_studios_own_address_keep_the_token() -> None:
    answer = in_turn(Answer(301, headers={"Location": "/data/upload/a/"}), Answer(200, b"a"))
    with SmallServer(answer) as server, client_of(server) as client:
        assert client.get_file("/data/upload/a", max_bytes=10) == b"a"
        assert [asked.headers["Authorization"] for asked in server.asked] == [f"Token {LEGACY}"] * 2


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/a",
        "//example.org/a",
        "http://127.0.0.1.example.org/a",
        "https://127.0.0.1/a",
        "ftp://127.0.0.1/a",
        "a/b",
        "http://[",
    ],
)
def test_the_token_goes_to_no_other_address(address: str) -> None:
    with SmallServer(lambda asked: Answer(200, b"a")) as server, client_of(server) as client:
        with pytest.raises(LabelStudioError):
            client.get_file(address, max_bytes=10)
        assert server.asked == []


@pytest.mark.parametrize("key", [LEGACY, PERSONAL])
def test_no_message_and_no_log_holds_the_token(key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    access = jwt({"exp": 300, "iat": 0, "jti": "x"})
    echo = as_json({"detail": f"you sent {key} and {access}"}, 400)
    answers = [echo, as_json({}, 503), as_json({"detail": key}, 401), as_json({"detail": access}, 403), Answer(200)]
    for answer in answers:

        def reply(asked: Asked, answer: Answer = answer) -> Answer:
            return as_json({"access": access}) if "refresh" in asked.path else answer

        with SmallServer(reply) as server, client_of(server, key, attempts=2) as client:
            with pytest.raises(LabelStudioError) as failed:
                client.projects()
            assert key not in repr(client)
        for text in (str(failed.value), repr(failed.value), caplog.text):
            assert key not in text
            assert access not in text


def test_backend_password_is_not_repeated() -> None:
    answer = as_json({"validation_errors": ["Can't connect to http://user:hush@host:9090"]}, 400)
    with (
        SmallServer(lambda asked: answer) as server,
        client_of(server) as client,
        pytest.raises(LabelStudioError) as failed,
    ):
        client.connect_backend(1, "http://user:hush@host:9090", "t")
    assert "hush" not in str(failed.value)


def test_access_tokens_are_renewed_before_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [jwt({"exp": 300, "iat": 0, "jti": str(n)}) for n in range(3)]
    exchanged: list[Asked] = []

    def answer(asked: Asked) -> Answer:
        if "refresh" not in asked.path:
            return as_json({"id": 7})
        exchanged.append(asked)
        return as_json({"access": given[len(exchanged) - 1]})

    now_s = [1000.0]
    monkeypatch.setattr("backend.client.time.monotonic", lambda: now_s[0])
    with SmallServer(answer) as server, client_of(server, PERSONAL) as client:
        for now_s[0], times in ((1000.0, 1), (1260.0, 1), (1275.0, 2)):
            client.project(7)
            assert len(exchanged) == times
        assert server.asked[-1].headers["Authorization"] == f"Bearer {given[1]}"
    assert all(asked.json == {"refresh": PERSONAL} and "Authorization" not in asked.headers for asked in exchanged)


def test_a_token_refused_twice_is_not_exchanged_for_ever() -> None:
    def answer(asked: Asked) -> Answer:
        if "refresh" in asked.path:
            return as_json({"access": jwt({"exp": 300, "iat": 0})})
        return as_json({"detail": "no"}, 401)

    with SmallServer(answer) as server, client_of(server, PERSONAL) as client:
        with pytest.raises(LabelStudioDenied):
            client.whoami()
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("url", "key", "expected"),
    [
        ("", LEGACY, "LABEL_STUDIO_URL"),
        ("localhost:8080", LEGACY, "LABEL_STUDIO_URL"),
        ("ftp://host", LEGACY, "LABEL_STUDIO_URL"),
        ("http://user:hush@host", LEGACY, "must not hold a user"),
        ("http://host", "two words", "LABEL_STUDIO_API_KEY"),
        ("http://host", "brëak", "LABEL_STUDIO_API_KEY"),
    ],
)
def test_unusable_settings_are_refused_at_once(url: str, key: str, expected: str) -> None:
    with pytest.raises(LabelStudioError, match=expected) as refused:
        LabelStudio(url, key)
    assert "hush" not in str(refused.value)
    assert key not in str(refused.value)


def test_without_a_token_only_the_version_is_asked_for() -> None:
    with SmallServer(lambda asked: as_json({"release": "1.23.2"})) as server, client_of(server, "") as client:
        assert client.version() == "1.23.2"
        with pytest.raises(LabelStudioDenied, match="LABEL_STUDIO_API_KEY is not set"):
            client.whoami()
        assert len(server.asked) == 1


def test_label_studio_below_a_path() -> None:
    with SmallServer(lambda asked: as_json({"id": 7})) as server:
        with LabelStudio(f"{server.url}/label-studio/", LEGACY) as client:
            client.project(7)
            client.get_file("/data/upload/1/a.png", max_bytes=100)
            client.get_file("/label-studio/data/upload/1/a.png", max_bytes=100)
        assert [asked.path for asked in server.asked] == [
            "/label-studio/api/projects/7/",
            "/label-studio/data/upload/1/a.png",
            "/label-studio/data/upload/1/a.png",
        ]


# Starting Label Studio


def venv_with(script: str, folder: Path) -> Path:
    command = folder / "bin" / "label-studio"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    return folder


def test_a_label_studio_that_dies_shows_its_log(tmp_path: Path) -> None:
    server = LabelStudioServer(venv_with("echo no room on the disk; exit 3", tmp_path / "venv"), tmp_path / "data")
    with pytest.raises(LabelStudioFailed, match=r"ended with 3:\n[\s\S]*no room on the disk"):
        server.start()
    assert not server.is_running
    server.stop()


def test_stopping_takes_the_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.label_studio._START_TIMEOUT_S", 1.0)
    script = f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; wait"
    monkeypatch.setattr("demo.label_studio._STOP_TIMEOUT_S", 0.2)
    with pytest.raises(LabelStudioFailed, match="did not answer within 1 s"):
        LabelStudioServer(venv_with(script, tmp_path / "venv"), tmp_path / "data").start()
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        # Dead, but not yet collected by whoever inherited it.
        if Path(f"/proc/{child}/stat").exists() and ") Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.02)
    pytest.fail("the child outlived Label Studio")


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with (
        SmallServer(lambda asked: Answer(200, b"{}")) as taken,
        pytest.raises(LabelStudioFailed, match=f"port {taken.port} cannot be had"),
    ):
        LabelStudioServer(venv_with("sleep 600", tmp_path / "venv"), tmp_path / "data", taken.port).start()
