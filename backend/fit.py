"""What the webhook starts and a person can type: a project's accepted labels → a new model version."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__, labelstudio
from .errors import BackendError, TrainingError
from .images import ImageStore
from .jobs import turn_in
from .labelstudio import LabelConfig
from .predictor import load_segmenter
from .problems import Problems
from .push import DEFAULT_CONFIG
from .registry import ModelVersion, Registry
from .service import client_of, parsed_config, project_key_of, read_tasks
from .settings import Settings
from .tile import Tile

if TYPE_CHECKING:
    from .compact import CompactSegmenter
    from .training import Example, TrainingReport

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]

BLOCK_TILES = 2
"""Tiles along one side of the blocks that are held out together, so that neighbours are not on both sides."""

TRAININGS_AT_ONCE = 1
"""Projects that train at the same time on one machine; the others wait."""

MAX_TILES = 500
"""The newest so many annotated tiles are learned from: what fits into memory and ten minutes of a small machine."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of a training run."""

    version: str
    """Name of the version that is live now."""

    message: str
    """One sentence for people: what was learned from how much, and whether it went live."""

    is_new: bool


def fit_project(settings: Settings, project_id: int, *, progress: Progress = lambda done, message: None) -> Fitted:
    """Fetch a project's accepted annotations, train, publish. Raises TrainingError or LabelStudioError."""
    with client_of(settings) as label_studio:
        progress(0.0, "reading annotations")
        project = label_studio.project(project_id)
        images = ImageStore(settings, label_studio)
        return fit(
            settings,
            project_key_of(project),
            label_studio.tasks(project_id, only_annotated=True),
            parsed_config(project["label_config"]),
            images,
            progress=progress,
        )


def fit_queued(settings: Settings, project_id: int, progress: Progress) -> tuple[str, str]:
    """`fit_project` as the webhook's process runs it: one training at a time on this machine."""
    progress(0.0, "waiting for another project's training")
    with turn_in(settings.data_dir / "jobs", TRAININGS_AT_ONCE):
        done = fit_project(settings, project_id, progress=progress)
    return done.version, done.message


def fit_export(
    settings: Settings,
    project: str,
    file: Path,
    config: Path | None,
    *,
    progress: Progress = lambda done, message: None,
) -> Fitted:
    """`fit` from a Label Studio JSON export. Images are fetched from where the tasks say."""
    label_config = (config or DEFAULT_CONFIG).read_text(encoding="utf-8")
    label_studio = client_of(settings) if settings.label_studio_url else None
    images = ImageStore(settings, label_studio)
    return fit(settings, project, read_tasks(file), parsed_config(label_config), images, progress=progress)


def fit(
    settings: Settings,
    project: str,
    tasks: Iterable[Mapping[str, Any]],
    config: LabelConfig,
    images: ImageStore,
    *,
    progress: Progress = lambda done, message: None,
) -> Fitted:
    """Train on annotated tasks as Label Studio exports them, and publish under ``project``."""
    from . import training  # torch takes a second to import
    from .compact import CompactSegmenter

    registry, problems = Registry(settings), Problems(settings.data_dir)
    segmenter = load_segmenter(settings)
    if not isinstance(segmenter, CompactSegmenter):
        raise TrainingError(f"{segmenter.version} cannot learn from annotations yet; GEOPRELABEL_SEGMENTER=compact can")
    labels = _class_names(config, segmenter.labels)
    gathered = Gathered()
    examples = list(gathered.examples(tasks, config, labels, images, problems, progress))
    if not examples:
        raise TrainingError(f"nothing to learn from: {gathered.summary() or 'no annotation was submitted yet'}")
    parent = registry.champions().get(project)
    with tempfile.TemporaryDirectory(prefix="geoprelabel-fit-") as scratch:
        heads = Path(scratch) / "heads.safetensors"
        report = training.train_heads(
            segmenter, examples, tuple(dict.fromkeys(labels.values())), out=heads,
            max_seconds=settings.training_max_s,
            progress=lambda done, message: progress(0.3 + 0.65 * done, message),
        )  # fmt: skip
        progress(0.95, "publishing")
        return _publish(registry, project, segmenter, heads, report, gathered, parent)


