"""The frames of OpenAI's plain completions: text as it comes, a finish reason for each choice, usage, `[DONE]`."""

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import replace

from protocols.dialects.base import Answer, Piece, Streamed
from protocols.dialects.openai_body import TOKEN_IDS
from protocols.dialects.openai_completions_logprobs import ChoiceLogprobs, Offsets, logprobs_of
from protocols.dialects.openai_stream import part_of
from protocols.dialects.sse import DONE, data
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


class Chunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Raw | UnsetType | None = UNSET
    rollout: Raw | UnsetType = UNSET
    """In the last chunk with a choice: what the whole response has under this name."""


class WholeChoice(msgspec.Struct, frozen=True):
    """One sample in a whole response."""

    index: int
    text: str
    finish_reason: str
    logprobs: Raw = Raw(b"null")
    stop_reason: Raw | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    rollout: Raw | UnsetType = UNSET


class Whole(msgspec.Struct, frozen=True):
    """A whole response."""

    id: str
    created: int
    model: str
    choices: tuple[WholeChoice, ...]
    usage: Raw
    rollout: Raw


_decoder = msgspec.json.Decoder(Whole)


class CompletionStream:
    """Of one job."""

    plain = True

    def __init__(self, streamed: Streamed, respond: Callable[[Answer], bytes]) -> None:
        """`respond` makes the whole response."""
        self._streamed, self._respond = streamed, respond
        self._shows_ids = TOKEN_IDS in streamed.asked
        self._offsets = [Offsets() for _ in streamed.states]
        self._chunks = _Chunks(
            f"cmpl-{streamed.job_id}", streamed.created_s, streamed.model, usage=streamed.usage
        )

    def begin(self) -> bytes:
        """Nothing: the first chunk has text."""
        return b""

    def add(self, segment: Segment, pieces: Sequence[Piece]) -> bytes:
        """One chunk, where there is text or something was asked of each token."""
        state, text = self._streamed.states[segment.index], _text(pieces)
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

    def end(self, answer: Answer, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What was held back, then finish reasons and usage."""
        held = [
            self._chunks.chunk(ChunkChoice(i, text))
            for i, pieces in enumerate(rest)
            if (text := _text(pieces))
        ]
        return b"".join(held) + self._chunks.last(_decoder.decode(self._respond(answer)))


class _Chunks:
    """What all chunks of a job share."""

    def __init__(self, name: str, created_s: int, model: str, *, usage: bool) -> None:
        self._name, self._created_s, self._model, self._usage = name, created_s, model, usage

    def chunk(self, choice: ChunkChoice, rollout: Raw | UnsetType = UNSET) -> bytes:
        usage = None if self._usage else UNSET
        return data(replace(self._chunk(usage), choices=(choice,), rollout=rollout))

    def last(self, whole: Whole) -> bytes:
        """Finish reasons, usage, and that it is done."""
        *others, final = [
            ChunkChoice(
                choice.index,
                "",
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                rollout=choice.rollout,
            )
            for choice in whole.choices
        ]
        usage = data(self._chunk(whole.usage)) if self._usage else b""
        ends = [*map(self.chunk, others), self.chunk(final, whole.rollout)]
        return b"".join([*ends, usage, DONE])

    def _chunk(self, usage: Raw | UnsetType | None) -> Chunk:
        return Chunk(
            id=self._name, created=self._created_s, model=self._model, choices=(), usage=usage
        )


def replay(body: bytes) -> bytes:
    """The frames of a whole response."""
    whole = _decoder.decode(body)
    chunks = _Chunks(whole.id, whole.created, whole.model, usage=False)
    texts = [
        ChunkChoice(choice.index, choice.text, choice.logprobs, token_ids=choice.token_ids)
        for choice in whole.choices
    ]
    return b"".join([*map(chunks.chunk, texts), chunks.last(whole)])


def _text(pieces: Sequence[Piece]) -> str:
    return "".join([piece.text for piece in pieces])
