"""One sample of a call: its request to the server, and its tokens on their way into the call's stream."""

import asyncio
import logging
import secrets
from collections.abc import Callable

import msgspec

from protocols.errors import EngineFailed, RequestError
from protocols.job import Segment
from protocols.rollout_state import FinishReason, SampleParams
from worker.engines.stream import SegmentStream

from .server import Away, Server
from .settings import Settings
from .wire import Ask, Drawn, ask, read_event

_LEAST_SESSION, _SESSIONS = 2**48, 2**53
"""A server compares session ids with small ones of its own; greater ones are no exact JSON numbers to everybody."""

log = logging.getLogger("rolloutq.engine")


class Totals:
    """What all samples of an engine came to."""

    def __init__(self) -> None:
        self.forwarded_tokens = self.generated_tokens = 0


class Sample(msgspec.Struct, frozen=True):
    """What is to be drawn."""

    index: int
    input_ids: list[int]
    """Prompt, then what is kept of the response."""
    start: int
    """Tokens that are kept."""
    most: int
    """Tokens that may be drawn."""
    whole: FinishReason | None
    """Why nothing is left to be drawn."""
    params: SampleParams
    stop_ids: frozenset[int]
    vocabulary: int


class Reader:
    """A sample's task; it ends by itself, or is given up."""

    def __init__(
        self,
        sample: Sample,
        server: Server,
        settings: Settings,
        slots: asyncio.Semaphore,
        totals: Totals,
        version: Callable[[], int],
    ) -> None:
        """`version` is the policy version that the server holds."""
        self._sample, self._server, self._settings = sample, server, settings
        self._slots, self._totals, self._version = slots, totals, version
        self._drawn = sample.start
        self._forwarded = False
        self._task: asyncio.Task[None] | None = None
        self._stream: SegmentStream | None = None
        self._session: int | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self.running = False
        """Whether it has a slot."""
        self.ended = False
        """Whether its call waits for nothing more of it; its connection may still be closing."""

    def start(self, stream: SegmentStream) -> asyncio.Task[None]:
        """Begin to draw into a stream."""
        self._stream = stream
        self._task = asyncio.create_task(self._run(stream))
        return self._task

    def give_up(self) -> None:
        """Draw no more: abort the request, then close its connection."""
        self.ended = True
        if self._session is None:
            self._end()
        elif self._giving_up is None:
            self._giving_up = asyncio.create_task(self._abort(self._session))

    def break_off(self, error: EngineFailed) -> None:
        """Give up, and raise `error` in the call's reader, where that waits for more."""
        if self._stream is not None and not self.ended:
            self._stream.fail(error)
        self.give_up()

    async def _abort(self, session_id: int) -> None:
        try:
            async with asyncio.timeout(self._settings.abort_limit_s):
                await self._server.abort(session_id)
        except TimeoutError:
            log.warning("the server did not abort a request in time; its connection is closed")
        finally:
            self._end()

    def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self, stream: SegmentStream) -> None:
        try:
            async with self._slots:
                self.running = True
                await self._draw(stream)
        except (EngineFailed, RequestError) as error:
            if not self.ended:  # else it is how the server tells of the abort
                stream.fail(error)
        except Exception:  # a task that broke in silence would leave its job waiting for ever
            log.exception("a sample's request broke")
            stream.fail(EngineFailed("the engine broke on this sample; its worker's log tells why"))
        finally:
            self.running, self.ended = False, True

    async def _draw(self, stream: SegmentStream) -> None:
        if self._sample.whole is not None:
            stream.put(self._segment(Drawn(finish_reason=self._sample.whole)))
            return
        give_up_at = asyncio.get_running_loop().time() + self._settings.away_limit_s
        while True:
            left_s = give_up_at - asyncio.get_running_loop().time()
            await self._server.wait_until_up(max(left_s, 0))
            try:
                await self._read(self._ask(), stream)
            except Away:
                continue
            return

    def _ask(self) -> Ask:
        sample = self._sample
        session_id = _LEAST_SESSION + secrets.randbelow(_SESSIONS - _LEAST_SESSION)
        return ask(sample.params, session_id, sample.input_ids, sample.most, sample.stop_ids)

    async def _read(self, body: Ask, stream: SegmentStream) -> None:
        """From the request to its last event; raises Away, EngineFailed or RequestError."""
        self._session = body.session_id
        limit_s = self._settings.first_token_limit_s
        try:
            async with asyncio.timeout(limit_s) as limit, self._server.stream(body) as answer:
                async for event in answer:
                    if self._take(event, stream):
                        return
                    limit_s = self._settings.stall_limit_s
                    limit.reschedule(asyncio.get_running_loop().time() + limit_s)
        except TimeoutError:
            raise EngineFailed(f"the server sent no token for {limit_s:g} s") from None
        finally:
            self._session = None
        raise EngineFailed("the server ended a stream in its midst")

    def _take(self, event: bytes, stream: SegmentStream) -> bool:
        """Pass an event's tokens on; returns whether it was the last."""
        sample, totals = self._sample, self._totals
        drawn = read_event(event, sample.params.top_logprobs, sample.vocabulary)
        if not self._forwarded:
            self._forwarded = True
            totals.forwarded_tokens += len(sample.input_ids) - 1  # the last token is not forwarded
        totals.forwarded_tokens += len(drawn.token_ids)
        totals.generated_tokens += len(drawn.token_ids)
        self.ended = self.ended or drawn.finish_reason is not None
        stream.put(self._segment(drawn))
        return drawn.finish_reason is not None

    def _segment(self, drawn: Drawn) -> Segment:
        start = self._drawn
        self._drawn += len(drawn.token_ids)
        return Segment(
            index=self._sample.index,
            start=start,
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            top_ids=drawn.top_ids,
            top_logprobs=drawn.top_logprobs,
            policy_version=self._version(),
            finish_reason=drawn.finish_reason,
        )
