"""One connection to a gateway: what arrives on it has to arrive in time, whole heads first of all.

Uvicorn limits how long a connection may be idle between two requests, and nothing else. While a request is answered its
own limits hold.
"""

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from producer_sdk.exchange.response import of_error
from protocols.errors import RequestTooSlow


class Connection(H11Protocol):
    """As `connections` makes it."""

    arrival_s: ClassVar[float]
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The first head has to come."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """More of a head, or of a body."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more comes."""
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Give what is arriving a limit, unless it has one: a request's own, or that of an idle connection."""
        answering = self.cycle and not self.cycle.response_complete
        if answering or self.timeout_keep_alive_task is not None:
            self._unwatch()
        elif self._limit is None:
            self._limit = self.loop.call_later(self.arrival_s, self._too_late)

    def _unwatch(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _too_late(self) -> None:
        if self.transport.is_closing():
            return
        begun, _ = self.conn.trailing_data
        if begun and self.conn.our_state is h11.IDLE:
            self._refuse()
        self.transport.close()

    def _refuse(self) -> None:
        """Answer half a head."""
        error = RequestTooSlow(f"the headers have not arrived within {self.arrival_s:g} s")
        said = of_error(error, "openai.chat", "none")
        headers = [*said.headers.items(), ("connection", "close")]
        events = (
            h11.Response(status_code=said.status, headers=headers),
            h11.Data(data=said.body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")


def connections(arrival_s: float) -> type[Connection]:
    """Connections on which a head, or what is left of a refused body, has to arrive within so many seconds."""
    return type("Connection", (Connection,), {"arrival_s": arrival_s})
