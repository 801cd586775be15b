"""`GeoPrelabeler` under Label Studio's own tooling: label-studio-ml 1.0.9 as it is, and called as 2.x does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend import model
from backend.service import Service
from backend.settings import Settings
from tests import golden_requests
from tests.fakes import BrightSegmenter, bright_image
from tests.test_server import CONFIG, data_uri, house_task

with warnings.catch_warnings():
    # label-studio-ml 1.0.9 is of 2023: what it imports warns of later Pythons.
    warnings.simplefilter("ignore")
    from label_studio_ml import api

CLICK = {"type": "keypoint", "to_name": "image", "from_name": "click", "value": {"x": 30, "y": 40, "width": 0.3}}


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service(Settings(data_dir=tmp_path, start_training_each_n_updates=1000), segmenter=BrightSegmenter())
    monkeypatch.setattr(service.jobs, "_start", lambda project: True)
    monkeypatch.setattr(model, "shared_service", lambda: service)
    service.start()
    yield service
    service.close()


def test_the_1_x_server_serves_it(service: Service, tmp_path: Path):
    client = api.init_app(model.GeoPrelabeler, model_dir=str(tmp_path / "models")).test_client()
    assert client.get("/health").get_json()["status"] == "UP"
    setup = {"project": "3.1700000000", "schema": CONFIG, "hostname": "", "access_token": ""}
    assert client.post("/setup", json=setup).status_code == 200
    body: dict[str, Any] = {
        "tasks": [house_task(1), {"id": 2, "data": {}}],
        "project": "3.1700000000",
        "label_config": CONFIG,
    }
    results = client.post("/predict", json={**body, "params": {}}).get_json()["results"]
    assert [bool(item) for item in results] == [True, False]
    assert results[0]["result"][0]["value"]["polygonlabels"] == ["Building"]
    body["tasks"] = [house_task(1)]
    results = client.post("/predict", json={**body, "params": {"context": {"result": [CLICK]}}}).get_json()["results"]
    assert len(results[0]["result"]) == 1


def test_fit_is_called_as_1_x_does(service: Service):
    event = golden_requests.load("webhook_annotation_created")["body"]
    made = model.GeoPrelabeler(label_config=CONFIG, train_output={})
    assert made.process_event("ANNOTATION_CREATED", event, "1700000001", {})["status"] == "noted"
    (asked,) = service.jobs._folder.glob("7.*.ask.json")
    assert json.loads(asked.read_text())["changes"] == 1


def test_predict_and_fit_are_called_as_2_x_does(service: Service):
    made = model.GeoPrelabeler(project_id="3.1700000000", label_config=CONFIG)
    (item,) = made.predict([house_task()], context={"result": [CLICK]})
    assert len(item["result"]) == 1
    (item,) = made.predict([{"id": 1, "data": {"image": data_uri(bright_image())}}], context=None)
    assert item["result"] == []
    event = golden_requests.load("webhook_start_training")["body"]
    assert made.fit("START_TRAINING", event)["status"] == "started"
    assert service.jobs.ask(made.fit("START_TRAINING", event)["job"]).at_once


def test_a_fit_that_cannot_be_is_answered_and_noted(service: Service):
    made = model.GeoPrelabeler(project_id="3.1700000000", label_config=CONFIG)
    assert made.fit("START_TRAINING", {"project": {}})["status"] == "failed"
    assert "names no project" in service.problems.recent()[0].message
