"""The HTTP skin: each route parses, calls one method of the service, and formats.

Flask, because only it can put the reason into the HTTP status line, the one text of ours that Label Studio shows.
"""

from __future__ import annotations

import ctypes
import hmac
import json
import logging
import re
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request, send_from_directory
from prometheus_client import CONTENT_TYPE_LATEST
from werkzeug.exceptions import HTTPException, NotFound, RequestEntityTooLarge

from . import __version__, access, logs, openapi, status_page
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
from .metrics import Metrics, forget_process
from .segmenter import Segmenter
from .service import PredictRequest, Service, project_key
from .settings import Settings
from .stores import CONTENT_TYPES
from .tiles import SceneTiles, signature
from .wire import read_json

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 2**20
"""A thousand tasks are about 9 MB; more than this is no batch of Label Studio's."""

MAX_CONTROL_BODY_BYTES = 8 * 2**20
"""For routes that get no tasks and no annotations, and for who has shown no password."""

GRACE_S, ANSWERS_WITHIN_S = 100, 95
"""How long after SIGTERM the processes are ended, and how long they go on with what they were asked; who has no answer
by then is told to ask again. In seconds."""

MAX_AGE_S = 3600
"""Browsers ask again for a tile after this long, in seconds."""

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


def create_app(
    settings: Settings | None = None, service: Service | None = None, *, guesses: access.Guesses | None = None
) -> Flask:
    """The WSGI application, with its service started. ``guesses`` is what all server processes count in together."""
    settings = settings or Settings.from_environment()
    service = service or Service(settings)
    service.start()
    app = Flask("geoprelabel", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.extensions["service"] = service
    metrics = Metrics(service)
    _clock(app, metrics)
    access.guard(app, settings, guesses or access.Guesses(), starts_training=_is_start_training)
    access.restrain_browsers(app)
    _control_routes(app, service, metrics)
    _predict_route(app, service, metrics)
    _tile_route(app, settings)
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


def _body(max_bytes: int = MAX_CONTROL_BODY_BYTES) -> Any:
    # Kept, as the guard may read it before the route does; a second read must not find more allowed than the first.
    request.max_content_length = max_bytes
    return read_json(request.get_data())


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

    @app.get("/openapi.json")
    def described() -> Response:
        return _json(openapi.document())

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
        request.max_content_length = MAX_CONTROL_BODY_BYTES
        body = _body() if request.method == "POST" and request.get_data() else None
        project = body.get("project") if isinstance(body, dict) else None
        return _json({"versions": service.versions(project_key(project) if project else None)})

    def webhook() -> Response:
        body = _body(MAX_BODY_BYTES)
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
        return Response(metrics.render(), content_type=CONTENT_TYPE_LATEST)

    app.add_url_rule("/webhook", "webhook", webhook, methods=["POST"])
    app.add_url_rule("/train", "train", train, methods=["POST"])


def _predict_route(app: Flask, service: Service, metrics: Metrics) -> None:
    @app.post("/predict")
    def predict() -> Response:
        asked = PredictRequest.from_json(_body(MAX_BODY_BYTES))
        results = None
        try:
            results, version = service.predict(asked)
        finally:
            metrics.count(asked, results)
        return _json({"results": results, "model_version": version})


def _tile_route(app: Flask, settings: Settings) -> None:
    """Tiles from disk, else made from their scene: conditional, by ranges, for pages of any origin."""
    folder = settings.tiles_dir.absolute()
    made = SceneTiles(settings.scenes_dir.absolute(), at_once=max(2, settings.cores))
    secret = settings.tiles_secret.get_secret_value()

    # Answered here and not by Flask: a browser asks before it sends a Range or an If-None-Match from another origin.
    @app.route("/tiles/<scene>/<path:tile>", methods=["GET", "HEAD", "OPTIONS"], provide_automatic_options=False)
    def tiles(scene: str, tile: str) -> Response:
        return Response(status=204) if request.method == "OPTIONS" else found(scene, tile)

    @app.after_request
    def for_any_page(answer: Response) -> Response:
        if request.endpoint != "tiles":
            return answer
        # Label Studio draws tiles on a canvas of another origin.
        answer.headers["Access-Control-Allow-Origin"] = "*"
        answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        answer.headers["Access-Control-Expose-Headers"] = "Accept-Ranges, Content-Range, Content-Length, ETag"
        if request.method == "OPTIONS":
            answer.headers["Allow"] = answer.headers["Access-Control-Allow-Methods"] = "GET, HEAD, OPTIONS"
            answer.headers["Access-Control-Allow-Headers"] = "Range, If-Range, If-None-Match, If-Modified-Since"
            answer.headers["Access-Control-Max-Age"] = "86400"
        return answer

    def found(scene: str, tile: str) -> Response:
        if not _TILE.fullmatch(scene) or not (_TILE.fullmatch(tile) or _XYZ_TILE.fullmatch(tile)):
            return reasoned(404, "no such tile")
        given, wanted = (text.encode() for text in (request.args.get("sig", ""), signature(secret, scene, tile)))
        if secret and not hmac.compare_digest(given, wanted):
            return reasoned(403, "this tile's address is not signed, or not with GEOPRELABEL_TILES_SECRET")
        if not (folder / scene / tile).resolve().is_relative_to(folder.resolve()):
            return reasoned(404, "no such tile")
        try:
            answer = send_from_directory(folder / scene, tile, conditional=True, max_age=MAX_AGE_S)
        except NotFound:
            answer = on_demand(scene, tile)
        # A signed address is for whoever was given it, not for a proxy's other users.
        answer.headers["Cache-Control"] = f"{'private' if secret else 'public'}, max-age={MAX_AGE_S}"
        return answer

    def on_demand(scene: str, tile: str) -> Response:
        etag = made.etag(scene, tile)
        if etag is None:
            return reasoned(404, "no such tile")
        answer = Response(content_type=CONTENT_TYPES[tile.rpartition(".")[2]])
        answer.set_etag(etag)
        # What the browser has already need not be made again.
        if request.if_none_match.contains(etag):
            answer.status_code = 304
            return answer
        content = made.image(scene, tile)
        if content is None:
            return reasoned(404, "no such tile")
        answer.set_data(content)
        answer.make_conditional(request, accept_ranges=True, complete_length=len(content))
        return answer


def _is_start_training() -> bool:
    try:
        body = _body()
    except (BadRequest, RequestEntityTooLarge):
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
        answer = reasoned(error.code or 500, error.description or error.name)
        # Location, Allow, Retry-After, WWW-Authenticate: what the status means nothing without.
        answer.headers.extend((name, value) for name, value in error.get_headers() if name != "Content-Type")
        return answer

    @app.errorhandler(Exception)
    def unknown(error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.path)
        service.problems.add(f"{request.method} {request.path}", f"unexpected {type(error).__name__}: {error}")
        return reasoned(500, f"unexpected {type(error).__name__}; see the backend's log and its /status page")


def _clock(app: Flask, metrics: Metrics) -> None:
    """Each request has an id, which the answer and every line of the log about it carry, and its time is taken."""

    @app.before_request
    def start() -> None:
        identity = logs.request_id_of(request.headers.get(logs.REQUEST_HEADER))
        logs.request_id.set(identity)
        request.environ[logs.ENVIRON_KEY] = identity
        request.environ["geoprelabel.start"] = time.perf_counter()

    @app.after_request
    def stop(answer: Response) -> Response:
        elapsed = time.perf_counter() - request.environ.get("geoprelabel.start", time.perf_counter())
        metrics.seconds.labels(request.endpoint or "none", str(answer.status_code)).observe(elapsed)
        answer.headers[logs.REQUEST_HEADER] = request.environ.get(logs.ENVIRON_KEY, "")
        return answer

    @app.teardown_request
    def end(error: BaseException | None) -> None:
        logs.request_id.set("")


def serve(settings: Settings, *, segmenter: Segmenter | None = None) -> None:
    """Run the server until it is stopped: gunicorn, WORKERS processes of THREADS threads.

    On SIGTERM it takes no more requests, and ends once those that it has are answered, or told to ask again.
    ``segmenter`` takes the place of the one that settings name.
    """
    from gunicorn.app.base import BaseApplication
    from gunicorn.workers.gthread import ThreadWorker

    _share_arenas()
    guesses = access.Guesses()

    class Worker(ThreadWorker):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.alive and self.booted:
                timer = threading.Timer(ANSWERS_WITHIN_S, self.wsgi.extensions["service"].end_answers)
                timer.daemon = True
                timer.start()
            super().handle_exit(sig, frame)

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            options = {
                "bind": [f"0.0.0.0:{settings.port}"],
                "workers": settings.workers,
                "threads": settings.threads,
                "worker_class": Worker,
                # A batch may take Label Studio's 100 s, a cold start's model load included.
                "timeout": 120,
                "graceful_timeout": GRACE_S,
                "keepalive": 5,
                "loglevel": settings.log_level.lower(),
                "proc_name": "geoprelabel",
                "logger_class": logs.gunicorn_logger(),
                "accesslog": "-" if settings.log_format == "json" else None,
                "child_exit": lambda server, worker: forget_process(worker.pid),
                "control_socket_disable": True,
            }
            for name, value in options.items():
                if name in self.cfg.settings:
                    self.cfg.set(name, value)

        def load(self) -> Flask:
            return create_app(settings, Service(settings, segmenter=segmenter), guesses=guesses)

    Server().run()


def _share_arenas() -> None:
    """Let threads share one of glibc's memory pools, which keeps what a tile of 512 px takes for the next one.

    With a pool for each, a tile's worth stays behind in every one; and by itself glibc gives large blocks back to the
    system after each tile, which then takes a quarter of the next one's time to hand them out anew.
    """
    m_arena_max, m_mmap_threshold, m_trim_threshold = -8, -3, -1
    # Other C libraries have no such thing.
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_threshold, 32 * 2**20)
        libc.mallopt(m_trim_threshold, 64 * 2**20)
