"""One connection to the server, opened when first used and again whenever it breaks.

Every step of the queue may be repeated after a lost answer, so a link repeats a call whose
connection broke, with full jitter, until `outage_s` is over. redis-py's own retries, read time-outs
and RESP3 are off: they re-send commands that must not be, end blocking reads early, and change the
shape of answers.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from redis.asyncio.connection import Connection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from protocols.errors import ConfigError, ServerUnavailable
from protocols.queue import tls
from protocols.queue.wire import Argument, Command, Wire, connect

CONNECT_S = 5.0
FIRST_CONTACT_S = 8.0
ANSWER_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
_PASSING = (ReadOnlyError, ClusterDownError, TryAgainError)
_PASSING_CODES = (
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "MISCONF",
    "BUSY ",
    "UNBLOCKED",
)
_OPTIONS = ("db", "username", "password")
"""What may follow a URL's `?`, beside those of TLS."""
_BROKEN = (RedisConnectionError, RedisTimeoutError, OSError, EOFError, TimeoutError)
_HUNG_UP = (ConnectionResetError, BrokenPipeError, EOFError)

log = logging.getLogger("rolloutq.link")


_memory: dict[str, Callable[[], Wire]] = {}


@contextmanager
def in_memory(wire: Callable[[], Wire]) -> Generator[str]:
    """A `memory://` URL that leads to such a wire, in this process and this block only.

    The one thing here that is shared by a whole process: a URL is all that the parts of a client
    and of a worker are given, and tests give them one of a server in memory.
    """
    url = f"memory://{len(_memory)}-{id(wire):x}"
    _memory[url] = wire
    try:
        yield url
    finally:
        del _memory[url]


def check_url(url: str) -> dict[str, Any]:
    """redis-py's connection arguments of a `redis://`, `rediss://` or `unix://` URL; raises ConfigError."""
    if url in _memory:
        return {"path": url}
    try:
        told = _options(url)
        options = dict(parse_url(url))
    except ValueError:
        raise ConfigError(
            "url: not a Redis URL; it looks like redis://host:6379/0 or redis://user:password@host:6379/0 "
            "(rediss:// for TLS, unix:///path for a socket; @ : / ? # % of a password as "
            "%40 %3A %2F %3F %23 %25)",
            param="url",
        ) from None
    secure = options.get("connection_class") is SSLConnection
    return options | (tls.tls_options(told) if secure else {})


def _options(url: str) -> dict[str, str]:
    """What follows a URL's `?`.

    Raises ConfigError where one is unknown, ValueError where a password would be read as something else.
    """
    parts = urlsplit(url)
    if parts.scheme != "unix" and "@" in url and "@" not in parts.netloc:
        raise ValueError("@ outside of user and host")
    known = (*_OPTIONS, *(tls.OPTIONS if parts.scheme == "rediss" else ()))
    told = {name: values[0] for name, values in parse_qs(parts.query).items()}
    for name in told:
        if name in tls.OPTIONS and name not in known:
            raise ConfigError(f"url: {name} is for rediss://, which is TLS", param="url")
        if name not in known:
            raise ConfigError(
                f"url: unknown option after `?`; there are {', '.join(known)}", param="url"
            )
    return told


def address_of(url: str) -> str:
    """Where a URL leads, without its user and password."""
    where = check_url(url)
    if "path" in where:
        return str(where["path"])
    return f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"


def _passes(error: ResponseError) -> bool:
    """Whether a refusal passes: a failover, a slot on its way, a long script, no replica, a full disk.

    redis-py 5 has fewer classes; where it has none, the text begins with the code.
    """
    return isinstance(error, _PASSING) or str(error).startswith(_PASSING_CODES)


