"""A gateway as a process: its socket, its signals, its end."""

import asyncio
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from producer_sdk.client import Client
from producer_sdk.gateway.app import Gateway
from producer_sdk.gateway.connection import connections
from producer_sdk.gateway.intake import HEAD_BYTES
from producer_sdk.gateway.patience import Leaving
from producer_sdk.gateway.settings import Settings
from protocols.errors import ConfigError

PARSER_BYTES = 2 * HEAD_BYTES
"""More, with the request line, is no head at all: the parser ends it, not we."""
KEEP_ALIVE_S = 75
AFTER_GRACE_S = 5
"""For last words, once the grace is over."""
BACKLOG = 4096


def bound(settings: Settings) -> socket.socket:
    """The socket of this very address; raises ConfigError where it is taken, or none of this machine's."""
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError:
        raise ConfigError(f"host {host}: no address of this machine", param="host") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"port {port} on {host} cannot be had ({error.strerror}); end what has it, or name another with --port",
            param="port",
        ) from None
    listening.setblocking(False)
    return listening


def serve(client: Client, control: Client, settings: Settings, listening: socket.socket) -> bool:
    """Answer requests until a signal comes and what is open has ended; whether it was Ctrl-C."""
    leaving = Leaving()
    gateway = Gateway(client, control, settings, leaving, address_of(settings))
    server = _Server(gateway, settings, leaving)
    server.run(sockets=[listening])
    return server.interrupted


def address_of(settings: Settings) -> str:
    """As a client is told it."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


class _Server(uvicorn.Server):
    """Uvicorn, with signals that let open requests end, and then end them with last words."""

    def __init__(self, gateway: Gateway, settings: Settings, leaving: Leaving) -> None:
        super().__init__(
            uvicorn.Config(
                gateway,
                http=connections(settings.arrival_s),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=PARSER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.grace_s) + AFTER_GRACE_S,
                backlog=BACKLOG,
            )
        )
        self._grace_s, self._leaving = settings.grace_s, leaving
        self.interrupted = False

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """SIGTERM and Ctrl-C begin the end; a second Ctrl-C is the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, number)
        yield
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _leave(self, number: signal.Signals) -> None:
        if number is signal.SIGINT:
            self.force_exit = self.interrupted
            self.interrupted = True
        if not self._leaving.begun:
            self._leaving.begun = True
            asyncio.get_running_loop().call_later(self._grace_s, self._leaving.end)
        self.should_exit = True
