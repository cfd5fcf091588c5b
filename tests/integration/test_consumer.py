"""How a worker waits for jobs and what it does with those that it is given meanwhile, on real servers."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protocols.queue.broker import Broker
from protocols.queue.link import Link
from protocols.queue.rows import Hold
from protocols.queue.wire import SocketWire
from tests.job_body import job
from tests.pool_look import Look, until, until_blocked
from tests.servers import both_servers
from worker import consumer as consumer_module
from worker.consumer import Consumer
from worker.lease import LeaseKeeper
from worker.outcome import Completed, HandedBack, Outcome, Settler
from worker.pipeline import Attempt

pytestmark = both_servers

NAME = "taker"
LONG_S = 60.0
AT_ONCE_S = 20.0
"""Well below `LONG_S`, for a busy machine."""


class Worker:
    """A consumer without an engine: it answers at once, or hands back what it was ordered to."""

    def __init__(self, url: str, pool: str) -> None:
        self.version = 0
        self.link = Link(url, name=f"{NAME}-{pool}")
        self._writing = Link(url, name="writer")
        settler = Settler(Broker(self._writing, pool), fail_limit=5, backoff_s=1, lease_s=15)
        self.consumer = Consumer(
            Broker(self.link, pool),
            NAME,
            LeaseKeeper(url, pool, NAME, lease_s=15, crash_limit=3),
            settler,
            self._handle,
            slots=8,
            lease_s=15,
            policy_version=lambda: self.version,
        )
        self.consumer.go_on()
        self.running = asyncio.create_task(self.consumer.run())
        self.holds = False

    async def _handle(self, attempt: Attempt) -> Outcome:
        while self.holds and attempt.order is None:  # noqa: ASYNC110 - what an engine would do
            await asyncio.sleep(0.001)
        if attempt.order is not None:
            return HandedBack()
        return Completed(b"{}", b"", policy_version=self.version, oldest_version=self.version)

    async def leave(self) -> None:
        """As on SIGTERM."""
        self.running.cancel()
        await asyncio.wait([self.running])
        await self.consumer.drain(0.0, asyncio.Event())

    async def close(self) -> None:
        await self.leave()
        await self.link.close()
        await self._writing.close()


@pytest.fixture
async def worker(
    broker: Broker, look: Look, url: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Worker]:
    """One that waits for a job."""
    assert broker.link.opened
    monkeypatch.setattr(consumer_module, "BELL_S", LONG_S)
    made = Worker(url, pool)
    await until_blocked(look, f"{NAME}-{pool}")
    yield made
    await made.close()


async def ends(look: Look, *job_ids: str) -> None:
    for job_id in job_ids:
        await until(lambda job_id=job_id: look.reply(job_id)["status"] == "completed", job_id)


async def test_a_burst_that_ends_a_wait_is_answered_whole(
    broker: Broker, look: Look, worker: Worker
) -> None:
    names = [f"j{i}" for i in range(20)]
    async with asyncio.timeout(AT_ONCE_S):
        await broker.enqueue([job(name) for name in names])
        await ends(look, *names)
    assert worker.consumer.finished_jobs == 20


async def test_a_wait_takes_one_job_and_leaves_the_others_to_all(
    broker: Broker, look: Look, worker: Worker, pool: str
) -> None:
    """Should the worker have frozen meanwhile, it is given no more."""
    wire = worker.link._wire  # pyright: ignore[reportPrivateUsage]
    assert isinstance(wire, SocketWire)
    wire._transport.pause_reading()  # pyright: ignore[reportPrivateUsage]
    await broker.enqueue([job(name) for name in "abc"])
    statuses = [look.reply(name)["status"] for name in "abc"]
    assert statuses == ["running", "queued", "queued"]


async def test_what_a_leaving_worker_is_given_is_handed_back(
    broker: Broker, look: Look, worker: Worker
) -> None:
    wire = worker.link._wire  # pyright: ignore[reportPrivateUsage]
    assert isinstance(wire, SocketWire)
    wire._transport.pause_reading()  # pyright: ignore[reportPrivateUsage]
    worker.holds = True
    async with asyncio.timeout(AT_ONCE_S):
        await broker.enqueue([job("a")])
        assert look.reply("a")["status"] == "running"
        await worker.leave()
    reply = look.reply("a")
    assert (reply["status"], reply["handbacks"], reply["lane"]) == ("queued", "1", "resume")
    assert worker.link.opened == 2


async def test_new_weights_during_a_wait_are_not_waited_with(
    broker: Broker, look: Look, worker: Worker
) -> None:
    """The take behind the bell is of the old version: it parks the job, and the next take has to come at once."""
    worker.version = 1
    async with asyncio.timeout(AT_ONCE_S):
        await broker.enqueue([job("a", min_version=1)])
        await ends(look, "a")
    assert "parked for policy version 1" in look.reply("a")["events"]


async def test_a_job_that_was_handed_back_does_not_wait_with_who_waits(
    broker: Broker, look: Look, worker: Worker, pool: str
) -> None:
    """The take behind the bell is not given it; the next take is, and has to come at once."""
    own_gate = (broker.keys.desired, f"gate@{NAME}")
    async with asyncio.timeout(AT_ONCE_S):
        look("HSET", *own_gate, "closed")
        await broker.enqueue([job("a")])
        taken = await broker.take("other", "n", 1, lease_ms=60_000, policy_version=0)
        look("HDEL", *own_gate)
        await until_blocked(look, f"{NAME}-{pool}")
        await broker.release([Hold("a", lease.fence) for lease in taken.leases])
        await ends(look, "a")
    assert look.reply("a")["handbacks"] == "1"
