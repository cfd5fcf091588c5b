"""`httpx2` transports that make jobs of requests: official clients talk over Redis, with no port open."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import suppress

import anyio
import httpx2

from producer_sdk.client import Client
from producer_sdk.exchange.call import Call, begin
from producer_sdk.exchange.frames import BlockingFrames, Frames, answered, answered_blocking
from producer_sdk.exchange.request import Request
from producer_sdk.exchange.response import Response, of_frames
from protocols.errors import RolloutError

GIVE_UP_S = 5.0
"""How long an order to cancel is waited for; it is on its way all the same."""
_HTTP = b"HTTP/2"
"""With HTTP/1.1, OpenAI's client would wait for the end of a stream that has said `[DONE]`."""


class Transport(httpx2.BaseTransport):
    """For `httpx2.Client`. Closing it leaves the client of the queue open."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Submit, wait, answer; every error of the queue is an answer too."""
        request.read()
        begun = begin(self._client, _told(request))
        if isinstance(begun, Response):
            return _whole(begun)
        try:
            answer = answered_blocking(begun)
        except BaseException:  # Ctrl-C while waiting: nobody wants the answer
            begun.give_up()
            raise
        if isinstance(answer, Response):
            return _whole(answer)
        return _response(200, of_frames(begun.request_id), stream=_Body(answer))


class AsyncTransport(httpx2.AsyncBaseTransport):
    """For `httpx2.AsyncClient`, in asyncio's loop. Closing it leaves the client of the queue open."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """As `Transport.handle_request`; cancelling the wait cancels the job."""
        await request.aread()
        begun = begin(self._client, _told(request))
        if isinstance(begun, Response):
            return _whole(begun)
        try:
            answer = await answered(begun)
        except asyncio.CancelledError:
            await _given_up(begun)
            raise
        if isinstance(answer, Response):
            return _whole(answer)
        return _response(200, of_frames(begun.request_id), stream=_AsyncBody(answer))


class _Body(httpx2.SyncByteStream):
    """Frames; closing them early cancels the job."""

    def __init__(self, frames: BlockingFrames) -> None:
        self._frames = frames

    def __iter__(self) -> Generator[bytes]:
        yield from self._frames

    def close(self) -> None:
        if not self._frames.finished:
            self._frames.finished = True
            order = self._frames.call.give_up()
            if order is not None:
                with suppress(
                    RolloutError
                ):  # no server, or a slow one: the job ends by its deadline
                    order.result(GIVE_UP_S)


class _AsyncBody(httpx2.AsyncByteStream):
    """Frames; closing them early cancels the job."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        async for frame in self._frames:
            yield frame

    async def aclose(self) -> None:
        if not self._frames.finished:
            self._frames.finished = True
            await _given_up(self._frames.call)


async def _given_up(call: Call) -> None:
    """Wait until the order to cancel has arrived, in whichever cancelled scope."""
    order = call.give_up()
    if order is not None:
        with (
            suppress(RolloutError),  # no server: the job ends by its deadline
            anyio.CancelScope(shield=True),
            anyio.move_on_after(GIVE_UP_S),
        ):
            await order


def _told(request: httpx2.Request) -> Request:
    timeout = request.extensions.get("timeout", {})
    return Request(
        method=request.method,
        path=request.url.path,
        headers={name.lower(): value for name, value in request.headers.items()},
        body=request.content,
        timeout_s=timeout.get("read"),
    )


def _whole(answer: Response) -> httpx2.Response:
    return _response(answer.status, answer.headers, content=answer.body)


def _response(
    status: int,
    headers: Mapping[str, str],
    *,
    content: bytes | None = None,
    stream: _Body | _AsyncBody | None = None,
) -> httpx2.Response:
    return httpx2.Response(
        status,
        headers=dict(headers),
        content=content,
        stream=stream,
        extensions={"http_version": _HTTP},
    )
