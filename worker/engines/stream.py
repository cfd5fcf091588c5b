"""A call under way as its reader sees it: segments wait here until they are asked for.

Segments of one sample that wait together are delivered as one. What waits is bounded by what the call may generate
(`n x max_tokens`), so a slow reader holds nobody up. All methods belong to the event loop's thread; an engine that
runs in another thread hands over each step with one `loop.call_soon_threadsafe(put_all, batch)`. Putting needs
neither a task nor a lock.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import msgspec

from protocols.errors import RolloutError
from protocols.job import Segment
from protocols.rollout_state import Logprobs, TokenIds


def _ignore(_indices: Sequence[int]) -> None:
    pass


class SegmentStream:
    """A Generation that an engine puts segments into; it ends by itself after the last sample's last segment."""

    def __init__(self, samples: int, given_up: Callable[[Sequence[int]], None] = _ignore) -> None:
        """Of `samples` samples; `given_up` is told the indices that the reader stops before their end."""
        self._open = set(range(samples))
        self._given_up = given_up
        self._waiting: dict[int, list[Segment]] = {}
        self._failure: RolloutError | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, segment: Segment) -> None:
        """Add a sample's next segment; one that comes after the sample's end is dropped."""
        index = segment.index
        if index not in self._open:
            return
        if segment.finish_reason is not None:
            self._close([index])
        self._waiting.setdefault(index, []).append(segment)
        self._wake()

    def fail(self, failure: RolloutError) -> None:
        """Raise `failure` in the reader, once it has read what waits."""
        self._failure = failure
        self._wake()

    def stop(self, index: int) -> None:
        """End one sample here; what of it was not read yet is dropped."""
        if index in self._open:
            self._give_up([index])

    def close(self) -> None:
        """Give up every sample that has not ended; what was put before can still be read. May be called again."""
        if self._open:
            self._given_up(list(self._open))
            self._close(list(self._open))
            self._wake()

    def __aiter__(self) -> Self:
        """The stream itself: it has one reader."""
        return self

    async def __anext__(self) -> Segment:
        """The next segment, as soon as there is one."""
        while not self._waiting:
            if not self._open:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._take(next(iter(self._waiting)))

    def _take(self, index: int) -> Segment:
        run = self._waiting.pop(index)
        if len(run) == 1:
            return run[0]
        version = run[0].policy_version
        same = next((i for i, part in enumerate(run) if part.policy_version != version), len(run))
        if same < len(run):
            self._waiting[index] = run[same:]
        return _merged(run[:same])

    def _give_up(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._waiting.pop(index, None)
        self._given_up(indices)
        self._close(indices)
        self._wake()

    def _close(self, indices: Sequence[int]) -> None:
        self._open.difference_update(indices)
        if not self._open:
            # the engine's side refers to the stream: without this cycle both are freed at once
            self._given_up = _ignore

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def put_all(batch: Iterable[tuple[SegmentStream, Segment | RolloutError]]) -> None:
    """Put each segment into its stream; a failure ends its stream."""
    for stream, news in batch:
        if isinstance(news, Segment):
            stream.put(news)
        else:
            stream.fail(news)


def _merged(run: Sequence[Segment]) -> Segment:
    token_ids, logprobs, top_ids, top_logprobs = TokenIds(), Logprobs(), TokenIds(), Logprobs()
    for part in run:
        token_ids.extend(part.token_ids)
        logprobs.extend(part.logprobs)
        top_ids.extend(part.top_ids)
        top_logprobs.extend(part.top_logprobs)
    return msgspec.structs.replace(
        run[0],
        token_ids=token_ids,
        logprobs=logprobs,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        finish_reason=run[-1].finish_reason,
        routed_experts=run[-1].routed_experts,
    )
