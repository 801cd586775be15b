"""Label Studio's own page in a real Chromium, for tests that must see what an annotator sees.

Places are given in percent of the image, as Label Studio counts them. Nothing the page asks for leaves this machine.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from playwright.sync_api import Page, Response, Route, sync_playwright

SmartTool = Literal["keypoint", "rectangle"]

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_TOOLS = {"keypoint": "KeyPointTool-dynamic", "rectangle": "RectangleTool-dynamic"}
_PROMPT_TYPES = {"keypoint": "keypointlabels", "rectangle": "rectanglelabels"}

_IMAGE = "[...Htx.annotationStore.selected.names.values()].find(tag => tag.type === 'image')"
_REGION = """region => ({
    id: region.cleanId, type: region.type, parent_id: region.parentID || '',
    score: region.score ?? region.results?.map(result => result.score).find(score => score != null) ?? null,
    labels: region.labeling?.selectedLabels?.map(label => label.value) ?? region.labels ?? [],
    points_pct: (region.points || []).map(point => [point.x, point.y]),
    is_prompt: !!region.dynamic,
})"""


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; None where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    return str(mac) if mac.exists() else None


@dataclass(frozen=True, slots=True)
class PaintedRegion:
    """One region as the page holds and paints it."""

    id: str
    type: str
    """Label Studio's word: ``polygonregion``, ``keypointregion``, ``rectangleregion``."""

    labels: tuple[str, ...]
    points_pct: tuple[tuple[float, float], ...]
    """Vertices of a polygon in percent of the image; empty for other types."""

    score: float | None
    parent_id: str
    is_prompt: bool
    """Whether it is a click or box for the backend rather than a label."""


