"""The same backend as a class for Label Studio's own tooling (the ``label-studio-ml`` package, 1.x and 2.x).

Our server does not need it: ``geoprelabel serve`` answers all of Label Studio's calls itself. It is for those who run
several models behind ``label-studio-ml`` or build on its classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from label_studio_ml.model import LabelStudioMLBase

from .errors import BackendError, BadRequest
from .service import PredictRequest, Service, project_key
from .settings import Settings


@functools.cache
def shared_service() -> Service:
    """One service for all models of this process, as the environment says, started."""
    service = Service(Settings.from_environment())
    service.start()
    return service


class GeoPrelabeler(LabelStudioMLBase):  # type: ignore[misc]
    """Polygons for tasks, and training on accepted ones, under both calling conventions of ``label-studio-ml``.

    1.x makes it with ``(label_config=…, train_output=…, **kwargs)``, 2.x with ``(project_id=…, label_config=…)``.
    """

    def __init__(
        self, project_id: str | None = None, label_config: str | None = None, train_output: Any = None, **kwargs: Any
    ) -> None:
        """Nothing is loaded before the first prediction."""
        try:
            super().__init__(label_config=label_config, train_output=train_output, **kwargs)
        except TypeError:
            super().__init__(project_id=project_id, label_config=label_config)
        self._project = project_key(project_id)
        self._label_config = label_config or ""

    def predict(self, tasks: Sequence[Mapping[str, Any]], context: Any = None, **kwargs: Any) -> list[Any]:
        """One prediction a task, in order, or ``[]`` for one that failed; the one answer to an annotator's prompts."""
        request = PredictRequest(list(tasks), self._project, self._label_config, context or None)
        results, version = shared_service().predict(request)
        self.model_version = version
        return results

    def fit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """React to a webhook event: 2.x calls ``fit(event, data)``, 1.x ``fit((), event=…, data=…, job_id=…)``.

        Training runs in a process of its own; this returns at once with what was done.
        """
        positional = dict(zip(("event", "data"), (a for a in args if a != ()), strict=False))
        event = kwargs.get("event") or positional.get("event")
        data = kwargs.get("data") or positional.get("data") or {}
        if not isinstance(event, str) or not isinstance(data, Mapping):
            raise BadRequest(f"fit takes an event's name and its data, got {event!r:.40} and {type(data).__name__}")
        try:
            return {**shared_service().event({**data, "action": event})}
        except BackendError as error:
            shared_service().problems.add(f"fit, event {event}", error)
            return {"status": "failed", "error": str(error)}
