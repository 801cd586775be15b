"""Segment Anything's checkpoints: where they come from, fetched whole or not at all, and known by their hash."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock

from .errors import BadWeights

OFFICIAL_URL = "https://dl.fbaipublicfiles.com/segment_anything"
"""Where Meta serves the checkpoints."""

_TRIES = 5
"""Attempts in a row that bring nothing before a download is given up; each that brings something counts anew."""

_STALLED_S = 30.0
"""A server that sends nothing for so many seconds is asked again."""

Progress = Callable[[int], None]
"""Called with the bytes that are here."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file of weights as it was published."""

    name: str
    """What GEOPRELABEL_SEGMENTER calls it."""

    file: str
    """Name of the file, wherever it lies."""

    nbytes: int
    sha256: str
    """In hexadecimal, all 64 digits. (The file's name holds the start of its MD5.)"""

    licence: str = "Apache-2.0"
    """SPDX name."""

    def url(self, mirror: str = "") -> str:
        """Where it is fetched from: at Meta's, or in the mirror, an http(s) URL of the folder that holds the files."""
        return f"{(mirror or OFFICIAL_URL).rstrip('/')}/{self.file}"


CHECKPOINTS = {
    checkpoint.name: checkpoint
    for checkpoint in (
        Checkpoint(
            "sam_vit_b",
            "sam_vit_b_01ec64.pth",
            375_042_383,
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        Checkpoint(
            "sam_vit_l",
            "sam_vit_l_0b3195.pth",
            1_249_524_607,
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        Checkpoint(
            "sam_vit_h",
            "sam_vit_h_4b8939.pth",
            2_564_550_879,
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
    )
}


def checkpoint_named(name: str) -> Checkpoint:
    """The checkpoint of that name. Raises BadWeights, which lists those there are."""
    try:
        return CHECKPOINTS[name]
    except KeyError:
        raise BadWeights(f"there are no weights called {name!r}; there are {', '.join(CHECKPOINTS)}") from None


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified(checkpoint: Checkpoint, folder: Path) -> Path:
    """The checkpoint's file in that folder, its bytes looked at. Raises BadWeights, which says what to do."""
    path = folder / checkpoint.file
    again = f"run geoprelabel weights get {checkpoint.name}"
    if not path.is_file():
        raise BadWeights(f"{path} is not there; {again}")
    if path.stat().st_size != checkpoint.nbytes:
        raise BadWeights(f"{path} has {path.stat().st_size} bytes, and {checkpoint.nbytes} are right; {again}")
    _check_hash(path, checkpoint, again)
    return path


def fetch(
    checkpoint: Checkpoint, folder: Path, *, mirror: str = "", progress: Progress = lambda done_bytes: None
) -> Path:
    """The checkpoint's file in that folder, fetched unless the right one is there.

    ``mirror`` is an http(s) URL or a folder of this machine that holds the file. What an interrupted call leaves, also
    one that was killed, the next one goes on from. The file appears under its name only once its hash was found right.
    Raises BadWeights.
    """
    target = folder / checkpoint.file
    part = target.with_name(f"{checkpoint.file}.part")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        try:
            return verified(checkpoint, folder)
        except BadWeights:
            pass
        here = part.stat().st_size if part.exists() else 0
        if shutil.disk_usage(folder).free < checkpoint.nbytes - here:
            raise BadWeights(f"{folder} has no room for the {checkpoint.nbytes / 1e6:.0f} MB of {checkpoint.file}")
        if mirror and not mirror.lower().startswith(("http://", "https://")):
            source = Path(mirror) / checkpoint.file
            if not source.is_file():
                raise BadWeights(
                    f"{source} is not there; GEOPRELABEL_WEIGHTS_MIRROR should be the folder that holds it"
                )
            shutil.copyfile(source, part)
            came_from = str(source)
        else:
            _download(checkpoint.url(mirror), part, checkpoint.nbytes, progress)
            came_from = _shown(checkpoint.url(mirror))
        try:
            _check_hash(part, checkpoint, f"{came_from} is not the published file and was thrown away")
        except BadWeights:
            part.unlink()
            raise
        os.replace(part, target)
    return target


def _check_hash(path: Path, checkpoint: Checkpoint, way_out: str) -> None:
    found = sha256_of(path)
    if found != checkpoint.sha256:
        raise BadWeights(
            f"{path.name} has the sha256 {found[:8]}…, and {checkpoint.name} has {checkpoint.sha256[:8]}…; {way_out}"
        )


def _download(url: str, part: Path, nbytes: int, progress: Progress) -> None:
    """Bring ``part`` to ``nbytes``, from where it ends. Raises BadWeights where the server does not let it."""
    shown, failures = _shown(url), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if before == nbytes:
            return
        if before > nbytes:
            part.unlink()
            before = 0
        try:
            reason = _more(url, part, before, nbytes, progress)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        except httpx.InvalidURL as error:
            raise BadWeights(f"{shown} is no URL: {error}") from error
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if after < nbytes and failures >= _TRIES:
            raise BadWeights(
                f"{shown} cannot be fetched: {reason}; {after} of {nbytes} bytes are here, run the command again to go "
                "on, or set GEOPRELABEL_WEIGHTS_MIRROR where this machine is cut off"
            )
        if failures:
            time.sleep(min(0.1 * 4**failures, 20))


def _more(url: str, part: Path, here: int, nbytes: int, progress: Progress) -> str:
    """Ask once for what is missing and append what comes; why it may not be all."""
    # A length that was compressed on its way is no length.
    headers = {"Range": f"bytes={here}-", "Accept-Encoding": "identity"} if here else {"Accept-Encoding": "identity"}
    with _asked(url, headers) as answer:
        if answer.status_code >= 500 or answer.status_code == 429:
            return f"it answers {answer.status_code} {answer.reason_phrase}"
        if answer.status_code == 416:
            part.unlink()
            return f"it has less than {here} bytes"
        if answer.status_code not in (200, 206):
            raise BadWeights(f"{_shown(url)} answers {answer.status_code} {answer.reason_phrase}")
        goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {here}-")
        if answer.status_code == 206 and not goes_on:
            raise BadWeights(f"{_shown(url)} sends another part of the file than it was asked for")
        here = here if goes_on else 0
        with part.open("ab" if goes_on else "wb") as file:
            for block in answer.iter_raw():
                here += len(block)
                if here > nbytes:
                    break
                file.write(block)
                progress(here)
        if here > nbytes:
            part.unlink()
            raise BadWeights(f"{_shown(url)} is longer than the {nbytes} bytes that are right, and was thrown away")
    return "it ends early"


@contextmanager
def _asked(url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=_STALLED_S) as answer:
        yield answer


def _shown(url: str) -> str:
    """A URL without the password that may be in it."""
    return re.sub(r"//[^/@]*@", "//", url)
