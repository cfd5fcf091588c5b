"""One step under trial, with what was before and after it."""

from typing import Any, NamedTuple

from tests.property.state_search.move import Move, kind_of
from tests.property.state_search.sight import Sight
from tests.property.state_search.world import Scope, World


class Case(NamedTuple):
    """One step under trial."""

    scope: Scope
    world: World
    move: Move
    answer: Any
    before: Sight
    after: Sight
    touched: list[str]
    """Jobs that the step changed."""

    @property
    def now_ms(self) -> int:
        """The server's clock."""
        return self.world.clock_ms

    @property
    def idle(self) -> bool:
        """Whether the step changed nothing that matters."""
        before, after = self.before, self.after
        return before is after or all(
            getattr(before, name) == getattr(after, name)
            for name in ("replies", "entries", "sets", "progress", "inbox", "dead", "desired")
        )

    def late(self, job: str, oldest: int) -> str:
        """Why a job whose oldest token is of that version shall not go on: its error, or nothing."""
        if int(self.before.replies.get(job, {}).get("deadline_ms", self.now_ms + 1)) <= self.now_ms:
            return "deadline_exceeded"
        most, wanted = kind_of(self.scope, job).max_staleness, int(self.before.desired["weights"])
        return "" if most is None or wanted - oldest <= most else "staleness_exceeded"

    @classmethod
    def of(cls, scope: Scope, world: World, move: Move, answer: Any, after: Sight) -> "Case":  # noqa: ANN401
        """The case of a step that led to `after`."""
        return cls(scope, world, move, answer, world.sight, after, _touched(world.sight, after))


def _touched(before: Sight, after: Sight) -> list[str]:
    if before is after:
        return []
    return [
        job
        for job in dict.fromkeys((*before.replies, *after.replies))
        if before.replies.get(job) != after.replies.get(job)
        or before.place(job) != after.place(job)
    ]
