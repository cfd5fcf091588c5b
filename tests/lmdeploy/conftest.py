"""These tests run where lmdeploy is installed (`make test-lmdeploy`), and end with what its engine answered."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest

from tests.lmdeploy.summary import Show

collect_ignore_glob = [] if find_spec("lmdeploy") else ["test_*.py"]
SHOWN = "shown"


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Show:
    """Take text for the summary of the run."""
    return partial(record_property, SHOWN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for end in ("passed", "failed") for one in terminalreporter.getreports(end)]
    texts = [text for one in reports for name, text in one.user_properties if name == SHOWN]
    if texts:
        terminalreporter.section("what lmdeploy's own engine answered, on this CPU")
    for text in texts:
        terminalreporter.write_line(str(text))
