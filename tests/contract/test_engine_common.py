"""What every engine promises of its calls: cancel, resume, versions, counters. `tests/engines.py` has the engines."""

import asyncio
from pathlib import Path

import pytest

from protocols.errors import EngineBusy
from tests import engines
from tests.lasting_calls import begun, kept_call, lasting, resumed, whole
from tests.tiny_model import altered
from tests.torch_engine_calls import LIMIT_S, Said, drain
from worker.engines.base import Engine, Weights
from worker.engines.scripted import ScriptedEngine

MANY = 230
"""More tokens than are drawn before somebody can say stop."""


def test_an_engine_can_do_its_minimum(engine: Engine) -> None:
    assert engine.capabilities >= engines.MINIMUM[engine.name]
    assert (engine.memory, engine.policy_version) == ("loaded", 0)


async def test_each_token_has_its_log_probability_and_version(engine: Engine) -> None:
    for said in await whole(engine, lasting(engine, 9, n=3)):
        assert len(said.ids) == len(said.logprobs) == len(said.versions) == 9
        assert all(-50 < one < 0 for one in said.logprobs)
        assert (set(said.versions), said.finish_reason) == ({0}, "length")


async def test_each_token_has_its_alternatives(engine: Engine) -> None:
    asked = lasting(engine, 9, top_logprobs=3)
    segments = [segment async for segment in engine.generate(asked)]
    assert sum(len(one.token_ids) for one in segments) == 9
    for segment in segments:
        wide = 3 * len(segment.token_ids)
        assert len(segment.top_ids) == len(segment.top_logprobs) == wide


async def test_stopping_a_sample_spares_the_others(engine: Engine) -> None:
    asked = lasting(engine, 60, n=3, temperature=0)
    generation = engine.generate(asked)
    said = [Said() for _ in range(3)]
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            said[segment.index].add(segment)
            if segment.index == 0 and len(said[0].ids) >= 3:
                generation.stop(0)
    assert [one.finish_reason for one in said] == [None, "length", "length"]
    assert 3 <= len(said[0].ids) < 60
    (alone,) = await whole(engine, lasting(engine, 60, temperature=0))
    assert said[0].ids == alone.ids[: len(said[0].ids)]


async def test_closing_a_generation_keeps_what_it_drew_and_frees_what_it_has(
    engine: Engine,
) -> None:
    endless = [engine.generate(lasting(engine, MANY, n=2)) for _ in range(3)]
    said = [Said(), Said()]
    async with asyncio.timeout(LIMIT_S):
        async for segment in endless[0]:
            said[segment.index].add(segment)
            if all(len(one.ids) >= 5 for one in said):
                for generation in endless:
                    generation.close()
                    generation.close()
    assert all(5 <= len(one.ids) < MANY and one.finish_reason is None for one in said)
    generated = engine.counters()["generated_tokens"]
    (after,) = await whole(engine, lasting(engine, 12))
    assert after.finish_reason is not None
    assert engine.counters()["generated_tokens"] - generated < MANY
    assert_at_rest(engine)


async def test_counters_tell_what_is_under_way_and_what_was_drawn(engine: Engine) -> None:
    before = engine.counters()["generated_tokens"]
    generation = engine.generate(lasting(engine, 30, n=2))
    counters = engine.counters()
    assert counters["running_samples"] + counters["waiting_samples"] == 2
    await anext(aiter(generation))
    await drain(generation)
    assert engine.counters()["generated_tokens"] - before == 60
    assert_at_rest(engine)


