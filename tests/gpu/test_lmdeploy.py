"""The engine lmdeploy on a real GPU, with nothing replaced: `pytest -m gpu tests/gpu` where lmdeploy is installed.

In half precision numbers differ from transformers' in float32 on the CPU by a little; other weights, or keys and values
of other weights, make them differ by a lot.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import altered, save_tiny_model, sized
from tests.torch_engine_calls import Said, call, read, say
from tests.trained_weights import disturb
from worker.engines.base import Engine, Weights

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

TOLERATED, APART = 0.05, 0.5
PROMPT = [7 * i % 250 + 5 for i in range(180)]
"""Of more than one block of the cache."""
KERNEL_SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
"""Heads of 64, which every kernel takes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = sized(LlamaConfig, **KERNEL_SIZES, max_position_embeddings=512)
    return save_tiny_model(tmp_path_factory.mktemp("models") / "small-llama", config)


@pytest.fixture(scope="module")
def trained(model: Path) -> Path:
    return altered(model, model.with_name("trained"), disturb)


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[Engine]:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device")
    from worker.engines.lmdeploy_engine import LMDeployEngine, Settings

    made = LMDeployEngine(Settings(model=str(model), cache_ratio=0.2))
    await made.start()
    yield made
    await made.close()


async def answer(engine: Engine) -> Said:
    (said,) = await say(engine, PROMPT, max_tokens=24, min_tokens=24)
    return said


def apart(said: Said, weights: Path) -> float:
    """How far its log-probabilities are from those of transformers with these weights."""
    (found,) = PlainModel(weights).logprobs([PROMPT], [said.ids])
    return max(abs(a - b) for a, b in zip(said.logprobs, of_tokens(found, said.ids), strict=True))


async def test_log_probabilities_are_near_those_of_transformers(
    engine: Engine, model: Path
) -> None:
    assert apart(await answer(engine), model) < TOLERATED
    group = await read(engine.generate(call(PROMPT, n=8, max_tokens=24, min_tokens=24)), 8)
    assert max(apart(one, model) for one in group) < TOLERATED
    assert len({tuple(one.ids) for one in group}) == 8


async def test_offloaded_memory_is_free_and_new_weights_meet_no_old_cache(
    engine: Engine, model: Path, trained: Path
) -> None:
    assert apart(await answer(engine), model) < TOLERATED
    for level, version in ((1, 1), (2, 2)):
        loaded = torch.cuda.memory_allocated()
        await engine.offload(level)
        assert torch.cuda.memory_allocated() < loaded / 2
        await engine.onload()
        if level == 1:
            assert apart(await answer(engine), model) < TOLERATED
        await engine.update_weights(Weights(version, str(trained)))
        said = await answer(engine)
        assert set(said.versions) == {version}
        assert apart(said, trained) < TOLERATED
        assert apart(said, model) > APART
        await engine.update_weights(Weights(0))
        assert apart(await answer(engine), model) < TOLERATED
