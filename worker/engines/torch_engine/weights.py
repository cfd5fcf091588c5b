"""New weights, read into host memory and found right before the running ones are touched."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protocols.errors import ConfigError, WeightsRefused
from worker.engines.base import Weights
from worker.engines.weight_files import Files, Hashed, compare, find, hash_rest, listed

from .parameters import Parameters, Place
from .safetensors_file import Entry, SafetensorsFile

if TYPE_CHECKING:
    from .model import LanguageModel

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be of; they become what the network computes in."""


def stage(
    weights: Weights, parameters: Parameters, reload: "Callable[[], LanguageModel]"
) -> list[Tensor]:
    """Host tensors for all places, in their order; without a path those of the model that `reload` gives.

    Raises WeightsRefused, and OSError where a file cannot be read. Takes as long as reading and hashing takes.
    """
    if weights.path is None:
        return _from_model(reload, parameters)
    return _from_files(find(weights.path), weights.sha256, parameters)


def _from_model(reload: "Callable[[], LanguageModel]", parameters: Parameters) -> list[Tensor]:
    try:
        first = reload().parameters()
    except ConfigError as error:
        raise WeightsRefused(error.message) from error
    if [(one.names, one.shape) for one in first.places] != [
        (one.names, one.shape) for one in parameters.places
    ]:
        raise WeightsRefused("the engine's model directory holds another model than at the start")
    # copies: the loader's tensors may be views of the mapped file
    return [
        _taken(new.tensor, place, new.names[0])
        for new, place in zip(first.places, parameters.places, strict=True)
    ]


def _from_files(files: Files, sha256: str | None, parameters: Parameters) -> list[Tensor]:
    by_name = {name: place for place in parameters.places for name in place.names}
    digest = hashlib.sha256()
    staged: dict[Place, Tensor] = {}
    with ExitStack() as stack:
        opened = {path: stack.enter_context(path.open("rb")) for path in files.paths}
        tables = {
            path: SafetensorsFile(file, path.name)
            for path, file in opened.items()
            if path in files.loaded
        }
        _check_names(files.name, list(tables.values()), parameters)
        for table in tables.values():
            _check_kinds(table, by_name)
        hashed = digest.update if sha256 else _ignore
        for path, file in opened.items():
            if path in tables:
                _read(tables[path], hashed, by_name, staged)
            elif sha256:
                hash_rest(file, hashed)
    if sha256:
        compare(files, digest.hexdigest(), sha256)
    return [staged[place] for place in parameters.places]


def _check_names(name: str, tables: list[SafetensorsFile], parameters: Parameters) -> None:
    """Each tensor once, under at least one of its names, and no others."""
    found = [one for table in tables for one in table.entries if one not in parameters.ignored]
    names = Counter(found)
    missing = [
        place.names[0] for place in parameters.places if names.keys().isdisjoint(place.names)
    ]
    unknown = sorted(
        names.keys() - set(chain.from_iterable(place.names for place in parameters.places))
    )
    twice = [name for name, times in names.items() if times > 1]
    faults = [
        f"{words} {len(which)} ({listed(which)})"
        for words, which in (
            ("tensors are missing:", missing),
            ("tensors are unknown to the model:", unknown),
            ("tensors are there twice:", twice),
        )
        if which
    ]
    if faults:
        raise WeightsRefused(f"{name}: {'; '.join(faults)}")


def _check_kinds(table: SafetensorsFile, by_name: Mapping[str, Place]) -> None:
    """Shapes and types, before any weights are read."""
    for name, entry in table.entries.items():
        place = by_name.get(name)
        if place is None:
            continue
        if entry.dtype not in DTYPES or not place.dtype.is_floating_point:
            raise WeightsRefused(
                f"{table.name}: {name} has the type {entry.dtype[:16]}, and only {', '.join(DTYPES)} are taken for "
                "weights of floating point"
            )
        if entry.shape != place.shape:
            raise WeightsRefused(
                f"{table.name}: {name} has the shape {list(entry.shape)}, and the model's is {list(place.shape)}"
            )


def _read(
    table: SafetensorsFile,
    hashed: Hashed,
    by_name: Mapping[str, Place],
    staged: dict[Place, Tensor],
) -> None:
    for name, read in table.tensors(hashed):
        place = by_name.get(name)
        if place is None:
            continue
        new = _taken(_viewed(read, table.entries[name]), place, f"{table.name}: {name}")
        former = staged.setdefault(place, new)
        if former is not new and not torch.equal(former, new):
            raise WeightsRefused(
                f"{table.name}: {name} is one with another tensor of this model, and has other values"
            )


def _viewed(read: bytearray, entry: Entry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    flat = torch.frombuffer(read, dtype=dtype) if read else torch.empty(0, dtype=dtype)
    return flat.view(entry.shape)


def _taken(tensor: Tensor, place: Place, name: str) -> Tensor:
    """A copy in the place's type; refused where a value is not finite, in the file or after rounding."""
    new = tensor.to(place.dtype, copy=True)
    # the extremes are no numbers where one value is none, and to find them takes no memory
    if new.numel() and not all(one.isfinite() for one in torch.aminmax(new)):
        raise WeightsRefused(f"{name} has values that are not finite as {place.dtype}")
    return new


def _ignore(_read: bytes | bytearray) -> None:
    pass
