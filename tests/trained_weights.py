"""Weights that training might have made, as files; how a torch engine answers with them; the fixtures of its tests."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor

from protocols.errors import WeightsRefused
from tests.tiny_model import altered, save_tiny_model
from tests.torch_engine_calls import Said, running, say
from worker.engines.base import Weights
from worker.engines.torch_engine import TorchEngine

Change = Callable[[dict[str, Tensor]], object]
_FILES = cast("Any", safetensors.torch)  # its types are partial


def disturb(weights: dict[str, Tensor], by: float = 0.1) -> None:
    """What a step of training might do, only more."""
    generator = torch.Generator().manual_seed(3)
    for name in sorted(weights):
        if weights[name].dim() > 1:
            weights[name] += by * torch.randn(weights[name].shape, generator=generator)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one that nobody changes."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def trained(model: Path) -> Path:
    """The same, its weights disturbed."""
    return altered(model, model.with_name("trained"), disturb)


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[TorchEngine]:
    """One with `model`, started. It keeps no prefixes: the same answer is then the same to the bit."""
    async with running(model, prefix_caching=False) as started:
        yield started


def to_file(weights: dict[str, Tensor], file: Path) -> Path:
    _FILES.save_file(weights, file, metadata={"format": "pt"})
    return file


def of_file(file: Path) -> dict[str, Tensor]:
    """Of a file, or of the one file in a model's directory."""
    return _FILES.load_file(file / "model.safetensors" if file.is_dir() else file)


async def answer(engine: TorchEngine) -> Said:
    (said,) = await say(engine, temperature=0, max_tokens=20, min_tokens=20)
    return said


def cut(keep: float) -> Callable[[Path], None]:
    def shorten(file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])

    return shorten


async def assert_refused(engine: TorchEngine, path: Path, reason: str) -> None:
    before = await answer(engine)
    with pytest.raises(WeightsRefused, match=reason) as caught:
        await engine.update_weights(Weights(1, str(path)))
    assert caught.value.message.endswith("version 0 goes on serving")
    assert str(path.parent) not in caught.value.message
    after = await answer(engine)
    assert (after.ids, after.logprobs) == (before.ids, before.logprobs)
    assert (engine.memory, set(after.versions)) == ("loaded", {0})
