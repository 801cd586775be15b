"""The HTTP skin: each route parses, calls one method of the service, and formats.

Flask, because only it can put the reason into the HTTP status line, the one text of ours that Label Studio shows.
"""

from __future__ import annotations

import ctypes
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from flask import Flask, Response, request, send_from_directory
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from werkzeug.exceptions import HTTPException

from . import __version__, status_page
from .errors import (
    BackendError,
    BadConfig,
    BadImage,
    BadRequest,
    Busy,
    ImageRefused,
    LabelStudioDenied,
    LabelStudioError,
    UnknownVersion,
)
from .findings import Finding
from .segmenter import Segmenter
from .service import PredictRequest, Service, project_key
from .settings import Settings

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 2**20
"""A thousand tasks are about 9 MB; more than this is no batch of Label Studio's."""

SECRET_HEADER = "X-GeoPrelabel-Secret"

# The first class in this order that an error belongs to gives the status.
_STATUS: tuple[tuple[type[BackendError], int], ...] = (
    (BadConfig, 422),
    (BadRequest, 400),
    (ImageRefused, 403),
    (BadImage, 422),
    (LabelStudioDenied, 502),
    (LabelStudioError, 502),
    (UnknownVersion, 404),
    (BackendError, 503),
)

_TILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_XYZ_TILE = re.compile(r"\d{1,2}/\d{1,10}/\d{1,10}\.(?:jpg|png|webp)")


def create_app(settings: Settings | None = None, service: Service | None = None) -> Flask:
    """The WSGI application, with its service started."""
    settings = settings or Settings.from_environment()
    service = service or Service(settings)
    service.start()
    app = Flask("geoprelabel", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.extensions["service"] = service
    metrics = Metrics()
    service.reviews.on_found = metrics.found
    _clock(app, metrics)
    _guard(app, settings)
    _control_routes(app, service, metrics)
    _predict_route(app, service, metrics)
    _tile_route(app, settings.tiles_dir.absolute())
    _error_handlers(app, service)
    return app


def reasoned(status: int, reason: str, **body: Any) -> Response:
    """A JSON answer with its reason in the HTTP status line as well: the line is all that Label Studio shows."""
    line = re.sub(r"\s+", " ", reason).strip()[:200].encode("latin-1", "replace").decode("latin-1")
    answer = Response(json.dumps({"error": reason, **body}), mimetype="application/json")
    answer.status = f"{status} {line or HTTPStatus(status).phrase}"
    return answer


def _json(body: Any, status: int = 200) -> Response:
    # allow_nan=False: one NaN would lose Label Studio the whole answer, so let it fail here, where it is seen.
    return Response(json.dumps(body, allow_nan=False), status=status, mimetype="application/json")


def _body() -> Any:
    try:
        return json.loads(request.get_data())
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _wants_html() -> bool:
    best = request.accept_mimetypes.best_match(["application/json", "text/html"])
    return best == "text/html" and request.accept_mimetypes[best] > request.accept_mimetypes["application/json"]


def _control_routes(app: Flask, service: Service, metrics: Metrics) -> None:
    def health() -> Response:
        return _json(
            {
                "status": "UP",
                "model_class": "GeoPrelabeler",
                "version": __version__,
                "ready": service.predictor.is_ready,
            }
        )

    def status() -> Response:
        facts = service.status()
        return Response(status_page.render(facts), mimetype="text/html") if _wants_html() else _json(facts)

    @app.get("/")
    def root() -> Response:
        return status() if _wants_html() else health()

    app.add_url_rule("/health", "health", health)
    app.add_url_rule("/status", "status", status)

    @app.post("/setup")
    def setup() -> Response:
        body = _body()
        if not isinstance(body, dict):
            raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
        # Its hostname and access_token are not taken: settings say where Label Studio is, and a stranger could lie.
        return _json({"model_version": service.setup(body.get("project"), body.get("schema"))})

    @app.route("/versions", methods=["GET", "POST"])
    def versions() -> Response:
        # Label Studio asks without saying for which project; whoever posts may say.
        body = _body() if request.method == "POST" and request.get_data() else None
        project = body.get("project") if isinstance(body, dict) else None
        return _json({"versions": service.versions(project_key(project) if project else None)})

    def webhook() -> Response:
        body = _body()
        if not isinstance(body, dict):
            raise BadRequest(f"an event must be a JSON object, got {type(body).__name__}")
        return _json(service.event(body), 201)

    def train() -> Response:
        body = _body()
        if not isinstance(body, dict):
            raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
        return _json(service.event({"action": "START_TRAINING", "project": body.get("project")}), 201)

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.render(service), content_type=CONTENT_TYPE_LATEST)

    app.add_url_rule("/webhook", "webhook", webhook, methods=["POST"])
    app.add_url_rule("/train", "train", train, methods=["POST"])


