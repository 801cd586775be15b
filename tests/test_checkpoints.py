"""Checkpoints are fetched whole or not at all, go on where they stopped, and are known by their hash."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from backend import checkpoints, cli
from backend.checkpoints import CHECKPOINTS, Checkpoint, fetch, verified
from backend.errors import BadWeights
from tests.small_server import Answer, Asked, SmallServer

CONTENT = np.random.default_rng(0).bytes(300_000)
SMALL = Checkpoint("small", "small_0b1c2d.pth", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: None)


def ranged(asked: Asked, content: bytes = CONTENT, *, at_most: int | None = None) -> Answer:
    """What a server that knows ranges answers; ``at_most`` bytes of it before it hangs up."""
    found = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("Range", ""))
    start = int(found[1]) if found else 0
    if start >= len(content):
        return Answer(416)
    body = content[start:]
    headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if found else {}
    return Answer(206 if found else 200, body[:at_most], headers, promised=len(body))


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {f"{SMALL.file}.lock"}


def test_a_checkpoint_is_fetched_once_and_is_what_was_published(tmp_path: Path) -> None:
    with SmallServer(ranged) as server:
        seen: list[int] = []
        path = fetch(SMALL, tmp_path / "sam", mirror=server.url, progress=seen.append)
        assert path.read_bytes() == CONTENT
        assert seen[-1] == len(CONTENT)
        assert seen == sorted(seen)
        assert fetch(SMALL, tmp_path / "sam", mirror=server.url) == path
        assert [asked.path for asked in server.asked] == [f"/{SMALL.file}"]
    assert left_over(tmp_path / "sam") == {SMALL.file}


def test_a_broken_connection_goes_on_where_it_broke(tmp_path: Path) -> None:
    with SmallServer(lambda asked: ranged(asked, at_most=70_000)) as server:
        assert fetch(SMALL, tmp_path, mirror=server.url).read_bytes() == CONTENT
        starts = [int(a.headers["Range"][6:-1]) if "Range" in a.headers else 0 for a in server.asked]
    assert starts[0] == 0
    assert len(starts) >= 5
    assert starts == sorted(set(starts))


def test_a_server_without_ranges_is_asked_from_the_start_again(tmp_path: Path) -> None:
    (tmp_path / f"{SMALL.file}.part").write_bytes(b"of another try" * 100)
    with SmallServer(lambda asked: Answer(200, CONTENT)) as server:
        assert fetch(SMALL, tmp_path, mirror=server.url).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(404), "404"),
        (Answer(403), "403"),
        (Answer(503), "503"),
        (Answer(200, CONTENT[:-1] + b"?"), "sha256"),
        (Answer(200, CONTENT + b"more"), "longer"),
        (Answer(200, b"<html>please log in</html>"), "cannot be fetched"),
        (Answer(206, CONTENT, {"Content-Range": "bytes 5-300004/300005"}), "another part"),
    ],
)
def test_what_is_not_the_checkpoint_is_refused_and_never_takes_its_name(
    tmp_path: Path, answer: Answer, said: str
) -> None:
    with SmallServer(lambda asked: answer) as server, pytest.raises(BadWeights, match=said):
        fetch(SMALL, tmp_path, mirror=server.url)
    assert SMALL.file not in left_over(tmp_path)


def test_after_a_wrong_file_the_right_one_can_be_fetched(tmp_path: Path) -> None:
    answers = [Answer(200, CONTENT[:-1] + b"?")]
    with SmallServer(lambda asked: answers.pop() if answers else ranged(asked)) as server:
        with pytest.raises(BadWeights, match="thrown away"):
            fetch(SMALL, tmp_path, mirror=server.url)
        assert fetch(SMALL, tmp_path, mirror=server.url).read_bytes() == CONTENT


def test_a_damaged_file_is_told_and_mended(tmp_path: Path) -> None:
    damaged = tmp_path / SMALL.file
    damaged.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(BadWeights, match="run geoprelabel weights get small"):
        verified(SMALL, tmp_path)
    with SmallServer(ranged) as server:
        fetch(SMALL, tmp_path, mirror=server.url)
    assert verified(SMALL, tmp_path).read_bytes() == CONTENT
    damaged.write_bytes(CONTENT[:100])
    with pytest.raises(BadWeights, match="100 bytes"):
        verified(SMALL, tmp_path)


def test_nobody_there_is_said_with_the_way_out_and_without_the_password(tmp_path: Path) -> None:
    with SmallServer(ranged) as server:
        port = server.port
    with pytest.raises(BadWeights, match="GEOPRELABEL_WEIGHTS_MIRROR") as caught:
        fetch(SMALL, tmp_path, mirror=f"http://me:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)


def test_a_folder_can_be_the_mirror(tmp_path: Path) -> None:
    mirror = tmp_path / "usb-stick"
    mirror.mkdir()
    with pytest.raises(BadWeights, match="usb-stick"):
        fetch(SMALL, tmp_path / "sam", mirror=str(mirror))
    (mirror / SMALL.file).write_bytes(CONTENT)
    assert fetch(SMALL, tmp_path / "sam", mirror=str(mirror)).read_bytes() == CONTENT
    (mirror / SMALL.file).write_bytes(CONTENT[::-1])
    (tmp_path / "sam" / SMALL.file).unlink()
    with pytest.raises(BadWeights, match="sha256"):
        fetch(SMALL, tmp_path / "sam", mirror=str(mirror))


def test_a_killed_download_goes_on(tmp_path: Path) -> None:
    stalls = threading.Event()

    def answer(asked: Asked) -> Answer:
        if not stalls.is_set():
            stalls.set()
            return ranged(asked, at_most=100_000)
        return ranged(asked)

    # The child waits after its first blocks, and is killed there.
    code = f"""
