"""Log lines: each names its request, JSON where that is asked for, and no secret in any of them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from backend import logs
from backend.flight import Claim, FairPool, SingleFlight
from backend.settings import Settings
from demo.backend import BackendServer
from demo.label_studio import free_port

TOKEN = "0123456789abcdef0123456789abcdef01234567"
CONFIG = """<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i"><Label value="building"/>
</PolygonLabels></View>"""
TASK = {"id": 1, "data": {"image": "http://127.0.0.1:1/missing.png"}}


def asked(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, bytes]:
    """Status, id of the request, and body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **named})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers[logs.REQUEST_HEADER], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers[logs.REQUEST_HEADER], error.read()


def written(style: str, work: Any, hidden: tuple[str, ...] = ()) -> str:
    """What a logger writes while ``work`` is called with it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines(hidden) if style == "json" else logs.Lines(hidden))
    logger = logging.getLogger("tests.logging")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        work(logger)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1.2_3", True), ("a" * 64, True), ("a" * 65, False), ("", False), (None, False), ("a b", False),
     ("a\nlevel=error", False), ("-a", False), ("é", False), ('{"a":1}', False)],
)  # fmt: skip
def test_an_id_that_is_fit_for_a_log_is_kept(given: str | None, is_kept: bool):
    identity = logs.request_id_of(given)
    assert (identity == given) == is_kept
    assert re.fullmatch(r"[\w.-]{1,64}", identity)


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_line_has_its_trace_and_no_secret(style: str):
    def work(logger: logging.Logger) -> None:
        try:
            raise ValueError(f"refused Token {TOKEN}\nby postgresql://u:hunter22@h/n")
        except ValueError:
            logger.exception("asking with %s failed", TOKEN)

    text = written(style, work, (TOKEN, "hunter22", "x"))
    assert TOKEN not in text
    assert "hunter22" not in text
    assert "ValueError" in text
    if style == "json":
        (line,) = text.splitlines()
        assert json.loads(line)["message"] == "asking with … failed"


def test_settings_name_all_their_secrets():
    settings = Settings(
        label_studio_api_key=TOKEN, webhook_secret="a-webhook-secret", basic_auth_user="user",
        basic_auth_pass="pass-word", database_url="postgresql://u:hunter22@h/n", mlflow_tracking_uri="http://me:sesame77@mlflow:5000",
    )  # fmt: skip
    assert {TOKEN, "a-webhook-secret", "pass-word", "hunter22", "sesame77"} <= settings.secrets
    assert "" not in settings.secrets


def test_work_handed_to_other_threads_keeps_the_requests_id():
    pool, flights, seen = FairPool(2, name="t"), SingleFlight[str](), []
    logs.request_id.set("r-1")
    future = pool.submit("a", logs.request_id.get)
    seen.append(flights.do("k", logs.request_id.get, claim=Claim()))
    logs.request_id.set("")
    assert [future.result(10), *seen] == ["r-1", "r-1"]
    assert pool.submit("a", logs.request_id.get).result(10) == ""
    pool.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two server processes that write JSON, what they answered to some requests, and what they wrote."""
    folder = tmp_path_factory.mktemp("served")
    secrets = {"LABEL_STUDIO_API_KEY": TOKEN, "GEOPRELABEL_WEBHOOK_SECRET": "sesame-open-up"}
    studio = f"http://127.0.0.1:{free_port()}"
    backend = BackendServer(
        folder, LOG_FORMAT="json", WORKERS="2", THREADS="4", LABEL_STUDIO_URL=studio, OMP_NUM_THREADS="1",
        GEOPRELABEL_IMAGE_HOSTS="127.0.0.1", **secrets,
    )  # fmt: skip
    answers = {}
    with backend:
        body = {"tasks": [TASK, {**TASK, "id": 2}], "project": "7.1", "label_config": CONFIG}
        answers["batch"] = asked(backend.url, "/predict", body, X_Request_ID="batch-1")
        answers["bad"] = asked(backend.url, "/predict?token=" + TOKEN, {"tasks": 1})
        answers["none"] = asked(backend.url, "/no/such")
        answers["refused"] = asked(backend.url, "/webhook", {"action": "X"}, X_GeoPrelabel_Secret=TOKEN)
        deadline = time.monotonic() + 60
        while b"geoprelabel_ready 1.0" not in asked(backend.url, "/metrics")[2] and time.monotonic() < deadline:
            time.sleep(0.2)
        metrics = [asked(backend.url, "/metrics")[2].decode() for _ in range(8)]
        master = backend._process.pid
        shared = list(Path(tempfile.gettempdir()).glob(f"geoprelabel-metrics-{master}-*"))
        assert len(shared) == 1
    assert not shared[0].exists()
    return answers, [json.loads(line) for line in backend.log.read_text().splitlines()], metrics


def test_every_line_is_json_and_of_every_request_there_is_one(served: Any):
    answers, lines, _ = served
    assert {"time", "level", "logger", "message", "pid"} <= set.intersection(*(set(line) for line in lines))
    access = {line["request_id"]: line for line in lines if line["logger"] == "gunicorn.access"}
    for name, path in {"batch": "/predict", "bad": "/predict", "none": "/no/such", "refused": "/webhook"}.items():
        status, identity, _ = answers[name]
        assert (access[identity]["path"], access[identity]["status"]) == (path, status)
        assert access[identity]["seconds"] >= 0
    assert [answers[name][0] for name in ("batch", "bad", "none", "refused")] == [200, 400, 404, 401]
    assert answers["batch"][1] == "batch-1"
    assert len(access) >= 12


def test_what_is_logged_for_a_request_names_it_in_whichever_thread(served: Any):
    _, lines, _ = served
    problems = [line for line in lines if line["logger"] == "backend.problems"]
    of_batch = [line for line in problems if line.get("request_id") == "batch-1"]
    assert len(of_batch) == 2
    assert all("missing.png" in line["message"] for line in of_batch)


def test_no_line_holds_a_secret(served: Any):
    _, lines, metrics = served
    for text in (json.dumps(lines), *metrics):
        assert TOKEN not in text
        assert "sesame" not in text


def test_the_figures_of_all_processes_are_the_same_whichever_answers(served: Any):
    _, _, texts = served
    for text in texts:
        assert 'geoprelabel_tasks_total{kind="batch",outcome="failed"} 2.0' in text
        assert "pid=" not in text
    ready = [re.findall(r"^geoprelabel_ready (\S+)$", text, re.MULTILINE) for text in texts]
    assert ready == [["1.0"]] * len(texts)
    (memory,) = {len(re.findall(r"^geoprelabel_resident_memory_bytes ", text, re.MULTILINE)) for text in texts}
    assert memory == 1


def test_what_a_killed_server_left_is_removed_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from backend import cli

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone, alive = tmp_path / "geoprelabel-metrics-99999999-a", tmp_path / f"geoprelabel-metrics-{os.getpid()}-b"
    for folder in (gone, alive):
        folder.mkdir()
        (folder / "counter_1.db").write_bytes(b"x")
    with cli._metrics_folder() as folder:
        assert folder.is_dir()
        assert not gone.exists()
        assert alive.exists()
    assert not folder.exists()
