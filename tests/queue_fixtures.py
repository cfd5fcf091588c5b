"""Fixtures for tests of the queue: a broker on an open pool, a look past it, workers and a client."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import pytest

from producer_sdk import Client
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from protocols.queue.rows import Lease
from tests.http_door import GatewayProcess
from tests.pool_look import Look, wait_until
from tests.servers import Server, ServerKind
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
        worker = start_worker(url, pool, engine="scripted", module="worker", **flags)
        worker.wait_ready()
        return worker

    return start


@pytest.fixture(scope="session")
def standing_pools(
    shared_servers: Callable[[ServerKind], Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[ServerKind], str]]:
    """A pool with one worker on each kind of server, for the whole run, started when first asked for."""
    workers: dict[ServerKind, WorkerProcess] = {}

    def standing(kind: ServerKind) -> str:
        if kind not in workers:
            url, pool = shared_servers(kind).url, f"standing-{uuid.uuid4().hex[:8]}"
            asyncio.run(open_pool(url, pool))
            log = tmp_path_factory.mktemp("standing") / f"{kind}.log"
            flags = {"engine": "scripted", "slots": "64", "lease-s": "3", "backoff-s": "0"}
            workers[kind] = WorkerProcess(url, pool, f"standing-{kind}", flags, log)
            workers[kind].wait_ready()
        assert workers[kind].running, workers[kind].log_tail()
        return workers[kind].pool

    yield standing
    for worker in workers.values():
        worker.kill()


@pytest.fixture
def standing(standing_pools: Callable[[ServerKind], str], server_kind: ServerKind) -> str:
    """The pool of a worker that other tests use too, with 64 slots, a lease of 3 s and no backoff: never stop it.

    A module whose tests need no more than that says that this is their `pool`.
    """
    return standing_pools(server_kind)


@pytest.fixture(scope="session")
def standing_gateways(
    shared_servers: Callable[[ServerKind], Server],
    standing_pools: Callable[[ServerKind], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[ServerKind], str]]:
    """A gateway of each standing pool, for the whole run, started when first asked for; its URL."""
    gateways: dict[ServerKind, GatewayProcess] = {}

    def standing(kind: ServerKind) -> str:
        if kind not in gateways:
            folder = tmp_path_factory.mktemp("gateway")
            url, pool = shared_servers(kind).url, standing_pools(kind)
            gateways[kind] = GatewayProcess(folder, url, pool)
            gateways[kind].wait_ready()
        return gateways[kind].url

    yield standing
    for gateway in gateways.values():
        gateway.kill()


async def open_pool(url: str, pool: str) -> None:
    """Prepare a pool and let jobs flow."""
    link = Link(url, name="opener")
    await Broker(link, pool).open()
    await link.close()


@pytest.fixture
def client(url: str, pool: str) -> Iterator[Client]:
    """A client of the test's pool."""
    with Client(url, pool=pool, run="test") as made:
        yield made


__all__ = [
    "broker",
    "client",
    "look",
    "nothing_left",
    "serve",
    "standing",
    "standing_gateways",
    "standing_pools",
    "take",
]
