"""Doctor: each thing that can be set up wrong, checked as it really is, with the command or setting that mends it.

To be run where the backend runs, with the same environment. Nothing is changed by looking: no project, task, backend or
webhook is made, and the one event that is sent to the backend is of a kind that it ignores.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from . import datamanager, earth, labelstudio
from .client import SECRET_HEADER, WEBHOOK_ACTIONS, LabelStudio
from .errors import BackendError, LabelStudioError
from .images import ImageStore
from .journal import Journal
from .labelstudio import LabelConfig
from .predictor import live_model, load_segmenter
from .registry import Registry
from .segmenter import Segmenter
from .service import parsed_config, project_key_of
from .settings import Settings

Json = dict[str, Any]
State = Literal["ok", "warn", "fail"]

TESTED = (1, 23)
"""Label Studio's release that everything is tested with."""

LEAST_FREE_MB = 200
FEW_FREE_MB = 2_000
"""Free disk in MB below which nothing works for long, and below which it is said."""

MOST_SKEW_S = 60.0
"""Difference of two clocks that a personal access token survives."""

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    message: str
    """One sentence."""

    remedy: str = ""
    """The command or setting that mends it; empty where nothing is wrong or the sentence says it."""

    def line(self) -> str:
        """For a terminal, without colour."""
        return f"{self.state:<4}  {self.name}: {self.message}" + (f" -> {self.remedy}" if self.remedy else "")


def examine(settings: Settings, *, project: int | None = None, backend_url: str = "") -> Iterator[Check]:
    """All checks, one after the other as they are done; with ``project`` those of a Label Studio project as well.

    ``backend_url`` is where Label Studio reaches the backend, where it is not connected yet. Raises nothing that a
    check can say.
    """
    yield from _guarded("data folder", lambda: _folder(settings.data_dir))
    yield from _guarded("disk", lambda: _disk(settings.data_dir))
    yield from _guarded("port", lambda: _port(settings))
    segmenter: list[Segmenter] = []
    yield from _guarded("model", lambda: _model(settings, segmenter))
    yield from _guarded("model versions", lambda: _versions(settings))
    yield from _guarded("journal", lambda: _journal(settings))
    yield from _guarded("other machines", lambda: _others(settings))
    label_studio: list[LabelStudio] = []
    with contextlib.ExitStack() as stack:
        yield from _guarded("Label Studio", lambda: _label_studio(settings, label_studio))
        for api in label_studio:
            stack.enter_context(api)
            if backend_url:
                yield from _guarded("backend address", lambda api=api: _address(api, backend_url))  # type: ignore[misc]
            if project is not None:
                yield from _project(settings, api, project, segmenter[0] if segmenter else None)
        if project is not None and not label_studio:
            yield Check("project", "fail", f"project {project} cannot be looked at without Label Studio")


def before_push(settings: Settings, backend_url: str | None) -> list[Check]:
    """What `push` needs: Label Studio, its token, and an address of the backend that Label Studio will call."""
    label_studio: list[LabelStudio] = []
    checks = list(_guarded("Label Studio", lambda: _label_studio(settings, label_studio)))
    for api in label_studio:
        with api:
            if backend_url:
                checks += _guarded("backend address", lambda api=api: _address(api, backend_url))  # type: ignore[misc]
    return checks


