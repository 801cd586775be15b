"""A real server under attack, and traps beside it that count what reaches them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from demo.label_studio import free_port
from tests.small_server import Answer, Asked, SmallServer, as_json

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "5ecre7c0ffee5ecre7c0ffee5ecre7c0ffee0042"
PASSWORD = "p4ssw0rd-of-the-test"
SECRET = "w3bhook-secret-of-the-test"
PROJECT = "3.1700000000"
CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image"><Label value="Building"/></PolygonLabels>
<KeyPoint name="click" toName="image" smart="true"/><Rectangle name="box" toName="image" smart="true"/>
<Brush name="brush" toName="image" smart="true"/></View>"""
CLICK = {
    "id": "k",
    "type": "keypoint",
    "from_name": "click",
    "to_name": "image",
    "value": {"x": 30, "y": 40, "width": 1},
}

PATIENCE_S = 60.0
"""Nothing that is bounded takes so long, however busy the machine; what is not takes minutes and more."""

NAMES = {
    "private.attack.test": [["10.0.0.7"]],
    "loop.attack.test": [["127.0.0.1"]],
    "loop6.attack.test": [["::1"]],
    "mapped.attack.test": [["::ffff:127.0.0.1"]],
    "metadata.google.internal": [["169.254.169.254"]],
    "linklocal.attack.test": [["fe80::1"]],
    "both.attack.test": [["8.8.8.8", "127.0.0.1"]],
    "rebind.attack.test": [["8.8.8.8"], ["127.0.0.1"]],
    "late.attack.test": [["8.8.8.8"], ["8.8.8.8"], ["127.0.0.1"]],
    "nothing.attack.test": [[]],
}
"""What names resolve to: the first time, the second time, and so on."""


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, (30, 30, 30)).save(file, "PNG")
    return file.getvalue()


