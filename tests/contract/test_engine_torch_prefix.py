"""The torch engine keeps what it computed for prompts that begin alike; only its counter tells."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from protocols.errors import EngineFailed
from protocols.rollout_state import TokenIds
from tests.architectures import ARCHITECTURES
from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import TOKEN_BYTES, VOCABULARY, altered, save_tiny_model, sized
from tests.torch_engine_calls import PROMPT, Said, call, read, running, say
from tests.trained_weights import disturb
from worker.engines.base import Call, Weights
from worker.engines.torch_engine import TorchEngine

TOLERATED = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[TorchEngine]:
    async with running(model, slots=4, prefill_chunk_tokens=16) as started:
        yield started


@pytest.fixture
async def forgetful(model: Path) -> AsyncIterator[TorchEngine]:
    """An engine that keeps nothing."""
    async with running(model, slots=4, prefix_caching=False) as started:
        yield started


def assert_same(said: Said, undisturbed: Said) -> None:
    assert said.ids == undisturbed.ids
    assert said.logprobs == pytest.approx(undisturbed.logprobs, abs=TOLERATED)
    assert said.finish_reason == undisturbed.finish_reason


async def forwarded(engine: TorchEngine, prompt: Sequence[int], **params: object) -> int:
    """Positions of the prompt that go through the model."""
    before = engine.counters()["forwarded_tokens"]
    (said,) = await say(engine, prompt, **params)
    return engine.counters()["forwarded_tokens"] - before - len(said.ids) + 1


async def test_a_second_turn_forwards_only_its_new_tokens(
    engine: TorchEngine, forgetful: TorchEngine
) -> None:
    turn, new = list(PROMPT), [300, 301, 302, 303, 304]
    for number in range(6):
        params = {"max_tokens": 20, "min_tokens": 20, "sampling_seed": number}
        before = engine.counters()["forwarded_tokens"]
        (said,) = await say(engine, turn, **params)
        (undisturbed,) = await say(forgetful, turn, **params)
        assert_same(said, undisturbed)
        # of an answer the last token was drawn and not forwarded
        fresh = len(PROMPT) if number == 0 else 1 + len(new)
        assert engine.counters()["forwarded_tokens"] - before == fresh + 19
        turn += [*said.ids, *new]


async def test_a_prompt_that_came_before_forwards_its_last_token_alone(engine: TorchEngine) -> None:
    assert await forwarded(engine, range(100)) == 100
    assert await forwarded(engine, range(100)) == 1
    assert await forwarded(engine, range(50)) == 1
    assert await forwarded(engine, [*range(50), 1, *range(51, 100)]) == 50


async def test_a_group_of_eight_on_512_tokens_forwards_its_prompt_once(tmp_path: Path) -> None:
    wide = save_tiny_model(tmp_path / "wide", sized(LlamaConfig, max_position_embeddings=1024))
    prompt = [5 + i % 300 for i in range(512)]
    async with running(wide, slots=3) as engine:
        group = await say(engine, prompt, n=8, max_tokens=5, min_tokens=5)
        assert [len(sample.ids) for sample in group] == [5] * 8
        assert engine.counters()["forwarded_tokens"] == 512 + 8 * 4
        assert await forwarded(engine, [*prompt, *group[6].ids, 3]) == 2


async def test_what_earlier_prompts_left_helps_whatever_runs_beside_it(
    model: Path, forgetful: TorchEngine
) -> None:
    chance = Random(3)
    roots = [[chance.randrange(1, VOCABULARY) for _ in range(60)] for _ in range(3)]

    def asked() -> Call:
        root = chance.choice(roots)[: chance.randrange(1, 60)]
        tail = [chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(1, 20))]
        return call(
            [*root, *tail],
            n=chance.randrange(1, 4),
            max_tokens=chance.randrange(1, 30),
            sampling_seed=chance.randrange(2**64),
            repetition_penalty=chance.choice([1.0, 1.2]),
        )

    calls = [asked() for _ in range(40)]
    # room for prefixes: 60 tokens, so that some are forgotten again and again
    tight = (2 * 256 + 60) * TOKEN_BYTES
    async with running(model, slots=4, kv_memory_bytes=tight, prefill_chunk_tokens=64) as engine:
        for first in range(0, 40, 10):
            batch = calls[first : first + 10]
            said = await asyncio.gather(*(read(engine.generate(c), c.params.n) for c in batch))
            for one, group in zip(batch, said, strict=True):
                for sample, alone in zip(
                    group, await read(forgetful.generate(one), one.params.n), strict=True
                ):
                    assert_same(sample, alone)
        spared = forgetful.counters()["forwarded_tokens"] - engine.counters()["forwarded_tokens"]
    assert spared > 100


async def test_no_more_is_kept_than_a_quarter_of_the_memory(model: Path) -> None:
    async with running(model, kv_memory_bytes=(4 * 150) * TOKEN_BYTES, slots=1) as engine:
        # beside two contexts of 256 there is room for 88
        assert await forwarded(engine, range(200), max_tokens=1) == 200
        assert await forwarded(engine, range(200), max_tokens=1) == 200 - 88
    async with running(model, kv_memory_bytes=800 * TOKEN_BYTES, slots=1) as engine:
        for start in (0, 60):
            assert await forwarded(engine, range(start, start + 240), max_tokens=1) == 240
        assert await forwarded(engine, range(60, 300), max_tokens=1) == 40
        assert await forwarded(engine, range(240), max_tokens=1) == 240


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_new_weights_do_not_meet_what_the_old_ones_left(
    engine: TorchEngine, model: Path, tmp_path: Path, level: int
) -> None:
    trained = altered(model, tmp_path / "trained", disturb)
    await say(engine, PROMPT, temperature=0)
    assert await forwarded(engine, PROMPT, temperature=0) == 1
    if level:
        await engine.offload(level)
        await engine.onload()
    await engine.update_weights(Weights(1, str(trained)))
    before = engine.counters()["forwarded_tokens"]
    (said,) = await say(engine, PROMPT, temperature=0, min_tokens=12)
    assert engine.counters()["forwarded_tokens"] - before == len(PROMPT) + 11
    (expected,) = PlainModel(trained).logprobs([PROMPT], [said.ids])
    assert said.logprobs == pytest.approx(of_tokens(expected, said.ids), abs=TOLERATED)


async def test_weights_that_come_back_find_nothing_kept(engine: TorchEngine) -> None:
    await say(engine, PROMPT)
    await engine.offload(1)
    await engine.onload()
    assert await forwarded(engine, PROMPT) == len(PROMPT)


async def test_kept_tokens_that_the_engine_has_seen_are_not_forwarded_again(
    engine: TorchEngine,
) -> None:
    asked = call(n=2, max_tokens=40, min_tokens=40)
    whole = await read(engine.generate(asked), 2)
    kept = tuple(TokenIds(one.ids[:25]) for one in whole)
    before = engine.counters()["forwarded_tokens"]
    generation = engine.generate(msgspec.structs.replace(asked, kept=kept))
    rests: list[list[int]] = [[], []]
    async for segment in generation:
        rests[segment.index] += segment.token_ids
    assert rests == [one.ids[25:] for one in whole]
    # the prompt's last token, and of each sample the last that was kept and all but the last that was drawn
    assert engine.counters()["forwarded_tokens"] - before == 1 + 2 * (1 + 14)


async def test_a_sample_given_up_leaves_what_it_had(engine: TorchEngine) -> None:
    generation = engine.generate(call(max_tokens=200, min_tokens=200))
    drawn: list[int] = []
    async for segment in generation:
        drawn += segment.token_ids
        if len(drawn) >= 10:
            generation.close()
    assert await forwarded(engine, [*PROMPT, *drawn[:10], 7]) <= 2


async def test_what_is_no_number_is_not_kept(tmp_path: Path, model: Path) -> None:
    def poison_token(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][300] = torch.nan

    poisoned = altered(model, tmp_path / "poisoned", poison_token)
    async with running(poisoned, slots=2) as engine, running(model) as whole:
        with pytest.raises(EngineFailed, match="not finite"):
            await say(engine, [*PROMPT, 300, 5, 6])
        (said,) = await say(engine, [*PROMPT, 5, 6])
        (expected,) = await say(whole, [*PROMPT, 5, 6])
    assert_same(said, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_architectures_go_on_from_what_is_kept(name: str, tmp_path: Path) -> None:
    made = save_tiny_model(tmp_path / "model", ARCHITECTURES[name])
    prompts = [[*range(20 + fork), 300 + fork, *range(40, 45 + 4 * fork)] for fork in range(5)]
    whole = [i % VOCABULARY for i in range(255)]
    async with running(made, slots=3, context_tokens=256) as engine:
        await say(engine, whole[:250])
        await say(engine, [*whole[:240], *prompts[0][-9:]])
        before = engine.counters()["forwarded_tokens"]
        said = await asyncio.gather(*(say(engine, prompt) for prompt in (*prompts, whole)))
        sent = sum(map(len, prompts)) + len(whole)
        spared = sent - (engine.counters()["forwarded_tokens"] - before)
    async with running(made, slots=1, context_tokens=256, prefix_caching=False) as forgetful:
        for (one,), prompt in zip(said, (*prompts, whole), strict=True):
            (alone,) = await say(forgetful, prompt)
            assert_same(one, alone)
    assert spared > 250
