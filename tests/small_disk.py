"""A disk that is soon full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *, size_mb: int) -> Iterator[Path]:
    """A new folder on a disk of that size; skips where nothing can be mounted."""
    folder.mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", folder]
    done = subprocess.run(disk, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """A file that takes all the room but so many bytes."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    if leave:
        os.truncate(path, path.stat().st_size - leave)
    return path
