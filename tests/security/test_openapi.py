"""The published description of the routes holds, and no body that fuzzers make from it ends in a 500."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis.checks import CheckContext
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from backend.openapi import document
from backend.server import create_app
from backend.service import Service
from backend.settings import Settings
from tests import golden_requests
from tests.fakes import BrightSegmenter

FUZZ_S = float(os.environ.get("GEOPRELABEL_FUZZ_S", "0"))
"""Seconds for each fuzzer; 0: the suite's small budget. `make fuzz` sets it."""

_MORE = max(1, round(FUZZ_S / 5))
fuzzing = hypothesis.settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=not FUZZ_S,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    settings = Settings(
        data_dir=folder, label_studio_url="", start_training_each_n_updates=10**9, image_max_megapixels=1
    )
    service = Service(settings, segmenter=BrightSegmenter())
    service.jobs._start = lambda project: True  # type: ignore[method-assign]
    yield service
    service.close()


@pytest.fixture(scope="module")
def app(service: Service) -> Flask:
    made = create_app(service.settings, service)
    service.predictor.wait(20)
    return made


@pytest.fixture(scope="module")
def described(app: Flask) -> Any:
    return schemathesis.openapi.from_wsgi("/openapi.json", app)


def test_every_route_is_described_and_no_other(app: Flask):
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    described = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert routes == described


def test_the_description_is_openapi_3_1(app: Flask, described: Any):
    assert app.test_client().get("/openapi.json").get_json() == document()
    described.validate()
    names = [route["operationId"] for routes in document()["paths"].values() for route in routes.values()]
    assert len(names) == len(set(names))


def no_500(ctx: CheckContext, response: Response, case: schemathesis.Case) -> None:
    assert response.status_code != 500, response.text


ROUTES = [(path, method) for path, methods in document()["paths"].items() for method in methods]


@pytest.mark.parametrize(("path", "method"), ROUTES)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_made_from_the_description_breaks_it(
    described: Any, path: str, method: str, mode: schemathesis.GenerationMode
):
    """With bodies that follow the description, and with such as do not."""
    strategy = described[path][method].as_strategy(generation_mode=mode)

    @hypothesis.settings(parent=fuzzing, max_examples=10 * _MORE)
    @given(case=strategy)
    def holds(case: schemathesis.Case) -> None:
        checks = [no_500, status_code_conformance, content_type_conformance, response_schema_conformance]
        if case.method.lower() != method:
            checks = [no_500]
        case.validate_response(case.call(), checks=checks)

    try:
        holds()
    except hypothesis.errors.Unsatisfiable:
        # A route without parameters has nothing that could be wrong.
        assert mode == schemathesis.GenerationMode.NEGATIVE


# --- Recorded requests with parts of them swapped for nonsense ---

NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from([1e308, -1e308, 1e-320, 2**31, 2**63, -(2**63), 0, -1]),
    st.text(st.characters(), max_size=20),
    st.sampled_from(
        ["", "\0", "\ud800", "../..", "data:image/png;base64,AAAA", "http://[", "EPSG:4326", "$image", "x" * 5000]
    ),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=4),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers(), max_size=3),
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places_in(item, (*path, key)))]


def swapped(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(body)
    changed[path[0]] = swapped(body[path[0]], path[1:], value)
    return changed


RECORDED = {
    name: golden_requests.load(name)
    for kind in ("predict_", "interactive_", "webhook_", "setup")
    for name in golden_requests.names(kind)
}


@hypothesis.settings(parent=fuzzing, max_examples=250 * _MORE)
@given(data=st.data())
def test_recorded_requests_with_nonsense_in_them_are_answered(app: Flask, service: Service, data: st.DataObject):
    recording = RECORDED[data.draw(st.sampled_from(sorted(RECORDED)))]
    body = recording["body"]
    if recording["path"].startswith("/predict"):
        body = {**body, "tasks": body["tasks"][:1]}
        for task in body["tasks"]:
            if isinstance(task, dict) and isinstance(task.get("data"), dict):
                task["data"]["image"] = SMALL
    for _ in range(data.draw(st.integers(1, 3))):
        places = places_in(body)
        body = swapped(body, data.draw(st.sampled_from(places)), data.draw(NASTY))
    text = json.dumps(body).replace("Infinity", "1e999").replace("NaN", "null")
    answer = app.test_client().open(
        recording["path"], method=recording["method"], data=text, content_type="application/json"
    )
    assert answer.status_code != 500, answer.data
    if answer.is_json:
        json.loads(answer.data, parse_constant=lambda constant: pytest.fail(f"{constant} in the answer"))
    unexpected = [problem for problem in service.problems.recent() if problem.message.startswith("unexpected")]
    assert unexpected == []


JSON = st.recursive(
    NASTY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@hypothesis.settings(parent=fuzzing, max_examples=60 * _MORE)
@given(body=JSON, path=st.sampled_from(["/predict", "/setup", "/webhook", "/train", "/versions"]))
def test_any_json_is_answered(app: Flask, body: Any, path: str):
    text = json.dumps(body).replace("Infinity", "1e999")
    assert app.test_client().post(path, data=text, content_type="application/json").status_code != 500


@hypothesis.settings(parent=fuzzing, max_examples=60 * _MORE)
@given(content=st.binary(max_size=300), path=st.sampled_from(["/predict", "/setup", "/webhook", "/train", "/versions"]))
def test_any_bytes_are_answered(app: Flask, content: bytes, path: str):
    assert app.test_client().post(path, data=content, content_type="application/json").status_code in (200, 400)


SMALL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR4nGOUk5NjIAUwkaR6VMOohiGlAQBHCwB6RULh+AAAAABJRU5ErkJggg=="
)
