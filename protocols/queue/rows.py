"""What the steps take and give, typed, and the rows that travel for it."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from protocols import codec
from protocols.errors import BodyTooLarge, InvalidRequest
from protocols.job import (
    DEFAULT_PROTOCOL,
    DEFAULT_REPLY_TTL_MS,
    MAX_BODY_BYTES,
    Job,
    JobStatus,
    Reply,
    Segment,
)
from protocols.queue.link import Argument
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from protocols.session import MAX_SESSION_CHARS, NewTurn, Recalled, SessionTurn

REPLY_FIELDS = (
    "status",
    "code",
    "body",
    "state",
    "error",
    "attempts",
    "worker",
    "policy_version",
    "finished_ms",
)

STATUS = {status.value.encode(): status for status in JobStatus}
"""As a reply hash says it."""
Renewal = Literal["held", "lost", "cancel", "expire", "stale", "gap"]
"""`gap`: held, but the server wants the checkpoint from its beginning."""
Retrial = Literal["retry", "dead", "lost"]


class Lease(msgspec.Struct, frozen=True, gc=False):
    """A job taken: what an attempt works on and proves itself by."""

    job_id: str
    fence: str
    """attempt:nonce; every write of the attempt is compared with it."""
    lane: str
    left_ms: int | None
    """What was left to its deadline when it was taken."""
    fields: dict[bytes, bytes]
    """The stream entry's fields as they came."""
    kept: tuple[Segment, ...] = ()
    """What earlier attempts generated and checkpointed, in order."""
    queued_ms: int = 0
    """When the job was accepted: server time, the same for every attempt."""

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return int(self.fence.partition(":")[0])


class Ending(msgspec.Struct, frozen=True, gc=False):
    """A terminal reply on its way to the server."""

    job_id: str
    fence: str
    status: JobStatus
    code: int
    body: bytes
    state: bytes = b""
    error: str = ""
    policy_version: int | None = None
    """The newest that produced one of its tokens."""
    oldest_version: int | None = None
    """The oldest: too far behind the wanted one, the server makes an `expired` reply of an answer."""
    segments: Sequence[Segment] = ()
    """Of a job that is streamed, what was generated since the last checkpoint."""
    frames: bytes = b""
    """What ends its stream."""
    tokens: int = 0
    """Of all samples, in its stream."""
    session: str = ""
    turns: tuple[NewTurn, ...] = ()
    """What its session keeps of it, if it has one."""

    @property
    def bytes(self) -> int:
        """About what it takes on the wire."""
        nodes = sum([len(turn.node) for turn in self.turns])
        answer = len(self.body) + len(self.state) + len(self.frames)
        return answer + segment_bytes(self.segments) + nodes


class Hold(msgspec.Struct, frozen=True):
    """A lease to be extended or given up, with what was generated since the last checkpoint."""

    job_id: str
    fence: str
    segments: Sequence[Segment] = ()

    @property
    def bytes(self) -> int:
        """About what it takes on the wire."""
        return segment_bytes(self.segments)


class End(msgspec.Struct, frozen=True):
    """The last entry of a progress stream."""

    status: JobStatus
    frames: bytes = b""
    """What ends the stream of a job that is streamed and completed."""
    tokens: int = 0
    """With frames: how many tokens the stream has, of all samples; a reader that has fewer lacks some."""


Entry = tuple[str, Segment | End]
"""An entry of a progress stream, under its id."""


class Failure(msgspec.Struct, frozen=True):
    """A failed attempt that may be tried again."""

    hold: Hold
    delay_ms: int
    message: str


class Taken(NamedTuple):
    """The answer to a take."""

    gate: str
    """`open`, `closed`, or `missing` while there is no desired state."""
    leases: list[Lease]
    hold: bool
    """Take nothing else until the worker holds no job, or the one job taken has a new checkpoint."""
    again: bool = False
    """It came after a wait, and there may be jobs that only a take without a wait is given: ask at once."""


class Beaten(NamedTuple):
    """The answer to a beat."""

    now_ms: int
    """Of the server."""
    desired: dict[str, str]
    """Empty where there is none."""
    seen: str
    """The last command that is told here."""
    news: list[Any]
    """New commands, as they came."""


class Swept(NamedTuple):
    """What a sweep found."""

    reclaimed: int
    dead: int
    promoted: int
    expired: int
    orphans: int


def body_hash(protocol: str, body: bytes) -> str:
    """What tells two bodies of one job id apart: SHA-1 of protocol and bytes."""
    digest = hashlib.sha1(protocol.encode() + b"\0", usedforsecurity=False)
    digest.update(body)
    return digest.hexdigest()


