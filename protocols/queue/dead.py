"""Dead letters: jobs that ended because their attempts did, and what may be done about them."""

from collections.abc import Sequence

import msgspec

from protocols.errors import QueueFull
from protocols.job import DEFAULT_PROTOCOL
from protocols.queue.broker import Broker
from protocols.queue.keys import LANES
from protocols.queue.refusals import FULL_RETRY_S
from protocols.queue.rows import body_hash

_LETTER_FIELDS = {
    b"job",
    b"reason",
    b"attempts",
    b"lane",
    b"workers",
    b"error",
    b"events",
    b"id",
}


class DeadLetter(msgspec.Struct, frozen=True):
    """A job that ended because its attempts did, with what is needed to try it again."""

    entry: str
    """Its place in `P:dead`."""
    job_id: str
    reason: str
    """`crashes` or `failures`."""
    attempts: int
    lane: str
    error: str
    events: tuple[str, ...]
    """`<server ms> <what happened>`, oldest first."""
    fields: dict[bytes, bytes]
    """The job's stream fields; empty where its entry was gone."""


async def dead_letters(broker: Broker, *, most: int) -> list[DeadLetter]:
    """The newest dead letters, newest first."""
    rows = await broker.link.call("XREVRANGE", broker.keys.dead, "+", "-", "COUNT", most)
    return [_letter_of(entry, flat) for entry, flat in rows]


async def requeue(broker: Broker, letter: DeadLetter) -> str:
    """Make a new job of a dead letter, which goes; returns the new job's id: `<id>~2`, then `~3`."""
    stem, _, count = letter.job_id.rpartition("~")
    numbered = bool(stem) and count.isdecimal()
    job_id = f"{stem}~{int(count) + 1}" if numbered else f"{letter.job_id}~2"
    lane = letter.lane if letter.lane in LANES[1:] else LANES[2]
    fields = [part for pair in letter.fields.items() for part in pair]
    body, protocol = letter.fields.get(b"body", b""), letter.fields.get(b"protocol", b"")
    sha = body_hash(protocol.decode() or DEFAULT_PROTOCOL, body)
    (answer,) = await broker.step("enqueue", job_id, lane, sha, len(fields), *fields)
    if answer.startswith((b"full", b"conflict", b"invalid")):
        raise QueueFull(
            f"job {job_id} was not accepted ({answer.decode()}); the dead letter stays",
            retry_after_s=FULL_RETRY_S,
        )
    await broker.link.call("XDEL", broker.keys.dead, letter.entry)
    return job_id


async def purge(broker: Broker, letters: Sequence[DeadLetter]) -> None:
    """Forget dead letters."""
    if letters:
        await broker.link.call("XDEL", broker.keys.dead, *(letter.entry for letter in letters))


def _letter_of(entry: bytes, flat: list[bytes]) -> DeadLetter:
    """An entry of `P:dead`."""
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return DeadLetter(
        entry=entry.decode(),
        job_id=fields[b"job"].decode(),
        reason=fields[b"reason"].decode(),
        attempts=int(fields[b"attempts"]),
        lane=fields[b"lane"].decode(),
        error=fields[b"error"].decode(),
        events=tuple(filter(None, fields[b"events"].decode().split(";"))),
        fields={name: value for name, value in fields.items() if name not in _LETTER_FIELDS},
    )
