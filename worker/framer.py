"""The frames of one attempt: from tokens to what the views of the samples show, to the dialect's own bytes.

The frames of a segment follow from the tokens so far and from where segments were cut before, and from nothing else:
an attempt that is given the segments of the ones before goes on with the very next byte.
"""

import codecs
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from protocols.dialects.base import Answer, Piece, Stream
from protocols.job import Segment
from protocols.rollout_state import SampleParams
from worker.engines.base import Tokenizer


class View:
    """Text alone."""

    def __init__(self, params: SampleParams, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._open = False

    def feed(self, token_ids: Sequence[int]) -> list[Piece]:
        """What these tokens add."""
        ids = [i for i in token_ids if i < 256]
        return self._piece(b"".join(map(self._tokenizer.token_bytes, ids)), final=False)

    def end(self) -> list[Piece]:
        """What was held back."""
        return self._piece(b"", final=True)

    def _piece(self, data: bytes, *, final: bool) -> list[Piece]:
        text = self._decode(data, final)
        if not text:
            return []
        opens, self._open = not self._open, True
        return [Piece("text", text, opens)]


class Framer:
    """Of one attempt."""

    def __init__(
        self, stream: Callable[[], Stream], view: Callable[[], View], *, samples: int
    ) -> None:
        """`stream` and `view` make fresh ones; `samples` is how many there are."""
        self._make_stream, self._make_view, self._samples = stream, view, samples
        self.restart()

    def restart(self) -> None:
        """As if nothing had been added."""
        self._stream = self._make_stream()
        self._views = [self._make_view() for _ in range(self._samples)]
        self._begun = False

    def add(self, segment: Segment) -> Segment:
        """The segment with its frames."""
        begin = self._begin()
        pieces = self._views[segment.index].feed(segment.token_ids)
        return replace(segment, frames=begin + self._stream.add(segment, pieces))

    def end(self, answer: Answer) -> bytes:
        """What comes after the last segment."""
        begin = self._begin()
        return begin + self._stream.end(answer, [view.end() for view in self._views])

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._stream.begin()
