"""What every engine with a model promises of what it draws: its numbers are those of transformers alone."""

import asyncio
from pathlib import Path

import pytest
import torch

from protocols.errors import ContextLengthExceeded, EngineFailed, InvalidRequest
from tests import engines
from tests.lasting_calls import kept_call, resumed
from tests.plain_model import PlainModel, listed, of_tokens
from tests.tiny_model import CONTEXT_TOKENS, VOCABULARY
from tests.torch_engine_calls import LIMIT_S, PROMPT, call, drain, read, say
from worker.engines.base import Engine

TOLERATED = 1e-4


@pytest.fixture(params=engines.WITH_A_MODEL)
def engine_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(model: Path) -> PlainModel:
    return PlainModel(model)


def test_what_an_engine_tells_of_its_model(engine: Engine) -> None:
    assert (engine.model, engine.vocabulary) == ("tiny-llama", VOCABULARY)
    assert engine.context_tokens == CONTEXT_TOKENS


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
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5, "top_p": 0.9},
        pytest.param({"repetition_penalty": 1.4}, marks=pytest.mark.needs("repetition_penalty")),
    ],
    ids=",".join,
)
async def test_log_probabilities_are_of_the_policy_as_it_is(
    engine: Engine, plain: PlainModel, params: dict[str, object]
) -> None:
    samples = await say(engine, PROMPT, n=2, max_tokens=30, **params)
    expected = plain.logprobs([PROMPT] * 2, [one.ids for one in samples])
    for said, logprobs in zip(samples, expected, strict=True):
        assert said.logprobs == pytest.approx(of_tokens(logprobs, said.ids), abs=TOLERATED)


async def test_the_samples_of_a_group_differ(engine: Engine) -> None:
    group = await say(engine, n=4)
    assert len({tuple(sample.ids) for sample in group}) > 1


async def test_top_k_bounds_what_is_drawn(engine: Engine, plain: PlainModel) -> None:
    (said,) = await say(engine, top_k=3, max_tokens=40)
    (logprobs,) = plain.logprobs([PROMPT], [said.ids])
    likeliest: list[list[int]] = listed(logprobs.topk(4).indices)
    assert all(one in four for one, four in zip(said.ids, likeliest, strict=True))
    assert any(one != four[0] for one, four in zip(said.ids, likeliest, strict=True))


@pytest.mark.needs("repetition_penalty")
async def test_the_repetition_penalty_counts_prompt_and_response(
    engine: Engine, plain: PlainModel
) -> None:
    penalty, prompts = 1.3, [list(range(5, 40)), [7, 8]]
    asked = [call(one, temperature=0, repetition_penalty=penalty, max_tokens=25) for one in prompts]
    said = [one for (one,) in await asyncio.gather(*(read(engine.generate(c)) for c in asked))]
    for prompt, one in zip(prompts, said, strict=True):
        (logits,) = plain.logits([prompt], [one.ids])
        for at, row in enumerate(logits):
            seen = torch.tensor(sorted({*prompt, *one.ids[:at]}))
            row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
            assert row.max() - row[one.ids[at]] < TOLERATED


async def test_the_alternatives_of_each_token_are_the_likeliest(
    engine: Engine, plain: PlainModel
) -> None:
    asked = call(top_logprobs=3, max_tokens=20)
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


@pytest.mark.needs("sampling_seed")
async def test_a_seed_gives_the_same_whatever_else_runs(engine: Engine) -> None:
    (alone,) = await say(engine, max_tokens=40)
    others = [
        engine.generate(call(range(seed, 3 * seed), n=2, max_tokens=20 + seed, sampling_seed=seed))
        for seed in range(3, 9)
    ]
    (among_others,) = await say(engine, max_tokens=40)
    assert among_others.ids == alone.ids
    assert among_others.logprobs == pytest.approx(alone.logprobs, abs=TOLERATED)
    for other in others:
        other.close()
    (another_seed,) = await say(engine, max_tokens=40, sampling_seed=2)
    assert another_seed.ids != alone.ids


@pytest.mark.needs("sampling_seed")
async def test_sample_i_of_a_group_draws_with_seed_plus_i(engine: Engine) -> None:
    last = 2**64 - 2
    group = await say(engine, n=4, sampling_seed=last)
    for i, sample in enumerate(group):
        (alone,) = await say(engine, sampling_seed=(last + i) % 2**64)
        assert sample.ids == alone.ids


