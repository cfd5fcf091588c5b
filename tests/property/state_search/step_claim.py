"""What must hold of every step: what it may change, what it must answer, and who may write."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tests.property.state_search.case import Case
from tests.property.state_search.lease_claim import wrong_write
from tests.property.state_search.machine import Outcome
from tests.property.state_search.move import Move
from tests.property.state_search.sight import WAITING, Sight
from tests.property.state_search.sweep_claim import wrong_sweep
from tests.property.state_search.take_claim import wrong_take
from tests.property.state_search.world import Ghost, Right, Scope, World

TAKES = ("take", "half_take")
COUNTERS = ("attempts", "crashes", "fails", "handbacks", "checkpoints")

Transition = tuple[str, str, str]
"""Place, step, place."""


class Judged(NamedTuple):
    """What the claims say of one step."""

    wrong: str | None
    ghost: Ghost
    transitions: frozenset[Transition]


def judge(scope: Scope, world: World, move: Move, outcome: Outcome) -> Judged:
    """Try one step on the server against every claim."""
    after = outcome.state[1] if outcome.state else world.sight
    case = Case.of(scope, world, move, outcome.answers[0], after)
    failed = next((answer for answer in outcome.answers if isinstance(answer, Exception)), None)
    if failed is not None:
        return Judged(f"{move.step} fails: {failed}", world.ghost, frozenset())
    wrong = next(_wrongs(case), None)
    arrows = frozenset(
        (case.before.place(job), _name(move), case.after.place(job)) for job in case.touched
    )
    return Judged(wrong, _ghost(case), frozenset(a for a in arrows if a[0] != a[2]))


def _name(move: Move) -> str:
    if move.kind in ("half_read", "half_take"):
        return "take, half"
    return "time" if move.kind == "expire" else move.step


def _wrongs(case: Case) -> Iterator[str]:
    yield from _claims_of(case)
    yield from _wrong_counters(case)
    yield from _wrong_ends(case)


def _claims_of(case: Case) -> Iterator[str]:
    match case.move.step:
        case "enqueue":
            yield from _enqueue(case)
        case "take":
            yield from wrong_take(case)
        case "renew" | "finish" | "fail" | "release":
            yield from wrong_write(case)
        case "cancel":
            yield from _cancel(case)
        case "sweep":
            yield from wrong_sweep(case)
        case _:
            if case.touched and case.move.kind not in ("expire", "half_read", "half_take"):
                yield f"{case.move.label} changes {case.touched}"


def _enqueue(case: Case) -> Iterator[str]:
    job, sha = case.move.operations[0][1], case.move.operations[0][3]
    known, told = case.before.replies.get(str(job)), case.answer[0].decode()
    if known is None:
        if told != "queued" or case.touched != [job] or case.after.place(str(job)) != "lane":
            yield f"a new job is told {told} and is {case.after.place(str(job))}"
        return
    wanted = known["status"] if known["sha"] == sha else "conflict"
    if told != wanted:
        yield f"a known job is told {told}, not {wanted}"
    if not case.idle:
        yield "sending a known job changes something"


def _cancel(case: Case) -> Iterator[str]:
    job, told = str(case.move.operations[0][1]), case.answer[0].decode()
    before, after = case.before.place(job), case.after.place(job)
    reply = case.after.replies.get(job, {})
    if before in WAITING:
        if (told, after, reply.get("status")) != ("cancelled", "ended", "cancelled"):
            yield f"a waiting job is cancelled: told {told}, and it is {reply.get('status')}"
    elif before in ("running", "unleased"):
        if (told, after, reply.get("cancel")) != ("stopping", before, "1"):
            yield f"a running job is cancelled: told {told}, and it is {after}"
    elif told != case.before.replies.get(job, {"status": "unknown"})["status"] or not case.idle:
        yield f"cancelling a job that is {before} is told {told}"
    if set(case.touched) - {job}:
        yield f"cancelling {job} changes {case.touched}"


def _wrong_counters(case: Case) -> Iterator[str]:
    for job in case.touched:
        before, after = case.before.replies.get(job), case.after.replies.get(job)
        if after is None or (before is None and case.move.step not in TAKES):
            continue
        was = case.before.place(job)
        if was in ("ended", "tombstone"):
            yield from _wrong_memory(job, was, before or {}, after)
        for name, count in _counts(case, job, before or {}, after).items():
            if int(after.get(name, 0)) != count:
                yield f"{case.move.label}: `{name}` of {job} is {after.get(name, 0)}, not {count}"


def _counts(case: Case, job: str, before: dict[str, str], after: dict[str, str]) -> dict[str, int]:
    """What a job's counters should be."""
    step, was, now_is = case.move.step, case.before.place(job), case.after.place(job)
    counts = {name: int(before.get(name, 0)) for name in COUNTERS}
    grown = _kept_tokens(after) != _kept_tokens(before)
    counts["checkpoints"] += grown
    counts["attempts"] += step in TAKES and now_is in ("running", "unleased")
    counts["fails"] += step == "fail" and job not in case.world.ghost.stopped
    counts["handbacks"] += step == "release"
    counts["crashes"] += step == "sweep" and was == "running"
    return counts | ({"crashes": 0} if grown else {})


