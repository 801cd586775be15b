"""Review: annotations checked after each save, beside the server.

Label Studio holds the annotator's save until the webhook answers, so an event is only put in line, and one thread of
each server process checks what waits: the newest version of each annotation. What was found is kept by `findings`, and
with GEOPRELABEL_COMMENT_INVALID written into the regions' notes, which the annotator's page shows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from filelock import FileLock

from .client import LabelStudio, NotFound
from .errors import BackendError
from .findings import Finding, Findings, digest_of, version_of
from .flight import give_way
from .problems import Problems
from .recent import Recent
from .settings import Settings
from .validation import Limits, annotation_findings

log = logging.getLogger(__name__)

Json = dict[str, Any]

MAX_WAITING = 1_000
"""Annotations in line. More come in at once only by a bulk action, which `geoprelabel validate --project` can check."""

NOTE = "GeoPrelabel: "
"""Each line of ours in a region's notes begins so."""

TAB = "GeoPrelabel findings"
"""Title of the Data Manager's tab that lists tasks with notes of ours."""

PAUSE_S = 0.2
"""Before a check, in seconds: the annotator's save goes on for so long, and may have another call for this process."""

_QUIET_S = 1.0
"""A note is written when no newer version came for so long, in seconds: who saves once may save again."""

_MAX_NOTE_CHARS = 300
_MAX_TEXT_CHARS = 4_096
"""Longer texts of a task's data are images rather than addresses, and nothing that a check looks at."""

_CHANGED = {"ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED"}


@dataclass(frozen=True, slots=True)
class _Version:
    """A saved annotation that waits for its check, or something deleted that waits to be forgotten."""

    id: int
    """Of the annotation, or of the task that was deleted."""

    project: str
    label_config: str | None
    annotation: Mapping[str, Any]
    task: Mapping[str, Any]
    deleted: Literal["", "annotation", "task"] = ""
    came: float = field(default_factory=time.monotonic)
    """When its event came, in seconds of this process's clock."""

    @property
    def key(self) -> tuple[bool, int]:
        """What a newer version takes the place of."""
        return self.deleted == "task", self.id

    @property
    def saved(self) -> float:
        return version_of(self.annotation)


