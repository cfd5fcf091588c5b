"""Calls that take a while on every engine, what is drawn before they are given up, and later attempts at them."""

import asyncio
from collections.abc import Sequence

import msgspec

from protocols.dialects.base import Script
from protocols.job import Segment
from protocols.rollout_state import TokenIds
from tests.torch_engine_calls import LIMIT_S, PROMPT, Said, call, read
from worker.engines.base import Call, Engine

MS_PER_TOKEN = 2
"""Of the engine without a model, whose answers would be there at once."""


def lasting(engine: Engine, max_tokens: int, **params: object) -> Call:
    """A call whose samples take all of `max_tokens`, one after another."""
    asked = call(PROMPT, max_tokens=max_tokens, **params)
    if "script" not in engine.capabilities:
        return asked
    script = Script(text="x" * max_tokens, ms_per_token=MS_PER_TOKEN)
    return msgspec.structs.replace(asked, script=script)


async def whole(engine: Engine, asked: Call) -> list[Said]:
    """All that is drawn of a call."""
    return await read(engine.generate(asked), asked.params.n)


async def begun(engine: Engine, asked: Call, tokens: int) -> list[Said]:
    """What is drawn of a call that is given up as soon as each sample has so many tokens."""
    generation = engine.generate(asked)
    said = [Said() for _ in range(asked.params.n)]
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            said[segment.index].add(segment)
            if all(len(one.ids) >= tokens for one in said):
                generation.close()
    return said


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


async def resumed(engine: Engine, asked: Call) -> list[Rest]:
    """What a later attempt draws."""
    rests = [Rest(len(kept)) for kept in asked.kept]
    async with asyncio.timeout(LIMIT_S):
        async for segment in engine.generate(asked):
            rests[segment.index].add(segment)
    return rests
