"""Label Studio's API over plain HTTP: the calls that this project makes, and no more.

The token goes to Label Studio's own origin, never along a redirect, and into no message or log. Calls that Label
Studio was too busy to take (429, 502–504, a locked SQLite file, no connection) are made again after a pause. A call
that may have been carried out is made again only where doing it twice is the same as doing it once.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from html import unescape
from types import TracebackType
from typing import Any

import httpx
import tenacity

from .errors import LabelStudioDenied, LabelStudioError

log = logging.getLogger(__name__)

Json = dict[str, Any]
"""A JSON object."""

WEBHOOK_ACTIONS = ("ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED")
"""Events that can start a training. Label Studio sends each inside the annotator's save, so no others are asked for."""

SECRET_HEADER = "X-GeoPrelabel-Secret"
"""Header in which Label Studio hands our own secret back with every webhook."""

_ANSWER_MAX_BYTES = 512 * 2**20
_ACTION_TIMEOUT_S = 600.0
"""For calls in which Label Studio asks a backend before it answers."""

_BACKEND_TIMEOUT_S = 120.0
_IMPORT_TIMEOUT_S = 120.0
_REDIRECTS_MAX = 3
_RETRY_AFTER_MAX_S = 60.0
_RENEW_BEFORE_S = 30.0
_SKIPPED_STATUSES = frozenset({429, 503})
_GATEWAY_STATUSES = frozenset({502, 504})
_IDEMPOTENT_METHODS = frozenset({"GET", "PUT", "PATCH", "DELETE"})
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_REDACTED = "…"
_JWT = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+")
_CREDENTIALS_IN_URL = re.compile(r"(?<=//)[^/@\s\"'<>]+@")


class NotFound(LabelStudioError):
    """Label Studio has no such project, task or file."""


class Unreachable(LabelStudioError):
    """Label Studio is down, or too busy for longer than we try; it may be there again later."""


class Doubtful(Unreachable):
    """A call may have been carried out, now or in a moment: who made it has to look before it is made again."""


class PredictionsLeftOut(LabelStudioError):
    """Label Studio did not store all predictions; those that it did are there."""

    def __init__(self, message: str, *, stored: int) -> None:
        super().__init__(message)
        self.stored = stored


class FileTooLarge(LabelStudioError):
    """A file is larger than the caller takes."""


