"""Jobs and policy versions: one that waits for newer weights is parked, one that fell behind too far is `expired`."""

from collections.abc import Callable
from typing import Any

import pytest

from protocols.codec import decode_json
from protocols.job import JobStatus, Reply, Segment
from protocols.queue import overview
from protocols.queue.broker import Broker
from protocols.queue.keys import GROUP, LANES
from protocols.queue.rows import Ending, Hold, Lease
from protocols.rollout_state import Logprobs, TokenIds
from tests.job_body import ending, job
from tests.pool_look import Look, sweep, wait_until
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


def ids(leases: list[Lease]) -> list[str]:
    return [lease.job_id for lease in leases]


def drawn(version: int, start: int = 0) -> Segment:
    """One token."""
    return Segment(
        0, start, TokenIds([7]), Logprobs([-1.0]), TokenIds(), Logprobs(), policy_version=version
    )


def want(look: Look, version: int) -> None:
    """Say that workers shall have these weights."""
    look("HSET", look.keys.desired, "weights", version)


def answered(lease: Lease, oldest_version: int | None = None) -> Ending:
    """An answer with a state."""
    return Ending(
        *(lease.job_id, lease.fence, JobStatus.COMPLETED, 200, b'{"an": "answer"}', b"tokens"),
        policy_version=9,
        oldest_version=oldest_version,
    )


async def reply_to(broker: Broker, job_id: str) -> Reply:
    (reply,) = await broker.replies([job_id])
    assert isinstance(reply, Reply)
    return reply


def everything_of(look: Look, job_id: str) -> list[Any]:
    """All that is kept of a job and of the lanes' entries, and how many entries there ever were."""
    keys = look.keys
    lanes = [keys.jobs(lane) for lane in LANES]
    return [
        look("DUMP", keys.reply(job_id)),
        look("ZRANGE", keys.parked, 0, -1, "WITHSCORES"),
        [look("ZCARD", key) for key in (keys.delayed, keys.alone, keys.leases)],
        [look("XRANGE", lane, "-", "+") for lane in lanes],
        [look("XPENDING", lane, GROUP)["pending"] for lane in lanes],
        [added(look, lane) for lane in lanes],
    ]


def added(look: Look, stream: str) -> int:
    """How many entries a stream ever had."""
    told = look("XINFO", "STREAM", stream)
    return int(dict(zip(told[::2], told[1::2], strict=True))[b"entries-added"])


async def test_a_parked_job_is_not_spun_and_the_first_worker_with_its_version_gets_it(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("new", min_version=2)])
    assert await take(5, version=0) == []
    parked = everything_of(look, "new")
    for _ in range(50):
        assert await take(5, version=0) == []
    await sweep(broker)
    assert await take(5, version=1) == []
    assert everything_of(look, "new") == parked
    assert float(look("ZSCORE", broker.keys.parked, "new")) == 2
    assert (await overview.depth(broker))["parked"] == 1
    (lease,) = await take(5, version=2)
    assert (lease.job_id, lease.attempt) == ("new", 1)
    assert (await overview.depth(broker))["parked"] == 0
    await broker.finish([ending(lease)])
    nothing_left()


async def test_others_are_taken_past_a_parked_job(broker: Broker, take: Take) -> None:
    await broker.enqueue([job("new", min_version=2), job("any")])
    assert ids(await take(5, version=1)) == ["any"]
    await broker.enqueue([job("later")])
    assert ids(await take(5, version=1)) == ["later"]


async def test_a_take_frees_what_its_version_and_slots_allow_oldest_version_first(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job(f"v{version}", min_version=version) for version in (3, 1, 2, 4)])
    assert await take(9, version=0) == []
    first, second = await take(2, version=3)
    assert (first.job_id, second.job_id) == ("v1", "v2")
    assert look("ZRANGE", broker.keys.parked, 0, -1) == [b"v3", b"v4"]
    (third,) = await take(2, version=3)
    assert third.job_id == "v3"
    (fourth,) = await take(2, version=4)
    await broker.finish([ending(lease) for lease in (first, second, third, fourth)])
    nothing_left()


async def test_a_parked_job_is_freed_once_though_the_answer_is_lost(
    broker: Broker, take: Take
) -> None:
    await broker.enqueue([job("new", min_version=1)])
    await take(version=0)
    taken = [await broker.take("w", "same", 1, lease_ms=60_000, policy_version=1) for _ in range(2)]
    assert taken[0].leases == taken[1].leases
    assert taken[0].leases[0].attempt == 1


async def test_a_parked_job_meets_its_deadline(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("new", min_version=1, timeout_ms=50)])
    await take(version=0)
    deadline_ms = int(look.reply("new")["deadline_ms"])
    wait_until(lambda: look.now_ms() > deadline_ms, "the deadline has passed")
    assert await sweep(broker) == {"expired": 1}
    assert look.reply("new")["error"] == "deadline_exceeded"
    nothing_left()


