"""From messages of blocks to the turns of a chat template: order, tools, errors, and what a template cannot show."""

import pytest
from msgspec.structs import replace

from protocols.errors import InvalidRequest
from protocols.message import Block, Message, Reasoning, Text, Thinking, Tool, ToolResult, ToolUse
from worker.engines.base import Template, Turn
from worker.turns import options_of, tools_of, turns_of

WHOLE = Template(tools=True, late_system=True)
BARE = Template()
MARK = ("<tool_call>", "</tool_call>")
LOOK = Tool("look", "Looks.", '{"type":"object","properties":{"z":{},"a":{}}}')
CALL = ToolUse("call_1", "look", '{"at": "it"}')
RESULT = ToolResult("call_1", (Text("a"), Text("b")))


def user(*blocks: Block | str) -> Message:
    return Message("user", tuple(Text(one) if isinstance(one, str) else one for one in blocks))


def assistant(*blocks: Block) -> Message:
    return Message("assistant", blocks)


def system(text: str) -> Message:
    return Message("system", (Text(text),))


def turns(
    *messages: Message, template: Template = WHOLE, tools: tuple[Tool, ...] = ()
) -> list[Turn]:
    return turns_of(messages, tools_of(tools), template, MARK)


def contents(found: list[Turn]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in found]


def test_plain_messages_are_turns_as_they_are() -> None:
    for template in (WHOLE, BARE, replace(WHOLE, neighbours=False)):
        found = turns(system("s"), user("a", "b\n"), assistant(Text("c")), template=template)
        assert contents(found) == [("system", "s"), ("user", "ab\n"), ("assistant", "c")]


def test_thinking_and_calls_are_fields_of_the_turn() -> None:
    (turn,) = turns(assistant(Thinking("hm"), Text("so"), CALL, replace(CALL, id="call_2")))
    assert (turn["content"], turn.get("reasoning_content")) == ("so", "hm")
    calls = turn.get("tool_calls", [])
    assert [call["id"] for call in calls] == ["call_1", "call_2"]
    assert calls[0]["function"] == {"name": "look", "arguments": {"at": "it"}}


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "{",
        "[1]",
        '"text"',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        "{'a': 1}",
        '{"a":' * 5000 + "1" + "}" * 5000,
    ],
)
def test_arguments_that_are_no_object_stay_the_policys_text(arguments: str) -> None:
    (turn,) = turns(assistant(replace(CALL, arguments=arguments)))
    assert turn.get("tool_calls", [])[0]["function"]["arguments"] == arguments


def test_large_integers_of_arguments_are_exact() -> None:
    (turn,) = turns(assistant(replace(CALL, arguments='{"n": 123456789012345678901}')))
    arguments = turn.get("tool_calls", [])[0]["function"]["arguments"]
    assert arguments == {"n": 123456789012345678901}


def test_results_and_the_text_between_them_keep_their_order() -> None:
    found = turns(user("one", RESULT, "two", "three", replace(RESULT, tool_use_id="other")))
    assert contents(found) == [
        ("user", "one"),
        ("tool", "ab"),
        ("user", "twothree"),
        ("tool", "ab"),
    ]


def test_a_result_names_its_call_and_the_tool() -> None:
    _, known, unknown = turns(assistant(CALL), user(RESULT, ToolResult("call_9")))
    assert (known.get("tool_call_id"), known.get("name")) == ("call_1", "look")
    assert (unknown.get("tool_call_id"), unknown.get("name")) == ("call_9", None)


def test_a_result_that_is_an_error_says_so() -> None:
    failed = replace(RESULT, is_error=True)
    assert contents(turns(user(failed))) == [("tool", "[tool error] ab")]
    (turn,) = turns(user(failed), template=BARE)
    assert "[tool error] ab" in turn["content"]


def test_what_the_model_said_after_a_call_is_a_turn_of_its_own() -> None:
    found = turns(assistant(Text("a"), CALL, Text("b")))
    assert contents(found) == [("assistant", "a"), ("assistant", "b")]
    assert ["tool_calls" in turn for turn in found] == [True, False]


