"""Byte strings by number, kept in a file instead of memory; what an export reads twice lies here in between."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rings import runs

_MUCH_MORE = 8


class Spool:
    """A list of byte strings that costs eight bytes of memory each.

    The file has no name in its folder, so that a killed process leaves nothing behind.
    """

    def __init__(self, folder: Path) -> None:
        """The file lies on the disk of that folder."""
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            error.filename = str(folder)  # not the name of a file that nobody has seen
            raise
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

    def append_rows(self, rows: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Put as many rows of an array as each length says at the end, as a byte string each."""
        self._file.write(np.ascontiguousarray(rows).data)
        end, row_bytes = self._ends[-1], rows.nbytes // max(len(rows), 1)
        self._ends.frombytes((end + np.cumsum(lengths, dtype=np.int64) * row_bytes).tobytes())

    def read_rows(self, numbers: NDArray[np.int64], row: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """What lies under those numbers where all has come by ``append_rows``: the rows, and how many are of each."""
        self._file.flush()
        ends = np.frombuffer(self._ends, np.int64) // row.itemsize
        starts, lengths = ends[numbers], ends[numbers + 1] - ends[numbers]
        # While somebody looks at an array's memory it cannot grow.
        del ends
        if not len(numbers):
            return np.empty((0, *row.shape), row.base), lengths
        first, stop = int(starts.min()), int((starts + lengths).max())
        if stop - first <= _MUCH_MORE * int(lengths.sum()):
            chunk = os.pread(self._file.fileno(), (stop - first) * row.itemsize, first * row.itemsize)
            return np.frombuffer(chunk, row)[runs(starts - first, lengths)], lengths
        return np.frombuffer(b"".join(self.read(numbers)), row), lengths

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
