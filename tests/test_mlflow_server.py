"""The registry over HTTP: the same behaviours with a real server of MLflow's, where there is one.

Only `mlflow-skinny` comes with the package, and it has no server. Set GEOPRELABEL_MLFLOW_VENV to an environment with
the full `mlflow`, or put its `mlflow` on PATH; `.ci/run` makes one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from backend.errors import BadWeights
from backend.predictor import Predictor
from backend.registry import HEADS_FILE, Registry
from backend.settings import Settings
from backend.stores import store_at
from tests.fakes import BrightSegmenter
from tests.small_s3 import s3_server

VENV = os.environ.get("GEOPRELABEL_MLFLOW_VENV", "")
MLFLOW = str(Path(VENV) / "bin" / "mlflow") if VENV else shutil.which("mlflow") or ""


def has_server() -> bool:
    """Whether that is the full package: the one that comes with ours has a command of the same name."""
    site = Path(MLFLOW).parent.parent
    return bool(MLFLOW) and any(site.glob("lib/python*/site-packages/mlflow-[0-9]*.dist-info"))


pytestmark = [
    pytest.mark.skipif(not has_server(), reason="no mlflow server: set GEOPRELABEL_MLFLOW_VENV (see the docstring)"),
    # The full package may be of another release, whose answers hold what the client here does not know.
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]


class Server:
    """A server of MLflow's with everything it keeps in one folder; it can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        with open(self.folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                [MLFLOW, "server", "--host", "127.0.0.1", "--port", self._port, "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}",
                 "--artifacts-destination", str(self.folder / "artifacts")],
                stdout=output, stderr=output, start_new_session=True, cwd=self.folder,
                env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while True:
            told = (self.folder / "server.log").read_text()[-2000:]
            assert self._process.poll() is None, told
            assert time.monotonic() < deadline, told
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 15)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(20)
        self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def url(server: Server) -> str:
    return server.url


def registry_at(url: str, folder: Path) -> tuple[Settings, Registry]:
    settings = Settings(data_dir=folder, mlflow_tracking_uri=url)
    return settings, Registry(settings)


def published(registry: Registry, project: str, name: str, folder: Path, *, promote: bool = True, parent: str = "base"):
    """As `fit` does it: within a run, since a server takes no weights from nowhere."""
    heads = folder / HEADS_FILE
    heads.write_bytes(name.encode())
    with registry.recorded(project) as run:
        run.params({"tiles_learned": 3})
        run.progress(0.5, "training")
        run.figures({"f1": {"after": 0.5}})
        registry.publish(
            project, name, heads, parent=parent, metrics={"iou": 0.5}, tags={}, promote=promote, run_id=run.run_id
        )


def test_what_one_machine_publishes_another_serves_within_five_seconds(url: str, tmp_path: Path):
    _, maker = registry_at(url, tmp_path / "maker")
    settings, there = registry_at(url, tmp_path / "server")
    predictor = Predictor(settings, there, segmenter=BrightSegmenter())
    predictor.start()
    try:
        predictor.wait(60)
        assert predictor.version("1.5") == "bright-1"
        published(maker, "1.5", "v-1", tmp_path)
        began = time.monotonic()
        # Its own name for the same weights: what counts is that they came over.
        while predictor.version("1.5") == "bright-1" and time.monotonic() < began + 30:
            time.sleep(0.05)
        assert time.monotonic() < began + 5
        live = there.champions()["1.5"]
        assert (live.name, live.number, live.parent, live.metrics) == ("v-1", 1, "base", {"iou": 0.5})
        assert live.heads_path.read_bytes() == b"v-1"
        assert str(tmp_path / "server") in str(live.heads_path)
    finally:
        predictor.stop()


def test_the_way_back_and_forth_is_the_same_as_with_a_file(url: str, tmp_path: Path):
    _, registry = registry_at(url, tmp_path)
    published(registry, "2.5", "a", tmp_path)
    published(registry, "2.5", "b", tmp_path, promote=False, parent="a")
    assert [(v.name, v.is_champion) for v in registry.versions("2.5")] == [("b", False), ("a", True)]
    registry.activate("2.5", "b")
    assert registry.champions()["2.5"].name == "b"
    assert registry.rollback("2.5") == "a"
    assert registry.rollback("2.5") == ""
    assert registry.champions().get("2.5") is None
    assert registry.key("2") == "2.5"


def test_weights_that_were_damaged_there_are_not_activated(server: Server, tmp_path: Path):
    _, maker = registry_at(server.url, tmp_path / "maker")
    published(maker, "3.5", "c-whole", tmp_path)
    (kept,) = (path for path in (server.folder / "artifacts").rglob(HEADS_FILE) if path.read_bytes() == b"c-whole")
    kept.write_bytes(b"half")
    _, there = registry_at(server.url, tmp_path / "server")
    with pytest.raises(BadWeights, match="damaged"):
        there.activate("3.5", "c-whole")


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_weights_lie_where_artifacts_says_beside_a_server_too(url: str, tmp_path: Path, kind: str):
    with ExitStack() as stack:
        if kind == "bucket":
            _, client = stack.enter_context(s3_server())
            client.create_bucket(Bucket="weights")
        kept, project = ("s3://weights/may" if kind == "bucket" else str(tmp_path / "kept")), f"5{len(kind)}.5"
        maker, server = (
            Settings(data_dir=tmp_path / name, mlflow_tracking_uri=url, artifacts=kept) for name in ("maker", "server")
        )
        published(Registry(maker), project, f"f-{kind}", tmp_path)
        there = Registry(server)
        predictor = Predictor(server, there, segmenter=BrightSegmenter())
        predictor.start()
        try:
            predictor.wait(60)
            # Its own name for the same weights, as above.
            deadline = time.monotonic() + 30
            while predictor.version(project) == "bright-1" and time.monotonic() < deadline:
                time.sleep(0.05)
            assert predictor.version(project) == f"f-{kind}"
        finally:
            predictor.stop()
        assert there.champions()[project].heads_path.read_bytes() == f"f-{kind}".encode()
        assert store_at(kept).get(f"f-{kind}/{HEADS_FILE}") == f"f-{kind}".encode()


def test_a_server_that_goes_away_leaves_the_live_version_in_place_and_comes_back(server: Server, tmp_path: Path):
    settings, registry = registry_at(server.url, tmp_path / "server")
    published(registry, "4.5", "d", tmp_path)
    predictor = Predictor(settings, registry, segmenter=BrightSegmenter())
    predictor.start()
    try:
        predictor.wait(60)
        live = predictor.version("4.5")
        assert live != "bright-1"
        server.stop()
        time.sleep(2)
        assert predictor.version("4.5") == live
        server.start()
        published(registry, "4.5", "e", tmp_path)
        deadline = time.monotonic() + 30
        while predictor.version("4.5") == live and time.monotonic() < deadline:
            time.sleep(0.1)
        assert predictor.version("4.5") == "e"
    finally:
        predictor.stop()
