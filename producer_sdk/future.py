"""What a client hands out: a value that is awaited or asked for, from any thread or event loop."""

import asyncio
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Generic, TypeVar

from producer_sdk.promise import Promise, wake
from protocols.errors import ResultTimeout
from protocols.job import Reply

Value = TypeVar("Value")
Wake = Callable[["asyncio.Future[None]", object], object]


class Pending(Generic[Value]):
    """An answer under way: `.result(timeout=…)`, or `await` it. No wait that ends early ends the work."""

    __slots__ = ("_inner", "_wake", "_what")

    def __init__(self, inner: Promise[Value], what: str, wake: Wake = wake) -> None:
        """`wake` reaches the event loop of whoever awaits it."""
        self._inner = inner
        self._what = what
        self._wake = wake

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
        if not self._inner.wait(timeout):
            raise ResultTimeout(
                f"{self._what}: no answer within {timeout:g} s; it goes on, ask again"
            )

    def add_done_callback(self, call: Callable[["Pending[Value]"], object]) -> None:
        """Call once with this when the answer is there, from the client's own thread or at once."""
        self._inner.add_done_callback(lambda _: call(self))

    def __await__(self) -> Generator[Any, None, Value]:
        """Wait in an event loop; cancelling the wait leaves the work alone."""
        if not self._inner.done():
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            call = partial(self._wake, waiter)
            self._inner.add_done_callback(call)
            try:
                yield from waiter
            finally:
                self._inner.forget(call)
        return self._inner.result()


class Future(Pending[Value]):
    """The answer to one job."""

    __slots__ = ("_cancel", "job_id")

    def __init__(
        self,
        inner: Promise[Value],
        job_id: str,
        cancel: Callable[[str], Pending[int]],
        wake: Wake = wake,
    ) -> None:
        super().__init__(inner, f"job {job_id}", wake)
        self.job_id = job_id
        self._cancel = cancel

    def cancel(self) -> Pending[int]:
        """Cancel the job itself, queued or running; its reply then says so."""
        return self._cancel(self.job_id)

    def __repr__(self) -> str:
        return f"<Future of job {self.job_id}: {'done' if self.done() else 'pending'}>"


def converted(inner: Promise[Reply], convert: Callable[[Reply], Value]) -> Promise[Value]:
    """A promise of what `convert` makes of the reply."""
    outer: Promise[Value] = Promise()

    def pass_on(done: Promise[Reply]) -> None:
        error = done.exception()
        if error is not None:
            outer.set_exception(error)
            return
        try:
            value = convert(done.result())
        except Exception as broken:  # noqa: BLE001 - whoever waits hears what broke
            outer.set_exception(broken)
        else:
            outer.set_result(value)

    inner.add_done_callback(pass_on)
    return outer
