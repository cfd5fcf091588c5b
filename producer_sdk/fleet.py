"""What a pool looks like now: its workers and what waits for them."""

import msgspec

from protocols.queue import overview
from protocols.queue.broker import Broker

SEEN_MS = 10_000
"""A worker whose last heartbeat is older is not live."""


class Fleet(msgspec.Struct, frozen=True):
    """A pool's live workers, by id, what they shall do, and the pool's depth."""

    pool: str
    gate: str
    """`open`, `closed`, or `missing` where no worker has set up the pool."""
    mode: str
    """What the closed gate does to jobs in flight: release, drain, keep or abort; empty while it is not closed."""
    memory: str
    """Where the weights shall be: loaded, offloaded, discarded or stale; empty where the gate is missing."""
    weights: int | None
    """Policy version that all shall hold; None: that of the weights which each started with."""
    generation: int
    """Of the orders so far."""
    alone: dict[str, dict[str, str]]
    """Orders to one worker alone that still stand: gate, mode, memory."""
    workers: dict[str, dict[str, str]]
    """What each says of itself: state, engine, model, policy_version, slots, running_jobs, health, ready, …"""
    depth: dict[str, int]
    """Entries by lane (running ones included), leases, delayed and parked jobs, dead letters."""

    @property
    def waiting_jobs(self) -> int:
        """Jobs that no worker holds."""
        lanes = sum(self.depth[lane] for lane in ("resume", "high", "normal", "low"))
        return max(0, lanes - self.depth["leases"])


async def look(broker: Broker) -> Fleet:
    """The pool as it is now."""
    desired = await overview.desired(broker)
    gate, version = desired.get("gate", "missing"), desired.get("weights", "")
    return Fleet(
        pool=broker.keys.pool,
        gate=gate,
        mode=desired.get("mode", "") if gate == "closed" else "",
        memory=desired.get("memory", ""),
        weights=int(version) if version else None,
        generation=int(desired.get("generation", 0)),
        alone=_alone(desired),
        workers=await overview.workers(broker, seen_ms=SEEN_MS),
        depth=await overview.depth(broker),
    )


def _alone(desired: dict[str, str]) -> dict[str, dict[str, str]]:
    alone: dict[str, dict[str, str]] = {}
    for field, value in desired.items():
        name, at, worker = field.partition("@")
        if at:
            alone.setdefault(worker, {})[name] = value
    return alone


def no_live_worker(pool: str) -> str:
    """What to say, and what to do, where nobody serves a pool."""
    return (
        f"no live worker for pool {pool}; start one with `rolloutq worker --pool {pool}`. "
        "Jobs stay queued until then"
    )
