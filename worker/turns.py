"""From messages of blocks to the turns of a chat template, in their order.

A template that shows no tools is told of them in words of ours, those of Hermes and Qwen: a system text, calls in the
markup that is looked for in responses, results in turns of the user.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby

import msgspec

from protocols.errors import InvalidRequest
from protocols.message import (
    Block,
    Image,
    Message,
    Reasoning,
    Text,
    Thinking,
    Tool,
    ToolResult,
    ToolUse,
)
from worker.engines.base import Declared, Function, Template, Turn, TurnCall, TurnTool

TOOL_ERROR = "[tool error]"
"""Before what a tool said that failed."""
PREAMBLE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within {open}{close} XML tags:
{open}
{{"name": <function-name>, "arguments": <args-json-object>}}
{close}"""


def tools_of(tools: Sequence[Tool]) -> list[TurnTool]:
    """What a template is told of them; raises InvalidRequest for a schema that cannot be read."""
    try:
        return [TurnTool(type="function", function=_declared(tool)) for tool in tools]
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "`tools`: the parameters of a tool are no JSON, or nested too deeply", param="tools"
        ) from None


def options_of(reasoning: Reasoning) -> dict[str, bool | str]:
    """What a template is told of thinking."""
    options: dict[str, bool | str] = {}
    if reasoning.enabled is not None:
        options |= {"enable_thinking": reasoning.enabled, "thinking": reasoning.enabled}
    if reasoning.effort is not None:
        options["reasoning_effort"] = reasoning.effort
    return options


def turns_of(
    messages: Sequence[Message],
    tools: Sequence[TurnTool],
    template: Template,
    call: tuple[str, str],
) -> list[Turn]:
    """The turns, as the template can show them; `call` is the markup of a call."""
    names = _names(messages)
    own_words = None if template.tools else call
    turns = [turn for message in messages for turn in _turns(message, names, own_words)]
    if own_words and tools:
        turns = _told(turns, tools, own_words)
    turns = _folded(turns, template)
    return turns if template.neighbours else _merged(turns)


def _names(messages: Sequence[Message]) -> dict[str, str]:
    """Of the tools that were called, by the call's id."""
    blocks = [block for message in messages for block in message.content]
    return {block.id: block.name for block in blocks if isinstance(block, ToolUse)}


def _turns(
    message: Message, names: dict[str, str], own_words: tuple[str, str] | None
) -> Iterable[Turn]:
    if message.role == "system":
        yield Turn(role="system", content=_text(message.content))
    elif message.role == "assistant":
        for blocks in _spoken(message.content):
            yield _assistant(blocks, own_words)
    elif own_words:
        yield Turn(role="user", content=_in_own_words(message.content))
    else:
        yield from _user(message.content, names)


def _user(content: Sequence[Block], names: dict[str, str]) -> Iterable[Turn]:
    """Results and what stands between them, in order."""
    for is_result, blocks in groupby(content, lambda block: isinstance(block, ToolResult)):
        if not is_result:
            yield Turn(role="user", content=_text(blocks))
            continue
        for result in blocks:
            if isinstance(result, ToolResult):
                turn = Turn(role="tool", content=_said(result), tool_call_id=result.tool_use_id)
                if result.tool_use_id in names:
                    turn["name"] = names[result.tool_use_id]
                yield turn
    if not content:
        yield Turn(role="user", content="")


def _spoken(content: Sequence[Block]) -> Iterable[list[Block]]:
    """An answer, cut where the model spoke again after a call: a turn's calls come last."""
    blocks: list[Block] = []
    for block in content:
        if blocks and isinstance(blocks[-1], ToolUse) and not isinstance(block, ToolUse):
            yield blocks
            blocks = []
        blocks.append(block)
    yield blocks


def _assistant(blocks: Sequence[Block], own_words: tuple[str, str] | None) -> Turn:
    turn = Turn(role="assistant", content=_text(blocks))
    thinking = "".join(block.text for block in blocks if isinstance(block, Thinking))
    if thinking:
        turn["reasoning_content"] = thinking
    calls = [block for block in blocks if isinstance(block, ToolUse)]
    if own_words:
        written = [_written(call, own_words) for call in calls]
        turn["content"] = "\n".join([turn["content"], *written] if turn["content"] else written)
    elif calls:
        turn["tool_calls"] = [_call(call) for call in calls]
    return turn


