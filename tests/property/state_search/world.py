"""One state of the search: the server's keys, and what everybody else remembers."""

from typing import Any, NamedTuple

from protocols.queue.rows import body_hash
from tests.property.state_search.machine import Operation
from tests.property.state_search.sight import NO_VERSION, Sight

LEASE_MS = 15_000
DELAY_MS = 2_000
CLIENT = -1
PROTOCOL = "openai.chat"


class Kind(NamedTuple):
    """A job that the client may send."""

    job: str
    timeout_ms: int | None = None
    min_version: int | None = None
    max_staleness: int | None = None
    reply_ttl_ms: int | None = None
    tokens: tuple[int, ...] = (2,)
    """Most tokens that are generated of each sample."""
    streamed: bool = False
    """Whether each token comes with frames."""

    def fields(self, body: str = "body") -> tuple[str, ...]:
        """Its stream fields; another `body` makes it another job."""
        flat = ["body", f"{body} of {self.job}", "inbox", "c"]
        for name in ("timeout_ms", "min_version", "max_staleness", "reply_ttl_ms"):
            value = getattr(self, name)
            if value is not None:
                flat += [name, str(value)]
        return tuple(flat)

    def enqueue(self, body: str = "body") -> Operation:
        """The step that sends it."""
        fields = self.fields(body)
        sha = body_hash(PROTOCOL, fields[1].encode())
        return ("enqueue", self.job, "normal", sha, str(len(fields)), *fields)


class Scope(NamedTuple):
    """What one search looks at."""

    name: str
    kinds: tuple[Kind, ...]
    limits: dict[str, int]
    """How often each kind of move may be made on one path; those not named are not made."""
    depth: int
    """Most moves of a path in the short form."""
    deep: int = 0
    """And in the full one."""
    slots: tuple[int, ...] = (1, 2)
    versions: tuple[int, ...] = (0, 0)
    crash_limit: int = 3
    fail_limit: int = 2


class Attempt(NamedTuple):
    """What a worker remembers of one lease."""

    job: str
    fence: str
    nonce: str
    """Of the take that began it: the claims tell attempts by it, whatever their fences are."""
    written: tuple[int, ...]
    """Tokens of each sample that it believes the server to have."""
    drawn: tuple[int, ...]
    oldest: int = NO_VERSION
    """Policy version of the oldest of its tokens."""
    order: str = ""
    """`cancel`, `expire` or `stale`, once it was told."""
    ending: str = ""
    """The step that shall end it, while its answer is out."""


class Worker(NamedTuple):
    """One worker process."""

    attempts: tuple[Attempt, ...] = ()
    alone: str = ""
    """Takes nothing until it is idle, or until this job has a new checkpoint; `-` where no job was given yet."""


class Wire(NamedTuple):
    """A step that the server has executed and whose answer was lost."""

    who: int
    step: str
    operation: Operation
    targets: tuple[Attempt, ...]
    answer: Any
    """What it was; nobody but the claims knows."""
    heard: bool = False
    """Whether it was repeated: then only a copy may still be on its way."""


class Right(NamedTuple):
    """Who may write to a job, by what the claims have seen."""

    nonce: str
    left_by: str = ""
    """The step by which it gave the job up, if it did."""


class Ghost(NamedTuple):
    """What the claims remember of the server's history; goes back with it."""

    rights: dict[str, Right]
    stopped: frozenset[str]
    """Jobs whose cancel was acknowledged."""


NO_GHOST = Ghost({}, frozenset())


class Copy(NamedTuple):
    """A replica that has stopped to follow."""

    image: bytes
    sight: Sight
    ghost: Ghost


class World(NamedTuple):
    """All of it."""

    clock_ms: int
    image: bytes
    sight: Sight
    ghost: Ghost = NO_GHOST
    workers: tuple[Worker, ...] = (Worker(), Worker())
    wire: Wire | None = None
    copy: Copy | None = None
    sent: frozenset[str] = frozenset()
    """Jobs that the client expects a reply of."""
    seen: frozenset[str] = frozenset()
    """Jobs whose reply the client has, and has not said so."""
    spent: tuple[tuple[str, int], ...] = ()
    """How often each limited kind of move was made."""
    takes: int = 0
    """Makes each nonce another."""
    versions: tuple[int, ...] = (0, 0)
    """The policy version of each worker."""

    def used(self, kind: str) -> int:
        """How often a kind of move was made."""
        return dict(self.spent).get(kind, 0)
