"""What every dialect returns under `rollout`: tokens, log-probabilities, versions, attempts."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from protocols.dialects.base import Answer
from protocols.errors import RolloutError
from protocols.message import Block, Text, Thinking
from protocols.rollout_state import RolloutState

LOGPROB_FLOOR = -9999.0
"""Stands for a log-probability that JSON has no number for, as in OpenAI's and vLLM's responses."""


class SampleResult(msgspec.Struct, frozen=True, gc=False):
    """One sample's tokens."""

    token_ids: list[int]
    logprobs: list[float]
    """`[tokens]`"""
    policy_versions: tuple[tuple[int, int], ...]
    """`[[version, start], ...]`"""
    parse_error: str | UnsetType = UNSET
    """Why markup stayed text."""


class Result(msgspec.Struct, frozen=True, gc=False):
    """A response's `rollout`; the tokens lie here for a single sample, else with each choice."""

    attempts: int
    ignored: tuple[str, ...]
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    logprobs: list[float] | UnsetType = UNSET
    policy_versions: tuple[tuple[int, int], ...] | UnsetType = UNSET
    parse_error: str | UnsetType = UNSET


def result_of(answer: Answer) -> Result:
    """The `rollout` of a chat response."""
    first, *others = answer.states
    prompt_ids = first.prompt_ids.tolist()
    if others:
        return Result(answer.attempts, answer.ignored, prompt_ids)
    sample = sample_result(first)
    return Result(
        answer.attempts,
        answer.ignored,
        prompt_ids,
        sample.token_ids,
        sample.logprobs,
        sample.policy_versions,
        sample.parse_error,
    )


def sample_result(state: RolloutState) -> SampleResult:
    """One sample's tokens."""
    return SampleResult(
        state.response_ids.tolist(),
        finite(state.logprobs),
        state.policy_versions,
        UNSET if state.parse_error is None else state.parse_error,
    )


def tops_of(state: RolloutState) -> list[list[tuple[int, float]]]:
    """`[response tokens][top_logprobs]` of token id and log-probability, likeliest first."""
    width = state.sample_params.top_logprobs
    flat = list(zip(state.top_ids.tolist(), finite(state.top_logprobs), strict=True))
    return [flat[at * width : (at + 1) * width] for at in range(len(state.response_ids))]


def output_of(state: RolloutState) -> tuple[Block, ...]:
    """What a sample says; its text, where nobody looked for blocks in it."""
    return state.output or ((Text(state.response),) if state.response else ())


def text_of(output: Sequence[Block]) -> str:
    """The text of an answer, without thinking and calls."""
    return "".join([block.text for block in output if isinstance(block, Text)])


def thinking_of(output: Sequence[Block]) -> str:
    """The thinking of an answer."""
    return "".join([block.text for block in output if isinstance(block, Thinking)])


def finite(logprobs: Sequence[float]) -> list[float]:
    """Log-probabilities that JSON can carry: the floor stands for what is not finite, or below it.

    The rollout state keeps the values as they were.
    """
    return [value if LOGPROB_FLOOR < value < math.inf else LOGPROB_FLOOR for value in logprobs]


def finish_of(state: RolloutState) -> Literal["stop", "length", "tool_calls"]:
    """Why a completed sample ended; raises RolloutError for one that did not come to its end.

    A broken sample is never shown as an answer: a trainer would learn from it.
    """
    reason = state.finish_reason
    if reason == "stop" or reason == "length" or reason == "tool_calls":
        return reason
    raise RolloutError(f"sample {state.index} has no answer: it ended as {reason}")


def completion_tokens(answer: Answer) -> int:
    """Generated tokens of all samples."""
    return sum([len(state.response_ids) for state in answer.states])


def thinking_tokens(answer: Answer) -> int | None:
    """Tokens of all samples that have a part in their thinking; None where there is none."""
    counts = [_thinking_tokens(state, answer.token_bytes) for state in answer.states]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _thinking_tokens(state: RolloutState, token_bytes: Callable[[int], bytes]) -> int | None:
    thoughts = [block.text.encode() for block in state.output if isinstance(block, Thinking)]
    if not thoughts:
        return None
    pieces = [token_bytes(token_id) for token_id in state.response_ids]
    ends, spelled = list(accumulate(map(len, pieces))), b"".join(pieces)
    count = reached = 0
    for thought in filter(None, thoughts):
        at = spelled.find(thought, reached)
        if at < 0:
            return None
        reached = at + len(thought)
        count += bisect_left(ends, reached) - bisect_left(ends, at + 1) + 1
    return count
