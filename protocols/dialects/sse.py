"""Server-sent events as bytes."""

from protocols.codec import encode_json

DONE = b"data: [DONE]\n\n"
"""What ends the streams of OpenAI's protocols."""


def data(value: object) -> bytes:
    """An event without a name."""
    return b"data: " + encode_json(value) + b"\n\n"


def event(name: str, value: object) -> bytes:
    """An event with a name, without which Anthropic's clients see nothing."""
    return b"event: " + name.encode() + b"\n" + data(value)


def raw_data(value: bytes) -> bytes:
    """An event of JSON that is encoded already."""
    return b"data: " + value + b"\n\n"
