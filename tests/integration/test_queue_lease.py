"""The steps `renew`, `finish` and `release`: a lease is proved by its fence, and a lost one writes nothing."""

from collections.abc import Callable

import pytest

from protocols.job import JobStatus, Reply
from protocols.queue.broker import Broker
from protocols.queue.rows import Ending, Failure, Hold
from tests.job_body import ending, job
from tests.pool_look import Look, expire_lease, sweep, wait_until
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


async def test_renewing_extends_a_lease(broker: Broker, look: Look, take: Take) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take(lease_ms=5_000)
    first_ms = look.lease_ms("a") or 0
    assert await broker.renew([Hold("a", lease.fence)], lease_ms=60_000) == ["held"]
    assert (look.lease_ms("a") or 0) >= first_ms + 50_000


async def test_renewing_tells_each_lease_its_own_answer(broker: Broker, take: Take) -> None:
    names = ("held", "cancel", "expire", "lost", "ended")
    await broker.enqueue([job(name) for name in names if name != "expire"])
    await broker.enqueue([job("expire", timeout_ms=60_000)])
    leases = {lease.job_id: lease.fence for lease in await take(9)}
    await broker.cancel(["cancel"])
    await broker.link.call("HSET", broker.keys.reply("expire"), "deadline_ms", 1)
    await broker.release([Hold("lost", leases["lost"])])
    await broker.finish([Ending("ended", leases["ended"], JobStatus.COMPLETED, 200, b"{}")])
    pairs = [*((name, leases[name]) for name in names), ("unknown", "1:x"), ("held", "2:other")]
    answers = await broker.renew([Hold(*pair) for pair in pairs], lease_ms=60_000)
    assert answers == ["held", "cancel", "expire", "lost", "lost", "lost", "lost"]


async def test_a_finish_is_the_reply(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a", timeout_ms=600_000, inbox="c", run="r")])
    (lease,) = await take()
    before_ms = look.now_ms()
    done = Ending(
        "a", lease.fence, JobStatus.COMPLETED, 200, b'{"x": 1}', b"\x00\xff", policy_version=7
    )
    assert await broker.finish([done]) == [True]
    (reply,) = await broker.replies(["a"])
    assert isinstance(reply, Reply)
    assert (reply.status, reply.code, reply.body) == (JobStatus.COMPLETED, 200, b'{"x": 1}')
    assert (reply.packed_state, reply.error, reply.attempts) == (b"\x00\xff", None, 1)
    assert (reply.worker, reply.policy_version) == ("w", 7)
    assert before_ms <= reply.finished_ms <= look.now_ms()
    assert 5.9 * 3600_000 < look("PTTL", broker.keys.reply("a")) <= 6 * 3600_000
    assert look("PTTL", broker.keys.run("r")) > 20 * 3600_000
    nothing_left()


async def test_a_reply_is_kept_as_long_as_the_job_says(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a", reply_ttl_ms=90_000)])
    (lease,) = await take()
    await broker.finish([ending(lease)])
    assert 80_000 < look("PTTL", broker.keys.reply("a")) <= 90_000


async def test_a_repeated_finish_is_answered_alike_and_writes_nothing(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a", inbox="c")])
    (lease,) = await take()
    assert await broker.finish([ending(lease, b'{"first": 1}')]) == [True]
    kept = look.reply("a")
    assert await broker.finish([ending(lease, b'{"second": 2}')]) == [True]
    assert look.reply("a") == kept
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    assert await broker.news("c", most=9, block_s=0.01) == []


@pytest.mark.parametrize("lost_by", ["handed back", "failed", "reclaimed", "taken again"])
async def test_a_lost_lease_finishes_nothing(
    broker: Broker, look: Look, take: Take, lost_by: str
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    if lost_by == "handed back":
        await broker.release([Hold("a", lease.fence)])
    elif lost_by == "failed":
        await broker.fail([Failure(Hold("a", lease.fence), 60_000, "broke")], limit=5)
    else:
        expire_lease(look, "a")
        await sweep(broker)
    if lost_by == "taken again":
        await take(worker="another")
    before = look.reply("a")
    assert await broker.finish([ending(lease, b'{"zombie": 1}')]) == [False]
    assert await broker.renew([Hold("a", lease.fence)], lease_ms=1) == ["lost"]
    assert look.reply("a") == before


async def test_a_zombie_is_told_that_its_reclaimed_job_is_lost(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    expire_lease(look, "a")
    await sweep(broker)
    assert await broker.fail([Failure(Hold("a", lease.fence), 0, "broke")], limit=5) == ["lost"]
    assert await broker.release([Hold("a", lease.fence)]) == [False]
    assert look.reply("a")["status"] == "queued"
    assert "fails" not in look.reply("a")


async def test_a_zombie_does_not_overwrite_the_reply_of_a_dead_letter(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    expire_lease(look, "a")
    assert await sweep(broker, crash_limit=1) == {"dead": 1}
    kept = look.reply("a")
    assert kept["error"] == "worker_lost"
    assert await broker.finish([ending(lease)]) == [False]
    assert look.reply("a") == kept


async def test_one_call_finishes_what_it_holds_and_refuses_the_rest(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job(name) for name in "abc"])
    a, b, c = await take(3)
    await broker.release([Hold("b", b.fence)])
    unknown = Ending("d", "1:x", JobStatus.COMPLETED, 200, b"{}")
    answers = await broker.finish([ending(a), ending(b), unknown, ending(c)])
    assert answers == [True, False, False, True]
    assert look.reply("d") == {}


async def test_a_released_job_is_free_at_once_and_at_no_cost(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    assert await broker.release([Hold("a", lease.fence)]) == [True]
    assert await broker.release([Hold("a", lease.fence)]) == [True]  # the answer was lost
    assert (look.length("normal"), look.length("resume")) == (0, 1)
    kept = look.reply("a")
    assert (kept["status"], kept["lane"], kept["handbacks"]) == ("queued", "resume", "1")
    assert look.lease_ms("a") is None
    (again,) = await take()
    assert again.attempt == 2
    assert again.fields == lease.fields
    assert {"crashes", "fails"}.isdisjoint(look.reply("a"))
    await broker.finish([ending(again)])
    nothing_left()


async def test_a_released_raw_entry_keeps_the_id_it_was_born_with(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    entry = look("XADD", broker.keys.jobs("normal"), "*", "body", "{}").decode()
    (lease,) = await take()
    await broker.release([Hold(entry, lease.fence)])
    (again,) = await take()
    assert again.job_id == entry
    await broker.finish([ending(again)])
    nothing_left()


async def test_a_job_whose_entry_was_deleted_by_hand_gets_a_reply(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a", inbox="c")])
    (lease,) = await take()
    look("XDEL", broker.keys.jobs("normal"), look.reply("a")["entry"])
    await broker.release([Hold("a", lease.fence)])
    assert look.reply("a")["error"] == "worker_lost"
    assert await broker.news("c", most=9, block_s=1) == ["a"]
    nothing_left()


async def test_a_lease_runs_out_by_the_clock_of_the_server(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    await take(lease_ms=300)
    wait_until(lambda: look.now_ms() > (look.lease_ms("a") or 0), "the lease has run out")
    assert await sweep(broker) == {"reclaimed": 1}
