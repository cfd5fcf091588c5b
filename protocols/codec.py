"""Bytes to and from what travels: the one place that knows the wire.

JSON is the dialects' own; rollout states are msgpack, with token ids as little-endian u32 and
log-probabilities as little-endian f32. Samples after the first leave out the prompt and its tools,
which equal the first's.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import msgspec

from protocols.errors import InvalidRequest
from protocols.rollout_state import Logprobs, RolloutState, TokenIds
from protocols.session import Node

JOB_ID = re.compile(r"[A-Za-z0-9._:~-]{1,128}")
MAX_DEPTH = 100
"""Of schemas and arguments: what is deeper would break the libraries that read them later."""
MAX_NAMED_CHARS = 256
"""An error repeats no more of what a client sent."""
Parsed = TypeVar("Parsed")
_ABSENT = re.compile(
    r"Object (?P<fault>missing required|contains unknown) field `(?P<field>.*)`", re.DOTALL
)


class _Error(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _Error


def pack_numbers(numbers: TokenIds | Logprobs) -> bytes:
    """Little-endian, 4 bytes each."""
    if sys.byteorder == "little":
        return numbers.tobytes()
    swapped = numbers[:]
    swapped.byteswap()
    return swapped.tobytes()


def _to_wire(value: object) -> bytes:
    if isinstance(value, TokenIds | Logprobs):
        return pack_numbers(value)
    raise NotImplementedError(f"{type(value).__name__} does not travel")


def _from_wire(kind: type, value: bytes) -> TokenIds | Logprobs:
    if kind is TokenIds or kind is Logprobs:
        return kind.from_bytes(value)
    raise NotImplementedError(f"{kind.__name__} does not travel")


_pack = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_unpack = msgspec.msgpack.Decoder(tuple[RolloutState, ...], dec_hook=_from_wire)
_unpack_node = msgspec.msgpack.Decoder(Node, dec_hook=_from_wire)
_encode = msgspec.json.Encoder()
_decode_error = msgspec.json.Decoder(_ErrorBody)
_decode_object = msgspec.json.Decoder(dict[str, Any])


def pack_states(states: Sequence[RolloutState]) -> bytes:
    """One rollout state a sample; those after the first without their prompt."""
    first, *others = states
    bare = [
        msgspec.structs.replace(state, message=(), prompt=None, tools=(), prompt_ids=TokenIds())
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
            state,
            message=first.message,
            prompt=first.prompt,
            tools=first.tools,
            prompt_ids=first.prompt_ids,
        )
        for state in others
    )


def pack_node(node: Node) -> bytes:
    """What a session keeps of one response: `<bytes of what follows>:`, the node, then its log-probabilities."""
    bare = _pack.encode(msgspec.structs.replace(node, logprobs=Logprobs()))
    return b"%d:%b%b" % (len(bare), bare, pack_numbers(node.logprobs))


def unpack_node(packed: bytes) -> Node:
    """What `pack_node` packed; without log-probabilities where these were left out."""
    told, _, rest = packed.partition(b":")
    bare, logprobs = rest[: int(told)], rest[int(told) :]
    node = _unpack_node.decode(bare)
    return msgspec.structs.replace(node, logprobs=Logprobs.from_bytes(logprobs))


def encode_json(value: object) -> bytes:
    """JSON of plain values and structs."""
    return _encode.encode(value)


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON object."""
    return _decode_object.decode(data)


def json_text(value: object, field: str) -> str:
    """Compact JSON text, keys as they come; raises InvalidRequest, which names `field`, where it is too deep."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise InvalidRequest(f"`{field}`: nested deeper than {MAX_DEPTH} levels", param=field)
    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":")
    )  # takes integers of any size


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list) else ()


def object_text(text: str) -> str | None:
    """The same JSON object in compact text; None where the text is not one."""
    try:
        return json_text(decode_json(text.encode()), "text")
    except (msgspec.DecodeError, UnicodeError, RecursionError, InvalidRequest):
        return None


def fitted(value: object, kind: type[Parsed], field: str) -> Parsed:
    """A decoded value as a struct; raises InvalidRequest, which names the field inside `field`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error), field) from None


def error_message(body: bytes) -> str | None:
    """What an error body says, in whichever dialect; None where it says nothing."""
    try:
        return _decode_error.decode(body).error.message
    except msgspec.DecodeError:
        return None


def parse_json(decoder: msgspec.json.Decoder[Parsed], body: bytes) -> Parsed:
    """Decode a job's body; raises InvalidRequest, which names the field at fault and its limit."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except RecursionError:
        raise InvalidRequest("body: not valid JSON: nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # The decoder says "truncated" of a high surrogate without its partner as well.
        hint = ", or a lone surrogate is in a string" if "truncated" in str(error) else ""
        raise InvalidRequest(f"body: not valid JSON: {error}{hint}") from None


def _misfit(told: str, within: str = "") -> InvalidRequest:
    """From the decoder's message, which ends in ``- at `$.path` `` of the field or its parent."""
    problem, _, inside = told.replace(" - at `key` in `$", " as a key - at `$").partition(
        " - at `$"
    )
    parts = [within + inside.rstrip("`") if within else inside.rstrip("`").lstrip(".")]
    if absent := _ABSENT.match(problem):
        parts.append(absent["field"])
        problem = "required" if absent["fault"] == "missing required" else "unknown field"
    field = ".".join(filter(None, parts))[:MAX_NAMED_CHARS]
    where = f"`{field}`" if field else "body"
    return InvalidRequest(f"{where}: {problem[:MAX_NAMED_CHARS]}", param=field or None)
