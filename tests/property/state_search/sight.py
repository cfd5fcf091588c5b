"""What the keys of a pool hold, as the search sees it, and where each job is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from protocols.codec import JOB_ID
from protocols.job import DEFAULT_PROTOCOL
from protocols.queue.keys import LANES, Keys
from protocols.queue.rows import body_hash

_KEYS = Keys("search")
_REPLY = _KEYS.reply("")
_PROGRESS = f"{_KEYS.prefix}:progress:"
_INBOX = _KEYS.inbox("")
_WORKER = _KEYS.worker("")
_SET_KEYS = {
    "leases": _KEYS.leases,
    "delayed": _KEYS.delayed,
    "parked": _KEYS.parked,
    "deadlines": _KEYS.deadlines,
    "collected": _KEYS.collected,
    "alone": f"{_KEYS.prefix}:alone",
}
_SETS = {key: name for name, key in _SET_KEYS.items()}
_STREAMS = {_KEYS.jobs(lane): lane for lane in LANES}

_BY_KEY: dict[str, Callable[[Any], str]] = {
    "replies": _KEYS.reply,
    "entries": lambda place: _KEYS.jobs(place[0]),
    "progress": lambda job: f"{_PROGRESS}{job}",
    "workers": _KEYS.worker,
    "passing": str,
}
"""Parts of a sight that come from several keys: to which key an item belongs."""

ROOMS = ("delayed", "parked", "alone")
WAITING = ("lane", "resume", *ROOMS, "orphan")
LIVE = (*WAITING, "running", "unleased")
NO_VERSION = 10**9
"""Of no token: newer than all."""


class Entry(NamedTuple):
    """One entry of a lane."""

    lane: str
    entry: str
    fields: dict[str, str]
    state: str
    """`unread`, `pending`, or `left`: acknowledged and still there."""

    @property
    def job(self) -> str:
        """The id that it was sent for; its own where it has none or one that no job may have."""
        given = self.fields.get("id", "")
        return given if JOB_ID.fullmatch(given) else self.entry

    @property
    def sha(self) -> str:
        """What tells its body from another."""
        return body_hash(DEFAULT_PROTOCOL, self.fields["body"].encode())


class Sight(NamedTuple):
    """All of a pool's keys."""

    replies: dict[str, dict[str, str]]
    entries: dict[tuple[str, str], Entry]
    ghosts: tuple[str, ...]
    """Pending, but not in their stream."""
    sets: dict[str, dict[str, int]]
    """Of leases, delayed, parked, deadlines, alone, collected; in order."""
    progress: dict[str, list[dict[str, bytes]]]
    inbox: tuple[str, ...]
    dead: tuple[str, ...]
    pool: dict[str, str]
    desired: dict[str, str]
    workers: dict[str, dict[str, str]]
    passing: dict[str, int]
    """Keys that will expire, and in how many seconds; by the server's own clock, which no step reads."""

    def own_entry(self, job: str) -> tuple[str, str] | None:
        """Lane and entry that a job's reply names."""
        reply = self.replies.get(job, {})
        return (reply["lane"], reply["entry"]) if "entry" in reply else None

    def oldest(self, job: str) -> int:
        """Policy version of the oldest token in a job's checkpoint."""
        rows = self.progress.get(job, [])
        return min((int(row["v"]) for row in rows if "v" in row), default=NO_VERSION)

    def place(self, job: str) -> str:
        """Where a job is; docs/job_states.md has these names."""
        reply = self.replies.get(job)
        if reply is None:
            return "unknown"
        status = reply["status"]
        if status == "running":
            return "running" if job in self.sets["leases"] else "unleased"
        if status != "queued":
            return "ended" if "body" in reply else "tombstone"
        entry = self.entries.get((reply.get("lane", ""), reply.get("entry", "")))
        if entry is None or entry.state == "left":
            return "lost"
        if entry.state == "unread":
            return "resume" if entry.lane == "resume" else "lane"
        return next((room for room in ROOMS if job in self.sets[room]), "orphan")


NOTHING = Sight({}, {}, (), {name: {} for name in _SETS.values()}, {}, (), (), {}, {}, {}, {})
"""Of a server without keys."""


def sight_of(view: list[Any], gone: Sequence[bytes] = (), before: Sight = NOTHING) -> Sight:
    """What there is after the keys of a view of harness.lua have changed and others have gone."""
    changed = [(key.decode(), seconds, content) for key, seconds, content in view]
    keys = {key for key, _, _ in changed} | {key.decode() for key in gone}
    sight = before._replace(
        **{
            name: {
                part: value
                for part, value in getattr(before, name).items()
                if key(part) not in keys
            }
            for name, key in _BY_KEY.items()
        },
        sets={name: {} if _SET_KEYS[name] in keys else kept for name, kept in before.sets.items()},
    )
    ghosts = tuple(
        ghost for ghost in before.ghosts if _KEYS.jobs(ghost.partition(":")[0]) not in keys
    )
    for key, seconds, content in changed:
        if seconds:
            sight.passing[key] = seconds
        if key in _STREAMS:
            ghosts += _add_entries(sight.entries, _STREAMS[key], *content)
        elif key in _SETS:
            sight.sets[_SETS[key]].update(_scores(content))
        elif key.startswith(_REPLY):
            sight.replies[key[len(_REPLY) :]] = _texts(content)
        elif key.startswith(_PROGRESS):
            sight.progress[key[len(_PROGRESS) :]] = [_map(flat) for _, flat in content[0]]
        elif key.startswith(_WORKER):
            sight.workers[key[len(_WORKER) :]] = _texts(content)
        else:
            sight = sight._replace(**_single(key, content))
    entries = sorted(sight.entries.items(), key=lambda item: (item[0][0], _order(item[0][1])))
    return sight._replace(entries=dict(entries), ghosts=ghosts)


def _single(key: str, content: Any) -> dict[str, Any]:  # noqa: ANN401 - as the server has it
    """The part of a sight that one key is."""
    if key == _KEYS.prefix:
        return {"pool": _texts(content)}
    if key == _KEYS.desired:
        return {"desired": _texts(content)}
    if key.startswith(_INBOX):
        return {"inbox": tuple(raw.decode() for raw in content)}
    assert key == _KEYS.dead, f"a key that keys.py does not have: {key}"
    return {"dead": tuple(_map(flat)["job"].decode() for _, flat in content[0])}


def _add_entries(
    entries: dict[tuple[str, str], Entry],
    lane: str,
    rows: list[Any],
    read: bytes,
    pending: list[bytes],
) -> tuple[str, ...]:
    """Add a lane's entries; the pending ones that are not there."""
    last, waiting = _order(read.decode()), {raw.decode() for raw in pending}
    for raw, flat in rows:
        entry = raw.decode()
        state = "pending" if entry in waiting else "left" if _order(entry) <= last else "unread"
        entries[lane, entry] = Entry(lane, entry, _texts(flat), state)
        waiting.discard(entry)
    return tuple(f"{lane}:{entry}" for entry in waiting)


def _order(entry: str) -> tuple[int, int]:
    ms, _, count = entry.partition("-")
    return int(ms), int(count)


def _texts(flat: list[bytes]) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in zip(flat[::2], flat[1::2], strict=True)}


def _map(flat: list[bytes]) -> dict[str, bytes]:
    return {k.decode(): v for k, v in zip(flat[::2], flat[1::2], strict=True)}


def _scores(flat: list[bytes]) -> dict[str, int]:
    return {k.decode(): int(v) for k, v in zip(flat[::2], flat[1::2], strict=True)}
