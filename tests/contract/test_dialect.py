"""What every dialect does alike, and what each refuses, ignores and limits."""

from collections.abc import Iterator
from copy import deepcopy

import msgspec
import pytest

from protocols.codec import decode_json, encode_json
from protocols.dialects import (
    DIALECTS,
    claude_messages,
    dialect_of,
    error_body,
    generate,
    openai_chat,
    openai_message,
)
from protocols.dialects.base import Answer, Dialect, Normal
from protocols.dialects.field import Verdict, Verdicts
from protocols.errors import (
    InvalidRequest,
    RequestError,
    RolloutError,
    UnknownProtocol,
    UnsupportedOption,
)
from protocols.message import Message, Text
from protocols.rollout_state import RolloutState, SampleParams, Status, TokenIds

Body = dict[str, object]
Path = tuple[str | int, ...]

USER = {"role": "user", "content": "Hi"}
PLAIN: dict[str, Body] = {
    "openai.chat": {"messages": [USER]},
    "claude.messages": {"messages": [USER], "max_tokens": 8},
    "generate": {"messages": [USER], "sample_params": {}},
}
BLOCKS: dict[str, Body] = {
    name: body | {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    for name, body in PLAIN.items()
}
STRUCTS: list[tuple[str, type[msgspec.Struct], Path]] = [
    ("openai.chat", openai_chat.Request, ()),
    ("openai.chat", openai_message.Turn, ("messages", 0)),
    ("openai.chat", openai_message.Part, ("messages", 0, "content", 0)),
    ("claude.messages", claude_messages.Request, ()),
    ("claude.messages", claude_messages.Block, ("messages", 0, "content", 0)),
    ("generate", generate.Params, ("sample_params",)),
    ("generate", openai_message.Turn, ("messages", 0)),
    ("generate", openai_message.Part, ("messages", 0, "content", 0)),
]
"""Every struct whose fields have verdicts, and where in a body it lies."""
OTHER: object = {"another": "value"}
"""Neutral for no field."""


def normalize(protocol: str, body: object) -> Normal:
    return dialect_of(protocol).normalize(encode_json(body))


def put(body: Body, at: Path, value: object) -> Body:
    """A copy of `body` with `value` at path `at`."""
    changed = deepcopy(body)
    holder: object = changed
    for step in at[:-1]:
        holder = holder[step]  # type: ignore[index]
    holder[at[-1]] = value  # type: ignore[index]
    return changed


def dotted(at: Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".")


def verdicts(*, refuse: bool) -> Iterator[object]:
    for protocol, kind, at in STRUCTS:
        for name, verdict in Verdicts(kind).by_field.items():
            if verdict.refuse is refuse:
                path = (*at, name)
                yield pytest.param(protocol, path, verdict, id=f"{protocol}-{dotted(path)}")


each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
each_refused = pytest.mark.parametrize(("protocol", "at", "verdict"), list(verdicts(refuse=True)))
each_ignored = pytest.mark.parametrize(("protocol", "at", "verdict"), list(verdicts(refuse=False)))


def test_dialects_are_found_by_their_names() -> None:
    assert list(DIALECTS) == ["openai.chat", "claude.messages", "generate"]
    assert all(dialect_of(name).name == name for name in DIALECTS)


def test_unknown_protocol_is_refused_with_the_names() -> None:
    with pytest.raises(
        UnknownProtocol, match=r"openai\.chat, claude\.messages, generate"
    ) as caught:
        dialect_of("openai.chit" * 50)
    assert caught.value.param == "protocol"
    assert len(caught.value.message) < 200


def test_unknown_protocol_gets_an_error_body_in_openais_shape() -> None:
    error = UnknownProtocol("no such protocol", param="protocol")
    body = error_body("soap", error, "job-1")
    assert body == dialect_of("openai.chat").error(error, "job-1")
    assert error_body("claude.messages", error, "job-1") != body


@each_refused
def test_refused_field_is_named(protocol: str, at: Path, verdict: Verdict) -> None:
    with pytest.raises(UnsupportedOption) as caught:
        normalize(protocol, put(BLOCKS[protocol], at, OTHER))
    assert caught.value.param == dotted(at)
    assert f"`{dotted(at)}`" in caught.value.message


@each_ignored
def test_ignored_field_is_reported(protocol: str, at: Path, verdict: Verdict) -> None:
    reported = dotted(at).replace("[0]", "[]")
    assert normalize(protocol, put(BLOCKS[protocol], at, OTHER)).ignored == (reported,)


@pytest.mark.parametrize(
    ("protocol", "at", "verdict"), [*verdicts(refuse=True), *verdicts(refuse=False)]
)
def test_neutral_values_change_nothing(protocol: str, at: Path, verdict: Verdict) -> None:
    plain = normalize(protocol, BLOCKS[protocol])
    assert None in verdict.neutral
    for value in verdict.neutral:
        assert normalize(protocol, put(BLOCKS[protocol], at, value)) == plain


@each_dialect
def test_unknown_field_is_refused_by_name(dialect: Dialect) -> None:
    for at in [("temprature",), ("messages", 0, "rôle"), ("messages", 0, "content", 0, "txt")]:
        with pytest.raises(InvalidRequest) as caught:
            normalize(dialect.name, put(BLOCKS[dialect.name], at, 1))
        assert caught.value.param == dotted(at)
        assert caught.value.message == f"`{dotted(at)}`: unknown field"


def test_claude_has_no_n() -> None:
    with pytest.raises(InvalidRequest, match="`n`: unknown field"):
        normalize("claude.messages", PLAIN["claude.messages"] | {"n": 2})


@each_dialect
def test_model_is_optional_and_reported(dialect: Dialect) -> None:
    assert normalize(dialect.name, PLAIN[dialect.name]).model is None
    assert normalize(dialect.name, PLAIN[dialect.name] | {"model": "m"}).model == "m"


@each_dialect
def test_rollout_options_are_the_same_everywhere(dialect: Dialect) -> None:
    options = {"group": "g", "session": "s", "script": {"text": "no", "fail": "crash"}}
    found = normalize(dialect.name, PLAIN[dialect.name] | {"rollout": options}).options
    assert (found.group, found.session) == ("g", "s")
    assert found.script is not None
    assert (found.script.text, found.script.fail) == ("no", "crash")
    with pytest.raises(InvalidRequest, match=r"`rollout\.deadline`: unknown field"):
        normalize(dialect.name, PLAIN[dialect.name] | {"rollout": {"deadline": 3}})


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


LIMITS: list[tuple[str, Path, object, str]] = [
    ("openai.chat", ("messages",), [], "Expected `array` of length >= 1"),
    ("openai.chat", ("messages",), [USER] * 4097, "Expected `array` of length <= 4096"),
    ("openai.chat", ("messages",), "Hi", "Expected `array`, got `str`"),
    ("openai.chat", ("messages", 0, "role"), "robot", "system, developer, user, assistant"),
    ("openai.chat", ("messages", 0, "content"), [], "at least one text part"),
    ("openai.chat", ("messages", 0, "content"), None, "at least one text part"),
    ("openai.chat", ("messages", 0, "content"), 5, "Expected `str | array | null`, got `int`"),
    ("openai.chat", ("n",), 0, "Expected `int` >= 1"),
    ("openai.chat", ("n",), 129, "Expected `int` <= 128"),
    ("openai.chat", ("n",), True, "Expected `int | null`, got `bool`"),
    ("openai.chat", ("max_tokens",), 0, "Expected `int` >= 1"),
    ("openai.chat", ("max_completion_tokens",), 2**31, "Expected `int` <= 2147483647"),
    ("openai.chat", ("temperature",), 2.1, "Expected `float` <= 2.0"),
    ("openai.chat", ("temperature",), -0.1, "Expected `float` >= 0.0"),
    ("openai.chat", ("top_p",), 0, "Expected `float` > 0.0"),
    ("openai.chat", ("top_p",), 1.1, "Expected `float` <= 1.0"),
    ("openai.chat", ("top_k",), -2, "Expected `int` >= -1"),
    ("openai.chat", ("presence_penalty",), 3, "Expected `float` <= 2.0"),
    ("openai.chat", ("repetition_penalty",), 0, "Expected `float` > 0.0"),
    ("openai.chat", ("stop",), ["a"] * 17, "Expected `array` of length <= 16"),
    ("openai.chat", ("stop",), "", "Expected `str` of length >= 1"),
    ("openai.chat", ("stop", 0), "a" * 257, "Expected `str` of length <= 256"),
    ("openai.chat", ("stop_token_ids",), [1] * 65, "Expected `array` of length <= 64"),
    ("openai.chat", ("stop_token_ids", 0), 2**32, "Expected `int` <= 4294967295"),
    ("openai.chat", ("seed",), 2**63, "Expected `int` <= 9223372036854775807"),
    ("openai.chat", ("top_logprobs",), 21, "Expected `int` <= 20"),
    ("openai.chat", ("top_logprobs",), 2, "needs `logprobs` true"),
    ("openai.chat", ("min_tokens",), 9, "9 is more than `max_tokens` 8"),
    ("openai.chat", ("model",), "", "Expected `str` of length >= 1"),
    ("claude.messages", ("messages",), [], "Expected `array` of length >= 1"),
    ("claude.messages", ("messages", 0, "role"), "tool", "user, assistant, system"),
    ("claude.messages", ("messages", 0, "content"), [], "Expected `array` of length >= 1"),
    ("claude.messages", ("max_tokens",), 0, "Expected `int` >= 1"),
    ("claude.messages", ("temperature",), 2.5, "Expected `float` <= 2.0"),
    ("claude.messages", ("stop_sequences",), ["a"] * 17, "Expected `array` of length <= 16"),
    ("claude.messages", ("system",), 3, "Expected `str | array | null`, got `int`"),
    ("generate", ("sample_params", "n"), 129, "Expected `int` <= 128"),
    ("generate", ("sample_params", "stops", 0), "", "Expected `str` of length >= 1"),
    ("generate", ("sample_params", "min_tokens"), 9, "more than `sample_params.max_tokens` 8"),
    ("generate", ("input_ids",), [], "Expected `array` of length >= 1"),
    ("generate", ("input_ids", 0), 2**32, "Expected `int` <= 4294967295"),
    ("generate", ("input_ids", 0), -1, "Expected `int` >= 0"),
    ("generate", ("prompt",), "", "Expected `str` of length >= 1"),
]
LIMITED: dict[str, Body] = {
    "openai.chat": {"messages": [USER], "max_tokens": 8, "stop": ["a"], "stop_token_ids": [1]},
    "claude.messages": PLAIN["claude.messages"],
    "generate": {"input_ids": [1], "sample_params": {"max_tokens": 8, "stops": ["a"]}},
}


@pytest.mark.parametrize(
    ("protocol", "at", "value", "limit"),
    [pytest.param(*row, id=f"{row[0]}-{dotted(row[1])}-{n}") for n, row in enumerate(LIMITS)],
)
def test_limit_is_told_with_its_field(protocol: str, at: Path, value: object, limit: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalize(protocol, put(LIMITED[protocol], at, value))
    assert caught.value.param == dotted(at)
    assert caught.value.message.startswith(f"`{dotted(at)}`: ")
    assert limit in caught.value.message


@pytest.mark.parametrize(
    ("protocol", "body", "field"),
    [
        ("openai.chat", {}, "messages"),
        ("openai.chat", {"messages": [{"content": "Hi"}]}, "messages[0].role"),
        (
            "openai.chat",
            {"messages": [USER | {"content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ("claude.messages", {"messages": [USER]}, "max_tokens"),
        (
            "claude.messages",
            {"max_tokens": 1, "messages": [{"role": "user"}]},
            "messages[0].content",
        ),
        (
            "claude.messages",
            {"max_tokens": 1, "messages": [USER], "system": [{"type": "text"}]},
            "system[0].text",
        ),
    ],
)
def test_missing_field_is_named(protocol: str, body: Body, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalize(protocol, body)
    assert (caught.value.message, caught.value.param) == (f"`{field}`: required", field)


@pytest.mark.parametrize(
    ("protocol", "part", "field"),
    [
        ("openai.chat", {"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ("openai.chat", {"type": "input_audio"}, "type"),
        ("claude.messages", {"type": "image", "source": {"type": "base64"}}, "type"),
        ("claude.messages", {"type": "tool_use", "id": "t", "name": "f", "input": {}}, "type"),
        ("claude.messages", {"type": "tool_result", "tool_use_id": "t", "content": "x"}, "type"),
        ("claude.messages", {"type": "thinking", "thinking": "x", "signature": ""}, "type"),
        ("claude.messages", {"type": "redacted_thinking", "data": "x"}, "type"),
        ("claude.messages", {"type": "document", "source": {}, "title": "x"}, "type"),
    ],
)
def test_content_other_than_text_is_unsupported(protocol: str, part: Body, field: str) -> None:
    with pytest.raises(UnsupportedOption) as caught:
        normalize(protocol, put(BLOCKS[protocol], ("messages", 0, "content", 0), part))
    assert caught.value.param == f"messages[0].content[0].{field}"


def test_tool_messages_are_unsupported_in_openai() -> None:
    turn = {"role": "tool", "tool_call_id": "t", "content": "3"}
    with pytest.raises(UnsupportedOption) as caught:
        normalize("openai.chat", {"messages": [USER, turn]})
    assert caught.value.param == "messages[1].role"


def test_prefill_is_unsupported_in_claude_and_history_in_openai() -> None:
    turns = [USER, {"role": "assistant", "content": "I"}]
    with pytest.raises(UnsupportedOption, match="end with a user message"):
        normalize("claude.messages", {"max_tokens": 8, "messages": turns})
    assert len(normalize("openai.chat", {"messages": turns}).state.message) == 2


@pytest.mark.parametrize("system", ["", [], None])
def test_empty_system_of_claude_is_no_message(system: object) -> None:
    normal = normalize("claude.messages", PLAIN["claude.messages"] | {"system": system})
    assert normal == normalize("claude.messages", PLAIN["claude.messages"])


@each_dialect
def test_empty_text_is_allowed(dialect: Dialect) -> None:
    body = put(PLAIN[dialect.name], ("messages", 0, "content"), "")
    assert normalize(dialect.name, body).state.message == (Message("user", (Text(""),)),)


@each_dialect
def test_any_unicode_text_is_kept(dialect: Dialect) -> None:
    text = "\x00 é 漢 \U0001f600 \u2028 \ufffd"
    body = put(PLAIN[dialect.name], ("messages", 0, "content"), text)
    assert normalize(dialect.name, body).state.message == (Message("user", (Text(text),)),)


@pytest.mark.parametrize(
    "sources", [{}, {"prompt": "a", "input_ids": [1]}, {"prompt": "a", "messages": [USER]}]
)
def test_generate_needs_exactly_one_prompt(sources: Body) -> None:
    with pytest.raises(InvalidRequest, match=f"exactly one is needed, {len(sources)} were given"):
        normalize("generate", sources)


def test_generate_takes_token_ids_over_the_whole_range() -> None:
    normal = normalize("generate", {"input_ids": [0, 2**32 - 1]})
    assert normal.state.prompt_ids == TokenIds([0, 2**32 - 1])
    assert normal.state.message == ()
    assert normal.state.prompt is None


def test_one_conversation_is_the_same_state_in_all_dialects() -> None:
    turns = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Three"}, {"type": "text", "text": "4"}],
        },
    ]
    system = {"role": "system", "content": "Be brief."}
    shared = {"temperature": 0.5, "top_p": 0.75, "top_k": 4}
    openai = normalize(
        "openai.chat", {"messages": [system, *turns], "max_tokens": 8, "stop": "END", **shared}
    )
    claude = normalize(
        "claude.messages",
        {
            "system": "Be brief.",
            "messages": turns,
            "max_tokens": 8,
            "stop_sequences": ["END"],
            **shared,
        },
    )
    params = {"max_tokens": 8, "stops": ["END"], "return_logprob": False, **shared}
    own = normalize("generate", {"messages": [system, *turns], "sample_params": params})
    assert openai.state == claude.state == own.state
    assert openai.state.sample_params == SampleParams(
        max_tokens=8, temperature=0.5, top_p=0.75, top_k=4, stops=("END",), return_logprob=False
    )


def test_absent_and_null_parameters_are_neutral() -> None:
    silent = normalize("openai.chat", PLAIN["openai.chat"]).state.sample_params
    assert silent == SampleParams(return_logprob=False)
    nulls = dict.fromkeys(openai_chat.Request.__struct_fields__)
    spoken = normalize("openai.chat", {**nulls, "messages": [USER]})
    assert spoken.state.sample_params == silent
    nulls = dict.fromkeys(generate.Params.__struct_fields__)
    spoken = normalize("generate", {"prompt": "a", "sample_params": nulls})
    assert spoken.state.sample_params == SampleParams()


@pytest.mark.parametrize(
    ("given", "field", "value", "unused"),
    [
        ({"max_tokens": 5}, "max_tokens", 5, ()),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", 5, ()),
        ({"max_tokens": 5, "max_completion_tokens": 3}, "max_tokens", 3, ("max_tokens",)),
        ({"min_new_tokens": 2}, "min_tokens", 2, ()),
        ({"min_tokens": 1, "min_new_tokens": 2}, "min_tokens", 1, ("min_new_tokens",)),
        ({"no_stop_trim": True}, "include_stop_str_in_output", True, ()),
        (
            {"include_stop_str_in_output": False, "no_stop_trim": True},
            "include_stop_str_in_output",
            False,
            ("no_stop_trim",),
        ),
        ({"skip_special_tokens": False}, "skip_special_tokens", False, ()),
        ({"top_k": -1}, "top_k", 0, ()),
        ({"seed": 7}, "sampling_seed", 7, ()),
        ({"seed": -1}, "sampling_seed", 2**63 - 1, ()),
        ({"seed": -(2**63)}, "sampling_seed", 0, ()),
        ({"temperature": 0}, "temperature", 0.0, ()),
        ({"stop": "a"}, "stops", ("a",), ()),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", 3, ()),
        ({"logprobs": False, "top_logprobs": 0}, "return_logprob", False, ()),
    ],
)
def test_aliases_meet_in_one_parameter(
    given: Body, field: str, value: object, unused: tuple[str, ...]
) -> None:
    normal = normalize("openai.chat", PLAIN["openai.chat"] | given)
    assert getattr(normal.state.sample_params, field) == value
    assert normal.ignored == unused


@each_dialect
@pytest.mark.parametrize("reason", [None, "abort", "error"])
def test_broken_sample_is_never_shown_as_an_answer(dialect: Dialect, reason: str | None) -> None:
    state = RolloutState(response="half", status=Status.COMPLETED)
    state = msgspec.structs.replace(state, finish_reason=reason)
    answer = Answer("job-1", "m", 0, (state,), (), 1, 10, lambda _: b"")
    with pytest.raises(RolloutError, match=f"it ended as {reason}"):
        dialect.respond(answer)
