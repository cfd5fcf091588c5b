"""`openai.completions`: OpenAI's plain completions, with the extensions of vLLM and SGLang.

The prompt is text that goes into no chat template, or token ids. One job has one prompt: a client
that sends a list of several gets a 400 that tells it to send one job each. Without `max_tokens` a
sample may fill the context.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import MAX_TOP_LOGPROBS, Answer, Normal, Options, Streamed
from protocols.dialects.choice import Offer
from protocols.dialects.field import Report, Verdicts, ignored, refused
from protocols.dialects.openai_body import TOKEN_IDS, Body, asked_of, stops_of, wants_usage
from protocols.dialects.openai_completions_logprobs import ChoiceLogprobs, logprobs_of
from protocols.dialects.openai_completions_stream import CompletionStream, replay
from protocols.dialects.openai_error import OpenAIErrors
from protocols.dialects.openai_tool import format_guide
from protocols.dialects.openai_usage import Usage, usage_of
from protocols.dialects.result import (
    Result,
    SampleResult,
    finish_of,
    result_of,
    sample_result,
)
from protocols.dialects.sampling import TokenId, sample_params
from protocols.errors import InvalidRequest, UnsupportedOption
from protocols.rollout_state import RolloutState, TokenIds

Prompt = str | list[TokenId | str | list[TokenId]]


class Request(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """How many alternatives to each token; 0 shows the tokens alone."""
    suffix: Annotated[object, refused("")] = None
    add_special_tokens: Annotated[object, refused(False)] = None
    prompt_embeds: Annotated[object, refused()] = None
    metadata: Annotated[object, ignored({})] = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One sample."""

    index: int
    text: str
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | UnsetType = UNSET
    """vLLM's: the stop string or stop token id that matched."""
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    """vLLM's, both where `return_token_ids` asks for them."""
    rollout: SampleResult | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A response body."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    rollout: Result


_decoder = msgspec.json.Decoder(Request)
_request = Verdicts(Request)


class OpenAICompletions(OpenAIErrors):
    """The dialect."""

    name = "openai.completions"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        options = request.rollout or Options()
        report = Report(options.unsupported)
        _request.check(request, report)
        prompt = _one_prompt(request.prompt)
        params = sample_params(
            request,
            report,
            max_tokens=request.max_tokens,
            stops=stops_of(request),
            sampling_seed=request.seed,
            return_logprob=request.logprobs is not None,
            top_logprobs=request.logprobs,
            guide=format_guide(Offer(), request.response_format, "response_format", report),
        )
        return Normal(
            RolloutState(
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=TokenIds() if isinstance(prompt, str) else prompt,
                sample_params=params,
            ),
            request.model,
            options,
            stream=bool(request.stream),
            stream_usage=wants_usage(request, report),
            asked=asked_of(request),
            ignored=report.noted,
        )

    def respond(self, answer: Answer) -> bytes:
        """A text completion; raises RolloutError where a sample did not come to its end."""
        return encode_json(
            Completion(
                id=f"cmpl-{answer.job_id}",
                created=answer.created_s,
                model=answer.model,
                choices=[_choice(state, answer) for state in answer.states],
                usage=usage_of(answer),
                rollout=result_of(answer),
            )
        )

    def stream(self, streamed: Streamed) -> CompletionStream:
        """The frames of a job that begins."""
        return CompletionStream(streamed)

    def replay(self, body: bytes) -> bytes:
        """The frames of a whole response."""
        return replay(body)


def _one_prompt(given: Prompt) -> str | TokenIds:
    """Text or token ids; raises RequestError."""
    if not isinstance(given, str) and len(given) == 1:
        (only,) = given
        given = [only] if isinstance(only, int) else only if isinstance(only, str) else [*only]
    if not given:
        raise InvalidRequest("`prompt`: it is empty", param="prompt")
    if isinstance(given, str):
        return given
    ids = [token for token in given if isinstance(token, int)]
    if not ids:
        raise UnsupportedOption(
            f"`prompt`: {len(given)} prompts; a job has one, so submit each as a job of its own",
            param="prompt",
        )
    if len(ids) < len(given):
        raise InvalidRequest("`prompt`: token ids and prompts are mixed", param="prompt")
    return TokenIds(ids)


def _choice(state: RolloutState, answer: Answer) -> Choice:
    shows_ids = TOKEN_IDS in answer.asked
    shown = state.sample_params.return_logprob
    return Choice(
        state.index,
        state.text,
        logprobs_of(state, answer.token_bytes) if shown else None,
        "length" if finish_of(state) == "length" else "stop",
        UNSET if state.stop_reason is None else state.stop_reason,
        state.prompt_ids.tolist() if shows_ids else UNSET,
        state.response_ids.tolist() if shows_ids else UNSET,
        UNSET if len(answer.states) == 1 else sample_result(state),
    )
