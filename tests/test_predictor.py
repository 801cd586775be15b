"""Whose turn it is: at the device, among groups of work, and of several requests for one answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest

from backend.errors import Busy
from backend.flight import Claims, FairPool, Gate, Replaced, Room, SingleFlight


def started(*works) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads


def until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_gate_lets_the_urgent_go_first_then_who_came_first():
    gate, order = Gate(), []

    def enter(name: str, urgency: int) -> None:
        with gate.entered(urgency=urgency):
            order.append(name)

    threads: list[threading.Thread] = []
    with gate.entered():
        for count, (name, urgency) in enumerate((("batch", 0), ("batch 2", 0), ("opened", 1), ("click", 2)), 1):
            threads += started(lambda name=name, urgency=urgency: enter(name, urgency))
            until(lambda count=count: gate.waiting == count)
    for thread in threads:
        thread.join(20)
    assert order == ["click", "opened", "batch", "batch 2"]


def test_a_gate_of_two_places_says_who_is_alone_and_keeps_a_third_out():
    gate, alone = Gate(2), {}
    go, third = threading.Event(), threading.Event()

    def enter(name: str, then: threading.Event | None = None) -> None:
        with gate.entered() as is_alone:
            alone[name] = is_alone
            if then is None:
                go.wait(20)
            else:
                then.set()

    with gate.entered() as is_alone:
        assert is_alone
        started(lambda: enter("second"))
        until(lambda: "second" in alone)
        started(lambda: enter("third", third))
        until(lambda: gate.waiting == 1)
        assert not third.wait(0.02)
        gate.places = 3
        assert third.wait(20)
    go.set()
    assert alone == {"second": False, "third": False}
    with gate.entered() as is_alone:
        pass
    assert gate.waiting == 0


def test_while_there_are_clicks_other_work_leaves_them_a_place():
    gate, inside, go = Gate(2), [], threading.Event()

    def long(name: str, urgency: int) -> None:
        with gate.entered(urgency=urgency) as is_alone:
            inside.append((name, is_alone))
            go.wait(20)

    with gate.entered(urgency=2, is_quick=True) as is_alone:
        assert is_alone
    threads = started(lambda: long("opened", 1))
    until(lambda: len(inside) == 1)
    # As urgent as a click, but it takes as long as an image does to be encoded.
    threads += started(lambda: long("cold click", 2))
    until(lambda: gate.waiting == 1)
    with gate.entered(urgency=2, is_quick=True) as is_alone:
        assert not is_alone
        assert (inside, gate.waiting) == ([("opened", True)], 1)
    # Nobody has clicked for a while.
    gate._kept_until_s = 0.0
    gate.places = 2
    until(lambda: len(inside) == 2)
    go.set()
    for thread in threads:
        thread.join(20)
    assert inside[1] == ("cold click", False)


def test_who_looks_at_an_image_to_answer_a_click_leaves_the_answer_a_place():
    gate, order = Gate(2), []

    def cold_click(name: str) -> None:
        with gate.entered(urgency=2, quick_follows=True):
            order.append(f"{name} looks")
            time.sleep(0.1)
        with gate.entered(urgency=2, is_quick=True):
            order.append(f"{name} answers")

    def others() -> None:
        with gate.entered():
            order.append("another")

    threads = started(lambda: cold_click("first"))
    until(lambda: bool(order))
    threads += started(lambda: cold_click("second"))
    until(lambda: gate.waiting == 1)
    threads += started(others)
    for thread in threads:
        thread.join(20)
    # Never two of them at once beside the first, which would keep its answer out.
    assert order.index("first looks") < order.index("first answers") < order.index("second answers")
    assert order.index("second looks") < order.index("another")


def test_all_claims_end_with_the_reason_those_to_come_too():
    gate, claims, told = Gate(), Claims(), []

    def wait_in_line() -> None:
        with claims.made("task") as claim, pytest.raises(Busy) as error, gate.entered(claim=claim):
            pytest.fail("entered")
        told.append(str(error.value))

    with gate.entered():
        threads = started(wait_in_line)
        until(lambda: gate.waiting == 1)
        claims.end_all(Busy("stopped"))
        threads[0].join(20)
    assert told == ["stopped"]
    with claims.made("task") as newer, pytest.raises(Busy):
        newer.check()


def test_quick_work_goes_before_long_work_that_is_as_urgent_and_came_first():
    gate, order = Gate(), []

    def enter(name: str, is_quick: bool) -> None:
        with gate.entered(urgency=2, is_quick=is_quick):
            order.append(name)

    threads: list[threading.Thread] = []
    with gate.entered():
        for count, (name, is_quick) in enumerate((("cold click", False), ("click", True)), 1):
            threads += started(lambda name=name, is_quick=is_quick: enter(name, is_quick))
            until(lambda count=count: gate.waiting == count)
    for thread in threads:
        thread.join(20)
    assert order == ["click", "cold click"]


def test_a_replaced_claim_leaves_the_line_at_once():
    gate, claims, gone = Gate(), Claims(), threading.Event()

    def older() -> None:
        with claims.made("task") as claim, pytest.raises(Replaced), gate.entered(claim=claim):
            pytest.fail("entered")
        gone.set()

    with gate.entered():
        started(older)
        until(lambda: gate.waiting == 1)
        with claims.made("another task"):
            time.sleep(0.02)
            assert not gone.is_set()
        with claims.made("task") as newer:
            assert gone.wait(20)
            newer.check()
        assert gate.waiting == 0
    with gate.entered():
        pass


def test_work_that_its_first_asker_gives_up_is_done_for_the_others_once():
    flights: SingleFlight[int] = SingleFlight()
    claims, go, calls, answers, given_up = Claims(), threading.Event(), [], [], threading.Event()

    def compute() -> int:
        calls.append(1)
        go.wait(20)
        return 7

    def older() -> None:
        with claims.made("task") as claim, pytest.raises(Replaced):
            flights.do("image", compute, claim=claim)
        given_up.set()

    def newer() -> None:
        with claims.made("task") as claim:
            answers.append(flights.do("image", compute, claim=claim))

    first = started(older)
    until(lambda: bool(calls))
    rest = started(newer, lambda: answers.append(flights.do("image", compute)))
    assert given_up.wait(20)
    go.set()
    for thread in first + rest:
        thread.join(20)
    assert (calls, answers) == ([1], [7, 7])


def test_an_error_reaches_all_who_asked():
    flights: SingleFlight[int] = SingleFlight()
    with Claims().made("task") as claim, pytest.raises(ZeroDivisionError):
        flights.do("image", lambda: 1 // 0, claim=claim)
    assert flights.do("image", lambda: 1) == 1


def test_a_small_group_does_not_wait_for_a_large_one():
    pool, order = FairPool(2, name="test"), []
    go = threading.Event()
    large = [pool.submit("large", lambda i=i: (go.wait(20), order.append(f"large {i}"))) for i in range(30)]
    small = [pool.submit("small", lambda i=i: order.append(f"small {i}")) for i in range(3)]
    for future in small:
        future.result(20)  # although no work of the large group has come to its end
    go.set()
    for future in large:
        future.result(20)
    assert order[:3] == ["small 0", "small 1", "small 2"]
    assert order[3:] == [f"large {i}" for i in range(30)]
    pool.close()


def test_groups_take_turns():
    pool, order = FairPool(2, name="test"), []
    go = threading.Event()
    held = pool.submit("held", lambda: go.wait(20))
    blocked = pool.submit("a", lambda: go.wait(20))
    until(lambda: pool.waiting == 0)
    futures = [pool.submit(group, lambda group=group: order.append(group)) for group in "aaaabb"]
    go.set()
    for future in [held, blocked, *futures]:
        future.result(20)
    assert sorted(order) == list("aaaabb")
    assert set(order[:4]) == {"a", "b"}
    assert order[-1] == "a"
    pool.close()


def test_a_closed_pool_finishes_what_was_begun():
    pool, go = FairPool(2, name="test"), threading.Event()
    begun = pool.submit("a", lambda: go.wait(20))
    until(lambda: pool.waiting == 0)
    waiting = pool.submit("a", lambda: True)
    closing = started(pool.close)
    with pytest.raises(CancelledError):
        waiting.result(20)
    go.set()
    closing[0].join(20)
    assert begun.result(0)
    with pytest.raises(RuntimeError):
        pool.submit("a", lambda: True)


def test_a_pool_passes_errors_on_and_goes_on():
    pool = FairPool(2, name="test")
    with pytest.raises(ZeroDivisionError):
        pool.submit("a", lambda: 1 // 0).result(20)
    assert pool.submit("a", lambda: 5).result(20) == 5
    pool.close()


def test_a_room_has_so_many_places_and_gives_them_back():
    room = Room(2)
    with room.place() as first, room.place() as second, room.place() as third:
        assert (first, second, third) == (True, True, False)
    with room.place() as again:
        assert again
