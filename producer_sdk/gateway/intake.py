"""A request as it arrives: its head judged, its body read, both within limits."""

import asyncio
from collections.abc import Mapping

from starlette.types import Receive, Scope

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


async def read_body(receive: Receive, headers: Mapping[str, str], settings: Settings) -> bytes:
    """The body; raises BodyTooLarge while it is coming, RequestTooSlow, or CallerGone."""
    told = headers.get("content-length", "")
    if told.isdigit() and int(told) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(settings.body_s):
            return await _parts(receive)
    except TimeoutError:
        raise RequestTooSlow(
            f"the body has not arrived within {settings.body_s:g} s", retry_after_s=1
        ) from None


async def _parts(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerGone
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return b"".join(parts)


def check_room(metrics: Metrics, settings: Settings, body_bytes: int = 0) -> None:
    """Raise QueueFull where this gateway holds as much as it may."""
    full = metrics.open_requests > settings.most_requests
    if full or metrics.open_body_bytes + body_bytes > settings.most_body_mb * 1_000_000:
        raise QueueFull(
            "this gateway has as many requests open as it may; ask again, or start another",
            retry_after_s=1,
        )


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"`body`: at most {MAX_BODY_BYTES} bytes", param="body")
