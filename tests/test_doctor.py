"""The doctor beside a real Label Studio and a real backend, each set-up broken in turn; and alone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import pytest
from typer.testing import CliRunner

from backend import cli, doctor
from backend.client import SECRET_HEADER, WEBHOOK_ACTIONS, LabelStudio
from backend.doctor import Check
from backend.push import push
from backend.settings import Settings
from demo.backend import REPOSITORY, BackendServer
from demo.label_studio import LabelStudioServer, free_port
from tests.fakes import BrightSegmenter, bright_image
from tests.small_server import Answer, SmallServer, as_json

CONFIG = (REPOSITORY / "configs" / "buildings.xml").read_text()
SECRET = "a secret of the test"


def checks(listed: Any, name: str) -> list[Check]:
    return [check for check in listed if check.name == name]


def states(looked: Any) -> dict[str, set[str]]:
    listed = list(looked)
    return {check.name: {other.state for other in listed if other.name == check.name} for check in listed}


# --- This machine ---


def test_without_label_studio_this_machine_is_checked_all_the_same(tmp_path: Path, one_torch_thread: None):
    environment = {"GEOPRELABEL_DATA_DIR": str(tmp_path / "data"), "PORT": str(free_port()), "LABEL_STUDIO_URL": ""}
    result = CliRunner().invoke(cli.app, ["doctor"], env=environment)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split(":")[0].split(maxsplit=1) for line in lines] == [
        ["ok", "data folder"], ["ok", "disk"], ["ok", "port"], ["ok", "model"], ["ok", "model versions"],
        ["ok", "journal"], ["warn", "Label Studio"],
    ]  # fmt: skip
    assert "LABEL_STUDIO_URL" in lines[-1]
    # Looking changes nothing.
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    (check,) = doctor._guarded("data folder", lambda: doctor._folder(tmp_path / "file" / "data"))
    assert check.state == "fail"
    assert "GEOPRELABEL_DATA_DIR" in check.remedy
    monkeypatch.setattr(doctor, "LEAST_FREE_MB", 1e12)
    (check,) = doctor._disk(tmp_path)
    assert check.state == "fail"


def test_what_is_set_has_to_be_there(tmp_path: Path):
    settings = Settings(
        data_dir=tmp_path, local_files_document_root=tmp_path / "none", dask_scheduler=f"tcp://127.0.0.1:{free_port()}"
    )
    assert states(doctor._others(settings)) == {"local files": {"fail"}, "Dask": {"fail"}}
    assert list(doctor._others(Settings(data_dir=tmp_path, local_files_document_root=tmp_path))) == []
    (tmp_path / "journal.sqlite3").write_bytes(b"not a database" * 100)
    (check,) = doctor._guarded("journal", lambda: doctor._journal(settings))
    assert check.state == "fail"


def test_what_a_library_raises_is_a_failed_check_and_not_the_end():
    def look() -> Iterator[Check]:
        yield Check("x", "ok", "so far")
        raise RuntimeError("the server\nis away")

    assert [(check.state, check.message) for check in doctor._guarded("x", look)] == [
        ("ok", "so far"), ("fail", "RuntimeError: the server is away"),
    ]  # fmt: skip


def test_a_port_that_another_program_has_taken_is_told_from_our_own_server(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        # Nobody answers there; what listens is not asked for long.
        taken.settimeout(0)
        (check,) = _port_check(taken.getsockname()[1])
        assert (check.state, "PORT" in check.remedy) == ("fail", True)
    body = {"status": "UP", "model_class": "GeoPrelabeler", "version": "9", "ready": True}
    with SmallServer(lambda asked: as_json(body)) as server:
        (check,) = _port_check(server.port)
    assert check.state == "ok"
    assert "GeoPrelabel 9" in check.message
    with SmallServer(lambda asked: as_json({"status": "UP"})) as server:
        (check,) = _port_check(server.port)
    assert check.state == "fail"


def _port_check(port: int) -> list[Check]:
    doctor._TIMEOUT_S, before = 0.5, doctor._TIMEOUT_S
    try:
        return list(doctor._port(Settings(port=port)))
    finally:
        doctor._TIMEOUT_S = before


# --- Label Studio that is not there, or not right ---


def look(settings: Settings) -> list[Check]:
    return doctor.before_push(settings, None)


def test_a_dead_host_and_another_web_site_are_no_label_studio():
    (check,) = look(Settings(label_studio_url=f"http://127.0.0.1:{free_port()}", label_studio_api_key="x"))
    assert check.state == "fail"
    assert "cannot be reached" in check.message
    with SmallServer(lambda asked: as_json({"hello": "world"})) as other:
        (check,) = look(Settings(label_studio_url=other.url, label_studio_api_key="x"))
    assert check.state == "fail"
    assert "no Label Studio" in check.message
    with SmallServer(lambda asked: Answer(200, b"<html>welcome")) as other:
        (check,) = look(Settings(label_studio_url=other.url, label_studio_api_key="x"))
    assert check.state == "fail"
    assert "LABEL_STUDIO_URL" in check.message


def test_an_old_release_and_a_missing_token_are_said():
    with SmallServer(lambda asked: as_json({"release": "1.12.0"})) as old:
        found = look(Settings(label_studio_url=old.url))
    assert states(found) == {"Label Studio": {"warn"}, "clock": {"ok"}, "token": {"fail"}}
    assert "upgrade" in found[0].remedy


def test_a_clock_that_is_off_is_said(monkeypatch: pytest.MonkeyPatch):
    now = time.time()
    with SmallServer(lambda asked: as_json({})) as server:
        assert [check.state for check in doctor._clock(server.url)] == ["ok"]
        monkeypatch.setattr(doctor, "time", SimpleNamespace(time=lambda: now + 3600))
        (check,) = doctor._clock(server.url)
    assert check.state == "warn"
    assert "ahead of" in check.message


def test_addresses_that_label_studio_refuses_are_told_before_anything_is_made():
    """The answers of Label Studio 1.23.2 with its own defaults, and of one that may call private addresses."""
    blocked = {"detail": "URL resolves to a reserved network address (block: 127.0.0.0/8)"}
    wanting = {"/api/ml": {"project": ["This field is required."]},
               "/api/webhooks/": {"headers": ["[] failed JSON schema check"]}}  # fmt: skip
    for refused_paths, states_wanted in (
        (("/api/ml", "/api/webhooks/"), ["fail", "fail"]),
        (("/api/webhooks/",), ["fail"]),
        ((), ["ok"]),
    ):

        def answer(asked: Any, refused_paths: tuple[str, ...] = refused_paths) -> Answer:
            if asked.path in refused_paths:
                return as_json(blocked, 403)
            return as_json({"detail": "Validation error", "validation_errors": wanting[asked.path]}, 400)

        with SmallServer(answer) as server, LabelStudio(server.url, "0" * 40, attempts=1) as api:
            found = list(doctor._guarded("x", lambda api=api: doctor._address(api, "http://127.0.0.1:9090")))
        assert [check.state for check in found] == states_wanted
        assert all("SSRF_PROTECTION_ENABLED=false" in check.message for check in found if check.state == "fail")


# --- A real Label Studio and a real backend ---


@dataclass
class Clinic:
    api: LabelStudio
    server: LabelStudioServer
    backend: BackendServer
    settings: Settings
    project: int

    def look(self, segmenter: Any = None, **changed: Any) -> list[Check]:
        settings = Settings.model_validate({**self.settings.model_dump(), **changed})
        return list(doctor._project(settings, self.api, self.project, segmenter or BrightSegmenter()))


@pytest.fixture(scope="module")
def clinic(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    data = tmp_path_factory.mktemp("doctor") / "data"
    tile = data / "tiles/town/r0001_c0001.png"
    tile.parent.mkdir(parents=True)
    cv2.imwrite(str(tile), bright_image((50, 60, 110, 140)))
    backend = BackendServer(
        data, LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.token,
        GEOPRELABEL_WEBHOOK_SECRET=SECRET, OMP_NUM_THREADS="1",
    )  # fmt: skip
    settings = Settings(
        label_studio_url=label_studio.url, label_studio_api_key=label_studio.token, webhook_secret=SECRET,
        data_dir=data, port=backend.port, public_url=backend.url,
    )  # fmt: skip
    with backend, LabelStudio(label_studio.url, label_studio.token) as api:
        record = {"crs": "EPSG:32645", "transform": [0.3, 0, 330000, 0, -0.3, 3060000], "window": [0, 0, 256, 256]}
        task = {"data": {"image": f"{backend.url}/tiles/town/r0001_c0001.png", "tile": record}}
        done = push(api, settings, [task], title="clinic", label_config=CONFIG, backend_url=backend.url)
        yield Clinic(api, label_studio, backend, settings, done.project_id)


@pytest.mark.label_studio
def test_after_a_push_all_is_well_and_scripts_can_read_it(clinic: Clinic):
    command = ["doctor", "--project", str(clinic.project), "--backend-url", clinic.backend.url]
    result = CliRunner().invoke(cli.app, [*command, "--json"], env=clinic.backend.environment())
    told = json.loads(result.stdout)
    assert result.exit_code == 0, result.stdout
    assert told["ok"] is True
    assert [check["name"] for check in told["checks"] if check["state"] != "ok"] == []
    assert {check["name"] for check in told["checks"]} >= {
        "Label Studio", "clock", "token", "backend address", "project", "backend", "webhook", "order of tasks",
        "labels", "images", "place on Earth",
    }  # fmt: skip
    assert clinic.server.token not in result.stdout
    assert SECRET not in result.stdout


@pytest.mark.label_studio
def test_a_wrong_token_is_said_without_showing_it(clinic: Clinic):
    env = {**clinic.backend.environment(), "LABEL_STUDIO_API_KEY": "f" * 40}
    result = CliRunner().invoke(cli.app, ["doctor", "--project", "1"], env=env)
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "token:" in line]
    assert line.startswith("fail")
    assert "legacy token" in line
    assert "f" * 40 not in result.output


@pytest.mark.label_studio
def test_a_project_that_is_not_there(clinic: Clinic):
    (check,) = list(doctor._project(clinic.settings, clinic.api, 999_999, None))
    assert (check.name, check.state) == ("project", "fail")


@pytest.mark.label_studio
def test_a_secret_that_is_not_the_webhooks_nor_the_backends_is_told_apart(clinic: Clinic):
    (check,) = checks(clinic.look(webhook_secret="another"), "webhook")
    assert check.state == "fail"
    assert "GEOPRELABEL_WEBHOOK_SECRET" in check.message
    (hook,) = clinic.api.webhooks(clinic.project)
    clinic.api.update_webhook(hook["id"], hook["url"], {SECRET_HEADER: "another"}, WEBHOOK_ACTIONS)
    try:
        (check,) = checks(clinic.look(webhook_secret="another"), "webhook")
        assert check.message == "the backend refuses the webhook's secret"
    finally:
        clinic.api.update_webhook(hook["id"], hook["url"], {SECRET_HEADER: SECRET}, WEBHOOK_ACTIONS)
    assert [check.state for check in checks(clinic.look(), "webhook")] == ["ok"]


@pytest.mark.label_studio
def test_a_webhook_that_lacks_events(clinic: Clinic):
    (hook,) = clinic.api.webhooks(clinic.project)
    clinic.api.update_webhook(hook["id"], hook["url"], hook["headers"], ["ANNOTATION_CREATED"])
    try:
        (check,) = checks(clinic.look(), "webhook")
        assert check.state == "fail"
        assert "ANNOTATION_UPDATED" in check.message
        assert "push again" in check.remedy
    finally:
        clinic.api.update_webhook(hook["id"], hook["url"], hook["headers"], WEBHOOK_ACTIONS)


@pytest.mark.label_studio
def test_labels_thresholds_and_classes_that_do_not_fit(clinic: Clinic):
    config = CONFIG.replace('value="building"', 'value="building" predicted_values="edifice"').replace(
        "</PolygonLabels>", '<Label value="moon base"/></PolygonLabels>'
    ).replace('<PolygonLabels ', '<PolygonLabels model_score_threshold="0.97" ')  # fmt: skip
    clinic.api.update_project(clinic.project, label_config=config)
    try:
        found = clinic.look()
        assert states(found)["labels"] == {"warn"}
        told = " ".join(check.message for check in checks(found, "labels"))
        assert "moon base" in told
        assert "'edifice' of building" in told
        (check,) = checks(found, "score threshold")
        assert check.state == "warn"
    finally:
        clinic.api.update_project(clinic.project, label_config=CONFIG)


@pytest.mark.label_studio
def test_images_that_are_refused_missing_or_not_for_browsers(clinic: Clinic):
    project = int(clinic.api.create_project("clinic, images", CONFIG)["id"])
    with SmallServer(lambda asked: Answer(200, cv2.imencode(".png", bright_image())[1].tobytes())) as other:
        clinic.api.import_tasks(project, [{"data": {"image": f"{other.url}/x.png"}}])
        task = {"id": project, "label_config": CONFIG}

        def image_checks(settings: Settings) -> list[Check]:
            config = doctor.parsed_config(CONFIG)
            return list(doctor._guarded("images", lambda: doctor._image(settings, clinic.api, task, config)))

        (check,) = image_checks(clinic.settings)
        assert check.state == "fail"
        assert "GEOPRELABEL_IMAGE_HOSTS" in check.message
        trusting = clinic.settings.model_copy(update={"image_hosts": (f"127.0.0.1:{other.port}",)})
        found = image_checks(trusting)
        assert [check.state for check in checks(found, "images")] == ["ok", "fail"]
        assert "CORS" in checks(found, "images")[1].message
        assert [check.state for check in checks(found, "place on Earth")] == ["warn"]


@pytest.mark.label_studio
def test_a_project_without_a_backend_and_one_whose_backend_has_gone(clinic: Clinic):
    project = int(clinic.api.create_project("clinic, empty", CONFIG)["id"])
    found = list(doctor._project(clinic.settings, clinic.api, project, BrightSegmenter()))
    assert states(found)["backend"] == {"fail"}
    assert "geoprelabel push" in checks(found, "backend")[0].remedy
    assert states(found)["images"] == {"warn"}
    with SmallServer(lambda asked: as_json({"status": "UP", "model_class": "x", "model_version": "v9"})) as second:
        clinic.api.connect(project, second.url)
    found = list(doctor._project(clinic.settings, clinic.api, project, BrightSegmenter()))
    assert states(found)["backend"] == {"fail"}
    assert "geoprelabel serve" in checks(found, "backend")[0].remedy
    # Connected by its address alone, it has no version as its title.
    assert states(found)["order of tasks"] == {"warn"}


@pytest.mark.label_studio
def test_push_looks_first_and_makes_nothing_where_something_is_wrong(clinic: Clinic, tmp_path: Path):
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps([{"data": {"image": "https://example.com/a.png"}}]))
    environment = clinic.backend.environment()
    command = ["push", str(tasks), "--project", "clinic, none", "--backend-url", "http://backend:9090"]
    result = CliRunner().invoke(cli.app, command, env=environment)
    assert result.exit_code == 1
    assert "needs a dot in its name" in result.output
    assert clinic.api.projects(title="clinic, none") == []

    other = tmp_path / "other.xml"
    other.write_text(CONFIG.replace('value="building"', 'value="hut"'))
    command = ["push", str(tasks), "--project", "clinic, empty", "--no-connect", "--config", str(other)]
    result = CliRunner().invoke(cli.app, command, env=environment)
    assert result.exit_code == 0, result.output
    assert "polygon lacks hut; polygon also has building" in result.output
