"""What a server's refusal of a command means to a caller."""

from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

from protocols.errors import (
    ControlBusy,
    ControlRefused,
    InvalidCommand,
    RolloutError,
    ServerUnavailable,
)

FULL_RETRY_S = 1.0
_JUDGEMENTS: dict[str, type[RolloutError]] = {
    "INVALID": InvalidCommand,
    "REFUSED": ControlRefused,
    "NOTYET": ControlBusy,
}
_UNPREPARED = ("UNPREPARED", "NOGROUP", "UNBLOCKED", "Function not found")


def lacks_preparation(error: ResponseError) -> bool:
    """Whether `Broker.prepare` mends it."""
    return any(sign in str(error) for sign in _UNPREPARED)


def refusal(error: ResponseError, address: str) -> RolloutError:
    """The error to raise; `address` is the server's."""
    code, _, told = str(error).partition(" ")
    if code in _JUDGEMENTS:
        return _JUDGEMENTS[code](told)
    if isinstance(error, NoPermissionError):
        return ServerUnavailable(f"Redis at {address} denies this user a command: {error}")
    if isinstance(error, OutOfMemoryError) or "OOM" in str(error)[:80]:
        return ServerUnavailable(
            f"Redis at {address} is out of memory (maxmemory): it takes no jobs until results "
            "are collected or expire",
            retry_after_s=FULL_RETRY_S,
        )
    return ServerUnavailable(f"Redis at {address} refuses: {error}")
