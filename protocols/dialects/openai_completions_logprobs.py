"""Log-probabilities as OpenAI's plain completions show them."""

import codecs
from collections.abc import Callable, Iterable

import msgspec

from protocols.dialects.result import finite, tops_of
from protocols.rollout_state import RolloutState


class ChoiceLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Every generated token, the stop token included, so that it aligns with `token_ids`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    """Null where no alternatives were asked for; of two that are spelled alike, the likelier."""
    text_offset: list[int]
    """Where each token begins, in characters of the text of all tokens."""


class Offsets:
    """Where the tokens of a text begin, in characters."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._reached = 0

    def of(self, pieces: Iterable[bytes]) -> list[int]:
        """Of the next tokens."""
        offsets = list[int]()
        for piece in pieces:
            offsets.append(self._reached)
            self._reached += len(self._decode(piece))
        return offsets


def logprobs_of(
    state: RolloutState, token_bytes: Callable[[int], bytes], offsets: Offsets | None = None
) -> ChoiceLogprobs:
    """Of every generated token; `offsets` knows what came before them."""
    pieces = [token_bytes(token_id) for token_id in state.response_ids]
    tops = [_named(top, token_bytes) for top in tops_of(state)]
    return ChoiceLogprobs(
        [piece.decode(errors="replace") for piece in pieces],
        finite(state.logprobs),
        tops if state.sample_params.top_logprobs else None,
        (offsets or Offsets()).of(pieces),
    )


def _named(top: list[tuple[int, float]], token_bytes: Callable[[int], bytes]) -> dict[str, float]:
    named: dict[str, float] = {}
    for token_id, logprob in top:
        named.setdefault(token_bytes(token_id).decode(errors="replace"), logprob)
    return named
