"""A whole session with marked secrets, and where they must not turn up: logs, pages, metrics, errors, files."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backend.boxes import LastBoxes
from backend.embeddings import EmbeddingFiles, EmbeddingKey
from backend.errors import BackendError, RegistryError
from backend.jobs import Jobs
from backend.journal import Journal
from backend.problems import Problems
from backend.registry import Registry
from backend.segmenter import Embedding
from backend.settings import BadSettings, Settings
from tests.small_label_studio import CONFIG as STUDIO_CONFIG
from tests.small_label_studio import CREATED, NUMBER, PROJECT, SmallLabelStudio
from tests.small_server import Answer, Asked, SmallServer, as_json

from .conftest import CLICK, PNG, Backend, start, stop

MARKED = {
    "LABEL_STUDIO_API_KEY": "MARKED1token5ecre7c0ffee0042",
    "BASIC_AUTH_PASS": "MARKED2-password-of-the-session",
    "GEOPRELABEL_WEBHOOK_SECRET": "MARKED3-secret-of-the-webhooks",
}
PERSONAL = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=")
    for part in (b'{"alg":"HS256"}', b'{"token_type":"refresh"}', b"MARKED4signature")
)
IN_ADDRESS = "MARKED5-in-an-address"
LEAKS = ("MARKED", base64.b64encode(b"geo:MARKED2-password-of-the-session").decode(), PERSONAL)


def leaks_in(folder: Path) -> list[str]:
    """Files below a folder that hold a secret: logs, journal, problems, MLflow's database, everything."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and "given-secrets" not in path.parts:
            content = path.read_bytes()
            found += [f"{path}: {leak}" for leak in LEAKS if leak.encode() in content]
    return found


@pytest.mark.parametrize("token", [MARKED["LABEL_STUDIO_API_KEY"], PERSONAL], ids=["legacy token", "personal token"])
def test_no_secret_leaves_the_settings(tmp_path: Path, token: str):
    """Push, predict, train, and everything that goes wrong, with secrets from files; then everything is searched."""
    given = tmp_path / "given-secrets"
    given.mkdir()
    environment = {}
    for name, secret in {**MARKED, "LABEL_STUDIO_API_KEY": token}.items():
        (given / name).write_text(f"{secret}\n")
        environment[f"{name}_FILE"] = str(given / name)
    refusing = [False]

    def fault(asked: Asked) -> Answer | None:
        if asked.path == "/api/token/refresh/":
            claims = base64.urlsafe_b64encode(b'{"exp": 300, "iat": 0}').decode().rstrip("=")
            return as_json({"access": f"MARKED6.{claims}.x"})
        assert asked.headers.get("Authorization", "").split(" ")[-1].startswith((token, "MARKED6")), asked
        if refusing[0]:
            # A server that says the token aloud in its error.
            return as_json({"detail": f"Invalid token {asked.headers['Authorization']}"}, 401)
        return None

    with SmallLabelStudio(2) as studio, SmallServer(lambda asked: Answer(200, PNG)) as bait:
        studio.fault = fault
        backend = start(
            tmp_path / "session",
            bait,
            ports=[studio.server.port],
            token=False,
            LABEL_STUDIO_URL=studio.server.url,
            BASIC_AUTH_USER="geo",
            LOG_LEVEL="DEBUG",
            **environment,
        )
        try:
            answers = session(backend, studio, refusing)
        finally:
            stop(backend)
        (tmp_path / "tasks.json").write_text(json.dumps([{"id": 1, "data": {"image": "/data/upload/3/1.png"}}]))
        program = "from backend import cli, training; training._STEPS = 2; cli.main()"
        commands = (
            ["push", str(tmp_path / "tasks.json"), "--project", str(NUMBER)],
            ["doctor"],
            ["train", "--project", str(NUMBER)],
        )
        # Starting a program costs seconds, and both kinds of token take the same way in it.
        for command in () if token == PERSONAL else commands:
            done = subprocess.run(
                [sys.executable, "-c", program, *command],
                capture_output=True,
                text=True,
                timeout=300,
                env={
                    **os.environ,
                    **environment,
                    "LABEL_STUDIO_URL": studio.server.url,
                    "BASIC_AUTH_USER": "geo",
                    "GEOPRELABEL_DATA_DIR": str(tmp_path / "session" / "data"),
                },
            )
            answers.append(done.stdout + done.stderr)
        if token != PERSONAL:
            settings = Settings(data_dir=tmp_path / "session" / "data")
            assert Jobs(settings).run(PROJECT).state == "done", (Jobs(settings).run(PROJECT), answers[-1])
            (trained,) = Registry(settings).versions(PROJECT)
            assert trained.run_id
    assert leaks_in(tmp_path) == []
    assert [answer for answer in answers if any(leak in answer for leak in LEAKS)] == []
    assert backend.offences() == []


