"""Tasks into Label Studio: project, import, and the backend connected in the order that works."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import datamanager, labelstudio
from .client import Connection, Doubtful, LabelStudio, PredictionsLeftOut
from .errors import BackendError, BadConfig
from .service import parsed_config
from .settings import Settings
from .stores import store_at

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "buildings.xml"
"""Polygons with smart clicks and boxes that need no label picked."""

BATCH = 250
"""Tasks in one call."""

BATCH_BYTES = 8 * 2**20
"""A call is no longer than that, but for a task that is."""

ATTEMPTS = 5
"""How often a call is made whose answer is lost."""

SETTLE_S = 30.0
"""So long after a call Label Studio may still carry it out."""

STORED_AT_ONCE = 16
"""Files on their way to a store."""

PATIENCE = 12
"""How often a call is made that Label Studio is too busy to take: for a minute or two."""

Progress = Callable[[float, str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What is in Label Studio now."""

    project_id: int
    url: str
    """The project's page."""

    tasks: int
    """Tasks imported by this call; those that were there before are left alone."""

    already_there: int
    predictions: int
    backend_id: int | None
    """Label Studio's number of the connected backend; None where it was not to be connected."""

    warnings: tuple[str, ...] = ()
    """What is not as it was asked for; sentences with the way out."""


def push(
    label_studio: LabelStudio,
    settings: Settings,
    tasks: Iterable[Mapping[str, Any]],
    *,
    title: str,
    label_config: str,
    backend_url: str | None,
    total: int = 0,
    progress: Progress = lambda done, message: None,
) -> Pushed:
    """Create or reuse the project of that title, import what it lacks, connect the backend.

    Run twice it adds nothing, also after a run that was cut off, wherever that was: before anything is sent, and after
    each call whose answer was lost, Label Studio is asked what arrived. Tasks are taken one after the other; in memory
    stay some bytes of each. Those that carry predictions get them, where they have none, through Label Studio's bulk
    import, and the number it took is checked. The Data Manager gets a tab of what needs a person most. A project that
    is there keeps its label config; a warning says where it is another one. ``total`` is how many tasks come, for
    ``progress``. Raises BadConfig, LabelStudioError, and BackendError where another push is at the project.
    """
    parsed_config(label_config)
    progress(0.0, "project")
    with _one_at_a_time(settings, label_studio.url, title) as note:
        label_studio.whoami()
        project = project_of(label_studio, title, label_config)
        project_id = int(project["id"])
        differs = config_difference(project.get("label_config"), label_config)
        connection = None
        if backend_url:
            progress(0.02, "connecting the backend")
            connection = _connected(label_studio, settings, project_id, backend_url)
        progress(0.05, "asking what is there")
        intake = _Intake(label_studio, project_id, note)
        for batch in _batches(tasks):
            intake.take(batch)
            progress(0.1 + 0.85 * intake.seen / max(total, intake.seen), "tasks")
        if intake.version is not None:
            datamanager.show_scores(label_studio, project_id, intake.version)
        datamanager.show_tab(label_studio, project_id)
    if intake.left_out:
        raise PredictionsLeftOut(
            f"all {intake.seen} tasks are in, but Label Studio left out {intake.left_out} of their predictions: they do"
            " not fit its label config (tag names and labels must be those of the config)",
            stored=intake.predictions,
        )
    progress(1.0, "done")
    return Pushed(
        project_id,
        f"{settings.label_studio_url}/projects/{project_id}/data",
        intake.imported,
        intake.seen - intake.imported,
        intake.predictions,
        connection.backend_id if connection else None,
        (f"project {title!r} keeps its own label config, which is not the one given: {differs}",) if differs else (),
    )


def write_for_storage(
    tasks: Iterable[Mapping[str, Any]], at: str | Path, *, progress: Callable[[int], None] = lambda done: None
) -> int:
    """A file for each task, predictions included, as Label Studio's cloud storages import them; returns how many.

    ``at`` is what `store_at` takes. A file's name depends on the task alone. Label Studio takes each name once, so that
    files can be written, copied and synchronized again and again; what is there already is left. Once imported, `push`
    adds nothing either. Raises BadScene where the store refuses.
    """
    store, done, written = store_at(at), 0, 0
    there = store.names("")
    # An object store takes as long for one small file as for many at once.
    with ThreadPoolExecutor(STORED_AT_ONCE) as pool:
        for batch in _batches(tasks):
            named = {f"{_digest(_identity(task['data'])).hex()}.json": task for task in batch}
            missing = {name: json.dumps(task).encode() for name, task in named.items() if name not in there}
            list(pool.map(store.put, missing.keys(), missing.values()))
            written += len(missing)
            progress(done := done + len(batch))
    return written


