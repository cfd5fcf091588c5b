"""The library with one guard taken out at a time, and in which scope the search looks for what goes wrong then."""

from typing import NamedTuple

from tests.property.state_search.scopes import hunt
from tests.property.state_search.world import Kind, Scope


class Mutant(NamedTuple):
    """One guard less."""

    guard: str
    """As docs/job_states.md names it."""
    old: str
    new: str
    scope: Scope


_TWO = (Kind("a"), Kind("b"))
_TIMED = (Kind("a", timeout_ms=20_000),)
_SHORT_LIVED = (Kind("a", reply_ttl_ms=60_000),)
_TOKENLESS = (Kind("a", tokens=(0,)),)
_OLD_WEIGHTS = (Kind("a", min_version=1),)
_STALE = (Kind("a", max_staleness=0, tokens=(1,)),)

_STREAMED = (Kind("a", timeout_ms=20_000, tokens=(1,), streamed=True),)

_LEAVE = "      leave_waiting(P, id)\n      conclude_error(P, gone, id, held, "

_FINISHES = "if mine and held.status == 'running' then\n      if args[i + 7]"
_AT_TAKE = "id and late(P, held, now)"
_ANSWER = "args[i + 2] == 'completed'"
_AT_FINISH = f"{_ANSWER} and late(P, held, now)"
_NO_DEADLINE = (
    "late(P, { max_staleness = held.max_staleness, oldest_version = held.oldest_version }, now)"
)
_NO_STALENESS = "late(P, { deadline_ms = held.deadline_ms }, now)"
_KEEP = "      local whole = keep(P, gone, id, held[6], args, i + 3, count)\n"
_OLDEST = (
    "      local oldest = held[5] and redis.call('HGET', P .. ':reply:' .. id, 'oldest_version')\n"
)

_LEASES = (
    Mutant(
        "finish: fence",
        "local id, held = args[i], held_of(P, args[i])\n    local mine = held.fence == args[i + 1]",
        "local id, held = args[i], held_of(P, args[i])\n    local mine = true",
        hunt(),
    ),
    Mutant(
        "renew: fence",
        "if held[1] ~= 'running' or held[2] ~= args[i + 1] then",
        "if held[1] ~= 'running' then",
        hunt("renew"),
    ),
    Mutant(
        "release: fence",
        "tonumber(args[i + 2]), held_of(P, args[i])\n    local mine = held.fence == args[i + 1]",
        "tonumber(args[i + 2]), held_of(P, args[i])\n    local mine = true",
        hunt("release"),
    ),
    Mutant("fail: fence", "if held.fence ~= args[i + 1] then", "if false then", hunt("fail")),
    Mutant(
        "fence: its nonce",
        "local fence = attempts .. ':' .. nonce",
        "local fence = tostring(attempts)",
        hunt("copy", "failover"),
    ),
    Mutant(
        "sweep: a reclaimed lease's fence goes",
        "if held.status == 'running' then redis.call('HDEL', P .. ':reply:' .. id, 'fence') end",
        "",
        hunt("release"),
    ),
    Mutant(
        "sweep: only leases that ran out",
        "ipairs(due(P .. ':leases', now, most))",
        "ipairs(redis.call('ZRANGE', P .. ':leases', 0, -1))",
        hunt(),
    ),
    Mutant(
        "finish: status running",
        _FINISHES,
        _FINISHES.replace(" and held.status == 'running'", ""),
        hunt("lost"),
    ),
    Mutant(
        "finish: not a queued job",
        _FINISHES,
        _FINISHES.replace(
            "held.status == 'running'", "(held.status == 'running' or held.status == 'queued')"
        ),
        hunt("release", "lost", "doubt"),
    ),
    Mutant(
        "renew: status running",
        "if held[1] ~= 'running' or held[2] ~= args[i + 1] then",
        "if held[2] ~= args[i + 1] then",
        hunt("renew", "release", "lost"),
    ),
    Mutant(
        "release: status running",
        "if mine and held.status == 'running' then\n      keep",
        "if mine then\n      keep",
        hunt("release", "lost"),
    ),
    Mutant(
        "fail: status running",
        "elseif held.status ~= 'running' then\n      out[#out + 1] = held.status == 'queued'",
        "elseif false then\n      out[#out + 1] = held.status == 'queued'",
        hunt("fail", "lost"),
    ),
    Mutant(
        "take: the nonce of the take before",
        "if before then return { gate",
        "if false then return { gate",
        hunt("lost", kinds=_TWO),
    ),
)

_IDENTITY = (
    Mutant(
        "enqueue: body hash",
        "elseif known[1] and known[2] ~= sha then",
        "elseif false then",
        hunt("other"),
    ),
    Mutant(
        "enqueue: known id",
        "elseif known[1] then\n      local fields",
        "elseif false then\n      local fields",
        hunt("again"),
    ),
    Mutant(
        "take: a copy with the same body",
        "if sha == held.sha then -- a second copy",
        "if false then -- a second copy",
        hunt("raw_same"),
    ),
    Mutant(
        "take: a job's own entry",
        "if held.status == 'queued' and held.lane == lane and held.entry == entry then return id, held end",
        "if held.status == 'queued' then return id, held end",
        hunt("raw_same"),
    ),
    Mutant(
        "requeue: the id stays",
        "local again = { 'id', id }",
        "local again = {}",
        hunt("release"),
    ),
)

