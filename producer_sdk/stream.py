"""A job's answer while it is generated: its segments, or the frames of its protocol, from the start and nothing twice.

Each reader has a place of its own in the job's progress stream, and keeps of what it has shown the token ids alone.
Where the server has lost the job and it runs again, what comes again is compared with these and left out. A stream
that cannot go on ends in an error: reading segments raises it, frames carry it as their protocol does.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from producer_sdk.courier import Courier
from producer_sdk.following import Feed
from producer_sdk.future import Future, Pending
from producer_sdk.promise import Promise
from protocols.dialects import dialect_of
from protocols.errors import RolloutError, ServerUnavailable
from protocols.job import DEFAULT_PROTOCOL, JobStatus, Reply, Segment
from protocols.queue.rows import End
from protocols.rollout_state import Logprobs, RolloutState, TokenIds

Item = TypeVar("Item")
Batch = list[Segment | End]


class Source(NamedTuple):
    """What is read."""

    courier: Courier
    reply: Future[Reply]
    inner: Promise[Reply]
    """What `reply` waits for."""
    protocol: "Pending[str | None]"
    """The job's dialect; None where the job is unknown."""


class Reader(ABC, Generic[Item]):
    """One way through a stream, for `for` or `async for`, once."""

    _complete = False
    """Whether all was shown."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._feed = Feed(source.reply.job_id, source.inner)
        self._shown: dict[int, TokenIds] = {}
        self._going = True
        self._again = self._was_again = False

    def __iter__(self) -> Iterator[Item]:
        """Block until there is more."""
        courier, reply, _, protocol = self._source
        try:
            while self._going:
                try:
                    batch = courier.pull(self._feed, again=self._asks_again()).result()
                except RolloutError as error:
                    yield from self._last(error, _known_protocol(protocol))
                    return
                yield from self._take(batch)
            if not self._complete:
                error = reply.exception()
                ended = error if isinstance(error, RolloutError) else reply.result()
                yield from self._last(ended, protocol.result() or DEFAULT_PROTOCOL)
        finally:
            courier.leave(self._feed)

    async def __aiter__(self) -> AsyncIterator[Item]:
        """Wait in the event loop until there is more."""
        courier, reply, _, protocol = self._source
        try:
            while self._going:
                try:
                    batch = await Pending(
                        courier.pull(self._feed, again=self._asks_again()), "stream"
                    )
                except RolloutError as error:
                    for item in self._last(error, _known_protocol(protocol)):
                        yield item
                    return
                for item in self._take(batch):
                    yield item
            if not self._complete:
                try:
                    ended: Reply | RolloutError = await reply
                except RolloutError as error:
                    ended = error
                for item in self._last(ended, (await protocol) or DEFAULT_PROTOCOL):
                    yield item
        finally:
            courier.leave(self._feed)

    @abstractmethod
    def _show(self, segment: Segment, known_tokens: int) -> Iterator[Item]:
        """What a segment adds, of which so many tokens were shown before."""

    @abstractmethod
    def _end(self, end: End) -> Iterator[Item]:
        """What comes after the last segment."""

    @abstractmethod
    def _last(self, ended: Reply | RolloutError, protocol: str) -> Iterator[Item]:
        """What is left to be shown when the entries are not all, or the job did not complete."""

    def _asks_again(self) -> bool:
        again, self._again = self._again, False
        return again

    def _take(self, batch: Batch) -> Generator[Item]:
        if not batch:
            self._lack()
        for entry in batch:
            if isinstance(entry, End):
                if entry.frames and entry.tokens != sum(map(len, self._shown.values())):
                    self._lack()
                else:
                    self._going = False
                    yield from self._end(entry)
                return
            known = self._known(entry)
            if known is None:
                self._lack()
                return
            yield from self._show(entry, known)
            if not self._going:
                return
            self._shown.setdefault(entry.index, TokenIds()).extend(entry.token_ids[known:])

    def _lack(self) -> None:
        """Something is missing: look again from the start, once; entries of another server may be out of order."""
        self._again, self._going = not self._was_again, not self._was_again
        self._was_again = True

    def _known(self, segment: Segment) -> int | None:
        """How many of its tokens were shown; None where it does not continue them."""
        shown = self._shown.get(segment.index, TokenIds())
        known = len(shown) - segment.start
        overlap = segment.token_ids[: max(known, 0)]
        if known < 0 or shown[segment.start : segment.start + len(overlap)] != overlap:
            return None
        return len(overlap)


class Segments(Reader[Segment]):
    """Segments as they come; what no checkpoint had is taken from the reply."""

    def _show(self, segment: Segment, known_tokens: int) -> Iterator[Segment]:
        if known_tokens < len(segment.token_ids):
            yield _after(segment, known_tokens) if known_tokens else segment

    def _end(self, end: End) -> Iterator[Segment]:
        self._complete = bool(end.frames)
        return iter(())

    def _last(self, ended: Reply | RolloutError, protocol: str) -> Iterator[Segment]:
        if isinstance(ended, RolloutError):
            raise ended
        for state in ended.states:
            shown = self._shown.get(state.index, TokenIds())
            if state.response_ids[: len(shown)] != shown:
                raise _lost(ended.job_id)
            yield from _tail(state, len(shown))
        ended.raise_for_status()


class Frames(Reader[bytes]):
    """Server-sent events in the job's protocol; what ends badly ends in the protocol's error."""

    _begun = False

    @property
    def ended(self) -> bool:
        """Whether what came last is the end; true before that is handed out."""
        return self._complete

    def _show(self, segment: Segment, known_tokens: int) -> Iterator[bytes]:
        if segment.frames and 0 < known_tokens < len(segment.token_ids):
            self._going = False  # frames cannot be cut
        elif segment.frames and not known_tokens:
            self._begun = True
            yield segment.frames

    def _end(self, end: End) -> Iterator[bytes]:
        if end.frames:
            self._complete = True
            yield end.frames

    def _last(self, ended: Reply | RolloutError, protocol: str) -> Iterator[bytes]:
        dialect, job_id = dialect_of(protocol), self._source.reply.job_id
        self._complete = True
        if isinstance(ended, Reply):
            if ended.status is not JobStatus.COMPLETED:
                yield dialect.error_frame(ended.body)
                return
            if not self._begun and not ended.tombstone:
                yield dialect.replay(ended.body)
                return
            ended = ended.exception() if ended.tombstone else _lost(job_id)
        yield dialect.error_frame(dialect.error(ended, job_id))


class Stream:
    """One job that is followed. Whatever reads it begins at the start of the response, however often."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.reply = source.reply
        """The whole answer, as `submit` gives it."""
        self.job_id = source.reply.job_id

    def __iter__(self) -> Iterator[Segment]:
        """Segments as they come; raises the job's error where it does not complete."""
        return iter(Segments(self._source))

    def __aiter__(self) -> AsyncIterator[Segment]:
        """Segments as they come; raises the job's error where it does not complete."""
        return aiter(Segments(self._source))

    def frames(self) -> Frames:
        """Server-sent events in the job's protocol, for `for` and `async for`; the last may be the protocol's error."""
        return Frames(self._source)

    def cancel(self) -> Pending[int]:
        """Cancel the job itself; its stream then ends."""
        return self.reply.cancel()


