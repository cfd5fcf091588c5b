"""What the streams of OpenAI's protocols share: the shape of a chunk, and how a stream ends."""

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import replace

from protocols.dialects.base import Piece
from protocols.dialects.sse import DONE, data
from protocols.job import Segment
from protocols.rollout_state import RolloutState

Choice = TypeVar("Choice", bound=msgspec.Struct)
WholeChoice = TypeVar("WholeChoice", bound=msgspec.Struct)


class Chunk(msgspec.Struct, Generic[Choice], frozen=True, kw_only=True, gc=False):
    """One event."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: tuple[Choice, ...] = ()
    usage: Raw | UnsetType | None = UNSET
    rollout: Raw | UnsetType = UNSET
    """In the last chunk with a choice: what the whole response has under this name."""


class Whole(msgspec.Struct, Generic[WholeChoice], frozen=True):
    """A whole response."""

    id: str
    created: int
    model: str
    choices: tuple[WholeChoice, ...]
    usage: Raw
    rollout: Raw


class Chunks(Generic[Choice]):
    """Of one job."""

    def __init__(self, like: Chunk[Choice], *, usage: bool) -> None:
        """`like` has what all of them share; `usage`: whether it was asked for."""
        self._usage = usage
        self._like = replace(like, usage=None) if usage else like

    def chunk(self, choice: Choice, rollout: Raw | UnsetType = UNSET) -> bytes:
        """The event of a choice."""
        return data(replace(self._like, choices=(choice,), rollout=rollout))

    def last(self, ends: Sequence[Choice], usage: Raw, rollout: Raw) -> bytes:
        """Finish reasons, usage, and that it is done."""
        *others, final = ends
        told = data(replace(self._like, usage=usage)) if self._usage else b""
        return b"".join([*map(self.chunk, others), self.chunk(final, rollout), told, DONE])


def text_of(pieces: Sequence[Piece]) -> str:
    """What the pieces of a plain view add."""
    return "".join([piece.text for piece in pieces])


def part_of(state: RolloutState, segment: Segment) -> RolloutState:
    """The state of a sample that begins, with the tokens of one segment and nothing else."""
    return replace(
        state,
        response_ids=segment.token_ids,
        logprobs=segment.logprobs,
        top_ids=segment.top_ids,
        top_logprobs=segment.top_logprobs,
    )
