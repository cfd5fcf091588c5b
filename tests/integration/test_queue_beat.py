"""The step `beat`: a worker says that it lives, and keeps what the pool shall do."""

from protocols.control import default_desired
from protocols.queue import overview
from protocols.queue.broker import Broker
from tests.pool_look import Look
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


async def test_a_missing_desired_state_is_written_back_whole(broker: Broker, look: Look) -> None:
    look("DEL", broker.keys.desired)
    assert (await broker.beat("w", {}, ttl_ms=60_000)).desired == {}
    wanted = {**default_desired(), "gate": "closed", "generation": "7"}
    seen = (await broker.beat("w", {}, ttl_ms=60_000, desired=wanted)).desired
    assert seen == wanted == await overview.desired(broker)


async def test_a_desired_state_is_never_overwritten(broker: Broker, look: Look) -> None:
    look("HSET", broker.keys.desired, "gate", "closed")
    seen = (await broker.beat("w", {}, ttl_ms=60_000, desired=default_desired())).desired
    assert seen["gate"] == "closed"
    await broker.open()
    assert (await overview.desired(broker))["gate"] == "closed"


async def test_a_beat_shows_a_worker_until_it_is_too_old(broker: Broker, look: Look) -> None:
    before_ms = look.now_ms()
    now_ms = (await broker.beat("w", {"state": "serving", "slots": 8}, ttl_ms=60_000)).now_ms
    assert before_ms <= now_ms <= look.now_ms()
    seen = (await overview.workers(broker, seen_ms=10_000))["w"]
    assert (seen["state"], seen["slots"], seen["beat_ms"]) == ("serving", "8", str(now_ms))
    assert await overview.live_workers(broker, seen_ms=10_000) == 1
    assert 0 < look("PTTL", broker.keys.worker("w")) <= 60_000
    look("ZADD", broker.keys.workers, "XX", now_ms - 10_001, "w")
    assert await overview.live_workers(broker, seen_ms=10_000) == 0
    assert await overview.workers(broker, seen_ms=10_000) == {}


async def test_a_worker_does_not_show_what_it_took(broker: Broker, take: Take) -> None:
    await broker.beat("w", {"state": "serving"}, ttl_ms=60_000)
    await broker.link.call("XADD", broker.keys.jobs("normal"), "*", "body", "{}")
    await take(worker="w")
    assert not any(
        name.startswith("take") for name in (await overview.workers(broker, seen_ms=9999))["w"]
    )


async def test_a_worker_that_leaves_is_not_shown(broker: Broker) -> None:
    await broker.beat("w", {}, ttl_ms=60_000)
    await broker.leave("w")
    assert await overview.workers(broker, seen_ms=10_000) == {}
    assert await overview.live_workers(broker, seen_ms=10_000) == 0


async def test_a_newer_generation_of_the_same_epoch_wins(broker: Broker, look: Look) -> None:
    """After a failover to an older copy, what a worker knows is what was ordered last."""
    there = {**default_desired(), "gate": "open", "generation": "4"}
    look("DEL", broker.keys.desired)
    await broker.beat("w", {}, ttl_ms=60_000, desired=there)
    known = {**there, "gate": "closed", "generation": "5"}
    assert (await broker.beat("w", {}, ttl_ms=60_000, desired=known)).desired == known
    assert (await broker.beat("w", {}, ttl_ms=60_000, desired=there)).desired == known


async def test_a_default_gives_way_to_what_was_ordered(broker: Broker, look: Look) -> None:
    """A flushed server where a fresh worker came first."""
    ordered = {**default_desired(), "gate": "closed", "generation": "3", "by": "me"}
    assert (await overview.desired(broker))["by"] == "default"
    assert (await broker.beat("w", {}, ttl_ms=60_000, desired=ordered)).desired == ordered
    other = {**ordered, "epoch": "another", "generation": "9"}
    assert (await broker.beat("w", {}, ttl_ms=60_000, desired=other)).desired == ordered
