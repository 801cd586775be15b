"""The whole product on this machine: ``make demo`` leaves a person in front of it, ``make demo CHECK=1`` proves it.

python -m demo.run [--scene FILE] [--check]
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backend import labelstudio
from backend.client import LabelStudio
from backend.labelstudio import PolygonTag
from demo.annotator import Truth, drawn
from demo.backend import REPOSITORY, BackendFailed, BackendServer
from demo.label_studio import LabelStudioFailed, LabelStudioServer, free_port, install, label_studio_venv
from demo.scene import make_scene

KEPT = REPOSITORY / ".demo"
CONFIG = REPOSITORY / "configs" / "buildings.xml"
TITLE = "GeoPrelabel demo"
ACCEPTED_TILES = 8


class CheckFailed(RuntimeError):
    """Something that must hold does not."""


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scene", type=Path, help="a georeferenced raster of yours; without it a synthetic one is made"
    )
    parser.add_argument("--truth", type=Path, help="with --check: true outlines of the scene, GeoJSON in EPSG:4326")
    parser.add_argument("--check", action="store_true", help="go through everything without a person, then stop")
    arguments = parser.parse_args()
    # So that `kill` ends the servers too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments.check:
            with tempfile.TemporaryDirectory(prefix="geoprelabel-demo-") as scratch:
                run(Path(scratch), arguments.scene, arguments.truth, check=True)
            print("demo: all checks passed")
        else:
            run(KEPT, arguments.scene, None, check=False)
    except (BackendFailed, LabelStudioFailed, CheckFailed) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; `make demo` goes on where you were, `rm -rf .demo` begins anew")
    return 0


def run(folder: Path, scene: Path | None, truth_path: Path | None, *, check: bool) -> None:
    """Bring everything up, and either wait for Ctrl-C or go through the checks."""
    folder.mkdir(parents=True, exist_ok=True)
    if scene is None:
        scene = folder / "demo_town.tif"
        if not scene.exists():
            _say("making a synthetic scene")
            make_scene(scene)
        truth_path = scene.with_name(f"{scene.stem}_truth.geojson")
    venv = label_studio_venv()
    if venv is None:
        _say("installing Label Studio, the first time")
        venv = install()
    with _both(venv, folder) as (server, backend):
        _say(f"cutting {scene.name} into tiles")
        ingested = backend.command("ingest", str(scene), "--out", str(backend.data_dir))
        tasks = str(backend.data_dir / "tasks.json")
        _say(f"{ingested['tiles']} tiles; predicting")
        predicted = str(backend.data_dir / "predictions.json")
        backend.command("predict", tasks, "--out", predicted, "--config", str(CONFIG))
        _say("pushing to Label Studio")
        pushed = backend.command(
            "push", predicted, "--project", TITLE, "--config", str(CONFIG), "--backend-url", backend.url
        )
        if check:
            with LabelStudio(server.url, server.token) as api:
                Checks(api, backend, pushed, Truth(truth_path) if truth_path else None, folder).run()
            return
        print(
            f"\n  Label Studio  {pushed['url']}\n  log in as     {server.user} / {server.password}\n"
            f"  backend       {backend.url}/status\n\n"
            "  Open a tile, turn on Auto-Annotation (bottom bar), pick the pink smart tool, click a roof.\n"
            "  Ctrl-C stops everything.\n"
        )
        signal.pause()


@contextlib.contextmanager
def _both(venv: Path, folder: Path) -> Iterator[tuple[LabelStudioServer, BackendServer]]:
    server = LabelStudioServer(venv, folder / "label-studio", port=_kept_port(folder / "label-studio.port", 8080))
    _say("starting Label Studio (half a minute the first time)")
    with server:
        backend = BackendServer(
            folder / "data",
            _kept_port(folder / "backend.port", 9090),
            LABEL_STUDIO_URL=server.url,
            LABEL_STUDIO_API_KEY=server.token,
            GEOPRELABEL_WEBHOOK_SECRET="demo-secret",
        )
        _say("starting the backend")
        with backend:
            yield server, backend


def _kept_port(file: Path, preferred: int) -> int:
    """The port of earlier runs, since tasks in Label Studio name it; at first the preferred one, or a free one."""
    if file.exists():
        return int(file.read_text())
    try:
        port = free_port(preferred)
    except LabelStudioFailed:
        port = free_port()
    file.write_text(str(port))
    return port


class Checks:
    """What a person would do and look at, one step after the other."""

    def __init__(
        self, api: LabelStudio, backend: BackendServer, pushed: dict[str, Any], truth: Truth | None, folder: Path
    ) -> None:
        self.api = api
        self.backend = backend
        self.project = int(pushed["project_id"])
        self.backend_id = int(pushed["backend_id"])
        self.truth = truth
        self.folder = folder
        self.tag: PolygonTag = labelstudio.parse_config(CONFIG.read_text()).tags[0]
        self.tasks = list(api.tasks(self.project))

    def run(self) -> None:
        """All of it. Raises CheckFailed at the first thing that does not hold."""
        self.pre_labels()
        self.click()
        accepted = self.accept()
        self.train()
        self.export(accepted)

    def pre_labels(self) -> None:
        polygons = [r for task in self.tasks for p in task["predictions"] for r in p["result"]]
        _must(bool(self.tasks), f"{len(self.tasks)} tasks are in Label Studio")
        _must(all(task["predictions"] for task in self.tasks), "every task has its prediction")
        _must(bool(polygons), f"{len(polygons)} polygons were predicted")

    def click(self) -> None:
        task = max(self.tasks, key=lambda task: len(task["predictions"][0]["result"]))
        ring = task["predictions"][0]["result"][0]["value"]["points"]
        x, y = (sum(values) / len(ring) for values in zip(*ring, strict=True))
        click = {
            "id": "click00001", "type": "keypoint", "from_name": "click", "to_name": "image", "origin": "manual",
            "original_width": 512, "original_height": 512, "image_rotation": 0, "is_positive": True,
            "value": {"x": x, "y": y, "width": 0.3, "labels": []},
        }  # fmt: skip
        answer = self.api.ask_backend(self.backend_id, task["id"], [click])
        regions = (answer.get("data") or {}).get("result") or []
        _must(bool(regions), f"a click on task {task['id']} is answered with a polygon")
        _must(regions[0]["value"].get("polygonlabels") == ["building"], "and with its class, building")

    def accept(self) -> list[dict[str, Any]]:
        """Annotate a block of neighbouring tiles: the truth where it is known, else what was predicted."""
        ordered = sorted(self.tasks, key=lambda task: task["data"]["tile"]["window"][1::-1])
        accepted = []
        for task in ordered[:ACCEPTED_TILES] if self.truth is None else ordered:
            result = drawn(task, self.truth, self.tag) if self.truth else task["predictions"][0]["result"]
            if result and len(accepted) < ACCEPTED_TILES * 2:
                self.api.create_annotation(task["id"], result, lead_time=1.0)
                accepted.append({**task, "drawn": result})
        _must(len(accepted) >= 4, f"{len(accepted)} tiles annotated and submitted")
        return accepted

    def train(self) -> None:
        before = self.backend.get("/versions")["versions"]
        begun = time.time()
        self.api.start_training(self.backend_id)
        state = self.backend.wait_for_training(str(self.project), since=begun)
        _must(state["state"] == "done", f"training: {state['message']}")
        after = self.backend.wait_for_version(state["version"])
        _must(len(after) == len(before) + 1, f"a new model version is listed: {state['version']}")
        version = next(v for v in self.backend.get("/status")["versions"] if v["name"] == state["version"])
        _must(version["metrics"]["judging"] is not None, "it was judged on tiles that it had not learned from")
        _must(
            version["live"] == (f"live: {version['name']}" in state["message"]), "and it is live only if it is better"
        )

    def export(self, accepted: list[dict[str, Any]]) -> None:
        out = self.folder / "labels.geojson"
        report = self.backend.command("export", "--project", str(self.project), "--out", str(out))
        _must(report["features"] > 0, f"{report['features']} features exported to GeoJSON")
        # Only some tiles are accepted: of a house that the others hold, a sliver may be all there is.
        checked = self.backend.command("validate", str(out), "--min-area-m2", "0")
        _must(not checked["findings"], "the export is valid")
        if self.truth is None:
            return
        wanted = {label.value for label in self.tag.labels}
        worst, mean = self.truth.agreement(out, accepted, wanted)
        _must(mean >= 0.98, f"exported polygons lie where the truth lies: mean IoU {mean:.4f}, worst {worst:.4f}")


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailed(f"does not hold: {what}")
    print(f"  ok  {what}", flush=True)


def _say(what: str) -> None:
    print(f"… {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
