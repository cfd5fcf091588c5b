"""The step `take`: it reads the lanes and begins the jobs, in one step that may be repeated."""

from collections import Counter
from collections.abc import Callable

import pytest

from protocols.codec import decode_json
from protocols.job import JobStatus
from protocols.queue.broker import Broker
from protocols.queue.rows import Hold, Lease
from tests.job_body import ending, job
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers

TAKE_BYTES = 4 * 1024 * 1024
"""What a take reads in bodies before it stops."""


def ids(leases: list[Lease]) -> list[str]:
    return [lease.job_id for lease in leases]


@pytest.mark.parametrize("gate", ["missing", "closed"])
async def test_nothing_is_taken_while_the_gate_is_not_open(
    broker: Broker, look: Look, gate: str
) -> None:
    await broker.enqueue([job("a")])
    look("DEL", broker.keys.desired)
    if gate != "missing":
        look("HSET", broker.keys.desired, "gate", gate)
    taken = await broker.take("w", "n1", 4, lease_ms=60_000, policy_version=0)
    assert (taken.gate, taken.leases) == (gate, [])
    assert look.reply("a")["status"] == "queued"
    look("HSET", broker.keys.desired, "gate", "open")
    taken = await broker.take("w", "n1", 4, lease_ms=60_000, policy_version=0)
    assert (taken.gate, ids(taken.leases)) == ("open", ["a"])


async def test_a_taken_job_runs_under_a_lease(broker: Broker, look: Look, take: Take) -> None:
    sent = job("a", run="r", group="g", timeout_ms=600_000)
    await broker.enqueue([sent])
    (lease,) = await take(lease_ms=30_000, worker="w7")
    assert (lease.job_id, lease.lane, lease.attempt) == ("a", "normal", 1)
    assert lease.fields[b"body"] == sent.body
    assert lease.fields[b"group"] == b"g"
    assert lease.left_ms is not None
    assert 590_000 < lease.left_ms <= 600_000
    kept = look.reply("a")
    assert (kept["status"], kept["worker"], kept["attempts"]) == ("running", "w7", "1")
    assert kept["fence"] == lease.fence
    assert 0 < (look.lease_ms("a") or 0) - look.now_ms() <= 30_000


async def test_the_same_nonce_gives_the_same_jobs(broker: Broker, look: Look) -> None:
    await broker.enqueue([job(name) for name in "abc"])

    async def taken(nonce: str) -> list[Lease]:
        return (await broker.take("w", nonce, 2, lease_ms=60_000, policy_version=0)).leases

    first = await taken("n1")
    assert ids(first) == ["a", "b"]
    assert await taken("n1") == first
    assert look.reply("a")["attempts"] == "1"
    assert ids(await taken("n2")) == ["c"]


async def test_a_repeated_take_leaves_out_what_has_ended(broker: Broker) -> None:
    await broker.enqueue([job(name) for name in "ab"])
    a, b = (await broker.take("w", "n1", 2, lease_ms=60_000, policy_version=0)).leases
    await broker.finish([ending(a)])
    assert (await broker.take("w", "n1", 2, lease_ms=60_000, policy_version=0)).leases == [b]


async def test_one_nonce_of_two_workers_is_two_takes(broker: Broker) -> None:
    await broker.enqueue([job(name) for name in "ab"])
    first = await broker.take("w1", "n", 1, lease_ms=60_000, policy_version=0)
    second = await broker.take("w2", "n", 1, lease_ms=60_000, policy_version=0)
    assert ids(first.leases + second.leases) == ["a", "b"]


@pytest.mark.parametrize("slots", [1, 3, 70])
async def test_a_take_never_exceeds_the_slots(broker: Broker, take: Take, slots: int) -> None:
    lanes = ("high", "normal", "low")
    await broker.enqueue([job(f"{lane}-{i}", lane=lane) for lane in lanes for i in range(30)])
    taken = [await take(slots) for _ in range(2)]
    assert [len(leases) for leases in taken] == [slots, min(slots, 90 - slots)]
    assert len({lease.job_id for leases in taken for lease in leases}) == min(2 * slots, 90)


