"""The use cases, and the one place where the parts are wired together."""

from __future__ import annotations

import contextvars
import functools
import hashlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from . import __version__, datamanager, labelstudio, validation
from .acceptance import Acceptance
from .annotations import TaskFile
from .boxes import LastBox, LastBoxes
from .bulk import Failed, Outcome, Task
from .client import LabelStudio, NotFound
from .database import Database, DatabaseError
from .errors import BackendError, BadRequest, BadTile, Busy, LabelStudioError
from .everything import EverythingOptions, Proposer, everything, regions_of
from .findings import Finding, Findings
from .flight import Claim, Claims, FairPool, Replaced, Room, SingleFlight, give_way
from .images import Image, ImageStore
from .instances import expected_f1
from .jobs import Jobs
from .journal import Journal
from .labelstudio import LabelConfig, PolygonTag, PromptRequest
from .predictor import BATCH, BUILDING, OPENED, Loaded, Predictor, load_segmenter, pre_label_options
from .problems import Problems
from .recent import Recent
from .registry import Registry
from .regularize import metric_frame, regularized
from .review import Reviews
from .segmenter import Segmenter
from .settings import Settings
from .sketch import ImageOf
from .tile import Region, Tile
from .vectorize import VectorizeOptions

log = logging.getLogger(__name__)

Json = dict[str, Any]

TITLE_AFTER_S = 3.0
"""A new version's name is written into Label Studio so long after it asked for it, in seconds."""

MAX_PROJECTS = 1_000
"""Projects of which something is remembered in memory; anybody can name thousands."""

MAX_WARMING = 10_000
"""More work than this in line, and no further embeddings are made ahead."""

LOADING_S = 2.5
"""How long /setup waits for the model at start, in seconds: Label Studio gives it three."""

RECONCILE_PAUSE_S = 30.0
"""Between two readings of all annotations at least, in seconds; more where Label Studio does not answer."""

SCRATCH_KEPT_S = 3600.0
"""What was not written to within this time, in seconds, nobody is writing any more."""

_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHANGES = {
    "ANNOTATION_CREATED": "annotation",
    "ANNOTATION_UPDATED": "annotation",
    "ANNOTATIONS_CREATED": "annotation",
    "ANNOTATIONS_DELETED": "annotations",
    "ANNOTATION_DELETED": "annotation",
}


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """What Label Studio asks when it wants polygons."""

    tasks: Sequence[Mapping[str, Any]]
    project: str
    label_config: str
    context: Mapping[str, Any] | None
    """An annotator's prompts; None or empty for automatic pre-labels."""

    model_version: str = ""
    """The version that is to answer; empty: the one that is live for the project."""

    @classmethod
    def from_json(cls, body: Any) -> PredictRequest:
        """Read a request's body. Raises BadRequest with what is wrong."""
        if not isinstance(body, Mapping):
            raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
        tasks = body.get("tasks")
        if not isinstance(tasks, list):
            raise BadRequest(f"tasks must be a list, got {type(tasks).__name__}")
        params = body.get("params")
        context = params.get("context") if isinstance(params, Mapping) else None
        if context is not None and not isinstance(context, Mapping):
            raise BadRequest(f"params.context must be an object, got {type(context).__name__}")
        label_config = body.get("label_config")
        if not isinstance(label_config, str) or not label_config.strip():
            raise BadRequest("label_config is missing")
        version = body.get("model_version") or (params.get("model_version") if isinstance(params, Mapping) else None)
        if version is not None and not isinstance(version, str):
            raise BadRequest(f"model_version must be a text, got {type(version).__name__}")
        return cls(tasks, project_key(body.get("project")), label_config, context, version or "")


