"""A session: the turns of one conversation, kept as token ids, so that a later turn never tokenizes an answer again.

Its turns are a tree. A turn is found by the hash of the conversation that ends in its answer, which
does not see what clients lose or spell anew: thinking, ids of tool calls, how arguments are written.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

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
from protocols.rollout_state import FinishReason, Logprobs, TokenIds

SESSION_TURNS = 4096
SESSION_BYTES = 32 * 1024 * 1024
"""A session that has so many turns, or so many bytes of them, takes no more."""
MAX_SESSION_CHARS = 256
MARK_BYTES = 16


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a session keeps of one response."""

    prompt_ids: TokenIds
    """What this turn added after its parent's tokens; of a root, its whole prompt."""
    response_ids: TokenIds
    logprobs: Logprobs
    """`[response tokens]`"""
    policy_versions: tuple[tuple[int, int], ...]
    """`(version, start)` spans of the response."""
    finish_reason: FinishReason | None = None
    output: tuple[Block, ...] = ()
    """The response as blocks, thinking included: what a template is given of it later."""
    messages: int = 0
    """How many messages the conversation had before this answer."""
    reasoning: Reasoning = Reasoning()
    branch: str | None = None
    """Why it goes on from no earlier turn; None where it does, or is the session's first."""


class NewTurn(msgspec.Struct, frozen=True):
    """A response on its way into its session."""

    rollout_id: str
    parent: str
    """Its parent's rollout id; empty for a root."""
    mark: str
    """Of the conversation that ends in it; empty where the prompt was none."""
    node: bytes
    """A packed Node."""


class SessionTurn(msgspec.Struct, frozen=True):
    """A response in its session."""

    rollout_id: str
    parent: str | None
    """The rollout id of the turn that it goes on from; None for a root."""
    at_ms: int
    """When it was accepted, by the server's clock."""
    node: Node


class Recalled(msgspec.Struct, frozen=True):
    """What a session knows of a conversation."""

    turns: int = 0
    """How many it has in all."""
    bytes: int = 0
    """That its nodes take."""
    path: tuple[tuple[str, Node], ...] = ()
    """`(rollout id, node)` from a root to the longest beginning that it knows; empty where it knows none; without
    log-probabilities."""
    gone: bool = False
    """Whether the job has tokens that go on from a turn which is not there any more."""

    @property
    def full(self) -> bool:
        """Whether it takes no more turns."""
        return self.turns >= SESSION_TURNS or self.bytes >= SESSION_BYTES


def trail(messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[str, ...]:
    """Marks of the conversation's beginnings, `[messages + 1]`: entry `i` is of the first `i` messages."""
    said = [[tool.name, tool.description, _arguments(tool.parameters)] for tool in tools]
    marks = [_hash("", said)]
    for message in messages:
        marks.append(follow(marks[-1], message))
    return tuple(marks)


def follow(mark: str, message: Message) -> str:
    """The mark of the conversation that goes on with this message."""
    return _hash(mark, [message.role, _heard(message)])


def _hash(mark: str, said: object) -> str:
    text = mark + json.dumps(said, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=MARK_BYTES).hexdigest()


def _heard(message: Message) -> object:
    if message.role != "assistant":
        return _blocks(message.content)
    # OpenAI's shape has one text beside the calls, and clients strip it
    text = "".join(block.text for block in message.content if isinstance(block, Text))
    calls = [[b.name, _arguments(b.arguments)] for b in message.content if isinstance(b, ToolUse)]
    return [text.strip(), calls]


def _blocks(blocks: Sequence[Block]) -> list[object]:
    said: list[object] = []
    for block in blocks:
        match block:
            case Text(text) if said and isinstance(said[-1], str):
                said[-1] += text
            case Text(text):
                said.append(text)
            case Image(url):
                said.append(["image", url])
            case ToolUse(_, name, arguments):
                said.append(["call", name, _arguments(arguments)])
            case ToolResult(_, content, is_error):
                said.append(["result", _blocks(content), is_error])
            case Thinking():
                pass
    return [one for one in said if one != ""]


def _arguments(text: str) -> str:
    """JSON in its one spelling: keys sorted, no spaces, whole numbers without a point; else the text as it is."""
    try:
        value = json.loads(text, parse_float=_number)
        return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> Any:  # noqa: ANN401 - int or float, as json.loads wants it
    value = float(text)
    return int(value) if value.is_integer() else value