def session(backend: Backend, studio: SmallLabelStudio, refusing: list[bool]) -> list[str]:
    """What the server answers to everything that a session holds, headers included."""
    password = {"Authorization": "Basic " + base64.b64encode(f"geo:{MARKED['BASIC_AUTH_PASS']}".encode()).decode()}
    secret = {"X-GeoPrelabel-Secret": MARKED["GEOPRELABEL_WEBHOOK_SECRET"]}
    answers = []

    def ask(method: str, path: str, body: object = None, headers: dict[str, str] = password) -> int:
        answer = backend.ask(method, path, body, headers)
        answers.append(f"{answer.reason} {answer.headers} {answer.body.decode()}")
        return answer.status

    def predict(image: str, context: object = None) -> int:
        task = {"id": 1, "data": {"image": image}}
        body = {
            "tasks": [task],
            "project": PROJECT,
            "label_config": STUDIO_CONFIG,
            "params": {"context": context, "login": "geo", "password": MARKED["BASIC_AUTH_PASS"]},
        }
        return ask("POST", "/predict", body)

    assert (
        ask(
            "POST",
            "/setup",
            {"project": PROJECT, "schema": STUDIO_CONFIG, "access_token": MARKED["LABEL_STUDIO_API_KEY"]},
        )
        == 200
    )
    assert predict("/data/upload/3/1.png") == 200
    assert predict("/data/upload/3/1.png", {"result": [CLICK]}) == 200
    event = {
        "action": "ANNOTATION_CREATED",
        "project": {"id": NUMBER, "created_at": CREATED, "label_config": STUDIO_CONFIG},
        "task": studio.tasks[1],
        "annotation": studio.tasks[1]["annotations"][0],
    }
    assert ask("POST", "/webhook", event, secret) == 201
    assert (
        ask("POST", "/webhook", {"action": "START_TRAINING", "project": {"id": NUMBER, "created_at": CREATED}}) == 201
    )
    # What goes wrong.
    assert ask("POST", "/webhook", event, {"X-GeoPrelabel-Secret": MARKED["GEOPRELABEL_WEBHOOK_SECRET"] + "x"}) == 401
    assert (
        ask("GET", "/status", None, {"Authorization": "Basic " + base64.b64encode(b"geo:MARKED7-a-wrong-one").decode()})
        == 401
    )
    assert predict(f"http://user:{IN_ADDRESS}@127.0.0.1:1/a.png", {"result": [CLICK]}) == 403
    assert predict(f"http://127.0.0.1:1/a.png?X-Amz-Signature={IN_ADDRESS}", {"result": [CLICK]}) == 403
    assert ask("POST", "/predict", {"tasks": MARKED["BASIC_AUTH_PASS"]}) == 400
    assert ask("POST", "/setup", b"{") == 400
    refusing[0] = True
    assert predict("/data/upload/3/2.png", {"result": [CLICK]}) == 502
    assert predict("/data/upload/3/2.png") == 200
    refusing[0] = False
    time.sleep(0.3)
    for path in ("/status", "/metrics", "/versions", "/openapi.json", "/nowhere", "/"):
        ask("GET", path)
    ask("GET", "/status", None, {**password, "Accept": "text/html"})
    return answers


# --- Secrets from files ---


def test_a_secret_in_a_file_counts_like_one_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = {
        "LABEL_STUDIO_API_KEY": "label_studio_api_key",
        "BASIC_AUTH_PASS": "basic_auth_pass",
        "GEOPRELABEL_WEBHOOK_SECRET": "webhook_secret",
        "GEOPRELABEL_DATABASE_URL": "database_url",
        "GEOPRELABEL_TILES_SECRET": "tiles_secret",
    }
    (tmp_path / "uri").write_text("http://me:sesame77@mlflow:5000\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI_FILE", str(tmp_path / "uri"))
    monkeypatch.setenv("BASIC_AUTH_USER", "geo")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        (tmp_path / name).write_text(f"  of {name}\n\n")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    settings = Settings.from_environment()
    assert {name: getattr(settings, field).get_secret_value() for name, field in names.items()} == {
        name: f"of {name}" for name in names
    }
    assert "of " not in repr(settings)
    assert settings.mlflow_tracking_uri == "http://me:sesame77@mlflow:5000"
    assert "sesame77" in settings.secrets


