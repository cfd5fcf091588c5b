"""Which fields of the public protocols are refused and which are ignored, written out by hand."""

import msgspec
import pytest
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from protocols.codec import encode_json
from protocols.dialects import claude_messages, dialect_of, generate, openai_chat
from protocols.dialects.field import Verdicts
from protocols.errors import UnsupportedOption
from protocols.rollout_state import SampleParams

USER = {"role": "user", "content": "Hi"}
PLAIN: dict[str, dict[str, object]] = {
    "openai.chat": {"messages": [USER]},
    "claude.messages": {"messages": [USER], "max_tokens": 8},
}
REFUSED: list[tuple[str, str, object]] = [
    ("openai.chat", "stream", True),
    ("openai.chat", "stream_options", {"include_usage": True}),
    ("openai.chat", "tools", [{"type": "function", "function": {"name": "f"}}]),
    ("openai.chat", "tool_choice", "required"),
    ("openai.chat", "functions", [{"name": "f"}]),
    ("openai.chat", "function_call", {"name": "f"}),
    ("openai.chat", "response_format", {"type": "json_object"}),
    ("openai.chat", "reasoning_effort", "low"),
    ("openai.chat", "logit_bias", {"50256": -100}),
    ("openai.chat", "modalities", ["text", "audio"]),
    ("openai.chat", "audio", {"voice": "a", "format": "wav"}),
    ("openai.chat", "prediction", {"type": "content", "content": "x"}),
    ("openai.chat", "moderation", {"model": "x"}),
    ("openai.chat", "web_search_options", {}),
    ("openai.chat", "min_p", 0.1),
    ("openai.chat", "ignore_eos", True),
    ("openai.chat", "allowed_token_ids", [1]),
    ("openai.chat", "bad_words", ["x"]),
    ("openai.chat", "prompt_logprobs", 0),
    ("openai.chat", "logprob_token_ids", [1]),
    ("openai.chat", "chat_template_kwargs", {"enable_thinking": False}),
    ("openai.chat", "input_ids", [1]),
    ("openai.chat", "guided_json", {}),
    ("openai.chat", "regex", "a+"),
    ("openai.chat", "ebnf", "a"),
    ("claude.messages", "stream", True),
    ("claude.messages", "tools", [{"name": "f", "input_schema": {}}]),
    ("claude.messages", "tool_choice", {"type": "any"}),
    ("claude.messages", "thinking", {"type": "enabled", "budget_tokens": 1024}),
    ("claude.messages", "output_config", {"effort": "low"}),
    ("claude.messages", "container", "c"),
    ("claude.messages", "mcp_servers", [{"url": "x"}]),
    ("claude.messages", "fallbacks", [{"model": "x"}]),
    ("claude.messages", "context_management", {"edits": []}),
    ("claude.messages", "thread", {"id": "x"}),
]
IGNORED: list[tuple[str, str, object]] = [
    ("openai.chat", "user", "ann"),
    ("openai.chat", "metadata", {"a": "b"}),
    ("openai.chat", "store", True),
    ("openai.chat", "service_tier", "flex"),
    ("openai.chat", "prompt_cache_key", "k"),
    ("openai.chat", "prompt_cache_options", {"ttl": "30m"}),
    ("openai.chat", "prompt_cache_retention", "24h"),
    ("openai.chat", "safety_identifier", "s"),
    ("openai.chat", "verbosity", "low"),
    ("openai.chat", "priority", 3),
    ("openai.chat", "cache_salt", "s"),
    ("openai.chat", "return_token_ids", False),
    ("openai.chat", "return_meta_info", True),
    ("openai.chat", "spaces_between_special_tokens", True),
    ("claude.messages", "metadata", {"user_id": "u"}),
    ("claude.messages", "speed", "fast"),
    ("claude.messages", "inference_geo", "eu"),
    ("claude.messages", "diagnostics", {"a": 1}),
    ("claude.messages", "user_profile_id", "u"),
]
SILENT: list[tuple[str, str, object]] = [
    ("openai.chat", "stream", False),
    ("openai.chat", "tools", []),
    ("openai.chat", "tool_choice", "none"),
    ("openai.chat", "tool_choice", "auto"),
    ("openai.chat", "parallel_tool_calls", True),
    ("openai.chat", "response_format", {"type": "text"}),
    ("openai.chat", "modalities", ["text"]),
    ("openai.chat", "logit_bias", {}),
    ("openai.chat", "store", False),
    ("openai.chat", "min_p", 0.0),
    ("openai.chat", "return_token_ids", True),
    ("openai.chat", "return_prompt_token_ids", True),
    ("claude.messages", "stream", False),
    ("claude.messages", "tools", []),
    ("claude.messages", "tool_choice", {"type": "auto"}),
    ("claude.messages", "thinking", {"type": "disabled"}),
    ("claude.messages", "cache_control", {"type": "ephemeral"}),
    ("claude.messages", "service_tier", "auto"),
]


def ignored_of(protocol: str, name: str, value: object) -> tuple[str, ...]:
    body = encode_json(PLAIN[protocol] | {name: value})
    return dialect_of(protocol).normalize(body).ignored


@pytest.mark.parametrize(("protocol", "name", "value"), REFUSED)
def test_what_changes_the_answer_is_refused(protocol: str, name: str, value: object) -> None:
    with pytest.raises(UnsupportedOption, match=f"^`{name}`: ") as caught:
        ignored_of(protocol, name, value)
    assert caught.value.param == name


@pytest.mark.parametrize(("protocol", "name", "value"), IGNORED)
def test_what_is_harmless_is_reported(protocol: str, name: str, value: object) -> None:
    assert ignored_of(protocol, name, value) == (name,)


@pytest.mark.parametrize(("protocol", "name", "value"), SILENT)
def test_what_means_nothing_is_accepted(protocol: str, name: str, value: object) -> None:
    assert ignored_of(protocol, name, value) == ()


def test_every_field_of_the_official_clients_is_known() -> None:
    openai_fields = set(CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert openai_fields <= set(openai_chat.Request.__struct_fields__)
    claude_fields = set(MessageCreateParamsBase.__annotations__) | {"stream"}
    assert claude_fields <= set(claude_messages.Request.__struct_fields__)


def test_every_sampling_parameter_can_be_given_to_generate() -> None:
    names = set(generate.Params.__struct_fields__) - set(Verdicts(generate.Params).by_field)
    assert {field.name for field in msgspec.structs.fields(SampleParams)} <= names