class _Busy(Exception):
    """The call may be made again; ``error`` is what to say when it was made often enough."""

    def __init__(self, error: LabelStudioError, *, retry_after_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Label Studio says that a file lies with another host."""

    url: str
    """Where, often with a signature in the query: not for logs. To be fetched without Label Studio's token."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A backend as a project knows it."""

    webhook_id: int
    backend_id: int


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: httpx.Headers
    content: bytes

    @property
    def location(self) -> str:
        return self.headers.get("location", "") if 300 <= self.status < 400 else ""


class LabelStudio:
    """One Label Studio server, as the owner of one token sees it. May be shared by threads.

    ``api_key`` is a legacy token or a personal access token. ``attempts`` and ``first_pause_s`` (seconds, doubled each
    time, with jitter) say how often a call is made that Label Studio is too busy to take. Every method raises
    LabelStudioDenied where the token is missing, wrong or not enough, Unreachable where calling later may help, and
    LabelStudioError for all else.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        attempts: int = 6,
        first_pause_s: float = 0.25,
    ) -> None:
        self._base = _checked_base(url)
        self._key = _checked_key(api_key)
        self._is_personal = _looks_like_jwt(self._key)
        self._access = ""
        self._access_until_s = 0.0
        self._access_lock = threading.Lock()
        self._attempts = attempts
        self._pause = tenacity.wait_random_exponential(multiplier=first_pause_s, max=20.0)
        _keep_urls_out_of_logs()
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            transport=transport,
            headers={"User-Agent": "geoprelabel", "Accept": "application/json, */*"},
        )

    @property
    def url(self) -> str:
        """Where Label Studio answers, without a slash at the end."""
        return str(self._base).rstrip("/")

    def close(self) -> None:
        """Let go of all connections."""
        self._http.close()

    def __enter__(self) -> LabelStudio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LabelStudio({self.url!r})"

    # Who and what answers

    def version(self) -> str:
        """Release that answers, e.g. ``1.23.2``. Needs no token."""
        answer = self._object(self._call("GET", "/api/version", with_token=False), "/api/version")
        return str(answer.get("release", ""))

    def whoami(self) -> Json:
        """The user whom the token belongs to."""
        return self._object(self._call("GET", "/api/current-user/whoami"), "/api/current-user/whoami")

    # Projects

    def projects(self, title: str | None = None) -> list[Json]:
        """All projects that the token may see; with a title, those that have exactly this one."""
        found: list[Json] = []
        params: dict[str, Any] = {"page_size": 100, "ordering": "id", **({"title": title} if title else {})}
        for page in range(1, 10_000):
            answer = self._call("GET", "/api/projects/", params={**params, "page": page})
            answer = self._object(answer, "/api/projects/")
            found += answer.get("results", [])
            if not answer.get("next"):
                break
        return [project for project in found if title is None or project.get("title") == title]

    def project(self, project_id: int) -> Json:
        """One project, its label config included."""
        return self._object(self._call("GET", f"/api/projects/{project_id:d}/"), "/api/projects/")

    def create_project(self, title: str, label_config: str, **fields: Any) -> Json:
        """A new project. ``fields`` are the API's own, e.g. ``description``."""
        body = {"title": title, "label_config": label_config, **fields}
        return self._object(self._call("POST", "/api/projects/", body=body), "/api/projects/")

    def update_project(self, project_id: int, **fields: Any) -> Json:
        """The project after those fields were set."""
        return self._object(self._call("PATCH", f"/api/projects/{project_id:d}/", body=fields), "/api/projects/")

    # Tasks, annotations, predictions

    def import_tasks(
        self,
        project_id: int,
        tasks: Sequence[Mapping[str, Any]],
        batch: int = 250,
        progress: Callable[[int], None] | None = None,
        *,
        is_careful: bool = False,
    ) -> list[int]:
        """Ids of the new tasks, in order.

        After each batch ``progress`` is told how many tasks were imported so far. An error in a later batch says how
        many were imported before it. Where the server failed, ``is_careful`` raises Doubtful rather than send again:
        it may have failed after the tasks were in.
        """
        ids: list[int] = []
        path, timeout_s = f"/api/projects/{project_id:d}/import", _IMPORT_TIMEOUT_S if is_careful else None
        for start in range(0, len(tasks), batch):
            part = list(tasks[start : start + batch])
            params = {"commit_to_project": "true", "return_task_ids": "true"}
            try:
                answer = self._object(
                    self._call("POST", path, params=params, body=part, timeout_s=timeout_s, is_careful=is_careful), path
                )
                new_ids = answer.get("task_ids")
                if not isinstance(new_ids, list) or len(new_ids) != len(part):
                    raise LabelStudioError(
                        f"{self.url}{path} answered with ids of {len(new_ids or [])} tasks, {len(part)} were sent"
                    )
            except LabelStudioError as error:
                if not ids:
                    raise
                raise type(error)(f"{error} ({len(ids)} of {len(tasks)} tasks were imported before)") from error
            ids += [int(task_id) for task_id in new_ids]
            if progress:
                progress(len(ids))
        return ids

    def import_predictions(
        self,
        project_id: int,
        predictions: Sequence[Mapping[str, Any]],
        batch: int = 250,
        *,
        is_careful: bool = False,
    ) -> int:
        """How many predictions were stored: all of them.

        Each one names its ``task``. Label Studio leaves out those that do not fit the label config without a word;
        raises PredictionsLeftOut with both numbers then. ``is_careful`` as for `import_tasks`.
        """
        path = f"/api/projects/{project_id:d}/import/predictions"
        created = 0
        for start in range(0, len(predictions), batch):
            part, timeout_s = list(predictions[start : start + batch]), _IMPORT_TIMEOUT_S if is_careful else None
            answer = self._call("POST", path, body=part, timeout_s=timeout_s, is_careful=is_careful)
            answer = self._object(answer, path)
            created += int(answer.get("created", 0))
        if created != len(predictions):
            raise PredictionsLeftOut(
                f"Label Studio stored {created} of {len(predictions)} predictions of project {project_id}: the others"
                " do not fit its label config (tag names and labels must be those of the config)",
                stored=created,
            )
        return created

    def tasks(
        self,
        project_id: int,
        only_annotated: bool = False,
        page_size: int = 100,
        *,
        above_id: int = 0,
        is_bare: bool = False,
    ) -> Iterator[Json]:
        """Every task with its annotations and predictions, ordered by id; no more than a page is held in memory.

        ``only_annotated`` leaves out tasks that have no annotation, or skipped ones only; ``above_id`` those up to a
        number. ``is_bare`` gives counts (``total_predictions``) in place of annotations and predictions. Storage
        addresses (``s3://…``) stay as they were imported.
        """
        last_id = above_id
        while True:
            # Asking for "ids above the last" rather than for page numbers: nothing is missed or seen twice when
            # tasks come, go or get annotated meanwhile.
            filters = [_filter("id", last_id), *([_filter("total_annotations", 0)] if only_annotated else [])]
            query = {"filters": {"conjunction": "and", "items": filters}, "ordering": ["tasks:id"]}
            params = {
                "project": project_id,
                **({} if is_bare else {"fields": "all"}),
                "resolve_uri": "false",
                "page": 1,
                "page_size": page_size,
                "query": json.dumps(query),
            }
            page = self._object(self._call("GET", "/api/tasks/", params=params), "/api/tasks/").get("tasks")
            if not isinstance(page, list):
                raise LabelStudioError(f"{self.url}/api/tasks/ answered without a list of tasks")
            if not page:
                return
            if not all(isinstance(task, dict) and isinstance(task.get("id"), int) for task in page):
                raise LabelStudioError(f"{self.url}/api/tasks/ answered with tasks that have no number")
            ids = [int(task["id"]) for task in page]
            if ids != sorted(ids) or ids[0] <= last_id:
                raise LabelStudioError(f"{self.url}/api/tasks/ does not keep to the order and filter asked for")
            yield from page
            last_id = ids[-1]

    def task(self, task_id: int) -> Json:
        """One task with its annotations and predictions."""
        return self._object(self._call("GET", f"/api/tasks/{task_id:d}/"), "/api/tasks/")

    def create_annotation(self, task_id: int, result: Sequence[Mapping[str, Any]], **fields: Any) -> Json:
        """A new annotation. ``fields`` are the API's own, e.g. ``was_cancelled`` or ``lead_time``."""
        body = {"result": list(result), **fields}
        return self._object(self._call("POST", f"/api/tasks/{task_id:d}/annotations/", body=body), "/api/tasks/")

    def annotation(self, annotation_id: int) -> Json:
        """One annotation as it is now."""
        path = f"/api/annotations/{annotation_id:d}/"
        return self._object(self._call("GET", path), path)

    def update_annotation(self, annotation_id: int, **fields: Any) -> Json:
        """The annotation after those fields were set. Label Studio has no way to say "unless it changed meanwhile"."""
        path = f"/api/annotations/{annotation_id:d}/"
        return self._object(self._call("PATCH", path, body=fields), path)

    def delete_annotation(self, annotation_id: int) -> None:
        """Afterwards there is no such annotation, whether or not there was one."""
        try:
            self._call("DELETE", f"/api/annotations/{annotation_id:d}/")
        except NotFound:
            log.debug("annotation %d was gone before", annotation_id)

    def predict_tasks(self, project_id: int, task_ids: Sequence[int]) -> Json:
        """Have Label Studio ask the project's backend about these tasks; gives its ``processed_items`` and ``detail``.

        Returns when all is stored. A batch that failed in the backend reads like one that did not.
        """
        body = {"selectedItems": {"all": False, "included": [int(task_id) for task_id in task_ids]}}
        params = {"id": "retrieve_tasks_predictions", "project": project_id}
        answer = self._call("POST", "/api/dm/actions", params=params, body=body, timeout_s=_ACTION_TIMEOUT_S)
        return self._object(answer, "/api/dm/actions")

    # Tabs of the Data Manager

    def views(self, project_id: int) -> list[Json]:
        """The Data Manager's tabs of a project, its filters and columns under ``data``."""
        return self._list(self._call("GET", "/api/dm/views/", params={"project": project_id}), "/api/dm/views/")

    def create_view(self, project_id: int, data: Mapping[str, Any]) -> Json:
        """A new tab. ``data`` is the API's own: ``title``, ``type``, ``filters``, ``hiddenColumns``."""
        body = {"project": project_id, "data": dict(data)}
        return self._object(self._call("POST", "/api/dm/views/", body=body), "/api/dm/views/")

    # Backends and webhooks

    def ml_backends(self, project_id: int) -> list[Json]:
        """Backends of a project. Label Studio asks each for its health meanwhile."""
        return self._list(
            self._call("GET", "/api/ml", params={"project": project_id}, timeout_s=_BACKEND_TIMEOUT_S), "/api/ml"
        )

    def connect_backend(
        self,
        project_id: int,
        url: str,
        title: str,
        *,
        basic_auth: tuple[str, str] | None = None,
        is_interactive: bool = True,
    ) -> Json:
        """The new backend. Label Studio calls its /health and /setup first; an error holds their reason to refuse.

        ``basic_auth`` is user and password that Label Studio sends with each of its calls.
        """
        body = {"project": project_id, "url": url, "title": title, "is_interactive": is_interactive}
        try:
            answer = self._call(
                "POST", "/api/ml", body={**body, **_auth_fields(basic_auth)}, timeout_s=_BACKEND_TIMEOUT_S
            )
        except LabelStudioError as error:
            if "health check failed" not in str(error):
                raise
            raise LabelStudioError(
                f"Label Studio reaches no backend at {_shown(url)}; start it there (geoprelabel serve), or give its"
                " address as Label Studio's machine sees it (--backend-url), and push again; --no-connect pushes tasks"
                " alone"
            ) from error
        return self._object(answer, "/api/ml")

    def refusals(self, backend_url: str) -> list[str]:
        """Why Label Studio would not take a backend at that address, or a webhook to it; nothing is made by asking."""
        backend_url, found = backend_url.rstrip("/"), []
        # All fields are checked before anything is made: the first lacks its project, the other has no valid headers.
        asked = ("/api/ml", {"url": backend_url}), ("/api/webhooks/", {"url": f"{backend_url}/webhook", "headers": []})
        for path, body in asked:
            try:
                self._call("POST", path, body=body, timeout_s=_BACKEND_TIMEOUT_S)
            except LabelStudioError as error:
                if "valid URL" in str(error):
                    found.append(_no_dot(f"{backend_url}/webhook"))
                elif any(told in str(error) for told in ("reserved network address", "resolve hostname")):
                    found.append(str(error))
                elif "project" not in str(error) and "headers" not in str(error):
                    raise
        return found

    def update_backend(self, backend_id: int, **fields: Any) -> Json:
        """The backend after those fields were set."""
        path = f"/api/ml/{backend_id:d}"
        now = self._object(self._call("GET", path, timeout_s=_BACKEND_TIMEOUT_S), path)
        # Label Studio 1.23 fails with 500 where url is not among the fields.
        body = {"url": now.get("url"), "project": now.get("project"), **fields}
        return self._object(self._call("PATCH", path, body=body, timeout_s=_BACKEND_TIMEOUT_S), path)

    def ask_backend(self, backend_id: int, task_id: int, prompts: Sequence[Mapping[str, Any]]) -> Json:
        """What a smart tool in the page does: a backend's answer to prompts, ``data`` or ``errors``."""
        path = f"/api/ml/{backend_id:d}/interactive-annotating"
        body = {"task": task_id, "context": {"result": list(prompts)}}
        return self._object(self._call("POST", path, body=body, timeout_s=_ACTION_TIMEOUT_S), path)

    def start_training(self, backend_id: int) -> None:
        """What the "Start Training" button does."""
        self._call("POST", f"/api/ml/{backend_id:d}/train", body={}, timeout_s=_BACKEND_TIMEOUT_S)

    def webhooks(self, project_id: int) -> list[Json]:
        """Webhooks of a project."""
        return self._list(self._call("GET", "/api/webhooks/", params={"project": project_id}), "/api/webhooks/")

    def create_webhook(
        self, project_id: int, url: str, headers: Mapping[str, str], actions: Sequence[str] = WEBHOOK_ACTIONS
    ) -> Json:
        """A new webhook that sends those events, with their content and those headers."""
        body = {"project": project_id, **_webhook_fields(url, headers, actions)}
        return self._object(self._call("POST", "/api/webhooks/", body=body), "/api/webhooks/")

    def update_webhook(self, webhook_id: int, url: str, headers: Mapping[str, str], actions: Sequence[str]) -> Json:
        """The webhook after address, headers and events were set."""
        path = f"/api/webhooks/{webhook_id:d}/"
        return self._object(self._call("PATCH", path, body=_webhook_fields(url, headers, actions)), path)

    def connect(
        self,
        project_id: int,
        backend_url: str,
        *,
        secret: str = "",
        title: str = "GeoPrelabel",
        basic_auth: tuple[str, str] | None = None,
    ) -> Connection:
        """Join a project and a backend; a second call adds nothing and mends what differs.

        The webhook, with ``secret`` in its header, comes first: where it is there already, Label Studio does not add
        its own, which would carry no secret and send every event of the project.
        """
        backend_url = backend_url.rstrip("/")
        hook_url, headers = f"{backend_url}/webhook", {SECRET_HEADER: secret} if secret else {}
        hook = next((hook for hook in self.webhooks(project_id) if hook.get("url") == hook_url), None)
        if hook is None:
            hook = self._first_webhook(project_id, hook_url, headers)
        elif (hook.get("headers"), hook.get("is_active"), set(hook.get("actions", []))) != (
            headers,
            True,
            set(WEBHOOK_ACTIONS),
        ):
            hook = self.update_webhook(int(hook["id"]), hook_url, headers, WEBHOOK_ACTIONS)
        backends = self.ml_backends(project_id)
        backend = next((one for one in backends if str(one.get("url", "")).rstrip("/") == backend_url), None)
        if backend is None:
            backend = self.connect_backend(project_id, backend_url, title, basic_auth=basic_auth)
        elif basic_auth or backend.get("title") != title or not backend.get("is_interactive"):
            fields = {"title": title, "is_interactive": True, **_auth_fields(basic_auth)}
            backend = self.update_backend(int(backend["id"]), **fields)
        return Connection(webhook_id=int(hook["id"]), backend_id=int(backend["id"]))

    def _first_webhook(self, project_id: int, url: str, headers: Mapping[str, str]) -> Json:
        try:
            return self.create_webhook(project_id, url, headers, WEBHOOK_ACTIONS)
        except LabelStudioError as error:
            if "valid URL" not in str(error):
                raise
            raise LabelStudioError(_no_dot(url)) from error

    # Files

    def resolve(self, task_id: int, fileuri: str, *, max_bytes: int) -> bytes | Elsewhere:
        """A file in a storage of the task's project (``s3://…``): its bytes, or where a signed link leads.

        Raises NotFound where no storage of the project holds it, FileTooLarge above ``max_bytes``.
        """
        encoded = base64.urlsafe_b64encode(fileuri.encode()).decode()
        url = self._absolute(f"/tasks/{task_id:d}/resolve/").copy_merge_params({"fileuri": encoded})
        return self._file(url, max_bytes, shown=f"{fileuri.partition('?')[0]} (task {task_id})")

    def get_file(self, path_or_url: str, max_bytes: int) -> bytes | Elsewhere:
        """An upload or a local file, by path (``/data/upload/…``) or by full address on Label Studio's own origin.

        Raises NotFound, FileTooLarge above ``max_bytes``, and LabelStudioError for an address on another origin.
        """
        url = self._absolute(path_or_url)
        return self._file(url, max_bytes, shown=_shown(str(url)))

    def owns(self, url: str) -> bool:
        """Whether the address lies on Label Studio's origin: same scheme, host and port."""
        try:
            return _origin(httpx.URL(url)) == _origin(self._base)
        except httpx.InvalidURL:
            return False

    def _file(self, url: httpx.URL, max_bytes: int, *, shown: str) -> bytes | Elsewhere:
        for _ in range(_REDIRECTS_MAX + 1):
            answer = self._again("GET", url, max_bytes=max_bytes)
            if not answer.location:
                if answer.status != 200:
                    raise LabelStudioError(f"{shown}: Label Studio answered {answer.status} instead of the file")
                return answer.content
            target = url.join(answer.location)
            if _origin(target) != _origin(self._base):
                return Elsewhere(str(target))
            url = target
        raise LabelStudioError(f"{shown}: more than {_REDIRECTS_MAX} redirects")

    # One call

    def _absolute(self, path_or_url: str) -> httpx.URL:
        base_path = self._base.path.rstrip("/")
        try:
            if not path_or_url.startswith("/") or path_or_url.startswith("//"):
                url = httpx.URL(path_or_url)
            elif base_path and not path_or_url.startswith(f"{base_path}/"):
                url = self._base.join(base_path + path_or_url)
            else:
                url = self._base.join(path_or_url)
        except httpx.InvalidURL as error:
            raise LabelStudioError(f"not an address: {_shown(path_or_url)}") from error
        if _origin(url) != _origin(self._base):
            raise LabelStudioError(f"{_shown(path_or_url)} is not on Label Studio's own address {self.url}")
        return url

    def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        timeout_s: float | None = None,
        with_token: bool = True,
        is_careful: bool = False,
    ) -> Any:
        """The answer's JSON; None where it has no body."""
        url = self._absolute(path)
        if params:
            url = url.copy_merge_params(params)
        for _ in range(_REDIRECTS_MAX + 1):
            answer = self._again(
                method, url, body=body, timeout_s=timeout_s, with_token=with_token, is_careful=is_careful
            )
            if not answer.location:
                break
            target = url.join(answer.location)
            if method != "GET" or _origin(target) != _origin(self._base):
                raise LabelStudioError(
                    f"{self.url}{path} redirects to {_shown(str(target))}; set LABEL_STUDIO_URL to where it answers"
                )
            url = target
        else:
            raise LabelStudioError(f"{self.url}{path} redirects again and again; is LABEL_STUDIO_URL right?")
        if not answer.content:
            return None
        try:
            return json.loads(answer.content)
        except ValueError as error:
            raise LabelStudioError(
                f"{self.url}{path} answered {answer.status} with something that is not JSON; is LABEL_STUDIO_URL right?"
            ) from error

    def _again(
        self,
        method: str,
        url: httpx.URL,
        *,
        body: Any = None,
        timeout_s: float | None = None,
        max_bytes: int = _ANSWER_MAX_BYTES,
        with_token: bool = True,
        is_careful: bool = False,
    ) -> _Answer:
        """The answer to a call, made as often as need be and as it may be. Its status is below 400."""
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(_Busy),
            before_sleep=lambda state: log.info("%s; trying again (%d)", _busy(state), state.attempt_number),
            reraise=True,
        )
        try:
            return retrying(self._authorized, method, url, content, timeout_s, max_bytes, with_token, is_careful)
        except _Busy as busy:
            raise busy.error from busy.__cause__

    def _wait(self, state: tenacity.RetryCallState) -> float:
        return max(_busy(state).retry_after_s, self._pause(state))

    def _authorized(
        self,
        method: str,
        url: httpx.URL,
        content: bytes | None,
        timeout_s: float | None,
        max_bytes: int,
        with_token: bool,
        is_careful: bool,
    ) -> _Answer:
        authorization = self._authorization() if with_token else ""
        answer = self._once(method, url, content, timeout_s, max_bytes, authorization)
        if answer.status == 401 and authorization.startswith("Bearer "):
            authorization = self._authorization(refused=authorization)
            answer = self._once(method, url, content, timeout_s, max_bytes, authorization)
        if answer.status < 400:
            return answer
        error = self._error(method, url, answer)
        if is_careful and answer.status >= 500 and answer.status not in _SKIPPED_STATUSES:
            raise Doubtful(f"{error}; it may have been carried out, so it was not sent again")
        is_locked = answer.status == 500 and b"is locked" in answer.content and b"database" in answer.content
        if (
            answer.status in _SKIPPED_STATUSES
            or is_locked
            or (answer.status in _GATEWAY_STATUSES and method in _IDEMPOTENT_METHODS)
        ):
            raise _Busy(error, retry_after_s=_retry_after_s(answer.headers))
        raise error

    def _authorization(self, *, refused: str = "") -> str:
        """The Authorization header; ``refused`` is one that Label Studio has just answered with 401."""
        if not self._key:
            raise LabelStudioDenied(
                "LABEL_STUDIO_API_KEY is not set; take a token from Account & Settings in Label Studio"
            )
        if not self._is_personal:
            return f"Token {self._key}"
        with self._access_lock:
            if time.monotonic() >= self._access_until_s or refused == f"Bearer {self._access}":
                self._renew_access()
            return f"Bearer {self._access}"

    def _renew_access(self) -> None:
        url = self._absolute("/api/token/refresh/")
        body = json.dumps({"refresh": self._key}).encode()
        asked_s = time.monotonic()
        answer = self._once("POST", url, body, None, 2**20, "")
        if answer.status in _SKIPPED_STATUSES | _GATEWAY_STATUSES or (
            answer.status == 500 and b"is locked" in answer.content
        ):
            raise _Busy(self._error("POST", url, answer), retry_after_s=_retry_after_s(answer.headers))
        try:
            access = json.loads(answer.content)["access"] if answer.status == 200 else ""
        except (ValueError, KeyError, TypeError):
            access = ""
        if not isinstance(access, str) or not access:
            if answer.status == 200 or answer.status not in (400, 401, 403):
                raise LabelStudioError(
                    f"{_shown(str(url))} answered {answer.status} without an access token; is LABEL_STUDIO_URL right?"
                )
            raise self._error("POST", url, _Answer(401, answer.headers, answer.content))
        self._access = _checked_key(access)
        self._access_until_s = asked_s + max(_lifetime_s(access) - _RENEW_BEFORE_S, 5.0)

    def _once(
        self,
        method: str,
        url: httpx.URL,
        content: bytes | None,
        timeout_s: float | None,
        max_bytes: int,
        authorization: str,
    ) -> _Answer:
        headers = {"Content-Type": "application/json"} if content is not None else {}
        if authorization:
            headers["Authorization"] = authorization
        timeout = self._http.timeout if timeout_s is None else httpx.Timeout(timeout_s, connect=10.0)
        # Each read may take as long as the timeout; all of them together may not take for ever.
        deadline_s = time.monotonic() + 4 * max(timeout.read or 0.0, 15.0)
        try:
            with self._http.stream(method, url, content=content, headers=headers, timeout=timeout) as response:
                parts, size = [], 0
                for part in response.iter_bytes():
                    size += len(part)
                    if size > max_bytes:
                        raise FileTooLarge(f"{_shown(str(url))} is larger than {max_bytes / 2**20:g} MB")
                    if time.monotonic() > deadline_s:
                        raise httpx.ReadTimeout("the answer came too slowly")
                    parts.append(part)
                return _Answer(response.status_code, response.headers, b"".join(parts))
        except httpx.HTTPError as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if isinstance(error, _NEVER_SENT):
                unreachable = Unreachable(
                    f"Label Studio at {self.url} cannot be reached ({self._safe(reason)});"
                    " is it running, and is LABEL_STUDIO_URL right?"
                )
                raise _Busy(unreachable) from error
            lost = f"{method} {_shown(str(url))} got no whole answer ({self._safe(reason)})"
            if method in _IDEMPOTENT_METHODS or url.path.endswith("/api/token/refresh/"):
                raise _Busy(Unreachable(lost)) from error
            raise Doubtful(f"{lost}; it may have been carried out, so it was not sent again") from error

    def _error(self, method: str, url: httpx.URL, answer: _Answer) -> LabelStudioError:
        reason = self._safe(_reason(answer))
        said = f"{answer.status}: {reason}" if reason else str(answer.status)
        where = f"{method} {_shown(str(url))}"
        if answer.status == 401:
            return LabelStudioDenied(
                f"LABEL_STUDIO_API_KEY was refused by {self.url} ({said}); take a new token from Account & Settings in"
                " Label Studio. Legacy tokens may be off for the organization: a personal access token works then"
            )
        if "reserved network address" in reason:
            return LabelStudioError(
                f"{where} was refused ({said}); start Label Studio with ML_BLOCK_LOCAL_IP=false and"
                " SSRF_PROTECTION_ENABLED=false to let it reach backends on private addresses"
            )
        if answer.status == 403:
            return LabelStudioDenied(f"the token's owner may not {where} ({said})")
        if answer.status == 404:
            return NotFound(f"{where}: not there, or not for this token ({said})")
        if answer.status == 413:
            return LabelStudioError(f"{where}: too much in one call ({said}); send smaller batches")
        if answer.status >= 500 or answer.status in _SKIPPED_STATUSES:
            return Unreachable(f"{where} failed ({said})")
        return LabelStudioError(f"{where} failed ({said})")

    def _safe(self, text: str) -> str:
        for secret in (self._key, self._access):
            if secret:
                text = text.replace(secret, _REDACTED)
        text = _JWT.sub(_REDACTED, text)
        return _CREDENTIALS_IN_URL.sub(f"{_REDACTED}@", text)

    def _object(self, answer: Any, path: str) -> Json:
        if not isinstance(answer, dict):
            raise LabelStudioError(f"{self.url}{path} answered with {type(answer).__name__}, not an object")
        return answer

    def _list(self, answer: Any, path: str) -> list[Json]:
        if not isinstance(answer, list) or not all(isinstance(item, dict) for item in answer):
            raise LabelStudioError(f"{self.url}{path} answered with {type(answer).__name__}, not a list of objects")
        return answer


