"""The Data Manager of a real Label Studio: the least sure tasks come first, whichever version is live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from backend import datamanager, service
from backend.client import LabelStudio
from backend.push import config_difference, push
from backend.service import Service
from backend.settings import Settings
from demo.backend import REPOSITORY
from demo.label_studio import LabelStudioServer
from tests.browser import find_chromium, label_studio_page
from tests.fakes import BrightSegmenter
from tests.small_server import Answer, Asked, SmallServer, as_json

CONFIG = (REPOSITORY / "configs" / "buildings.xml").read_text()
SCORES = (0.9, 0.2, 0.7, 0.5)


@dataclass
class Backend:
    """What Label Studio asks of a backend before it asks for predictions, under a version that can be changed."""

    url: str = ""
    version: str = "model-1"

    def answer(self, asked: Asked) -> Answer:
        if asked.path.endswith("/setup"):
            return as_json({"model_version": self.version})
        return as_json({"status": "UP", "model_class": "GeoPrelabeler", "results": []})


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend()
    with SmallServer(lambda asked: made.answer(asked)) as server:
        made.url = server.url
        yield made


@pytest.fixture
def api(label_studio: LabelStudioServer) -> Iterator[LabelStudio]:
    with LabelStudio(label_studio.url, label_studio.token) as api:
        yield api


def tasks_of(version: str) -> list[dict[str, Any]]:
    region = {
        "id": "r", "from_name": "polygon", "to_name": "image", "type": "polygonlabels", "score": 0.5,
        "original_width": 64, "original_height": 64, "image_rotation": 0,
        "value": {"points": [[10, 10], [60, 10], [60, 60]], "closed": True, "polygonlabels": ["building"]},
    }  # fmt: skip
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    return [
        {"data": {"image": pixel, "n": str(number)},
         "predictions": [{"result": [{**region, "id": f"r{number}"}], "score": score, "model_version": version}]}
        for number, score in enumerate(SCORES)
    ]  # fmt: skip


def shown(api: LabelStudio, project: int) -> list[tuple[int, float | None]]:
    """Number and score of the tasks in our tab, as Label Studio lists them."""
    (view,) = [view for view in api.views(project) if view["data"]["title"] == datamanager.TAB]
    listed = api._call("GET", "/api/tasks/", params={"project": project, "view": view["id"], "fields": "all"})
    return [(int(task["data"]["n"]), task["predictions_score"]) for task in listed["tasks"]]


SORTED = [(1, 0.2), (3, 0.5), (2, 0.7), (0, 0.9)]


@pytest.mark.label_studio
def test_after_a_push_the_least_sure_tasks_come_first_and_labelled_ones_leave(
    api: LabelStudio, label_studio: LabelStudioServer, backend: Backend
):
    settings = Settings(label_studio_url=label_studio.url, label_studio_api_key=label_studio.token)
    for _ in range(2):
        done = push(
            api, settings, tasks_of("model-1"), title="sorted", label_config=CONFIG, backend_url=backend.url
        )  # fmt: skip
    assert [view["data"]["title"] for view in api.views(done.project_id)] == ["Default", datamanager.TAB]
    (connected,) = api.ml_backends(done.project_id)
    assert (connected["title"], connected["description"]) == ("model-1", datamanager.TITLE)
    assert shown(api, done.project_id) == SORTED

    first = next(task for task in api.tasks(done.project_id) if task["data"]["n"] == "1")
    api.create_annotation(first["id"], [])
    assert shown(api, done.project_id) == SORTED[1:]

    # Another version goes live: its scores count, of which there are none yet.
    backend.version = "model-2"
    assert datamanager.title_backends(api, done.project_id, pause_s=0.1) == ["model-2"]
    assert api.project(done.project_id)["model_version"] == "model-2"
    assert [score for _, score in shown(api, done.project_id)] == [None, None, None]
    assert datamanager.title_backends(api, done.project_id) == []
    backend.version = "model-1"
    datamanager.title_backends(api, done.project_id, pause_s=0.1)
    assert shown(api, done.project_id) == SORTED[1:]


@pytest.mark.label_studio
def test_a_title_that_a_person_chose_stays(api: LabelStudio, label_studio: LabelStudioServer, backend: Backend):
    project = int(api.create_project("own title", CONFIG)["id"])
    api.connect(project, backend.url, title="Our model")
    assert datamanager.title_backends(api, project) == []
    settings = Settings(label_studio_url=label_studio.url, label_studio_api_key=label_studio.token)
    push(api, settings, [], title="own title", label_config=CONFIG, backend_url=backend.url)
    assert [one["title"] for one in api.ml_backends(project)] == ["Our model"]


@pytest.mark.label_studio
def test_without_a_backend_the_predictions_that_were_pushed_are_sorted_by(
    api: LabelStudio, label_studio: LabelStudioServer
):
    settings = Settings(label_studio_url=label_studio.url, label_studio_api_key=label_studio.token)
    done = push(api, settings, tasks_of("bulk-1"), title="no backend", label_config=CONFIG, backend_url=None)
    assert shown(api, done.project_id) == SORTED


@pytest.mark.label_studio
def test_the_server_has_the_title_follow_when_label_studio_asks_for_the_version(
    api: LabelStudio, label_studio: LabelStudioServer, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(service, "TITLE_AFTER_S", 0.05)
    project = api.create_project("follows", CONFIG)
    api.connect(int(project["id"]), backend.url)
    backend.version = "model-7"
    running = Service(
        Settings(data_dir=tmp_path, label_studio_url=label_studio.url, label_studio_api_key=label_studio.token),
        segmenter=BrightSegmenter(),
    )
    running.start()
    try:
        running.setup(f"{project['id']}.1700000000", CONFIG)
        running._errands.submit(lambda: None).result(30)
        assert api.project(int(project["id"]))["model_version"] == "model-7"
        assert running.problems.recent() == []
    finally:
        running.close()


@pytest.mark.label_studio
@pytest.mark.browser
def test_label_tasks_as_displayed_opens_the_least_sure_one(
    api: LabelStudio, label_studio: LabelStudioServer, tmp_path: Path
):
    if find_chromium() is None:
        pytest.skip("no Chromium or Chrome: apt-get install chromium")
    settings = Settings(label_studio_url=label_studio.url, label_studio_api_key=label_studio.token)
    done = push(api, settings, tasks_of("bulk-1"), title="in the page", label_config=CONFIG, backend_url=None)
    first = next(task["id"] for task in api.tasks(done.project_id) if task["data"]["n"] == "1")
    with label_studio_page(label_studio.url) as page:
        page.login(label_studio.user, label_studio.password)
        page.page.goto(done.url)
        page.page.get_by_text(datamanager.TAB).first.click()
        page.page.get_by_text("0.200").first.wait_for(timeout=30_000)
        page.screenshot(tmp_path / "tab.png")
        page.page.locator("button:has-text('Label All Tasks') + button").last.click()
        page.page.get_by_text("Label Tasks As Displayed").first.click()
        page.page.wait_for_function("id => window.Htx?.task?.id === id", arg=first, timeout=90_000)
        page.screenshot(tmp_path / "task.png")
        assert page.errors == []


def test_every_tile_that_was_looked_at_has_a_score_and_none_that_was_not(tmp_path: Path):
    settings = Settings(data_dir=tmp_path, local_files_document_root=tmp_path)
    tiles = {"sure": (250, 30), "faint": (140, 30), "empty": (30, 30)}
    for name, (house, ground) in tiles.items():
        picture = np.full((128, 128, 3), ground, np.uint8)
        picture[40:80, 40:90] = house
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    running = Service(settings, segmenter=BrightSegmenter())
    running.start()
    try:
        tasks = [{"id": n, "data": {"image": f"/data/local-files/?d={name}.png"}} for n, name in enumerate(tiles)]
        scores = {
            name: [found and found.get("score") for _, found in running.predict_tasks(enumerate(tasks), config)]
            for name, config in (("known", CONFIG), ("unknown", CONFIG.replace('"building"', '"moon base"')))
        }
    finally:
        running.close()
    sure, faint, empty = scores["known"]
    assert empty == 1.0
    assert 0 < faint < sure < 1
    assert scores["unknown"] == [None, None, None]


def test_a_config_that_means_the_same_is_no_difference():
    assert config_difference(CONFIG, CONFIG.replace("\n", "\n  ")) == ""
    assert config_difference(None, CONFIG) == ""
    assert "lacks hut; polygon also has building" in config_difference(CONFIG, CONFIG.replace('"building"', '"hut"'))
    assert "lacks the tag click" in config_difference(CONFIG.replace('name="click"', 'name="other"'), CONFIG)
    assert config_difference(CONFIG, CONFIG.replace('opacity="0.35"', 'opacity="0.5"')).startswith("its text; ")
    assert "not XML" in config_difference("<View", CONFIG)
    assert json.dumps(config_difference(CONFIG, "<View/>"))
