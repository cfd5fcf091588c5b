"""SmolLM2 at temperature 1, guided: in the full form fifty answers of each kind, every one valid."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
import pytest
import pytest_asyncio
from msgspec import Meta

from protocols.message import CallGuide, Guide, JsonGuide, Tool
from protocols.rollout_state import TokenIds
from tests.form import FULL
from tests.torch_engine_calls import Said, call
from worker.engines.base import Turn
from worker.engines.torch_engine import Settings, TorchEngine

SAMPLES = 50 if FULL else 8
LIMIT_S = 800
MOST_TOKENS = 300
pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first run converts the model, on a machine that may be busy
    pytest.mark.asyncio(loop_scope="module"),
]


class Place(msgspec.Struct, forbid_unknown_fields=True):
    city: Annotated[str, Meta(min_length=1, max_length=30)]
    country: Literal["France", "Italy", "Japan", "Peru"]


class Trip(msgspec.Struct, forbid_unknown_fields=True):
    title: Annotated[str, Meta(max_length=60)]
    places: Annotated[list[Place], Meta(min_length=1, max_length=3)]
    days: Annotated[int, Meta(ge=1, le=30)]
    rating: Annotated[int, Meta(ge=0, le=5)]
    by_train: bool


class Weather(msgspec.Struct, forbid_unknown_fields=True):
    city: Annotated[str, Meta(max_length=30)]
    days: Annotated[int, Meta(ge=1, le=7)]
    unit: Literal["celsius", "fahrenheit"]


class Mail(msgspec.Struct, forbid_unknown_fields=True):
    to: Annotated[list[Annotated[str, Meta(max_length=30)]], Meta(min_length=1, max_length=2)]
    text: Annotated[str, Meta(max_length=120)]


class Called(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["weather", "mail"]
    arguments: msgspec.Raw


def schema_of(kind: type[msgspec.Struct]) -> str:
    """With every definition in it, and nothing else allowed."""
    return msgspec.json.encode(msgspec.json.schema(kind)).decode()


TOOLS = (Tool("weather", parameters=schema_of(Weather)), Tool("mail", parameters=schema_of(Mail)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def smollm2() -> AsyncIterator[TorchEngine]:
    made = TorchEngine(Settings(slots=25))
    await made.start()
    yield made
    await made.close()


async def answers(engine: TorchEngine, question: str, guide: Guide) -> list[tuple[Said, str]]:
    prompt = engine.tokenizer.render([Turn(role="user", content=question)])
    asked = call(TokenIds(prompt), n=SAMPLES, guide=guide, max_tokens=MOST_TOKENS, temperature=1)
    said = [Said() for _ in range(SAMPLES)]
    async with asyncio.timeout(LIMIT_S):
        async for segment in engine.generate(asked):
            said[segment.index].add(segment)
    tokens = engine.tokenizer.token_bytes
    return [(one, b"".join(map(tokens, one.ids[:-1])).decode()) for one in said]


async def test_every_answer_follows_a_json_schema(smollm2: TorchEngine) -> None:
    guide = JsonGuide(schema_of(Trip))
    said = await answers(smollm2, "Plan a trip for me, as JSON.", guide)
    assert [one.finish_reason for one, _ in said] == ["stop"] * SAMPLES
    for _, text in said:
        msgspec.json.decode(text, type=Trip)
    assert len({text for _, text in said}) > SAMPLES // 2


async def test_every_answer_calls_a_required_tool(smollm2: TorchEngine) -> None:
    guide = CallGuide(TOOLS, parallel=False)
    said = await answers(smollm2, "What is the weather in Lima? Mail it to Ann.", guide)
    assert [one.finish_reason for one, _ in said] == ["stop"] * SAMPLES
    for _, text in said:
        match = re.fullmatch(r"<tool_call>\n?(.*?)\n?</tool_call>", text, re.DOTALL)
        assert match is not None
        called = msgspec.json.decode(match[1], type=Called)
        msgspec.json.decode(called.arguments, type=Weather if called.name == "weather" else Mail)