class Reviews:
    """The desk where saved annotations are checked."""

    def __init__(
        self, settings: Settings, findings: Findings, problems: Problems, connect: Callable[[], LabelStudio]
    ) -> None:
        """Nothing runs before the first event. ``connect`` is called where Label Studio has to be asked or told."""
        self._settings = settings
        self._findings = findings
        self._problems = problems
        self._connect = connect
        self._api: LabelStudio | None = None
        self._limits = Limits(settings.max_overlap, settings.min_area_m2, settings.min_area_px)
        self._waiting: OrderedDict[tuple[bool, int], _Version] = OrderedDict()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_busy = self._is_closed = self._is_over = False
        self._with_tab: Recent[int, None] = Recent(1_000)
        self.on_found: Callable[[Sequence[Finding]], None] = lambda found: None
        """Told of every finding that was not known yet."""

    def note(self, payload: Mapping[str, Any], project: str) -> None:
        """Put an event's annotations in line, at once. ``project`` is Label Studio's ``<id>.<created>``."""
        for version in _versions(payload, project):
            self._put(version)

    def is_own(self, annotation: Any) -> bool:
        """Whether an updated annotation is what we wrote into Label Studio ourselves: no change to learn from."""
        if not self._settings.comment_invalid or not isinstance(annotation, Mapping):
            return False
        number = annotation.get("id")
        written = self._findings.own_write(number, at_a_glance=True) if isinstance(number, int) else None
        return written is not None and bool(written.digest) and written.digest == digest_of(annotation)

    @property
    def waiting(self) -> int:
        """Annotations in line in this process."""
        return len(self._waiting)

    def wait(self, timeout_s: float) -> bool:
        """Whether everything in line was checked within that time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_busy, timeout_s)

    def close(self) -> None:
        """Finish the check that runs and leave what waits."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(10)
        if self._api is not None:
            self._api.close()

    def _put(self, version: _Version) -> None:
        with self._changed:
            before = self._waiting.get(version.key)
            if before is not None and before.saved > version.saved and not version.deleted:
                return
            if before is None and len(self._waiting) >= MAX_WAITING:
                if not self._is_over:
                    self._problems.add(
                        f"checks, project {version.project}",
                        f"more than {MAX_WAITING} annotations came in at once, and some were not checked;"
                        f" geoprelabel validate --project {version.project.split('.')[0]} checks them all",
                    )
                self._is_over = True
                return
            self._waiting[version.key] = version
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="review", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        give_way()
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._is_closed:
                    came = next(iter(self._waiting.values())).came
                    self._changed.wait_for(lambda: self._is_closed, max(0.0, came + PAUSE_S - time.monotonic()))
                if self._is_closed:
                    return
                _, version = self._waiting.popitem(last=False)
                # Not before the line is empty: a full one that moves would say so with every step.
                self._is_over = self._is_over and bool(self._waiting)
                self._is_busy = True
            where = f"checks, project {version.project}, annotation {version.id}"
            try:
                self._review(version)
            except BackendError as error:
                self._problems.add(where, error)
            except Exception as error:
                # Whatever it is, it is this annotation's: the next one is checked all the same.
                log.exception("%s failed", where)
                self._problems.add(where, f"unexpected {type(error).__name__}: {error}; please report it with the log")

    def _review(self, version: _Version) -> None:
        if version.deleted == "task":
            self._findings.remove(tasks=[version.id])
            return
        whole = None if version.deleted else self._whole(version)
        if whole is None:
            self._findings.remove(annotations=[version.id])
            return
        found = annotation_findings(whole.annotation, whole.task, label_config=whole.label_config, limits=self._limits)
        task = whole.task.get("id")
        new = self._findings.put(whole.id, task if isinstance(task, int) else None, whole.project, whole.saved, found)
        if new is None:
            return
        self.on_found(new)
        if self._settings.comment_invalid:
            try:
                self._write_back(whole, found)
            except NotFound:
                log.debug("annotation %d is gone", whole.id)

    def _whole(self, version: _Version) -> _Version | None:
        """The version with what its event lacked; None where the annotation is gone."""
        annotation, task, label_config = version.annotation, version.task, version.label_config
        try:
            if not isinstance(annotation.get("result"), list):
                annotation = self._label_studio().annotation(version.id)
            if not isinstance(task.get("data"), Mapping):
                number = annotation.get("task")
                task = self._label_studio().task(int(number)) if isinstance(number, int) else task
        except NotFound:
            return None
        if label_config is None and version.project.split(".")[0].isdigit():
            label_config = self._label_studio().project(int(version.project.split(".")[0])).get("label_config")
        return replace(version, label_config=label_config, annotation=annotation, task=task)

    def _write_back(self, version: _Version, found: Sequence[Finding]) -> None:
        """Make the regions' notes say what was found, unless the annotation was saved again meanwhile."""
        wanted = noted(version.annotation["result"], found)
        if wanted == version.annotation["result"] and not self._findings.own_write(version.id).digest:
            return
        if self._is_superseded(version):
            return
        # One process at a time, so that a save that we wrote over is seen by whoever handles its event.
        with FileLock(self._settings.data_dir / "findings.lock", timeout=60):
            now = self._label_studio().annotation(version.id)
            written = self._findings.own_write(version.id)
            is_newest = now.get("result") == version.annotation["result"]
            # Ours is there, and this one was saved after the version that ours was made of and before ours was stored.
            was_lost = written.digest == digest_of(now) and written.base_version < version.saved < written.version
            if wanted == now.get("result") or not (is_newest or was_lost):
                return
            self._findings.will_write(version.id, digest_of({**now, "result": wanted}), base_version=version.saved)
            answer = self._label_studio().update_annotation(version.id, result=wanted)
            self._findings.has_written(version.id, version_of(answer))
            if not is_newest:
                self._problems.add(
                    f"checks, project {version.project}, annotation {version.id}",
                    "was saved in the moment in which a note was written to it; the save was written again",
                )
            project = version.project.split(".")[0]
            if found and project.isdigit():
                self._show_tab(int(project))

    def _is_superseded(self, version: _Version) -> bool:
        """Whether a newer version comes in, for which this waits a little."""
        with self._changed:
            left_s = version.came + _QUIET_S - time.monotonic()
            self._changed.wait_for(lambda: version.key in self._waiting or self._is_closed, max(left_s, 0.0))
            return version.key in self._waiting or self._is_closed

    def _show_tab(self, project: int) -> None:
        """Give the project's Data Manager a tab of the tasks with notes."""
        if project in self._with_tab:
            return
        views = self._label_studio().views(project)
        if not any(view.get("data", {}).get("title") == TAB for view in views):
            if not views:
                # Ours would be the only one: the page makes its own first tab only where there is none.
                return
            like = views[0].get("data", {})
            note = {"filter": "filter:tasks:annotations_results", "operator": "contains", "type": "String"}
            filters = {"conjunction": "and", "items": [{**note, "value": NOTE.strip()}]}
            kept = {name: like[name] for name in ("hiddenColumns", "columnsWidth") if name in like}
            self._label_studio().create_view(project, {"title": TAB, "type": "list", "filters": filters, **kept})
        self._with_tab[project] = None

    def _label_studio(self) -> LabelStudio:
        if self._api is None:
            self._api = self._connect()
        return self._api


