"""The torch engine on SmolLM2-135M-Instruct: what transformers gives, whatever else is in the batch."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec
import pytest
import pytest_asyncio
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from protocols.rollout_state import SampleParams, TokenIds
from tests.plain_model import PlainModel, of_tokens
from worker.engines.base import Call, Turn
from worker.engines.torch_engine import Settings, TorchEngine
from worker.engines.torch_engine.checkpoint import locate

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first run converts the model, on a machine that may be busy
    pytest.mark.asyncio(loop_scope="module"),
]

PROMPTS = (Path(__file__).parents[1] / "golden/prompts_100.txt").read_text().splitlines()
NEW_TOKENS = 16
END = 2
TOLERATED = 1e-4
BATCH = 25


class Said(msgspec.Struct, frozen=True):
    """One greedy answer."""

    prompt_ids: TokenIds
    ids: list[int]
    logprobs: list[float]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TorchEngine]:
    made = TorchEngine(Settings(slots=32))
    await made.start()
    yield made
    await made.close()


@pytest.fixture(scope="module")
def plain(engine: TorchEngine) -> PlainModel:
    """The same weights in transformers' hands; after the engine, which converts them."""
    assert engine.model == "smollm2"
    return PlainModel(locate("smollm2"))


def asked(engine: TorchEngine, text: str) -> TokenIds:
    return engine.tokenizer.render([Turn(role="user", content=text)])


async def say(engine: TorchEngine, prompt_ids: Sequence[int], **params: object) -> Said:
    usual = SampleParams(max_tokens=NEW_TOKENS)
    call = Call(TokenIds(prompt_ids), msgspec.structs.replace(usual, **params))
    ids: list[int] = []
    logprobs: list[float] = []
    async for segment in engine.generate(call):
        ids += segment.token_ids
        logprobs += segment.logprobs
    return Said(call.prompt_ids, ids, logprobs)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def answers(engine: TorchEngine) -> list[Said]:
    """Greedy answers to all prompts, sent at once."""
    return await asyncio.gather(
        *(say(engine, asked(engine, text), temperature=0) for text in PROMPTS)
    )


def assert_equal_or_tied(ours: list[int], theirs: list[int], logprobs: Tensor) -> None:
    """Equal, or different from a position on where both tokens are as likely as rounding can tell."""
    if ours == theirs:
        return
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    apart = (logprobs[at, ours[at]] - logprobs[at, theirs[at]]).abs().item()
    assert apart < TOLERATED, f"{ours} and {theirs} part at {at}, {apart:.1e} apart"


async def test_text_goes_through_the_models_own_template_and_back(engine: TorchEngine) -> None:
    loader = cast("Any", PreTrainedTokenizerFast)
    reference = loader.from_pretrained(locate("smollm2"))
    turns = [
        Turn(role="user", content="Good day — 雨が降る 🌧️"),
        Turn(role="assistant", content="Indeed."),
        Turn(role="user", content="Why?"),
    ]
    expected = reference.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = engine.tokenizer.render(turns)
    assert list(ids) == expected
    spelled = b"".join(engine.tokenizer.token_bytes(one) for one in ids).decode()
    assert spelled == engine.tokenizer.decode(ids, skip_special_tokens=False)
    assert "<|im_start|>user\nGood day — 雨が降る 🌧️<|im_end|>\n" in spelled


async def test_the_prompts_are_100(answers: list[Said]) -> None:
    assert len({bytes(one.prompt_ids) for one in answers}) == 100


@pytest.mark.parametrize("start", range(0, 100, BATCH))
async def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(
    start: int, plain: PlainModel, answers: list[Said]
) -> None:
    batch = answers[start : start + BATCH]
    prompts = [one.prompt_ids for one in batch]
    theirs = plain.greedy(prompts, NEW_TOKENS, END)
    logprobs = plain.logprobs(prompts, [one.ids for one in batch])
    for one, ids, expected in zip(batch, theirs, logprobs, strict=True):
        assert_equal_or_tied(one.ids, ids, expected)
        assert one.logprobs == pytest.approx(of_tokens(expected, one.ids), abs=TOLERATED)


