"""The tutorial's pictures, taken of a real Label Studio and this backend in a real browser: ``make screenshots``.

The scene is made up (`demo.scene`), so that the pictures show nobody's imagery.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shapely
from playwright.sync_api import Page

from backend import labelstudio
from backend.client import LabelStudio
from backend.labelstudio import PolygonTag
from backend.tile import Tile
from demo.annotator import Truth, drawn
from demo.backend import REPOSITORY, BackendServer
from demo.label_studio import LabelStudioServer, label_studio_venv
from demo.scene import make_scene
from tests.browser import LabelStudioPage, label_studio_page

IMAGES = Path(__file__).resolve().parent / "images"
CONFIG = REPOSITORY / "configs" / "buildings.xml"
MAX_BYTES = 150_000
ACCEPTED_TILES = 16


def main() -> int:
    """Take all of them; the exit code."""
    venv = label_studio_venv()
    if venv is None:
        print("no Label Studio: make label-studio", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="geoprelabel-pictures-") as scratch, servers(venv, Path(scratch)) as both:
        take(*both, Path(scratch))
    return 0


@contextlib.contextmanager
def servers(venv: Path, folder: Path) -> Iterator[tuple[LabelStudioServer, BackendServer]]:
    with (
        LabelStudioServer(venv, folder / "label-studio") as server,
        BackendServer(folder / "data", LABEL_STUDIO_URL=server.url, LABEL_STUDIO_API_KEY=server.token) as backend,
    ):
        yield server, backend


def take(server: LabelStudioServer, backend: BackendServer, folder: Path) -> None:
    scene = folder / "town.tif"
    truth = Truth(make_scene(scene, size_px=(2048, 2048)))
    tag = labelstudio.parse_config(CONFIG.read_text(encoding="utf-8")).tags[0]
    backend.command("ingest", str(scene), "--out", str(backend.data_dir))
    predicted = folder / "predictions.json"
    backend.command("predict", str(backend.data_dir / "tasks.json"), "--out", str(predicted))
    pushed = backend.command("push", str(predicted), "--project", "My town", "--backend-url", backend.url)
    project = int(pushed["project_id"])
    with LabelStudio(server.url, server.token) as api, label_studio_page(server.url, width=1400, height=860) as page:
        page.login(server.user, server.password)
        tasks = list(api.tasks(project))
        tiles_and_pre_labels(page, project, tasks)
        clicked(page, project, *missed(tasks, truth), tag)
        for task in sorted(tasks, key=lambda task: task["data"]["tile"]["window"][1::-1])[:ACCEPTED_TILES]:
            api.create_annotation(task["id"], drawn(task, truth, tag), lead_time=1.0)
        begun = time.time()
        api.start_training(int(pushed["backend_id"]))
        trained = backend.wait_for_training(str(project), since=begun)
        backend.wait_for_version(trained["version"])
        page.page.set_viewport_size({"width": 1100, "height": 900})
        page.page.goto(f"{backend.url}/status")
        save(page.page, "status")
        report = folder / "report.html"
        backend.command(
            "export", "--project", str(project), "--out", str(folder / "town.geojson"), "--report", str(report)
        )
        page.page.set_content(report.read_text(encoding="utf-8"))
        save(page.page, "report")


def tiles_and_pre_labels(page: LabelStudioPage, project: int, tasks: list[dict[str, Any]]) -> None:
    page.page.goto(f"{page.url}/projects/{project}/data")
    page.page.wait_for_selector("img[src*='/tiles/']", timeout=60_000)
    page.page.wait_for_load_state("networkidle")
    save(page.page, "tiles")
    page.open_task(project, max(tasks, key=lambda task: len(task["predictions"][0]["result"]))["id"])
    save(page.page, "pre-labels")


def missed(tasks: list[dict[str, Any]], truth: Truth) -> tuple[dict[str, Any], shapely.Point]:
    """A building that the model did not find, whole on its tile: the task, and a place on the roof in percent."""
    found = []
    for task in tasks:
        tile = Tile.from_task(task["data"])
        assert tile is not None
        rings = (labelstudio.outline_px(result, tile.size) for result in task["predictions"][0]["result"])
        there = shapely.union_all([shapely.Polygon(ring).buffer(0) for ring in rings if ring is not None])
        inside = tile.outline_px().buffer(-20)
        found += [
            (region.polygon.area, task, tile, region.polygon)
            for region in truth.on(tile, ["building"])
            if inside.contains(region.polygon) and there.distance(region.polygon) > 4
        ]
    _, task, tile, polygon = max(found, key=lambda each: each[0])
    x, y = shapely.get_coordinates(shapely.point_on_surface(polygon))[0]
    return task, shapely.Point(100 * x / tile.size[0], 100 * y / tile.size[1])


def clicked(
    page: LabelStudioPage, project: int, task: dict[str, Any], place_pct: shapely.Point, tag: PolygonTag
) -> None:
    page.open_task(project, task["id"])
    page.auto_annotation()
    page.pick_smart_tool("keypoint")
    with page.prompting():
        page.click_pct(place_pct.x, place_pct.y)
    page.wait_for_suggestion()
    save(page.page, "click")
    page.accept_suggestion()
    save(page.page, "accepted")
    page.submit()


def save(page: Page, name: str) -> None:
    """As a JPEG of at most MAX_BYTES."""
    for quality in range(85, 20, -10):
        picture = page.screenshot(type="jpeg", quality=quality)
        if len(picture) <= MAX_BYTES:
            break
    path = IMAGES / f"{name}.jpg"
    path.write_bytes(picture)
    print(f"{path.relative_to(REPOSITORY)}: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
