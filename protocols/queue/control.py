"""The control step of control.lua as typed calls, and what it left: answers and the audit."""

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from protocols.control import Ack, Command, Issued
from protocols.queue.broker import Broker
from protocols.queue.rows import texts

NONE = "0-0"
"""The entry before all."""
_COUNTS = ("cancelled", "stopping", "ended", "unknown", "left")
_decode_ack = msgspec.json.Decoder(Ack)


class Logged(msgspec.Struct, frozen=True):
    """An entry of the audit `P:commands`."""

    id: str
    at_ms: int
    said: str
    by: str
    generation: int | None
    refused: str
    """Why; empty where the command was accepted."""


class Answers(msgspec.Struct, frozen=True):
    """A command, and what the workers have said to it so far."""

    command: Issued
    acks: dict[str, Ack]
    """By worker."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The live workers that shall answer; empty where there was none: an order then waits for those that come."""
        return self.command.workers

    @property
    def silent(self) -> tuple[str, ...]:
        """Who has not answered."""
        return tuple(worker for worker in self.asked if worker not in self.acks)

    @property
    def unmet(self) -> dict[str, str]:
        """Who has not done it, and why: it refused, a later order replaced this one, or it has not answered."""
        told = {worker: ack for worker, ack in self.acks.items() if ack.result != "applied"}
        refusals = {worker: f"{ack.result}: {ack.why}" for worker, ack in told.items()}
        return refusals | dict.fromkeys(self.silent, "silent")


async def issue(broker: Broker, words: Sequence[str], *, by: str) -> Issued:
    """Submit a command; a lost answer is asked for again under the same id.

    Raises InvalidCommand where the words are none, ControlRefused where it is not its time, and ControlBusy where a
    worker is about to be ready for it.
    """
    named = any(word.startswith("id=") for word in words)
    own = [] if named else [f"id=c-{secrets.token_hex(6)}"]
    signed = [] if any(word.startswith("by=") for word in words) else [f"by={by}"]
    told = texts(await broker.step("control", *words, *own, *signed))
    return Issued(
        id=told["command"],
        said=told["said"],
        generation=int(told["generation"]) if told["generation"] else None,
        workers=tuple(told["workers"].split()),
        counts={name: int(told[name]) for name in _COUNTS if name in told},
    )


async def hear(broker: Broker, message: str, words: Sequence[str], after: str) -> str:
    """Bring what was published on the channel; whoever is first makes a command of it.

    `after` and the answer name the last entry of `P:commands` that this worker brought or met.
    """
    entry = await broker.step("hear", message, after, *words)
    return entry.decode()


async def newest(broker: Broker) -> str:
    """The last entry of `P:commands`, after which `hear` looks for what is published from now on."""
    rows = await broker.link.call("XREVRANGE", broker.keys.commands, "+", "-", "COUNT", 1)
    return rows[0][0].decode() if rows else NONE


async def answers(broker: Broker, command: Issued) -> Answers:
    """Who of those that were asked has said what."""
    told = texts(await broker.link.call("HGETALL", broker.keys.acks(command.id)))
    acks = {who: _decode_ack.decode(said) for who, said in told.items() if who[0] != "@"}
    return Answers(command, acks)


async def audit(broker: Broker, *, most: int) -> list[Logged]:
    """The newest commands, newest first."""
    rows = await broker.link.call("XREVRANGE", broker.keys.commands, "+", "-", "COUNT", most)
    return [_logged(entry.decode(), texts(flat)) for entry, flat in rows]


def command_of(row: list[Any]) -> Command | None:
    """What `beat` tells of a command; None for one that was refused, or that no step has written."""
    command_id, flat = row
    told: dict[str, str] = texts(flat)
    fields = {"worker": None, "generation": None, **told, "id": command_id.decode()}
    try:
        return None if "refused" in told else msgspec.convert(fields, Command, strict=False)
    except msgspec.ValidationError:
        return None


def _logged(entry: str, told: dict[str, str]) -> Logged:
    return Logged(
        id=told.get("id", entry),
        at_ms=int(entry.partition("-")[0]),
        said=told.get("said", ""),
        by=told.get("by", "?"),
        generation=int(told["generation"]) if "generation" in told else None,
        refused=told.get("refused", ""),
    )
