"""Batches that grow while one is under way: order, bounds, answers, errors."""

import asyncio
from collections.abc import Sequence

import pytest

from protocols.queue.coalesce import Coalescer


class Sender:
    """Answers each item with itself, once it is let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.free, self.asked = asyncio.Event(), asyncio.Event()
        self.under_way = 0
        if not held:
            self.free.set()

    async def __call__(self, batch: Sequence[int]) -> list[int]:
        self.batches.append(list(batch))
        self.asked.set()
        self.under_way += 1
        assert self.under_way == 1
        await self.free.wait()
        self.under_way -= 1
        return list(batch)


def coalescer(sender: Sender, *, most: int = 256, most_bytes: int = 10**9) -> Coalescer[int, int]:
    return Coalescer(sender, size=lambda item: item, most=most, most_bytes=most_bytes)


async def test_what_one_turn_of_the_loop_puts_goes_together() -> None:
    sender = Sender()
    gathered = coalescer(sender)
    assert await asyncio.gather(*(gathered.answer(i) for i in range(5))) == [0, 1, 2, 3, 4]
    assert sender.batches == [[0, 1, 2, 3, 4]]


async def test_what_gathers_during_a_round_trip_is_the_next_batch() -> None:
    sender = Sender(held=True)
    gathered = coalescer(sender)
    first = asyncio.ensure_future(gathered.answer(1))
    await sender.asked.wait()
    later = [asyncio.ensure_future(gathered.answer(i)) for i in range(2, 9)]
    await asyncio.sleep(0)
    sender.free.set()
    assert await asyncio.gather(first, *later) == list(range(1, 9))
    assert sender.batches == [[1], list(range(2, 9))]


async def test_a_batch_is_bounded_in_items() -> None:
    sender = Sender()
    gathered = coalescer(sender, most=4)
    assert await asyncio.gather(*(gathered.answer(1) for _ in range(10))) == [1] * 10
    assert [len(batch) for batch in sender.batches] == [4, 4, 2]


async def test_a_batch_is_bounded_in_bytes_and_keeps_the_order() -> None:
    sender = Sender()
    gathered = coalescer(sender, most_bytes=10)
    sizes = [4, 4, 4, 25, 1, 9, 9]
    assert await asyncio.gather(*(gathered.answer(size) for size in sizes)) == sizes
    assert sender.batches == [[4, 4], [4], [25], [1, 9], [9]]


async def test_an_error_meets_its_batch_and_nobody_else() -> None:
    calls = 0

    async def send(batch: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConnectionError("gone")
        return list(batch)

    gathered = Coalescer[int, int](send, size=lambda _: 1, most=2)
    answers = await asyncio.gather(*(gathered.answer(i) for i in range(4)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ConnectionError, ConnectionError, int, int]


async def test_one_refused_item_of_a_batch_is_told_alone() -> None:
    async def send(batch: Sequence[int]) -> list[int | Exception]:
        return [ValueError("odd") if item % 2 else item for item in batch]

    gathered = Coalescer[int, int | Exception](send, size=lambda _: 1)
    told: list[int | Exception] = []
    for item in range(4):
        gathered.put(item, told.append)
    await gathered.close()
    assert [type(answer) for answer in told] == [int, ValueError, int, ValueError]


async def test_a_wait_given_up_disturbs_nobody() -> None:
    sender = Sender(held=True)
    gathered = coalescer(sender)
    given_up = asyncio.ensure_future(gathered.answer(1))
    other = asyncio.ensure_future(gathered.answer(2))
    await sender.asked.wait()
    given_up.cancel()
    sender.free.set()
    assert await other == 2
    with pytest.raises(asyncio.CancelledError):
        await given_up


async def test_closing_waits_for_all_that_was_put() -> None:
    sender = Sender()
    gathered = coalescer(sender, most=1)
    told: list[int | Exception] = []
    for item in range(5):
        gathered.put(item, told.append)
    await gathered.close()
    assert told == [0, 1, 2, 3, 4]
    await gathered.close()


async def test_it_works_again_after_a_pause() -> None:
    sender = Sender()
    gathered = coalescer(sender)
    assert await gathered.answer(1) == 1
    assert await gathered.answer(2) == 2
    assert sender.batches == [[1], [2]]


async def test_what_is_brought_before_a_batch_goes_with_it() -> None:
    sender, elsewhere = Sender(held=True), [5, 6]

    def gather() -> None:
        while elsewhere:
            gathered.put(elsewhere.pop(0), told.append)

    told: list[int | Exception] = []
    gathered = Coalescer(sender, size=lambda item: item, gather=gather)
    gathered.put(4, told.append)
    await sender.asked.wait()
    elsewhere += [7, 8]
    sender.free.set()
    await gathered.close()
    assert sender.batches == [[4, 5, 6], [7, 8]]
    assert told == [4, 5, 6, 7, 8]
    assert not gathered.waiting
