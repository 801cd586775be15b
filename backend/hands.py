"""Processes beside this one that do a share of long work; what they did comes back in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from types import TracebackType
from typing import TypeVar

_Job = TypeVar("_Job")
_Done = TypeVar("_Done")


class Hands:
    """Some processes, started when there is first something to do, and ended with the block or with this process."""

    def __init__(self, workers: int, prepare: Callable[[], None] | None = None) -> None:
        """``prepare`` is what each of them does first; it is pickled."""
        self.workers = workers
        # Forked children would share what libraries of the parent hold: locks, connections, handles.
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (prepare,))

    def __enter__(self) -> Hands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, work: Callable[[_Job], _Done], jobs: Iterable[_Job]) -> Iterator[tuple[_Job, _Done]]:
        """Each job with what came of it, in order; only a few are under way at any time.

        Jobs, results and ``work`` are pickled. Raises what ``work`` raises, and BrokenProcessPool where a process was
        ended.
        """
        under_way: deque[tuple[_Job, Future[_Done]]] = deque()
        for job in jobs:
            under_way.append((job, self._pool.submit(work, job)))
            # A few ahead, so that nobody waits for work and memory stays small.
            if len(under_way) > 2 * self.workers:
                job, future = under_way.popleft()
                yield job, future.result()
        while under_way:
            job, future = under_way.popleft()
            yield job, future.result()


def _start(prepare: Callable[[], None] | None) -> None:
    # The parent answers to Ctrl-C. Should it be killed, nobody else would end this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
