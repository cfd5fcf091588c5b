"""What goes back: status, headers and body, of a reply or of an error."""

import math
from collections.abc import Mapping
from urllib.parse import quote

import msgspec

from protocols.codec import encode_json
from protocols.dialects import error_body, http_status
from protocols.errors import NoLiveWorker, QueueFull, RolloutError, ServerUnavailable
from protocols.job import Reply

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
RETRY_S = 1.0
IGNORED_BYTES = 2048
SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "%,")
"""What a header shows as it is; the rest is percent-encoded, `,` too, since it stands between names."""


class Response(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _Result(msgspec.Struct):
    ignored: tuple[str, ...] = ()


class _Peek(msgspec.Struct):
    rollout: _Result | None = None


_peek = msgspec.json.Decoder(_Peek)


def of_json(value: object, request_id: str) -> Response:
    """An answer of our own."""
    return Response(200, {"content-type": JSON, **ids(request_id)}, encode_json(value))


def of_frames(request_id: str) -> Mapping[str, str]:
    """The headers of a stream, which is a 200 whatever becomes of it."""
    return {"content-type": EVENTS, "cache-control": "no-cache", **ids(request_id)}


def of_reply(reply: Reply, protocol: str) -> Response:
    """The reply of a job. Whatever the queue may retry it has retried: no client shall do so again."""
    if reply.tombstone:
        return of_error(reply.exception(), protocol, reply.job_id)
    headers = {"content-type": JSON, **ids(reply.job_id)}
    if reply.code >= 400:
        headers["x-should-retry"] = "false"
    elif ignored := _ignored(reply.body):
        headers["x-rollout-ignored"] = ignored
    return Response(http_status(protocol, reply.code), headers, reply.body)


def of_error(
    error: RolloutError, protocol: str, request_id: str, *, again: bool | None = None
) -> Response:
    """An error in the protocol's own shape.

    `again`: whether the same request, sent again, is not a second job; by default where no job is left behind.
    """
    headers = {"content-type": JSON, **ids(request_id), **_advice(error, again)}
    body = error_body(protocol, error, request_id)
    return Response(http_status(protocol, error.http_status), headers, body)


def ids(request_id: str) -> dict[str, str]:
    """The request id where OpenAI's clients look for it, and where Anthropic's do."""
    return {"x-request-id": request_id, "request-id": request_id}


def _advice(error: RolloutError, again: bool | None) -> dict[str, str]:
    retryable = isinstance(error, QueueFull | NoLiveWorker | ServerUnavailable)
    if again is None:
        again = not isinstance(error, ServerUnavailable)
    if not (retryable and again):
        return {"x-should-retry": "false"}
    wait_s = error.retry_after_s or RETRY_S
    return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}


def _ignored(body: bytes) -> str:
    """The fields that were accepted without effect, as the response says itself; their names are the caller's."""
    if b'"ignored":[]' in body:
        return ""
    try:
        result = _peek.decode(body).rollout
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    told = ",".join(quote(name, safe=SAFE) for name in result.ignored) if result else ""
    return told if len(told) <= IGNORED_BYTES else f"{told[: IGNORED_BYTES - 3]}..."
