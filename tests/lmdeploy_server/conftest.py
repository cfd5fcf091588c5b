"""lmdeploy's own api_server as a process; the tests are left out where lmdeploy is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.servers import ServerKind, free_port
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300.0

if importlib.util.find_spec("lmdeploy") is None:
    collect_ignore_glob = ["*.py"]


class ApiServer:
    """A running one."""

    def __init__(self, model: Path, log: Path, options: dict[str, object]) -> None:
        self.port = free_port()
        self._log = log
        words = [str(model), str(self.port), json.dumps(options)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.lmdeploy_server.stub_server", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=log.parent,
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
        self._process.kill()
        self._process.wait(30)

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


StartApiServer = Callable[..., ApiServer]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def api_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartApiServer]:
    """Start one with these options; those that were asked for before are used again."""
    running: dict[str, ApiServer] = {}
    with ExitStack() as ends:

        def start(**options: object) -> ApiServer:
            told = json.dumps(options, sort_keys=True)
            if told not in running:
                log = tmp_path_factory.mktemp("api_server") / "log"
                server = running[told] = ApiServer(model, log, options)
                ends.callback(server.kill)
                server.wait_healthy()
            return running[told]

        yield start


@pytest.fixture
def server_kind() -> ServerKind:
    """Redis: the environment that has lmdeploy may lack the wheel of Valkey."""
    return "redis"
