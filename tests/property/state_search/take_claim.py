"""What must hold of a take."""

from collections.abc import Iterator
from typing import Any

from tests.property.state_search.case import Case
from tests.property.state_search.world import LEASE_MS, Right


def wrong_take(case: Case) -> Iterator[str]:
    gate, rows, hold, *again = case.answer
    begun = {row[1].decode(): row for row in rows}
    if case.before.desired["gate"] != "open":
        if rows or gate == b"open" or not case.idle:
            yield "something begins although the gate is closed"
        return
    for job, row in begun.items():
        yield from _wrong_row(case, job, row)
    if case.move.kind == "repeat":
        still = _still_held(case)
        if still:
            if begun.keys() != still or not case.idle:
                yield f"a repeated take gives {sorted(begun)} where it gave {sorted(still)}"
            return
    started = [job for job in case.touched if case.after.place(job) == "running"]
    if case.touched and set(started) != begun.keys():
        yield f"a take begins {started} and gives {sorted(begun)}"
    if len(started) > int(case.move.operations[0][3]):
        yield "a take begins more jobs than the worker has slots"
    for job in case.touched:
        yield from _wrong_taken(case, job, alone=len(started) == 1 and hold == 1)
    yield from _wrong_parked(case) if case.move.kind != "wait" else _wrong_wait(case, again)


def _wrong_wait(case: Case, again: list[int]) -> Iterator[str]:
    """Who waited may be frozen: it is given nothing where jobs wait to go on, and told so."""
    version = int(case.move.operations[0][5])
    parked = [job for job, at in case.before.sets["parked"].items() if at <= version]
    resumed = [entry for entry in case.before.entries.values() if entry.lane == "resume"]
    unread = [entry.job for entry in resumed if entry.state == "unread"]
    old = [*unread, *parked, *case.before.sets["alone"]]
    if again != [1] * bool(old):
        yield f"a take behind a wait says {again} of {old}"
    if old and (case.touched or not case.idle):
        yield f"a take behind a wait changes {case.touched} though {old} wait to go on"


def _wrong_parked(case: Case) -> Iterator[str]:
    """As many go on as the worker has slots for, of those whose version it has; the others stay untouched."""
    if case.move.kind != "take":
        return
    slots, version = int(case.move.operations[0][3]), int(case.move.operations[0][5])
    parked = case.before.sets["parked"]
    due = [job for job, at in parked.items() if at <= version]
    left = [job for job in due if case.after.place(job) == "parked"]
    if len(left) != max(0, len(due) - slots):
        yield f"a take leaves {left} parked of {due} whose version is there"
    early = set(case.touched) & (parked.keys() - set(due))
    if early:
        yield f"a take changes {sorted(early)}, parked for newer weights"


def _still_held(case: Case) -> set[str]:
    """Of the jobs that the lost answer gave, those that are still this attempt's."""
    assert case.world.wire
    rights = case.world.ghost.rights
    _, rows, *_ = case.world.wire.answer
    nonce = str(case.move.operations[0][2])
    return {row[1].decode() for row in rows if rights.get(row[1].decode()) == Right(nonce)}


def _wrong_row(case: Case, job: str, row: list[Any]) -> Iterator[str]:
    reply = case.after.replies[job]
    if row[2].decode() != reply.get("fence"):
        yield f"{job} is given with another fence than it has"
    given = [dict(zip(flat[::2], flat[1::2], strict=True)) for _, flat in row[6]]
    kept = [{k.encode(): v for k, v in entry.items()} for entry in case.after.progress.get(job, [])]
    if given != kept:
        yield f"{job} is given with {len(given)} of its {len(kept)} segments"


def _wrong_taken(case: Case, job: str, *, alone: bool) -> Iterator[str]:
    before, after = case.before.place(job), case.after.place(job)
    entry = case.before.own_entry(job) or case.after.own_entry(job)
    reply, holding = case.after.replies[job], int(case.move.operations[0][6])
    fields = case.before.entries[entry].fields if entry in case.before.entries else {}
    over = case.late(job, case.before.oldest(job))
    stopped, version = job in case.world.ghost.stopped, int(case.move.operations[0][5])
    young = int(fields.get("min_version", 0)) > version
    suspect = (
        case.scope.crash_limit > 2 and int(reply.get("crashes", 0)) == case.scope.crash_limit - 1
    )
    if before not in ("lane", "resume", "parked", "alone", "unknown"):
        yield f"a take changes {job}, which was {before}"
    if after == "running" and (over or stopped or young):
        why = (
            "is over its deadline or too stale"
            if over
            else "was cancelled"
            if stopped
            else "waits for weights"
        )
        yield f"{job} begins although it {why}"
    elif after == "running" and suspect and (holding or not alone):
        yield f"{job} begins beside others although it was lost {case.scope.crash_limit - 1} times in a row"
    elif after == "running" and case.after.sets["leases"].get(job) != case.now_ms + LEASE_MS:
        yield f"{job} begins without a whole lease"
    elif after == "parked" and (
        not young or case.after.sets["parked"][job] != int(fields["min_version"])
    ):
        yield f"{job} is parked and need not be"
    elif after == "ended" and reply.get("error") == "job_conflict" and not _conflicts(case, job):
        yield f"the copy {job} is refused and has the body of the job that it names"
    elif after == "ended" and reply["status"] != (
        "cancelled" if stopped else "expired" if over else "failed"
    ):
        yield f"{job} is not begun and has {reply['status']}"
    elif after == "ended" and over and not stopped and reply["error"] != over:
        yield f"{job} is not begun because of {over}, and is told {reply['error']}"


def _conflicts(case: Case, job: str) -> bool:
    entry = next(entry for entry in case.before.entries.values() if entry.entry == job)
    return case.after.replies[entry.job]["sha"] != entry.sha
