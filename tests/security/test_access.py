"""Who gets in: passwords, the webhook's secret, guessing, and HTTP as it should not be spoken."""

from __future__ import annotations

import base64
import json
import socket
import threading

import pytest

from backend.access import GUESS_EVERY_S, GUESSES, KNOWN_FOR_S, Guesses
from backend.openapi import document

from .conftest import CONFIG, PASSWORD, PNG, PNG_URL, PROJECT, SECRET, Backend

GUARDED = (
    ("GET", "/"),
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("GET", "/versions"),
    ("POST", "/versions"),
    ("GET", "/openapi.json"),
    ("POST", "/setup"),
    ("POST", "/predict"),
    ("POST", "/webhook"),
    ("POST", "/train"),
)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


RIGHT = {"Authorization": basic("geo", PASSWORD)}


def test_the_list_of_guarded_routes_is_whole():
    described = {(method.upper(), path) for path, routes in document()["paths"].items() for method in routes}
    assert described - set(GUARDED) == {("GET", "/health"), ("GET", "/tiles/{scene}/{tile}")}


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "headers", [{}, {"Cookie": "session=1"}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Original-URL": "/health"}]
)
def test_no_guarded_route_is_open(locked: Backend, method: str, path: str, headers: dict[str, str]):
    answer = locked.ask(method, path, {} if method == "POST" else None, headers)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert "geoprelabel_" not in answer.body.decode()


@pytest.mark.parametrize(
    "path",
    [
        "//status",
        "/./status",
        "/health/../status",
        "/health/..%2fstatus",
        "/STATUS",
        "/status/",
        "/status;health",
        "/status%00",
        "/%73tatus",
        "/tiles/../status",
        "/tiles/a/../../status",
        "/tiles/a/b?endpoint=status",
        "/metrics?x=/health",
        "/metrics#/health",
        "http://a/status",
        "//health/status",
        "/health%2f..%2fmetrics",
        "/health?/../metrics",
        "/.well-known/../metrics",
    ],
)
def test_no_spelling_of_a_path_opens_a_route(locked: Backend, path: str):
    answer = locked.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split(b" ")[1]) in (308, 400, 401, 404) or b'"status": "UP"' in answer
    assert b"geoprelabel_" not in answer
    assert b'"segmenter"' not in answer


AUTHORIZATIONS = (
    "",
    "Basic",
    "Basic ",
    "Basic " + "=" * 40,
    "Basic !!!!",
    "Basic Og==",
    "Basic " + base64.b64encode(b"geo").decode(),
    "Basic " + base64.b64encode(b"geo:").decode(),
    "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(),
    "Bearer " + PASSWORD,
    "Token " + PASSWORD,
    "Digest username=geo",
    "basic",
    "Negotiate AAAA",
    "Basic " + "A" * 8000,
    PASSWORD,
)


def test_no_header_but_the_right_one_opens_a_route_and_guessing_is_slowed_for_all_processes(locked: Backend):
    # From this machine's other addresses: each address has its own count.
    refusals = [
        ask_from(locked, f"127.0.{n // 8}.{n % 8 + 2}", f"Authorization: {header}")
        for n, header in enumerate(AUTHORIZATIONS)
    ]
    assert {answer.split(b" ")[1] for answer in refusals} <= {b"401", b"400"}

    def guess(address: str, password: str) -> bytes:
        return ask_from(locked, address, f"Authorization: {basic('geo', password)}").split(b" ")[1]

    found = [guess("127.0.9.9", f"guess{n}") for n in range(3 * GUESSES)]
    assert found.count(b"401") in range(GUESSES, GUESSES + 4)
    assert found[-1] == b"429"
    slowed = ask_from(locked, "127.0.9.9", f"Authorization: {basic('geo', 'guess')}")
    wait_s = int(slowed.lower().partition(b"retry-after: ")[2].split(b"\r\n")[0])
    assert 1 <= wait_s <= 2 * GUESSES * GUESS_EVERY_S
    # The right guess does not get in from there now, and everybody else does.
    assert guess("127.0.9.9", PASSWORD) == b"429"
    assert guess("127.0.9.10", PASSWORD) == b"200"
    # An address that Label Studio is known at is not locked out by who else asks from there.
    assert [guess("127.0.9.10", "wrong") for _ in range(2 * GUESSES)] == [b"401"] * 2 * GUESSES
    assert guess("127.0.9.10", PASSWORD) == b"200"


