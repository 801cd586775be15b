"""Addresses that must not be asked, however they are spelled; each in a real /predict."""

from __future__ import annotations

import base64

import pytest

from tests.small_server import Answer, SmallServer

from .conftest import PNG, TOKEN, Backend, Friend

HOSTS = (
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "localhost.localdomain",
    "127.0.0.1.",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7f.0x0.0x0.0x1",
    "0x7f.1",
    "017700000001",
    "0177.0.0.01",
    "0177.0.0.1",
    "127.0.0.0x1",
    "00000177.1",
    "0",
    "0.0.0.0",
    "000.000.000.000",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1%25lo]",
    "[fe80::1%lo]",
    "[::1%25lo]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "metadata.google.internal",
    "METADATA.google.internal.",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "192.168.257",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.192",
    "198.18.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "224.0.0.1",
    "１２７.０.０.１",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
    "loc\u00adalhost",
    "127.0.0.1%00.example.org",
    "127.0.0.1%2eexample.org",
    "private.attack.test",
    "loop.attack.test",
    "loop6.attack.test",
    "mapped.attack.test",
    "linklocal.attack.test",
    "both.attack.test",
    "rebind.attack.test",
    "late.attack.test",
    "nothing.attack.test",
)


@pytest.mark.parametrize("host", HOSTS)
def test_no_spelling_of_a_forbidden_host_is_asked(backend: Backend, bait: SmallServer, host: str):
    for _ in range(2 if "attack" in host else 1):
        answer = backend.predict(f"http://{host}:{bait.port}/a.png")
        assert answer.status in (400, 403, 422), answer.body


URLS = (
    "http://8.8.8.8@127.0.0.1:{port}/a.png",
    "http://user:pass@127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{friend}@127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{port}#@127.0.0.1:{friend}/a.png",
    "http://127.0.0.1:{port}?@127.0.0.1:{friend}/a.png",
    "http://127.0.0.1:{port}\\@127.0.0.1:{friend}/a.png",
    "http://127.0.0.1:{friend}\\@127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{friend}%40127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{friend}:{port}/a.png",
    "http://127.0.0.1:{friend} 127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{friend}\t@127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{friend}\r\nHost: 127.0.0.1:{port}\r\n/a.png",
    "http://127.0.0.1:{friend}/a.png\r\n\r\nGET http://127.0.0.1:{port}/ HTTP/1.1",
    "http://127.0.0.1:{friend}/%0d%0aHost:%20127.0.0.1:{port}",
    "http:127.0.0.1:{port}/a.png",
    "http:/127.0.0.1:{port}/a.png",
    "http:///127.0.0.1:{port}/a.png",
    "http:\\\\127.0.0.1:{port}\\a.png",
    "//127.0.0.1:{port}/a.png",
    "///127.0.0.1:{port}/a.png",
    "/\\127.0.0.1:{port}/a.png",
    "\\\\127.0.0.1@{port}\\share\\a.png",
    "https://127.0.0.1:{port}/a.png",
    "HTTP://127.0.0.1:{port}/a.png",
    "hTtP://127.0.0.1:{port}/a.png",
    " http://127.0.0.1:{port}/a.png",
    "http://127.0.0.1:{port}",
    "http://127.0.0.1:0{port}/a.png",
    "http://127.0.0.1:/a.png",
    "http://127.0.0.1:99999/a.png",
    "http://127.0.0.1:-1/a.png",
    "http://[127.0.0.1]:{port}/a.png",
    "http://[::1/a.png",
    "http://[v1.127.0.0.1]:{port}/a.png",
    "http://127.0.0.1:{friend}.attack.test:{port}/a.png",
    "ftp://127.0.0.1:{port}/a.png",
    "gopher://127.0.0.1:{port}/_GET%20/",
    "dict://127.0.0.1:{port}/a",
    "ws://127.0.0.1:{port}/a.png",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/containers/json",
    "jar:http://127.0.0.1:{port}/a.zip!/a.png",
    "view-source:http://127.0.0.1:{port}/a.png",
    "javascript:fetch('http://127.0.0.1:{port}')",
    "/vsicurl/http://127.0.0.1:{port}/a.tif",
    "/vsicurl_streaming/http://127.0.0.1:{port}/a.tif",
    "/vsis3/bucket/a.tif",
    "/vsizip//vsicurl/http://127.0.0.1:{port}/a.zip",
    "http://127.0.0.1:{port}/data/upload/../../a.png",
    "http://127.0.0.1:{port}/tiles/scene/a.png",
    "http://localhost:{port}/tiles/scene/%2e%2e%2fa.png",
)


@pytest.mark.parametrize("url", URLS)
def test_no_trick_with_an_address_leads_elsewhere(backend: Backend, friend: Friend, bait: SmallServer, url: str):
    for click in (True, False):
        answer = backend.predict(url.format(port=bait.port, friend=friend.server.port), click=click)
        assert answer.status in ((400, 403, 404, 422) if click else (200,)), answer.body
        if not click:
            assert answer.json["results"] == [[]]


