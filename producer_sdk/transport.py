"""`httpx2` transports that make jobs of requests: official clients talk over Redis, with no port open."""

import asyncio

import anyio
import httpx2

from producer_sdk.client import Client
from producer_sdk.exchange.call import Call, begin
from producer_sdk.exchange.request import Request
from producer_sdk.exchange.response import Response
from protocols.errors import ResultTimeout, RolloutError

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
        return _whole(begun if isinstance(begun, Response) else _waited(begun), request)


def _waited(call: Call) -> Response:
    try:
        return call.answer(call.pending.result(call.limit_s))
    except ResultTimeout:
        return call.late()
    except RolloutError as error:
        return call.failed(error)
    except BaseException:  # Ctrl-C while waiting: nobody wants the answer
        call.give_up()
        raise


class AsyncTransport(httpx2.AsyncBaseTransport):
    """For `httpx2.AsyncClient`, in asyncio's loop. Closing it leaves the client of the queue open."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """As `Transport.handle_request`; cancelling the wait cancels the job."""
        await request.aread()
        begun = begin(self._client, _told(request))
        answer = begun if isinstance(begun, Response) else await _awaited(begun)
        return _whole(answer, request)


async def _awaited(call: Call) -> Response:
    try:
        async with asyncio.timeout(call.limit_s):
            value = await call.pending
        return call.answer(value)
    except TimeoutError as error:
        return call.failed(error) if isinstance(error, RolloutError) else call.late()
    except RolloutError as error:
        return call.failed(error)
    except asyncio.CancelledError:
        await _given_up(call)
        raise


async def _given_up(call: Call) -> None:
    """Wait until the order to cancel has arrived, in whichever cancelled scope."""
    order = call.give_up()
    if order is not None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(GIVE_UP_S):
            try:
                await order
            except RolloutError:
                return  # no server: the job ends by its deadline


def _told(request: httpx2.Request) -> Request:
    timeout = request.extensions.get("timeout", {})
    return Request(
        method=request.method,
        path=request.url.path,
        headers={name.lower(): value for name, value in request.headers.items()},
        body=request.content,
        timeout_s=timeout.get("read"),
    )


def _whole(answer: Response, request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(
        answer.status,
        headers=dict(answer.headers),
        content=answer.body,
        request=request,
        extensions={"http_version": _HTTP},
    )
