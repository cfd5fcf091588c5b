"""Fixtures for tests of the queue: a broker on an open pool, a look past it, workers and a client."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import pytest

from producer_sdk import Client
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from protocols.queue.rows import Lease
from tests.pool_look import Look, wait_until
from tests.worker_process import StartWorker, WorkerProcess


@pytest.fixture
async def broker(url: str, pool: str) -> AsyncIterator[Broker]:
    """The steps of a pool that is prepared and open."""
    link = Link(url, name="test", outage_s=20)
    made = Broker(link, pool)
    await made.open()
    yield made
    await link.close()


class Take(Protocol):
    """What the fixture `take` is."""

    async def __call__(
        self, slots: int = 1, *, worker: str = "w", lease_ms: int = 60_000, version: int = 0
    ) -> list[Lease]:
        """Take with a nonce of its own; the leases."""
        ...


@pytest.fixture
def take(broker: Broker) -> Take:
    """Take jobs as a worker would."""
    count = itertools.count()

    async def taken(
        slots: int = 1, *, worker: str = "w", lease_ms: int = 60_000, version: int = 0
    ) -> list[Lease]:
        nonce = f"test.{next(count)}"
        answer = await broker.take(worker, nonce, slots, lease_ms=lease_ms, policy_version=version)
        return answer.leases

    return taken


@pytest.fixture
def look(url: str, pool: str) -> Iterator[Look]:
    """Raw commands on the server of `url`."""
    made = Look(url, pool)
    yield made
    made.close()


@pytest.fixture
def nothing_left(look: Look) -> Callable[[], None]:
    """Assert that no job is left in streams, pending lists, leases, delays and deadlines.

    It waits a little: a job's client has the reply before the next sweep has tidied up.
    """

    def check() -> None:
        wait_until(lambda: not look.left(), "nothing is left")

    return check


class Serve(Protocol):
    """What the fixture `serve` is; flags are the worker's."""

    def __call__(self, **flags: float) -> WorkerProcess:
        """Start a worker of the test's pool and wait until it serves."""
        ...


@pytest.fixture
def serve(start_worker: StartWorker, broker: Broker, url: str, pool: str) -> Serve:
    """Start scripted workers on an open pool."""

    def start(**flags: float) -> WorkerProcess:
        worker = start_worker(url, pool, engine="scripted", **flags)
        worker.wait_ready()
        return worker

    return start


@pytest.fixture
def client(url: str, pool: str) -> Iterator[Client]:
    """A client of the test's pool."""
    with Client(url, pool=pool, run="test") as made:
        yield made


__all__ = ["broker", "client", "look", "nothing_left", "serve", "take"]
