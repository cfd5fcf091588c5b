"""The same state under any names: digests of worlds, for the search's memory.

Times become distances from now, stream entries their order, fences numbers in the order of their
appearance, workers the order of their memories. Left out is what no step reads: bodies of replies,
events, the counts of attempts, hand-backs and ends, and which consumer an entry is pending for.
"""

import hashlib
from typing import Any

import msgspec

from tests.property.state_search.sight import LIVE, Sight
from tests.property.state_search.world import Ghost, Wire, Worker, World

_LONGEST_MS = 600_000
_COUNTS = ("crashes", "fails", "cancel", "alone", "oldest_version", "inbox", "sha")
_TIMES = ("leases", "delayed", "deadlines")
_STALE = -1

Canon = Any
"""Nested tuples and lists of plain values."""


class _Names(dict[str, int]):
    def __missing__(self, name: str) -> int:
        number = self[name] = len(self)
        return number


def server_digest(world: World) -> bytes:
    """Of the server alone."""
    return _digest(_server(world.sight, world.clock_ms, _Names()))


def digest(world: World) -> bytes:
    """Of everything."""
    names, now, copy = _Names(), world.clock_ms, world.copy
    server = _server(world.sight, now, names), _ghost(world.ghost, names)
    older = copy and (_server(copy.sight, now, names), _ghost(copy.ghost, names))
    order = sorted(range(len(world.workers)), key=lambda number: _worker(world, number, names))
    for number in order:
        for attempt in world.workers[number].attempts:
            names[attempt.nonce]
    workers = [_worker(world, number, names) for number in order]
    wire = world.wire and _wire(world.wire, world.sight, names)
    rest = sorted(world.sent), sorted(world.seen), world.spent
    return _digest((server, older, workers, wire, rest))


def _digest(value: Canon) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(value), digest_size=12).digest()


def nonce_of(fence: str) -> str:
    """A fence is attempt:nonce; the count does not matter where nonces are never used twice."""
    return fence.rpartition(":")[2]


def _server(sight: Sight, now: int, names: _Names) -> Canon:
    raw = sorted(
        {job for job in sight.replies if "-" in job}
        | {entry.job for entry in sight.entries.values() if "-" in entry.job},
        key=lambda job: int(job.partition("-")[2]),
    )
    alias = {job: f"r{number}" for number, job in enumerate(raw)}
    replies = sorted((alias.get(job, job), job) for job in sight.replies)
    sets, pool = sight.sets, sight.pool
    return (
        [(name, _job(sight, job, now, names)) for name, job in replies],
        [
            (entry.lane, alias.get(entry.job, entry.job), entry.fields["body"], entry.state)
            for entry in sight.entries.values()
        ],
        [alias.get(job, job) for job in sets["alone"]],
        sorted((job, max(-_LONGEST_MS, at - now)) for job, at in sets["collected"].items()),
        max(0, int(pool.get("alone_until_ms", 0)) - now),
        sorted(sight.desired.items()),
        sorted(job for job in sight.progress if job not in sight.replies),
    )


def _job(sight: Sight, job: str, now: int, names: _Names) -> Canon:
    reply, place = sight.replies[job], sight.place(job)
    fence = reply.get("fence")
    known = place, reply["status"], reply["sha"], None if fence is None else names[nonce_of(fence)]
    if place not in LIVE:
        return *known, job in sight.progress
    kept = sorted(item for item in reply.items() if item[0].startswith("kept:"))
    times = [
        max(0, at - now) for at in (sight.sets[name].get(job) for name in _TIMES) if at is not None
    ]
    there = [job in sight.sets[name] for name in _TIMES]
    deadline = max(0, int(reply.get("deadline_ms", 0)) - now), "deadline_ms" in reply
    own = sight.entries.get((reply["lane"], reply["entry"]))
    place_of_entry = own and list(sight.entries.values()).index(own)
    return (
        *known,
        [reply.get(name) for name in _COUNTS],
        kept,
        there,
        times,
        deadline,
        place_of_entry,
    )


def _ghost(ghost: Ghost, names: _Names) -> Canon:
    rights = sorted((job, names[right.nonce], right.left_by) for job, right in ghost.rights.items())
    return rights, sorted(ghost.stopped)


def _worker(world: World, number: int, names: _Names) -> Canon:
    worker: Worker = world.workers[number]
    claims = world.sight.pool.get("alone_worker") == f"w{number}"
    older = world.copy and world.copy.sight.pool.get("alone_worker") == f"w{number}"
    attempts = sorted(
        (*attempt._replace(fence=""), names.get(attempt.fence, _STALE))
        for attempt in worker.attempts
    )
    version = world.versions[number]
    calls = world.wire is not None and world.wire.who == number
    return attempts, worker.alone, version, claims, bool(older), calls


def _wire(wire: Wire, sight: Sight, names: _Names) -> Canon:
    targets = [(attempt.job, names[attempt.nonce]) for attempt in wire.targets]
    if wire.step == "take":
        last = sight.workers.get(f"w{wire.who}", {})
        remembered = last.get("take_nonce") == wire.operation[2] and last.get("take_hold")
        return wire.step, wire.heard, remembered, wire.operation[3:]
    told = [names.get(nonce_of(part), part) for part in wire.operation if isinstance(part, str)]
    return wire.step, wire.heard, targets, told
