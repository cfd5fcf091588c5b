"""Takes jobs for free slots, runs each, and settles what became of it."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from protocols.queue.broker import Broker, Lease, Renewal, Taken
from worker.lease import LeaseKeeper
from worker.outcome import Outcome, Settler
from worker.pipeline import Attempt, Order

GATE_POLL_S = 0.5
SETTLE_S = 30.0

_ORDERS: dict[Renewal, Order] = {"cancel": "cancel", "expire": "expire", "lost": "lost"}

log = logging.getLogger("rolloutq.consumer")


class Consumer:
    """Runs up to `slots` attempts at once; each holds its lease until its outcome is written."""

    def __init__(
        self,
        broker: Broker,
        worker: str,
        keeper: LeaseKeeper,
        settler: Settler,
        handle: Callable[[Attempt], Awaitable[Outcome]],
        *,
        slots: int,
        lease_s: float,
        policy_version: Callable[[], int],
    ) -> None:
        """`broker` has a link of its own: the one connection of the process that may block."""
        self._broker, self._worker = broker, worker
        self._keeper, self._settler = keeper, settler
        self._handle = handle
        self._slots, self._lease_ms = slots, int(lease_s * 1000)
        self._policy_version = policy_version
        self._attempts: dict[tuple[str, str], Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._nonce = secrets.token_hex(4)
        self._takes = 0
        self.finished_jobs = 0

    @property
    def running(self) -> int:
        """Attempts under way."""
        return len(self._attempts)

    async def run(self) -> None:
        """Take and run jobs until cancelled; attempts under way go on."""
        while True:
            free = self._slots - len(self._attempts)
            if free <= 0:
                self._slot_freed.clear()
                await self._slot_freed.wait()
                continue
            taken = await self._take(free)
            if taken.gate != "open":
                await asyncio.sleep(GATE_POLL_S)
            elif len(taken.leases) < free:
                await self._broker.bell()

    async def _take(self, free: int) -> Taken:
        self._takes += 1
        taking = asyncio.ensure_future(
            self._broker.take(
                self._worker,
                f"{self._nonce}.{self._takes}",
                free,
                lease_ms=self._lease_ms,
                policy_version=self._policy_version(),
            )
        )
        try:
            taken = await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._begin_all(await taking)  # what the server has begun is ours to hand back
            raise
        self._begin_all(taken)
        return taken

    def _begin_all(self, taken: Taken) -> None:
        for lease in taken.leases:
            self._begin(lease)

    def _begin(self, lease: Lease) -> None:
        attempt = Attempt(lease)
        self._attempts[_key(lease)] = attempt
        self._keeper.hold(lease)
        task = asyncio.get_running_loop().create_task(self._see_through(attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_through(self, attempt: Attempt) -> None:
        try:
            outcome = await self._handle(attempt)
            await self._settler.settle(attempt.lease, outcome)
            self.finished_jobs += 1
        finally:
            del self._attempts[_key(attempt.lease)]
            self._keeper.drop(attempt.lease)
            self._slot_freed.set()

    def obey(self, lease: Lease, renewal: Renewal) -> None:
        """Pass on what a renewal said of a lease."""
        attempt = self._attempts.get(_key(lease))
        if attempt is not None and renewal in _ORDERS:
            attempt.give(_ORDERS[renewal])

    async def drain(self, grace_s: float) -> None:
        """Let attempts end for `grace_s`, then hand back the rest; return when all is written."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for attempt in list(self._attempts.values()):
            attempt.give("hand back")
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=SETTLE_S)
            for task in left:
                log.error("an attempt did not end in %s s; its lease will run out", SETTLE_S)
                task.cancel()


def _key(lease: Lease) -> tuple[str, str]:
    """A worker that was frozen may hold two leases of one job, the older one lost."""
    return lease.job_id, lease.fence
