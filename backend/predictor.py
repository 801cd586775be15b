"""Images and prompts in, outlines out: the models in memory, their embeddings, and whose turn it is."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from . import instances, vectorize
from .coverage import coverage
from .errors import BackendError, UnknownVersion
from .flight import Gate, SingleFlight
from .registry import ModelVersion, Registry
from .regularize import regularized
from .segmenter import DenseMaps, Embedding, Prompts, Segmenter
from .settings import Settings
from .tile import Region
from .vectorize import VectorizeOptions

log = logging.getLogger(__name__)

REFRESH_S = 1.0
"""How often the registry is asked for promotions, in seconds."""

LEAST_CLASS_EVIDENCE = 0.2
"""An object is of a class where the class's mean probability under it exceeds half of that around it by this. Of
held-out objects 74–100 % were named so at a fit scale, at most 1 % wrongly, and of places without an object 4–21 %."""

BUILDING = "building"
"""The class whose outlines can be made right-angled."""

BATCH, INTERACTIVE = 0, 1
"""Urgency of work: a person waits for the second."""


@runtime_checkable
class Trainable(Protocol):
    """A segmenter whose dense heads can be replaced by a project's own."""

    @property
    def base_version(self) -> str:
        """Version of the weights that make embeddings."""
        ...

    def with_heads(self, path: Path) -> Segmenter:
        """The same network with other heads. Raises BadWeights."""
        ...


@runtime_checkable
class Scalable(Protocol):
    """A segmenter that outlines small objects better when it sees the image enlarged."""

    def working_scale(self, image_hw: tuple[int, int], gsd_m: float | None, classes: Collection[str]) -> float:
        """How much to enlarge an image of that ground size a pixel, where objects of those classes count."""
        ...

    def embed(self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0) -> Embedding:
        """Features of an image that is seen ``scale`` times as large."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready, and the name that Label Studio knows it by."""

    segmenter: Segmenter
    version: str


