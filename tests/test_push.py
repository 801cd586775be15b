"""Push: every task and prediction arrives once, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine

import backend.push as pushing
from backend.annotations import tasks_in
from backend.bulk import BulkReport, predict_project
from backend.client import LabelStudio, PredictionsLeftOut
from backend.errors import BackendError, LabelStudioDenied
from backend.export import ExportOptions, export
from backend.ingest import IngestOptions, ingest
from backend.push import Pushed, push, write_for_storage
from backend.service import Service
from backend.settings import Settings
from demo.label_studio import LabelStudioServer
from tests.small_s3 import s3_server

from .fakes import BrightSegmenter, bright_image
from .small_server import Answer, Asked, SmallServer, as_json

CONFIG = """<View><Image name="image" value="$image"/><PolygonLabels name="p" toName="image">
<Label value="building"/></PolygonLabels></View>"""
TOKEN = "0123456789abcdef"


class SmallIntake:
    """So much of Label Studio as `push` calls; ``fault`` may answer in its place, before or after the deed."""

    def __init__(self) -> None:
        self.projects: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self.before: Callable[[Asked], Answer | None] = lambda asked: None
        self.after: Callable[[Asked], Answer | None] = lambda asked: None
        self.delay_s = 0.0
        self._lock = threading.Lock()
        self.server = SmallServer(self._answer)

    def __enter__(self) -> SmallIntake:
        self.server.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.__exit__(*error)

    def counts(self) -> Counter[tuple[str, int]]:
        """How often each task is there, and its predictions."""
        return Counter((task["data"]["image"], len(task["predictions"])) for task in self.tasks)

    def _answer(self, asked: Asked) -> Answer:
        if (instead := self.before(asked)) is not None:
            return instead
        with self._lock:
            answer = self._done(asked)
        return self.after(asked) or answer

    def _done(self, asked: Asked) -> Answer:
        query = {name: values[0] for name, values in parse_qs(urlsplit(asked.target).query).items()}
        match asked.method, asked.path:
            case "GET", "/api/current-user/whoami":
                is_known = asked.headers["Authorization"] == f"Token {TOKEN}"
                return as_json({"id": 1}) if is_known else as_json({"detail": "Invalid token."}, 401)
            case "GET", "/api/projects/":
                return as_json({"results": self.projects})
            case "POST", "/api/projects/":
                self.projects.append({"id": 1, **asked.json})
                return as_json(self.projects[-1], 201)
            case "GET", "/api/projects/1/":
                return as_json(self.projects[0])
            case "PATCH", "/api/projects/1/":
                return as_json(self.projects[0])
            case "POST", "/api/projects/1/import":
                time.sleep(self.delay_s)
                self.sizes.append(len(asked.json))
                first = len(self.tasks) + 1
                self.tasks += [{"id": first + n, "predictions": [], **task} for n, task in enumerate(asked.json)]
                return as_json({"task_ids": list(range(first, len(self.tasks) + 1))}, 201)
            case "POST", "/api/projects/1/import/predictions":
                good = [p for p in asked.json if p["model_version"] != "unfit"]
                for prediction in good:
                    self.tasks[prediction["task"] - 1]["predictions"].append(prediction)
                return as_json({"created": len(good)}, 201)
            case "GET", "/api/tasks/":
                above = json.loads(query["query"])["filters"]["items"][0]["value"]
                listed = self.tasks[above : above + int(query["page_size"])]
                told = [{"id": t["id"], "data": t["data"], "total_predictions": len(t["predictions"])} for t in listed]
                return as_json({"tasks": told})
            case "GET", "/api/dm/views/":
                return as_json([])
            case "POST", "/api/dm/views/":
                return as_json({"id": 1, "data": {}}, 201)
        return as_json({"detail": "not here"}, 404)


def tasks_of(count: int, *, predictions: int = 1, version: str = "m1") -> Iterator[dict[str, Any]]:
    for number in range(count):
        made = [{"result": [], "score": 0.5, "model_version": version}] * predictions
        data = {"image": f"http://x.org/{number}.jpg", "tile": {"scene": "town", "window": [number, 0, 512, 512]}}
        yield {"data": data, **({"predictions": made} if predictions else {})}


def pushed(studio: SmallIntake, folder: Path, tasks: Any, **options: Any) -> Pushed:
    settings = Settings(label_studio_url=studio.server.url, label_studio_api_key=TOKEN, data_dir=folder)
    with LabelStudio(studio.server.url, TOKEN, first_pause_s=0.01, **options) as api:
        return push(api, settings, tasks, title="town", label_config=CONFIG, backend_url=None)


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallIntake]:
    monkeypatch.setattr(pushing, "SETTLE_S", 0.3)
    monkeypatch.setattr(pushing, "BATCH", 10)
    with SmallIntake() as studio:
        yield studio


def test_a_second_run_adds_nothing(studio: SmallIntake, tmp_path: Path) -> None:
    done = pushed(studio, tmp_path, tasks_of(25))
    assert (done.tasks, done.already_there, done.predictions) == (25, 0, 25)
    assert studio.sizes == [10, 10, 5]
    again = pushed(studio, tmp_path, tasks_of(25))
    assert (again.tasks, again.already_there, again.predictions) == (0, 25, 0)
    assert set(studio.counts().values()) == {1}
    assert not list((tmp_path / "push").glob("*.json"))
    # What was predicted since, and what is new, is added.
    grown = pushed(studio, tmp_path, tasks_of(30, predictions=2))
    assert (grown.tasks, grown.predictions) == (5, 10)


def test_a_task_that_is_listed_twice_is_one(studio: SmallIntake, tmp_path: Path) -> None:
    done = pushed(studio, tmp_path, [*tasks_of(12), *tasks_of(12)])
    assert (done.tasks, done.already_there, len(studio.tasks)) == (12, 12, 12)


def in_turn(*answers: Answer | None) -> Callable[[Asked], Answer | None]:
    left = list(answers)
    return lambda asked: left.pop(0) if asked.method == "POST" and "import" in asked.path and left else None


LOST = Answer(201, b'{"task_ids": [1', promised=500)
BUSY = as_json({"detail": "slow down"}, 429, Retry_After="0.2")
LOCKED = as_json({"detail": "database is locked"}, 500)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("answer", [LOST, LOCKED, as_json({}, 502), as_json({}, 504)])
def test_where_an_answer_is_lost_nothing_is_lost_or_sent_twice(
    studio: SmallIntake, tmp_path: Path, when: str, answer: Answer
) -> None:
    setattr(studio, when, in_turn(answer, None, None, answer, answer))
    done = pushed(studio, tmp_path, tasks_of(25))
    assert (done.tasks, done.predictions <= 25) == (25, True)
    assert studio.counts() == {(f"http://x.org/{n}.jpg", 1): 1 for n in range(25)}


def test_a_call_that_is_still_under_way_is_waited_for(
    studio: SmallIntake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for its answer any more, and its tasks are not there yet when they are looked for."""
    monkeypatch.setattr(pushing, "SETTLE_S", 10.0)
    slow = threading.Event()

    def late(asked: Asked) -> Answer | None:
        if asked.path.endswith("/import") and not slow.is_set():
            slow.set()
            threading.Timer(0.5, lambda: studio._done(asked)).start()
            return LOST
        return None

    studio.before = late
    assert pushed(studio, tmp_path, tasks_of(10)).tasks == 10
    assert studio.counts() == {(f"http://x.org/{n}.jpg", 1): 1 for n in range(10)}


