"""A request as it came, and what its headers say about its job."""

import hashlib
import hmac
import math
import secrets
from collections.abc import Callable, Mapping

import msgspec

from producer_sdk.client import JobOptions
from protocols.codec import JOB_ID
from protocols.errors import InvalidRequest
from protocols.job import Lane

NAME_CHARS = 256
LONGEST_S = 30 * 24 * 3600.0


class Request(msgspec.Struct, frozen=True):
    """What somebody asks over HTTP, or would."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in small letters."""
    body: bytes = b""
    timeout_s: float | None = None
    """How long the other side waits; the job's deadline, unless a header says another."""
    caller: str = ""
    """Whose requests are told apart by their idempotency keys; never shown."""

    @property
    def speaks_claude(self) -> bool:
        """Whether Anthropic's client asks, where the path does not tell."""
        return "anthropic-version" in self.headers


class _Peek(msgspec.Struct):
    stream: bool | None = None


_peek = msgspec.json.Decoder(_Peek)


def wants_frames(body: bytes) -> bool:
    """Whether the body asks for a stream; one that cannot be read does not: its dialect says what is wrong with it."""
    try:
        return bool(_peek.decode(body).stream)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def job_id_of(request: Request) -> str:
    """The id that the headers give the job, the same for every retry of one request; else a fresh one."""
    told = request.headers.get("x-rollout-job-id")
    if told is not None:
        if not JOB_ID.fullmatch(told):
            raise InvalidRequest(
                "`x-rollout-job-id`: 1 to 128 of A-Z a-z 0-9 . _ : ~ -", param="x-rollout-job-id"
            )
        return told
    key = request.headers.get("idempotency-key")
    if key is None:
        return f"http-{secrets.token_hex(12)}"
    named = "\n".join((request.path, _text("idempotency-key", key)))
    return f"idem-{hmac.digest(request.caller.encode(), named.encode(), hashlib.sha256).hex()[:40]}"


def lasting(request: Request) -> bool:
    """Whether somebody can come back for the answer, so that hanging up does not end the job."""
    return "idempotency-key" in request.headers or "x-rollout-job-id" in request.headers


def options_of(request: Request) -> JobOptions:
    """What the headers say beside the body; raises InvalidRequest, which names the header."""
    options: JobOptions = {}
    if request.timeout_s is not None:
        options["timeout_s"] = request.timeout_s
    for header, (name, read) in _OPTIONS.items():
        if header in request.headers:
            options[name] = read(header, request.headers[header])  # pyright: ignore[reportGeneralTypeIssues]
    return options


def _text(header: str, told: str) -> str:
    if not 1 <= len(told) <= NAME_CHARS:
        raise InvalidRequest(f"`{header}`: 1 to {NAME_CHARS} characters", param=header)
    return told


def _lane(header: str, told: str) -> Lane:
    if told not in ("high", "normal", "low"):
        raise InvalidRequest(f"`{header}`: high, normal or low", param=header)
    return told


def _whole(header: str, told: str) -> int:
    if not (told.isascii() and told.isdigit() and len(told) <= 15):
        raise InvalidRequest(f"`{header}`: a whole number from 0", param=header)
    return int(told)


def seconds(header: str, told: str) -> float:
    """A number of seconds in a header; raises InvalidRequest."""
    try:
        found = float(told)
    except ValueError:
        found = math.nan
    if not 0 < found <= LONGEST_S:
        raise InvalidRequest(
            f"`{header}`: seconds, more than 0 and at most {LONGEST_S:g}", param=header
        )
    return found


_OPTIONS: Mapping[str, tuple[str, Callable[[str, str], object]]] = {
    "x-session-id": ("session", _text),
    "x-rollout-session": ("session", _text),
    "x-rollout-group": ("group", _text),
    "x-rollout-lane": ("lane", _lane),
    "x-rollout-min-version": ("min_version", _whole),
    "x-rollout-max-staleness": ("max_staleness", _whole),
    "x-rollout-timeout-s": ("timeout_s", seconds),
}
"""Header -> option of the job, and how it is read; of two that say the same the later one wins."""
