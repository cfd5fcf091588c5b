"""The whole response of OpenAI's chat completions."""

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from protocols.dialects.base import Answer
from protocols.dialects.openai_body import TOKEN_IDS
from protocols.dialects.openai_call import ToolCall, calls_of
from protocols.dialects.openai_usage import Usage, usage_of
from protocols.dialects.result import (
    Result,
    SampleResult,
    finish_of,
    finite,
    output_of,
    result_of,
    sample_result,
    text_of,
    thinking_of,
    tops_of,
)
from protocols.rollout_state import RolloutState


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
    content: str | None
    """Null where the turn is nothing but calls."""
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    """The same under vLLM's name."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True, gc=False):
    """One sample."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | UnsetType = UNSET
    """vLLM's: the stop string or stop token id that matched."""
    token_ids: list[int] | UnsetType = UNSET
    """vLLM's, where `return_token_ids` asks for it."""
    rollout: SampleResult | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A response body."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    rollout: Result


def completion(answer: Answer) -> ChatCompletion:
    """The response; raises RolloutError where a sample did not come to its end."""
    shows_ids = TOKEN_IDS in answer.asked
    return ChatCompletion(
        id=f"chatcmpl-{answer.job_id}",
        created=answer.created_s,
        model=answer.model,
        choices=[_choice(state, answer) for state in answer.states],
        usage=usage_of(answer),
        prompt_token_ids=answer.states[0].prompt_ids.tolist() if shows_ids else UNSET,
        rollout=result_of(answer),
    )


def _choice(state: RolloutState, answer: Answer) -> Choice:
    shown = state.sample_params.return_logprob
    return Choice(
        state.index,
        _message(state),
        logprobs_of(state, answer.token_bytes) if shown else None,
        finish_of(state),
        UNSET if state.stop_reason is None else state.stop_reason,
        state.response_ids.tolist() if TOKEN_IDS in answer.asked else UNSET,
        UNSET if len(answer.states) == 1 else sample_result(state),
    )


def _message(state: RolloutState) -> AnswerMessage:
    output = output_of(state)
    text, thought, calls = text_of(output), thinking_of(output) or UNSET, calls_of(output)
    return AnswerMessage(
        content=None if calls and not text else text,
        reasoning_content=thought,
        reasoning=thought,
        tool_calls=calls or UNSET,
    )


def logprobs_of(state: RolloutState, token_bytes: Callable[[int], bytes]) -> ChoiceLogprobs:
    """Of every generated token."""
    columns = (state.response_ids, finite(state.logprobs), tops_of(state))
    return ChoiceLogprobs(
        [
            TokenLogprob(*_spelled(token_id, logprob, token_bytes), _tops(top, token_bytes))
            for token_id, logprob, top in zip(*columns, strict=True)
        ]
    )


def _tops(tops: list[tuple[int, float]], token_bytes: Callable[[int], bytes]) -> list[TopLogprob]:
    return [TopLogprob(*_spelled(token_id, logprob, token_bytes)) for token_id, logprob in tops]


def _spelled(
    token_id: int, logprob: float, token_bytes: Callable[[int], bytes]
) -> tuple[str, float, list[int]]:
    data = token_bytes(token_id)
    return data.decode(errors="replace"), logprob, list(data)