async def test_a_later_attempt_draws_only_what_is_missing(engine: Engine) -> None:
    asked = lasting(engine, 40, n=4)
    first = await whole(engine, asked)
    before = engine.counters()["generated_tokens"]
    cuts = (0, 33, 40, 20)
    kept = [one.ids[:cut] for one, cut in zip(first, cuts, strict=True)]
    rests = await resumed(engine, kept_call(asked, kept, ended=[2]))
    assert [len(one.ids) for one in rests] == [40, 7, 0, 20]
    assert [one.finish_reason for one in rests] == ["length", "length", None, "length"]
    assert engine.counters()["generated_tokens"] - before == 67


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        pytest.param({}, marks=pytest.mark.needs("sampling_seed")),
        pytest.param(
            {"repetition_penalty": 1.1},
            marks=pytest.mark.needs("sampling_seed", "repetition_penalty"),
        ),
    ],
    ids=["the likeliest", "drawn", "penalised"],
)
async def test_the_rest_is_that_of_an_undisturbed_run(
    engine: Engine, params: dict[str, object]
) -> None:
    """Of a model whose rounding does not depend on the batch; where it does, only what is kept is certain."""
    asked = lasting(engine, 40, n=2, **params)
    first = await whole(engine, asked)
    kept = [one.ids[:cut] for one, cut in zip(first, (1, 25), strict=True)]
    for one, rest in zip(first, await resumed(engine, kept_call(asked, kept)), strict=True):
        assert rest.ids == one.ids[rest.start :]


async def test_a_sample_that_has_all_its_tokens_ends_at_once(engine: Engine) -> None:
    asked = lasting(engine, 40)
    (full,) = await whole(engine, asked)
    before = engine.counters()
    (rest,) = await resumed(engine, kept_call(asked, [full.ids]))
    assert (rest.ids, rest.finish_reason) == ([], "length")
    assert engine.counters() == before


async def test_what_was_given_up_goes_on_where_it_was(engine: Engine) -> None:
    """As a pause that releases or keeps its jobs asks."""
    asked = lasting(engine, MANY, n=2)
    first = await begun(engine, asked, 5)
    await engine.offload(1)  # nothing is under way any more
    await engine.onload()
    rests = await resumed(engine, kept_call(asked, [one.ids for one in first]))
    for one, rest in zip(first, rests, strict=True):
        assert one.finish_reason is None
        assert (len(one.ids) + len(rest.ids), rest.finish_reason) == (MANY, "length")


async def test_what_is_under_way_may_end_before_the_weights_move(engine: Engine) -> None:
    """As a pause that lets its jobs end asks."""
    generation = engine.generate(lasting(engine, MANY))
    with pytest.raises(EngineBusy):
        await engine.offload(1)
    await anext(aiter(generation))
    await drain(generation)
    await engine.offload(1)
    await engine.onload()
    assert engine.memory == "loaded"


@pytest.mark.needs("update_weights")
async def test_each_part_of_a_sample_bears_the_version_that_drew_it(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    asked = lasting(engine, MANY)
    (first,) = await begun(engine, asked, 5)
    following = altered(model, tmp_path / "next", lambda _: None)
    await engine.update_weights(Weights(4, str(following)))
    (rest,) = await resumed(engine, kept_call(asked, [first.ids]))
    assert (set(first.versions), set(rest.versions)) == ({0}, {4})
    assert len(first.ids) + len(rest.ids) == MANY


def test_a_case_is_left_out_where_nobody_must_pass_it_and_fails_where_an_engine_must() -> None:
    engine = ScriptedEngine()
    engine.name = "lmdeploy-server"
    engine.capabilities = frozenset({"max_tokens", "offload"})
    engines.require(engine, {"max_tokens"})
    with pytest.raises(pytest.skip.Exception, match="need not be able to do min_tokens, script"):
        engines.require(engine, {"min_tokens", "script"})
    with pytest.raises(pytest.fail.Exception, match="must be able to do n,"):
        engines.require(engine, {"min_tokens", "n"})


def test_a_case_cannot_ask_for_what_it_does_not_say_it_needs() -> None:
    engine = ScriptedEngine()
    asked = lasting(engine, 9, n=2, temperature=0, min_tokens=9)
    assert engines.undeclared(asked, {"sampling_seed"}) == {"min_tokens"}
    assert engines.undeclared(asked, {"min_tokens"}) == set()


def assert_at_rest(engine: Engine) -> None:
    counters = engine.counters()
    assert (counters["running_samples"], counters["waiting_samples"]) == (0, 0)