def test_a_system_message_stays_in_place_where_the_template_can_show_it() -> None:
    found = turns(user("a"), system("s"), user("b"))
    assert contents(found) == [("user", "a"), ("system", "s"), ("user", "b")]


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([user("a"), system("s"), user("b")], [("user", "a"), ("user", "s\n\nb")]),
        (
            [user("a"), system("s"), assistant(Text("b"))],
            [("user", "a\n\ns"), ("assistant", "b")],
        ),
        ([user("a"), system("s")], [("user", "a\n\ns")]),
        (
            [user("a"), assistant(Text("b")), system("s"), system("t")],
            [("user", "a"), ("assistant", "b"), ("user", "s\n\nt")],
        ),
        ([system("s"), system("t"), user("a")], [("system", "s"), ("user", "t\n\na")]),
        (
            [assistant(Text("b")), system("s"), assistant(Text("c"))],
            [("assistant", "b"), ("user", "s"), ("assistant", "c")],
        ),
    ],
)
def test_a_system_message_that_cannot_be_shown_joins_its_neighbour(
    messages: list[Message], shown: list[tuple[str, str]]
) -> None:
    assert contents(turns(*messages, template=BARE)) == shown


def test_a_template_without_system_turns_has_the_text_in_the_users() -> None:
    found = turns(system("s"), user("a"), template=replace(BARE, system=False))
    assert contents(found) == [("user", "s\n\na")]


def test_neighbours_are_merged_where_the_template_raises_on_them() -> None:
    template = replace(WHOLE, neighbours=False)
    messages = (user("a"), user("b"), assistant(Text("c"), CALL), assistant(Thinking("d"), CALL))
    found = turns(*messages, user(RESULT, RESULT), template=template)
    roles = [turn["role"] for turn in found]
    assert roles == ["user", "assistant", "tool", "tool"]
    assert found[0]["content"] == "a\n\nb"
    assert (found[1]["content"], found[1].get("reasoning_content")) == ("c", "d")
    assert len(found[1].get("tool_calls", [])) == 2
    assert len(turns(*messages)) == 4


def test_tools_have_their_schema_with_keys_in_order() -> None:
    (shown,) = tools_of((LOOK,))
    assert shown["function"].get("description") == "Looks."
    assert list(shown["function"]["parameters"]["properties"]) == ["z", "a"]  # type: ignore[index]
    (bare,) = tools_of((Tool("f"),))
    assert "description" not in bare["function"]


def test_a_schema_that_cannot_be_read_is_the_jobs_fault() -> None:
    for schema in ("{", "[" * 100_000):
        with pytest.raises(InvalidRequest, match="`tools`"):
            tools_of((Tool("f", parameters=schema),))


def test_a_template_that_shows_no_tools_is_told_of_them_in_words() -> None:
    first, *_ = turns(system("s"), user("a"), template=BARE, tools=(LOOK,))
    assert first["content"].startswith("s\n\n# Tools\n")
    assert '"name": "look", "description": "Looks."' in first["content"]
    assert '<tool_call>\n{"name": <function-name>' in first["content"]
    first, second = turns(user("a"), template=BARE, tools=(LOOK,))
    assert first["role"] == "system"
    assert contents([second]) == [("user", "a")]


def test_history_of_calls_is_in_the_same_words() -> None:
    malformed = replace(CALL, arguments="{oops")
    found = turns(
        user("q"),
        assistant(Text("so"), CALL, malformed),
        user(RESULT, RESULT, "and?"),
        template=BARE,
    )
    assert found[1]["content"] == (
        'so\n<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "look", "arguments": {oops}\n</tool_call>'
    )
    told = "<tool_response>\nab\n</tool_response>"
    assert contents(found[2:]) == [("user", f"{told}\n{told}\nand?")]
    assert all("tool_calls" not in turn for turn in found)


def test_reasoning_is_told_by_the_names_that_templates_know() -> None:
    assert options_of(Reasoning()) == {}
    assert options_of(Reasoning(enabled=False)) == {"enable_thinking": False, "thinking": False}
    assert options_of(Reasoning(effort="low")) == {"reasoning_effort": "low"}
