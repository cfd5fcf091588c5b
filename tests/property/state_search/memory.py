"""What everybody remembers after a move: the next world."""

from collections.abc import Iterator
from typing import Any

from tests.property.state_search.machine import Outcome
from tests.property.state_search.move import FREE, Move, kind_of, next_event_ms
from tests.property.state_search.sight import NO_VERSION, Sight
from tests.property.state_search.world import (
    CLIENT,
    NO_GHOST,
    Attempt,
    Copy,
    Ghost,
    Scope,
    Wire,
    Worker,
    World,
)

_LOSABLE = ("enqueue", "take", "renew", "finish", "fail", "release", "cancel")


def quiet_world(scope: Scope, world: World, move: Move, empty: tuple[bytes, Sight]) -> World:
    """After a move that is no operation of the server."""
    world = _spend(scope, world, move.kind)
    match move.kind:
        case "see":
            return world._replace(seen=world.seen | {move.job})
        case "tick":
            due_ms = next_event_ms(world.sight, world.clock_ms)
            assert due_ms is not None
            return world._replace(clock_ms=due_ms)
        case "crash":
            wire = world.wire
            if wire and wire.who == move.who:
                wire = wire._replace(heard=True) if scope.limits.get("late") else None
            return _with_worker(world, move.who, Worker())._replace(wire=wire)
        case "copy":
            return world._replace(copy=Copy(world.image, world.sight, world.ghost))
        case "failover":
            assert world.copy
            image, sight, ghost = world.copy
            return world._replace(image=image, sight=sight, ghost=ghost, copy=None)
        case "flush":
            return world._replace(image=empty[0], sight=empty[1], ghost=NO_GHOST)
        case _:
            raise AssertionError(move.kind)


def next_worlds(
    scope: Scope, world: World, move: Move, outcome: Outcome, ghost: Ghost
) -> Iterator[tuple[str, World]]:
    """After a move on the server: its answer arrives, or it is lost. With each what to call it."""
    image, sight = outcome.state or (world.image, world.sight)
    server = _spend(scope, world, move.kind)._replace(image=image, sight=sight, ghost=ghost)
    answer = outcome.answers[0]
    fresh = server._replace(takes=world.takes + 1)  # the next take's nonce is another
    if move.step == "half_take" or (move.step == "take" and answer[1]):
        server = fresh
    if move.kind == "late":
        assert world.wire
        yield "", server._replace(wire=None if world.wire.heard else world.wire)
        return
    told = _told(scope, server, move, answer)
    if move.kind == "repeat":
        assert world.wire
        late = scope.limits.get("late", 0) > world.used("late")
        told = told._replace(wire=world.wire._replace(heard=True) if late else None)
    yield "", told
    losable = move.step in _LOSABLE and move.kind != "repeat"
    if losable and world.wire is None and scope.limits.get("lost", 0) > world.used("lost"):
        wire = Wire(move.who, move.step, move.operations[0], move.targets, answer)
        waiting = _mark(fresh, move, move.step) if move.who != CLIENT else fresh
        yield " (the answer is lost)", _spend(scope, waiting, "lost")._replace(wire=wire)


def _spend(scope: Scope, world: World, kind: str) -> World:
    if scope.limits.get(kind, 0) >= FREE or kind in ("send", "see"):
        return world
    spent = dict(world.spent)
    spent[kind] = spent.get(kind, 0) + 1
    return world._replace(spent=tuple(sorted(spent.items())))


def _with_worker(world: World, who: int, worker: Worker) -> World:
    workers = list(world.workers)
    workers[who] = worker
    return world._replace(workers=tuple(workers))


def _mark(world: World, move: Move, step: str) -> World:
    """Remember what was drawn; and, where a job's end was sent, that its answer is out."""
    worker = world.workers[move.who]
    targets = {target.nonce: target for target in move.targets}
    ending = step if step in ("finish", "fail", "release") else ""
    attempts = tuple(
        a._replace(drawn=grown.drawn, oldest=grown.oldest, ending=ending or a.ending)
        if (grown := targets.get(a.nonce))
        else a
        for a in worker.attempts
    )
    return _with_worker(world, move.who, worker._replace(attempts=attempts))


def _told(scope: Scope, world: World, move: Move, answer: Any) -> World:  # noqa: ANN401
    """The answer reaches whoever asked."""
    match move.step:
        case "enqueue" if move.kind in ("send", "again"):
            return world._replace(sent=world.sent | {move.job})
        case "collect":
            return world._replace(seen=world.seen - {move.job})
        case "take":
            return _taken(scope, world, move, answer)
        case "renew":
            return _renewed(world, move, answer)
        case "finish" | "fail" | "release":
            nonces = {target.nonce for target in move.targets}
            worker = world.workers[move.who]
            left = tuple(a for a in worker.attempts if a.nonce not in nonces)
            return _with_worker(world, move.who, Worker(left, worker.alone if left else ""))
        case _:
            return world


def _taken(scope: Scope, world: World, move: Move, answer: Any) -> World:  # noqa: ANN401
    worker, (_, rows, hold, *_) = world.workers[move.who], answer
    begun: list[Attempt] = []
    nonce = str(move.operations[0][2])
    for _, raw_job, raw_fence, _, _, _, kept, _ in rows:
        job, fence = raw_job.decode(), raw_fence.decode()
        counts, oldest = [0 for _ in kind_of(scope, job).tokens], NO_VERSION
        for _, flat in kept:
            segment = dict(zip(flat[::2], flat[1::2], strict=True))
            counts[int(segment[b"i"])] += len(segment[b"t"]) // 4
            oldest = min(oldest, int(segment[b"v"]))
        begun.append(Attempt(job, fence, nonce, tuple(counts), tuple(counts), oldest))
    attempts = worker.attempts + tuple(begun)
    alone = (begun[0].job if begun else "-") if hold == 1 and attempts else ""
    return _with_worker(world, move.who, Worker(attempts, alone))


def _renewed(world: World, move: Move, answers: list[bytes]) -> World:
    """As LeaseKeeper._renew and what the pipeline makes of an order."""
    worker = _mark(world, move, "renew").workers[move.who]
    told = {t.nonce: (t, a) for t, a in zip(move.targets, answers, strict=True)}
    attempts: list[Attempt] = []
    alone = worker.alone
    for attempt in worker.attempts:
        target, answer = told.get(attempt.nonce, (attempt, b""))
        if answer == b"gap":
            attempts.append(attempt._replace(written=tuple(0 for _ in attempt.written)))
        elif answer == b"held":
            if target.job == alone and target.drawn != target.written:
                alone = ""
            attempts.append(attempt._replace(written=target.drawn))
        elif answer in (b"cancel", b"expire", b"stale"):
            attempts.append(attempt._replace(order=attempt.order or answer.decode()))
        elif answer != b"lost":
            attempts.append(attempt)
    return _with_worker(world, move.who, Worker(tuple(attempts), alone if attempts else ""))
