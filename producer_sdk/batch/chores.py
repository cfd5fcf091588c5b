"""The batch worker: arq runs batches that were left to it, and forgets old ones. The only module that knows arq.

arq asks each few seconds which batches nobody is at. One taken up is a job of arq's with a name of its own for every
time: arq itself would wait for a dead worker's job until its time-out, an hour here. After that hour a batch is left
and taken up again, so that arq's own records stay few.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import astuple

from producer_sdk.batch.journal import BatchHeld, Files
from producer_sdk.batch.registry import OWNER_S, Batch, Registry
from producer_sdk.batch.runner import Look, Order, Wish
from producer_sdk.batch.work import Summary, work
from protocols.errors import ConfigError, QueueError, RolloutError
from protocols.queue.broker import Broker
from protocols.queue.link import Link

LOOK_S, KEEP_S = 3, 2.0
LONGEST_S = 3600
NO_WORKER_S = 60.0
log = logging.getLogger("rolloutq.batch")
Context = dict[str, Any]


class Chores:
    """What one batch worker does."""

    def __init__(self, url: str, pool: str, folder: Path, *, batches: int, keep_s: float) -> None:
        """`folder`: where all files are. `batches`: the most at once. `keep_s`: how long ended ones are remembered."""
        self._url, self._pool, self._folder = url, pool, folder.resolve()
        self._batches, self._keep_s = batches, keep_s
        self._at: set[str] = set()
        """Batches that are under way here."""
        self._threads = ThreadPoolExecutor(batches, thread_name_prefix="batch")
        self._owner = f"{socket.gethostname()}-{os.getpid()}"
        self._link = Link(url, name=f"batch:{self._owner}")
        self._registry = Registry(Broker(self._link, pool))

    async def look(self, context: Context) -> None:
        """Take up what nobody is at."""
        for batch in await self._registry.all():
            if not batch.ended and batch.owner is None:
                # new every 15 s: arq knows the job of a worker that died before its attempt counted until its time-out
                name = f"{self._pool}:{batch.id}:{batch.attempts}:{int(time.time()) // OWNER_S}"
                await context["redis"].enqueue_job("run", batch.id, _job_id=name)

    async def sweep(self, context: Context) -> None:
        """Forget what is past its retention."""
        if count := await self._registry.sweep(self._keep_s):
            log.info("forgot %d batches that ended long ago", count)

    async def run(self, context: Context, batch_id: str) -> None:
        """Run one batch until it has ended, or this worker leaves."""
        batch = await self._registry.get(batch_id)
        owner = f"{self._owner}-{batch.attempts}"
        if batch.ended or batch_id in self._at or len(self._at) >= self._batches:
            return
        self._at.add(batch_id)
        try:
            if await self._registry.claim(batch_id, owner):
                await self._own(batch, owner)
        finally:
            self._at.remove(batch_id)

    async def _own(self, batch: Batch, owner: str) -> None:
        log.info("batch %s: at it, for the %d. time", batch.id, batch.attempts + 1)
        order, looks = Order(), Looks()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, self._work, batch, order, looks)
        keeping = asyncio.create_task(self._keep(batch.id, owner, order, looks))
        try:
            await asyncio.wait([running])
        finally:
            order.at_least(Wish.DETACH)
            while not running.done():  # cancelled, maybe once more: the first passes at the end
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            keeping.cancel()
            await asyncio.wait([keeping])
            await self._tell(batch.id, owner, order, running)

    def _work(self, batch: Batch, order: Order, looks: "Looks") -> Summary:
        files = Files.of(Path(batch.task.input), Path(batch.task.output))
        for path in astuple(files):
            if not path.resolve().is_relative_to(self._folder):
                raise ConfigError(
                    f"{path}: this batch worker reads and writes below its --dir alone"
                )
        return work(
            batch.task,
            self._url,
            self._pool,
            no_worker_s=NO_WORKER_S,
            order=order,
            watch=looks.take,
            say=partial(log.warning, "batch %s: %s", batch.id),
        )

    async def _keep(self, batch_id: str, owner: str, order: Order, looks: "Looks") -> None:
        while True:
            with contextlib.suppress(QueueError):  # the runner hears of it, too
                match await self._registry.keep(batch_id, owner, looks.newest):
                    case "cancel":
                        order.at_least(Wish.CANCEL)
                    case "lost":
                        order.at_least(Wish.DETACH)
                    case _:
                        pass
            await asyncio.sleep(KEEP_S)

    async def _tell(
        self, batch_id: str, owner: str, order: Order, running: "asyncio.Future[Summary]"
    ) -> None:
        """Say what came of it."""
        match running.exception():
            case None:
                summary = running.result()
                if summary.interrupted and order.wish != Wish.CANCEL:
                    log.warning("batch %s: left, for this worker leaves", batch_id)
                    await self._registry.leave(batch_id, owner)
                    return
                state = "cancelled" if summary.interrupted else "done"
                log.info("batch %s: %s", batch_id, state)
                await self._registry.end(batch_id, owner, state, summary)
            case RolloutError() as error if not isinstance(error, QueueError | BatchHeld):
                log.error("batch %s: %s", batch_id, error.message)
                await self._registry.end(batch_id, owner, "failed", None, error.message)
            case error:
                log.warning("batch %s: left for now: %s", batch_id, error)
                await self._registry.leave(batch_id, owner, str(error))


class Looks:
    """The newest look, from the runner's thread."""

    def __init__(self) -> None:
        self.newest: Look | None = None

    def take(self, look: Look) -> None:
        """Keep it until the next."""
        self.newest = look


def serve(url: str, pool: str, folder: Path, *, batches: int, keep_s: float) -> None:
    """Run batches, so many at once, until SIGTERM or SIGINT; what is under way is left for the next worker.

    Their files are below `folder`. Raises ConfigError without the extra `batch`.
    """
    try:
        arq, connections, worker = (
            import_module(name) for name in ("arq", "arq.connections", "arq.worker")
        )
    except ImportError:
        raise ConfigError(
            "a batch worker needs arq: pip install 'rolloutq[batch]' in an environment of its own, for arq holds "
            "redis-py below 6"
        ) from None
    chores = Chores(url, pool, folder, batches=batches, keep_s=keep_s)
    every = set(range(0, 60, LOOK_S))
    served = worker.Worker(
        [arq.func(chores.run, name="run", timeout=LONGEST_S, keep_result=0, max_tries=1)],
        cron_jobs=[
            arq.cron(chores.look, second=every, run_at_startup=True, name="look"),
            arq.cron(chores.sweep, second={30}, run_at_startup=True, name="sweep"),
        ],
        queue_name=f"rolloutq:batches:{pool}",
        redis_settings=connections.RedisSettings.from_dsn(url),
        max_jobs=batches + 2,
        job_serializer=msgspec.msgpack.encode,  # arq's own would be pickle
        job_deserializer=msgspec.msgpack.decode,
    )
    served.on_stop = _hear_no_more
    served.run()


def _hear_no_more(number: int) -> None:
    """Leaving takes some seconds; on a second signal arq would end before its jobs have."""
    log.info("leaving: what is under way is left to another")
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, lambda: None)
