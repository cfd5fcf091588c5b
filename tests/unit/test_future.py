"""Futures: asked for or awaited, from any thread and loop; no wait that ends early ends the work."""

import asyncio
import threading
from typing import Any, cast

import pytest

from producer_sdk.future import Future, Pending, converted
from producer_sdk.promise import Promise
from protocols.errors import JobConflict, ResultTimeout
from protocols.job import JobStatus, Reply

Inner = Promise[int]
REPLY = Reply(job_id="j", status=JobStatus.COMPLETED, code=200, body=b"{}")


def pending() -> tuple[Inner, Pending[int]]:
    inner: Inner = Promise()
    return inner, Pending(inner, "job j")


def test_a_result_is_given_once_it_is_there() -> None:
    inner, future = pending()
    assert not future.done()
    threading.Timer(0.05, inner.set_result, [7]).start()
    assert future.result(10) == 7
    assert future.done()
    assert (future.result(0), future.exception()) == (7, None)


def test_a_wait_that_ends_early_names_the_job_and_leaves_it() -> None:
    inner, future = pending()
    for wait in (future.result, future.exception):
        with pytest.raises(ResultTimeout, match=r"job j: no answer within 0\.01 s; it goes on"):
            wait(0.01)
    inner.set_result(7)
    assert future.result(0) == 7


async def test_waits_that_were_cancelled_are_not_woken_at_the_end() -> None:
    inner: Inner = Promise()
    woken: list[object] = []
    future = Pending(inner, "job j", lambda waiter, _: woken.append(waiter))
    waits = [asyncio.ensure_future(wait_for(future)) for _ in range(3)]
    await asyncio.sleep(0)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    inner.set_result(7)
    assert woken == []
    assert await future == 7


async def wait_for(future: Pending[int]) -> int:
    return await future


def test_an_error_stands_for_the_answer() -> None:
    inner, future = pending()
    inner.set_exception(JobConflict("other body"))
    assert isinstance(future.exception(0), JobConflict)
    with pytest.raises(JobConflict):
        future.result(0)


def test_an_answer_that_is_itself_a_time_out_is_raised_as_it_is() -> None:
    inner, future = pending()
    inner.set_exception(TimeoutError("theirs"))
    with pytest.raises(TimeoutError, match="theirs"):
        future.result(0)
    assert not isinstance(future.exception(0), ResultTimeout)


async def test_awaiting_wakes_the_loop_from_another_thread() -> None:
    inner, future = pending()
    threading.Timer(0.05, inner.set_result, [7]).start()
    async with asyncio.timeout(10):
        assert await future == 7
        assert await future == 7


async def test_awaiting_raises_what_stands_for_the_answer() -> None:
    inner, future = pending()
    inner.set_exception(JobConflict("other body"))
    with pytest.raises(JobConflict):
        await future


async def test_cancelling_a_wait_leaves_the_work_and_the_other_waits() -> None:
    inner, future = pending()

    async def wait() -> int:
        return await future

    given_up, kept = asyncio.create_task(wait()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.sleep(0)
    assert not inner.done()
    inner.set_result(7)
    assert await kept == 7
    with pytest.raises(asyncio.CancelledError):
        await given_up


def test_an_answer_after_the_loop_has_ended_troubles_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner, future = pending()

    async def give_up() -> None:
        async with asyncio.timeout(0.01):
            await future

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    inner.set_result(7)
    assert not caplog.records


def test_callbacks_get_the_future() -> None:
    inner, future = pending()
    called: list[object] = []
    future.add_done_callback(called.append)
    inner.set_result(7)
    future.add_done_callback(called.append)
    assert called == [future, future]


def test_a_job_future_shows_its_id_and_cancels_its_job() -> None:
    inner: Promise[Reply] = Promise()
    cancelled: list[str] = []

    def cancel(job_id: str) -> Pending[int]:
        cancelled.append(job_id)
        return cast("Any", None)

    future = Future(inner, "j", cancel)
    assert repr(future) == "<Future of job j: pending>"
    future.cancel()
    assert cancelled == ["j"]
    inner.set_result(REPLY)
    assert repr(future) == "<Future of job j: done>"


def test_a_converted_future_has_what_was_made_of_the_reply() -> None:
    inner: Promise[Reply] = Promise()
    outer = converted(inner, lambda reply: reply.job_id)
    inner.set_result(REPLY)
    assert outer.result() == "j"


def test_a_converted_future_passes_errors_on_and_those_of_the_conversion() -> None:
    inner: Promise[Reply] = Promise()
    outer = converted(inner, lambda reply: reply.job_id)
    inner.set_exception(JobConflict("other body"))
    assert isinstance(outer.exception(), JobConflict)

    def broken(_: Reply) -> str:
        raise ZeroDivisionError

    inner = Promise()
    outer = converted(inner, broken)
    inner.set_result(REPLY)
    assert isinstance(outer.exception(), ZeroDivisionError)
