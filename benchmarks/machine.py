"""What the benchmarks share: a server of their own, CPU time and memory of processes."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import redis

from benchmarks import record

HERE = Path(__file__).parent
READY_S = 30.0


@contextmanager
def server(binary: str) -> Generator[int]:
    """A server on a free loopback port, nothing on disk; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        process = subprocess.Popen(
            [*command, "--appendonly", "no", "--dir", place], stdout=subprocess.DEVNULL
        )
        try:
            until(admin(port).ping)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def admin(port: int) -> Any:  # noqa: ANN401 - redis-py's types are loose
    """A plain client."""
    return cast("Any", redis.Redis(port=port))


def until(true: Callable[[], object]) -> None:
    """Wait for a sign."""
    give_up_at = time.monotonic() + READY_S
    while True:
        try:
            if true():
                return
        except redis.RedisError:
            pass
        if time.monotonic() > give_up_at:
            raise TimeoutError("not ready")
        time.sleep(0.05)


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process of this tree; what it prints is read."""
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """What a process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def server_cpu_s(admin: Any) -> float:  # noqa: ANN401
    """User and system time of a server."""
    info = admin.info("cpu")
    return info["used_cpu_user"] + info["used_cpu_sys"]


def write_down(path: Path | None, binary: str, figures: dict[str, Any]) -> None:
    """Keep the figures of a run, if a file is named for it."""
    if path is not None:
        told = subprocess.run([binary, "--version"], check=True, capture_output=True, text=True)
        server = " ".join(told.stdout.split()[:3])
        record.write(path, {"server": server, **figures}, "redis", "hiredis")
