"""Answers in the order of their completion, for `for` and `async for`."""

import asyncio
import threading

import pytest

from producer_sdk.future import Pending
from producer_sdk.group import Group
from producer_sdk.promise import Promise
from producer_sdk.results import Results
from protocols.errors import JobNotFound, ResultTimeout
from protocols.job import JobStatus, Reply

Inner = Promise[str]


def futures(*names: str) -> tuple[dict[str, Inner], list[Pending[str]]]:
    inner: dict[str, Inner] = {name: Promise() for name in names}
    return inner, [Pending(future, name) for name, future in inner.items()]


def test_answers_come_as_they_complete() -> None:
    inner, waiting = futures("a", "b", "c")
    results = iter(Results(waiting, timeout=10))
    for name in "cab":
        inner[name].set_result(name)
        assert next(results) == name
    with pytest.raises(StopIteration):
        next(results)


async def test_answers_come_as_they_complete_in_a_loop() -> None:
    inner, waiting = futures("a", "b", "c")
    results = aiter(Results(waiting, timeout=10))
    for name in "cab":
        threading.Timer(0.01, inner[name].set_result, [name]).start()
        assert await anext(results) == name
    with pytest.raises(StopAsyncIteration):
        await anext(results)


def test_nothing_to_wait_for_is_nothing() -> None:
    nothing: list[Pending[str]] = []
    assert list(Results(nothing, timeout=0.01)) == []
    assert len(Results(nothing)) == 0


def test_the_timeout_is_for_all_together_and_tells_how_many_came() -> None:
    inner, waiting = futures("a", "b", "c")
    inner["a"].set_result("a")
    inner["b"].set_result("b")
    results = Results(waiting, timeout=0.05)
    seen: list[str] = []
    with pytest.raises(ResultTimeout, match=r"2 of 3 answers within 0\.05 s; the others go on"):
        seen.extend(results)
    assert not inner["c"].done()


async def test_the_timeout_ends_a_wait_in_a_loop() -> None:
    inner, waiting = futures("a")
    with pytest.raises(ResultTimeout, match="0 of 1"):
        await anext(aiter(Results(waiting, timeout=0.02)))
    inner["a"].set_result("late")
    await asyncio.sleep(0)


def test_an_error_among_the_answers_is_raised_in_its_place() -> None:
    inner, waiting = futures("a", "b")
    inner["a"].set_exception(ZeroDivisionError())
    inner["b"].set_result("b")
    results = iter(Results(waiting, timeout=1))
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_tombstone_is_no_answer() -> None:
    tomb = Reply(job_id="j", status=JobStatus.COMPLETED, code=200, body=b"{}")
    for ask in (tomb.raise_for_status, lambda: Group.of(tomb, 2)):
        with pytest.raises(JobNotFound, match="collected"):
            ask()
