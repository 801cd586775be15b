"""The whole loop on a real Label Studio with a real browser: scene → tasks → polygons → clicks → training → GeoJSON.

Once on a synthetic scene, and once on the real orthomosaic of Banepa where ``../shared/data`` holds it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from shapely import Point, Polygon
from shapely.geometry import shape

from backend import labelstudio
from backend.client import LabelStudio
from backend.service import project_key_of
from backend.tile import Region, Tile
from demo.annotator import Truth, drawn
from demo.backend import REPOSITORY, BackendServer
from demo.label_studio import LabelStudioServer
from demo.scene import make_scene
from tests.browser import LabelStudioPage, find_chromium, label_studio_page

pytestmark = pytest.mark.label_studio

CONFIG = REPOSITORY / "configs" / "buildings.xml"
BANEPA = REPOSITORY.parent / "shared/data/hot_banepa_e2e/scenes/banepa_full_scene.tif"
BANEPA_TRUTH = BANEPA.with_name("banepa_full_scene_labels_4326.geojson")


@dataclass
class Campaign:
    """A scene's project in Label Studio, with the backend connected."""

    api: LabelStudio
    server: LabelStudioServer
    backend: BackendServer
    project: int
    backend_id: int
    truth: Truth
    tasks: list[dict[str, Any]]
    clicks_project: int
    """A project of the same tiles that asks for no pre-labels: the page takes a click on a polygon for a selection."""

    folder: Path

    def objects_on(self, task: dict[str, Any], *, margin_px: float = 12) -> list[Region]:
        """What of the truth lies wholly on the task's tile, the largest first."""
        tile = tile_of(task)
        inside = tile.outline_px().buffer(-margin_px)
        return sorted(
            (r for r in self.truth.on(tile, ["building"]) if inside.contains(r.polygon)), key=lambda r: -r.polygon.area
        )


def tile_of(task: dict[str, Any]) -> Tile:
    tile = Tile.from_task(task["data"])
    assert tile is not None
    return tile


