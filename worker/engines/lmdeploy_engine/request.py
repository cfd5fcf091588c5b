"""From a call to what lmdeploy is asked for each sample. Needs no lmdeploy."""

from collections.abc import Sequence

import msgspec

from protocols.errors import ContextLengthExceeded, InvalidRequest, UnsupportedOption
from protocols.rollout_state import FinishReason, TokenIds
from worker.engines.base import Call
from worker.engines.bias import check_bias

HOTTEST = 2.0
"""lmdeploy's own bound of the temperature."""


class Wanted(msgspec.Struct, frozen=True):
    """lmdeploy's generation parameters, all of them that matter: its defaults are nobody's."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    random_seed: int
    logprobs: int
    stop_token_ids: list[int]
    n: int = 1
    do_sample: bool = True
    """Also where the likeliest token is wanted: without it lmdeploy drops the repetition penalty."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Its own counts the response alone, and padding with it; see `penalty`."""
    ignore_eos: bool = False
    skip_special_tokens: bool = False
    spaces_between_special_tokens: bool = False
    return_routed_experts: bool = False
    include_stop_str_in_output: bool = True
    """Otherwise the stop token and its log-probability were lost."""


class Room(msgspec.Struct, frozen=True):
    """What the engine can take."""

    context_tokens: int
    vocabulary: int
    stop_ids: frozenset[int]
    """Token ids that end a response: the model's own and the tokenizer's."""

    def check(self, call: Call) -> None:
        """Raise RequestError for a call that it cannot take."""
        if not call.prompt_ids:
            raise InvalidRequest("the prompt has no tokens; send at least one")
        if len(call.prompt_ids) >= self.context_tokens:
            raise ContextLengthExceeded(
                f"the prompt has {len(call.prompt_ids)} tokens and the context {self.context_tokens}: no room is left "
                "for an answer; shorten it"
            )
        largest = max(map(max, filter(None, (call.prompt_ids, *call.kept))))
        if largest >= self.vocabulary:
            raise InvalidRequest(
                f"the prompt, or what is kept of an earlier attempt, has the token id {largest}, and this model's "
                f"are below {self.vocabulary}"
            )
        check_bias(call.params, self.vocabulary)
        if call.params.return_routed_experts and call.params.stops:
            raise UnsupportedOption(
                "`return_routed_experts`: not beside `stops`, whose samples lmdeploy does not end itself; use "
                "`stop_token_ids`",
                param="return_routed_experts",
            )
        if call.params.temperature > HOTTEST:
            raise UnsupportedOption(
                f"`temperature`: {call.params.temperature}; lmdeploy takes at most {HOTTEST:g}",
                param="temperature",
            )

    def limit(self, call: Call) -> int:
        """Most tokens that a sample may have."""
        room = self.context_tokens - len(call.prompt_ids)
        return room if call.params.max_tokens is None else min(call.params.max_tokens, room)


def kept_of(call: Call) -> Sequence[TokenIds]:
    """What each sample has already."""
    return call.kept or [TokenIds() for _ in range(call.params.n)]


def ended_by(kept: TokenIds, call: Call, room: Room) -> FinishReason | None:
    """Why a sample is whole with what was kept of it; None where it is not."""
    if kept and (kept[-1] in room.stop_ids or kept[-1] in call.params.stop_token_ids):
        return "stop"
    return "length" if len(kept) >= room.limit(call) else None


def wanted(call: Call, index: int, kept_tokens: int, room: Room) -> Wanted:
    """What is left to be drawn of a sample that has `kept_tokens` already."""
    params, limit = call.params, room.limit(call)
    # a guide minds it itself
    least = 0 if params.guide else params.min_tokens
    greedy = params.temperature == 0
    return Wanted(
        max_new_tokens=limit - kept_tokens,
        min_new_tokens=max(0, min(least, limit) - kept_tokens),
        temperature=1.0 if greedy else params.temperature,
        top_p=1.0 if greedy else params.top_p,
        top_k=1 if greedy else params.top_k,
        random_seed=((params.sampling_seed or 0) + index) % 2**64,
        logprobs=max(1, params.top_logprobs),
        return_routed_experts=params.return_routed_experts,
        stop_token_ids=sorted(room.stop_ids.union(params.stop_token_ids)),
    )
