"""So much of Label Studio as training reads, over real HTTP: tasks that a test can change, and faults on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import cv2
from shapely import box

from backend import labelstudio
from backend.tile import Region, Tile

from .fakes import bright_image
from .small_server import Answer, Asked, SmallServer, as_json

CONFIG = """<View><Image name="image" value="$image"/><PolygonLabels name="polygon" toName="image">
<Label value="House"/></PolygonLabels><KeyPoint name="click" toName="image" smart="true"/></View>"""
CREATED = "2023-11-14T22:13:20Z"
NUMBER = 3
PROJECT = f"{NUMBER}.1700000000"
TOKEN = "0123456789abcdef"


class SmallLabelStudio:
    """One project whose images lie with Label Studio; ``fault`` may answer a request in its place."""

    def __init__(self, annotated: int = 0, *, port: int = 0) -> None:
        self.tasks: dict[int, dict[str, Any]] = {}
        self.fault: Callable[[Asked], Answer | None] = lambda asked: None
        self.server = SmallServer(self._answer, port)
        for number in range(1, annotated + 1):
            self.annotate(number)

    def annotate(self, number: int, **fields: Any) -> dict[str, Any]:
        """A task with one house that was drawn, as the event of it says."""
        tile = Tile.from_xyz(19, 1000 + number, 2000, size=(128, 128))
        parsed = labelstudio.parse_config(CONFIG)
        house = Region(box(30 + number, 50, 80 + number, 100), "House")
        annotation = {
            "id": 100 + number, "task": number, "was_cancelled": False, "ground_truth": False,
            "updated_at": f"2026-01-01T00:00:{number:02d}Z",
            "result": labelstudio.results_of([house], parsed.tags[0], tile, task_id=number), **fields,
        }  # fmt: skip
        data = {"image": f"/data/upload/{NUMBER}/{number}.png", "tile": tile.to_record()}
        self.tasks[number] = {"id": number, "data": data, "annotations": [annotation], "predictions": []}
        return {"action": "ANNOTATION_CREATED", "project": {"id": NUMBER, "created_at": CREATED},
                "task": {"id": number, "data": data}, "annotation": annotation}  # fmt: skip

    def __enter__(self) -> SmallLabelStudio:
        self.server.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.__exit__(*error)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a backend needs to find it."""
        return {"LABEL_STUDIO_URL": self.server.url, "LABEL_STUDIO_API_KEY": TOKEN}

    def _answer(self, asked: Asked) -> Answer:
        if (instead := self.fault(asked)) is not None:
            return instead
        if asked.path == f"/api/projects/{NUMBER}/":
            return as_json({"id": NUMBER, "created_at": CREATED, "label_config": CONFIG})
        if asked.path == "/api/tasks/":
            query = {name: values[0] for name, values in parse_qs(urlsplit(asked.target).query).items()}
            above = json.loads(query["query"])["filters"]["items"][0]["value"]
            listed = [task for number, task in sorted(self.tasks.items()) if number > above and task["annotations"]]
            return as_json({"tasks": listed[: int(query["page_size"])]})
        number = asked.path.removeprefix("/api/tasks/").removesuffix("/")
        if number.isdigit() and int(number) in self.tasks:
            return as_json(self.tasks[int(number)])
        if asked.path.startswith("/data/upload/"):
            left = 30 + int(asked.path.rpartition("/")[2].removesuffix(".png"))
            image = bright_image((left, 50, left + 50, 100), size=(128, 128))
            return Answer(200, cv2.imencode(".png", image)[1].tobytes(), {"Content-Type": "image/png"})
        return as_json({"detail": "not here"}, 404)
