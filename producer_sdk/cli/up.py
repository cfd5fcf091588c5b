"""`rolloutq up`: an embedded server and workers, kept running until Ctrl-C or SIGTERM."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from producer_sdk.cli import GOOD
from producer_sdk.cli.process import Terminated, ended_by_signals, how_it_ended
from producer_sdk.cli.screen import say
from producer_sdk.cli.stack import POLL_S, USAGE, Plan, Stack, threads_each, worker_failed
from protocols.errors import ConfigError
from protocols.queue.keys import Keys

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0
"""A worker that ran for so long has not failed at its start."""

_BODY = (
    '{"messages":[{"role":"user","content":"What is the capital of France?"}],'
    '"max_tokens":16,"temperature":0}'
)


def up(
    *,
    port: Annotated[int, Parameter(validator=Number(gte=1, lte=65535))] = 6379,
    workers: Annotated[int, Parameter(validator=Number(gte=1, lte=256))] = 1,
    engine: Literal["torch", "scripted"] = "torch",
    model: str | None = None,
    slots: Annotated[int, Parameter(validator=Number(gte=1, lte=1024))] = 8,
    pool: Annotated[str, Parameter(env_var="ROLLOUTQ_POOL")] = "default",
    directory: Annotated[Path | None, Parameter(name="--dir")] = None,
) -> int:
    """Keep a server and workers running.

    Every other setting of the workers is taken from `ROLLOUTQ_*`; `rolloutq worker --help` lists them.

    Args:
        port: The server's, on 127.0.0.1.
        workers: How many.
        engine: What generates.
        model: A directory in Hugging Face's layout; without one, smollm2.
        slots: Jobs that a worker has at once.
        pool: The pool that they serve.
        directory: Where the server keeps its data, to find it again; without one nothing is kept.
    """
    flags = {"engine": engine, "slots": str(slots), **threads_each(workers)}
    if model is not None:
        flags["model"] = model
    with ended_by_signals(), ExitStack() as block:
        folder = _folder(directory, block)
        names = tuple(f"w{number}" for number in range(1, workers + 1))
        plan = Plan(port, pool, folder, directory is not None, names, flags, worker_logs=False)
        try:
            stack = block.enter_context(Stack(plan))
            say(f"serving pool {pool} at {stack.where.url} with {workers} x {engine}, loading")
            _keep_running(stack)
        except Terminated:
            say("ending")
    return GOOD


def _folder(directory: Path | None, block: ExitStack) -> Path:
    if directory is None:
        made = tempfile.TemporaryDirectory(prefix="rolloutq-", ignore_cleanup_errors=True)
        return Path(block.enter_context(made))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--dir {directory}: {error.strerror}", param="dir") from None
    return directory


def _keep_running(stack: Stack) -> None:
    """Until all workers have left because somebody told them to."""
    seats = [Seat(stack, name) for name in stack.plan.workers]
    ready = False
    while True:
        stack.check_server()
        for seat in seats:
            seat.look()
        seats = [seat for seat in seats if not seat.left]
        if not seats:
            say("all workers have left, ending")
            return
        if not ready and stack.serving():
            ready = True
            say(_what_next(stack))
        time.sleep(POLL_S)


def _what_next(stack: Stack) -> str:
    prefix, port = Keys(stack.where.pool).prefix, stack.plan.port
    flags = "" if port == 6379 else f" --url {stack.where.url}"
    flags += "" if stack.where.pool == "default" else f" --pool {stack.where.pool}"
    return (
        f"ready. Send a job and read its answer:\n"
        f"  redis-cli -p {port} XADD '{prefix}:jobs:normal' '*' id hello body '{_BODY}'\n"
        f"  redis-cli -p {port} HGETALL '{prefix}:reply:hello'\n"
        f"or: rolloutq submit{flags} --prompt 'What is the capital of France?'\n"
        f"Look: rolloutq status{flags}\n"
        f"Ctrl-C ends it."
    )


class Seat:
    """A worker's place: whoever died there is replaced, later each time it dies soon; whoever left is not."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack, self._name = stack, name
        self._starts = 1
        self._started_at = time.monotonic()
        self._restart_at: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._holder = name
        self.left = False
        """Whether the worker ended because it was told to."""

    def look(self) -> None:
        """Plan a restart where the worker has died, and carry it out when it is due; let it go where it left."""
        now = time.monotonic()
        if self._restart_at is None:
            status = self._stack.workers[self._holder].ended
            if status == GOOD:
                self._let_go()
            elif status is not None:
                self._plan_restart(status, now)
        elif now >= self._restart_at:
            self._restart(now)

    def _let_go(self) -> None:
        del self._stack.workers[self._holder]
        self.left = True
        say(f"worker {self._holder} has left as it was told to; no other takes its place")

    def _plan_restart(self, status: int, now: float) -> None:
        if status == USAGE:
            raise worker_failed(self._holder, status)
        if now - self._started_at >= STEADY_S:
            self._pause_s = FIRST_PAUSE_S
        self._restart_at = now + self._pause_s
        say(f"worker {self._holder} {how_it_ended(status)}; another starts in {self._pause_s:g} s")
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _restart(self, now: float) -> None:
        del self._stack.workers[self._holder]
        self._starts += 1
        self._holder = f"{self._name}.{self._starts}"  # attempts of the dead one keep its name
        self._stack.start_worker(self._holder)
        self._restart_at, self._started_at = None, now
