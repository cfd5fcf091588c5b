"""The frames of OpenAI's plain completions: text as it comes, a finish reason for each choice, usage, `[DONE]`."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Raw, UnsetType

from protocols.dialects.base import Piece, Streamed
from protocols.dialects.openai_body import TOKEN_IDS
from protocols.dialects.openai_completions_logprobs import ChoiceLogprobs, Offsets, logprobs_of
from protocols.dialects.openai_stream import Chunk, Chunks, Whole, part_of, text_of
from protocols.job import Segment


class ChunkChoice(msgspec.Struct, frozen=True, gc=False):
    """What is new of one sample."""

    index: int
    text: str
    logprobs: Raw | ChoiceLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: Raw | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    """vLLM's, where `return_token_ids` asks for it: those of this chunk."""
    rollout: Raw | UnsetType = UNSET
    """Of one sample among several: its tokens, log-probabilities and policy versions."""


class WholeChoice(msgspec.Struct, frozen=True):
    """One sample in a whole response."""

    index: int
    text: str
    finish_reason: str
    logprobs: Raw = Raw(b"null")
    stop_reason: Raw | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    rollout: Raw | UnsetType = UNSET


_decoder = msgspec.json.Decoder(Whole[WholeChoice])


class CompletionStream:
    """Of one job."""

    plain = True

    def __init__(self, streamed: Streamed) -> None:
        self._streamed = streamed
        self._shows_ids = TOKEN_IDS in streamed.asked
        self._offsets = [Offsets() for _ in streamed.states]
        like = _like(f"cmpl-{streamed.job_id}", streamed.created_s, streamed.model)
        self._chunks = Chunks(like, usage=streamed.usage)

    def begin(self) -> bytes:
        """Nothing: the first chunk has text."""
        return b""

    def add(self, segment: Segment, pieces: Sequence[Piece]) -> bytes:
        """One chunk, where there is text or something was asked of each token."""
        state, text = self._streamed.states[segment.index], text_of(pieces)
        shown = state.sample_params.return_logprob
        if not (text or shown or self._shows_ids):
            return b""
        part, offsets = part_of(state, segment), self._offsets[segment.index]
        choice = ChunkChoice(
            segment.index,
            text,
            logprobs_of(part, self._streamed.token_bytes, offsets) if shown else None,
            token_ids=segment.token_ids.tolist() if self._shows_ids else UNSET,
        )
        return self._chunks.chunk(choice)

    def end(self, body: bytes, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What was held back, then finish reasons and usage."""
        held = [
            self._chunks.chunk(ChunkChoice(i, text))
            for i, pieces in enumerate(rest)
            if (text := text_of(pieces))
        ]
        return b"".join(held) + _last(self._chunks, _decoder.decode(body))


def _like(name: str, created_s: int, model: str) -> Chunk[ChunkChoice]:
    return Chunk(id=name, object="text_completion", created=created_s, model=model)


def _last(chunks: Chunks[ChunkChoice], whole: Whole[WholeChoice]) -> bytes:
    ends = [
        ChunkChoice(
            choice.index,
            "",
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            rollout=choice.rollout,
        )
        for choice in whole.choices
    ]
    return chunks.last(ends, whole.usage, whole.rollout)


def replay(body: bytes) -> bytes:
    """The frames of a whole response."""
    whole = _decoder.decode(body)
    chunks = Chunks(_like(whole.id, whole.created, whole.model), usage=False)
    texts = [
        ChunkChoice(choice.index, choice.text, choice.logprobs, token_ids=choice.token_ids)
        for choice in whole.choices
    ]
    return b"".join([*map(chunks.chunk, texts), _last(chunks, whole)])
