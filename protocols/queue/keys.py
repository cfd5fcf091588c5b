"""Every key of a pool: name, type, who writes it, how long it lives.

All begin with `P` = `rollout:{<pool>}`, whose braces put a pool into one cluster slot.
The function library (the `.lua` files beside this) builds the same names from `P`, the one key
that every step is called with.

| key                 | type             | written by                | lives                                          |
|---------------------|------------------|---------------------------|------------------------------------------------|
| `P`                 | hash             | prepare, take             | for ever: schema, backlog limit, turn of lanes |
| `P:jobs:<lane>`     | stream           | enqueue, raw XADD         | an entry until its job has ended               |
| `P:jobs:resume`     | stream           | release, sweep            | likewise; read before all lanes                |
| `P:reply:<job id>`  | hash             | every step                | 6 h after the end, see tombstones in sweep     |
| `P:leases`          | sorted set       | take, renew, finish, …    | id by lease expiry, ms                         |
| `P:delayed`         | sorted set       | fail                      | id by the time it may run again, ms            |
| `P:parked`          | sorted set       | take                      | id by the policy version that it waits for     |
| `P:deadlines`       | sorted set       | enqueue, take             | id by deadline, ms                             |
| `P:alone`           | sorted set       | sweep                     | quarantined id by the time of its second crash |
| `P:progress:<id>`   | stream           | renew, finish, …          | 10 min after the end: checkpoints, then `end`  |
| `P:collected`       | sorted set       | collect                   | id by the time of its end, until its tombstone |
| `P:session:<id>`    | hash             | finish                    | 6 h after its last answer, or until `release`  |
| `P:run:<run>`       | sorted set       | enqueue, take             | a day after the run's last reply               |
| `P:dead`            | stream           | fail, sweep               | the newest 10,000                              |
| `P:inbox:<client>`  | list             | finish, …                 | an hour; the newest 100,000                    |
| `P:batches`         | sorted set       | `rolloutq batch`          | batch id by when it was submitted, ms; 7 d     |
| `P:batch:<id>`      | hash             | `rolloutq batch`          | 7 d after its end: task, state, progress       |
| `P:batch-owner:<id>`| string           | `rolloutq batch worker`   | 15 s: which process is at it                   |
| `P:desired`         | hash             | control, beat             | for ever                                       |
| `P:commands`        | stream           | control, hear             | the newest 10,000                              |
| `P:acks:<command>`  | hash             | control, beat             | an hour after the last answer                  |
| `P:workers`         | sorted set       | beat                      | id by last heartbeat, ms; 10 min               |
| `P:worker:<id>`     | hash             | beat, take                | 10 min after the last heartbeat                |

The channel `rollout:bell:<pool>` names workers that shall look for orders; it carries hints only. What is
published on `rollout:control:<pool>` is a command.

Each lane's stream has two groups: `workers`, through which jobs are taken, and `bell`, on which
idle workers wait.
"""

import re

from protocols.errors import ConfigError

LANES = ("resume", "high", "normal", "low")
GROUP = "workers"
BELL = "bell"

_POOL = re.compile(r"[a-z0-9-]{1,64}")


class Keys:
    """The keys of one pool."""

    def __init__(self, pool: str) -> None:
        """Raises ConfigError where the pool's name is none."""
        if not _POOL.fullmatch(pool):
            raise ConfigError(
                f"pool {pool[:80]!r}: a pool's name is 1 to 64 of a-z, 0-9 and '-'", param="pool"
            )
        self.pool = pool
        self.prefix = f"rollout:{{{pool}}}"
        self.leases = f"{self.prefix}:leases"
        self.delayed = f"{self.prefix}:delayed"
        self.parked = f"{self.prefix}:parked"
        self.alone = f"{self.prefix}:alone"
        self.deadlines = f"{self.prefix}:deadlines"
        self.collected = f"{self.prefix}:collected"
        self.dead = f"{self.prefix}:dead"
        self.desired = f"{self.prefix}:desired"
        self.workers = f"{self.prefix}:workers"
        self.commands = f"{self.prefix}:commands"
        self.batches = f"{self.prefix}:batches"
        self.bell = f"rollout:bell:{pool}"
        self.control = f"rollout:control:{pool}"

    def jobs(self, lane: str) -> str:
        """A lane's stream."""
        return f"{self.prefix}:jobs:{lane}"

    def reply(self, job_id: str) -> str:
        """The one key of a job's whole life."""
        return f"{self.prefix}:reply:{job_id}"

    def progress(self, job_id: str) -> str:
        """A job's checkpoints."""
        return f"{self.prefix}:progress:{job_id}"

    def session(self, session: str) -> str:
        """A session's turns: `n:<rollout id>` node, `l:<rollout id>` link, `h:<mark>` rollout id; `turns`, `bytes`."""
        return f"{self.prefix}:session:{session}"

    def run(self, run: str) -> str:
        """A run's job ids."""
        return f"{self.prefix}:run:{run}"

    def inbox(self, client: str) -> str:
        """A client process's finished jobs."""
        return f"{self.prefix}:inbox:{client}"

    def batch(self, batch: str) -> str:
        """What is known of an offline batch."""
        return f"{self.prefix}:batch:{batch}"

    def batch_owner(self, batch: str) -> str:
        """The process that is at an offline batch."""
        return f"{self.prefix}:batch-owner:{batch}"

    def acks(self, command: str) -> str:
        """The workers' answers to a command."""
        return f"{self.prefix}:acks:{command}"

    def worker(self, worker: str) -> str:
        """What a worker says of itself."""
        return f"{self.prefix}:worker:{worker}"
