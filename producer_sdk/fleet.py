"""What a pool looks like now: its workers and what waits for them."""

import msgspec

from protocols.queue.broker import Broker

SEEN_MS = 10_000
"""A worker whose last heartbeat is older is not live."""


class Fleet(msgspec.Struct, frozen=True):
    """A pool's live workers, by id, and its depth."""

    pool: str
    gate: str
    """`open`, `closed`, or `missing` where no worker has set up the pool."""
    workers: dict[str, dict[str, str]]
    """What each says of itself: state, engine, model, policy_version, slots, running_jobs, …"""
    depth: dict[str, int]
    """Entries by lane (running ones included), leases, delayed and parked jobs, dead letters."""

    @property
    def waiting_jobs(self) -> int:
        """Jobs that no worker holds."""
        lanes = sum(self.depth[lane] for lane in ("resume", "high", "normal", "low"))
        return max(0, lanes - self.depth["leases"])


async def look(broker: Broker) -> Fleet:
    """The pool as it is now."""
    desired = await broker.desired()
    return Fleet(
        pool=broker.keys.pool,
        gate=desired.get("gate", "missing"),
        workers=await broker.workers(seen_ms=SEEN_MS),
        depth=await broker.depth(),
    )


def no_live_worker(pool: str) -> str:
    """What to say, and what to do, where nobody serves a pool."""
    return (
        f"no live worker for pool {pool}; start one with `rolloutq worker --pool {pool}`. "
        "Jobs stay queued until then"
    )
