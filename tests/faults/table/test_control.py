"""The control channel under faults: an acknowledged pause is a fact, and every worker comes to what is wanted."""

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
from torch import Tensor

from producer_sdk import Client, Future
from protocols.job import JobStatus, Reply
from protocols.queue.broker import LIBRARY, Broker
from tests.control_look import acks, fact, obeyed, order, redis_cli
from tests.faults.harness import script
from tests.faults.harness.channel_trace import Seen, Trace
from tests.faults.harness.fork import ForkedWorker, StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.pool_look import wait_until
from tests.servers import StartServer
from tests.tiny_model import altered, save_tiny_model
from tests.worker_process import StartWorker, WorkerProcess

LIMIT_S = 120.0
STILL_S = 10.0
"""How long nothing may begin."""
MODES = ("release", "keep", "drain")
RING = "local function ring(P, whom)\n"
DROPPED = (
    RING
    + "  if redis.call('HINCRBY', P, 'rings', 1) % 2 == 0 then return end -- every second one\n"
)


@pytest.fixture
def url(fresh_server: StartServer) -> str:
    """A server without other pools."""
    return fresh_server().url


@pytest.fixture
def trace(url: str) -> Iterator[Trace]:
    """What the server sees, from the start."""
    with Trace(url) as made:
        yield made


def newest_command(look: Watch) -> str:
    """The id of the command that was logged last."""
    ((entry, _),) = look("XREVRANGE", look.keys.commands, "+", "-", "COUNT", 1)
    return entry.decode()