def _checked_base(url: str) -> httpx.URL:
    try:
        base = httpx.URL(url.strip().rstrip("/"))
    except httpx.InvalidURL as error:
        raise LabelStudioError(f"LABEL_STUDIO_URL is not an address: {_shown(url)}") from error
    if base.scheme not in ("http", "https") or not base.host:
        raise LabelStudioError(f"LABEL_STUDIO_URL must be http:// or https:// and a host, got {_shown(url)}")
    if base.userinfo:
        raise LabelStudioError(
            f"LABEL_STUDIO_URL must not hold a user and a password ({_shown(url)}): the token takes their place"
        )
    return base.copy_with(query=None, fragment=None)


def _checked_key(key: str) -> str:
    key = key.strip()
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise LabelStudioDenied("LABEL_STUDIO_API_KEY holds characters that no token has; copy it again")
    return key


def _looks_like_jwt(key: str) -> bool:
    return key.count(".") == 2 and bool(_jwt_claims(key))


def _jwt_claims(token: str) -> Json:
    """What a JWT says of itself; empty where it cannot be read. Its signature is the server's matter."""
    payload = token.split(".")[1] if token.count(".") == 2 else ""
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, binascii.Error):
        return {}
    return claims if isinstance(claims, dict) else {}


def _lifetime_s(access: str) -> float:
    """How long an access token lives, in seconds; by the difference of its own times, as our clock may be off."""
    claims = _jwt_claims(access)
    try:
        return min(max(float(claims["exp"]) - float(claims["iat"]), 0.0), 3600.0)
    except (KeyError, TypeError, ValueError):
        return 300.0


