"""The control channel: what a pool shall do, what a worker is doing, and which step leads from one to the other.

Every form of a command (`FCALL rolloutq_control`, `PUBLISH`, `rolloutq control`, `Client.control`) is words, as in
`pause mode=drain`, and ends in one step of the queue, which parses, judges and writes the desired state down
(`protocols/queue/control.lua`). Workers follow the desired state; `next_step` is how.
"""

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal, Self

import msgspec

from protocols.errors import InvalidCommand

MESSAGE_BYTES = 8192

Gate = Literal["open", "closed"]
Mode = Literal["release", "drain", "keep", "abort"]
"""What a closed gate does to jobs in flight: hand them back, let them end, hold them, answer them `aborted`."""
Memory = Literal["loaded", "offloaded", "discarded", "stale"]
"""Weights: there; in host memory; gone; room for them, but none in it."""
State = Literal["serving", "paused", "offloaded", "stale"]
Step = Literal["pause", "offload", "onload", "update_weights", "continue"]
Result = Literal["applied", "superseded", "refused"]

_decode_message = msgspec.json.Decoder(dict[str, str | int | bool])


class Desired(msgspec.Struct, frozen=True):
    """What one worker shall be doing; fields of `P:desired`."""

    gate: Gate
    mode: Mode
    memory: Memory
    weights: int | None
    """Policy version; None: that of the weights which the worker started with."""
    uri: str | None
    """Where these weights are; None: where the worker started with them."""
    sha256: str | None
    epoch: str
    """Of the generations: they can be compared within one."""
    generation: int

    @classmethod
    def of(cls, fields: Mapping[str, str], worker: str) -> Self:
        """As it is for one worker: an order to it alone stands beside those to all."""
        own = {
            name: fields.get(f"{name}@{worker}", fields.get(name)) for name in cls.__struct_fields__
        }
        told: dict[str, Any] = {name: value for name, value in own.items() if value}
        return msgspec.convert(_EMPTY | told, cls, strict=False)


_EMPTY: dict[str, None] = {"weights": None, "uri": None, "sha256": None}


class Standing(msgspec.Struct, frozen=True):
    """What one worker is doing."""

    gate: Gate
    mode: Mode | None
    """How the gate was closed; None while it is open."""
    memory: Memory
    version: int
    """Policy version of its weights."""
    running: int
    """Jobs that it generates for."""
    held: int
    """Jobs that it holds until the gate opens."""

    @property
    def state(self) -> State:
        """In one word."""
        if self.memory in ("offloaded", "discarded"):
            return "offloaded"
        if self.memory == "stale":
            return "stale"
        return "serving" if self.gate == "open" else "paused"


def next_step(now: Standing, wanted: Desired) -> Step | None:
    """What leads on from here; None where there is nothing to do, or jobs in flight have to end first."""
    shut = wanted.gate == "closed"
    if shut and (now.gate == "open" or now.mode != wanted.mode):
        return "pause"
    if wanted.memory in ("offloaded", "discarded") and not _as_wanted(now.memory, wanted.memory):
        return None if now.running else "offload"
    if wanted.memory in ("loaded", "stale") and now.memory in ("offloaded", "discarded"):
        return "onload"
    if wanted.memory == "loaded" and not _on_version(now, wanted):
        return "update_weights"
    if not shut and now.gate == "closed":
        return "continue"
    return None


def settled(now: Standing, wanted: Desired) -> bool:
    """Whether it is done: no step is left, and a pause that ends jobs has ended them."""
    return next_step(now, wanted) is None and _gate_settled(now, wanted) and _unloaded(now, wanted)


def reached(verb: str, now: Standing, wanted: Desired) -> bool:
    """Whether what one order asked for is done, whatever else is wanted."""
    match verb:
        case "pause" | "continue":
            return _gate_settled(now, wanted)
        case "offload":
            return _unloaded(now, wanted)
        case "onload":
            return now.memory in ("loaded", "stale")
        case _:
            return _on_version(now, wanted)


