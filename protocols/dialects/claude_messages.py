"""`claude.messages`: Anthropic's messages.

Beyond the current API: `temperature` (to 2), `top_p` and `top_k` are accepted at top level, and
`model` may be left out.
"""

from itertools import groupby
from operator import attrgetter
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import MAX_MESSAGES, Answer, Name, Normal, Options
from protocols.dialects.field import Verdicts, ignored, path, refused
from protocols.dialects.result import Result, completion_tokens, finish_of, result_of
from protocols.dialects.sampling import NEUTRAL, Stops, Temperature, Tokens, TopK, TopP
from protocols.errors import InvalidRequest, RolloutError, UnsupportedOption
from protocols.message import Message, Text
from protocols.rollout_state import RolloutState, SampleParams

StopReason = Literal[
    "end_turn", "stop_sequence", "max_tokens", "tool_use", "model_context_window_exceeded"
]
ERROR_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status to Anthropic's `type`; any other is an `api_error`."""


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of content: text's fields, and those of the kinds that its type refuses."""

    type: str
    text: str | None = None
    cache_control: object = None
    """Accepted in silence: agents set it on every turn, and it changes no token."""
    citations: Annotated[object, ignored([])] = None
    source: Annotated[object, refused()] = None
    title: Annotated[object, refused()] = None
    context: Annotated[object, refused()] = None
    id: Annotated[object, refused()] = None
    name: Annotated[object, refused()] = None
    input: Annotated[object, refused()] = None
    caller: Annotated[object, refused()] = None
    tool_use_id: Annotated[object, refused()] = None
    content: Annotated[object, refused()] = None
    is_error: Annotated[object, refused()] = None
    thinking: Annotated[object, refused()] = None
    signature: Annotated[object, refused()] = None
    data: Annotated[object, refused()] = None
    file_id: Annotated[object, refused()] = None


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    role: str
    content: str | Annotated[list[Block], Meta(min_length=1)]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""

    max_tokens: Tokens
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: Name | None = None
    rollout: Options | None = None
    system: str | list[Block] | None = None
    stop_sequences: Stops | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    cache_control: object = None
    """Accepted in silence."""

    metadata: Annotated[object, ignored({})] = None
    service_tier: Annotated[object, ignored("auto", "standard_only")] = None
    speed: Annotated[object, ignored("standard")] = None
    inference_geo: Annotated[object, ignored()] = None
    diagnostics: Annotated[object, ignored({})] = None
    user_profile_id: Annotated[object, ignored()] = None
    workspace_id: Annotated[object, ignored()] = None

    stream: Annotated[object, refused(False)] = None
    tools: Annotated[object, refused([])] = None
    tool_choice: Annotated[object, refused({"type": "none"}, {"type": "auto"})] = None
    thinking: Annotated[object, refused({"type": "disabled"})] = None
    output_config: Annotated[object, refused({}, {"format": None})] = None
    output_format: Annotated[object, refused()] = None
    container: Annotated[object, refused()] = None
    mcp_servers: Annotated[object, refused([])] = None
    fallbacks: Annotated[object, refused([])] = None
    fallback_credit_token: Annotated[object, refused()] = None
    context_management: Annotated[object, refused({})] = None
    compaction: Annotated[object, refused()] = None
    thread: Annotated[object, refused()] = None
    billing_policy: Annotated[object, refused()] = None


_decoder = msgspec.json.Decoder(Request)
_request = Verdicts(Request)
_block = Verdicts(Block)


