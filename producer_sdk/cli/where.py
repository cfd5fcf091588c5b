"""Where a command looks: a server and a pool, and short questions to them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from cyclopts import Parameter

from protocols.queue.broker import Broker
from protocols.queue.link import Link

OUTAGE_S = 3.0

Value = TypeVar("Value")


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Where:
    """A pool on a server."""

    url: Annotated[str, Parameter(env_var="ROLLOUTQ_URL")] = field(
        default="redis://localhost:6379/0", repr=False
    )
    """The Redis server."""
    pool: Annotated[str, Parameter(env_var="ROLLOUTQ_POOL")] = "default"
    """The pool: the workers that serve one model."""


def ask(where: Where, question: Callable[[Broker], Awaitable[Value]]) -> Value:
    """The answer to a short question, over a connection that is closed again.

    Raises ConfigError where URL or pool is none, ServerUnavailable after `OUTAGE_S` without a server.
    """

    async def asked() -> Value:
        link = Link(where.url, name="rolloutq-command", outage_s=OUTAGE_S)
        try:
            return await question(Broker(link, where.pool))
        finally:
            await link.close()

    return asyncio.run(asked())