def _predict_route(app: Flask, service: Service, metrics: Metrics) -> None:
    @app.post("/predict")
    def predict() -> Response:
        asked = PredictRequest.from_json(_body())
        results = None
        try:
            results, version = service.predict(asked)
        finally:
            metrics.count(asked, results)
        return _json({"results": results, "model_version": version})


def _tile_route(app: Flask, folder: Path) -> None:
    @app.get("/tiles/<scene>/<path:tile>")
    def tiles(scene: str, tile: str) -> Response:
        if not _TILE.fullmatch(scene) or not (_TILE.fullmatch(tile) or _XYZ_TILE.fullmatch(tile)):
            return reasoned(404, "no such tile")
        answer = send_from_directory(folder / scene, tile, conditional=True, max_age=3600)
        # Label Studio draws tiles on a canvas of another origin.
        answer.headers["Access-Control-Allow-Origin"] = "*"
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        return answer


def _guard(app: Flask, settings: Settings) -> None:
    """Basic auth on all routes but the health check and the tiles, and a secret for webhooks, where they are set."""
    user, password = settings.basic_auth_user, settings.basic_auth_pass.get_secret_value()
    secret = settings.webhook_secret.get_secret_value()
    locks_webhook = bool(secret) or settings.has_basic_auth

    def same(given: str | None, wanted: str) -> bool:
        return bool(wanted) and hmac.compare_digest((given or "").encode(), wanted.encode())

    @app.before_request
    def check() -> Response | None:
        if request.endpoint in ("health", "tiles"):
            return None
        # Name and password are both compared every time, so that the time taken tells nothing.
        given = request.authorization
        name_fits = same(given.username if given else None, user)
        password_fits = same(given.password if given else None, password)
        has_password = settings.has_basic_auth and name_fits and password_fits
        if has_password or (request.endpoint != "webhook" and not settings.has_basic_auth):
            return None
        if request.endpoint == "webhook" and (not locks_webhook or same(request.headers.get(SECRET_HEADER), secret)):
            return None
        if request.endpoint == "webhook" and not settings.has_basic_auth and _is_start_training():
            # Label Studio sends this one by the backend's connection, not by the webhook: with its password, if any.
            return None
        answer = reasoned(401, "user or password is missing or wrong (BASIC_AUTH_USER, BASIC_AUTH_PASS)")
        answer.headers["WWW-Authenticate"] = 'Basic realm="GeoPrelabel"'
        return answer


def _is_start_training() -> bool:
    try:
        body = _body()
    except BadRequest:
        return False
    return isinstance(body, dict) and body.get("action") == "START_TRAINING"


def _error_handlers(app: Flask, service: Service) -> None:
    @app.errorhandler(BackendError)
    def known(error: BackendError) -> Response:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        if request.endpoint != "predict":
            service.problems.add(f"{request.method} {request.path}", error)
        answer = reasoned(status, str(error))
        if isinstance(error, Busy):
            answer.headers["Retry-After"] = "1"
        return answer

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        return reasoned(error.code or 500, error.description or error.name)

    @app.errorhandler(Exception)
    def unknown(error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.path)
        service.problems.add(f"{request.method} {request.path}", f"unexpected {type(error).__name__}: {error}")
        return reasoned(500, f"unexpected {type(error).__name__}; see the backend's log and its /status page")


