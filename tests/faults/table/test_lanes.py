"""No lane starves, however much waits in the higher ones."""

import time
from collections.abc import Callable

import pytest

from producer_sdk import Client
from protocols.job import Lane
from protocols.queue.broker import Broker
from tests.faults.harness import script
from tests.faults.harness.fork import StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch

LANES: tuple[Lane, ...] = ("high", "normal", "low")
WAITING = 400
"""Jobs that are kept waiting in every lane."""


@pytest.mark.timeout(200)
def test_low_lane_keeps_its_share_under_constant_high_load(
    row: Callable[[str], Row],
    full: bool,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
) -> None:
    line = row("constant load of the high lane")
    wanted = 10_000 if full else 1_200
    sent: dict[Lane, int] = dict.fromkeys(LANES, 0)
    body = script.body("lane", ms_per_token=2)

    def fill() -> int:
        """Bring every lane up to its mark; the fewest that waited in one."""
        waiting: dict[Lane, int] = {lane: look.length(lane) for lane in LANES}
        for lane, count in waiting.items():
            for _ in range(WAITING - count):
                client.submit(body, lane=lane, job_id=f"{lane}-{sent[lane]}")
                sent[lane] += 1
        return min(waiting.values())

    fill()
    while min(look.length(lane) for lane in LANES) < WAITING:
        time.sleep(0.01)
    fork(slots=8)
    fewest = WAITING
    while sum(taken := [sent[lane] - look.length(lane) for lane in LANES]) < wanted:
        fewest = min(fewest, fill())
        time.sleep(0.02)
    high, normal, low = (count / sum(taken) for count in taken)
    line.tried = sum(taken)
    line.happened = taken[0]
    line.note = (
        f"done: high {high:.1%}, normal {normal:.1%}, low {low:.1%}; 8:4:1 is 61.5, 30.8, 7.7"
    )
    assert fewest > 2 * 8, "a lane ran empty: the others were not pressed"
    assert high > normal > low >= 0.05
