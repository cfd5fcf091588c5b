"""`--gpus 0-7 --tp 2`: one worker process for each group of GPUs, kept running until it is told to leave.

A worker that dies is replaced, later each time it dies soon; one that ends in good order, by a `shutdown`, is not. One
that finds its settings wrong ends them all. A signal is passed on to every worker: the first lets them drain, the
second hand everything back at once, the third ends them.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

from protocols.cancellation import cancel
from protocols.errors import ConfigError, QueueError
from protocols.queue import overview
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from worker.config import Config

USAGE = 2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0
"""A worker that ran for so long has not failed at its start."""
LOOK_S = 0.5
SEEN_MS = 10_000
KILL_LIMIT_S = 10.0
ID_CHARS = 56
"""Of the 64 that an id may have: the rest is for `-<group>.<start>`."""

log = logging.getLogger("rolloutq.launcher")


def groups(gpus: str, size: int) -> list[tuple[int, ...]]:
    """`0-3` by twos is (0, 1), (2, 3); raises ConfigError where it is no list of GPUs, or not whole groups."""
    numbers = [number for part in gpus.split(",") for number in _numbers(part, gpus)]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--gpus: {gpus!r} names a GPU twice", param="gpus")
    if len(numbers) % size:
        raise ConfigError(
            f"--gpus: {gpus!r} are {len(numbers)} GPUs, not whole groups of --tp {size}",
            param="gpus",
        )
    return [tuple(numbers[at : at + size]) for at in range(0, len(numbers), size)]


def _numbers(part: str, gpus: str) -> range:
    first, dash, last = part.strip().partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1024):
        raise ConfigError(f"--gpus: {gpus!r}; as 0-7, or 0,2,4-5", param="gpus")
    return range(int(first), int(last) + 1)


class Launcher:
    """The workers of one machine."""

    def __init__(self, config: Config, argv: Sequence[str]) -> None:
        """`argv` is what the workers are told too, each beside its own id; raises ConfigError."""
        gpus = groups(config.gpus, config.tp)
        if len(config.worker_id) > ID_CHARS:
            raise ConfigError(
                f"--worker-id: {len(config.worker_id)} characters; with --gpus at most {ID_CHARS}: a number follows",
                param="worker_id",
            )
        self._config = config
        self._seats = [
            Seat(f"{config.worker_id}-{number}", group, argv) for number, group in enumerate(gpus)
        ]
        self._signals = 0

    async def run(self) -> int:
        """Until every worker has ended; the exit code: 0 if all did in good order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._pass_on)
        saying = asyncio.create_task(self._say_ready())
        holding = [asyncio.create_task(self._hold(seat)) for seat in self._seats]
        try:
            statuses = await asyncio.gather(*holding)
        finally:
            await cancel(saying, *holding)
            for seat in self._seats:
                await seat.kill()
        return next((_exit_code(status) for status in statuses if status), 0)

    async def _hold(self, seat: "Seat") -> int:
        status = await seat.hold()
        if status == USAGE and not self._signals:
            log.error("worker %s has wrong settings; all end", seat.holder)
            self._pass_on()
        return status

    def _pass_on(self) -> None:
        self._signals += 1
        for seat in self._seats:
            seat.leave(signal.SIGKILL if self._signals > 2 else signal.SIGTERM)

    async def _say_ready(self) -> None:
        """Say it once all workers have loaded, warmed up and found the pool open."""
        config = self._config
        link = Link(config.url, name=f"{config.worker_id}:launcher")
        broker = Broker(link, config.pool)
        try:
            while not await self._ready(broker):  # noqa: ASYNC110 - the server tells it only when asked
                await asyncio.sleep(LOOK_S)
            log.info("ready: %d workers serve pool %s", len(self._seats), config.pool)
        finally:
            await link.close()

    async def _ready(self, broker: Broker) -> bool:
        try:
            told = await overview.workers(broker, seen_ms=SEEN_MS)
        except QueueError:
            return False  # the workers say so themselves
        return all(told.get(seat.holder, {}).get("state") == "serving" for seat in self._seats)


class Seat:
    """A group of GPUs and the worker that has it."""

    def __init__(self, name: str, gpus: Sequence[int], argv: Sequence[str]) -> None:
        self.holder = name
        self._name, self._argv = name, argv
        self._devices = ",".join(map(str, gpus))
        self._process: asyncio.subprocess.Process | None = None
        self._leaving = asyncio.Event()

    async def hold(self) -> int:
        """Keep a worker here until one ends in good order or is told to leave; its exit status."""
        starts, pause_s = 1, FIRST_PAUSE_S
        while True:
            began_s = time.monotonic()
            status = await self._run()
            if self._leaving.is_set():
                return 0 if status == -signal.SIGTERM else status  # it had not come up yet
            if status in (0, USAGE):
                return status
            if time.monotonic() - began_s >= STEADY_S:
                pause_s = FIRST_PAUSE_S
            log.warning(
                "worker %s %s; another starts in %g s", self.holder, _words(status), pause_s
            )
            if await self._told_within(pause_s):
                return 0
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            starts += 1
            self.holder = f"{self._name}.{starts}"  # attempts of the dead one keep its name

    def leave(self, number: int) -> None:
        """Send the worker a signal; another one will not come after it."""
        self._leaving.set()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """End what is left, for certain."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            async with asyncio.timeout(KILL_LIMIT_S):
                await self._process.wait()

    async def _run(self) -> int:
        # the last flag of a name counts; a group of its own, so that a terminal's Ctrl-C comes through the launcher
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "worker", *self._argv),
            *("--gpus", "", "--worker-id", self.holder),
            stdin=asyncio.subprocess.DEVNULL,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": self._devices},
            process_group=0,
        )
        if self._leaving.is_set():  # told so while it was started
            self._process.terminate()
        return await self._process.wait()

    async def _told_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._leaving.wait()
        except TimeoutError:
            return False


def _words(status: int) -> str:
    return (
        f"ended with status {status}"
        if status >= 0
        else f"was ended by {signal.Signals(-status).name}"
    )


def _exit_code(status: int) -> int:
    return status if status > 0 else 128 - status
