"""A server that answers as it is told to, and a link to it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from protocols.queue.link import Link

LIMIT_S = 20
HANG_UP, SILENCE = b"hang up", b"silence"
OK = b"+OK\r\n"


class FakeServer:
    """Answers the requests that come, in order, whatever they are; then `+OK` for ever."""

    def __init__(self, *steps: bytes) -> None:
        self.steps = list(steps)
        self.requests: list[str] = []
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._asked = asyncio.Event()
        self._stopped = asyncio.Event()
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        self._stopped.clear()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._stopped.set()
            for writer in self._open.values():
                writer.transport.abort()
            if self._open:
                await asyncio.wait(self._open)
            self._server = None

    async def asked(self) -> None:
        """Wait for the next request."""
        self._asked.clear()
        await self._asked.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            while await self._answer(await _words(reader), writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            del self._open[task]
            writer.transport.abort()

    async def _answer(self, words: list[str], writer: asyncio.StreamWriter) -> bool:
        step = OK
        if words[0] not in ("CLIENT", "AUTH"):  # names itself first
            self.requests.append(words[0])
            self._asked.set()
            step = self.steps.pop(0) if self.steps else OK
        if step == SILENCE:
            await self._stopped.wait()
        elif step != HANG_UP:
            writer.write(step)
        return step != HANG_UP


async def _words(reader: asyncio.StreamReader) -> list[str]:
    count = int((await reader.readuntil(b"\r\n"))[1:])
    words: list[str] = []
    for _ in range(count):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(size + 2))[:-2].decode())
    return words


@asynccontextmanager
async def linked(
    *steps: bytes, outage_s: float = 10.0
) -> AsyncGenerator[tuple[FakeServer, Link], Any]:
    server = FakeServer(*steps)
    await server.start()
    link = Link(f"redis://127.0.0.1:{server.port}/0", name="test", outage_s=outage_s)
    try:
        async with asyncio.timeout(LIMIT_S):
            yield server, link
    finally:
        await link.close()
        await server.stop()