def _pass_cancellation(error: Exception) -> None:
    """A connection closed because its reader was cancelled may raise another error over the cancellation."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


class ConnectionGone(ServerUnavailable):
    """What was to be sent on one certain connection, which is lost."""


class Link:
    """One connection; the answers to calls come in the order of the calls."""

    def __init__(self, url: str, *, name: str, outage_s: float = 60.0) -> None:
        """`name` is what the server's CLIENT LIST shows. A call gives up after `outage_s` without a server.

        Where there never was one, it gives up after `FIRST_CONTACT_S`: the URL may be wrong.
        """
        options, self._in_memory = check_url(url), _memory.get(url)
        self._kind: type[Connection] = options.pop("connection_class", Connection)
        if "path" not in options:
            options.setdefault("socket_keepalive", True)
        self._options: dict[str, Any] = options | {
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_S,
            "client_name": name,
            "health_check_interval": 0,
        }
        self._wire: Wire | None = None
        self._opening = asyncio.Lock()
        self.address = address_of(url)
        self.outage_s = outage_s
        """May be changed, also for the call under way."""
        self.opened = 0
        """How often a connection was made: a change means that contact was lost in between."""

    async def call(self, *command: Argument, block_s: float = 0.0, only: int | None = None) -> Any:  # noqa: ANN401 - as sent
        """The answer to one command, which the server may hold back for `block_s`; `only` as in `calls`."""
        (answer,) = await self.calls([command], block_s=block_s, only=only)
        if isinstance(answer, RedisError):
            raise answer
        return answer

    async def calls(
        self, commands: Sequence[Command], *, block_s: float = 0.0, only: int | None = None
    ) -> list[Any]:
        """The answers to several commands sent at once; a refused command's answer is its ResponseError.

        `only` says which connection they are meant for, by what `opened` was: they are sent once,
        and raise ConnectionGone where it is gone.
        """
        loop = asyncio.get_running_loop()
        began_s, pause_s = loop.time(), FIRST_PAUSE_S
        while True:
            try:
                return await self._attempt(commands, ANSWER_S + block_s, only)
            except (*_BROKEN, ResponseError) as error:
                refused = self._refused(error)
                if refused is not None:
                    raise refused from (error if isinstance(error, ResponseError) else None)
                if isinstance(error, ResponseError) and not _passes(error):
                    raise
                _pass_cancellation(error)
                if only is not None:
                    raise self._lost() from None
                patience_s = self._patience_s
                if loop.time() - began_s >= patience_s:
                    raise ServerUnavailable(
                        f"no Redis at {self.address} for {patience_s:g} s "
                        f"({type(error).__name__}); {self._question(error)}",
                        retry_after_s=LONGEST_PAUSE_S,
                    ) from None
                if pause_s == FIRST_PAUSE_S:
                    log.warning("no Redis at %s (%s); trying again", self.address, error)
            await asyncio.sleep(random.uniform(0, pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _refused(self, error: Exception) -> ServerUnavailable | None:
        """What to say where asking again would be in vain."""
        where = f"Redis at {self.address}"
        if isinstance(error, AuthenticationError):
            return ServerUnavailable(
                f"{where} refuses this user: {error}; check the user and password in the URL"
            )
        if isinstance(error, NoPermissionError):
            return ServerUnavailable(
                f"{where} refuses this user a command: {error}; use another user in the URL, or "
                "let the ACL allow it"
            )
        trouble = None if self.opened else tls.tls_trouble(error)  # later, it may be a failover's
        return ServerUnavailable(f"{where} {trouble}") if trouble else None

    def _question(self, error: Exception) -> str:
        """What may be wrong where there is no contact."""
        secure, found = issubclass(self._kind, SSLConnection), [*tls.causes(error)]
        gone = any(isinstance(cause, _HUNG_UP) for cause in found) or "by server" in str(error)
        if gone and secure and not self.opened:
            return "it hangs up; does it want a client certificate (ssl_certfile, ssl_keyfile)?"
        if gone and not self.opened:
            return "it hangs up; is that a TLS port, which wants rediss://?"
        if secure and any(isinstance(cause, TimeoutError) for cause in found):
            return "is it running, is the URL right, and does that port speak TLS?"
        return "is it running, and is the URL right?"

    def _lost(self) -> ConnectionGone:
        return ConnectionGone(f"the connection to Redis at {self.address} was lost; judge anew")

    @property
    def _patience_s(self) -> float:
        return self.outage_s if self.opened else min(self.outage_s, FIRST_CONTACT_S)

    async def _attempt(
        self, commands: Sequence[Command], limit_s: float, only: int | None
    ) -> list[Any]:
        """Send and read; a connection that did not get all its answers is never used again."""
        wire = None
        try:
            async with asyncio.timeout(limit_s):
                wire = await self._open(only)
                answers = await wire.exchange(commands)
        except BaseException:
            self._drop(wire)
            raise
        for answer in answers:  # where one passes all are sent again, as every step may be
            if isinstance(answer, ResponseError) and (len(answers) == 1 or _passes(answer)):
                raise answer
        return answers

    async def subscribed(self, channels: Sequence[str]) -> AsyncIterator[tuple[str, str]]:
        """What is published from now on, with its channel; raises when the connection breaks. Uses up the link.

        The first is empty: it says that all channels are subscribed to.
        """
        wire = None
        try:
            async with asyncio.timeout(ANSWER_S):
                wire = await self._open()
                for confirmed in await wire.exchange([("SUBSCRIBE", name) for name in channels]):
                    if isinstance(confirmed, ResponseError):
                        raise confirmed
            yield "", ""
            while True:
                kind, channel, told = await wire.receive()
                if kind == b"message":
                    yield channel.decode(), told.decode(errors="replace")
        finally:
            self._drop(wire)

    async def _open(self, only: int | None = None) -> Wire:
        async with self._opening:
            if only is not None and (self._wire is None or self.opened != only):
                raise self._lost()
            if self._wire is None:
                if self._in_memory is None:
                    self._wire = await connect(self._kind(**self._options))
                else:
                    self._wire = self._in_memory()
                self.opened += 1
            return self._wire

    def _drop(self, wire: Wire | None) -> None:
        if wire is not None:
            wire.abort()
            if wire is self._wire:
                self._wire = None

    async def close(self) -> None:
        """Close the connection; the next call would open another."""
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()


class Listener:
    """What is published on some channels, on a connection of its own; what is missed is missed."""

    def __init__(self, url: str, channels: Sequence[str], *, name: str) -> None:
        self._link = Link(url, name=name)
        self._channels = channels

    async def __aiter__(self) -> AsyncIterator[tuple[str, str]]:
        """Channel and message, for as long as the task lives, with full jitter after a break.

        Both are empty whenever a subscription begins.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async for message in self._link.subscribed(self._channels):
                    pause_s = FIRST_PAUSE_S
                    yield message
            except (*_BROKEN, RedisError) as error:
                _pass_cancellation(error)
                if isinstance(error, ResponseError) and pause_s == FIRST_PAUSE_S:
                    channels = ", ".join(self._channels)
                    log.warning("Redis at %s: no %s: %s", self._link.address, channels, error)
            await asyncio.sleep(random.uniform(0, pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()