@contextlib.contextmanager
def label_studio_page(url: str, *, width: int = 1500, height: int = 1100) -> Iterator[LabelStudioPage]:
    """A fresh browser at a Label Studio on this machine. Raises RuntimeError where no browser is installed."""
    executable = find_chromium()
    if executable is None:
        raise RuntimeError("no Chromium or Chrome found (Debian, Ubuntu: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=_FLAGS)
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            page = LabelStudioPage(context.new_page(), url)
            context.route("**/*", page._stay_here)
            yield page
        finally:
            browser.close()


class LabelStudioPage:
    """What an annotator does, and what the page then shows."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url.rstrip("/")
        self.refused_urls: list[str] = []
        """Requests that would have left this machine, and were not made."""

        self.errors: list[str] = []
        """Exceptions that the page's own scripts did not catch."""

        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _stay_here(self, route: Route) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            self.refused_urls.append(route.request.url)
            route.abort()

    def login(self, user: str, password: str) -> None:
        """Through the login form."""
        self.page.goto(f"{self.url}/user/login/")
        self.page.fill("input[name=email]", user)
        self.page.fill("input[name=password]", password)
        self.page.click("button[type=submit]")
        self.page.wait_for_url(lambda url: "/user/login" not in url)

    def open_task(self, project: int, task: int) -> None:
        """Returns when the image is drawn and the page takes clicks."""
        self.page.goto(f"{self.url}/projects/{project}/data?task={task}")
        self.page.wait_for_function(
            f"""() => {{
                const image = window.Htx?.annotationStore?.selected && {_IMAGE};
                return image?.stageRef && image.stageWidth > 1 && document.querySelector('.konvajs-content canvas');
            }}""",
            timeout=60_000,
        )
        self._settle()

    def auto_annotation(self, on: bool = True, *, auto_accept: bool = False) -> None:
        """Set the two switches below the image. The second is there only while the first is on."""
        self._switch("auto-annotation", "Htx.autoAnnotation", on)
        if on:
            self._switch("auto-accept", "Htx.autoAcceptSuggestions", auto_accept)

    def _switch(self, name: str, state: str, on: bool) -> None:
        toggle = self.page.locator(f"[data-testid=bottombar-{name}-toggle]")
        toggle.wait_for(state="attached", timeout=30_000)
        if bool(self.page.evaluate(f"() => {state}")) != on:
            # The checkbox itself is hidden behind its picture.
            toggle.click(force=True)
            self.page.wait_for_function(f"() => !!{state} === {json.dumps(on)}")

    def pick_smart_tool(self, kind: SmartTool, label: str | None = None) -> None:
        """Take the smart tool from the toolbar: labelled prompts also need a label, the first one unless named.

        The page drops the label after each prompt, so pick again before the next where prompts are labelled.
        """
        # All smart tools share the last button of the toolbar, which goes on to the next at each click.
        button = self.page.locator(".lsf-toolbar__group").last.locator("> .lsf-tool").first
        for _ in range(6):
            if self.selected_tool() == _TOOLS[kind]:
                break
            button.click()
            self.page.wait_for_timeout(150)
        if self.selected_tool() != _TOOLS[kind]:
            raise AssertionError(f"the page has no smart {kind} tool; the selected tool is {self.selected_tool()!r}")
        row = self._label_row(kind)
        if row is None:
            if label is not None:
                raise AssertionError(f"the config's smart {kind} prompts have no labels; {label!r} was asked for")
            return
        entries = self.page.locator(".lsf-labels").nth(row).locator(".lsf-label")
        # An entry shows its hot key behind its name.
        names = [text.split("\n")[0].strip() for text in entries.all_inner_texts()]
        if label is not None and label not in names:
            raise AssertionError(f"the smart {kind}'s labels are {names}; {label!r} was asked for")
        entry = entries.nth(names.index(label) if label is not None else 0)
        if "selected" not in (entry.get_attribute("class") or ""):
            entry.click()
            self.page.wait_for_timeout(100)

    def selected_tool(self) -> str:
        """Label Studio's name of the tool in hand, such as ``KeyPointTool-dynamic``; empty where there is none."""
        found = self.page.evaluate(f"() => {_IMAGE}.getToolsManager().findSelectedTool()?.fullName ?? ''")
        return str(found)

    def _label_row(self, kind: SmartTool) -> int | None:
        """Which of the page's rows of labels belongs to the smart tag of that kind; None where its tag has none."""
        controls = self.page.evaluate(
            """() => [...Htx.annotationStore.selected.names.values()]
                .filter(tag => tag.type.endsWith('labels') && tag.children?.length)
                .map(tag => [tag.type, !!tag.smart])"""
        )
        of_kind = [i for i, (tag_type, _) in enumerate(controls) if tag_type == _PROMPT_TYPES[kind]]
        return next((i for i in of_kind if controls[i][1]), of_kind[0] if of_kind else None)

    def click_pct(self, x_pct: float, y_pct: float, *, alt: bool = False) -> None:
        """Click the image; with ``alt`` as a click off the object."""
        x, y = self.viewport_xy(x_pct, y_pct)
        if alt:
            self.page.keyboard.down("Alt")
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.up()
        if alt:
            self.page.keyboard.up("Alt")

    def drag_pct(self, points_pct: Sequence[tuple[float, float]], *, steps: int = 8) -> None:
        """Press at the first point, pass the others, let go at the last."""
        x, y = self.viewport_xy(*points_pct[0])
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for point in points_pct[1:]:
            x, y = self.viewport_xy(*point)
            self.page.mouse.move(x, y, steps=steps)
        self.page.mouse.up()

    def viewport_xy(self, x_pct: float, y_pct: float) -> tuple[float, float]:
        """Where a place in the image is in the window, in its pixels."""
        left, top, width, height = self.page.evaluate(
            f"""() => {{
                const image = {_IMAGE};
                const box = image.stageRef.container().getBoundingClientRect();
                return [box.x + image.zoomingPositionX, box.y + image.zoomingPositionY,
                        image.stageWidth * image.zoomScale, image.stageHeight * image.zoomScale];
            }}"""
        )
        return left + width * x_pct / 100, top + height * y_pct / 100

    @contextlib.contextmanager
    def prompting(self, *, timeout_s: float = 120) -> Iterator[dict[str, Any]]:
        """Around a click or drag: waits for the backend's answer, and gives what was asked and answered.

        Afterwards ``sent`` holds the regions of the prompt, ``answer`` the body that came back, where the page itself
        shows nothing of an error.
        """
        exchange: dict[str, Any] = {}
        with self.page.expect_response(
            lambda response: "interactive-annotating" in response.url, timeout=timeout_s * 1000
        ) as waited:
            yield exchange
        response: Response = waited.value
        exchange["sent"] = json.loads(response.request.post_data or "{}").get("context", {}).get("result", [])
        exchange["answer"] = response.json()

    def wait_for_suggestion(self, count: int = 1, *, timeout_s: float = 30) -> list[PaintedRegion]:
        """The suggestions, once there are that many and none is on its way."""
        self.page.wait_for_function(
            "count => Htx.annotationStore.selected.suggestions.size >= count && !Htx.awaitingSuggestions",
            arg=count,
            timeout=timeout_s * 1000,
        )
        self._settle()
        return self.suggestions()

    def accept_suggestion(self) -> list[PaintedRegion]:
        """Accept all suggestions with the button below the image; the task's regions afterwards."""
        self.page.click("[data-testid=bottombar-accept-suggestions-button]")
        self.page.wait_for_function("() => Htx.annotationStore.selected.suggestions.size === 0")
        self._settle()
        return self.regions()

    def submit(self, *, timeout_s: float = 60) -> dict[str, Any]:
        """Submit or update the annotation; the body that the page sent. Raises AssertionError where it was refused."""
        with self.page.expect_response(
            lambda response: "/annotations" in response.url and response.request.method in ("POST", "PATCH"),
            timeout=timeout_s * 1000,
        ) as waited:
            self.page.click("[data-testid=bottombar-submit-button], [data-testid=bottombar-update-button]")
        response: Response = waited.value
        assert response.ok, f"submitting was answered with {response.status}: {response.text()[:300]}"
        body: dict[str, Any] = json.loads(response.request.post_data or "{}")
        return body

    def regions(self) -> list[PaintedRegion]:
        """The annotation's regions, prompts included, in the outliner's order."""
        return [_region(r) for r in self.page.evaluate(f"() => Htx.annotationStore.selected.regions.map({_REGION})")]

    def suggestions(self) -> list[PaintedRegion]:
        """What the backend suggests and nobody has accepted yet."""
        found = self.page.evaluate(f"() => [...Htx.annotationStore.selected.suggestions.values()].map({_REGION})")
        return [_region(r) for r in found]

    def outliner_count(self) -> int:
        """Regions listed in the panel beside the image."""
        return self.page.locator(".lsf-outliner-item").count()

    def colour_at(self, x_pct: float, y_pct: float) -> tuple[int, int, int]:
        """Red, green and blue that the window shows at a place in the image, with everything painted over it."""
        x, y = self.viewport_xy(x_pct, y_pct)
        clip = {"x": round(x), "y": round(y), "width": 1, "height": 1}
        png = self.page.screenshot(clip=clip)  # type: ignore[arg-type]
        red, green, blue = self.page.evaluate(
            """async base64 => {
                const image = new Image();
                image.src = 'data:image/png;base64,' + base64;
                await image.decode();
                const canvas = new OffscreenCanvas(1, 1).getContext('2d');
                canvas.drawImage(image, 0, 0);
                return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
            }""",
            base64.b64encode(png).decode(),
        )
        return red, green, blue

    def screenshot(self, path: Path) -> Path:
        """The window as a PNG file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return path

    def _settle(self) -> None:
        # Konva paints on the second frame after a change.
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_timeout(250)


def _region(found: Mapping[str, Any]) -> PaintedRegion:
    return PaintedRegion(
        id=str(found["id"]),
        type=str(found["type"]),
        labels=tuple(found["labels"] or ()),
        points_pct=tuple((float(x), float(y)) for x, y in found["points_pct"]),
        score=found["score"],
        parent_id=str(found["parent_id"]),
        is_prompt=bool(found["is_prompt"]),
    )
