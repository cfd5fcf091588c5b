"""Takes jobs for free slots, runs each, and settles what became of it."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, assert_never

from protocols.cancellation import cancel
from protocols.control import Gate, Mode
from protocols.errors import RolloutError
from protocols.queue.broker import Broker
from protocols.queue.rows import Lease, Renewal, Taken
from worker.lease import LeaseKeeper
from worker.outcome import Outcome, Settler
from worker.pipeline import Attempt, Order

GATE_POLL_S = 0.5
SLOT_POLL_S = 0.25
BELL_S = 2.0
"""The longest wait for a job; docs/decisions/0013 has why few are taken behind it."""
GIVE_UP_S = 2.0
SETTLE_S = 30.0
ABOUT_TO_END_S = 1.0

_ORDERS: dict[Renewal, Order] = {
    "cancel": "cancel",
    "expire": "expire",
    "stale": "stale",
    "lost": "lost",
}

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
        pressed: Callable[[], bool] = lambda: False,
    ) -> None:
        """`broker` has a link of its own: the one connection of the process that may block.

        `pressed` tells whether the engine has more than it can run at once; then nothing is taken.
        """
        self._broker, self._worker = broker, worker
        self._keeper, self._settler = keeper, settler
        self._handle = handle
        self._slots, self._lease_ms = slots, int(lease_s * 1000)
        self._policy_version, self._pressed = policy_version, pressed
        self._holding_back = self._alone = self._still = False
        self._attempts: set[Attempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._giving_up: asyncio.Task[None] | None = None
        self._slot_freed = asyncio.Event()
        self._open = asyncio.Event()
        self.mode: Mode | None = None
        """How the gate was closed; None before it was."""
        self._nonce = secrets.token_hex(4)
        self._takes = 0
        self.finished_jobs = 0

    @property
    def jobs(self) -> int:
        """Attempts that it has, held ones included."""
        return len(self._attempts)

    @property
    def held(self) -> int:
        """Attempts that wait, with their tokens, for the gate to open."""
        return sum(attempt.held and not attempt.generating for attempt in list(self._attempts))

    @property
    def gate(self) -> Gate:
        """Whether it takes jobs; closed until it is first told to go on."""
        return "open" if self._open.is_set() else "closed"

    def pause(self, mode: Mode) -> None:
        """Take nothing, and do with the jobs in flight what `mode` says."""
        self._open.clear()
        self.mode = mode
        for attempt in list(self._attempts):
            self._apply(mode, attempt)

    def go_on(self) -> None:
        """Take jobs, and draw again for those that are held."""
        self.mode = None
        self._open.set()
        for attempt in list(self._attempts):
            attempt.go_on()

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncGenerator[None]:
        """A block in which nothing is generated; jobs in flight wait with their tokens, and go on after it."""
        keeps = self.mode == "keep"
        self._still = True
        try:
            await asyncio.gather(*(attempt.rest() for attempt in self._attempts))
            yield
        finally:
            self._still = False
            for attempt in list(self._attempts) if not keeps else ():
                attempt.go_on()

    def _apply(self, mode: Mode, attempt: Attempt) -> None:
        match mode:
            case "release":
                attempt.give("hand back")
            case "abort":
                attempt.give("abort")
            case "keep":
                attempt.hold()
            case "drain":
                attempt.go_on()
            case _:
                assert_never(mode)

    async def run(self) -> None:
        """Take and run jobs until cancelled; attempts under way go on."""
        awaited = 0
        # how many jobs the next wait is for; 0: no wait, and as many as there are slots
        while True:
            if not self._open.is_set():
                awaited = 0
                await self._open.wait()
            free = self._slots - len(self._attempts)
            if free <= 0 or self._held_back() or (self._attempts and self._pressed()):
                awaited = 0
                await self._wait_for_slot()
                continue
            version = self._policy_version()
            taken = await self._take(min(free, awaited) or free, BELL_S if awaited else 0.0)
            awaited = 0
            if taken.gate != "open":
                await asyncio.sleep(GATE_POLL_S)
            elif taken.hold:
                self._hold_back(taken)
            elif self._policy_version() == version and not taken.again:
                awaited = max(1, 4 * len(taken.leases))

    async def _wait_for_slot(self) -> None:
        self._slot_freed.clear()
        try:
            async with asyncio.timeout(SLOT_POLL_S):
                await self._slot_freed.wait()
        except TimeoutError:
            return

    def _hold_back(self, taken: Taken) -> None:
        """A quarantined job wants this worker for itself: now that it runs, or once it is idle."""
        self._holding_back, self._alone = True, bool(taken.leases)

    def _held_back(self) -> bool:
        """Whether to take nothing: until idle, or until the lone job has a new checkpoint."""
        if not self._holding_back:
            return False
        got_on = self._alone and any(attempt.checkpoint.grown for attempt in self._attempts)
        self._holding_back = bool(self._attempts) and not got_on
        return self._holding_back

    async def _take(self, slots: int, bell_s: float) -> Taken:
        self._takes += 1
        nonce = f"{self._nonce}.{self._takes}"
        try:
            taken = await self._broker.take(
                self._worker,
                nonce,
                slots,
                lease_ms=self._lease_ms,
                policy_version=self._policy_version(),
                holding=len(self._attempts),
                bell_s=bell_s,
            )
        except asyncio.CancelledError:
            # a task of its own, for this one may be cancelled once more
            self._giving_up = asyncio.create_task(self._give_up_take(nonce))
            raise
        for lease in taken.leases:
            self._begin(lease)
        return taken

    async def _give_up_take(self, nonce: str) -> None:
        """Begin what the server has begun, for it is ours to hand back; without an answer its leases run out."""
        with contextlib.suppress(RolloutError, TimeoutError):
            async with asyncio.timeout(GIVE_UP_S):
                for lease in await self._broker.give_up_take(self._worker, nonce):
                    self._begin(lease)

    def _begin(self, lease: Lease) -> None:
        attempt = Attempt(lease)
        self._attempts.add(attempt)
        self._keeper.hold(attempt)
        if self.mode is not None:  # taken while the gate closed
            self._apply(self.mode, attempt)
        elif self._still:
            attempt.hold()
        task = asyncio.get_running_loop().create_task(self._see_through(attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_through(self, attempt: Attempt) -> None:
        try:
            outcome = await self._handle(attempt)
            await self._settler.settle(attempt.lease, outcome)
            self.finished_jobs += 1
        finally:
            self._attempts.discard(attempt)
            self._keeper.drop(attempt)
            self._slot_freed.set()

    def obey(self, attempt: Attempt, renewal: Renewal) -> None:
        """Pass on what a renewal said of an attempt."""
        if attempt in self._attempts and renewal in _ORDERS:
            attempt.give(_ORDERS[renewal])

    async def drain(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Hand back what will not end within the grace, let the rest end; return when all is written.

        What is about to end does so first. `hurry` ends the grace.
        """
        if self._giving_up is not None:
            await self._giving_up
        hurried = asyncio.create_task(hurry.wait())
        about_s = min(ABOUT_TO_END_S, grace_s)
        await self._wait_for_all(about_s, hurried)
        for attempt in list(self._attempts):
            if not attempt.ends_within(grace_s - about_s):
                attempt.give("hand back")
        await self._wait_for_all(grace_s - about_s, hurried)
        for attempt in list(self._attempts):
            attempt.give("hand back")
        await cancel(hurried)
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=SETTLE_S)
            for task in left:
                log.error("an attempt did not end in %s s; its lease will run out", SETTLE_S)
                task.cancel()

    async def _wait_for_all(self, seconds: float, hurried: asyncio.Task[Any]) -> None:
        ended = asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.wait([ended, hurried], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
