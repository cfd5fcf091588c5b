"""What may happen next in a state: every move that a client, a worker, the network or the server can make."""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from protocols.queue.keys import GROUP
from tests.property.state_search.machine import KEYS, Operation
from tests.property.state_search.sight import NO_VERSION, Sight
from tests.property.state_search.world import (
    CLIENT,
    DELAY_MS,
    LEASE_MS,
    Attempt,
    Kind,
    Scope,
    World,
)

FREE = 99
"""As often as one likes."""
BY_HAND = "by_hand"
"""A field that marks the entries which no client sent."""
COLLECTED_MS = 600_000
STATUS = {"": "completed", "cancel": "cancelled", "expire": "expired", "stale": "expired"}
"""What an attempt answers, by the order that it was given."""
LAST_FRAMES = "done"
ANY_AGE_MS = "-1"
"""For how long an orphan must have been idle: at any time, so that no clock but ours matters."""


class Move(NamedTuple):
    """One step of one of them; where `operations` are none, the server has no part in it."""

    label: str
    kind: str
    """Under this name a scope limits it."""
    operations: tuple[Operation, ...] = ()
    who: int = CLIENT
    targets: tuple[Attempt, ...] = ()
    job: str = ""

    @property
    def step(self) -> str:
        """The step of the library that it is about."""
        return self.operations[0][0] if self.operations else ""  # pyright: ignore[reportReturnType]


def moves(scope: Scope, world: World) -> Iterator[Move]:
    """All moves that the scope allows in this state."""
    for move in (
        *_of_client(scope, world),
        *_of_workers(scope, world),
        *_of_network(world),
        *_of_server(scope, world),
    ):
        if scope.limits.get(move.kind, 0) > world.used(move.kind):
            yield move


def kind_of(scope: Scope, job: str) -> Kind:
    """What a job is like; a raw entry's is plain."""
    return next((kind for kind in scope.kinds if kind.job == job), Kind(job, tokens=(1,)))


# the client


def _of_client(scope: Scope, world: World) -> Iterator[Move]:
    sight = world.sight
    for kind in scope.kinds:
        job, place = kind.job, sight.place(kind.job)
        if job not in world.sent:
            yield Move(f"client sends {job}", "send", (kind.enqueue(),), job=job)
        elif place == "unknown" and job not in world.seen:
            yield Move(
                f"client misses {job} and sends it again", "send", (kind.enqueue(),), job=job
            )
        else:
            yield Move(f"client sends {job} once more", "again", (kind.enqueue(),), job=job)
        if place != "unknown":
            other = (kind.enqueue("another body"),)
            yield Move(f"client sends another body as {job}", "other", other, job=job)
            yield Move(f"client cancels {job}", "cancel", (("cancel", job),), job=job)
        if place == "ended" and job in world.sent - world.seen:
            yield Move(f"client sees the reply of {job}", "see", job=job)
        if job in world.seen:
            finished_ms = sight.replies.get(job, {}).get("finished_ms", str(world.clock_ms))
            collect = (("collect", job, finished_ms),)
            yield Move(f"client has collected {job}", "collect", collect, job=job)
    yield from _raw(scope, world)


def _raw(scope: Scope, world: World) -> Iterator[Move]:
    """XADD by hand: a job without an id, and copies of the first job with its body and another."""
    add = ("XADD", KEYS.jobs("normal"), f"{world.clock_ms}-*")
    first = scope.kinds[0]
    yield Move("XADD of a body", "raw", ((*add, "body", "raw", BY_HAND, "1"),))
    bad = (*add, "id", "no id", "body", "raw", BY_HAND, "1")
    yield Move("XADD of a body with a bad id", "raw_bad", (bad,))
    for kind, body in (("raw_same", "body"), ("raw_other", "another body")):
        fields = first.fields(body)
        yield Move(
            f"XADD of {body} as {first.job}",
            kind,
            ((*add, "id", first.job, *fields, BY_HAND, "1"),),
        )


# workers


def _of_workers(scope: Scope, world: World) -> Iterator[Move]:
    for who, worker in enumerate(world.workers):
        out = (
            world.wire.step if world.wire and world.wire.who == who and not world.wire.heard else ""
        )
        held = len(worker.attempts)
        if not worker.alone and out != "take":
            for slots in (slots for slots in scope.slots if held + slots <= 2):
                yield from _takes(world, who, slots, held)
        for attempt in worker.attempts:
            yield from _ends(scope, who, attempt, world.versions[who])
            if out != "renew":
                yield from _renewals(scope, world, who, attempt)
        if len({attempt.job for attempt in worker.attempts}) > 1:
            yield from _batches(scope, world, who, worker.attempts, out)
        if held or worker.alone or out:
            yield Move(f"w{who} crashes", "crash", who=who)
    yield from _broken_takes(world)


