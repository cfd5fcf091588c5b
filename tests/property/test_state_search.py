"""All states of the queue protocol in a small scope: the short form of `make states`; see docs/job_states.md."""

from collections.abc import Callable, Iterator

import pytest

from protocols.queue.broker import LIBRARY
from tests.property.state_search import page
from tests.property.state_search.machine import Machine, replaced
from tests.property.state_search.mutants import MUTANTS, Mutant
from tests.property.state_search.scopes import SCOPES
from tests.property.state_search.search import Found, Search
from tests.property.state_search.world import Scope


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine("valkey", tmp_path_factory.mktemp("states"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def searched(machine: Machine) -> Callable[[Scope], Found]:
    """Search a scope, once."""
    found: dict[str, Found] = {}

    def search(scope: Scope) -> Found:
        if scope.name not in found:
            machine.load(LIBRARY)
            found[scope.name] = Search(machine, scope).run()
        return found[scope.name]

    return search


@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.name)
def test_no_state_breaks_a_claim(searched: Callable[[Scope], Found], scope: Scope) -> None:
    found = searched(scope)
    assert found.violation is None
    assert found.complete or found.depth == scope.depth


def test_the_page_names_every_transition(searched: Callable[[Scope], Found]) -> None:
    seen = frozenset[tuple[str, str, str]]().union(*(searched(scope).arrows for scope in SCOPES))
    assert seen - page.transitions() == set()


def test_the_page_names_every_guard() -> None:
    assert page.guards() == [mutant.guard for mutant in MUTANTS]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_a_missing_guard_is_found(machine: Machine, mutant: Mutant) -> None:
    machine.load(replaced(LIBRARY, mutant.old, mutant.new))
    found = Search(machine, mutant.scope).run()
    assert found.violation is not None
