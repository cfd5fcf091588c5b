"""What a stream's bytes say, for tests."""

import json
from collections.abc import Iterable, Iterator
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


def chat_text(frames: bytes | Iterable[bytes]) -> str:
    """The content of a chat completion's first choice; it must be well ended."""
    told = list(events(frames))
    assert told[-1].data == "[DONE]", told[-1]
    choices = [c for e in told[:-1] for c in e.data["choices"] if c["index"] == 0]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] != []
    return "".join(choice["delta"].get("content") or "" for choice in choices)
