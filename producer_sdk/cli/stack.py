"""An embedded server and its workers, as `rolloutq up` and `rolloutq demo` run them."""

import os
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from producer_sdk.cli.process import Child, how_it_ended
from producer_sdk.cli.server import HOST, start_server
from producer_sdk.cli.where import Where, ask
from producer_sdk.fleet import Fleet, look
from protocols.errors import ConfigError, RolloutError, ServerUnavailable
from protocols.queue.broker import Broker
from protocols.queue.keys import Keys

STOP_LIMIT_S = 20.0
POLL_S = 0.2
USAGE = 2


@dataclass(frozen=True)
class Plan:
    """What to run."""

    port: int
    pool: str
    folder: Path
    """Of the server's data and log."""
    durable: bool
    """Whether the server keeps its data in the folder."""
    workers: tuple[str, ...]
    """Their names."""
    flags: Mapping[str, str]
    """Of every worker, beside url, pool and id."""
    worker_logs: bool
    """Whether workers write into files of the folder; else to standard error."""


class Stack:
    """Processes that begin and end with the block."""

    def __init__(self, plan: Plan) -> None:
        Keys(plan.pool)
        self.plan = plan
        self.where = Where(f"redis://{HOST}:{plan.port}/0", plan.pool)
        self.server: Child | None = None
        self.workers: dict[str, Child] = {}

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.close)
            plan = self.plan
            self.server = start_server(plan.port, plan.folder, durable=plan.durable)
            ask(self.where, Broker.open)
            for name in plan.workers:
                self.start_worker(name)
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def start_worker(self, name: str) -> None:
        """Start a worker under this name, whoever had it before."""
        url, pool = self.where.url, self.where.pool
        told = {"url": url, "pool": pool, "worker-id": name, **self.plan.flags}
        flags = [word for flag, value in told.items() for word in (f"--{flag}", value)]
        log = self.plan.folder / f"{name}.log" if self.plan.worker_logs else None
        self.workers[name] = Child(name, [sys.executable, "-P", "-m", "worker", *flags], log)

    def fleet(self) -> Fleet:
        """The pool as it is now."""
        return ask(self.where, look)

    def serving(self) -> bool:
        """Whether all workers would take jobs."""
        told = self.fleet().workers
        return all(told.get(name, {}).get("state") == "serving" for name in self.workers)

    def wait_until_serving(self, limit_s: float) -> None:
        """Raises RolloutError where a worker ends instead, or `limit_s` passes."""
        give_up_at = time.monotonic() + limit_s
        while not self.serving():
            self.check_server()
            for name, child in self.workers.items():
                if child.ended is not None:
                    raise worker_failed(name, child.ended)
            if time.monotonic() > give_up_at:
                raise RolloutError(f"the workers were not ready within {limit_s:g} s")
            time.sleep(POLL_S)

    def check_server(self) -> None:
        """Raises ServerUnavailable where the server has ended."""
        if self.server is not None and self.server.ended is not None:
            raise ServerUnavailable(
                f"the server {how_it_ended(self.server.ended)}:\n{self.server.log_tail()}"
            )

    def logs(self) -> str:
        """The last lines of every process that has a log."""
        children = [*self.workers.values(), *([self.server] if self.server else [])]
        return "\n".join(f"--- {c.name}\n{c.log_tail().rstrip()}" for c in children if c.log)

    def close(self) -> None:
        """End the workers, then the server; a second Ctrl-C kills what is left."""
        try:
            if (
                self.server is not None and self.server.ended is None
            ):  # else nothing can be handed back
                _end(self.workers.values())
                _end([self.server])
        finally:
            for child in (*self.workers.values(), self.server):
                if child is not None:
                    child.kill()


def _end(children: Collection[Child]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        child.wait(STOP_LIMIT_S)


def worker_failed(name: str, status: int) -> RolloutError:
    """What to say of a worker that ended although nobody told it to."""
    message = f"worker {name} {how_it_ended(status)}; its last lines tell why"
    return ConfigError(message) if status == USAGE else RolloutError(message)


def threads_each(workers: int) -> dict[str, str]:
    """The flag that divides the cores among workers, unless the environment says how many each gets."""
    if "ROLLOUTQ_THREADS" in os.environ:
        return {}
    return {"threads": str(max(1, (os.cpu_count() or 1) // workers))}