class Predictor:
    """Serves all projects from one base model and their own heads. Safe to call from several threads."""

    def __init__(self, settings: Settings, registry: Registry, *, segmenter: Segmenter | None = None) -> None:
        """Nothing is loaded before `start`. ``segmenter`` takes the place of the one that settings name."""
        self._settings = settings
        self._registry = registry
        self._base: Future[Segmenter] = Future()
        self._given = segmenter
        self._versions: Sequence[ModelVersion] = ()
        self._champions: Mapping[str, ModelVersion] = {}
        self._versions_read = threading.Event()
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        self._models_lock = threading.Lock()
        self._embeddings = EmbeddingCache(settings.embedding_cache_mb * 2**20)
        self._embedding_flights: SingleFlight[Embedding] = SingleFlight()
        self.gate = Gate()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Load the base model and follow promotions, in the background."""
        self._threads = [
            threading.Thread(target=self._load_base, name="load-model", daemon=True),
            threading.Thread(target=self._follow_promotions, name="follow-promotions", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the background threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=10)

    @property
    def is_ready(self) -> bool:
        """Whether the base model is loaded and promotions are known."""
        return self._base.done() and not self._base.exception() and self._versions_read.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until predictions can be made. Raises BackendError where that takes longer, or why it never will."""
        deadline = time.monotonic() + timeout_s
        try:
            self._base.result(timeout_s)
        except TimeoutError as error:
            raise BackendError("the model is still loading; try again in a few seconds") from error
        if not self._versions_read.wait(max(deadline - time.monotonic(), 0)):
            raise BackendError("the model registry has not answered yet; try again in a few seconds")

    def refresh(self) -> None:
        """Look for promotions now rather than within a second."""
        self._versions = self._registry.versions()
        self._champions = {version.project: version for version in self._versions if version.is_champion}
        self._versions_read.set()

    @property
    def versions(self) -> Sequence[ModelVersion]:
        """All versions of all projects as of the last look at the registry, newest first."""
        return self._versions

    def base_version(self) -> str:
        """Name of the shipped weights."""
        return self._base.result().version

    def version(self, project: str) -> str:
        """Name of the weights that are live for the project; changes exactly when they do."""
        return self.model(project).version

    def model(self, project: str) -> Loaded:
        """The model that is live for the project. Of a damaged version the shipped weights take the place."""
        base = self._base.result()
        champion = self._champions.get(project)
        if champion is None:
            return Loaded(base, base.version)
        with self._models_lock:
            if champion.name in self._models:
                self._models.move_to_end(champion.name)
                return self._models[champion.name]
        try:
            if not isinstance(base, Trainable):
                raise UnknownVersion(f"{base.version} takes no heads of a project")
            loaded = Loaded(base.with_heads(champion.heads_path), champion.name)
        except (BackendError, OSError) as error:
            log.error(
                "version %s of project %s cannot be loaded (%s); serving %s",
                champion.name,
                project,
                error,
                base.version,
            )
            loaded = Loaded(base, base.version)
        with self._models_lock:
            self._models[champion.name] = loaded
            while len(self._models) > 32:
                self._models.popitem(last=False)
        return loaded

    def working_scale(
        self, model: Loaded, image_rgb: NDArray[np.uint8], gsd_m: float | None, classes: Collection[str]
    ) -> float:
        """How much the model should enlarge an image of that ground size a pixel, where those classes are in play."""
        if not isinstance(model.segmenter, Scalable):
            return 1.0
        return model.segmenter.working_scale((image_rgb.shape[0], image_rgb.shape[1]), gsd_m, classes)

    def embed(
        self, model: Loaded, image_rgb: NDArray[np.uint8], key: str, *, urgency: int = BATCH, scale: float = 1.0
    ) -> Embedding:
        """The image's embedding, from memory where it was made before. ``key`` names the image's content."""
        base = getattr(model.segmenter, "base_version", model.segmenter.version)
        if scale != 1:
            key = f"{key}*{scale:g}"
        cached = self._embeddings.get((key, base))
        if cached is not None:
            return cached

        def compute() -> Embedding:
            with self.gate.entered(urgency=urgency):
                segmenter = model.segmenter
                if isinstance(segmenter, Scalable):
                    embedding = segmenter.embed(image_rgb, scale=scale)
                else:
                    embedding = segmenter.embed(image_rgb)
            self._embeddings.put((key, base), embedding)
            return embedding

        return self._embedding_flights.do((key, base), compute)

    def automatic(
        self,
        model: Loaded,
        image_rgb: NDArray[np.uint8],
        key: str,
        labels: Mapping[str, str],
        *,
        options: VectorizeOptions,
        min_score: float,
        urgency: int = BATCH,
        scale: float = 1.0,
        frame: NDArray[np.float64] | None = None,
    ) -> list[Region]:
        """Outlines of everything in the image that the model knows, the surest first; neighbours share their borders.

        ``labels`` gives, for each class of the model that is wanted, the label it gets. Objects below ``min_score``
        are left out. Parts of one object share an ``object_id``. With ``frame``, which takes pixels to metres,
        buildings become right-angled where that is as good.
        """
        if not labels:
            return []
        dense = self._dense(model, self.embed(model, image_rgb, key, urgency=urgency, scale=scale), urgency)
        found = [
            (known, instance)
            for known in labels
            for instance in instances.instances(dense, known, least_score=min_score, options=options)
        ]
        # Ground that two claim goes to the surer one.
        found.sort(key=lambda one: -one[1].score)
        outlines = [list(instance.polygons) for _, instance in found]
        if frame is not None:
            size = (image_rgb.shape[1], image_rgb.shape[0])
            outlines = _squared(outlines, [known == BUILDING for known, _ in found], frame, size)
        regions: list[Region] = []
        for number, parts in enumerate(coverage(outlines, options=options)):
            known, instance = found[number]
            tie = f"{known}-{number}" if len(parts) > 1 else ""
            regions += [Region(part, labels[known], instance.score, object_id=tie) for part in parts]
        return regions

    def prompted(
        self,
        model: Loaded,
        image_rgb: NDArray[np.uint8],
        key: str,
        prompts: Prompts,
        *,
        options: VectorizeOptions,
        scale: float = 1.0,
    ) -> list[Region]:
        """The outline of the object that clicks and box mean, without a label; its parts share an ``object_id``."""
        embedding = self.embed(model, image_rgb, key, urgency=INTERACTIVE, scale=scale)
        with self.gate.entered(urgency=INTERACTIVE):
            masks = model.segmenter.segment(embedding, prompts)
        polygons = vectorize.polygons(masks.probabilities[0], options=options)
        tie = "prompted" if len(polygons) > 1 else ""
        return [Region(polygon, "", float(masks.scores[0]), object_id=tie) for polygon in polygons]

    def class_of(
        self,
        model: Loaded,
        image_rgb: NDArray[np.uint8],
        key: str,
        regions: Sequence[Region],
        among: Collection[str],
        *,
        scale: float = 1.0,
    ) -> str | None:
        """The model's class, of those in ``among``, that is likeliest under the outlines; None where none is likely."""
        if not among or not regions:
            return None
        embedding = self.embed(model, image_rgb, key, urgency=INTERACTIVE, scale=scale)
        outlines = [region.polygon for region in regions]
        reach = max(2, round(0.25 * math.sqrt(sum(outline.area for outline in outlines))))
        window = _window_xyxy(outlines, reach, embedding.image_hw)
        with self.gate.entered(urgency=INTERACTIVE):
            dense = model.segmenter.dense(embedding, window_xyxy=window)
        left, top, right, bottom = window
        local = [shapely.transform(outline, lambda xy: xy - (left, top)) for outline in outlines]
        inside = vectorize.rasterize(local, bottom - top, right - left)
        if not inside.any():
            return None
        around = _grown(inside, reach) & ~inside
        best, highest = None, LEAST_CLASS_EVIDENCE
        for known, probabilities in zip(dense.labels, dense.probabilities, strict=True):
            if known in among:
                # What is likely all around says less about this object than what is likely here alone.
                outside = float(probabilities[around].mean()) if around.any() else 0.0
                evidence = float(probabilities[inside].mean()) - 0.5 * outside
                if evidence >= highest:
                    best, highest = known, evidence
        return best

    def _dense(self, model: Loaded, embedding: Embedding, urgency: int) -> DenseMaps:
        with self.gate.entered(urgency=urgency):
            return model.segmenter.dense(embedding)

    def _load_base(self) -> None:
        try:
            self._base.set_result(self._given or warmed_up(load_segmenter(self._settings)))
        except Exception as error:
            log.exception("the model cannot be loaded")
            self._base.set_exception(error)

    def _follow_promotions(self) -> None:
        seen: object = object()
        while not self._stop.is_set():
            try:
                now = self._registry.fingerprint()
                if now != seen:
                    self.refresh()
                    seen = now
            except Exception:
                log.exception("the model registry cannot be read; serving the versions known so far")
            self._stop.wait(REFRESH_S)


