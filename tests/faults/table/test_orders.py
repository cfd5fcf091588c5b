"""Cancels and deadlines take effect at once, however long the lease and whatever else runs."""

import time
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import pytest

from producer_sdk import Client, Reply
from protocols.queue.broker import Broker
from tests.faults.harness import script
from tests.faults.harness.fork import StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.pool_look import wait_until

LIMIT_S = 0.5
SLOTS = 32


class Late(NamedTuple):
    """How late ends came, in seconds."""

    worst: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Late":
        ordered = sorted(seconds)
        return cls(ordered[-1], ordered[max(0, int(0.99 * len(ordered)) - 1)])


@pytest.fixture
def busy(broker: Broker, client: Client, fork: StartFork, look: Watch) -> Watch:
    """Two workers at the default lease, both full, with a queue before them that moves."""
    for worker in (fork(slots=SLOTS, lease_s=15), fork(slots=SLOTS, lease_s=15)):
        worker.wait_ready(look)
    passing = script.body("passing by", ms_per_token=100)
    for number in range(3000):
        client.submit(passing, job_id=f"passing-{number}", lane="low")
    wait_until(lambda: look("ZCARD", look.keys.leases) >= SLOTS, "they are busy")
    return look


@pytest.mark.timeout(200)
def test_a_cancel_takes_effect_at_once(
    row: Callable[[str], Row], full: bool, busy: Watch, client: Client, rng: Random
) -> None:
    line = row("cancel under load, 15 s lease")
    ids = [f"cancelled-{number}" for number in range(600 if full else 120)]
    body = script.body("c" * 600, ms_per_token=100)
    futures = {job_id: client.submit(body, job_id=job_id, lane="high") for job_id in ids}
    wait_until(lambda: None not in busy.statuses(ids), "all are accepted")
    wait_until(lambda: busy.statuses(ids).get("running", 0) >= SLOTS, "many run, many wait")
    late: list[float] = []
    while futures:
        at_once = rng.sample(sorted(futures), min(len(futures), rng.randint(1, 12)))
        running_now = busy.statuses(at_once).get("running", 0)
        asked_ms = busy.now_ms()
        asked = [futures.pop(job_id) for job_id in at_once]
        for pending in [future.cancel() for future in asked]:
            pending.result(10)
        replies = [future.result(10) for future in asked]
        late += [(reply.finished_ms - asked_ms) / 1000 for reply in replies]
        line.tried += len(replies)
        line.happened += running_now
        assert {reply.status for reply in replies} == {"cancelled"}
        time.sleep(0.05)
    _judge(line, late, "stopped while running")


@pytest.mark.timeout(200)
def test_a_deadline_takes_effect_at_once(
    row: Callable[[str], Row], full: bool, busy: Watch, client: Client, rng: Random
) -> None:
    line = row("deadline under load, 15 s lease")
    count = 600 if full else 120
    body = script.body("d" * 600, ms_per_token=100)
    futures = [
        client.submit(
            body, timeout_s=rng.uniform(1, 10 if full else 3), lane="high", job_id=f"late-{number}"
        )
        for number in range(count)
    ]
    ids = [future.job_id for future in futures]
    wait_until(lambda: all(busy.numbers(ids, "deadline_ms")), "all are accepted")
    deadlines = dict(zip(ids, busy.numbers(ids, "deadline_ms"), strict=True))
    replies: list[Reply] = [future.result(60) for future in futures]
    late = [(reply.finished_ms - deadlines[reply.job_id]) / 1000 for reply in replies]
    line.tried = len(replies)
    line.happened = sum(reply.attempts > 0 for reply in replies)
    assert {reply.status for reply in replies} == {"expired"}
    assert min(late) >= -0.01, "a job expired before its deadline"
    _judge(line, late, "expired while running")


def _judge(line: Row, late: list[float], what: str) -> None:
    worst, p99 = Late.of(late)
    line.recovery_s = p99
    line.note = f"recovery is the 99th percentile; worst {worst:.2f} s; happened: {what}"
    assert line.happened >= 20
    assert line.happened < line.tried, "none of them was still queued"
    assert p99 <= LIMIT_S
