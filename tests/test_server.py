"""The routes, as Label Studio calls them: every recorded request replayed, and what goes wrong."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr
from shapely import Point, Polygon, box

from backend import labelstudio
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from backend.tile import Tile
from tests import golden_requests
from tests.fakes import BrightSegmenter, bright_image

CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="polygon" toName="image"><Label value="Building"/><Label value="Moon base"/></PolygonLabels>
<KeyPoint name="click" toName="image" smart="true"/><Rectangle name="box" toName="image" smart="true"/></View>"""
PROJECT = "3.1700000000"

HOUSES_XYXY = ((190, 52, 240, 92), (280, 215, 318, 262), (335, 265, 372, 300), (330, 360, 380, 400))
"""The houses, in pixels, on the tiles that the recordings name: one under each place where a recorded prompt lies."""


def town_png() -> bytes:
    return cv2.imencode(".png", bright_image(*HOUSES_XYXY, size=(640, 512)))[1].tobytes()


@pytest.fixture(scope="session")
def upload_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serves the one uploaded file of the recordings, as Label Studio would."""
    folder = tmp_path_factory.mktemp("uploads")
    (folder / "data/upload/7").mkdir(parents=True)
    (folder / "data/upload/7/5d0c81aa-r0001_c0002.png").write_bytes(town_png())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def settings(tmp_path: Path, upload_server: str) -> Settings:
    for folder, name in (("valley", "r0002_c0005.png"), ("valley", "r0003_c0007.png")):
        tile = tmp_path / "data/tiles" / folder / name
        tile.parent.mkdir(parents=True, exist_ok=True)
        tile.write_bytes(town_png())
    (tmp_path / "files/tiles").mkdir(parents=True)
    (tmp_path / "files/tiles/r0004_c0001.png").write_bytes(town_png())
    return Settings(
        data_dir=tmp_path / "data",
        public_url="http://geoprelabel.test:9090",
        label_studio_url=upload_server,
        label_studio_api_key="0123456789abcdef0123456789abcdef01234567",
        local_files_document_root=tmp_path / "files",
        start_training_each_n_updates=1000,
    )


@pytest.fixture
def service(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service(settings, segmenter=BrightSegmenter())
    # The recordings' START_TRAINING must not start real training processes here; test_jobs does that.
    monkeypatch.setattr(service.jobs, "_start", lambda project: True)
    yield service
    service.close()


@pytest.fixture
def client(settings: Settings, service: Service) -> FlaskClient:
    return create_app(settings, service).test_client()


def data_uri(image_rgb: np.ndarray) -> str:
    png = cv2.imencode(".png", image_rgb[:, :, ::-1])[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(png).decode()


def post(client: FlaskClient, path: str, body: Any, **options: Any) -> Any:
    return client.post(path, data=json.dumps(body), content_type="application/json", **options)


def predict(client: FlaskClient, *tasks: Any, context: Any = None, config: str = CONFIG) -> Any:
    body = {"tasks": list(tasks), "project": PROJECT, "label_config": config, "params": {"context": context}}
    return post(client, "/predict", body)


def house_task(number: int = 1) -> dict[str, Any]:
    return {"id": number, "data": {"image": data_uri(bright_image((50, 60, 110, 140)))}}


def rings_px(item: Any, size: tuple[int, int]) -> list[np.ndarray]:
    return [np.array(r["value"]["points"]) * np.array(size) / 100 for r in item["result"]]


def near(outline: Polygon, house_xyxy: tuple[int, int, int, int]) -> bool:
    house = box(*house_xyxy)
    return outline.intersection(house).area / outline.union(house).area > 0.97


# --- Recorded requests ---


@pytest.mark.parametrize("name", golden_requests.names("predict_") + golden_requests.names("interactive_"))
def test_every_recorded_predict_is_answered_with_the_houses(client: FlaskClient, name: str):
    recording = golden_requests.load(name)
    answer = post(client, "/predict", recording["body"])
    assert answer.status_code == 200, answer.status
    body = answer.get_json()
    assert len(body["results"]) == len(recording["body"]["tasks"])
    assert body["model_version"] == "bright-1"
    context = recording["body"]["params"]["context"] or {}
    for item in body["results"]:
        outlines = [Polygon(ring) for ring in rings_px(item, (640, 512))]
        if context.get("result"):
            (prompt,) = context["result"][:1]
            at = [prompt["value"][name] + prompt["value"].get(side, 0) / 2 * ("rect" in prompt["type"])
                  for name, side in (("x", "width"), ("y", "height"))]  # fmt: skip
            clicked = [house for house in HOUSES_XYXY if box(*house).contains(Point(at[0] * 6.40, at[1] * 5.12))]
            assert [near(p, house) for p in outlines for house in clicked] == [True]
        else:
            assert [sum(near(p, house) for p in outlines) for house in HOUSES_XYXY] == [1, 1, 1, 1]
            assert len(outlines) == 4
        tags = {tag.from_name for tag in labelstudio.parse_config(recording["body"]["label_config"]).tags}
        assert {r["from_name"] for r in item["result"]} <= tags


@pytest.mark.parametrize("name", golden_requests.names("webhook_"))
def test_every_recorded_webhook_is_answered(client: FlaskClient, service: Service, name: str):
    recording = golden_requests.load(name)
    answer = post(client, "/webhook", recording["body"])
    assert answer.status_code == 201
    project = next(iter(service.jobs._folder.glob("*.ask.json")), None)
    counts = "annotation" in name and "skipped" not in name
    trains = "start_training" in name
    assert (project is not None) == (counts or trains)
    if project is not None:
        key = project.name.removesuffix(".ask.json")
        assert service.jobs.ask(key).at_once == trains
        assert key.startswith("7.")


@pytest.mark.parametrize("name", ["health", "setup", "setup_basic_auth", "versions"])
def test_recorded_control_requests_are_answered(client: FlaskClient, name: str):
    recording = golden_requests.load(name)
    answer = client.open(recording["path"], method=recording["method"], data=json.dumps(recording["body"]))
    assert answer.status_code == 200, answer.status
    body = answer.get_json()
    expected = {"health": ("status", "UP"), "versions": ("versions", ["bright-1"])}.get(
        name, ("model_version", "bright-1")
    )
    assert body[expected[0]] == expected[1]


# --- Predictions ---


def test_a_tile_that_cannot_be_read_costs_only_itself(client: FlaskClient, service: Service):
    broken = {"id": 2, "data": {"image": "data:image/png;base64,bm90IGFuIGltYWdl"}}
    answer = predict(client, house_task(1), broken, {"id": 3, "data": {}}, {"id": 4}, "nonsense", house_task(6))
    results = answer.get_json()["results"]
    assert [bool(item) for item in results] == [True, False, False, False, False, True]
    assert results[1] == []
    problems = " ".join(p.where + p.message for p in service.problems.recent())
    assert "task 2" in problems
    assert "task 3" in problems


def test_empty_ground_is_a_result_and_no_failure(client: FlaskClient):
    answer = predict(client, {"id": 1, "data": {"image": data_uri(bright_image())}})
    assert answer.get_json()["results"][0]["result"] == []


def test_labels_are_those_of_the_config(client: FlaskClient):
    results = predict(client, house_task()).get_json()["results"]
    assert [r["value"]["polygonlabels"] for r in results[0]["result"]] == [["Building"]]


def test_region_ids_depend_only_on_task_version_and_geometry(client: FlaskClient):
    first, second = (predict(client, house_task()).get_json()["results"][0]["result"][0]["id"] for _ in range(2))
    other = predict(client, house_task(2)).get_json()["results"][0]["result"][0]["id"]
    assert first == second != other


def test_what_is_left_when_time_is_up_is_asked_for_again(settings: Settings):
    hurried = Service(settings.model_copy(update={"predict_budget_s": 1e-6}), segmenter=BrightSegmenter())
    client = create_app(settings, hurried).test_client()
    hurried.predictor.wait(10)
    assert predict(client, house_task(1), house_task(2)).get_json()["results"] == [[], []]
    hurried.close()


def test_the_same_tile_asked_for_twice_at_once_is_computed_once(settings: Settings):
    go = threading.Event()
    segmenter = BrightSegmenter(wait_for=go)
    service = Service(settings, segmenter=segmenter)
    app = create_app(settings, service)
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(predict(app.test_client(), house_task()).get_json()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(30)
    service.close()
    assert segmenter.embedded == 1
    assert len(answers) == 3
    assert len({json.dumps(a["results"]) for a in answers}) == 1


def test_a_click_brings_the_object_under_it_where_it_lies(client: FlaskClient):
    click = {"type": "keypoint", "to_name": "image", "from_name": "click", "value": {"x": 30, "y": 40, "width": 0.3}}
    answer = predict(client, house_task(), context={"result": [click]})
    item = answer.get_json()["results"][0]
    (ring,) = rings_px(item, (256, 256))
    truth = Polygon([(50, 60), (110, 60), (110, 140), (50, 140)])
    assert Polygon(ring).intersection(truth).area / Polygon(ring).union(truth).area > 0.97
    assert item["result"][0]["value"]["polygonlabels"] == ["Building"]


def test_the_last_prompt_deleted_is_an_empty_answer(client: FlaskClient):
    assert predict(client, house_task(), context={"result": []}).get_json()["results"][0]["result"] == []


def test_a_click_beside_all_objects_is_an_empty_answer(client: FlaskClient):
    click = {"type": "keypoint", "to_name": "image", "from_name": "click", "value": {"x": 90, "y": 90, "width": 0.3}}
    assert predict(client, house_task(), context={"result": [click]}).get_json()["results"][0]["result"] == []


def test_an_interactive_request_that_fails_says_why_in_the_status_line(client: FlaskClient, service: Service):
    click = {"type": "keypoint", "to_name": "image", "from_name": "click", "value": {"x": "left", "y": 40}}
    answer = predict(client, house_task(), context={"result": [click]})
    assert answer.status.startswith("400 ")
    assert "value.x" in answer.status
    assert "value.x" in service.problems.recent()[0].message


@pytest.mark.parametrize("task", ["nonsense", None, {"id": 1}, {"id": 1, "data": {"image": 7}}])
def test_an_interactive_request_without_an_image_is_refused(client: FlaskClient, task: Any):
    click = {"type": "keypoint", "to_name": "image", "from_name": "click", "value": {"x": 30, "y": 40}}
    assert predict(client, task, context={"result": [click]}).status_code == 400


def test_results_pass_through_a_place_that_cannot_be_read(client: FlaskClient, service: Service):
    task = house_task()
    task["data"]["tile"] = {"window": [0, 0, 256, 256], "crs": "EPSG:999999", "transform": [1, 0, 0, 0, -1, 0]}
    assert len(predict(client, task).get_json()["results"][0]["result"]) == 1
    assert "EPSG:999999" in service.problems.recent()[0].message


# --- What goes wrong ---


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/setup", {"project": PROJECT, "schema": "<View><Image name='i' value='$i'/></View>"}, 422, "PolygonLabels"),
        ("/setup", {"project": PROJECT, "schema": "<View"}, 422, "not XML"),
        ("/setup", {"project": "../../etc", "schema": CONFIG}, 400, "project"),
        ("/setup", [], 400, "object"),
        ("/predict", {"tasks": "all"}, 400, "tasks"),
        ("/predict", {"tasks": [], "project": PROJECT}, 400, "label_config"),
        ("/predict", {"tasks": [], "project": PROJECT, "label_config": "<View/>"}, 422, "PolygonLabels"),
        ("/webhook", {"project": {"id": 1}}, 400, "action"),
        ("/webhook", {"action": "START_TRAINING", "project": {}}, 400, "project"),
        ("/webhook", {"action": "START_TRAINING", "project": {"id": 1, "created_at": "noon"}}, 400, "created_at"),
        ("/nowhere", {}, 404, ""),
    ],
)
def test_the_status_line_says_what_is_wrong(client: FlaskClient, path: str, body: Any, status: int, words: str):
    answer = post(client, path, body)
    assert answer.status_code == status
    assert words in answer.status
    assert words in answer.get_json()["error"]


def test_a_body_that_is_not_json_is_refused(client: FlaskClient):
    answer = client.post("/predict", data=b"{", content_type="application/json")
    assert answer.status.startswith("400 the body is not JSON")


def test_a_status_line_is_one_latin_1_line(client: FlaskClient):
    answer = post(client, "/setup", {"project": "Größe\r\nX-Evil: 1\n道", "schema": CONFIG})
    assert answer.status_code == 400
    answer.status.encode("latin-1")
    assert "\n" not in answer.status
    assert "X-Evil" not in answer.headers


def test_a_model_that_cannot_be_loaded_is_said_in_the_status_line(settings: Settings):
    service = Service(settings.model_copy(update={"segmenter": "sam_vit_b"}))
    client = create_app(settings, service).test_client()
    answer = post(client, "/setup", {"project": PROJECT, "schema": CONFIG})
    service.close()
    assert answer.status_code == 503
    assert "sam_vit_b" in answer.status
    assert client.get("/health").status_code == 200


# --- Access ---


def test_basic_auth_guards_all_but_health_and_tiles(settings: Settings):
    locked = settings.model_copy(update={"basic_auth_user": "u", "basic_auth_pass": SecretStr("p")})
    service = Service(locked, segmenter=BrightSegmenter())
    client = create_app(locked, service).test_client()
    body = {"project": PROJECT, "schema": CONFIG}
    assert client.get("/health").status_code == 200
    assert client.get("/tiles/valley/r0002_c0005.png", buffered=True).status_code == 200
    for method, path in (
        *(("GET", path) for path in ("/", "/status", "/metrics", "/versions")),
        *(("POST", path) for path in ("/setup", "/predict", "/webhook", "/train")),
    ):
        refused = client.open(path, method=method, json=body)
        assert refused.status_code == 401, path
        assert "WWW-Authenticate" in refused.headers
    assert post(client, "/setup", body, auth=("u", "wrong")).status_code == 401
    assert post(client, "/setup", body, auth=("u", "p")).status_code == 200
    service.close()


def test_a_webhook_needs_its_secret_or_the_password(settings: Settings):
    secret = Settings(webhook_secret="s3cret").webhook_secret
    locked = settings.model_copy(update={"webhook_secret": secret})
    service = Service(locked, segmenter=BrightSegmenter())
    service.jobs._start = lambda project: True  # type: ignore[method-assign]
    client = create_app(locked, service).test_client()
    body = {"action": "TASKS_CREATED", "project": {"id": 1}}
    assert post(client, "/webhook", body).status_code == 401
    assert post(client, "/webhook", body, headers={"X-GeoPrelabel-Secret": "wrong"}).status_code == 401
    assert post(client, "/webhook", body, headers={"X-GeoPrelabel-Secret": "s3cret"}).status_code == 201
    # Label Studio's button comes by the backend's connection, which knows no secret.
    assert post(client, "/webhook", {**body, "action": "START_TRAINING"}).status_code == 201
    service.close()


# --- Pages for people and monitors ---


def test_tiles_are_served_with_cors_and_nothing_else_is(client: FlaskClient, settings: Settings):
    (settings.data_dir / "secret.txt").write_text("x")
    answer = client.get("/tiles/valley/r0002_c0005.png", buffered=True)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    with client.get("/tiles/valley/r0002_c0005.png", headers={"If-None-Match": answer.headers["ETag"]}) as unchanged:
        assert unchanged.status_code == 304
    for path in (
        "/tiles/valley/none.png",
        "/tiles/..%2f/secret.txt",
        "/tiles/%2e%2e/secret.txt",
        "/tiles/valley/..%2f..%2fsecret.txt",
    ):
        assert client.get(path, follow_redirects=True).status_code == 404, path


def test_the_status_page_shows_problems_without_letting_them_in(client: FlaskClient, service: Service):
    service.problems.add("predict, task 1", "<script>alert(1)</script>")
    page = client.get("/", headers={"Accept": "text/html"}).get_data(as_text=True)
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert client.get("/status").get_json()["problems"][0]["where"] == "predict, task 1"
    assert "0123456789abcdef" not in page


def test_labels_that_nothing_knows_are_on_the_status_page(client: FlaskClient):
    assert post(client, "/setup", {"project": PROJECT, "schema": CONFIG}).status_code == 200
    assert client.get("/status").get_json()["untrained_labels"] == {PROJECT: ["Moon base"]}
    assert "Moon base" in client.get("/status", headers={"Accept": "text/html"}).get_data(as_text=True)


def test_metrics_count_tasks(client: FlaskClient):
    predict(client, house_task(), {"id": 2, "data": {}})
    text = client.get("/metrics").get_data(as_text=True)
    assert 'geoprelabel_tasks_total{kind="batch",outcome="done"} 1.0' in text
    assert 'geoprelabel_tasks_total{kind="batch",outcome="failed"} 1.0' in text


def test_the_tile_record_gives_the_answer_its_size():
    tile = Tile.from_xyz(19, 386690, 220241, size=(512, 512))
    again = Tile.from_task({"tile": tile.to_record()}, size=(1024, 1024))
    assert again is not None
    assert again.gsd_m == pytest.approx((tile.gsd_m or 0) / 2)
