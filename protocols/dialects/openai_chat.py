"""`openai.chat`: OpenAI's chat completions, with the extensions of vLLM, SGLang and lmdeploy."""

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import Answer, Name, Normal, Options, Streamed
from protocols.dialects.field import Verdicts, chosen, ignored, refused
from protocols.dialects.openai_chat_stream import ChatStream, replay
from protocols.dialects.openai_error import error_body
from protocols.dialects.openai_message import Turns, messages_of
from protocols.dialects.openai_stream import error_frame
from protocols.dialects.result import (
    Result,
    SampleResult,
    completion_tokens,
    finish_of,
    finite,
    result_of,
    sample_result,
)
from protocols.dialects.sampling import Sampling, Seed, Stop, Stops, Tokens, sample_params
from protocols.errors import InvalidRequest, RolloutError
from protocols.rollout_state import RolloutState, SampleParams


class Request(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""

    messages: Turns
    model: Name | None = None
    rollout: Options | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: Stop | Stops | None = None
    seed: Seed | None = None
    logprobs: bool | None = None

    user: Annotated[object, ignored()] = None
    metadata: Annotated[object, ignored({})] = None
    store: Annotated[object, ignored(False)] = None
    service_tier: Annotated[object, ignored("auto", "default")] = None
    prompt_cache_key: Annotated[object, ignored()] = None
    prompt_cache_options: Annotated[object, ignored({})] = None
    prompt_cache_retention: Annotated[object, ignored()] = None
    safety_identifier: Annotated[object, ignored()] = None
    verbosity: Annotated[object, ignored("medium")] = None
    priority: Annotated[object, ignored(0)] = None
    cache_salt: Annotated[object, ignored()] = None
    return_prompt_token_ids: Annotated[object, ignored(True)] = None
    return_logprob: Annotated[object, ignored(True)] = None
    """lmdeploy's; log-probabilities are always returned under `rollout`."""
    return_meta_info: Annotated[object, ignored(False)] = None

    stream: Annotated[object, refused(False)] = None
    stream_options: Annotated[object, refused({})] = None
    tools: Annotated[object, refused([])] = None
    tool_choice: Annotated[object, refused("none", "auto")] = None
    parallel_tool_calls: Annotated[object, refused(True, False)] = None
    functions: Annotated[object, refused([])] = None
    function_call: Annotated[object, refused("none", "auto")] = None
    response_format: Annotated[object, refused({"type": "text"})] = None
    reasoning_effort: Annotated[object, refused()] = None
    logit_bias: Annotated[object, refused({})] = None
    modalities: Annotated[object, refused(["text"])] = None
    audio: Annotated[object, refused()] = None
    prediction: Annotated[object, refused()] = None
    moderation: Annotated[object, refused()] = None
    web_search_options: Annotated[object, refused()] = None

    input_ids: Annotated[object, refused()] = None
    min_p: Annotated[object, refused(0)] = None
    ignore_eos: Annotated[object, refused(False)] = None
    allowed_token_ids: Annotated[object, refused([])] = None
    bad_words: Annotated[object, refused([])] = None
    best_of: Annotated[object, refused(1)] = None
    use_beam_search: Annotated[object, refused(False)] = None
    length_penalty: Annotated[object, refused(1)] = None
    prompt_logprobs: Annotated[object, refused()] = None
    logprob_token_ids: Annotated[object, refused([])] = None
    return_tokens_as_token_ids: Annotated[object, refused(False)] = None
    truncate_prompt_tokens: Annotated[object, refused()] = None
    echo: Annotated[object, refused(False)] = None
    add_generation_prompt: Annotated[object, refused(True)] = None
    continue_final_message: Annotated[object, refused(False)] = None
    add_special_tokens: Annotated[object, refused(False)] = None
    chat_template: Annotated[object, refused()] = None
    chat_template_kwargs: Annotated[object, refused({})] = None
    enable_thinking: Annotated[object, refused()] = None
    documents: Annotated[object, refused([])] = None
    structured_outputs: Annotated[object, refused({})] = None
    guided_json: Annotated[object, refused()] = None
    guided_regex: Annotated[object, refused()] = None
    guided_choice: Annotated[object, refused()] = None
    guided_grammar: Annotated[object, refused()] = None
    regex: Annotated[object, refused()] = None
    ebnf: Annotated[object, refused()] = None
    logits_processors: Annotated[object, refused([])] = None


_decoder = msgspec.json.Decoder(Request)
_request = Verdicts(Request)


class TopLogprob(msgspec.Struct, frozen=True, gc=False):
    """An alternative at one position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """One generated token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Every generated token, the stop token included, so that it aligns with `token_ids`."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One sample."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | UnsetType = UNSET
    """vLLM's: the stop string or stop token id that matched."""
    rollout: SampleResult | UnsetType = UNSET


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of the prompt, counted once, and of all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A response body."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    rollout: Result


class OpenAIChat:
    """The dialect."""

    name = "openai.chat"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        unused = _request.check(request)
        message = messages_of(request.messages, unused)
        params = _params_of(request, unused)
        return Normal(
            RolloutState(message=message, sample_params=params),
            request.model,
            request.rollout or Options(),
            tuple(dict.fromkeys(unused)),
        )

    def respond(self, answer: Answer) -> bytes:
        """A chat completion; raises RolloutError where a sample did not come to its end."""
        alone = len(answer.states) == 1
        return encode_json(
            ChatCompletion(
                id=f"chatcmpl-{answer.job_id}",
                created=answer.created_s,
                model=answer.model,
                choices=[_choice(state, answer, alone) for state in answer.states],
                usage=usage_of(answer),
                rollout=result_of(answer),
            )
        )

    def error(self, error: RolloutError, job_id: str) -> bytes:
        """OpenAI's error body."""
        return error_body(error)

    def stream(self, streamed: Streamed) -> ChatStream:
        """The frames of a job that begins."""
        return ChatStream(streamed, self.respond)

    def replay(self, body: bytes) -> bytes:
        """The frames of a whole response."""
        return replay(body)

    def error_frame(self, body: bytes) -> bytes:
        """The event that ends a stream which cannot go on."""
        return error_frame(body)


def usage_of(answer: Answer) -> Usage:
    """OpenAI's usage."""
    prompt, completion = len(answer.states[0].prompt_ids), completion_tokens(answer)
    return Usage(prompt, completion, prompt + completion)


def _params_of(request: Request, unused: list[str]) -> SampleParams:
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "`top_logprobs`: needs `logprobs` true; send it, or leave `top_logprobs` out",
            param="top_logprobs",
        )
    return sample_params(
        request,
        unused,
        max_tokens=chosen(
            unused,
            None,
            max_completion_tokens=request.max_completion_tokens,
            max_tokens=request.max_tokens,
        ),
        stops=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        sampling_seed=request.seed,
        return_logprob=bool(request.logprobs),
    )


