"""OpenAI's messages, text only, into the normal form. `generate` takes the same shape."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocols.dialects.base import MAX_MESSAGES
from protocols.dialects.field import Verdicts, ignored, path, refused
from protocols.errors import InvalidRequest, UnsupportedOption
from protocols.message import Message, Text

ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
UNSUPPORTED_ROLES = ("tool", "function")


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece of a message's content."""

    type: str
    text: str | None = None
    prompt_cache_breakpoint: Annotated[object, ignored()] = None
    image_url: Annotated[object, refused()] = None
    video_url: Annotated[object, refused()] = None
    audio_url: Annotated[object, refused()] = None
    input_audio: Annotated[object, refused()] = None
    file: Annotated[object, refused()] = None
    refusal: Annotated[object, refused()] = None


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message; a client that echoes an answer sends most of these fields as null."""

    role: str
    content: str | list[Part] | None = None
    name: Annotated[object, ignored()] = None
    tool_calls: Annotated[object, refused([])] = None
    tool_call_id: Annotated[object, refused()] = None
    function_call: Annotated[object, refused()] = None
    refusal: Annotated[object, refused()] = None
    audio: Annotated[object, refused()] = None
    annotations: Annotated[object, refused([])] = None
    reasoning: Annotated[object, refused("")] = None
    reasoning_content: Annotated[object, refused("")] = None


Turns = Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
_turn = Verdicts(Turn)
_part = Verdicts(Part)


def messages_of(turns: list[Turn], unused: list[str]) -> tuple[Message, ...]:
    """The conversation as it stands, order and neighbours untouched; raises RequestError."""
    return tuple([_message(turn, at, unused) for at, turn in enumerate(turns)])


def _message(turn: Turn, at: int, unused: list[str]) -> Message:
    role = _role(turn.role, at)
    unused += _turn.check(turn, "messages", at)
    if isinstance(turn.content, str):
        return Message(role, (Text(turn.content),))
    if turn.content:
        return Message(role, tuple([_text(p, at, i, unused) for i, p in enumerate(turn.content)]))
    field = path("messages", at, "content")
    raise InvalidRequest(f"`{field}`: Expected a string or at least one text part", param=field)


def _role(role: str, at: int) -> Literal["system", "user", "assistant"]:
    known = ROLES.get(role)
    if known:
        return known
    field = path("messages", at, "role")
    if role in UNSUPPORTED_ROLES:
        raise UnsupportedOption(f"`{field}`: '{role}' is not supported", param=field)
    raise InvalidRequest(f"`{field}`: Expected one of {', '.join(ROLES)}", param=field)


def _text(part: Part, at: int, index: int, unused: list[str]) -> Text:
    unused += _part.check(part, "messages", at, "content", index)
    if part.type == "text" and part.text is not None:
        return Text(part.text)
    field = path("messages", at, "content", index, "text" if part.type == "text" else "type")
    if part.type == "text":
        raise InvalidRequest(f"`{field}`: required", param=field)
    raise UnsupportedOption(f"`{field}`: only parts of type 'text' are supported", param=field)