async def test_a_quarantined_job_is_parked_and_runs_alone_later(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("new", min_version=1), job("other", min_version=1)])
    for _ in range(2):
        await take(1, version=1)
        look("ZADD", broker.keys.leases, "XX", 1, "new")
        await sweep(broker)
    assert look.reply("new")["alone"] == "1"
    assert await take(5, version=0) == []
    assert look("ZRANGE", broker.keys.parked, 0, -1) == [b"new"]
    assert ids(await take(5, version=1)) == ["new"]
    assert ids(await take(5, version=1)) == ["other"]


async def test_the_history_says_once_that_a_job_was_parked(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("new", min_version=1)])
    for _ in range(3):
        await take(version=0)
    (event,) = filter(None, look.reply("new")["events"].split(";"))
    assert event.partition(" ")[2] == "parked for policy version 1"


async def test_a_renewal_tells_a_job_that_it_fell_behind(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a", max_staleness=1), job("b")])
    a, b = await take(2)
    holds = [Hold(lease.job_id, lease.fence, [drawn(0)]) for lease in (a, b)]
    want(look, 1)
    assert await broker.renew(holds, lease_ms=60_000) == ["held", "held"]
    want(look, 2)
    assert await broker.renew(holds, lease_ms=60_000) == ["stale", "held"]
    assert look.reply("a")["status"] == "running"


async def test_the_tokens_that_a_renewal_brings_count_at_once(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a", max_staleness=0)])
    (lease,) = await take()
    want(look, 1)
    fresh, old = [drawn(1)], [drawn(0, start=1)]
    assert await broker.renew([Hold("a", lease.fence)], lease_ms=60_000) == ["held"]
    assert await broker.renew([Hold("a", lease.fence, fresh)], lease_ms=60_000) == ["held"]
    assert await broker.renew([Hold("a", lease.fence, old)], lease_ms=60_000) == ["stale"]


async def test_a_job_that_fell_behind_while_it_waited_is_answered_and_not_begun(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a", max_staleness=0, inbox="c")])
    (lease,) = await take()
    await broker.release([Hold("a", lease.fence, [drawn(0)])])
    want(look, 1)
    assert await take() == []
    kept = look.reply("a")
    assert (kept["status"], kept["code"], kept["error"]) == ("expired", "410", "staleness_exceeded")
    assert "before it began" in kept["body"]
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    nothing_left()


@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate"])
async def test_an_answer_after_the_deadline_is_an_expired_reply_with_its_tokens(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None], protocol: str
) -> None:
    await broker.enqueue([job("a", timeout_ms=50, protocol=protocol, inbox="c")])
    (lease,) = await take()
    deadline_ms = int(look.reply("a")["deadline_ms"])
    wait_until(lambda: look.now_ms() > deadline_ms, "the deadline has passed")
    assert await broker.finish([answered(lease)]) == [True]
    reply = await reply_to(broker, "a")
    assert (reply.status, reply.code, reply.error) == (JobStatus.EXPIRED, 504, "deadline_exceeded")
    assert (reply.packed_state, reply.policy_version) == (b"tokens", 9)
    error = decode_json(reply.body)["error"]
    assert error["message"] == "the deadline of job a passed while it was generated"
    assert error["type"] == ("timeout_error" if protocol == "claude.messages" else "server_error")
    assert await broker.finish([answered(lease)]) == [True]  # the answer was lost
    assert await reply_to(broker, "a") == reply
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    nothing_left()


@pytest.mark.parametrize(
    ("checkpointed", "ended", "fits"),
    [(None, 1, True), (None, 0, False), (0, None, False), (1, 1, True), (None, None, True)],
)
async def test_an_answer_that_fell_behind_is_an_expired_reply_with_its_tokens(
    broker: Broker,
    look: Look,
    take: Take,
    checkpointed: int | None,
    ended: int | None,
    *,
    fits: bool,
) -> None:
    await broker.enqueue([job("a", max_staleness=2)])
    (lease,) = await take()
    if checkpointed is not None:
        await broker.renew([Hold("a", lease.fence, [drawn(checkpointed)])], lease_ms=60_000)
    want(look, 3)
    assert await broker.finish([answered(lease, ended)]) == [True]
    reply = await reply_to(broker, "a")
    told = (reply.status, reply.code, reply.error)
    late = (JobStatus.EXPIRED, 410, "staleness_exceeded")
    assert told == ((JobStatus.COMPLETED, 200, None) if fits else late)
    assert (reply.packed_state, reply.policy_version) == (b"tokens", 9)


async def test_only_an_answer_can_come_too_late(broker: Broker, look: Look, take: Take) -> None:
    await broker.enqueue([job("a", timeout_ms=600_000)])
    (lease,) = await take()
    look("HSET", broker.keys.reply("a"), "deadline_ms", 1)
    cancelled = Ending("a", lease.fence, JobStatus.CANCELLED, 499, b"{}", error="cancelled")
    assert await broker.finish([cancelled]) == [True]
    assert (await reply_to(broker, "a")).status is JobStatus.CANCELLED
