"""Images and prompts in, outlines out: the models in memory, their embeddings, and whose turn it is."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import Polygon

from . import instances, vectorize
from .coverage import coverage
from .embeddings import EmbeddingKey, Embeddings
from .errors import BackendError, BadWeights, UnknownVersion
from .flight import Claim, Gate, SingleFlight
from .problems import Problems
from .recent import Recent
from .registry import ModelVersion, Registry
from .regularize import regularized
from .segmenter import DenseMaps, Embedding, Masks, Prompts, Segmenter
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

PRE_LABEL_MIN_M2 = 4.0
"""Automatic objects and holes below this are left out where the tile has a place, in square metres."""

LEAST_AGREEMENT = 0.5
"""An object keeps its first outline where the one drawn from its box has a lower IoU with it."""

MOST_AT_ONCE = 4
"""Threads at the device, each with a share of the processors: two networks on one processor each are done sooner than
one after the other on two. More would need more memory."""

OUTLINED_AT_ONCE = 8
"""Objects whose outlines are drawn anew before waiting clicks get their turn."""

PRE_LABEL_MIN_PX = 100.0
"""The same for tiles without a place, in square pixels. A click may be answered with something smaller."""

BATCH, OPENED, INTERACTIVE = 0, 1, 2
"""Urgency of work: nobody waits for it, a person has opened the task, a person has clicked."""


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


@runtime_checkable
class Outlining(Protocol):
    """A segmenter that outlines an object better from its box than its dense heads do."""

    def outline(self, embedding: Embedding, boxes_xyxy: NDArray[np.float64]) -> Iterable[Masks]:
        """For each box, (N, 4) in pixel corners, the object in it, as one candidate."""
        ...


@runtime_checkable
class Mirroring(Protocol):
    """A segmenter quick enough to look at a tile and at its mirror image to pre-label it: two see more than one."""

    def dense(
        self,
        embedding: Embedding,
        *,
        window_xyxy: tuple[int, int, int, int] | None = None,
        labels: Collection[str] | None = None,
    ) -> DenseMaps:
        """What a `Segmenter` says of an image, of those classes only."""
        ...

    def dense_mirrored(
        self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0, labels: Collection[str] | None = None
    ) -> DenseMaps:
        """What ``dense`` says of the image's mirror image, seen ``scale`` times as large."""
        ...


@runtime_checkable
class Shareable(Protocol):
    """A segmenter that several threads may use at once, each on some of the processors."""

    @property
    def threads(self) -> int:
        """Processors that it may use in all."""
        ...

    def use_threads(self, count: int) -> None:
        """Compute on so many processors what the calling thread asks for from now on."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready, and the name that Label Studio knows it by."""

    segmenter: Segmenter
    version: str


