"""The torch engine goes on behind the tokens of earlier attempts as if nobody had disturbed it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest
import pytest_asyncio

from protocols.errors import InvalidRequest
from protocols.job import Segment
from protocols.rollout_state import FinishReason, SampleParams, TokenIds
from tests.architectures import ARCHITECTURES
from tests.tiny_model import VOCABULARY, save_tiny_model
from worker.engines.base import Call, Generation, Turn
from worker.engines.torch_engine import Settings, TorchEngine

LIMIT_S = 100
TOLERATED = 1e-4
PROMPT = TokenIds(range(5, 25))
NOTHING = TokenIds()


class Drawn:
    """What an engine drew of one sample, from its first segment's start on."""

    def __init__(self) -> None:
        self.start: int | None = None
        self.ids, self.top_ids = TokenIds(), TokenIds()
        self.logprobs: list[float] = []
        self.top_logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None

    def add(self, segment: Segment) -> None:
        assert self.finish_reason is None
        self.start = segment.start if self.start is None else self.start
        assert segment.start == self.start + len(self.ids)
        self.ids.extend(segment.token_ids)
        self.top_ids.extend(segment.top_ids)
        self.logprobs += segment.logprobs
        self.top_logprobs += segment.top_logprobs
        self.finish_reason = segment.finish_reason


def call(prompt: Sequence[int] = PROMPT, **params: object) -> Call:
    usual = SampleParams(max_tokens=40, min_tokens=40, sampling_seed=1)
    return Call(TokenIds(prompt), msgspec.structs.replace(usual, **params))


async def read(generation: Generation, n: int) -> list[Drawn]:
    drawn = [Drawn() for _ in range(n)]
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            drawn[segment.index].add(segment)
    return drawn


async def draw(engine: TorchEngine, asked: Call) -> list[Drawn]:
    return await read(engine.generate(asked), asked.params.n)


async def resume(
    engine: TorchEngine, asked: Call, whole: Sequence[Drawn], *cuts: int, ended: Sequence[int] = ()
) -> list[Drawn]:
    """Draw what follows after the first `cuts` tokens of each sample."""
    kept = tuple(one.ids[:cut] for one, cut in zip(whole, cuts, strict=True))
    return await draw(engine, msgspec.structs.replace(asked, kept=kept, ended=frozenset(ended)))


def assert_is_the_rest(rest: Drawn, whole: Drawn, cut: int) -> None:
    assert rest.start == cut
    assert rest.ids.tobytes() == whole.ids[cut:].tobytes()
    assert rest.finish_reason == whole.finish_reason
    assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=TOLERATED)
    wide = len(whole.top_ids) // len(whole.ids)
    assert rest.top_ids == whole.top_ids[cut * wide :]
    assert rest.top_logprobs == pytest.approx(whole.top_logprobs[cut * wide :], abs=TOLERATED)


@asynccontextmanager
async def running(directory: Path, **settings: object) -> AsyncGenerator[TorchEngine]:
    usual = Settings(model=str(directory), threads=1)
    engine = TorchEngine(msgspec.structs.replace(usual, **settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
async def engine(directory: Path) -> AsyncIterator[TorchEngine]:
    # as in another worker, which has forwarded none of it
    async with running(
        directory, slots=4, prefill_chunk_tokens=16, prefix_caching=False
    ) as started:
        yield started


EVEN = tuple(range(0, VOCABULARY, 2))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.8},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.5},
        {"top_logprobs": 3},
        {"stop_token_ids": EVEN, "min_tokens": 30},
        {"sampling_seed": 2**64 - 1, "max_tokens": None, "min_tokens": 300},
    ],
    ids=",".join,
)
async def test_the_rest_is_that_of_an_undisturbed_run(
    engine: TorchEngine, params: dict[str, object]
) -> None:
    asked = call(PROMPT, **params)
    (whole,) = await draw(engine, asked)
    assert len(whole.ids) >= 30
    last = len(whole.ids) - 1
    for cut in (1, 2, 16, 17, 18, 29, last):
        (rest,) = await resume(engine, asked, [whole], cut)
        assert_is_the_rest(rest, whole, cut)


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_architectures_go_on_as_if_undisturbed(name: str, tmp_path: Path) -> None:
    made = save_tiny_model(tmp_path / "model", ARCHITECTURES[name])
    asked = call(n=3)
    async with running(made, slots=2, prefill_chunk_tokens=16, context_tokens=100) as engine:
        whole = await draw(engine, asked)
        for one, rest, cut in zip(
            whole, await resume(engine, asked, whole, 1, 25, 11), (1, 25, 11), strict=True
        ):
            assert_is_the_rest(rest, one, cut)


