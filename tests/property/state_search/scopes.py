"""What is searched: two workers, at most two jobs, and every kind of fault, some at a time."""

from collections import Counter

from tests.property.state_search.move import FREE
from tests.property.state_search.world import Kind, Scope

BASE = {"send": FREE, "take": FREE, "finish": FREE, "sweep": FREE, "tick": FREE, "repeat": FREE}
"""A job is sent, taken and finished; time passes, somebody sweeps; who got no answer asks again."""
_GROW = {"checkpoint": FREE, "renew": FREE}
_GIVE_UP = {"fail": 1, "release": 1}
_LOSE = {"lost": 1, "late": 1}
_FAIL_OVER = {"copy": 1, "failover": 1}
_BY_HAND = {"raw": 1, "raw_same": 1, "raw_other": 1, "raw_bad": 1}
_HALVES = {"half_read": 1, "half_take": 1}
_AFTERWARDS = {"see": 1, "collect": 1, "expire": 1}
_CONTROL = {"pause": 1, "continue": 1, "publish": 1}

TWO = (Kind("a"), Kind("b", tokens=(1,)))

SCOPES = (
    Scope(
        "delivery",
        TWO,
        BASE | _GROW | _GIVE_UP | {"both": 1, "crash": 1},
        *(6, 8),
        crash_limit=2,
    ),
    Scope(
        "lost answers",
        TWO,
        BASE
        | _GROW
        | _GIVE_UP
        | _LOSE
        | {"wait": 1, "doubt": 1, "again": 1, "other": 1, "cancel": 1, "crash": 1},
        *(4, 6),
        crash_limit=2,
        slots=(1,),
    ),
    Scope(
        "failover",
        TWO,
        BASE | _GROW | _FAIL_OVER | {"flush": 1, "see": 1, "collect": 1, "release": 1, "lost": 1},
        *(4, 6),
        crash_limit=2,
        slots=(2,),
    ),
    Scope(
        "orders",
        (
            Kind("a", timeout_ms=20_000, max_staleness=0, tokens=(1,)),
            Kind("b", min_version=1, max_staleness=0, tokens=(1,)),
        ),
        BASE | _GIVE_UP | _CONTROL | {"checkpoint": 2, "renew": 1, "cancel": 1},
        *(5, 7),
        slots=(2,),
        versions=(0, 1),
    ),
    Scope(
        "parked",
        (Kind("a", tokens=(0,)), Kind("b", min_version=1, tokens=(0,))),
        BASE | {"wait": 2, "release": 1, "half_take": 1, "cancel": 1},
        *(5, 10),
        slots=(1,),
        versions=(0, 1),
    ),
    Scope(
        "by hand",
        (Kind("a", reply_ttl_ms=60_000, tokens=(1,)),),
        BASE
        | _BY_HAND
        | _HALVES
        | _AFTERWARDS
        | {"checkpoint": 1, "other": 1, "again": 1, "cancel": 1},
        *(4, 5),
        crash_limit=2,
    ),
    Scope(
        "afterwards",
        (Kind("a", min_version=1, reply_ttl_ms=60_000, tokens=(1,)),),
        BASE | _AFTERWARDS | {"checkpoint": 1, "raw_same": 1, "again": 1, "other": 1},
        *(5, 9),
        slots=(1,),
        versions=(0, 1),
        crash_limit=2,
    ),
    Scope(
        "quarantine",
        (Kind("a", timeout_ms=70_000, min_version=1, tokens=(1,)),),
        BASE | _GIVE_UP | {"checkpoint": 1, "half_take": 1, "half_read": 1, "cancel": 1},
        *(9, 13),
        slots=(2,),
        versions=(0, 1),
    ),
    Scope(
        "quarantine beside another",
        (Kind("a", tokens=(1,)), Kind("b", tokens=(0,))),
        BASE | {"wait": 2, "checkpoint": 1, "release": 1, "finish": 1},
        *(6, 11),
        slots=(2,),
    ),
    Scope(
        "two samples",
        (Kind("a", tokens=(2, 2)),),
        BASE | _FAIL_OVER | {"checkpoint": FREE, "release": 1, "lost": 1, "late": 1},
        *(5, 7),
        slots=(1,),
        crash_limit=2,
    ),
    Scope(
        "streamed",
        (Kind("a", tokens=(2, 1), timeout_ms=20_000, streamed=True),),
        BASE | _FAIL_OVER | {"checkpoint": 2, "release": 1, "lost": 1, "late": 1, "cancel": 1},
        *(4, 7),
        slots=(1,),
        crash_limit=2,
    ),
    Scope(
        "everything",
        (Kind("a", timeout_ms=20_000), Kind("b", min_version=1, reply_ttl_ms=60_000)),
        BASE
        | _GROW
        | _GIVE_UP
        | _LOSE
        | _FAIL_OVER
        | _BY_HAND
        | _HALVES
        | _AFTERWARDS
        | _CONTROL
        | {
            "wait": 1,
            "both": 1,
            "crash": 1,
            "doubt": 1,
            "again": 1,
            "other": 1,
            "cancel": 1,
            "flush": 1,
        },
        *(2, 4),
        versions=(0, 1),
    ),
)


def hunt(
    *names: str,
    kinds: tuple[Kind, ...] = (Kind("a"),),
    crash_limit: int = 2,
    fail_limit: int = 2,
) -> Scope:
    """A small scope for one guard: beside what always happens, each named move as often as it is named."""
    return Scope(
        *(" ".join(names), kinds, BASE | Counter(names), 14),
        slots=(1,),
        crash_limit=crash_limit,
        fail_limit=fail_limit,
    )
