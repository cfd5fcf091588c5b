"""OpenAI's tool calls in an answer, which `generate` shows too."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from protocols.message import Block, ToolUse


class CalledFunction(msgspec.Struct, frozen=True, gc=False):
    """What is called."""

    name: str
    arguments: str
    """The model's own text."""


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