def _connected(label_studio: LabelStudio, settings: Settings, project_id: int, backend_url: str) -> Connection:
    secret = settings.webhook_secret.get_secret_value()
    auth = (settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()) if settings.has_basic_auth else None
    there = [one for one in label_studio.ml_backends(project_id) if _same_url(one.get("url"), backend_url)]
    name = str(there[0]["title"]) if there and there[0].get("title") else datamanager.TITLE
    connection = label_studio.connect(project_id, backend_url, secret=secret, title=name, basic_auth=auth)
    datamanager.title_backends(label_studio, project_id)
    return connection


# Tasks, each once -----------------------------------------------------------------------------------------------------


@contextmanager
def _one_at_a_time(settings: Settings, url: str, title: str) -> Iterator[Path]:
    """Where it is noted what is under way to the project. Raises BackendError where another push of this machine is."""
    note = settings.data_dir / "push" / f"{_digest([url, title]).hex()}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{note}.lock", timeout=0):
            yield note
    except Timeout as error:
        raise BackendError(f"another push into the project {title!r} is under way; wait for it") from error


def _batches(tasks: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Some hundred tasks at a time, fewer where they are large."""
    batch: list[Mapping[str, Any]] = []
    size = 0
    for task in tasks:
        length = len(json.dumps(task))
        if batch and (len(batch) == BATCH or size + length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += length
    if batch:
        yield batch


@dataclass(slots=True)
class _There:
    """A task that Label Studio has."""

    id: int
    has_predictions: bool


class _Intake:
    """Tasks and predictions on their way into a project.

    A request goes on in Label Studio though nobody waits for its answer any more. So before each one it is noted what
    it brings (``note``); where the answer is lost, or a run before this one was killed, what was noted is waited for,
    and what has not come after ``SETTLE_S`` is sent again.
    """

    def __init__(self, label_studio: LabelStudio, project_id: int, note: Path) -> None:
        self._label_studio = label_studio
        self._project_id = project_id
        self._note = note
        self._there: dict[bytes, _There] = {}
        self._last_id = 0
        self.seen = self.imported = self.predictions = self.left_out = 0
        self.version: str | None = None
        """Model version of the last predictions that were stored; None where none were."""
        self._look()
        if before := self._noted():
            has_come = self._have_predictions if before["is_predictions"] else self._are_there
            self._settle(lambda: has_come(before["tasks"]), before["sent"], before["first_id"])
            self._note.unlink(missing_ok=True)

    def take(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Have these tasks, and predictions for those that have none, in the project."""
        named = {_digest(_identity(task["data"])): task for task in batch}
        self.seen += len(batch)
        before = len(self._there)
        self._sure(lambda: self._import(named), lambda: self._are_there(named), named, self._last_id)
        self.imported += len(self._there) - before
        wanted = {
            digest: task
            for digest, task in named.items()
            if task.get("predictions") and not self._there[digest].has_predictions
        }
        if wanted:
            first_id = min(self._there[digest].id for digest in wanted) - 1
            self._sure(
                lambda: self._predict(wanted),
                lambda: self._have_predictions(wanted),
                wanted,
                first_id,
                is_predictions=True,
            )

    def _are_there(self, digests: Iterable[bytes]) -> bool:
        return all(digest in self._there for digest in digests)

    def _have_predictions(self, digests: Iterable[bytes]) -> bool:
        return all(digest in self._there and self._there[digest].has_predictions for digest in digests)

    def _import(self, named: Mapping[bytes, Mapping[str, Any]]) -> None:
        missing = {digest: task for digest, task in named.items() if digest not in self._there}
        if missing:
            sent = [{"data": task["data"]} for task in missing.values()]
            ids = self._label_studio.import_tasks(self._project_id, sent, len(sent), is_careful=True)
            self._there |= {digest: _There(number, False) for digest, number in zip(missing, ids, strict=True)}
            self._last_id = max(self._last_id, *ids)

    def _predict(self, wanted: Mapping[bytes, Mapping[str, Any]]) -> None:
        lacking = {digest: task for digest, task in wanted.items() if not self._there[digest].has_predictions}
        sent = [
            {**prediction, "task": self._there[digest].id}
            for digest, task in lacking.items()
            for prediction in task["predictions"]
        ]
        if not sent:
            return
        try:
            stored = self._label_studio.import_predictions(self._project_id, sent, len(sent), is_careful=True)
        except PredictionsLeftOut as error:
            stored = error.stored
        self.predictions += stored
        self.left_out += len(sent) - stored
        for digest in lacking:
            self._there[digest].has_predictions = True
        self.version = str(sent[-1].get("model_version") or "")

    def _sure(
        self,
        send: Callable[[], None],
        is_there: Callable[[], bool],
        named: Iterable[bytes],
        first_id: int,
        *,
        is_predictions: bool = False,
    ) -> None:
        """Call ``send`` until it is known that Label Studio has it all."""
        for attempt in range(ATTEMPTS):
            if is_there():
                return
            sent = time.time()
            self._write_note(sent=sent, first_id=first_id, is_predictions=is_predictions, tasks=named)
            try:
                send()
            except Doubtful as error:
                if attempt == ATTEMPTS - 1:
                    raise
                log.warning("%s; asking Label Studio what arrived", error)
                self._settle(is_there, sent, first_id)
            self._note.unlink(missing_ok=True)

    def _settle(self, is_there: Callable[[], bool], sent: float, first_id: int) -> None:
        """Look again and again whether what was sent has come, for so long as it may still come."""
        pause_s = 0.25
        while True:
            self._look(first_id)
            # By a clock that may have been set back.
            left_s = min(sent + SETTLE_S - time.time(), SETTLE_S)
            if is_there() or left_s <= 0:
                return
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, 5.0)

    def _look(self, above_id: int = 0) -> None:
        """Take in what Label Studio has."""
        listed = self._label_studio.tasks(self._project_id, page_size=500, above_id=above_id, is_bare=True)
        for task in listed:
            number, has_predictions = int(task["id"]), bool(task.get("total_predictions"))
            self._there[_digest(_identity(task["data"]))] = _There(number, has_predictions)
            self._last_id = max(self._last_id, number)

    def _write_note(self, *, tasks: Iterable[bytes], **what: float) -> None:
        note = {**what, "tasks": [digest.hex() for digest in tasks]}
        scratch = self._note.with_suffix(".new")
        scratch.write_text(json.dumps(note))
        scratch.replace(self._note)

    def _noted(self) -> dict[str, Any]:
        """What a run that was cut off had under way; empty where none was."""
        try:
            note = json.loads(self._note.read_text())
            tasks = {bytes.fromhex(digest) for digest in note["tasks"]}
            return {**note, "sent": float(note["sent"]), "first_id": int(note["first_id"]), "tasks": tasks}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError):
            self._note.unlink(missing_ok=True)
            return {}


