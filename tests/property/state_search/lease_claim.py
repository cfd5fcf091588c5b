"""What must hold of the steps of a lease's holder, and of those who hold it no longer."""

from collections.abc import Iterator

from tests.property.state_search.case import Case
from tests.property.state_search.move import DELAY_MS, LEASE_MS, STATUS, kind_of
from tests.property.state_search.world import Attempt


def wrong_write(case: Case) -> Iterator[str]:
    jobs = {attempt.job for attempt in case.move.targets}
    if set(case.touched) - jobs:
        yield f"{case.move.label} changes {case.touched}"
    for attempt, answer in zip(case.move.targets, case.answer, strict=True):
        told = answer.decode() if isinstance(answer, bytes) else str(answer)
        right = case.world.ghost.rights.get(attempt.job)
        if right is None or right.nonce != attempt.nonce:
            yield from _refused(case, attempt, told, ("lost", "0"))
        elif right.left_by:
            yield from _repeated(case, attempt, told, right.left_by)
        else:
            yield from _HOLDER[case.move.step](case, attempt, told)


def _refused(case: Case, attempt: Attempt, told: str, refusals: tuple[str, ...]) -> Iterator[str]:
    if attempt.job in case.touched:
        yield f"a lost lease of {attempt.job} writes: {case.move.label}"
    if told not in refusals:
        yield f"a lost lease of {attempt.job} is told {told}"


def _repeated(case: Case, attempt: Attempt, told: str, left_by: str) -> Iterator[str]:
    """It gave the job up itself, and hears that again or that the lease is gone."""
    if attempt.job in case.touched:
        yield f"an attempt that gave up {attempt.job} writes: {case.move.label}"
    if (
        left_by == case.move.step == "finish"
        and case.after.place(attempt.job) == "ended"
        and told != "1"
    ):
        yield f"a repeated finish of {attempt.job} is told {told}"


def _holder_renews(case: Case, attempt: Attempt, told: str) -> Iterator[str]:
    job, before = attempt.job, case.before.replies[attempt.job]
    kept = [int(before.get(f"kept:{index}", 0)) for index in range(len(attempt.drawn))]
    sent = list(zip(attempt.written, attempt.drawn, kept, strict=True))
    gap = any(drawn > written > have for written, drawn, have in sent)
    order = _ORDER[case.late(job, case.after.oldest(job))]
    wanted = "cancel" if "cancel" in before else order or ("gap" if gap else "held")
    if told != wanted:
        yield f"the holder of {job} renews and is told {told}, not {wanted}"
    if case.after.sets["leases"].get(job) != case.now_ms + LEASE_MS:
        yield f"the holder of {job} renews and its lease does not run anew"
    yield from _wrong_kept(case, attempt, told)


def _wrong_kept(case: Case, attempt: Attempt, told: str) -> Iterator[str]:
    before, after = case.before.replies[attempt.job], case.after.replies[attempt.job]
    for index, (written, drawn) in enumerate(zip(attempt.written, attempt.drawn, strict=True)):
        have = int(before.get(f"kept:{index}", 0))
        wanted = max(have, drawn) if drawn > written and written <= have else have
        if int(after.get(f"kept:{index}", 0)) != wanted:
            yield f"{attempt.job} is told {told}; of sample {index}, {wanted} tokens should be kept"


def _holder_finishes(case: Case, attempt: Attempt, told: str) -> Iterator[str]:
    reply = case.after.replies[attempt.job]
    late = "" if attempt.order else case.late(attempt.job, attempt.oldest)
    wanted = ("expired", late) if late else (STATUS[attempt.order], "")
    if told != "1" or (reply["status"], reply.get("error", "")) != wanted:
        yield f"the holder of {attempt.job} finishes it and is told {told}; it is {reply['status']}"
    if (reply.get("body") == attempt.fence) == bool(late) or reply.get("state") != attempt.fence:
        yield f"the holder of {attempt.job} finishes it, {wanted}; body or state is another"
    if kind_of(case.scope, attempt.job).streamed and not attempt.order:
        yield from _wrong_kept(case, attempt, told)


def _holder_fails(case: Case, attempt: Attempt, told: str) -> Iterator[str]:
    job = attempt.job
    last = int(case.before.replies[job].get("fails", 0)) + 1 >= case.scope.fail_limit
    last = last or job in case.world.ghost.stopped
    wanted = ("dead", "ended") if last else ("retry", "delayed")
    if (told, case.after.place(job)) != wanted:
        yield f"the holder of {job} fails it and is told {told}; it is {case.after.place(job)}"
    if not last and case.after.sets["delayed"].get(job) != case.now_ms + DELAY_MS:
        yield f"{job} does not wait for its delay"
    if not last:
        yield from _wrong_kept(case, attempt, told)


def _holder_releases(case: Case, attempt: Attempt, told: str) -> Iterator[str]:
    job = attempt.job
    stopped = job in case.world.ghost.stopped
    if told != "1" or case.after.place(job) not in (("ended",) if stopped else ("resume", "alone")):
        yield f"the holder of {job} hands it back and is told {told}; it is {case.after.place(job)}"
    if not stopped:
        yield from _wrong_kept(case, attempt, told)


_ORDER = {"": "", "deadline_exceeded": "expire", "staleness_exceeded": "stale"}
_HOLDER = {
    "renew": _holder_renews,
    "finish": _holder_finishes,
    "fail": _holder_fails,
    "release": _holder_releases,
}
