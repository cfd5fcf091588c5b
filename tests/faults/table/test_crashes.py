"""Who is to blame for a dead worker: the job that kills it, not the jobs that only were there."""

from collections.abc import Callable
from random import Random

import pytest

from producer_sdk import Client
from protocols.queue.broker import Broker
from tests.faults.harness import script
from tests.faults.harness.fork import ForkedWorker, StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.pool_look import wait_until

NEIGHBOURS = 63


@pytest.mark.timeout(400)
def test_poison_job_takes_no_neighbour_with_it(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
    nothing_left: Callable[[], None],
) -> None:
    line = row("one poison job in a batch of 64")
    lease_s = 15.0 if full else 1.0
    names = [f"neighbour-{number}" for number in range(NEIGHBOURS)]
    texts = {name: script.text_of(seed, name, 10) for name in names}
    bodies = {"poison": script.body("never", ms_per_token=1, fail="crash", at_token=3)}
    bodies |= {name: script.body(text, ms_per_token=10) for name, text in texts.items()}
    futures = {name: client.submit(body, job_id=name) for name, body in bodies.items()}
    wait_until(lambda: look.statuses(bodies).get("queued") == len(bodies), "all 64 wait")

    worker = fork(slots=64, lease_s=lease_s)
    deaths: list[int] = []

    def replace_dead() -> bool:
        nonlocal worker
        if not worker.running:
            deaths.append(len(look.held().get(worker.worker_id, {})))
            worker = fork(slots=64, lease_s=lease_s)
        return all(future.done() for future in futures.values())

    wait_until(replace_dead, "64 replies", timeout_s=300)
    replies = {name: future.result() for name, future in futures.items()}
    poison = replies.pop("poison")
    line.tried = line.happened = len(deaths)
    line.lost = sum(not script.right(replies[name].state, texts[name]) for name in names)
    line.note = f"{look.dead_letters()} dead letter; leases held at each death: {deaths}"
    assert deaths, "the poison killed nobody"
    assert deaths[0] == NEIGHBOURS + 1, "the first death did not hit the whole batch"
    assert poison.error == "worker_lost"
    assert look.dead_letters() == 1
    assert line.lost == 0
    assert len(deaths) <= 3
    nothing_left()


@pytest.mark.timeout(400)
def test_innocent_long_jobs_outlive_any_number_of_kills(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    rng: Random,
    broker: Broker,
    client: Client,
    fork: StartFork,
    look: Watch,
    nothing_left: Callable[[], None],
) -> None:
    line = row("long jobs on spot workers, kills after a checkpoint")
    kills = 30 if full else 6
    names = [f"long-{number}" for number in range(4)]
    tokens, pace_ms = (4000, 25) if full else (2000, 6)  # longer than all the kills take
    texts = {name: script.text_of(seed, name, tokens) for name in names}
    futures = [
        client.submit(script.body(texts[name], ms_per_token=pace_ms), job_id=name) for name in names
    ]
    flags = {"slots": 2, "lease_s": 1.0, "checkpoint_tokens": 16, "checkpoint_s": 0.2}
    workers = {worker.worker_id: worker for worker in (fork(**flags), fork(**flags))}

    def ready_to_kill(kept: dict[str, int]) -> ForkedWorker | None:
        """A worker whose jobs all have a checkpoint that is newer than those."""
        now = dict(zip(names, look.numbers(names, "kept:0"), strict=True))
        held = look.held()
        able = [w for w, jobs in held.items() if all(now[job] > kept[job] for job in jobs)]
        return workers[rng.choice(able)] if able and len(able) == len(held) else None

    for _ in range(kills):
        kept = dict(zip(names, look.numbers(names, "kept:0"), strict=True))
        found: list[ForkedWorker] = []
        wait_until(
            lambda kept=kept, found=found: (
                found.extend(w for w in [ready_to_kill(kept)] if w) or found
            ),
            "a worker with new checkpoints",
        )
        victim = found[0]
        victim.kill()
        line.tried += 1
        line.happened += victim.worker_id in look.held()
        del workers[victim.worker_id]
        fresh = fork(**flags)
        workers[fresh.worker_id] = fresh

    replies = [future.result(timeout=240) for future in futures]
    rights = zip(replies, names, strict=True)
    line.lost = sum(not script.right(reply.state, texts[name]) for reply, name in rights)
    attempts = [reply.attempts for reply in replies]
    line.note = f"{look.dead_letters()} dead letters; attempts {attempts}"
    assert line.happened == kills
    assert max(attempts) > 3, "no job was hit as often as a poison job may be"
    assert look.dead_letters() == 0
    assert line.lost == 0
    nothing_left()
