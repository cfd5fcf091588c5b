"""The step `sweep`: it finds what nobody else will, and owns every lifetime."""

import asyncio
from collections.abc import Callable

import pytest

from protocols.job import JobStatus, Reply
from protocols.queue import overview
from protocols.queue.broker import Broker
from protocols.queue.rows import Hold
from tests.job_body import ending, job
from tests.pool_look import Look, expire_lease, sweep, wait_until
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers

ERROR_SHAPES = {
    "openai.chat": {"message", "type", "param", "code"},
    "generate": {"message", "type", "param", "code"},
    "claude.messages": {"type", "message"},
}


async def test_only_expired_leases_are_reclaimed(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job(name) for name in "abcd"])
    held = await take(4)
    expire_lease(look, "b", "d")
    assert await sweep(broker) == {"reclaimed": 2}
    assert [look.reply(name)["status"] for name in "abcd"] == [
        "running",
        "queued",
        "running",
        "queued",
    ]
    again = await take(4)
    assert {(lease.job_id, lease.attempt) for lease in again} == {("b", 2), ("d", 2)}
    await broker.finish([ending(lease) for lease in (*again, held[0], held[2])])
    nothing_left()


async def test_a_sweep_without_leave_reclaims_nothing(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    await take()
    expire_lease(look, "a")
    swept = await broker.sweep(most=200, crash_limit=3, reclaim=False, orphan_ms=0)
    assert not any(swept)
    assert look.reply("a")["status"] == "running"


async def test_a_sweep_is_bounded_in_jobs(broker: Broker, look: Look, take: Take) -> None:
    names = [f"j{i}" for i in range(10)]
    await broker.enqueue([job(name) for name in names])
    await take(10)
    expire_lease(look, *names)
    swept = [
        (await broker.sweep(most=4, crash_limit=3, reclaim=True, orphan_ms=0)).reclaimed
        for _ in range(4)
    ]
    assert swept == [4, 4, 2, 0]


@pytest.mark.parametrize("protocol", ERROR_SHAPES)
async def test_too_many_crashes_make_a_dead_letter_and_a_reply(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None], protocol: str
) -> None:
    await broker.enqueue([job("a", protocol=protocol, inbox="c")])
    for expected in ("reclaimed", "reclaimed", "dead"):
        await take(worker="w9")
        expire_lease(look, "a")
        assert await sweep(broker, crash_limit=3) == {expected: 1}
    (reply,) = await broker.replies(["a"])
    assert isinstance(reply, Reply)
    assert (reply.status, reply.code, reply.error) == (JobStatus.FAILED, 500, "worker_lost")
    error = reply.response["error"]
    assert set(error) == ERROR_SHAPES[protocol]
    assert "lost with its worker 3 times" in error["message"]
    assert (reply.response.get("type") == "error") == (protocol == "claude.messages")
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    ((_, letter),) = look("XRANGE", broker.keys.dead, "-", "+")
    assert (letter[b"job"], letter[b"reason"], letter[b"workers"]) == (b"a", b"crashes", b"w9")
    nothing_left()


