"""OpenAI's tool calls: what is called, in an answer and when it comes back, and calls as an answer shows them."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from protocols.message import Block, ToolUse


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What is called."""

    name: str
    arguments: str
    """The model's own text, JSON or not."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One call."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def call_id(block_id: str) -> str:
    """OpenAI's spelling of a new call's id."""
    return f"call_{block_id}"


def calls_of(output: Iterable[Block]) -> list[ToolCall]:
    """The calls among some blocks."""
    return [
        ToolCall(id=call_id(block.id), function=CalledFunction(block.name, block.arguments))
        for block in output
        if isinstance(block, ToolUse)
    ]
