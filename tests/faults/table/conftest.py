"""What the fault tests share: short or full, the seed, workers that start quickly, and the table at the end."""

import os
import random
import secrets
from collections.abc import Callable, Generator, Iterator
from typing import Literal, cast

import pytest

from tests.faults.harness.fork import ForkedWorker, Nursery, StartFork
from tests.faults.harness.row import Row, lines_of
from tests.faults.harness.watch import Watch

Form = Literal["short", "full"]
FORM: Form = "full" if os.environ.get("ROLLOUTQ_FAULTS") == "full" else "short"
SEED = int(os.environ.get("ROLLOUTQ_SEED") or secrets.randbits(32))

_ROWS = pytest.StashKey[list[Row]]()
_ROW = pytest.StashKey[Row]()


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to bring about the numbers of docs/faults.md, or a few."""
    return FORM == "full"


@pytest.fixture
def seed() -> int:
    """Of all that a test draws by lot; `ROLLOUTQ_SEED` repeats one."""
    return SEED


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Lots of the test's own."""
    return random.Random(f"{seed}:{request.node.name}")


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[str], Row]:
    """Open this test's line of the table."""

    def opened(fault: str) -> Row:
        made = Row(fault)
        request.config.stash.setdefault(_ROWS, []).append(made)
        cast("pytest.Item", request.node).stash[_ROW] = made  # pyright: ignore[reportUnknownMemberType]
        return made

    return opened


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """One zygote for the whole run."""
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture
def fork(nursery: Nursery, url: str, pool: str) -> Iterator[StartFork]:
    """Start scripted workers of the test's pool; they are killed when it ends."""
    started: list[ForkedWorker] = []

    def start(**flags: float) -> ForkedWorker:
        started.append(nursery.start(url, pool, **flags))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
    print(nursery.log_tails())  # noqa: T201 - pytest shows it


@pytest.fixture
def look(url: str, pool: str) -> Iterator[Watch]:
    """The pool as its server has it."""
    made = Watch(url, pool)
    yield made
    made.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A line is met when its test has passed."""
    report = yield
    if call.when == "call" and _ROW in item.stash and report.passed:
        item.stash[_ROW].verdict = "met"
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    rows = config.stash.setdefault(_ROWS, [])
    if rows:
        terminalreporter.section(f"faults, {FORM} form, ROLLOUTQ_SEED={SEED}")
        for line in lines_of(rows):
            terminalreporter.write_line(line)
