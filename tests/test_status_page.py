"""The page at /status: curves of what annotators made of pre-labels, readable on a phone, without script or network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from backend import status_page
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from tests.browser import find_chromium
from tests.fakes import BrightSegmenter
from tests.test_acceptance import HALF, PROJECT, SQUARE, annotation, prediction, region, task

VERSIONS = ("compact-45115e2a", "compact-45115e2a-0c1d2e3f", "<script>alert(1)</script>")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FlaskClient]:
    settings = Settings(data_dir=tmp_path)
    service = Service(settings, segmenter=BrightSegmenter())
    # Each version is a day younger than the one before, and more of its outlines stay as they are.
    tasks = []
    for number, version in enumerate(VERSIONS):
        for hour in range(1, 20, 3):
            identity, points = 100 * number + hour, HALF if (hour // 3) % (2 + number) == 0 else SQUARE
            made = annotation(region("a"), region("b", points), hour=24 * number + hour, number=identity)
            shown = prediction(region("a"), region("b"), version=version, hour=0)
            tasks.append({**task([made], [shown]), "id": identity})
    service.journal.reconcile(PROJECT, tasks)
    client = create_app(settings, service).test_client()
    client.get("/status")
    service.acceptance.wait(20)
    yield client
    service.close()


def page_of(client: FlaskClient) -> str:
    return client.get("/status", headers={"Accept": "text/html"}).get_data(as_text=True)


def test_figures_are_in_the_json_the_metrics_and_the_page(client: FlaskClient):
    facts = client.get("/status").get_json()["acceptance"][PROJECT]
    assert [version["name"] for version in facts["versions"]] == list(VERSIONS)
    assert facts["versions"][0]["predicted"] == 14
    rates = [version["unchanged_rate"] for version in facts["versions"]]
    metrics = client.get("/metrics").get_data(as_text=True)
    wanted = f'geoprelabel_prelabels{{outcome="unchanged",project="{PROJECT}",version="{VERSIONS[0]}"}}'
    assert f"{wanted} {facts['versions'][0]['unchanged']:.1f}" in metrics
    assert f'geoprelabel_edit_distance{{project="{PROJECT}",version="{VERSIONS[1]}"}}' in metrics
    page = page_of(client)
    for rate in rates:
        assert f"({100 * rate:.0f}&nbsp;%)" in page


def test_nothing_on_the_page_is_loaded_run_or_let_in(client: FlaskClient):
    page = page_of(client)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for loaded in ("src=", "url(", "@import", "<link", "<iframe"):
        assert loaded not in page


def test_each_version_has_a_curve_of_points_inside_the_picture(client: FlaskClient):
    page = page_of(client)
    pictures = [f"<svg{rest.split('</svg>')[0]}</svg>" for rest in page.split("<svg")[1:]]
    assert len(pictures) == 2
    for picture in pictures:
        width, height = (float(number) for number in picture.split("viewBox='")[1].split("'")[0].split()[2:])
        circles = picture.split("<circle")[1:]
        assert len(circles) == len({circle.split("cx=")[1].split("<title")[0] for circle in circles}) > len(VERSIONS)
        for circle in circles:
            x, y = (float(circle.split(f"{name}=")[1].split()[0]) for name in ("cx", "cy"))
            assert 0 <= x <= width
            assert 0 <= y <= height
        assert picture.count("<polyline") == len(VERSIONS)


def test_one_point_and_none_are_pictures_too():
    point = {"from": 1.7e9, "version": "v1", "unchanged_rate": 0.5, "edit_distance": None, "predicted": 4}
    facts = {"span_s": 600.0, "curve": [point]}
    drawn = status_page._curves("Unchanged", facts, "unchanged_rate", 1.0, {"v1": "v0"})
    assert drawn.count("<circle") == 1
    assert "nan" not in drawn
    assert status_page._curves("Distance", facts, "edit_distance", None, {"v1": "v0"}) == ""
    assert "Nothing yet" in status_page._acceptance({})


def full_page(client: FlaskClient) -> str:
    """The page with all that it may have to show: long names, long sentences, a training at work."""
    now, project, version = time.time(), "17.1700000000", "compact-d3a6b765-0c1d2e3f"
    facts = client.get("/status").get_json()
    facts |= {
        "label_studio": "https://label-studio.a-long-name-of-a-team.example.org:8080",
        "untrained_labels": {project: ["Moon base", "Solar panel", "Greenhouse"]},
        "is_journal_behind": True,
        "disk_free_mb": 300,
        "versions": [{"project": project, "name": version, "live": True, "created": "2026-03-01T12:00:00+00:00",
                      "parent": "", "metrics": {}, "note": NOTE}] * 3,
        "training": {project: {"state": "training", "message": "learning from 214 tiles, step 310 of 800",
                               "progress": 0.39, "started": now - 75, "finished": 0, "version": "",
                               "duration_s": 75.0, "changes_since": 3}},
        "findings": [{"when": now - 40, "project": project, "task": 17, "annotation": 101, "region": "c0ffee" * 4,
                      "reason": "self-crossing", "message": "the outline crosses itself at 3 %, 5 %; redraw it",
                      "url": "https://ls.example/projects/17/data?task=17"}] * 2,
        "finding_counts": {"self-crossing": 2},
        "problems": [{"when": now - 5, "where": "interactive predict, project 17.1700000000, task 17", "message":
                      "https://images.example/orthos/2026/very-long-name-of-a-scene_r0012_c0045.jpg?…: no address of"
                      " images.example is public; add it to GEOPRELABEL_IMAGE_HOSTS to have images fetched there"}],
    }  # fmt: skip
    return status_page.render(facts)


NOTE = (
    "learned from 214 tiles; F1 0.58 → 0.71 on 31 held-out tiles (95 % sure between +0.04 and +0.22), and no label lost"
)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width_px", "scheme"), [(320, "light"), (390, "dark"), (844, "light"), (1000, "light"), (1280, "light")]
)
def test_it_is_readable_on_a_phone(client: FlaskClient, tmp_path: Path, width_px: int, scheme: str):
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium or Chrome: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    shown = full_page(client)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": width_px, "height": 844}, color_scheme=scheme)  # type: ignore[arg-type]
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.set_content(shown)
            assert [url for url in asked if not url.startswith("about:")] == []
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            cut = page.evaluate(
                """() => [...document.querySelectorAll('table, td, td *, th, p')].filter(e => e.getClientRects().length
                    && e.getBoundingClientRect().right > innerWidth).map(e => e.innerText)"""
            )
            assert cut == []
            assert page.get_by_text(NOTE).first.is_visible()
            for picture in page.locator("svg").all():
                box = picture.bounding_box()
                assert box is not None
                assert box["width"] >= width_px - 40 or box["width"] > 300
                assert box["height"] > 60
            dot, ground = page.evaluate(
                """() => [getComputedStyle(document.querySelector('circle.v0')).fill,
                          getComputedStyle(document.querySelector('svg text')).fill]"""
            )
            assert page.evaluate("getComputedStyle(document.querySelector('polyline.v0')).fill") == "none"
            assert dot == "rgb(31, 119, 180)"
            assert ground == ("rgb(0, 0, 0)" if scheme == "light" else "rgb(255, 255, 255)")
            page.screenshot(path=tmp_path / f"{width_px}-{scheme}.png", full_page=True)
        finally:
            browser.close()
