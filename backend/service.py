"""The use cases, and the one place where the parts are wired together."""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import labelstudio, validation
from .annotations import tasks_in
from .client import LabelStudio
from .errors import BackendError, BadRequest, BadTile, LabelStudioError
from .findings import Finding, Findings
from .flight import SingleFlight
from .images import Image, ImageStore
from .jobs import Jobs
from .labelstudio import LabelConfig, PolygonTag, PromptRequest
from .predictor import BUILDING, Loaded, Predictor
from .problems import Problems
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

LOADING_S = 2.5
"""How long /setup waits for the model at start, in seconds: Label Studio gives it three."""

PRE_LABEL_MIN_M2 = 4.0
"""Automatic objects and holes below this are left out where the tile has a place, in square metres."""

PRE_LABEL_MIN_PX = 100.0
"""The same for tiles without a place, in square pixels. A click may be answered with something smaller."""

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
        return cls(tasks, project_key(body.get("project")), label_config, context)


class Service:
    """What the server, the command line and Label Studio's own tooling call."""

    def __init__(self, settings: Settings, *, segmenter: Segmenter | None = None) -> None:
        """Wire the parts; nothing is loaded or connected before `start`."""
        self.settings = settings
        self.registry = Registry(settings)
        self.predictor = Predictor(settings, self.registry, segmenter=segmenter)
        self.jobs = Jobs(settings)
        self.problems = Problems(settings.data_dir)
        self.findings = Findings(settings.data_dir)
        self.reviews = Reviews(settings, self.findings, self.problems, lambda: client_of(settings))
        self.images = ImageStore(settings, client_of(settings) if settings.label_studio_url else None)
        self._answers: SingleFlight[list[Json]] = SingleFlight()
        # Two: one tile's image is fetched and its outlines traced while the model is at another's.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tile")
        self._untrained: dict[str, tuple[str, ...]] = {}
        self.started = time.time()

    def start(self) -> None:
        """Load the model and follow promotions, in the background."""
        self.predictor.start()

    def close(self) -> None:
        """Finish what runs and let go of everything."""
        self.reviews.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.predictor.stop()

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
        return self.predictor.version(project_key(project))

    def predict(self, request: PredictRequest) -> tuple[list[Any], str]:
        """One item a task, in order: a prediction, or ``[]`` for a task that failed or for which no time was left.

        Also the version that made them. Raises BackendError where a single interactive request fails, as there is
        nothing else to answer.
        """
        deadline = time.monotonic() + self.settings.predict_budget_s
        config = parsed_config(request.label_config)
        self.predictor.wait(self.settings.predict_budget_s)
        model = self.predictor.model(request.project)
        if request.context and len(request.tasks) == 1:
            task = request.tasks[0]
            where = f"interactive predict, {_named(task, request.project)}"
            try:
                return [self._answer_prompt(model, config, task, request.context)], model.version
            except BackendError as error:
                self.problems.add(where, error)
                raise
        results = self._predict_batch(model, config, request, deadline)
        return results, model.version

    def event(self, payload: Mapping[str, Any]) -> Json:
        """React to a webhook event, at once. Raises BadRequest where it names no action or project."""
        action = payload.get("action")
        if not isinstance(action, str):
            raise BadRequest("the event names no action")
        project = project_key_of(payload.get("project"))
        if action == "START_TRAINING":
            started = self.jobs.start(project)
            return {"job": project, "status": "started" if started else "already training; goes on with what is new"}
        if action == "ANNOTATION_UPDATED" and self.reviews.is_own(payload.get("annotation")):
            return {"status": "our own note"}
        self.reviews.note(payload, project)
        if action in _CHANGES:
            count = _changed(payload.get(_CHANGES[action]))
            started = self.jobs.changed(project, count) if count else False
            return {"job": project, "status": "started" if started else "noted"}
        return {"status": "ignored"}

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
            # Nothing is invented for a label that the model does not know: it gets no pre-labels until it was trained.
            "untrained_labels": {project: list(labels) for project, labels in self._untrained.items() if labels},
            "versions": [
                {"project": v.project, "name": v.name, "live": v.is_champion, "created": v.created.isoformat(),
                 "parent": v.parent, "metrics": dict(v.metrics), "note": v.tags.get("note", "")}
                for v in self.predictor.versions
            ],
            "training": {project: {"state": run.state, "message": run.message, "progress": run.progress,
                                   "started": run.started, "finished": run.finished, "version": run.version,
                                   "changes_since": self.jobs.ask(project).changes}
                         for project, run in self.jobs.runs().items()},
            "checks_waiting": self.reviews.waiting,
            "finding_counts": self.findings.counts(),
            "findings": [{"when": kept.checked, "project": kept.project, "task": kept.finding.task,
                          "annotation": kept.finding.annotation, "region": kept.finding.region,
                          "reason": kept.finding.reason, "message": kept.finding.message,
                          "url": self._task_url(kept.project, kept.finding)}
                         for kept in self.findings.recent()],
            "problems": [{"when": p.when, "where": p.where, "message": p.message} for p in self.problems.recent()],
        }  # fmt: skip

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
        self, tasks: Iterable[Mapping[str, Any]], label_config: str, project: str = "0"
    ) -> Iterable[tuple[Mapping[str, Any], Json | None]]:
        """Pre-labels for many tasks, in order, two at a time: the task and its prediction, None where it failed."""
        config = parsed_config(label_config)
        self.predictor.wait(120)
        model = self.predictor.model(project)
        pending: list[tuple[Mapping[str, Any], Future[Json | None]]] = []
        for task in tasks:
            pending.append((task, self._pool.submit(self._pre_label_or_none, model, config, project, task)))
            if len(pending) > 3:
                done, future = pending.pop(0)
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    def _predict_batch(
        self, model: Loaded, config: LabelConfig, request: PredictRequest, deadline: float
    ) -> list[Json | list[Any]]:
        def one(task: Mapping[str, Any]) -> Json | list[Any]:
            if time.monotonic() > deadline:
                return []
            return self._pre_label_or_none(model, config, request.project, task) or []

        if len(request.tasks) == 1:
            return [one(request.tasks[0])]
        return [future.result() for future in [self._pool.submit(one, task) for task in request.tasks]]

    def _pre_label_or_none(
        self, model: Loaded, config: LabelConfig, project: str, task: Mapping[str, Any]
    ) -> Json | None:
        """A task's prediction, or None when it failed; then the reason is among the problems."""
        where = f"predict, {_named(task, project)}"
        try:
            if not isinstance(task, Mapping):
                raise BadRequest(f"a task must be an object, got {type(task).__name__}")
            results = [result for tag in config.wanted_tags for result in self._pre_label(model, config, task, tag)]
        except BackendError as error:
            self.problems.add(where, error)
            return None
        except Exception as error:
            # Whatever it is, it is this task's: the rest of the batch goes on.
            log.exception("%s failed", where)
            self.problems.add(where, f"unexpected {type(error).__name__}: {error}; please report it with the log")
            return None
        return labelstudio.prediction_of(results, version=model.version)

    def _pre_label(self, model: Loaded, config: LabelConfig, task: Mapping[str, Any], tag: PolygonTag) -> list[Json]:
        image, tile = self._open(task, tag)
        labels = tag.match(model.segmenter.labels)
        scale = self._scale(model, config, tag, image, tile)
        threshold = tag.model_score_threshold
        min_score = self.settings.model_score_threshold if threshold is None else threshold

        def compute() -> list[Json]:
            regions = self.predictor.automatic(
                model,
                image.rgb,
                image.key,
                labels,
                options=_pre_label_options(tile),
                min_score=min_score,
                scale=scale,
                frame=metric_frame(tile) if self.settings.regularize else None,
            )
            return self._results(regions, task, tag, tile, model)

        # Label Studio often asks twice when a task is opened, and would store two predictions.
        key = (task_identity(task), tag.from_name, image.key, model.version, tuple(labels.items()), min_score, scale)
        return self._answers.do(key, compute)

    def _answer_prompt(
        self, model: Loaded, config: LabelConfig, task: Mapping[str, Any], context: Mapping[str, Any]
    ) -> Json:
        image_tag = labelstudio.prompted_tag(context, config)
        image, tile = self._open(task, image_tag)
        request = labelstudio.read_prompts(context, config, tile.size)
        if request is None or request.prompts.is_empty:
            return labelstudio.prediction_of([], version=model.version)
        scale = self._scale(model, config, request.tag, image, tile)
        regions = self.predictor.prompted(
            model, image.rgb, image.key, request.prompts, options=VectorizeOptions(), scale=scale
        )
        tag, label = self._label(model, config, image, regions, request, scale)
        outlines = [region.polygon for region in regions]
        if self.settings.regularize and label in tag.match([BUILDING]).values():
            outlines = regularized(outlines, frame=metric_frame(tile), size=tile.size)
        regions = [replace(r, label=label, polygon=outline) for r, outline in zip(regions, outlines, strict=True)]
        return labelstudio.prediction_of(self._results(regions, task, tag, tile, model), version=model.version)

    def _label(
        self,
        model: Loaded,
        config: LabelConfig,
        image: Image,
        regions: Sequence[Region],
        request: PromptRequest,
        scale: float,
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
        best = self.predictor.class_of(model, image.rgb, image.key, regions, known, scale=scale)
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

    An export does not hold the label config: None then.
    """
    if file is not None:
        yield tasks_in(file), None
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


def client_of(settings: Settings) -> LabelStudio:
    """Label Studio's API as settings say. Raises LabelStudioError where they say nothing."""
    if not settings.label_studio_url:
        raise LabelStudioError(
            "LABEL_STUDIO_URL is not set; it says where Label Studio answers, e.g. http://localhost:8080"
        )
    return LabelStudio(settings.label_studio_url, settings.label_studio_api_key.get_secret_value())


def _tags_beside(config: LabelConfig, tag: PolygonTag) -> Sequence[PolygonTag]:
    """The tags on a tag's image that predictions are wanted for, in the config's order; the tag itself if none."""
    return [each for each in config.wanted_tags if each.to_name == tag.to_name] or [tag]


def _pre_label_options(tile: Tile) -> VectorizeOptions:
    """What is too small to pre-label: by its area on the ground where known, and what no network sees anyway."""
    if tile.gsd_m is None:
        return VectorizeOptions(min_area_px=PRE_LABEL_MIN_PX)
    on_ground = VectorizeOptions.for_gsd(tile.gsd_m, min_area_m2=PRE_LABEL_MIN_M2, min_hole_m2=PRE_LABEL_MIN_M2)
    plain = VectorizeOptions()
    return replace(
        on_ground,
        min_area_px=max(on_ground.min_area_px, plain.min_area_px),
        min_hole_px=max(on_ground.min_hole_px, plain.min_hole_px),
    )


def _changed(annotations: Any) -> int:
    """How many annotations of an event count: all but the skipped ones."""
    listed = annotations if isinstance(annotations, list) else [annotations]
    return sum(isinstance(a, Mapping) and not a.get("was_cancelled") for a in listed)