@pytest.fixture(scope="module", params=["synthetic", "banepa"])
def campaign(
    request: pytest.FixtureRequest, label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "banepa":
        if not BANEPA.exists():
            pytest.skip(f"{BANEPA.name} is not at hand; the synthetic scene goes the same way")
        scene, truth_path = BANEPA, BANEPA_TRUTH
    else:
        scene = folder / "town.tif"
        truth_path = make_scene(scene, size_px=(1200, 1000))
    backend = BackendServer(
        folder / "data",
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        GEOPRELABEL_WEBHOOK_SECRET="a secret of the test",
        START_TRAINING_EACH_N_UPDATES="6",
        GEOPRELABEL_TRAINING_QUIET_S="1",
        GEOPRELABEL_TRAINING_MAX_S="40",
    )
    with backend, LabelStudio(label_studio.url, label_studio.token) as api:
        backend.command("ingest", str(scene))
        pushed = push(backend, f"e2e {request.param}", CONFIG)
        project = int(pushed["project_id"])
        (folder / "clicks.xml").write_text(
            CONFIG.read_text().replace("<PolygonLabels ", '<PolygonLabels model_skip="true" ')
        )
        clicks = push(backend, f"e2e {request.param} clicks", folder / "clicks.xml")
        tasks = list(api.tasks(project))
        assert pushed["tasks"] == len(tasks) > 4
        truth = Truth(truth_path)
        yield Campaign(
            api,
            label_studio,
            backend,
            project,
            int(pushed["backend_id"]),
            truth,
            tasks,
            int(clicks["project_id"]),
            folder,
        )


def push(backend: BackendServer, title: str, config: Path) -> dict[str, Any]:
    tasks = str(backend.data_dir / "tasks.json")
    pushed = backend.command("push", tasks, "--project", title, "--config", str(config), "--backend-url", backend.url)
    assert isinstance(pushed, dict)
    return pushed


@pytest.fixture
def page(campaign: Campaign) -> Iterator[LabelStudioPage]:
    if find_chromium() is None:
        pytest.skip("no Chromium or Chrome: apt-get install chromium")
    with label_studio_page(campaign.server.url) as page:
        page.login(campaign.server.user, campaign.server.password)
        yield page
        assert page.errors == []


def richest(campaign: Campaign, tasks: list[dict[str, Any]] | None = None) -> list[tuple[dict[str, Any], list[Region]]]:
    """Tasks with whole buildings on them, those with the most first."""
    found = [(task, campaign.objects_on(task)) for task in tasks or campaign.tasks]
    return sorted(((t, o) for t, o in found if o), key=lambda pair: -len(pair[1]))


def test_pushing_again_adds_nothing(campaign: Campaign):
    again = campaign.backend.command(
        *(
            "push",
            str(campaign.backend.data_dir / "tasks.json"),
            "--project",
            campaign.api.project(campaign.project)["title"],
        ),
        *("--config", str(CONFIG), "--backend-url", campaign.backend.url),
    )
    assert (again["tasks"], again["already_there"]) == (0, len(campaign.tasks))
    assert again["backend_id"] == campaign.backend_id
    assert len(campaign.api.webhooks(campaign.project)) == 1


def test_label_studio_stores_batch_predictions(campaign: Campaign):
    ids = [task["id"] for task, _ in richest(campaign)[:3]]
    campaign.api.predict_tasks(campaign.project, ids)
    version = campaign.backend.get("/versions")["versions"][0]
    for task_id in ids:
        (prediction,) = campaign.api.task(task_id)["predictions"]
        assert prediction["model_version"] == version
        assert all(r["value"]["polygonlabels"] == ["building"] for r in prediction["result"])
    assert any(campaign.api.task(task_id)["predictions"][0]["result"] for task_id in ids)


def test_predictions_are_imported_in_bulk(campaign: Campaign):
    if len(campaign.tasks) > 40:
        pytest.skip(f"{len(campaign.tasks)} tiles take minutes; the synthetic scene goes the same way")
    report = campaign.backend.command("predict", "--project", str(campaign.project))
    assert report["failed"] == 0
    assert report["predicted"] + report["resumed"] == len(campaign.tasks)
    assert all(task["predictions"] for task in campaign.api.tasks(campaign.project))
    again = campaign.backend.command("predict", "--project", str(campaign.project))
    assert (again["predicted"], again["resumed"]) == (0, len(campaign.tasks))


@pytest.mark.browser
@pytest.mark.parametrize("tool", ["keypoint", "rectangle"])
def test_a_smart_tool_gives_a_polygon_that_is_painted_accepted_and_submitted(
    campaign: Campaign, page: LabelStudioPage, tool: str
):
    tasks = list(campaign.api.tasks(campaign.clicks_project))
    task, objects = richest(campaign, tasks)[{"keypoint": 0, "rectangle": 1}[tool]]
    size = tile_of(task).size
    wanted = objects[0].polygon
    middle = Point(shapely.maximum_inscribed_circle(wanted).coords[0])
    page.open_task(campaign.clicks_project, task["id"])
    page.auto_annotation(True)
    page.pick_smart_tool(tool)  # type: ignore[arg-type]
    # Beside the click itself, which is painted too.
    look = ((middle.x + 6) * 100 / size[0], (middle.y + 6) * 100 / size[1])
    before = page.colour_at(*look)
    with page.prompting() as exchange:
        if tool == "keypoint":
            page.click_pct(middle.x * 100 / size[0], middle.y * 100 / size[1])
        else:
            x0, y0, x1, y1 = wanted.bounds
            page.drag_pct([(x0 * 100 / size[0], y0 * 100 / size[1]), (x1 * 100 / size[0], y1 * 100 / size[1])])
    assert "errors" not in exchange["answer"], exchange["answer"]
    suggested = [region for region in page.wait_for_suggestion() if region.type == "polygonregion"]
    assert suggested
    outline = Polygon([(x * size[0] / 100, y * size[1] / 100) for x, y in suggested[0].points_pct])
    assert outline.buffer(2).contains(middle)
    assert suggested[0].labels == ("building",)
    assert page.colour_at(*look) != before, "nothing was painted"
    accepted = page.accept_suggestion()
    assert {region.id for region in suggested} <= {region.id for region in accepted}
    page.screenshot(campaign.folder / f"{tool}.png")
    page.submit()
    saved = campaign.api.task(task["id"])["annotations"][0]["result"]
    polygons = [result for result in saved if result["type"] == "polygonlabels"]
    assert {region.id for region in suggested} == {result["id"] for result in polygons}
    assert polygons[0]["meta"]["model_version"] == campaign.backend.get("/versions")["versions"][-1]


@pytest.mark.browser
def test_a_courtyard_is_painted_as_a_hole_and_comes_back_as_one(campaign: Campaign, page: LabelStudioPage):
    project = campaign.clicks_project
    task, _ = richest(campaign, list(campaign.api.tasks(project)))[2]
    tag, tile = labelstudio.parse_config(CONFIG.read_text()).tags[0], tile_of(task)
    yard = Polygon([(100, 100), (400, 120), (380, 400), (90, 380)], [[(200, 200), (300, 210), (290, 300), (190, 290)]])
    version = campaign.backend.get("/versions")["versions"][-1]
    results = labelstudio.results_of([Region(yard, "building", 0.9)], tag, tile, task_id=task["id"], version=version)
    campaign.api.import_predictions(
        project, [{"task": task["id"], "result": results, "model_version": "with a courtyard"}]
    )
    campaign.api.update_project(project, model_version="with a courtyard")
    inside_pct, yard_pct = tile.px_to_pct(np.array([(150.0, 150.0), (245.0, 250.0)]))
    page.open_task(project, task["id"])
    page.page.wait_for_function("() => Htx.annotationStore.selected.regions.length === 1", timeout=30_000)
    page.page.wait_for_timeout(500)
    shown = [page.colour_at(*inside_pct), page.colour_at(*yard_pct)]
    page.page.evaluate("() => Htx.annotationStore.selected.regions[0].toggleHidden()")
    page.page.wait_for_timeout(500)
    assert page.colour_at(*inside_pct) != shown[0], "the roof was not painted"
    assert page.colour_at(*yard_pct) == shown[1], "the courtyard was painted over"
    page.submit()
    (annotation,) = campaign.api.task(task["id"])["annotations"]
    read = labelstudio.read_annotation(annotation, tile)
    assert [len(region.polygon.interiors) for region in read.regions] == [1]
    assert read.regions[0].polygon.symmetric_difference(yard).area < 1


def test_accepted_labels_train_a_new_version_through_the_webhook_and_are_exported_where_they_lie(campaign: Campaign):
    tag = labelstudio.parse_config(CONFIG.read_text()).tags[0]
    # A block of neighbours round the middle of what is labelled, so that objects are cut by the borders between.
    middle = np.mean([tile_of(task).window[:2] for task, _ in richest(campaign)[:8]], axis=0)  # type: ignore[index]
    near = sorted(campaign.tasks, key=lambda task: np.hypot(*(np.array(tile_of(task).window[:2]) - middle)))  # type: ignore[index]
    block = near[:9]
    begun = time.time()
    for task in block:
        campaign.api.create_annotation(task["id"], drawn(task, campaign.truth, tag), lead_time=2.0)

    run = campaign.backend.wait_for_training(str(campaign.project), since=begun, timeout_s=240)
    assert run["state"] == "done", run
    versions = campaign.backend.wait_for_version(run["version"])
    assert len(versions) == 2
    project = campaign.api.project(campaign.project)
    setup = {"project": project_key_of(project), "schema": CONFIG.read_text()}
    live = next(v for v in campaign.backend.get("/status")["versions"] if v["name"] == run["version"])["live"]
    assert campaign.backend.post("/setup", setup)["model_version"] == (run["version"] if live else versions[-1])

    out = campaign.folder / "labels.geojson"
    report = campaign.backend.command("export", "--project", str(campaign.project), "--out", str(out))
    assert report["tasks"] == len(block) >= 4
    # Of objects that the outer border of the block cuts, slivers are left.
    assert campaign.backend.command("validate", str(out), "--min-area-m2", "0")["findings"] == []
    worst, mean = campaign.truth.agreement(out, block, ["building"])
    assert mean >= 0.98, (worst, mean)
    assert worst >= 0.9, (worst, mean)
    features = json.loads(out.read_text())["features"]
    outlines = [shape(feature["geometry"]) for feature in features]
    assert all(outline.is_valid for outline in outlines)
    tree = shapely.STRtree(outlines)
    doubled = [
        (a, b) for a, b in tree.query(outlines, predicate="intersects").T
        if a < b and outlines[a].intersection(outlines[b]).area > 0.5 * min(outlines[a].area, outlines[b].area)
    ]  # fmt: skip
    truly_doubled = shapely.STRtree(campaign.truth.polygons).query(campaign.truth.polygons, predicate="covers").shape[1]
    assert len(doubled) <= truly_doubled - len(campaign.truth.polygons)
