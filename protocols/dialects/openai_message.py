"""OpenAI's messages in the normal form. `generate` takes the same shape.

A run of `tool` messages and the user's message right after it become one message of the user, as
Claude writes them; other neighbours stay as they are.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocols.dialects.base import MAX_MESSAGES
from protocols.dialects.field import Report, Verdicts, chosen, ignored, path, refused, wrong
from protocols.dialects.openai_call import CalledFunction
from protocols.dialects.picture import image_of
from protocols.message import Block, Image, Message, Text, Thinking, ToolResult, ToolUse

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
}
ASSISTANT_FIELDS = ("tool_calls", "reasoning_content", "reasoning", "refusal")


class ImageUrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a picture is."""

    url: str
    detail: Annotated[object, ignored("auto")] = None


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    prompt_cache_breakpoint: Annotated[object, ignored()] = None
    cache_control: object = None
    """Accepted in silence, as in Claude's blocks."""
    uuid: Annotated[object, ignored()] = None
    video_url: Annotated[object, refused()] = None
    audio_url: Annotated[object, refused()] = None
    input_audio: Annotated[object, refused()] = None
    file: Annotated[object, refused()] = None


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of `tool_calls`."""

    id: str
    function: CalledFunction | None = None
    type: str = "function"
    custom: object = None
    index: object = None
    """Left over from a stream; the order of the list counts."""


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message; a client that echoes an answer sends most of these fields as null."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    name: Annotated[object, ignored()] = None
    annotations: Annotated[object, ignored([])] = None
    function_call: Annotated[object, refused()] = None
    audio: Annotated[object, refused()] = None


Turns = Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
_turn = Verdicts(Turn)
_part = Verdicts(Part)
_image = Verdicts(ImageUrl)


def messages_of(turns: list[Turn], report: Report) -> tuple[Message, ...]:
    """The conversation in its order; raises RequestError."""
    messages: list[Message] = []
    before = ""
    for at, turn in enumerate(turns):
        message = _message(turn, at, report)
        if before == "tool" and message.role == "user":
            message = Message("user", (*messages.pop().content, *message.content))
        messages.append(message)
        before = turn.role
    return tuple(messages)


def _message(turn: Turn, at: int, report: Report) -> Message:
    role = ROLES.get(turn.role)
    if role is None:
        raise wrong(f"Expected one of {', '.join(ROLES)}", "messages", at, "role")
    _turn.check(turn, report, "messages", at)
    if turn.role == "assistant":
        return Message(role, _spoken(turn, at, report))
    _expect_only(turn, at)
    content = _content(turn, at, report)
    if turn.role == "tool":
        if turn.tool_call_id is None:
            raise wrong("required", "messages", at, "tool_call_id")
        return Message(role, (ToolResult(turn.tool_call_id, content),))
    if not content:
        raise wrong("Expected a string or at least one part", "messages", at, "content")
    return Message(role, content)


def _expect_only(turn: Turn, at: int) -> None:
    """Raise InvalidRequest for what only other roles have."""
    if turn.tool_call_id is not None and turn.role != "tool":
        raise wrong("only messages of role 'tool' have it", "messages", at, "tool_call_id")
    for name in ASSISTANT_FIELDS:
        if getattr(turn, name):
            raise wrong("only messages of role 'assistant' have it", "messages", at, name)


def _spoken(turn: Turn, at: int, report: Report) -> tuple[Block, ...]:
    """The assistant's thinking, text and calls, in this order."""
    thought = chosen(
        report,
        path("messages", at) + ".",
        "",
        reasoning_content=turn.reasoning_content,
        reasoning=turn.reasoning,
    )
    thinking = (Thinking(thought),) if thought else ()
    said = (Text(turn.refusal),) if turn.refusal else ()
    calls = tuple([_call(call, at, i, report) for i, call in enumerate(turn.tool_calls or ())])
    around = bool(thinking or said or calls)
    content = () if turn.content == "" and around else _content(turn, at, report)
    blocks = (*thinking, *content, *said, *[call for call in calls if call])
    if not blocks:
        raise wrong("Expected a string, at least one part or a call", "messages", at, "content")
    return blocks


def _call(call: Call, at: int, index: int, report: Report) -> ToolUse | None:
    where = ("messages", at, "tool_calls", index)
    if call.type != "function":
        report.refuse(path(*where, "type"), "only calls of type 'function' are supported")
        return None
    if call.function is None:
        raise wrong("required", *where, "function")
    return ToolUse(call.id, call.function.name, call.function.arguments)


def _content(turn: Turn, at: int, report: Report) -> tuple[Text | Image, ...]:
    if isinstance(turn.content, str):
        return (Text(turn.content),)
    parts = enumerate(turn.content or ())
    found = [_block(part, report, "messages", at, "content", index) for index, part in parts]
    return tuple([block for block in found if block])


def _block(part: Part, report: Report, *at: str | int) -> Text | Image | None:
    _part.check(part, report, *at)
    match part.type:
        case "text" | "refusal":
            text = part.text if part.type == "text" else part.refusal
            if text is None:
                raise wrong("required", *at, part.type)
            return Text(text)
        case "image_url":
            return _picture(part.image_url, report, *at, "image_url")
        case _:
            why = "only parts of type 'text', 'refusal' and 'image_url' are supported"
            report.refuse(path(*at, "type"), why)
            return None


def _picture(source: ImageUrl | str | None, report: Report, *at: str | int) -> Image:
    if source is None:
        raise wrong("required", *at)
    if isinstance(source, ImageUrl):
        _image.check(source, report, *at)
        source = source.url
    return image_of(source, path(*at))
