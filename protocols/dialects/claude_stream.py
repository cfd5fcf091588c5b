"""The frames of Claude's messages.

`message_start`, `ping`, then block by block its start, deltas and stop, one open at a time and their indexes without a
gap, then `message_delta` with stop reason and usage, and `message_stop`. What comes last is taken from the whole
response, so that both say the same.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw

from protocols.dialects.base import Piece, Streamed
from protocols.dialects.claude_response import SIGNATURE, call_id, input_of
from protocols.dialects.sse import event
from protocols.job import Segment

Kind = Literal["text", "thinking", "tool_use"]


class WholeBlock(msgspec.Struct, frozen=True):
    """A block of a whole response."""

    type: Kind
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: Raw = Raw(b"{}")


class WholeUsage(msgspec.Struct, frozen=True):
    """What the beginning of a stream tells."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class Whole(msgspec.Struct, frozen=True):
    """A whole response."""

    id: str
    model: str
    content: tuple[WholeBlock, ...]
    stop_reason: str
    stop_sequence: str | None
    usage: Raw
    rollout: Raw


_decoder = msgspec.json.Decoder(Whole)
_usage = msgspec.json.Decoder(WholeUsage)


class MessageStream:
    """Of one job."""

    plain = False

    def __init__(self, streamed: Streamed) -> None:
        self._streamed = streamed
        self._blocks = _Blocks()

    def begin(self) -> bytes:
        """The message without its content."""
        streamed = self._streamed
        usage = WholeUsage(len(streamed.states[0].prompt_ids))
        return _start(f"msg_{streamed.job_id}", streamed.model, usage)

    def add(self, segment: Segment, pieces: Sequence[Piece]) -> bytes:
        """A delta for each piece, between the starts and stops of blocks."""
        return b"".join([self._blocks.add(piece) for piece in pieces])

    def end(self, body: bytes, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What was held back, then stop reason and usage."""
        held = [self._blocks.add(piece) for pieces in rest for piece in pieces]
        whole = _decoder.decode(body)
        return b"".join([*held, self._blocks.close(), _stop(whole)])


class _Blocks:
    """Blocks as they come, one open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: Kind | None = None

    def add(self, piece: Piece) -> bytes:
        """What a piece adds."""
        frames = b""
        if piece.opens or self._open is None:
            frames = self.close()
            self._index, self._open = self._index + 1, piece.kind
            start = {"index": self._index, "content_block": _empty(piece)}
            frames += event("content_block_start", {"type": "content_block_start", **start})
        text = piece.text
        if piece.kind == "tool_use" and piece.opens and text:
            text = input_of(text).decode()
        return frames + self._delta(_delta(piece.kind, text)) if text else frames

    def close(self) -> bytes:
        """End the block that is open, if any."""
        if self._open is None:
            return b""
        signed, self._open = self._open == "thinking", None
        sign = {"type": "signature_delta", "signature": SIGNATURE}
        stop = {"type": "content_block_stop", "index": self._index}
        return (self._delta(sign) if signed else b"") + event("content_block_stop", stop)

    def _delta(self, delta: dict[str, str]) -> bytes:
        told = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return event("content_block_delta", told)


def _empty(piece: Piece) -> dict[str, Any]:
    """A block as it stands where it begins."""
    match piece.kind:
        case "text":
            return {"type": "text", "text": ""}
        case "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "tool_use":
            return {"type": "tool_use", "id": call_id(piece.id), "name": piece.name, "input": {}}


def _delta(kind: Kind, text: str) -> dict[str, str]:
    match kind:
        case "text":
            return {"type": "text_delta", "text": text}
        case "thinking":
            return {"type": "thinking_delta", "thinking": text}
        case "tool_use":
            return {"type": "input_json_delta", "partial_json": text}


def _start(name: str, model: str, usage: WholeUsage) -> bytes:
    message: dict[str, Any] = {
        "id": name,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**msgspec.structs.asdict(usage), "output_tokens": 0},
    }
    started = event("message_start", {"type": "message_start", "message": message})
    return started + event("ping", {"type": "ping"})


def _stop(whole: Whole) -> bytes:
    told = {
        "type": "message_delta",
        "delta": {"stop_reason": whole.stop_reason, "stop_sequence": whole.stop_sequence},
        "usage": whole.usage,
        "rollout": whole.rollout,
    }
    return event("message_delta", told) + event("message_stop", {"type": "message_stop"})


def replay(body: bytes) -> bytes:
    """The frames of a whole response."""
    whole, blocks = _decoder.decode(body), _Blocks()
    frames = [_start(whole.id, whole.model, _usage.decode(whole.usage))]
    for block in whole.content:
        given = {
            "text": block.text,
            "thinking": block.thinking,
            "tool_use": bytes(block.input).decode(),
        }
        # ids of calls stand as they will be read: the prefix is added where a block begins
        named = block.id.removeprefix(call_id(""))
        frames.append(blocks.add(Piece(block.type, given[block.type], True, named, block.name)))
    return b"".join([*frames, blocks.close(), _stop(whole)])
