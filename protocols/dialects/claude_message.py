"""Claude's messages in the normal form: order kept, neighbours of one role made one message."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Literal

import msgspec

from protocols.codec import json_text
from protocols.dialects.claude_block import (
    BrowserStateBlock,
    Content,
    DocumentBlock,
    ImageBlock,
    RedactedThinkingBlock,
    Returned,
    SearchResultBlock,
    Source,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from protocols.dialects.field import Report, Verdicts, path, wrong
from protocols.dialects.picture import image_of
from protocols.errors import InvalidRequest, UnsupportedOption
from protocols.message import Block, Image, Message, Text, Thinking, ToolResult, ToolUse

RAW_ARGUMENTS = "rollout_raw_arguments"
"""The one key of a tool's `input` where the model wrote no JSON object: what it wrote, as text."""
BILLING = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*")
"""Put before the system prompt by Claude Code; it changes with every call, and with it every token after it."""

_verdicts: dict[type[msgspec.Struct], Verdicts] = {
    kind: Verdicts(kind)
    for kind in (
        TextBlock,
        ImageBlock,
        DocumentBlock,
        SearchResultBlock,
        ToolUseBlock,
        ToolResultBlock,
    )
}


def messages_of(
    turns: list[Turn], system: str | list[TextBlock] | None, report: Report
) -> tuple[Message, ...]:
    """System first, then the turns, of which those without a block fall away; raises RequestError."""
    given = [
        Message(_role(turn, at), tuple(_blocks(turn.content, report, "messages", at, "content")))
        for at, turn in enumerate(turns)
    ]
    messages = [message for message in given if message.content]
    if not messages:
        raise InvalidRequest("`messages`: nothing is left of them", param="messages")
    if messages[-1].role == "assistant":
        raise UnsupportedOption(
            "`messages`: the last one is the assistant's, and prefilling its answer is not "
            "supported; end with a user message",
            param="messages",
        )
    if told := _system(system, report):
        messages.insert(0, Message("system", told))
    return tuple(
        [
            Message(role, tuple([block for message in same for block in message.content]))
            for role, same in groupby(messages, key=attrgetter("role"))
        ]
    )


def _role(turn: Turn, at: int) -> Literal["user", "assistant", "system"]:
    if turn.role != "assistant" and turn.content == []:
        raise wrong("Expected `array` of length >= 1", "messages", at, "content")
    if turn.role == "user" or turn.role == "assistant" or turn.role == "system":
        return turn.role
    raise wrong("Expected one of user, assistant, system", "messages", at, "role")


def _system(system: str | list[TextBlock] | None, report: Report) -> tuple[Text, ...]:
    if not system:
        return ()
    blocks = [TextBlock(text=system)] if isinstance(system, str) else system
    for index, block in enumerate(blocks):
        _verdicts[TextBlock].check(block, report, "system", index)
    texts = [BILLING.sub("", block.text) for block in blocks]
    return tuple(
        [Text(told) for told, block in zip(texts, blocks, strict=True) if told or not block.text]
    )


def _blocks(content: str | Sequence[Content], report: Report, *at: str | int) -> Iterable[Block]:
    if isinstance(content, str):
        yield Text(content)
        return
    for index, block in enumerate(content):
        yield from _block(block, report, *at, index)


def _block(block: Content, report: Report, *at: str | int) -> Iterable[Block]:
    if verdicts := _verdicts.get(type(block)):
        verdicts.check(block, report, *at)
    match block:
        case ThinkingBlock():
            yield Thinking(block.thinking)
        case RedactedThinkingBlock():
            report.ignore(path(*at, "redacted_thinking"), "nobody here can read it")
        case ToolUseBlock():
            yield ToolUse(block.id, block.name, _arguments(block, *at))
        case ToolResultBlock():
            content = tuple(_returned(block.content, report, *at, "content"))
            yield ToolResult(block.tool_use_id, content, bool(block.is_error))
        case TextBlock() | ImageBlock() | DocumentBlock() | SearchResultBlock():
            yield from _given(block, report, *at)
        case _:
            report.refuse(path(*at, "type"), "blocks of Anthropic's own servers are not supported")


def _arguments(block: ToolUseBlock, *at: str | int) -> str:
    raw = block.input.get(RAW_ARGUMENTS)
    if isinstance(raw, str) and len(block.input) == 1:
        return raw
    return json_text(block.input, path(*at, "input"))


def _returned(
    content: str | Sequence[Returned] | None, report: Report, *at: str | int
) -> Iterable[Text | Image]:
    if isinstance(content, str):
        yield Text(content)
        return
    for index, block in enumerate(content or ()):
        match block:
            case ToolReferenceBlock():
                yield Text(block.tool_name)
            case BrowserStateBlock():
                report.refuse(path(*at, index, "type"), "a browser's state is not supported")
            case _:
                _verdicts[type(block)].check(block, report, *at, index)
                yield from _given(block, report, *at, index)


def _given(
    block: TextBlock | ImageBlock | DocumentBlock | SearchResultBlock,
    report: Report,
    *at: str | int,
) -> Iterable[Text | Image]:
    match block:
        case TextBlock():
            yield Text(block.text)
        case ImageBlock():
            yield from _picture(block.source, report, *at, "source")
        case DocumentBlock():
            yield from _document(block, report, *at, "source")
        case SearchResultBlock():
            yield Text(
                "\n".join([block.title, block.source, *[part.text for part in block.content]])
            )


def _picture(source: Source, report: Report, *at: str | int) -> Iterable[Image]:
    if source.type == "base64" and source.data and source.media_type:
        yield Image(f"data:{source.media_type};base64,{source.data}")
    elif source.type == "url" and source.url:
        yield image_of(source.url, path(*at, "url"))
    elif source.type in ("base64", "url"):
        raise wrong("Expected `data` and `media_type`, or `url`", *at)
    else:
        report.refuse(path(*at, "type"), "only sources of type 'base64' and 'url' are supported")


def _document(block: DocumentBlock, report: Report, *at: str | int) -> Iterable[Text | Image]:
    """Its title, its context and its text are one text."""
    source = block.source
    before = [part for part in (block.title, block.context) if part]
    if source.type == "text" and source.data is not None:
        yield Text("\n".join([*before, source.data]))
    elif source.type == "content" and source.content is not None:
        if before:
            yield Text("\n".join(before) + "\n")
        yield from _returned(source.content, report, *at, "content")
    elif source.type in ("text", "content"):
        raise wrong(f"Expected `{'data' if source.type == 'text' else 'content'}`", *at)
    else:
        report.refuse(
            path(*at, "type"), "only documents of type 'text' and 'content' are supported"
        )


def references(turns: Iterable[Turn]) -> frozenset[str]:
    """Names of the tools that tool results refer to."""
    return frozenset(
        found.tool_name
        for turn in turns
        if not isinstance(turn.content, str)
        for block in turn.content
        if isinstance(block, ToolResultBlock) and not isinstance(block.content, str | None)
        for found in block.content
        if isinstance(found, ToolReferenceBlock)
    )