REDIRECTS = (
    "http://127.0.0.1:{port}/a.png",
    "http://localhost:{port}/a.png",
    "http://[::1]:{port}/a.png",
    "//127.0.0.1:{port}/a.png",
    "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://rebind.attack.test:{port}/a.png",
    "http://10.0.0.1/a.png",
    "http://2130706433:{port}/a.png",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "ftp://127.0.0.1:{port}/a.png",
    "gopher://127.0.0.1:{port}/_a",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "s3://bucket/a.png",
    "/vsicurl/http://127.0.0.1:{port}/a.png",
    "http://user:pass@127.0.0.1:{port}/a.png",
    "http://[/",
    "\\\\127.0.0.1\\share\\a.png",
    "http://127.0.0.1:{port}\\@x/a",
    "http://127.0.0.1:99999/",
    "\x00",
    "http://\u00ad/",
    "?" * 70000,
)


@pytest.mark.parametrize("number", range(len(REDIRECTS)))
def test_no_redirect_leads_where_an_address_may_not(backend: Backend, friend: Friend, bait: SmallServer, number: int):
    target = REDIRECTS[number].format(port=bait.port)
    answer = backend.predict(friend.put(f"to/{number}", Answer(302, headers={"Location": target})))
    assert answer.status in (403, 422), answer.body


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_end(backend: Backend, friend: Friend, status: int):
    before = len(friend.server.asked)
    answer = backend.predict(friend.put(f"round/{status}", Answer(status, headers={"Location": f"/round/{status}"})))
    assert answer.status == 422
    assert len(friend.server.asked) - before == 4


FILES = (
    "file:///etc/passwd",
    "file:/etc/passwd",
    "file://localhost/etc/passwd",
    "FILE:///etc/passwd",
    "fIlE:////etc/passwd",
    "/etc/passwd",
    "//etc/passwd",
    "etc/passwd",
    "../../../../../../../etc/passwd",
    "~/../etc/passwd",
    "{secret}",
    "file://{secret}",
    "local:{secret}",
    "C:\\Windows\\win.ini",
    "\\\\server\\share\\a.png",
    "\\\\?\\C:\\a",
    "/proc/self/environ",
    "/dev/zero",
    "/dev/stdin",
    "/data/local-files/?d=../secrets/secret.png",
    "/data/local-files/?d=..%2fsecrets%2fsecret.png",
    "/data/local-files/?d=%2e%2e/secrets/secret.png",
    "/data/local-files/?d=%252e%252e/secrets/secret.png",
    "/data/local-files/?d=..\\secrets\\secret.png",
    "/data/local-files/?d=..%5csecrets%5csecret.png",
    "/data/local-files/?d=....//secrets/secret.png",
    "/data/local-files/?d={secret}",
    "/data/local-files/?d=/{secret}",
    "/data/local-files/?d=//{secret}",
    "/data/local-files/?d=link.png",
    "/data/local-files/?d=links/secret.png",
    "/data/local-files/?d=inside.png/../../secrets/secret.png",
    "/data/local-files/?d=inside.png%00.jpg",
    "/data/local-files/?d=inside.png&d=../secrets/secret.png",
    "/data/local-files/?d=",
    "/data/local-files/?d=.",
    "/data/local-files/",
    "/data/local-files/?D=../secrets/secret.png",
    "/data/local-files/?d=file:///etc/passwd",
    "/data/local-files/../../etc/passwd",
    "/data/local-files/?d=" + "a/" * 3000 + "b.png",
    "/data/local-files/?d=" + "x" * 5000,
    "{studio}/data/local-files/?d=../secrets/secret.png",
    "{studio}/data/local-files/?d=links/secret.png",
    "{own}/tiles/../../secrets/secret.png",
    "{own}/tiles/scene/../../../secrets/secret.png",
    "{own}/tiles/scene/%2e%2e%2f%2e%2e%2f%2e%2e%2fsecrets%2fsecret.png",
    "{own}/tiles/scene/link.png",
    "{own}/tiles/scene/.hidden.png",
    "{own}/tiles/scene/a.png%00.txt",
    "{own}/tiles/scene/a.png/",
    "{own}/tiles/%2e%2e/a.png",
    "{own}/tiles//etc/passwd",
    "{own}/tiles/scene/..;/a.png",
    "{own}/tiles/scene\\..\\a.png",
    "{own}/tiles/scene/CON",
    "{own}/tiles/scene/a.png:stream",
)


@pytest.mark.parametrize("url", FILES)
def test_no_address_reads_a_file_of_this_machine(backend: Backend, studio: SmallServer, url: str):
    secret = backend.folder / "secrets" / "secret.png"
    address = url.replace("{secret}", str(secret)).replace("{studio}", studio.url)
    asked = len(studio.asked)
    answer = backend.predict(address.replace("{own}", f"http://127.0.0.1:{backend.port}"))
    if answer.status == 200:
        # Label Studio's own file under that name, then: it has rules of its own, and was asked.
        assert len(studio.asked) > asked
    else:
        assert answer.status in (400, 403, 422, 502), answer.body
    assert PNG not in answer.body