@pytest.mark.parametrize("rounds", [1, 3])
async def test_lanes_share_a_take_eight_to_four_to_one(
    broker: Broker, take: Take, rounds: int
) -> None:
    lanes = ("low", "normal", "high")
    await broker.enqueue([job(f"{lane}-{i}", lane=lane) for lane in lanes for i in range(50)])
    for _ in range(2):
        lanes_taken = [lease.lane for lease in await take(13 * rounds)]
        assert lanes_taken == ["high"] * 8 * rounds + ["normal"] * 4 * rounds + ["low"] * rounds


async def test_no_lane_starves_by_single_slots(broker: Broker, take: Take) -> None:
    lanes = ("high", "normal", "low")
    await broker.enqueue([job(f"{lane}-{i}", lane=lane) for lane in lanes for i in range(60)])
    taken = [lease.lane for _ in range(52) for lease in await take(1)]
    assert Counter(taken) == {"high": 32, "normal": 16, "low": 4}
    longest_wait = max(len(stretch) for stretch in "".join(lane[0] for lane in taken).split("l"))
    assert longest_wait <= 12


async def test_an_idle_lane_gives_its_share_to_the_others(broker: Broker, take: Take) -> None:
    await broker.enqueue([job(f"l-{i}", lane="low") for i in range(13)])
    assert len(await take(13)) == 13


async def test_what_was_handed_back_comes_first(broker: Broker, take: Take) -> None:
    await broker.enqueue([job("low", lane="low")])
    (lease,) = await take()
    await broker.enqueue([job(f"high-{i}", lane="high") for i in range(3)])
    await broker.release([Hold(lease.job_id, lease.fence)])
    (again,) = await take()
    assert (again.job_id, again.lane, again.attempt) == ("low", "resume", 2)


async def test_a_lane_is_taken_in_order(broker: Broker, take: Take) -> None:
    names = [f"j{i}" for i in range(200)]
    await broker.enqueue([job(name) for name in names])
    taken = [name for _ in range(4) for name in ids(await take(50))]
    assert taken == names


async def test_a_job_whose_deadline_has_passed_is_answered_and_not_begun(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("late", timeout_ms=1, inbox="c"), job("good", timeout_ms=600_000)])
    deadline_ms = int(look.reply("late")["deadline_ms"])
    wait_until(lambda: look.now_ms() > deadline_ms, "the deadline has passed")
    (good,) = await take(5)
    assert good.job_id == "good"
    kept = look.reply("late")
    assert (kept["status"], kept["code"], kept["error"]) == ("expired", "504", "deadline_exceeded")
    assert "deadline of job late" in decode_json(kept["body"].encode())["error"]["message"]
    assert await broker.news("c", most=9, block_s=1) == ["late"]
    await broker.finish([ending(good)])
    nothing_left()


async def test_a_raw_entry_is_born_at_take_under_its_own_id(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    fields = ("id", "raw1", "body", '{"messages": []}', "run", "r", "inbox", "c")
    look("XADD", broker.keys.jobs("normal"), "*", *fields)
    assert look.reply("raw1") == {}
    (lease,) = await take()
    assert lease.job_id == "raw1"
    kept = look.reply("raw1")
    assert (kept["status"], kept["protocol"], kept["run"]) == ("running", "openai.chat", "r")
    assert await broker.run_ids("r") == ["raw1"]
    await broker.finish([ending(lease)])
    nothing_left()


async def test_a_raw_entry_without_an_id_has_the_id_of_the_entry(
    broker: Broker, look: Look, take: Take
) -> None:
    entry = look("XADD", broker.keys.jobs("high"), "*", "body", "{}").decode()
    (lease,) = await take()
    assert (lease.job_id, lease.lane) == (entry, "high")
    assert look.reply(entry)["status"] == "running"


@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate", "no.such"])
async def test_a_raw_entry_with_an_odd_id_is_answered_under_the_id_of_the_entry(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None], protocol: str
) -> None:
    fields = ("id", 'a "b"', "body", "{}", "protocol", protocol, "inbox", "c")
    entry = look("XADD", broker.keys.jobs("normal"), "*", *fields).decode()
    assert await take() == []
    kept = look.reply(entry)
    assert (kept["status"], kept["code"], kept["error"]) == ("failed", "400", "invalid_request")
    error = decode_json(kept["body"].encode())["error"]
    assert "`id`: 1 to 128" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert await broker.news("c", most=9, block_s=1) == [entry]
    nothing_left()


