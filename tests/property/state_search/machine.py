"""A real server that can be put into any state: what the search runs the real function library on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis

from protocols.queue.keys import BELL, GROUP, LANES, Keys
from tests.property.state_search.sight import NOTHING, Sight, sight_of
from tests.servers import Server, ServerKind

KEYS = Keys("search")
START_MS = 4_102_444_800_000
"""The clock of the first state, ahead of the server's own: so `*` gives the same stream ids in every run."""

_CLOCK = """local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
"""
_CLOCK_KEY = """local function now_ms()
  return tonumber(redis.call('GET', 'clock'))
end
"""
_HARNESS = Path(__file__).with_name("harness.lua").read_text()

_NOTHING = b"\x90"
"""An image without keys: an empty list in MessagePack."""

Operation = tuple[str | bytes, ...]
"""A step of the library and its arguments, or a plain command."""
Word = str | bytes | int


class Question(NamedTuple):
    """A state, and what to try in it: each time the clock and some operations."""

    image: bytes
    sight: Sight
    tries: Sequence[tuple[int, Sequence[Operation]]]


class Plea(NamedTuple):
    """A state that shall come to rest, after these operations."""

    image: bytes
    clock_ms: int
    operations: Sequence[Operation]


class Outcome(NamedTuple):
    """What some operations led to; `answers` in their order."""

    answers: list[Any]
    state: tuple[bytes, Sight] | None
    """Image and sight; None where nothing has changed."""


def replaced(library: str, old: str, new: str) -> str:
    """The library with one passage changed, which must be there just once."""
    found = library.count(old)
    assert found == 1, f"{found} times in the library: {old!r}"
    return library.replace(old, new)


class Machine:
    """One server; `load` a library first."""

    def __init__(self, kind: ServerKind, folder: Path) -> None:
        path = folder / "s"
        self._server = Server(kind, folder, ("--unixsocket", str(path)))
        self._server.start()
        self._redis: Any = Redis(unix_socket_path=str(path), protocol=2, socket_timeout=60)

    def close(self) -> None:
        """End the server."""
        self._redis.close()
        self._server.kill()

    def load(self, library: str) -> None:
        """Use this library: its clock becomes a key, the rest stays as it is."""
        text = replaced(library, _CLOCK, _CLOCK_KEY) + _HARNESS
        self._redis.execute_command("FUNCTION", "LOAD", "REPLACE", text)

    def empty_pool(self) -> tuple[bytes, Sight]:
        """A pool that is prepared and open."""
        operations: list[Operation] = [
            ("XGROUP", "CREATE", KEYS.jobs(lane), group, "0", "MKSTREAM")
            for lane in LANES
            for group in (GROUP, BELL)
        ]
        operations += [("XSETID", KEYS.jobs(lane), f"{START_MS}-0") for lane in LANES]
        operations.append(("HSET", KEYS.prefix, "schema", "1"))
        operations.append(("HSET", KEYS.desired, "gate", "open", "weights", "0"))
        ((outcome,),) = self.outcomes([Question(_NOTHING, NOTHING, [(START_MS, operations)])])
        assert outcome.state
        return outcome.state

    def outcomes(self, questions: Sequence[Question]) -> list[list[Outcome]]:
        """For each question what each of its tries leads to."""
        calls: list[list[Word]] = []
        for image, _, tries in questions:
            call: list[Word] = [image]
            for clock_ms, operations in tries:
                call += (clock_ms, *_flat(operations))
            calls.append(call)
        answers = self._calls("rolloutq_search", calls)
        return [
            [_outcome(question.sight, row) for row in rows]
            for question, rows in zip(questions, answers, strict=True)
        ]

    def rescues(
        self, pleas: Sequence["Plea"], rounds: int, round_ms: int, crash_limit: int
    ) -> list[Sight]:
        """What is there after a live worker had time to sweep, take and finish."""
        calls: list[list[Word]] = [
            [plea.image, plea.clock_ms, rounds, round_ms, crash_limit, *_flat(plea.operations)]
            for plea in pleas
        ]
        return [sight_of(view) for view in self._calls("rolloutq_rescue", calls)]

    def _calls(self, function: str, calls: Sequence[Sequence[Word]]) -> list[Any]:
        pipe: Any = self._redis.pipeline(transaction=False)
        for args in calls:
            pipe.execute_command("FCALL", function, 1, KEYS.prefix, *args)
        return pipe.execute()


def _outcome(before: Sight, row: list[Any]) -> Outcome:
    if len(row) == 1:
        return Outcome(row[0], None)
    answers, image, view, gone = row
    return Outcome(answers, (image, sight_of(view, gone, before)))


def _flat(operations: Sequence[Operation]) -> list[Word]:
    flat: list[Word] = [len(operations)]
    for operation in operations:
        flat += (len(operation), *operation)
    return flat