import sys, time
from pathlib import Path
from backend.checkpoints import Checkpoint, fetch
def progress(done):
    if done >= 60_000:
        print("some", flush=True)
        time.sleep(60)
small = Checkpoint{(SMALL.name, SMALL.file, SMALL.nbytes, SMALL.sha256)!r}
fetch(small, Path(sys.argv[1]), mirror=sys.argv[2], progress=progress)
"""
    with SmallServer(answer) as server:
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), server.url], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"some\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert SMALL.file not in left_over(tmp_path)
        assert fetch(SMALL, tmp_path, mirror=server.url).read_bytes() == CONTENT
    assert left_over(tmp_path) == {SMALL.file}


def test_two_that_fetch_at_once_ask_the_server_once(tmp_path: Path) -> None:
    def slow(asked: Asked) -> Answer:
        threading.Event().wait(0.2)
        return ranged(asked)

    with SmallServer(slow) as server:
        threads = [threading.Thread(target=fetch, args=(SMALL, tmp_path), kwargs={"mirror": server.url}) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.asked) == 1


def test_the_published_checkpoints_are_named_as_the_settings_name_them() -> None:
    from backend.settings import SEGMENTERS

    assert set(CHECKPOINTS) == set(SEGMENTERS) - {"compact"}
    for checkpoint in CHECKPOINTS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", checkpoint.sha256)
        assert checkpoint.url() == f"https://dl.fbaipublicfiles.com/segment_anything/{checkpoint.file}"


def test_the_command_line_fetches_lists_and_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", {SMALL.name: SMALL})
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    run = CliRunner().invoke
    with SmallServer(ranged) as server:
        monkeypatch.setenv("GEOPRELABEL_WEIGHTS_MIRROR", server.url)
        listed = run(cli.app, ["weights", "list", "--json"])
        assert '"is_here": false' in listed.output
        assert SMALL.sha256 in listed.output
        assert run(cli.app, ["weights", "verify"]).exit_code == 1
        assert str(tmp_path / "sam" / SMALL.file) in run(cli.app, ["weights", "get", "small"]).output
    assert '"is_here": true' in run(cli.app, ["weights", "list", "--json"]).output
    assert run(cli.app, ["weights", "verify"]).exit_code == 0
    (tmp_path / "sam" / SMALL.file).write_bytes(CONTENT[::-1])
    wrong = run(cli.app, ["weights", "verify", "small"])
    assert wrong.exit_code == 1
    assert isinstance(run(cli.app, ["weights", "get", "none"]).exception, BadWeights)
