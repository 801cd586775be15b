"""A real Label Studio on this machine: installed into its own virtual environment, started headless, stopped again."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "requirements-label-studio.txt"
VENV = REPOSITORY / ".venv-label-studio"

_START_TIMEOUT_S = 240.0
_COMMAND_TIMEOUT_S = 600.0
"""For pip, and for making the database: each takes about half a minute where nothing else runs."""

_STOP_TIMEOUT_S = 10.0
_LOG_TAIL_LINES = 25


class LabelStudioFailed(RuntimeError):
    """Label Studio could not be installed or started; the message ends with what it said last."""


class LabelStudioServer:
    """One Label Studio with its own data folder, on the loopback address alone.

    Start it with ``start()`` or as a context manager. ``python_env`` is the virtual environment that holds
    label-studio; ``port`` 0 takes a free one; files under ``files_root`` are served at /data/local-files/ to projects
    with a local storage there. A kept ``data_dir`` keeps its projects, its user and its token. With
    ``allows_private_addresses`` it may call a backend on this machine, which its own defaults forbid.
    """

    def __init__(
        self,
        python_env: Path,
        data_dir: Path,
        port: int = 0,
        files_root: Path | None = None,
        *,
        user: str = "admin@example.com",
        password: str = "labelstudio",
        allows_private_addresses: bool = True,
    ) -> None:
        self.python_env = Path(python_env)
        self.data_dir = Path(data_dir).absolute()
        self.port = port
        self.files_root = Path(files_root).absolute() if files_root else self.data_dir / "files"
        self.user = user
        self.password = password
        self.token = ""
        """Legacy token of the user; known once started."""

        self.allows_private_addresses = allows_private_addresses
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What it writes."""
        return self.data_dir / "label-studio.log"

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> LabelStudioServer:
        """Returns when it answers. Raises LabelStudioFailed with the end of its log when it dies or takes too long."""
        if self.is_running:
            return self
        command = self.python_env / "bin" / "label-studio"
        if not command.exists():
            raise LabelStudioFailed(f"no label-studio in {self.python_env}; install it with `make demo`")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.files_root.mkdir(parents=True, exist_ok=True)
        self.token = self._kept_token()
        # Asked for a port that is taken, Label Studio would quietly take the next one.
        self.port = free_port(self.port)
        self._lay_out_database()
        arguments = [
            *("start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(self.port)),
            *("--username", self.user, "--password", self.password, "--user-token", self.token),
            *("--enable-legacy-api-token", "--log-level", "INFO"),
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(command), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                env=self._environment(os.environ),
                # Its own group, so that stopping takes the children along and Ctrl-C in a terminal is ours to handle.
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Afterwards neither it nor any child of it lives. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        # The group is signalled even when its leader is gone: children may outlive it.
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> LabelStudioServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _kept_token(self) -> str:
        """The token of the data folder, as Label Studio sets it for a new user only."""
        path = self.data_dir / "token"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(20))
        return path.read_text().strip()

    def _lay_out_database(self) -> None:
        """Give a fresh data folder a copy of an empty database, made once for each virtual environment.

        Label Studio would make the same by some 300 migrations, which is most of the time that its first start takes.
        """
        database = self.data_dir / "label_studio.sqlite3"
        release = next(self.python_env.glob("lib/python*/site-packages/label_studio-*.dist-info"), None)
        if database.exists() or release is None:
            return
        empty = self.python_env / "share" / f"{release.stem}.sqlite3"
        if not empty.exists():
            if not os.access(self.python_env, os.W_OK):
                return
            empty.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=empty.parent) as folder:
                manage = release.parent / "label_studio" / "manage.py"
                environment = self._environment(os.environ) | {
                    "DJANGO_SETTINGS_MODULE": "label_studio.core.settings.label_studio",
                    "LABEL_STUDIO_BASE_DATA_DIR": folder,
                }
                python = self.python_env / "bin" / "python"
                _run([str(python), str(manage), "migrate", "--no-color", "-v", "0"], environment)
                (Path(folder) / database.name).replace(empty)
        shutil.copyfile(empty, database)

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        # Addresses, tokens and Django settings of the caller's own would change what starts.
        foreign = ("LABEL_STUDIO_", "DJANGO_", "POSTGRE_", "PYTHON", "VIRTUAL_ENV", "ML_", "SSRF_")
        kept = {name: value for name, value in base.items() if not name.startswith(foreign)}
        private = "false" if self.allows_private_addresses else "true"
        return {
            **kept,
            "DJANGO_DB": "sqlite",
            "LABEL_STUDIO_BASE_DATA_DIR": str(self.data_dir),
            "LABEL_STUDIO_HOST": self.url,
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(self.files_root),
            "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
            # Read when the organization is first made; off, our legacy token would be refused.
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            # Both are needed for a backend on a private address: the first for predictions, the second for webhooks.
            "ML_BLOCK_LOCAL_IP": private,
            "SSRF_PROTECTION_ENABLED": private,
            # Nothing is told to anybody.
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
            "COLLECT_ANALYTICS": "false",
            "LATEST_VERSION_CHECK": "false",
        }

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        # No proxy: this is the loopback address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise LabelStudioFailed(f"Label Studio ended with {self._process.returncode}:\n{self._log_tail()}")
            with contextlib.suppress(OSError), opener.open(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise LabelStudioFailed(f"Label Studio did not answer within {_START_TIMEOUT_S:g} s:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-_LOG_TAIL_LINES:]).replace(self.token, "…")


def install(venv: Path = VENV, requirements: Path = REQUIREMENTS) -> Path:
    """The virtual environment with Label Studio in it; made and filled where it is not there or not as locked.

    Raises LabelStudioFailed with the end of what pip said.
    """
    mark = venv / "installed-from.txt"
    wanted = requirements.read_text()
    if (venv / "bin" / "label-studio").exists() and mark.exists() and mark.read_text() == wanted:
        return venv
    python = venv / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(venv)])
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", str(requirements)])
    # Written last: an installation that was broken off is taken up again.
    mark.write_text(wanted)
    return venv


def label_studio_venv() -> Path | None:
    """The virtual environment with Label Studio: GEOPRELABEL_LS_VENV, else the repository's own; None where none is."""
    named = os.environ.get("GEOPRELABEL_LS_VENV", "")
    venv = Path(named) if named else VENV
    return venv if (venv / "bin" / "label-studio").exists() else None


def free_port(wanted: int = 0) -> int:
    """The port wanted, or any for 0. Raises LabelStudioFailed where it is taken."""
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still winding down counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise LabelStudioFailed(f"port {wanted} cannot be had ({error.strerror})") from error
        port: int = probe.getsockname()[1]
    return port


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=environment,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise LabelStudioFailed(f"{' '.join(command)} took more than {_COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-_LOG_TAIL_LINES:])
        raise LabelStudioFailed(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
