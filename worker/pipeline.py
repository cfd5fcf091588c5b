"""One job, from its lease to its outcome. Read `_generate_answer` top to bottom.

Every job gets exactly one terminal reply. This module holds the only `except Exception` of the
path: whatever a step raises becomes an outcome. Cancellation passes through.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar, assert_never

from msgspec.structs import replace

from protocols import codec
from protocols.dialects import dialect_of, error_body
from protocols.dialects.base import Answer, Dialect, Normal, Stream, Streamed
from protocols.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    JobError,
    RolloutError,
    StalenessExceeded,
)
from protocols.job import ROLLOUT_STATUS, JobStatus
from protocols.queue.rows import Lease, job_of, protocol_of
from protocols.rollout_state import RolloutState, Status
from worker.checkpoint import Checkpoint, StreamedCheckpoint
from worker.engines.base import Call, Engine, Generation
from worker.framer import Framer
from worker.outcome import Completed, Ended, HandedBack, Lost, Outcome, Retried
from worker.parse import Sample
from worker.regions import PLAIN, Reading
from worker.render import check, heard, reading_of, render
from worker.session import Recall, kept_in, no_sessions, thread_of

Order = Literal["cancel", "expire", "stale", "lost", "hand back", "abort"]
"""Why an attempt shall end before its generation does."""

BESIDE_BYTES = 256 * 1024
"""A longer body is read beside the event loop."""
BESIDE_VALUES = 2048
"""An answer of more tokens, likely others included, is put together beside it."""
Made = TypeVar("Made")

log = logging.getLogger("rolloutq.pipeline")


class Interrupted(Exception):
    """An order ended the generation."""


class Attempt:
    """One lease of a job on its way through the pipeline; orders reach it here."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.order: Order | None = None
        self.prompt: RolloutState | None = None
        self.samples: list[Sample] = []
        self.checkpoint = Checkpoint(self.samples)
        self.grew: Callable[[], object] = lambda: None
        """Called after each segment of a job that is streamed."""
        self._generation: Generation | None = None
        self._stopped = False
        self._held: asyncio.Event | None = None
        """Set when it may go on; None while it is not held, as most never are."""
        self._resting: asyncio.Event | None = None
        """Set when the engine has given it back; None where nobody waits for that."""
        self._begun_s = time.monotonic()
        self._limit_tokens = 0

    def give(self, order: Order) -> None:
        """End the attempt: at once where it generates, else before it would begin to. The first order counts."""
        self.order = self.order or order
        self.go_on()
        self._stop_drawing()

    @property
    def held(self) -> bool:
        """Whether it is to wait, with its tokens, until it may go on."""
        return self._held is not None

    @property
    def generating(self) -> bool:
        """Whether the engine has it."""
        return self._generation is not None

    async def rest(self) -> None:
        """Hold, and wait until the engine has given it back."""
        self.hold()
        if self._generation is not None:
            self._resting = self._resting or asyncio.Event()
            await self._resting.wait()

    def hold(self) -> None:
        """Draw no more tokens for now; those that were drawn stay."""
        if self.order is None:
            self._held = self._held or asyncio.Event()
            self._stop_drawing()

    def go_on(self) -> None:
        """Draw again, after the tokens that are there."""
        if self._held is not None:
            self._held.set()
            self._held = None

    def _stop_drawing(self) -> None:
        self._stopped = True
        if self._generation is not None:
            self._generation.close()

    def ends_within(self, seconds: float) -> bool:
        """Whether it would end by then at its pace so far, were every sample to use all its tokens."""
        drawn = max(len(sample.ids) for sample in self.samples) if self.samples else 0
        fresh = drawn - max((s.start + len(s.token_ids) for s in self.lease.kept), default=0)
        if fresh <= 0 or self.held:
            return False
        pace_s = (time.monotonic() - self._begun_s) / fresh
        return (self._limit_tokens - drawn) * pace_s <= seconds

    async def draw(
        self,
        engine: Engine,
        call: Call,
        reading: Reading = PLAIN,
        stream: "Callable[[], Stream] | None" = None,
        cuts: str | None = None,
    ) -> list[Sample]:
        """Generate what earlier attempts did not; raises Interrupted where an order came first.

        With a stream, checkpoints carry its frames, cut also where `cuts` (of the job) says.
        """
        samples = [Sample(call.params, engine.tokenizer, reading) for _ in range(call.params.n)]
        for segment in self.lease.kept:
            samples[segment.index].add(segment)
        checkpoint = Checkpoint(samples)
        if stream is not None:
            framer = Framer(stream, samples, self.lease.job_id)
            wanted = [mark.split(":") for mark in (cuts or "").split()]
            checkpoint = StreamedCheckpoint(
                samples, framer, self.lease.kept, [(int(i), int(n)) for i, n in wanted]
            )
        self.samples, self.checkpoint = samples, checkpoint
        self._begun_s, self._limit_tokens = time.monotonic(), call.params.max_tokens or 0
        while await self._may_draw():
            await self._draw(engine, _going_on(call, samples))
        return samples

    @property
    def _unfinished(self) -> bool:
        return None in [sample.finish_reason for sample in self.samples]

    async def _may_draw(self) -> bool:
        """Whether a sample lacks its end; waits while it is held, and raises Interrupted where an order came."""
        unfinished = self._unfinished
        while unfinished and self._held is not None:
            await self._held.wait()  # an order, a deadline or a lost lease ends this as well
        if self.order is not None:
            raise Interrupted
        return unfinished

    async def _draw(self, engine: Engine, call: Call) -> None:
        """Until the samples have ended, or the attempt is to draw no more for now."""
        self._stopped = False
        generation = self._generation = engine.generate(call)
        try:
            async for segment in generation:
                if self.samples[segment.index].add(segment):
                    generation.stop(segment.index)
                if self.checkpoint.streamed:
                    self.grew()
        finally:
            self._generation = None
            if self._resting is not None:
                self._resting.set()
                self._resting = None
            generation.close()
        if self._unfinished and not self._stopped:
            raise EngineFailed("the engine ended a sample without a reason")


