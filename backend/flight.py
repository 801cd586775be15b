"""Work that several threads want at the same moment is done once, and work on a device is done in turn."""

from __future__ import annotations

import contextvars
import functools
import heapq
import itertools
import math
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

IMPORTING = threading.RLock()
"""Held while a large library is imported that another thread may want too: of two that wait for each other's modules,
Python lets one go on with half of them."""

GIVES_WAY_BY = 5
"""How much nicer a thread is that computes, as the system counts: it gets a third of what one that answers gets."""


def give_way() -> None:
    """Let threads that answer at once have the processors first, from now on: this one computes.

    So does every thread that it starts. A thread cannot take it back, so one that gives way answers nothing else.
    """
    # Elsewhere a priority is the whole process's.
    if sys.platform == "linux":
        os.nice(GIVES_WAY_BY)


class Replaced(Exception):
    """Somebody asked again before this was answered: nobody waits for it any more."""


class Claim:
    """One request for an answer, until nobody waits for it any more."""

    def __init__(self) -> None:
        self.ended: Future[None] = Future()

    def end(self, reason: Exception) -> None:
        """Let who works for it raise the ``reason`` as soon as it can. Nothing happens where it has one already."""
        with suppress(InvalidStateError):
            self.ended.set_exception(reason)

    def check(self) -> None:
        """Raises Replaced where a newer one has come, or for what other reason it was ended."""
        if self.ended.done():
            self.ended.result()


class Claims:
    """The requests that are being answered: a newer one of the same key takes an older one's place."""

    def __init__(self) -> None:
        self._newest: dict[Hashable, Claim] = {}
        self._over: Exception | None = None
        self._lock = threading.Lock()

    @contextmanager
    def made(self, key: Hashable) -> Iterator[Claim]:
        """The newest claim to the key for the length of a ``with`` block, unless a newer one is made meanwhile."""
        claim = Claim()
        with self._lock:
            older, over = self._newest.get(key), self._over
            self._newest[key] = claim
        if older is not None:
            older.end(Replaced())
        if over is not None:
            claim.end(over)
        try:
            yield claim
        finally:
            with self._lock:
                if self._newest.get(key) is claim:
                    del self._newest[key]

    def end_all(self, reason: Exception) -> None:
        """End those that there are, and those to come."""
        with self._lock:
            self._over, claims = reason, list(self._newest.values())
        for claim in claims:
            claim.end(reason)