def check_job(job: Job) -> Job:
    """The job, if the queue would take it; else InvalidRequest or BodyTooLarge."""
    if not codec.JOB_ID.fullmatch(job.id):
        raise InvalidRequest(f"`id` {job.id[:80]!r}: 1 to 128 of A-Z a-z 0-9 . _ : ~ -", param="id")
    if job.session is not None:
        checked_session(job.session)
    if len(job.body) > MAX_BODY_BYTES:
        raise BodyTooLarge(
            f"`body`: {len(job.body)} bytes; the limit is {MAX_BODY_BYTES}", param="body"
        )
    return job


def checked_session(session: str) -> str:
    """The session's name, if it may have it; else InvalidRequest."""
    if 1 <= len(session) <= MAX_SESSION_CHARS:
        return session
    raise InvalidRequest(f"`session`: 1 to {MAX_SESSION_CHARS} characters", param="session")


def job_of(lease: Lease) -> Job:
    """The typed job of a stream entry; an InvalidRequest names the field that is wrong."""
    fields = lease.fields
    if b"body" not in fields:
        raise InvalidRequest("`body`: missing; XADD … body '{\"messages\": […]}'", param="body")
    return check_job(
        Job(
            id=lease.job_id,
            body=fields[b"body"],
            protocol=protocol_of(lease),
            group=_text(fields, b"group"),
            session=_text(fields, b"session"),
            timeout_ms=_number(fields, b"timeout_ms", least=1),
            min_version=_number(fields, b"min_version", least=0),
            max_staleness=_number(fields, b"max_staleness", least=0),
            reply_ttl_ms=_number(fields, b"reply_ttl_ms", least=1) or DEFAULT_REPLY_TTL_MS,
            stream=_flag(fields, b"stream"),
            cuts=_cuts(fields),
        )
    )


def protocol_of(lease: Lease) -> str:
    """The dialect that the entry names."""
    return _text(lease.fields, b"protocol") or DEFAULT_PROTOCOL


def fields_of(job: Job) -> Iterable[Argument]:
    """A job's stream fields, those at their default left out."""
    yield from ("body", job.body)
    for name, default in _OPTIONAL:
        value: Argument | bool | None = getattr(job, name)
        if value != default and value is not None:
            yield from (name, int(value) if value is True else value)


_OPTIONAL = [
    (field.name, field.default)
    for field in msgspec.structs.fields(Job)
    if field.name not in ("id", "body", "lane")
]


def _finish_reason(raw: bytes) -> FinishReason | None:
    return msgspec.convert(raw.decode(), FinishReason) if raw else None


def _text(fields: dict[bytes, bytes], name: bytes) -> str | None:
    value = fields.get(name)
    return None if value is None else value.decode("utf-8", "replace")


