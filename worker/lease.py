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
from functools import partial
from typing import TYPE_CHECKING, cast

from protocols.cancellation import cancel
from protocols.control import words_of
from protocols.errors import InvalidCommand, RolloutError, ServerUnavailable
from protocols.queue.broker import FROM_NOW, Broker
from protocols.queue.control import NONE, hear, newest
from protocols.queue.link import Link, Listener
from protocols.queue.rows import Hold, Renewal
from worker.pipeline import Attempt

if TYPE_CHECKING:
    from worker.checkpoint import Checkpoint
    from worker.controller import Controller  # which leads, by way of the consumer, back here

BEAT_S = 2.0
WORKER_TTL_S = 600
SWEEP_S = 0.4
"""Bounds how late a queued job's deadline and a lost job's return are."""
SWEEP_JOBS = 200
ORPHANS_EVERY_S = 10.0
TICK_S = 0.2
SUBSCRIBE_S = 5.0
TOLD_CHARS = 64
RENEW_MOST = 128
RENEW_BYTES = 4 * 1024 * 1024
"""Of one call, beside its last job's checkpoint."""
JOIN_S = 5.0
LAST_WORDS_S = 2.0

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
        self._renewed_s = self._looked_s = 0.0
        self._woken: asyncio.Event
        self._rung = False
        """Whether the bell has named this worker."""
        self._grown: set[Attempt] = set()
        """Of jobs that are streamed, those with new tokens."""
        self._loop: asyncio.AbstractEventLoop
        self._beat: asyncio.Event
        self._subscribed: asyncio.Event
        self._seen = FROM_NOW
        """The last command that a heartbeat told of."""
        self._heard = NONE
        """The last command that came by the channel."""
        self._controller: Controller
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
        controller: "Controller",
        obey: Callable[[Attempt, Renewal], object],
        broken: Callable[[Exception], object],
    ) -> None:
        """Begin; the first heartbeat goes out at once.

        `facts` tells what it shows; `controller` follows commands; `obey` hears every answer to a renewal but
        `held`, `broken` the error that ended the thread. All are called from the thread.
        """
        self._facts, self._obey, self._broken = facts, obey, broken
        self._controller = controller
        self._thread.start()
        self._ready.wait(JOIN_S)

    def close(self) -> None:
        """End the thread; leases still held run out."""
        with contextlib.suppress(RuntimeError):  # it has ended by itself, and its loop with it
            self._stop()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def hold(self, attempt: Attempt) -> None:
        """Renew this attempt's lease from now on, at once whenever it says that it grew."""
        attempt.grew = partial(self._wake_for, attempt)
        self._held.add(attempt)

    def _wake_for(self, attempt: Attempt) -> None:
        if attempt in self._grown:
            return
        self._grown.add(attempt)
        if len(self._grown) == 1:  # else the thread has been woken for another, and looks for all
            with contextlib.suppress(RuntimeError):  # it has ended by itself, and its loop with it
                self._loop.call_soon_threadsafe(self._woken.set)

    def drop(self, attempt: Attempt) -> None:
        """Renew it no longer."""
        self._held.discard(attempt)
        attempt.grew = _ignore  # it refers to the attempt: without this cycle all that hangs on it is freed at once

    def _run(self) -> None:
        try:
            asyncio.run(self._keep())
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker must hear
            self._broken(_first(error))

    async def _keep(self) -> None:
        stopped = asyncio.Event()
        self._woken, self._beat = asyncio.Event(), asyncio.Event()
        self._subscribed = asyncio.Event()
        loop = self._loop = asyncio.get_running_loop()
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
                    tasks.create_task(self._listening(broker)),
                    tasks.create_task(self._controller.run(self._beat.set)),
                ]
                await stopped.wait()
                await cancel(*kept)
            await self._answer_last(broker)
        finally:
            await link.close()

    async def _renewing(self, broker: Broker) -> None:
        tick_s = min(TICK_S, self._lease_s / 6, self._checkpoint_s / 2)
        while True:
            try:
                async with asyncio.timeout(tick_s):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            attempts = self._attempts_due(tick_s)
            while attempts:
                attempts = await self._renew(broker, attempts)

    def _attempts_due(self, tick_s: float) -> list[Attempt]:
        """Whose lease is renewed now: of streams with new tokens; every tick those with a checkpoint due, or all."""
        grown: set[Attempt] = set()
        while self._grown:  # until it is empty: what comes after that wakes the thread again
            grown.add(self._grown.pop())
        now = time.monotonic()
        if self._rung or now - self._renewed_s >= self._lease_s / 3:
            self._rung, self._renewed_s = False, now
            return list(self._held)
        if now - self._looked_s >= tick_s:
            self._looked_s = now
            return [attempt for attempt in list(self._held) if self._due(attempt)]
        return [attempt for attempt in grown & self._held if self._due(attempt)]

    def _due(self, attempt: Attempt) -> bool:
        return attempt.checkpoint.due(self._checkpoint_tokens, self._checkpoint_s)

    async def _renew(self, broker: Broker, attempts: list[Attempt]) -> list[Attempt]:
        """Renew as many as one call should carry; returns the others."""
        holds: list[Hold] = []
        checkpoints: list[Checkpoint] = []
        total_bytes = 0
        for attempt in attempts[:RENEW_MOST]:
            if total_bytes >= RENEW_BYTES:
                break
            checkpoint = attempt.checkpoint
            hold = Hold(attempt.lease.job_id, attempt.lease.fence, checkpoint.segments())
            total_bytes += hold.bytes
            holds.append(hold)
            checkpoints.append(checkpoint)
        answers = await broker.renew(holds, lease_ms=int(self._lease_s * 1000))
        for attempt, hold, checkpoint, answer in zip(
            attempts, holds, checkpoints, answers, strict=False
        ):
            if answer == "gap":
                checkpoint.rewind()
            elif answer == "held":
                checkpoint.written(hold.segments)
                if checkpoint.streamed and self._due(attempt):
                    self._grown.add(attempt)
                    self._woken.set()
            elif attempt in self._held:
                self._obey(attempt, answer)
        return attempts[len(holds) :]

    async def _listening(self, broker: Broker) -> None:
        """Renew at once when the bell names this worker, look when it names all, bring what is published."""
        keys = broker.keys
        # before subscribing: what is published from then on comes after it
        self._heard = await newest(broker)
        listener = Listener(self._url, (keys.bell, keys.control), name=f"{self._worker}:bell")
        try:
            async for channel, told in listener:
                if channel == keys.control:
                    await self._bring(broker, told)
                elif channel == keys.bell and told in (self._worker, "all"):
                    self._beat.set()
                    if told == self._worker:
                        self._rung = True
                        self._woken.set()
                elif not channel:
                    if self._seen != FROM_NOW:
                        self._heard = self._seen
                    self._subscribed.set()
        finally:
            await listener.close()

    async def _bring(self, broker: Broker, message: str) -> None:
        """Make a command of what was published, unless another worker has."""
        try:
            words = words_of(message)
        except InvalidCommand:
            words = [message[:TOLD_CHARS]]  # the audit shall tell of it
        try:
            self._heard = await hear(broker, message, words, self._heard)
        except RolloutError as error:
            log.warning("what was published on the control channel is lost: %s", error)

    async def _beating(self, broker: Broker, contact: Contact) -> None:
        controller = self._controller
        # who may not subscribe is told of commands by heartbeats
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SUBSCRIBE_S):
                await self._subscribed.wait()
        while True:
            self._beat.clear()
            answers = controller.answers()
            told = await broker.beat(
                self._worker,
                self._facts(),
                ttl_ms=WORKER_TTL_S * 1000,
                desired=controller.to_restore(),
                seen=self._seen,
                acks=answers,
            )
            contact.seen(broker.link.opened)
            self._seen = told.seen
            controller.sent(answers)
            controller.hear(told)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(BEAT_S, self._lease_s / 6)):
                    await self._beat.wait()

    async def _answer_last(self, broker: Broker) -> None:
        """Bring the answers that no heartbeat has carried, that to a shutdown among them."""
        answers = self._controller.answers()
        if not answers:
            return
        # where nobody listens, silence says it
        with contextlib.suppress(TimeoutError, RolloutError):
            async with asyncio.timeout(LAST_WORDS_S):
                ttl_ms = WORKER_TTL_S * 1000
                await broker.beat(self._worker, self._facts(), ttl_ms=ttl_ms, acks=answers)

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
