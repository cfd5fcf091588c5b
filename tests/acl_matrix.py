"""Who may run which command on pool `default`: a line each. `P` is the pool's prefix, `Q` that of another pool."""

import shlex
from typing import Literal, NamedTuple

from protocols.queue.broker import LIBRARY
from protocols.queue.keys import Keys

Verdict = Literal["may", "may not", "known"]
"""`known`: allowed, although one would rather not; docs/security.md says so."""

_PREFIX = {"P": Keys("default").prefix, "Q": Keys("other").prefix}

EVERYBODY_MAY = """
PING
TIME
SELECT 0
XLEN P:jobs:normal
HGETALL P:worker:w
HGETALL P:desired
"""
NOBODY_MAY = """
FLUSHALL
FLUSHDB
CONFIG GET *
CONFIG SET maxmemory 1
ACL LIST
ACL SETUSER trainer +@all
KEYS *
SCAN 0
RANDOMKEY
INFO
MONITOR
SHUTDOWN NOSAVE
REPLICAOF 127.0.0.1 1
CLIENT LIST
CLIENT KILL TYPE normal
FUNCTION DELETE rolloutq
FUNCTION FLUSH
FUNCTION LIST
SCRIPT FLUSH
SCRIPT LOAD 'return 1'
EVAL 'return 1' 0
DEL P
DEL P:desired P:jobs:normal
RENAME P:reply:a P:reply:b
XTRIM P:jobs:normal MAXLEN 0
XGROUP DESTROY P:jobs:normal workers
XCLAIM P:jobs:normal workers thief 0 1-1
XAUTOCLAIM P:jobs:normal workers thief 0 0
PSUBSCRIBE *
SUBSCRIBE rollout:bell:other
PUBLISH rollout:bell:other x
PUBLISH rollout:control:other pause
HGETALL Q:reply:x
HGETALL Q:desired
HSET Q:desired gate closed
XADD Q:jobs:normal * body {}
XREADGROUP GROUP workers thief STREAMS Q:jobs:normal >
FCALL rolloutq_enqueue 1 Q stolen normal sha 2 body {}
FCALL rolloutq_take 1 Q thief n 1 1000 0 0
XREVRANGE Q:dead + -
GET another-application
SET another-application 1
"""
NO_WORKERS_RIGHT = """
XREADGROUP GROUP workers thief COUNT 1 STREAMS P:jobs:normal >
XREADGROUP GROUP bell bell COUNT 1 NOACK STREAMS P:jobs:normal >
XRANGE P:jobs:normal - +
XREAD COUNT 1 STREAMS P:jobs:normal 0
XPENDING P:jobs:normal workers
XGROUP CREATE P:jobs:normal mine 0
XGROUP SETID P:jobs:normal workers $
XGROUP DELCONSUMER P:jobs:normal workers w
FUNCTION LOAD REPLACE '#!lua name=rolloutq'
FCALL rolloutq_take 1 P thief n 1 1000 0 0
FCALL rolloutq_beat 1 P ghost 1000 $ 0 0 state serving
FCALL rolloutq_sweep 1 P 10 3 1 0
ZADD P:workers 1 ghost
ZREM P:workers w
HSET P:worker:ghost state serving
DEL P:reply:x
SUBSCRIBE rollout:control:default
SUBSCRIBE rollout:bell:default
"""
NO_OPERATORS_RIGHT = """
FCALL rolloutq_control 1 P pause
FCALL rolloutq_control 1 P ping
FCALL rolloutq_hear 1 P ping 0-0 ping
"""

