"""The full form: `python -m tests.property.state_search [--server redis]`. Exit code 1 where anything is amiss."""

import argparse
import sys
import tempfile
from pathlib import Path

from protocols.queue.broker import LIBRARY
from tests.property.state_search import page
from tests.property.state_search.machine import Machine, replaced
from tests.property.state_search.mutants import MUTANTS
from tests.property.state_search.scopes import SCOPES
from tests.property.state_search.search import Found, Search, Violation
from tests.property.state_search.step_claim import Transition

LIMIT_S = 60.0
"""Of one scope: a slow machine goes less deep, and says so."""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Search all scopes, then without each guard."""
    parser = argparse.ArgumentParser(description="Search all states of the queue protocol.")
    parser.add_argument("--server", choices=("valkey", "redis"), default="valkey")
    kind = parser.parse_args().server
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(kind, Path(folder))
        try:
            return 1 if _search_all(machine) + _search_without_guards(machine) else 0
        finally:
            machine.close()


def _search_all(machine: Machine) -> int:
    """How much was amiss with the library as it is."""
    machine.load(LIBRARY)
    found: list[Found] = []
    for scope in SCOPES:
        _say(f"{scope.name} …")
        deep = Search(machine, scope._replace(depth=scope.deep), _say).run(LIMIT_S)
        found.append(deep)
        _say(
            f"{scope.name}: {deep.states:,} states, {deep.transitions:,} transitions, depth {deep.depth}"
            f"{' (all there is)' if deep.complete else ''}, {deep.seconds:.0f} s, "
            f"violations: {_told(deep.violation)}"
        )
    broken = sum(one.violation is not None for one in found)
    states, transitions = sum(one.states for one in found), sum(one.transitions for one in found)
    _say(f"in all {states:,} states, {transitions:,} transitions, violations: {broken}")
    whole = all(
        one.complete or one.depth == scope.deep for one, scope in zip(found, SCOPES, strict=True)
    )
    return broken + _compare(
        frozenset[Transition]().union(*(one.arrows for one in found)), whole=whole
    )


def _compare(seen: frozenset[Transition], *, whole: bool) -> int:
    """How many transitions the page lacks; if the search was `whole`, also how many it has too many."""
    written = page.transitions()
    for arrow in sorted(seen - written):
        _say(f"not in docs/job_states.md: {' | '.join(arrow)}")
    for arrow in sorted(written - seen):
        _say(f"in docs/job_states.md and not seen: {' | '.join(arrow)}")
    return len(seen - written) + (len(written - seen) if whole else 0)


def _search_without_guards(machine: Machine) -> int:
    """How many guards may be missing without anybody noticing."""
    missed = 0
    for mutant in MUTANTS:
        machine.load(replaced(LIBRARY, mutant.old, mutant.new))
        found = Search(machine, mutant.scope).run(LIMIT_S)
        missed += found.violation is None
        _say(f"without {mutant.guard}: {_told(found.violation)}")
    machine.load(LIBRARY)
    _say(f"{len(MUTANTS) - missed} of {len(MUTANTS)} missing guards found")
    return missed


def _told(violation: Violation | None) -> str:
    if violation is None:
        return "0"
    return f"after {len(violation.path)} moves, {violation.wrong} ({'; '.join(violation.path)})"


if __name__ == "__main__":
    sys.exit(main())