def ask_from(backend: Backend, address: str, header: str, path: str = "/status") -> bytes:
    with socket.socket() as wire:
        wire.bind((address, 0))
        wire.settimeout(20)
        wire.connect(("127.0.0.1", backend.port))
        wire.sendall(
            f"GET {path} HTTP/1.1\r\nHost: a\r\n{header}\r\nConnection: close\r\n\r\n".encode("latin-1", "replace")
        )
        got = b""
        while part := wire.recv(65536):
            got += part
        return got


@pytest.mark.parametrize("name", ["X-GeoPrelabel-Secret", "x-geoprelabel-secret"])
@pytest.mark.parametrize(
    ("secret", "status"),
    [
        (SECRET, 201),
        (SECRET[:-1], 401),
        (SECRET + "x", 401),
        ("", 401),
        (f" {SECRET} ", 201),
        ("é", 401),
        (f"{SECRET}, {SECRET}", 401),
    ],
)
def test_a_webhook_comes_in_with_its_secret_alone(locked: Backend, name: str, secret: str, status: int):
    body = {"action": "TASKS_CREATED", "project": {"id": 1}}
    if status == 401:
        locked.ask("GET", "/status", headers=RIGHT)  # this address is known, so that it is not locked out
    assert locked.ask("POST", "/webhook", body, {name: secret.encode().decode("latin-1")}).status == status
    assert locked.ask("POST", "/webhook", body, RIGHT).status == 201


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 10_000,
        b'{"action": "START_TRAINING"}',
        b'{"action": ["START_TRAINING"], "project": {"id": 1}}',
    ],
)
def test_start_training_is_no_way_in_where_there_is_a_password(locked: Backend, body: bytes):
    assert locked.ask("POST", "/webhook", body).status == 401
    assert locked.ask("POST", "/train", body).status == 401


def test_the_secret_of_webhooks_opens_nothing_else(locked: Backend):
    for method, path in GUARDED:
        if path != "/webhook":
            assert locked.ask(method, path, {}, {"X-GeoPrelabel-Secret": SECRET}).status == 401
    locked.ask("GET", "/status", headers=RIGHT)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "get", "FOO", "POST"])
@pytest.mark.parametrize("path", ["/health", "/status", "/metrics", "/predict", "/tiles/scene/a.png", "/openapi.json"])
def test_other_methods_are_refused(backend: Backend, method: str, path: str):
    answer = backend.raw(
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    )
    status = int(answer.split(b" ")[1])
    assert status in (400, 405, 501), answer
    assert b"/etc" not in answer
    if status == 405:
        assert b"\r\nallow: " in answer.lower()


@pytest.mark.parametrize(
    "header", ["X-HTTP-Method-Override: DELETE", "X-Method-Override: GET", "_method: GET", "X-Original-Method: GET"]
)
def test_no_header_changes_the_method(locked: Backend, header: str):
    answer = locked.raw(
        f"POST /predict HTTP/1.1\r\nHost: a\r\n{header}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode()
    )
    assert b" 401 " in answer


