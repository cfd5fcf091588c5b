"""The pool on a server that forgets, refuses or is full: prepared again where it may be, a clear error where not."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from protocols.errors import PoolNotPrepared, ServerUnavailable
from protocols.job import JobStatus, Reply
from protocols.queue.broker import LIBRARY_VERSION, Broker
from protocols.queue.link import Link
from protocols.queue.rows import Hold
from tests.job_body import ending, job
from tests.pool_look import Look, until_blocked
from tests.servers import Server, StartServer, both_servers

pytestmark = both_servers


@pytest.fixture
def own(fresh_server: StartServer) -> Server:
    return fresh_server()


@pytest.fixture
async def broker(own: Server, pool: str) -> AsyncIterator[Broker]:
    link = Link(own.url, name="test", outage_s=20)
    made = Broker(link, pool)
    await made.open()
    yield made
    await link.close()


@pytest.fixture
def url(own: Server) -> str:
    return own.url


async def run_one(broker: Broker, job_id: str) -> None:
    assert await broker.enqueue([job(job_id)]) == [JobStatus.QUEUED]
    taken = await broker.take("w", f"n-{job_id}", 1, lease_ms=60_000, policy_version=0)
    assert await broker.finish([ending(lease) for lease in taken.leases]) == [True]


async def test_a_flushed_pool_is_prepared_again_by_whoever_comes(
    broker: Broker, look: Look, nothing_left: Callable[[], None]
) -> None:
    await run_one(broker, "a")
    look("FLUSHALL")
    assert await broker.enqueue([job("b")]) == [JobStatus.QUEUED]
    assert (await broker.take("w", "n1", 1, lease_ms=1, policy_version=0)).gate == "missing"
    await broker.open()
    taken = await broker.take("w", "n2", 1, lease_ms=60_000, policy_version=0)
    await broker.finish([ending(lease) for lease in taken.leases])
    nothing_left()


async def test_a_lost_library_is_loaded_again(broker: Broker, look: Look) -> None:
    look("FUNCTION", "FLUSH")
    await run_one(broker, "a")


async def test_an_idle_worker_outlives_a_flush(broker: Broker, look: Look) -> None:
    taking = broker.take("w", "n", 1, lease_ms=1, policy_version=0, bell_s=20)
    waiting = asyncio.create_task(taking)
    await until_blocked(look, "test")
    look("FLUSHALL")
    async with asyncio.timeout(10):
        await waiting
    await broker.open()
    await run_one(broker, "a")


async def test_a_group_made_late_sees_what_was_added_before(broker: Broker, look: Look) -> None:
    look("FLUSHALL")
    look("XADD", broker.keys.jobs("normal"), "*", "id", "early", "body", "{}")
    await broker.open()
    taken = await broker.take("w", "n1", 1, lease_ms=60_000, policy_version=0)
    assert [lease.job_id for lease in taken.leases] == ["early"]


async def test_preparing_never_replaces_a_newer_library(broker: Broker, look: Look) -> None:
    newer = (
        "#!lua name=rolloutq\n"
        f"redis.register_function('rolloutq_version', function() return {LIBRARY_VERSION + 1} end)"
    )
    look("FUNCTION", "LOAD", "REPLACE", newer)
    await broker.prepare()
    assert look("FCALL", "rolloutq_version", 1, broker.keys.prefix) == LIBRARY_VERSION + 1


async def test_preparing_replaces_an_older_library(broker: Broker, look: Look) -> None:
    older = (
        "#!lua name=rolloutq\nredis.register_function('rolloutq_version', function() return 0 end)"
    )
    look("FUNCTION", "LOAD", "REPLACE", older)
    await broker.prepare()
    await run_one(broker, "a")


async def test_a_user_without_the_right_is_told_who_has_it(
    broker: Broker, own: Server, look: Look
) -> None:
    look("ACL", "SETUSER", "trainer", "on", ">s3cret", "~*", "&*", "+@all", "-function")
    look("FUNCTION", "FLUSH")
    link = Link(own.url.replace("redis://", "redis://trainer:s3cret@"), name="trainer", outage_s=2)
    with pytest.raises(PoolNotPrepared) as refused:
        await Broker(link, broker.keys.pool).enqueue([job("a")])
    assert "start a worker" in refused.value.message
    assert "s3cret" not in refused.value.message
    await broker.prepare()
    trainer = Broker(link, broker.keys.pool)
    assert await trainer.enqueue([job("a")]) == [JobStatus.QUEUED]
    await link.close()


async def test_a_wrong_password_is_refused_at_once_and_not_repeated(own: Server) -> None:
    link = Link(own.url.replace("redis://", "redis://nobody:s3cret@"), name="x")
    with pytest.raises(ServerUnavailable) as refused:
        async with asyncio.timeout(5):
            await link.call("PING")
    assert "refuses this user" in refused.value.message
    assert "s3cret" not in refused.value.message
    await link.close()


async def test_a_full_server_takes_no_jobs_and_lets_go_of_those_it_has(
    broker: Broker, look: Look, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job(name) for name in "abc"])
    look("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(ServerUnavailable) as refused:
        await broker.enqueue([job("d")])
    assert "out of memory" in refused.value.message
    assert refused.value.retry_after_s
    await broker.beat("w", {"state": "serving"}, ttl_ms=60_000)
    taken = (await broker.take("w", "n", 3, lease_ms=60_000, policy_version=0)).leases
    a, b, c = taken
    assert await broker.renew([Hold("a", a.fence)], lease_ms=60_000) == ["held"]
    assert await broker.release([Hold("b", b.fence)]) == [True]
    assert await broker.cancel(["b"]) == ["cancelled"]
    assert await broker.finish([ending(a), ending(c)]) == [True, True]
    replies = await broker.replies(["a", "c"])
    ended = [reply for reply in replies if isinstance(reply, Reply)]
    await broker.collected([(reply.job_id, reply.finished_ms) for reply in ended])
    assert look("ZCARD", broker.keys.collected) == 2
    look("CONFIG", "SET", "maxmemory", "0")
    assert await broker.enqueue([job("d")]) == [JobStatus.QUEUED]
    await broker.cancel(["d"])
    nothing_left()
