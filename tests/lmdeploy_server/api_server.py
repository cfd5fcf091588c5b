"""lmdeploy's own api_server as a process."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300.0


class ApiServer:
    """A running one: over a stub that obeys `options`, or over lmdeploy's own PyTorch engine."""

    def __init__(self, model: Path, log: Path, options: dict[str, object] | None = None) -> None:
        """`options` None: lmdeploy's own engine."""
        self.port = free_port()
        self._log = log
        words = ["cpu_server", str(model), str(self.port)]
        if options is not None:
            words = ["stub_server", *words[1:], json.dumps(options)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"tests.lmdeploy_server.{words[0]}", *words[1:]],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=log.parent,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the api_server did not start:\n{self.log_tail()}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """End it, and the process of its engine."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
