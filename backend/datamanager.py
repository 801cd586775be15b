"""Label Studio's Data Manager: tasks in the order in which they need a person.

Label Studio 1.23 shows, sorts by and samples by the scores of those predictions only whose model version is the
project's "model version", and that is the *title* of the connected backend. Under any other title the column
"Prediction score" is empty. So the backend is titled as the version that is live, which Label Studio itself carries on
to the project.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from .client import LabelStudio

log = logging.getLogger(__name__)

TITLE = "GeoPrelabel"
"""Title of a backend that was just connected, and the description by which one is known as ours later."""

TAB = "Least sure first"
"""Title of the tab of tasks nobody has labelled, the lowest prediction score first."""

_TRIES = 3
_PAUSE_S = 2.0
"""Label Studio asks a backend for its version, then stores its record as it was before: a title can get lost."""

_SELDOM = (
    "inner_id", "annotations_results", "annotations_ids", "predictions_score", "predictions_model_versions",
    "predictions_results", "file_upload", "storage_filename", "created_at", "updated_at", "updated_by",
    "avg_lead_time", "draft_exists",
)  # fmt: skip
_HIDDEN = {
    "explore": _SELDOM,
    "labeling": ("id", "completed_at", "cancelled_annotations", "total_predictions", "annotators", *_SELDOM),
}
"""Columns that the page itself hides in a project's first tab."""


def is_ours(backend: Mapping[str, Any]) -> bool:
    """Whether a backend has a title that we gave it, and may give anew."""
    return TITLE in (backend.get("title"), backend.get("description"))


def title_backends(label_studio: LabelStudio, project_id: int, *, pause_s: float = _PAUSE_S) -> list[str]:
    """Title the project's backends of ours as their live version; the titles that changed.

    One whose title a person chose stays as it is. Raises LabelStudioError.
    """
    changed: list[str] = []
    for attempt in range(_TRIES):
        listed = [one for one in label_studio.ml_backends(project_id) if is_ours(one)]
        # It tells its version when it is asked for its health; one that does not answer keeps its last.
        wrong = [one for one in listed if one.get("model_version") and one.get("title") != one["model_version"]]
        if not wrong:
            break
        if attempt:
            time.sleep(pause_s)
        for one in wrong:
            label_studio.update_backend(int(one["id"]), title=one["model_version"], description=TITLE)
            changed.append(str(one["model_version"]))
            log.debug("the backend of project %d has the title %s now", project_id, one["model_version"])
    return changed


def show_scores(label_studio: LabelStudio, project_id: int, version: str) -> None:
    """Have a project that shows no version's predictions show those of that one. Raises LabelStudioError."""
    if version and not label_studio.project(project_id).get("model_version"):
        label_studio.update_project(project_id, model_version=version)


def show_tab(label_studio: LabelStudio, project_id: int) -> bool:
    """Give the project's Data Manager the tab `TAB`; whether it had none. Raises LabelStudioError."""
    views = label_studio.views(project_id)
    if any(view.get("data", {}).get("title") == TAB for view in views):
        return False
    if not views:
        # The page makes its own first tab only where there is none.
        label_studio.create_view(project_id, {"title": "Default", "type": "list", "hiddenColumns": _hidden()})
    unlabelled = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}
    tab = {
        "title": TAB,
        "type": "list",
        "ordering": ["tasks:predictions_score"],
        "filters": {"conjunction": "and", "items": [unlabelled]},
        "hiddenColumns": _hidden(but="predictions_score"),
    }
    label_studio.create_view(project_id, tab)
    return True


def _hidden(but: str = "") -> dict[str, list[str]]:
    return {where: [f"tasks:{name}" for name in names if name != but] for where, names in _HIDDEN.items()}
