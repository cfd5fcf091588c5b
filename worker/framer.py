"""The frames of one attempt: from tokens to what the views of the samples show, to the dialect's own bytes.

The frames of a segment follow from the tokens so far and from where segments were cut before, and from nothing else:
an attempt that is given the segments of the ones before goes on with the very next byte.
"""

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from protocols.dialects.base import Stream
from protocols.job import Segment
from worker.parse import Sample


class Framer:
    """Of one attempt."""

    def __init__(
        self, stream: Callable[[], Stream], samples: Sequence[Sample], job_id: str
    ) -> None:
        """`stream` makes a fresh one; `samples` are those whose tokens will be added."""
        self._make, self._samples, self._job_id = stream, samples, job_id
        self.restart()

    def restart(self) -> None:
        """As if nothing had been added."""
        self._stream = self._make()
        self._views = [
            sample.view(f"{self._job_id}/{index}", plain=self._stream.plain)
            for index, sample in enumerate(self._samples)
        ]
        self._begun = False

    def add(self, segment: Segment) -> Segment:
        """The segment with its frames."""
        begin = self._begin()
        pieces = self._views[segment.index].feed(segment.token_ids)
        return replace(segment, frames=begin + self._stream.add(segment, pieces))

    def end(self, body: bytes) -> bytes:
        """What comes after the last segment; `body` is the whole response."""
        begin = self._begin()
        return begin + self._stream.end(body, [view.end() for view in self._views])

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._stream.begin()
