"""The one notice that an engine gives of its own end."""

import asyncio

from protocols.errors import EngineFailed


class Breakdown:
    """Told once, and waited for; both in the event loop's thread."""

    def __init__(self) -> None:
        self._told = asyncio.Event()
        self.failure: EngineFailed | None = None
        """What broke the engine, once something has."""

    def tell(self, failure: EngineFailed) -> None:
        """Say what broke the engine; only the first time counts."""
        self.failure = self.failure or failure
        self._told.set()

    async def wait(self) -> EngineFailed:
        """What broke it, as soon as something has."""
        while self.failure is None:
            await self._told.wait()
        return self.failure
