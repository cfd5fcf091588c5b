"""The server's own record of what was written: MONITOR, which shows the commands that functions call as well."""

import re
import socket
import threading
from collections import Counter, deque
from types import TracebackType
from typing import Self
from urllib.parse import urlparse

from tests.pool_look import wait_until

_CONCLUDED = re.compile(
    rb'^.{0,80}\[\d+ lua\] "HSET" "rollout:\{([^}]+)\}:reply:([^"]+)" "finished_ms" '
)
_STATUS = re.compile(rb'"finished_ms" "\d+" "status" "([a-z]+)"')
_STEP = re.compile(rb'^.{0,80}\] "FCALL" "rolloutq_([a-z]+)"')
_SENT = re.compile(rb'^.{0,80}\[\d+ (?!lua)[^\]]+\] "([A-Za-z]+)"')
READ_BYTES = 1 << 20


class Monitor:
    """Reads MONITOR in a thread, from when it is entered until it is left."""

    def __init__(self, url: str, *, kept_bytes: int = 400) -> None:
        """`kept_bytes` of a line are looked at: bodies are of no interest, but a call may be long."""
        where = urlparse(url)
        self._socket = socket.create_connection((where.hostname or "", where.port or 0))
        self._thread = threading.Thread(target=self._read, name="monitor", daemon=True)
        self._concluded: Counter[tuple[str, str]] = Counter()
        self.statuses: Counter[str] = Counter()
        """Terminal statuses written, of all pools."""
        self.steps: Counter[str] = Counter()
        """Calls of each step, of all pools."""
        self._sent: Counter[str] = Counter()
        self._kept_bytes = kept_bytes
        self._calls: deque[tuple[str, bytes]] = deque(maxlen=5000)
        self._begun = threading.Event()
        self._marks: set[bytes] = set()

    def __enter__(self) -> Self:
        self._socket.sendall(b"MONITOR\r\n")
        self._thread.start()
        assert self._begun.wait(10), "the server does not answer MONITOR"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def replies_written(self, pool: str) -> dict[str, int]:
        """How often each job of a pool got a terminal reply, up to this moment."""
        self._catch_up()
        counted = self._concluded.copy()
        return {job_id: count for (name, job_id), count in counted.items() if name == pool}

    def sent(self, command: str) -> int:
        """How many of a command clients have sent themselves, so not functions, up to this moment."""
        self._catch_up()
        return self._sent[command]

    def called(self, step: str, job_id: str, fence: str) -> int:
        """How many calls of a step were made for a job under that fence."""
        self._catch_up()
        wanted = f'"{job_id}" "{fence}"'.encode()
        return sum(name == step and wanted in line for name, line in list(self._calls))

    def _catch_up(self) -> None:
        """Wait until what the server has done so far was read here."""
        mark = f"mark-{id(self)}-{len(self._marks)}".encode()
        host, port = self._socket.getpeername()[:2]
        with socket.create_connection((host, port)) as other:
            other.sendall(b"ECHO " + mark + b"\r\n")
            other.recv(100)
        wait_until(lambda: mark in self._marks, "MONITOR has caught up")

    def _read(self) -> None:
        rest = b""
        while chunk := self._socket.recv(READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\r\n")
            for line in lines:
                self._note(line[: self._kept_bytes])
            self._begun.set()

    def _note(self, line: bytes) -> None:
        if found := _CONCLUDED.match(line):
            self._concluded[found[1].decode(), found[2].decode()] += 1
            if status := _STATUS.search(line):
                self.statuses[status[1].decode()] += 1
        elif found := _STEP.match(line):
            self.steps[found[1].decode()] += 1
            self._calls.append((found[1].decode(), line))
        elif b'"ECHO" "mark-' in line:
            self._marks.add(line.rpartition(b' "')[2].rstrip(b'"'))
        elif found := _SENT.match(line):
            self._sent[found[1].decode().upper()] += 1