def _choice(state: RolloutState, answer: Answer, alone: bool) -> Choice:
    shown = state.sample_params.return_logprob
    return Choice(
        state.index,
        AnswerMessage(content=state.text),
        _logprobs(state, answer.token_bytes) if shown else None,
        finish_of(state),
        UNSET if state.stop_reason is None else state.stop_reason,
        UNSET if alone else sample_result(state),
    )


def _logprobs(state: RolloutState, token_bytes: Callable[[int], bytes]) -> ChoiceLogprobs:
    tops = _tops(state, token_bytes)
    return ChoiceLogprobs(
        [
            TokenLogprob(data.decode(errors="replace"), logprob, list(data), top)
            for data, logprob, top in zip(
                map(token_bytes, state.response_ids), finite(state.logprobs), tops, strict=True
            )
        ]
    )


def _tops(state: RolloutState, token_bytes: Callable[[int], bytes]) -> list[list[TopLogprob]]:
    width = state.sample_params.top_logprobs
    flat = [
        TopLogprob(data.decode(errors="replace"), logprob, list(data))
        for data, logprob in zip(
            map(token_bytes, state.top_ids), finite(state.top_logprobs), strict=True
        )
    ]
    return [flat[at * width : (at + 1) * width] for at in range(len(state.response_ids))]