def project_of(label_studio: LabelStudio, title: str, label_config: str) -> dict[str, Any]:
    """The project of that title, created where there is none. Raises BackendError where several have it."""
    found = label_studio.projects(title=title)
    if len(found) > 1:
        ids = ", ".join(str(project["id"]) for project in found)
        raise BackendError(f"several projects are called {title!r} ({ids}); rename all but one")
    if found:
        return found[0]
    # Predictions are for the annotator to mend, so they are shown; and a task once labelled is done.
    return label_studio.create_project(title, label_config, show_collab_predictions=True, maximum_annotations=1)


def config_difference(now: Any, wanted: str) -> str:
    """In what a project's label config differs from the one wanted, with the way out; empty where it does not."""
    if not isinstance(now, str) or now.split() == wanted.split():
        return ""
    way_out = "to change it, paste the other one under Settings, Labeling Interface"
    try:
        there, asked = labelstudio.labels_by_tag(now), labelstudio.labels_by_tag(wanted)
    except BadConfig as error:
        return f"{error}; {way_out}"
    said = []
    for what, names in (("lacks", asked.keys() - there.keys()), ("also has", there.keys() - asked.keys())):
        said += [f"it {what} the tag {name}" for name in sorted(names)]
    for tag in sorted(asked.keys() & there.keys()):
        for what, labels in (("lacks", asked[tag] - there[tag]), ("also has", there[tag] - asked[tag])):
            said += [f"{tag} {what} {', '.join(sorted(labels))}"] if labels else []
    return f"{'; '.join(said) or 'its text'}; {way_out}"


def _same_url(one: Any, other: str) -> bool:
    return isinstance(one, str) and one.rstrip("/") == other.rstrip("/")


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:16]


def _identity(data: Mapping[str, Any]) -> str:
    """Two tasks are the same when they show the same image of the same place."""
    tile = data.get("tile") if isinstance(data.get("tile"), Mapping) else None
    rest = {name: value for name, value in data.items() if name != "tile"}
    return json.dumps([rest, [tile.get("scene"), tile.get("window")] if tile else None], sort_keys=True)
