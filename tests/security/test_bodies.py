"""Bodies that are no JSON, too much of it, or nonsense in its shape; each sent to the real server."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from .conftest import CLICK, CONFIG, PATIENCE_S, PNG_URL, PROJECT, Backend

POSTS = ("/predict", "/setup", "/webhook", "/train", "/versions")

NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"tasks": [',
    "100,000 arrays deep": b"[" * 100_000,
    "100,000 arrays deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep behind a text that closes": b'["' + b"]" * 5000 + b'",' + b"[" * 5000 + b"]" * 5001,
    "deep behind an escaped quote": b'["\\"' + b"]" * 5000 + b'",' + b"[" * 5000 + b"]" * 5001,
    "NaN": b'{"tasks": [NaN]}',
    "Infinity": b'{"tasks": [-Infinity]}',
    "a number of 5,000 digits": b'{"project": ' + b"9" * 5000 + b"}",
    "a number of a million digits": b'{"project": ' + b"9" * 1_000_000 + b"}",
    "not UTF-8": b'{"project": "\xff\xfe"}',
    "UTF-16": '{"project": "1"}'.encode("utf-16"),
    "a half character as bytes": b'{"project": "\xed\xa0\x80"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "YAML": b"!!python/object/apply:os.system ['true']",
    "XML": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
    "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "a form": b"project=1&schema=2",
    "single quotes": b"{'project': 1}",
    "a comment": b'{"project": 1} // 2',
    "two values": b"{}{}",
    "quotes without end": b'"' + b'\\"' * 200_000,
    "a NUL": b'{"project": "1"\0}',
}
WRONG: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "a text": "tasks",
    "a list": [],
    "true": True,
    "a list of lists": [[[]]],
    "an object of nothing it knows": {"__proto__": {"a": 1}, "constructor": 1},
}


@pytest.mark.parametrize("name", NO_JSON)
@pytest.mark.parametrize("path", POSTS)
def test_what_is_no_json_is_refused(backend: Backend, path: str, name: str):
    before_s = time.monotonic()
    answer = backend.ask("POST", path, NO_JSON[name])
    assert answer.status in (200, 400) if path == "/versions" and not NO_JSON[name] else answer.status == 400, (
        answer.body
    )
    assert len(answer.body) < 1000
    assert time.monotonic() - before_s < PATIENCE_S


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("path", POSTS)
def test_json_of_another_shape_is_refused(backend: Backend, path: str, name: str):
    answer = backend.ask("POST", path, json.dumps(WRONG[name]).encode())
    assert answer.status in (
        (200, 400) if path in ("/versions", "/setup") else (201, 400) if path == "/train" else (400,)
    )


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(backend: Backend, path: str):
    size = 300 * 2**20 if path in ("/predict", "/webhook") else 9 * 2**20
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    assert b" 413 " in backend.raw(head.encode() + b"{", timeout_s=3)


PROJECTS = (
    "../../etc",
    "..",
    "/etc/passwd",
    "1/../2",
    "a\0b",
    "-rf",
    "*",
    "1;DROP TABLE project",
    "1' OR '1'='1",
    "%2e%2e",
    "x" * 65,
    "x" * 10**6,
    "é",
    "\ud800",
    "\u202e1",
    "\n",
    " ",
    ".hidden",
    "_",
    "${jndi:ldap://a}",
    "{{7*7}}",
    "<script>",
    1.5,
    -1,
    10**400,
    1e400,
    True,
    [],
    {},
    {"id": "../.."},
    {"id": True, "created_at": "x"},
    {"id": 10**30},
    {"id": 1, "created_at": "9999999-01-01"},
    {"id": 1, "created_at": "\0"},
    {"id": 1, "created_at": "0001-01-01T00:00:00+23:59"},
    {"id": -5, "created_at": None},
)


@pytest.mark.parametrize("number", range(len(PROJECTS)))
def test_no_project_names_a_file_or_breaks_a_route(backend: Backend, number: int):
    project = PROJECTS[number]
    data = backend.folder / "data"
    bodies = {
        "/setup": {"project": project, "schema": CONFIG},
        "/predict": {"tasks": [{"id": 1, "data": {"image": PNG_URL}}], "project": project, "label_config": CONFIG},
        "/webhook": {"action": "START_TRAINING", "project": project},
        "/train": {"project": project},
        "/versions": {"project": project},
    }
    for path, body in bodies.items():
        answer = backend.ask("POST", path, body)
        assert answer.status in (200, 201, 400), (path, answer.body)
    created = {
        "action": "ANNOTATION_CREATED",
        "project": project,
        "task": {"id": 1, "data": {}},
        "annotation": {"id": 1, "task": 1, "result": []},
    }
    assert backend.ask("POST", "/webhook", created).status in (201, 400)
    strays = [path for path in backend.folder.rglob("*") if not path.is_relative_to(data) and "passwd" in path.name]
    assert strays == []
    assert {path.parent for path in data.rglob("*.ask.json")} <= {data / "jobs"}


VERSIONS = (
    "../../secrets/secret.png",
    "/etc/passwd",
    "..",
    ".",
    "a\0b",
    "x" * 10**5,
    "\ud800",
    "%2e%2e%2f",
    "heads.safetensors",
    "champion",
    "models:/geoprelabel-project-1/1",
    "file:///etc/passwd",
    "s3://bucket/model",
    "1' OR '1'='1",
    "<script>",
    "\r\nX-Evil: 1",
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", ["model_version", "params"])
def test_no_model_version_names_a_file(backend: Backend, place: str, version: str):
    body = {"tasks": [{"id": 1, "data": {"image": PNG_URL}}], "project": PROJECT, "label_config": CONFIG}
    body |= {"model_version": version} if place == "model_version" else {"params": {"model_version": version}}
    answer = backend.ask("POST", "/predict", body)
    assert answer.status == 404
    assert len(answer.body) < 1000
    assert "X-Evil" not in answer.headers


@pytest.mark.parametrize("version", [7, 1.5, True, [], {}, ["a"], {"a": 1}])
def test_a_model_version_is_a_text(backend: Backend, version: Any):
    body = {"tasks": [], "project": PROJECT, "label_config": CONFIG, "model_version": version}
    assert backend.ask("POST", "/predict", body).status in ((400,) if version else (200, 400))


TASKS: dict[str, Any] = {
    "null": None,
    "a number": 7,
    "a text": "x",
    "a list": [1],
    "true": True,
    "no data": {"id": 1},
    "data is a list": {"id": 1, "data": []},
    "data is a text": {"id": 1, "data": "image"},
    "an image that is a number": {"id": 1, "data": {"image": 1e400}},
    "an image that is a list": {"id": 1, "data": {"image": [PNG_URL]}},
    "an image that is an object": {"id": 1, "data": {"image": {"url": "a"}}},
    "an image of 10 million characters": {"id": 1, "data": {"image": "http://" + "a" * 10_000_000}},
    "an image with half a character": {"id": 1, "data": {"image": "http://a\ud800/"}},
    "a NUL": {"id": 1, "data": {"image": "\0"}},
    "data 90 levels deep": {"id": 1, "data": json.loads('{"a":' * 90 + "1" + "}" * 90)},
    "an id that is infinite": {"id": 1e400, "data": {"image": PNG_URL}},
    "an id that is an object": {"id": {"a": []}, "data": {"image": PNG_URL}},
    "an id of 4,000 digits": {"id": 10**4000, "data": {"image": PNG_URL}},
    "drafts that are a text": {"id": 1, "data": {"image": PNG_URL}, "drafts": "x"},
    "annotations that are numbers": {
        "id": 1,
        "data": {"image": PNG_URL},
        "annotations": [1, None, {"result": 7}],
        "predictions": {"a": 1},
    },
    "svg in a data address": {"id": 1, "data": {"image": "data:image/svg+xml;base64,PHN2Zy8+"}},
    "a data address without end": {"id": 1, "data": {"image": "data:image/png;base64," + "A" * 7_000_000}},
    "percent signs without end": {"id": 1, "data": {"image": "data:image/png;base64," + "%" * 1_000_000}},
    "parameters without end": {"id": 1, "data": {"image": "data:image/png" + ";a=b" * 100_000 + ";base64,AAAA"}},
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_is_nonsense_costs_only_itself(backend: Backend, name: str):
    good = {"id": 2, "data": {"image": PNG_URL}}
    body = {"tasks": [TASKS[name], good], "project": PROJECT, "label_config": CONFIG}
    before_s = time.monotonic()
    answer = backend.ask("POST", "/predict", body)
    assert answer.status == 200
    assert answer.json["results"][1] != []
    answer = backend.ask(
        "POST", "/predict", {**body, "tasks": [TASKS[name]], "params": {"context": {"result": [CLICK]}}}
    )
    assert answer.status in (200, 400, 403, 422), answer.body
    assert time.monotonic() - before_s < PATIENCE_S


WINDOW = [0, 0, 64, 64]
UTM = [0.5, 0, 300000, 0, -0.5, 3000000]
AXES_WKT = 'CS[ellipsoidal,2],AXIS["lat",north],AXIS["lon",east],ANGLEUNIT["degree",0.0174532925199433]'
ELLIPSOID_WKT = 'ELLIPSOID["WGS 84",6378137,298.257223563]'
GRID_WKT = (
    f'BOUNDCRS[SOURCECRS[GEOGCRS["a",DATUM["d",{ELLIPSOID_WKT}],{AXES_WKT}]],'
    f'TARGETCRS[GEOGCRS["WGS 84",DATUM["World Geodetic System 1984",{ELLIPSOID_WKT}],{AXES_WKT}]],'
    'ABRIDGEDTRANSFORMATION["t",METHOD["NTv2",ID["EPSG",9615]],'
    'PARAMETERFILE["Latitude and longitude difference file","/etc/passwd"]]]'
)
PROJ4_WKT = (
    'GEOGCS["a",DATUM["d",SPHEROID["WGS 84",6378137,298.257223563],EXTENSION["PROJ4_GRIDS","/etc/passwd"]],'
    'PRIMEM["G",0],UNIT["degree",0.0174532925199433]]'
)
PLACES: dict[str, Any] = {
    "null": None,
    "a text": "tile",
    "a list": [1, 2],
    "empty": {},
    "true": True,
    "a transform of ones": {"window": WINDOW, "crs": "EPSG:32645", "transform": [1, 1, 1, 1, 1, 1]},
    "a transform of 1e308": {"window": WINDOW, "crs": "EPSG:32645", "transform": [1e308] * 6},
    "an infinite transform": {"window": WINDOW, "crs": "EPSG:32645", "transform": [1e400, 0, 0, 0, -1e400, 0]},
    "a transform of 1e-320": {"window": WINDOW, "crs": "EPSG:32645", "transform": [1e-320, 0, 0, 0, -1e-320, 0]},
    "a transform of a million numbers": {"window": WINDOW, "crs": "EPSG:32645", "transform": [1] * 1_000_000},
    "a transform of objects": {"window": WINDOW, "crs": "EPSG:32645", "transform": [{}] * 6},
    "a transform of huge numbers": {"window": WINDOW, "crs": "EPSG:32645", "transform": [10**400] * 6},
    "a window without end": {"window": [0, 0, 10**400, 10**400], "crs": "EPSG:32645", "transform": UTM},
    "a window of 1e308": {"window": [0, 0, 1e308, 1e308], "crs": "EPSG:32645", "transform": UTM},
    "a negative window": {"window": [0, 0, -64, -64], "crs": "EPSG:32645", "transform": UTM},
    "an infinite size": {"size": [1e400, 1e400], "crs": "EPSG:32645", "transform": UTM},
    "a core without end": {"window": WINDOW, "core": [10**400] * 4, "crs": "EPSG:32645", "transform": UTM},
    "a tiny pixel": {"window": WINDOW, "crs": "EPSG:32645", "transform": UTM, "gsd_m": 1e-300},
    "a huge pixel": {"window": WINDOW, "crs": "EPSG:32645", "transform": UTM, "gsd_m": 1e300},
    "a negative pixel": {"window": WINDOW, "crs": "EPSG:32645", "transform": UTM, "gsd_m": -1},
    "a pixel that is a text": {"window": WINDOW, "crs": "EPSG:32645", "transform": UTM, "gsd_m": "../.."},
    "a pole": {"window": WINDOW, "crs": "EPSG:4326", "transform": [1, 0, 179, 0, -1, 91]},
    "a scene that is a path": {
        "window": WINDOW,
        "scene": "../../etc/passwd",
        "source": {"path": "/etc/passwd", "sha256": "0"},
    },
    "a source that is a path": {"window": WINDOW, "source": "/etc/passwd", "stretch": "x"},
    **{
        f"the crs {crs[:40]!r}": {"window": WINDOW, "crs": crs, "transform": UTM}
        for crs in (
            "/etc/passwd",
            "file:///etc/passwd",
            "@/etc/passwd",
            "+init=epsg:4326",
            "+init=/etc/passwd:x",
            "init=epsg:4326",
            "+proj=longlat +nadgrids=/etc/passwd",
            "+proj=longlat +geoidgrids=/etc/passwd",
            "+proj=utm +zone=45",
            "+proj=pipeline +step +proj=hgridshift +grids=/etc/passwd",
            "+proj=pipeline +step +proj=deformation +grids=/dev/zero",
            "http://169.254.169.254/crs",
            "https://example.org/crs.wkt",
            "urn:ogc:def:crs:EPSG::4326",
            "EPSG:999999",
            "EPSG:4326\0",
            "EPSG:4326\n",
            "IAU_2015:30100",
            "PROJ:x",
            "a" * 30_000,
            "GEOGCRS[" * 2000,
            'GEOGCRS["' + "a" * 19_000,
            "GEOGCRS[]",
            GRID_WKT,
            PROJ4_WKT,
            GRID_WKT.replace("/etc/passwd", "http://169.254.169.254/grid"),
            "\ud800",
            "{{7*7}}",
            "",
        )
    },
    "a crs that is a number": {"window": WINDOW, "crs": 4326, "transform": UTM},
    "a crs that is an object": {
        "window": WINDOW,
        "crs": {"type": "GeographicCRS", "$schema": "http://169.254.169.254/"},
        "transform": UTM,
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_is_nonsense_costs_only_the_place(backend: Backend, name: str):
    task = {"id": 1, "data": {"image": PNG_URL, "tile": PLACES[name]}}
    for context in (None, {"result": [CLICK]}):
        body = {"tasks": [task], "project": PROJECT, "label_config": CONFIG, "params": {"context": context}}
        before_s = time.monotonic()
        answer = backend.ask("POST", "/predict", body)
        assert answer.status == 200, answer.body
        assert answer.json["results"] != [[]]
        assert time.monotonic() - before_s < PATIENCE_S


def test_no_crs_makes_proj_open_a_file():
    from backend.errors import BadTile
    from backend.tile import checked_crs

    names = ("crs '+", "crs '/", "crs 'BOUND", "crs 'GEOGCS", "crs 'file", "crs '@", "crs 'http", "crs 'init")
    hostile = [place["crs"] for name, place in PLACES.items() if any(part in name for part in names)]
    assert len(hostile) >= 14
    for crs in hostile:
        with pytest.raises(BadTile):
            checked_crs(crs)


VALUES: dict[str, Any] = {
    "nothing": {},
    "a text": "x",
    "null": None,
    "a list": [],
    "infinite": {"x": 1e400, "y": 1},
    "huge": {"x": 10**400, "y": 1},
    "far away": {"x": 1e308, "y": -1e308},
    "texts": {"x": "1", "y": "2"},
    "lists": {"x": [1], "y": [2]},
    "true": {"x": True, "y": False},
    "a box without end": {"x": 0, "y": 0, "width": 1e308, "height": 1e308, "rotation": 1e308},
    "an infinite box": {"x": 0, "y": 0, "width": 1e400, "height": 1e400, "rotation": 1e400},
    "a negative box": {"x": 50, "y": 50, "width": -10, "height": -10, "rotation": 7},
    "an rle that says 2^32 values": {"format": "rle", "rle": [255, 255, 255, 255, 56, 0, 0, 0]},
    "an rle of too many bytes": {"format": "rle", "rle": [0] * 1_000_001},
    "an rle of nothing": {"format": "rle", "rle": []},
    "an rle of large numbers": {"format": "rle", "rle": [256, -1, 10**30]},
    "an rle of texts": {"format": "rle", "rle": ["a"]},
    "an rle that ends": {"format": "rle", "rle": [0, 0, 64, 0, 57, 77]},
    "an rle that is a text": {"format": "rle", "rle": "AAAA"},
    "an rle of 100,000 ones": {"format": "rle", "rle": [255] * 100_000},
    "100,000 points": {"points": [[n % 100, n % 97] for n in range(100_000)]},
}


@pytest.mark.parametrize("kind", ["keypoint", "rectangle", "brush"])
@pytest.mark.parametrize("name", VALUES)
def test_a_prompt_that_is_nonsense_is_refused_or_answered(backend: Backend, name: str, kind: str):
    tool = {"keypoint": "click", "rectangle": "box", "brush": "brush"}[kind]
    for side in (64, 10**9, -1, 1e400, "64", None):
        prompt = {
            "id": "p",
            "type": kind,
            "from_name": tool,
            "to_name": "image",
            "value": VALUES[name],
            "original_width": side,
            "original_height": side,
        }
        task = {"id": 1, "data": {"image": PNG_URL}}
        body = {
            "tasks": [task],
            "project": PROJECT,
            "label_config": CONFIG,
            "params": {"context": {"result": [prompt]}},
        }
        before_s = time.monotonic()
        answer = backend.ask("POST", "/predict", body)
        assert answer.status in (200, 400), answer.body
        assert time.monotonic() - before_s < PATIENCE_S


@pytest.mark.parametrize(
    "context",
    [
        [],
        "x",
        7,
        {"result": "x"},
        {"result": [1]},
        {"result": [None]},
        {"result": {}},
        {"event": "../.."},
        {"type": ["capabilities"]},
        {"result": [{}]},
        {"result": [{"type": 7}]},
        {"result": [{"type": "keypoint", "value": {"x": 1, "y": 1}, "to_name": []}]},
        {"result": [CLICK] * 20_000},
        {"event": {"a": 1}},
        {"result": [{**CLICK, "id": {"a": 1}}]},
        {"result": [{**CLICK, "id": "\ud800"}]},
    ],
    ids=range(16),
)
def test_a_context_that_is_nonsense_is_refused_or_answered(backend: Backend, context: Any):
    body = {"tasks": [{"id": 1, "data": {"image": PNG_URL}}], "project": PROJECT, "label_config": CONFIG}
    answer = backend.ask("POST", "/predict", {**body, "params": {"context": context}})
    assert answer.status in (200, 400), answer.body


REGIONS: dict[str, Any] = {
    "a polygon of 100,000 points": {
        "type": "polygonlabels",
        "value": {"points": [[n % 101, n * 7 % 103] for n in range(100_000)], "polygonlabels": ["Building"]},
    },
    "a polygon of infinities": {"type": "polygonlabels", "value": {"points": [[1e400, 0], [0, 1e400], [1, 1]]}},
    "a brush that says 2^32 values": {
        "type": "brushlabels",
        "value": {"format": "rle", "rle": [255] * 40},
        "original_width": 50_000,
        "original_height": 50_000,
    },
    "a bitmask of 2^31 pixels": {
        "type": "bitmasklabels",
        "value": {"imageDataURL": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUn////9/////CAYAAAA="},
    },
    "a bitmask that is an address": {"type": "bitmasklabels", "value": {"imageDataURL": "http://169.254.169.254/"}},
    "points within points": {"type": "polygonlabels", "value": {"points": [[[[[[1]]]]]] * 9}},
    "10,000 regions": None,
}


@pytest.mark.parametrize("name", REGIONS)
def test_an_annotation_that_is_nonsense_is_taken_at_once_and_checked_in_time(backend: Backend, name: str):
    region = {"id": "r", "from_name": "polygon", "to_name": "image", "original_width": 64, "original_height": 64}
    small = {"type": "polygonlabels", "value": {"points": [[1, 1], [2, 1], [2, 2]], "polygonlabels": ["Building"]}}
    many = [{**region, **small, "id": f"r{n}"} for n in range(10_000)]
    result = many if REGIONS[name] is None else [{**region, **REGIONS[name]}]
    event = {
        "action": "ANNOTATION_CREATED",
        "project": {"id": 9, "label_config": CONFIG},
        "task": {"id": 1, "data": {"image": PNG_URL}},
        "annotation": {"id": abs(hash(name)) % 10**9, "task": 1, "result": result},
    }
    before_s = time.monotonic()
    assert backend.ask("POST", "/webhook", event).status == 201
    while backend.ask("GET", "/status").json["checks_waiting"]:
        assert time.monotonic() - before_s < PATIENCE_S
        time.sleep(0.1)
    assert "unexpected" not in json.dumps(backend.ask("GET", "/status").json["problems"])


BOMB = (
    "<!DOCTYPE lolz [<!ENTITY l 'lol'>"
    + "".join(f"<!ENTITY l{n} '&l{n - 1 or ''};&l{n - 1 or ''};'>" for n in range(1, 30))
    + "]>"
)
LABELS = '<PolygonLabels name="polygon" toName="image"><Label value="A"/></PolygonLabels>'
TAGS = f'<Image name="image" value="$image"/>{LABELS}'
CONFIGS: dict[str, Any] = {
    "billion laughs": f"{BOMB}<View>&l29;{TAGS}</View>",
    "an entity of a file": f"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><View>&b;{TAGS}</View>",
    "an entity of an address": "<!DOCTYPE a [<!ENTITY b SYSTEM 'http://127.0.0.1:{port}/b'>]><View>&b;"
    + TAGS
    + "</View>",
    "an outer document type": "<!DOCTYPE a SYSTEM 'http://127.0.0.1:{port}/a.dtd'><View>" + TAGS + "</View>",
    "a parameter entity": "<!DOCTYPE a [<!ENTITY % b SYSTEM 'http://127.0.0.1:{port}/b'> %b;]><View>"
    + TAGS
    + "</View>",
    "a document type": f"<!DOCTYPE View><View>{TAGS}</View>",
    "quadratic blowup": "<!DOCTYPE a [<!ENTITY b '" + "b" * 50_000 + "'>]><View>" + "&b;" * 30_000 + "</View>",
    "50,000 levels": "<View>" * 50_000 + TAGS + "</View>" * 50_000,
    "20,000 levels": "<a>" * 20_000 + TAGS + "</a>" * 20_000,
    "too long": "<View>" + TAGS + " " * 300_000 + "</View>",
    "20 MB": "<View>" + TAGS + " " * 20_000_000 + "</View>",
    "100,000 attributes": "<View " + " ".join(f'a{n}="1"' for n in range(15_000)) + f">{TAGS}",
    "not XML": "View: {PolygonLabels: yes}",
    "nothing": "   ",
    "a half character": f"<View>{TAGS}\ud800</View>",
    "a NUL": f"<View>{TAGS}\0</View>",
    "another encoding": f"<?xml version='1.0' encoding='utf-7'?><View>{TAGS}</View>",
    "no such encoding": f"<?xml version='1.0' encoding='x-evil'?><View>{TAGS}</View>",
    "an inclusion": "<View xmlns:xi='http://www.w3.org/2001/XInclude'><xi:include href='file:///etc/passwd'/></View>",
    "a style sheet": "<?xml-stylesheet href='http://127.0.0.1:{port}/a.xsl'?><View></View>",
    "an unclosed tag": f"<View>{TAGS}",
    "two roots": f"<View>{TAGS}</View><View/>",
    "a header in a name": f'<View><Image name="image" value="x"/>{LABELS}</View>'.replace(
        '"polygon"', '"a&#13;&#10;X-Evil: 1"'
    ),
    "a threshold that is none": f"<View>{TAGS}</View>".replace(
        'name="polygon"', 'name="polygon" score_threshold="nan"'
    ),
    "a number": 7,
    "a list": [TAGS],
    "an object": {"a": 1},
    "true": True,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_label_config_that_is_an_attack_is_refused(backend: Backend, name: str):
    config = CONFIGS[name]
    if isinstance(config, str):
        config = config.replace("{port}", str(backend.bait.port))
    before_s = time.monotonic()
    harmless = name in ("20,000 levels", "a half character", "another encoding", "no such encoding")
    for path, body in (
        ("/predict", {"tasks": [{"id": 1, "data": {"image": PNG_URL}}], "project": PROJECT, "label_config": config}),
        ("/setup", {"project": PROJECT, "schema": config}),
    ):
        answer = backend.ask("POST", path, body)
        is_harmless = harmless or (path == "/setup" and (name == "nothing" or not isinstance(config, str)))
        allowed = (200, 400, 413, 422) if is_harmless else (400, 413, 422)
        assert answer.status in allowed, answer.body
        assert "X-Evil" not in answer.headers
        assert len(answer.body) < 1000
    assert time.monotonic() - before_s < PATIENCE_S