PNG = png()
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@dataclasses.dataclass(frozen=True)
class Reply:
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Backend:
    """A running server, and what its processes were seen doing."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], port: int, bait: SmallServer) -> None:
        self.folder = folder
        self.process = process
        self.port = port
        self.bait = bait

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        # Python writes infinity as no JSON does.
        is_raw = isinstance(body, bytes) or body is None
        content = body if is_raw else json.dumps(body).replace("Infinity", "1e400").encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                connection.putheader(name, value)
            if content is not None:
                connection.putheader("Content-Length", str(len(content)))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # The server may hang up on what is too large.
                connection.endheaders(content)
            answer = connection.getresponse()
            return Reply(answer.status, answer.reason, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def raw(self, content: bytes, *, timeout_s: float = 10.0) -> bytes:
        """What comes back for those very bytes, until the server closes or is silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as wire:
            wire.sendall(content)
            wire.settimeout(1.5)
            got = b""
            try:
                while part := wire.recv(65536):
                    got += part
            except TimeoutError:
                pass
            return got

    def predict(self, image: Any, *, click: bool = True, config: str = CONFIG, **task: Any) -> Reply:
        """The answer to a click on an image; without ``click`` to a task of a batch."""
        context = {"result": [CLICK]} if click else None
        body = {
            "tasks": [{"id": 1, "data": {"image": image}, **task}],
            "project": PROJECT,
            "label_config": config,
            "params": {"context": context},
        }
        return self.ask("POST", "/predict", body)

    def offences(self) -> list[str]:
        """What the server did that it must not do, of all that was seen so far."""
        return [line for line in self.seen() if line.startswith("FORBIDDEN")]

    def seen(self) -> list[str]:
        log = self.folder / "watch.log"
        return log.read_text().splitlines() if log.exists() else []

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def memory_mb(self) -> float:
        """Resident memory of the server and its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in [self.process.pid, *children]]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def start(folder: Path, bait: SmallServer, *, ports: list[int], token: bool = True, **environment: str) -> Backend:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    files = folder / "files"
    files.mkdir()
    (files / "inside.png").write_bytes(PNG)
    secret = folder / "secrets"
    secret.mkdir()
    (secret / "secret.png").write_bytes(PNG)
    (files / "link.png").symlink_to(secret / "secret.png")
    (files / "links").symlink_to(secret)
    tiles = folder / "data" / "tiles" / "scene"
    tiles.mkdir(parents=True)
    (tiles / "a.png").write_bytes(PNG)
    (tiles / "link.png").symlink_to(secret / "secret.png")
    told = {
        "names": NAMES,
        "log": str(folder / "watch.log"),
        "ports": ports,
        "secrets": [str(secret), "/etc/passwd", "/etc/hostname", "/etc/shadow", "/proc/self/environ"],
    }
    (folder / "told.json").write_text(json.dumps(told))
    given = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("GEOPRELABEL", "LABEL_STUDIO"))},
        "PORT": str(port),
        "GEOPRELABEL_DATA_DIR": str(folder / "data"),
        "LOCAL_FILES_DOCUMENT_ROOT": str(files),
        **({"LABEL_STUDIO_API_KEY": TOKEN} if token else {}),
        "GEOPRELABEL_IMAGE_MAX_MB": "4",
        "GEOPRELABEL_IMAGE_MAX_MEGAPIXELS": "4",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.security.small_backend", str(folder / "told.json")],
            cwd=REPOSITORY,
            env=given,
            stdout=log,
            stderr=log,
        )
    backend = Backend(folder, process, port, bait)
    deadline = time.monotonic() + 90
    while True:
        try:
            if backend.ask("GET", "/health").json["ready"]:
                return backend
        except OSError:
            pass
        assert process.poll() is None, backend.log()
        assert time.monotonic() < deadline, backend.log()
        time.sleep(0.05)


def stop(backend: Backend) -> None:
    backend.process.terminate()
    try:
        backend.process.wait(20)
    except subprocess.TimeoutExpired:
        backend.process.kill()
        backend.process.wait()


@pytest.fixture(scope="session")
def bait() -> Iterator[SmallServer]:
    """A server on this machine that nobody has allowed: nothing may reach it."""
    with SmallServer(lambda asked: Answer(200, PNG, {"Content-Type": "image/png"})) as server:
        yield server


@pytest.fixture(scope="session")
def studio() -> Iterator[SmallServer]:
    """Label Studio, as far as images go."""

    def answer(asked: Asked) -> Answer:
        return Answer(200, PNG, {"Content-Type": "image/png"}) if asked.path.startswith("/data/") else as_json({}, 404)

    with SmallServer(answer) as server:
        yield server


class Friend:
    """A host that images may come from, and that serves what a test puts there."""

    def __init__(self) -> None:
        self.files: dict[str, Answer] = {}
        self.server = SmallServer(lambda asked: self.files.get(asked.path, Answer(404)))

    def put(self, name: str, answer: Answer) -> str:
        """The address of what is served there from now on."""
        self.files[f"/{name}"] = answer
        return f"{self.server.url}/{name}"


@pytest.fixture(scope="session")
def friend() -> Iterator[Friend]:
    made = Friend()
    with made.server:
        yield made


@pytest.fixture(scope="session")
def backend(
    tmp_path_factory: pytest.TempPathFactory, bait: SmallServer, studio: SmallServer, friend: Friend
) -> Iterator[Backend]:
    """A server without a password that knows a Label Studio and one host with images."""
    running = start(
        tmp_path_factory.mktemp("backend"),
        bait,
        ports=[studio.port, friend.server.port],
        LABEL_STUDIO_URL=studio.url,
        GEOPRELABEL_IMAGE_HOSTS=f"127.0.0.1:{friend.server.port}",
    )
    yield running
    stop(running)


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory, bait: SmallServer) -> Iterator[Backend]:
    """Two server processes behind a password and a webhook secret."""
    running = start(
        tmp_path_factory.mktemp("locked"),
        bait,
        ports=[],
        BASIC_AUTH_USER="geo",
        BASIC_AUTH_PASS=PASSWORD,
        GEOPRELABEL_WEBHOOK_SECRET=SECRET,
        WORKERS="2",
    )
    yield running
    stop(running)


@pytest.fixture(autouse=True)
def _nothing_forbidden_happened(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each attack: the bait was not touched, the server did nothing forbidden, and it still answers."""
    yield
    for name in {"backend", "locked"} & set(request.fixturenames):
        attacked: Backend = request.getfixturevalue(name)
        assert attacked.bait.asked == []
        assert attacked.offences() == []
        assert attacked.ask("GET", "/health").status == 200
