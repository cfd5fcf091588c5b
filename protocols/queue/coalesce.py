"""What gathers during one round trip is the next: batches without timers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Coalescer(Generic[Item, Answer]):
    """Sends items in batches, one batch under way at a time, each as large as what has gathered.

    A batch ends at `most` items or `most_bytes`. Whoever puts items bounds how many there are: a
    worker its leases, a client its futures.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]],
        *,
        size: Callable[[Item], int],
        most: int = 64,
        most_bytes: int = 4 * 1024 * 1024,
        gather: Callable[[], object] = lambda: None,
    ) -> None:
        """`send` answers a batch in its order; `size` tells an item's bytes.

        `gather` is called before each batch, and once more where there is none: it may put more.
        """
        self._send, self._size, self._gather = send, size, gather
        self._most, self._most_bytes = most, most_bytes
        self._waiting: list[tuple[Item, Callable[[Answer | Exception], None]]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether there is a next batch."""
        return bool(self._waiting)

    def put(self, item: Item, tell: Callable[[Answer | Exception], None]) -> None:
        """Queue an item; `tell` is called once with its answer, or with the error that its batch met."""
        self._waiting.append((item, tell))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def answer(self, item: Item) -> Answer:
        """Queue an item and wait for its answer."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.put(item, partial(_tell, future))
        return await future

    async def close(self) -> None:
        """Wait until all that was put is answered."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        await asyncio.sleep(0)  # what this turn of the loop puts goes together
        try:
            while self._more():
                batch = self._cut()
                answers: Sequence[Answer | Exception]
                try:
                    answers = await self._send([item for item, _ in batch])
                except Exception as error:  # noqa: BLE001 - whoever put an item hears of it
                    answers = [error] * len(batch)
                for (_, tell), answer in zip(batch, answers, strict=True):
                    tell(answer)
        finally:
            self._task = None

    def _more(self) -> bool:
        self._gather()
        return self.waiting

    def _cut(self) -> list[tuple[Item, Callable[[Answer | Exception], None]]]:
        total = count = 0
        for item, _ in self._waiting[: self._most]:
            total += self._size(item)
            if count and total > self._most_bytes:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch


def _tell(future: "asyncio.Future[Answer]", answer: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
