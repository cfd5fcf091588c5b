"""Ending tasks for certain."""

import asyncio
from typing import Any

AGAIN_S = 0.5


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks and wait until they have ended.

    One cancellation may be lost on its way (`asyncio.wait_for` before Python 3.12 swallows it when
    its own wait ends at that moment), so it is repeated.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
