"""What of an attempt's tokens the server has, and what it has not yet.

The event loop's thread appends to the samples while the lease keeper's thread reads them here: a
sample only grows, and what is read is a copy of its first tokens.
"""

import time
from collections.abc import Sequence
from itertools import pairwise

from protocols.job import Segment
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from worker.parse import Sample


class Checkpoint:
    """Of one attempt."""

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


def _new(sample: Sample, index: int, start: int) -> list[Segment]:
    # in this order: where there is a reason, all tokens are there
    finish_reason, end = sample.finish_reason, len(sample.ids)
    if end <= start:
        return []
    cuts = [start, *(at for _, at in sample.versions if start < at < end), end]
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
