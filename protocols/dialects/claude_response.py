"""The whole response of Claude's messages."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from protocols.codec import encode_json, object_text
from protocols.dialects.base import Answer
from protocols.dialects.claude_message import RAW_ARGUMENTS
from protocols.dialects.result import (
    Result,
    completion_tokens,
    finish_of,
    output_of,
    result_of,
    thinking_tokens,
)
from protocols.message import Block, Text, Thinking, ToolUse
from protocols.rollout_state import RolloutState

SIGNATURE = "cm9sbG91dHE="
"""Of every thinking block; any is taken back."""

StopReason = Literal[
    "end_turn", "stop_sequence", "max_tokens", "tool_use", "model_context_window_exceeded"
]


class AnswerText(msgspec.Struct, frozen=True, gc=False, tag="text"):
    """Generated text."""

    text: str


class AnswerThinking(msgspec.Struct, frozen=True, gc=False, tag="thinking"):
    """Generated thinking."""

    thinking: str
    signature: str = SIGNATURE


class AnswerToolUse(msgspec.Struct, frozen=True, gc=False, tag="tool_use"):
    """A generated call."""

    id: str
    name: str
    input: msgspec.Raw
    """The model's own JSON object."""


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


class OutputDetails(msgspec.Struct, frozen=True, gc=False):
    """Of which kind the generated tokens are."""

    thinking_tokens: int


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens; none of them is read from or written to a cache that is billed apart."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: OutputDetails | UnsetType = UNSET
    """Where the answer holds thinking."""


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="message"):
    """A response body."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason
    stop_sequence: str | None
    usage: Usage
    rollout: Result


def message_of(answer: Answer) -> AnswerMessage:
    """The response; raises RolloutError where the sample did not come to its end."""
    (state,) = answer.states
    return AnswerMessage(
        id=f"msg_{answer.job_id}",
        model=answer.model,
        content=[shown for block in output_of(state) if (shown := _shown(block))],
        stop_reason=stop_reason(state, answer.context_tokens),
        stop_sequence=state.stop_reason if isinstance(state.stop_reason, str) else None,
        usage=usage_of(answer),
        rollout=result_of(answer),
    )


def usage_of(answer: Answer) -> Usage:
    """Anthropic's usage."""
    thought = thinking_tokens(answer)
    return Usage(
        len(answer.states[0].prompt_ids),
        completion_tokens(answer),
        output_tokens_details=UNSET if thought is None else OutputDetails(thought),
    )


def stop_reason(state: RolloutState, context_tokens: int) -> StopReason:
    """Why a completed sample ended, in Anthropic's words; raises RolloutError for any other."""
    match finish_of(state):
        case "stop":
            return "stop_sequence" if isinstance(state.stop_reason, str) else "end_turn"
        case "tool_calls":
            return "tool_use"
        case "length":
            full = len(state.prompt_ids) + len(state.response_ids) >= context_tokens
            return "model_context_window_exceeded" if full else "max_tokens"


def call_id(block_id: str) -> str:
    """Anthropic's spelling of a new call's id."""
    return f"toolu_{block_id}"


def input_of(arguments: str) -> bytes:
    """A call's input: the JSON object that the model wrote, else what it wrote as the one value of an object."""
    told = object_text(arguments)
    return encode_json({RAW_ARGUMENTS: arguments}) if told is None else told.encode()


def _shown(block: Block) -> AnswerBlock | None:
    match block:
        case Text(text):
            return AnswerText(text)
        case Thinking(text):
            return AnswerThinking(text)
        case ToolUse(id, name, arguments):
            return AnswerToolUse(call_id(id), name, msgspec.Raw(input_of(arguments)))
        case _:
            return None
