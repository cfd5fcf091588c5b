"""What a stream's bytes say, for tests."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One server-sent event."""

    name: str
    data: Any
    """JSON, or `[DONE]`."""


def events(frames: bytes | Iterable[bytes]) -> Iterator[Event]:
    """The events of whole frames; anything else in them is an error."""
    joined = frames if isinstance(frames, bytes) else b"".join(frames)
    assert joined.endswith(b"\n\n")
    for block in joined[:-2].split(b"\n\n"):
        *named, told = block.decode().split("\n")
        assert told.startswith("data: ")
        assert all(line.startswith("event: ") for line in named)
        assert len(named) <= 1
        name = named[0].removeprefix("event: ") if named else ""
        text = told.removeprefix("data: ")
        yield Event(name, text if text == "[DONE]" else json.loads(text))


def objects(frames: bytes | Iterable[bytes]) -> list[dict[str, Any]]:
    """The data of all events but `[DONE]`."""
    return [event.data for event in events(frames) if event.data != "[DONE]"]


def choices(frames: bytes | Iterable[bytes]) -> list[dict[str, Any]]:
    """The choices of all chunks of an OpenAI completion."""
    return [choice for told in objects(frames) for choice in told.get("choices", ())]


def _content(choice: dict[str, Any]) -> str:
    return choice["delta"].get("content") or ""


def chat_text(
    frames: bytes | Iterable[bytes], *, of: Callable[[dict[str, Any]], str] = _content
) -> str:
    """What the first choice of an OpenAI completion says; its chunks must be in order and well ended."""
    frames = frames if isinstance(frames, bytes) else b"".join(frames)
    told = list(events(frames))
    assert told[-1].data == "[DONE]", told[-1]
    first = [choice for choice in choices(frames) if choice["index"] == 0]
    assert "delta" not in first[0] or first[0]["delta"]["role"] == "assistant"
    reasons = [choice["finish_reason"] for choice in first]
    assert reasons[-1] is not None
    assert not any(reasons[:-1])
    return "".join(map(of, first))


def claude_text(frames: bytes | Iterable[bytes]) -> str:
    """The text of a message whose events come in the order that its clients rely on."""
    told = list(events(frames))
    assert all(event.name == event.data["type"] for event in told)
    names = [event.name for event in told]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    open_block, count, text = None, 0, ""
    for event in told[2:-2]:
        match event.name:
            case "content_block_start":
                assert (open_block, event.data["index"]) == (None, count)
                open_block, count = count, count + 1
            case "content_block_delta":
                assert event.data["index"] == open_block
                text += event.data["delta"].get("text", "")
            case "content_block_stop":
                assert event.data["index"] == open_block
                open_block = None
            case name:
                raise AssertionError(name)
    assert open_block is None
    return text


def generate_text(frames: bytes | Iterable[bytes]) -> str:
    """The text of the first sample of `generate`."""
    told = list(events(frames))
    assert told[-1].data == "[DONE]"
    samples = [s for event in told[:-1] for s in event.data["samples"] if s["index"] == 0]
    reached = 0
    for sample in samples:
        assert sample["start"] == reached
        reached += len(sample["response_ids"])
    assert samples[-1]["finish_reason"] in ("stop", "length", "tool_calls")
    return "".join(sample["text"] for sample in samples)


def completion_text(frames: bytes | Iterable[bytes]) -> str:
    """The text of a plain completion's first choice."""
    return chat_text(frames, of=lambda choice: choice["text"])


TEXT_OF: dict[str, Callable[[bytes | Iterable[bytes]], str]] = {
    "openai.chat": chat_text,
    "openai.completions": completion_text,
    "claude.messages": claude_text,
    "generate": generate_text,
}
"""By dialect: the text of the first sample, from frames that must be in order and well ended."""
