"""What the webhook starts and a person can type: a project's accepted labels → a new model version."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__, labelstudio
from .client import NotFound, Unreachable
from .errors import BackendError, LabelStudioError, RegistryError, TrainingError
from .images import ImageStore
from .jobs import Jobs, NotNow
from .journal import Journal, JournalError
from .labelstudio import LabelConfig
from .predictor import Trainable, damage, live_model, load_segmenter
from .problems import Problems
from .push import DEFAULT_CONFIG
from .registry import HEADS_FILE, ModelVersion, Registry
from .sampling import Sample
from .service import client_of, parsed_config, project_key_of, read_tasks
from .settings import Settings
from .tile import Tile

if TYPE_CHECKING:
    from .judging import Judgement
    from .training import Example

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]

BLOCK_TILES = 2
"""Tiles along one side of the blocks that are held out together, so that neighbours are not on both sides."""

MAX_TILES = 500
"""So many annotated tiles are learned from at most: what fits into memory and ten minutes of a small machine."""

SEED = 0
"""What chance is drawn from: the same annotations make the same version, judged the same."""

_BLOCKS, _LEARNED = "judged_blocks", "learned_blocks"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of a training run."""

    version: str
    """Name of the version that came of it."""

    message: str
    """One sentence for people: what was learned from how much, and whether it went live."""

    is_new: bool


def fit_project(settings: Settings, project_id: int, *, progress: Progress = lambda done, message: None) -> Fitted:
    """Learn from a project's accepted annotations: what the journal holds once Label Studio was asked what is missing.

    Raises LabelStudioError where it does not answer, JournalError where the journal cannot be written, TrainingError.
    """
    with client_of(settings) as label_studio, closing(Journal(settings)) as journal:
        progress(0.0, "asking Label Studio what changed")
        project = label_studio.project(project_id)
        key = project_key_of(project)
        journal.reconcile(key, label_studio.tasks(project_id, only_annotated=True))
        return fit(
            settings,
            key,
            journal.tasks(key),
            parsed_config(project["label_config"]),
            ImageStore(settings, label_studio),
            progress=progress,
        )


def fit_typed(settings: Settings, project_id: int, *, progress: Progress) -> Fitted:
    """`fit_project` where a person waits for it: /status shows it too. Raises AtWork where it is trained already."""
    with client_of(settings) as label_studio:
        key = project_key_of(label_studio.project(project_id))
    return Jobs(settings).train_here(key, lambda tell: fit_project(settings, project_id, progress=tell), progress)


def fit_queued(settings: Settings, project_id: int, progress: Progress) -> tuple[str, str]:
    """`fit_project` as the webhook's process runs it. Raises NotNow for what comes right without anybody's doing."""
    try:
        done = fit_project(settings, project_id, progress=progress)
    except NotFound:
        raise
    except Exception as error:
        # Each library has an error of its own for a full disk.
        is_full = any(sign in str(error) for sign in ("disk is full", "No space left on device"))
        if isinstance(error, (LabelStudioError, JournalError, RegistryError)) or is_full:
            raise NotNow(str(error)) from error
        raise
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
    """Train on annotated tasks as Label Studio exports them, judge what came of it, and publish under ``project``.

    The version goes live where it is surely better than the live one on tiles that neither learned from, or as
    GEOPRELABEL_PROMOTE says. Raises TrainingError where there is nothing to learn from.
    """
    from . import judging, training  # torch takes a second to import

    registry, problems = Registry(settings), Problems(settings.data_dir)
    segmenter = load_segmenter(settings)
    if not isinstance(segmenter, Trainable) or not isinstance(segmenter, training.Learner):
        raise TrainingError(f"{segmenter.version} cannot learn from annotations; GEOPRELABEL_SEGMENTER=compact can")
    names = _class_names(config, segmenter.labels)
    classes = tuple(dict.fromkeys(names.values()))
    gathered = Gathered()
    with registry.recorded(project) as run, tempfile.TemporaryDirectory(prefix="geoprelabel-fit-") as scratch:

        def tell(share: float, message: str) -> None:
            run.progress(share, message)
            progress(share, message)

        examples = list(gathered.examples(tasks, config, names, images, problems, tell))
        if not examples:
            raise TrainingError(f"nothing to learn from: {gathered.summary() or 'no annotation was submitted yet'}")
        versions = registry.versions(project)
        before = next((version for version in versions if version.is_champion), None)
        champion = live_model(segmenter, before, versions, lambda *seen: problems.add(*damage(*seen)))
        held_before = {block for version in versions for block in version.tags.get(_BLOCKS, "").split()}
        learned_before = before.tags.get(_LEARNED, "").split() if before else ()
        if not isinstance(segmenter, training.Deep):
            examples = judging.embedded(segmenter, examples, classes, progress=_part(tell, 0.3, 0.5))
        split = judging.split(examples, held_before, learned_before)
        run.params(
            {"tiles_learned": len(split.learn), "tiles_judged": len(split.judge), "labels": ", ".join(classes),
             "parent": champion.version, "base": segmenter.base_version, "seed": SEED, "code": __version__}
        )  # fmt: skip
        heads = Path(scratch) / HEADS_FILE
        report = training.train_heads(
            segmenter, split.learn, classes, out=heads, folds_out=Path(scratch) if split.in_turn else None,
            seed=SEED, max_seconds=settings.training_max_s, progress=_part(tell, 0.5, 0.8),
        )  # fmt: skip
        challenger = segmenter.with_heads(heads)
        learned = f"learned from {len(split.learn)} tiles"
        known = next((version for version in versions if version.name == challenger.version), None)
        if known is not None:
            return _known_already(registry, known, settings.promote)
        challengers = [
            (model, judging.embedded(champion.segmenter, tiles, classes))
            for model, tiles in judging.challengers(split, challenger, report.folds, segmenter.with_heads)
        ]
        judged = None
        if challengers:
            judged = judging.judge(
                champion.segmenter, challengers, classes, min_score=settings.model_score_threshold,
                seed=SEED, progress=_part(tell, 0.8, 0.95),
            )  # fmt: skip
        why_not = split.why_not or "the outlines lie in one block of neighbours, and judging it needs two"
        is_better, why = judging.verdict(judged) if judged else (False, why_not)
        promote = is_better if settings.promote == "better" else settings.promote == "always"
        if is_better and _name(registry.champions().get(project)) != _name(before):
            promote = settings.promote == "always"
            why += "; meanwhile another version was made live"
        tell(0.95, "publishing")
        metrics = {**asdict(report), "judging": asdict(judged) if judged else None}
        del metrics["held_out"], metrics["folds"]  # each place by name: too much for a page
        run.figures(metrics)
        version = registry.publish(
            project,
            challenger.version,
            heads,
            parent=champion.version,
            metrics=metrics,
            tags={
                "note": f"{learned}; {why}",
                "annotations": str(len(gathered.annotation_ids)),
                "annotations_sha256": _sha256(json.dumps(sorted(gathered.annotation_ids))),
                "data_sha256": _data_sha256(examples),
                _BLOCKS: " ".join(split.blocks),
                _LEARNED: " ".join(split.learned_blocks),
                "seed": str(SEED),
                "code": __version__,
            },
            promote=promote,
            run_id=run.run_id,
        )
    return Fitted(version.name, f"{learned}; {why}; {_outcome(version, settings.promote, judged)}", is_new=True)


