"""What every engine with a model promises of what it draws; which engines there are, `tests/engines.py` says."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from protocols.errors import ContextLengthExceeded, EngineFailed, InvalidRequest
from protocols.job import Segment
from protocols.rollout_state import TokenIds
from tests import engines
from tests.plain_model import PlainModel, listed, of_tokens
from tests.tiny_model import CONTEXT_TOKENS, VOCABULARY, save_tiny_model
from tests.torch_engine_calls import LIMIT_S, PROMPT, Said, call, drain, read, say
from worker.engines.base import Call, Engine

TOLERATED = 1e-4
MINIMUM = {
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "stops",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "return_logprob",
    "top_logprobs",
    "sampling_seed",
    "offload",
    "update_weights",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def plain(model: Path) -> PlainModel:
    return PlainModel(model)


@pytest.fixture(params=engines.WITH_A_MODEL)
async def engine(request: pytest.FixtureRequest, model: Path) -> AsyncIterator[Engine]:
    async with engines.running(request.param, model) as started:
        yield started


def kept_call(asked: Call, kept: Sequence[Sequence[int]], ended: Sequence[int] = ()) -> Call:
    """The call of a later attempt."""
    told = tuple(TokenIds(ids) for ids in kept)
    return msgspec.structs.replace(asked, kept=told, ended=frozenset(ended))


class Rest(Said):
    """A sample from its first new token on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def add(self, segment: Segment) -> None:
        super().add(msgspec.structs.replace(segment, start=segment.start - self.start))


async def resume(engine: Engine, asked: Call, cuts: Sequence[int]) -> list[Rest]:
    rests = [Rest(cut) for cut in cuts]
    async with asyncio.timeout(LIMIT_S):
        async for segment in engine.generate(asked):
            rests[segment.index].add(segment)
    return rests


def test_what_every_engine_with_a_model_can_do(engine: Engine) -> None:
    assert engine.capabilities >= MINIMUM
    assert (engine.model, engine.vocabulary) == ("tiny-llama", VOCABULARY)
    assert engine.context_tokens == CONTEXT_TOKENS


async def test_each_token_has_its_log_probability_and_version(engine: Engine) -> None:
    for said in await say(engine, n=3, max_tokens=9, min_tokens=9):
        assert len(said.ids) == len(said.logprobs) == len(said.versions) == 9
        assert all(-50 < one < 0 for one in said.logprobs)
        assert (set(said.versions), said.finish_reason) == ({0}, "length")


async def test_the_likeliest_tokens_and_all_log_probabilities_are_those_of_transformers(
    engine: Engine, plain: PlainModel
) -> None:
    prompts = [list(range(20, 20 + length)) for length in (90, 16, 65, 3)]
    asked = [call(one, temperature=0, max_tokens=30) for one in prompts]
    said = [one for (one,) in await asyncio.gather(*(read(engine.generate(c)) for c in asked))]
    assert [one.ids for one in said] == plain.greedy(prompts, 30, 0)
    logprobs = plain.logprobs(prompts, [one.ids for one in said])
    for one, expected in zip(said, logprobs, strict=True):
        assert one.logprobs == pytest.approx(of_tokens(expected, one.ids), abs=TOLERATED)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.4}],
    ids=",".join,
)
async def test_log_probabilities_are_of_the_policy_as_it_is(
    engine: Engine, plain: PlainModel, params: dict[str, object]
) -> None:
    samples = await say(engine, PROMPT, n=2, max_tokens=30, min_tokens=30, **params)
    expected = plain.logprobs([PROMPT] * 2, [one.ids for one in samples])
    for said, logprobs in zip(samples, expected, strict=True):
        assert said.logprobs == pytest.approx(of_tokens(logprobs, said.ids), abs=TOLERATED)


async def test_top_k_bounds_what_is_drawn(engine: Engine, plain: PlainModel) -> None:
    (said,) = await say(engine, top_k=3, max_tokens=40, min_tokens=40)
    (logprobs,) = plain.logprobs([PROMPT], [said.ids])
    likeliest: list[list[int]] = listed(logprobs.topk(4).indices)
    assert all(one in four for one, four in zip(said.ids, likeliest, strict=True))
    assert any(one != four[0] for one, four in zip(said.ids, likeliest, strict=True))


async def test_the_repetition_penalty_counts_prompt_and_response(
    engine: Engine, plain: PlainModel
) -> None:
    penalty, prompts = 1.3, [list(range(5, 40)), [7, 8]]
    asked = [
        call(one, temperature=0, repetition_penalty=penalty, max_tokens=25, min_tokens=25)
        for one in prompts
    ]
    said = [one for (one,) in await asyncio.gather(*(read(engine.generate(c)) for c in asked))]
    for prompt, one in zip(prompts, said, strict=True):
        (logits,) = plain.logits([prompt], [one.ids])
        for at, row in enumerate(logits):
            seen = torch.tensor(sorted({*prompt, *one.ids[:at]}))
            row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
            row[0] = -torch.inf
            best = row.max()
            assert best - row[one.ids[at]] < TOLERATED


