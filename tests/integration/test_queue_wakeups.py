"""Wake-ups: the inbox of a client, and the bell that idle workers wait on."""

import asyncio

import pytest

from protocols.queue.broker import Broker
from protocols.queue.link import Link
from protocols.queue.rows import Hold
from tests.job_body import ending, job
from tests.pool_look import Look, until_blocked
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers

LONG_S = 20.0
AT_ONCE_S = 10.0
"""Well below `LONG_S`, for a busy machine."""


async def ready_after_empty_bell(broker: Broker) -> None:
    while await broker.bell(block_s=0.01):
        pass


async def test_a_waiting_client_is_woken_by_a_reply(
    broker: Broker, url: str, pool: str, take: Take
) -> None:
    waiting = Broker(Link(url, name="inbox"), pool)
    await broker.enqueue([job(name, inbox="c") for name in "ab"])
    wait = asyncio.create_task(waiting.news("c", most=10, block_s=LONG_S))
    async with asyncio.timeout(AT_ONCE_S):
        await broker.finish([ending(lease) for lease in await take(2)])
        assert await wait == ["a", "b"]
    await waiting.link.close()


async def test_every_client_of_one_job_is_woken(broker: Broker, take: Take) -> None:
    for client in ("a", "b", "a"):
        assert await broker.enqueue([job("shared", inbox=client)]) == ["queued"]
    await broker.finish([ending(lease) for lease in await take()])
    for client in ("a", "b"):
        assert await broker.news(client, most=10, block_s=0.01) == ["shared"]


async def test_of_many_clients_of_one_job_the_newest_four_are_woken(
    broker: Broker, take: Take
) -> None:
    for client in "abcdef":
        await broker.enqueue([job("shared", inbox=client)])
    await broker.finish([ending(lease) for lease in await take()])
    woken = [await broker.news(client, most=10, block_s=0.01) for client in "abcdef"]
    assert woken == [[], [], *[["shared"]] * 4]


async def test_an_inbox_is_bounded_and_expires(broker: Broker, look: Look, take: Take) -> None:
    inbox = broker.keys.inbox("c")
    for _ in range(101):
        look("RPUSH", inbox, *["x"] * 1000)
    await broker.enqueue([job("a", inbox="c")])
    await broker.finish([ending(lease) for lease in await take()])
    assert look("LLEN", inbox) == 100_000
    assert look("LINDEX", inbox, -1) == b"a"
    assert 3500_000 < look("PTTL", inbox) <= 3600_000


async def test_reading_an_inbox_is_bounded(broker: Broker, look: Look) -> None:
    look("RPUSH", broker.keys.inbox("c"), "a", "b", "c")
    assert await broker.news("c", most=2, block_s=1) == ["a", "b"]
    assert await broker.news("c", most=2, block_s=1) == ["c"]


@pytest.mark.parametrize("lane", ["high", "normal", "low"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "enqueued"])
async def test_an_arriving_job_wakes_an_idle_worker(
    broker: Broker, look: Look, url: str, pool: str, lane: str, raw: bool
) -> None:
    idle = Broker(Link(url, name=f"idle-{pool}"), pool)
    await ready_after_empty_bell(idle)
    ringing = asyncio.create_task(idle.bell(block_s=LONG_S))
    async with asyncio.timeout(AT_ONCE_S):
        await until_blocked(look, f"idle-{pool}")
        if raw:
            look("XADD", broker.keys.jobs(lane), "*", "body", "{}")
        else:
            await broker.enqueue([job("a", lane=lane)])  # pyright: ignore[reportArgumentType]
        assert await ringing
    await idle.link.close()


async def test_a_handed_back_job_wakes_an_idle_worker(
    broker: Broker, url: str, pool: str, take: Take
) -> None:
    idle = Broker(Link(url, name=f"idle-{pool}"), pool)
    await broker.enqueue([job("a")])
    (lease,) = await take(2)
    await ready_after_empty_bell(idle)
    ringing = asyncio.create_task(idle.bell(block_s=LONG_S))
    async with asyncio.timeout(AT_ONCE_S):
        await broker.release([Hold("a", lease.fence)])
        assert await ringing
    await idle.link.close()


async def test_one_job_wakes_one_worker(broker: Broker) -> None:
    await broker.enqueue([job("a")])
    assert await broker.bell(block_s=0.01)
    assert not await broker.bell(block_s=0.05)


async def test_a_take_that_leaves_nothing_silences_the_bell(broker: Broker, take: Take) -> None:
    await broker.enqueue([job(f"j{i}") for i in range(20)])
    assert len(await take(64)) == 20
    assert not await broker.bell(block_s=0.05)


async def test_a_take_that_leaves_something_does_not(broker: Broker, take: Take) -> None:
    await broker.enqueue([job(f"j{i}") for i in range(20)])
    assert len(await take(10)) == 10
    assert await broker.bell(block_s=LONG_S)
