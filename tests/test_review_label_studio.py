"""Saved annotations checked by a real backend beside a real Label Studio, and what an annotator sees of it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pytest
from typer.testing import CliRunner

from backend import cli
from backend.client import LabelStudio
from backend.review import NOTE, TAB
from demo.backend import REPOSITORY, BackendServer
from demo.label_studio import LabelStudioServer
from tests.browser import find_chromium, label_studio_page
from tests.fakes import bright_image

pytestmark = pytest.mark.label_studio

CONFIG = (REPOSITORY / "configs" / "buildings.xml").read_text()
BOW_TIE = [[20, 23], [43, 55], [43, 23], [20, 55]]
RECTANGLE = [[20, 23], [43, 23], [43, 55], [20, 55]]
UPDATES_TO_TRAIN = 1000


@dataclass
class Desk:
    """A project with one task, whose backend checks what is saved."""

    api: LabelStudio
    server: LabelStudioServer
    backend: BackendServer
    project: int
    task: int

    def findings(self, annotation: int) -> list[dict[str, Any]]:
        listed = self.backend.get("/status")["findings"]
        return [finding for finding in listed if finding["annotation"] == annotation]

    def reasons(self, annotation: int) -> list[str]:
        return sorted(finding["reason"] for finding in self.findings(annotation))

    def notes(self, annotation: int) -> dict[str, list[str]]:
        results = self.api.annotation(annotation)["result"]
        return {result["id"]: result.get("meta", {}).get("text", []) for result in results}

    def changes(self) -> int:
        folder = self.backend.data_dir / "jobs"
        return sum(json.loads(path.read_text())["changes"] for path in folder.glob(f"{self.project}.*.ask.json"))

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.backend.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(r'^geoprelabel_findings_total\{reason="([^"]+)"\} (\S+)$', text, re.MULTILINE)
        return {reason: float(count) for reason, count in found}


def until(is_so: Callable[[], bool], *, timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def region(name: str, points: list[list[float]], **more: Any) -> dict[str, Any]:
    return {
        "id": name, "from_name": "polygon", "to_name": "image", "type": "polygonlabels", "origin": "manual",
        "original_width": 256, "original_height": 256, "image_rotation": 0,
        "value": {"points": points, "closed": True, "polygonlabels": ["building"]}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def desk(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("review")
    tile = folder / "data/tiles/town/r0001_c0001.png"
    tile.parent.mkdir(parents=True)
    cv2.imwrite(str(tile), bright_image((50, 60, 110, 140), (150, 150, 200, 220)))
    backend = BackendServer(
        folder / "data",
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        GEOPRELABEL_COMMENT_INVALID="1",
        START_TRAINING_EACH_N_UPDATES=str(UPDATES_TO_TRAIN),
        WORKERS="2",
    )
    with backend, LabelStudio(label_studio.url, label_studio.token) as api:
        project = int(api.create_project("review", CONFIG, maximum_annotations=1)["id"])
        api.connect(project, backend.url)
        # As the page does when a project is first looked at.
        api.create_view(project, {"title": "Default", "type": "list", "hiddenColumns": {"explore": [], "labeling": []}})
        (task,) = api.import_tasks(project, [{"data": {"image": f"{backend.url}/tiles/town/r0001_c0001.png"}}])
        yield Desk(api, label_studio, backend, project, task)


def test_what_is_wrong_is_on_the_status_page_in_the_metrics_and_in_the_regions_notes_until_it_is_corrected(desk: Desk):
    before, counted = desk.changes(), desk.metrics().get("self-crossing", 0)
    mine = {"text": ["checked twice"]}
    number = desk.api.create_annotation(
        desk.task, [region("crossing00", BOW_TIE), region("sound00000", [[60, 60], [80, 60], [70, 85]], meta=mine)]
    )["id"]

    assert until(lambda: desk.reasons(number) == ["self-crossing"])
    (finding,) = desk.findings(number)
    assert (finding["task"], finding["region"]) == (desk.task, "crossing00")
    assert finding["url"] == (
        f"{desk.server.url}/projects/{desk.project}/data?task={desk.task}&annotation={number}&region=crossing00"
    )
    assert desk.metrics()["self-crossing"] == counted + 1

    assert until(lambda: bool(desk.notes(number)["crossing00"]))
    notes = desk.notes(number)
    assert notes["crossing00"][0].startswith(f"{NOTE}the outline crosses itself")
    assert notes["sound00000"] == ["checked twice"]

    # Our own change comes back as an event: it must neither be answered with another nor be learned from.
    settled = desk.api.annotation(number)["updated_at"]
    time.sleep(2)
    assert desk.api.annotation(number)["updated_at"] == settled
    assert desk.changes() == before + 1
    assert desk.metrics()["self-crossing"] == counted + 1

    # The page sends the note along with the correction.
    results = desk.api.annotation(number)["result"]
    results[0]["value"]["points"] = RECTANGLE
    desk.api.update_annotation(number, result=results)
    assert until(lambda: desk.findings(number) == [])
    assert until(lambda: desk.notes(number) == {"crossing00": [], "sound00000": ["checked twice"]})
    time.sleep(1)
    assert desk.changes() == before + 2

    tabs = [view["data"]["title"] for view in desk.api.views(desk.project)]
    assert tabs == ["Default", TAB]
    desk.api.delete_annotation(number)


def test_a_deleted_annotation_has_no_findings(desk: Desk):
    number = desk.api.create_annotation(desk.task, [region("crossing01", BOW_TIE)])["id"]
    assert until(lambda: desk.reasons(number) == ["self-crossing"])
    command = ["validate", "--project", str(desk.project), "--json"]
    result = CliRunner().invoke(cli.app, command, env=desk.backend.environment())
    assert result.exit_code == 1
    # The task is a photo, which an export would refuse.
    assert json.loads(result.stdout)["counts"] == {"place": 1, "self-crossing": 1}
    desk.api.delete_annotation(number)
    assert until(lambda: desk.findings(number) == [])


def test_the_newest_of_many_saves_stays_as_it_was_saved(desk: Desk):
    number = desk.api.create_annotation(desk.task, [region("crossing02", BOW_TIE)])["id"]
    for step in range(6):
        crossing = [[x + step, y] for x, y in BOW_TIE]
        desk.api.update_annotation(number, result=[region("crossing02", crossing)])
    last = [[x + 5.0, y] for x, y in BOW_TIE]
    assert until(lambda: bool(desk.notes(number)["crossing02"]))
    time.sleep(1)
    (result,) = desk.api.annotation(number)["result"]
    assert result["value"]["points"] == last
    assert len(result["meta"]["text"][0].splitlines()) == 1
    desk.api.delete_annotation(number)


@pytest.mark.browser
def test_an_annotator_reads_the_note_in_the_panel_of_the_region_and_finds_the_task_in_its_tab(
    desk: Desk, tmp_path: Path
):
    if find_chromium() is None:
        pytest.skip("no Chromium or Chrome: apt-get install chromium")
    number = desk.api.create_annotation(
        desk.task, [region("crossing03", BOW_TIE), region("sound00003", [[60, 60], [80, 60], [70, 85]])]
    )["id"]
    assert until(lambda: bool(desk.notes(number)["crossing03"]))
    with label_studio_page(desk.server.url) as page:
        page.login(desk.server.user, desk.server.password)
        page.page.goto(f"{desk.server.url}/projects/{desk.project}/data")
        page.page.get_by_text(TAB).first.click()
        page.page.locator(".dm-table__row-wrapper, [class*=row-wrapper]").first.wait_for(timeout=30_000)
        page.screenshot(tmp_path / "tab.png")
        page.open_task(desk.project, desk.task)
        page.page.locator(".lsf-outliner-item").first.click()
        page.page.get_by_text(f"{NOTE}the outline crosses itself").first.wait_for(timeout=10_000)
        page.screenshot(tmp_path / "note.png")
        assert page.errors == []
    desk.api.delete_annotation(number)