async def test_the_alternatives_of_each_token_are_the_likeliest(
    engine: Engine, plain: PlainModel
) -> None:
    asked = call(top_logprobs=3, max_tokens=20, min_tokens=20)
    # beside one that wants more, and one that wants none
    others = [engine.generate(call(top_logprobs=wide, max_tokens=30)) for wide in (5, 0)]
    async with asyncio.timeout(LIMIT_S):
        segments = [segment async for segment in engine.generate(asked)]
    for other in others:
        other.close()
    tokens = [one for segment in segments for one in segment.token_ids]
    top_ids = [one for segment in segments for one in segment.top_ids]
    top = [one for segment in segments for one in segment.top_logprobs]
    (logprobs,) = plain.logprobs([PROMPT], [tokens])
    assert top_ids == [one for row in listed(logprobs.topk(3).indices) for one in row]
    expected = [one for row in listed(logprobs.topk(3).values) for one in row]
    assert top == pytest.approx(expected, abs=TOLERATED)


async def test_a_seed_gives_the_same_whatever_else_runs(engine: Engine) -> None:
    (alone,) = await say(engine, max_tokens=40, min_tokens=40)
    others = [
        engine.generate(call(range(seed, 3 * seed), n=2, max_tokens=20 + seed, sampling_seed=seed))
        for seed in range(3, 9)
    ]
    (among_others,) = await say(engine, max_tokens=40, min_tokens=40)
    assert among_others.ids == alone.ids
    assert among_others.logprobs == pytest.approx(alone.logprobs, abs=TOLERATED)
    for other in others:
        other.close()
    (another_seed,) = await say(engine, max_tokens=40, min_tokens=40, sampling_seed=2)
    assert another_seed.ids != alone.ids


async def test_sample_i_of_a_group_draws_with_seed_plus_i(engine: Engine) -> None:
    last = 2**64 - 2
    group = await say(engine, n=4, sampling_seed=last)
    for i, sample in enumerate(group):
        (alone,) = await say(engine, sampling_seed=(last + i) % 2**64)
        assert sample.ids == alone.ids
    assert len({tuple(sample.ids) for sample in group}) > 1


async def test_a_stop_token_ends_a_sample_and_is_its_last(engine: Engine) -> None:
    # without `min_tokens`, which takes tokens out of the draw
    (free,) = await say(engine, max_tokens=40)
    stop = free.ids[7]
    first = free.ids.index(stop)
    (stopped,) = await say(engine, max_tokens=40, stop_token_ids=(stop,))
    assert stopped.ids == free.ids[: first + 1]
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=TOLERATED)
    assert stopped.finish_reason == "stop"


async def test_no_stop_token_comes_before_min_tokens(engine: Engine) -> None:
    stops = tuple(range(0, VOCABULARY, 2))
    (soon,) = await say(engine, stop_token_ids=stops, max_tokens=50)
    (later,) = await say(engine, stop_token_ids=stops, max_tokens=50, min_tokens=10)
    assert len(soon.ids) < 10 <= len(later.ids)
    assert not set(later.ids[:10]) & set(stops)
    assert (later.ids[-1] in stops, later.finish_reason) == (True, "stop")


async def test_a_full_context_ends_a_sample_as_length(engine: Engine) -> None:
    for params in ({"max_tokens": 1000}, {"max_tokens": None}):
        (said,) = await say(engine, range(CONTEXT_TOKENS - 16), min_tokens=1000, **params)
        assert (len(said.ids), said.finish_reason) == (16, "length")
    (last,) = await say(engine, range(CONTEXT_TOKENS - 1), min_tokens=1)
    assert (len(last.ids), last.finish_reason) == (1, "length")


async def test_what_no_engine_could_take_is_refused(engine: Engine) -> None:
    with pytest.raises(
        ContextLengthExceeded, match=f"{CONTEXT_TOKENS} tokens and the context {CONTEXT_TOKENS}"
    ):
        engine.generate(call([1] * CONTEXT_TOKENS))
    with pytest.raises(InvalidRequest, match="no tokens"):
        engine.generate(call([]))
    with pytest.raises(InvalidRequest, match=f"token id {VOCABULARY}"):
        engine.generate(call([1, VOCABULARY]))
    with pytest.raises(InvalidRequest, match=f"token id {VOCABULARY}"):
        engine.generate(kept_call(call(), [[3, VOCABULARY]]))
    assert (await say(engine))[0].finish_reason is not None


async def test_stopping_a_sample_spares_the_others(engine: Engine) -> None:
    generation = engine.generate(call(n=3, max_tokens=60, min_tokens=60))
    said = [Said() for _ in range(3)]
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            said[segment.index].add(segment)
            if segment.index == 0 and len(said[0].ids) >= 3:
                generation.stop(0)
    assert [one.finish_reason for one in said] == [None, "length", "length"]
    assert 3 <= len(said[0].ids) < 60
    (alone,) = await say(engine, max_tokens=60, min_tokens=60)
    assert said[0].ids == alone.ids[: len(said[0].ids)]