def _known_protocol(protocol: "Pending[str | None]") -> str:
    """The job's dialect as far as it is known: nobody can be asked any more."""
    known = protocol.result() if protocol.done() and protocol.exception() is None else None
    return known or DEFAULT_PROTOCOL


def _lost(job_id: str) -> RolloutError:
    return ServerUnavailable(
        f"the server has lost a part of the stream of job {job_id}; client.get(job_id) has its reply"
    )


def _after(segment: Segment, tokens: int) -> Segment:
    wide = len(segment.top_ids) // len(segment.token_ids)
    return replace(
        segment,
        start=segment.start + tokens,
        token_ids=segment.token_ids[tokens:],
        logprobs=segment.logprobs[tokens:],
        top_ids=segment.top_ids[tokens * wide :],
        top_logprobs=segment.top_logprobs[tokens * wide :],
        frames=b"",
    )


def _tail(state: RolloutState, start: int) -> Iterator[Segment]:
    """What a sample has from there on, cut where the policy version changes."""
    total, wide = len(state.response_ids), state.sample_params.top_logprobs
    inner = [at for _, at in state.policy_versions if start < at < total]
    for at, until in pairwise([start, *inner, total]) if start < total else ():
        yield Segment(
            index=state.index,
            start=at,
            token_ids=TokenIds(state.response_ids[at:until]),
            logprobs=Logprobs(state.logprobs[at:until]),
            top_ids=TokenIds(state.top_ids[at * wide : until * wide]),
            top_logprobs=Logprobs(state.top_logprobs[at * wide : until * wide]),
            policy_version=next(v for v, begun in reversed(state.policy_versions) if begun <= at),
            finish_reason=state.finish_reason if until == total else None,
        )
