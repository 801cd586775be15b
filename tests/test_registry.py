"""Versions of projects' models: published whole, one of them live, the way back open."""

from __future__ import annotations

import base64
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import pytest
from typer.testing import CliRunner

from backend import cli
from backend.errors import BadRequest, BadWeights, RegistryError, UnknownVersion
from backend.judging import Comparison, Judgement, LabelJudgement
from backend.predictor import Predictor
from backend.problems import Problems
from backend.registry import Registry
from backend.server import create_app
from backend.service import PredictRequest, Service
from backend.settings import BadSettings, Settings
from tests.fakes import BrightSegmenter, bright_image
from tests.small_s3 import s3_server

CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image"><Label value="Building"/></PolygonLabels></View>"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # One database for the module, since making its tables takes seconds; each test has a project of its own.
    return Settings(data_dir=tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def registry(settings: Settings) -> Registry:
    return Registry(settings)


def publish(
    registry: Registry, project: str, name: str, folder: Path, *, promote: bool = True, parent: str = "base"
) -> None:
    heads = folder / f"{name}.safetensors"
    heads.write_bytes(name.encode())
    registry.publish(project, name, heads, parent=parent, metrics={"iou": 0.5}, tags={"note": "n"}, promote=promote)


def test_nothing_is_made_by_looking(tmp_path: Path):
    registry = Registry(Settings(data_dir=tmp_path / "new"))
    assert registry.versions() == []
    assert registry.champions() == {}
    assert not (tmp_path / "new").exists()


def test_a_published_version_is_whole_and_live(registry: Registry, tmp_path: Path):
    publish(registry, "1.5", "a-1", tmp_path)
    live = registry.champions()["1.5"]
    assert (live.name, live.number, live.parent, live.is_champion) == ("a-1", 1, "base", True)
    assert live.heads_path.read_bytes() == b"a-1"
    assert live.metrics == {"iou": 0.5}


def test_a_challenger_is_listed_and_not_live(registry: Registry, tmp_path: Path):
    publish(registry, "2.5", "b-1", tmp_path)
    publish(registry, "2.5", "b-2", tmp_path, promote=False)
    assert registry.champions()["2.5"].name == "b-1"
    assert [(v.name, v.is_champion) for v in registry.versions("2.5")] == [("b-2", False), ("b-1", True)]


def test_the_list_shows_whole_names_in_80_columns(registry: Registry, settings: Settings, tmp_path: Path):
    name = "compact-1a2b3c4d-5e6f7a8b"
    publish(registry, "21.1700000000", name, tmp_path)
    listed = CliRunner(env={"GEOPRELABEL_DATA_DIR": str(settings.data_dir), "COLUMNS": "80"}).invoke(
        cli.app, ["models", "list", "--project", "21"]
    )
    assert name in listed.output
    assert len(listed.output.splitlines()) == 2


def test_the_way_back_leads_to_the_parent_and_then_to_the_shipped_model(registry: Registry, tmp_path: Path):
    publish(registry, "3.5", "c-1", tmp_path)
    publish(registry, "3.5", "c-2", tmp_path, parent="c-1")
    assert registry.rollback("3.5") == "c-1"
    assert registry.champions()["3.5"].name == "c-1"
    assert registry.rollback("3.5") == ""
    assert "3.5" not in registry.champions()
    with pytest.raises(UnknownVersion):
        registry.rollback("3.5")
    assert registry.activate("3.5", "c-2").is_champion


def test_an_unknown_version_is_refused_with_those_there_are(registry: Registry, tmp_path: Path):
    publish(registry, "4.5", "d-1", tmp_path)
    with pytest.raises(UnknownVersion, match="d-1"):
        registry.activate("4.5", "d-9")
    assert registry.key("4") == "4.5"
    with pytest.raises(UnknownVersion, match="999"):
        registry.key("999")


@contextmanager
def serving(settings: Settings, **options: Any) -> Iterator[Predictor]:
    """A server process's predictor, with a registry of its own."""
    predictor = Predictor(settings, Registry(settings), segmenter=BrightSegmenter(**options))
    predictor.start()
    predictor.wait(20)
    try:
        yield predictor
    finally:
        predictor.stop()


def test_all_servers_see_a_promotion_and_the_way_back_within_seconds(
    settings: Settings, registry: Registry, tmp_path: Path
):
    with serving(settings) as one, serving(settings) as other:
        assert (one.version("5.5"), other.version("5.5")) == ("bright-1", "bright-1")
        for change, live in (
            (lambda: publish(registry, "5.5", "bright-new", tmp_path), "bright-new"),
            (lambda: registry.rollback("5.5"), "bright-1"),
        ):
            change()
            deadline = time.monotonic() + 5
            while {one.version("5.5"), other.version("5.5")} != {live}:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert one.version("6.5") == "bright-1"


def asked(project: str, count: int = 1, **fields: Any) -> dict[str, Any]:
    png = cv2.imencode(".png", bright_image((20, 20, 60, 60)))[1].tobytes()
    image = "data:image/png;base64," + base64.b64encode(png).decode()
    tasks = [{"id": number, "data": {"image": image}} for number in range(count)]
    return {"tasks": tasks, "project": project, "label_config": CONFIG, **fields}


def request(project: str, count: int = 1, **fields: Any) -> PredictRequest:
    return PredictRequest.from_json(asked(project, count, **fields))


def test_a_promotion_in_the_midst_of_a_request_waits_for_the_next(
    settings: Settings, registry: Registry, tmp_path: Path
):
    go_on = threading.Event()
    go_on.set()
    waiting = BrightSegmenter(wait_for=go_on)
    service = Service(settings, segmenter=waiting)
    service.start()
    service.predictor.wait(20)
    go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(service.predict, request("9.5", 3))
        publish(registry, "9.5", "in-the-midst", tmp_path)
        service.predictor.refresh()
        assert service.predictor.version("9.5") == "in-the-midst"
        go_on.set()
        results, version = answering.result(30)
    assert {version, *(item["model_version"] for item in results)} == {"bright-1"}
    results, version = service.predict(request("9.5", 3))
    assert {version, *(item["model_version"] for item in results)} == {"in-the-midst"}
    service.close()


def test_a_request_may_name_the_version_that_answers_it(settings: Settings, registry: Registry, tmp_path: Path):
    publish(registry, "10.5", "h-1", tmp_path)
    publish(registry, "10.5", "h-2", tmp_path, promote=False)
    service = Service(settings, segmenter=BrightSegmenter())
    client = create_app(settings, service).test_client()
    service.predictor.wait(20)
    for fields, version in (
        ({}, "h-1"),
        ({"model_version": "h-2"}, "h-2"),
        ({"params": {"model_version": "h-2"}}, "h-2"),
        ({"model_version": "bright-1"}, "bright-1"),
    ):
        (answer,), answered = service.predict(request("10.5", **fields))
        assert (answer["model_version"], answered) == (version, version)
    with pytest.raises(UnknownVersion):
        service.predict(request("11.5", model_version="h-1"))
    refused = client.post("/predict", json={**asked("10.5"), "model_version": "h-9"})
    assert refused.status_code == 404
    assert "it has: h-2, h-1, bright-1" in refused.status
    assert client.post("/versions", json={"project": "10.5"}).json == {"versions": ["h-2", "h-1", "bright-1"]}
    with pytest.raises(BadRequest, match="model_version"):
        request("10.5", model_version=3)
    service.close()


def test_an_embedding_outlives_a_promotion(settings: Settings, registry: Registry, tmp_path: Path):
    predictor = Predictor(settings, registry, segmenter=BrightSegmenter())
    predictor.start()
    predictor.wait(20)
    before = predictor.embed(predictor.model("7.5"), bright_image(), "image")
    publish(registry, "7.5", "e-1", tmp_path)
    predictor.refresh()
    assert predictor.model("7.5").version == "e-1"
    assert predictor.embed(predictor.model("7.5"), bright_image(), "image") is before
    predictor.stop()


def damaged(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if how == "cut short" else content[:-1] + b"?")


@pytest.mark.parametrize("how", ["missing", "cut short", "changed"])
def test_a_damaged_version_is_never_used_and_its_parent_takes_its_place(
    settings: Settings, registry: Registry, tmp_path: Path, how: str
):
    project = f"8.{len(how)}"
    first, second = f"{how[:3]}-1", f"{how[:3]}-2"
    publish(registry, project, first, tmp_path)
    publish(registry, project, second, tmp_path, parent=first)
    live = registry.champions()[project]
    whole = live.heads_path.read_bytes()
    damaged(live.heads_path, how)
    with serving(settings) as predictor:
        assert predictor.version(project) == first
        assert predictor.version(project) == first
        told = [problem for problem in Problems(settings.data_dir).recent() if second in problem.where]
        assert len(told) == 1
        assert str(live.heads_path) in told[0].message
        assert "geoprelabel models list --project 8" in told[0].message
        with pytest.raises(BadWeights):
            predictor.model(project, second)
        with pytest.raises(BadWeights):
            registry.activate(project, second)

        damaged(registry.get(project, first).heads_path, how)
        predictor._models.clear()
        assert predictor.version(project) == "bright-1"

        # Training on the same annotations makes the same file, which takes the damaged one's place.
        live.heads_path.write_bytes(whole)
        predictor.refresh()
        assert predictor.version(project) == second


@pytest.mark.parametrize("step", ["create_registered_model", "create_model_version", "set_registered_model_alias"])
def test_a_publisher_that_ends_at_any_step_leaves_nothing_live_and_can_be_repeated(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    registry, project = Registry(settings), f"12.{len(step)}"

    def end(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(registry._client, step, end)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, project, "i-1", tmp_path)
    assert registry.versions(project) == []
    publish(registry, project, "i-1", tmp_path)
    assert [(v.name, v.number, v.is_champion) for v in registry.versions(project)] == [("i-1", 1, True)]


KILLED = """
import os, signal, sys
from pathlib import Path
from backend.registry import Registry
from backend.server import create_app
from backend.settings import BadSettings, Settings

registry = Registry(Settings(data_dir=Path(sys.argv[1])))
registry._client.set_registered_model_alias = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
registry.publish("13.5", "j-2", Path(sys.argv[2]), parent="j-1", metrics={}, tags={}, promote=True)
"""


def test_a_killed_publisher_leaves_the_version_before_it_live(settings: Settings, registry: Registry, tmp_path: Path):
    publish(registry, "13.5", "j-1", tmp_path)
    heads = tmp_path / "j-2.safetensors"
    heads.write_bytes(b"j-2")
    ended = subprocess.run([sys.executable, "-c", KILLED, settings.data_dir, heads], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert [(v.name, v.is_champion) for v in registry.versions("13.5")] == [("j-1", True)]
    publish(registry, "13.5", "j-2", tmp_path, parent="j-1")
    assert [(v.name, v.is_champion) for v in registry.versions("13.5")] == [("j-2", True), ("j-1", False)]


@pytest.mark.parametrize("way", ["another is published", "another is made live", "the way back"])
def test_a_version_whose_publisher_died_once_it_was_live_is_still_seen_when_it_is_no_longer(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
):
    registry, project = Registry(settings), f"14.{ord(way[-1])}"
    delete_tag = registry._client.delete_model_version_tag

    def end(model: str, number: str, tag: str) -> None:
        if number == "2":
            raise KeyboardInterrupt
        delete_tag(model, number, tag)

    publish(registry, project, "q-1", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(registry._client, "delete_model_version_tag", end)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, project, "q-2", tmp_path, parent="base")
    assert registry.champions()[project].name == "q-2"
    if way == "another is published":
        publish(registry, project, "q-3", tmp_path)
    elif way == "another is made live":
        registry.activate(project, "q-1")
    else:
        registry.rollback(project)
    assert {version.name: version.is_champion for version in registry.versions(project)}["q-2"] is False
    assert registry.activate(project, "q-2").is_champion


def test_a_full_disk_leaves_no_half_version(
    settings: Settings, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            publish(registry, "14.5", "k-1", tmp_path)
    assert registry.versions("14.5") == []
    assert list((settings.model_dir / "versions/k-1").iterdir()) == []


def test_publishing_puts_back_a_file_that_was_damaged(registry: Registry, tmp_path: Path):
    publish(registry, "15.5", "l-1", tmp_path)
    path = registry.champions()["15.5"].heads_path
    damaged(path, "cut short")
    publish(registry, "16.5", "l-1", tmp_path)
    assert path.read_bytes() == b"l-1"
    registry.champions()["15.5"].check()


def test_another_machine_gets_the_weights_from_mlflow(tmp_path: Path, settings: Settings):
    uri = f"sqlite:///{settings.model_dir.absolute() / 'mlflow.db'}"
    maker, server = (Settings(data_dir=tmp_path / name, mlflow_tracking_uri=uri) for name in ("maker", "server"))
    heads = tmp_path / "heads.safetensors"
    heads.write_bytes(b"m-1")
    registry = Registry(maker)
    with registry.recorded("17.5") as run:
        registry.publish("17.5", "m-1", heads, parent="", metrics={}, tags={}, promote=True, run_id=run.run_id)
    with serving(server) as predictor:
        assert predictor.version("17.5") == "m-1"
    assert Registry(server).champions()["17.5"].heads_path.read_bytes() == b"m-1"


def test_another_machine_gets_the_weights_from_a_bucket(tmp_path: Path, settings: Settings):
    uri = f"sqlite:///{settings.model_dir.absolute() / 'mlflow.db'}"
    with s3_server() as (_, client):
        client.create_bucket(Bucket="weights")
        maker, server = (
            Settings(data_dir=tmp_path / name, mlflow_tracking_uri=uri, artifacts="s3://weights/may/")
            for name in ("maker", "server")
        )
        publish(Registry(maker), "18.5", "b-1", tmp_path)
        with serving(server) as predictor:
            assert predictor.version("18.5") == "b-1"
        assert Registry(server).champions()["18.5"].heads_path.read_bytes() == b"b-1"
        # What changed on its way is not loaded, and what cannot be kept is not published.
        client.put_object(Bucket="weights", Key="may/b-1/heads.safetensors", Body=b"b-2")
        late = Registry(Settings(data_dir=tmp_path / "late", mlflow_tracking_uri=uri, artifacts=maker.artifacts))
        version = late.champions()["18.5"]
        late.obtain(version)
        with pytest.raises(BadWeights, match="damaged"):
            version.check()
        nowhere = Settings(data_dir=tmp_path / "maker", mlflow_tracking_uri=uri, artifacts="s3://no-such-bucket")
        with pytest.raises(RegistryError, match="GEOPRELABEL_ARTIFACTS"):
            publish(Registry(nowhere), "18.5", "b-3", tmp_path)
        assert [v.name for v in Registry(maker).versions("18.5")] == ["b-1"]


def test_an_address_for_weights_that_is_none_is_refused_at_once():
    with pytest.raises(BadSettings, match="s3://bucket"):
        Settings.from_environment(artifacts="ftp://weights")


# --- The command line -------------------------------------------------------------------------------------------------


def test_versions_are_listed_shown_and_made_live_by_command(settings: Settings, registry: Registry, tmp_path: Path):
    gain = Comparison(0.52, 0.71, 0.11, 0.27)
    labels = {"building": LabelJudgement(188, gain, gain)}
    judged = Judgement(6, 2, 188, labels, gain, gain, (None, 0.78), (0.1, 0.05), None, False)
    heads = tmp_path / "n.safetensors"
    heads.write_bytes(b"n")
    registry.publish("18.5", "n-1", heads, parent="base", metrics={}, tags={"note": "too few tiles"}, promote=True)
    registry.publish(
        "18.5", "n-2", heads, parent="n-1", metrics={"judging": asdict(judged)}, tags={"note": "better"}, promote=False
    )

    def said(*arguments: str, code: int = 0) -> str:
        environment = {"GEOPRELABEL_DATA_DIR": str(settings.data_dir), "COLUMNS": "200"}
        done = CliRunner().invoke(cli.app, ["models", *arguments], env=environment)
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    listed = said("list", "--project", "18")
    assert "0.52 → 0.71" in listed
    assert "not judged" in listed
    shown = said("show", "n-2")
    for words in ("parent n-1", "note better", "sha256", "building (188): F1@0.5", "+0.110 to +0.270", "0.780"):
        assert words in shown
    assert '"after": 0.71' in said("show", "n-2", "--json")
    assert "n-2 is live for project 18.5" in said("activate", "n-2", "--project", "18")
    assert registry.champions()["18.5"].name == "n-2"
    assert said("rollback", "--project", "18").startswith("n-1 is live for project 18")
    damaged(registry.get("18.5", "n-2").heads_path, "changed")
    assert "is damaged" in said("show", "n-2")


def test_who_is_alone_at_the_device_has_all_processors_and_two_share_them(settings):
    class Sharing(BrightSegmenter):
        threads = 4

        def __init__(self) -> None:
            super().__init__()
            self.used: list[int] = []
            self.is_in, self.may_go = threading.Event(), threading.Event()

        def use_threads(self, count: int) -> None:
            self.used.append(count)

        def embed(self, image_rgb):
            if len(self.used) == 1:
                self.is_in.set()
                self.may_go.wait(20)
            return super().embed(image_rgb)

    segmenter = Sharing()
    predictor = Predictor(settings, Registry(settings), segmenter=segmenter)
    predictor.start()
    predictor.wait(20)
    model, image = predictor.model("1"), bright_image((20, 20, 60, 60))
    try:
        first = threading.Thread(target=predictor.embed, args=(model, image, "first"))
        first.start()
        assert segmenter.is_in.wait(20)
        predictor.embed(model, image, "second")
        segmenter.may_go.set()
        first.join(20)
        predictor.embed(model, image, "third")
    finally:
        segmenter.may_go.set()
        predictor.stop()
    assert segmenter.used == [4, 1, 4]
