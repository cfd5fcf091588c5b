"""Files of weights: which they are, and whether their bytes are those that were meant. Needs no torch."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

import msgspec

from protocols.errors import EngineBusy, EngineFailed, InvalidRequest, WeightsRefused
from worker.engines.base import Memory, Weights

INDEX = "model.safetensors.index.json"
NAMES_SHOWN = 3
_PIECE_BYTES = 1 << 20
Hashed = Callable[[bytes | bytearray], object]
"""Where bytes go to be hashed."""


class Files(msgspec.Struct, frozen=True):
    """What a path stands for."""

    name: str
    """Of the file or directory, without the way to it."""
    paths: Sequence[Path]
    """In order of name, as the checksum takes them."""
    loaded: frozenset[Path]
    """Those with tensors: what a directory's index names, or all."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


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


def find(path: str) -> Files:
    """The files of a path; raises WeightsRefused where there are none."""
    found = Path(path).expanduser()
    name = found.resolve().name
    if found.is_file():
        return Files(name, [found], frozenset([found]))
    if not found.is_dir():
        raise WeightsRefused(f"{name}: no such file or directory on this worker's machine")
    paths = sorted(one for one in found.glob("*.safetensors") if not one.name.startswith("."))
    if not paths:
        raise WeightsRefused(f"{name}: a directory without a file *.safetensors")
    return Files(name, paths, _indexed(found / INDEX, paths))


def verify(files: Files, sha256: str | None) -> None:
    """Compare the checksum, if there is one, without a look at the tensors; raises WeightsRefused."""
    if sha256 is None:
        return
    digest = hashlib.sha256()
    for path in files.paths:
        with path.open("rb") as file:
            hash_rest(file, digest.update)
    compare(files, digest.hexdigest(), sha256)


def hash_rest(file: BinaryIO, hashed: Hashed) -> None:
    """Give what is left of a file to `hashed`, piece by piece."""
    while piece := file.read(_PIECE_BYTES):
        hashed(piece)


def _reason(error: OSError | WeightsRefused) -> str:
    if isinstance(error, WeightsRefused):
        return error.message
    return f"{PurePath(str(error.filename or 'a file')).name} cannot be read: {error.strerror}"


def compare(files: Files, found: str, expected: str) -> None:
    """Raise WeightsRefused where two checksums differ."""
    if found != expected:
        raise WeightsRefused(f"{files.name}: its SHA-256 is {found}, and {expected[:64]} was told")


def listed(names: Sequence[str]) -> str:
    """Some names and how many there are: of many, only the first are shown."""
    shown = ", ".join(name[:80] for name in names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _indexed(index: Path, paths: Sequence[Path]) -> frozenset[Path]:
    """The files that an index names; all where there is no index."""
    if not index.exists():
        return frozenset(paths)
    try:
        named = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except msgspec.MsgspecError as error:
        raise WeightsRefused(f"{INDEX} is garbled: {error}") from error
    absent = sorted(named - {path.name for path in paths})
    if absent:
        raise WeightsRefused(f"{INDEX} names files that the directory lacks: {listed(absent)}")
    return frozenset(path for path in paths if path.name in named)
