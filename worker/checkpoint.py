"""What of an attempt's tokens the server has, and what it has not yet.

The event loop's thread appends to the samples while the lease keeper's thread reads them here: a
sample only grows, and what is read is a copy of its first tokens.
"""

import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

from protocols.errors import EngineFailed
from protocols.job import Segment
from protocols.queue.rows import segment_bytes
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from worker.framer import Framer
from worker.parse import Sample

UNIT_TOKENS = 256
"""Most tokens that share frames: bounds what one segment weighs, and how long the lease keeper's loop is held."""
PORTION_BYTES = 1024 * 1024
"""About the most that one renewal carries of one job."""

log = logging.getLogger("rolloutq.checkpoint")


class Checkpoint:
    """Of one attempt."""

    streamed = False
    """Whether somebody waits for every token."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """What the samples have already came from the server."""
        self._samples = samples
        self._written = [len(sample.ids) for sample in samples]
        self._written_s = time.monotonic()
        self.grown = False
        """Whether this attempt has added to it."""

    @property
    def new_tokens(self) -> int:
        """Generated since the last checkpoint."""
        return sum(len(sample.ids) for sample in self._samples) - sum(self._written)

    def due(self, tokens: int, seconds: float) -> bool:
        """Whether so many tokens are new, or some are and the last checkpoint is so long ago."""
        new = self.new_tokens
        return new >= tokens or (new > 0 and time.monotonic() - self._written_s >= seconds)

    def segments(self) -> list[Segment]:
        """What is new, in order, cut where the policy version changes."""
        marks = zip(self._samples, self._written, strict=True)
        return [
            segment
            for index, (sample, start) in enumerate(marks)
            for segment in _new(sample, index, start)
        ]

    def written(self, segments: Sequence[Segment]) -> None:
        """The server has these."""
        for segment in segments:
            self._written[segment.index] = segment.start + len(segment.token_ids)
            self.grown = True
        self._written_s = time.monotonic()

    def rewind(self) -> None:
        """The server may have nothing: the next checkpoint is whole."""
        self._written = [0] * len(self._samples)


class StreamedCheckpoint(Checkpoint):
    """Of an attempt whose segments carry frames.

    Frames cannot be cut. So a segment, once cut, stays as it is: repeated, it is the same bytes, whoever sends it. Both
    threads cut, one at a time.
    """

    streamed = True

    def __init__(
        self,
        samples: Sequence[Sample],
        framer: Framer,
        kept: Sequence[Segment],
        wanted: Iterable[tuple[int, int]] = (),
    ) -> None:
        """`kept` is what the samples have from earlier attempts; a segment ends at each `wanted` (sample, tokens)."""
        super().__init__(samples)
        self._framer, self._wanted = framer, frozenset(wanted)
        self._cutting = threading.Lock()
        self._cuts = [(one.index, one.start, one.start + len(one.token_ids)) for one in kept]
        self._cut = self._written[:]
        self._unwritten: list[Segment] = []
        self._ended = False
        for segment in kept:
            framer.add(segment)

    def due(self, tokens: int, seconds: float) -> bool:
        """Whether there is anything new."""
        return not self._ended and (bool(self._unwritten) or self._grown)

    @property
    def _grown(self) -> bool:
        return any(len(one.ids) > cut for one, cut in zip(self._samples, self._cut, strict=True))

    def segments(self) -> list[Segment]:
        """What is new, in order, as far as one call should carry it; nothing once the attempt has ended."""
        with self._cutting:
            if self._ended:
                return []
            try:
                self._cut_new(UNIT_TOKENS)
            except Exception:  # in the keeper's thread: the job fails by it, not the worker
                log.exception("frames could not be made")
                self._framer, self._ended = _Broken(), True
                return []
            return portion(self._unwritten)

    def rest(self, body: bytes) -> tuple[list[Segment], bytes]:
        """All that the server may lack, and the last frames; nothing is carried by renewals from then on.

        `body` is the whole response.
        """
        with self._cutting:
            self._cut_new()
            self._ended = True
            return self._unwritten[:], self._framer.end(body)

    def written(self, segments: Sequence[Segment]) -> None:
        """The server has these."""
        with self._cutting:
            del self._unwritten[: len(segments)]
        super().written(segments)

    def rewind(self) -> None:
        """The server may have nothing: every segment again, as it was."""
        with self._cutting:
            if self._ended:
                return
            super().rewind()
            self._framer.restart()
            self._unwritten = [
                self._framer.add(_cut(self._samples[index], index, start, end, None))
                for index, start, end in self._cuts
            ]

    def _cut_new(self, most_tokens: float = math.inf) -> None:
        """Make segments of what is new, up to so many tokens; the rest is new the next time."""
        tokens = 0
        for index, sample in enumerate(self._samples):
            at = self._cut[index]
            marks = {end for i, end in self._wanted if i == index}
            marks.update(range(at, len(sample.ids), UNIT_TOKENS))
            for segment in _new(sample, index, at, marks):
                self._cut[index] = segment.start + len(segment.token_ids)
                self._cuts.append((index, segment.start, self._cut[index]))
                self._unwritten.append(self._framer.add(segment))
                tokens += len(segment.token_ids)
                if tokens >= most_tokens:
                    return


class _Broken(Framer):
    """In the place of one that failed."""

    def __init__(self) -> None:
        pass

    def add(self, segment: Segment) -> Segment:
        raise EngineFailed("the worker broke on this job's stream; its log tells why")

    def end(self, body: bytes) -> bytes:
        raise EngineFailed("the worker broke on this job's stream; its log tells why")


def portion(segments: Sequence[Segment], most_bytes: int = PORTION_BYTES) -> list[Segment]:
    """The first of them, at least one if there are any, up to so many bytes."""
    taken, total = 0, 0
    for segment in segments:
        total += segment_bytes((segment,))
        if taken and total > most_bytes:
            break
        taken += 1
    return list(segments[:taken])


def _new(sample: Sample, index: int, start: int, marks: Iterable[int] = ()) -> list[Segment]:
    # in this order: where there is a reason, all tokens are there
    finish_reason, end = sample.finish_reason, len(sample.ids)
    if end <= start:
        return []
    within = {at for at in (*marks, *(at for _, at in sample.versions)) if start < at < end}
    cuts = [start, *sorted(within), end]
    return [
        _cut(sample, index, at, until, finish_reason if until == end else None)
        for at, until in pairwise(cuts)
    ]


def _cut(
    sample: Sample, index: int, at: int, until: int, finish_reason: FinishReason | None
) -> Segment:
    wide = sample.wide
    return Segment(
        index=index,
        start=at,
        token_ids=TokenIds(sample.ids[at:until]),
        logprobs=Logprobs(sample.logprobs[at:until]),
        top_ids=TokenIds(sample.top_ids[at * wide : until * wide]),
        top_logprobs=Logprobs(sample.top_logprobs[at * wide : until * wide]),
        policy_version=next(version for version, begun in reversed(sample.versions) if begun <= at),
        finish_reason=finish_reason,
    )
