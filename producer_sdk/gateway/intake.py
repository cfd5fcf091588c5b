"""A request as it arrives: its head judged, its body read, both within limits; and how much is held of all of them."""

import asyncio
from collections.abc import Mapping

from starlette.requests import Request as Incoming
from starlette.types import Scope

from producer_sdk.gateway.metrics import Metrics
from producer_sdk.gateway.settings import Settings
from protocols.errors import BodyTooLarge, HeadTooLarge, QueueFull, RequestTooSlow
from protocols.job import MAX_BODY_BYTES

PATH_BYTES = 4096
HEAD_BYTES = 32 * 1024


class CallerGone(Exception):
    """Whoever asked has hung up."""


def headers_of(scope: Scope) -> Mapping[str, str]:
    """The headers, names in small letters; of several of one name the last. Raises HeadTooLarge."""
    raw: list[tuple[bytes, bytes]] = scope["headers"]
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > PATH_BYTES:
        raise HeadTooLarge(f"the path: at most {PATH_BYTES} bytes, with what follows its `?`")
    if sum(len(name) + len(value) for name, value in raw) > HEAD_BYTES:
        raise HeadTooLarge(f"the headers: at most {HEAD_BYTES} bytes together")
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}


class Intake:
    """What one gateway takes in."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics

    def check_room(self, body_bytes: int = 0) -> None:
        """Raise QueueFull where this gateway would hold more than it may."""
        full = self._metrics.open_requests > self._settings.most_requests
        held_bytes = self._metrics.open_body_bytes + body_bytes
        if full or held_bytes > self._settings.most_body_mb * 1_000_000:
            raise QueueFull(
                "this gateway has as many requests open as it may; ask again, or start another",
                retry_after_s=1,
            )

    async def read(self, incoming: Incoming) -> bytes:
        """The body, held from its first byte on until `let_go`.

        Raises BodyTooLarge or QueueFull while it is coming, RequestTooSlow, or CallerGone.
        """
        told = incoming.headers.get("content-length", "")
        if told.isdigit() and int(told) > MAX_BODY_BYTES:
            raise _too_large()
        limit_s = self._settings.arrival_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._parts(incoming)
        except TimeoutError:
            raise RequestTooSlow(
                f"the body has not arrived within {limit_s:g} s", retry_after_s=1
            ) from None

    def let_go(self, scope: Scope) -> None:
        """The request has ended: nothing of its body is held any more."""
        self._metrics.open_body_bytes -= scope.get("state", {}).pop("held_bytes", 0)

    async def _parts(self, incoming: Incoming) -> bytes:
        parts: list[bytes] = []
        while True:
            message = await incoming.receive()
            if message["type"] == "http.disconnect":
                raise CallerGone
            parts.append(message.get("body", b""))
            self._hold(incoming.scope["state"], len(parts[-1]))
            if not message.get("more_body", False):
                return b"".join(parts)

    def _hold(self, state: dict[str, int], more_bytes: int) -> None:
        self.check_room(more_bytes)
        state["held_bytes"] = state.get("held_bytes", 0) + more_bytes
        self._metrics.open_body_bytes += more_bytes
        if state["held_bytes"] > MAX_BODY_BYTES:
            raise _too_large()


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"`body`: at most {MAX_BODY_BYTES} bytes", param="body")
