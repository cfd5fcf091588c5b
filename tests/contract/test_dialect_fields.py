"""Which fields of the public protocols are refused and which are ignored, written out by hand."""

import msgspec
import pytest
from anthropic.types.beta.message_create_params import (
    MessageCreateParamsBase as BetaMessageCreateParamsBase,
)
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types import completion_create_params as openai_plain
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from protocols.codec import encode_json
from protocols.dialects import (
    claude_count_tokens,
    claude_messages,
    dialect_of,
    generate,
    openai_chat,
    openai_completions,
)
from protocols.dialects.field import Verdicts
from protocols.errors import UnsupportedOption
from protocols.rollout_state import SampleParams
from tests.dialect_bodies import PLAIN

REFUSED: list[tuple[str, str, object]] = [
    ("openai.chat", "functions", [{"name": "f"}]),
    ("openai.chat", "function_call", {"name": "f"}),
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
    ("openai.chat", "guided_json", {}),
    ("openai.chat", "regex", "a+"),
    ("openai.chat", "ebnf", "a"),
    ("openai.completions", "suffix", "."),
    ("openai.completions", "echo", True),
    ("openai.completions", "best_of", 3),
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
    ("openai.chat", "return_meta_info", True),
    ("openai.chat", "spaces_between_special_tokens", True),
    ("openai.completions", "user", "ann"),
    ("claude.messages", "metadata", {"user_id": "u"}),
    ("claude.messages", "speed", "fast"),
    ("claude.messages", "inference_geo", "eu"),
    ("claude.messages", "diagnostics", {"a": 1}),
    ("claude.messages", "user_profile_id", "u"),
    ("claude.count_tokens", "speed", "fast"),
]
SILENT: list[tuple[str, str, object]] = [
    ("openai.chat", "stream", False),
    ("openai.chat", "tools", []),
    ("openai.chat", "tool_choice", "none"),
    ("openai.chat", "tool_choice", "auto"),
    ("openai.chat", "parallel_tool_calls", True),
    ("openai.chat", "parallel_tool_calls", False),
    ("openai.chat", "response_format", {"type": "text"}),
    ("openai.chat", "modalities", ["text"]),
    ("openai.chat", "logit_bias", {}),
    ("openai.chat", "store", False),
    ("openai.chat", "min_p", 0.0),
    ("openai.chat", "return_token_ids", False),
    ("openai.chat", "return_prompt_token_ids", True),
    ("openai.completions", "echo", False),
    ("openai.completions", "best_of", 1),
    ("claude.messages", "stream", False),
    ("claude.messages", "tools", []),
    ("claude.messages", "tool_choice", {"type": "auto"}),
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


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        (CompletionCreateParamsBase, openai_chat.Request),
        (openai_plain.CompletionCreateParamsBase, openai_completions.Request),
        (MessageCreateParamsBase, claude_messages.Request),
        (BetaMessageCreateParamsBase, claude_messages.Request),
        (MessageCountTokensParams, claude_count_tokens.Request),
    ],
)
def test_every_field_of_the_official_clients_is_known(
    official: type, ours: type[msgspec.Struct]
) -> None:
    fields = set(official.__annotations__)
    assert fields
    assert fields <= set(ours.__struct_fields__)


def test_every_sampling_parameter_can_be_given_to_generate() -> None:
    names = set(generate.Params.__struct_fields__) - set(Verdicts(generate.Params).by_field)
    fields = {field.name for field in msgspec.structs.fields(SampleParams)}
    assert fields - {"guide"} | {"response_format"} <= names