def _kept_tokens(reply: dict[str, str]) -> int:
    return sum(int(count) for name, count in reply.items() if name.startswith("kept:"))


def _wrong_memory(
    job: str, was: str, before: dict[str, str], after: dict[str, str]
) -> Iterator[str]:
    """What has ended stays as it is; of a tombstone body and state go, and what they were for."""
    gone = set(before) - set(after)
    changed = [name for name in after if after[name] != before.get(name)]
    allowed: set[str] = (
        {"body", "state", "inbox", "run", "fence", "entry", "lane"} if was == "ended" else set()
    )
    if changed or gone - allowed:
        yield f"the reply of {job} changed after its end: {sorted(gone | set(changed))}"


def _wrong_ends(case: Case) -> Iterator[str]:
    """Each end is told once, and a dead letter says why a job ended whose attempts did."""
    ended = [job for job in case.touched if _ends(case, job)]
    news = Counter(case.after.inbox) - Counter(case.before.inbox)
    told = Counter({word: count for word, count in news.items() if not word.startswith("+")})
    yield from _wrong_calls(case, set(news - told))
    if told != Counter(job for job in ended if "inbox" in case.after.replies[job]):
        yield f"{ended} ended and {sorted(told)} was told"
    gave_up = ("worker_lost", "engine_failed")
    dead = Counter(case.after.dead) - Counter(case.before.dead)
    if dead != Counter(job for job in ended if case.after.replies[job].get("error") in gave_up):
        yield f"{ended} ended and {sorted(dead)} became a dead letter"


def _wrong_calls(case: Case, called: set[str]) -> Iterator[str]:
    """The client is called when there are new frames of a job that goes on, and only then."""
    grown = {
        f"+{job}"
        for job in case.touched
        if "inbox" in case.after.replies.get(job, {})
        and case.move.step in ("renew", "fail", "release")
        and _framed(case.after, job) > _framed(case.before, job)
    }
    if called != grown:
        yield f"{case.move.label}: {sorted(grown)} have new frames and {sorted(called)} was called"


def _framed(sight: Sight, job: str) -> int:
    return sum("sse" in row for row in sight.progress.get(job, []))


def _ends(case: Case, job: str) -> bool:
    return case.after.place(job) == "ended" and case.before.place(job) not in ("ended", "tombstone")


def _ghost(case: Case) -> Ghost:
    """What the claims remember: whose lease it is, and whose wish to cancel was acknowledged."""
    rights, stopped = dict(case.world.ghost.rights), set(case.world.ghost.stopped)
    for job in case.touched:
        was, now_is = case.before.place(job), case.after.place(job)
        if (
            now_is == "unknown"
            or case.move.kind == "half_take"
            or (case.move.step == "sweep" and was == "running")
        ):
            rights.pop(job, None)
        elif case.move.step == "take" and now_is == "running":
            rights[job] = Right(str(case.move.operations[0][2]))
        elif _gives_up(case, job, was, now_is):
            rights[job] = rights[job]._replace(left_by=case.move.step)
        if now_is in ("running", "unleased") and "cancel" in case.after.replies[job]:
            stopped.add(job)
        elif now_is not in ("running", "unleased", *WAITING):
            stopped.discard(job)
    return Ghost(rights, frozenset(stopped))


def _gives_up(case: Case, job: str, was: str, now_is: str) -> bool:
    """Whether the holder has ended its attempt."""
    held, right = ("running", "unleased"), case.world.ghost.rights.get(job)
    ends = case.move.step in ("finish", "fail", "release") and was in held and now_is not in held
    return ends and right is not None and not right.left_by
