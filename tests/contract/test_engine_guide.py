"""What every engine with a model promises of guides and of `logit_bias`."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from protocols.errors import InvalidRequest
from protocols.message import CallGuide, Guide, JsonGuide, Tool
from protocols.rollout_state import TokenIds
from tests import engines
from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import VOCABULARY, save_tiny_model
from tests.torch_engine_calls import PROMPT, Said, call, drain, read, say
from worker.engines.base import Engine

TOLERATED = 1e-4
END = 0
ROOM = 200
"""Tokens in which every answer here ends."""


class Point(msgspec.Struct, forbid_unknown_fields=True):
    kind: Literal["a", "bc", "def"]
    at: Annotated[list[Annotated[float, Meta(ge=0, le=1)]], Meta(max_length=3)]
    n: Annotated[int, Meta(ge=-5, le=77)]
    inner: "Inner"


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    on: bool
    name: Annotated[str, Meta(max_length=6)] | None


class Called(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["point", "wait"]
    arguments: msgspec.Raw


class Wait(msgspec.Struct, forbid_unknown_fields=True):
    unit: Literal["s", "min"]


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bc", "def"]},
        "at": {"type": "array", "items": {"enum": [0, 0.25, 1]}, "maxItems": 3},
        "n": {"type": "integer", "minimum": -5, "maximum": 77},
        "inner": {
            "type": "object",
            "properties": {
                "on": {"type": "boolean"},
                "name": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
            },
            "required": ["on", "name"],
            "additionalProperties": False,
        },
    },
    "required": ["kind", "at", "n", "inner"],
    "additionalProperties": False,
}
UNIT = {"type": "object", "properties": {"unit": {"enum": ["s", "min"]}}, "required": ["unit"]}
POINT = JsonGuide(msgspec.json.encode(SCHEMA).decode())
TOOLS = (
    Tool("point", parameters=POINT.schema),
    Tool("wait", parameters=msgspec.json.encode(UNIT | {"additionalProperties": False}).decode()),
)
ONE_CALL, WAITS = CallGuide(TOOLS, parallel=False), CallGuide(TOOLS[1:])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(params=[name for name in engines.WITH_A_MODEL if "guide" in engines.MINIMUM[name]])
async def engine(request: pytest.FixtureRequest, model: Path) -> AsyncIterator[Engine]:
    async with engines.running(request.param, model) as started:
        engines.require(started, ("guide", "logit_bias"))
        yield started


async def guided(engine: Engine, guide: Guide, **params: object) -> list[Said]:
    usual: dict[str, object] = {"guide": guide, "max_tokens": ROOM}
    return await say(engine, PROMPT, **(usual | params))


def text_of(engine: Engine, ids: Sequence[int]) -> str:
    return b"".join(map(engine.tokenizer.token_bytes, ids)).decode()


def answer_of(engine: Engine, said: Said) -> str:
    """What was said before the end token."""
    assert (said.finish_reason, said.ids[-1]) == ("stop", END)
    assert END not in said.ids[:-1]
    return text_of(engine, said.ids[:-1])


def check_calls(text: str) -> int:
    """How many there are; each is one of the tools with arguments of its schema."""
    calls = re.split(r"\n?<tool_call>\n?", text)
    assert calls[0] == ""
    for one in calls[1:]:
        assert one.endswith("</tool_call>")
        body = one.removesuffix("</tool_call>").removesuffix("\n")
        called = msgspec.json.decode(body, type=Called)
        msgspec.json.decode(called.arguments, type=Point if called.name == "point" else Wait)
    return len(calls) - 1


async def test_guides_and_biases_are_declared(engine: Engine) -> None:
    assert {"guide", "logit_bias"} <= engine.capabilities


async def test_whatever_a_model_would_say_it_follows_the_schema(engine: Engine) -> None:
    for params in ({}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5}, {"repetition_penalty": 1.4}):
        for said in await guided(engine, POINT, n=4, **params):
            msgspec.json.decode(answer_of(engine, said), type=Point)


async def test_whatever_a_model_would_say_it_calls_a_tool(engine: Engine) -> None:
    for said in await guided(engine, ONE_CALL, n=6):
        assert check_calls(answer_of(engine, said)) == 1


async def test_several_calls_follow_their_schemas_too(engine: Engine) -> None:
    (said,) = await guided(engine, WAITS, min_tokens=150, max_tokens=None)
    said_bytes = b"".join(map(engine.tokenizer.token_bytes, said.ids))
    whole, closed, _ = said_bytes.rpartition(b"</tool_call>")
    assert check_calls((whole + closed).decode()) >= 2


async def test_each_sample_is_guided_by_itself(engine: Engine) -> None:
    group = await guided(engine, POINT, n=3)
    assert len({tuple(said.ids) for said in group}) > 1
    for i, said in enumerate(group):
        (alone,) = await guided(engine, POINT, sampling_seed=1 + i)
        assert said.ids == alone.ids


@pytest.mark.slow
@pytest.mark.timeout(600)  # a dozen generations, one by one, on a machine that may be busy
@pytest.mark.parametrize("guide", [POINT, ONE_CALL], ids=["json", "call"])
async def test_a_guided_sample_goes_on_behind_what_was_kept(engine: Engine, guide: Guide) -> None:
    asked = call(guide=guide, n=2, max_tokens=ROOM)
    whole = await read(engine.generate(asked), 2)
    shortest = min(len(one.ids) for one in whole)
    for cut in (1, 7, shortest // 2, shortest - 2, shortest - 1):
        kept = tuple(TokenIds(one.ids[:cut]) for one in whole)
        rests: list[list[int]] = [[], []]
        async for segment in engine.generate(msgspec.structs.replace(asked, kept=kept)):
            assert segment.start == cut + len(rests[segment.index])
            rests[segment.index] += segment.token_ids
        for one, rest in zip(whole, rests, strict=True):
            assert rest == one.ids[cut:]


async def test_free_rows_draw_what_they_draw_alone(engine: Engine) -> None:
    asked = [call(sampling_seed=seed, max_tokens=60, min_tokens=60) for seed in (5, 6)]
    alone = [(await read(engine.generate(one)))[0] for one in asked]
    ruled = call(guide=POINT, max_tokens=ROOM)
    (by_itself,) = await read(engine.generate(ruled))
    together = await asyncio.gather(
        *(read(engine.generate(one)) for one in (asked[0], ruled, asked[1]))
    )
    assert [one.ids for (one,) in together] == [alone[0].ids, by_itself.ids, alone[1].ids]


async def test_rows_that_come_and_go_do_not_disturb_a_guide(engine: Engine) -> None:
    lengths = [(3, 9), (90, 4), (17, 30), (64, 5), (5, 12)]
    others = [
        call(range(2, 2 + prompt), max_tokens=tokens, min_tokens=tokens, repetition_penalty=1.2)
        for prompt, tokens in lengths
    ]
    ruled = [call(guide=POINT, max_tokens=ROOM, sampling_seed=seed) for seed in range(4)]
    alone = [(await read(engine.generate(one)))[0].ids for one in ruled]
    mixed = [one for pair in zip(ruled, others[:4], strict=True) for one in pair] + others[4:]
    said = await asyncio.gather(*(read(engine.generate(one)) for one in mixed))
    assert [said[2 * i][0].ids for i in range(4)] == alone


async def test_recorded_log_probabilities_are_of_the_policy_without_guide_and_bias(
    engine: Engine, model: Path
) -> None:
    (said,) = await guided(engine, POINT, logit_bias=((9, 50.0), (40, -3.5)))
    (expected,) = PlainModel(model).logprobs([PROMPT], [said.ids])
    assert said.logprobs == pytest.approx(of_tokens(expected, said.ids), abs=TOLERATED)


async def test_the_guide_wins_over_min_tokens(engine: Engine) -> None:
    (said,) = await guided(engine, JsonGuide('{"type":"boolean"}'), min_tokens=50)
    assert answer_of(engine, said) in {"true", "false"}


async def test_a_guide_that_does_not_end_in_time_ends_as_length(engine: Engine) -> None:
    (said,) = await guided(engine, POINT, max_tokens=4)
    assert (len(said.ids), said.finish_reason) == (4, "length")


@pytest.mark.parametrize("field", ["response_format", "tools"])
async def test_a_guide_that_cannot_be_followed_fails_before_a_token(
    engine: Engine, field: str
) -> None:
    schema = '{"not":{"type":"string"}}'
    calls = CallGuide((Tool("f", parameters=schema),))
    guide = JsonGuide(schema) if field == "response_format" else calls
    before = engine.counters()["generated_tokens"]
    with pytest.raises(InvalidRequest, match=f"`{field}`") as caught:
        await read(engine.generate(call(guide=guide, n=2)), 2)
    assert caught.value.param == field
    assert engine.counters()["generated_tokens"] == before
    assert (await guided(engine, POINT))[0].finish_reason == "stop"


async def test_a_guide_that_becomes_too_complex_fails_its_job_alone(engine: Engine) -> None:
    wild = JsonGuide('{"type":"string","pattern":"^([a-z]{1,60}){1,60}([a-y]{1,60}){1,60}$"}')
    other = engine.generate(call(max_tokens=40, min_tokens=40))
    with pytest.raises(InvalidRequest, match=r"`response_format`: .* too complex"):
        await guided(engine, wild)
    await drain(other)
    assert (await guided(engine, POINT))[0].finish_reason == "stop"


async def test_giving_a_guided_sample_up_before_its_grammar_is_there(engine: Engine) -> None:
    for _ in range(3):
        generation = engine.generate(call(guide=POINT, n=2, max_tokens=ROOM))
        generation.close()
        await drain(generation)
    assert (await guided(engine, POINT))[0].finish_reason == "stop"


async def test_a_large_schema_holds_nobody_up(engine: Engine) -> None:
    properties = {f"p{i}": SCHEMA for i in range(600)}
    large = {"type": "object", "properties": properties, "required": list(properties)}
    asked = call(guide=JsonGuide(msgspec.json.encode(large).decode()), max_tokens=3)
    task = asyncio.create_task(read(engine.generate(asked)))
    (quick,) = await say(engine, max_tokens=3, min_tokens=3)
    assert not task.done()
    assert len(quick.ids) == 3
    assert text_of(engine, (await task)[0].ids)[0] == "{"


async def test_a_bias_of_100_decides_and_one_of_minus_100_excludes(engine: Engine) -> None:
    (forced,) = await say(engine, logit_bias=((77, 100.0),), max_tokens=8, min_tokens=8)
    assert forced.ids == [77] * 8
    free = await say(engine, n=2, max_tokens=40, min_tokens=40)
    banned = tuple((one, -100.0) for one in sorted({i for said in free for i in said.ids}))
    for said in await say(engine, n=2, max_tokens=40, min_tokens=40, logit_bias=banned):
        assert not {token_id for token_id, _ in banned} & set(said.ids)


async def test_biased_and_free_rows_share_a_batch(engine: Engine) -> None:
    (alone,) = await say(engine, max_tokens=30, min_tokens=30)
    forced, free = await asyncio.gather(
        say(engine, logit_bias=((5, -100.0), (9, 100.0)), max_tokens=20, min_tokens=20),
        say(engine, max_tokens=30, min_tokens=30),
    )
    assert (forced[0].ids, free[0].ids) == ([9] * 20, alone.ids)


async def test_a_bias_of_a_token_that_is_none_is_refused(engine: Engine) -> None:
    for strange in (-1, VOCABULARY):
        with pytest.raises(InvalidRequest, match="logit_bias"):
            engine.generate(call(logit_bias=((strange, 1.0),)))