def test_a_busy_server_is_waited_for_as_it_says(studio: SmallIntake, tmp_path: Path) -> None:
    studio.before = in_turn(BUSY, as_json({}, 503), BUSY)
    began = time.monotonic()
    assert pushed(studio, tmp_path, tasks_of(10)).tasks == 10
    assert time.monotonic() - began > 0.4
    assert set(studio.counts().values()) == {1}
    # Also as a date, which has whole seconds.
    studio.before = in_turn(as_json({}, 429, Retry_After=formatdate(time.time() + 2, usegmt=True)))
    began = time.monotonic()
    assert pushed(studio, tmp_path, tasks_of(11)).tasks == 1
    assert time.monotonic() - began > 0.9


def test_predictions_that_do_not_fit_are_told_at_the_end(studio: SmallIntake, tmp_path: Path) -> None:
    unfit = tasks_of(3, version="unfit")
    with pytest.raises(PredictionsLeftOut, match="all 25 tasks are in, but Label Studio left out 3 of their predict"):
        pushed(studio, tmp_path, [*unfit, *list(tasks_of(25))[3:]])
    assert sum(len(task["predictions"]) for task in studio.tasks) == 22


def test_a_wrong_token_is_told_before_anything_is_made(studio: SmallIntake, tmp_path: Path) -> None:
    settings = Settings(label_studio_url=studio.server.url, label_studio_api_key="b" * 16, data_dir=tmp_path)
    with LabelStudio(studio.server.url, "b" * 16) as api, pytest.raises(LabelStudioDenied, match="was refused"):
        push(api, settings, tasks_of(1), title="town", label_config=CONFIG, backend_url=None)
    assert not studio.projects