class Service:
    """What the server, the command line and Label Studio's own tooling call."""

    def __init__(
        self, settings: Settings, *, segmenter: Segmenter | None = None, image_cache_mb: float = 128.0
    ) -> None:
        """Wire the parts; nothing is loaded or connected before `start`."""
        self.settings = settings
        self.registry = Registry(settings)
        self.predictor = Predictor(settings, self.registry, segmenter=segmenter)
        self.database = Database(settings)
        self.jobs = Jobs(settings, self.database)
        self.journal = Journal(settings, self.database)
        self.problems = Problems(settings.data_dir)
        self.findings = Findings(settings.data_dir, self.database)
        asks = (lambda: client_of(settings, attempts=2)) if settings.label_studio_url else None
        self.acceptance = Acceptance(settings, self.journal, self.problems, asks)
        self.reviews = Reviews(settings, self.findings, self.problems, lambda: client_of(settings))
        self._label_studio = client_of(settings) if settings.label_studio_url else None
        self.images = ImageStore(settings, self._label_studio, cache_mb=image_cache_mb)
        self._answers: SingleFlight[tuple[list[Json], list[float], float]] = SingleFlight()
        # Two a project: one tile's image is fetched and its outlines traced while the model is at another's.
        self._pool = FairPool(3, name="tile")
        # Apart from the threads that read requests: who asks for the control routes does not wait for these.
        self._predicting = ThreadPoolExecutor(settings.threads, thread_name_prefix="predict", initializer=give_way)
        self._claims = Claims()
        self._boxes = LastBoxes(settings.data_dir / "boxes")
        # Some request threads stay free for the control routes, however much is asked to be predicted.
        self._places = Room(settings.threads - min(4, max(1, settings.threads // 4)))
        self._batch_places = Room(max(1, settings.threads // 4))
        self._untrained: Recent[str, tuple[str, ...]] = Recent(MAX_PROJECTS)
        self._titled: Recent[str, str] = Recent(MAX_PROJECTS)
        self._errands = ThreadPoolExecutor(max_workers=1, thread_name_prefix="errand")
        self._closing = threading.Event()
        self.started = time.time()

    @property
    def is_closing(self) -> threading.Event:
        """Set once the service is being closed."""
        return self._closing

    def queues(self) -> dict[str, int]:
        """How much waits in this process: for the device, tiles of batches and prewarming, annotations to check."""
        return {"device": self.predictor.gate.waiting, "tiles": self._pool.waiting, "checks": self.reviews.waiting}

    def start(self) -> None:
        """Load the model, follow promotions, and go on with training that is asked for, in the background."""
        self.predictor.start()
        for work in (lambda: self.jobs.tend(self._closing), self._follow_label_studio):
            threading.Thread(target=work, name="training-desk", daemon=True).start()

    def end_answers(self) -> None:
        """Answer who still waits for a prediction now, with what there is: the process is about to be ended."""
        self._claims.end_all(Busy("the backend is being stopped before it came to this; try again in a moment"))

    def close(self) -> None:
        """Finish what runs and let go of everything."""
        self._closing.set()
        self.acceptance.close()
        self._errands.shutdown(wait=True, cancel_futures=True)
        self.reviews.close()
        self._pool.close()
        self._predicting.shutdown(wait=False, cancel_futures=True)
        self.images.close()
        if self._label_studio is not None:
            self._label_studio.close()
        self.predictor.stop()
        self.database.close()

    # --- What Label Studio asks ---

    def setup(self, project: Any, label_config: Any) -> str:
        """Check a project's label config; the name of the model version that is live for it.

        Raises BadConfig with a sentence fit for Label Studio's connect dialog.
        """
        if isinstance(label_config, str) and label_config.strip():
            config = parsed_config(label_config)
            self.predictor.wait(LOADING_S)
            self._note_untrained_labels(project_key(project), config)
        self.predictor.wait(LOADING_S)
        version = self.predictor.version(project_key(project))
        self._keep_title(project_key(project), version)
        return version

    def predict(self, request: PredictRequest) -> tuple[list[Any], str]:
        """One item a task, in order: a prediction, or ``[]`` for a task that failed or for which no time was left.

        Also the version that made them. Raises BackendError where a single interactive request fails, as there is
        nothing else to answer, and Busy where more is asked at once than there are threads for.
        """
        with ExitStack() as stack:
            rooms = [self._batch_places, self._places] if len(request.tasks) > 1 else [self._places]
            if not all([stack.enter_context(room.place()) for room in rooms]):
                return self._turned_away(request)
            work = functools.partial(contextvars.copy_context().run, self._predict, request)
            return self._predicting.submit(work).result()

    def _turned_away(self, request: PredictRequest) -> tuple[list[Any], str]:
        """What Label Studio asks again later: an empty list for each task of a batch. Raises Busy for all else."""
        busy = Busy("more predictions are asked for than THREADS can answer at once; try again in a moment")
        self.problems.add(f"predict, project {request.project}", busy)
        if len(request.tasks) < 2 or not self.predictor.is_ready:
            raise busy
        return [[] for _ in request.tasks], self.predictor.model(request.project, request.model_version).version

    def _predict(self, request: PredictRequest) -> tuple[list[Any], str]:
        deadline = time.monotonic() + self.settings.predict_budget_s
        config = parsed_config(request.label_config)
        self.predictor.wait(self.settings.predict_budget_s)
        model = self.predictor.model(request.project, request.model_version)
        if event := labelstudio.event_of(request.context):
            return [self._answer_event(event, model, config, request, task) for task in request.tasks], model.version
        if request.context and len(request.tasks) == 1:
            task = request.tasks[0]
            where = f"interactive predict, {_named(task, request.project)}"
            try:
                with self._claims.made((request.project, _drawn_by(task), _key_of(task))) as claim:
                    return [self._answer_prompt(model, config, request, task, claim)], model.version
            except Replaced:
                # A newer click on the task has come, and only the newest answer is drawn.
                return [labelstudio.prediction_of([], version=model.version)], model.version
            except BackendError as error:
                self.problems.add(where, error)
                raise
        with self._claims.made(object()) as claim:
            return self._predict_batch(model, config, request, deadline, claim), model.version

    def _answer_event(
        self, event: str, model: Loaded, config: LabelConfig, request: PredictRequest, task: Mapping[str, Any]
    ) -> Json:
        """What a client that asks more than predictions is told; it gets no regions."""
        answer = labelstudio.prediction_of([], version=model.version)
        if event == "capabilities":
            return {**answer, "capabilities": labelstudio.capabilities(config, model.segmenter.labels)}
        if self._pool.waiting < MAX_WARMING:
            self._pool.submit(("warm", request.project), lambda: self._warmed(model, config, request.project, task))
        return answer

    def event(self, payload: Mapping[str, Any]) -> Json:
        """React to a webhook event, at once. Raises BadRequest where it names no action or project."""
        action = payload.get("action")
        if not isinstance(action, str):
            raise BadRequest("the event names no action")
        project = project_key_of(payload.get("project"))
        if action == "START_TRAINING":
            started = self._asked(project, lambda: self.jobs.start(project))
            return {"job": project, "status": "started" if started else "already training; goes on with what is new"}
        if action in _CHANGES:
            for task in _tasks_of(payload):
                self._boxes.forget(project, task)
        self.journal.note(project, payload)
        if action in _CHANGES or action == "TASKS_DELETED":
            self.acceptance.note(project, map(int, _tasks_of(payload)))
        if action == "ANNOTATION_UPDATED" and self.reviews.is_own(payload.get("annotation")):
            return {"status": "our own note"}
        answer: Json = {"status": "ignored"}
        if action in _CHANGES:
            count = _changed(payload.get(_CHANGES[action]))
            started = self._asked(project, lambda: self.jobs.changed(project, count)) if count else False
            answer = {"job": project, "status": "started" if started else "noted"}
        # Last: its thread begins at once and takes the processor, and an annotator waits for this answer.
        self.reviews.note(payload, project)
        return answer

    def _asked(self, project: str, ask: Callable[[], bool]) -> bool:
        """Whether a training was started; a full disk must not be an annotator's trouble."""
        try:
            return ask()
        except (OSError, DatabaseError) as error:
            self.journal.miss(project)
            self.problems.add(f"training, project {project}", f"{error}; Label Studio will be asked what was missed")
            return False

    def _follow_label_studio(self) -> None:
        """Reconcile all journals after the start, and again whenever an event could not be written down."""
        remove_scratch(self.settings)
        while not self.predictor.is_ready:
            if self._closing.wait(0.2):
                return
        self.journal.warm_up()
        pause_s, is_due = 0.0, True
        while self.settings.label_studio_url and not self._closing.wait(pause_s):
            if not is_due and not self.journal.has_missed:
                continue
            try:
                self._reconcile()
                pause_s, is_due = RECONCILE_PAUSE_S, False
            except (BackendError, OSError) as error:
                self.problems.add("reading annotations from Label Studio", error)
                pause_s, is_due = min(max(pause_s * 2, RECONCILE_PAUSE_S), 600.0), True

    def _reconcile(self) -> None:
        """Have every project's journal say what Label Studio says, and ask for training where enough was missed."""
        # A project that was missed may have no journal yet.
        missed = self.journal.missed
        known = dict.fromkeys([*self.journal.projects(), *missed])
        projects = [project for project in known if project.split(".")[0].isdigit()]
        if not projects:
            self.journal.made_up_for(missed)
            return
        # In turn, or what several server processes find missing would be counted by each.
        with self.database.in_turn("reconcile"), client_of(self.settings) as label_studio:
            for project in projects:
                number = int(project.split(".")[0])
                try:
                    if project_key_of(label_studio.project(number)) != project:
                        continue
                except NotFound:
                    continue
                changes = self.journal.reconcile(project, label_studio.tasks(number, only_annotated=True)).changes
                if changes:
                    log.info("project %s: %d annotations had changed unnoticed", project, changes)
                    self.jobs.changed(project, changes)
        self.journal.made_up_for(missed)

    def versions(self, project: str | None = None) -> list[str]:
        """Names of all model versions, newest first, the shipped weights last."""
        self.predictor.wait(LOADING_S)
        # As last seen: asking the registry takes as long as its database does, and Label Studio waits three seconds.
        names = [v.name for v in self.predictor.versions if project in (None, v.project)]
        return [*names, self.predictor.base_version()]

    def status(self) -> Json:
        """How everything stands, for people and monitors; nothing secret."""
        ready = self.predictor.is_ready
        return {
            "ready": ready,
            "uptime_s": round(time.time() - self.started),
            "segmenter": self.settings.segmenter,
            "model_version": self.predictor.base_version() if ready else None,
            "label_studio": self.settings.label_studio_url or None,
            "has_token": bool(self.settings.label_studio_api_key.get_secret_value()),
            "waiting": self.predictor.gate.waiting,
            "queues": self.queues(),
            "is_journal_behind": self.journal.has_missed,
            "embeddings_mb": {"memory": round(self.predictor.embeddings.memory.nbytes / 2**20, 1),
                              "memory_limit": self.settings.embedding_cache_mb,
                              "disk": round(self.predictor.embeddings.disk.nbytes / 2**20, 1),
                              "disk_limit": self.settings.embedding_disk_mb},
            "images_mb": {"memory": round(self.images.nbytes / 2**20, 1), "memory_limit": self.images.limit_mb},
            "disk_free_mb": None if (left := free_bytes(self.settings.data_dir)) is None else left // 2**20,
            # Nothing is invented for a label that the model does not know: it gets no pre-labels until it was trained.
            "untrained_labels": {project: list(labels) for project, labels in list(self._untrained.items()) if labels},
            "versions": [
                {"project": v.project, "name": v.name, "live": v.is_champion, "created": v.created.isoformat(),
                 "parent": v.parent, "metrics": dict(v.metrics), "note": v.tags.get("note", "")}
                for v in self.predictor.versions
            ],
            "training": {project: {"state": run.state, "message": run.message, "progress": run.progress,
                                   "started": run.started, "finished": run.finished, "version": run.version,
                                   "duration_s": round(run.duration_s, 1),
                                   "changes_since": self.jobs.ask(project).changes}
                         for project, run in self.jobs.runs().items()},
            "acceptance": self.acceptance.facts(),
            "checks_waiting": self.reviews.waiting,
            "finding_counts": self.findings.counts(),
            "findings": [{"when": kept.checked, "project": kept.project, "task": kept.finding.task,
                          "annotation": kept.finding.annotation, "region": kept.finding.region,
                          "reason": kept.finding.reason, "message": kept.finding.message,
                          "url": self._task_url(kept.project, kept.finding)}
                         for kept in self.findings.recent()],
            "problems": [{"when": p.when, "where": p.where, "message": p.message} for p in self.problems.recent()],
        }  # fmt: skip

    def _keep_title(self, project: str, version: str) -> None:
        """Have the backend's title in Label Studio follow the live version, later: see `datamanager`."""
        number, token = project.split(".")[0], self.settings.label_studio_api_key.get_secret_value()
        if self._titled.get(project) == version or not number.isdigit() or number == "0":
            return
        if not self.settings.label_studio_url or not token:
            return
        self._titled[project] = version

        def errand() -> None:
            # Label Studio stores what it knows of us once it has our answer, the old title included.
            if self._closing.wait(TITLE_AFTER_S):
                return
            try:
                with client_of(self.settings) as label_studio:
                    datamanager.title_backends(label_studio, int(number))
            except BackendError as error:
                self.problems.add(f"title of the backend, project {project}", error)

        self._errands.submit(errand)

    def _task_url(self, project: str, finding: Finding) -> str | None:
        """Where Label Studio shows what was found: its own "Copy Region Link"."""
        number = project.split(".")[0]
        if not self.settings.label_studio_url or not number.isdigit() or finding.task is None:
            return None
        # Label Studio shows such a region alone, and of an overlap one wants to see both.
        is_alone = finding.region and finding.reason not in (validation.OVERLAP, validation.DUPLICATE)
        region = f"&region={quote(finding.region)}" if is_alone else ""
        return (
            f"{self.settings.label_studio_url}/projects/{number}/data"
            f"?task={finding.task}&annotation={finding.annotation}{region}"
        )

    # --- Pre-labels and answers ---

    def predict_tasks(
        self, tasks: Iterable[tuple[int, Task]], label_config: str, project: str = "0"
    ) -> Iterable[tuple[int, Outcome]]:
        """Pre-labels for many numbered tasks, in order, two at a time."""
        config = parsed_config(label_config)
        self.predictor.wait(120)
        model = self.predictor.model(project)
        pending: list[tuple[int, Future[Outcome]]] = []
        for number, task in tasks:
            work = functools.partial(self._pre_label_or_failed, model, config, project, task)
            pending.append((number, self._pool.submit(project, work)))
            if len(pending) > 3:
                done, future = pending.pop(0)
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    def pre_label(self, model: Loaded, label_config: str, task: Task) -> Json:
        """A task's prediction by that model. Raises BackendError."""
        return self._prediction(model, parsed_config(label_config), task, BATCH)

    def warm(self, model: Loaded, label_config: str, task: Task) -> bool:
        """Whether embeddings of a task's images had to be made, to be kept on disk. Raises BackendError."""
        return self._warm(model, parsed_config(label_config), task)

    def warm_tasks(
        self, tasks: Iterable[Mapping[str, Any]], label_config: str, project: str = "0"
    ) -> Iterable[bool | None]:
        """Make the embeddings of many tasks' images, so that no click waits for one.

        Of each task, in order, whether one had to be made; None where it failed. Raises BadRequest where nothing would
        be kept for the server to find.
        """
        if not self.settings.embedding_disk_mb:
            raise BadRequest("GEOPRELABEL_EMBEDDING_DISK_MB is 0; embeddings made now would be gone with this process")
        config = parsed_config(label_config)
        self.predictor.wait(120)
        model = self.predictor.model(project)
        pending: list[Future[bool | None]] = []
        for task in tasks:
            pending.append(self._pool.submit(project, functools.partial(self._warmed, model, config, project, task)))
            if len(pending) > 3:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()

    def _warmed(self, model: Loaded, config: LabelConfig, project: str, task: Mapping[str, Any]) -> bool | None:
        """Whether embeddings of a task's images had to be made; None where one failed, and the reason is a problem."""
        try:
            return self._warm(model, config, task)
        except BackendError as error:
            self.problems.add(f"prewarm, {_named(task, project)}", error)
            return None
        except Exception as error:
            log.exception("prewarm, %s failed", _named(task, project))
            self.problems.add(f"prewarm, {_named(task, project)}", f"unexpected {type(error).__name__}: {error}")
            return None

    def _warm(self, model: Loaded, config: LabelConfig, task: Mapping[str, Any]) -> bool:
        made = False
        for tag in {tag.to_name: tag for tag in config.tags}.values():
            image, tile = self._open(task, tag)
            scale = self._scale(model, config, tag, image, tile)
            made |= self.predictor.warm(model, image.rgb, image.key, scale=scale)
        return made

    def _predict_batch(
        self, model: Loaded, config: LabelConfig, request: PredictRequest, deadline: float, claim: Claim
    ) -> list[Json | list[Any]]:
        def one(task: Mapping[str, Any], urgency: int) -> Json | list[Any]:
            if time.monotonic() > deadline:
                return []
            found = self._pre_label_or_failed(model, config, request.project, task, urgency=urgency, claim=claim)
            return [] if isinstance(found, Failed) else found

        if len(request.tasks) == 1:
            return [one(request.tasks[0], OPENED)]
        begun = [self._pool.submit(request.project, functools.partial(one, task, BATCH)) for task in request.tasks]
        return [_result_or_empty(future, claim) for future in begun]

    def _pre_label_or_failed(
        self,
        model: Loaded,
        config: LabelConfig,
        project: str,
        task: Task,
        *,
        urgency: int = BATCH,
        claim: Claim | None = None,
    ) -> Outcome:
        """A task's prediction, or why there is none; that is among the problems then, too."""
        where = f"predict, {_named(task, project)}"
        try:
            return self._prediction(model, config, task, urgency, claim)
        except BackendError as error:
            self.problems.add(where, error)
            return Failed(str(error))
        except Exception as error:
            # Whatever it is, it is this task's: the rest of the batch goes on.
            log.exception("%s failed", where)
            reason = f"unexpected {type(error).__name__}: {error}; please report it with the log"
            self.problems.add(where, reason)
            return Failed(reason)

    def _prediction(
        self, model: Loaded, config: LabelConfig, task: Task, urgency: int, claim: Claim | None = None
    ) -> Json:
        if not isinstance(task, Mapping):
            raise BadRequest(f"a task must be an object, got {type(task).__name__}")
        found = [self._pre_label(model, config, task, tag, urgency, claim) for tag in config.wanted_tags]
        results = [result for of_tag, *_ in found for result in of_tag]
        chances = [chance for _, of_tag, _ in found for chance in of_tag]
        # What nobody looked for is not known to be absent: no score then.
        is_looked_for = any(tag.match(model.segmenter.labels) for tag in config.wanted_tags)
        score = expected_f1(chances, sum(doubt for *_, doubt in found)) if is_looked_for else None
        return labelstudio.prediction_of(results, version=model.version, score=score)

    def _pre_label(
        self,
        model: Loaded,
        config: LabelConfig,
        task: Mapping[str, Any],
        tag: PolygonTag,
        urgency: int,
        claim: Claim | None,
    ) -> tuple[list[Json], list[float], float]:
        """Results, the chance of each object that it is right, and how many were left out as unlikely."""
        image, tile = self._open(task, tag)
        labels = tag.match(model.segmenter.labels)
        scale = self._scale(model, config, tag, image, tile)
        threshold = tag.model_score_threshold
        min_score = self.settings.model_score_threshold if threshold is None else threshold

        def compute() -> tuple[list[Json], list[float], float]:
            found = self.predictor.automatic(
                model,
                image.rgb,
                image.key,
                labels,
                options=pre_label_options(tile.gsd_m),
                min_score=min_score,
                urgency=urgency,
                scale=scale,
                frame=metric_frame(tile) if self.settings.regularize else None,
            )
            return self._results(found.regions, task, tag, tile, model), found.chances, found.doubt

        # Label Studio often asks twice when a task is opened, and would store two predictions.
        key = (task_identity(task), tag.from_name, image.key, model.version, tuple(labels.items()), min_score, scale)
        return self._answers.do(key, compute, claim=claim)

    def _answer_prompt(
        self, model: Loaded, config: LabelConfig, asked: PredictRequest, task: Mapping[str, Any], claim: Claim
    ) -> Json:
        context, last_box = self._with_last_box(asked, task)
        image_tag = labelstudio.prompted_tag(context, config)
        image, tile = self._open(task, image_tag)
        request = labelstudio.read_prompts(context, config, tile.size)
        if request is None or request.prompts.is_empty:
            return labelstudio.prediction_of([], version=model.version)
        scale = self._scale(model, config, request.tag, image, tile)

        def prompted(request: PromptRequest) -> list[Region]:
            prompts, options = request.prompts, VectorizeOptions()
            return self.predictor.prompted(
                model, image.rgb, image.key, prompts, options=options, scale=scale, claim=claim
            )

        regions = prompted(request)
        alone = labelstudio.read_prompts(asked.context, config, tile.size)
        is_unsure = last_box is not None and last_box.may_be_done(labelstudio.prompt_items(asked.context) or [])
        if alone is not None and last_box is not None and is_unsure:
            found = prompted(alone)
            if not last_box.shares(_in_percent(found, tile)):
                # A neighbour whose first click happens to lie in the box, and no part that its answer left out.
                request, regions, last_box = alone, found, None
                self._boxes.forget(asked.project, _key_of(task))
        if last_box is not None:
            self._boxes.refined(asked.project, _key_of(task))
        elif request.prompts.box_xyxy is not None:
            self._boxes.answered(asked.project, _key_of(task), _in_percent(regions, tile))
        tag, label = self._label(model, config, image, regions, request, scale, claim)
        outlines = [region.polygon for region in regions]
        if self.settings.regularize and label in tag.match([BUILDING]).values():
            outlines = regularized(outlines, frame=metric_frame(tile), size=tile.size)
        identity = task_identity(task)
        regions = [
            replace(
                region,
                label=label,
                polygon=outline,
                # An answer that further clicks refine comes in the place of the coarser one.
                id=labelstudio.prompt_region_id(identity, request.first_id, part) if request.first_id else "",
            )
            for part, (region, outline) in enumerate(zip(regions, outlines, strict=True))
        ]
        return labelstudio.prediction_of(self._results(regions, task, tag, tile, model), version=model.version)

    def _with_last_box(
        self, asked: PredictRequest, task: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], LastBox | None]:
        """The prompts, and before clicks the task's last box, where they refine what it was drawn around."""
        context = asked.context or {}
        items = labelstudio.prompt_items(context) or []
        key, user = _key_of(task), _drawn_by(task)
        if (box := _last_box_of(items)) is not None:
            self._boxes.remember(asked.project, key, box, user)
        elif not items:
            self._boxes.forget(asked.project, key)
        elif all(str(item.get("type")).startswith("keypoint") for item in items):
            accepted = labelstudio.region_ids_in(task)
            last = self._boxes.with_box(
                asked.project,
                key,
                items,
                user,
                lambda box_id: labelstudio.prompt_region_id(task_identity(task), box_id) in accepted,
            )
            if last is not None:
                return {**context, "result": [last.prompt, *items]}, last
        return context, None

    def _label(
        self,
        model: Loaded,
        config: LabelConfig,
        image: Image,
        regions: Sequence[Region],
        request: PromptRequest,
        scale: float,
        claim: Claim,
    ) -> tuple[PolygonTag, str]:
        """Tag and class of a prompted object: the annotator's word, the only label, or what the model sees there.

        No label where the model sees none of its own: it may be one that nothing knows yet.
        """
        if request.label:
            return request.tag, request.label
        tags = _tags_beside(config, request.tag)
        labels = {label.value: tag for tag in reversed(tags) for label in tag.labels}
        if len(labels) == 1:
            label, tag = labels.popitem()
            return tag, label
        known = {
            name: (tag, label) for tag in reversed(tags) for name, label in tag.match(model.segmenter.labels).items()
        }
        best = self.predictor.class_of(model, image.rgb, image.key, regions, known, scale=scale, claim=claim)
        return (request.tag, "") if best is None else known[best]

    def _scale(self, model: Loaded, config: LabelConfig, tag: PolygonTag, image: Image, tile: Tile) -> float:
        """The same for clicks and pre-labels, so that they share an embedding."""
        classes = {name for each in _tags_beside(config, tag) for name in each.match(model.segmenter.labels)}
        return self.predictor.working_scale(model, image.rgb, tile.gsd_m, classes)

    def _open(self, task: Mapping[str, Any], tag: PolygonTag) -> tuple[Image, Tile]:
        url = labelstudio.image_of(task, tag)
        image = self.images.fetch(url, task_id=task.get("id"))
        size = (image.rgb.shape[1], image.rgb.shape[0])
        try:
            return image, labelstudio.tile_of(task, url, size)
        except BadTile as error:
            # A place that cannot be read spoils the export, not the outlines.
            self.problems.add(f"predict, task {task.get('id')}", error)
            return image, Tile(size=size)

    def _results(
        self, regions: Sequence[Region], task: Mapping[str, Any], tag: PolygonTag, tile: Tile, model: Loaded
    ) -> list[Json]:
        return labelstudio.results_of(regions, tag, tile, task_id=task_identity(task), version=model.version)

    def _note_untrained_labels(self, project: str, config: LabelConfig) -> None:
        known = self.predictor.model(project).segmenter.labels
        labels = tuple(dict.fromkeys(label for tag in config.wanted_tags for label in tag.unmatched(known)))
        if labels != self._untrained.get(project, ()):
            log.info("project %s: no pre-labels for %s until annotations of them train a model", project, labels)
        self._untrained[project] = labels


# --- The project's name on the wire ---


def project_key(value: Any) -> str:
    """Label Studio's ``<id>.<created>`` of a project, checked; ``0`` where it names none. Raises BadRequest."""
    if value is None or value == "":
        return "0"
    text = str(value)
    if not _PROJECT.fullmatch(text):
        raise BadRequest(f"project must be Label Studio's <id>.<created>, got {text[:80]!r}")
    return text


def project_key_of(project: Any) -> str:
    """The key of a project as webhooks and the API describe it. Raises BadRequest."""
    if not isinstance(project, Mapping):
        return project_key(project)
    number, created = project.get("id"), project.get("created_at")
    if not isinstance(number, int):
        raise BadRequest("the event names no project")
    if not isinstance(created, str):
        return project_key(number)
    try:
        return project_key(f"{number}.{int(datetime.fromisoformat(created).timestamp())}")
    except ValueError as error:
        raise BadRequest(f"project.created_at must be a time, got {created[:40]!r}") from error


def task_identity(task: Mapping[str, Any]) -> str:
    """What region ids depend on: the task's id, or its data where it has none yet."""
    number = task.get("id")
    return str(number) if number is not None else json.dumps(task.get("data"), sort_keys=True, default=str)


def _key_of(task: Any) -> str:
    return task_identity(task) if isinstance(task, Mapping) else f"{task!r:.200}"


def _drawn_by(task: Any) -> str:
    """The annotator, where the task's drafts are all of one; a request does not say who asks."""
    drafts = task.get("drafts") if isinstance(task, Mapping) else None
    listed = drafts if isinstance(drafts, list) else []
    users = {str(draft.get("user")) for draft in listed if isinstance(draft, Mapping)}
    return users.pop() if len(users) == 1 else ""


def _tasks_of(payload: Mapping[str, Any]) -> list[str]:
    """The numbers of the tasks that an event's annotations are of, as far as it says."""
    listed = payload.get("annotation")
    annotations = listed if isinstance(listed, list) else [listed]
    tasks = [each.get("task") for each in annotations if isinstance(each, Mapping)]
    return [str(task) for task in tasks if isinstance(task, int) and not isinstance(task, bool)]


def _last_box_of(prompts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The newest smart rectangle among prompts."""
    return next((each for each in reversed(prompts) if str(each.get("type")).startswith("rectangle")), None)


def _in_percent(regions: Sequence[Region], tile: Tile) -> BaseGeometry:
    """All outlines as one, in percent of the tile."""
    whole = shapely.union_all([region.polygon for region in regions])
    return shapely.transform(whole, lambda xy: xy * 100 / np.array(tile.size))


def _result_or_empty(future: Future[Json | list[Any]], claim: Claim) -> Json | list[Any]:
    either: tuple[Future[Any], ...] = (future, claim.ended)
    wait(either, return_when=FIRST_COMPLETED)
    # Where the server is stopped Label Studio asks again.
    return future.result() if future.done() and not future.cancelled() else []


def _named(task: Any, project: str) -> str:
    return f"project {project}, task {task.get('id') if isinstance(task, Mapping) else f'{task!r:.40}'}"


@functools.lru_cache(maxsize=64)
def parsed_config(label_config: str) -> LabelConfig:
    """The label config, read once for each text of it. Raises BadConfig."""
    return labelstudio.parse_config(label_config)


@contextmanager
def annotated_tasks(
    settings: Settings, project_id: int | None, file: Path | None
) -> Iterator[tuple[Iterable[Mapping[str, Any]], str | None]]:
    """A project's tasks with their annotations, page by page from Label Studio or from its JSON export; and the config.

    An export does not hold the label config: None then. Its annotations' results are left for `export` to read.
    """
    if file is not None:
        yield TaskFile(file), None
        return
    assert project_id is not None
    with client_of(settings) as label_studio:
        label_config = label_studio.project(project_id)["label_config"]
        yield label_studio.tasks(project_id, only_annotated=True), label_config


@contextmanager
def task_images(settings: Settings) -> Iterator[ImageOf]:
    """Images of tasks by address and task number, fetched only from where they may come; raising BackendError."""
    with ExitStack() as stack:
        label_studio = stack.enter_context(client_of(settings)) if settings.label_studio_url else None
        images = stack.enter_context(closing(ImageStore(settings, label_studio)))
        yield lambda url, task_id: images.fetch(url, task_id=task_id).rgb


def everything_in_tasks(
    settings: Settings,
    segmenter: Proposer,
    config: LabelConfig,
    tasks: Iterable[tuple[int, Task]],
    *,
    options: EverythingOptions,
) -> Iterator[tuple[int, Outcome]]:
    """For each numbered task, outlines without a label of all that the segmenter sees."""
    if not config.wanted_tags:
        raise BadRequest("the label config has no tag that takes polygons")
    tag, problems = config.wanted_tags[0], Problems(settings.data_dir)
    with task_images(settings) as image_of:
        for number, task in tasks:
            try:
                url = labelstudio.image_of(task, tag)
                rgb = image_of(url, task.get("id"))
                tile = Tile(size=(rgb.shape[1], rgb.shape[0]))
                regions = regions_of(everything(segmenter, rgb, options=options))
            except BackendError as error:
                problems.add(f"everything, task {task.get('id')}", error)
                yield number, Failed(str(error))
                continue
            identity, version = task_identity(task), f"{segmenter.version}-everything"
            results = labelstudio.results_of(regions, tag, tile, task_id=identity, version=version)
            yield number, labelstudio.prediction_of(results, version=version)


def prediction_fingerprint(settings: Settings, version: str, label_config: str) -> str:
    """Names all that a pre-label depends on beside its task: it changes where they may change."""
    parts = [__version__, version, settings.model_score_threshold, settings.regularize, label_config]
    return f"{version} {hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def proposer_of(settings: Settings) -> Proposer:
    """The segmenter that settings name, if it can look for everything. Raises BadRequest where it cannot."""
    if settings.segmenter == "compact":
        raise BadRequest(
            "the compact segmenter does not look for everything; set GEOPRELABEL_SEGMENTER=sam_vit_b (or _l, _h)"
        )
    segmenter = load_segmenter(settings)
    assert isinstance(segmenter, Proposer)
    return segmenter


def read_tasks(path: Path) -> list[Json]:
    """The tasks of a ``tasks.json`` or a Label Studio export. Raises BadRequest naming what is wrong with it."""
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadRequest(f"{path} is not there") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(tasks, list):
        raise BadRequest(f"{path} must hold a list of Label Studio tasks, got {type(tasks).__name__}")
    for number, task in enumerate(tasks):
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise BadRequest(f"{path}: task number {number} has no data object")
    return tasks


def client_of(settings: Settings, *, attempts: int = 6) -> LabelStudio:
    """Label Studio's API as settings say. Raises LabelStudioError where they say nothing."""
    if not settings.label_studio_url:
        raise LabelStudioError(
            "LABEL_STUDIO_URL is not set; it says where Label Studio answers, e.g. http://localhost:8080"
        )
    key = settings.label_studio_api_key.get_secret_value()
    return LabelStudio(settings.label_studio_url, key, attempts=attempts)


def remove_scratch(settings: Settings) -> None:
    """Remove what processes that were killed were writing; what is younger may be of one that is at work."""
    data_dir = settings.data_dir
    patterns = ((data_dir / "jobs", ".*.json.*"), (data_dir, ".*.json.*"), (data_dir, ".acceptance-*"),
                (data_dir / "boxes", "*.*.*"), (settings.model_dir / "versions", "*/.new-*"))  # fmt: skip
    for folder, pattern in patterns:
        for path in folder.glob(pattern) if folder.is_dir() else ():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > SCRATCH_KEPT_S:
                    path.unlink()


def free_bytes(folder: Path) -> int | None:
    """Room left on the disk of a folder that may not be there yet; None where the system does not say."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def _tags_beside(config: LabelConfig, tag: PolygonTag) -> Sequence[PolygonTag]:
    """The tags on a tag's image that predictions are wanted for, in the config's order; the tag itself if none."""
    return [each for each in config.wanted_tags if each.to_name == tag.to_name] or [tag]


def _changed(annotations: Any) -> int:
    """How many annotations of an event count: all but the skipped ones."""
    listed = annotations if isinstance(annotations, list) else [annotations]
    return sum(isinstance(a, Mapping) and not a.get("was_cancelled") for a in listed)