class SingleFlight(Generic[Result]):
    """Calls for the same key that overlap in time share one computation. Nothing is kept after it."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Future[Result]] = {}
        self._lock = threading.Lock()

    def do(self, key: Hashable, compute: Callable[[], Result], *, claim: Claim | None = None) -> Result:
        """What ``compute`` returns or raises, computed by this thread or by the one that is at it already.

        With a ``claim`` it is computed in a thread of its own, and goes on for others where this one was ended.
        """
        with self._lock:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if claim is None:
            if leads:
                self._fly(key, flight, compute)
            return flight.result()
        if leads:
            work = functools.partial(contextvars.copy_context().run, self._fly, key, flight, compute)
            threading.Thread(target=work, name="flight", daemon=True).start()
        either: tuple[Future[Any], ...] = (flight, claim.ended)
        wait(either, return_when=FIRST_COMPLETED)
        if not flight.done():
            claim.check()
        return flight.result()

    def _fly(self, key: Hashable, flight: Future[Result], compute: Callable[[], Result]) -> None:
        try:
            result = compute()
        except BaseException as error:
            self._land(key)
            flight.set_exception(error)
        else:
            self._land(key)
            flight.set_result(result)

    def _land(self, key: Hashable) -> None:
        with self._lock:
            del self._flights[key]


KEPT_S = 30.0
"""After quick work, one place is kept free for more of it so long, in seconds."""


class Gate:
    """Lets few threads at a time at the device: quick work first, then who is more urgent, then who came first.

    While there is quick work now and then, all else leaves one place of several free for it: who waits for the answer
    to a click does not wait for an image to be encoded.
    """

    def __init__(self, places: int = 1) -> None:
        self._places = places
        self._waiting: list[tuple[bool, int, int]] = []
        self._inside = 0
        self._kept_until_s = -math.inf
        self._order = itertools.count()
        self._turn = threading.Condition()
        self.on_entered: Callable[[int, float], None] = lambda urgency, waited_s: None
        """Told of everyone who got in how urgent it was, and how long it waited, in seconds."""

    @property
    def places(self) -> int:
        """How many threads may be in at a time."""
        return self._places

    @places.setter
    def places(self, places: int) -> None:
        with self._turn:
            self._places = places
            self._turn.notify_all()

    @contextmanager
    def entered(
        self, *, urgency: int = 0, is_quick: bool = False, quick_follows: bool = False, claim: Claim | None = None
    ) -> Iterator[bool]:
        """Hold a place for the length of a ``with`` block. Quick work goes first, then the higher ``urgency``.

        Where ``quick_follows`` a place is kept for that as well. Gives whether nobody else was in, or waits who may
        come in beside this one. Raises why the ``claim`` ended where it did before its turn.
        """
        ticket, came_s = (not is_quick, -urgency, next(self._order)), time.monotonic()
        if claim is not None:
            claim.ended.add_done_callback(self._wake)
        with self._turn:
            if is_quick or quick_follows:
                self._kept_until_s = came_s + KEPT_S
            heapq.heappush(self._waiting, ticket)
            self._turn.wait_for(
                lambda: (self._waiting[0] == ticket and self._has_place()) or (claim and claim.ended.done())
            )
            self._waiting.remove(ticket)
            heapq.heapify(self._waiting)
            if claim is not None and claim.ended.done():
                self._turn.notify_all()
                claim.check()
            is_first = not self._inside
            self._inside += 1
            is_alone = is_first and not self._has_place()
            # The next one may find a place beside this one.
            self._turn.notify_all()
        try:
            self.on_entered(urgency, time.monotonic() - came_s)
            yield is_alone
        finally:
            with self._turn:
                if quick_follows:
                    self._kept_until_s = time.monotonic() + KEPT_S
                self._inside -= 1
                self._turn.notify_all()

    def _has_place(self) -> bool:
        """Whether somebody waits and the first of them may come in."""
        if not self._waiting:
            return False
        is_long = self._waiting[0][0]
        is_kept = is_long and self._places > 1 and time.monotonic() < self._kept_until_s
        return self._inside < self._places - is_kept

    def _wake(self, _: Future[None]) -> None:
        with self._turn:
            self._turn.notify_all()

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        with self._turn:
            return len(self._waiting)


class Room:
    """So many at a time, and nobody waits for a place."""

    def __init__(self, places: int) -> None:
        self._free = threading.Semaphore(places)

    @contextmanager
    def place(self) -> Iterator[bool]:
        """Whether there was a place; it is held for the length of a ``with`` block."""
        got = self._free.acquire(blocking=False)
        try:
            yield got
        finally:
            if got:
                self._free.release()


class FairPool:
    """Threads that do queued work for several groups in turn, however much of it one of them has.

    One thread is never had by the group that has all the others: work that is slow, such as images from a slow host,
    holds up nobody else's.
    """

    def __init__(self, threads: int, *, name: str) -> None:
        """The threads start with the first work; there must be two at least."""
        if threads < 2:
            raise ValueError(f"a fair pool needs 2 threads at least, got {threads}")
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        self._queues: OrderedDict[Hashable, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()
        self._at_work: dict[Hashable, int] = {}
        self._is_closed = False
        self._has_started = False
        self._turn = threading.Condition()

    def submit(self, group: Hashable, work: Callable[[], Result]) -> Future[Result]:
        """Put work in line behind the group's other work."""
        future: Future[Result] = Future()
        with self._turn:
            if self._is_closed:
                raise RuntimeError("the pool is closed")
            if not self._has_started:
                self._has_started = True
                for thread in self._threads:
                    thread.start()
            # What it logs names the request that it is for.
            in_context = functools.partial(contextvars.copy_context().run, work)
            self._queues.setdefault(group, deque()).append((future, in_context))
            self._turn.notify_all()
        return future

    @property
    def waiting(self) -> int:
        """How much work is in line."""
        with self._turn:
            return sum(map(len, self._queues.values()))

    def close(self) -> None:
        """Finish what was begun, cancel what was not."""
        with self._turn:
            self._is_closed = True
            for queue in self._queues.values():
                for future, _ in queue:
                    future.cancel()
            self._queues.clear()
            self._turn.notify_all()
        if self._has_started:
            for thread in self._threads:
                thread.join()

    def _next(self) -> Hashable | None:
        """The group whose turn it is: of those that may have another thread, the one served longest ago."""
        most = len(self._threads) - 1
        return next((group for group in self._queues if self._at_work.get(group, 0) < most), None)

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._is_closed or self._next() is not None)
                group = self._next()
                if group is None:
                    return
                queue = self._queues[group]
                future, work = queue.popleft()
                self._queues.move_to_end(group)
                if not queue:
                    del self._queues[group]
                self._at_work[group] = self._at_work.get(group, 0) + 1
            if future.set_running_or_notify_cancel():
                try:
                    result = work()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
            with self._turn:
                self._at_work[group] -= 1
                if not self._at_work[group]:
                    del self._at_work[group]
                self._turn.notify_all()
