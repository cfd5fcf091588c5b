"""Limits of fields, and what a body must have."""

import pytest

from protocols.errors import InvalidRequest
from protocols.rollout_state import TokenIds
from tests.dialect_bodies import FUNCTION, PLAIN, USER, Body, Path, dotted, normalize, put

LIMITS: list[tuple[str, Path, object, str]] = [
    ("openai.chat", ("messages",), [], "Expected `array` of length >= 1"),
    ("openai.chat", ("messages",), [USER] * 4097, "Expected `array` of length <= 4096"),
    ("openai.chat", ("messages",), "Hi", "Expected `array | null`, got `str`"),
    ("openai.chat", ("messages", 0, "role"), "robot", "system, developer, user, assistant"),
    ("openai.chat", ("messages", 0, "content"), [], "at least one part"),
    ("openai.chat", ("messages", 0, "content"), None, "at least one part"),
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
    ("openai.chat", ("logit_bias",), {"-1": 1}, "Expected `int` >= 0 as a key"),
    ("openai.chat", ("logit_bias",), {"a": 1}, "Expected `int`, got `str` as a key"),
    (
        "openai.chat",
        ("logit_bias",),
        {str(token): 0 for token in range(1025)},
        "Expected `object` of length <= 1024",
    ),
    ("openai.chat", ("tools",), [FUNCTION] * 1025, "Expected `array` of length <= 1024"),
    ("openai.chat", ("tools",), [FUNCTION] * 2, "2 of them are named 'weather'"),
    ("openai.chat", ("tool_choice",), "required", "demands a call, but there is no tool"),
    ("openai.chat", ("reasoning_effort",), "much", "Invalid enum value"),
    ("openai.chat", ("model",), "", "Expected `str` of length >= 1"),
    ("claude.messages", ("messages",), [], "Expected `array` of length >= 1"),
    ("claude.messages", ("messages", 0, "role"), "tool", "user, assistant, system"),
    ("claude.messages", ("messages", 0, "content"), [], "Expected `array` of length >= 1"),
    ("claude.messages", ("max_tokens",), -1, "Expected `int` >= 0"),
    ("claude.messages", ("temperature",), 2.5, "Expected `float` <= 2.0"),
    ("claude.messages", ("stop_sequences",), ["a"] * 17, "Expected `array` of length <= 16"),
    ("claude.messages", ("system",), 3, "Expected `str | array | null`, got `int`"),
    ("claude.messages", ("tool_choice",), {"type": "any"}, "demands a call"),
    ("openai.completions", ("prompt",), "", "it is empty"),
    ("openai.completions", ("prompt",), [], "it is empty"),
    ("openai.completions", ("prompt",), [[]], "it is empty"),
    ("openai.completions", ("prompt",), [1, "a"], "mixed"),
    ("openai.completions", ("prompt",), {"a": 1}, "Expected `str | array`, got `object`"),
    ("openai.completions", ("logprobs",), 21, "Expected `int` <= 20"),
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
    "openai.completions": PLAIN["openai.completions"],
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


MISSING: list[tuple[str, Body, str]] = [
    ("openai.chat", {}, "messages"),
    ("openai.chat", {"messages": [{"content": "Hi"}]}, "messages[0].role"),
    (
        "openai.chat",
        {"messages": [USER | {"content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    (
        "openai.chat",
        {"messages": [{"role": "tool", "content": "3"}]},
        "messages[0].tool_call_id",
    ),
    (
        "openai.chat",
        {"messages": [USER], "tools": [{"type": "function"}]},
        "tools[0].function",
    ),
    (
        "openai.chat",
        {"messages": [USER], "tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name",
    ),
    (
        "openai.chat",
        {"messages": [USER], "response_format": {"type": "json_schema"}},
        "response_format.json_schema",
    ),
    ("openai.completions", {}, "prompt"),
    ("claude.count_tokens", {}, "messages"),
    ("claude.messages", {"messages": [USER]}, "max_tokens"),
    (
        "claude.messages",
        {"max_tokens": 1, "messages": [USER], "tools": [{"name": "f"}]},
        "tools[0].input_schema",
    ),
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
]


@pytest.mark.parametrize(("protocol", "body", "field"), MISSING)
def test_missing_field_is_named(protocol: str, body: Body, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalize(protocol, body)
    assert (caught.value.message, caught.value.param) == (f"`{field}`: required", field)


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