_ENDS = (
    Mutant(
        "settle: XACK",
        "    redis.call('XACK', P .. ':jobs:' .. lane, GROUP, unpack(entries))\n",
        "",
        hunt(),
    ),
    Mutant(
        "settle: XDEL",
        "    redis.call('XDEL', P .. ':jobs:' .. lane, unpack(entries))\n",
        "",
        hunt(),
    ),
    Mutant(
        "settle: the lease goes",
        "if #gone.leases > 0 then redis.call('ZREM', P .. ':leases', unpack(gone.leases)) end",
        "",
        hunt(),
    ),
    Mutant(
        "settle: the deadline goes",
        "if #gone.deadlines > 0 then redis.call('ZREM', P .. ':deadlines', unpack(gone.deadlines)) end",
        "",
        hunt(kinds=_TIMED),
    ),
    Mutant("conclude: the reply expires", "  redis.call('PEXPIRE', held.key, ttl)\n", "", hunt()),
    Mutant(
        "conclude: the inbox is told",
        "  if held.inbox then gather(gone.inboxes, held.inbox, id) end\n",
        "",
        hunt(),
    ),
    Mutant(
        "conclude: the progress goes no later than the reply",
        "math.min(PROGRESS_TTL_MS, ttl)",
        "PROGRESS_TTL_MS",
        hunt("checkpoint", "release", "expire", kinds=_SHORT_LIVED),
    ),
    Mutant(
        "tombstone: only of what ended long ago",
        "if finished and finished <= now - TOMBSTONE_AFTER_MS then",
        "if true then",
        hunt("copy", "failover", "see", "collect"),
    ),
    Mutant(
        "sweep: crash limit",
        "if crashes >= limit and not held.cancel then",
        "if false then",
        hunt(),
    ),
    Mutant(
        "fail: limit",
        "elseif redis.call('HINCRBY', P .. ':reply:' .. id, 'fails', 1) >= limit then",
        "elseif redis.call('HINCRBY', P .. ':reply:' .. id, 'fails', 1) >= 99 then",
        hunt("fail", fail_limit=1),
    ),
)

_ORDERS = (
    Mutant(
        "cancel: only what waits ends at once",
        f"if held.status == 'queued' then\n{_LEAVE}'cancelled'",
        f"if held.status then\n{_LEAVE}'cancelled'",
        hunt("cancel"),
    ),
    Mutant(
        "cancel: waits no longer",
        f"{_LEAVE}'cancelled'",
        "      conclude_error(P, gone, id, held, 'cancelled'",
        hunt("cancel", "fail"),
    ),
    Mutant("renew: tells of a cancel", "held[3] and 'cancel' or ", "", hunt("cancel", "renew")),
    Mutant(
        "requeue: not what shall stop",
        "if held.cancel then return stop(P, gone, id, held) end",
        "",
        hunt("cancel"),
    ),
    Mutant(
        "fail: not what shall stop",
        "elseif held.cancel then\n      stop(",
        "elseif false then\n      stop(",
        hunt("cancel", "fail"),
    ),
    Mutant("take: deadline", _AT_TAKE, f"id and {_NO_DEADLINE}", hunt(kinds=_TIMED)),
    Mutant(
        "sweep: deadline",
        f"if held.status == 'queued' then\n{_LEAVE}'expired'",
        f"if false then\n{_LEAVE}'expired'",
        hunt(kinds=_TIMED),
    ),
    Mutant(
        "renew: tells of a deadline",
        "deadline_exceeded = { 'expire',",
        "deadline_exceeded = { 'held',",
        hunt("renew", kinds=_TIMED),
    ),
    Mutant("finish: deadline", _AT_FINISH, f"{_ANSWER} and {_NO_DEADLINE}", hunt(kinds=_TIMED)),
    Mutant(
        "take: staleness",
        _AT_TAKE,
        f"id and {_NO_STALENESS}",
        hunt("checkpoint", "release", "publish", kinds=_STALE),
    ),
    Mutant(
        "renew: tells of staleness",
        "staleness_exceeded = { 'stale',",
        "staleness_exceeded = { 'held',",
        hunt("checkpoint", "renew", "publish", kinds=_STALE),
    ),
    Mutant(
        "renew: the tokens that it brings count",
        f"{_KEEP}{_OLDEST}",
        f"{_OLDEST}{_KEEP}",
        hunt("checkpoint", "publish", kinds=_STALE),
    ),
    Mutant(
        "finish: staleness",
        _AT_FINISH,
        f"{_ANSWER} and {_NO_STALENESS}",
        hunt("publish", kinds=_STALE),
    ),
    Mutant(
        "finish: tokens without a checkpoint count",
        "      if args[i + 7] ~= '' then held.oldest_version = args[i + 7] end\n",
        "",
        hunt("publish", kinds=_STALE),
    ),
    Mutant(
        "finish: only an answer is too late",
        _AT_FINISH,
        "late(P, held, now)",
        hunt("renew", kinds=_TIMED),
    ),
    Mutant(
        "take: min_version",
        "elseif min_version > version then",
        "elseif min_version > version + 9 then",
        hunt(kinds=_OLD_WEIGHTS),
    ),
    Mutant(
        "take: only what is parked for its version",
        "promote(P, 'parked', version, now, slots)",
        "promote(P, 'parked', '+inf', now, slots)",
        hunt(kinds=_OLD_WEIGHTS),
    ),
    Mutant(
        "take: what is parked goes on",
        "  promote(P, 'parked', version, now, slots)\n",
        "",
        hunt(kinds=_OLD_WEIGHTS),
    ),
    Mutant(
        "take, behind a wait: nothing where jobs go on",
        "if waited and some_go_on(P, version) then",
        "if false then",
        hunt("release", "wait"),
    ),
    Mutant(
        "take, behind a wait: quarantined ones too",
        "redis.call('ZCARD', P .. ':alone') + redis.call('ZCOUNT'",
        "redis.call('ZCOUNT'",
        hunt("wait", kinds=_TOKENLESS, crash_limit=3),
    ),
    Mutant(
        "take, behind a wait: not those that run",
        "> redis.call('XPENDING', P .. ':jobs:resume', GROUP)[1] then",
        "> 0 then",
        hunt("release", "wait"),
    ),
    Mutant(
        "rooms: the parked wait too",
        "local ROOMS = { 'delayed', 'parked', 'alone' }",
        "local ROOMS = { 'delayed', 'alone' }",
        hunt("cancel", kinds=_OLD_WEIGHTS),
    ),
    Mutant(
        "take: gate",
        "if gate ~= 'open' and slots > 0 then return { gate, {}, 0 } end",
        "",
        hunt("pause"),
    ),
    Mutant(
        "sweep: only delays that are over",
        "promote(P, 'delayed', now, now, most)",
        "promote(P, 'delayed', '+inf', now, most)",
        hunt("fail"),
    ),
)

