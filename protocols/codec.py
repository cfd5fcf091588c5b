"""Bytes to and from what travels: the one place that knows the wire.

JSON is the dialects' own; rollout states are msgpack, with token ids as little-endian u32 and log-probabilities as
little-endian f32. Samples after the first leave out the prompt, which equals the first's.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from protocols.errors import InvalidRequest
from protocols.rollout_state import Logprobs, RolloutState, TokenIds

JOB_ID = re.compile(r"[A-Za-z0-9._:~-]{1,128}")
Parsed = TypeVar("Parsed")


def _to_wire(value: object) -> bytes:
    if isinstance(value, TokenIds | Logprobs):
        if sys.byteorder == "big":
            value = type(value)(value)
            value.byteswap()
        return value.tobytes()
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _from_wire(kind: type, value: Any) -> TokenIds | Logprobs:
    if kind is TokenIds or kind is Logprobs:
        return kind.from_bytes(value)
    raise NotImplementedError(f"{kind.__name__} does not travel")


_pack = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_unpack = msgspec.msgpack.Decoder(tuple[RolloutState, ...], dec_hook=_from_wire)
_encode = msgspec.json.Encoder()
_decode_object = msgspec.json.Decoder(dict[str, Any])


def pack_states(states: Sequence[RolloutState]) -> bytes:
    """One rollout state a sample; those after the first without their prompt."""
    first, *others = states
    bare = [
        msgspec.structs.replace(state, message=(), prompt=None, prompt_ids=TokenIds())
        for state in others
    ]
    return _pack.encode([first, *bare])


def unpack_states(packed: bytes) -> tuple[RolloutState, ...]:
    """What `pack_states` packed, the prompt put back into every sample."""
    if not packed:
        return ()
    first, *others = _unpack.decode(packed)
    return first, *(
        msgspec.structs.replace(
            state, message=first.message, prompt=first.prompt, prompt_ids=first.prompt_ids
        )
        for state in others
    )


def encode_json(value: object) -> bytes:
    """JSON of plain values and structs."""
    return _encode.encode(value)


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON object."""
    return _decode_object.decode(data)


def parse_json(decoder: msgspec.json.Decoder[Parsed], body: bytes) -> Parsed:
    """Decode a job's body; what does not fit is an InvalidRequest that names the field.

    msgspec's messages end in ``- at `$.path` ``: the path is the field at fault.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        unknown = re.search(r"unknown field `([^`]*)`", problem)
        inside = path.rstrip("`").lstrip(".")
        field = ".".join(part for part in (inside, unknown and unknown[1]) if part)
        where = f"`{field}`: " if field else "body: "
        raise InvalidRequest(where + problem, param=field or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"body: not valid JSON: {error}") from None
