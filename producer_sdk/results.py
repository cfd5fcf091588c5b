"""Replies as they come: one object for `for` and `async for`, with a bar where somebody watches."""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from producer_sdk.future import Pending
from producer_sdk.progress import Progress
from producer_sdk.promise import call_soon
from protocols.errors import ResultTimeout

Value = TypeVar("Value")


class Results(Generic[Value]):
    """The answers to some futures, in the order of their completion; iterate once, sync or async."""

    def __init__(
        self,
        futures: Iterable[Pending[Value]],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> None:
        """`timeout`: seconds for all of them together; then ResultTimeout is raised."""
        self._futures = list(futures)
        self._timeout = timeout
        self._progress = progress

    def __len__(self) -> int:
        """How many there will be."""
        return len(self._futures)

    def __iter__(self) -> Iterator[Value]:
        """Block until each is there."""
        done: queue.SimpleQueue[Pending[Value]] = queue.SimpleQueue()
        for future in self._futures:
            future.add_done_callback(done.put)
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        with Progress(len(self._futures), shown=self._progress) as progress:
            for count in range(len(self._futures)):
                try:
                    left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                    future = done.get(timeout=left_s)
                except queue.Empty:
                    raise self._late(count) from None
                progress.advance()
                yield future.result()

    async def __aiter__(self) -> AsyncIterator[Value]:
        """Wait in the event loop until each is there."""
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[Pending[Value]] = asyncio.Queue()
        for future in self._futures:
            future.add_done_callback(lambda ready: call_soon(loop, partial(done.put_nowait, ready)))
        deadline = None if self._timeout is None else loop.time() + self._timeout
        with Progress(len(self._futures), shown=self._progress) as progress:
            for count in range(len(self._futures)):
                try:
                    async with asyncio.timeout_at(deadline):
                        future = await done.get()
                except TimeoutError:
                    raise self._late(count) from None
                progress.advance()
                yield future.result()

    def _late(self, count: int) -> ResultTimeout:
        return ResultTimeout(
            f"{count} of {len(self._futures)} answers within {self._timeout:g} s; the others go on"
        )
