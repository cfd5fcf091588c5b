"""Segments with frames in the queue's steps."""

from protocols.job import JobStatus, Segment
from protocols.queue.broker import Broker
from protocols.queue.rows import End, Ending, Hold, Lease
from protocols.rollout_state import Logprobs, TokenIds
from tests.job_body import job
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


def segment(start: int, tokens: int) -> Segment:
    ids = TokenIds(range(start, start + tokens))
    logprobs = Logprobs([-1.0] * tokens)
    frames = f"<{start}+{tokens}>".encode()
    return Segment(0, start, ids, logprobs, TokenIds(), Logprobs(), 0, frames=frames)


def hold(lease: Lease, *segments: Segment) -> Hold:
    return Hold(lease.job_id, lease.fence, segments)


def ending(lease: Lease, *segments: Segment) -> Ending:
    tokens = sum(len(one.token_ids) for one in segments)
    return Ending(
        *(lease.job_id, lease.fence, JobStatus.COMPLETED, 200, b"{}"),
        segments=segments,
        frames=b"<done>",
        tokens=tokens,
        oldest_version=0,
    )


async def shown(broker: Broker, job_id: str) -> list[bytes]:
    (entries,) = await broker.progress([(job_id, "0")], most=99)
    return [entry.frames for _, entry in entries]


async def test_a_renewal_with_frames_calls_the_client_once(broker: Broker, take: Take) -> None:
    await broker.enqueue([job("a", inbox="c")])
    (lease,) = await take()
    await broker.renew([hold(lease, segment(0, 2), segment(2, 1))], lease_ms=60_000)
    assert await broker.news("c", most=9, block_s=1) == ["+a"]
    await broker.renew([hold(lease)], lease_ms=60_000)
    await broker.finish([ending(lease, segment(3, 1))])
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    assert await shown(broker, "a") == [b"<0+2>", b"<2+1>", b"<3+1>", b"<done>"]


async def test_frames_are_kept_whole_or_not_at_all(broker: Broker, take: Take) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    assert await broker.renew([hold(lease, segment(0, 2))], lease_ms=60_000) == ["held"]
    again = [hold(lease, segment(0, 2), segment(2, 2))]
    assert await broker.renew(again, lease_ms=60_000) == ["held"]
    other = [hold(lease, segment(3, 2))]  # cut elsewhere: its first token is there already
    assert await broker.renew(other, lease_ms=60_000) == ["gap"]
    assert await shown(broker, "a") == [b"<0+2>", b"<2+2>"]


async def test_a_worker_that_lost_its_lease_adds_no_frames(broker: Broker, take: Take) -> None:
    await broker.enqueue([job("a")])
    (first,) = await take()
    await broker.release([hold(first, segment(0, 1))])
    (second,) = await take()
    assert await broker.renew([hold(first, segment(1, 1))], lease_ms=60_000) == ["lost"]
    assert await broker.finish([ending(first, segment(1, 1))]) == [False]
    assert [one.frames for one in second.kept] == [b"<0+1>"]
    assert second.queued_ms == first.queued_ms > 0
    assert await shown(broker, "a") == [b"<0+1>"]


async def test_an_answer_that_came_too_late_ends_its_stream_without_last_frames(
    broker: Broker, take: Take
) -> None:
    await broker.enqueue([job("a", max_staleness=0)])
    (lease,) = await take()
    await broker.link.call("HSET", broker.keys.desired, "weights", 1)
    late = ending(lease, segment(0, 1))
    assert await broker.finish([late]) == [True]
    (entries,) = await broker.progress([("a", "0")], most=99)
    assert [entry for _, entry in entries][-1] == End(JobStatus.EXPIRED)
