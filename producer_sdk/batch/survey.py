"""The first look at the input: its hash, its lines, and what is wrong with each, before anything is sent."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import msgspec

from producer_sdk.batch.manifest import READ_BYTES
from producer_sdk.batch.row import Rows
from protocols.errors import ConfigError, InvalidRequest, RolloutError

WAITING, DONE, FAILED, INVALID, BLANK = range(5)
"""What a line is; one byte each is all that is kept of it. Lines beyond a limit are blank."""
_BUCKETS = 256


class Problem(msgspec.Struct, frozen=True):
    """What is wrong with a line."""

    line: int
    """From 1."""
    code: str
    message: str

    @property
    def told(self) -> str:
        """In words."""
        return f"line {self.line}: {self.message} ({self.code})"


class Survey(msgspec.Struct, frozen=True):
    """What the input is."""

    sha256: str
    size_bytes: int
    states: bytearray
    """`[lines + 1]`; the first stands for no line."""
    rows: int
    invalid: int


def lines_of(path: Path, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, before `end`: the file may have grown since; raises ConfigError."""
    try:
        with path.open("rb", buffering=READ_BYTES) as file:
            yield from enumerate(islice(file, end and end - 1), 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", param="input") from None


def survey(
    path: Path,
    rows: Rows,
    *,
    limit: int | None = None,
    report: Callable[[Problem], None] = lambda _: None,
) -> Survey:
    """Read it all; every problem of its first `limit` rows is reported, in the order of lines but for doubled ids."""
    sha256, states, count = hashlib.sha256(), bytearray(1), 0
    ids = _Ids()
    for number, line in lines_of(path):
        sha256.update(line)
        if not line.strip() or (limit is not None and count >= limit):
            states.append(BLANK)
            continue
        count += 1
        try:
            ids.add(rows.checked(line, number).custom_id)
            states.append(WAITING)
        except RolloutError as error:
            states.append(INVALID)
            report(Problem(number, error.code, error.message))
    for problem in _doubled(path, rows, states, ids):
        states[problem.line] = INVALID
        report(problem)
    invalid = states.count(INVALID)
    return Survey(sha256.hexdigest(), os.path.getsize(path), states, count, invalid)


def _doubled(path: Path, rows: Rows, states: bytearray, ids: "_Ids") -> Iterator[Problem]:
    """Lines whose id an earlier line has."""
    suspects = ids.doubled()
    if not suspects:
        return
    first: dict[str, int] = {}
    for number, line in lines_of(path, len(states)):
        if states[number] == WAITING:
            custom_id = rows.row(line, number).custom_id
            if hash(custom_id) in suspects and first.setdefault(custom_id, number) != number:
                told = InvalidRequest(
                    f"`custom_id`: {custom_id[:80]!r} is that of line {first[custom_id]} too"
                )
                yield Problem(number, told.code, told.message)


class _Ids:
    """Hashes of the ids, eight bytes each, in buckets that are small enough to be compared one at a time."""

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]

    def add(self, custom_id: str) -> None:
        told = hash(custom_id)
        self._buckets[told & (_BUCKETS - 1)].append(told)

    def doubled(self) -> set[int]:
        """Hashes that came more than once."""
        found: set[int] = set()
        for bucket in self._buckets:
            seen: set[int] = set()
            if len(set(bucket)) != len(bucket):
                found.update(h for h in bucket if h in seen or seen.add(h))
        return found
