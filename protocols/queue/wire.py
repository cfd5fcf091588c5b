"""What goes over one open connection: commands out, answers in, however many at once.

redis-py connects, checks certificates and logs in; then its transport is taken over, because reading through redis-py
costs more than all that a client does with an answer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import hiredis
from redis.asyncio.connection import Connection, DefaultParser
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    InvalidResponse,
    NoPermissionError,
    ReadOnlyError,
    ResponseError,
)

Argument: TypeAlias = str | bytes | int | float
Command: TypeAlias = Sequence[Argument]

UNREAD_MOST = 256
"""Things that came unasked for: while so many are not taken, the server keeps the rest."""
_NOTHING_YET = object()
# both without types of their own
_pack = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType]
_error = cast("Callable[[str], Exception]", DefaultParser.parse_error)  # pyright: ignore[reportUnknownMemberType]


PIECE = 64
"""Arguments that are packed together."""
FEED_BYTES = 16 * 1024
"""Given to hiredis at once: behind each answer it moves all that it was given and has not read."""


def _packed(command: Command) -> bytes:
    """A command as it is sent, a long one piece by piece: hiredis grows one buffer, which costs five times as much."""
    if len(command) <= PIECE:
        return _pack((*command,))
    parts: list[bytes | memoryview] = [b"*%d\r\n" % len(command)]
    for at in range(0, len(command), PIECE):
        piece = (*command[at : at + PIECE],)
        parts.append(memoryview(_pack(piece))[len(b"*%d\r\n" % len(piece)) :])
    return b"".join(parts)


class Wire(Protocol):
    """An open connection; exchanges follow one another without waiting for answers.

    One whose exchange did not end well is good for nothing but `abort`.
    """

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands sent at once; a refused command's answer is its ResponseError.

        Raises what concerns the connection as a whole: redis-py's ConnectionError, NoPermissionError, ReadOnlyError.
        """
        ...

    async def receive(self) -> Any:  # noqa: ANN401 - as sent
        """The next thing that comes without being asked for."""
        ...

    def abort(self) -> None:
        """Close at once."""
        ...

    async def close(self) -> None:
        """Close in good order."""
        ...


def passed(answer: Any) -> Any:  # noqa: ANN401 - as sent
    """An answer, unless it is an error that concerns more than its command."""
    if isinstance(answer, Exception) and (
        not isinstance(answer, ResponseError)
        or isinstance(answer, NoPermissionError | ReadOnlyError)
    ):
        raise answer
    return answer


class SocketWire(asyncio.Protocol):
    """A connection that redis-py made, its transport taken over."""

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._connection, self._transport = connection, transport
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=_error,
            notEnoughData=_NOTHING_YET,
        )
        self._answers: list[Any] = []
        self._waiting: deque[tuple[int, asyncio.Future[list[Any]]]] = deque()
        self._lost: Exception | None = None
        self._paused = False
        self._before = transport.get_protocol()
        transport.set_protocol(self)

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As in Wire."""
        answers = self._next(len(commands))
        self._transport.write(b"".join([_packed(command) for command in commands]))
        return [passed(answer) for answer in await answers]

    async def receive(self) -> Any:  # noqa: ANN401 - as sent
        """As in Wire."""
        return passed((await self._next(1))[0])

    def _next(self, count: int) -> "asyncio.Future[list[Any]]":
        """The answers after those that others wait for."""
        answers: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self._lost is None:
            self._waiting.append((count, answers))
            self._hand_out()
        else:
            answers.set_exception(self._lost)
        return answers

    def _hand_out(self) -> None:
        """Give what is there to whoever waits; where nobody takes it, read no more for now."""
        while self._waiting and len(self._answers) >= self._waiting[0][0]:
            count, answers = self._waiting.popleft()
            if not answers.done():
                answers.set_result(self._answers[:count])
            del self._answers[:count]
        full = not self._waiting and len(self._answers) >= UNREAD_MOST
        if full != self._paused:
            self._paused = full
            (self._transport.pause_reading if full else self._transport.resume_reading)()

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        try:
            for start in range(0, len(data), FEED_BYTES):
                self._reader.feed(data, start, min(FEED_BYTES, len(data) - start))
                while (answer := self._reader.gets()) is not _NOTHING_YET:
                    self._answers.append(answer)
        except InvalidResponse as error:
            self._lose(error)
        else:
            self._hand_out()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport; redis-py waits to hear it too."""
        self._lose(exc or RedisConnectionError("Connection closed by server."))
        self._before.connection_lost(exc)

    def _lose(self, error: Exception) -> None:
        self._lost = error
        while self._waiting:
            _, answers = self._waiting.popleft()
            if not answers.done():
                answers.set_exception(error)

    def abort(self) -> None:
        """As in Wire."""
        _abort(self._connection)

    async def close(self) -> None:
        """As in Wire."""
        await self._connection.disconnect()


async def connect(connection: Connection) -> Wire:
    """Open and log in; raises what redis-py raises."""
    _leave_library_unsaid(connection)
    try:
        await connection.connect()
    except BaseException:
        _abort(connection)
        raise
    writer = connection._writer  # pyright: ignore[reportPrivateUsage]
    assert writer is not None
    return SocketWire(connection, cast("asyncio.Transport", writer.transport))


def _leave_library_unsaid(connection: Connection) -> None:
    """No CLIENT SETINFO: Redis 7.0 has none, so that an ACL for 7.0 cannot allow it; redis-py 5 and 8."""
    for name in ("driver_info", "lib_name", "lib_version"):
        setattr(connection, name, None)


def _abort(connection: Connection) -> None:
    writer = connection._writer  # pyright: ignore[reportPrivateUsage]
    if writer is not None:  # redis-py itself closes only with an await
        writer.transport.abort()
        connection._close()  # pyright: ignore[reportPrivateUsage]
