"""Bodies that are malformed, hostile or huge: a short 400 in bounded time, or understood as they stand."""

import time

import pytest

from protocols.codec import decode_json, encode_json
from protocols.dialects import DIALECTS, dialect_of
from protocols.dialects.base import Dialect
from protocols.errors import InvalidRequest, RequestError
from protocols.message import ToolUse
from tests.dialect_bodies import BLOCKS, CUSTOM, FUNCTION, PLAIN, USER, Body, normalize

LIMIT_S = 10
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
DEEP = 500
"""Deeper than what is taken, not so deep that the decoder refuses."""


def nested(levels: int) -> Body:
    value: Body = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


BAD_BODIES = {
    "empty": b"",
    "not an object": b"[]",
    "null": b"null",
    "cut": b'{"messages": [',
    "trailing": b"{} {}",
    "nan": b'{"messages": NaN}',
    "raw nul": b'{"messages": "\x00"}',
    "not utf-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "encoded surrogate": b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "deep": b'{"messages": ' + b"[" * 200_000,
    "deep, unchecked": b'{"metadata": ' + b'{"a":' * 200_000,
    "deep, refused": b'{"tools": ' + b"[" * 200_000,
    "giant integer": b'{"messages": [], "seed": ' + b"9" * 10_000 + b"}",
    "giant integer, unchecked": b'{"metadata": ' + b"9" * 10_000 + b"}",
    "giant float": b'{"messages": [], "temperature": 1e999}',
    "long unknown field": b'{"' + b"x" * 1_000_000 + b'": 1}',
}


@each_dialect
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_body_is_a_short_request_error(dialect: Dialect, body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        dialect.normalize(body)
    assert caught.value.http_status == 400
    assert len(caught.value.message) < 1000
    decode_json(dialect.error(caught.value, "job-1"))


@pytest.mark.parametrize("protocol", BLOCKS)
def test_a_hundred_thousand_messages_are_refused_in_bounded_time(protocol: str) -> None:
    body = encode_json(PLAIN[protocol] | {"messages": [USER] * 100_000})
    begun_s = time.monotonic()
    with pytest.raises(InvalidRequest, match="length <= 4096"):
        dialect_of(protocol).normalize(body)
    assert time.monotonic() - begun_s < LIMIT_S


@pytest.mark.parametrize("protocol", BLOCKS)
def test_as_many_messages_as_may_be_are_understood_in_bounded_time(protocol: str) -> None:
    turns = [USER, {"role": "assistant", "content": "A"}] * 2047 + [USER]
    begun_s = time.monotonic()
    normal = normalize(protocol, PLAIN[protocol] | {"messages": turns})
    assert len(normal.state.message) == 4095
    assert time.monotonic() - begun_s < LIMIT_S


@pytest.mark.parametrize(
    ("protocol", "given", "field"),
    [
        (
            "openai.chat",
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": nested(DEEP)}}
                ]
            },
            "tools[0].function.parameters",
        ),
        (
            "openai.chat",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": nested(DEEP)},
                }
            },
            "response_format.json_schema.schema",
        ),
        (
            "claude.messages",
            {"tools": [CUSTOM | {"input_schema": nested(DEEP)}]},
            "tools[0].input_schema",
        ),
        (
            "claude.messages",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "tool_use", "id": "1", "name": "f", "input": nested(DEEP)}
                        ],
                    },
                    USER,
                ]
            },
            "messages[0].content[0].input",
        ),
    ],
)
def test_schema_or_argument_that_is_too_deep_is_named(
    protocol: str, given: Body, field: str
) -> None:
    with pytest.raises(InvalidRequest, match="nested deeper than 100 levels") as caught:
        normalize(protocol, PLAIN[protocol] | given)
    assert caught.value.param == field


def test_schema_as_deep_as_may_be_is_taken() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(100)}}
    normal = normalize("openai.chat", PLAIN["openai.chat"] | {"tools": [tool]})
    assert normal.state.tools[0].parameters.count("{") == 100


def test_numbers_of_any_size_stay_in_schemas() -> None:
    function = {"name": "f", "parameters": {"maximum": 1e300}}
    body = encode_json(
        PLAIN["openai.chat"] | {"tools": [{"type": "function", "function": function}]}
    ).replace(b"1e300", b"1" + b"0" * 400)
    found = dialect_of("openai.chat").normalize(body).state.tools[0]
    assert found.parameters == f'{{"maximum":{10**400}}}'


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    turns = encode_json([USER]).decode()
    body = f'{{"messages":[],"messages":{turns},"n":1,"n":2}}'.encode()
    assert dialect_of("openai.chat").normalize(body).state.sample_params.n == 2
    call = '{"type":"tool_use","id":"1","name":"f","input":{"a":1,"a":2}}'
    turn = f'{{"role":"assistant","content":[{call}]}}'
    history = f'{{"max_tokens":1,"messages":[{turn},{turns[1:]}}}'
    found = dialect_of("claude.messages").normalize(history.encode()).state.message
    assert found[0].content == (ToolUse("1", "f", '{"a":2}'),)


@pytest.mark.parametrize("text", ["\x00", "\ufffd", "\U0001f600", "\u2028", "a" * 1_000_000])
def test_any_text_is_kept_in_names_and_results(text: str) -> None:
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": text}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": text, "content": text},
    ]
    body = PLAIN["openai.chat"] | {"messages": turns, "tools": [FUNCTION]}
    first, second = normalize("openai.chat", body).state.message
    assert first.content == (ToolUse(text, text, text),)
    assert second.content[0].tool_use_id == text  # type: ignore[union-attr]
