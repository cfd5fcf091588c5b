"""What the worker does with its jobs and its engine when the desired state changes; each step has a limit.

The controller calls from the lease keeper's thread; the steps run in the worker's event loop.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Literal, assert_never

import msgspec

from protocols.control import Desired, Standing, State, Step
from worker.consumer import Consumer
from worker.engines.base import Engine, Weights

LIMITS_S: dict[Step, float] = {
    "pause": 10.0,
    "continue": 10.0,
    "offload": 120.0,
    "onload": 300.0,
    "update_weights": 1800.0,
}

UPDATES_MOST = 50

Life = Literal["starting", "serving", "draining", "stopped"]


class Update(msgspec.Struct, frozen=True):
    """A line of the update log: from then on tokens bear this version."""

    version: int
    before: int
    at_ms: int
    """By the worker's clock."""
    sha256: str | None


class Steps:
    """Of one worker; its consumer and engine are used in the event loop in which this was made."""

    def __init__(self, consumer: Consumer, engine: Engine, stop: Callable[[], object]) -> None:
        """`stop` makes the worker leave; called again, at once."""
        self._consumer, self._engine, self._stop = consumer, engine, stop
        self._loop = asyncio.get_running_loop()
        self.life: Life = "starting"
        self.updates: tuple[Update, ...] = ()
        """The newest updates of the weights, oldest first."""

    @property
    def ready(self) -> bool:
        """Whether steps can be taken: the engine has started, and the worker is not leaving."""
        return self.life == "serving"

    def standing(self) -> Standing:
        """What the worker is doing."""
        consumer, engine = self._consumer, self._engine
        held = consumer.held
        return Standing(
            gate=consumer.gate,
            mode=consumer.mode,
            memory=engine.memory,
            version=engine.policy_version,
            running=consumer.jobs - held,
            held=held,
        )

    def state(self) -> Life | State:
        """The worker's state in one word."""
        return self.standing().state if self.life == "serving" else self.life

    async def take(self, step: Step, wanted: Desired) -> None:
        """Take one step; raises TimeoutError past its limit, and RolloutError where the engine refuses."""
        done = asyncio.run_coroutine_threadsafe(self._take(step, wanted), self._loop)
        async with asyncio.timeout(LIMITS_S[step]):
            await asyncio.wrap_future(done)

    def leave(self, *, now: bool) -> None:
        """Drain and end; `now`: hand everything back at once."""
        for _ in range(2 if now else 1):
            self._loop.call_soon_threadsafe(self._stop)

    def _take(self, step: Step, wanted: Desired) -> Coroutine[None, None, None]:
        match step:
            case "pause":
                return self._pause(wanted)
            case "continue":
                return self._continue()
            case "offload":
                return self._engine.offload(2 if wanted.memory == "discarded" else 1)
            case "onload":
                return self._engine.onload()
            case "update_weights":
                return self._update_weights(wanted)
            case _:
                assert_never(step)

    async def _pause(self, wanted: Desired) -> None:
        self._consumer.pause(wanted.mode)

    async def _continue(self) -> None:
        self._consumer.go_on()

    async def _update_weights(self, wanted: Desired) -> None:
        before = self._engine.policy_version
        version = before if wanted.weights is None else wanted.weights
        path = None if wanted.uri is None else wanted.uri.removeprefix("file://")
        async with self._consumer.still():
            await self._engine.update_weights(Weights(version, path, wanted.sha256))
        update = Update(version, before, int(1000 * time.time()), wanted.sha256)
        self.updates = (*self.updates, update)[-UPDATES_MOST:]