HOSTS = (
    "",
    "a",
    "evil.example.org",
    "evil.example.org:99999",
    "a\tb",
    "a/b",
    "a@b",
    "[::1",
    "127.0.0.1\0",
    "a, b",
    "${jndi:ldap://a}",
    "é",
    "x" * 5000,
)


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_header_changes_nothing(backend: Backend, host: str):
    answer = backend.raw(f"GET /status HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split(b" ")[1]) in (200, 400), answer
    assert b"evil.example.org" not in answer


SMUGGLED = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
REQUESTS = (
    f"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
    f"POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n{SMUGGLED}",
    "POST /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0;a\r\nX: y\r\n\r\n",
    "GET /health HTTP/1.1\r\nHost: a\r\nX: a\r\n Content-Length: 9\r\n\r\n",
    "GET /health HTTP/1.1\r\nHost: a\r\nX: a\rX-GeoPrelabel-Secret: b\r\n\r\n",
    "GET /health HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    f"GET /health HTTP/1.1\r\nHost: a\r\nX_GeoPrelabel_Secret: {SECRET}\r\n\r\n",
    "GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
    "GET /health\r\n\r\n",
    "GET  /health HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /" + "a" * 10_000 + " HTTP/1.1\r\nHost: a\r\n\r\n",
    "GET /health HTTP/1.1\r\nHost: a\r\n" + "".join(f"X-{n}: y\r\n" for n in range(500)) + "\r\n",
    "GET /health HTTP/1.1\r\nHost: a\r\nX: " + "y" * 100_000 + "\r\n\r\n",
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET /status HTTP/1.1\r\nHost: a\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "\0" * 100,
)


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_no_request_hides_in_another(locked: Backend, number: int):
    answer = locked.raw(REQUESTS[number].encode("latin-1"), timeout_s=5)
    assert b"geoprelabel_request" not in answer
    assert b" 500 " not in answer
    assert b"Traceback" not in answer


def test_a_secret_by_another_spelling_of_its_header_is_none(locked: Backend):
    headers = ("Host: a", f"X_GeoPrelabel_Secret: {SECRET}", "Content-Length: 2", "Connection: close")
    head = "\r\n".join(("POST /webhook HTTP/1.1", *headers, "", "{}"))
    assert b" 401 " in locked.raw(head.encode())


def test_pages_forbid_scripts_frames_and_guessing_of_types(backend: Backend):
    for path in ("/status", "/", "/health", "/nowhere", "/metrics", "/tiles/scene/a.png"):
        headers = backend.ask("GET", path, headers={"Accept": "text/html"}).headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert "default-src 'none'" in headers["Content-Security-Policy"], path
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        assert "script" not in headers["Content-Security-Policy"], path
        assert headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "'><img src=x onerror=alert(1)>", "javascript:alert(1)", "\u202e\0"]
)
def test_nothing_that_was_sent_becomes_part_of_a_page(backend: Backend, text: str):
    backend.predict(f"http://127.0.0.1:1/{text}")
    backend.ask(
        "POST",
        "/setup",
        {"project": PROJECT, "schema": CONFIG.replace("Building", "A&lt;script&gt;" + json.dumps(text)[1:3])},
    )
    page = backend.ask("GET", "/status", headers={"Accept": "text/html"}).body.decode()
    assert "<script" not in page
    assert "<img" not in page
    assert "href='javascript" not in page


TILES = (
    "/tiles/../secrets/secret.png",
    "/tiles/scene/../../../secrets/secret.png",
    "/tiles/%2e%2e/%2e%2e/secrets/secret.png",
    "/tiles/scene/..%2f..%2f..%2fsecrets%2fsecret.png",
    "/tiles/scene/%252e%252e%252fsecret.png",
    "/tiles/scene/..\\..\\secrets\\secret.png",
    "/tiles/scene/link.png",
    "/tiles/scene/a.png%00",
    "/tiles/scene/a.png/",
    "/tiles/scene//a.png",
    "/tiles//etc/passwd",
    "/tiles/scene/.",
    "/tiles/scene/",
    "/tiles/./a.png",
    "/tiles/scene/1/2/../../a.png",
    "/tiles/scene/1/2/3.png/../../../a.png",
    "/tiles/scene/" + "a" * 5000,
    "/tiles/" + "a/" * 2000 + "b.png",
    "/tiles/scene/a.png;x",
    "/tiles/scene/a.PNG",
    "/tiles/scene/%E2%80%AE.png",
    "/tiles/~root/a.png",
    "/tiles/scene/http:%2f%2f169.254.169.254%2f",
    "/tiles/scene/a.png%0d%0aX-Evil:%201",
    "/static/a.png",
    "/tiles/scene/1/1/1.vrt",
    "/tiles/scene/99/9999999999/9999999999.png",
    "/tiles/scene/-1/0/0.png",
)


