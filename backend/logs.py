"""Log lines, for people or for programs: each names the request that it belongs to, and none holds a secret."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

REQUEST_HEADER = "X-Request-ID"
ENVIRON_KEY = "geoprelabel.request"
"""Where the id lies in a request's WSGI environment, for what is written after the answer."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that this thread is at work for; empty where there is none."""

_WELL_FORMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LEAST_SECRET = 6
"""Characters; what is shorter would blot out words."""


def request_id_of(given: str | None) -> str:
    """The caller's own id of its request, where it is fit for a log, or a new one."""
    return given if given and _WELL_FORMED.fullmatch(given) else secrets.token_hex(8)


class Lines(logging.Formatter):
    """A line for people: time, level, logger, message, and the request's id where there is one."""

    def __init__(self, hidden: Collection[str] = ()) -> None:
        """``hidden``: what is left out wherever it turns up, as passwords and tokens."""
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        # The longest first: one may be part of another.
        self._hidden = sorted({text for text in hidden if len(text) >= _LEAST_SECRET}, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        return self.cleaned(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        identity = request_id.get()
        return super().formatMessage(record) + (f" [request {identity}]" if identity else "")

    def cleaned(self, text: str) -> str:
        """The text without what is to be hidden."""
        for secret in self._hidden:
            text = text.replace(secret, "…")
        return text


class JsonLines(Lines):
    """A JSON object a line, with ``time`` (UTC), ``level``, ``logger``, ``message``, ``pid`` and, where it has them,
    ``request_id``, ``exception`` and the ``facts`` of an access line.
    """  # noqa: D205

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": self.cleaned(record.getMessage()),
            "pid": os.getpid(),
        }
        if identity := request_id.get():
            said["request_id"] = identity
        if record.exc_info:
            said["exception"] = self.cleaned(self.formatException(record.exc_info))
        facts: Mapping[str, Any] = getattr(record, "facts", {})
        said |= {name: self.cleaned(value) if isinstance(value, str) else value for name, value in facts.items()}
        return json.dumps(said, default=str)


def configure(*, level: str, style: Literal["text", "json"] = "text", hidden: Collection[str] = ()) -> None:
    """Have everything logged to standard error from now on, unless somebody else has seen to that already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(hidden) if style == "json" else Lines(hidden))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(style == "json")
    # One line a request of every library would drown ours, and httpx prints whole URLs.
    for noisy in ("httpx", "httpcore", "rasterio", "pyogrio", "PIL", "filelock", "distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def gunicorn_logger() -> type[Any]:
    """The class that gunicorn logs through: into the same lines as all else, access included where that is on."""
    from gunicorn.glogging import Logger

    class Requests(Logger):  # type: ignore[misc]
        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            for each in (self.error_log, self.access_log):
                each.handlers.clear()
                each.propagate = True

        def access(self, resp: Any, req: Any, environ: Mapping[str, Any], request_time: Any) -> None:
            if not self.access_log_enabled:
                return
            # The path without its query, which may hold what is nobody's business.
            method, path, status = environ.get("REQUEST_METHOD"), environ.get("PATH_INFO"), str(resp.status)[:3]
            facts = {"method": method, "path": path, "status": int(status) if status.isdigit() else status,
                     "seconds": round(request_time.total_seconds(), 4), "bytes": getattr(resp, "sent", None),
                     "remote": environ.get("REMOTE_ADDR"), "request_id": environ.get(ENVIRON_KEY, "")}  # fmt: skip
            self.access_log.info("%s %s %s", method, path, status, extra={"facts": facts})

    return Requests
