"""Fields that are not honoured: each is reported or refused as its verdict and the request say."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest

from protocols import dialects
from protocols.dialects import (
    claude_block,
    claude_count_tokens,
    claude_messages,
    claude_tool,
    generate,
    openai_body,
    openai_chat,
    openai_completions,
    openai_message,
    openai_tool,
)
from protocols.dialects.base import Unsupported
from protocols.dialects.field import Verdict, Verdicts
from protocols.errors import UnsupportedOption
from tests.dialect_bodies import BLOCKS, CUSTOM, PLAIN, USER, Body, Path, dotted, normalize, put

CHAT, CLAUDE = BLOCKS["openai.chat"], BLOCKS["claude.messages"]
AT = ("messages", 0, "content", 0)
IMAGE: Body = {"type": "image", "source": {"type": "url", "url": "https://a"}}
DOCUMENT: Body = {"type": "document", "source": {"type": "text", "data": "D"}}
FOUND: Body = {"type": "search_result", "source": "s", "title": "t", "content": []}
USE: Body = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
RESULT: Body = {"type": "tool_result", "tool_use_id": "1"}
SCHEMA: Body = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}
PICTURE: Body = {"type": "image_url", "image_url": {"url": "https://a"}}

STRUCTS: list[tuple[str, type[msgspec.Struct], Path, Body]] = [
    ("openai.chat", openai_chat.Request, (), CHAT),
    ("openai.chat", openai_body.StreamOptions, ("stream_options",), CHAT | {"stream_options": {}}),
    (
        "openai.chat",
        openai_tool.JsonSchema,
        ("response_format", "json_schema"),
        CHAT | {"response_format": SCHEMA},
    ),
    ("openai.chat", openai_message.Turn, ("messages", 0), CHAT),
    ("openai.chat", openai_message.Part, AT, CHAT),
    ("openai.chat", openai_message.ImageUrl, (*AT, "image_url"), put(CHAT, AT, PICTURE)),
    ("openai.completions", openai_completions.Request, (), PLAIN["openai.completions"]),
    ("claude.messages", claude_messages.Request, (), CLAUDE),
    ("claude.messages", claude_block.TextBlock, AT, CLAUDE),
    ("claude.messages", claude_block.ImageBlock, AT, put(CLAUDE, AT, IMAGE)),
    ("claude.messages", claude_block.DocumentBlock, AT, put(CLAUDE, AT, DOCUMENT)),
    ("claude.messages", claude_block.SearchResultBlock, AT, put(CLAUDE, AT, FOUND)),
    ("claude.messages", claude_block.ToolUseBlock, AT, put(CLAUDE, AT, USE)),
    ("claude.messages", claude_block.ToolResultBlock, AT, put(CLAUDE, AT, RESULT)),
    (
        "claude.messages",
        claude_block.TextBlock,
        (*AT, "content", 0),
        put(CLAUDE, AT, RESULT | {"content": [{"type": "text", "text": "3"}]}),
    ),
    (
        "claude.messages",
        claude_block.TextBlock,
        ("system", 0),
        CLAUDE | {"system": [{"type": "text", "text": "S"}]},
    ),
    ("claude.messages", claude_tool.CustomTool, ("tools", 0), CLAUDE | {"tools": [CUSTOM]}),
    (
        "claude.messages",
        claude_tool.ThinkingConfig,
        ("thinking",),
        CLAUDE | {"thinking": {"type": "enabled"}},
    ),
    (
        "claude.messages",
        claude_tool.OutputConfig,
        ("output_config",),
        CLAUDE | {"output_config": {}},
    ),
    (
        "claude.messages",
        claude_tool.OutputFormat,
        ("output_config", "format"),
        CLAUDE | {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    ),
    ("claude.count_tokens", claude_count_tokens.Request, (), PLAIN["claude.count_tokens"]),
    ("generate", generate.Request, (), BLOCKS["generate"]),
    ("generate", generate.Params, ("sample_params",), BLOCKS["generate"]),
    ("generate", openai_message.Turn, ("messages", 0), BLOCKS["generate"]),
]
"""Structs whose fields have verdicts, where in a body one lies, and that body."""
OTHER: object = {"another": "value"}
"""Neutral for no field."""
POLICIES: tuple[Unsupported | None, ...] = (None, *get_args(Unsupported))


def verdicts() -> Iterator[object]:
    for protocol, kind, at, body in STRUCTS:
        for name, verdict in Verdicts(kind).by_field.items():
            path = (*at, name)
            label = f"{protocol}-{kind.__name__}-{dotted(path)}"
            yield pytest.param(protocol, path, verdict, body, id=label)


def structs() -> Iterator[type[msgspec.Struct]]:
    for module in pkgutil.iter_modules(dialects.__path__):
        found = importlib.import_module(f"protocols.dialects.{module.name}")
        for value in vars(found).values():
            if isinstance(value, type) and issubclass(value, msgspec.Struct):
                yield value


def under(policy: Unsupported | None, body: Body) -> Body:
    return body if policy is None else body | {"rollout": {"unsupported": policy}}


each_verdict = pytest.mark.parametrize(("protocol", "at", "verdict", "body"), list(verdicts()))


def test_no_struct_with_a_verdict_is_left_out_here() -> None:
    judged = {kind for kind in structs() if Verdicts(kind).by_field}
    assert judged <= {kind for _, kind, _, _ in STRUCTS} | {
        openai_body.Body,
        generate.Sampling,
        claude_messages.Conversation,
    }


@each_verdict
@pytest.mark.parametrize("policy", POLICIES)
def test_field_is_reported_or_refused_as_the_request_wants(
    protocol: str, at: Path, verdict: Verdict, body: Body, policy: Unsupported | None
) -> None:
    changed = under(policy, put(body, at, OTHER))
    if policy in verdict.tolerated:
        reported = dotted(at).replace("[0]", "[]")
        assert reported in normalize(protocol, changed).ignored
        return
    with pytest.raises(UnsupportedOption) as caught:
        normalize(protocol, changed)
    assert caught.value.param == dotted(at)
    assert f"`{dotted(at)}`" in caught.value.message


@each_verdict
def test_neutral_values_change_nothing(
    protocol: str, at: Path, verdict: Verdict, body: Body
) -> None:
    plain = normalize(protocol, under("error", body))
    assert None in verdict.neutral
    for value in verdict.neutral:
        assert normalize(protocol, under("error", put(body, at, value))) == plain


DECISIVE: list[tuple[str, Body, str]] = [
    ("openai.chat", {"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
    ("openai.chat", {"tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ("openai.chat", {"response_format": {"type": "regex"}}, "response_format.type"),
    ("openai.chat", {"chat_template_kwargs": {"tone": 1}}, "chat_template_kwargs.tone"),
    (
        "openai.chat",
        {"messages": [USER | {"content": [{"type": "text", "text": "a"}, {"type": "file"}]}]},
        "messages[0].content[1].type",
    ),
    (
        "openai.chat",
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": "a",
                    "tool_calls": [{"id": "1", "type": "custom", "custom": {}}],
                }
            ]
        },
        "messages[0].tool_calls[0].type",
    ),
    (
        "claude.messages",
        {"tools": [{"type": "web_search_20250305", "name": "w", "max_uses": 5}]},
        "tools[0].type",
    ),
    (
        "claude.messages",
        {
            "messages": [
                USER | {"content": [{"type": "text", "text": "a"}, {"type": "mcp_tool_use"}]}
            ]
        },
        "messages[0].content[1].type",
    ),
    (
        "claude.messages",
        {
            "messages": [
                USER
                | {
                    "content": [
                        {"type": "document", "source": {"type": "base64", "data": "x"}},
                        {"type": "text", "text": "a"},
                    ]
                }
            ]
        },
        "messages[0].content[0].source.type",
    ),
]


@pytest.mark.parametrize(("protocol", "body", "field"), DECISIVE)
def test_what_would_change_the_answer_is_dropped_only_on_demand(
    protocol: str, body: Body, field: str
) -> None:
    for policy in (None, "warn", "error"):
        with pytest.raises(UnsupportedOption) as caught:
            normalize(protocol, under(policy, PLAIN[protocol] | body))
        assert caught.value.param == field
    reported = field.replace("[0]", "[]").replace("[1]", "[]")
    assert reported in normalize(protocol, under("ignore", PLAIN[protocol] | body)).ignored
