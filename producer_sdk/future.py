"""What a client hands out: a value that is awaited or asked for, from any thread or event loop."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from protocols.errors import ResultTimeout
from protocols.job import Reply

Value = TypeVar("Value")


class Pending(Generic[Value]):
    """An answer under way: `.result(timeout=…)`, or `await` it. No wait that ends early ends the work."""

    def __init__(self, inner: "concurrent.futures.Future[Value]", what: str) -> None:
        self._inner = inner
        self._what = what

    def done(self) -> bool:
        """Whether the answer is there."""
        return self._inner.done()

    def result(self, timeout: float | None = None) -> Value:
        """The answer; raises ResultTimeout after `timeout` seconds, while the work goes on."""
        self._wait(timeout)
        return self._inner.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that stands for the answer, if one does; raises ResultTimeout as `result` does."""
        self._wait(timeout)
        return self._inner.exception()

    def _wait(self, timeout: float | None) -> None:
        if self._inner.done():  # no waiter need be made
            return
        if not concurrent.futures.wait([self._inner], timeout).done:
            raise ResultTimeout(
                f"{self._what}: no answer within {timeout:g} s; it goes on, ask again"
            )

    def add_done_callback(self, call: Callable[["Pending[Value]"], object]) -> None:
        """Call once with this when the answer is there, from the client's own thread or at once."""
        self._inner.add_done_callback(lambda _: call(self))

    def __await__(self) -> Generator[Any, None, Value]:
        """Wait in an event loop; cancelling the wait leaves the work alone."""
        if not self._inner.done():
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()

            def wake() -> None:
                if not waiter.done():
                    waiter.set_result(None)

            self._inner.add_done_callback(lambda _: call_soon(loop, wake))
            yield from waiter
        return self._inner.result(0)


class Future(Pending[Value]):
    """The answer to one job."""

    def __init__(
        self,
        inner: "concurrent.futures.Future[Value]",
        job_id: str,
        cancel: Callable[[str], Pending[int]],
    ) -> None:
        super().__init__(inner, f"job {job_id}")
        self.job_id = job_id
        self._cancel = cancel

    def cancel(self) -> Pending[int]:
        """Cancel the job itself, queued or running; its reply then says so."""
        return self._cancel(self.job_id)

    def __repr__(self) -> str:
        return f"<Future of job {self.job_id}: {'done' if self.done() else 'pending'}>"


def converted(
    inner: "concurrent.futures.Future[Reply]", convert: Callable[[Reply], Value]
) -> "concurrent.futures.Future[Value]":
    """A future of what `convert` makes of the reply."""
    outer: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def pass_on(done: "concurrent.futures.Future[Reply]") -> None:
        error = done.exception()
        if error is not None:
            outer.set_exception(error)
            return
        try:
            outer.set_result(convert(done.result()))
        except Exception as broken:  # noqa: BLE001 - whoever waits hears what broke
            outer.set_exception(broken)

    inner.add_done_callback(pass_on)
    return outer


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Call in the loop, from any thread, unless the loop has ended meanwhile."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:  # the loop that waited is closed: nobody waits any more
        return