MATRIX: dict[str, dict[Verdict, str]] = {
    "trainer": {
        "may": """
WAIT 0 1
FCALL rolloutq_version 1 P
FCALL rolloutq_enqueue 1 P raw-1 low sha 4 body {} run r
FCALL rolloutq_cancel 1 P raw-1
FCALL rolloutq_collect 1 P raw-1 1
XADD P:jobs:low * id raw-2 body {}
HMGET P:reply:raw-1 status body
XRANGE P:progress:raw-1 - +
XREAD COUNT 1 STREAMS P:progress:raw-1 0
ZRANGE P:run:r 0 -1
HSET P:batch:mine state waiting
HGETALL P:batch:mine
ZADD P:batches 1 mine
ZRANGE P:batches 0 -1
GET P:batch-owner:mine
HSCAN P:session:mine 0 COUNT 10
UNLINK P:session:mine
BLMPOP 0.01 1 P:inbox:mine LEFT
ZCOUNT P:workers -inf +inf
ZRANGEBYSCORE P:workers -inf +inf
ZCARD P:leases
ZCARD P:delayed
XLEN P:dead
PUBLISH rollout:bell:default x
""",
        "may not": NO_WORKERS_RIGHT
        + NO_OPERATORS_RIGHT
        + """
SET P:batch-owner:mine thief
HSET P:session:mine turns 1
FCALL rolloutq_recall 1 P mine 1:n s
UNLINK P:reply:raw-1
HSET P backlog 1
HSET P:desired gate closed
HDEL P:desired gate
XADD P:commands * verb pause
XRANGE P:commands - +
HGETALL P:acks:1
HSET P:acks:1 w done
PUBLISH rollout:control:default pause
XRANGE P:dead - +
XREVRANGE P:dead + -
XDEL P:dead 1-1
""",
        "known": """
HMGET P:reply:of-another body state
HSET P:reply:of-another status completed
XADD P:progress:of-another * end completed
RPUSH P:inbox:of-another x
BLMPOP 0.01 1 P:inbox:of-another LEFT
XDEL P:jobs:normal 1-1
XACK P:jobs:normal workers 1-1
ZREM P:leases of-another
HINCRBY P ends 1
HSCAN P:session:of-another 0
UNLINK P:session:of-another
FCALL rolloutq_cancel 1 P of-another
FCALL rolloutq_finish 1 P of-another 1:n completed 200 {} '' '' '' 0
""",
    },
    "worker": {
        "may": """
FCALL rolloutq_sweep 1 P 10 3 0 1000
FCALL rolloutq_take 1 P nobody n 0 1000 0 0
FCALL rolloutq_recall 1 P mine 1:n s mark
FCALL rolloutq_hear 1 P ping 0-0 ping
XGROUP CREATE P:jobs:high workers 0
XGROUP SETID P:jobs:high bell $
XGROUP DELCONSUMER P:jobs:high workers nobody
XPENDING P:jobs:high workers
XREADGROUP GROUP workers nobody COUNT 1 STREAMS P:jobs:high >
XREADGROUP GROUP bell bell COUNT 1 NOACK STREAMS P:jobs:high >
XRANGE P:commands - +
HSET P:acks:1 w done
PEXPIRE P:acks:1 60000
DEL P:worker:ghost
SUBSCRIBE rollout:bell:default
SUBSCRIBE rollout:control:default
PUBLISH rollout:bell:default w
""",
        "may not": "PUBLISH rollout:control:default pause",
        "known": """
HSET P:desired by worker
XADD P:commands * verb status
XRANGE P:jobs:normal - +
HSET P:reply:of-another status completed
FUNCTION LOAD REPLACE LIBRARY
""",
    },
    "operator": {
        "may": """
FCALL rolloutq_control 1 P ping
FCALL rolloutq_control 1 P cancel run=r
HGETALL P
HSET P seen 1
HGET P:desired gate
HSET P:desired by operator
XADD P:commands * verb status
XRANGE P:commands - +
XREVRANGE P:commands + - COUNT 1
HGETALL P:acks:1
HINCRBY P:desired generation 0
ZRANGE P:workers 0 -1
ZRANGE P:run:r 0 -1
FCALL rolloutq_cancel 1 P nobody
FCALL rolloutq_enqueue 1 P letter~2 low sha 2 body {}
XREVRANGE P:dead + -
XDEL P:dead 1-1
BLMPOP 0.01 1 P:inbox:mine LEFT
PUBLISH rollout:control:default ping
PUBLISH rollout:bell:default x
""",
        "may not": NO_WORKERS_RIGHT
        + """
HSCAN P:session:mine 0
UNLINK P:session:mine
XRANGE P:progress:raw-1 - +
XREAD COUNT 1 STREAMS P:progress:raw-1 0
FCALL rolloutq_collect 1 P raw-1 1
XDEL P:commands 1-1
XTRIM P:commands MAXLEN 0
DEL P:dead
""",
        "known": """
HGETALL P:reply:of-another
HSET P:reply:of-another status completed
HSET P:acks:1 w done
XRANGE P:dead - +
""",
    },
    "viewer": {
        "may": """
ZCOUNT P:workers -inf +inf
ZRANGEBYSCORE P:workers -inf +inf
ZCARD P:leases
ZCARD P:delayed
XLEN P:dead
""",
        "may not": NO_WORKERS_RIGHT
        + NO_OPERATORS_RIGHT
        + """
HSCAN P:session:mine 0
UNLINK P:session:mine
FCALL rolloutq_version 1 P
FCALL rolloutq_enqueue 1 P raw-3 low sha 2 body {}
FCALL rolloutq_cancel 1 P raw-1
FCALL rolloutq_collect 1 P raw-1 1
XADD P:jobs:normal * body {}
XDEL P:dead 1-1
HSET P:acks:1 w done
HSET P:reply:raw-1 status completed
PEXPIRE P:reply:raw-1 1
HSET P:desired gate closed
XADD P:commands * verb pause
BLMPOP 0.01 1 P:inbox:mine LEFT
XRANGE P:progress:raw-1 - +
ZREM P:leases raw-1
ZRANGE P:run:r 0 -1
PUBLISH rollout:bell:default x
PUBLISH rollout:control:default pause
""",
        "known": """
HGETALL P:reply:of-another
XREVRANGE P:dead + -
""",
    },
}


class Case(NamedTuple):
    """One user and one command."""

    user: str
    verdict: Verdict
    words: tuple[str, ...]

    def __str__(self) -> str:
        """The user, the verdict and as much of the command as fits."""
        return f"{self.user} {self.verdict}: {' '.join(self.words)[:70]}"


def cases() -> list[Case]:
    """The whole matrix."""
    found: list[Case] = []
    shared: dict[Verdict, str] = {"may": EVERYBODY_MAY, "may not": NOBODY_MAY, "known": ""}
    for user, told in MATRIX.items():
        for verdict, lines in shared.items():
            commands = _commands(lines + "\n" + told[verdict])
            found += [Case(user, verdict, words) for words in commands]
    return found


def _commands(lines: str) -> list[tuple[str, ...]]:
    return [tuple(_word(word) for word in shlex.split(line)) for line in lines.splitlines() if line]


def _word(word: str) -> str:
    head, colon, rest = word.partition(":")
    return LIBRARY if word == "LIBRARY" else _PREFIX.get(head, head) + colon + rest
