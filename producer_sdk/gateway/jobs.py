"""The routes whose requests are jobs, and the list of models: as over the transport, with a caller who may hang up."""

import asyncio
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import Request as Incoming
from starlette.responses import Response as Outgoing
from starlette.types import Message, Receive, Scope, Send

from producer_sdk.client import Client
from producer_sdk.exchange.call import Call, begin
from producer_sdk.exchange.frames import answered
from producer_sdk.exchange.request import LONGEST_S, Request, seconds
from producer_sdk.exchange.response import Response, of_frames
from producer_sdk.gateway.intake import CallerGone, Intake
from producer_sdk.gateway.patience import Leaving, Patience
from producer_sdk.gateway.settings import Settings
from protocols.errors import ServerUnavailable

MARGIN_S, MARGIN_SHARE = 1.0, 0.1
"""How much earlier than its caller a job gives up, so that the answer is heard: the smaller of the two."""
KEEP_ALIVE_S = 15.0
STUCK_S = 5.0
"""How long after its limit a request may still be open: then whoever asked does not read the answer."""
READ_TIMEOUT = "x-stainless-read-timeout"
"""In which the official clients say how long they wait."""


class Jobs:
    """The endpoint of all these routes."""

    def __init__(
        self, client: Client, settings: Settings, intake: Intake, leaving: Leaving
    ) -> None:
        self._client, self._settings = client, settings
        self._intake, self._leaving = intake, leaving

    async def __call__(self, incoming: Incoming) -> Outgoing:
        """The answer, still to be waited for; raises RolloutError where the request is not taken."""
        headers: Mapping[str, str] = incoming.state.headers
        request = Request(
            method=incoming.method,
            path=incoming.scope["path"],
            headers=headers,
            body=await self._intake.read(incoming),
            timeout_s=self._timeout_s(headers),
            caller=incoming.state.caller,
        )
        begun = begin(self._client, request)
        return outgoing_of(begun) if isinstance(begun, Response) else Answer(begun, self._leaving)

    def _timeout_s(self, headers: Mapping[str, str]) -> float:
        if READ_TIMEOUT not in headers:
            return self._settings.timeout_s
        told_s = seconds(READ_TIMEOUT, headers[READ_TIMEOUT])
        return told_s - min(MARGIN_S, MARGIN_SHARE * told_s)


class Answer(Outgoing):
    """What is sent when it has come, whole or as frames; whoever hangs up before its end cancels the job."""

    def __init__(self, call: Call, leaving: Leaving) -> None:
        self._call, self._leaving = call, leaving
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait, and send; raises CallerGone where nobody hears it, or reads it."""
        patience = Patience()
        limit_s = (self._call.limit_s or LONGEST_S) + STUCK_S
        try:
            async with self._leaving.wait(patience, receive, limit_s):
                await self._answer(scope, receive, send)
        except TimeoutError:
            self._call.give_up()
            if patience.gone or not patience.leaving:
                raise CallerGone from None
            await self._last_words(scope, receive, send)
        except asyncio.CancelledError:
            self._call.give_up()
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await answered(self._call)
        self._begun = True
        if isinstance(answer, Response):
            await outgoing_of(answer)(scope, receive, send)
            return
        headers = Headers(of_frames(self._call.request_id)).raw
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        keeper = asyncio.create_task(_keep_alive(send))
        try:
            async for frame in answer:
                await send(_part(frame))
        finally:
            keeper.cancel()
        await send(_part(b"", more=False))

    async def _last_words(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is said where the gateway has to go: the job is cancelled, and may be asked again."""
        if not self._begun:
            said = self._call.failed(_leaving(), again=True)
            await outgoing_of(said)(scope, receive, send)
        elif self._call.stream is not None:
            await send(_part(self._call.last_frame(_leaving()), more=False))


def outgoing_of(answer: Response) -> Outgoing:
    """As starlette sends it."""
    return Outgoing(answer.body, answer.status, answer.headers)


async def _keep_alive(send: Send) -> None:
    """What stands between may close a connection that is silent; clients read over comments."""
    while True:
        await asyncio.sleep(KEEP_ALIVE_S)
        await send(_part(b": keep-alive\n\n"))


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _leaving() -> ServerUnavailable:
    return ServerUnavailable("this gateway is shutting down; ask again", retry_after_s=1)
