"""What docs/job_states.md says, to be compared with what the search sees."""

from itertools import product
from pathlib import Path

from tests.property.state_search.step_claim import Transition

PAGE = Path(__file__).parents[3] / "docs" / "job_states.md"


def transitions() -> frozenset[Transition]:
    """Every row of the table of transitions; a cell may name several states."""
    return frozenset(
        (was, step, now)
        for came, step, went, *_ in _rows("state, step, state")
        for was, now in product(came.split(", "), went.split(", "))
    )


def guards() -> list[str]:
    """The guards that the page names."""
    return [guard for guard, *_ in _rows("guards")]


def _rows(name: str) -> list[list[str]]:
    table = PAGE.read_text().partition(f"<!-- tested: {name} -->")[2].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return rows[2:]
