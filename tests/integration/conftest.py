"""The queue's fixtures for this folder, and the command."""

from collections.abc import Callable

import pytest

from producer_sdk import Client
from producer_sdk.cli import run
from tests.command import Ran, Rolloutq
from tests.http_door import Door, GatewayDoor, TransportDoor
from tests.queue_fixtures import (
    broker,
    client,
    look,
    nothing_left,
    serve,
    standing,
    standing_gateways,
    standing_pools,
    take,
)
from tests.servers import ServerKind


@pytest.fixture(params=["transport", "gateway"])
def door(
    request: pytest.FixtureRequest,
    client: Client,
    server_kind: ServerKind,
    standing_gateways: Callable[[ServerKind], str],
) -> Door:
    """The ways in for an unmodified client."""
    if request.param == "transport":
        return TransportDoor(client)
    return GatewayDoor(standing_gateways(server_kind))


@pytest.fixture
def rolloutq(url: str, pool: str, capsys: pytest.CaptureFixture[str]) -> Rolloutq:
    """Run a command on the test's own pool, unless its words say another."""

    def ran(*words: str) -> Ran:
        where = {"--url": url, "--pool": pool}
        given = [
            word for flag, value in where.items() if flag not in words for word in (flag, value)
        ]
        capsys.readouterr()
        code = run([*words, *given])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return ran


__all__ = [
    "broker",
    "client",
    "look",
    "nothing_left",
    "rolloutq",
    "serve",
    "standing",
    "standing_gateways",
    "standing_pools",
    "take",
]
