"""What must hold in every state. The claims yield what is wrong."""

from collections.abc import Iterator

from protocols.queue.keys import Keys
from tests.property.state_search.move import BY_HAND, frames, tokens
from tests.property.state_search.sight import LIVE, NO_VERSION, ROOMS, WAITING, Entry, Sight

_KEYS = Keys("search")
_TOKEN_FIELDS = ("t", "p", "ti", "tp")


def wrong_state(sight: Sight, *, halves: bool) -> str | None:
    """What no state may be; `halves`: whether a step may have died in its middle."""
    return next(_wrongs(sight, halves), None)


def wrong_rest(before: Sight, after: Sight) -> str | None:
    """What must not be once a live worker had time to finish everything that was there before."""
    return next(_restless(before, after), None)


def _wrongs(sight: Sight, halves: bool) -> Iterator[str]:
    if sight.ghosts:
        yield f"pending, but not in their stream: {', '.join(sight.ghosts)}"
    for entry in sight.entries.values():
        yield from _wrong_entry(sight, entry, halves)
    for job, reply in sight.replies.items():
        place = sight.place(job)
        if place == "lost" or (place in ("orphan", "unleased") and not halves):
            yield f"{job} is {reply['status']}, and {place}"
        yield from _wrong_sets(sight, job, place)
        yield from _wrong_lifetime(sight, job, place)
        yield from _wrong_checkpoint(sight, job)
    for name in ("leases", *ROOMS, "deadlines"):
        for job in sight.sets[name]:
            if sight.place(job) not in LIVE:
                yield f"{job} has {sight.place(job)} and is still in {name}"


def _wrong_entry(sight: Sight, entry: Entry, halves: bool) -> Iterator[str]:
    """An entry is its job's own; one added by hand may be a copy until it is read."""
    own = sight.entries.get(sight.own_entry(entry.job) or ("", "")) is entry
    if entry.state == "left":
        yield f"an acknowledged entry of {entry.job} is still in {entry.lane}"
    elif not own and BY_HAND not in entry.fields:
        yield f"{entry.job} has a second entry, in {entry.lane}"
    elif not own and entry.state == "pending" and not halves:
        yield f"an entry was read and not begun: {entry.job}"


def _wrong_sets(sight: Sight, job: str, place: str) -> Iterator[str]:
    if place in WAITING and "cancel" in sight.replies[job]:
        yield f"{job} shall stop and waits for another attempt"
    there = {name for name in ("leases", *ROOMS) if job in sight.sets[name]}
    own = {"leases"} if place == "running" else {place} & set(ROOMS)
    if there != own:
        yield f"{job} is {place} and in {sorted(there)}"
    if place in LIVE:
        if (job in sight.sets["deadlines"]) != ("deadline_ms" in sight.replies[job]):
            yield f"{job} is {place} and its deadline is not kept in P:deadlines"
        own_entry = sight.entries.get(sight.own_entry(job) or ("", ""))
        unread = own_entry is not None and own_entry.state == "unread"
        if unread != (place in ("lane", "resume")):
            yield f"{job} is {place} and its entry is {own_entry and own_entry.state}"
    elif sight.own_entry(job) in sight.entries:
        yield f"{job} has {place} and its entry is still there"


def _wrong_lifetime(sight: Sight, job: str, place: str) -> Iterator[str]:
    reply, progress = sight.replies[job], f"{_KEYS.prefix}:progress:{job}"
    passes, rows = _KEYS.reply(job) in sight.passing, sight.progress.get(job, [])
    if passes == (place in LIVE):
        yield f"the reply of {job} ({place}) {'will expire' if passes else 'stays for ever'}"
    if rows and (progress in sight.passing) == (place in LIVE):
        yield f"the progress of {job} ({place}) {'will expire' if place in LIVE else 'stays for ever'}"
    if rows and ("end" in rows[-1]) == (place in LIVE):
        yield f"the progress of {job} ({place}) {'has ended' if place in LIVE else 'has no end'}"
    if place == "ended" and not {"code", "body", "finished_ms"} <= reply.keys():
        yield f"the reply of {job} lacks code, body or time"


def _wrong_checkpoint(sight: Sight, job: str) -> Iterator[str]:
    """Each sample's segments follow each other without a gap, and `kept:<sample>` counts them."""
    rows = [row for row in sight.progress.get(job, []) if "end" not in row]
    counts: dict[int, int] = {}
    for row in rows:
        index, start = int(row["i"]), counts.get(int(row["i"]), 0)
        end = start + len(row["t"]) // 4
        counts[index] = end
        if int(row["s"]) != start or end == start:
            yield f"the checkpoint of {job} has tokens from {int(row['s'])} where {start} comes next"
        elif tuple(row[name] for name in _TOKEN_FIELDS) != tokens(job, index, start, end):
            yield f"the checkpoint of {job} holds other tokens than were drawn"
        if row.get("sse", b"").decode() not in ("", frames(index, start, end)):
            yield f"the frames of {job} from {start} on are of other tokens"
    yield from _wrong_end(sight, job, sum(counts.values()))
    kept = {
        int(name[5:]): int(n) for name, n in sight.replies[job].items() if name.startswith("kept:")
    }
    oldest = int(sight.replies[job].get("oldest_version", NO_VERSION))
    if oldest != sight.oldest(job) and sight.place(job) in LIVE:
        yield f"the oldest token of {job} is of version {sight.oldest(job)}, and {oldest} is named"
    if kept != counts and sight.place(job) in LIVE:
        yield f"the checkpoint of {job} has {counts} tokens and counts {kept}"


def _wrong_end(sight: Sight, job: str, tokens: int) -> Iterator[str]:
    """All or none of a job's entries have frames; last ones only where it completed, and with the number of tokens."""
    rows = sight.progress.get(job, [])
    framed = ["sse" in row for row in rows if "end" not in row]
    if any(framed) and not all(framed):
        yield f"some segments of {job} lack their frames"
    last = rows[-1] if rows and "end" in rows[-1] and "sse" in rows[-1] else None
    if last and (last["end"], int(last["n"]) >= tokens) != (b"completed", True):
        yield f"the stream of {job} ends as if it had completed with {last['n']} of {tokens} tokens"


def _restless(before: Sight, after: Sight) -> Iterator[str]:
    yield from _wrongs(after, halves=False)
    for job in before.replies.keys() | {entry.job for entry in before.entries.values()}:
        if after.place(job) not in ("ended", "tombstone"):
            yield f"{job} never ends: {after.place(job)}"
    for entry in before.entries.values():
        conflict = _conflicts(before, after, entry)
        if conflict and after.replies.get(entry.entry, {}).get("error") != "job_conflict":
            yield f"the copy of {entry.job} with another body gets no answer"
    if after.entries:
        yield f"entries stay: {[entry.job for entry in after.entries.values()]}"
    for job, reply in before.replies.items():
        later = after.replies.get(job, {})
        if before.place(job) != "ended":
            continue
        changed = [
            name for name in ("status", "body") if later.get(name, reply[name]) != reply[name]
        ]
        if changed:
            yield f"the reply of {job} changed afterwards: {changed}"


def _conflicts(before: Sight, after: Sight, entry: Entry) -> bool:
    """Whether an entry added by hand carries another body than the job whose id it names."""
    if BY_HAND not in entry.fields or entry.entry == entry.job:
        return False
    return after.replies[entry.job]["sha"] != entry.sha
