"""Orders about an engine's weights: which are legal when, and what a refusal says. Needs no torch."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import PurePath

from protocols.errors import EngineBusy, EngineFailed, InvalidRequest, WeightsRefused
from worker.engines.base import Memory, Weights


@contextmanager
def refusing(version: int, meanwhile: str) -> Generator[None]:
    """Let WeightsRefused say whose weights were refused and what is so `meanwhile`; an unreadable file is one."""
    try:
        yield
    except (OSError, WeightsRefused) as error:
        # without its traceback, whose frames hold what was read of the weights
        raise WeightsRefused(
            f"version {version} is not loaded: {_reason(error)}; {meanwhile}"
        ) from error.with_traceback(None)


def meanwhile(memory: Memory, version: int) -> str:
    """How things stand after a refusal."""
    if memory == "loaded":
        return f"version {version} goes on serving"
    return f"the engine's memory stays {memory}"


def busy(samples: int) -> EngineBusy:
    """What an engine says whose weights shall change below `samples` samples."""
    return EngineBusy(
        f"{samples} samples are under way; end them, or wait until they have ended, and try again",
        retry_after_s=1,
    )


def not_loaded(memory: Memory) -> EngineFailed:
    """What an engine says that shall generate without weights."""
    return EngineFailed(
        f"the engine's weights are {memory}, not loaded; try again when they are, or leave it to another worker"
    )


def check_order(weights: Weights, memory: Memory, first_version: int) -> None:
    """Refuse what no file could make right; `first_version` is of the weights that the engine started with."""
    if memory in {"offloaded", "discarded"}:
        raise WeightsRefused(f"the engine's memory is {memory}; onload first")
    if weights.path is None and weights.version != first_version:
        raise WeightsRefused(
            f"without a path only version {first_version} can be loaded, which the engine started with; give a path"
        )
    if weights.path is None and weights.sha256 is not None:
        raise WeightsRefused("a checksum belongs to a path; give both or neither")


def after_offload(memory: Memory, level: int) -> Memory:
    """Where the weights are then; raises InvalidRequest for a level that there is not."""
    if level not in {1, 2}:
        raise InvalidRequest(
            f"level: {level}; 1 keeps the weights in host memory, 2 discards them", param="level"
        )
    return "offloaded" if level == 1 and memory in {"loaded", "offloaded"} else "discarded"


def after_onload(memory: Memory) -> Memory:
    """Where the weights are then."""
    return "loaded" if memory in {"loaded", "offloaded"} else "stale"


def _reason(error: OSError | WeightsRefused) -> str:
    if isinstance(error, WeightsRefused):
        return error.message
    return f"{PurePath(str(error.filename or 'a file')).name} cannot be read: {error.strerror}"
