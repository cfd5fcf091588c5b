"""Workers as processes, `python -P -m worker` or another module, that a test starts, watches and kills."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import pytest
from redis import Redis

ROOT = Path(__file__).resolve().parent.parent
END_LIMIT_S = 30.0


class WorkerProcess:
    """A running worker; `worker_id` is the name it registers under."""

    def __init__(
        self,
        url: str,
        pool: str,
        worker_id: str,
        flags: dict[str, str],
        log: Path,
        module: str = "worker",
    ) -> None:
        self.url = url
        self.pool = pool
        self.worker_id = worker_id
        self.log = log
        told = {"url": url, "pool": pool, "worker-id": worker_id, **flags}
        arguments = [word for name, value in told.items() for word in (f"--{name}", value)]
        kept = {name: text for name, text in os.environ.items() if not name.startswith("ROLLOUTQ_")}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
                cwd=log.parent,
            )

    @property
    def pid(self) -> int:
        """Of the process, running or not."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the worker serves; the test fails if it ends or `timeout_s` passes before."""
        key = f"rollout:{{{self.pool}}}:worker:{self.worker_id}"
        deadline = time.monotonic() + timeout_s
        with Redis.from_url(self.url, protocol=2) as redis:  # pyright: ignore[reportUnknownMemberType]
            while redis.hget(key, "state") != b"serving":
                if not self.running or time.monotonic() > deadline:
                    pytest.fail(f"worker {self.worker_id} is not ready:\n{self.log_tail()}")
                time.sleep(0.05)

    def signal(self, number: int) -> None:
        """Send any signal, such as SIGSTOP."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.wait(END_LIMIT_S)

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self._process.terminate()

    def wait(self, timeout_s: float = END_LIMIT_S) -> int:
        """The exit status, negative for a signal; raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def log_tail(self) -> str:
        """The last lines that the worker wrote."""
        return self.log.read_text(errors="replace")[-4000:]


class StartWorker(Protocol):
    """What the fixture `start_worker` is; flags are the worker's: `lease_s=2` is `--lease-s 2`."""

    def __call__(
        self,
        url: str,
        pool: str,
        *,
        engine: str = "scripted",
        module: str = "worker",
        **flags: str | float,
    ) -> WorkerProcess:
        """Start a worker and return at once."""
        ...