def _name(version: ModelVersion | None) -> str:
    return version.name if version else ""


def _outcome(version: ModelVersion, promote: str, judged: Judgement | None) -> str:
    """Whether the version is live, and what else can be done, in words."""
    if version.is_champion:
        return f"live{' as GEOPRELABEL_PROMOTE=always says' if promote == 'always' else ''}: {version.name}"
    by_hand = f"geoprelabel models activate {version.name} --project {version.project.split('.')[0]}"
    kept = f"kept as challenger{' as GEOPRELABEL_PROMOTE=never says' if promote == 'never' else ''}: {version.name}"
    unjudged = "" if judged or promote == "never" else "; GEOPRELABEL_PROMOTE=always does so each time"
    return f"{kept} ({by_hand} makes it live{unjudged})"


def _known_already(registry: Registry, known: ModelVersion, promote: str) -> Fitted:
    """What the same annotations made before. One that a person took off stays off."""
    message = f"the annotations are those of {known.name}; nothing new to learn"
    if promote == "always" and not known.is_champion:
        registry.activate(known.project, known.name)
        message += "; live as GEOPRELABEL_PROMOTE=always says"
    return Fitted(known.name, message, is_new=False)


def _part(tell: Progress, start: float, stop: float) -> Progress:
    """Progress of a part of the work that takes the whole's share from ``start`` to ``stop``."""
    return lambda done, message: tell(start + (stop - start) * done, message)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _data_sha256(examples: Iterable[Example]) -> str:
    """Of the outlines, their labels and places."""
    listed = [(e.place, [(label, outline.wkb_hex) for label, outline in e.regions]) for e in examples]
    return _sha256(json.dumps(listed))


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
        """Training examples, one an annotated tile. A task that cannot be read is noted, and the next one taken.

        Raises Unreachable where Label Studio has the images and went away.
        """
        from .training import Example

        sample: Sample[tuple[Mapping[str, Any], Mapping[str, Any]]] = Sample(MAX_TILES, labels.keys())
        for task in tasks:
            for annotation in labelstudio.chosen_annotations(task):
                has = labelstudio.labels_of(annotation)
                sample.add((task, annotation), key=str(task.get("id")), age=labelstudio.age(annotation), labels=has)
        chosen = sample.items()
        if sample.added > len(chosen):
            self.left_out[f"tiles beyond the {MAX_TILES} that one training takes"] = sample.added - len(chosen)
        for number, (task, annotation) in enumerate(chosen):
            try:
                tag = config.tags[0]
                url = labelstudio.image_of(task, tag)
                image = images.fetch(url, task_id=task.get("id"))
                tile = labelstudio.tile_of(task, url, (image.rgb.shape[1], image.rgb.shape[0]))
                read = labelstudio.read_annotation(annotation, tile, config=config)
            except BackendError as error:
                if isinstance(error.__cause__, Unreachable):
                    # Of all tiles, not of this one: a version of what was read so far would have forgotten the rest.
                    raise error.__cause__ from error
                problems.add(f"training, task {task.get('id')}", error)
                self.left_out["tiles that could not be read"] += 1
                continue
            self.left_out.update(read.dropped)
            self.annotation_ids.append(int(annotation.get("id") or 0))
            progress(0.3 * number / len(chosen), f"reading annotations ({len(self.annotation_ids)})")
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
