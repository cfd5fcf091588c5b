"""A worker with 256 jobs in flight goes; how long until the last of them runs again."""

import signal
import time
from collections.abc import Callable

import pytest

from producer_sdk import Client, Future, Reply
from protocols.queue.broker import Broker
from tests.faults.harness import script
from tests.faults.harness.fork import StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Leases, Watch
from tests.pool_look import wait_until

IN_FLIGHT = 256
PACE_MS = 400
LASTING = 300
"""Tokens of a job that outlasts the test at that pace."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("queue", ["idle", "backlog"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_jobs_of_a_worker_that_goes_run_again(
    how: signal.Signals,
    queue: str,
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
) -> None:
    line = row(f"{how.name} with {IN_FLIGHT} in flight, {queue} queue")
    lease_s = 15.0 if full else 1.5
    limit_s = lease_s + 5 if how == signal.SIGKILL else 2.0
    victim = fork(slots=IN_FLIGHT, lease_s=lease_s)
    flight = [f"flight-{number}" for number in range(IN_FLIGHT)]
    lasting = script.body(script.text_of(seed, "flight", LASTING), ms_per_token=PACE_MS)
    flying = [client.submit(lasting, job_id=name) for name in flight]
    wait_until(lambda: look.statuses(flight).get("running") == IN_FLIGHT, "all 256 run")

    heir = fork(slots=IN_FLIGHT + 8, lease_s=lease_s)
    heir.wait_ready(look)
    time.sleep(
        lease_s
    )  # it may reclaim after a whole lease of contact, as in a fleet that has run for long
    undisturbed = _run_longer_than_the_lease(client, look, lease_s)
    backlog = (10_000 if full else 1_500) if queue == "backlog" else 0
    short = script.body("short" if not full else "not so short", ms_per_token=80)
    waiting = [client.submit(short, job_id=f"short-{i}") for i in range(backlog)]
    if backlog:
        wait_until(lambda: look("HEXISTS", look.keys.reply(f"short-{backlog - 1}"), "status"), "in")

    leases = look.held()[victim.worker_id]
    line.tried, line.happened = 1, int(len(leases) == IN_FLIGHT)
    line.recovery_s = _until_all_run_again(look, leases, lambda: victim.signal(how), limit_s + 20)
    still = sum(not future.done() for future in waiting)
    line.note = f"limit {limit_s:g} s" + (f"; {still} of {backlog} still queued" if backlog else "")
    assert line.happened == 1
    assert not backlog or still, "the backlog was over before the jobs ran again"
    assert line.recovery_s <= limit_s
    assert set(look.numbers(flight, "attempts")) == {2}
    for future in flying:
        future.cancel()
    for future in [*undisturbed, *waiting]:
        assert future.result(timeout=120).attempts == 1, "a job ran twice without a fault"


def _run_longer_than_the_lease(client: Client, look: Watch, lease_s: float) -> list[Future[Reply]]:
    ids = [f"undisturbed-{number}" for number in range(8)]
    tokens = int(1.5 * lease_s * 1000 / PACE_MS)
    body = script.body("u" * tokens, ms_per_token=PACE_MS)
    futures = [client.submit(body, job_id=job_id) for job_id in ids]
    wait_until(lambda: look.statuses(ids).get("running") == len(ids), "they run")
    return futures


def _until_all_run_again(
    look: Watch, leases: Leases, fault: Callable[[], None], limit_s: float
) -> float:
    began_s = time.monotonic()
    fault()
    while not look.begun_again(leases):
        assert time.monotonic() - began_s < limit_s, f"not all run again after {limit_s} s"
        time.sleep(0.05)
    return time.monotonic() - began_s
