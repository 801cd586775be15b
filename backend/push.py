"""Tasks into Label Studio: project, import, and the backend connected in the order that works."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import datamanager, labelstudio
from .client import LabelStudio
from .errors import BackendError, BadConfig
from .service import parsed_config
from .settings import Settings

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "buildings.xml"
"""Polygons with smart clicks and boxes that need no label picked."""

Progress = Callable[[float, str], None]


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
    tasks: Sequence[Mapping[str, Any]],
    *,
    title: str,
    label_config: str,
    backend_url: str | None,
    progress: Progress = lambda done, message: None,
) -> Pushed:
    """Create or reuse the project of that title, import what it lacks, connect the backend.

    Run twice it adds nothing. Tasks that carry predictions get them through Label Studio's bulk import, and the number
    it took is checked. The Data Manager gets a tab of what needs a person most. A project that is there keeps its label
    config; a warning says where it is another one. Raises BadConfig, LabelStudioError.
    """
    parsed_config(label_config)
    progress(0.0, "project")
    project = project_of(label_studio, title, label_config)
    project_id = int(project["id"])
    differs = config_difference(project.get("label_config"), label_config)
    present = {_identity(task["data"]) for task in label_studio.tasks(project_id)}
    new = [task for task in tasks if _identity(task["data"]) not in present]
    if backend_url:
        progress(0.1, "connecting the backend")
    secret = settings.webhook_secret.get_secret_value()
    auth = (settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()) if settings.has_basic_auth else None
    connection = None
    if backend_url:
        there = [one for one in label_studio.ml_backends(project_id) if _same_url(one.get("url"), backend_url)]
        name = str(there[0]["title"]) if there and there[0].get("title") else datamanager.TITLE
        connection = label_studio.connect(project_id, backend_url, secret=secret, title=name, basic_auth=auth)
        datamanager.title_backends(label_studio, project_id)
    ids = label_studio.import_tasks(
        project_id,
        [{"data": task["data"]} for task in new],
        progress=lambda done: progress(0.2 + 0.6 * done / len(new), "tasks"),
    )
    predictions = [
        {**prediction, "task": task_id}
        for task_id, task in zip(ids, new, strict=True)
        for prediction in task.get("predictions", ())
    ]
    progress(0.8, "predictions")
    count = label_studio.import_predictions(project_id, predictions) if predictions else 0
    if predictions:
        datamanager.show_scores(label_studio, project_id, str(predictions[-1].get("model_version") or ""))
    datamanager.show_tab(label_studio, project_id)
    progress(1.0, "done")
    return Pushed(
        project_id,
        f"{settings.label_studio_url}/projects/{project_id}/data",
        len(ids),
        len(tasks) - len(new),
        count,
        connection.backend_id if connection else None,
        (f"project {title!r} keeps its own label config, which is not the one given: {differs}",) if differs else (),
    )


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


def _identity(data: Mapping[str, Any]) -> str:
    """Two tasks are the same when they show the same image of the same place."""
    tile = data.get("tile") if isinstance(data.get("tile"), Mapping) else None
    rest = {name: value for name, value in data.items() if name != "tile"}
    return json.dumps([rest, [tile.get("scene"), tile.get("window")] if tile else None], sort_keys=True)
