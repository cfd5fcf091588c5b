"""A whole client and fleet in this process, for unit tests of what is built on the SDK.

    from worker.testing import fleet

    def test_my_trainer():
        with fleet() as client:
            reply = client.submit({"messages": [{"role": "user", "content": "hi"}]}).result(10)
            assert reply.response["choices"][0]["message"]["content"] == "hi"

The server is fakeredis and the engine the scripted one, which echoes the last user text or obeys
`rollout.script`. Everything between them is the real thing. Needs the package `fakeredis[lua]`.
"""

import asyncio
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from fakeredis import FakeServer
from fakeredis.aioredis import FakeAsyncRedisConnection
from redis.exceptions import RedisError

from producer_sdk import Client
from protocols.control import default_desired
from protocols.queue.broker import Broker
from protocols.queue.link import Link, in_memory
from protocols.queue.wire import Command, passed
from worker.config import Config
from worker.service import Service

END_S = 10.0


@contextmanager
def fleet(*, workers: int = 1, slots: int = 64, pool: str = "default") -> Generator[Client]:
    """A client whose jobs are done by `workers` workers of `slots` slots each; all end with the block."""
    with ExitStack() as stack:
        url = stack.enter_context(_server())
        asyncio.run(_prepare(url, pool))
        for number in range(workers):
            config = Config(
                url=url,
                pool=pool,
                engine="scripted",
                worker_id=f"test-{number}",
                slots=slots,
                grace_s=0,
            )
            stack.enter_context(_worker(config))
        yield stack.enter_context(Client(url, pool=pool))


def _server() -> AbstractContextManager[str]:
    server = FakeServer(server_type="redis", version=(7, 2))
    return in_memory(lambda: MemoryWire(server))


class MemoryWire:
    """A connection to a server in memory."""

    def __init__(self, server: FakeServer) -> None:
        self._connection = FakeAsyncRedisConnection(server=server, protocol=2)
        self._turn = asyncio.Lock()

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As in Wire."""
        async with self._turn:
            await self._connection.connect()
            packed = self._connection.pack_commands(commands)
            await self._connection.send_packed_command(packed, check_health=False)
            return [await self.receive() for _ in commands]

    async def receive(self) -> Any:  # noqa: ANN401 - as sent
        """As in Wire."""
        try:
            return await self._connection.read_response()
        except RedisError as error:
            return passed(error)

    def abort(self) -> None:
        """As in Wire."""

    async def close(self) -> None:
        """As in Wire."""
        await self._connection.disconnect()


async def _prepare(url: str, pool: str) -> None:
    link = Link(url, name="testing")
    broker = Broker(link, pool)
    await broker.prepare()
    await broker.beat("testing", {}, ttl_ms=1000, desired=default_desired())
    await broker.leave("testing")
    await link.close()


@contextmanager
def _worker(config: Config) -> Generator[None]:
    loop = asyncio.new_event_loop()
    service = Service(config)
    thread = threading.Thread(target=lambda: loop.run_until_complete(service.run()), daemon=True)
    thread.start()
    give_up_at = time.monotonic() + END_S
    while service.state != "serving" and time.monotonic() < give_up_at:
        time.sleep(0.005)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(service.stop)
        thread.join(END_S)
        loop.close()
