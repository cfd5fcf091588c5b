"""Two servers, one the other's replica, and what a failover after a partition does to them."""

import time
from types import TracebackType
from typing import Self, cast

from redis import Redis

from tests.faults.harness import record
from tests.faults.harness.proxy import Proxy
from tests.pool_look import wait_until
from tests.servers import Server, StartServer

OPTIONS = (*record.OPTIONS, "--repl-diskless-sync-delay", "0")


class Pair:
    """`url` leads to whichever is the primary; the replica follows it through a proxy that can be cut."""

    def __init__(self, fresh_server: StartServer) -> None:
        self.primary: Server = fresh_server(*OPTIONS)
        self.replica: Server = fresh_server(*OPTIONS)
        self._front = Proxy(self.primary.port)
        self._between = Proxy(self.primary.port)

    @property
    def url(self) -> str:
        """Of the primary, by way of the proxy."""
        return self._front.url

    def __enter__(self) -> Self:
        self._front.__enter__()
        self._between.__enter__()
        self._follow()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._front.__exit__(kind, error, at)
        self._between.__exit__(kind, error, at)

    def partition(self) -> None:
        """From now on the replica hears nothing; the primary goes on."""
        self._between.cut()

    def promote(self) -> float:
        """The replica takes over, the primary dies and comes back as the replica; when clients were led over."""
        old, new = self.primary, self.replica
        _command(new, "REPLICAOF", "NO", "ONE")
        self._front.lead_to(new.port)
        led_s = time.monotonic()
        old.kill()
        old.start()
        self._between.lead_to(new.port)
        self.primary, self.replica = new, old
        self._follow()
        return led_s

    def _follow(self) -> None:
        _command(self.replica, "REPLICAOF", "127.0.0.1", str(self._between.port))
        wait_until(lambda: _in_step(self.replica), "the replica is in step")


def _command(server: Server, *words: str) -> object:
    with Redis.from_url(server.url, protocol=2) as redis:  # pyright: ignore[reportUnknownMemberType]
        return cast("object", redis.execute_command(*words))  # pyright: ignore[reportUnknownMemberType]


def _in_step(server: Server) -> bool:
    told = cast("dict[str, object]", _command(server, "INFO", "replication"))
    return told.get("master_link_status") == "up"