async def run_job(
    attempt: Attempt, engine: Engine, pool: str, recall: Recall = no_sessions
) -> Outcome:
    """What becomes of one attempt; `recall` looks up what its session knows."""
    lease = attempt.lease
    timer = None
    if lease.left_ms is not None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(lease.left_ms / 1000, attempt.give, "expire")
    try:
        return await _generate_answer(attempt, engine, pool, recall)
    except Interrupted:
        return _obeyed(attempt)
    except RolloutError as error:
        return _failed(attempt, error)
    except Exception:  # the one place where a fault of ours or of an engine becomes an outcome
        log.exception("job %s: attempt %s broke", lease.job_id, lease.attempt)
        return _failed(attempt, EngineFailed("the worker broke on this job; its log tells why"))
    finally:
        if timer is not None:
            timer.cancel()


async def _generate_answer(attempt: Attempt, engine: Engine, pool: str, recall: Recall) -> Outcome:
    job = job_of(attempt.lease)
    dialect = dialect_of(job.protocol)
    large = len(job.body) > BESIDE_BYTES
    normal = await _beside(large, partial(_accepted, dialect, job.body, engine, pool))
    session = job.session or normal.options.session
    thread = await thread_of(attempt.lease, session, normal.state, recall)
    prompt, call = await render(normal, job, engine, thread)
    attempt.prompt = prompt
    if normal.counts or call.params.max_tokens == 0:
        undrawn = replace(
            prompt, rollout_id=f"{job.id}/0", finish_reason="length", status=Status.COMPLETED
        )
        return _answer(attempt, dialect, normal, (undrawn,), engine)
    reading = reading_of(prompt, engine.tokenizer)
    streamed = job.stream or normal.stream
    stream = _stream(attempt.lease, dialect, normal, prompt, engine) if streamed else None
    samples = await attempt.draw(engine, call, reading, stream, job.cuts)

    def completed() -> Outcome:
        states = tuple([sample.state(prompt, job.id, i) for i, sample in enumerate(samples)])
        return kept_in(thread, states, _answer(attempt, dialect, normal, states, engine))

    values = sum([len(sample.ids) * (1 + sample.wide) for sample in samples])
    return await _beside(values > BESIDE_VALUES, completed)


