"""Work that several threads want at the same moment is done once, and work on a device is done in turn."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

Result = TypeVar("Result")


class SingleFlight(Generic[Result]):
    """Calls for the same key that overlap in time share one computation. Nothing is kept after it."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Future[Result]] = {}
        self._lock = threading.Lock()

    def do(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """What ``compute`` returns or raises, computed by this thread or by the one that is at it already."""
        with self._lock:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not leads:
            return flight.result()
        try:
            result = compute()
        except BaseException as error:
            flight.set_exception(error)
            raise
        else:
            flight.set_result(result)
            return result
        finally:
            with self._lock:
                del self._flights[key]


class Gate:
    """Lets one thread at a time at the device; who is more urgent goes first, then who came first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int]] = []
        self._is_busy = False
        self._order = itertools.count()
        self._turn = threading.Condition()

    @contextmanager
    def entered(self, *, urgency: int = 0) -> Iterator[None]:
        """Hold the gate for the length of a ``with`` block. The higher ``urgency`` goes first."""
        ticket = (-urgency, next(self._order))
        with self._turn:
            heapq.heappush(self._waiting, ticket)
            self._turn.wait_for(lambda: not self._is_busy and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._is_busy = True
        try:
            yield
        finally:
            with self._turn:
                self._is_busy = False
                self._turn.notify_all()

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        with self._turn:
            return len(self._waiting)