def _retry_after_s(headers: httpx.Headers) -> float:
    """Seconds, or a date as HTTP also has it (RFC 9110, 10.2.3)."""
    told = headers.get("retry-after", "0")
    try:
        wait_s = float(told)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(told).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(wait_s, 0.0), _RETRY_AFTER_MAX_S) if math.isfinite(wait_s) else 0.0


def _busy(state: tenacity.RetryCallState) -> _Busy:
    busy = state.outcome.exception() if state.outcome else None
    assert isinstance(busy, _Busy)
    return busy


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host.lower(), url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


def _shown(url: str) -> str:
    """An address as it may be shown: no user, no password, no query."""
    return _CREDENTIALS_IN_URL.sub("", url.partition("?")[0].partition("#")[0])[:200]


def _reason(answer: _Answer) -> str:
    """What an error answer says, in one line of at most 500 characters."""
    text = answer.content[:20_000].decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except ValueError:
        # An HTML page: its title says all that a person can use.
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        body = title.group(1) if title else ("" if "<" in text else text)
    if isinstance(body, dict):
        told = [body.get("detail"), body.get("validation_errors"), body.get("error"), body.get("errors")]
        body = [part for part in told if part] or [
            value for key, value in body.items() if key not in ("id", "status_code", "version", "exc_info")
        ]
    plain = unescape(re.sub(r"<[^>]+>", "", "; ".join(_leaves(body))))
    return " ".join(plain.split())[:500]


