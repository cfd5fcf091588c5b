"""Samples on their way through lmdeploy: each has a session and a task of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from protocols.cancellation import cancel
from protocols.errors import EngineFailed, RolloutError
from protocols.job import Segment
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from worker.engines.base import Call, Counters
from worker.engines.guide import Guides, Matcher
from worker.engines.stream import SegmentStream
from worker.engines.weights import busy

from .penalty import LogitBias, RepetitionPenalty
from .pipeline import Drawn, Pipeline, Session
from .request import Room, Wanted, ended_by, kept_of, wanted

BLOCK_TOKENS = 64
"""lmdeploy's prefix cache has whole blocks of so many."""
_ENDED = "the lmdeploy engine ended before the sample did; another worker can take the job"


class Sample:
    """One sample that is not whole."""

    def __init__(self, call: Call, index: int, kept: TokenIds, room: Room) -> None:
        self.index = index
        self.tokens = len(kept)
        """That it has so far."""
        self.wide = call.params.top_logprobs
        self.input_ids = [*call.prompt_ids, *kept]
        self.wanted: Wanted = wanted(call, index, len(kept), room)
        self.call = call
        self.matcher: Matcher | None = None
        """Of a sample with a guide, once that is compiled."""
        self.begun = asyncio.Event()
        """Set when lmdeploy has drawn of it, or will not."""
        self.leader: Sample | None = None
        """Whose beginning is waited for, since it leaves the prompt in the prefix cache."""
        self.session: Session | None = None
        """While lmdeploy has it."""
        self.ended = False
        """Whether it is finished, or its reader gave it up."""

    def processors(self) -> "list[LogitBias | RepetitionPenalty]":
        """What changes its logits, in order."""
        params = self.call.params
        made: list[LogitBias | RepetitionPenalty] = []
        if params.logit_bias:
            made.append(LogitBias(params.logit_bias))
        if params.repetition_penalty != 1:
            made.append(RepetitionPenalty(params.repetition_penalty, self.input_ids))
        return made

    def segment(self, drawn: Drawn, policy_version: int) -> Segment:
        """What was drawn, behind what it has."""
        top = [_likeliest(one, self.wide) for one in drawn.logprobs] if self.wide else []
        made = Segment(
            index=self.index,
            start=self.tokens,
            token_ids=TokenIds(drawn.token_ids),
            logprobs=Logprobs(
                one[i] for i, one in zip(drawn.token_ids, drawn.logprobs, strict=True)
            ),
            top_ids=TokenIds(token_id for row in top for token_id, _ in row),
            top_logprobs=Logprobs(logprob for row in top for _, logprob in row),
            policy_version=policy_version,
            finish_reason=drawn.finish_reason,
            routed_experts=drawn.routed_experts,
        )
        self.tokens += len(drawn.token_ids)
        self.ended = self.ended or drawn.finish_reason is not None
        return made


