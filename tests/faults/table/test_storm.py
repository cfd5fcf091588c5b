"""Thousands of jobs through a storm of kills and freezes: each answered once, with the right tokens.

The judge is the server's own record, not what workers or the client say.
"""

import re
import time
from collections.abc import Callable
from random import Random
from statistics import median

import pytest

from producer_sdk import Client
from protocols import codec
from protocols.queue.broker import Broker
from tests.faults.harness import record, script
from tests.faults.harness.fork import StartFork
from tests.faults.harness.record import Record
from tests.faults.harness.row import Row
from tests.faults.harness.storm import Storm
from tests.faults.harness.watch import Watch
from tests.servers import Server, StartServer

WORKERS = 8
SLOTS = 2
LEASE_S = 1.0
TOKENS, PACE_MS = 200, 5
CHECKPOINT_TOKENS, CHECKPOINT_S = 2, 0.015
"""More often than every 2 % of a job."""
_REFUSED = re.compile(r"job (\S+): the lease of attempt (\S+) was lost")


@pytest.fixture
def server(fresh_server: StartServer) -> Server:
    """A server that keeps a record."""
    return fresh_server(*record.OPTIONS)


@pytest.fixture
def url(server: Server) -> str:
    """Its URL stands for the shared one."""
    return server.url


@pytest.mark.timeout(1500)
def test_every_job_is_answered_once_through_kills_and_freezes(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    rng: Random,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
    server: Server,
    pool: str,
    nothing_left: Callable[[], None],
) -> None:
    jobs, faults, least_refused = (10_000, 500, 100) if full else (240, 12, 3)
    line = row(f"{jobs:,} jobs, {WORKERS} workers: kills and freezes")
    flags = {"slots": SLOTS, "lease_s": LEASE_S}
    flags |= {"checkpoint_tokens": CHECKPOINT_TOKENS, "checkpoint_s": CHECKPOINT_S}
    storm = Storm(lambda: fork(**flags), look, rng)
    for _ in range(WORKERS):
        storm.add()
    texts = {f"job-{i}": script.text_of(seed, f"job-{i}", TOKENS) for i in range(jobs)}
    futures = [
        client.submit(script.body(text, ms_per_token=PACE_MS), job_id=job_id)
        for job_id, text in texts.items()
    ]
    done: list[object] = []
    for future in futures:
        future.add_done_callback(done.append)
    began_s = time.monotonic()
    while len(done) < jobs:
        due = min(faults, int(1.15 * faults * len(done) / jobs) + 1)
        storm.blow(due, due)
        time.sleep(0.02)
    storm.calm()
    took_s = time.monotonic() - began_s
    nothing_left()
    dead = look.dead_letters()
    client.close()
    for worker in storm.workers.values():
        worker.kill()
    server.stop()

    seen = record.read_record(server.folder, pool)
    refused = [
        (match[1], match[2])
        for worker in storm.started
        for match in _REFUSED.finditer(worker.log.read_text())
    ]
    line.tried, line.happened = storm.tried, storm.kills + storm.freezes
    line.recovery_s = max(storm.reclaimed_after_s)
    line.double = seen.double
    line.lost = sum(not _answered_right(seen, job_id, text) for job_id, text in texts.items())
    size = median(seen.checkpoint_tokens) / TOKENS
    begun = sum(map(len, seen.fences.values()))
    line.note = (
        f"{storm.kills} kills, {storm.freezes} freezes, {len(refused)} zombies refused, {dead} dead, "
        f"{len(storm.spared)} spared; "
        f"{begun} attempts; a checkpoint holds {size:.1%} of a job; {took_s:.0f} s"
    )
    assert storm.kills >= faults
    assert storm.freezes >= faults
    assert size <= 0.02
    assert seen.accepted == set(texts)
    assert line.lost == 0
    assert line.double == 0
    assert dead == 0
    assert len(storm.spared) <= max(5, jobs // 500), (
        "losses are counted that a checkpoint has undone"
    )
    assert len(refused) >= least_refused
    for job_id, fence in refused:
        assert seen.fences[job_id][-1] != fence, "the attempt that was refused has answered"


def _answered_right(seen: Record, job_id: str, text: str) -> bool:
    """Whether the first terminal reply in the record is the one that the script must give."""
    ends = seen.ends.get((job_id, 0))
    if not ends or b"state" not in ends[0]:
        return False
    end, states = ends[0], codec.unpack_states(ends[0][b"state"])
    return end[b"status"] == b"completed" and len(states) == 1 and script.right(states[0], text)
