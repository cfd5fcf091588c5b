"""A server that is flushed, or killed and started again, under workers and clients that go on."""

import asyncio
import signal
import time
from collections.abc import Callable
from functools import partial

import pytest

from producer_sdk import Client, Future, Reply
from protocols.errors import ServerUnavailable
from protocols.queue.broker import Broker
from tests.faults.harness import record, script
from tests.faults.harness.fork import ForkedWorker, StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.job_body import job
from tests.pool_look import wait_until
from tests.servers import Server, StartServer

LIMIT_S = 5.0
LEASE_S = 3.0
SLOTS = 16
PACE_MS = 20
TOKENS = 15
AWAY_S = 4.0
"""Longer than a lease: to the server that comes back all of them have run out."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def server(fresh_server: StartServer) -> Server:
    """A server that keeps a record."""
    return fresh_server(*record.OPTIONS)


@pytest.fixture
def url(server: Server) -> str:
    """Its URL stands for the shared one."""
    return server.url


class Flow:
    """Jobs that run through a pool, and whether they do."""

    def __init__(self, client: Client, look: Watch, seed: int, count: int) -> None:
        self._client, self._look = client, look
        names = [f"job-{number}" for number in range(count)]
        self.texts = {name: script.text_of(seed, name, TOKENS) for name in names}
        self.futures: dict[str, Future[Reply]] = {
            name: client.submit(script.body(text, ms_per_token=PACE_MS), job_id=name)
            for name, text in self.texts.items()
        }

    @property
    def done(self) -> int:
        """How many have their reply."""
        return sum(future.done() for future in self.futures.values())

    @property
    def outstanding(self) -> list[str]:
        """Those that have none."""
        return [name for name, future in self.futures.items() if not future.done()]

    def until_it_moves(self) -> float:
        """Seconds until jobs run and more replies arrive than were on their way."""
        began_s, wanted = time.monotonic(), min(len(self.futures), self.done + 2 * SLOTS + 1)
        wait_until(lambda: self.done >= wanted, "jobs flow again")
        return time.monotonic() - began_s

    def lost(self) -> int:
        """How many have no right reply once all have one."""
        replies = {name: future.result(60) for name, future in self.futures.items()}
        return sum(not script.right(replies[name].state, self.texts[name]) for name in replies)


def test_flushed_while_paused_stays_paused(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
    server: Server,
    pool: str,
    nothing_left: Callable[[], None],
) -> None:
    line = row("FLUSHALL while paused")
    workers = _start_two(fork, look)
    flow = Flow(client, look, seed, 2000 if full else 300)
    wait_until(lambda: flow.done >= 50, "jobs flow")
    _set_gate(look, "closed")
    wait_until(lambda: not look.held(), "what had begun has ended")
    _until_seen_by(look, workers)
    wait_until(
        lambda: look.statuses(flow.outstanding) in ({"queued": len(flow.outstanding)}, {}), ""
    )
    waiting = flow.outstanding

    line.tried = 1
    look("FLUSHALL")
    line.happened = int(look.statuses(waiting) == {None: len(waiting)})
    began_s = time.monotonic()
    wait_until(lambda: look("HGET", look.keys.desired, "gate"), "the desired state is back")
    line.recovery_s = time.monotonic() - began_s
    assert look("HGET", look.keys.desired, "gate") == b"closed"
    wait_until(
        lambda: look.statuses(waiting) == {"queued": len(waiting)}, "all are submitted again"
    )
    assert look("HGET", look.keys.desired, "gate") == b"closed"
    assert look.numbers(waiting, "attempts") == [0] * len(waiting), "a job began while paused"

    _set_gate(look, "open")
    line.lost = flow.lost()
    line.note = f"{len(waiting)} jobs submitted again by their client"
    assert waiting
    assert line.happened == 1
    assert line.recovery_s <= LIMIT_S
    _judge(line, client, workers, server, pool, nothing_left)


def test_flushed_while_running_flows_again(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
    server: Server,
    pool: str,
    nothing_left: Callable[[], None],
) -> None:
    line = row("FLUSHALL while running")
    workers = _start_two(fork, look)
    flushes = 8 if full else 2
    flow = Flow(client, look, seed, 3000 if full else 600)
    line.recovery_s = 0.0
    for number in range(flushes):
        share = (number + 1) * len(flow.futures) // (flushes + 2)
        wait_until(
            lambda share=share: flow.done >= share and look.held(), "jobs flow", timeout_s=90
        )
        waiting = flow.outstanding
        look("FLUSHALL")
        line.tried += 1
        line.happened += None in look.statuses(waiting)
        line.recovery_s = max(line.recovery_s, flow.until_it_moves())
    line.lost = flow.lost()
    assert line.happened == flushes
    assert line.recovery_s <= LIMIT_S
    _judge(line, client, workers, server, pool, nothing_left)


def test_killed_server_with_its_file_flows_again(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
    server: Server,
    pool: str,
    nothing_left: Callable[[], None],
) -> None:
    line = row("server killed, started again with its AOF")
    workers = _start_two(fork, look)
    kills = 8 if full else 1
    flow = Flow(client, look, seed, 3000 if full else 600)
    line.recovery_s = 0.0
    for number in range(kills):
        share = (number + 1) * len(flow.futures) // (kills + 2)
        wait_until(
            lambda share=share: flow.done >= share and look.held(), "jobs flow", timeout_s=90
        )
        held = sum(map(len, look.held().values()))
        server.kill()
        line.tried += 1
        line.happened += held > 0
        time.sleep(AWAY_S)
        server.start()
        line.recovery_s = max(line.recovery_s, flow.until_it_moves())
    line.lost = flow.lost()
    attempts = {future.result(0).attempts for future in flow.futures.values()}
    line.note = f"away {AWAY_S:g} s each, lease {LEASE_S:g} s; attempts {sorted(attempts)}"
    assert line.happened == kills
    assert line.recovery_s <= LIMIT_S
    assert attempts == {1}, "a job was taken from a worker that lived and could not say so"
    _judge(line, client, workers, server, pool, nothing_left)


async def test_what_may_be_reclaimed_is_judged_anew_after_a_break(
    broker: Broker, look: Watch, server: Server
) -> None:
    await broker.enqueue([job("a")])
    await broker.take("w", "n", 1, lease_ms=1, policy_version=0)
    await broker.link.call("WAITAOF", 1, 0, 5000)  # or what was accepted goes with the server
    judged_on = broker.link.opened
    server.kill()
    sweep = partial(broker.sweep, most=9, crash_limit=3, orphan_ms=0)
    waiting = asyncio.create_task(sweep(reclaim=True, only=judged_on))
    await asyncio.sleep(0)
    server.start()
    with pytest.raises(ServerUnavailable, match="connection"):
        await waiting
    assert (await sweep(reclaim=False)).reclaimed == 0
    assert look.statuses(["a"]) == {"running": 1}
    with pytest.raises(ServerUnavailable, match="was lost"):
        await sweep(reclaim=True, only=judged_on)
    assert (await sweep(reclaim=True, only=broker.link.opened)).reclaimed == 1


def _start_two(fork: StartFork, look: Watch) -> list[ForkedWorker]:
    workers = [fork(slots=SLOTS, lease_s=LEASE_S) for _ in range(2)]
    for worker in workers:
        worker.wait_ready(look)
    return workers


def _set_gate(look: Watch, gate: str) -> None:
    look("HSET", look.keys.desired, "gate", gate)
    look("HINCRBY", look.keys.desired, "generation", 1)


def _until_seen_by(look: Watch, workers: list[ForkedWorker]) -> None:
    """Return when every worker has had a heartbeat answered since."""
    since_ms = look.now_ms()

    def beats_ms() -> list[int]:
        return [int(look("HGET", look.keys.worker(w.worker_id), "beat_ms") or 0) for w in workers]

    for _ in range(2):  # the answer to a heartbeat has arrived once the next one is there
        wait_until(lambda since_ms=since_ms: min(beats_ms()) > since_ms, "heartbeats")
        since_ms = max(beats_ms())


def _judge(
    line: Row,
    client: Client,
    workers: list[ForkedWorker],
    server: Server,
    pool: str,
    nothing_left: Callable[[], None],
) -> None:
    nothing_left()
    assert all(worker.running for worker in workers), "a worker has ended"
    for worker in workers:
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    client.close()
    server.stop()
    line.double = record.read_record(server.folder, pool).double
    assert line.lost == 0
    assert line.double == 0
