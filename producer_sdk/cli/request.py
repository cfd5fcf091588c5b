"""Request bodies as a command line gives them."""

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from protocols import codec
from protocols.errors import InvalidRequest

_decoder = msgspec.json.Decoder(dict[str, Any])


def asking(prompt: str, protocol: str, **limits: float) -> dict[str, Any]:
    """The body in which a user says one thing; `limits` are sampling parameters that all dialects name alike."""
    if protocol == "openai.completions":
        return {"prompt": prompt} | limits
    turns = {"messages": [{"role": "user", "content": prompt}]}
    match protocol:
        case "generate":
            return turns | {"sample_params": limits}
        case "claude.count_tokens":
            return turns  # nothing is drawn
        case _:
            return turns | limits


def read_body(told: str) -> dict[str, Any]:
    """The body that is `told`, or that lies on standard input (`-`) or in a file (`@file`).

    Raises InvalidRequest.
    """
    return codec.parse_json(_decoder, _bytes(told))


def _bytes(told: str) -> bytes:
    if told == "-":
        return sys.stdin.buffer.read()
    if not told.startswith("@"):
        return os.fsencode(told)
    try:
        return Path(told[1:]).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{told}: {error.strerror}", param="body") from None
