"""A TCP proxy between a process and its server that loses answers: the request arrives and is executed."""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlparse

CHUNK_BYTES = 1 << 16
LIMIT_S = 30.0


class CuttingProxy:
    """Forwards both ways; where a request holds a text that `cut` was told of, its answer is lost.

    The connection breaks with it, but only once the server has answered, so the step was executed.
    """

    def __init__(self, url: str) -> None:
        where = urlparse(url)
        self._server = (where.hostname or "", where.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.happened: Counter[str] = Counter()
        """Answers lost, by the text of their request."""
        self.held = threading.Event()
        """Set while an answer is held back."""
        self._wanted: Counter[str] = Counter()
        self._hold: tuple[str, float] | None = None
        self._pairs: list[_Pair] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)

    def cut(self, text: str, times: int) -> None:
        """Lose the answers to the next `times` requests that hold the text."""
        with self._lock:
            self._wanted[text] += times

    def hold(self, text: str, seconds: float) -> None:
        """Let the answer to the next request that holds the text be late."""
        self._hold = (text, seconds)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(LIMIT_S)
        for pair in self._pairs:
            pair.end(LIMIT_S)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            pair = _Pair(client, socket.create_connection(self._server))
            self._pairs.append(pair)
            pair.begin(self._requests, self._answers)

    def _requests(self, pair: "_Pair") -> None:
        with contextlib.suppress(OSError):
            while data := pair.client.recv(CHUNK_BYTES):
                pair.lose = pair.lose or self._chosen(data)
                if self._hold and self._hold[0].encode() in data:
                    (_, pair.late_s), self._hold = self._hold, None
                pair.server.sendall(data)
        _break(pair.server)

    def _answers(self, pair: "_Pair") -> None:
        with contextlib.suppress(OSError):
            while data := pair.server.recv(CHUNK_BYTES):
                if pair.lose:
                    self.happened[pair.lose] += 1
                    break
                if pair.late_s:
                    self.held.set()
                    time.sleep(pair.late_s)
                    pair.late_s = 0.0
                pair.client.sendall(data)
        _break(pair.client)
        _break(pair.server)

    def _chosen(self, data: bytes) -> str | None:
        with self._lock:
            for text, left in self._wanted.items():
                if left and text.encode() in data:
                    self._wanted[text] -= 1
                    return text
        return None


class _Pair:
    """One connection's two ends."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.lose: str | None = None
        self.late_s = 0.0
        self._threads: list[threading.Thread] = []

    def begin(self, *carry: Callable[["_Pair"], None]) -> None:
        self._threads = [threading.Thread(target=way, args=(self,), daemon=True) for way in carry]
        for thread in self._threads:
            thread.start()

    def end(self, limit_s: float) -> None:
        for end in (self.client, self.server):
            _break(end)
        for thread in self._threads:
            thread.join(limit_s)
        self.client.close()
        self.server.close()


def _break(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
