"""A promise: given once, by any thread, to whoever waits; and the doorbell, which wakes a loop once for many."""

import asyncio
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from producer_sdk.promise import Doorbell, Promise, call_soon

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 20


def test_it_is_given_once() -> None:
    promise: Promise[int] = Promise()
    promise.set_result(7)
    with pytest.raises(RuntimeError, match="before"):
        promise.set_result(8)
    assert promise.result() == 7


def test_a_wait_that_ends_early_leaves_nothing_behind() -> None:
    promise: Promise[int] = Promise()
    assert not any(promise.wait(0.001) for _ in range(3))
    assert promise._calls == []  # pyright: ignore[reportPrivateUsage]


def test_every_thread_that_waits_is_told() -> None:
    promise: Promise[int] = Promise()
    told: list[int] = []
    waits = [threading.Thread(target=lambda: told.append(promise.result())) for _ in range(8)]
    for wait in waits:
        wait.start()
    promise.set_result(7)
    for wait in waits:
        wait.join(LIMIT_S)
    assert told == [7] * 8


def test_a_callback_that_fails_keeps_nobody_from_the_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    promise: Promise[int] = Promise()
    told: list[int] = []

    def fails(_: Promise[int]) -> None:
        raise ZeroDivisionError

    promise.add_done_callback(fails)
    promise.add_done_callback(lambda done: told.append(done.result()))
    promise.set_result(7)
    assert told == [7]
    assert "callback" in caplog.text


def test_no_callback_is_lost_while_the_answer_is_given() -> None:
    for _ in range(200):
        promise: Promise[int] = Promise()
        told: list[int] = []
        giving = threading.Thread(target=promise.set_result, args=[7])
        giving.start()
        for _ in range(20):
            promise.add_done_callback(lambda done, told=told: told.append(done.result()))
        giving.join(LIMIT_S)
        assert told == [7] * 20


async def test_many_waits_that_end_together_wake_their_loop_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, doorbell = asyncio.get_running_loop(), Doorbell()
    rung: list[Callable[[], object]] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", rung.append)
    waiters: list[asyncio.Future[None]] = [loop.create_future() for _ in range(9)]
    for waiter in waiters:
        doorbell.wake(waiter, None)
    assert len(rung) == 1
    rung[0]()
    assert all(waiter.done() for waiter in waiters)
    doorbell.wake(loop.create_future(), None)
    assert len(rung) == 2


def test_what_a_loop_gives_in_one_turn_wakes_another_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doorbell, loop = Doorbell(), asyncio.new_event_loop()
    waiters: list[asyncio.Future[None]] = [loop.create_future() for _ in range(9)]
    rung: list[Callable[[], object]] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", rung.append)

    async def give() -> None:
        for waiter in waiters:
            doorbell.wake(waiter, None)
        assert not rung
        await asyncio.sleep(0)
        assert len(rung) == 1

    asyncio.run(give())
    rung[0]()
    assert all(waiter.done() for waiter in waiters)
    loop.close()


def test_a_loop_that_has_ended_is_forgotten() -> None:
    doorbell, loop = Doorbell(), asyncio.new_event_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    loop.close()
    assert not call_soon(loop, partial(doorbell.wake, waiter, None))
    doorbell.wake(waiter, None)
    assert not doorbell._waiters  # pyright: ignore[reportPrivateUsage]
