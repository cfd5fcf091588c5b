"""A conversation in its normal form: messages made of blocks, and the tools that may be called.

One ordered list of blocks is what every dialect is converted to and from. Nothing here is repaired:
the arguments of a tool call are the text that the model wrote.
"""

from typing import Literal

import msgspec


class Text(msgspec.Struct, frozen=True, tag="text"):
    """A block of text."""

    text: str


class Image(msgspec.Struct, frozen=True, tag="image"):
    """A picture, by its address or its bytes; no engine here takes one yet."""

    url: str
    """`https:` or `data:`."""


class Thinking(msgspec.Struct, frozen=True, tag="thinking"):
    """What the model thought before it spoke."""

    text: str


class ToolUse(msgspec.Struct, frozen=True, tag="tool_use"):
    """A call of a tool by the model."""

    id: str
    name: str
    arguments: str
    """JSON of an object where the model wrote one; else whatever it wrote."""


class ToolResult(msgspec.Struct, frozen=True, tag="tool_result"):
    """What a tool answered; it travels in a user's message."""

    tool_use_id: str
    content: tuple[Text | Image, ...] = ()
    is_error: bool = False


Block = Text | Image | Thinking | ToolUse | ToolResult
"""What a message is made of, in order."""


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Block, ...]


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool that the model may call."""

    name: str
    description: str | None = None
    parameters: str = '{"type":"object"}'
    """JSON schema of the arguments, as JSON text with keys in the order in which they came."""


class ToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which tools the model may or must call."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    """With `required`: the one tool to be called."""
    parallel: bool = True
    """Whether one answer may call several."""


class Reasoning(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether and how much the model shall think; None leaves it to the chat template."""

    enabled: bool | None = None
    effort: str | None = None
    """Handed to the chat template, as `reasoning_effort`."""


class JsonGuide(msgspec.Struct, frozen=True, tag="json"):
    """The answer is one JSON value."""

    schema: str = '{"type":"object"}'
    """JSON schema, as JSON text."""


class CallGuide(msgspec.Struct, frozen=True, tag="calls"):
    """The answer calls at least one of these tools, in the model's own markup."""

    tools: tuple[Tool, ...]
    parallel: bool = True
    """Whether it may call several."""


Guide = JsonGuide | CallGuide
"""What the tokens are constrained to. Thinking, where the model thinks first, is not."""
