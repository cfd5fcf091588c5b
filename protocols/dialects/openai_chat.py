"""`openai.chat`: OpenAI's chat completions, with the extensions of vLLM, SGLang and lmdeploy."""

from typing import Annotated

import msgspec
from msgspec import Meta

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import MAX_MESSAGES, Answer, Normal, Options, Streamed
from protocols.dialects.field import Report, Verdicts, chosen, ignored, refused, withheld
from protocols.dialects.openai_body import Body, asked_of, stops_of, wants_usage
from protocols.dialects.openai_chat_response import completion
from protocols.dialects.openai_chat_stream import ChatStream, replay
from protocols.dialects.openai_error import OpenAIErrors
from protocols.dialects.openai_message import Turn, messages_of
from protocols.dialects.openai_tool import (
    Choice,
    Effort,
    Mode,
    Tools,
    format_guide,
    offer,
    reasoning,
)
from protocols.dialects.sampling import TokenId, Tokens, TopLogprobs, sample_params
from protocols.errors import InvalidRequest
from protocols.message import Guide, Message
from protocols.rollout_state import RolloutState, SampleParams, TokenIds


class Request(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""

    messages: Annotated[list[Turn], Meta(max_length=MAX_MESSAGES)] | None = None
    input_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    """SGLang's and lmdeploy's: the prompt as token ids, which wins over `messages`."""
    tools: Tools | None = None
    tool_choice: Mode | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    """`TemplateKwargs`; open, so that any other name is a refused one and not an unknown one."""
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    metadata: Annotated[object, ignored({})] = None
    store: Annotated[object, ignored(False)] = None
    service_tier: Annotated[object, ignored("auto", "default")] = None
    prompt_cache_key: Annotated[object, ignored()] = None
    prompt_cache_options: Annotated[object, ignored({})] = None
    prompt_cache_retention: Annotated[object, ignored()] = None
    safety_identifier: Annotated[object, ignored()] = None
    verbosity: Annotated[object, ignored("medium")] = None
    stream_reasoning: Annotated[object, ignored(True)] = None

    separate_reasoning: Annotated[object, withheld(True)] = None
    include_reasoning: Annotated[object, withheld(True)] = None
    prediction: Annotated[object, withheld()] = None
    moderation: Annotated[object, withheld()] = None

    functions: Annotated[object, refused([])] = None
    function_call: Annotated[object, refused("none", "auto")] = None
    modalities: Annotated[object, refused(["text"])] = None
    audio: Annotated[object, refused()] = None
    web_search_options: Annotated[object, refused()] = None
    add_generation_prompt: Annotated[object, refused(True)] = None
    continue_final_message: Annotated[object, refused(False)] = None
    add_special_tokens: Annotated[object, refused(False)] = None
    chat_template: Annotated[object, refused()] = None
    documents: Annotated[object, refused([])] = None


_decoder = msgspec.json.Decoder(Request)
_request = Verdicts(Request)


class OpenAIChat(OpenAIErrors):
    """The dialect."""

    name = "openai.chat"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        options = request.rollout or Options()
        report = Report(options.unsupported)
        _request.check(request, report)
        offered = offer(request.tools, request.tool_choice, request.parallel_tool_calls, report)
        guide = format_guide(offered, request.response_format, "response_format", report)
        state = RolloutState(
            message=_conversation(request, report),
            prompt_ids=TokenIds(request.input_ids or ()),
            tools=offered.tools,
            tool_choice=offered.choice,
            reasoning=reasoning(
                request.reasoning_effort,
                request.enable_thinking,
                request.chat_template_kwargs,
                report,
            ),
            sample_params=_params_of(request, guide, report),
        )
        return Normal(
            state,
            request.model,
            options,
            stream=bool(request.stream),
            stream_usage=wants_usage(request, report),
            asked=asked_of(request),
            ignored=report.noted,
        )

    def respond(self, answer: Answer) -> bytes:
        """A chat completion; raises RolloutError where a sample did not come to its end."""
        return encode_json(completion(answer))

    def stream(self, streamed: Streamed) -> ChatStream:
        """The frames of a job that begins."""
        return ChatStream(streamed)

    def replay(self, body: bytes) -> bytes:
        """The frames of a whole response."""
        return replay(body)


def _conversation(request: Request, report: Report) -> tuple[Message, ...]:
    if request.input_ids:
        if request.messages:
            report.ignore("messages", "`input_ids` is the prompt; send one of them")
        return ()
    if request.messages:
        return messages_of(request.messages, report)
    problem = "required" if request.messages is None else "Expected `array` of length >= 1"
    raise InvalidRequest(f"`messages`: {problem}", param="messages")


def _params_of(request: Request, guide: Guide | None, report: Report) -> SampleParams:
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            "`top_logprobs`: needs `logprobs` true; send it, or leave `top_logprobs` out",
            param="top_logprobs",
        )
    return sample_params(
        request,
        report,
        max_tokens=chosen(
            report,
            "",
            None,
            max_completion_tokens=request.max_completion_tokens,
            max_tokens=request.max_tokens,
        ),
        stops=stops_of(request),
        sampling_seed=request.seed,
        return_logprob=bool(request.logprobs),
        top_logprobs=request.top_logprobs,
        guide=guide,
    )
