"""A line of the output: an answer in its family's batch shape, and what such a line tells when it is read again.

Every line begins with the row's id, `<batch>-<line>`, by which a later run knows what is done; the answer is the body
of the reply, byte for byte.
"""

import re
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from protocols.dialects import http_status
from protocols.errors import RolloutError
from protocols.job import JobStatus, Reply

_ID = re.compile(r"[a-z0-9]+-(\d+)")


class Fault(msgspec.Struct, frozen=True):
    """Why a row has no answer."""

    code: str
    message: str


class _Response(msgspec.Struct, frozen=True, gc=False):
    status_code: int
    request_id: str
    body: Raw


class _OpenAILine(msgspec.Struct, frozen=True, gc=False):
    id: str
    custom_id: str
    response: _Response | None
    error: Fault | None


class _Result(msgspec.Struct, frozen=True, gc=False):
    type: Literal["succeeded", "errored", "canceled", "expired"]
    message: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


class _ClaudeLine(msgspec.Struct, frozen=True, gc=False):
    id: str
    custom_id: str
    result: _Result


_encode = msgspec.json.Encoder().encode
_CLAUDE_TYPES: dict[JobStatus, Literal["canceled", "expired"]] = {
    JobStatus.CANCELLED: "canceled",
    JobStatus.EXPIRED: "expired",
}


def answer_line(row_id: str, custom_id: str, protocol: str, reply: Reply) -> bytes:
    """The line of a reply, good or not."""
    body = Raw(reply.body)
    good = reply.status is JobStatus.COMPLETED
    if protocol.startswith("claude."):
        if good:
            result = _Result("succeeded", message=body)
        else:
            result = _Result(_CLAUDE_TYPES.get(reply.status, "errored"), error=body)
        return _encode(_ClaudeLine(row_id, custom_id, result)) + b"\n"
    fault = None if good else Fault(reply.error or "", str(reply.exception()))
    response = _Response(http_status(protocol, reply.code), reply.job_id, body)
    return _encode(_OpenAILine(row_id, custom_id, response, fault)) + b"\n"


def refusal_reply(job_id: str, body: bytes, error: RolloutError) -> Reply:
    """The reply that stands for a job which the queue did not take; `body` is its dialect's error body."""
    return Reply(job_id, JobStatus.FAILED, error.http_status, body, error=error.code)


# what was written, read again


class _Choice(msgspec.Struct, gc=False):
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Body(msgspec.Struct, gc=False):
    """What is counted of an answer, in whichever family's shape."""

    usage: _Usage | None = None
    choices: list[_Choice] = []
    samples: list[_Choice] = []
    stop_reason: str | None = None


class _WrittenResponse(msgspec.Struct, gc=False):
    body: Body


class _WrittenResult(msgspec.Struct, gc=False):
    type: str
    message: Body | None = None


class Written(msgspec.Struct, gc=False):
    """A line of the output, of any family or format."""

    id: str
    response: _WrittenResponse | None = None
    error: Fault | None = None
    result: _WrittenResult | None = None
    status: str | None = None
    """Of a rollout; this and what follows."""
    index: int = 0
    of: int = 1
    prompt_ids: list[int] = []
    response_ids: list[int] = []
    finish_reason: str | None = None

    @property
    def line(self) -> int:
        """Of the input; 0 where the id is none of ours."""
        found = _ID.fullmatch(self.id)
        return int(found[1]) if found else 0


_body = msgspec.json.Decoder(Body)
written = msgspec.json.Decoder(Written).decode


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What one row adds to the counts."""

    fault: str | None
    """The code of its error; None where it has an answer."""
    prompt_tokens: int = 0
    response_tokens: int = 0
    reasons: tuple[str, ...] = ()
    """Why its samples ended, one each."""


def seen_in_reply(reply: Reply) -> Seen:
    """What a reply adds."""
    if reply.status is not JobStatus.COMPLETED:
        return Seen(reply.error or reply.status.value)
    return _seen(_body.decode(reply.body))


def seen_in(line: Written) -> Seen:
    """What a line adds that was written before."""
    if line.status is not None:
        if line.error is not None or line.status != "completed":
            return Seen(line.error.code if line.error else line.status)
        prompt_tokens = 0 if line.index else len(line.prompt_ids)
        return Seen(None, prompt_tokens, len(line.response_ids), (line.finish_reason or "",))
    if line.error is not None:
        return Seen(line.error.code)
    if line.result is not None:
        if line.result.message is None:
            return Seen(line.result.type)
        return _seen(line.result.message)
    return _seen(line.response.body if line.response else Body())


def _seen(body: Body) -> Seen:
    usage = body.usage or _Usage()
    choices = body.choices or body.samples
    if choices:
        reasons = tuple([choice.finish_reason or "" for choice in choices])
    else:
        reasons = () if body.stop_reason is None else (body.stop_reason,)
    return Seen(
        None,
        usage.prompt_tokens or usage.input_tokens,
        usage.completion_tokens or usage.output_tokens,
        reasons,
    )
