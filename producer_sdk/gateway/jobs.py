"""The routes whose requests are jobs, and the list of models: as over the transport, with a caller who may hang up."""

import asyncio
from collections.abc import Mapping

from starlette.requests import Request as Incoming
from starlette.responses import Response as Outgoing

from producer_sdk.client import Client
from producer_sdk.exchange.call import Call, begin
from producer_sdk.exchange.request import Request, seconds
from producer_sdk.exchange.response import Response
from producer_sdk.gateway.intake import CallerGone, check_room, read_body
from producer_sdk.gateway.metrics import Metrics
from producer_sdk.gateway.patience import Leaving, Patience
from producer_sdk.gateway.settings import Settings
from protocols.errors import RolloutError, ServerUnavailable

MARGIN_S, MARGIN_SHARE = 1.0, 0.1
"""How much earlier than its caller a job gives up, so that the answer is heard: the smaller of the two."""
READ_TIMEOUT = "x-stainless-read-timeout"
"""In which the official clients say how long they wait."""


class Jobs:
    """The endpoint of all these routes."""

    def __init__(
        self, client: Client, settings: Settings, metrics: Metrics, leaving: Leaving
    ) -> None:
        self._client, self._settings = client, settings
        self._metrics, self._leaving = metrics, leaving

    async def __call__(self, incoming: Incoming) -> Outgoing:
        """The answer; raises RolloutError where the request did not get as far as the queue."""
        headers: Mapping[str, str] = incoming.state.headers
        body = await read_body(incoming.receive, headers, self._settings)
        check_room(self._metrics, self._settings, len(body))
        self._metrics.open_body_bytes += len(body)
        try:
            request = Request(
                method=incoming.method,
                path=incoming.url.path,
                headers=headers,
                body=body,
                timeout_s=self._timeout_s(headers),
                caller=incoming.state.caller,
            )
            begun = begin(self._client, request)
            whole = begun if isinstance(begun, Response) else await self._whole(begun, incoming)
        finally:
            self._metrics.open_body_bytes -= len(body)
        return Outgoing(whole.body, whole.status, whole.headers)

    async def _whole(self, call: Call, incoming: Incoming) -> Response:
        patience = Patience()
        try:
            async with self._leaving.wait(patience, incoming.receive, call.limit_s):
                value = await call.pending
            return call.answer(value)
        except RolloutError as error:
            return call.failed(error)
        except TimeoutError:
            if patience.gone:
                call.give_up()
                raise CallerGone from None
            if patience.leaving:
                call.give_up()
                return call.failed(leaving_now(), again=True)
            return call.late()
        except asyncio.CancelledError:
            call.give_up()
            raise

    def _timeout_s(self, headers: Mapping[str, str]) -> float:
        if READ_TIMEOUT not in headers:
            return self._settings.timeout_s
        told_s = seconds(READ_TIMEOUT, headers[READ_TIMEOUT])
        return told_s - min(MARGIN_S, MARGIN_SHARE * told_s)


def leaving_now() -> ServerUnavailable:
    """What a request hears that is open when the gateway has to go."""
    return ServerUnavailable("this gateway is shutting down; ask again", retry_after_s=1)