class Drawer:
    """Draws as many samples at once as lmdeploy has handles; the others wait here, where they can be given up."""

    def __init__(
        self,
        pipeline: Pipeline,
        guides: Guides,
        slots: int,
        policy_version: Callable[[], int],
        look: Callable[[], Awaitable[None]],
    ) -> None:
        """`policy_version`: of the weights that draw now; `look` tells if lmdeploy is broken."""
        self._pipeline, self._guides = pipeline, guides
        self._free = asyncio.Semaphore(slots)
        self._policy_version, self._look = policy_version, look
        self._tasks: dict[asyncio.Task[None], Sample] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._forwarded_tokens = self._generated_tokens = 0
        self._closing = False

    def begin(self, call: Call, room: Room) -> SegmentStream:
        """The stream of a call that `room` has checked."""
        samples: dict[int, Sample] = {}

        def give_up(indices: Sequence[int]) -> None:
            for index in indices:
                if index in samples:
                    self._give_up(samples[index])

        stream = SegmentStream(call.params.n, give_up)
        for index, kept in enumerate(kept_of(call)):
            reason = ended_by(kept, call, room)
            if index in call.ended:
                stream.stop(index)
            elif reason is not None:
                stream.put(_nothing_more(index, len(kept), reason, self._policy_version()))
            else:
                samples[index] = Sample(call, index, kept, room)
        leader = self._leader(samples.values())
        for sample in samples.values():
            sample.leader = None if sample is leader else leader
            task = asyncio.create_task(self._see_through(sample, stream))
            self._tasks[task] = sample
            task.add_done_callback(self._tasks.pop)
        return stream

    def counters(self) -> Counters:
        """Load and totals; may be called from another thread."""
        under_way = [sample for sample in list(self._tasks.values()) if not sample.ended]
        running = sum(sample.session is not None for sample in under_way)
        return Counters(
            running_samples=running,
            waiting_samples=len(under_way) - running,
            forwarded_tokens=self._forwarded_tokens,
            generated_tokens=self._generated_tokens,
        )

    def _leader(self, samples: Iterable[Sample]) -> Sample | None:
        """The sample that goes first, where that spares the others the prompt."""
        first = next(iter(samples), None)
        shared = first is not None and len(first.input_ids) > BLOCK_TOKENS
        return first if shared and self._pipeline.shares else None

    async def rest(self, limit_s: float) -> None:
        """Wait until what was given up has left lmdeploy; raises EngineBusy while a sample is under way."""
        under_way = sum(not sample.ended for sample in self._tasks.values())
        if under_way:
            raise busy(under_way)
        if self._tasks:
            _, left = await asyncio.wait(set(self._tasks), timeout=limit_s)
            if left:
                raise EngineFailed(
                    f"lmdeploy did not come to rest within {limit_s:.0f} s; its worker must be restarted"
                )

    async def close(self) -> None:
        """End everything; streams that are open fail."""
        # not by cancelling alone: lmdeploy swallows some, and would draw on until the next
        self._closing = True
        await cancel(*self._tasks, *self._aborts)

    def _give_up(self, sample: Sample) -> None:
        sample.ended = True
        if sample.session is not None:
            abort = asyncio.create_task(sample.session.abort())
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)

    async def _see_through(self, sample: Sample, stream: SegmentStream) -> None:
        failure: RolloutError = EngineFailed(_ENDED)
        try:
            if sample.call.params.guide is not None:
                sample.matcher = await self._guides.matcher(sample.call, sample.index)
            if sample.leader is not None:
                await sample.leader.begun.wait()
            async with self._free:
                if not sample.ended:
                    await self._draw(sample, stream)
            failure = EngineFailed("lmdeploy gave the sample up before its end")
        except RolloutError as error:
            failure = error
            await self._look()  # first: whoever reads the failure must not send the job here again
        finally:
            sample.begun.set()
            if not sample.ended:
                sample.ended = True
                stream.fail(failure)

    async def _draw(self, sample: Sample, stream: SegmentStream) -> None:
        session = sample.session = self._pipeline.session()
        try:
            drawing = session.draw(
                sample.input_ids, sample.wanted, sample.processors(), sample.matcher
            )
            async for drawn in drawing:
                if self._closing:
                    raise EngineFailed(_ENDED)
                self._count(sample, drawn)
                sample.begun.set()
                if sample.matcher is not None and sample.matcher.failure is not None:
                    await session.abort()
                    raise sample.matcher.failure
                if sample.ended:
                    await session.abort()  # again: one that comes too early is lost
                else:
                    stream.put(sample.segment(drawn, self._policy_version()))
        finally:
            sample.session = None

    def _count(self, sample: Sample, drawn: Drawn) -> None:
        self._generated_tokens += len(drawn.token_ids)
        self._forwarded_tokens += len(drawn.token_ids)
        if not sample.begun.is_set():  # with its first token, and the last of all is not forwarded
            self._forwarded_tokens += len(sample.input_ids) - drawn.cached_tokens - 1


def _likeliest(logprobs: Mapping[int, float], most: int) -> list[tuple[int, float]]:
    """Lmdeploy gives as many as the most demanding request of the batch wants, and the token drawn."""
    return sorted(logprobs.items(), key=lambda one: (-one[1], one[0]))[:most]


def _nothing_more(index: int, start: int, reason: FinishReason, version: int) -> Segment:
    return Segment(
        index=index,
        start=start,
        token_ids=TokenIds(),
        logprobs=Logprobs(),
        top_ids=TokenIds(),
        top_logprobs=Logprobs(),
        policy_version=version,
        finish_reason=reason,
    )
