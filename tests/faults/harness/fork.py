"""Workers that start in milliseconds, for tests that kill hundreds of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pool_look import Look

ROOT = Path(__file__).resolve().parents[3]


class ForkedWorker:
    """A worker's process."""

    def __init__(self, nursery: "Nursery", worker_id: str, pid: int, log: Path) -> None:
        self._nursery = nursery
        self.worker_id, self.pid, self.log = worker_id, pid, log

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._nursery.ask({"poll": self.pid}) is None

    def signal(self, number: int) -> None:
        """Send any signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self.running:
            self.signal(signal.SIGKILL)
            self.wait()

    def freeze(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self.signal(signal.SIGSTOP)
        state = Path(f"/proc/{self.pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] not in "TtZ":
            time.sleep(0.001)

    def wake(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        status = self._nursery.ask({"wait": self.pid})
        assert status is not None
        return status

    def wait_ready(self, look: Look, timeout_s: float = 60.0) -> None:
        """Return when it serves."""
        deadline = time.monotonic() + timeout_s
        while look("HGET", look.keys.worker(self.worker_id), "state") != b"serving":
            if not self.running or time.monotonic() > deadline:
                pytest.fail(f"worker {self.worker_id} is not ready:\n{self.log_tail()}")
            time.sleep(0.02)

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


class Nursery:
    """Starts workers; see `zygote`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: list[ForkedWorker] = []
        kept = {name: text for name, text in os.environ.items() if not name.startswith("ROLLOUTQ_")}
        self._zygote = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.faults.harness.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            cwd=folder,
            text=True,
        )

    def start(
        self, url: str, pool: str, *, clock_off_s: float = 0.0, **flags: float
    ) -> ForkedWorker:
        """Start a scripted worker and return at once; flags are the worker's, `lease_s=2` is `--lease-s 2`."""
        worker_id = f"f{len(self.workers)}"
        told = {"url": url, "pool": pool, "engine": "scripted", "worker-id": worker_id}
        told |= {name.replace("_", "-"): str(value) for name, value in flags.items()}
        words = [word for name, value in told.items() for word in (f"--{name}", value)]
        log = self.folder / f"{worker_id}.log"
        pid = self.ask({"start": words, "log": str(log), "clock_off_s": clock_off_s})
        assert pid is not None
        self.workers.append(ForkedWorker(self, worker_id, pid, log))
        return self.workers[-1]

    def ask(self, order: dict[str, Any]) -> int | None:
        """The zygote's answer to one order."""
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()
        return json.loads(self._zygote.stdout.readline())

    def close(self) -> None:
        """Kill everything that was started, then the zygote."""
        for worker in self.workers:
            worker.kill()
        self._zygote.communicate(timeout=30)

    def log_tails(self) -> str:
        """What the youngest workers wrote."""
        return "\n".join(f"--- {w.worker_id}\n{w.log_tail()}" for w in self.workers[-4:])


StartFork = Callable[..., ForkedWorker]
"""What the fixture `fork` is: `Nursery.start` on the test's pool."""