async def test_each_sample_of_a_group_goes_on_from_its_own_tokens(engine: TorchEngine) -> None:
    asked = call(n=4)
    whole = await draw(engine, asked)
    before = engine.counters()
    cuts = (0, 33, 1, 20)
    rests = await resume(engine, asked, whole, *cuts)
    after = engine.counters()
    for one, rest, cut in zip(whole, rests, cuts, strict=True):
        assert_is_the_rest(rest, one, cut)
    # the prompt once, every token but each sample's last once
    forwarded = after["forwarded_tokens"] - before["forwarded_tokens"]
    assert forwarded == len(PROMPT) + 4 * 39
    assert after["generated_tokens"] - before["generated_tokens"] == 4 * 40 - sum(cuts)


async def test_samples_that_are_whole_take_no_part(engine: TorchEngine) -> None:
    asked = call(n=4)
    whole = await draw(engine, asked)
    before = engine.counters()
    rests = await resume(engine, asked, whole, 40, 12, 30, 40, ended=[0, 2, 3])
    after = engine.counters()
    assert [rest.start for rest in rests] == [None, 12, None, None]
    assert_is_the_rest(rests[1], whole[1], 12)
    assert after["generated_tokens"] - before["generated_tokens"] == 28
    assert after["forwarded_tokens"] - before["forwarded_tokens"] == len(PROMPT) + 39
    assert await resume(engine, asked, whole, 40, 40, 40, 40, ended=range(4))
    assert engine.counters() == after


async def test_tokens_that_fill_the_limit_end_the_sample_at_once(engine: TorchEngine) -> None:
    asked = call(n=2)
    whole = await draw(engine, asked)
    full, rest = await resume(engine, asked, whole, 40, 39)
    assert (full.start, len(full.ids), full.finish_reason) == (40, 0, "length")
    assert_is_the_rest(rest, whole[1], 39)
    before = engine.counters()
    for one in await resume(engine, asked, whole, 40, 40):
        assert (one.start, len(one.ids), one.finish_reason) == (40, 0, "length")
    assert engine.counters() == before


async def test_tokens_that_fill_the_context_end_the_sample_at_once(engine: TorchEngine) -> None:
    asked = call(range(240), max_tokens=None)
    (whole,) = await draw(engine, asked)
    assert len(whole.ids) == 16
    (full,) = await resume(engine, asked, [whole], 16)
    assert (full.start, len(full.ids), full.finish_reason) == (16, 0, "length")
    (rest,) = await resume(engine, asked, [whole], 15)
    assert_is_the_rest(rest, whole, 15)


async def test_a_stop_token_before_and_behind_the_border(engine: TorchEngine) -> None:
    (free,) = await draw(engine, call())
    at = next(i for i in range(10, 40) if free.ids[i] not in free.ids[:i])
    asked = call(stop_token_ids=(free.ids[at],), min_tokens=0)
    (whole,) = await draw(engine, asked)
    assert (len(whole.ids), whole.finish_reason) == (at + 1, "stop")
    (behind,) = await resume(engine, asked, [whole], at)
    assert_is_the_rest(behind, whole, at)
    (before,) = await resume(engine, asked, [whole], at + 1)
    assert (before.start, len(before.ids), before.finish_reason) == (at + 1, 0, "stop")


async def test_going_on_twice_is_going_on_once(engine: TorchEngine) -> None:
    asked = call()
    (whole,) = await draw(engine, asked)
    (second,) = await resume(engine, asked, [whole], 10)
    kept = TokenIds([*whole.ids[:10], *second.ids[:15]])
    (third,) = await draw(engine, msgspec.structs.replace(asked, kept=(kept,)))
    assert_is_the_rest(third, whole, 25)