@pytest.mark.timeout(300)
def test_an_acknowledged_pause_is_a_fact(
    row: Callable[[str], Row],
    broker: Broker,
    client: Client,
    start_worker: StartWorker,
    trace: Trace,
    look: Watch,
    url: str,
    pool: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    line = row("PUBLISH pause: one frozen across it, one joins")
    model = save_tiny_model(tmp_path_factory.mktemp("model"))

    def start() -> WorkerProcess:
        return start_worker(url, pool, engine="torch", model=str(model), slots=8, threads=1)

    steady, frozen = start(), start()
    steady.wait_ready(LIMIT_S)
    frozen.wait_ready(LIMIT_S)
    prompts = [[1 + i % 200, 7, 9] for i in range(1_200)]
    params = {"max_tokens": 48, "min_tokens": 48, "temperature": 1.0}
    futures = [
        client.submit({"input_ids": ids, "sample_params": params}, protocol="generate")
        for ids in prompts
    ]
    wait_until(lambda: len(look.held()) == 2, "both are at work", timeout_s=LIMIT_S)
    frozen.signal(signal.SIGSTOP)
    line.tried = len(futures)
    assert int(redis_cli(url, "PUBLISH", f"rollout:control:{pool}", "pause")) >= 1
    wait_until(lambda: look("HGET", look.keys.desired, "gate") == b"closed", "it is a command")
    command = newest_command(look)
    wait_until(lambda: steady.worker_id in acks(look, command), "the steady one answers")
    begun_before, since_s = len(trace.caught_up().begun), time.monotonic()
    joined = start()
    wait_until(lambda: time.monotonic() - since_s > 2, "it was frozen across the pause")
    assert frozen.worker_id not in acks(look, command), "it was not frozen across the pause"
    frozen.signal(signal.SIGCONT)
    wait_until(lambda: len(acks(look, command)) == 2, "both have answered", timeout_s=LIMIT_S)
    wait_until(
        lambda: fact(look, joined.worker_id, "state") == "paused",
        "the joiner waits",
        timeout_s=LIMIT_S,
    )
    answered_s = time.monotonic()
    wait_until(lambda: time.monotonic() - answered_s > STILL_S, "a while", timeout_s=2 * STILL_S)
    assert len(trace.caught_up().begun) == begun_before  # nothing began after the acknowledgement
    waiting = sum(look.length(lane) for lane in ("resume", "high", "normal", "low"))
    line.happened = waiting
    assert waiting >= 1_000, "the backlog was too short to prove anything"
    records = [look.reply(future.job_id) for future in futures]
    kept = [record for record in records if record.get("handbacks")]
    assert look.length("resume") == len(kept) > 0
    redis_cli(url, "PUBLISH", f"rollout:control:{pool}", "continue")
    resumed_s = time.monotonic()
    replies = [future.result(LIMIT_S) for future in futures]
    line.lost = sum(reply.status is not JobStatus.COMPLETED for reply in replies)
    line.double = sum(count > 1 for count in trace.replies_written(pool).values())
    line.recovery_s = time.monotonic() - resumed_s
    again = [record for record in kept if record.get("checkpoints") is None]
    line.note = f"{len(kept)} handed back, {len(again)} of them without a token"
    assert {len(reply.states[0].response_ids) for reply in replies} == {48}
    drawn = 48 * len(futures)
    wait_until(lambda: _drawn(look, steady, frozen, joined) >= drawn, "the last heartbeats")
    # none began from zero: at most the token that was being drawn when a job was handed back is drawn again
    assert _drawn(look, steady, frozen, joined) <= drawn + len(kept)
    assert line.lost == line.double == 0
    assert trace.caught_up().begun_while_closed == 0


def _drawn(look: Watch, *workers: WorkerProcess) -> int:
    return sum(int(fact(look, worker.worker_id, "generated_tokens")) for worker in workers)


@pytest.mark.timeout(600)
def test_weights_change_under_load_again_and_again(
    row: Callable[[str], Row],
    full: bool,
    broker: Broker,
    client: Client,
    start_worker: StartWorker,
    trace: Trace,
    look: Watch,
    rng: Random,
    url: str,
    pool: str,
    tmp_path: Path,
) -> None:
    line = row("pause, offload, onload, update, continue under load")
    cycles = 40 if full else 6
    model = save_tiny_model(tmp_path / "model")
    fleet = [
        start_worker(url, pool, engine="torch", model=str(model), slots=8, threads=1)
        for _ in range(2)
    ]
    for worker in fleet:
        worker.wait_ready(LIMIT_S)
    params = {"max_tokens": 64, "min_tokens": 64, "temperature": 1.0}
    futures: list[Future[Reply]] = []

    def submit(count: int) -> None:
        for _ in range(count):
            ids = [rng.randrange(1, 200) for _ in range(4)]
            body = {"input_ids": ids, "sample_params": params}
            futures.append(client.submit(body, protocol="generate"))

    submit(100)
    for version in range(1, cycles + 1):
        submit(30)
        wait_until(lambda: look.held(), "jobs run", timeout_s=LIMIT_S)
        mode, level = MODES[version % len(MODES)], version // len(MODES) % 2 + 1
        weights = altered(model, tmp_path / f"v{version}", partial(_nudged, version))
        obeyed(look, "pause", f"mode={mode}", timeout_s=LIMIT_S)
        obeyed(look, "offload", f"level={level}", timeout_s=LIMIT_S)
        obeyed(look, "onload", timeout_s=LIMIT_S)
        uri = f"uri={weights / 'model.safetensors'}"
        obeyed(look, "update_weights", f"version={version}", uri, timeout_s=LIMIT_S)
        obeyed(look, "continue", timeout_s=LIMIT_S)
    replies = [future.result(LIMIT_S) for future in futures]
    line.tried = cycles
    line.lost = sum(reply.status is not JobStatus.COMPLETED for reply in replies)
    line.double = sum(count > 1 for count in trace.replies_written(pool).values())
    spans = [reply.states[0].policy_versions for reply in replies]
    line.happened = sum(len(s) > 1 for s in spans)
    line.note = f"{len(replies)} jobs; happened: those that lived through an update"
    assert line.lost == line.double == 0
    assert {len(reply.states[0].response_ids) for reply in replies} == {64}
    assert all(list(s) == sorted(s) and len({v for v, _ in s}) == len(s) for s in spans)
    assert trace.caught_up().begun_while_closed == 0
    assert line.happened > 0


def _nudged(version: int, weights: dict[str, Tensor]) -> None:
    for tensor in weights.values():
        tensor.mul_(1 + 0.001 * version)


@pytest.mark.timeout(900)
def test_workers_come_to_what_is_wanted_without_half_of_the_doorbells(
    row: Callable[[str], Row],
    full: bool,
    broker: Broker,
    client: Client,
    fork: StartFork,
    trace: Trace,
    look: Watch,
    rng: Random,
) -> None:
    line = row("control commands, half of the doorbells dropped")
    commands, workers, joiners = (1_000, 6, 6) if full else (60, 3, 2)
    assert RING in LIBRARY
    look("FUNCTION", "LOAD", "REPLACE", LIBRARY.replace(RING, DROPPED))
    fleet = [fork(slots=4) for _ in range(workers)]
    for worker in fleet:
        worker.wait_ready(look)
    futures = [client.submit(script.body("work", ms_per_token=5)) for _ in range(200)]
    issued: dict[str, tuple[float, list[str]]] = {}
    for number in range(commands):
        verb = rng.choice(["pause", "pause mode=drain", "pause mode=keep", "continue", "ping"])
        told = order(look, *verb.split(), f"id=n{number}")
        issued[told["command"]] = (look.now_ms() / 1000, told["workers"].split())
        if number % (commands // joiners) == joiners:
            fleet.append(fork(slots=4))
        if number % 10 == 0:
            futures.append(client.submit(script.body("work", ms_per_token=5)))
        time.sleep(rng.uniform(0, 0.3))
    order(look, "pause", "id=last")
    wait_until(lambda: _all_at(look, fleet, "paused"), "all pause", timeout_s=LIMIT_S)
    wait_until(lambda: _answered(trace.caught_up(), issued), "all answer", timeout_s=LIMIT_S)
    took = sorted(_slowest_s(trace.caught_up(), issued))
    line.tried, line.happened = commands, int(look("HGET", look.keys.prefix, "rings")) // 2
    line.recovery_s = took[int(0.99 * len(took))]
    line.note = f"p50 {took[len(took) // 2]:.2f} s, {len(fleet)} workers, recovery is p99"
    order(look, "continue", "id=go")
    replies = [future.result(LIMIT_S) for future in futures]
    line.lost = sum(reply.status is not JobStatus.COMPLETED for reply in replies)
    line.double = sum(count > 1 for count in trace.replies_written(look.keys.pool).values())
    assert line.happened >= commands // 4, "too few doorbells were dropped"
    assert trace.caught_up().begun_while_closed == 0
    assert line.lost == line.double == 0
    assert line.recovery_s <= 3.0


def _all_at(look: Watch, fleet: list[ForkedWorker], state: str) -> bool:
    return {fact(look, worker.worker_id, "state") for worker in fleet} == {state}


def _answered(seen: Seen, issued: dict[str, tuple[float, list[str]]]) -> bool:
    return all(set(asked) <= set(seen.acked.get(name, ())) for name, (_, asked) in issued.items())


def _slowest_s(seen: Seen, issued: dict[str, tuple[float, list[str]]]) -> Iterator[float]:
    """From each command to the last of its answers, by the server's clock."""
    for name, (at_s, asked) in issued.items():
        yield max(seen.acked[name][worker] for worker in asked) - at_s
