"""`generate`: token ids, text or messages in, tokens out; parameters under XTuner's names.

`logprobs` is `[response tokens]`; `top_logprobs` is `[response tokens][top_logprobs]` of
`[token id, log-probability]`, likeliest first.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import Answer, Name, Normal, Options
from protocols.dialects.field import Verdicts, refused
from protocols.dialects.openai_chat import Usage, usage_of
from protocols.dialects.openai_error import error_body
from protocols.dialects.openai_message import Turns, messages_of
from protocols.dialects.result import Result, finish_of, finite, session_of
from protocols.dialects.sampling import (
    Sampling,
    Seed,
    Stops,
    TokenId,
    Tokens,
    sample_params,
)
from protocols.errors import InvalidRequest, RolloutError
from protocols.rollout_state import RolloutState, SampleParams, Status, TokenIds


class Params(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SampleParams, and what else XTuner's has."""

    max_tokens: Tokens | None = None
    stops: Stops | None = None
    sampling_seed: Seed | None = None
    return_logprob: bool | None = None
    stream: Annotated[object, refused(False)] = None
    return_routed_experts: Annotated[object, refused(False)] = None


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body: exactly one of `input_ids`, `prompt` and `messages`."""

    input_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    """Plain text, not put into a chat template."""
    messages: Turns | None = None
    sample_params: Params | None = None
    model: Name | None = None
    rollout: Options | None = None


_decoder = msgspec.json.Decoder(Request)
_params = Verdicts(Params)


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One sample."""

    index: int
    text: str
    response_ids: list[int]
    logprobs: list[float] | None
    """Null where `return_logprob` is false."""
    top_logprobs: list[list[tuple[int, float]]] | None
    """Null where none were asked for."""
    finish_reason: Literal["stop", "length", "tool_calls"]
    status: Status
    policy_versions: tuple[tuple[int, int], ...]
    stop_reason: str | int | UnsetType = UNSET
    """The stop string or stop token id that matched."""


class Response(msgspec.Struct, frozen=True, gc=False):
    """A response body."""

    id: str
    model: str
    prompt_ids: list[int]
    samples: list[Sample]
    usage: Usage
    rollout: Result


class Generate:
    """The dialect."""

    name = "generate"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        params = request.sample_params or Params()
        unused = _params.check(params, "sample_params")
        return Normal(
            _state_of(request, _sample_params(params, unused), unused),
            request.model,
            request.rollout or Options(),
            tuple(dict.fromkeys(unused)),
        )

    def respond(self, answer: Answer) -> bytes:
        """Samples with their tokens; raises RolloutError where one did not come to its end."""
        return encode_json(
            Response(
                id=answer.job_id,
                model=answer.model,
                prompt_ids=answer.states[0].prompt_ids.tolist(),
                samples=[_sample(state) for state in answer.states],
                usage=usage_of(answer),
                rollout=Result(answer.attempts, answer.ignored, session=session_of(answer)),
            )
        )

    def error(self, error: RolloutError, job_id: str) -> bytes:
        """OpenAI's error body."""
        return error_body(error)


def _state_of(request: Request, params: SampleParams, unused: list[str]) -> RolloutState:
    sources = (request.input_ids, request.prompt, request.messages)
    given = len(sources) - sources.count(None)
    if given != 1:
        raise InvalidRequest(
            f"`input_ids`, `prompt`, `messages`: exactly one is needed, {given} were given",
            param="input_ids",
        )
    return RolloutState(
        prompt_ids=TokenIds(request.input_ids or ()),
        prompt=request.prompt,
        message=messages_of(request.messages, unused) if request.messages else (),
        sample_params=params,
    )


def _sample_params(params: Params, unused: list[str]) -> SampleParams:
    return sample_params(
        params,
        unused,
        at="sample_params.",
        max_tokens=params.max_tokens,
        stops=tuple(params.stops or ()),
        sampling_seed=params.sampling_seed,
        return_logprob=params.return_logprob is not False,
    )


def _sample(state: RolloutState) -> Sample:
    params = state.sample_params
    return Sample(
        state.index,
        state.text,
        state.response_ids.tolist(),
        finite(state.logprobs) if params.return_logprob else None,
        _tops(state) if params.return_logprob and params.top_logprobs else None,
        finish_of(state),
        state.status,
        state.policy_versions,
        UNSET if state.stop_reason is None else state.stop_reason,
    )


def _tops(state: RolloutState) -> list[list[tuple[int, float]]]:
    width = state.sample_params.top_logprobs
    flat = list(zip(state.top_ids.tolist(), finite(state.top_logprobs), strict=True))
    return [flat[at * width : (at + 1) * width] for at in range(len(state.response_ids))]