async def test_a_stop_token_ends_a_sample_and_is_its_last(engine: Engine) -> None:
    (free,) = await say(engine, max_tokens=40, temperature=0)
    stop = free.ids[7]
    first = free.ids.index(stop)
    (stopped,) = await say(engine, max_tokens=40, temperature=0, stop_token_ids=(stop,))
    assert stopped.ids == free.ids[: first + 1]
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=TOLERATED)
    assert stopped.finish_reason == "stop"


@pytest.mark.needs("min_tokens")
async def test_no_stop_token_comes_before_min_tokens(engine: Engine) -> None:
    stops = tuple(range(0, VOCABULARY, 2))
    (soon,) = await say(engine, stop_token_ids=stops, max_tokens=50)
    (later,) = await say(engine, stop_token_ids=stops, max_tokens=50, min_tokens=10)
    assert len(soon.ids) < 10 <= len(later.ids)
    assert not set(later.ids[:10]) & set(stops)
    assert (later.ids[-1] in stops, later.finish_reason) == (True, "stop")


async def test_a_full_context_ends_a_sample_as_length(engine: Engine) -> None:
    for params in ({"max_tokens": 1000}, {"max_tokens": None}):
        (said,) = await say(engine, range(CONTEXT_TOKENS - 16), **params)
        assert (len(said.ids), said.finish_reason) == (16, "length")
    (last,) = await say(engine, range(CONTEXT_TOKENS - 1))
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


async def test_more_samples_than_slots_wait_their_turn(engine: Engine) -> None:
    """Read at each segment, for one moment may be late: the reader is no faster than its machine."""
    generation = engine.generate(call(n=5, max_tokens=230))
    assert engine.counters()["waiting_samples"] == 5
    under_way: set[int] = set()
    most_under_way = 0
    loads: set[tuple[int, int]] = set()
    ends: list[str] = []
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            counters = engine.counters()
            loads.add((counters["running_samples"], counters["waiting_samples"]))
            under_way.add(segment.index)
            most_under_way = max(most_under_way, len(under_way))
            if segment.finish_reason is not None:
                under_way.remove(segment.index)
                ends.append(segment.finish_reason)
    assert (2, 3) in loads
    assert (most_under_way, max(running for running, _ in loads)) == (2, 2)
    assert ends == ["length"] * 5


async def test_the_rest_s_log_probabilities_are_those_behind_what_is_kept(
    engine: Engine, plain: PlainModel
) -> None:
    asked = call(n=3, max_tokens=40)
    whole = await read(engine.generate(asked), 3)
    cuts = (0, 33, 20)
    kept = [one.ids[:cut] for one, cut in zip(whole, cuts, strict=True)]
    rests = await resumed(engine, kept_call(asked, kept))
    ids = [[*had, *one.ids] for had, one in zip(kept, rests, strict=True)]
    for one, cut, logprobs in zip(rests, cuts, plain.logprobs([PROMPT] * 3, ids), strict=True):
        assert one.logprobs == pytest.approx(of_tokens(logprobs[cut:], one.ids), abs=TOLERATED)


async def test_what_is_kept_goes_through_the_model_once(
    engine: Engine, running: engines.Running
) -> None:
    asked = call(max_tokens=40)
    (whole,) = await read(engine.generate(asked))
    assert (
        engine.counters()["forwarded_tokens"] == len(PROMPT) + 39
    )  # a last token is not forwarded
    async with running() as another:
        await resumed(another, kept_call(asked, [whole.ids[:30]]))
        assert another.counters()["forwarded_tokens"] == len(PROMPT) + 30 + 9


async def test_a_sample_that_is_whole_ends_at_once(engine: Engine) -> None:
    (free,) = await say(engine, max_tokens=40)
    stopped = kept_call(call(stop_token_ids=(free.ids[4],), max_tokens=40), [free.ids[:5]])
    filled = kept_call(call(range(CONTEXT_TOKENS - 16), max_tokens=None), [free.ids[:16]])
    before = engine.counters()
    for asked, reason in ((stopped, "stop"), (filled, "length")):
        (rest,) = await resumed(engine, asked)
        assert (rest.ids, rest.finish_reason) == ([], reason)
    assert engine.counters() == before


async def test_an_engine_that_does_not_run_generates_nothing(running: engines.Running) -> None:
    async with running(slots=1) as engine:
        generations = [engine.generate(call(max_tokens=230)) for _ in range(2)]
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
