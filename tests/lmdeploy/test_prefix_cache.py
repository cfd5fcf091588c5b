"""lmdeploy keeps its prefix cache over sleep and over new weights; the engine does not."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import engines
from tests.lmdeploy.cpu_shim import BLOCK_TOKENS
from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import altered, save_tiny_model
from tests.torch_engine_calls import Said, call, read, say
from tests.trained_weights import disturb
from worker.engines.base import Engine, Weights

TOLERATED = 1e-4
PROMPT = [7 * i % 250 + 5 for i in range(3 * BLOCK_TOKENS - 20)]
WHOLE_BLOCKS = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def trained(model: Path) -> Path:
    return altered(model, model.with_name("trained"), disturb)


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[Engine]:
    async with engines.running("lmdeploy", model) as started:
        yield started


async def said_and_forwarded(engine: Engine) -> tuple[Said, int]:
    """An answer, and how many positions of the prompt were not in the cache."""
    before = engine.counters()["forwarded_tokens"]
    (said,) = await say(engine, PROMPT, max_tokens=6, min_tokens=6, temperature=0)
    return said, engine.counters()["forwarded_tokens"] - before - 5


def assert_is_of(said: Said, weights: Path) -> None:
    (expected,) = PlainModel(weights).logprobs([PROMPT], [said.ids])
    assert said.logprobs == pytest.approx(of_tokens(expected, said.ids), abs=TOLERATED)


async def test_a_prompt_that_is_cached_is_not_forwarded_again(engine: Engine, model: Path) -> None:
    first, forwarded = await said_and_forwarded(engine)
    again, forwarded_again = await said_and_forwarded(engine)
    assert (forwarded, forwarded_again) == (len(PROMPT), len(PROMPT) - WHOLE_BLOCKS)
    assert again.ids == first.ids
    assert_is_of(again, model)


async def test_a_group_forwards_the_blocks_of_its_prompt_once(engine: Engine, model: Path) -> None:
    group = await say(engine, PROMPT, n=4, max_tokens=6, min_tokens=6)
    assert [len(one.ids) for one in group] == [6] * 4
    alone = len(PROMPT) - WHOLE_BLOCKS
    assert engine.counters()["forwarded_tokens"] == len(PROMPT) + 3 * alone + 4 * 5
    for one in group:
        assert_is_of(one, model)


async def test_a_group_whose_first_sample_is_given_up_goes_on(engine: Engine) -> None:
    generation = engine.generate(call(PROMPT, n=3, max_tokens=6, min_tokens=6))
    generation.stop(0)
    said = await read(generation, 3)
    assert [len(one.ids) for one in said] == [0, 6, 6]
    generation = engine.generate(call(PROMPT, n=3, max_tokens=6, min_tokens=6))
    generation.close()
    assert [len(one.ids) for one in await read(generation, 3)] == [0, 0, 0]


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_new_weights_do_not_meet_what_the_old_ones_cached(
    engine: Engine, trained: Path, level: int
) -> None:
    old, _ = await said_and_forwarded(engine)
    if level:
        await engine.offload(level)
        await engine.onload()
    await engine.update_weights(Weights(1, str(trained)))
    new, forwarded = await said_and_forwarded(engine)
    assert forwarded == len(PROMPT)
    assert new.ids != old.ids
    assert_is_of(new, trained)


async def test_a_cache_that_was_offloaded_is_not_used_again(engine: Engine, model: Path) -> None:
    await said_and_forwarded(engine)
    await engine.offload(1)
    await engine.onload()
    said, forwarded = await said_and_forwarded(engine)
    assert forwarded == len(PROMPT)
    assert_is_of(said, model)
