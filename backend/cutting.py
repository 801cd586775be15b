"""A scene's tiles made in the plan's order, by this process or by several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait

from .errors import BadScene
from .scenes import MAX_CACHE_BYTES, Pixels
from .stores import Store
from .tiles import Planned, TileSet

_RUN_TILES = 8
"""Neighbours that one process cuts in a row: they share blocks of the file, which would be unpacked twice else."""

_FEWEST_TILES = 24
"""For each process; starting one takes as long as cutting that many."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done with a tile of the plan."""

    spot: Planned
    name: str
    """Of its image in the store."""

    is_kept: bool
    """Whether an earlier run has written it."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What came of it."""

    what: str
    """``written``, ``kept``, ``planned`` (no store) or ``empty``."""

    nodata_share: float


def cut(tiles: TileSet, store: Store | None, jobs: Iterable[Work], *, workers: int = 1) -> Iterator[tuple[Work, Cut]]:
    """Each job once it is done, in their order; ``workers`` processes, fewer for few tiles.

    Without a ``store`` nothing is written, and what is learned is which tiles hold data. Raises BadScene.
    """
    workers = min(workers, len(tiles) // _FEWEST_TILES)
    if workers <= 1:
        with ExitStack() as stack:
            cutter = _Cutter(tiles, store, stack)
            for job in jobs:
                yield job, cutter.cut(job)
        return
    listed = iter(jobs)
    runs = iter(lambda: list(islice(listed, _RUN_TILES)), [])
    try:
        yield from _cut_by_several(tiles, store, runs, workers)
    except BrokenProcessPool as error:
        raise BadScene(
            "a process that cuts tiles was ended, perhaps for want of memory; run the same command with fewer"
            " --workers, it goes on behind the tiles that are there"
        ) from error


def _cut_by_several(
    tiles: TileSet, store: Store | None, runs: Iterable[list[Work]], workers: int
) -> Iterator[tuple[Work, Cut]]:
    """As `cut`, by processes that end with this one. Raises BrokenProcessPool where one of them was ended."""
    # Forked children would share what libraries of the parent hold: locks, connections, handles.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (tiles, store, MAX_CACHE_BYTES // workers)
    )
    under_way: deque[tuple[list[Work], Future[list[Cut]]]] = deque()
    try:
        for run in runs:
            under_way.append((run, pool.submit(_cut_run, run)))
            # A few ahead, so that nobody waits for work and memory stays small.
            if len(under_way) > 2 * workers:
                run, made = under_way.popleft()
                yield from zip(run, made.result(), strict=True)
        for run, made in under_way:
            yield from zip(run, made.result(), strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Cutter:
    """Cuts one tile after the other; opens the scene when it is first needed."""

    def __init__(self, tiles: TileSet, store: Store | None, stack: ExitStack) -> None:
        self._tiles, self._store, self._stack = tiles, store, stack
        self._pixels: Pixels | None = None

    def cut(self, job: Work) -> Cut:
        there = "kept" if job.is_kept else "planned" if self._store is None else ""
        if there and self._tiles.is_full:
            return Cut(there, 0.0)
        if self._pixels is None:
            self._pixels = self._stack.enter_context(self._tiles.scene.open())
        image, nodata_share = self._tiles.image(self._pixels, job.spot, is_wanted=not there)
        if nodata_share == 1.0:
            return Cut("empty", 1.0)
        if image is not None and self._store is not None:
            self._store.put(job.name, self._tiles.encoded(image))
        return Cut(there or "written", nodata_share)


# In a process of its own ----------------------------------------------------------------------------------------------

_cutter: _Cutter | None = None


def _start(tiles: TileSet, store: Store | None, cache_bytes: int) -> None:
    global _cutter
    from rasterio._env import get_gdal_config, set_gdal_config

    # The parent answers to Ctrl-C. Should it be killed, nobody else would end this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_gdal_config("GDAL_CACHEMAX", min(get_gdal_config("GDAL_CACHEMAX"), cache_bytes))
    _cutter = _Cutter(tiles, store, ExitStack())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _cut_run(run: list[Work]) -> list[Cut]:
    assert _cutter is not None
    return [_cutter.cut(job) for job in run]