def _squared(
    outlines: list[list[Polygon]], is_building: list[bool], frame: NDArray[np.float64], size: tuple[int, int]
) -> list[list[Polygon]]:
    """Objects in parts, those that are buildings right-angled."""
    plain, others = (
        [part for parts, flag in zip(outlines, is_building, strict=True) if flag == wanted for part in parts]
        for wanted in (True, False)
    )
    squared = iter(regularized(plain, frame=frame, size=size, others=others))
    return [
        [next(squared) for _ in parts] if flag else parts for parts, flag in zip(outlines, is_building, strict=True)
    ]


def _window_xyxy(outlines: Sequence[Polygon], reach_px: int, image_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Columns and rows, from … to, of the pixels that outlines reach, and so many more on each side."""
    left, top, right, bottom = shapely.total_bounds(outlines)
    height, width = image_hw
    return (
        max(0, math.floor(left) - reach_px),
        max(0, math.floor(top) - reach_px),
        min(width, math.ceil(right) + reach_px),
        min(height, math.ceil(bottom) + reach_px),
    )


def _grown(mask: NDArray[np.bool_], reach_px: int) -> NDArray[np.bool_]:
    """The mask and all pixels not farther from it than so many."""
    from scipy import ndimage

    return np.asarray(ndimage.distance_transform_edt(~mask) <= reach_px)


class EmbeddingCache:
    """The embeddings used last, bounded by the memory they take."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: OrderedDict[tuple[str, str], Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str]) -> Embedding | None:
        """The embedding of that image and those weights, or None."""
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
            return found

    def put(self, key: tuple[str, str], embedding: Embedding) -> None:
        """Keep an embedding, at the cost of those not used for longest."""
        with self._lock:
            old = self._items.pop(key, None)
            self._bytes += embedding.nbytes - (old.nbytes if old else 0)
            self._items[key] = embedding
            while self._bytes > self._max_bytes and self._items:
                _, dropped = self._items.popitem(last=False)
                self._bytes -= dropped.nbytes

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        return self._bytes


def warmed_up(segmenter: Segmenter) -> Segmenter:
    """The same segmenter after one tile went all the way, so that no click waits for imports and kernels."""
    embedding = segmenter.embed(np.zeros((512, 512, 3), np.uint8))
    dense = segmenter.dense(embedding)
    masks = segmenter.segment(embedding, Prompts(np.array([(256.0, 256.0)]), np.array([True])))
    for label in dense.labels:
        instances.instances(dense, label)
    vectorize.polygons(masks.probabilities[0])
    return segmenter


def load_segmenter(settings: Settings) -> Segmenter:
    """The segmenter that settings name. Raises BadWeights, or BackendError where there is none of that name yet."""
    if settings.segmenter == "compact":
        # torch takes a second to import: not before it is needed.
        from .compact import CompactSegmenter

        return CompactSegmenter.load(device=settings.device)
    raise BackendError(
        f"GEOPRELABEL_SEGMENTER={settings.segmenter} is not in this release yet; compact is the one that is"
    )
