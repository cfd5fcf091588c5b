"""Requests and responses of every dialect, one file a case in tests/golden/dialects, compared exactly.

A case's samples are drawn from a vocabulary of 256 tokens, one a byte.
"""

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from anthropic.types import Message as ClaudeMessage
from anthropic.types import MessageTokensCount
from anthropic.types.shared import ErrorResponse, ErrorType
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.shared import ErrorObject

from protocols.codec import decode_json, encode_json
from protocols.dialects import DIALECTS, dialect_of
from protocols.dialects.base import Answer, Normal, Options
from protocols.errors import error_of
from protocols.message import Message, Reasoning, Text, Thinking, Tool, ToolChoice, ToolUse
from protocols.rollout_state import (
    Logprobs,
    RolloutState,
    SampleParams,
    Status,
    TokenIds,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dialects"


class Expected(msgspec.Struct, forbid_unknown_fields=True):
    """What a dialect shall understand of a body."""

    message: tuple[Message, ...]
    prompt: str | None
    input_ids: list[int]
    sample_params: SampleParams
    model: str | None
    options: Options
    ignored: tuple[str, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    reasoning: Reasoning = Reasoning()
    stream: bool = False
    stream_usage: bool = False
    counts: bool = False


class Conditions(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer says of the job."""

    job_id: str
    model: str
    created_s: int
    attempts: int
    context_tokens: int


class Case(msgspec.Struct, forbid_unknown_fields=True):
    """One file."""

    protocol: str
    body: dict[str, object]
    answer: Conditions
    prompt_ids: list[int]
    samples: list[RolloutState]
    normal: Expected
    response: dict[str, object]


class ErrorCase(msgspec.Struct, forbid_unknown_fields=True):
    """One error, by the code of its class."""

    error: str
    param: str | None
    body: dict[str, object]


class ErrorCases(msgspec.Struct, forbid_unknown_fields=True):
    """One file of errors."""

    protocol: str
    job_id: str
    message: str
    errors: list[ErrorCase]


def numbers(kind: type, value: list[int | float | str]) -> object:
    """Arrays are lists in JSON; infinities and NaN are strings in them."""
    if kind is TokenIds:
        return TokenIds(int(item) for item in value)
    return Logprobs(float(item) for item in value) if kind is Logprobs else value


def load(path: Path) -> Case:
    return msgspec.json.decode(path.read_bytes(), type=Case, dec_hook=numbers)


def named(path: Path) -> str:
    return path.stem


ERRORS = sorted(GOLDEN.glob("errors_*.json"))
CASES = sorted(set(GOLDEN.glob("*.json")) - set(ERRORS))
CLAUDE_ERROR_TYPES = {*get_args(ErrorType), "request_too_large"}
"""The last is documented, but the client has no type for it."""
each_case = pytest.mark.parametrize("path", CASES, ids=named)
each_error_file = pytest.mark.parametrize("path", ERRORS, ids=named)


def answer_to(case: Case, normal: Normal) -> Answer:
    states = tuple(
        msgspec.structs.replace(
            sample,
            message=normal.state.message,
            prompt=normal.state.prompt,
            prompt_ids=TokenIds(case.prompt_ids),
            sample_params=normal.state.sample_params,
            status=Status.COMPLETED,
        )
        for sample in case.samples
    )
    return Answer(
        job_id=case.answer.job_id,
        model=case.answer.model,
        created_s=case.answer.created_s,
        states=states,
        ignored=normal.ignored,
        attempts=case.answer.attempts,
        context_tokens=case.answer.context_tokens,
        token_bytes=lambda token_id: bytes([token_id]),
        asked=normal.asked,
    )


def respond(case: Case) -> bytes:
    dialect = dialect_of(case.protocol)
    return dialect.respond(answer_to(case, dialect.normalize(encode_json(case.body))))


def test_every_dialect_has_golden_cases() -> None:
    assert {load(path).protocol for path in CASES} == set(DIALECTS)


@each_case
def test_body_is_understood_as_the_golden_file_says(path: Path) -> None:
    case = load(path)
    normal = dialect_of(case.protocol).normalize(encode_json(case.body))
    understood = Expected(
        normal.state.message,
        normal.state.prompt,
        normal.state.prompt_ids.tolist(),
        normal.state.sample_params,
        normal.model,
        normal.options,
        normal.ignored,
        normal.state.tools,
        normal.state.tool_choice,
        normal.state.reasoning,
        normal.stream,
        normal.stream_usage,
        normal.counts,
    )
    assert understood == case.normal
    assert normal.state.status is Status.INIT


@each_case
def test_response_is_the_golden_one(path: Path) -> None:
    case = load(path)
    assert respond(case) == encode_json(case.response)


@each_case
def test_response_is_valid_for_the_official_client(path: Path) -> None:
    case = load(path)
    body = respond(case)
    match case.protocol:
        case "openai.chat":
            choices = ChatCompletion.model_validate_json(body, strict=True).choices
            said = [said_by_openai(choice.message) for choice in choices]
        case "openai.completions":
            plain = Completion.model_validate_json(body, strict=True)
            said = [spoken(choice.text, "", []) for choice in plain.choices]
        case "claude.messages":
            said = [said_by_claude(ClaudeMessage.model_validate_json(body, strict=True))]
        case "claude.count_tokens":
            count = MessageTokensCount.model_validate_json(body, strict=True)
            assert count.input_tokens == len(case.prompt_ids)
            return
        case _:
            return
    assert said == [blocks_of(sample) for sample in case.samples]


Said = dict[str, object]


def blocks_of(sample: RolloutState) -> Said:
    """Text, thinking and calls of a sample, whichever it has."""
    output = sample.output or (Text(sample.text),)
    calls = [(block.name, block.arguments) for block in output if isinstance(block, ToolUse)]
    return spoken(
        "".join(block.text for block in output if isinstance(block, Text)),
        "".join(block.text for block in output if isinstance(block, Thinking)),
        calls,
    )


def spoken(text: str, thinking: str, calls: list[tuple[str, str]]) -> Said:
    parts: Said = {"text": text, "thinking": thinking, "calls": calls}
    return {name: part for name, part in parts.items() if part}


def said_by_openai(message: ChatCompletionMessage) -> Said:
    thinking: str = getattr(message, "reasoning_content", "")
    assert getattr(message, "reasoning", "") == thinking
    calls = [
        (call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
        if call.type == "function"
    ]
    return spoken(message.content or "", thinking, calls)


def said_by_claude(message: ClaudeMessage) -> Said:
    text = thinking = ""
    calls: list[tuple[str, str]] = []
    for block in message.content:
        match block.type:
            case "text":
                text += block.text
            case "thinking":
                thinking += block.thinking
            case "tool_use":
                raw = block.input.get("rollout_raw_arguments")
                calls.append((block.name, raw if isinstance(raw, str) else json.dumps(block.input)))
            case _:
                raise AssertionError(block.type)
    return spoken(text, thinking, calls)


@each_case
def test_returned_tokens_logprobs_and_versions_align(path: Path) -> None:
    for tokens in returned_samples(load(path)):
        ids, logprobs, versions = tokens
        assert logprobs is None or len(logprobs) == len(ids)
        assert versions[0][1] == 0 if versions else not ids


def returned_samples(
    case: Case,
) -> list[tuple[list[int], list[float] | None, list[list[int]]]]:
    response = decode_json(respond(case))
    if case.protocol == "claude.count_tokens":
        return []
    if case.protocol == "generate":
        return [
            (sample["response_ids"], sample["logprobs"], sample["policy_versions"])
            for sample in response["samples"]
        ]
    several = len(case.samples) > 1
    holders = response["choices"] if several else [response]
    results = [holder["rollout"] for holder in holders]
    return [(each["token_ids"], each["logprobs"], each["policy_versions"]) for each in results]


@each_error_file
def test_error_bodies_are_the_golden_ones(path: Path) -> None:
    cases = msgspec.json.decode(path.read_bytes(), type=ErrorCases)
    dialect = dialect_of(cases.protocol)
    for case in cases.errors:
        error = error_of(case.error, cases.message)
        error.param = case.param
        assert error.code == case.error
        assert decode_json(dialect.error(error, cases.job_id)) == case.body


@each_error_file
def test_error_bodies_are_valid_for_the_official_client(path: Path) -> None:
    cases = msgspec.json.decode(path.read_bytes(), type=ErrorCases)
    for case in cases.errors:
        if cases.protocol.startswith("claude."):
            error = ErrorResponse.construct(None, **case.body).error
            assert error.type in CLAUDE_ERROR_TYPES
        else:
            assert set(case.body) == {"error"}
            ErrorObject.model_validate(case.body["error"], strict=True)