TOKEN_TRAPS = (
    "http://127.0.0.1:{port}/data/upload/1/a.png",
    "http://127.0.0.1:{port}/data/local-files/?d=a.png",
    "http://127.0.0.1:{port}/tasks/1/resolve/?fileuri=YQ==",
    "http://attack.test:{port}/data/upload/1/a.png",
    "https://127.0.0.1:{studio}/data/upload/1/a.png",
    "http://127.0.0.1:{studio}.attack.test/data/upload/1/a.png",
    "http://127.0.0.1:{studio}@attack.test:{port}/data/upload/1/a.png",
    "http://127.0.0.1:{friend}/data/upload/1/a.png",
    "/data/upload/..%2f..%2fapi/current-user/token",
    "/data/upload/../../api/current-user/token",
    "/api/current-user/token",
    "/data/upload/%2e%2e/%2e%2e/api/current-user/token",
    "/data/upload/%252e%252e%252fapi",
    "/tasks/1/resolve/../../../api/",
    "/data/upload/1/a.png?next=http://127.0.0.1:{port}/",
    "/data/upload//127.0.0.1:{port}/a.png",
    "/data/upload/\\\\127.0.0.1:{port}",
    "@127.0.0.1:{port}/data/upload/1/a.png",
    ".attack.test/data/upload/1/a.png",
)


OWN_ROUTES = ("/api/ml", "/api/projects/", "/api/tasks/", "/api/version", "/api/webhooks/")
"""What a server asks of Label Studio unasked, at start and after events; no trap above aims at one of them."""


@pytest.mark.parametrize("url", TOKEN_TRAPS)
def test_the_token_goes_to_label_studio_alone_and_to_its_files_alone(
    backend: Backend, studio: SmallServer, friend: Friend, bait: SmallServer, url: str
):
    before = len(friend.server.asked), len(studio.asked)
    address = url.format(port=bait.port, studio=studio.port, friend=friend.server.port)
    answer = backend.predict(address)
    assert answer.status < 500 or answer.status == 502, answer.body
    for asked in friend.server.asked[before[0] :]:
        assert not {"authorization", "cookie"} & {name.lower() for name in asked.headers}
    for asked in studio.asked[before[1] :]:
        # The backend asks of its own accord, too: which projects it is connected to, and what they hold.
        assert asked.path.startswith(("/data/", "/tasks/1/resolve/", *OWN_ROUTES)), asked
        assert ".." not in asked.target
    assert TOKEN.encode() not in answer.body


def test_a_redirect_of_label_studios_does_not_take_the_token_along(
    backend: Backend, studio: SmallServer, friend: Friend, bait: SmallServer, monkeypatch: pytest.MonkeyPatch
):
    # One origin is scheme, host and port: the friend differs from Label Studio in the port alone.
    targets = {
        "/data/upload/away.png": friend.put("away.png", Answer(200, PNG)),
        "/data/upload/trap.png": f"http://127.0.0.1:{bait.port}/a.png",
    }
    monkeypatch.setattr(studio, "asked", studio.asked)
    handler = studio._server.RequestHandlerClass
    plain = handler._answer  # type: ignore[attr-defined]

    def answer(self: object) -> None:
        if self.path not in targets:  # type: ignore[attr-defined]
            return plain(self)
        self.send_response(302)  # type: ignore[attr-defined]
        self.send_header("Location", targets[self.path])  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")  # type: ignore[attr-defined]
        return self.end_headers()  # type: ignore[attr-defined]

    monkeypatch.setattr(handler, "do_GET", answer)
    assert backend.predict("/data/upload/away.png").status == 200
    assert "authorization" not in {name.lower() for name in friend.server.asked[-1].headers}
    assert backend.predict("/data/upload/trap.png").status == 403


@pytest.mark.parametrize(
    "task_id", ["../../api", "1/../../api/x", None, -1, 10**400, 1.5, "1", True, [1], {"a": 1}, "ä"]
)
@pytest.mark.parametrize("scheme", ["s3", "gs", "azure-blob"])
def test_storage_addresses_of_nonsense_tasks_ask_nothing_else(
    backend: Backend, studio: SmallServer, scheme: str, task_id: object
):
    before = len(studio.asked)
    answer = backend.predict(f"{scheme}://bucket/../a.png", id=task_id)
    assert answer.status in (400, 403, 422), answer.body
    answer = backend.predict(f"{scheme}://bucket/a.png", id=task_id)
    assert answer.status in (400, 403, 422), answer.body
    for asked in studio.asked[before:]:
        # Beside all requests the backend looks by itself whether the project still lists it.
        is_upkeep = (asked.method, asked.target) == ("GET", "/api/ml?project=3")
        assert is_upkeep or asked.path.startswith("/tasks/")
        assert asked.path.endswith("/resolve/")
        uri = asked.target.partition("fileuri=")[2].replace("%3D", "=")
        assert base64.urlsafe_b64decode(uri).startswith(f"{scheme}://".encode())