def _number(fields: dict[bytes, bytes], name: bytes, *, least: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not re.fullmatch(rb"\d{1,13}", value) or int(value) < least:
        field = name.decode()
        raise InvalidRequest(f"`{field}`: a whole number from {least} to 10^13 - 1", param=field)
    return int(value)


def _flag(fields: dict[bytes, bytes], name: bytes) -> bool:
    value = fields.get(name, b"0")
    if value not in (b"0", b"1"):
        raise InvalidRequest(f"`{name.decode()}`: 0 or 1", param=name.decode())
    return value == b"1"


def _cuts(fields: dict[bytes, bytes]) -> str | None:
    value = fields.get(b"cuts")
    if value is not None and not re.fullmatch(rb"\d{1,3}:\d{1,9}( \d{1,3}:\d{1,9})*", value):
        raise InvalidRequest("`cuts`: <sample>:<tokens>, with spaces between them", param="cuts")
    return None if value is None else value.decode()


def taken_of(row: list[Any]) -> Taken:
    """The answer of `take`."""
    gate, jobs, hold, *again = row
    return Taken(gate.decode(), [_lease_of(job) for job in jobs], hold == 1, again == [1])


def _lease_of(row: list[Any]) -> Lease:
    _, job_id, fence, lane, left_ms, flat, kept, queued_ms = row
    return Lease(
        job_id=job_id.decode(),
        fence=fence.decode(),
        lane=lane.decode(),
        left_ms=None if left_ms == b"" else int(left_ms),
        fields=dict(zip(flat[::2], flat[1::2], strict=True)),
        kept=tuple(segment_of(entry) for _, entry in kept),
        queued_ms=int(queued_ms),
    )


def segment_of(flat: list[bytes]) -> Segment:
    """A checkpoint's entry."""
    entry = dict(zip(flat[::2], flat[1::2], strict=True))
    return Segment(
        index=int(entry[b"i"]),
        start=int(entry[b"s"]),
        token_ids=TokenIds.from_bytes(entry[b"t"]),
        logprobs=Logprobs.from_bytes(entry[b"p"]),
        top_ids=TokenIds.from_bytes(entry[b"ti"]),
        top_logprobs=Logprobs.from_bytes(entry[b"tp"]),
        policy_version=int(entry[b"v"]),
        finish_reason=_finish_reason(entry[b"f"]),
        frames=entry.get(b"sse", b""),
    )


def entry_of(raw: tuple[bytes, list[bytes]]) -> Entry:
    """An entry of a progress stream."""
    entry_id, flat = raw
    if flat[0] != b"end":
        return entry_id.decode(), segment_of(flat)
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    status = STATUS[fields[b"end"]]
    return entry_id.decode(), End(status, fields.get(b"sse", b""), int(fields.get(b"n", 0)))


def hold_args(hold: Hold) -> Iterable[Argument]:
    """A hold as the arguments of `renew` and `release`."""
    yield from (hold.job_id, hold.fence)
    yield from _segment_args(hold.segments)


def ending_args(end: Ending) -> list[Argument]:
    """An ending as the arguments of `finish`."""
    newest = "" if end.policy_version is None else end.policy_version
    oldest = "" if end.oldest_version is None else end.oldest_version
    answer = (end.status.value, end.code, end.body, end.state, newest, oldest)
    more = _more_args(end)
    return [end.job_id, end.fence, *answer, len(more), *more]


def _more_args(end: Ending) -> list[Argument]:
    """What most endings have not."""
    if not (end.error or end.frames or end.segments or end.turns):
        return []
    turns = [(turn.rollout_id, turn.parent, turn.mark, turn.node) for turn in end.turns]
    told = [value for turn in turns for value in turn]
    stream = (end.frames, end.tokens, *_segment_args(end.segments))
    return [end.error, *stream, end.session, len(turns), *told]


def segment_bytes(segments: Iterable[Segment]) -> int:
    """About what segments take on the wire."""
    return sum([8 * (len(s.token_ids) + len(s.top_ids)) + len(s.frames) for s in segments])


def _segment_args(segments: Sequence[Segment]) -> Iterable[Argument]:
    yield len(segments)
    for segment in segments:
        yield from (segment.index, segment.start, len(segment.token_ids), segment.policy_version)
        yield codec.pack_numbers(segment.token_ids)
        yield codec.pack_numbers(segment.logprobs)
        yield codec.pack_numbers(segment.top_ids)
        yield codec.pack_numbers(segment.top_logprobs)
        yield segment.finish_reason or ""
        yield segment.frames


def recalled_of(row: list[Any]) -> Recalled:
    """The answer of `recall`."""
    turns, size, flat, gone = row
    pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
    path = tuple((name.decode(), codec.unpack_node(node)) for name, node in pairs)
    return Recalled(turns, size, path, gone == 1)


def turns_of(fields: dict[bytes, bytes]) -> list[SessionTurn]:
    """A session's hash, its turns in the order of their acceptance."""
    found: list[tuple[int, SessionTurn]] = []
    for name, link in fields.items():
        kind, _, rollout_id = name.partition(b":")
        node = fields.get(b"n:" + rollout_id)
        if kind == b"l" and node is not None:
            number, at_ms, parent = link.decode().split(" ")
            node = codec.unpack_node(node)
            turn = SessionTurn(rollout_id.decode(), parent or None, int(at_ms), node)
            found.append((int(number), turn))
    turns: dict[str, SessionTurn] = {}
    for _, turn in sorted(found, key=lambda pair: pair[0]):
        if (
            turn.parent is None or turn.parent in turns
        ):  # one that came while the hash was read may lack its parent
            turns[turn.rollout_id] = turn
    return list(turns.values())


def reply_of(job_id: str, row: list[bytes | None]) -> Reply | JobStatus | None:
    """A reply hash's `REPLY_FIELDS`."""
    status, code, body, state, error, attempts, worker, version, finished_ms = row
    if status is None:
        return None
    known = STATUS[status]
    if not known.terminal:
        return known
    return Reply(
        job_id=job_id,
        status=known,
        code=int(code or 0),
        body=body or b"{}",
        packed_state=state or b"",
        error=error.decode() if error else None,
        attempts=int(attempts or 0),
        worker=worker.decode() if worker else None,
        policy_version=int(version) if version else None,
        finished_ms=int(finished_ms or 0),
    )


def texts(flat: list[bytes]) -> dict[str, str]:
    """Pairs of a hash."""
    return {k.decode(): v.decode() for k, v in zip(flat[::2], flat[1::2], strict=True)}