class Metrics:
    """Prometheus metrics of requests and tasks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.seconds = Histogram(
            "geoprelabel_request_seconds", "Time to answer a request", ["route", "status"], registry=self._registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 100),
        )  # fmt: skip
        self._tasks = Counter(
            "geoprelabel_tasks_total", "Tasks predicted", ["kind", "outcome"], registry=self._registry
        )
        self._findings = Counter(
            "geoprelabel_findings_total", "Things wrong with annotations, when first seen", ["reason"],
            registry=self._registry,
        )  # fmt: skip
        self._pre_labels = Gauge(
            "geoprelabel_prelabels", "Pre-labels of submitted annotations by what became of them",
            ["project", "version", "outcome"], registry=self._registry, multiprocess_mode="mostrecent",
        )  # fmt: skip
        self._edit_distance = Gauge(
            "geoprelabel_edit_distance", "Mean 1 - IoU of pre-labels that were kept and what was submitted of them",
            ["project", "version"], registry=self._registry, multiprocess_mode="mostrecent",
        )  # fmt: skip
        self._ready = Gauge(
            "geoprelabel_ready", "Whether the model is loaded", registry=self._registry, multiprocess_mode="mostrecent"
        )
        self._waiting = Gauge(
            "geoprelabel_waiting",
            "Predictions in line for the device",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._training = {
            name: Gauge(
                f"geoprelabel_training_{name}", text, ["project"], registry=self._registry,
                multiprocess_mode="mostrecent",
            )
            for name, text in {
                "running": "Whether the project's model is being trained",
                "failed": "Whether the project's newest training failed",
                "progress": "How far the newest training is, 0 to 1",
                "duration_seconds": "How long the newest training took, or has taken so far",
                "changes": "Annotations changed since the newest training began",
            }.items()
        }  # fmt: skip

    def count(self, asked: PredictRequest, results: list[Any] | None) -> None:
        """Note what became of a request's tasks; None for a request that failed."""
        kind = "interactive" if asked.context else "batch"
        failed = len(asked.tasks) if results is None else sum(item == [] for item in results)
        self._tasks.labels(kind, "failed").inc(failed)
        self._tasks.labels(kind, "done").inc(len(asked.tasks) - failed)

    def found(self, findings: Sequence[Finding]) -> None:
        """Note what a check found."""
        for finding in findings:
            self._findings.labels(finding.reason).inc()

    def render(self, service: Service) -> bytes:
        """All metrics as text, those of the other server processes included."""
        self._ready.set(service.predictor.is_ready)
        self._waiting.set(service.predictor.gate.waiting)
        for project, facts in service.acceptance.facts().items():
            for version in facts["versions"]:
                for outcome in ("unchanged", "edited", "deleted", "clicked", "drawn"):
                    self._pre_labels.labels(project, version["name"], outcome).set(version[outcome])
                self._edit_distance.labels(project, version["name"]).set(version["edit_distance"] or 0)
        for project, run in service.jobs.runs().items():
            values = {"running": run.state == "training", "failed": run.state == "failed", "progress": run.progress,
                      "duration_seconds": run.duration_s, "changes": service.jobs.ask(project).changes}  # fmt: skip
            for name, value in values.items():
                self._training[name].labels(project).set(value)
        shown = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            shown = CollectorRegistry()
            multiprocess.MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
        return generate_latest(shown)


def _clock(app: Flask, metrics: Metrics) -> None:
    @app.before_request
    def start() -> None:
        request.environ["geoprelabel.start"] = time.perf_counter()

    @app.after_request
    def stop(answer: Response) -> Response:
        elapsed = time.perf_counter() - request.environ.get("geoprelabel.start", time.perf_counter())
        metrics.seconds.labels(request.endpoint or "none", str(answer.status_code)).observe(elapsed)
        return answer


def serve(settings: Settings, *, segmenter: Segmenter | None = None) -> None:
    """Run the server until it is stopped: gunicorn, WORKERS processes of THREADS threads.

    On SIGTERM it takes no more requests, and ends once those that it has are answered. ``segmenter`` takes the place of
    the one that settings name.
    """
    from gunicorn.app.base import BaseApplication

    _share_arenas()

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            options = {
                "bind": [f"0.0.0.0:{settings.port}"],
                "workers": settings.workers,
                "threads": settings.threads,
                "worker_class": "gthread",
                # A batch may take Label Studio's 100 s, a cold start's model load included.
                "timeout": 120,
                "graceful_timeout": 100,
                "keepalive": 5,
                "loglevel": settings.log_level.lower(),
                "proc_name": "geoprelabel",
                "control_socket_disable": True,
            }
            for name, value in options.items():
                if name in self.cfg.settings:
                    self.cfg.set(name, value)

        def load(self) -> Flask:
            return create_app(settings, Service(settings, segmenter=segmenter))

    Server().run()


def _share_arenas() -> None:
    """Let threads share two of glibc's memory pools: with one for each, a tile's worth stays behind in every one."""
    m_arena_max = -8
    # Other C libraries have no such thing.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(m_arena_max, 2)
