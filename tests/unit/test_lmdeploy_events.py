"""The stream of lmdeploy's server, however its bytes come."""

from collections.abc import AsyncIterator

import pytest

from worker.engines.lmdeploy_server.wire import events

TOLD = ["{}", '{"text":"\u2028\x85"}', '{"text":"data: "}']
STREAM = (
    "".join(f"data: {one}\n\n" for one in TOLD).encode() + b": still there\r\n\r\ndata: [DONE]\n\n"
)


async def pieces(bytes_each: int) -> AsyncIterator[bytes]:
    for start in range(0, len(STREAM), bytes_each):
        yield STREAM[start : start + bytes_each]


@pytest.mark.parametrize("bytes_each", [1, 2, 3, 5, 7, 11, len(STREAM)])
async def test_events_are_whole_wherever_the_stream_was_cut(bytes_each: int) -> None:
    assert [event.decode() async for event in events(pieces(bytes_each))] == TOLD