_CHECKPOINTS = (
    Mutant(
        "keep: no gap",
        "if start > kept then",
        "if false then",
        hunt("checkpoint", "checkpoint", "copy", "failover"),
    ),
    Mutant(
        "keep: an overlap is left out",
        "local skip, wide = kept - start,",
        "local skip, wide = 0,",
        hunt("checkpoint", "lost", "release"),
    ),
    Mutant(
        "keep: nothing shrinks",
        "elseif start + tokens > kept then",
        "elseif true then",
        hunt("checkpoint", "lost", "late", "release"),
    ),
    Mutant(
        "keep: a job that gets on is no poison",
        "redis.call('HDEL', key, 'crashes', 'alone')",
        "redis.call('HDEL', key, 'alone')",
        hunt("checkpoint", crash_limit=3),
    ),
    Mutant(
        "sweep: quarantine",
        "if crashes == limit - 1 and limit > 2 then",
        "if false then",
        hunt(kinds=_TOKENLESS, crash_limit=3),
    ),
    Mutant(
        "take: an idle worker for a quarantined job",
        "if holding > 0 then return nil, true end",
        "",
        hunt(kinds=_TOKENLESS, crash_limit=3),
    ),
)

_STREAMS = (
    Mutant(
        "keep: followers are called",
        "  if framed and inbox then gather(gone.inboxes, inbox, '+' .. id) end\n",
        "",
        hunt("checkpoint", kinds=_STREAMED),
    ),
    Mutant(
        "finish: the rest of a stream",
        "      if count > 0 then keep(P, gone, id, nil, args, i + ENDING, count) end\n",
        "",
        hunt(kinds=_STREAMED),
    ),
    Mutant(
        "finish: too late, no last frames",
        "local last = not code and more > 0",
        "local last = more > 0",
        hunt(kinds=_STREAMED),
    ),
)

_HALVES = (
    Mutant(
        "orphans: read and not begun",
        "elseif held.status == 'queued' and not waits(P, id) then",
        "elseif false then",
        hunt("half_read"),
    ),
    Mutant(
        "orphans: begun and not leased",
        "elseif held.status == 'running' and not redis.call('ZSCORE', P .. ':leases', id) then",
        "elseif false then",
        hunt("half_take"),
    ),
    Mutant(
        "orphans: not what waits for its delay",
        "held.status == 'queued' and not waits(P, id) then",
        "held.status == 'queued' then",
        hunt("fail"),
    ),
    Mutant(
        "orphans: an entry nobody has begun becomes a job",
        "local admitted, fresh = admit(P, gone, lane, copy)",
        "local admitted, fresh = gather(gone.entries, lane, entry)",
        hunt("raw", "half_read"),
    ),
)

MUTANTS = (
    *_LEASES,
    *_IDENTITY,
    *_ENDS,
    *_ORDERS,
    *_CHECKPOINTS,
    *_STREAMS,
    *_HALVES,
)
