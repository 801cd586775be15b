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

_MUCH_MORE = 8


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
        file, wanted = self._file.fileno(), np.asarray(numbers, np.int64)
        if not len(wanted):
            return []
        ends = np.frombuffer(self._ends, np.int64)
        starts, stops = ends[wanted], ends[wanted + 1]
        # While somebody looks at an array's memory it cannot grow.
        del ends
        first, size = int(starts.min()), int(stops.max() - starts.min())
        spans = zip((starts - first).tolist(), (stops - first).tolist(), strict=True)
        if size <= _MUCH_MORE * int((stops - starts).sum()):
            # One read, though it brings some that nobody asked for, is faster than many.
            chunk = os.pread(file, size, first)
            return [chunk[start:stop] for start, stop in spans]
        return [os.pread(file, stop - start, first + start) for start, stop in spans]