async def test_a_late_queued_job_is_expired_without_a_take(
    broker: Broker, look: Look, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a", timeout_ms=1, inbox="c")])
    deadline_ms = int(look.reply("a")["deadline_ms"])
    wait_until(lambda: look.now_ms() >= deadline_ms, "the deadline has passed")
    assert await sweep(broker) == {"expired": 1}
    kept = look.reply("a")
    assert (kept["status"], kept["code"], kept["error"]) == ("expired", "504", "deadline_exceeded")
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    nothing_left()


async def test_a_late_running_job_is_left_to_its_worker(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a", timeout_ms=600_000)])
    (lease,) = await take()
    look("ZADD", broker.keys.deadlines, "XX", 1, "a")
    look("HSET", broker.keys.reply("a"), "deadline_ms", 1)
    assert await sweep(broker) == {}
    assert look.reply("a")["status"] == "running"
    assert await broker.renew([Hold("a", lease.fence)], lease_ms=1000) == ["expire"]


async def orphaned(broker: Broker, look: Look) -> dict[str, int]:
    """A sweep that looks at whatever is pending for a moment."""
    await asyncio.sleep(0.005)  # XPENDING counts whole milliseconds
    return await sweep(broker, orphan_ms=1)


async def test_an_entry_read_but_not_begun_is_found(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("sent")])
    look("XADD", broker.keys.jobs("normal"), "*", "id", "raw", "body", "{}")
    look("XREADGROUP", "GROUP", "workers", "dead", "STREAMS", broker.keys.jobs("normal"), ">")
    assert await take(5) == []
    assert await orphaned(broker, look) == {"orphans": 2}
    leases = await take(5)
    assert {lease.job_id for lease in leases} == {"sent", "raw"}
    await broker.finish([ending(lease) for lease in leases])
    nothing_left()


async def test_a_running_job_without_a_lease_is_found(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    await take()
    look("ZREM", broker.keys.leases, "a")
    assert await orphaned(broker, look) == {"orphans": 1}
    assert await sweep(broker) == {"reclaimed": 1}
    (again,) = await take()
    await broker.finish([ending(again)])
    nothing_left()


async def test_the_entry_of_an_ended_job_is_removed(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    await take()
    look("ZREM", broker.keys.leases, "a")
    look("HSET", broker.keys.reply("a"), "status", "failed")
    await orphaned(broker, look)
    nothing_left()


async def test_a_pending_entry_that_was_deleted_is_forgotten(
    broker: Broker, look: Look, nothing_left: Callable[[], None]
) -> None:
    stream = broker.keys.jobs("low")
    entry = look("XADD", stream, "*", "body", "{}")
    look("XREADGROUP", "GROUP", "workers", "dead", "STREAMS", stream, ">")
    look("XDEL", stream, entry)
    await orphaned(broker, look)
    nothing_left()


async def test_jobs_at_work_and_jobs_that_wait_are_no_orphans(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("works"), job("parked", min_version=5), job("waits")])
    await take(2)
    before = [look.reply(name) for name in ("works", "parked", "waits")]
    assert await orphaned(broker, look) == {}
    assert [look.reply(name) for name in ("works", "parked", "waits")] == before


async def test_many_orphans_are_found_a_portion_a_sweep(
    broker: Broker, look: Look, take: Take
) -> None:
    stream = broker.keys.jobs("normal")
    await broker.enqueue([job("works")])
    await take()
    for i in range(5):
        look("XADD", stream, "*", "id", f"o{i}", "body", "{}")
    look("XREADGROUP", "GROUP", "workers", "dead", "STREAMS", stream, ">")
    await asyncio.sleep(0.005)
    found = [
        (await broker.sweep(most=2, crash_limit=3, reclaim=True, orphan_ms=1)).orphans
        for _ in range(4)
    ]
    assert sum(found) == 5
    assert max(found) <= 2
    assert len(await take(9)) == 5


async def test_a_collected_reply_becomes_a_tombstone(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a", inbox="c"), job("b")])
    await broker.finish([ending(lease, b'{"long": "text"}') for lease in await take(2)])
    replies = [reply for reply in await broker.replies(["a", "b"]) if isinstance(reply, Reply)]
    await broker.collected([(reply.job_id, reply.finished_ms) for reply in replies])
    await sweep(broker, orphan_ms=1)
    assert "body" in look.reply("a")  # ten minutes have not passed
    long_ago_ms = look.now_ms() - 600_001
    look("HSET", broker.keys.reply("a"), "finished_ms", long_ago_ms)
    look("ZADD", broker.keys.collected, "XX", long_ago_ms, "a")
    await sweep(broker)
    tomb = look.reply("a")
    assert {"body", "state", "inbox", "fence", "entry", "lane"}.isdisjoint(tomb)
    assert (tomb["status"], tomb["code"]) == ("completed", "200")
    assert "body" in look.reply("b")
    assert await broker.enqueue([job("a")]) == [JobStatus.COMPLETED]
    assert await take() == []
    assert look("PTTL", broker.keys.reply("a")) > 5 * 3600_000
    assert look("ZRANGE", broker.keys.collected, 0, -1) == [b"b"]


async def test_a_worker_long_gone_is_forgotten_once_it_holds_nothing(
    broker: Broker, look: Look, take: Take
) -> None:
    def consumers() -> int:
        return len(look("XINFO CONSUMERS", broker.keys.jobs("normal"), "workers"))

    await broker.beat("gone", {}, ttl_ms=60_000)
    await broker.enqueue([job("a")])
    await take(worker="gone")
    look("ZADD", broker.keys.workers, "XX", look.now_ms() - 600_001, "gone")
    await orphaned(broker, look)
    assert consumers() == 1  # it holds a job yet
    expire_lease(look, "a")
    await sweep(broker)
    await orphaned(broker, look)
    assert consumers() == 0
    assert look("ZRANGE", broker.keys.workers, 0, -1) == []


async def test_a_worker_that_left_is_forgotten_as_well(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.beat("left", {}, ttl_ms=60_000)
    await broker.enqueue([job("a")])
    (lease,) = await take(worker="left")
    await broker.finish([ending(lease)])
    await broker.leave("left")
    assert await overview.live_workers(broker, seen_ms=60_000) == 0
    await orphaned(broker, look)
    assert look("XINFO CONSUMERS", broker.keys.jobs("normal"), "workers") == []
    assert look("ZRANGE", broker.keys.workers, 0, -1) == []
