"""Weights that the torch engine refuses: each for a reason that it names, and the old ones go on."""

import json
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protocols.errors import WeightsRefused
from tests.torch_engine_calls import running
from tests.trained_weights import (
    Change,
    assert_refused,
    cut,
    engine,
    model,
    of_file,
    to_file,
    trained,
)
from worker.engines.torch_engine import TorchEngine
from worker.engines.torch_engine.safetensors_file import SafetensorsFile

NORM = "model.norm.weight"
HEAD = "lm_head.weight"


__all__ = ["engine", "model", "trained"]


def garbled(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20:60] = b"\xff" * 40
    file.write_bytes(data)


def nested(file: Path) -> None:
    header = b'{"a":' + b"[" * 10**6
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def misplaced(file: Path) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[NORM]["shape"] = [31]
    fresh = json.dumps(header).encode()
    file.write_bytes(len(fresh).to_bytes(8, "little") + fresh + data[end:])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def other(file: Path) -> None:
    file.write_text("no weights at all")


def directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "garbled": (garbled, "its header is cut off or garbled: .*(malformed|decode)"),
    "nested": (nested, "its header is cut off or garbled: .*recursion"),
    "empty": (cut(0), "its header .* no safetensors file"),
    "no whole header": (cut(0.002), "its header is cut off or garbled: .* bytes are announced"),
    "cut off": (cut(0.7), r"it has \d+ bytes, and its header tells of \d+; it was cut off"),
    "too long": (longer, "its header tells of"),
    "another kind of file": (other, "it is no safetensors file"),
    "wrong shape in the header": (misplaced, "the place of model.norm.weight does not fit"),
    "empty directory": (directory, r"directory without a file \*\.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
async def test_a_damaged_file_is_refused(
    name: str, engine: TorchEngine, trained: Path, tmp_path: Path
) -> None:
    damage, reason = DAMAGES[name]
    file = to_file(of_file(trained), tmp_path / "w.safetensors")
    damage(file)
    await assert_refused(engine, file, f"w.safetensors: .*{reason}")


def drop_all(weights: dict[str, Tensor]) -> None:
    for name in list(weights)[1:]:
        del weights[name]


def widen(weights: dict[str, Tensor]) -> None:
    weights[NORM] = torch.ones(33)


def to(dtype: torch.dtype) -> Change:
    return lambda weights: weights.update({NORM: weights[NORM].to(dtype)})


def put(value: float) -> Change:
    return lambda weights: weights[HEAD].view(-1)[77:78].fill_(value)


def lack(weights: dict[str, Tensor]) -> None:
    del weights[NORM]


def add(weights: dict[str, Tensor]) -> None:
    weights["extra"] = torch.ones(2)


CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lack, r"tensors are missing: 1 \(model.norm.weight\)"),
    "nearly all missing": (drop_all, r"tensors are missing: 20 \(.*, .*, .* and 17 more\)"),
    "unknown": (add, r"unknown to the model: 1 \(extra\)"),
    "shape": (widen, r"model.norm.weight has the shape \[33\], and the model's is \[32\]"),
    "integers": (to(torch.int32), "model.norm.weight has the type I32"),
    "float64": (to(torch.float64), "model.norm.weight has the type F64"),
    "nan": (put(torch.nan), "lm_head.weight has values that are not finite"),
    "infinite": (put(torch.inf), "lm_head.weight has values that are not finite"),
    "minus infinite": (put(-torch.inf), "lm_head.weight has values that are not finite"),
}


@pytest.mark.parametrize("name", CHANGES)
async def test_weights_that_are_not_the_models_are_refused(
    name: str, engine: TorchEngine, trained: Path, tmp_path: Path
) -> None:
    change, reason = CHANGES[name]
    weights = of_file(trained)
    change(weights)
    file = to_file(weights, tmp_path / "w.safetensors")
    await assert_refused(engine, file, f"w.safetensors: .*{reason}")


async def test_a_value_too_large_for_the_engines_type_is_refused(
    model: Path, trained: Path, tmp_path: Path
) -> None:
    weights = of_file(trained)
    put(1e6)(weights)
    async with running(model, dtype="float16") as engine:
        path = to_file(weights, tmp_path / "w.safetensors")
        await assert_refused(engine, path, "lm_head.weight has values that are not finite")


def test_a_file_that_is_shortened_while_it_is_read_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    file = to_file(of_file(trained), tmp_path / "w.safetensors")
    with BufferedReader(FileIO(file), 16) as opened:
        tensors: Iterator[object] = SafetensorsFile(opened, file.name).tensors(len)
        next(tensors)
        cut(0.5)(file)
        with pytest.raises(WeightsRefused, match="became shorter while it was read"):
            list(tensors)
