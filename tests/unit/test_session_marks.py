"""When two conversations count as one: what clients lose or spell anew does not matter, all else does."""

import pytest

from protocols.errors import InvalidRequest
from protocols.message import (
    Block,
    Message,
    Text,
    Thinking,
    Tool,
    ToolResult,
    ToolUse,
)
from protocols.queue.rows import check_job
from protocols.session import follow, trail
from tests.job_body import job

CALL = ToolUse("call_1", "add", '{"a": 1, "b": [2.0, "x"]}')
RESULT = ToolResult("call_1", (Text("3"),))
TOOL = Tool("add", "Adds.", '{"type":"object","properties":{"a":{}}}')


def conversation(*answer: Block, result: ToolResult = RESULT) -> tuple[Message, ...]:
    return (
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("Add."),)),
        Message("assistant", answer),
        Message("user", (result, Text("Go on."))),
    )


def mark(*answer: Block, result: ToolResult = RESULT) -> str:
    return trail(conversation(*answer, result=result), (TOOL,))[-1]


@pytest.mark.parametrize(
    "answer",
    [
        (Text("I add."), CALL),
        (Thinking("Hm."), Text("I add."), CALL),
        (Text(" I add.\n"), CALL),
        (Text("I "), Text("add."), CALL),
        (CALL, Text("I add.")),
        (Text("I add."), Text(""), ToolUse("toolu_9", "add", CALL.arguments)),
        (Text("I add."), ToolUse("call_1", "add", '{"b":[2,"\\u0078"],\n "a":1}')),
    ],
)
def test_what_clients_lose_or_spell_anew_makes_no_other_conversation(
    answer: tuple[Block, ...],
) -> None:
    assert mark(*answer) == mark(Text("I add."), CALL)


def test_ids_of_tool_results_do_not_matter() -> None:
    other = ToolResult("toolu_9", (Text(""), Text("3")))
    assert mark(CALL, result=other) == mark(CALL)


@pytest.mark.parametrize(
    "answer",
    [
        (Text("I add"), CALL),
        (Text("I add."),),
        (Text("I add."), CALL, CALL),
        (Text("I add."), ToolUse("call_1", "sub", CALL.arguments)),
        (Text("I add."), ToolUse("call_1", "add", '{"a": 2}')),
        (Text("I add."), ToolUse("call_1", "add", '{"a": 1')),
    ],
)
def test_another_answer_is_another_conversation(answer: tuple[Block, ...]) -> None:
    assert mark(*answer) != mark(Text("I add."), CALL)


@pytest.mark.parametrize(
    "result",
    [
        ToolResult("call_1", (Text("4"),)),
        ToolResult("call_1", (Text("3"),), is_error=True),
        ToolResult("call_1"),
    ],
)
def test_another_result_is_another_conversation(result: ToolResult) -> None:
    assert mark(CALL, result=result) != mark(CALL)


def test_system_and_tools_belong_to_the_conversation() -> None:
    messages = conversation(CALL)
    marks = {
        trail(messages, ())[-1],
        trail(messages, (TOOL,))[-1],
        trail(messages, (Tool("add"),))[-1],
        trail(messages[1:], (TOOL,))[-1],
        trail((Message("system", (Text("Be long."),)), *messages[1:]), (TOOL,))[-1],
    }
    assert len(marks) == 5
    spelled = Tool("add", "Adds.", '{"properties": {"a": {}}, "type": "object"}')
    assert trail(messages, (spelled,)) == trail(messages, (TOOL,))


def test_a_turns_mark_is_that_of_the_beginning_which_the_next_turn_looks_up() -> None:
    messages = conversation(Thinking("Hm."), CALL)
    marks = trail(messages[:2], (TOOL,))
    assert len(marks) == 3
    assert follow(marks[-1], messages[2]) == trail(conversation(CALL), (TOOL,))[3]


@pytest.mark.parametrize(
    "arguments", ["", "{", "[" * 100_000, "1" * 10_000, "NaN", '{"a": 1e999}', '"\\ud800"']
)
def test_arguments_that_are_no_proper_json_are_no_trouble(arguments: str) -> None:
    assert mark(ToolUse("c", "add", arguments)) == mark(ToolUse("d", "add", arguments))


def test_a_sessions_name_is_bounded() -> None:
    for name in ("", "x" * 257):
        with pytest.raises(InvalidRequest, match="`session`"):
            check_job(job("a", session=name))
