"""The frames of `generate`: parts of the whole response, then what only its end knows, and `[DONE]`.

Each event has `id`, `model` and `samples`. A sample's `text`, `response_ids`, `logprobs` and `top_logprobs` are what is
new; `start` is the position of its first token. The last event has of each sample what else the whole response has of
it, and `prompt_ids`, `usage` and `rollout`.
"""

from collections.abc import Sequence

import msgspec
from msgspec import Raw

from protocols.codec import encode_json
from protocols.dialects.base import Piece, Streamed
from protocols.dialects.openai_stream import part_of, text_of
from protocols.dialects.result import finite, tops_of
from protocols.dialects.sse import DONE, data
from protocols.job import Segment

NULL = Raw(b"null")
_decoder = msgspec.json.Decoder(dict[str, Raw])
_samples = msgspec.json.Decoder(list[dict[str, Raw]])


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

    def __init__(self, streamed: Streamed) -> None:
        self._streamed = streamed

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

    def end(self, body: bytes, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What was held back and how it ended."""
        whole = _decoder.decode(body)
        samples = _samples.decode(whole["samples"])
        for sample, pieces in zip(samples, rest, strict=True):
            sample |= {
                "text": _raw(text_of(pieces)),
                "start": _raw(_length(sample["response_ids"])),
            }
            sample["response_ids"] = _raw([])
            for name in ("logprobs", "top_logprobs"):
                sample[name] = sample[name] if sample[name] == NULL else _raw([])
        return data({**whole, "samples": samples}) + DONE


def _raw(value: object) -> Raw:
    return Raw(encode_json(value))


def _length(ids: Raw) -> int:
    return len(msgspec.json.decode(ids, type=list[int]))


def replay(body: bytes) -> bytes:
    """The frames of a whole response: all of it in one event."""
    whole = _decoder.decode(body)
    samples = [{**sample, "start": _raw(0)} for sample in _samples.decode(whole["samples"])]
    return data({**whole, "samples": samples}) + DONE
