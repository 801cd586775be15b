"""The last box of each task, for the clicks that refine it: Label Studio never sends clicks and boxes together.

Kept in ``DATA_DIR/boxes``, where all server processes find it: one small file a task, for two minutes after it was last
of use, gone when the annotation is saved or another object is begun. Nothing here raises; without a box, clicks are
answered by themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely
from shapely.errors import GEOSException
from shapely.geometry.base import BaseGeometry

from .whole import write_json

log = logging.getLogger(__name__)

Prompt = Mapping[str, Any]

KEPT_S = 120.0
"""How long a box is remembered after it was last of use, in seconds."""

MAX_BOXES = 1_000
"""Boxes that are remembered at once; the oldest go first."""

_REACH = 0.05
"""A click belongs to a box as far outside as this share of the box's longer side: boxes are drawn a little off. Any
further, and in a dense town the first click on the neighbour would count as one."""

_LEAST_SHARED = 0.1
"""Two answers are about one object where they share this much of the smaller one."""

_VALUE_KEYS = ("x", "y", "width", "height", "rotation", "labels", "rectanglelabels")


@dataclass(frozen=True, slots=True)
class LastBox:
    """A box that clicks may refine. Outlines are in percent of the image."""

    prompt: Prompt
    """The smart rectangle's result."""

    answer: BaseGeometry
    """What was answered to it alone; empty where that is not known."""

    is_refined: bool
    """Whether clicks refined it before."""

    def may_be_done(self, clicks: Sequence[Prompt]) -> bool:
        """Whether clicks that lie in it may begin another object: a first one, on ground that the answer leaves out."""
        if self.is_refined or self.answer.is_empty or len(clicks) != 1 or clicks[0].get("is_positive", True) is False:
            return False
        value, box = clicks[0]["value"], self.prompt["value"]
        apart = shapely.distance(self.answer, shapely.Point(float(value["x"]), float(value["y"])))
        return bool(apart > _REACH * max(float(box["width"]), float(box["height"])))

    def shares(self, alone: BaseGeometry) -> bool:
        """Whether what a click gets without the box is about the same object, or about none."""
        smaller = min(self.answer.area, alone.area)
        try:
            return bool(shapely.intersection(self.answer, alone).area >= _LEAST_SHARED * smaller)
        except GEOSException:  # outlines that rounding made cross themselves
            return True


class LastBoxes:
    """Remembers the box prompts of tasks. May be shared by threads and processes."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written before the first box."""
        self._folder = folder

    def remember(self, project: str, task: Any, box: Prompt, user: str = "") -> None:
        """Keep a smart rectangle's result as the task's last box. ``user`` is empty where nobody knows who drew it."""
        value = box.get("value")
        if not isinstance(value, Mapping):
            return
        kept = {
            "user": user,
            "box": {
                **{key: box.get(key) for key in ("id", "type", "from_name", "to_name", "image_rotation")},
                "value": {key: value[key] for key in _VALUE_KEYS if key in value},
            },
        }
        self._write(project, task, kept)

    def answered(self, project: str, task: Any, answer: BaseGeometry) -> None:
        """Keep what was answered to the task's last box alone, in percent."""
        self._add(project, task, answer=shapely.to_wkb(answer, hex=True))

    def refined(self, project: str, task: Any) -> None:
        """Clicks were answered together with the task's last box."""
        self._add(project, task, is_refined=True)

    def _add(self, project: str, task: Any, **more: Any) -> None:
        try:
            kept = {**json.loads(self._path(project, task).read_text(encoding="utf-8")), **more}
        except (OSError, ValueError, TypeError):
            return
        self._write(project, task, kept)

    def _write(self, project: str, task: Any, kept: Mapping[str, Any]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            write_json(self._path(project, task), kept)
        except (OSError, ValueError, TypeError) as error:
            log.warning("the box of task %s is not remembered: %s", task, error)

    def with_box(
        self,
        project: str,
        task: Any,
        clicks: Sequence[Prompt],
        user: str = "",
        is_accepted: Callable[[str], bool] = lambda box_id: False,
    ) -> LastBox | None:
        """The box that the clicks, keypoint results, refine; None where they mean another object, and then it is gone.

        They refine it where every click on the object lies in or at the box, or, with none such, a click off the object
        does. A box whose answer is in the annotation already (``is_accepted``, of its prompt's id) is done with.
        """
        path = self._path(project, task)
        try:
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink(missing_ok=True)
                return None
            kept = json.loads(path.read_text(encoding="utf-8"))
            box = kept["box"]
            if user and kept["user"] and user != kept["user"]:
                return None
            if is_accepted(str(box.get("id"))) or not _refines(clicks, box):
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
            answer = shapely.from_wkb(kept["answer"]) if "answer" in kept else shapely.Polygon()
            return LastBox(box, answer, bool(kept.get("is_refined")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError, GEOSException) as error:
            log.warning("the last box of task %s cannot be read: %s", task, error)
            return None

    def forget(self, project: str, task: Any) -> None:
        """The task's annotation was saved, or its last prompt deleted."""
        try:
            self._path(project, task).unlink(missing_ok=True)
        except OSError as error:
            log.warning("the last box of task %s cannot be removed: %s", task, error)

    def _tidy(self) -> None:
        """Remove boxes that are too old, and the oldest of too many."""
        found = sorted((entry.stat().st_mtime, entry.path) for entry in os.scandir(self._folder))
        too_many = max(0, len(found) - MAX_BOXES + 1)
        for number, (used, path) in enumerate(found):
            if number >= too_many and used > time.time() - KEPT_S:
                break
            Path(path).unlink(missing_ok=True)

    def _path(self, project: str, task: Any) -> Path:
        name = json.dumps([project, task], default=str)
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def _refines(clicks: Sequence[Prompt], box: Prompt) -> bool:
    """Whether clicks, keypoint results, are about the object in the box, in percent of one image."""
    if not clicks or any(click.get("to_name") != box.get("to_name") for click in clicks):
        return False
    if _label(clicks[-1]) != _label(box):
        return False
    on = [click for click in clicks if click.get("is_positive", True) is not False]
    inside = [_is_at(click["value"], box["value"]) for click in (on or clicks)]
    return all(inside) if on else any(inside)


def _is_at(point: Mapping[str, Any], box: Mapping[str, Any]) -> bool:
    left, top, width, height = (float(box[key]) for key in ("x", "y", "width", "height"))
    angle = math.radians(float(box.get("rotation") or 0.0))
    along, down = float(point["x"]) - left, float(point["y"]) - top
    # Rotated clockwise about its first corner; percent of a tile, which is about square.
    along, down = along * math.cos(angle) + down * math.sin(angle), down * math.cos(angle) - along * math.sin(angle)
    reach = _REACH * max(width, height)
    return -reach <= along <= width + reach and -reach <= down <= height + reach


def _label(prompt: Prompt) -> str | None:
    value = prompt["value"]
    names = value.get("labels") or value.get(str(prompt.get("type"))) or [None]
    return names[0] if isinstance(names, list) else None
