"""What travels: the job a producer enqueues, the segments an attempt generates, the reply that ends it."""

from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

import msgspec

from protocols import codec
from protocols.errors import JobNotFound, RolloutError, error_of
from protocols.rollout_state import (
    FinishReason,
    Logprobs,
    RolloutState,
    RoutedExperts,
    Status,
    TokenIds,
)

Lane = Literal["high", "normal", "low"]
"""Jobs of a higher lane are read more often; none starves."""

MAX_BODY_BYTES = 16 * 1024 * 1024
DEFAULT_PROTOCOL = "openai.chat"
DEFAULT_REPLY_TTL_MS = 6 * 3600 * 1000


class Job(msgspec.Struct, frozen=True, gc=False):
    """One job as it lies in a lane's stream."""

    id: str
    body: bytes
    """JSON in the job's dialect."""
    protocol: str = DEFAULT_PROTOCOL
    lane: Lane = "normal"
    inbox: str | None = None
    """The client process that wants to be woken."""
    run: str | None = None
    group: str | None = None
    session: str | None = None
    timeout_ms: int | None = None
    """From the moment it is accepted to its deadline."""
    min_version: int | None = None
    """Oldest policy version that may begin it."""
    max_staleness: int | None = None
    """Most policy versions that the oldest of its tokens may fall behind the wanted one."""
    reply_ttl_ms: int = DEFAULT_REPLY_TTL_MS
    """How long the reply is kept after the end."""
    stream: bool = False
    """Whether its segments are written, with their frames, as soon as they are generated."""
    cuts: str | None = None
    """`<sample>:<tokens>`, separated by spaces: where a segment shall end, since a reader was shown so much of the job
    before the server lost it."""


class Segment(msgspec.Struct, frozen=True):
    """Tokens of one sample, in order: what an engine yields, and the unit of checkpoint and stream."""

    index: int
    """Which sample."""
    start: int
    """Position of the first token in the response."""
    token_ids: TokenIds
    logprobs: Logprobs
    """`[tokens]`, before temperature, penalties and truncation."""
    top_ids: TokenIds
    """`[tokens x top_logprobs]`."""
    top_logprobs: Logprobs
    policy_version: int
    """Stamped by the engine that held these weights when it drew the tokens."""
    finish_reason: FinishReason | None = None
    """Set on the sample's last segment."""
    frames: bytes = b""
    """Of a job that is streamed, what these tokens add to its frames; the first one begins them."""
    routed_experts: RoutedExperts | None = None
    """Of the whole sample, on its last segment, where they were asked for. No part of a checkpoint."""


class JobStatus(StrEnum):
    """Where a job is. A rollout state has a status of its own (XTuner's); `ROLLOUT_STATUS` maps them."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    EXPIRED = "expired"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the job has its reply."""
        return self not in _LIVE


_LIVE = (JobStatus.QUEUED, JobStatus.RUNNING)

ROLLOUT_STATUS: dict[JobStatus, Status] = {
    JobStatus.QUEUED: Status.INIT,
    JobStatus.RUNNING: Status.INIT,
    JobStatus.COMPLETED: Status.COMPLETED,
    JobStatus.FAILED: Status.FAILED,
    JobStatus.ABORTED: Status.ABORTED,
    JobStatus.EXPIRED: Status.EXPIRED,
    JobStatus.CANCELLED: Status.ABORTED,
}
"""The one mapping between the two enums."""


class Reply(msgspec.Struct, frozen=True, dict=True):
    """The terminal answer of a job."""

    job_id: str
    status: JobStatus
    code: int
    """HTTP status."""
    body: bytes
    """JSON in the job's dialect; of a failed job, that dialect's error body."""
    packed_state: bytes = b""
    """msgpack, see `codec.unpack_states`."""
    error: str | None = None
    """`code` of the error class, where the job did not complete."""
    attempts: int = 0
    worker: str | None = None
    policy_version: int | None = None
    """The newest policy version that produced one of its tokens."""
    finished_ms: int = 0
    """Server time."""

    @cached_property
    def response(self) -> dict[str, Any]:
        """The body as a dict."""
        return codec.decode_json(self.body)

    @cached_property
    def states(self) -> tuple[RolloutState, ...]:
        """One rollout state a sample; empty where nothing was generated."""
        return codec.unpack_states(self.packed_state)

    @property
    def state(self) -> RolloutState | None:
        """The first sample's rollout state."""
        return self.states[0] if self.states else None

    def raise_for_status(self) -> "Reply":
        """Return self if completed, else raise the error that ended the job.

        Of a tombstone, which an owner that collects its reply leaves behind, it raises JobNotFound.
        """
        if self.status is JobStatus.COMPLETED and not self.tombstone:
            return self
        raise self.exception()

    @property
    def tombstone(self) -> bool:
        """Whether it completed and only that is left: its owner collected the answer a while ago."""
        return self.status is JobStatus.COMPLETED and self.body == b"{}"

    def exception(self) -> RolloutError:
        """The error that ended the job, with the message that its body carries."""
        if self.tombstone:
            return JobNotFound(
                f"the answer of job {self.job_id} was collected; only its status is kept"
            )
        told = codec.error_message(self.body) or f"job {self.job_id} ended {self.status}"
        return error_of(self.error or "", told)
