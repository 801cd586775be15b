"""Byte strings by number, kept in a file instead of memory; what an export reads twice lies here in between."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray


class Spool:
    """A list of byte strings that costs eight bytes of memory each.

    The file has no name in its folder, so that a killed process leaves nothing behind.
    """

    def __init__(self, folder: Path) -> None:
        """The file lies on the disk of that folder."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, blobs: Iterable[bytes]) -> None:
        """Put byte strings at the end, numbered on."""
        listed = list(blobs)
        self._file.write(b"".join(listed))
        end = self._ends.pop()
        self._ends.extend(accumulate(map(len, listed), initial=end))

    def read(self, numbers: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """The byte strings of those numbers, in their order."""
        self._file.flush()
        file, ends = self._file.fileno(), self._ends
        listed = numbers.tolist() if isinstance(numbers, np.ndarray) else list(numbers)
        if listed and listed[-1] - listed[0] == len(listed) - 1 and listed == list(range(listed[0], listed[-1] + 1)):
            # A run of neighbours is one read.
            first = ends[listed[0]]
            chunk = os.pread(file, ends[listed[-1] + 1] - first, first)
            return [chunk[ends[i] - first : ends[i + 1] - first] for i in listed]
        return [os.pread(file, ends[i + 1] - ends[i], ends[i]) for i in listed]
