"""Breadth first through every state within a scope, on a real server."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.property.state_search.canon import digest, server_digest
from tests.property.state_search.machine import (
    KEYS,
    START_MS,
    Machine,
    Operation,
    Outcome,
    Plea,
    Question,
)
from tests.property.state_search.memory import next_worlds, quiet_world
from tests.property.state_search.move import Move, moves
from tests.property.state_search.state_claim import wrong_rest, wrong_state
from tests.property.state_search.step_claim import Transition, judge
from tests.property.state_search.world import Scope, World

ROUNDS = 8
ROUND_MS = 31_000
PROGRESS_S = 5.0
CHUNK = 32
"""States that are expanded in one exchange with the server."""

Report = Callable[[str], object]
Parents = dict[bytes, tuple[bytes, str]]
Node = tuple[World, bytes]
"""A state and its digest."""


class Violation(NamedTuple):
    """The shortest way to something that must not be."""

    wrong: str
    path: tuple[str, ...]


class Found(NamedTuple):
    """What a search saw."""

    states: int
    transitions: int
    depth: int
    """Every path of so many moves was walked."""
    complete: bool
    """Whether no longer path leads to another state."""
    violation: Violation | None
    arrows: frozenset[Transition]
    seconds: float


class Search:
    """One scope on one machine, whose library is loaded."""

    def __init__(self, machine: Machine, scope: Scope, report: Report = lambda _: None) -> None:
        self._machine, self._scope, self._report = machine, scope, report
        self._empty = machine.empty_pool()
        self._halves = any(scope.limits.get(kind) for kind in ("half_read", "half_take"))
        self._parents: Parents = {}
        self._rested: set[tuple[bytes, frozenset[str]]] = set()
        self._arrows: set[Transition] = set()
        self._transitions = 0
        self._violation: Violation | None = None

    def run(self, limit_s: float = 3600.0) -> Found:
        """Search until a violation, the depth, the end of all states or the time limit."""
        began_s = told_s = time.monotonic()
        image, sight = self._empty
        first = World(START_MS, image, sight, versions=self._scope.versions)
        self._parents[digest(first)] = (b"", "")
        frontier, depth = [(first, digest(first))], 0
        while frontier and depth < self._scope.depth:
            following: list[Node] = []
            for start in range(0, len(frontier), CHUNK):
                following += self._expand(frontier[start : start + CHUNK])
                now_s = time.monotonic()
                if self._violation is not None or now_s - began_s > limit_s:
                    return self._found(depth, following, began_s)
                if now_s - told_s > PROGRESS_S:
                    told_s = now_s
                    self._report(
                        f"  {self._scope.name}: depth {depth}, {len(self._parents):,} states"
                    )
            frontier, depth = following, depth + 1
        return self._found(depth, frontier, began_s)

    def _found(self, depth: int, frontier: list[Node], began_s: float) -> Found:
        counts = len(self._parents), self._transitions, depth, not frontier
        return Found(*counts, self._violation, frozenset(self._arrows), time.monotonic() - began_s)

    def _expand(self, nodes: list[Node]) -> list[Node]:
        """The new states that follow from some."""
        plans = [list(moves(self._scope, world)) for world, _ in nodes]
        questions = [
            Question(
                *(world.image, world.sight),
                [(world.clock_ms, move.operations) for move in plan if move.operations],
            )
            for (world, _), plan in zip(nodes, plans, strict=True)
        ]
        found: list[Node] = []
        for (world, key), plan, outcomes in zip(
            nodes, plans, self._machine.outcomes(questions), strict=True
        ):
            for label, following in self._follow(world, key, plan, iter(outcomes)):
                node = None if following == world else self._add(key, label, following)
                if node is not None:
                    found.append(node)
            if self._violation is not None:
                return found
        self._check_rest(found)
        return found

    def _follow(
        self, world: World, key: bytes, plan: list[Move], outcomes: Iterator[Outcome]
    ) -> Iterator[tuple[str, World]]:
        """Every world that follows from one; stops where a claim is broken."""
        self._transitions += len(plan)
        for move in plan:
            if not move.operations:
                yield move.label, quiet_world(self._scope, world, move, self._empty)
                continue
            outcome = next(outcomes)
            wrong, ghost, arrows = judge(self._scope, world, move, outcome)
            self._arrows |= arrows
            if wrong is None and outcome.state:
                wrong = wrong_state(outcome.state[1], halves=self._halves)
            if wrong is not None:
                self._violate(wrong, key, move.label)
                return
            for suffix, following in next_worlds(self._scope, world, move, outcome, ghost):
                yield move.label + suffix, following

    def _add(self, parent: bytes, label: str, world: World) -> Node | None:
        """Remember a state; nothing where it is known."""
        key = digest(world)
        if key in self._parents or self._violation is not None:
            return None
        self._parents[key] = (parent, label)
        return world, key

    def _check_rest(self, nodes: list[Node]) -> None:
        """Whether every accepted job ends where a live worker has time; the client sends what was lost again."""
        waiting: list[Node] = []
        for world, key in nodes:
            rested = server_digest(world), world.sent - world.seen
            if rested not in self._rested:
                self._rested.add(rested)
                waiting.append((world, key))
        pleas = [Plea(world.image, world.clock_ms, self._again(world)) for world, _ in waiting]
        sights = self._machine.rescues(pleas, ROUNDS, ROUND_MS, self._scope.crash_limit)
        for (world, key), sight in zip(waiting, sights, strict=True):
            unanswered = [job for job in world.sent - world.seen if job not in sight.replies]
            wrong = (
                f"{unanswered} never gets a reply" if unanswered else wrong_rest(world.sight, sight)
            )
            if wrong is not None:
                self._violate(wrong, key, "nothing but time, a live worker and its sweeps")
                return

    def _again(self, world: World) -> list[Operation]:
        again: list[Operation] = [
            kind.enqueue() for kind in self._scope.kinds if kind.job in world.sent - world.seen
        ]
        return [*again, ("HSET", KEYS.desired, "gate", "open")]

    def _violate(self, wrong: str, parent: bytes, label: str) -> None:
        path = [label]
        while parent:
            parent, label = self._parents[parent]
            path.append(label)
        self._violation = Violation(wrong, tuple(reversed([step for step in path if step])))
