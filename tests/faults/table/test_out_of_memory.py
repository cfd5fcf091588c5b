"""A server at its maxmemory takes no jobs, and gets rid of those it has."""

import time
from collections.abc import Callable
from random import Random

import pytest

from producer_sdk import Client, Future, Reply, RolloutError, ServerUnavailable
from protocols.job import JobStatus
from protocols.queue.broker import Broker
from tests.faults.harness import script
from tests.faults.harness.fork import ForkedWorker, StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.servers import Server, StartServer

TOKENS, PACE_MS = 10, 50
BODY_BYTES = 60_000
SLOTS = 16
LEASE_S = 3.0
BEAT_LIMIT_S = 2.0
WINDOW = 16


@pytest.fixture
def server(fresh_server: StartServer) -> Server:
    """A small one."""
    return fresh_server("--maxmemory", "12mb", "--maxmemory-policy", "noeviction")


@pytest.fixture
def url(server: Server) -> str:
    """Its URL stands for the shared one."""
    return server.url


class Pressing:
    """Submits jobs for as long as the server takes any, and again what it refused."""

    def __init__(self, client: Client, seed: int, count: int) -> None:
        names = [f"job-{number}" for number in range(count)]
        self._client = client
        self.texts = {
            name: script.text_of(seed, name, TOKENS + 1).ljust(BODY_BYTES, "x") for name in names
        }
        self._waiting = names[::-1]
        self._sent: dict[str, Future[Reply]] = {}
        self.replies: dict[str, Reply] = {}
        self.tries = 0
        self.refusals: list[RolloutError] = []

    @property
    def over(self) -> bool:
        """Whether all jobs have their reply."""
        return len(self.replies) == len(self.texts)

    def press(self) -> None:
        """Send up to a window of jobs; hear of those that were sent before."""
        for _ in range(min(WINDOW, len(self._waiting))):
            name = self._waiting.pop()
            body = script.body(self.texts[name], ms_per_token=PACE_MS) | {"max_tokens": TOKENS}
            self._sent[name] = self._client.submit(body, job_id=name)
            self.tries += 1
        for name in [name for name, future in self._sent.items() if future.done()]:
            self._hear(name, self._sent.pop(name))

    def _hear(self, name: str, future: Future[Reply]) -> None:
        error = future.exception()
        if isinstance(error, RolloutError):
            self.refusals.append(error)
            self._waiting.insert(0, name)
        else:
            self.replies[name] = future.result()

    def lost(self) -> int:
        """Jobs whose reply is not right."""
        begun = {name: list(text[:TOKENS].encode()) for name, text in self.texts.items()}
        return sum(
            reply.state is None or list(reply.state.response_ids) != begun[name]
            for name, reply in self.replies.items()
            if reply.status is not JobStatus.CANCELLED
        )


@pytest.mark.timeout(400)
def test_a_full_server_refuses_jobs_and_finishes_those_it_has(
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
    line = row("maxmemory reached, noeviction")
    workers = [fork(slots=SLOTS, lease_s=LEASE_S) for _ in range(2)]
    for worker in workers:
        worker.wait_ready(look)
    pressing = Pressing(client, seed, 1500 if full else 400)
    gap_s, finished_full, cancelled_full = 0.0, 0, 0
    until_s = time.monotonic() + 350
    while not pressing.over:
        assert time.monotonic() < until_s, f"{len(pressing.replies)} replies"
        before, refused = len(pressing.replies), len(pressing.refusals)
        pressing.press()
        gap_s = max(gap_s, _beat_gap_s(look, workers))
        if len(pressing.refusals) > refused:
            finished_full += len(pressing.replies) - before
            cancelled_full += _cancel_one(client, look, rng)
        time.sleep(0.05)

    line.tried, line.happened = pressing.tries, len(pressing.refusals)
    line.lost = pressing.lost()
    line.recovery_s = _until_a_job_passes(client)
    line.note = (
        f"replies that came while full: {finished_full}, cancels: {cancelled_full}; "
        f"longest silence of a heart {gap_s:.1f} s"
    )
    assert line.happened >= 20
    for error in pressing.refusals:
        assert isinstance(error, ServerUnavailable)
        assert "out of memory" in error.message
        assert error.retry_after_s
    assert finished_full > 0
    assert cancelled_full > 0
    assert gap_s <= BEAT_LIMIT_S
    assert {reply.attempts for reply in pressing.replies.values()} <= {0, 1}
    assert line.lost == 0
    nothing_left()


def _beat_gap_s(look: Watch, workers: list[ForkedWorker]) -> float:
    beats_ms = [int(look("HGET", look.keys.worker(w.worker_id), "beat_ms")) for w in workers]
    return (look.now_ms() - min(beats_ms)) / 1000


def _cancel_one(client: Client, look: Watch, rng: Random) -> bool:
    """Cancel one running job while the server is full; whether that ended it."""
    running = sorted(job for leases in look.held().values() for job in leases)
    if not running:
        return False
    job_id = rng.choice(running)
    client.cancel(job_id=job_id).result(5)
    return client.get(job_id).result(5).status == "cancelled"


def _until_a_job_passes(client: Client) -> float:
    began_s = time.monotonic()
    assert client.submit(script.body("through")).result(5).status == "completed"
    return time.monotonic() - began_s
