"""What must hold of a sweep."""

from collections.abc import Iterator

from tests.property.state_search.case import Case
from tests.property.state_search.move import COLLECTED_MS
from tests.property.state_search.sight import WAITING
from tests.property.state_search.world import Scope


def wrong_sweep(case: Case) -> Iterator[str]:
    """It changes what is due and nothing else."""
    for job in case.touched:
        was, now_is = case.before.place(job), case.after.place(job)
        if was == "running":
            yield from _wrong_reclaim(case, job, now_is)
        elif not _may_change(case, job, was, now_is):
            yield f"a sweep changes {job} from {was} to {now_is}"
    for name in ("leases", "delayed"):
        due = [job for job, at in case.after.sets[name].items() if at <= case.now_ms]
        if any(case.before.place(job) != "unleased" for job in due):
            yield f"a sweep leaves {due} in {name}"
    for job, at in case.after.sets["deadlines"].items():
        if at <= case.now_ms and case.after.place(job) in WAITING:
            yield f"a sweep leaves {job} queued after its deadline"


def _wrong_reclaim(case: Case, job: str, now_is: str) -> Iterator[str]:
    crashes = int(case.before.replies[job].get("crashes", 0)) + 1
    if case.before.sets["leases"][job] > case.now_ms:
        yield f"{job} is taken from its worker, whose lease is not over"
    if "fence" in case.after.replies[job]:
        yield f"{job} is reclaimed and its fence stays"
    if now_is != _after_crash(case.scope, crashes) and not _ends_anyhow(case, job):
        yield f"{job} is {now_is} after {crashes} crashes in a row"


def _after_crash(scope: Scope, crashes: int) -> str:
    if crashes >= scope.crash_limit:
        return "ended"
    return "alone" if scope.crash_limit > 2 and crashes == scope.crash_limit - 1 else "resume"


def _ends_anyhow(case: Case, job: str) -> bool:
    """Its deadline has passed, or it was to stop."""
    status = case.after.replies[job]["status"]
    deadline = case.before.replies.get(job, {}).get("deadline_ms")
    over = deadline is not None and int(deadline) <= case.now_ms
    return (over and status == "expired") or (
        job in case.world.ghost.stopped and status == "cancelled"
    )


def _may_change(case: Case, job: str, was: str, now_is: str) -> bool:
    now, sets = case.now_ms, case.before.sets
    if was in WAITING and _ends_anyhow(case, job):
        return True
    match was:
        case "delayed":
            return sets["delayed"][job] <= now and now_is in ("resume", "alone")
        case "orphan":
            return now_is in ("resume", "alone")
        case "unleased":
            return now_is == "running" and case.after.sets["leases"][job] == now
        case "ended":
            return now_is == "tombstone" and sets["collected"].get(job, now) + COLLECTED_MS <= now
        case "unknown":
            return now_is in ("resume", "ended")
        case _:
            return False
