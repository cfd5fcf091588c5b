"""What a client's thread gives and others wait for.

As concurrent.futures.Future, which carries a lock, a condition and two lists of its own: of ten thousand jobs in flight
they are most of what a client allocates.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, cast

Value = TypeVar("Value")
Call = Callable[[], object]

_GIVING = threading.Lock()
"""Held for as long as it takes to see whether an answer is there, or to say that it is."""
os.register_at_fork(  # a child must not inherit it locked
    before=_GIVING.acquire, after_in_parent=_GIVING.release, after_in_child=_GIVING.release
)

log = logging.getLogger("rolloutq.client")


class Promise(Generic[Value]):
    """An answer, or the error that stands for it, given once by any thread."""

    __slots__ = ("_answer", "_calls", "_error")

    def __init__(self) -> None:
        self._calls: list[Callable[[Promise[Value]], object]] | None = []
        self._answer: Value | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is there."""
        return self._calls is None

    def set_result(self, answer: Value) -> None:
        """Give the answer."""
        self._give(answer, None)

    def set_exception(self, error: BaseException) -> None:
        """Give the error."""
        self._give(None, error)

    def _give(self, answer: Value | None, error: BaseException | None) -> None:
        with _GIVING:
            if self._calls is None:
                raise RuntimeError("this promise was kept before")
            self._answer, self._error = answer, error
            calls, self._calls = self._calls, None
        for call in calls:
            try:
                call(self)
            # a caller's fault is no other waiter's, nor that of the client's thread
            except Exception:
                log.exception("a callback of a future failed")

    def add_done_callback(self, call: "Callable[[Promise[Value]], object]") -> None:
        """Call once with this when it is there: from the thread that gives it, or at once."""
        with _GIVING:
            if self._calls is not None:
                self._calls.append(call)
                return
        call(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is there, for at most `timeout` seconds; returns whether it is."""
        if self.done():
            return True
        there = threading.Event()
        call = partial(_set, there)
        self.add_done_callback(call)
        there.wait(timeout)
        self.forget(call)
        return self.done()

    def forget(self, call: "Callable[[Promise[Value]], object]") -> None:
        """Do not call it, if it waits to be called."""
        with _GIVING:
            if self._calls and call in self._calls:
                self._calls.remove(call)

    def exception(self) -> BaseException | None:
        """Block until it is there; the error, if it is one."""
        self.wait()
        return self._error

    def result(self) -> Value:
        """Block until it is there; raises the error, if it is one."""
        self.wait()
        if self._error is not None:
            raise self._error
        return cast("Value", self._answer)


def _set(event: threading.Event, _: object) -> None:
    event.set()


def call_soon(loop: asyncio.AbstractEventLoop, call: Call) -> bool:
    """Call in the loop, from any thread, unless the loop has ended meanwhile; whether it will be called."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # the loop that waited is closed: nobody waits any more
        return False
    return True


def wake(waiter: "asyncio.Future[None]", _: object) -> None:
    """End a wait in an event loop, from any thread."""
    call_soon(waiter.get_loop(), partial(_end, [waiter]))


class Doorbell:
    """Ends waits too: those that are to end before their loop looks wake it once.

    To wake a loop takes a system call on either side, which is more than all else that a reply costs here. So whoever
    gives in a loop of its own rings when that loop turns: what it gives until then goes together.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}

    def wake(self, waiter: "asyncio.Future[None]", _: object) -> None:
        """As `wake`."""
        loop = waiter.get_loop()
        with self._lock:
            waiters = self._waiters.get(loop)
            if waiters is not None and not loop.is_closed():
                waiters.append(waiter)
                return
            for closed in [one for one in self._waiters if one.is_closed()]:
                del self._waiters[closed]
            self._waiters[loop] = [waiter]
        ring = partial(self._ring, loop)
        giving = _running_loop()
        if giving is None or giving is loop:
            ring()
        else:
            giving.call_soon(ring)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        if not call_soon(loop, partial(self._open, loop)):
            with self._lock:
                self._waiters.pop(loop, None)

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            waiters = self._waiters.pop(loop, [])
        _end(waiters)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _end(waiters: "list[asyncio.Future[Any]]") -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