def _takes(world: World, who: int, slots: int, held: int) -> Iterator[Move]:
    nonce, version = f"n{world.takes}", str(world.versions[who])
    rest = (nonce, str(slots), str(LEASE_MS), version)
    take = ("take", f"w{who}", *rest, str(held))
    yield Move(f"w{who} takes up to {slots}", "take", (take,), who)
    yield Move(f"w{who} takes up to {slots} behind a wait", "wait", ((*take, "1"),), who)


def _broken_takes(world: World) -> Iterator[Move]:
    """Redis does not roll a function back: a take may die in its middle, nobody gets its jobs."""
    unread = [entry for entry in world.sight.entries.values() if entry.state == "unread"]
    for lane in sorted({entry.lane for entry in unread}):
        group = ("GROUP", GROUP, "broken", "COUNT", "1")
        read = ("XREADGROUP", *group, "STREAMS", KEYS.jobs(lane), ">")
        yield Move(f"a take dies after it has read {lane}", "half_read", (read,))
    version = max(world.versions)
    parked = [job for job, at in world.sight.sets["parked"].items() if at <= version][:1]
    alone = list(world.sight.sets["alone"])[:1]
    for key, job in ((KEYS.parked, parked), (KEYS.alone, alone)):
        for one in job:
            out = ("ZREM", key, one)
            yield Move(f"a take dies after it has let {one} out", "half_read", (out,))
    if unread or alone or parked:
        nonce = f"n{world.takes}"
        take = ("half_take", "broken", nonce, "1", str(LEASE_MS), str(version), "0")
        yield Move("a take dies before it has leased", "half_take", (take,))


def _ends(scope: Scope, who: int, attempt: Attempt, version: int) -> Iterator[Move]:
    """An attempt with an unanswered end may think again and finish; it must not count."""
    kind = "doubt" if attempt.ending else ""
    if attempt.ending != "finish":
        whole = (_grown(scope, attempt, version),)
        yield Move(
            f"w{who} finishes {attempt.job}",
            kind or "finish",
            (_finish(scope, whole, version),),
            who,
            whole,
        )
    if not attempt.ending and not attempt.order:
        for step in ("fail", "release"):
            target, operation = _give_up(scope, step, (attempt,), version)
            yield Move(f"w{who} {step}s {attempt.job}", step, (operation,), who, target)


def _renewals(scope: Scope, world: World, who: int, attempt: Attempt) -> Iterator[Move]:
    job, version = attempt.job, world.versions[who]
    renewal = ("renew", str(LEASE_MS), *_hold(scope, attempt, version))
    yield Move(f"w{who} renews {job}", "renew", (renewal,), who, (attempt,))
    for index, most in enumerate(kind_of(scope, job).tokens):
        if attempt.drawn[index] < most and not attempt.ending:
            grown = _drawn(attempt, index, version)
            renewal = ("renew", str(LEASE_MS), *_hold(scope, grown, version))
            label = f"w{who} checkpoints token {grown.drawn[index]} of {job}"
            yield Move(label, "checkpoint", (renewal,), who, (grown,))


def _batches(
    scope: Scope, world: World, who: int, attempts: Sequence[Attempt], out: str
) -> Iterator[Move]:
    free = tuple(attempt for attempt in attempts if not attempt.ending)
    if len(free) == len(attempts):
        whole = tuple(_grown(scope, attempt, world.versions[who]) for attempt in free)
        yield Move(
            f"w{who} finishes both",
            "both",
            (_finish(scope, whole, world.versions[who]),),
            who,
            whole,
        )
        target, operation = _give_up(scope, "release", free, world.versions[who])
        yield Move(f"w{who} releases both", "both", (operation,), who, target)
    if out != "renew":
        holds = [
            part for attempt in attempts for part in _hold(scope, attempt, world.versions[who])
        ]
        renew = ("renew", str(LEASE_MS), *holds)
        yield Move(f"w{who} renews both", "both", (renew,), who, tuple(attempts))


def _finish(scope: Scope, attempts: Sequence[Attempt], version: int) -> Operation:
    """Of each its answer, or the error that it was ordered to end with; the fence is both body and state."""
    words: list[str | bytes] = []
    for attempt in attempts:
        status, oldest = STATUS[attempt.order], attempt.oldest
        versions = ("", "") if oldest == NO_VERSION else (str(oldest), str(oldest))
        words += [attempt.job, attempt.fence, status, "200", attempt.fence, attempt.fence]
        words += versions
        more: list[str | bytes] = []
        if kind_of(scope, attempt.job).streamed and not attempt.order:
            stream = (LAST_FRAMES, str(sum(attempt.drawn)), *_segments(scope, attempt, version))
            more = ["", *stream, "", "0"]
        words += [str(len(more)), *more]
    return ("finish", *words)


def _give_up(
    scope: Scope, step: str, attempts: Sequence[Attempt], version: int
) -> tuple[tuple[Attempt, ...], Operation]:
    """`fail` or `release`, each with one more token where there is one."""
    grown = tuple(_grown(scope, attempt, version) for attempt in attempts)
    if step == "release":
        return grown, (
            "release",
            *(part for attempt in grown for part in _hold(scope, attempt, version)),
        )
    (attempt,) = grown
    return grown, (
        "fail",
        str(scope.fail_limit),
        *_hold(scope, attempt, version),
        str(DELAY_MS),
        "broke",
    )