def test_a_registry_that_refuses_is_one_sentence_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that what the registry sets is gone afterwards
    refused = as_json({"error_code": "INVALID_PARAMETER_VALUE", "message": "not today"}, 400)
    with SmallServer(lambda asked: refused) as mlflow:
        uri = mlflow.url.replace("//", "//me:MARKED%408@")
        (tmp_path / "uri").write_text(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI_FILE", str(tmp_path / "uri"))
        with pytest.raises(RegistryError, match="not today") as told:
            Registry(Settings.from_environment(data_dir=tmp_path)).versions()
        given = {asked.headers.get("Authorization", "") for asked in mlflow.asked}
    assert given == {"Basic " + base64.b64encode(b"me:MARKED@8").decode()}
    assert "MARKED" not in f"{told.value} {told.value.__cause__}"
    assert "\n" not in str(told.value)


def test_every_secret_setting_can_come_from_a_file():
    secret = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert {"label_studio_api_key", "basic_auth_pass", "webhook_secret", "database_url"} <= secret


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"", "0 bytes"),
        (b"  \n", "3 bytes"),
        (b"MARKED\xff", "UTF-8"),
        (b"MARKED" * 20_000, "nothing else"),
    ],
)
def test_a_file_without_a_secret_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, told: str
):
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    monkeypatch.setenv("GEOPRELABEL_WEBHOOK_SECRET_FILE", str(tmp_path / "secret"))
    with pytest.raises(BadSettings, match=f"GEOPRELABEL_WEBHOOK_SECRET_FILE.*{told}") as refused:
        Settings.from_environment()
    assert "MARKED" not in str(refused.value)
    assert refused.value.__cause__ is None or "MARKED" not in str(refused.value.__cause__)


@pytest.mark.parametrize(
    "environment",
    [
        {"GEOPRELABEL_WEBHOOK_SECRET": "MARKED", "GEOPRELABEL_WEBHOOK_SECRET_FILE": "/x"},
        {"LABEL_STUDIO_ACCESS_TOKEN": "MARKED", "LABEL_STUDIO_API_KEY_FILE": "/x"},
        {"BASIC_AUTH_PASS": "MARKED"},
        {"BASIC_AUTH_USER": "geo"},
        {"LABEL_STUDIO_URL": "ftp://user:MARKED@host"},
        {"PORT": "MARKED", "BASIC_AUTH_PASS": "MARKED"},
    ],
)
def test_settings_that_contradict_each_other_are_refused_without_saying_the_secret(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as refused:
        Settings.from_environment()
    assert "MARKED" not in str(refused.value) + repr(refused.value.__cause__)


# --- Files that were swapped for pickles and worse ---


class Owned:
    def __reduce__(self) -> object:
        return os.mkdir, ("/tmp/geoprelabel-was-owned",)


PICKLE = pickle.dumps(Owned())
DAMAGE = {
    "a pickle": PICKLE,
    "nothing": b"",
    "zeros": bytes(100),
    "yaml": b"!!python/object/apply:os.system ['true']",
    "a header of 2^63 bytes": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "a long header": (10**8).to_bytes(8, "little") + b"{",
    "deep JSON": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a folder": None,
}


@pytest.fixture
def owned() -> Iterator[Path]:
    mark = Path("/tmp/geoprelabel-was-owned")
    yield mark
    assert not mark.exists()


def damage(path: Path, content: bytes | None) -> None:
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_cached_embedding_that_is_something_else_is_a_miss(tmp_path: Path, owned: Path, name: str):
    files, key = EmbeddingFiles(tmp_path, 10**7), EmbeddingKey("ab", "w")
    files.put(key, Embedding({"a": np.zeros((2, 2), np.float32)}, (2, 2), "w"))
    damage(files._path(key), DAMAGE[name])
    assert files.get(key) is None


@pytest.mark.parametrize("name", DAMAGE)
def test_a_remembered_box_that_is_something_else_is_none(tmp_path: Path, owned: Path, name: str):
    boxes = LastBoxes(tmp_path)
    boxes.remember("1", 1, {"id": "b", "value": {"x": 0, "y": 0, "width": 9, "height": 9}})
    damage(boxes._path("1", 1), DAMAGE[name])
    assert boxes.with_box("1", 1, [CLICK]) is None


@pytest.mark.parametrize("name", DAMAGE)
def test_problems_that_are_something_else_are_none(tmp_path: Path, owned: Path, name: str):
    problems = Problems(tmp_path)
    problems.add("a", "b")
    damage(tmp_path / "problems.jsonl", DAMAGE[name])
    assert problems.recent() == []
    problems.add("a", "b\ud800")


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "nothing"])
def test_a_journal_that_is_something_else_is_said(tmp_path: Path, owned: Path, name: str):
    damage_at = tmp_path / "journal.sqlite3"
    damage_at.touch()
    damage(damage_at, DAMAGE[name])
    journal = Journal(Settings(data_dir=tmp_path))
    with pytest.raises(BackendError):
        list(journal.tasks("1"))
    journal.note("1", {"action": "ANNOTATION_CREATED"})
    assert journal.has_missed


@pytest.mark.parametrize("name", DAMAGE)
def test_weights_that_are_something_else_are_refused(tmp_path: Path, owned: Path, name: str):
    from backend.compact import CompactSegmenter
    from backend.errors import BadWeights

    path = tmp_path / "heads.safetensors"
    path.touch()
    damage(path, DAMAGE[name])
    segmenter = CompactSegmenter.load()
    with pytest.raises(BadWeights):
        segmenter.with_heads(path)