async def test_many_kept_tokens_do_not_hold_others_up(directory: Path) -> None:
    arrivals: list[str] = []

    async def note(name: str, generation: Generation) -> None:
        async for segment in generation:
            arrivals.extend(name for _ in segment.token_ids)

    asked = call([9], max_tokens=200, min_tokens=200, sampling_seed=3)
    async with running(directory, prefill_chunk_tokens=8, prefix_caching=False) as engine:
        (whole,) = await draw(engine, asked)
        other = engine.generate(call([3], max_tokens=230, min_tokens=230))
        await anext(aiter(other))
        kept = (whole.ids[:180],)
        resumed = engine.generate(msgspec.structs.replace(asked, kept=kept))
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(note("other", other), note("resumed", resumed))
    # a step brings the row forward by a chunk, and by a token more beside the others
    assert arrivals.index("resumed") >= 180 // 9 - 1
    assert arrivals.count("resumed") == 20


async def test_giving_up_while_it_catches_up_spares_the_others(directory: Path) -> None:
    async with running(directory, slots=3, prefill_chunk_tokens=4, prefix_caching=False) as engine:
        asked = [call([seed + 2] * 9, sampling_seed=seed) for seed in range(3)]
        whole = [(await draw(engine, one))[0] for one in asked]
        long = call([7], n=2, max_tokens=220, min_tokens=220)
        behind = await draw(engine, long)
        kept = tuple(one.ids[:200] for one in behind)
        for turn in range(4):
            gone = engine.generate(msgspec.structs.replace(long, kept=kept))
            rests = [
                asyncio.create_task(resume(engine, one, [full], 5 * turn + 3))
                for one, full in zip(asked, whole, strict=True)
            ]
            async with asyncio.timeout(LIMIT_S):
                while engine.counters()["running_samples"] < 2:  # noqa: ASYNC110 - a thread counts
                    await asyncio.sleep(0)
            gone.close()
            for task, full in zip(rests, whole, strict=True):
                (rest,) = await task
                assert_is_the_rest(rest, full, 5 * turn + 3)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_runs_beside_it_the_rest_is_the_same(directory: Path, seed: int) -> None:
    chance = Random(seed)
    asked = [
        call(
            [chance.randrange(1, VOCABULARY) for _ in range(chance.randrange(1, 40))],
            n=chance.randrange(1, 4),
            max_tokens=(length := chance.randrange(2, 60)),
            min_tokens=length,
            sampling_seed=chance.randrange(2**64),
            repetition_penalty=chance.choice([1.0, 1.2]),
        )
        for _ in range(12)
    ]
    async with running(directory, slots=3, prefill_chunk_tokens=16) as engine:
        whole = [await draw(engine, one) for one in asked]
        cuts = [[chance.randrange(len(one.ids)) for one in group] for group in whole]
        rests = await asyncio.gather(
            *(
                resume(engine, one, group, *at)
                for one, group, at in zip(asked, whole, cuts, strict=True)
            )
        )
    for group, at, rest in zip(whole, cuts, rests, strict=True):
        for full, cut, one in zip(group, at, rest, strict=True):
            assert_is_the_rest(one, full, cut)


async def test_kept_tokens_that_the_model_does_not_have_are_refused(engine: TorchEngine) -> None:
    strange = msgspec.structs.replace(call(), kept=(TokenIds([3, VOCABULARY]),))
    with pytest.raises(InvalidRequest, match=f"token id {VOCABULARY}"):
        engine.generate(strange)
    (said,) = await draw(engine, msgspec.structs.replace(call(), kept=(NOTHING,)))
    assert said.start == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def smollm2() -> AsyncIterator[TorchEngine]:
    made = TorchEngine(Settings(slots=8))
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
        {"temperature": 0, "top_logprobs": 5},
    ],
    ids=",".join,
)
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)  # the first run converts the model, on a machine that may be busy
@pytest.mark.asyncio(loop_scope="module")
async def test_smollm2_goes_on_as_if_undisturbed(
    smollm2: TorchEngine, params: dict[str, object]
) -> None:
    prompt = smollm2.tokenizer.render([Turn(role="user", content="Tell me about the sea.")])
    asked = call(prompt, n=2, sampling_seed=17, max_tokens=48, min_tokens=48, **params)
    whole = await draw(smollm2, asked)
    for cuts in ((1, 47), (30, 13)):
        rests = await resume(smollm2, asked, whole, *cuts)
        for rest, one, cut in zip(rests, whole, cuts, strict=True):
            assert_is_the_rest(rest, one, cut)
