"""What a worker says of itself, with every heartbeat and when it is asked: no URL, no path, no environment."""

import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocols import codec
from worker.config import Config
from worker.consumer import Consumer
from worker.engines.base import Engine
from worker.steps import Steps

if TYPE_CHECKING:
    from worker.controller import Controller

STUCK_S = 5.0
"""An event loop that has not turned for so long is stuck."""
PACKAGES = ("rolloutq", "redis", "torch", "transformers", "lmdeploy")

Fact = dict[str, str | int]


class Facts:
    """Of one worker; read from the lease keeper's thread."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        consumer: Consumer,
        steps: Steps,
        turned_s: Callable[[], float],
    ) -> None:
        """`turned_s` tells when the event loop turned last, by the monotonic clock."""
        self._config, self._engine, self._consumer, self._steps = config, engine, consumer, steps
        self._turned_s = turned_s
        self._started_ms = int(time.time() * 1000)
        self.controller: Controller | None = None

    def heartbeat(self) -> Fact:
        """What `P:worker:<id>` shows."""
        engine, consumer, counters = self._engine, self._consumer, self._engine.counters()
        return {
            **self.standing(),
            "engine": engine.name,
            "model": engine.model,
            "slots": self._config.slots,
            "finished_jobs": consumer.finished_jobs,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ms": self._started_ms,
            "health": self.health(),
            "ready": self.ready(),
            "updates": codec.encode_json(self._steps.updates).decode(),
            "running_samples": counters["running_samples"],
            "waiting_samples": counters["waiting_samples"],
            "forwarded_tokens": counters["forwarded_tokens"],
            "generated_tokens": counters["generated_tokens"],
        }

    def standing(self) -> Fact:
        """Where it is on its way to the desired state."""
        now, controller = self._steps.standing(), self.controller
        wanted = controller.wanted if controller else None
        return {
            "state": self._steps.state(),
            "memory": now.memory,
            "policy_version": now.version,
            "running_jobs": now.running,
            "held_jobs": now.held,
            "generation": wanted.generation if wanted else 0,
            "epoch": wanted.epoch if wanted else "",
            "doing": controller.doing if controller else "",
            "trouble": controller.trouble if controller else "",
        }

    def health(self) -> str:
        """`ok`, or why the process is not alive enough to go on."""
        silent_s = time.monotonic() - self._turned_s()
        return "ok" if silent_s < STUCK_S else f"its event loop has been stuck for {silent_s:.0f} s"

    def ready(self) -> str:
        """`ok` if it would take a job now, or why not."""
        state = self._steps.state()
        if self.health() != "ok":
            return self.health()
        if state != "serving":
            return f"it is {state}"
        return "ok" if self._consumer.jobs < self._config.slots else "all slots are in use"

    def answer(self, verb: str) -> Fact:
        """What a question asks for."""
        match verb:
            case "health":
                return {"health": self.health()}
            case "ready":
                return {"ready": self.ready()}
            case "status":
                return self.standing()
            case "metadata":
                return self._metadata()
            case _:
                return {}

    def _metadata(self) -> Fact:
        engine, config = self._engine, self._config
        versions = {f"version_{name}": _installed(name) for name in PACKAGES}
        return {
            "engine": engine.name,
            "model": engine.model,
            "capabilities": " ".join(sorted(engine.capabilities)),
            "context_tokens": engine.context_tokens,
            "vocabulary": engine.vocabulary,
            "policy_version": engine.policy_version,
            "slots": config.slots,
            "lease_ms": int(1000 * config.lease_s),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ms": self._started_ms,
            "version_python": platform.python_version(),
            **{name: found for name, found in versions.items() if found},
            "updates": codec.encode_json(self._steps.updates).decode(),
        }


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
