"""How requests are served beside each other: who is answered, in whose turn, from which cache, and in what form."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from filelock import FileLock
from shapely import Polygon, box
from typer.testing import CliRunner

from backend import cli, labelstudio
from backend.client import LabelStudio
from backend.errors import BadRequest
from backend.flight import GIVES_WAY_BY
from backend.jobs import Jobs
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from backend.tile import Tile
from demo.label_studio import LabelStudioServer, free_port
from tests.fakes import BrightSegmenter, bright_image
from tests.sdk_judge import SdkJudge, sdk_judge

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image"><Label value="Building"/></PolygonLabels>
<KeyPoint name="click" toName="image" smart="true"/><Rectangle name="box" toName="image" smart="true"/></View>"""
PROJECT = "3.1700000000"


class SlowSegmenter(BrightSegmenter):
    """Takes a while for each image."""

    def __init__(self, seconds: float = 0.02, **options: Any) -> None:
        super().__init__(**options)
        self.seconds = seconds

    def embed(self, image_rgb: np.ndarray) -> Any:
        time.sleep(self.seconds)
        return super().embed(image_rgb)


def image_task(number: int, *boxes: tuple[int, int, int, int], side: int = 128, **more: Any) -> dict[str, Any]:
    """A task whose image has bright boxes, and one dark pixel that makes it another file for each number."""
    image = bright_image(*(boxes or ((20, 20, 60, 60),)), size=(side, side))
    image[-1, -1] = number % 50
    image[-1, -2] = number // 50 % 50
    packed = io.BytesIO()
    PIL.Image.fromarray(image).save(packed, "PNG")
    return {
        "id": number,
        "data": {"image": "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()},
        **more,
    }


def click(x: float, y: float, *, positive: bool = True, id: str = "k1") -> dict[str, Any]:
    return {"id": id, "type": "keypoint", "from_name": "click", "to_name": "image", "is_positive": positive,
            "value": {"x": x, "y": y, "width": 0.3}}  # fmt: skip


def rectangle(x: float, y: float, width: float, height: float, *, id: str = "r1") -> dict[str, Any]:
    return {"id": id, "type": "rectangle", "from_name": "box", "to_name": "image",
            "value": {"x": x, "y": y, "width": width, "height": height, "rotation": 0}}  # fmt: skip


def asked(*tasks: Any, prompts: list[Any] | None = None, context: Any = None, **more: Any) -> dict[str, Any]:
    context = {"result": prompts} if prompts is not None else context
    return {"tasks": list(tasks), "project": PROJECT, "label_config": CONFIG, "params": {"context": context}, **more}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a service on one data folder, and a function that posts to its /predict."""
    made: list[Service] = []

    def start(segmenter: Any = None, **settings: Any) -> Any:
        wanted = Settings(data_dir=tmp_path / "data", **settings)
        service = Service(wanted, segmenter=segmenter or BrightSegmenter())
        made.append(service)
        app = create_app(wanted, service)
        service.predictor.wait(20)

        def post(body: dict[str, Any], path: str = "/predict") -> Any:
            return app.test_client().post(path, data=json.dumps(body), content_type="application/json")

        post.service = service  # type: ignore[attr-defined]
        return post

    yield start
    for service in made:
        service.close()


def results(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.status
    return answer.get_json()["results"]


def outlines(item: Any, side: int = 128) -> list[Polygon]:
    return [Polygon(np.array(r["value"]["points"]) * side / 100) for r in item["result"]]


def iou(one: Any, other: Any) -> float:
    return one.intersection(other).area / one.union(other).area


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- Newest first, enough for all ---


def test_no_save_waits_for_a_training_process_that_is_given_no_processor(tmp_path):
    jobs, answers = Jobs(Settings(data_dir=tmp_path, start_training_each_n_updates=100)), []
    jobs.changed(PROJECT)
    # As the process does, for the moment that it takes to write; it is the first to be put off.
    with FileLock(tmp_path / "jobs" / f"{PROJECT}.ask.json.lock"):
        save = threading.Thread(target=lambda: answers.append(jobs.changed(PROJECT, 2)))
        save.start()
        save.join(20)
        assert answers == [False]
        assert jobs.ask(PROJECT).changes == 1
    until(lambda: jobs.ask(PROJECT).changes == 3)


@pytest.mark.skipif(sys.platform != "linux", reason="threads of this system have no priorities of their own")
def test_what_computes_gives_way_to_what_answers_at_once(serve):
    class Watched(BrightSegmenter):
        def embed(self, image_rgb: np.ndarray) -> Any:
            seen.append(os.getpriority(os.PRIO_PROCESS, 0))
            return super().embed(image_rgb)

    seen: list[int] = []
    post, own = serve(Watched()), os.getpriority(os.PRIO_PROCESS, 0)
    opened, clicked, batch = (
        asked(image_task(1)),
        asked(image_task(2), prompts=[click(30, 30)]),
        asked(image_task(3), image_task(4)),
    )
    for body in (opened, clicked, batch):
        results(post(body))
    assert len(seen) == 4
    assert all(nice == min(own + GIVES_WAY_BY, 19) for nice in seen)
    # Whoever asked goes on as before: it may be asked for a control route next.
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_newer_click_takes_a_waiting_ones_place(serve):
    go = threading.Event()
    segmenter = BrightSegmenter(wait_for=go)
    post = serve(segmenter)
    task = image_task(1)
    with ThreadPoolExecutor(3) as pool:
        older = pool.submit(post, asked(task, prompts=[click(30, 30)]))
        until(lambda: bool(post.service.predictor._embedding_flights._flights))
        beside = pool.submit(post, asked(image_task(2), prompts=[click(30, 30)]))
        newer = pool.submit(post, asked(task, prompts=[click(30, 30), click(31, 31, id="k2")]))
        # At once, while the image is still being looked at.
        assert results(older.result(20)) == [{"result": [], "model_version": "bright-1"}]
        assert not newer.done()
        go.set()
        for answer in (newer, beside):
            assert iou(outlines(results(answer.result(20))[0])[0], box(20, 20, 60, 60)) > 0.95
    assert segmenter.embedded == 2


def test_clicks_beyond_the_threads_are_refused_with_a_reason_and_control_routes_answer(serve):
    go = threading.Event()
    post = serve(BrightSegmenter(wait_for=go), threads=4)
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(post, asked(image_task(n), prompts=[click(30, 30)])) for n in range(3)]
        until(lambda: len(post.service.predictor._embedding_flights._flights) == 3)
        refused = post(asked(image_task(9), prompts=[click(30, 30)]))
        assert refused.status_code == 503
        assert "THREADS" in refused.status
        assert int(refused.headers["Retry-After"]) > 0
        # Label Studio asks again for tasks that are answered by an empty list.
        assert results(post(asked(image_task(10), image_task(11)))) == [[], []]
        assert post({"project": PROJECT, "schema": CONFIG}, "/setup").status_code == 200
        go.set()
        assert all(len(results(answer.result(20))[0]["result"]) == 1 for answer in held)
    assert len(results(post(asked(image_task(9), prompts=[click(30, 30)])))[0]["result"]) == 1


def test_another_projects_batch_does_not_wait_for_a_large_one(serve):
    post = serve(SlowSegmenter(0.03))
    ended: dict[str, float] = {}

    def batch(project: str, count: int, first: int) -> None:
        body = asked(*[image_task(first + n) for n in range(count)], project=project)
        assert all(item["result"] for item in results(post(body)))
        ended[project] = time.monotonic()

    large = threading.Thread(target=batch, args=("1.1", 40, 0))
    large.start()
    until(lambda: post.service._pool.waiting > 20)
    batch("2.1", 3, 500)
    left = post.service._pool.waiting
    large.join(60)
    assert ended["2.1"] < ended["1.1"]
    assert left > 10  # of the large one's tiles, when the small one had its answer


def test_no_answer_is_of_another_image(serve):
    post = serve(threads=32, embedding_cache_mb=1)
    places = [(4 + 12 * (n % 10), 4 + 12 * (n // 10)) for n in range(60)]
    tasks = [image_task(n, (x, y, x + 11, y + 11)) for n, (x, y) in enumerate(places)]

    def one(number: int) -> None:
        n = number * 37 % len(tasks)
        x, y = places[n]
        prompts = [click((x + 4) / 1.28, (y + 4) / 1.28, id=f"k{number}")] if number % 3 else None
        # As different annotators on different tasks: nothing replaces anything.
        (item,) = results(post(asked({**tasks[n], "id": number}, prompts=prompts)))
        (found,) = outlines(item)
        assert iou(found, box(x, y, x + 11, y + 11)) > 0.8

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(240)))


# --- The last box ---


TWO = ((20, 20, 60, 60), (64, 20, 100, 60))
AROUND_BOTH = rectangle(14, 14, 66, 36)


def count(answer: Any) -> int:
    return len(results(answer)[0]["result"])


def test_clicks_refine_what_the_last_box_was_drawn_around(serve):
    post, task = serve(), image_task(1, *TWO)
    assert count(post(asked(task, prompts=[AROUND_BOTH]))) == 2
    less = results(post(asked(task, prompts=[click(60, 30, positive=False)])))[0]
    assert [iou(found, box(*TWO[0])) > 0.95 for found in outlines(less)] == [True]
    both = [click(60, 30, positive=False), click(62, 30, id="k2")]
    assert count(post(asked(task, prompts=both))) == 2


def test_a_refined_answer_comes_in_the_coarser_ones_place(serve):
    post, task = serve(), image_task(1, *TWO)
    first, refined, again = (
        results(post(asked(task, prompts=prompts)))[0]["result"][0]["id"]
        for prompts in ([AROUND_BOTH], [click(60, 30, positive=False)], [rectangle(14, 14, 66, 36, id="r2")])
    )
    assert first == refined != again
    alone, further = (
        results(post(asked(image_task(2, *TWO), prompts=prompts)))[0]["result"][0]["id"]
        for prompts in ([click(30, 30)], [click(30, 30), click(60, 30, id="k2")])
    )
    assert alone == further != first


@pytest.mark.parametrize(
    "ending",
    ["saved", "another object", "last prompt deleted", "accepted", "another annotator", "another project", "too old"],
)
def test_the_box_is_forgotten_when_it_is_done_with(serve, monkeypatch: pytest.MonkeyPatch, ending: str):
    post, task, off = serve(), image_task(1, *TWO), [click(60, 30, positive=False)]
    drafts = [{"user": "ann@example.com", "result": []}]
    answer = results(post(asked({**task, "drafts": drafts}, prompts=[AROUND_BOTH])))[0]
    body = asked({**task, "drafts": drafts}, prompts=off)
    if ending == "saved":
        event = {"action": "ANNOTATION_CREATED", "project": {"id": 3, "created_at": "2023-11-14T22:13:20Z"},
                 "annotation": {"id": 5, "task": 1, "result": []}}  # fmt: skip
        assert post(event, "/webhook").status_code == 201
    elif ending == "another object":
        assert count(post(asked({**task, "drafts": drafts}, prompts=[click(95, 95)]))) == 0
    elif ending == "last prompt deleted":
        post(asked({**task, "drafts": drafts}, prompts=[]))
    elif ending == "accepted":
        body["tasks"][0]["drafts"] = [{"user": "ann@example.com", "result": answer["result"]}]
    elif ending == "another annotator":
        body["tasks"][0]["drafts"] = [{"user": "bob@example.com", "result": []}]
    elif ending == "another project":
        body["project"] = "4.1700000000"
    else:
        now = time.time()
        monkeypatch.setattr("backend.boxes.time.time", lambda: now + 1000)
    assert count(post(body)) == 0


def test_another_server_process_knows_the_box(serve):
    task = image_task(1, *TWO)
    assert count(serve()(asked(task, prompts=[AROUND_BOTH]))) == 2
    assert count(serve()(asked(task, prompts=[click(60, 30, positive=False)]))) == 1


@pytest.mark.parametrize("value", [None, [], {}, {"x": "a"}, {"x": 10**400, "y": 1}])
def test_prompts_that_cannot_be_read_are_refused_with_a_box_in_memory_too(serve, value: Any):
    post, task = serve(), image_task(1, *TWO)
    post(asked(task, prompts=[AROUND_BOTH]))
    for prompt in (click(1, 1), AROUND_BOTH):
        assert post(asked(task, prompts=[{**prompt, "value": value}])).status_code == 400
    assert count(post(asked(task, prompts=[{**AROUND_BOTH, "id": ["x"]}]))) == 2
    assert count(post(asked(task, prompts=[click(60, 30, positive=False)]))) == 1


def test_boxes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from backend import boxes

    monkeypatch.setattr(boxes, "MAX_BOXES", 5)
    last = boxes.LastBoxes(tmp_path)
    for number in range(12):
        last.remember(PROJECT, number, AROUND_BOTH)
    assert len(list(tmp_path.iterdir())) <= 5
    assert last.with_box(PROJECT, 11, [click(30, 30)]) is not None


# --- Warm before anybody clicks ---


def test_what_one_process_embedded_another_reads(serve):
    tasks = [image_task(n) for n in range(4)]
    first = serve()
    assert list(first.service.warm_tasks([*tasks, {"id": 9, "data": {}}], CONFIG, PROJECT)) == [True] * 4 + [None]
    assert list(first.service.warm_tasks(tasks, CONFIG, PROJECT)) == [False] * 4
    segmenter = BrightSegmenter()
    second = serve(segmenter)
    assert all(count(second(asked(task, prompts=[click(30, 30)]))) for task in tasks)
    assert segmenter.embedded == 0


def test_a_prewarm_event_is_answered_at_once_and_done_after(serve):
    go = threading.Event()
    segmenter = BrightSegmenter(wait_for=go)
    post = serve(segmenter)
    tasks = [image_task(1), image_task(2)]
    assert [item["result"] for item in results(post(asked(*tasks, context={"event": "prewarm"})))] == [[], []]
    go.set()
    until(lambda: segmenter.embedded == 2)
    until(lambda: len(list(post.service.predictor.embeddings.disk.folder.glob("*.safetensors"))) == 2)
    assert count(post(asked(tasks[0], prompts=[click(30, 30)]))) == 1
    assert segmenter.embedded == 2


def test_capabilities_are_those_there_are(serve):
    post = serve()
    (item,) = results(post(asked(image_task(1), context={"event": "capabilities"})))
    told = item["capabilities"]
    assert item["result"] == []
    assert told["prompts"]["keypoint"]
    assert not told["prompts"]["text"]
    assert told["results"] == [{"from_name": "polygon", "to_name": "image", "type": "polygonlabels"}]
    assert told["pre_labels"] == ["Building"]


def test_the_prewarm_command_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("backend.predictor.load_segmenter", lambda settings: BrightSegmenter())
    monkeypatch.setenv("GEOPRELABEL_DATA_DIR", str(tmp_path))
    tasks = [image_task(n, side=512) for n in range(3)] + [{"id": 4, "data": {"image": "file:///etc/passwd"}}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    command = ["prewarm", str(tmp_path / "tasks.json"), "--json"]
    for made in (3, 0):
        done = CliRunner().invoke(cli.app, command)
        told = json.loads(done.stdout)
        assert (told["tasks"], told["made"], told["kept"], told["failed"]) == (4, made, 3 - made, 1)
        assert told["disk_mb"] > 0
    monkeypatch.setenv("GEOPRELABEL_EMBEDDING_DISK_MB", "0")
    refused = CliRunner().invoke(cli.app, command)
    assert isinstance(refused.exception, BadRequest)
    assert "GEOPRELABEL_EMBEDDING_DISK_MB" in str(refused.exception)


# --- Masks and boxes instead of polygons ---


def config_of(*kinds: str) -> str:
    tags = "".join(f'<{kind} name="{kind}" toName="image"><Label value="Building"/></{kind}>' for kind in kinds)
    return (
        f'<View><Image name="image" value="$image"/>{tags}<KeyPoint name="click" toName="image" smart="true"/></View>'
    )


@pytest.fixture(scope="module")
def judge() -> Iterator[SdkJudge]:
    with sdk_judge() as started:
        yield started


KINDS = ("BrushLabels", "BitmaskLabels", "RectangleLabels")
RING = ((20, 20, 60, 60), (70, 70, 90, 100))


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_config_has_no_polygons_the_same_objects_come_as_masks_or_boxes(serve, judge: SdkJudge, kind: str):
    post, config = serve(), config_of(kind)
    task = image_task(1, *RING)
    (item,) = results(post(asked(task, label_config=config)))
    assert [r["type"] for r in item["result"]] == [kind.casefold()] * 2
    assert judge.errors(config, item) == []
    parsed = labelstudio.parse_config(config)
    read = labelstudio.read_annotation({"result": item["result"]}, Tile(size=(128, 128)), config=parsed)
    assert not read.dropped
    assert {region.label for region in read.regions} == {"Building"}
    for truth in RING:
        assert max(iou(region.polygon, box(*truth)) for region in read.regions) > 0.95
    (clicked,) = results(post(asked(task, label_config=config, prompts=[click(30, 30)])))
    assert [r["type"] for r in clicked["result"]] == [kind.casefold()]


def test_polygons_are_the_first_choice_then_brush(serve):
    for kinds, chosen in (
        (("RectangleLabels", "BrushLabels", "PolygonLabels"), "PolygonLabels"),
        (KINDS, "BrushLabels"),
    ):
        assert [tag.from_name for tag in labelstudio.parse_config(config_of(*kinds)).tags] == [chosen]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 96)])
def test_masks_come_back_as_they_were(shape: tuple[int, int]):
    random = np.random.default_rng(1)
    for mask in (random.random(shape) > 0.5, np.ones(shape, bool), random.random(shape) > 0.99):
        packed = labelstudio.brush_rle(mask)
        assert np.array_equal(labelstudio.brush_mask(packed, shape[::-1]), mask)
        assert np.array_equal(labelstudio.bitmask(labelstudio.bitmask_url(mask)), mask)


@pytest.mark.label_studio
def test_label_studio_takes_masks_and_boxes_as_predictions(serve, label_studio: LabelStudioServer):
    post, task = serve(), image_task(1, *RING)
    with LabelStudio(label_studio.url, label_studio.token) as client:
        for kind in KINDS:
            config = config_of(kind)
            project = client.create_project(f"serving {kind}", config)["id"]
            client.import_tasks(project, [{"data": task["data"]}])
            (stored,) = client.tasks(project)
            (item,) = results(post(asked({**stored}, label_config=config)))
            client.import_predictions(project, [{**item, "task": stored["id"]}])
            (stored,) = client.tasks(project)
            (prediction,) = stored["predictions"]
            assert prediction["result"] == item["result"]


# --- The server as a process ---


SERVER = """
import sys, time
sys.path.insert(0, {repository!r})
from backend import server
from backend.settings import Settings
from tests.fakes import BrightSegmenter

class Slow(BrightSegmenter):
    threads = 2

    def use_threads(self, count):
        pass

    def embed(self, image_rgb):
        with open({journal!r}, "a") as file:
            file.write("embedded\\n")
        time.sleep({seconds})
        return super().embed(image_rgb)

server.GRACE_S, server.ANSWERS_WITHIN_S = {grace_s}, {grace_s} - 4
server.serve(Settings.from_environment(), segmenter=Slow())
"""


def posted(port: int, body: dict[str, Any]) -> Any:
    answer = answered(port, body)
    assert answer.status == 200, answer.reason
    return json.loads(answer.body)["results"]


@dataclass(frozen=True)
class Answered:
    status: int
    reason: str
    body: bytes


def answered(port: int, body: dict[str, Any]) -> Answered:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/predict", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return Answered(answer.status, answer.reason, answer.read())


@contextmanager
def served(folder: Path, *, workers: int, seconds: float, grace_s: int = 100) -> Iterator[tuple[Any, int, Path]]:
    """A server whose segmenter takes that long for each image: its process, its port, a file with a line an image."""
    port, journal = free_port(), folder / "embedded.txt"
    code = SERVER.format(repository=str(REPOSITORY), journal=str(journal), seconds=seconds, grace_s=grace_s)
    environment = {
        **os.environ, "PORT": str(port), "WORKERS": str(workers), "THREADS": "8", "GEOPRELABEL_DATA_DIR": str(folder),
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log, cwd=REPOSITORY)

    def is_up() -> bool:
        try:
            return bool(posted(port, asked(image_task(0), prompts=[])))
        except OSError:
            return False

    try:
        deadline = time.monotonic() + 90
        while not is_up():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield server, port, journal
    finally:
        server.kill()
        server.wait()


def test_two_workers_share_embeddings_and_a_stopped_server_answers_what_it_has(tmp_path: Path):
    with served(tmp_path, workers=2, seconds=0.7) as (server, port, journal):
        known = image_task(1)
        assert posted(port, asked(known, prompts=[click(30, 30)]))[0]["result"]
        assert journal.read_text().count("embedded") == 1
        for number in range(12):  # a new connection each, so that both workers get some
            assert posted(port, asked({**known, "id": number}, prompts=[click(30, 30)]))[0]["result"]
        assert journal.read_text().count("embedded") == 1

        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(posted, port, asked(image_task(2), prompts=[click(30, 30)]))
            many = pool.submit(posted, port, asked(image_task(3), image_task(4)))
            until(lambda: journal.read_text().count("embedded") >= 3)
            server.send_signal(signal.SIGTERM)
            assert len(one.result(60)[0]["result"]) == 1
            assert [len(item["result"]) for item in many.result(60)] == [1, 1]
        assert server.wait(30) == 0


def test_who_cannot_be_answered_before_the_server_ends_is_told_to_ask_again(tmp_path: Path):
    with served(tmp_path, workers=1, seconds=4, grace_s=10) as (server, port, journal), ThreadPoolExecutor(6) as pool:
        clicks = [pool.submit(answered, port, asked(image_task(n), prompts=[click(30, 30)])) for n in (1, 2, 3)]
        # Who clicks has one image looked at after the other: after six seconds the second is not done yet.
        until(lambda: journal.exists())
        many = pool.submit(answered, port, asked(image_task(4), image_task(5)))
        opened = pool.submit(answered, port, asked(image_task(6)))
        time.sleep(0.5)
        begun = time.monotonic()
        server.send_signal(signal.SIGTERM)
        told = [each.result(60) for each in (*clicks, many, opened)]
        assert time.monotonic() - begun < 10
        assert server.wait(30) == 0
    assert sorted(one.status for one in told[:3]) == [200, 503, 503]
    assert all("stopped" in one.reason for one in told[:3] if one.status == 503)
    assert [json.loads(one.body)["results"] for one in told[3:]] == [[[], []], [[]]]