def test_two_pushes_at_once_are_refused(studio: SmallIntake, tmp_path: Path) -> None:
    def second(asked: Asked) -> Answer | None:
        if asked.path.endswith("/import"):
            with pytest.raises(BackendError, match="another push into the project 'town' is under way"):
                pushed(studio, tmp_path, tasks_of(1))
        return None

    studio.after = second
    assert pushed(studio, tmp_path, tasks_of(10)).tasks == 10


PUSHER = """
import sys
from pathlib import Path
import backend.push as pushing
from tests.test_push import TOKEN, pushed, tasks_of
class studio: server = type("server", (), {"url": sys.argv[1]})
pushing.BATCH, pushing.SETTLE_S = 10, 1.5
sys.stdin.readline()
pushed(studio, Path(sys.argv[2]), tasks_of(45))
"""


def test_killed_at_any_point_nothing_is_lost_and_nothing_there_twice(studio: SmallIntake, tmp_path: Path) -> None:
    """Killed after the n-th call: before it is carried out, when it was, and while it still is (which it then is)."""
    kills = [("before", 1), ("after", 1), ("after", 2), ("before", 3), ("under way", 2)]

    def started() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PUSHER, studio.server.url, str(tmp_path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    process, following = started(), started()
    for when, count in kills:
        left = count

        def kill(asked: Asked, when: str = when, pid: int = process.pid) -> Answer | None:
            nonlocal left
            if asked.method == "POST" and "/import" in asked.path and (left := left - 1) == 0:
                os.kill(pid, signal.SIGKILL)
                if when == "under way":
                    threading.Timer(0.5, lambda: studio._done(asked)).start()
                return None if when == "after" else LOST
            return None

        studio.before, studio.after = (lambda asked: None, kill) if when == "after" else (kill, lambda asked: None)
        process.communicate("\n", timeout=60)
        assert process.returncode == -signal.SIGKILL, (when, count)
        process, following = following, started()
    # The last one is let through.
    studio.before = studio.after = lambda asked: None
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    following.kill()
    following.communicate()
    assert studio.counts() == {(f"http://x.org/{n}.jpg", 1): 1 for n in range(45)}


def test_memory_does_not_grow_with_the_tasks(studio: SmallIntake, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pushing, "BATCH", 250)
    padding = "x" * 5_000

    def heavy(count: int) -> Iterator[dict[str, Any]]:
        for task in tasks_of(count, predictions=0):
            yield {**task, "data": {**task["data"], "more": padding}}

    def forget(asked: Asked) -> Answer | None:
        for task in studio.tasks:
            task["data"] = {}
        studio.server.asked.clear()
        return None

    studio.after = forget
    peaks = []
    for number, count in enumerate((250, 2_500)):
        studio.tasks.clear()
        tracemalloc.start()
        pushed(studio, tmp_path / str(number), heavy(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_250 * 1_000, peaks


# A real Label Studio


@pytest.mark.label_studio
def test_a_real_label_studio_has_each_task_once(label_studio: LabelStudioServer, tmp_path: Path) -> None:
    settings = Settings(
        label_studio_url=label_studio.url, label_studio_api_key=label_studio.token, data_dir=tmp_path
    )  # fmt: skip
    listed = list(tasks_of(300))
    (tmp_path / "tasks.json").write_text(json.dumps(listed))
    with LabelStudio(label_studio.url, label_studio.token) as api:
        for count in (300, 0):
            tasks = tasks_in(tmp_path / "tasks.json")
            done = push(api, settings, tasks, title="once", label_config=CONFIG, backend_url=None, total=300)
            assert (done.tasks, done.predictions) == (count, count)
        there = Counter((t["data"]["image"], len(t["predictions"])) for t in api.tasks(done.project_id))
    assert there == {(task["data"]["image"], 1): 1 for task in listed}


def test_files_for_a_cloud_storage_stay_as_they_are(tmp_path: Path) -> None:
    assert write_for_storage(tasks_of(5), tmp_path / "s3") == 5
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s3").iterdir()}
    assert write_for_storage(tasks_of(7), tmp_path / "s3") == 2
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s3").iterdir()}
    assert before.items() <= after.items()
    assert json.loads(next((tmp_path / "s3").glob("*.json")).read_text())["predictions"]


# By way of a bucket


class Bucket:
    """The bucket ``towns`` of an S3 server on this machine, and what Label Studio needs to be told of it."""

    def __init__(self, endpoint: str, client: Any) -> None:
        self.endpoint, self.client = endpoint, client
        self.client.create_bucket(Bucket="towns")

    def keys(self, prefix: str) -> list[str]:
        listed = self.client.list_objects_v2(Bucket="towns", Prefix=f"{prefix}/").get("Contents", [])
        return [one["Key"].removeprefix(f"{prefix}/") for one in listed]

    def storage(self, api: LabelStudio, project: int, prefix: str) -> int:
        """A source storage of the project, made as the page makes it; its number."""
        body = {
            "project": project, "bucket": "towns", "prefix": prefix, "regex_filter": r".*\.json", "presign": True,
            "use_blob_urls": False, "s3_endpoint": self.endpoint, "region_name": "us-east-1",
            "aws_access_key_id": "testing", "aws_secret_access_key": "testing",
        }  # fmt: skip
        return int(api._call("POST", "/api/storages/s3/", body=body)["id"])

    def synchronized(self, api: LabelStudio, project: int, storage: int, count: int) -> list[dict[str, Any]]:
        """The project's tasks once there are so many."""
        api._call("POST", f"/api/storages/s3/{storage}/sync", body={}, timeout_s=60)
        deadline = time.monotonic() + 60
        while len(there := list(api.tasks(project))) < count and time.monotonic() < deadline:
            time.sleep(0.2)
        return there


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with s3_server() as (endpoint, client):
        yield Bucket(endpoint, client)


def test_task_files_go_to_a_bucket_by_one_command_and_only_once(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps(list(tasks_of(5))))
    command = [sys.executable, "-m", "backend", "push", "tasks.json", "--storage", "s3://towns/may/tasks", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    for written in (5, 0):
        told = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        assert json.loads(told.stdout) == {"written": written, "tasks": 5}
    assert write_for_storage(tasks_of(7), "s3://towns/may/tasks") == 2
    write_for_storage(tasks_of(7), tmp_path / "s3")
    files = {path.name: path.read_bytes() for path in (tmp_path / "s3").iterdir()}
    there = {key: bucket.client.get_object(Bucket="towns", Key=f"may/tasks/{key}") for key in bucket.keys("may/tasks")}
    assert {key: one["Body"].read() for key, one in there.items()} == files
    with pytest.raises(BackendError, match=r"s3://none-such/x: .*AWS_ACCESS_KEY_ID"):
        write_for_storage(tasks_of(1), "s3://none-such/x")


@pytest.mark.label_studio
def test_a_real_label_studio_takes_tasks_from_a_bucket_once(
    label_studio: LabelStudioServer, bucket: Bucket, tmp_path: Path
) -> None:
    settings = Settings(
        label_studio_url=label_studio.url, label_studio_api_key=label_studio.token, data_dir=tmp_path
    )  # fmt: skip
    with LabelStudio(label_studio.url, label_studio.token) as api:
        project = int(api.create_project("from a bucket", CONFIG)["id"])
        # Label Studio refuses a storage with nothing in it.
        write_for_storage(tasks_of(5), "s3://towns/town")
        storage = bucket.storage(api, project, "town")
        for count in (5, 8):
            write_for_storage(tasks_of(count), "s3://towns/town")
            there = bucket.synchronized(api, project, storage, count)
            found = sorted((task["data"]["image"], len(task["predictions"])) for task in there)
            assert found == [(f"http://x.org/{n}.jpg", 1) for n in range(count)]
        done = push(api, settings, tasks_of(8), title="from a bucket", label_config=CONFIG, backend_url=None)
        assert (done.tasks, done.already_there, done.predictions) == (0, 8, 0)


@pytest.mark.label_studio
def test_images_that_a_real_label_studio_presigns_are_predicted_and_come_back_in_their_place(
    label_studio: LabelStudioServer, bucket: Bucket, tmp_path: Path
) -> None:
    """Tiles and tasks in a bucket of which only Label Studio has the key, to polygons on the ground."""
    place = Affine(0.5, 0, 354_000, 0, -0.5, 3_057_000)
    with rasterio.open(
        tmp_path / "town.tif", "w", driver="GTiff", width=200, height=128, count=3, dtype="uint8", crs="EPSG:32645",
        transform=place,
    ) as out:  # fmt: skip
        out.write(np.moveaxis(bright_image((20, 30, 60, 70), (140, 40, 180, 90), size=(200, 128)), 2, 0))
    ingest([tmp_path / "town.tif"], tmp_path, upload="s3://towns/tiles", options=IngestOptions(128, 32, "png"))
    write_for_storage(tasks_in(tmp_path / "tasks.json"), "s3://towns/tasks")

    def predicted(api: LabelStudio, project: int, **more: Any) -> BulkReport:
        settings = Settings(
            label_studio_url=label_studio.url, label_studio_api_key=label_studio.token, data_dir=tmp_path, **more
        )
        with contextlib.closing(Service(settings, segmenter=BrightSegmenter())) as service:
            service.predictor.start()
            service.predictor.wait(60)
            return predict_project(
                api, project, lambda tasks: service.predict_tasks(tasks, CONFIG, str(project)), version="bright-1",
                fingerprint="x", kept=tmp_path / "kept.jsonl",
            )  # fmt: skip

    with LabelStudio(label_studio.url, label_studio.token) as api, pytest.MonkeyPatch.context() as patch:
        project = int(api.create_project("presigned", CONFIG)["id"])
        tasks = bucket.synchronized(api, project, bucket.storage(api, project, "tasks"), 2)
        assert sorted(task["data"]["image"] for task in tasks) == [
            f"s3://towns/tiles/town/r0000_c000{column}.png" for column in (0, 1)
        ]
        # From here on nobody but Label Studio knows the bucket.
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT"):
            patch.delenv(name)
        # Where a signed link leads is no less suspect than any address: this machine's own has to be named.
        refused = predicted(api, project)
        assert (refused.predicted, refused.failed) == (0, 2)
        assert "GEOPRELABEL_IMAGE_HOSTS" in refused.failures[0].reason
        done = predicted(api, project, image_hosts=("127.0.0.1",))
        assert (done.predicted, done.failed, done.polygons) == (2, 0, 2)
        for task in list(api.tasks(project)):
            (prediction,) = task["predictions"]
            api.create_annotation(task["id"], prediction["result"], parent_prediction=prediction["id"])
        export(api.tasks(project), tmp_path / "back.gpkg", options=ExportOptions())
    there = geopandas.read_file(tmp_path / "back.gpkg", layer="back").to_crs("EPSG:32645").union_all()
    wanted = shapely.union_all([shapely.box(*(place @ (x0, y1)), *(place @ (x1, y0))) for x0, y0, x1, y1 in
                                ((20, 30, 60, 70), (140, 40, 180, 90))])  # fmt: skip
    assert there.symmetric_difference(wanted).area / wanted.area < 0.1