def _call(call: ToolUse) -> TurnCall:
    function = Function(name=call.name, arguments=_arguments(call.arguments))
    return TurnCall(id=call.id, type="function", function=function)


def _arguments(text: str) -> dict[str, object] | str:
    """The object; the text itself where it is none, for it is the policy's own."""
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        msgspec.json.decode(text)  # stricter than json: no NaN, no half of a surrogate pair
        return json.loads(text)  # exact where msgspec is not: large integers
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return text


def _written(call: ToolUse, mark: tuple[str, str]) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'{mark[0]}\n{{"name": {name}, "arguments": {call.arguments}}}\n{mark[1]}'


def _in_own_words(content: Sequence[Block]) -> str:
    """Results and what stands between them, as one text."""
    parts: list[str] = []
    for is_result, blocks in groupby(content, lambda block: isinstance(block, ToolResult)):
        if is_result:
            results = [_said(block) for block in blocks if isinstance(block, ToolResult)]
            parts += [f"<tool_response>\n{said}\n</tool_response>" for said in results]
        else:
            parts.append(_text(blocks))
    return "\n".join(parts)


def _said(result: ToolResult) -> str:
    text = _text(result.content)
    return f"{TOOL_ERROR} {text}" if result.is_error else text


def _text(blocks: Iterable[Block]) -> str:
    return "".join([block.text for block in blocks if isinstance(block, Text)])


def _declared(tool: Tool) -> Declared:
    parameters: object = json.loads(tool.parameters)
    if tool.description is None:
        return Declared(name=tool.name, parameters=parameters)
    return Declared(name=tool.name, description=tool.description, parameters=parameters)


def _told(turns: list[Turn], tools: Sequence[TurnTool], mark: tuple[str, str]) -> list[Turn]:
    """With the tools in the first system turn."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = PREAMBLE.format(tools=lines, open=mark[0], close=mark[1])
    if turns and turns[0]["role"] == "system":
        return [Turn(role="system", content=f"{turns[0]['content']}\n\n{text}"), *turns[1:]]
    return [Turn(role="system", content=text), *turns]


def _folded(turns: list[Turn], template: Template) -> list[Turn]:
    """System turns that the template cannot show join the user's turn after them, else before, else are one."""
    folded: list[Turn] = []
    waiting: list[str] = []
    for at, turn in enumerate(turns):
        shown = template.late_system or (at == 0 and template.system)
        if turn["role"] == "system" and not shown:
            waiting.append(turn["content"])
        elif waiting:
            folded.extend(_joined(waiting, turn, folded))
            waiting = []
        else:
            folded.append(turn)
    if waiting:
        folded.extend(_joined(waiting, None, folded))
    return folded


def _joined(system: list[str], after: Turn | None, before: list[Turn]) -> list[Turn]:
    text = "\n\n".join(system)
    rest = [] if after is None else [after]
    if after is not None and after["role"] == "user":
        return [Turn(role="user", content=f"{text}\n\n{after['content']}")]
    if before and before[-1]["role"] == "user":
        last = before.pop()
        return [Turn(role="user", content=f"{last['content']}\n\n{text}"), *rest]
    return [Turn(role="user", content=text), *rest]


def _merged(turns: list[Turn]) -> list[Turn]:
    """Neighbours of one role as one turn, but for results."""
    merged: list[Turn] = []
    for turn in turns:
        if not merged or turn["role"] == "tool" or merged[-1]["role"] != turn["role"]:
            merged.append(turn)
            continue
        before = merged.pop()
        one = Turn(role=turn["role"], content=_beside(before["content"], turn["content"]))
        thinking = _beside(before.get("reasoning_content", ""), turn.get("reasoning_content", ""))
        if thinking:
            one["reasoning_content"] = thinking
        calls = [*before.get("tool_calls", []), *turn.get("tool_calls", [])]
        if calls:
            one["tool_calls"] = calls
        merged.append(one)
    return merged


def _beside(one: str, other: str) -> str:
    return f"{one}\n\n{other}" if one and other else one + other


def images_of(messages: Sequence[Message]) -> Iterable[tuple[int, Image]]:
    """Pictures, each with the number of its message."""
    for number, message in enumerate(messages):
        for block in message.content:
            inner = block.content if isinstance(block, ToolResult) else (block,)
            yield from ((number, image) for image in inner if isinstance(image, Image))
