"""Files of weights: which they are, and whether their bytes are those that were meant. Needs no torch."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from protocols.errors import WeightsRefused

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


def find(path: str) -> Files:
    """The files of a path; raises WeightsRefused where there are none."""
    found = Path(path)
    name = Path(os.path.abspath(path)).name[:80]
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
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WeightsRefused(f"{INDEX} is garbled: {error}") from error
    absent = sorted(named - {path.name for path in paths})
    if absent:
        raise WeightsRefused(f"{INDEX} names files that the directory lacks: {listed(absent)}")
    return frozenset(path for path in paths if path.name in named)
