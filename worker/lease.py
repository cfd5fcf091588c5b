"""Leases held, and what keeps them: a thread with a connection of its own, which generation cannot block.

It renews the leases, carries out what was generated as checkpoints and brings back orders, says that
the worker lives, and sweeps the pool.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import cast

from protocols.cancellation import cancel
from protocols.errors import ServerUnavailable
from protocols.queue.broker import Broker
from protocols.queue.link import Link, Listener
from protocols.queue.rows import Hold, Renewal
from worker.controller import Desired
from worker.pipeline import Attempt

BEAT_S = 2.0
WORKER_TTL_S = 600
SWEEP_S = 0.4
"""Bounds how late a queued job's deadline and a lost job's return are."""
SWEEP_JOBS = 200
ORPHANS_EVERY_S = 10.0
TICK_S = 0.2
RENEW_MOST = 128
JOIN_S = 5.0

log = logging.getLogger("rolloutq.lease")


def _ignore(*_: object) -> None:
    pass


def _first(error: Exception) -> Exception:
    """What a group of tasks broke on."""
    while isinstance(error, ExceptionGroup):
        error = cast("ExceptionGroup[Exception]", error).exceptions[0]
    return error


class Contact:
    """How long the server has been there without a gap; only after a whole lease of it may anything be reclaimed.

    After an outage or a failover every lease looks expired, although its holder lives and could not
    say so.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._since = self._last = time.monotonic()
        self.opened: int = 0
        """Which connection it was seen on last, by its link's count."""

    def seen(self, opened: int) -> None:
        """The server has answered on a link that was opened so many times."""
        now = time.monotonic()
        if now - self._last > self._lease_s / 3 or opened != self.opened:
            self._since = now
        self._last, self.opened = now, opened

    @property
    def whole_lease(self) -> bool:
        """Whether a whole lease has passed."""
        return time.monotonic() - self._since >= self._lease_s