@pytest.mark.parametrize("path", TILES)
def test_the_tile_route_gives_tiles_alone(backend: Backend, path: str):
    answer = backend.raw(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert int(answer.split(b" ")[1]) in (308, 400, 403, 404, 414), answer[:300]
    assert PNG not in answer
    assert b"\r\nX-Evil" not in answer


@pytest.mark.parametrize(
    "value",
    ["bytes=0-", "bytes=99999-", "bytes=-99999999", "bytes=5-1", "bytes=" + "0-1," * 5000, "pages=1", "bytes=a-b"],
)
def test_ranges_are_answered_or_refused(backend: Backend, value: str):
    answer = backend.ask(
        "GET", "/tiles/scene/a.png", headers={"Range": value, "If-None-Match": 'W/"a", "b"', "If-Modified-Since": "x"}
    )
    assert answer.status in (200, 206, 304, 400, 416, 431)
    assert len(answer.body) <= 2 * len(PNG) + 500


# --- The count of guesses ---


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_guesses_come_back_with_time():
    clock = Clock()
    guesses = Guesses(now=clock)
    for _ in range(GUESSES):
        assert guesses.wait_s("8.8.8.8") == 0
        guesses.wrong("8.8.8.8")
    assert guesses.wait_s("8.8.8.8") == pytest.approx(GUESS_EVERY_S)
    assert guesses.wait_s("8.8.4.4") == 0
    clock.now_s += GUESS_EVERY_S
    assert guesses.wait_s("8.8.8.8") == 0
    for _ in range(1000):
        guesses.wrong("8.8.8.8")
    assert guesses.wait_s("8.8.8.8") <= 2 * GUESSES * GUESS_EVERY_S
    clock.now_s += 2 * GUESSES * GUESS_EVERY_S
    assert guesses.wait_s("8.8.8.8") == 0


def test_who_knew_the_password_lately_is_not_locked_out_and_later_is_again():
    clock = Clock()
    guesses = Guesses(now=clock)
    guesses.right("8.8.8.8")
    for _ in range(100):
        guesses.wrong("8.8.8.8")
    assert guesses.wait_s("8.8.8.8") == 0
    clock.now_s += KNOWN_FOR_S
    for _ in range(GUESSES):
        guesses.wrong("8.8.8.8")
    assert guesses.wait_s("8.8.8.8") > 0


def test_a_customer_of_ipv6_is_one_address():
    guesses = Guesses(now=Clock())
    for n in range(GUESSES):
        guesses.wrong(f"2001:db8:1:2::{n:x}")
    assert guesses.wait_s("2001:db8:1:2:ffff::1%eth0") > 0
    assert guesses.wait_s("2001:db8:1:3::1") == 0
    for _ in range(GUESSES):
        guesses.wrong("::ffff:8.8.8.8")
    assert guesses.wait_s("8.8.8.8") > 0


def test_a_million_addresses_take_no_more_memory_and_do_not_lock_out_one_that_is_known():
    clock = Clock()
    guesses = Guesses(64, now=clock)
    size = len(guesses._memory)
    for n in range(20_000):
        guesses.wrong(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
        if n % 50 == 0:
            clock.now_s += 1
            guesses.right("8.8.8.8")
    assert len(guesses._memory) == size
    assert guesses.wait_s("8.8.8.8") == 0


def test_threads_lose_no_count():
    guesses = Guesses(now=Clock())
    threads = [threading.Thread(target=guesses.wrong, args=("8.8.8.8",)) for _ in range(GUESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert guesses.wait_s("8.8.8.8") > 0


def test_a_task_gets_its_answer_with_the_password(locked: Backend):
    body = {"tasks": [{"id": 1, "data": {"image": PNG_URL}}], "project": PROJECT, "label_config": CONFIG}
    assert locked.ask("POST", "/predict", body, RIGHT).json["results"][0]["result"] == []