async def test_alone_is_as_in_a_batch(engine: TorchEngine, answers: list[Said]) -> None:
    for among_others in answers[:: len(answers) // 4]:
        alone = await say(engine, among_others.prompt_ids, temperature=0)
        assert alone.ids == among_others.ids
        assert alone.logprobs == pytest.approx(among_others.logprobs, abs=TOLERATED)


async def test_the_model_answers(answers: list[Said], engine: TorchEngine) -> None:
    text = engine.tokenizer.decode(answers[0].ids, skip_special_tokens=True)
    assert "Paris" in text


async def test_a_seed_gives_one_answer_whatever_arrives_beside_it(engine: TorchEngine) -> None:
    prompt_ids = asked(engine, "Tell me about a place you would like to see.")
    params = SampleParams(temperature=1, sampling_seed=11, max_tokens=32, min_tokens=32)
    alone = await say(engine, prompt_ids, **msgspec.structs.asdict(params))

    async def beside(number: int) -> None:
        call = Call(
            asked(engine, PROMPTS[number] * (1 + number % 3)),
            SampleParams(max_tokens=9 + 2 * number, sampling_seed=number),
        )
        async for _ in engine.generate(call):
            pass

    early = [asyncio.create_task(beside(i)) for i in range(3)]
    await asyncio.sleep(0)
    call = Call(prompt_ids, params)
    ids: list[int] = []
    late: list[asyncio.Task[None]] = []
    async for segment in engine.generate(call):
        ids += segment.token_ids
        if len(ids) % 6 == 0 and len(late) < 4:
            late.append(asyncio.create_task(beside(3 + len(late))))
    await asyncio.gather(*early, *late)
    assert len(late) == 4
    assert ids == alone.ids


async def test_going_on_behind_some_tokens_gives_the_same_answer(engine: TorchEngine) -> None:
    prompt_ids = asked(engine, "Invent a word and say what it means.")
    whole = await say(engine, prompt_ids, sampling_seed=5, max_tokens=24, min_tokens=24)
    behind = [*prompt_ids, *whole.ids[:10]]
    rest = await say(engine, behind, sampling_seed=5, max_tokens=14, min_tokens=14)
    assert rest.ids == whole.ids[10:]
    assert rest.logprobs == pytest.approx(whole.logprobs[10:], abs=TOLERATED)


async def forwarded(engine: TorchEngine, prompt_ids: Sequence[int], n: int) -> int:
    """Positions of the prompt that go through the model for `n` samples of six tokens."""
    before = engine.counters()["forwarded_tokens"]
    params = SampleParams(n=n, max_tokens=6, min_tokens=6, sampling_seed=3)
    samples: list[list[int]] = [[] for _ in range(n)]
    async for segment in engine.generate(Call(TokenIds(prompt_ids), params)):
        samples[segment.index] += segment.token_ids
    assert [len(ids) for ids in samples] == [6] * n
    assert n == 1 or len({tuple(ids) for ids in samples}) > 1
    return engine.counters()["forwarded_tokens"] - before - n * 5  # a last token is not forwarded


async def test_a_group_of_eight_forwards_its_prompt_once(engine: TorchEngine) -> None:
    chance = Random(8)
    prompt_ids = [chance.randrange(20, engine.vocabulary) for _ in range(512)]
    assert await forwarded(engine, prompt_ids, 8) == 512
    assert await forwarded(engine, [*prompt_ids, 44, 45, 46], 1) == 3


async def test_turns_that_forward_only_what_is_new_are_those_of_an_engine_that_keeps_nothing(
    engine: TorchEngine,
) -> None:
    said: list[Said] = []
    params: dict[str, object] = {"temperature": 0.8, "sampling_seed": 5, "min_tokens": NEW_TOKENS}
    prompt_ids = asked(engine, "Say a number, any number.")
    for question in ("Why that one?", "Another one, please.", "And the sum of both?"):
        said.append(await say(engine, prompt_ids, **params))
        new = engine.tokenizer.encode_written(f"<|im_end|>\n<|im_start|>user\n{question}")
        before = [*prompt_ids, *said[-1].ids]
        prompt_ids = TokenIds([*before, *new])
        assert await forwarded(engine, prompt_ids, 1) == len(new) + 1
    forgetful = TorchEngine(Settings(slots=1, prefix_caching=False))
    await forgetful.start()
    try:
        for one in said:
            alone = await say(forgetful, one.prompt_ids, **params)
            assert one.ids == alone.ids
            assert one.logprobs == pytest.approx(alone.logprobs, abs=TOLERATED)
    finally:
        await forgetful.close()
