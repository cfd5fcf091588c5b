"""Wrong clocks of workers and clients change nothing: only the server's time counts."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from producer_sdk import Client
from protocols.queue.broker import Broker
from tests.faults.harness import script
from tests.faults.harness.fork import StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.pool_look import wait_until

HOUR_S = 3600.0
LEASE_S = 1.5
LATE_S = 1.0
FAIL_LIMIT = 3

KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": (script.body("plain", ms_per_token=20), 600.0),
    "late": (script.body("d" * 200, ms_per_token=50), 0.8),
    "broken": (script.body("broken", fail="error", at_token=2), 600.0),
}
"""Body and deadline of what must end as completed, expired and failed."""

Ends = dict[str, tuple[str, int]]
"""Job id -> status, attempts; those of expired jobs, which may expire before they begin, are left out."""


@pytest.mark.timeout(200)
def test_clocks_an_hour_off_make_no_difference(
    row: Callable[[str], Row],
    full: bool,
    broker: Broker,
    fork: StartFork,
    look: Watch,
    url: str,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
    nothing_left: Callable[[], None],
) -> None:
    line = row("clocks of worker and client an hour off")
    right_time = time.time
    count = 60 if full else 10
    ends: dict[float, Ends] = {}
    waits: dict[float, float] = {}
    for off_s in (0.0, HOUR_S, -HOUR_S) if full else (0.0, HOUR_S):
        monkeypatch.setattr(time, "time", lambda off_s=off_s: right_time() - off_s)
        with Client(url, pool=pool) as client:
            ends[off_s], waits[off_s] = _live_through(client, fork, look, off_s, count)
        monkeypatch.undo()
    line.tried = line.happened = len(ends) - 1  # each of them asserts that its clocks are off
    line.recovery_s = max(waits.values())
    line.lost = sum(ends[off_s] != ends[0.0] for off_s in ends)
    line.note = "a killed worker's jobs ran again after " + ", ".join(
        f"{wait:.1f} s ({off_s / HOUR_S:+.0f} h)" for off_s, wait in waits.items()
    )
    assert line.lost == 0, "wrong clocks made a difference"
    assert {status for status, _ in ends[0.0].values()} == {"completed", "expired", "failed"}
    assert max(waits.values()) <= LEASE_S + 5
    nothing_left()


def _live_through(
    client: Client, fork: StartFork, look: Watch, off_s: float, count: int
) -> tuple[Ends, float]:
    """Answers, deadlines, retries and a killed worker; how all ended, and how long until jobs ran again."""
    flags = {"slots": 5 * count, "lease_s": LEASE_S, "fail_limit": FAIL_LIMIT, "backoff_s": 0.1}
    stem = f"off{off_s:.0f}"
    long = [
        client.submit(script.body("l" * 60, ms_per_token=50), job_id=f"{stem}-long-{number}")
        for number in range(count)
    ]
    victim = fork(clock_off_s=off_s, **flags)
    ids = [future.job_id for future in long]
    wait_until(lambda: look.statuses(ids).get("running") == count, "they run")
    heir = fork(clock_off_s=off_s, **flags)
    heir.wait_ready(look)
    told_ms = int(look("HGET", look.keys.worker(heir.worker_id), "started_ms"))
    assert abs(told_ms - look.now_ms() - 1000 * off_s) < 60_000, "its clock is not off"
    time.sleep(LEASE_S)  # of contact, before it may reclaim
    leases = look.held()[victim.worker_id]
    victim.kill()
    killed_s = time.monotonic()
    mixed = [
        client.submit(body, job_id=f"{stem}-{kind}-{number}", timeout_s=timeout_s)
        for number in range(count)
        for kind, (body, timeout_s) in KINDS.items()
    ]
    wait_until(lambda: look.begun_again(leases), "the killed worker's jobs run again")
    waited_s = time.monotonic() - killed_s
    replies = [future.result(60) for future in (*long, *mixed)]
    heir.kill()
    for reply in replies:
        if "-late-" in reply.job_id:
            deadline_ms = int(look.reply(reply.job_id)["deadline_ms"])
            assert -0.01 <= (reply.finished_ms - deadline_ms) / 1000 <= LATE_S
    ends = {
        r.job_id.removeprefix(stem): (r.status.value, 0 if r.status == "expired" else r.attempts)
        for r in replies
    }
    return ends, waited_s