def _grown(scope: Scope, attempt: Attempt, version: int) -> Attempt:
    """With one more token of the first sample, if it may have one."""
    most = kind_of(scope, attempt.job).tokens[0]
    return _drawn(attempt, 0, version) if attempt.drawn[0] < most else attempt


def _drawn(attempt: Attempt, index: int, version: int) -> Attempt:
    drawn = tuple(n + (at == index) for at, n in enumerate(attempt.drawn))
    return attempt._replace(drawn=drawn, oldest=min(attempt.oldest, version))


def _hold(scope: Scope, attempt: Attempt, version: int) -> Iterator[str | bytes]:
    """As `rows.hold_args`."""
    yield from (attempt.job, attempt.fence)
    yield from _segments(scope, attempt, version)


def _segments(scope: Scope, attempt: Attempt, version: int) -> Iterator[str | bytes]:
    """For each sample one segment of all that the server seems to lack; of a stream, one a token."""
    streamed = kind_of(scope, attempt.job).streamed
    new = [
        (index, at, at + 1 if streamed else end)
        for index, (start, end) in enumerate(zip(attempt.written, attempt.drawn, strict=True))
        for at in (range(start, end) if streamed else (start,))
        if end > start
    ]
    yield str(len(new))
    for index, start, end in new:
        yield from (str(index), str(start), str(end - start), str(version))
        yield from tokens(attempt.job, index, start, end)
        yield ""
        yield frames(index, start, end) if streamed else ""


def frames(index: int, start: int, end: int) -> str:
    """What stands for the frames of some tokens."""
    return f"{index}:{start}-{end}"


def tokens(job: str, index: int, start: int, end: int) -> tuple[bytes, bytes, bytes, bytes]:
    """Ids, log-probabilities and two alternatives of each of a sample's tokens; every attempt draws the same."""
    ids = [ord(job[0]) * 1000 + index * 100 + at for at in range(start, end)]
    alternatives = [number for one in ids for number in (one + 10, one + 20)]
    return (
        struct.pack(f"<{len(ids)}I", *ids),
        struct.pack(f"<{len(ids)}f", *ids),
        struct.pack(f"<{len(alternatives)}I", *alternatives),
        struct.pack(f"<{len(alternatives)}f", *alternatives),
    )


# the network


def _of_network(world: World) -> Iterator[Move]:
    wire = world.wire
    if wire is None:
        return
    who = "client" if wire.who == CLIENT else f"w{wire.who}"
    if not wire.heard:
        yield Move(
            f"{who} repeats its {wire.step}", "repeat", (wire.operation,), wire.who, wire.targets
        )
    yield Move(
        f"a late copy of {who}'s {wire.step} arrives",
        "late",
        (wire.operation,),
        wire.who,
        wire.targets,
    )


# the server and its clock


def _of_server(scope: Scope, world: World) -> Iterator[Move]:
    sight = world.sight
    yield Move("sweep", "sweep", (("sweep", "100", str(scope.crash_limit), "1", ANY_AGE_MS),))
    due_ms = next_event_ms(sight, world.clock_ms)
    if due_ms is not None:
        yield Move(f"{due_ms - world.clock_ms} ms pass", "tick")
    if world.copy is None:
        yield Move("a replica falls behind", "copy")
    else:
        yield Move("it becomes the master", "failover")
    yield Move("the server loses everything", "flush")
    closed = sight.desired["gate"] != "open"
    gate = ("HSET", KEYS.desired, "gate", "open" if closed else "closed")
    yield Move("continue" if closed else "pause", "continue" if closed else "pause", (gate,))
    weights = str(int(sight.desired["weights"]) + 1)
    publish = (("HSET", KEYS.desired, "weights", weights),)
    yield Move(f"weights {weights} are published", "publish", publish)
    for job in sight.replies:
        if sight.place(job) in ("ended", "tombstone"):
            yield Move(f"the reply of {job} expires", "expire", (_expiry(sight, job),), job=job)


def _expiry(sight: Sight, job: str) -> Operation:
    """The reply goes, and the progress stream with it unless that is kept for longer."""
    reply, progress = KEYS.reply(job), f"{KEYS.prefix}:progress:{job}"
    longer = sight.passing.get(progress, 0) > sight.passing.get(reply, 0)
    return ("DEL", reply) if longer else ("DEL", reply, progress)


def next_event_ms(sight: Sight, now_ms: int) -> int | None:
    """When the next lease, delay, deadline, claim or tombstone is due; None where nothing is."""
    due = [at for name in ("leases", "delayed", "deadlines") for at in sight.sets[name].values()]
    due += [at + COLLECTED_MS for at in sight.sets["collected"].values()]
    due += [int(sight.pool.get("alone_until_ms", 0))]
    return min((at for at in due if at > now_ms), default=None)
