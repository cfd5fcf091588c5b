"""A server that speaks lmdeploy 0.18's wire over real sockets, and fails where a test tells it to.

The token at position `p` of prompt and response together is `token_at(p)`, so a continued sample must go on as if it
had never been cut. It draws no log-probability: that of token `t` is `-t / 1000`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

VOCABULARY, END = 320, 0


def token_at(position: int) -> int:
    return 1 + position % 300


def logprob_of(token_id: int) -> float:
    return -token_id / 1000


class Faults:
    """What the next requests meet, at the token of their own that is named."""

    def __init__(self) -> None:
        self.statuses: list[tuple[int, str]] = []
        """Answers of the next requests, instead of tokens."""
        self.stall_at: int | None = None
        self.cut_at: int | None = None
        self.error_at: int | None = None
        self.event_at: tuple[int, str] | None = None
        """A text instead of the event."""
        self.finish_at: tuple[int, str] | None = None


class LmdeployWire:
    """See the module."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.models = ["/models/tiny-llama"]
        self.keys: list[str] = []
        self.context_tokens = 256
        self.ends_at: int | None = None
        """The position where the model ends its answer."""
        self.text = ""
        """Of every token."""
        self.pace_s = 0.001
        self.healthy = True
        self.asleep = False
        self.sleeps = True
        """Whether it obeys /sleep and /wakeup."""
        self.can_abort = True
        self.abort_pause_s = 0.0
        """Between the end of an aborted stream and the answer to the abort."""
        self.logprobs = True
        self.bodies: list[dict[str, Any]] = []
        """Of the requests to /generate, probes of a starting engine included."""
        self.calls: list[str] = []
        """Every request but the looks at /health."""
        self.aborted: list[int] = []
        self.closed: list[int] = []
        """Sessions whose connection was closed before their end."""
        self._running: dict[int, asyncio.Event] = {}
        self._server: asyncio.Server | None = None
        self.port = 0
        self._links: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._running)

    async def start(self) -> None:
        """Listen, on the port that it had before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut all connections and listen no more."""
        assert self._server is not None
        self._server.close()
        for link in list(self._links):
            link.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        try:
            while await self._one_request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._links.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(" ", 2)
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = target.split("?")[0]
        if path != "/health":
            self.calls.append(f"{method} {target}")
        key = headers.get("authorization", "").removeprefix("bearer ")
        if path != "/health" and self.keys and key not in self.keys:
            return await _say(writer, 401, {"message": "Unauthorized.", "code": 401})
        if path == "/generate":
            return await self._generate(json.loads(body), reader, writer)
        return await self._manage(method, target, body, writer)

    async def _manage(
        self, method: str, target: str, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        match method, target.split("?")[0]:
            case "GET", "/health":
                return await _say(writer, 200 if self.healthy else 503, {"status": "healthy"})
            case "GET", "/v1/models":
                return await _say(writer, 200, {"data": [{"id": name} for name in self.models]})
            case "GET", "/is_sleeping":
                return await _say(writer, 200, {"is_sleeping": self.asleep})
            case "POST", "/sleep" | "/wakeup" as path:
                self.asleep = (path == "/sleep") if self.sleeps else self.asleep
                return await _say(writer, 200, None)
            case "POST", "/abort_request":
                return await self._abort(json.loads(body)["session_id"], writer)
            case _:
                return await _say(writer, 404, {"message": "Not Found", "code": 404})

    async def _abort(self, session_id: int, writer: asyncio.StreamWriter) -> bool:
        if not self.can_abort:
            return await _say(writer, 501, "This server does not support abort requests.")
        if session_id not in self._running:
            return await _say(writer, 400, {"message": f"Session {session_id} not found."})
        self.aborted.append(session_id)
        self._running[session_id].set()
        await asyncio.sleep(self.abort_pause_s)
        return await _say(writer, 200, None)

    def _refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        prompt = len(body["input_ids"])
        if self.faults.statuses:
            return self.faults.statuses.pop(0)
        if self.asleep:
            return 503, "Engine is sleeping; call POST /wakeup before inference"
        if not self.logprobs:
            return (
                400,
                "return_logprob(True) requested but not enabled logprobs_mode in engine configuration.",
            )
        if prompt >= self.context_tokens:
            return (
                400,
                f"Input length ({prompt}) must be smaller than the model context length ({self.context_tokens}).",
            )
        return None

    async def _generate(
        self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        self.bodies.append(body)
        refusal = self._refusal(body)
        if refusal is not None:
            status, message = refusal
            return await _say(writer, status, {"message": message, "code": status})
        session_id = body["session_id"]
        aborted = self._running[session_id] = asyncio.Event()
        gone = asyncio.create_task(reader.read(1))  # a client that waits for tokens sends nothing
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        )
        try:
            async for event in self._events(body, aborted, gone):
                writer.write(f"data: {event}\n\n".encode())
                await writer.drain()
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
        except (ConnectionError, _Cut):
            pass
        finally:
            if gone.done() and not aborted.is_set():
                self.closed.append(session_id)
            gone.cancel()
            del self._running[session_id]
        return False

    async def _events(
        self, body: dict[str, Any], aborted: asyncio.Event, gone: "asyncio.Task[bytes]"
    ) -> AsyncGenerator[str]:
        prompt, wide, faults = len(body["input_ids"]), body["top_logprobs_num"], self.faults
        for drawn in range(body["max_tokens"]):
            position = prompt + drawn
            if faults.event_at is not None and faults.event_at[0] == drawn:
                yield faults.event_at[1]
                return
            if faults.cut_at == drawn:
                raise _Cut
            if faults.error_at == drawn:
                yield json.dumps(
                    {"error": {"message": "An internal server error occurred.", "code": 500}}
                )
                return
            if faults.finish_at is not None and faults.finish_at[0] == drawn:
                yield _event([], wide, faults.finish_at[1])
                return
            if position == self.ends_at:
                yield _event([END], wide, "stop")
                return
            stalled = faults.stall_at == drawn
            await _first(aborted, gone, None if stalled else self.pace_s)
            if gone.done():
                raise _Cut
            if aborted.is_set():
                yield _event([], wide, "abort")
                return
            yield _event([token_at(position)], wide, None, self.text)
        yield _event([], wide, "length")


class _Cut(Exception):
    pass


async def _first(
    aborted: asyncio.Event, gone: "asyncio.Task[bytes]", limit_s: float | None
) -> None:
    waiting = asyncio.create_task(aborted.wait())
    await asyncio.wait([waiting, gone], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _event(ids: list[int], wide: int, reason: str | None, text: str = "") -> str:
    meta = {
        "finish_reason": {"type": reason} if reason else None,
        "output_token_logprobs": [[logprob_of(i), i] for i in ids] or None,
        "output_top_logprobs": [[[logprob_of(i) - k, i + k] for k in range(wide)] for i in ids]
        if wide and ids
        else None,
    }
    # as lmdeploy: what is not ASCII comes as it is
    return json.dumps({"text": text, "output_ids": ids, "meta_info": meta}, ensure_ascii=False)


async def _say(writer: asyncio.StreamWriter, status: int, body: object) -> bool:
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return True


@asynccontextmanager
async def lmdeploy_wire() -> AsyncGenerator[LmdeployWire]:
    """A running one."""
    server = LmdeployWire()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
