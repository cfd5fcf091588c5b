"""The frames of `generate`: parts of the whole response, then what only its end knows, and `[DONE]`.

Each event has `id`, `model` and `samples`. A sample's `text`, `response_ids`, `logprobs` and `top_logprobs` are what is
new; `start` is the position of its first token. The last event has of each sample what else the whole response has of
it, and `prompt_ids`, `usage` and `rollout`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from protocols.codec import decode_json
from protocols.dialects.base import Answer, Piece, Streamed
from protocols.dialects.openai_stream import part_of, text_of
from protocols.dialects.result import finite, tops_of
from protocols.dialects.sse import DONE, data
from protocols.job import Segment


class Part(msgspec.Struct, frozen=True, gc=False):
    """What is new of one sample."""

    index: int
    start: int
    text: str
    response_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    policy_version: int


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event."""

    id: str
    model: str
    samples: tuple[Part, ...]


class GenerateStream:
    """Of one job."""

    plain = True

    def __init__(self, streamed: Streamed, respond: Callable[[Answer], bytes]) -> None:
        """`respond` makes the whole response."""
        self._streamed, self._respond = streamed, respond

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def add(self, segment: Segment, pieces: Sequence[Piece]) -> bytes:
        """One event."""
        state = part_of(self._streamed.states[segment.index], segment)
        params = state.sample_params
        part = Part(
            segment.index,
            segment.start,
            text_of(pieces),
            segment.token_ids.tolist(),
            finite(segment.logprobs) if params.return_logprob else None,
            tops_of(state) if params.return_logprob and params.top_logprobs else None,
            segment.policy_version,
        )
        return data(Event(self._streamed.job_id, self._streamed.model, (part,)))

    def end(self, answer: Answer, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What was held back and how it ended."""
        whole = decode_json(self._respond(answer))
        for sample, pieces in zip(whole["samples"], rest, strict=True):
            sample["text"] = text_of(pieces)
            _drop_tokens(sample)
        return data(whole) + DONE


def _drop_tokens(sample: dict[str, Any]) -> None:
    sample["start"] = len(sample["response_ids"])
    sample["response_ids"] = []
    for name in ("logprobs", "top_logprobs"):
        sample[name] = None if sample[name] is None else []


def replay(body: bytes) -> bytes:
    """The frames of a whole response: all of it in one event."""
    whole = decode_json(body)
    for sample in whole["samples"]:
        sample["start"] = 0
    return data(whole) + DONE
