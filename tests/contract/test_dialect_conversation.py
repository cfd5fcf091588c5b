"""Conversations as blocks: the same in every dialect, in order, with nothing repaired."""

import pytest

from protocols.errors import InvalidRequest, UnsupportedOption
from protocols.message import Block, Image, Message, Reasoning, Text, Thinking, ToolResult, ToolUse
from protocols.rollout_state import SampleParams
from tests.dialect_bodies import CUSTOM, FUNCTION, PLAIN, USER, Body, normalize

OPENAI_TURNS: list[Body] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Bern"}, {"type": "text", "text": "?"}]},
    {
        "role": "assistant",
        "reasoning_content": "Two cities.",
        "content": "I look.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"Bern","days":1.0}'},
            },
            {
                "id": "toolu_2",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"Zürich"}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {
        "role": "tool",
        "tool_call_id": "toolu_2",
        "content": [
            {"type": "text", "text": "a map"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        ],
    },
    {"role": "user", "content": "And now?"},
    {"role": "system", "content": "One word."},
    {"role": "user", "content": "Go."},
]
CLAUDE_TURNS: list[Body] = [
    OPENAI_TURNS[1],
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Two cities.", "signature": "any"},
            {"type": "text", "text": "I look."},
            {
                "type": "tool_use",
                "id": "call_1",
                "name": "weather",
                "input": {"city": "Bern", "days": 1.0},
            },
            {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {"city": "Zürich"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
            {
                "type": "tool_result",
                "tool_use_id": "toolu_2",
                "content": [
                    {"type": "text", "text": "a map"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
                    },
                ],
            },
        ],
    },
    {"role": "user", "content": "And now?"},
    {"role": "system", "content": "One word."},
    {"role": "user", "content": "Go."},
]
BLOCKS = (
    Message("system", (Text("Be brief."),)),
    Message("user", (Text("Bern"), Text("?"))),
    Message(
        "assistant",
        (
            Thinking("Two cities."),
            Text("I look."),
            ToolUse("call_1", "weather", '{"city":"Bern","days":1.0}'),
            ToolUse("toolu_2", "weather", '{"city":"Zürich"}'),
        ),
    ),
    Message(
        "user",
        (
            ToolResult("call_1", (Text("rain"),)),
            ToolResult("toolu_2", (Text("a map"), Image("data:image/png;base64,AA=="))),
            Text("And now?"),
        ),
    ),
    Message("system", (Text("One word."),)),
    Message("user", (Text("Go."),)),
)
SCHEMA: Body = {"type": "object", "properties": {"word": {"type": "string"}}}


def messages(protocol: str, turns: list[Body], **more: object) -> tuple[Message, ...]:
    return normalize(protocol, PLAIN[protocol] | {"messages": turns} | more).state.message


def claude_blocks(*content: Body, role: str = "user") -> tuple[Block, ...]:
    turns: list[Body] = [{"role": role, "content": list(content)}, USER]
    return messages("claude.messages", turns)[0].content


def test_one_conversation_is_the_same_state_in_all_dialects() -> None:
    shared: Body = {"temperature": 0.5, "top_p": 0.75, "top_k": 4}
    openai = normalize(
        "openai.chat",
        {
            "messages": OPENAI_TURNS,
            "tools": [FUNCTION],
            "tool_choice": "none",
            "parallel_tool_calls": True,
            "reasoning_effort": "low",
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "max_tokens": 8,
            "stop": "END",
            **shared,
        },
    )
    claude = normalize(
        "claude.messages",
        {
            "system": "Be brief.",
            "messages": CLAUDE_TURNS,
            "tools": [CUSTOM],
            "tool_choice": {"type": "none"},
            "thinking": {"type": "adaptive"},
            "output_config": {
                "effort": "low",
                "format": {"type": "json_schema", "schema": SCHEMA},
            },
            "max_tokens": 8,
            "stop_sequences": ["END"],
            **shared,
        },
    )
    own = normalize(
        "generate",
        {
            "messages": OPENAI_TURNS,
            "tools": [FUNCTION],
            "tool_choice": "none",
            "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"},
            "sample_params": {
                "max_tokens": 8,
                "stops": ["END"],
                "return_logprob": False,
                "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
                **shared,
            },
        },
    )
    assert openai.state == claude.state == own.state
    assert openai.state.message == BLOCKS
    assert openai.state.reasoning == Reasoning(enabled=True, effort="low")
    counted = normalize(
        "claude.count_tokens",
        {
            "system": "Be brief.",
            "messages": CLAUDE_TURNS,
            "tools": [CUSTOM],
            "tool_choice": {"type": "none"},
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": "low"},
        },
    )
    assert counted.state.message == BLOCKS
    assert counted.state.tools == claude.state.tools
    assert counted.state.reasoning == claude.state.reasoning
    assert counted.state.sample_params == SampleParams()


def test_one_prompt_is_the_same_state_in_both_dialects_that_take_one() -> None:
    for given in ("Hi", ["Hi"]):
        plain = normalize("openai.completions", {"prompt": given, "logprobs": 0})
        assert plain.state == normalize("generate", {"prompt": "Hi"}).state
    for ids in ([1, 2], [[1, 2]]):
        plain = normalize("openai.completions", {"prompt": ids, "logprobs": 0})
        assert plain.state == normalize("generate", {"input_ids": [1, 2]}).state
        chat = normalize("openai.chat", {"input_ids": [1, 2], "messages": [], "logprobs": True})
        assert chat.state == plain.state


def test_one_job_takes_one_prompt() -> None:
    for several in (["a", "b"], [[1], [2]], ["a", [1]]):
        with pytest.raises(UnsupportedOption, match="2 prompts; a job has one"):
            normalize("openai.completions", {"prompt": several})


