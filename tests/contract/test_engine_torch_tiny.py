"""What the torch engine promises, on a model of a few thousand weights."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from protocols.errors import ConfigError, ContextLengthExceeded, EngineFailed, InvalidRequest
from protocols.rollout_state import SampleParams
from tests.tiny_model import SIZES, TOKEN_BYTES, VOCABULARY, altered, save_tiny_model, sized
from tests.torch_engine_calls import LIMIT_S, PROMPT, Said, call, drain, read, running, say
from worker.engines.base import Generation
from worker.engines.torch_engine import Settings, TorchEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[TorchEngine]:
    async with running(model) as started:
        yield started


async def test_what_the_engine_tells_of_itself(engine: TorchEngine) -> None:
    assert (engine.name, engine.model) == ("torch", "tiny-llama")
    assert engine.context_tokens == SIZES["max_position_embeddings"]
    assert engine.vocabulary == VOCABULARY
    fields = {*SampleParams.__struct_fields__} - {"return_routed_experts"}
    assert engine.capabilities == fields | {"offload", "update_weights"}


async def test_prompts_in_chunks_give_what_whole_prompts_give(model: Path) -> None:
    prompts = [list(range(20, 20 + length)) for length in (90, 16, 17, 3)]

    async def all_of(**settings: object) -> list[list[Said]]:
        async with running(model, **settings) as engine:
            return await asyncio.gather(*(say(engine, prompt) for prompt in prompts))

    whole, chunked = await all_of(), await all_of(prefill_chunk_tokens=16)
    for (one,), (other,) in zip(whole, chunked, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


async def test_a_long_prompt_does_not_hold_others_up(model: Path) -> None:
    arrivals: list[str] = []

    async def note(name: str, generation: Generation) -> None:
        async for segment in generation:
            arrivals.extend(name for _ in segment.token_ids)

    async with running(model, prefill_chunk_tokens=8) as engine:
        short = engine.generate(call([3], max_tokens=200, min_tokens=200))
        await anext(aiter(short))
        long = engine.generate(call(range(160), max_tokens=1))
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(note("short", short), note("long", long))
    assert arrivals.index("long") >= 160 // 8 - 1


async def test_a_seed_gives_the_same_whatever_else_runs(engine: TorchEngine) -> None:
    (alone,) = await say(engine, max_tokens=40, min_tokens=40)
    others = [
        engine.generate(call(range(seed, 3 * seed), n=2, max_tokens=20 + seed, sampling_seed=seed))
        for seed in range(3, 9)
    ]
    (among_others,) = await say(engine, max_tokens=40, min_tokens=40)
    assert among_others.ids == alone.ids
    assert among_others.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    for other in others:
        other.close()
    (another_seed,) = await say(engine, max_tokens=40, min_tokens=40, sampling_seed=2)
    assert another_seed.ids != alone.ids


async def test_going_on_behind_some_tokens_gives_the_tokens_of_an_undisturbed_run(
    engine: TorchEngine,
) -> None:
    (whole,) = await say(engine, max_tokens=30, min_tokens=30)
    (rest,) = await say(engine, [*PROMPT, *whole.ids[:11]], max_tokens=19, min_tokens=19)
    assert rest.ids == whole.ids[11:]


async def test_sample_i_of_a_group_draws_with_seed_plus_i(engine: TorchEngine) -> None:
    last = 2**64 - 2
    group = await say(engine, n=4, sampling_seed=last)
    for i, sample in enumerate(group):
        (alone,) = await say(engine, sampling_seed=(last + i) % 2**64)
        assert sample.ids == alone.ids
    assert len({tuple(sample.ids) for sample in group}) > 1


async def test_a_group_forwards_its_prompt_once(model: Path) -> None:
    async with running(model, slots=3) as engine:
        group = await say(engine, n=8, max_tokens=5, min_tokens=5)
        counters = engine.counters()
    assert [len(sample.ids) for sample in group] == [5] * 8
    assert counters["forwarded_tokens"] == len(PROMPT) + 8 * 4  # a last token is not forwarded
    assert counters["generated_tokens"] == 8 * 5


async def test_more_samples_than_slots_wait_their_turn(model: Path) -> None:
    async with running(model, slots=2) as few, running(model, slots=8) as many:
        for engine in (few, many):
            assert (engine.counters()["running_samples"], engine.context_tokens) == (0, 256)
        asked = [call(range(i + 1, 4 * i + 5), n=3, sampling_seed=i) for i in range(4)]
        by_few = await asyncio.gather(*(read(few.generate(one), 3) for one in asked))
        by_many = await asyncio.gather(*(read(many.generate(one), 3) for one in asked))
    assert [[s.ids for s in one] for one in by_few] == [[s.ids for s in one] for one in by_many]


async def test_counters_tell_what_runs_and_what_waits(model: Path) -> None:
    async with running(model, slots=2) as engine:
        generation = engine.generate(call(n=5, max_tokens=100, min_tokens=100))
        assert engine.counters()["waiting_samples"] == 5
        await anext(aiter(generation))
        assert engine.counters()["running_samples"] == 2
        assert engine.counters()["waiting_samples"] == 3
        generation.close()
        await say(engine)
        assert engine.counters()["running_samples"] == engine.counters()["waiting_samples"] == 0


async def test_stopping_a_sample_frees_its_slot_and_spares_the_others(model: Path) -> None:
    async with running(model, slots=2) as engine:
        generation = engine.generate(call(n=3, max_tokens=60, min_tokens=60))
        said = [Said() for _ in range(3)]
        async with asyncio.timeout(LIMIT_S):
            async for segment in generation:
                said[segment.index].add(segment)
                if segment.index == 0 and len(said[0].ids) >= 3:
                    generation.stop(0)
        assert [one.finish_reason for one in said] == [None, "length", "length"]
        assert len(said[0].ids) < 60
        alone = [
            await say(engine, sampling_seed=1 + i, max_tokens=60, min_tokens=60) for i in range(3)
        ]
    assert [one.ids for one in said[1:]] == [one.ids for (one,) in alone[1:]]
    assert said[0].ids == alone[0][0].ids[: len(said[0].ids)]


async def test_closing_a_generation_frees_all_it_has(model: Path) -> None:
    async with running(model, slots=1) as engine:
        endless = [engine.generate(call(n=2, max_tokens=230, min_tokens=230)) for _ in range(3)]
        await anext(aiter(endless[0]))
        for generation in endless:
            generation.close()
        generated = engine.counters()["generated_tokens"]
        (said,) = await say(engine)
        assert said.finish_reason is not None
        assert engine.counters()["generated_tokens"] - generated < 230
        for generation in endless:
            assert [segment async for segment in generation] == []


async def test_a_stop_token_ends_a_sample_and_is_its_last(engine: TorchEngine) -> None:
    (free,) = await say(engine, max_tokens=40, min_tokens=40)
    stop = free.ids[7]
    first = free.ids.index(stop)
    (stopped,) = await say(engine, max_tokens=40, stop_token_ids=(stop,))
    assert stopped.ids == free.ids[: first + 1]
    assert len(stopped.logprobs) == first + 1
    assert stopped.finish_reason == "stop"


async def test_the_models_own_end_token_ends_a_sample(tmp_path: Path, model: Path) -> None:
    async with running(model) as engine:
        (free,) = await say(engine, temperature=0, max_tokens=20)
    ending = save_tiny_model(tmp_path / "ending", sized(LlamaConfig, eos_token_id=[0, free.ids[4]]))
    async with running(ending) as engine:
        (said,) = await say(engine, temperature=0, max_tokens=20)
    assert said.ids == free.ids[: free.ids.index(free.ids[4]) + 1]
    assert said.finish_reason == "stop"


async def test_no_stop_token_comes_before_min_tokens(engine: TorchEngine) -> None:
    stops = tuple(range(0, VOCABULARY, 2))
    (soon,) = await say(engine, stop_token_ids=stops, max_tokens=50)
    (later,) = await say(engine, stop_token_ids=stops, max_tokens=50, min_tokens=10)
    assert len(soon.ids) < 10 <= len(later.ids)
    assert not set(later.ids[:10]) & set(stops)
    assert later.ids[-1] in stops
    assert later.finish_reason == "stop"


async def test_a_full_context_ends_a_sample_as_length(engine: TorchEngine) -> None:
    for params in ({"max_tokens": 1000}, {"max_tokens": None}):
        (said,) = await say(engine, range(240), min_tokens=1000, **params)
        assert (len(said.ids), said.finish_reason) == (16, "length")
    (last,) = await say(engine, range(255), min_tokens=1)
    assert (len(last.ids), last.finish_reason) == (1, "length")


async def test_prompts_that_no_engine_could_take_are_refused(engine: TorchEngine) -> None:
    with pytest.raises(ContextLengthExceeded, match="256 tokens and the context 256"):
        engine.generate(call([1] * 256))
    with pytest.raises(InvalidRequest, match="no tokens"):
        engine.generate(call([]))
    with pytest.raises(InvalidRequest, match=f"token id {VOCABULARY}"):
        engine.generate(call([1, VOCABULARY]))
    assert (await say(engine))[0].finish_reason is not None


async def test_samples_wait_while_all_memory_is_spoken_for(model: Path) -> None:
    # beside one context for prompts: one row of 200 tokens, or three of 60
    async with running(model, kv_memory_bytes=TOKEN_BYTES * (256 + 256), slots=4) as engine:
        assert engine.context_tokens == 256
        small = engine.generate(call(n=3, max_tokens=40, min_tokens=40))
        large = engine.generate(call(max_tokens=180, min_tokens=180))
        async with asyncio.timeout(LIMIT_S):
            await anext(aiter(small))
            assert engine.counters()["running_samples"] == 3
            await anext(aiter(large))
            assert engine.counters()["running_samples"] == 1
            ends = [segment.finish_reason async for segment in small]
    assert ends == ["length"] * 3


async def test_too_little_memory_shortens_the_context_or_is_refused(model: Path) -> None:
    async with running(model, kv_memory_bytes=TOKEN_BYTES * 100) as engine:
        assert engine.context_tokens == 50
        (said,) = await say(engine, range(20), max_tokens=None, min_tokens=50)
        assert (len(said.ids), said.finish_reason) == (30, "length")
        with pytest.raises(ContextLengthExceeded):
            engine.generate(call(range(50)))
    with pytest.raises(ConfigError, match="kv_memory_bytes"):
        await TorchEngine(Settings(model=str(model), kv_memory_bytes=1000)).start()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"context_tokens": 257}, "context_tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"model": "absent"}, "absent"),
    ],
)
async def test_a_wrong_setting_is_refused_by_name(
    model: Path, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        async with running(model, **settings):
            pass


async def test_the_alternatives_of_each_token_are_the_likeliest(engine: TorchEngine) -> None:
    generation = engine.generate(call(top_logprobs=3, max_tokens=6, temperature=0))
    async with asyncio.timeout(LIMIT_S):
        segments = [segment async for segment in generation]
    tokens = [one for segment in segments for one in segment.token_ids]
    own = [one for segment in segments for one in segment.logprobs]
    top_ids = [one for segment in segments for one in segment.top_ids]
    top = [one for segment in segments for one in segment.top_logprobs]
    assert len(top_ids) == len(top) == 3 * len(tokens)
    assert top_ids[::3] == tokens
    assert top[::3] == pytest.approx(own)
    assert all(a >= b for i in range(0, len(top), 3) for a, b in [(top[i], top[i + 1])])


async def test_tokens_bear_the_policy_version_that_drew_them(engine: TorchEngine) -> None:
    generation = engine.generate(call(max_tokens=150, min_tokens=150))
    said = Said()
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            said.add(segment)
            engine.policy_version = 3
    assert said.versions == sorted(said.versions)
    assert set(said.versions) == {0, 3}


async def test_half_precision_generates(model: Path) -> None:
    async with running(model, dtype="bfloat16") as engine:
        (said,) = await say(engine)
    assert len(said.ids) == 12 or said.finish_reason == "stop"


async def test_one_poisoned_prompt_fails_alone(tmp_path: Path, model: Path) -> None:
    def poison_token(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][300] = torch.nan

    poisoned = altered(model, tmp_path / "poisoned", poison_token)
    async with running(model) as whole, running(poisoned, slots=4) as engine:
        # what the poisoned rows leave behind lies where the next users of these rows are masked
        poison = call([5, 300, *range(60)], n=2)
        others = [
            call(range(length), sampling_seed=length, max_tokens=25, min_tokens=25)
            for length in (70, 9, 3, 8, 4, 6)
        ]
        results = await asyncio.gather(
            read(engine.generate(poison), 2),
            *(read(engine.generate(one)) for one in others),
            return_exceptions=True,
        )
        after = [await read(engine.generate(one)) for one in others]
        expected = [await read(whole.generate(one)) for one in others]
    failed, *said = results
    assert isinstance(failed, EngineFailed)
    assert "not finite" in failed.message
    for one in (said, after):
        ids = [sample.ids for group in cast("list[list[Said]]", one) for sample in group]
        assert ids == [sample.ids for group in expected for sample in group]


async def test_a_broken_step_fails_every_reader_and_the_engine_refuses_more(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generations = [engine.generate(call(n=8, max_tokens=200, min_tokens=200)) for _ in range(3)]
    await anext(aiter(generations[0]))

    def break_down(*_: object) -> None:
        raise RuntimeError("out of memory at 0xdeadbeef")

    monkeypatch.setattr("worker.engines.torch_engine.runner.draw", break_down)
    results = await asyncio.gather(
        *(drain(generation) for generation in generations), return_exceptions=True
    )
    for failure in results:
        assert isinstance(failure, EngineFailed)
        assert "RuntimeError" in failure.message
        assert "0xdeadbeef" not in failure.message
    assert "0xdeadbeef" in caplog.text
    with pytest.raises(EngineFailed, match="restarted"):
        engine.generate(call())
    async with asyncio.timeout(LIMIT_S):
        assert "restarted" in (await engine.breakdown()).message


async def test_closing_the_engine_fails_what_is_open_and_ends_its_thread(model: Path) -> None:
    async with running(model, slots=1) as engine:
        generations = [engine.generate(call(max_tokens=230, min_tokens=230)) for _ in range(2)]
        await anext(aiter(generations[0]))
    results = await asyncio.gather(*map(drain, generations), return_exceptions=True)
    assert [type(one) for one in results] == [EngineFailed, EngineFailed]
    assert not [one for one in threading.enumerate() if one.name == "torch-engine"]
    with pytest.raises(EngineFailed, match="not running"):
        engine.generate(call())
    await engine.close()


async def test_an_engine_that_was_not_started_generates_nothing(model: Path) -> None:
    engine = TorchEngine(Settings(model=str(model)))
    assert engine.counters()["running_samples"] == 0
    with pytest.raises(EngineFailed, match="not running"):
        engine.generate(call())
