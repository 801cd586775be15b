"""What must hold of the report: everything counted is there, nothing is fetched, nothing from outside is believed."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import shapely
from affine import Affine
from numpy.typing import NDArray
from playwright.sync_api import sync_playwright
from shapely import MultiPolygon, Polygon

from backend.earth import lineage_of, lonlat_geometry, versions
from backend.errors import BadImage
from backend.report import Conflict, ExportReport, report_page
from backend.sketch import WORST_REPAIRS, Repair, Sketch, area_change
from backend.tile import Tile
from backend.vectorize import repair

from .browser import _FLAGS, find_chromium

HOSTILE = "\"><script>alert(1)</script>' onload=x <img src=//evil.example/x.png> &amp;"
TILE = Tile((400, 300), "EPSG:32645", Affine(0.2, 0, 354_166.4, 0, -0.2, 3_057_067.0), scene="town", gsd_m=0.2)
EUROPE = Tile((400, 300), "EPSG:25832", Affine(0.2, 0, 500_000, 0, -0.2, 5_550_000), scene="stadt", gsd_m=0.2)


def box_on(tile: Tile, x: float, y: float, side: float = 40) -> Polygon | MultiPolygon:
    geometry = lonlat_geometry(shapely.box(x, y, x + side, y + side), tile)
    assert geometry is not None
    return geometry


def bow_tie(number: int, *, text: str = "crosses itself", change: float | None = None) -> Repair:
    ring = np.array([(100, 100), (160, 150), (160, 100), (100, 150)], float) + number
    after = shapely.union_all(repair(Polygon(ring)))
    return Repair(number, f"region-{number}", text, ring, after, -0.01 * number if change is None else change)


def report_of(**changes: Any) -> ExportReport:
    facts: dict[str, Any] = {
        "out": Path("out/buildings.geojson"), "tasks": 41, "annotations": 39, "regions": 1234, "features": 1107,
        "merged": 58, "duplicates": 63, "repaired": 12, "dropped": {"left-over prompt": 17}, "refused": {"no place": 2},
        "findings": ["task 3, annotation 30: crosses itself"],
        "crs": [lineage_of(TILE, None), lineage_of(EUROPE, None)],
        "versions": versions(), "labels": {"building": 1000, "road": 107}, "label_area_m2": {"building": 123456.7},
        "conflicts": [Conflict(("a1", "b2"), ("building", "road"), (3, 4), 0.42, (85.52341, 27.63412))],
        "conflict_count": 7, "chosen": {"newest submitted": 36, "ground truth": 3},
        "made_at": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return ExportReport(**{**facts, **changes})


def full_sketch() -> Sketch:
    sketch = Sketch()
    for number, tile in enumerate((TILE, EUROPE), 1):
        sketch.add_tile(tile, image_url=f"http://host/tiles/{number}.jpg", task_id=number)
        shapes = [box_on(tile, x, y) for x in range(20, 340, 60) for y in range(20, 240, 60)]
        sketch.add_features(shapes, ["building"] * (len(shapes) - 1) + ["road"])
    for number in range(13):
        sketch.add_repair(bow_tie(number))
    return sketch


def grey(url: str, task_id: Any) -> NDArray[np.uint8]:
    return np.full((300, 400, 3), 90, np.uint8)


def images_in(page: str) -> list[NDArray[np.uint8]]:
    found = re.findall(r'href="data:image/\w+;base64,([^"]+)"', page)
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def points_of(svg: str, kind: str) -> NDArray[np.float64]:
    """All points of the paths of that class or fill."""
    paths = re.findall(rf"<path [^>]*{kind}[^>]*>", svg)
    data = " ".join(re.findall(r' d="([^"]*)"', " ".join(paths)))
    return np.array([float(text) for text in re.findall(r"-?[\d.]+", data)]).reshape(-1, 2)


class _Tags(HTMLParser):
    """Checks that what is opened is closed, and remembers names of tags and attributes."""

    OPEN_ENDED = frozenset({"meta", "br", "html", "body", "path", "image", "rect", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.seen |= {tag, *(f"{tag}@{name}" for name, _ in attrs)}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action")]
        if tag not in self.OPEN_ENDED:
            self.waiting.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.OPEN_ENDED:
            self.waiting.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPEN_ENDED:
            assert self.waiting.pop() == tag


# What it says


def test_every_count_is_on_the_page() -> None:
    page = report_page(report_of(), full_sketch())
    for text in ("1,107", "1,234", "41", "39", "58", "63", "12", "17", "left-over prompt", "no place", "12.35 ha",
                 "first 1 of 7 places", "42%", "27.634120, 85.523410", "newest submitted", "2026-01-02 03:04:05 UTC",
                 "ETRS89 was taken for WGS 84", "Inverse of UTM zone 45N", *versions().values()):  # fmt: skip
        assert text in page, text


def test_a_report_without_pictures_is_whole() -> None:
    page = report_page(report_of(dropped={}, refused={}, conflicts=[], conflict_count=0, findings=[], repaired=0))
    assert "Nothing was left out" in page
    assert "No two labels claim the same ground" in page
    assert "Every outline was valid" in page
    assert "<svg" not in page


def test_the_page_is_well_formed_and_needs_nothing() -> None:
    tags = _Tags()
    tags.feed(report_page(report_of(), full_sketch(), image_of=grey))
    assert tags.waiting == []
    assert tags.links
    assert all(link.startswith("data:image/") for link in tags.links)
    assert not tags.seen & {"script", "iframe", "object", "embed", "link", "a", "form"}


def test_what_came_from_outside_is_never_markup() -> None:
    sketch = Sketch()
    sketch.add_tile(TILE, image_url=HOSTILE, task_id=HOSTILE)
    sketch.add_features([box_on(TILE, 50, 50)], [HOSTILE])
    sketch.add_repair(Repair(HOSTILE, HOSTILE, HOSTILE, bow_tie(0).before, bow_tie(0).after, 0.5))
    report = report_of(
        out=Path(HOSTILE.replace("/", "")), dropped={HOSTILE: 1}, refused={HOSTILE: 2}, findings=[HOSTILE],
        labels={HOSTILE: 1}, label_area_m2={HOSTILE: 5.0}, chosen={HOSTILE: 1}, made_at=HOSTILE,
        versions={HOSTILE: HOSTILE},
        conflicts=[Conflict((HOSTILE, HOSTILE), (HOSTILE, HOSTILE), (HOSTILE,), 0.5, (0.0, 0.0))],
        crs=[lineage_of(Tile((5, 5), "EPSG:32645", TILE.transform, scene=HOSTILE), None)],
    )  # fmt: skip
    tags = _Tags()
    page = report_page(report, sketch)
    tags.feed(page)
    assert tags.waiting == []
    assert not tags.seen & {"script", "img"}
    assert not any(name.partition("@")[2].startswith("on") for name in tags.seen)
    assert "&lt;script&gt;" in page


# Repairs


def test_the_repairs_that_changed_most_are_shown_before_and_after() -> None:
    sketch = full_sketch()
    sketch.add_repair(bow_tie(99, change=math.nan))
    assert [found.task for found in sketch.repairs] == list(range(12, 12 - WORST_REPAIRS, -1))
    page = report_page(report_of(repaired=14), sketch)
    assert page.count('aria-label="as drawn"') == page.count('aria-label="as exported"') == WORST_REPAIRS
    assert "The 10 of 14 that changed their area most" in page
    assert "−12.0%" in page


def test_a_repair_that_is_not_known_as_drawn_is_shown_all_the_same() -> None:
    sketch = Sketch()
    sketch.add_repair(Repair(1, "r", "no idea", np.empty((0, 2)), shapely.box(0, 0, 5, 5), math.nan))
    sketch.add_repair(Repair(2, "s", "nothing left", np.array([[0, 0], [math.nan, 1]]), Polygon(), -1.0))
    page = report_page(report_of(), sketch)
    assert "unknown" in page
    assert "nan" not in page.split("<style>")[1].split("</style>")[1]


@pytest.mark.parametrize(
    ("ring", "after", "change"),
    [
        ([(0, 0), (10, 0), (10, 10), (0, 10)], shapely.box(0, 0, 10, 10), 0),
        ([(0, 0), (10, 0), (10, 10), (0, 10)], shapely.box(0, 0, 10, 5), -0.5),
        ([(0, 0), (10, 10), (10, 0), (0, 10)], Polygon([(0, 0), (5, 5), (0, 10)]), 1),
        ([(0, 0), (10, 0), (10, 10), (0, 10)], Polygon(), -1),
        ([], shapely.box(0, 0, 1, 1), math.nan),
    ],
)
def test_a_change_is_a_share_of_the_larger_area(ring: Any, after: Polygon, change: float) -> None:
    assert area_change(np.array(ring, float).reshape(-1, 2), after) == pytest.approx(change, nan_ok=True)


# The map


def test_a_place_is_a_map_and_both_sides_of_the_antimeridian_are_one_place() -> None:
    maps, more = full_sketch().maps()
    assert ([drawn.features for drawn in maps], more) == ([24, 24], 0)
    assert sorted(round(drawn.centre_lonlat[0]) for drawn in maps) == [9, 86]
    sketch = Sketch()
    tile = Tile((400, 400), "EPSG:4326", Affine(1e-5, 0, 179.998, 0, -1e-5, -16.5), gsd_m=1.1)
    sketch.add_tile(tile)
    sketch.add_features([box_on(tile, 30, 50), box_on(tile, 180, 50), box_on(tile, 330, 50)], ["a"] * 3)
    (drawn,), _ = sketch.maps()
    assert abs(abs(drawn.centre_lonlat[0]) - 180) < 0.01
    at = points_of(drawn.svg, "fill-rule")
    assert np.ptp(at[:, 0]) > 500, "spread over the map, not heaped at its sides"


def test_a_pole_is_one_place() -> None:
    tile = Tile((400, 400), "EPSG:3413", Affine(1, 0, -200, 0, -1, 200), gsd_m=1.0)
    sketch = Sketch()
    sketch.add_tile(tile)
    sketch.add_features([box_on(tile, x, y) for x in (20, 180, 340) for y in (20, 180, 340)], ["ice"] * 9)
    (drawn,), _ = sketch.maps()
    assert abs(drawn.centre_lonlat[1]) > 89.99


def test_the_map_is_to_scale_with_north_up() -> None:
    sketch = Sketch()
    north_west, south_east = shapely.box(0, 0, 10, 10), shapely.box(390, 290, 400, 300)
    sketch.add_features([lonlat_geometry(shape, TILE) for shape in (north_west, south_east)], ["a", "b"])
    (drawn,), _ = sketch.maps()
    first, last = (points_of(drawn.svg, f'fill="{colour}"') for colour in sketch.colours().values())
    assert first[:, 1].max() < last[:, 1].min()
    assert first[:, 0].max() < last[:, 0].min()
    spread = np.ptp(np.concatenate([first, last]), axis=0)
    assert spread[1] / spread[0] == pytest.approx(300 / 400, rel=0.04), "but for the meridian's lean"


def test_images_of_tiles_lie_under_what_was_drawn_on_them() -> None:
    rgb = np.full((300, 400, 3), (40, 200, 40), np.uint8)
    rgb[100:160, 200:300] = (230, 20, 20)
    roof = shapely.box(200, 100, 300, 160)
    turned = Affine.translation(354_200, 3_057_000) @ Affine.rotation(30) @ Affine.scale(0.2, 0.2)
    for transform in (TILE.transform, turned):
        tile = Tile((400, 300), "EPSG:32645", transform, gsd_m=0.2)
        sketch = Sketch()
        sketch.add_tile(tile, image_url="http://host/1.jpg", task_id=1)
        sketch.add_features([lonlat_geometry(roof, tile)], ["roof"])
        (drawn,), _ = sketch.maps(lambda url, task_id: rgb)
        assert drawn.images == 1
        (picture,) = images_in(drawn.svg)
        outline = Polygon(points_of(drawn.svg, "fill-rule")[:-1])
        rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
        inside = shapely.contains_xy(outline, columns + 0.5, rows + 0.5)
        rim = shapely.contains_xy(outline.buffer(8).difference(outline.buffer(2)), columns + 0.5, rows + 0.5)
        is_red = (picture[..., 0] > 150) & (picture[..., 1] < 100)
        assert is_red[inside].mean() > 0.96
        assert is_red[rim & (picture[..., 3] > 0)].mean() < 0.04


def test_tiles_without_an_image_are_drawn_as_footprints() -> None:
    def broken(url: str, task_id: Any) -> NDArray[np.uint8]:
        raise BadImage("no such image")

    maps, _ = full_sketch().maps(broken)
    assert all(drawn.images == 0 and 'class="tiles"' in drawn.svg for drawn in maps)
    assert "footprints of tiles" in report_page(report_of(), full_sketch(), image_of=broken)


def test_a_large_export_makes_a_small_page() -> None:
    sketch = Sketch()
    rng = np.random.default_rng(5)
    for _ in range(4):
        lower = np.column_stack((85.5 + rng.uniform(0, 0.1, 25_000), 27.6 + rng.uniform(0, 0.1, 25_000)))
        sketch.add_features(shapely.box(*lower.T, *(lower + 1e-5).T), ["building", "road"] * 12_500)
    for number in range(3000):
        sketch.add_tile(TILE.crop(0, 0, 9, 9), image_url=f"http://host/{number}", task_id=number)
    asked: list[str] = []

    def image(url: str, task_id: Any) -> NDArray[np.uint8]:
        asked.append(url)
        return grey(url, task_id)

    page = report_page(report_of(features=100_000), sketch, image_of=image)
    assert len(page) < 2_000_000
    assert 1 <= len(asked) <= 64
    assert "one dot for each feature" in page
    (drawn,), _ = sketch.maps()
    (dots,) = images_in(drawn.svg)
    assert (dots[..., 3] > 0).mean() > 0.05


def test_an_export_of_nothing_has_a_report() -> None:
    sketch = Sketch()
    assert sketch.maps() == ([], 0)
    sketch.add_features([], [])
    sketch.add_tile(TILE)
    (drawn,), _ = sketch.maps()
    assert (drawn.features, drawn.tiles) == (0, 1)


# In a browser


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_and_asks_for_nothing(tmp_path: Path, scheme: Any) -> None:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium or Chrome found (Debian, Ubuntu: apt-get install chromium)")
    path = tmp_path / "report.html"
    path.write_text(report_page(report_of(), full_sketch(), image_of=grey), encoding="utf-8")
    requests: list[str] = []
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=_FLAGS)
        page = browser.new_context(viewport={"width": 1100, "height": 900}, color_scheme=scheme).new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        shown = page.inner_text("body")
        names, values = (page.locator(f".figures {tag}").all_inner_texts() for tag in ("dt", "dd"))
        cards = dict(zip(names, values, strict=True))
        sections = page.locator("h2").all_inner_texts()
        pictures = page.locator("svg").all()
        sizes = [picture.bounding_box() for picture in pictures]
        ground, ink = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
        page.set_viewport_size({"width": 390, "height": 800})
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        browser.close()
    assert requests == [path.as_uri()]
    assert said == []
    assert cards["features"] == "1,107"
    assert (cards["outlines repaired"], cards["conflicts"]) == ("12", "7")
    assert sections[:2] == ["Map", "Labels"]
    assert "How places became longitude and latitude" in sections
    assert "buildings.geojson" in shown
    assert len(pictures) == 2 + 2 * WORST_REPAIRS
    assert all(size and size["width"] > 100 and size["height"] > 100 for size in sizes)
    assert _is_light(ground) == (scheme == "light")
    assert _is_light(ink) == (scheme == "dark")
    assert overflow <= 0, "a phone must not scroll sideways"


def _is_light(colour: str) -> bool:
    return sum(int(text) for text in re.findall(r"\d+", colour)[:3]) > 3 * 128


@pytest.mark.parametrize("crowd", [0, 4])
def test_points_are_drawn_as_dots_of_their_colour(crowd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.sketch._MAX_VERTICES", 10 if crowd else 1000)
    sketch = Sketch()
    sketch.add_tile(TILE)
    places = TILE.px_to_lonlat(np.array([(50.0, 60.0), (300.0, 200.0)]))
    sketch.add_features([shapely.Point(place) for place in places], ["tree", "tree"])
    sketch.add_features([box_on(TILE, 100 + x, 100) for x in range(1 + crowd)], ["building"] * (1 + crowd))
    ((drawn,), more) = sketch.maps()
    assert (drawn.features, drawn.is_dots, more) == (3 + crowd, bool(crowd), 0)
    assert set(sketch.colours()) == {"tree", "building"}
    if not crowd:
        group = drawn.svg.partition("<title>tree</title>")[2].partition("</g>")[0]
        assert group.count(f'stroke="{sketch.colours()["tree"]}"') == 1
        assert re.findall(r"M[\d.]+ [\d.]+h0", group)[:2] == re.findall(r"M[\d.]+ [\d.]+h0", group)[2:]