def test_messages_beside_token_ids_are_reported() -> None:
    normal = normalize("openai.chat", {"input_ids": [1], "messages": [USER]})
    assert normal.ignored == ("messages",)
    assert normal.state.message == ()


@pytest.mark.parametrize("arguments", ["", "{", "not json", "[1]", '{"a": 1, "a": 2}', "{" * 9999])
@pytest.mark.parametrize("protocol", ["openai.chat", "generate"])
def test_malformed_arguments_stay_what_the_model_wrote(protocol: str, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turn: Body = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert messages(protocol, [USER, turn])[1].content == (ToolUse("1", "f", arguments),)


def test_raw_arguments_come_back_as_they_were_in_claude() -> None:
    block: Body = {"type": "tool_use", "id": "1", "name": "f"}
    raw = block | {"input": {"rollout_raw_arguments": "{oh"}}
    assert claude_blocks(raw, role="assistant") == (ToolUse("1", "f", "{oh"),)
    giant = block | {"input": {"n": 2**200}}
    assert claude_blocks(giant, role="assistant") == (ToolUse("1", "f", f'{{"n":{2**200}}}'),)


def test_results_keep_their_order_and_their_error() -> None:
    found = claude_blocks(
        {"type": "text", "text": "first"},
        {"type": "tool_result", "tool_use_id": "2", "is_error": True, "content": "no"},
        {"type": "tool_result", "tool_use_id": "1"},
        {"type": "text", "text": "last"},
    )[:4]
    assert found == (
        Text("first"),
        ToolResult("2", (Text("no"),), is_error=True),
        ToolResult("1"),
        Text("last"),
    )


def test_neighbours_of_one_role_stay_in_openai_and_become_one_in_claude() -> None:
    turns: list[Body] = [USER, USER, {"role": "assistant", "content": "A"}, USER]
    assert [len(m.content) for m in messages("openai.chat", turns)] == [1, 1, 1, 1]
    assert [len(m.content) for m in messages("claude.messages", turns)] == [2, 1, 1]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_of_history_is_read_under_both_names(name: str) -> None:
    turn: Body = {"role": "assistant", "content": "A", name: "T"}
    assert messages("openai.chat", [turn])[0].content == (Thinking("T"), Text("A"))


def test_refusal_of_the_assistant_is_text() -> None:
    turns: list[Body] = [
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    assert [m.content for m in messages("openai.chat", turns)] == [(Text("No."),)] * 2


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "user", "content": "a", "reasoning": "r"}, "reasoning"),
        ({"role": "system", "content": "a", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "function", "content": "a"}, "role"),
    ],
)
def test_field_of_another_role_is_refused(turn: Body, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalize("openai.chat", {"messages": [turn]})
    assert caught.value.param == f"messages[0].{field}"


def test_redacted_thinking_is_dropped_and_reported() -> None:
    redacted: Body = {"type": "redacted_thinking", "data": "x"}
    turns = [
        USER,
        {"role": "assistant", "content": [redacted, {"type": "text", "text": "A"}]},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": [redacted]},
        {"role": "user", "content": "Three"},
    ]
    normal = normalize("claude.messages", {"max_tokens": 8, "messages": turns})
    assert normal.ignored == ("messages[].content[].redacted_thinking",)
    assert normal.state.message[1:] == (
        Message("assistant", (Text("A"),)),
        Message("user", (Text("Two"), Text("Three"))),
    )


def test_documents_and_search_results_are_text() -> None:
    found = claude_blocks(
        {
            "type": "document",
            "title": "T",
            "context": "C",
            "source": {"type": "text", "media_type": "text/plain", "data": "D"},
        },
        {"type": "document", "source": {"type": "content", "content": "whole"}},
        {
            "type": "document",
            "source": {"type": "content", "content": [{"type": "text", "text": "part"}]},
        },
        {
            "type": "search_result",
            "source": "https://a",
            "title": "Found",
            "content": [{"type": "text", "text": "it"}],
        },
    )[:4]
    assert found == (
        Text("T\nC\nD"),
        Text("whole"),
        Text("part"),
        Text("Found\nhttps://a\nit"),
    )


def test_billing_header_is_cut_from_the_system_prompt() -> None:
    header = "x-anthropic-billing-header: cc_version=2; cch=ab12;"
    blocks = [{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}]
    for system in (blocks, f"{header}\nBe brief."):
        found = messages("claude.messages", [USER], system=system)
        assert found[0] == Message("system", (Text("Be brief."),))
    assert messages("claude.messages", [USER], system=header) == (Message("user", (Text("Hi"),)),)


@pytest.mark.parametrize("system", ["", [], None])
def test_empty_system_of_claude_is_no_message(system: object) -> None:
    normal = normalize("claude.messages", PLAIN["claude.messages"] | {"system": system})
    assert normal == normalize("claude.messages", PLAIN["claude.messages"])


def test_prefill_is_unsupported_in_claude_and_history_in_openai() -> None:
    turns: list[Body] = [USER, {"role": "assistant", "content": "I"}]
    with pytest.raises(UnsupportedOption, match="end with a user message"):
        messages("claude.messages", turns)
    assert len(messages("openai.chat", turns)) == 2


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "a.png"])
def test_address_of_an_image_is_on_the_web_or_in_the_body(url: str) -> None:
    part = {"type": "image_url", "image_url": url}
    with pytest.raises(InvalidRequest, match="Expected an https: or data: URL"):
        messages("openai.chat", [{"role": "user", "content": [part]}])
    with pytest.raises(InvalidRequest):
        claude_blocks({"type": "image", "source": {"type": "url", "url": url}})
