"""The server's own record of a pool: its append-only file, read after the run.

Functions are recorded as what they wrote, so it shows every terminal reply that was ever accepted,
whatever workers and clients believe.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hiredis

from protocols.queue.keys import Keys

OPTIONS = (
    *("--appendonly", "yes", "--auto-aof-rewrite-percentage", "0"),
    *("--aof-use-rdb-preamble", "no", "--enable-debug-command", "yes"),
)
"""What a server needs for a whole record."""
_CHUNK = 1 << 20


@dataclass
class Record:
    """What was written of a pool's jobs, in order."""

    accepted: set[str] = field(default_factory=set[str])
    flushes: int = 0
    ends: dict[tuple[str, int], list[dict[bytes, bytes]]] = field(
        default_factory=lambda: defaultdict[tuple[str, int], list[dict[bytes, bytes]]](list)
    )
    """The fields of every terminal reply, by job and how often the server was flushed before."""
    fences: dict[str, list[str]] = field(default_factory=lambda: defaultdict[str, list[str]](list))
    """Of every attempt that began."""
    checkpoint_tokens: list[int] = field(default_factory=list[int])
    """Size of every checkpoint."""

    @property
    def double(self) -> int:
        """Jobs that were answered more than once while the server kept its data."""
        return sum(len(ends) > 1 for ends in self.ends.values())


def read_record(folder: Path, pool: str) -> Record:
    """From the folder of a server that has ended."""
    keys, record = Keys(pool), Record()
    replies = keys.reply("").encode()
    progress = f"{keys.prefix}:progress:".encode()
    for command in _commands(folder):
        name = command[0].upper()
        if name == b"FLUSHALL":
            record.flushes += 1
        elif name in (b"HSET", b"HMSET") and command[1].startswith(replies):
            _note_hash(record, command[1][len(replies) :].decode(), command[2:])
        elif name == b"XADD" and command[1].startswith(progress):
            fields = _pairs(command[3:])
            if b"t" in fields:
                record.checkpoint_tokens.append(len(fields[b"t"]) // 4)
    return record


def _note_hash(record: Record, job_id: str, flat: list[bytes]) -> None:
    fields = _pairs(flat)
    if b"sha" in fields:
        record.accepted.add(job_id)
    if b"finished_ms" in fields:
        record.ends[job_id, record.flushes].append(fields)
    if b"fence" in fields:
        record.fences[job_id].append(fields[b"fence"].decode())


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=False))


def _commands(folder: Path) -> Iterator[list[bytes]]:
    parts = sorted(folder.glob("appendonlydir/*.aof"), key=_order)
    assert parts, f"no append-only file in {folder}"
    for part in parts:
        reader = hiredis.Reader()
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                reader.feed(chunk)
                while (command := reader.gets()) is not False:
                    assert isinstance(command, list)
                    yield command


def _order(part: Path) -> tuple[bool, int]:
    """The base file first, then the increments by number."""
    _, number, kind, _ = part.name.rsplit(".", 3)
    return kind != "base", int(number)
