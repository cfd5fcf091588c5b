"""Wake-ups: the inbox of a client, and the bell that idle workers wait on."""

import asyncio

import pytest

from protocols.queue.broker import Broker
from protocols.queue.keys import BELL, LANES, Keys
from protocols.queue.link import Link
from protocols.queue.rows import Hold, Taken
from tests.job_body import ending, job
from tests.pool_look import Look, expire_lease, sweep, until_blocked
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers

LONG_S = 20.0
AT_ONCE_S = 10.0
"""Well below `LONG_S`, for a busy machine."""


def rings(look: Look, keys: Keys) -> bool:
    """Whether an idle worker would be woken now; it takes that wake-up."""
    streams = [keys.jobs(lane) for lane in LANES]
    group = ("GROUP", BELL, BELL, "COUNT", 1, "NOACK")
    return bool(look("XREADGROUP", *group, "STREAMS", *streams, *(">" for _ in streams)))


async def waits(idle: Broker, look: Look, name: str) -> "asyncio.Task[Taken]":
    """A worker that waits for a job."""
    await idle.link.call("PING")
    taking = idle.take("idle", "n", 1, lease_ms=60_000, policy_version=0, bell_s=LONG_S)
    task = asyncio.create_task(taking)
    await until_blocked(look, name)
    return task


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
    async with asyncio.timeout(AT_ONCE_S):
        ringing = await waits(idle, look, f"idle-{pool}")
        if raw:
            look("XADD", broker.keys.jobs(lane), "*", "body", "{}")
        else:
            await broker.enqueue([job("a", lane=lane)])  # pyright: ignore[reportArgumentType]
        assert len((await ringing).leases) == 1
    await idle.link.close()


async def test_a_handed_back_job_wakes_an_idle_worker(
    broker: Broker, look: Look, url: str, pool: str, take: Take
) -> None:
    idle = Broker(Link(url, name=f"idle-{pool}"), pool)
    await broker.enqueue([job("a")])
    (lease,) = await take(2)
    async with asyncio.timeout(AT_ONCE_S):
        ringing = await waits(idle, look, f"idle-{pool}")
        await broker.release([Hold("a", lease.fence)])
        assert await ringing == Taken("open", [], hold=False, again=True)
    await idle.link.close()


async def lose(broker: Broker, look: Look, take: Take, job_id: str) -> None:
    """A worker takes that job and dies."""
    assert [lease.job_id for lease in await take(1, worker="dead")] == [job_id]
    expire_lease(look, job_id)
    assert await sweep(broker) == {"reclaimed": 1}


@pytest.mark.parametrize("losses", [1, 2], ids=["lost", "quarantined"])
async def test_a_lost_job_is_not_given_to_who_waited_and_may_be_frozen(
    broker: Broker, look: Look, take: Take, losses: int
) -> None:
    await broker.enqueue([job("a")])
    for _ in range(losses):
        await lose(broker, look, take, "a")
    waited = await broker.take("w", "n1", 9, lease_ms=60_000, policy_version=0, bell_s=0.05)
    assert waited == Taken("open", [], hold=False, again=True)
    assert [lease.job_id for lease in await take()] == ["a"]


async def test_a_lost_job_comes_before_new_ones_also_after_a_wait(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    await lose(broker, look, take, "a")
    await broker.enqueue([job("b")])
    waited = await broker.take("w", "n1", 9, lease_ms=60_000, policy_version=0, bell_s=0.05)
    assert waited == Taken("open", [], hold=False, again=True)
    assert [lease.job_id for lease in await take(9)] == ["a", "b"]


async def test_who_waits_beside_a_resumed_job_that_runs_is_given_new_ones(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    await lose(broker, look, take, "a")
    assert len(await take(9)) == 1
    await broker.enqueue([job("b")])
    waited = await broker.take("w", "n1", 9, lease_ms=60_000, policy_version=0, bell_s=0.05)
    assert [lease.job_id for lease in waited.leases] == ["b"]
    assert not waited.again


async def test_one_job_wakes_one_worker(broker: Broker, look: Look) -> None:
    await broker.enqueue([job("a")])
    assert rings(look, broker.keys)
    assert not rings(look, broker.keys)


async def test_a_take_that_leaves_nothing_silences_the_bell(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job(f"j{i}") for i in range(20)])
    assert len(await take(64)) == 20
    assert not rings(look, broker.keys)


async def test_a_take_that_leaves_something_does_not(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job(f"j{i}") for i in range(20)])
    assert len(await take(10)) == 10
    assert rings(look, broker.keys)


async def test_a_wait_for_the_bell_ends_with_what_there_is(broker: Broker) -> None:
    async with asyncio.timeout(AT_ONCE_S):
        taken = await broker.take("w", "n", 1, lease_ms=1000, policy_version=0, bell_s=0.05)
    assert taken == Taken("open", [], hold=False)


async def test_a_gate_that_closes_meanwhile_closes_for_who_waits(
    broker: Broker, look: Look, url: str, pool: str
) -> None:
    idle = Broker(Link(url, name=f"idle-{pool}"), pool)
    async with asyncio.timeout(AT_ONCE_S):
        ringing = await waits(idle, look, f"idle-{pool}")
        look("HSET", broker.keys.desired, "gate", "closed")
        await broker.enqueue([job("a")])
        assert await ringing == Taken("closed", [], hold=False)
    await idle.link.close()


async def test_a_wait_whose_connection_breaks_gives_what_it_has_begun(
    broker: Broker, look: Look, url: str, pool: str
) -> None:
    idle = Broker(Link(url, name=f"idle-{pool}"), pool)
    async with asyncio.timeout(AT_ONCE_S):
        connection = await idle.link.call("CLIENT", "ID")
        ringing = await waits(idle, look, f"idle-{pool}")
        look("CLIENT", "KILL", "ID", connection)
        await broker.enqueue([job("a")])
        taken = await ringing
        again = await idle.take("idle", "n", 1, lease_ms=60_000, policy_version=0)
    assert idle.link.opened == 2
    assert [lease.job_id for lease in again.leases] == ["a"]
    assert taken.leases in ([], again.leases)
    await idle.link.close()


async def test_a_take_that_was_given_up_tells_what_it_had_begun(broker: Broker) -> None:
    await broker.enqueue([job("a")])
    taken = await broker.take("w", "n", 1, lease_ms=60_000, policy_version=0)
    assert await broker.give_up_take("w", "n") == taken.leases


async def test_a_take_that_was_given_up_begins_nothing_later(broker: Broker) -> None:
    assert await broker.give_up_take("w", "n1") == []
    await broker.enqueue([job("a")])
    late = await broker.take("w", "n1", 1, lease_ms=60_000, policy_version=0)
    assert late.leases == []
    next_one = await broker.take("w", "n2", 1, lease_ms=60_000, policy_version=0)
    assert [lease.job_id for lease in next_one.leases] == ["a"]