async def test_a_raw_entry_with_the_id_of_another_body_is_refused_under_the_id_of_the_entry(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    await broker.enqueue([job("a")])
    entry = look("XADD", broker.keys.jobs("normal"), "*", "id", "a", "body", "{}").decode()
    (lease,) = await take(5)
    assert lease.fields[b"body"] == job("a").body
    kept = look.reply(entry)
    assert (kept["status"], kept["code"], kept["error"]) == ("failed", "409", "job_conflict")
    assert "job id a belongs to another body" in kept["body"]
    await broker.finish([ending(lease)])
    nothing_left()
    assert look.reply("a")["status"] == "completed"


async def test_a_second_raw_copy_of_a_body_is_dropped(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    for _ in range(3):
        look("XADD", broker.keys.jobs("normal"), "*", "id", "a", "body", job("a").body)
    assert await broker.enqueue([job("a")]) == [JobStatus.QUEUED]
    (lease,) = await take(5)
    await broker.finish([ending(lease, b'{"first": 1}')])
    look("XADD", broker.keys.jobs("low"), "*", "id", "a", "body", job("a").body)
    assert await take(5) == []
    assert look.reply("a")["body"] == '{"first": 1}'
    nothing_left()


@pytest.mark.parametrize("field", ["reply_ttl_ms", "timeout_ms", "min_version", "max_staleness"])
@pytest.mark.parametrize("value", ["", "-1", "1e300", "inf", "nan", "12345678901234567890", "x"])
async def test_an_odd_number_in_a_raw_entry_breaks_no_step(
    broker: Broker,
    look: Look,
    take: Take,
    nothing_left: Callable[[], None],
    field: str,
    value: str,
) -> None:
    fields = ("id", "odd", "body", "{}", field, value)
    look("XADD", broker.keys.jobs("normal"), "*", *fields)
    look("XADD", broker.keys.jobs("normal"), "*", "id", "good", "body", "{}")
    taken = await take(5, version=0)
    if look.reply("odd")["status"] == "queued":  # it asks for a version that nobody has
        assert await broker.cancel(["odd"]) == ["cancelled"]
    assert await broker.finish([ending(lease) for lease in taken]) == [True] * len(taken)
    assert look.reply("good")["status"] == "completed"
    assert look("PTTL", broker.keys.reply("odd")) > 0
    nothing_left()


async def test_a_raw_entry_of_very_many_fields_breaks_no_step(
    broker: Broker, look: Look, take: Take, nothing_left: Callable[[], None]
) -> None:
    many = [word for i in range(5000) for word in (f"f{i}", "")]
    look("XADD", broker.keys.jobs("normal"), "*", "id", "wide", "body", "{}", *many)
    for lease in await take():
        await broker.release([Hold(lease.job_id, lease.fence)])
    for lease in await take():
        await broker.finish([ending(lease)])
    nothing_left()


@pytest.mark.parametrize("mebibytes", [3, 15])
async def test_a_take_is_bounded_in_bytes(
    broker: Broker, take: Take, nothing_left: Callable[[], None], mebibytes: int
) -> None:
    big = "x" * (mebibytes * 1024 * 1024)
    names = [f"big-{i}" for i in range(4)]
    for name in names:
        assert await broker.enqueue([job(name, big)]) == [JobStatus.QUEUED]
    seen: list[str] = []
    while len(seen) < len(names):
        leases = await take(16)
        assert leases
        *before, _ = [len(lease.fields[b"body"]) for lease in leases]
        assert sum(before) < TAKE_BYTES  # the one that reaches the bound is the last
        seen += ids(leases)
        await broker.finish([ending(lease) for lease in leases])
    assert seen == names
    nothing_left()


async def test_a_take_is_bounded_in_bytes_among_small_jobs(broker: Broker, take: Take) -> None:
    big = "x" * (6 * 1024 * 1024)
    await broker.enqueue([job(f"small-{i}") for i in range(4)])
    for i in range(12):
        await broker.enqueue([job(f"big-{i}", big)])
    bodies = [len(lease.fields[b"body"]) for lease in await take(16)]
    assert sum(bodies) < TAKE_BYTES + 4 * len(big)
