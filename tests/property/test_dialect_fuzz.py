"""Whatever a body holds, a dialect understands it or refuses it; it never fails in another way."""

import json
from collections.abc import Callable
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.codec import decode_json
from protocols.dialects import DIALECTS
from protocols.dialects.base import Dialect, Normal
from protocols.errors import RequestError
from protocols.rollout_state import Status

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
Containers = list[tuple[dict[str, JsonValue] | list[JsonValue], str | int]]

TEXT_TURN: JsonValue = {"role": "user", "content": "Hi"}
BLOCK_TURN: JsonValue = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
TOOL_TURNS: list[JsonValue] = [
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "T",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "https://a", "detail": "auto"}}],
    },
]
FUNCTION: JsonValue = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
CLAUDE_TURNS: list[JsonValue] = [
    BLOCK_TURN,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "T", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"},
            {"type": "text", "text": "A"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}},
        ],
    },
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "1",
                "is_error": True,
                "content": [
                    {"type": "text", "text": "3"},
                    {"type": "image", "source": {"type": "url", "url": "https://a"}},
                ],
            },
            {
                "type": "document",
                "title": "t",
                "source": {"type": "text", "media_type": "text/plain", "data": "D"},
            },
            {
                "type": "search_result",
                "source": "s",
                "title": "t",
                "content": [{"type": "text", "text": "x"}],
            },
        ],
    },
]
CUSTOM: JsonValue = {
    "name": "f",
    "description": "d",
    "input_schema": {"type": "object"},
    "input_examples": [{"a": 1}],
    "strict": True,
}
SHARED: dict[str, JsonValue] = {
    "model": "m",
    "max_tokens": 5,
    "n": 2,
    "stop": ["a", "b"],
    "seed": 3,
    "temperature": 0.5,
    "logit_bias": {"7": -1},
    "stream": True,
    "stream_options": {"include_usage": True},
    "rollout": {"group": "g", "script": {"text": "x"}, "unsupported": "ignore"},
    "metadata": {"a": "b"},
}
CONVERSATION: dict[str, JsonValue] = {
    "model": "m",
    "messages": CLAUDE_TURNS,
    "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
    "tools": [CUSTOM],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low"},
}
VALID: dict[str, dict[str, JsonValue]] = {
    "openai.chat": {
        **SHARED,
        "messages": [{"role": "system", "content": "S"}, BLOCK_TURN, *TOOL_TURNS, TEXT_TURN],
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [FUNCTION],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
    },
    "openai.completions": {
        **SHARED,
        "prompt": [[1, 2, 3]],
        "logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    },
    "claude.messages": {
        **CONVERSATION,
        "max_tokens": 5,
        "stop_sequences": ["a"],
        "temperature": 1,
        "metadata": {"user_id": "u"},
    },
    "claude.count_tokens": CONVERSATION,
    "generate": {
        "messages": TOOL_TURNS,
        "tools": [FUNCTION],
        "tool_choice": "required",
        "chat_template_kwargs": {"enable_thinking": True},
        "sample_params": {
            "n": 2,
            "max_tokens": 5,
            "stops": ["a"],
            "sampling_seed": 3,
            "logit_bias": {"7": -1},
        },
        "rollout": {"session": "s"},
    },
}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)

words = st.text(max_size=8) | st.sampled_from(
    ["messages", "role", "content", "user", "assistant", "text", "type", "n", "stop", "input_ids"]
)
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**32, 2**63, -(2**63), 2**64, -1])
scalars: st.SearchStrategy[JsonValue] = st.none() | st.booleans() | numbers | words
values: st.SearchStrategy[JsonValue] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4)
)


def places(value: JsonValue) -> Containers:
    """Every place in a value where another could stand."""
    if isinstance(value, dict):
        here: Containers = [(value, key) for key in value]
        return here + [place for inner in value.values() for place in places(inner)]
    if isinstance(value, list):
        here = [(value, index) for index in range(len(value))]
        return here + [place for inner in value for place in places(inner)]
    return []


def replace(holder: dict[str, JsonValue] | list[JsonValue], key: str | int, new: JsonValue) -> None:
    holder[key] = new  # type: ignore[index, call-overload]


def delete(holder: dict[str, JsonValue] | list[JsonValue], key: str | int, _: JsonValue) -> None:
    del holder[key]  # type: ignore[arg-type]


def nest(holder: dict[str, JsonValue] | list[JsonValue], key: str | int, _: JsonValue) -> None:
    holder[key] = [holder[key]]  # type: ignore[index, call-overload]


def add(holder: dict[str, JsonValue] | list[JsonValue], key: str | int, new: JsonValue) -> None:
    if isinstance(holder, dict):
        holder[f"{key}_"] = new
    else:
        holder.append(new)


changes: st.SearchStrategy[
    Callable[[dict[str, JsonValue] | list[JsonValue], str | int, JsonValue], None]
] = st.sampled_from([replace, delete, nest, add])


@st.composite
def mutated(draw: st.DrawFn, protocol: str) -> bytes:
    """A valid body, changed in a few places."""
    body: JsonValue = deepcopy(VALID[protocol])
    for _ in range(draw(st.integers(1, 3))):
        found = places(body)
        if found:
            holder, key = draw(st.sampled_from(found))
            draw(changes)(holder, key, draw(values))
    return json.dumps(body).encode()


def understands_or_refuses(dialect: Dialect, body: bytes) -> None:
    found = outcome(dialect, body)
    if isinstance(found, Normal):
        check_normal(found)
    else:
        assert found.http_status == 400
        assert found.message
        decode_json(dialect.error(found, "job-1"))


def outcome(dialect: Dialect, body: bytes) -> Normal | RequestError:
    try:
        return dialect.normalize(body)
    except RequestError as refusal:
        return refusal


def check_normal(normal: Normal) -> None:
    state, params = normal.state, normal.state.sample_params
    assert state.status is Status.INIT
    assert [bool(state.message), state.prompt is not None, bool(state.prompt_ids)].count(True) == 1
    assert all(message.content for message in state.message)
    assert 1 <= params.n <= 128
    assert params.max_tokens is None or params.min_tokens <= params.max_tokens < 2**31
    assert params.sampling_seed is None or 0 <= params.sampling_seed < 2**63
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert params.top_k >= 0
    assert all(0 < len(stop) <= 256 for stop in params.stops)


@each_dialect
@given(body=st.binary(max_size=200))
def test_any_bytes_are_understood_or_refused(dialect: Dialect, body: bytes) -> None:
    understands_or_refuses(dialect, body)


@each_dialect
@given(value=values)
def test_any_json_is_understood_or_refused(dialect: Dialect, value: JsonValue) -> None:
    understands_or_refuses(dialect, json.dumps(value).encode())


@each_dialect
@given(data=st.data())
def test_any_change_of_a_valid_body_is_understood_or_refused(
    dialect: Dialect, data: st.DataObject
) -> None:
    understands_or_refuses(dialect, data.draw(mutated(dialect.name)))


@each_dialect
@given(data=st.data())
def test_any_cut_of_a_valid_body_is_understood_or_refused(
    dialect: Dialect, data: st.DataObject
) -> None:
    body = json.dumps(VALID[dialect.name]).encode()
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, len(body)))
    understands_or_refuses(dialect, body[:start] + data.draw(st.binary(max_size=4)) + body[end:])


@each_dialect
def test_bodies_that_the_changes_start_from_are_understood(dialect: Dialect) -> None:
    check_normal(dialect.normalize(json.dumps(VALID[dialect.name]).encode()))