class Gathered:
    """What was read of a project, and what was left out for which reason."""

    def __init__(self) -> None:
        self.annotation_ids: list[int] = []
        self.left_out: Counter[str] = Counter()

    def examples(
        self,
        tasks: Iterable[Mapping[str, Any]],
        config: LabelConfig,
        labels: Mapping[str, str],
        images: ImageStore,
        problems: Problems,
        progress: Progress,
    ) -> Iterator[Example]:
        """Training examples, one an annotated tile. A task that cannot be read is noted, and the next one taken."""
        from .training import Example

        # Label Studio gives tasks by id, so the last ones are the newest.
        newest: deque[tuple[Mapping[str, Any], Mapping[str, Any]]] = deque(maxlen=MAX_TILES)
        for task in tasks:
            for annotation in labelstudio.chosen_annotations(task):
                if len(newest) == MAX_TILES:
                    self.left_out[f"tiles older than the newest {MAX_TILES}"] += 1
                newest.append((task, annotation))
        for number, (task, annotation) in enumerate(newest):
            try:
                tag = config.tags[0]
                url = labelstudio.image_of(task, tag)
                image = images.fetch(url, task_id=task.get("id"))
                tile = labelstudio.tile_of(task, url, (image.rgb.shape[1], image.rgb.shape[0]))
                read = labelstudio.read_annotation(annotation, tile, config=config)
            except BackendError as error:
                problems.add(f"training, task {task.get('id')}", error)
                self.left_out["tiles that could not be read"] += 1
                continue
            self.left_out.update(read.dropped)
            self.annotation_ids.append(int(annotation.get("id") or 0))
            progress(0.3 * number / len(newest), f"reading annotations ({len(self.annotation_ids)})")
            regions = [(labels[r.label], r.polygon) for r in read.regions if r.label in labels]
            yield Example(image_rgb=image.rgb, regions=regions, place=place_of(tile, task), gsd_m=tile.gsd_m)

    def summary(self) -> str:
        """What was left out, in words."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())


def place_of(tile: Tile, task: Mapping[str, Any]) -> str:
    """Name of the block of neighbouring tiles that the tile lies in; the task itself for a plain photo."""
    if not tile.has_place:
        return f"task {task.get('id')}"
    width, height = tile.size
    (x0, y0), (x1, y1) = tile.px_to_crs(np.array([(0.0, 0.0), (width, height)]))
    side = BLOCK_TILES * max(abs(x1 - x0), abs(y1 - y0))
    return f"{tile.scene}:{math.floor((x0 + x1) / 2 / side)}:{math.floor((y0 + y1) / 2 / side)}"


def _class_names(config: LabelConfig, known: Iterable[str]) -> dict[str, str]:
    """For each label of the config, the class it is trained as: the model's own where it knows one, else itself."""
    known = tuple(known)
    names: dict[str, str] = {}
    for tag in config.tags:
        classes = {label: name for name, label in tag.match(known).items()}
        names.update({label.value: classes.get(label.value, label.value) for label in tag.labels})
    return names


def _publish(
    registry: Registry,
    project: str,
    segmenter: CompactSegmenter,
    heads: Path,
    report: TrainingReport,
    gathered: Gathered,
    parent: ModelVersion | None,
) -> Fitted:
    version = segmenter.with_heads(heads).version
    if any(known.name == version for known in registry.versions(project)):
        return Fitted(version, f"the annotations are those of {version}; nothing new to learn", is_new=False)
    learned = f"learned from {len(gathered.annotation_ids)} tiles"
    better, judged = verdict(report)
    note = f"{learned}; {judged}"
    ids = json.dumps(sorted(gathered.annotation_ids))
    registry.publish(
        project,
        version,
        heads,
        parent=parent.name if parent else segmenter.base_version,
        metrics=asdict(report),
        tags={
            "note": note,
            "annotations": str(len(gathered.annotation_ids)),
            "annotations_sha256": hashlib.sha256(ids.encode()).hexdigest(),
            "code": __version__,
        },
        promote=better,
    )
    return Fitted(version, f"{note}; {'live' if better else 'kept as challenger'}: {version}", is_new=True)


def verdict(report: TrainingReport) -> tuple[bool, str]:
    """Whether a new version goes live, and why, from its figures on the tiles that were held out.

    It stays a challenger when no label does better there than with the shipped weights, or one does worse by 0.01. With
    too few tiles to hold any out it goes live: the annotator asked for it, and ``geoprelabel models rollback`` undoes
    it.
    """
    if not report.held_out:
        return True, "too few tiles to judge it by"
    figures, better, worse = [], False, False
    for label in report.labels:
        before, after = label.iou_before or 0.0, label.iou_after or 0.0
        figures.append(f"{label.label} IoU {before:.2f} → {after:.2f}")
        better |= after > before
        worse |= after < before - 0.01
    return better and not worse, f"on held-out tiles {', '.join(figures)}"
