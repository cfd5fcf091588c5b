"""Sampling fields and their limits as requests spell them, and their way into SampleParams."""

from typing import Annotated

import msgspec
from msgspec import Meta

from protocols.dialects.base import MAX_SAMPLES, MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS
from protocols.dialects.field import Report, chosen, ignored
from protocols.errors import InvalidRequest
from protocols.message import Guide
from protocols.rollout_state import SampleParams

MAX_STOP_TOKEN_IDS = 64
MAX_BIASES = 1024
MAX_TOKEN_ID = 2**32 - 1
SEED_MASK = 2**63 - 1
NEUTRAL = SampleParams()
"""Its values are what absent and null mean."""

Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
MinTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
Samples = Annotated[int, Meta(ge=1, le=MAX_SAMPLES)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
"""-1 and 0: no limit."""
Repetition = Annotated[float, Meta(gt=0, le=10)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Biases = Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)]
"""By token id, which JSON spells as a string."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What OpenAI's requests and `generate`'s parameters have in common; null means absent.

    Names of vLLM, SGLang, lmdeploy and XTuner are all accepted. Where two of them name one thing,
    the first here wins and the other is reported.
    """

    n: Samples | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    min_tokens: MinTokens | None = None
    min_new_tokens: MinTokens | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Biases | None = None
    return_routed_experts: bool | None = None
    spaces_between_special_tokens: Annotated[object, ignored(False)] = None


def sample_params(
    given: Sampling,
    report: Report,
    *,
    at: str = "",
    max_tokens: int | None,
    stops: tuple[str, ...],
    sampling_seed: int | None,
    return_logprob: bool,
    top_logprobs: int | None,
    guide: Guide | None,
) -> SampleParams:
    """The parameters of a request, whose fields lie under `at`.

    Raises InvalidRequest where two of them clash.
    """
    min_tokens = chosen(
        report, at, 0, min_tokens=given.min_tokens, min_new_tokens=given.min_new_tokens
    )
    if max_tokens is not None and min_tokens > max_tokens:
        field = f"{at}min_tokens"
        raise InvalidRequest(
            f"`{field}`: {min_tokens} is more than `{at}max_tokens` {max_tokens}", param=field
        )
    return SampleParams(
        n=given.n or NEUTRAL.n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=NEUTRAL.temperature if given.temperature is None else given.temperature,
        top_p=given.top_p or NEUTRAL.top_p,
        top_k=max(given.top_k or 0, 0),
        repetition_penalty=given.repetition_penalty or NEUTRAL.repetition_penalty,
        presence_penalty=given.presence_penalty or NEUTRAL.presence_penalty,
        frequency_penalty=given.frequency_penalty or NEUTRAL.frequency_penalty,
        stops=stops,
        stop_token_ids=tuple(given.stop_token_ids or ()),
        include_stop_str_in_output=chosen(
            report,
            at,
            False,
            include_stop_str_in_output=given.include_stop_str_in_output,
            no_stop_trim=given.no_stop_trim,
        ),
        skip_special_tokens=given.skip_special_tokens is not False,
        return_logprob=return_logprob,
        top_logprobs=top_logprobs or 0,
        return_routed_experts=bool(given.return_routed_experts),
        logit_bias=tuple(sorted((given.logit_bias or {}).items())),
        guide=guide,
        sampling_seed=None if sampling_seed is None else sampling_seed & SEED_MASK,
    )
