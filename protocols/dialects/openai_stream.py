"""What the streams of OpenAI's protocols share."""

from collections.abc import Callable

import msgspec

from protocols.dialects.result import finite
from protocols.dialects.sse import raw_data
from protocols.job import Segment


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    """An alternative at one position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """One generated token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChunkLogprobs(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a chunk, those included whose text comes later or never."""

    content: list[TokenLogprob]
    refusal: None = None


def error_frame(body: bytes) -> bytes:
    """The event that ends a stream which cannot go on: clients raise what they find under `error`."""
    return raw_data(body)


def logprobs_of(segment: Segment, wide: int, token_bytes: Callable[[int], bytes]) -> ChunkLogprobs:
    """Of a segment with `wide` alternatives at each position."""
    alternatives = zip(segment.top_ids, finite(segment.top_logprobs), strict=True)
    tops = [TopLogprob(*_spelled(i, logprob, token_bytes)) for i, logprob in alternatives]
    tokens = zip(segment.token_ids, finite(segment.logprobs), strict=True)
    return ChunkLogprobs(
        [
            TokenLogprob(*_spelled(i, logprob, token_bytes), tops[at * wide : (at + 1) * wide])
            for at, (i, logprob) in enumerate(tokens)
        ]
    )


def _spelled(
    token_id: int, logprob: float, token_bytes: Callable[[int], bytes]
) -> tuple[str, float, list[int]]:
    data = token_bytes(token_id)
    return data.decode(errors="replace"), logprob, list(data)
