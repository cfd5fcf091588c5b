"""What a reader of a SegmentStream sees."""

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from protocols.errors import EngineFailed
from protocols.job import Segment
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from worker.engines.stream import SegmentStream, put_all

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT_S = 30


def segment(
    index: int, start: int, *, finish_reason: FinishReason | None = None, version: int = 0
) -> Segment:
    return Segment(
        index=index,
        start=start,
        token_ids=TokenIds([start + 100]),
        logprobs=Logprobs([-start]),
        top_ids=TokenIds([start, start + 1]),
        top_logprobs=Logprobs([-start, -start - 1]),
        policy_version=version,
        finish_reason=finish_reason,
    )


async def read(stream: SegmentStream) -> list[Segment]:
    async with asyncio.timeout(LIMIT_S):
        return [one async for one in stream]


async def test_the_stream_ends_after_the_last_samples_last_segment() -> None:
    stream = SegmentStream(2)
    stream.put(segment(1, 0, finish_reason="stop"))
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    stream.put(segment(0, 0))
    stream.put(segment(0, 1, finish_reason="length"))
    segments = await reading
    assert [(one.index, one.finish_reason) for one in segments if one.finish_reason] == [
        (1, "stop"),
        (0, "length"),
    ]


async def test_segments_of_a_sample_that_wait_together_come_as_one() -> None:
    stream = SegmentStream(2)
    for start in range(3):
        stream.put(segment(0, start))
        stream.put(segment(1, start, finish_reason="stop" if start == 2 else None))
    stream.put(segment(0, 3, finish_reason="length"))
    first, second = await read(stream)
    assert (first.index, first.start, first.finish_reason) == (0, 0, "length")
    assert list(first.token_ids) == [100, 101, 102, 103]
    assert list(first.logprobs) == [0, -1, -2, -3]
    assert list(first.top_ids) == [0, 1, 1, 2, 2, 3, 3, 4]
    assert list(first.top_logprobs) == [0, -1, -1, -2, -2, -3, -3, -4]
    assert (second.index, second.finish_reason, len(second.token_ids)) == (1, "stop", 3)


async def test_tokens_of_two_policy_versions_are_never_one_segment() -> None:
    stream = SegmentStream(1)
    for start, version in enumerate([4, 4, 5, 5, 5]):
        stream.put(segment(0, start, version=version, finish_reason="stop" if start == 4 else None))
    segments = await read(stream)
    assert [(one.policy_version, one.start, len(one.token_ids)) for one in segments] == [
        (4, 0, 2),
        (5, 2, 3),
    ]


async def test_a_stopped_sample_says_no_more_and_the_engine_is_told() -> None:
    told: list[Sequence[int]] = []
    stream = SegmentStream(2, told.append)
    stream.put(segment(0, 0))
    stream.put(segment(1, 0))
    stream.stop(0)
    stream.stop(0)
    stream.put(segment(0, 1, finish_reason="stop"))
    stream.put(segment(1, 1, finish_reason="stop"))
    stream.stop(1)
    assert [one.index for one in await read(stream)] == [1]
    assert told == [[0]]


async def test_closing_ends_a_reader_that_waits() -> None:
    told: list[Sequence[int]] = []
    stream = SegmentStream(3, told.append)
    stream.put(segment(1, 0, finish_reason="stop"))
    reader = aiter(stream)
    assert (await anext(reader)).index == 1
    waiting = asyncio.ensure_future(anext(reader, None))
    await asyncio.sleep(0)
    stream.close()
    stream.close()
    assert await asyncio.wait_for(waiting, LIMIT_S) is None
    assert told == [[0, 2]]


async def test_a_failure_comes_after_what_waits() -> None:
    stream = SegmentStream(1)
    stream.put(segment(0, 0))
    stream.fail(EngineFailed("broken"))
    reader = aiter(stream)
    assert (await anext(reader)).start == 0
    with pytest.raises(EngineFailed, match="broken"):
        await anext(reader)


async def test_a_failure_wakes_a_reader_and_spares_finished_samples() -> None:
    finished, open_one = SegmentStream(1), SegmentStream(1)
    finished.put(segment(0, 0, finish_reason="stop"))
    finished.fail(EngineFailed("late"))
    assert len(await read(finished)) == 1
    waiting = asyncio.ensure_future(anext(aiter(open_one)))
    await asyncio.sleep(0)
    open_one.fail(EngineFailed("broken"))
    with pytest.raises(EngineFailed):
        await asyncio.wait_for(waiting, LIMIT_S)


async def test_a_cancelled_reader_can_read_on() -> None:
    stream = SegmentStream(1)
    waiting = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    stream.put(segment(0, 0, finish_reason="stop"))
    assert len(await read(stream)) == 1


async def test_a_thread_feeds_many_streams_with_one_call() -> None:
    streams = [SegmentStream(1) for _ in range(3)]
    loop = asyncio.get_running_loop()
    batch: list[tuple[SegmentStream, Segment | EngineFailed]] = [
        (streams[0], segment(0, 0, finish_reason="stop")),
        (streams[1], EngineFailed("broken")),
        (streams[2], segment(0, 0, finish_reason="stop")),
    ]
    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(put_all, batch))
    reading = [asyncio.create_task(read(stream)) for stream in streams]
    thread.start()
    results = await asyncio.gather(*reading, return_exceptions=True)
    thread.join(LIMIT_S)
    assert [type(one) for one in results] == [list, EngineFailed, list]
