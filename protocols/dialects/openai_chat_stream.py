"""The frames of OpenAI's chat completions.

A chunk for the role of each choice, then its deltas as they come, a chunk with its finish reason, the usage where it
was asked for, and `[DONE]`. What comes last is taken from the whole response, so that both say the same.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import replace

from protocols.dialects.base import Piece, Streamed
from protocols.dialects.openai_body import TOKEN_IDS
from protocols.dialects.openai_call import ToolCall, call_id
from protocols.dialects.openai_chat_response import ChoiceLogprobs, logprobs_of
from protocols.dialects.openai_stream import Chunk, Chunks, Whole, part_of
from protocols.job import Segment
from protocols.rollout_state import RolloutState


class CallFunction(msgspec.Struct, frozen=True, gc=False):
    """A tool call's name, or more of its arguments."""

    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(msgspec.Struct, frozen=True, gc=False):
    """What is new of a tool call; `id` and `type` where it begins."""

    index: int
    function: CallFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What is new of the assistant's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    """The same under vLLM's name."""
    tool_calls: tuple[CallDelta, ...] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, gc=False):
    """What is new of one sample."""

    index: int
    delta: Delta = Delta()
    logprobs: Raw | ChoiceLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: Raw | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    """vLLM's, where `return_token_ids` asks for it: those of this chunk."""
    rollout: Raw | UnsetType = UNSET
    """Of one sample among several: its tokens, log-probabilities and policy versions."""


class WholeMessage(msgspec.Struct, frozen=True):
    """The assistant's turn in a whole response."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class WholeChoice(msgspec.Struct, frozen=True):
    """One sample in a whole response."""

    index: int
    message: WholeMessage
    finish_reason: str
    logprobs: Raw = Raw(b"null")
    stop_reason: Raw | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    rollout: Raw | UnsetType = UNSET


_decoder = msgspec.json.Decoder(Whole[WholeChoice])


class ChatStream:
    """Of one job."""

    plain = False

    def __init__(self, streamed: Streamed) -> None:
        self._streamed = streamed
        self._shows_ids = TOKEN_IDS in streamed.asked
        self._open_calls = [-1] * len(streamed.states)
        """Index of the tool call that is open, by sample."""
        like = _like(f"chatcmpl-{streamed.job_id}", streamed.created_s, streamed.model)
        self._chunks = Chunks(like, usage=streamed.usage)

    def begin(self) -> bytes:
        """The role of each choice."""
        return b"".join(
            [self._chunks.chunk(_role(index)) for index in range(len(self._open_calls))]
        )

    def add(self, segment: Segment, pieces: Sequence[Piece]) -> bytes:
        """A chunk for each piece; the segment's log-probabilities are in the first."""
        choices = list(self._pieces(segment.index, pieces))
        state = self._streamed.states[segment.index]
        if state.sample_params.return_logprob or self._shows_ids:
            first = choices[0] if choices else ChunkChoice(segment.index)
            choices[:1] = [self._with_tokens(first, state, segment)]
        return b"".join([self._chunks.chunk(choice) for choice in choices])

    def _with_tokens(
        self, choice: ChunkChoice, state: RolloutState, segment: Segment
    ) -> ChunkChoice:
        shown = logprobs_of(part_of(state, segment), self._streamed.token_bytes)
        return replace(
            choice,
            logprobs=shown if state.sample_params.return_logprob else None,
            token_ids=segment.token_ids.tolist() if self._shows_ids else UNSET,
        )

    def end(self, body: bytes, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What was held back, then finish reasons and usage."""
        held = [choice for i, pieces in enumerate(rest) for choice in self._pieces(i, pieces)]
        whole = _decoder.decode(body)
        return b"".join([self._chunks.chunk(choice) for choice in held]) + _last(
            self._chunks, whole
        )

    def _pieces(self, index: int, pieces: Sequence[Piece]) -> Iterator[ChunkChoice]:
        for piece in pieces:
            for delta in self._deltas(index, piece):
                yield ChunkChoice(index, delta)

    def _deltas(self, index: int, piece: Piece) -> Iterator[Delta]:
        match piece.kind:
            case "text":
                yield Delta(content=piece.text)
            case "thinking":
                yield Delta(reasoning_content=piece.text, reasoning=piece.text)
            case "tool_use":
                if piece.opens:
                    self._open_calls[index] += 1
                    yield call_delta(self._open_calls[index], call_id(piece.id), piece.name)
                if piece.text:
                    more = CallDelta(self._open_calls[index], CallFunction(piece.text))
                    yield Delta(tool_calls=(more,))


def call_delta(at: int, named: str, name: str) -> Delta:
    """Where a tool call begins."""
    return Delta(tool_calls=(CallDelta(at, CallFunction("", name), named, "function"),))


def _like(name: str, created_s: int, model: str) -> Chunk[ChunkChoice]:
    return Chunk(id=name, object="chat.completion.chunk", created=created_s, model=model)


def _role(index: int) -> ChunkChoice:
    return ChunkChoice(index, Delta(role="assistant", content=""))


def _last(chunks: Chunks[ChunkChoice], whole: Whole[WholeChoice]) -> bytes:
    ends = [
        ChunkChoice(
            choice.index,
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
    frames = [chunks.chunk(_role(choice.index)) for choice in whole.choices]
    for choice in whole.choices:
        deltas = list(_whole_deltas(choice.message)) or [Delta()]
        first = ChunkChoice(
            choice.index, deltas[0], logprobs=choice.logprobs, token_ids=choice.token_ids
        )
        frames += map(chunks.chunk, [first, *(ChunkChoice(choice.index, d) for d in deltas[1:])])
    return b"".join([*frames, _last(chunks, whole)])


def _whole_deltas(message: WholeMessage) -> Iterator[Delta]:
    if message.reasoning_content:
        yield Delta(
            reasoning_content=message.reasoning_content, reasoning=message.reasoning_content
        )
    if message.content:
        yield Delta(content=message.content)
    for at, call in enumerate(message.tool_calls):
        yield call_delta(at, call.id, call.function.name)
        yield Delta(tool_calls=(CallDelta(at, CallFunction(call.function.arguments)),))
