"""The step `fail`: a failed attempt waits, runs again, and becomes a dead letter in the end."""

from collections.abc import Callable

from protocols.codec import decode_json
from protocols.queue.broker import Broker
from protocols.queue.rows import Failure, Hold, Lease
from tests.job_body import ending, job
from tests.pool_look import Look, sweep
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


def failure(lease: Lease, delay_ms: int = 60_000) -> Failure:
    return Failure(Hold(lease.job_id, lease.fence), delay_ms, "the engine broke")


def make_due(look: Look, job_id: str) -> None:
    look("ZADD", look.keys.delayed, "XX", 1, job_id)


async def test_a_failed_job_waits_its_delay_and_runs_again(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    before_ms = look.now_ms()
    assert await broker.fail([failure(lease)], limit=5) == ["retry"]
    due_ms = float(look("ZSCORE", broker.keys.delayed, "a"))
    assert before_ms + 60_000 <= due_ms <= look.now_ms() + 60_000
    assert look.lease_ms("a") is None
    assert await sweep(broker) == {}  # not due
    assert await take() == []
    make_due(look, "a")
    assert await sweep(broker) == {"promoted": 1}
    (again,) = await take()
    assert (again.job_id, again.attempt, again.lane) == ("a", 2, "resume")
    await broker.finish([ending(again)])
    assert look.reply("a")["fails"] == "1"
    nothing_left()


async def test_the_last_failure_makes_a_dead_letter_and_a_reply(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a", inbox="c")])
    for expected in ("retry", "retry", "dead"):
        (lease,) = await take(worker="w3")
        assert await broker.fail([failure(lease)], limit=3) == [expected]
        make_due(look, "a")
        await sweep(broker)
    kept = look.reply("a")
    assert (kept["status"], kept["code"], kept["error"]) == ("failed", "500", "engine_failed")
    assert "failed 3 times" in decode_json(kept["body"].encode())["error"]["message"]
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    ((_, letter),) = look("XRANGE", broker.keys.dead, "-", "+")
    assert letter[b"job"] == b"a"
    assert letter[b"reason"] == b"failures"
    assert letter[b"attempts"] == b"3"
    assert letter[b"workers"] == b"w3"
    assert letter[b"error"] == b"the engine broke"
    assert letter[b"body"] == job("a").body
    nothing_left()


async def test_a_repeated_fail_is_answered_alike_and_counts_once(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    assert await broker.fail([failure(lease)], limit=2) == ["retry"]
    assert await broker.fail([failure(lease)], limit=2) == ["retry"]
    assert look.reply("a")["fails"] == "1"
    make_due(look, "a")
    await sweep(broker)
    (lease,) = await take()
    assert await broker.fail([failure(lease)], limit=2) == ["dead"]
    assert await broker.fail([failure(lease)], limit=2) == ["dead"]
    assert look("XLEN", broker.keys.dead) == 1


async def test_only_the_holder_can_fail_a_job(broker: Broker, look: Look, take: Take) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    await broker.release([Hold("a", lease.fence)])
    await take(worker="another")
    assert await broker.fail([failure(lease)], limit=1) == ["lost"]
    assert look.reply("a")["status"] == "running"
    assert "fails" not in look.reply("a")


async def test_a_failing_job_can_still_be_cancelled(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    await broker.fail([failure(lease)], limit=5)
    assert await broker.cancel(["a"]) == ["cancelled"]
    nothing_left()