def _going_on(call: Call, samples: Sequence[Sample]) -> Call:
    """The call, for what the samples lack."""
    kept = tuple([sample.ids[:] for sample in samples])
    ended = frozenset([i for i, one in enumerate(samples) if one.finish_reason is not None])
    if not ended and not any(kept):
        return call
    return replace(call, kept=kept, ended=ended)


async def _beside(heavy: bool, work: Callable[[], Made]) -> Made:
    """What `work` makes; where that is heavy, in a thread, so that the event loop is not held."""
    return await asyncio.to_thread(work) if heavy else work()


def _accepted(dialect: Dialect, body: bytes, engine: Engine, pool: str) -> Normal:
    normal = heard(dialect.normalize(body), engine)
    check(normal, engine, pool)
    return normal


def _stream(
    lease: Lease, dialect: Dialect, normal: Normal, prompt: RolloutState, engine: Engine
) -> Callable[[], Stream]:
    streamed = Streamed(
        job_id=lease.job_id,
        model=normal.model or engine.model,
        # not the attempt's: another goes on with the same frames
        created_s=lease.queued_ms // 1000,
        states=tuple(replace(prompt, index=index) for index in range(prompt.sample_params.n)),
        usage=normal.stream_usage,
        ignored=normal.ignored,
        token_bytes=engine.tokenizer.token_bytes,
        asked=normal.asked,
    )
    return partial(dialect.stream, streamed)


def _answer(
    attempt: Attempt,
    dialect: Dialect,
    normal: Normal,
    states: tuple[RolloutState, ...],
    engine: Engine,
) -> Completed:
    lease, checkpoint = attempt.lease, attempt.checkpoint
    answer = Answer(
        job_id=lease.job_id,
        model=normal.model or engine.model,
        created_s=int(time.time()),
        states=states,
        ignored=normal.ignored,
        attempts=lease.attempt,
        context_tokens=engine.context_tokens,
        token_bytes=engine.tokenizer.token_bytes,
        asked=normal.asked,
    )
    versions = [version for state in states for version, _ in state.policy_versions]
    body = dialect.respond(answer)
    segments, frames = (
        checkpoint.rest(body) if isinstance(checkpoint, StreamedCheckpoint) else ((), b"")
    )
    return Completed(
        body=body,
        state=codec.pack_states(states),
        policy_version=max(versions, default=engine.policy_version),
        oldest_version=min(versions, default=engine.policy_version),
        segments=tuple(segments),
        frames=frames,
        tokens=sum(len(state.response_ids) for state in states),
    )


def _obeyed(attempt: Attempt) -> Outcome:
    job_id = attempt.lease.job_id
    match attempt.order:
        case "cancel":
            return _ended(attempt, JobStatus.CANCELLED, Cancelled(f"job {job_id} was cancelled"))
        case "expire":
            error = DeadlineExceeded(f"the deadline of job {job_id} passed while it was generated")
            return _ended(attempt, JobStatus.EXPIRED, error)
        case "abort":
            error = Aborted(
                f"job {job_id} was ended by a pause in mode abort; submit it under another id"
            )
            return _ended(attempt, JobStatus.ABORTED, error)
        case "stale":
            error = StalenessExceeded(
                f"job {job_id} fell behind the wanted policy version by more than its max_staleness "
                "while it was generated"
            )
            return _ended(attempt, JobStatus.EXPIRED, error)
        case "hand back":
            return HandedBack(tuple(attempt.checkpoint.segments()))
        case "lost" | None:
            return Lost()
        case _:
            assert_never(attempt.order)


def _failed(attempt: Attempt, error: RolloutError) -> Outcome:
    if isinstance(error, JobError) and error.retryable:
        return Retried(error, tuple(attempt.checkpoint.segments()))
    return _ended(attempt, JobStatus.FAILED, error)


def _ended(attempt: Attempt, status: JobStatus, error: RolloutError) -> Ended:
    """Without an answer, but with the tokens so far in the rollout states."""
    lease, prompt = attempt.lease, attempt.prompt
    states = [
        sample.state(prompt, lease.job_id, index, cut_off=ROLLOUT_STATUS[status])
        for index, sample in enumerate(attempt.samples)
        if prompt is not None
    ]
    body = error_body(protocol_of(lease), error, lease.job_id)
    return Ended(status, error, body, codec.pack_states(states) if states else b"")
