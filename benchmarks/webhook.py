"""What a connected backend costs an annotator's save: the same saves in three projects of a real Label Studio, in turn.

    python benchmarks/webhook.py [--saves 40]

Label Studio tells its backends inside the save, and the annotator waits for that. One project has no backend. One has
this one as `push` connects it, with its webhook. One has a webhook to a server that answers at once and does nothing:
what Label Studio itself spends on telling anybody, and no backend can save. First no training runs (idle), then one
runs all the time (training), and at last "start training on annotation submission" is switched on as well (switch):
each save carries two calls then, though the webhook alone starts training. Prints one JSON line, in milliseconds:

plain_*        a save without a backend
connected_*    the same save with it
added_*        median difference of the two: saves one after the other, of which each is first by turns
floor_*        the same difference for the webhook to a server that does nothing
answer_*       what the backend itself took of that, on average of all its answers to Label Studio's events
goal_ms        what the project has set for the difference while training runs; ``missed`` names what is above it

and on standard error what that means, in a sentence.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend.client import LabelStudio
from demo.backend import BackendServer
from demo.label_studio import LabelStudioServer, label_studio_venv
from demo.scene import make_scene
from tests.small_server import SmallServer, as_json

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "buildings.xml"
GOAL_MS = 50.0
REGIONS, CORNERS = 20, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=40, help="of each kind")
    saves = parser.parse_args().saves
    venv = label_studio_venv()
    if venv is None:
        sys.exit("no Label Studio: `make demo` installs one, or set GEOPRELABEL_LS_VENV to an environment with one")
    with tempfile.TemporaryDirectory() as scratch, LabelStudioServer(venv, Path(scratch) / "label-studio") as server:
        folder = Path(scratch)
        make_scene(folder / "town.tif", size_px=(1200, 1000))
        # Training is started by hand below, or it would run in the first half as well.
        backend = BackendServer(
            folder / "data", LABEL_STUDIO_URL=server.url, LABEL_STUDIO_API_KEY=server.token,
            START_TRAINING_EACH_N_UPDATES="1000000", GEOPRELABEL_TRAINING_MAX_S="60",
        )  # fmt: skip
        with backend, LabelStudio(server.url, server.token) as api, SmallServer(lambda asked: as_json({})) as nobody:
            backend.command("ingest", str(folder / "town.tif"))
            figures = measure(backend, api, nobody.url, saves)
            print(json.dumps(figures))
            print(meaning(figures, saves), file=sys.stderr)
            # A trainer outlives its server, and would write into a folder that is being removed.
            while is_training(backend):
                time.sleep(0.5)


def measure(backend: BackendServer, api: LabelStudio, nobody: str, saves: int) -> dict[str, Any]:
    tasks = str(backend.data_dir / "tasks.json")
    connected = backend.command(
        "push", tasks, "--project", "with", "--config", str(CONFIG), "--backend-url", backend.url
    )
    project, backend_id = int(connected["project_id"]), int(connected["backend_id"])
    plain, floor = (
        int(backend.command("push", tasks, "--project", name, "--config", str(CONFIG), "--no-connect")["project_id"])
        for name in ("without", "floor")
    )
    api.create_webhook(floor, f"{nobody}/webhook", {})
    alike = list(zip(*([task["id"] for task in api.tasks(each)] for each in (plain, project, floor)), strict=True))
    for tasks_of_one in alike[:3]:
        saved(api, tasks_of_one, 0)  # what is slow once, on all sides
    before = answering(backend)
    figures = told("idle", [saved(api, alike[i % len(alike)], i) for i in range(saves)])
    figures["answer_idle_ms"] = per_event(before, before := answering(backend))
    for when in ("training", "switch"):
        api.update_project(project, start_training_on_annotation_update=when == "switch")
        times = []
        while len(times) < saves:
            if not is_training(backend):
                api.start_training(backend_id)
                time.sleep(0.2)
                continue
            times.append(saved(api, alike[len(times) % len(alike)], len(times)))
        figures |= told(when, times)
        figures[f"answer_{when}_ms"] = per_event(before, before := answering(backend))
    missed = [name for name in ("added_training_ms", "added_switch_ms") if figures[name] > GOAL_MS]
    return {**figures, "goal_ms": GOAL_MS, "missed": missed}


def is_training(backend: BackendServer) -> bool:
    return any(run["state"] == "training" for run in backend.get("/status")["training"].values())


def meaning(figures: dict[str, Any], saves: int) -> str:
    """What an annotator feels, in words."""
    added, plain, floor, own, twice = (
        figures[f"{name}_ms"]
        for name in ("added_training", "plain_training", "floor_training", "answer_training", "added_switch")
    )
    missed = f"missed by {', '.join(figures['missed'])}" if figures["missed"] else "met"
    return (
        f"With training on, a save takes {added:+g} ms beside {plain:g} ms without a backend (medians of {saves} saves;"
        f" {floor:+g} ms with a webhook to a server that does nothing; the backend's own answers take {own:g} ms), and"
        f" {twice:+g} ms where Label Studio calls it twice. The"
        f" goal is {GOAL_MS:g} ms at most: {missed}."
    )


def answering(backend: BackendServer) -> tuple[float, float]:
    """Seconds spent on events so far, and how many there were."""
    with urllib.request.urlopen(f"{backend.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    seconds, count = (
        sum(
            float(value)
            for value in re.findall(rf'^geoprelabel_request_seconds_{what}{{route="webhook".*}} (\S+)$', text, re.M)
        )
        for what in ("sum", "count")
    )
    return seconds, count


def per_event(before: tuple[float, float], after: tuple[float, float]) -> float:
    return round((after[0] - before[0]) / max(after[1] - before[1], 1) * 1000, 1)


def saved(api: LabelStudio, tasks: Sequence[int], number: int) -> tuple[float, ...]:
    """Milliseconds that the same save takes on each of the tasks."""
    spent = {}
    orders = list(itertools.permutations(tasks))
    for task in orders[number % len(orders)]:
        begun = time.perf_counter()
        api.create_annotation(task, drawn(number))
        spent[task] = (time.perf_counter() - begun) * 1000
    return tuple(spent[task] for task in tasks)


def drawn(number: int) -> list[dict[str, Any]]:
    """As much as an annotator has on a tile of a town."""
    side = [(0, 0), (2, 0), (4, 0), (4, 2), (4, 4), (2, 4), (0, 4), (0, 2)][:CORNERS]
    return [
        {"id": f"r{number}-{i}", "from_name": "polygon", "to_name": "image", "type": "polygonlabels",
         "original_width": 512, "original_height": 512, "image_rotation": 0, "origin": "manual",
         "value": {"points": [[x + 19 * (i % 5) + number % 7, y + 19 * (i // 5)] for x, y in side],
                   "closed": True, "polygonlabels": ["building"]}}
        for i in range(REGIONS)
    ]  # fmt: skip


def told(when: str, times: Sequence[tuple[float, ...]]) -> dict[str, float]:
    plain, connected, floor = zip(*times, strict=True)
    return {
        f"plain_{when}_ms": round(statistics.median(plain), 1),
        f"connected_{when}_ms": round(statistics.median(connected), 1),
        f"added_{when}_ms": round(statistics.median(b - a for a, b in zip(plain, connected, strict=True)), 1),
        f"floor_{when}_ms": round(statistics.median(b - a for a, b in zip(plain, floor, strict=True)), 1),
        f"connected_{when}_ms_p95": round(sorted(connected)[int(0.95 * (len(times) - 1))], 1),
        f"plain_{when}_ms_p95": round(sorted(plain)[int(0.95 * (len(times) - 1))], 1),
    }


if __name__ == "__main__":
    main()