def noted(results: Sequence[Any], found: Sequence[Finding]) -> list[Any]:
    """Results whose notes say what was found and nothing that was found before; what people wrote there stays.

    Label Studio shows ``meta.text`` of a region in its details panel.
    """
    lines: dict[str, list[str]] = {}
    for finding in found:
        if finding.region:
            lines.setdefault(finding.region, []).append(f"{NOTE}{finding.message}"[:_MAX_NOTE_CHARS])
    changed: list[Any] = []
    for result in results:
        # Several results can share an id; all of them are the same region to the page, and the first one's notes count.
        ours = lines.pop(result["id"], []) if isinstance(result, Mapping) and isinstance(result.get("id"), str) else []
        meta = result.get("meta") if isinstance(result, Mapping) else None
        has_meta = isinstance(meta, Mapping)
        theirs = [line for line in _text_of(meta) if not line.startswith(NOTE)] if has_meta else []
        if not isinstance(result, Mapping) or (not ours and (not has_meta or theirs == _text_of(meta))):
            changed.append(result)
            continue
        kept = {name: value for name, value in (meta or {}).items() if name != "text"}
        text = "\n".join([*theirs, *ours])
        notes = {**kept, **({"text": [text]} if text else {})}
        changed.append({**{name: value for name, value in result.items() if name != "meta"},
                        **({"meta": notes} if notes else {})})  # fmt: skip
    return changed


def _text_of(meta: Any) -> list[str]:
    """The lines of a region's notes."""
    text = meta.get("text") if isinstance(meta, Mapping) else None
    listed = text if isinstance(text, list) else [text]
    return [line for part in listed if isinstance(part, str) and part for line in part.split("\n")]


def _versions(payload: Mapping[str, Any], project: str) -> Iterator[_Version]:
    action = payload.get("action")
    if action in ("ANNOTATIONS_DELETED", "ANNOTATION_DELETED"):
        for number, _ in _listed(payload.get("annotations") or payload.get("annotation")):
            yield _Version(number, project, None, {}, {}, "annotation")
    if action == "TASKS_DELETED":
        for number, _ in _listed(payload.get("tasks")):
            yield _Version(number, project, None, {}, {}, "task")
    if action not in _CHANGED:
        return
    about = payload.get("project")
    label_config = about.get("label_config") if isinstance(about, Mapping) else None
    tasks = dict(_listed(payload.get("task")))
    for number, annotation in _listed(payload.get("annotation")):
        named = annotation.get("task")
        task = tasks.get(named, {}) if isinstance(named, int) else {}
        yield _Version(
            number, project, label_config if isinstance(label_config, str) else None, annotation, _lean(task)
        )


def _listed(value: Any) -> list[tuple[int, Mapping[str, Any]]]:
    """The objects of a list, or the one object, with their numbers."""
    items = value if isinstance(value, list) else [value]
    return [(item["id"], item) for item in items if isinstance(item, Mapping) and isinstance(item.get("id"), int)]


def _lean(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """A task without what no check looks at: it may wait for a while, and images can ride in it."""
    data = task.get("data")
    if not isinstance(data, Mapping):
        return task
    kept = {name: value[:_MAX_TEXT_CHARS] if isinstance(value, str) else value for name, value in data.items()}
    return {"id": task.get("id"), "data": kept}