class AnswerText(msgspec.Struct, frozen=True, gc=False, tag="text"):
    """The generated text."""

    text: str


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens; none of them is read from or written to a cache that is billed apart."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="message"):
    """A response body."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: tuple[AnswerText, ...]
    stop_reason: StopReason
    stop_sequence: str | None
    usage: Usage
    rollout: Result


class Error(msgspec.Struct, frozen=True):
    """What is under `error`."""

    type: str
    message: str


class ErrorBody(msgspec.Struct, frozen=True, tag="error"):
    """An error body."""

    error: Error
    request_id: str


class ClaudeMessages:
    """The dialect."""

    name = "claude.messages"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        unused = _request.check(request)
        return Normal(
            RolloutState(message=_messages_of(request, unused), sample_params=_params_of(request)),
            request.model,
            request.rollout or Options(),
            tuple(dict.fromkeys(unused)),
        )

    def respond(self, answer: Answer) -> bytes:
        """A message; raises RolloutError where the sample did not come to its end."""
        (state,) = answer.states
        stopped = state.stop_reason if isinstance(state.stop_reason, str) else None
        return encode_json(
            AnswerMessage(
                id=f"msg_{answer.job_id}",
                model=answer.model,
                content=(AnswerText(state.text),),
                stop_reason=_stop_reason(state, answer.context_tokens),
                stop_sequence=stopped,
                usage=Usage(len(state.prompt_ids), completion_tokens(answer)),
                rollout=result_of(answer),
            )
        )

    def error(self, error: RolloutError, job_id: str) -> bytes:
        """Anthropic's error body."""
        kind = ERROR_TYPES.get(error.http_status, "api_error")
        return encode_json(ErrorBody(Error(kind, error.message), job_id))


def _params_of(request: Request) -> SampleParams:
    return SampleParams(
        max_tokens=request.max_tokens,
        temperature=NEUTRAL.temperature if request.temperature is None else request.temperature,
        top_p=request.top_p or NEUTRAL.top_p,
        top_k=max(request.top_k or 0, 0),
        stops=tuple(request.stop_sequences or ()),
        return_logprob=False,
    )


def _messages_of(request: Request, unused: list[str]) -> tuple[Message, ...]:
    """System first, then the turns; neighbours of one role become one message."""
    if request.messages[-1].role == "assistant":
        raise UnsupportedOption(
            "`messages`: the last one is the assistant's, and prefilling its answer is not "
            "supported; end with a user message",
            param="messages",
        )
    turns = [
        Message(_role(turn, at), _texts(turn.content, unused, "messages", at, "content"))
        for at, turn in enumerate(request.messages)
    ]
    if request.system:
        turns.insert(0, Message("system", _texts(request.system, unused, "system")))
    return tuple(
        [
            Message(role, tuple([block for turn in same for block in turn.content]))
            for role, same in groupby(turns, key=attrgetter("role"))
        ]
    )


def _role(turn: Turn, at: int) -> Literal["user", "assistant", "system"]:
    if turn.role == "user" or turn.role == "assistant" or turn.role == "system":
        return turn.role
    field = path("messages", at, "role")
    raise InvalidRequest(f"`{field}`: Expected one of user, assistant, system", param=field)


def _texts(content: str | list[Block], unused: list[str], *at: str | int) -> tuple[Text, ...]:
    if isinstance(content, str):
        return (Text(content),)
    return tuple([_text(block, unused, *at, index) for index, block in enumerate(content)])


def _text(block: Block, unused: list[str], *at: str | int) -> Text:
    if block.type != "text":
        field = path(*at, "type")
        raise UnsupportedOption(f"`{field}`: only blocks of type 'text' are supported", param=field)
    unused += _block.check(block, *at)
    if block.text is None:
        field = path(*at, "text")
        raise InvalidRequest(f"`{field}`: required", param=field)
    return Text(block.text)


def _stop_reason(state: RolloutState, context_tokens: int) -> StopReason:
    match finish_of(state):
        case "stop":
            return "stop_sequence" if isinstance(state.stop_reason, str) else "end_turn"
        case "tool_calls":
            return "tool_use"
        case "length":
            full = len(state.prompt_ids) + len(state.response_ids) >= context_tokens
            return "model_context_window_exceeded" if full else "max_tokens"
