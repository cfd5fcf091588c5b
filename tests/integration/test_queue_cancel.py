"""The step `cancel`: a queued job never begins, a running one is told."""

from collections.abc import Callable

import pytest

from protocols.codec import decode_json
from protocols.job import JobStatus
from protocols.queue.broker import Broker
from protocols.queue.rows import Ending, Hold
from tests.job_body import ending, job
from tests.pool_look import Look
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate"])
async def test_a_queued_job_is_answered_at_once_and_never_begins(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None], protocol: str
) -> None:
    await broker.enqueue([job("a", protocol=protocol, inbox="c", timeout_ms=60_000)])
    assert await broker.cancel(["a"]) == ["cancelled"]
    kept = look.reply("a")
    assert (kept["status"], kept["code"], kept["error"]) == ("cancelled", "499", "cancelled")
    assert "cancelled before it began" in decode_json(kept["body"].encode())["error"]["message"]
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    assert await take() == []
    nothing_left()


async def test_a_running_job_is_told_and_ends_by_its_holder(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    assert await broker.cancel(["a"]) == ["stopping"]
    assert look.reply("a")["status"] == "running"
    assert await broker.renew([Hold("a", lease.fence)], lease_ms=60_000) == ["cancel"]
    end = Ending("a", lease.fence, JobStatus.CANCELLED, 499, b"{}", error="cancelled")
    assert await broker.finish([end]) == [True]
    assert await broker.cancel(["a"]) == ["cancelled"]
    nothing_left()


async def test_a_cancel_is_answered_job_by_job(broker: Broker, take: Take) -> None:
    await broker.enqueue([job("ended"), job("runs")])
    ended, _ = await take(2)
    await broker.finish([ending(ended)])
    await broker.enqueue([job("waits")])
    answers = await broker.cancel(["ended", "runs", "waits", "nobody"])
    assert answers == ["completed", "stopping", "cancelled", "unknown"]
    again = await broker.cancel(["ended", "runs", "waits", "nobody"])
    assert again == answers


async def test_a_parked_job_can_be_cancelled(
    broker: Broker, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a", min_version=9)])
    assert await take() == []
    assert await broker.cancel(["a"]) == ["cancelled"]
    nothing_left()
