"""What followed streams cost the server: their segments, however many they are and whoever follows."""

import asyncio
import time

import pytest

from producer_sdk import Client
from tests.job_body import scripted
from tests.monitor import Monitor
from tests.pool_look import Look
from tests.queue_fixtures import Serve
from tests.servers import StartServer, both_servers
from tests.sse import chat_text

pytestmark = both_servers

STREAMS = 2_000
TEXT = "sixteen letters!"


@pytest.fixture
def url(fresh_server: StartServer) -> str:
    return fresh_server().url


async def read_all(client: Client, ms_per_token: float) -> list[bytes]:
    async def read(number: int) -> bytes:
        stream = client.stream(scripted(TEXT, ms_per_token=ms_per_token), job_id=f"s-{number}")
        return b"".join([frame async for frame in stream.frames()])

    return await asyncio.gather(*(read(number) for number in range(STREAMS)))


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_2000_followed_streams_cost_no_more_than_their_segments(
    client: Client, look: Look, serve: Serve
) -> None:
    for _ in range(2):
        serve(slots=STREAMS // 2, lease_s=30)
    before = {name: look.calls(name) for name in ("xrange", "xread", "hmget", "blmpop", "fcall")}
    begun_s = time.monotonic()
    frames = await read_all(client, ms_per_token=500)
    took_s = time.monotonic() - begun_s
    spent = {name: look.calls(name) - count for name, count in before.items()}
    entries = sum(look("XLEN", look.keys.progress(f"s-{n}")) for n in range(STREAMS))
    print(f"{STREAMS} streams, {entries} entries, {took_s:.1f} s; commands: {spent}")  # noqa: T201
    assert {chat_text(whole) for whole in frames} == {TEXT}
    assert entries > 4 * STREAMS
    # one look as a stream is begun, one as its end is told; the others each for a segment
    assert spent["xrange"] <= entries + 2 * STREAMS
    assert spent["xread"] == 0
    assert spent["blmpop"] < entries


async def test_streams_that_say_nothing_cost_nothing(
    client: Client, serve: Serve, url: str
) -> None:
    serve(slots=200, lease_s=30)
    streams = [client.stream(scripted(TEXT, fail="hang", at_token=1)) for _ in range(200)]
    readings = [aiter(stream.frames()) for stream in streams]
    await asyncio.gather(*(anext(reading) for reading in readings))
    waiting = [asyncio.ensure_future(anext(reading)) for reading in readings]
    await asyncio.sleep(0.5)
    with Monitor(url) as monitor:
        await asyncio.sleep(2)
        assert monitor.sent("XRANGE") == 0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_followers_of_anothers_streams_look_together(
    client: Client, serve: Serve, url: str, pool: str
) -> None:
    serve(slots=200, lease_s=30)
    streams = [client.stream(scripted(TEXT, fail="hang", at_token=1)) for _ in range(50)]
    await asyncio.gather(*(anext(aiter(stream.frames())) for stream in streams))
    with Client(url, pool=pool) as other:
        readings = [aiter(other.follow(stream.job_id).frames()) for stream in streams]
        await asyncio.gather(*(anext(reading) for reading in readings))
        waiting = [asyncio.ensure_future(anext(reading)) for reading in readings]
        await asyncio.sleep(0.5)
        with Monitor(url) as monitor:
            begun_s = time.monotonic()
            await asyncio.sleep(2)
            looks = monitor.sent("XRANGE")
        ticks = (time.monotonic() - begun_s) / 0.25 + 1
        assert 0 < looks <= ticks * len(streams)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