def _guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks of one kind; what stops them is the last one."""
    try:
        yield from look()
    except BackendError as error:
        yield Check(name, "fail", str(error))
    except Exception as error:
        # A library's own, such as of an MLflow server that does not answer. The next check may still be done.
        said = " ".join(str(error).split())[:300]
        yield Check(name, "fail", f"{type(error).__name__}: {said}")


# --- This machine ---


def _folder(folder: Path) -> Iterator[Check]:
    there = next((each for each in (folder, *folder.absolute().parents) if each.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there) as scratch:
            scratch.write(b"x")
    except OSError as error:
        yield Check(
            "data folder", "fail", f"{there} cannot be written to: {error.strerror}",
            f"chown it to the backend's user, or set GEOPRELABEL_DATA_DIR to a folder that uid {_uid()} may write to",
        )  # fmt: skip
        return
    yield Check("data folder", "ok", f"{folder} {'is writable' if there == folder else 'can be made'}")


def _uid() -> int:
    return os.getuid() if hasattr(os, "getuid") else -1


def _disk(folder: Path) -> Iterator[Check]:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free_mb = shutil.disk_usage(there).free / 2**20
    state: State = "fail" if free_mb < LEAST_FREE_MB else "warn" if free_mb < FEW_FREE_MB else "ok"
    remedy = "" if state == "ok" else "make room, or move GEOPRELABEL_DATA_DIR and MODEL_DIR to a larger disk"
    yield Check("disk", state, f"{free_mb / 1024:.1f} GB are free for {folder}", remedy)


def _port(settings: Settings) -> Iterator[Check]:
    address = f"http://127.0.0.1:{settings.port}"
    try:
        told = httpx.get(f"{address}/health", timeout=_TIMEOUT_S, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        told = None
    if isinstance(told, dict) and told.get("model_class") == "GeoPrelabeler":
        ready = "ready" if told.get("ready") else "still loading its model"
        yield Check("port", "ok", f"GeoPrelabel {told.get('version')} answers at port {settings.port} and is {ready}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", settings.port))
        except OSError as error:
            yield Check(
                "port", "fail", f"port {settings.port} is taken by another program ({error.strerror})",
                "set PORT to a free one, and give it to push: --backend-url http://HOST:PORT",
            )  # fmt: skip
            return
    yield Check("port", "ok", f"port {settings.port} is free; no backend runs on this machine", "geoprelabel serve")


def _model(settings: Settings, out: list[Segmenter]) -> Iterator[Check]:
    began = time.perf_counter()
    try:
        out.append(load_segmenter(settings))
    except BackendError as error:
        yield Check("model", "fail", str(error), "install the package again, or set GEOPRELABEL_SEGMENTER=compact")
        return
    took = time.perf_counter() - began
    known = ", ".join(out[0].labels) or "no class by itself"
    yield Check("model", "ok", f"{out[0].version} is whole, loads in {took:.1f} s, and knows {known}")


def _versions(settings: Settings) -> Iterator[Check]:
    registry = Registry(settings)
    versions = registry.versions()
    bad = 0
    for version in versions:
        try:
            version.check()
        except BackendError as error:
            bad += 1
            number = version.project.split(".")[0]
            yield Check(
                f"model version {version.name}", "fail" if version.is_champion else "warn", str(error),
                f"put the file back from a backup, or: geoprelabel models rollback --project {number}"
                if version.is_champion else "",
            )  # fmt: skip
    if not bad:
        yield Check("model versions", "ok", f"{len(versions)} trained, all whole" if versions else "none trained yet")


def _journal(settings: Settings) -> Iterator[Check]:
    kept = len(Journal(settings).projects())
    yield Check("journal", "ok", f"keeps the annotations of {kept} projects" if kept else "no annotations kept yet")


def _others(settings: Settings) -> Iterator[Check]:
    """What is set and has to be there."""
    root = settings.local_files_document_root
    if root is not None and not root.is_dir():
        yield Check(
            "local files", "fail", f"LOCAL_FILES_DOCUMENT_ROOT {root} is no folder here",
            "mount it where Label Studio has it, or unset it: local files are asked of Label Studio then",
        )  # fmt: skip
    if settings.dask_scheduler:
        at = urlsplit(settings.dask_scheduler)
        try:
            socket.create_connection((at.hostname or "", at.port or 8786), _TIMEOUT_S).close()
        except OSError as error:
            yield Check(
                "Dask", "fail", f"no scheduler answers at {_shown(settings.dask_scheduler)} ({error})",
                "dask scheduler, or unset GEOPRELABEL_DASK_SCHEDULER: training runs on this machine then",
            )  # fmt: skip


# --- Label Studio ---


def _label_studio(settings: Settings, out: list[LabelStudio]) -> Iterator[Check]:
    """Whether it is there and takes the token; ``out`` receives it then."""
    if not settings.label_studio_url:
        yield Check(
            "Label Studio", "warn", "LABEL_STUDIO_URL is not set: no training, and images by full address only",
            "LABEL_STUDIO_URL=http://localhost:8080",
        )  # fmt: skip
        return
    key = settings.label_studio_api_key.get_secret_value()
    api = LabelStudio(settings.label_studio_url, key, timeout_s=_TIMEOUT_S, attempts=2, first_pause_s=0.1)
    with contextlib.ExitStack() as stack:
        stack.callback(api.close)
        release = api.version()
        number = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
        if not number:
            yield Check(
                "Label Studio", "fail", f"{api.url} answers, but is no Label Studio",
                "set LABEL_STUDIO_URL to the address in the browser's address bar, up to the first slash",
            )  # fmt: skip
            return
        is_older = number < TESTED
        yield Check(
            "Label Studio", "warn" if is_older else "ok", f"{release} answers at {api.url}",
            f"tested with {'.'.join(map(str, TESTED))}; upgrade it: pip install -U label-studio" if is_older else "",
        )  # fmt: skip
        yield from _clock(api.url)
        if not key:
            yield Check(
                "token", "fail", "LABEL_STUDIO_API_KEY is not set",
                "in Label Studio: Account & Settings, Personal Access Token; LABEL_STUDIO_API_KEY=…",
            )  # fmt: skip
            return
        kind = "personal access token" if key.count(".") == 2 else "legacy token"
        try:
            who = api.whoami()
        except LabelStudioError as error:
            yield Check("token", "fail", f"{kind}: {error}")
            return
        yield Check("token", "ok", f"the {kind} is that of {who.get('email') or who.get('username') or 'a user'}")
        out.append(api)
        stack.pop_all()


def _clock(url: str) -> Iterator[Check]:
    asked = time.time()
    with contextlib.suppress(httpx.HTTPError, KeyError, ValueError, TypeError):
        date = httpx.head(url, timeout=_TIMEOUT_S, trust_env=False).headers["Date"]
        skew_s = parsedate_to_datetime(date).timestamp() - (asked + time.time()) / 2
        if abs(skew_s) > MOST_SKEW_S:
            way = "behind" if skew_s > 0 else "ahead of"
            yield Check(
                "clock", "warn", f"this machine's clock is {abs(skew_s):.0f} s {way} Label Studio's",
                "synchronise both (timedatectl set-ntp true): tokens and saved annotations are told apart by time",
            )  # fmt: skip
        else:
            yield Check("clock", "ok", "agrees with Label Studio's")


def _address(api: LabelStudio, backend_url: str) -> Iterator[Check]:
    refused = api.refusals(backend_url)
    for sentence in refused:
        yield Check("backend address", "fail", sentence)
    if not refused:
        yield Check("backend address", "ok", f"Label Studio is willing to call {_shown(backend_url)}")


# --- A project ---


def _project(settings: Settings, api: LabelStudio, number: int, segmenter: Segmenter | None) -> Iterator[Check]:
    try:
        project = api.project(number)
        key = project_key_of(project)
    except BackendError as error:
        yield Check("project", "fail", str(error), "geoprelabel push makes one; its number is in the page's address")
        return
    yield Check("project", "ok", f"{number} is {project.get('title')!r}")
    backends: list[Json] = []
    yield from _guarded("backend", lambda: _backends(settings, api, project, backends))
    for backend in backends[:1]:
        yield from _guarded("webhook", lambda backend=backend: _webhook(settings, api, project, backend))  # type: ignore[misc]
        yield from _guarded("order of tasks", lambda backend=backend: _scores(project, backend))  # type: ignore[misc]
    configs: list[LabelConfig] = []
    yield from _guarded("label config", lambda: _config(settings, project, key, segmenter, configs))
    for config in configs:
        yield from _guarded("images", lambda config=config: _image(settings, api, project, config))  # type: ignore[misc]


def _backends(settings: Settings, api: LabelStudio, project: Mapping[str, Any], out: list[Json]) -> Iterator[Check]:
    title = project.get("title")
    listed = api.ml_backends(int(project["id"]))
    if not listed:
        yield Check(
            "backend", "fail", f"project {title!r} has no backend",
            f"geoprelabel push tasks.json --project {str(title)!r} --backend-url http://HOST:{settings.port}",
        )  # fmt: skip
        return
    out += listed
    if len(listed) > 1:
        yield Check(
            "backend", "warn", f"project {title!r} has {len(listed)} backends; Label Studio asks the first alone",
            "delete the others under Settings, Model",
        )  # fmt: skip
    backend = listed[0]
    url = _shown(str(backend.get("url")))
    if backend.get("state") != "CO":
        reason = str(backend.get("error_message") or "").strip().splitlines()
        yield Check(
            "backend", "fail", f"Label Studio does not reach {url}: {reason[-1][:300] if reason else 'no answer'}",
            "is `geoprelabel serve` running, and is that its address as Label Studio's machine sees it? With"
            " BASIC_AUTH_USER set, push again, so that Label Studio knows the password",
        )  # fmt: skip
        yield from _address(api, str(backend.get("url")))
        return
    yield Check("backend", "ok", f"{url} is connected and serves {backend.get('model_version')}")
    if not backend.get("is_interactive"):
        yield Check(
            "clicks", "warn", "interactive pre-annotations are off: smart tools ask nobody",
            "Settings, Model, Edit: Interactive preannotations; or push again",
        )  # fmt: skip
    if not project.get("show_collab_predictions"):
        yield Check(
            "pre-labels", "warn", "annotators are not shown pre-labels",
            "Settings, Annotation: Use predictions to prelabel tasks",
        )  # fmt: skip


def _webhook(settings: Settings, api: LabelStudio, project: Mapping[str, Any], backend: Json) -> Iterator[Check]:
    url = f"{str(backend.get('url')).rstrip('/')}/webhook"
    again = "run geoprelabel push again with the environment of the backend"
    hooks = [hook for hook in api.webhooks(int(project["id"])) if hook.get("url") == url]
    if not hooks:
        yield Check(
            "webhook", "fail", "no webhook goes to the backend: it hears of no annotation, and never learns", again
        )
        return
    if len(hooks) > 1:
        yield Check("webhook", "warn", f"{len(hooks)} webhooks go to the backend: each save is told so often",
                    "delete all but one under Settings, Webhooks")  # fmt: skip
    hook = hooks[0]
    missing = set(WEBHOOK_ACTIONS) - set(hook.get("actions") or ())
    if not hook.get("is_active") or (missing and not hook.get("send_for_all_actions")):
        what = "is switched off" if not hook.get("is_active") else f"does not send {', '.join(sorted(missing))}"
        yield Check("webhook", "fail", f"the webhook to the backend {what}", again)
        return
    if not hook.get("send_payload"):
        yield Check("webhook", "fail", "the webhook sends no payload", again)
        return
    headers = hook.get("headers") if isinstance(hook.get("headers"), Mapping) else {}
    sent = next((value for name, value in (headers or {}).items() if name.lower() == SECRET_HEADER.lower()), "")
    wanted = settings.webhook_secret.get_secret_value()
    if sent != wanted:
        yield Check(
            "webhook", "fail",
            "the webhook's secret is not the one in GEOPRELABEL_WEBHOOK_SECRET" if wanted else
            "the webhook carries a secret, and GEOPRELABEL_WEBHOOK_SECRET is not set here", again,
        )  # fmt: skip
        return
    yield _delivered(url, headers or {}, project)
    if not wanted and not settings.has_basic_auth:
        yield Check(
            "webhook secret", "warn", "whoever reaches the backend can send it events and start trainings",
            "set GEOPRELABEL_WEBHOOK_SECRET for the backend, then push again",
        )  # fmt: skip


def _delivered(url: str, headers: Mapping[str, Any], project: Mapping[str, Any]) -> Check:
    """Whether the backend takes an event as Label Studio sends it; asked from here."""
    event = {"action": "PROJECT_UPDATED", "project": {"id": project["id"], "created_at": project.get("created_at")}}
    try:
        answer = httpx.post(
            url, json=event, headers={str(k): str(v) for k, v in headers.items()}, timeout=_TIMEOUT_S, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Check(
            "webhook", "warn", f"not tried: {_shown(url)} cannot be reached from here ({type(error).__name__})",
            "nothing to do where only Label Studio's network knows that name",
        )  # fmt: skip
    if answer.status_code == 401:
        return Check(
            "webhook", "fail", "the backend refuses the webhook's secret",
            "start the backend with the GEOPRELABEL_WEBHOOK_SECRET with which push was run",
        )  # fmt: skip
    if not answer.is_success:
        return Check("webhook", "fail", f"{_shown(url)} answered {answer.status_code} {answer.reason_phrase[:200]}")
    return Check("webhook", "ok", "registered, active, and taken by the backend")


def _scores(project: Mapping[str, Any], backend: Json) -> Iterator[Check]:
    """Whether the Data Manager can sort by our scores, see `datamanager`."""
    live, chosen = backend.get("model_version"), project.get("model_version")
    if chosen == live:
        yield Check("order of tasks", "ok", f"the Data Manager sorts by the scores of {live}")
        return
    remedy = "geoprelabel push again" if datamanager.is_ours(backend) else f"Settings, Model, Edit: name it {live}"
    if chosen and chosen != backend.get("title"):
        remedy = f"Settings, Annotation, Use predictions: choose {backend.get('title')} instead of {chosen}"
    yield Check(
        "order of tasks", "warn", f"the Data Manager sorts by the scores of {chosen or 'no version'}, not {live}",
        remedy,
    )  # fmt: skip


def _config(
    settings: Settings, project: Mapping[str, Any], key: str, segmenter: Segmenter | None, out: list[LabelConfig]
) -> Iterator[Check]:
    try:
        config = parsed_config(str(project.get("label_config") or ""))
    except BackendError as error:
        yield Check("label config", "fail", str(error), "Settings, Labeling Interface; configs/ has some to start from")
        return
    out.append(config)
    if not config.prompts:
        yield Check(
            "clicks", "warn", "the label config has no smart tool: annotators cannot ask by click or box",
            '<KeyPoint name="click" toName="image" smart="true"/>, <Rectangle name="box" toName="image" smart="true"/>',
        )  # fmt: skip
    if not config.wanted_tags:
        yield Check("pre-labels", "warn", "model_skip is set on every tag: no pre-labels at all", "remove model_skip")
    known = _classes(settings, key, segmenter)
    if known is None:
        return
    unmatched = [label for tag in config.wanted_tags for label in tag.unmatched(known)]
    strangers = [
        f"{value!r} of {label.value}"
        for tag in config.wanted_tags for label in tag.labels for value in label.predicted_values
        if value.casefold() not in {name.casefold() for name in known}
    ]  # fmt: skip
    if strangers:
        yield Check(
            "labels", "warn", f"predicted_values names classes that the model does not have: {', '.join(strangers)}",
            f"it has {', '.join(known)}",
        )  # fmt: skip
    if unmatched:
        yield Check(
            "labels", "warn", f"no class of the model means {', '.join(unmatched)}: no pre-labels of it, clicks work",
            f'add predicted_values="…" with one of {", ".join(known)} to the label, or annotate some tiles:'
            " training teaches it",
        )  # fmt: skip
    elif config.wanted_tags:
        yield Check("labels", "ok", "each label means a class that the model knows")
    for tag in config.wanted_tags:
        least = settings.model_score_threshold if tag.model_score_threshold is None else tag.model_score_threshold
        where = "MODEL_SCORE_THRESHOLD" if tag.model_score_threshold is None else "model_score_threshold"
        if not 0.05 <= least <= 0.9:
            what = "nearly all pre-labels are left out" if least > 0.9 else "pre-labels are shown that are mostly wrong"
            yield Check("score threshold", "warn", f"{where} of {tag.from_name} is {least:g}: {what}", f"{where}=0.3")


def _classes(settings: Settings, key: str, segmenter: Segmenter | None) -> tuple[str, ...] | None:
    if segmenter is None:
        return None
    versions = [version for version in Registry(settings).versions() if version.project == key]
    champion = next((version for version in versions if version.is_champion), None)
    # What is wrong with a version was said before.
    return live_model(segmenter, champion, versions, lambda version, error: None).segmenter.labels


def _image(settings: Settings, api: LabelStudio, project: Mapping[str, Any], config: LabelConfig) -> Iterator[Check]:
    task = next(api.tasks(int(project["id"]), page_size=1), None)
    if task is None:
        yield Check("images", "warn", "the project has no tasks yet", "geoprelabel ingest scene.tif, then push")
        return
    with contextlib.closing(ImageStore(settings, api)) as images:
        for tag in config.tags:
            url = labelstudio.image_of(task, tag)
            size = images.fetch(url, task_id=task.get("id")).rgb.shape[1::-1]
            yield Check("images", "ok", f"the image of task {task['id']} can be fetched, {size[0]} x {size[1]} pixels")
            yield from _seen_by_browsers(settings, url, str(project.get("label_config")))
            yield from _place(labelstudio.tile_of(task, url, (size[0], size[1])))


def _seen_by_browsers(settings: Settings, url: str, label_config: str) -> Iterator[Check]:
    host, own = urlsplit(url).hostname or "", urlsplit(settings.label_studio_url).hostname or ""
    if not url.startswith(("http://", "https://")):
        return
    if _is_loopback(host) and not _is_loopback(own):
        yield Check(
            "images", "fail", f"tasks name images at {host}, which browsers on other machines do not reach",
            "set GEOPRELABEL_PUBLIC_URL to where they reach this backend, ingest anew, and push into a new project",
        )  # fmt: skip
    if (
        "crossorigin" not in label_config.casefold()
        or urlsplit(url).netloc == urlsplit(settings.label_studio_url).netloc
    ):
        return
    with contextlib.suppress(httpx.HTTPError):
        asked = {"Origin": settings.label_studio_url}
        with httpx.stream("GET", url, headers=asked, timeout=_TIMEOUT_S, trust_env=False) as answer:
            allowed = answer.headers.get("Access-Control-Allow-Origin", "")
        if allowed not in ("*", settings.label_studio_url):
            yield Check(
                "images", "fail", f"{host} does not let Label Studio's page read its images (no CORS): none is shown",
                f"have {host} send Access-Control-Allow-Origin: *, or take crossOrigin out of the label config",
            )  # fmt: skip


def _place(tile: Any) -> Iterator[Check]:
    if not tile.has_place:
        yield Check(
            "place on Earth", "warn", "the task is a photo without a place: it cannot be exported as vectors",
            "cut georeferenced scenes with geoprelabel ingest",
        )  # fmt: skip
        return
    lineage = earth.checked_lineage(tile, earth.area_of(tile, (0.0, 0.0, float(tile.size[0]), float(tile.size[1]))))
    crs = lineage.crs if len(lineage.crs) <= 40 else "the scene's own CRS"
    accuracy = f", to {lineage.accuracy_m:.2g} m" if lineage.accuracy_m is not None else ""
    if lineage.missing_grids:
        yield Check(
            "place on Earth", "warn",
            f"PROJ lacks the grid {lineage.missing_grids[0]}: {crs} is placed less exactly{accuracy}",
            "projsync --file " + lineage.missing_grids[0] + ", or PROJ_NETWORK=ON",
        )  # fmt: skip
        return
    yield Check("place on Earth", "ok", f"PROJ knows the way from {crs} to EPSG:4326{accuracy}")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _shown(url: str) -> str:
    """An address without user and password."""
    return re.sub(r"(?<=//)[^/@\s]+@", "", url)[:200]
