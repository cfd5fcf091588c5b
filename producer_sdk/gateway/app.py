"""The gateway as an application: which path leads where, who may go there, what every request meets."""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from starlette.requests import Request as Incoming
from starlette.responses import Response as Outgoing
from starlette.types import Message, Receive, Scope, Send

from producer_sdk.client import Client
from producer_sdk.exchange.response import of_error
from producer_sdk.exchange.route import MODELS, PROTOCOLS, allow, is_models, shape_of, unknown
from producer_sdk.gateway.intake import CallerGone, Intake, headers_of
from producer_sdk.gateway.jobs import Jobs
from producer_sdk.gateway.keys import Keyring, Role
from producer_sdk.gateway.look import Look
from producer_sdk.gateway.metrics import GONE, Metrics
from producer_sdk.gateway.orders import VERBS, Orders
from producer_sdk.gateway.patience import Leaving
from producer_sdk.gateway.settings import Settings
from protocols.errors import RolloutError

Endpoint = Callable[[Incoming], Awaitable[Outgoing]]
OTHER = "other"

log = logging.getLogger("rolloutq.gateway")


class Way(NamedTuple):
    """Where a path leads."""

    method: str
    role: Role
    endpoint: Endpoint


class Gateway:
    """An ASGI application."""

    def __init__(
        self, client: Client, control: Client, settings: Settings, leaving: Leaving, address: str
    ) -> None:
        """`control` commands the workers; `address` is where this gateway listens."""
        self._keyring = Keyring(settings)
        self._metrics = Metrics()
        self._intake = Intake(settings, self._metrics)
        jobs = Jobs(client, settings, self._intake, leaving)
        look = Look(client, self._metrics, leaving, address)
        self._models = Way("GET", Role.INFERENCE, jobs)
        self._ways: dict[str, Way] = {
            **dict.fromkeys(PROTOCOLS, Way("POST", Role.INFERENCE, jobs)),
            **{
                f"/{verb}": Way("POST", Role.ADMIN, Orders(control, self._intake)) for verb in VERBS
            },
            MODELS: self._models,
            "/healthz": Way("GET", Role.NOBODY, look.healthz),
            "/readyz": Way("GET", Role.NOBODY, look.readyz),
            "/metadata": Way("GET", Role.INFERENCE, look.metadata),
            "/metrics": Way("GET", Role.INFERENCE, look.metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, from its head to the last byte of its answer."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        began_s, sent = time.monotonic(), _Sent(send)
        metrics = self._metrics
        metrics.open_requests += 1
        try:
            outgoing = await self._answer(scope, receive)
            await outgoing(scope, receive, sent)
        except CallerGone:
            sent.status = GONE
            if not sent.started:
                await Outgoing(status_code=GONE)(scope, receive, send)
        finally:
            metrics.open_requests -= 1
            self._intake.let_go(scope)
            metrics.answered(self._label(scope["path"]), sent.status, time.monotonic() - began_s)

    async def _answer(self, scope: Scope, receive: Receive) -> Outgoing:
        path: str = scope["path"]
        claude = any(name == b"anthropic-version" for name, _ in scope["headers"])
        request_id = f"req-{secrets.token_hex(8)}"
        try:
            return await self._through(path, scope, receive)
        except RolloutError as error:
            found = of_error(error, shape_of(path, claude=claude), request_id)
        except CallerGone:
            raise
        except Exception:  # a fault of ours: who asked hears that, and no more
            log.exception("request %s failed", request_id)
            fault = RolloutError(
                "the gateway failed to answer; its log has more under this request's id"
            )
            found = of_error(fault, shape_of(path, claude=claude), request_id)
        return Outgoing(found.body, found.status, found.headers)

    async def _through(self, path: str, scope: Scope, receive: Receive) -> Outgoing:
        headers = headers_of(scope)
        way = self._models if is_models(path) else self._ways.get(path)
        needed = way.role if way else Role.INFERENCE  # a stranger learns nothing of the paths
        scope.setdefault("state", {}).update(
            headers=headers, caller=self._keyring.check(headers, needed)
        )
        if way is None:
            raise unknown(path)
        allow(scope["method"], way.method, path)
        if needed is not Role.NOBODY:
            self._intake.check_room()
        return await way.endpoint(Incoming(scope, receive))

    def _label(self, path: str) -> str:
        return MODELS if is_models(path) else path if path in self._ways else OTHER


class _Sent:
    """Passes on what is sent, and remembers the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.started = 500, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
        await self._send(message)
