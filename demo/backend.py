"""This backend as a process of its own, started as a person would start it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from demo.label_studio import free_port

REPOSITORY = Path(__file__).resolve().parent.parent

_START_TIMEOUT_S = 90.0


class BackendFailed(RuntimeError):
    """The backend or a command of it did not do what it should; the message ends with what it said last."""


class BackendServer:
    """``geoprelabel serve`` with its own data folder; ``port`` 0 takes a free one."""

    def __init__(self, data_dir: Path, port: int = 0, **environment: str) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port or free_port()
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.healthy_after_s = 0.0
        """Time from the start to the first answer of /health, in seconds."""

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What it writes."""
        return self.data_dir / "backend.log"

    def environment(self) -> dict[str, str]:
        """What the server and every command beside it are started with."""
        return {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PORT": str(self.port),
            "GEOPRELABEL_DATA_DIR": str(self.data_dir),
            "GEOPRELABEL_PUBLIC_URL": self.url,
            **self._environment,
        }

    def start(self) -> BackendServer:
        """Returns when it answers and its model is loaded. Raises BackendFailed with the end of its log."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "backend", "serve"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(), start_new_session=True,
            )  # fmt: skip
        begun = time.monotonic()
        while time.monotonic() < begun + _START_TIMEOUT_S and self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                is_ready = self.get("/health")["ready"]
                self.healthy_after_s = self.healthy_after_s or time.monotonic() - begun
                if is_ready:
                    return self
            time.sleep(0.05)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        self.stop()
        raise BackendFailed(f"the backend did not come up:\n{tail}")

    def stop(self) -> None:
        """Afterwards it does not live. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> BackendServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def get(self, path: str) -> Any:
        """A route's JSON. Raises OSError where it does not answer."""
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers={"Accept": "application/json"}), timeout=10
        ) as a:
            return json.load(a)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """A route's JSON answer to a JSON body. Raises OSError, its text the reason in the status line."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def command(self, *arguments: str) -> Any:
        """Run ``geoprelabel ARGUMENTS --json`` beside the server; what it printed. Raises BackendFailed."""
        done = subprocess.run(
            [sys.executable, "-m", "backend", *arguments, "--json"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=self.environment(), check=False,
        )  # fmt: skip
        if done.returncode:
            raise BackendFailed(
                f"geoprelabel {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return json.loads(done.stdout)

    def wait_for_training(self, project: str, *, since: float, timeout_s: float = 600) -> dict[str, Any]:
        """The state of the first training of that project number that began after ``since`` and is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for key, run in self.get("/status")["training"].items():
                over = run["state"] in ("done", "failed") and run["finished"] > since
                if key.split(".")[0] == project and over:
                    return dict(run)
            time.sleep(0.5)
        raise BackendFailed(f"training of project {project} took over {timeout_s:.0f} s")

    def wait_for_version(self, name: str, *, timeout_s: float = 30) -> list[str]:
        """All version names, once that one is among them: servers look for new ones every second."""
        deadline = time.monotonic() + timeout_s
        while name not in (versions := self.get("/versions")["versions"]):
            if time.monotonic() > deadline:
                raise BackendFailed(f"version {name} is not among {', '.join(versions)} after {timeout_s:.0f} s")
            time.sleep(0.2)
        return list(versions)
