"""How long one request goes on: to its limit, until its caller hangs up, or until the gateway has to leave."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from starlette.types import Receive


class Patience:
    """Of one request; when its wait ends in TimeoutError, this says why."""

    def __init__(self) -> None:
        self.limit: asyncio.Timeout | None = None
        self.gone = False
        """The caller has hung up."""
        self.leaving = False
        """The gateway has to go."""

    def end(self) -> None:
        """Let the wait be over."""
        with suppress(RuntimeError):  # the block has just ended by itself
            if self.limit is not None:
                self.limit.reschedule(0)

    async def watch(self, receive: Receive) -> None:
        """Wait until the caller hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.end()


class Leaving:
    """Whether the gateway is on its way out, and what is still open then."""

    def __init__(self) -> None:
        self.begun = False
        """Nothing new is taken."""
        self._over = False
        self._open: set[Patience] = set()

    def end(self) -> None:
        """Let every open request end now, each with last words of its own."""
        self._over = True
        for patience in tuple(self._open):
            patience.leaving = True
            patience.end()

    @asynccontextmanager
    async def wait(
        self, patience: Patience, receive: Receive, limit_s: float
    ) -> AsyncGenerator[None]:
        """A block that raises TimeoutError when the wait is over."""
        patience.leaving = self._over
        async with asyncio.timeout(0 if self._over else limit_s) as patience.limit:
            watcher = asyncio.create_task(patience.watch(receive))
            self._open.add(patience)
            try:
                yield
            finally:
                self._open.discard(patience)
                watcher.cancel()