async def test_closing_a_generation_keeps_what_it_drew_and_frees_what_it_has(
    engine: Engine,
) -> None:
    endless = [engine.generate(call(n=2, max_tokens=230, min_tokens=230)) for _ in range(3)]
    said = [Said(), Said()]
    async with asyncio.timeout(LIMIT_S):
        async for segment in endless[0]:
            said[segment.index].add(segment)
            if all(len(one.ids) >= 5 for one in said):
                for generation in endless:
                    generation.close()
    assert all(5 <= len(one.ids) < 230 and one.finish_reason is None for one in said)
    generated = engine.counters()["generated_tokens"]
    (after,) = await say(engine)
    assert after.finish_reason is not None
    assert engine.counters()["generated_tokens"] - generated < 230
    counters = engine.counters()
    assert (counters["running_samples"], counters["waiting_samples"]) == (0, 0)


async def test_more_samples_than_slots_wait_their_turn(engine: Engine) -> None:
    generation = engine.generate(call(n=5, max_tokens=60, min_tokens=60))
    assert engine.counters()["waiting_samples"] == 5
    await anext(aiter(generation))
    counters = engine.counters()
    assert (counters["running_samples"], counters["waiting_samples"]) == (2, 3)
    async with asyncio.timeout(LIMIT_S):
        ends = [one.finish_reason async for one in generation if one.finish_reason is not None]
    assert ends == ["length"] * 5


async def test_a_later_attempt_draws_only_what_is_missing(
    engine: Engine, plain: PlainModel
) -> None:
    asked = call(n=4, max_tokens=40, min_tokens=40)
    whole = await read(engine.generate(asked), 4)
    before = engine.counters()
    cuts = (0, 33, 40, 20)
    kept = [one.ids[:cut] for one, cut in zip(whole, cuts, strict=True)]
    rests = await resume(engine, kept_call(asked, kept, ended=[2]), cuts)
    after = engine.counters()
    assert [len(one.ids) for one in rests] == [40, 7, 0, 20]
    assert after["generated_tokens"] - before["generated_tokens"] == 67
    ids = [[*had, *one.ids] for had, one in zip(kept, rests, strict=True)]
    for one, cut, logprobs in zip(rests, cuts, plain.logprobs([PROMPT] * 4, ids), strict=True):
        assert one.finish_reason == (None if cut == 40 else "length")
        if one.ids:
            expected = of_tokens(logprobs[cut:], one.ids)
            assert one.logprobs == pytest.approx(expected, abs=TOLERATED)


async def test_what_is_kept_goes_through_the_model_once(engine: Engine) -> None:
    asked = call(max_tokens=40, min_tokens=40)
    (whole,) = await read(engine.generate(asked))
    before = engine.counters()
    assert before["forwarded_tokens"] == len(PROMPT) + 39  # a last token is not forwarded
    await resume(engine, kept_call(asked, [whole.ids[:30]]), [30])
    forwarded = engine.counters()["forwarded_tokens"] - before["forwarded_tokens"]
    assert forwarded == len(PROMPT) + 30 + 9


async def test_a_sample_that_is_whole_ends_at_once(engine: Engine) -> None:
    (free,) = await say(engine, max_tokens=40, min_tokens=40)
    full = kept_call(call(max_tokens=40), [free.ids])
    stopped = kept_call(call(stop_token_ids=(free.ids[4],), max_tokens=40), [free.ids[:5]])
    filled = kept_call(call(range(CONTEXT_TOKENS - 16), max_tokens=None), [free.ids[:16]])
    before = engine.counters()
    for asked, reason in ((full, "length"), (stopped, "stop"), (filled, "length")):
        (rest,) = await resume(engine, asked, [len(asked.kept[0])])
        assert (rest.ids, rest.finish_reason) == ([], reason)
    assert engine.counters() == before


async def test_the_rest_is_that_of_an_undisturbed_run(engine: Engine) -> None:
    """Of a model whose rounding does not depend on the batch; where it does, only what is kept is certain."""
    asked = call(n=2, max_tokens=40, min_tokens=40, repetition_penalty=1.1)
    whole = await read(engine.generate(asked), 2)
    cuts = (1, 25)
    kept = [one.ids[:cut] for one, cut in zip(whole, cuts, strict=True)]
    for one, rest in zip(whole, await resume(engine, kept_call(asked, kept), cuts), strict=True):
        assert rest.ids == one.ids[rest.start :]


@pytest.mark.parametrize("name", engines.WITH_A_MODEL)
async def test_an_engine_that_does_not_run_generates_nothing(name: str, model: Path) -> None:
    async with engines.running(name, model, slots=1) as engine:
        generations = [engine.generate(call(max_tokens=230, min_tokens=230)) for _ in range(2)]
        await anext(aiter(generations[0]))
        whole = asyncio.create_task(engine.breakdown())
        await asyncio.sleep(0)
    results = await asyncio.gather(*map(drain, generations), return_exceptions=True)
    assert [type(one) for one in results] == [EngineFailed, EngineFailed]
    with pytest.raises(EngineFailed, match="not running"):
        engine.generate(call())
    assert engine.counters()["running_samples"] == 0
    assert not whole.done()  # to be closed is not to break
    whole.cancel()
    await engine.close()
