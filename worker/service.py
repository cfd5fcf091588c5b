"""A worker's life: prepare the pool, load the engine, serve, and leave cleanly when told to."""

import asyncio
import contextlib
import logging
import signal
import time
from functools import partial

from protocols.cancellation import cancel
from protocols.errors import QueueError
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from worker.config import Config
from worker.consumer import Consumer
from worker.controller import Controller
from worker.engines import build
from worker.engines.base import Engine
from worker.facts import Facts
from worker.lease import LeaseKeeper
from worker.outcome import Settler
from worker.pipeline import run_job
from worker.steps import Steps

OUTAGE_S = 24 * 3600.0
"""A worker that has served waits this long for a server that is away."""
LEAVING_S = 10.0
"""But only so long once it has been told to leave: its leases run out by themselves."""
GOODBYE_S = 2.0
TURN_S = 0.5

log = logging.getLogger("rolloutq.worker")


class Service:
    """One worker in one process."""

    def __init__(self, config: Config, engine: Engine | None = None) -> None:
        self.config = config
        self.engine = engine or build(config)
        self._steps: Steps | None = None
        self._turned_s = time.monotonic()
        self._leave = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def state(self) -> str:
        """`starting`, then what the control channel makes of it, `draining`, `stopped`."""
        return "starting" if self._steps is None else self._steps.state()

    async def run(self) -> None:
        """Serve until `stop`; raises what broke the worker, if something did."""
        config = self.config
        blocking = Link(config.url, name=f"{config.worker_id}:taker", outage_s=OUTAGE_S)
        writing = Link(config.url, name=f"{config.worker_id}:writer", outage_s=OUTAGE_S)
        broker = Broker(writing, config.pool)
        settler = Settler(
            broker,
            fail_limit=config.fail_limit,
            backoff_s=config.backoff_s,
            lease_s=config.lease_s,
        )
        keeper = LeaseKeeper(
            config.url,
            config.pool,
            config.worker_id,
            lease_s=config.lease_s,
            crash_limit=config.crash_limit,
            checkpoint_tokens=config.checkpoint_tokens,
            checkpoint_s=config.checkpoint_s,
        )
        consumer = Consumer(
            Broker(blocking, config.pool),
            config.worker_id,
            keeper,
            settler,
            partial(run_job, engine=self.engine, pool=config.pool),
            slots=config.slots,
            lease_s=config.lease_s,
            policy_version=lambda: self.engine.policy_version,
            pressed=lambda: self.engine.counters()["waiting_samples"] > 0,
        )
        steps = self._steps = Steps(consumer, self.engine, self.stop)
        turning = asyncio.create_task(self._turning())
        try:
            await broker.prepare()
            self._keep(keeper, consumer, steps)
            await self.engine.start()
            steps.life = "serving"
            log.info("worker %s serves pool %s", config.worker_id, config.pool)
            await self._serve(consumer, steps, writing)
        finally:
            steps.life, writing.outage_s = "stopped", LEAVING_S
            await cancel(turning)
            await settler.close()
            keeper.close()
            await self._say_goodbye(broker)
            await self.engine.close()
            await blocking.close()
            await writing.close()
        if self._failure is not None:
            raise self._failure

    async def _turning(self) -> None:
        """Note that the event loop turns."""
        while True:
            self._turned_s = time.monotonic()
            await asyncio.sleep(TURN_S)

    async def _serve(self, consumer: Consumer, steps: Steps, writing: Link) -> None:
        taking = asyncio.create_task(consumer.run())
        leaving = asyncio.create_task(self._leave.wait())
        breaking = asyncio.create_task(self.engine.breakdown())
        await asyncio.wait([taking, leaving, breaking], return_when=asyncio.FIRST_COMPLETED)
        steps.life, writing.outage_s = "draining", LEAVING_S
        if breaking.done():
            self._failure = breaking.result()
            log.error("worker %s leaves: %s", self.config.worker_id, self._failure)
        if taking.done():
            self._failure = self._failure or _exception_of(taking)
        await cancel(taking, leaving, breaking)
        await consumer.drain(self.config.grace_s, self._hurry)

    async def _say_goodbye(self, broker: Broker) -> None:
        with contextlib.suppress(QueueError, TimeoutError):  # where nobody listens, silence says it
            async with asyncio.timeout(GOODBYE_S):
                await broker.leave(self.config.worker_id)

    def stop(self) -> None:
        """Take no more, finish what ends within the grace, hand the rest back; a second time, at once."""
        if self._leave.is_set():
            self._hurry.set()
        self._leave.set()

    def _keep(self, keeper: LeaseKeeper, consumer: Consumer, steps: Steps) -> None:
        loop = asyncio.get_running_loop()
        facts = Facts(self.config, self.engine, consumer, steps, lambda: self._turned_s)
        facts.controller = Controller(self.config.worker_id, steps, facts.answer)

        def broken(error: Exception) -> None:
            self._failure = error
            self.stop()

        keeper.start(
            facts=facts.heartbeat,
            controller=facts.controller,
            obey=lambda attempt, order: loop.call_soon_threadsafe(consumer.obey, attempt, order),
            broken=lambda error: loop.call_soon_threadsafe(broken, error),
        )


def _exception_of(task: asyncio.Task[None]) -> Exception | None:
    error = task.exception()
    return error if isinstance(error, Exception) else None


async def serve(config: Config) -> None:
    """Run a worker until SIGTERM or SIGINT."""
    service = Service(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop)
    await service.run()
