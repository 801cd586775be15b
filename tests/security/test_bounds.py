"""Projects by the thousand: what is kept of each in memory is bounded, and no route grows slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from backend.predictor import Predictor
from backend.recent import Recent
from backend.server import create_app
from backend.service import MAX_PROJECTS, Service
from backend.settings import Settings
from tests.fakes import BrightSegmenter

from .conftest import CONFIG, PATIENCE_S


def test_what_was_used_last_is_kept():
    kept: Recent[str, int] = Recent(3)
    for number, name in enumerate("abcadaeaf"):
        kept[name] = number
    assert dict(kept) == {"e": 6, "a": 7, "f": 8}
    assert kept.get("a") == 7
    kept["g"] = 9
    assert "a" in kept
    assert len(kept) == 3


@pytest.fixture
def service(tmp_path: Path) -> Any:
    service = Service(Settings(data_dir=tmp_path, start_training_each_n_updates=10**6), segmenter=BrightSegmenter())
    service.jobs._start = lambda project: True  # type: ignore[method-assign]
    yield service
    service.close()


def test_thousands_of_projects_leave_bounded_tables(service: Service):
    client = create_app(service.settings, service).test_client()
    service.predictor.wait(20)
    config = CONFIG.replace("Building", "Moon base")
    for number in range(MAX_PROJECTS + 200):
        assert client.post("/setup", json={"project": f"{number}.1700000000", "schema": config}).status_code == 200
    assert len(service._untrained) == MAX_PROJECTS
    assert len(service._titled) <= MAX_PROJECTS
    before_s = time.monotonic()
    answer = client.get("/status")
    assert answer.status_code == 200
    assert len(answer.data) < 2**20
    assert time.monotonic() - before_s < PATIENCE_S


def test_events_of_thousands_of_projects_are_noted_and_the_pages_stay_fast(service: Service):
    client = create_app(service.settings, service).test_client()
    service.predictor.wait(20)
    for number in range(300):
        body = {
            "action": "ANNOTATION_CREATED",
            "project": {"id": number, "label_config": CONFIG},
            "task": {"id": number, "data": {}},
            "annotation": {"id": number, "task": number, "result": []},
        }
        assert client.post("/webhook", json=body).status_code == 201
    for path in ("/status", "/metrics", "/versions"):
        before_s = time.monotonic()
        assert client.get(path).status_code == 200
        assert time.monotonic() - before_s < PATIENCE_S, path
    assert len(service.problems.recent()) <= 50
    assert len(service.findings.recent()) <= 200


def test_damaged_versions_are_remembered_in_bounded_number(service: Service):
    predictor: Predictor = service.predictor
    for number in range(2 * MAX_PROJECTS):
        predictor._damaged[f"v{number}"] = None
    assert len(predictor._damaged) <= MAX_PROJECTS