class LeaseKeeper:
    """Keeps one worker's leases from a thread."""

    def __init__(
        self,
        url: str,
        pool: str,
        worker: str,
        *,
        lease_s: float,
        crash_limit: int,
        checkpoint_tokens: int = 64,
        checkpoint_s: float = 2.0,
    ) -> None:
        """A checkpoint is due after so many new tokens, or with fewer after so long."""
        self._url, self._pool, self._worker = url, pool, worker
        self._checkpoint_tokens, self._checkpoint_s = checkpoint_tokens, checkpoint_s
        self._lease_s, self._crash_limit = lease_s, crash_limit
        self._held: set[Attempt] = set()
        self._renewed_s = 0.0
        self._rung: asyncio.Event
        self._desired = Desired()
        self._stop: Callable[[], object] = lambda: None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
        self._facts: Callable[[], dict[str, str | int]] = dict
        self._obey: Callable[[Attempt, Renewal], object] = _ignore
        self._broken: Callable[[Exception], object] = _ignore

    def start(
        self,
        *,
        facts: Callable[[], dict[str, str | int]],
        obey: Callable[[Attempt, Renewal], object],
        broken: Callable[[Exception], object],
    ) -> None:
        """Begin; the first heartbeat goes out at once.

        `facts` tells what it shows; `obey` hears every answer to a renewal but `held`, `broken` the
        error that ended the thread. All are called from the thread.
        """
        self._facts, self._obey, self._broken = facts, obey, broken
        self._thread.start()
        self._ready.wait(JOIN_S)

    def close(self) -> None:
        """End the thread; leases still held run out."""
        with contextlib.suppress(RuntimeError):  # it has ended by itself, and its loop with it
            self._stop()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def hold(self, attempt: Attempt) -> None:
        """Renew this attempt's lease from now on."""
        self._held.add(attempt)

    def drop(self, attempt: Attempt) -> None:
        """Renew it no longer."""
        self._held.discard(attempt)

    def _run(self) -> None:
        try:
            asyncio.run(self._keep())
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker must hear
            self._broken(_first(error))

    async def _keep(self) -> None:
        stopped = asyncio.Event()
        self._rung = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(stopped.set)
        link = Link(self._url, name=f"{self._worker}:keeper", outage_s=24 * 3600.0)
        broker, contact = Broker(link, self._pool), Contact(self._lease_s)
        self._ready.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                kept = [
                    tasks.create_task(self._renewing(broker)),
                    tasks.create_task(self._beating(broker, contact)),
                    tasks.create_task(self._sweeping(broker, contact)),
                    tasks.create_task(self._listening(broker.keys.bell)),
                ]
                await stopped.wait()
                await cancel(*kept)
        finally:
            await link.close()

    async def _renewing(self, broker: Broker) -> None:
        tick_s = min(TICK_S, self._lease_s / 6, self._checkpoint_s / 2)
        while True:
            try:
                async with asyncio.timeout(tick_s):
                    await self._rung.wait()
            except TimeoutError:
                pass
            everything = self._rung.is_set() or self._renewal_due
            self._rung.clear()
            attempts = [a for a in list(self._held) if everything or self._due(a)]
            if everything:
                self._renewed_s = time.monotonic()
            for start in range(0, len(attempts), RENEW_MOST):
                await self._renew(broker, attempts[start : start + RENEW_MOST])

    def _due(self, attempt: Attempt) -> bool:
        return attempt.checkpoint.due(self._checkpoint_tokens, self._checkpoint_s)

    @property
    def _renewal_due(self) -> bool:
        return time.monotonic() - self._renewed_s >= self._lease_s / 3

    async def _renew(self, broker: Broker, attempts: list[Attempt]) -> None:
        checkpoints = [attempt.checkpoint for attempt in attempts]
        segments = [checkpoint.segments() for checkpoint in checkpoints]
        holds = [
            Hold(attempt.lease.job_id, attempt.lease.fence, new)
            for attempt, new in zip(attempts, segments, strict=True)
        ]
        answers = await broker.renew(holds, lease_ms=int(self._lease_s * 1000))
        for attempt, checkpoint, new, answer in zip(
            attempts, checkpoints, segments, answers, strict=True
        ):
            if answer == "gap":
                checkpoint.rewind()
            elif answer == "held":
                checkpoint.written(new)
            elif attempt in self._held:
                self._obey(attempt, answer)

    async def _listening(self, channel: str) -> None:
        """Renew at once when the bell names this worker: an order waits."""
        listener = Listener(self._url, channel, name=f"{self._worker}:bell")
        try:
            async for whom in listener:
                if whom == self._worker:
                    self._rung.set()
        finally:
            await listener.close()

    async def _beating(self, broker: Broker, contact: Contact) -> None:
        while True:
            _, seen = await broker.beat(
                self._worker,
                self._facts(),
                ttl_ms=WORKER_TTL_S * 1000,
                desired=self._desired.to_restore(),
            )
            contact.seen(broker.link.opened)
            self._desired.saw(seen)
            await asyncio.sleep(min(BEAT_S, self._lease_s / 6))

    async def _sweeping(self, broker: Broker, contact: Contact) -> None:
        orphans_at = time.monotonic() + ORPHANS_EVERY_S
        while True:
            await asyncio.sleep(SWEEP_S)
            look = time.monotonic() >= orphans_at
            if look:
                orphans_at = time.monotonic() + ORPHANS_EVERY_S
            reclaim = contact.whole_lease
            try:
                swept = await broker.sweep(
                    most=SWEEP_JOBS,
                    crash_limit=self._crash_limit,
                    reclaim=reclaim,
                    orphan_ms=int(2000 * self._lease_s) if look else 0,
                    only=contact.opened if reclaim else None,
                )
            except ServerUnavailable as error:  # the next one judges anew what it may reclaim
                log.warning("no sweep: %s", error)
                continue
            if swept.reclaimed or swept.dead or swept.orphans:
                log.warning("swept: %s", swept._asdict())