def _gate_settled(now: Standing, wanted: Desired) -> bool:
    if wanted.gate == "open":
        return now.gate == "open"
    ending = wanted.mode in ("release", "abort")
    shut = now.gate == "closed" and now.mode == wanted.mode
    return shut and not (ending and (now.running or now.held))


def _unloaded(now: Standing, wanted: Desired) -> bool:
    unloading = wanted.memory in ("offloaded", "discarded")
    return not unloading or _as_wanted(now.memory, wanted.memory)


def _as_wanted(memory: Memory, wanted: Memory) -> bool:
    return memory == wanted or (memory, wanted) == ("discarded", "offloaded")


def _on_version(now: Standing, wanted: Desired) -> bool:
    """Whether it holds the weights that it shall; where nobody said which, any will do."""
    return now.memory == "loaded" and wanted.weights in (None, now.version)


class Command(msgspec.Struct, frozen=True):
    """An entry of `P:commands`, as a worker hears it."""

    id: str
    said: str
    verb: str
    worker: str | None
    """Whom it is for; None: all."""
    generation: int | None
    """Of the desired state that it made; None where it is no order."""
    until_ms: int
    """Server time until when it shall be obeyed."""
    by: str

    @property
    def options(self) -> dict[str, str]:
        """`name=value` of what was said."""
        pairs = (word.partition("=") for word in self.said.split(" ")[1:])
        return {name: value for name, _, value in pairs}

    def still_wanted(self, wanted: Desired) -> bool:
        """Whether a later desired state wants what this order wanted."""
        match self.verb:
            case "pause":
                return wanted.gate == "closed" and wanted.mode == self.options.get(
                    "mode", "release"
                )
            case "continue":
                return wanted.gate == "open"
            case "offload":
                return wanted.memory in ("offloaded", "discarded")
            case "onload":
                return wanted.memory in ("loaded", "stale")
            case _:
                return str(wanted.weights) == self.options.get("version")


class Issued(msgspec.Struct, frozen=True):
    """What the control step answers: a command that was accepted."""

    id: str
    said: str
    generation: int | None
    workers: tuple[str, ...]
    """Live workers that shall answer."""
    counts: dict[str, int]
    """Of a cancel: jobs cancelled, stopping, ended before, unknown; and left, for the next one."""

    @property
    def verb(self) -> str:
        """Its first word."""
        return self.said.partition(" ")[0]


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's answer to one command; JSON in `P:acks:<command id>`."""

    result: Result
    state: str
    """Of the worker: starting, serving, paused, offloaded, stale, draining or stopped."""
    running: int
    """Jobs that it was generating for when it answered."""
    held: int = 0
    """Jobs that it held until the gate opens."""
    version: int | None = None
    """Policy version of its weights."""
    ms: int = 0
    """From hearing the command to having done it."""
    why: str = ""
    """Of a refusal, and of an order that a later one replaced."""
    facts: dict[str, str | int] = {}
    """What was asked for: metadata, health, status."""


def default_desired() -> dict[str, str]:
    """Serving, with the weights that the workers start with; fields of `P:desired`."""
    return {
        "gate": "open",
        "mode": "release",
        "memory": "loaded",
        "weights": "",
        "uri": "",
        "sha256": "",
        "epoch": secrets.token_hex(8),
        "generation": "0",
        "by": "default",
        "at_ms": str(int(time.time() * 1000)),
    }


def words_of(message: str) -> list[str]:
    """A command as it is published: words, or a JSON object `{"verb": "pause", "mode": "drain"}`.

    Raises InvalidCommand where it is neither; what the words mean, the control step judges.
    """
    if len(message) > MESSAGE_BYTES:
        raise InvalidCommand(f"a command has at most {MESSAGE_BYTES} characters")
    if not message.lstrip().startswith("{"):
        return message.split()
    try:
        told = _decode_message.decode(message)
    except msgspec.DecodeError as error:
        raise InvalidCommand(f'not a JSON object like {{"verb": "pause"}}: {error}') from None
    return words(str(told.pop("verb", "")), told)


def words(verb: str, options: Mapping[str, object]) -> list[str]:
    """A verb and its options as words; None leaves an option out."""
    return [verb, *(f"{name}={_word(v)}" for name, v in options.items() if v is not None)]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