@dataclass(frozen=True, slots=True)
class PreLabels:
    """What a model finds on an image by itself."""

    regions: list[Region]
    """The surest first."""

    chances: list[float]
    """Of each object, that it is right; an object in parts has several regions."""

    doubt: float
    """Objects that it left out as unlikely, each counted by its chance."""


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
        self._problems = Problems(settings.data_dir)
        self._damaged: Recent[str, None] = Recent(1_000)
        self.embeddings = Embeddings(
            settings.data_dir / "embeddings",
            memory_bytes=settings.embedding_cache_mb * 2**20,
            disk_bytes=settings.embedding_disk_mb * 2**20,
        )
        self._embedding_flights: SingleFlight[Embedding] = SingleFlight()
        self.gate = Gate()
        self.on_embedding: Callable[[str, float], None] = lambda source, seconds: None
        """Told of each embedding where it came from (memory, disk, made), and how long it took, in seconds."""
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
        for version in self._versions:
            if version.is_champion:
                self._registry.obtain(version)
        self._champions = {version.project: version for version in self._versions if version.is_champion}
        with self._models_lock:
            # What took a damaged version's place is looked at anew: the file may have been put back.
            for name in [name for name, loaded in self._models.items() if loaded.version != name]:
                del self._models[name]
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

    def model(self, project: str, name: str = "") -> Loaded:
        """The model that is live for the project, or the one of that ``name``.

        A damaged live version is told among the problems, and its parent or the shipped weights take the place. Raises
        UnknownVersion where the project has no version of that name, and BadWeights where that one is damaged.
        """
        base = self._base.result()
        if name == base.version:
            return Loaded(base, base.version)
        versions = [version for version in self._versions if version.project == project]
        wanted = next((v for v in versions if v.name == name), None) if name else self._champions.get(project)
        if wanted is None:
            if name:
                known = ", ".join([*(v.name for v in versions), base.version])
                raise UnknownVersion(f"project {project} has no model version {name[:80]!r}; it has: {known}")
            return Loaded(base, base.version)
        with self._models_lock:
            known_model = self._models.get(wanted.name)
            if known_model and name in ("", known_model.version):
                self._models.move_to_end(wanted.name)
                return known_model
        loaded = _loaded(base, wanted) if name else live_model(base, wanted, versions, self._note_damage)
        with self._models_lock:
            self._models[wanted.name] = loaded
            while len(self._models) > 32:
                self._models.popitem(last=False)
        return loaded

    def _note_damage(self, version: ModelVersion, error: Exception) -> None:
        if version.name in self._damaged:
            return
        self._damaged[version.name] = None
        self._problems.add(*damage(version, error))

    def working_scale(
        self, model: Loaded, image_rgb: NDArray[np.uint8], gsd_m: float | None, classes: Collection[str]
    ) -> float:
        """How much the model should enlarge an image of that ground size a pixel, where those classes are in play."""
        if not isinstance(model.segmenter, Scalable):
            return 1.0
        return model.segmenter.working_scale((image_rgb.shape[0], image_rgb.shape[1]), gsd_m, classes)

    def embed(
        self,
        model: Loaded,
        image_rgb: NDArray[np.uint8],
        key: str,
        *,
        urgency: int = BATCH,
        scale: float = 1.0,
        claim: Claim | None = None,
    ) -> Embedding:
        """The image's embedding, from memory or disk where it was made before. ``key`` names the image's content.

        Raises why the ``claim`` ended where it did before it is there.
        """
        name = embedding_key(model, key, scale)
        cached = self.embeddings.memory.get(name)
        if cached is not None:
            self.on_embedding("memory", 0.0)
            return cached

        def compute() -> Embedding:
            kept = self.embeddings.get(name)
            if kept is not None:
                self.on_embedding("disk", 0.0)
                return kept
            with self._device(model, urgency=urgency, quick_follows=urgency == INTERACTIVE):
                begun_s = time.monotonic()
                segmenter = model.segmenter
                if isinstance(segmenter, Scalable):
                    embedding = segmenter.embed(image_rgb, scale=scale)
                else:
                    embedding = segmenter.embed(image_rgb)
                self.on_embedding("made", time.monotonic() - begun_s)
            self.embeddings.put(name, embedding)
            return embedding

        return self._embedding_flights.do(name, compute, claim=claim)

    def warm(self, model: Loaded, image_rgb: NDArray[np.uint8], key: str, *, scale: float = 1.0) -> bool:
        """Have the image's embedding kept for later; whether it had to be made."""
        if embedding_key(model, key, scale) in self.embeddings:
            return False
        self.embed(model, image_rgb, key, scale=scale)
        return True

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
    ) -> PreLabels:
        """Outlines of everything in the image that the model knows, the surest first; neighbours share their borders.

        ``labels`` gives, for each class of the model that is wanted, the label it gets. Objects below ``min_score``
        are left out. Parts of one object share an ``object_id``. With ``frame``, which takes pixels to metres,
        buildings become right-angled where that is as good.
        """
        if not labels:
            return PreLabels([], [], 0.0)
        embedding = self.embed(model, image_rgb, key, urgency=urgency, scale=scale)
        segmenter = model.segmenter
        if isinstance(segmenter, Mirroring):
            with self._device(model, urgency=urgency):
                dense = segmenter.dense(embedding, labels=labels)
            with self._device(model, urgency=urgency):
                dense = dense.mean_with_mirrored(segmenter.dense_mirrored(image_rgb, scale=scale, labels=labels))
        else:
            with self._device(model, urgency=urgency):
                dense = segmenter.dense(embedding)

        def redrawn(objects: list[list[Polygon]]) -> list[list[Polygon]]:
            if not isinstance(segmenter, Outlining):
                return objects
            done: list[list[Polygon]] = []
            for start in range(0, len(objects), OUTLINED_AT_ONCE):
                # A few at a time: a click does not wait for all objects of a tile.
                with self._device(model, urgency=urgency):
                    done += outlined(segmenter, embedding, objects[start : start + OUTLINED_AT_ONCE], options)
            return done

        return pre_labels_of(dense, labels, options=options, min_score=min_score, frame=frame, redrawn=redrawn)

    def prompted(
        self,
        model: Loaded,
        image_rgb: NDArray[np.uint8],
        key: str,
        prompts: Prompts,
        *,
        options: VectorizeOptions,
        scale: float = 1.0,
        claim: Claim | None = None,
    ) -> list[Region]:
        """The outline of the object that clicks and box mean, without a label; its parts share an ``object_id``.

        Raises why the ``claim`` ended where it did before its turn.
        """
        embedding = self.embed(model, image_rgb, key, urgency=INTERACTIVE, scale=scale, claim=claim)
        with self._device(model, urgency=INTERACTIVE, is_quick=True, claim=claim):
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
        claim: Claim | None = None,
    ) -> str | None:
        """The model's class, of those in ``among``, that is likeliest under the outlines; None where none is likely."""
        if not among or not regions:
            return None
        embedding = self.embed(model, image_rgb, key, urgency=INTERACTIVE, scale=scale, claim=claim)
        outlines = [region.polygon for region in regions]
        reach = max(2, round(0.25 * math.sqrt(sum(outline.area for outline in outlines))))
        window = _window_xyxy(outlines, reach, embedding.image_hw)
        with self._device(model, urgency=INTERACTIVE, is_quick=True, claim=claim):
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

    @contextmanager
    def _device(
        self,
        model: Loaded,
        *,
        urgency: int,
        is_quick: bool = False,
        quick_follows: bool = False,
        claim: Claim | None = None,
    ) -> Iterator[None]:
        """A place at the device: all processors for one alone, else a share of them, on which two get more done."""
        with self.gate.entered(
            urgency=urgency, is_quick=is_quick, quick_follows=quick_follows, claim=claim
        ) as is_alone:
            if isinstance(model.segmenter, Shareable):
                threads = model.segmenter.threads
                model.segmenter.use_threads(threads if is_alone else max(1, threads // self.gate.places))
            yield

    def _load_base(self) -> None:
        try:
            segmenter = self._given or warmed_up(load_segmenter(self._settings))
            if isinstance(segmenter, Shareable):
                self.gate.places = max(1, min(segmenter.threads, MOST_AT_ONCE))
            self._base.set_result(segmenter)
        except Exception as error:
            # What says itself what mends it needs no trace.
            log.error("the model cannot be loaded: %s", error, exc_info=not isinstance(error, BackendError))
            self._base.set_exception(error)

    def _follow_promotions(self) -> None:
        seen: object = object()
        told = ""
        while not self._stop.is_set():
            try:
                now = self._registry.fingerprint()
                if now != seen:
                    self.refresh()
                    seen = now
            except Exception as error:
                # Once for each reason: this comes by every second.
                if str(error) != told:
                    told = str(error)
                    log.exception("the model registry cannot be read")
                    self._problems.add("model registry", f"{error or type(error).__name__}; it cannot be read")
            self._stop.wait(REFRESH_S)


def pre_labels_of(
    dense: DenseMaps,
    labels: Mapping[str, str],
    *,
    options: VectorizeOptions,
    min_score: float,
    frame: NDArray[np.float64] | None = None,
    redrawn: Callable[[list[list[Polygon]]], list[list[Polygon]]] = lambda objects: objects,
) -> PreLabels:
    """What `Predictor.automatic` gives, from a tile's maps; ``redrawn`` may better the objects' outlines."""
    by_class = {known: instances.find(dense, known, least_score=min_score, options=options) for known in labels}
    found = [(known, instance) for known, of_class in by_class.items() for instance in of_class.instances]
    # Ground that two claim goes to the surer one.
    found.sort(key=lambda one: -one[1].score)
    outlines = redrawn([list(instance.polygons) for _, instance in found])
    if frame is not None:
        size = (dense.probabilities.shape[2], dense.probabilities.shape[1])
        outlines = _squared(outlines, [known == BUILDING for known, _ in found], frame, size)
    regions: list[Region] = []
    for number, parts in enumerate(coverage(outlines, options=options)):
        known, instance = found[number]
        tie = f"{known}-{number}" if len(parts) > 1 else ""
        regions += [Region(part, labels[known], instance.score, object_id=tie) for part in parts]
    doubt = sum(of_class.doubt for of_class in by_class.values())
    return PreLabels(regions, [instance.score for _, instance in found], doubt)


def outlined(
    segmenter: Outlining, embedding: Embedding, objects: Sequence[list[Polygon]], options: VectorizeOptions
) -> list[list[Polygon]]:
    """Objects in parts, each as the segmenter outlines what is in its box, where the two agree on what that is."""
    boxes = np.array([shapely.total_bounds(parts) for parts in objects]).reshape(-1, 4)
    better = []
    for parts, masks in zip(objects, segmenter.outline(embedding, boxes), strict=True):
        drawn = vectorize.polygons(masks.probabilities[0], options=options)
        one, other = shapely.union_all(parts), shapely.union_all(drawn)
        agree = one.intersection(other).area >= LEAST_AGREEMENT * one.union(other).area
        better.append(drawn if agree and drawn else parts)
    return better


def pre_label_options(gsd_m: float | None) -> VectorizeOptions:
    """What is too small to pre-label: by its area on the ground where known, and what no network sees anyway."""
    if gsd_m is None:
        return VectorizeOptions(min_area_px=PRE_LABEL_MIN_PX)
    on_ground = VectorizeOptions.for_gsd(gsd_m, min_area_m2=PRE_LABEL_MIN_M2, min_hole_m2=PRE_LABEL_MIN_M2)
    plain = VectorizeOptions()
    return replace(
        on_ground,
        min_area_px=max(on_ground.min_area_px, plain.min_area_px),
        min_hole_px=max(on_ground.min_hole_px, plain.min_hole_px),
    )


def live_model(
    base: Segmenter,
    version: ModelVersion | None,
    versions: Iterable[ModelVersion],
    on_damage: Callable[[ModelVersion, Exception], None],
) -> Loaded:
    """The version, ready to serve; where it is damaged its parent, that one's parent, …, at last the shipped weights.

    ``on_damage`` is told of each version that is passed over.
    """
    by_name = {(known.project, known.name): known for known in versions}
    passed_over = set()
    while version is not None and version.name not in passed_over:
        try:
            return _loaded(base, version)
        except (BackendError, OSError) as error:
            on_damage(version, error)
            passed_over.add(version.name)
        version = by_name.get((version.project, version.parent))
    return Loaded(base, base.version)


def damage(version: ModelVersion, error: Exception) -> tuple[str, str]:
    """Where something is wrong with a live version, and what, with the ways out: for the status page."""
    number = version.project.split(".")[0]
    return f"model version {version.name}, project {number}", (
        f"{error}; an older version serves the project until it is trained again or another one is activated"
        f" (geoprelabel models list --project {number})"
    )


def _loaded(base: Segmenter, version: ModelVersion) -> Loaded:
    """Raises BadWeights where its file is not what was registered, or fits other weights than those loaded."""
    if not isinstance(base, Trainable):
        raise UnknownVersion(f"{base.version} takes no heads of a project")
    version.check()
    return Loaded(base.with_heads(version.heads_path), version.name)


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


def embedding_key(model: Loaded, image_key: str, scale: float) -> EmbeddingKey:
    """What names the embedding of an image, for all projects whose heads stand on the same weights."""
    return EmbeddingKey(image_key, getattr(model.segmenter, "base_version", model.segmenter.version), scale)


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
    """The segmenter that settings name. Raises BadWeights, which says how to get what is missing."""
    try:
        return _loaded_segmenter(settings)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        if settings.device == "cpu":
            raise
        # Each of torch's devices has another way to say that it is not there.
        reason = str(error).strip().partition("\n")[0]
        raise BadWeights(
            f"the model cannot be put on DEVICE={settings.device}: {reason}; set DEVICE=cpu, or install a torch that"
            " computes there"
        ) from error


def _loaded_segmenter(settings: Settings) -> Segmenter:
    if settings.segmenter == "compact":
        # torch takes a second to import: not before it is needed.
        from .compact import CompactSegmenter

        return CompactSegmenter.load(device=settings.device)
    from .checkpoints import checkpoint_named, verified

    checkpoint = checkpoint_named(settings.segmenter)
    # Before torch is imported: what is missing is said at once.
    path = None if settings.sam_checkpoint else verified(checkpoint, settings.sam_dir)
    from .sam import SamSegmenter

    if path is None:
        assert settings.sam_checkpoint is not None
        return SamSegmenter.load(settings.sam_checkpoint, name=settings.segmenter, device=settings.device)
    return SamSegmenter.load(path, name=checkpoint.name, device=settings.device, sha256=checkpoint.sha256)
