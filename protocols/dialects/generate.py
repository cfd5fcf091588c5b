"""`generate`: token ids, text or messages in, tokens out; parameters under XTuner's names.

`logprobs` is `[response tokens]`; `top_logprobs` is `[response tokens][top_logprobs]` of
`[token id, log-probability]`, likeliest first.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import Answer, Name, Normal, Options, Streamed
from protocols.dialects.choice import Offer
from protocols.dialects.field import Report, Verdicts, ignored
from protocols.dialects.generate_stream import GenerateStream, replay
from protocols.dialects.openai_call import ToolCall, calls_of
from protocols.dialects.openai_error import OpenAIErrors
from protocols.dialects.openai_message import Turns, messages_of
from protocols.dialects.openai_tool import (
    Choice,
    Effort,
    Format,
    Mode,
    Tools,
    format_guide,
    offer,
    reasoning,
)
from protocols.dialects.openai_usage import Usage, usage_of
from protocols.dialects.result import Result, finish_of, finite, output_of, session_of, tops_of
from protocols.dialects.sampling import (
    Sampling,
    Seed,
    Stops,
    TokenId,
    Tokens,
    TopLogprobs,
    sample_params,
)
from protocols.errors import InvalidRequest
from protocols.message import CallGuide, JsonGuide
from protocols.rollout_state import RolloutState, SampleParams, Status, TokenIds


class Params(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SampleParams, and what else XTuner's has; what it calls `guide` is a `response_format` here."""

    max_tokens: Tokens | None = None
    stops: Stops | None = None
    sampling_seed: Seed | None = None
    return_logprob: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: Format | None = None
    stream: bool | None = None
    return_token_ids: Annotated[object, ignored(True)] = None
    """They are what this dialect is for."""


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body: exactly one of `input_ids`, `prompt` and `messages`."""

    input_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    """Plain text, not put into a chat template."""
    messages: Turns | None = None
    tools: Tools | None = None
    tool_choice: Mode | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    """`TemplateKwargs`; open, so that any other name is a refused one and not an unknown one."""
    sample_params: Params | None = None
    model: Name | None = None
    stream: bool | None = None
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
    tool_calls: list[ToolCall] | UnsetType = UNSET
    """In OpenAI's shape; `text` holds their markup too."""
    parse_error: str | UnsetType = UNSET
    """Why markup stayed text."""


class Response(msgspec.Struct, frozen=True, gc=False):
    """A response body."""

    id: str
    model: str
    prompt_ids: list[int]
    samples: list[Sample]
    usage: Usage
    rollout: Result


def request_params(params: SampleParams) -> dict[str, object]:
    """`sample_params` of a request, for parameters in their normal form; raises InvalidRequest for a guide to calls."""
    told: dict[str, object] = msgspec.to_builtins(params)
    if params.logit_bias:
        told["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    match params.guide:
        case None:
            pass
        case JsonGuide(schema):
            schema_field = {"schema": msgspec.Raw(schema.encode())}
            told["response_format"] = {"type": "json_schema", "json_schema": schema_field}
        case CallGuide():
            raise InvalidRequest("`guide`: send `tools` and `tool_choice` instead", param="guide")
    told.pop("guide", None)
    return told


class Generate(OpenAIErrors):
    """The dialect."""

    name = "generate"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        options, params = request.rollout or Options(), request.sample_params or Params()
        report = Report(options.unsupported)
        _params.check(params, report, "sample_params")
        offered = offer(request.tools, request.tool_choice, request.parallel_tool_calls, report)
        return Normal(
            _state_of(request, offered, _sample_params(params, offered, report), report),
            request.model,
            options,
            stream=bool(request.stream or params.stream),
            ignored=report.noted,
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

    def stream(self, streamed: Streamed) -> GenerateStream:
        """The frames of a job that begins."""
        return GenerateStream(streamed)

    def replay(self, body: bytes) -> bytes:
        """The frames of a whole response."""
        return replay(body)


def _state_of(
    request: Request, offered: Offer, params: SampleParams, report: Report
) -> RolloutState:
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
        message=messages_of(request.messages, report) if request.messages else (),
        tools=offered.tools,
        tool_choice=offered.choice,
        reasoning=reasoning(
            request.reasoning_effort,
            request.enable_thinking,
            request.chat_template_kwargs,
            report,
        ),
        sample_params=params,
    )


def _sample_params(params: Params, offered: Offer, report: Report) -> SampleParams:
    at = "sample_params."
    return sample_params(
        params,
        report,
        at=at,
        max_tokens=params.max_tokens,
        stops=tuple(params.stops or ()),
        sampling_seed=params.sampling_seed,
        return_logprob=params.return_logprob is not False,
        top_logprobs=params.top_logprobs,
        guide=format_guide(offered, params.response_format, f"{at}response_format", report),
    )


def _sample(state: RolloutState) -> Sample:
    params = state.sample_params
    return Sample(
        state.index,
        state.text,
        state.response_ids.tolist(),
        finite(state.logprobs) if params.return_logprob else None,
        tops_of(state) if params.return_logprob and params.top_logprobs else None,
        finish_of(state),
        state.status,
        state.policy_versions,
        UNSET if state.stop_reason is None else state.stop_reason,
        calls_of(output_of(state)) or UNSET,
        UNSET if state.parse_error is None else state.parse_error,
    )
