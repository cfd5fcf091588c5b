"""One pool as its server has it, seen past the code under test; and what is left of jobs that ended."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

from redis import Redis

from protocols.queue.broker import Broker
from protocols.queue.keys import GROUP, LANES, Keys

WAIT_S = 30.0


class Look:
    """A blocking connection for a test's own commands."""

    def __init__(self, url: str, pool: str) -> None:
        self.keys = Keys(pool)
        self._redis = Redis.from_url(url, protocol=2)  # pyright: ignore[reportUnknownMemberType]

    def __call__(self, *command: str | bytes | float) -> Any:  # noqa: ANN401 - the server's answers
        """The answer to one command, in redis-py's shape for RESP2."""
        return cast("Any", self._redis.execute_command(*command))  # pyright: ignore[reportUnknownMemberType]

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def now_ms(self) -> int:
        """The server's clock."""
        seconds, micros = self("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def reply(self, job_id: str) -> dict[str, str]:
        """A job's reply hash, but for its binary state."""
        found: dict[bytes, bytes] = self("HGETALL", self.keys.reply(job_id))
        return {name.decode(): value.decode() for name, value in found.items() if name != b"state"}

    def length(self, lane: str) -> int:
        """Entries of a lane."""
        return int(self("XLEN", self.keys.jobs(lane)))

    def lease_ms(self, job_id: str) -> float | None:
        """When a job's lease ends; None where it has none."""
        score = self("ZSCORE", self.keys.leases, job_id)
        return None if score is None else float(score)

    def calls(self, command: str) -> int:
        """How often the server has executed a command, by whomever."""
        stats: dict[str, dict[str, int]] = self("INFO", "commandstats")
        return stats.get(f"cmdstat_{command}", {}).get("calls", 0)

    def is_connected(self, name: str) -> bool:
        """Whether there is a client whose name begins so; what it sent was executed before it goes."""
        return f" name={name}".encode() in self("CLIENT", "LIST")

    def is_blocked(self, name: str) -> bool:
        """Whether a client of that name waits in a blocking command."""
        lines = cast("bytes", self("CLIENT", "LIST")).decode().splitlines()
        return any(f" name={name} " in line and " flags=b " in line for line in lines)

    def left(self) -> list[str]:
        """What of jobs is in streams, pending lists and sorted sets; empty once all jobs have ended."""
        found: list[str] = []
        for lane in LANES:
            if entries := self.length(lane):
                found.append(f"{entries} entries in {lane}")
            if pending := self("XPENDING", self.keys.jobs(lane), GROUP)["pending"]:
                found.append(f"{pending} pending in {lane}")
        rooms = (self.keys.delayed, self.keys.parked, self.keys.alone)
        sets = (self.keys.leases, *rooms, self.keys.deadlines)
        held = [(key, self("ZRANGE", key, 0, 4)) for key in sets]
        return found + [f"{key.rpartition(':')[2]} of {ids}" for key, ids in held if ids]


def wait_until(holds: Callable[[], object], what: str, *, timeout_s: float = WAIT_S) -> None:
    """Return as soon as `holds()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


async def until(holds: Callable[[], object], what: str, *, timeout_s: float = WAIT_S) -> None:
    """`wait_until`, while the event loop goes on."""
    await asyncio.to_thread(wait_until, holds, what, timeout_s=timeout_s)


async def until_blocked(look: Look, name: str) -> None:
    """Return when the client of that name waits in a blocking command, while the event loop goes on."""
    await until(lambda: look.is_blocked(name), f"{name} waits")


def expire_lease(look: Look, *job_ids: str) -> None:
    """Let leases have run out long ago, as after their holder's death."""
    for job_id in job_ids:
        look("ZADD", look.keys.leases, "XX", 1, job_id)


async def sweep(broker: Broker, *, crash_limit: int = 3, orphan_ms: int = 0) -> dict[str, int]:
    """One sweep that may reclaim; what it found."""
    swept = await broker.sweep(most=200, crash_limit=crash_limit, reclaim=True, orphan_ms=orphan_ms)
    return {name: count for name, count in swept._asdict().items() if count}
