"""The queue's fixtures for this folder, and the table of faults that is printed after the tests."""

from collections.abc import Callable

import pytest

from tests.queue_fixtures import (
    broker,
    client,
    look,
    nothing_left,
    serve,
    standing,
    standing_pools,
    take,
)
from tests.servers import ServerKind

Report = Callable[..., None]

_rows = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request: pytest.FixtureRequest, server_kind: ServerKind) -> Report:
    """Add a line to the table: what was tried and happened, what was lost and doubled, how long it took."""

    def line(
        fault: str, *, tried: int, happened: int, lost: int, double: int, recovery_s: float
    ) -> None:
        rows = request.config.stash.setdefault(_rows, [])
        rows.append(
            f"{fault:<40} {server_kind:<7} tried {tried:>5}  happened {happened:>5}  "
            f"lost {lost:>3}  double {double:>3}  recovery {recovery_s:5.1f} s"
        )

    return line


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for row in config.stash.setdefault(_rows, []):
        terminalreporter.write_line(row)


__all__ = [
    "broker",
    "client",
    "look",
    "nothing_left",
    "serve",
    "standing",
    "standing_pools",
    "take",
]
