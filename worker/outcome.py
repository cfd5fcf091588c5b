"""Every way an attempt can end, and what each does to the job.

The set is closed: `run_job` turns whatever happens, a crash of ours included, into one of these,
and `settle` maps each to one step of the queue. A job gets exactly one terminal reply; a lost lease
writes nothing.
"""

import logging
import random
from collections.abc import Sequence
from typing import TypeAlias, assert_never

import msgspec

from protocols.errors import RolloutError
from protocols.job import JobStatus, Segment
from protocols.queue.broker import Broker
from protocols.queue.coalesce import Coalescer
from protocols.queue.rows import Ending, Failure, Hold, Lease
from protocols.session import NewTurn
from worker.checkpoint import portion

BACKOFF_MOST_S = 60.0
MOST_DOUBLINGS = 10

log = logging.getLogger("rolloutq.outcome")


class Completed(msgspec.Struct, frozen=True):
    """Generated and answered."""

    body: bytes
    state: bytes
    policy_version: int
    """The newest of its tokens."""
    oldest_version: int
    segments: tuple[Segment, ...] = ()
    """Of a job that is streamed, what was generated since the last checkpoint."""
    frames: bytes = b""
    """What ends its stream."""
    tokens: int = 0
    """Of all samples, in its stream."""
    session: str = ""
    turns: tuple[NewTurn, ...] = ()
    """What its session keeps of it, if it has one."""


class Ended(msgspec.Struct, frozen=True):
    """A terminal reply without an answer: refused, cancelled, expired."""

    status: JobStatus
    error: RolloutError
    body: bytes
    """The error in the job's dialect."""
    state: bytes = b""
    """The rollout states as far as they came."""


class Retried(msgspec.Struct, frozen=True):
    """The attempt failed; another may succeed."""

    error: RolloutError
    segments: tuple[Segment, ...] = ()
    """Generated since the last checkpoint."""


class HandedBack(msgspec.Struct, frozen=True):
    """The worker gives the job to another."""

    segments: tuple[Segment, ...] = ()
    """Generated since the last checkpoint."""


class Lost(msgspec.Struct, frozen=True):
    """The lease went to somebody else: whatever this attempt made is void."""


Outcome: TypeAlias = Completed | Ended | Retried | HandedBack | Lost


class Settler:
    """Writes outcomes; those of many jobs travel together."""

    def __init__(
        self, broker: Broker, *, fail_limit: int, backoff_s: float, lease_s: float
    ) -> None:
        self._broker = broker
        self._lease_ms = int(lease_s * 1000)
        self._fail_limit = fail_limit
        self._backoff_s = backoff_s
        self._finish = Coalescer(broker.finish, size=lambda end: end.bytes)
        self._renew = Coalescer(self._renew_batch, size=lambda hold: hold.bytes)
        self._fail = Coalescer(self._fail_batch, size=lambda failure: failure.hold.bytes)
        self._release = Coalescer(broker.release, size=lambda hold: hold.bytes)

    async def settle(self, lease: Lease, outcome: Outcome) -> None:
        """Write what an attempt's end means to its job."""
        job_id, fence = lease.job_id, lease.fence
        match outcome:
            case Completed():
                segments = await self._all_but_last(lease, outcome.segments)
                kept = await self._finish.answer(_completed(lease, outcome, segments))
            case Ended(status, error, body, state):
                kept = await self._finish.answer(
                    Ending(job_id, fence, status, error.http_status, body, state, error.code)
                )
            case Retried(error, segments):
                delay_ms = int(random.uniform(0, self._longest_s(lease.attempt)) * 1000)
                hold = Hold(job_id, fence, segments)
                retrial = await self._fail.answer(Failure(hold, delay_ms, error.message))
                kept = retrial != "lost"
            case HandedBack(segments):
                kept = await self._release.answer(Hold(job_id, fence, segments))
            case Lost():
                kept = False
            case _:
                assert_never(outcome)
        if not kept:
            log.warning("job %s: the lease of attempt %s was lost", job_id, fence)

    async def _all_but_last(self, lease: Lease, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Write what is more than the end should carry, in portions; returns the last one."""
        while segments and len(first := portion(segments)) < len(segments):
            await self._renew.answer(Hold(lease.job_id, lease.fence, first))
            segments = segments[len(first) :]
        return segments

    async def _renew_batch(self, holds: Sequence[Hold]) -> Sequence[str]:
        return await self._broker.renew(holds, lease_ms=self._lease_ms)

    def _longest_s(self, attempt: int) -> float:
        """The bound of the next wait: hand-backs count as attempts too, so it must not double for ever."""
        doubled = self._backoff_s * 2 ** min(attempt - 1, MOST_DOUBLINGS)
        return min(doubled, BACKOFF_MOST_S)

    async def _fail_batch(self, failures: Sequence[Failure]) -> Sequence[str]:
        return await self._broker.fail(failures, limit=self._fail_limit)

    async def close(self) -> None:
        """Wait until everything is written."""
        for coalescer in (self._renew, self._finish, self._fail, self._release):
            await coalescer.close()


def _completed(lease: Lease, outcome: Completed, segments: Sequence[Segment]) -> Ending:
    """With what its stream and its session get."""
    return Ending(
        lease.job_id,
        lease.fence,
        JobStatus.COMPLETED,
        200,
        outcome.body,
        outcome.state,
        policy_version=outcome.policy_version,
        oldest_version=outcome.oldest_version,
        segments=segments,
        frames=outcome.frames,
        tokens=outcome.tokens,
        session=outcome.session,
        turns=outcome.turns,
    )