def _no_dot(url: str) -> str:
    return (
        f"Label Studio takes no webhook to {_shown(url)}: the host needs a dot in its name, or an IP address"
        " (in Docker, a network alias such as geoprelabel.local)"
    )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            for text in _leaves(item):
                yield text if key == "non_field_errors" else f"{key}: {text}"
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None and value != "":
        yield str(value)


def _filter(column: str, above: int) -> Json:
    return {"filter": f"filter:tasks:{column}", "operator": "greater", "type": "Number", "value": above}


def _auth_fields(basic_auth: tuple[str, str] | None) -> Json:
    if basic_auth is None:
        return {}
    return {"auth_method": "BASIC_AUTH", "basic_auth_user": basic_auth[0], "basic_auth_pass": basic_auth[1]}


def _webhook_fields(url: str, headers: Mapping[str, str], actions: Sequence[str]) -> Json:
    return {
        "url": url,
        "send_payload": True,
        "send_for_all_actions": False,
        "headers": dict(headers),
        "is_active": True,
        "actions": list(actions),
    }


def _keep_urls_out_of_logs() -> None:
    """Quiet httpx: it logs whole addresses at INFO, and signed links hold their secret in the query."""
    for name in ("httpx", "httpcore"):
        logger = logging.getLogger(name)
        if logger.level < logging.WARNING:
            logger.setLevel(logging.WARNING)
