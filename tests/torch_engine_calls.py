"""A tiny torch engine, and calls to it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from protocols.job import Segment
from protocols.rollout_state import FinishReason, SampleParams, TokenIds
from worker.engines.base import Call, Engine, Generation
from worker.engines.torch_engine import Settings, TorchEngine

LIMIT_S = 100
PROMPT = TokenIds(range(5, 25))


class Said:
    """What one sample came to."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.finish_reason: FinishReason | None = None

    def add(self, segment: Segment) -> None:
        assert segment.start == len(self.ids)
        assert self.finish_reason is None
        self.ids += segment.token_ids
        self.logprobs += segment.logprobs
        self.versions += [segment.policy_version] * len(segment.token_ids)
        self.finish_reason = segment.finish_reason


async def read(generation: Generation, n: int = 1) -> list[Said]:
    said = [Said() for _ in range(n)]
    async with asyncio.timeout(LIMIT_S):
        async for segment in generation:
            said[segment.index].add(segment)
    return said


async def drain(generation: Generation) -> None:
    """Read what is left of a generation that was begun to be read."""
    async with asyncio.timeout(LIMIT_S):
        async for _ in generation:
            pass


def call(prompt: Sequence[int] = PROMPT, **params: object) -> Call:
    usual = SampleParams(max_tokens=12, sampling_seed=1)
    return Call(TokenIds(prompt), msgspec.structs.replace(usual, **params))


async def say(engine: Engine, prompt: Sequence[int] = PROMPT, **params: object) -> list[Said]:
    asked = call(prompt, **params)
    return await read(engine.generate(asked), asked.params.n)


@asynccontextmanager
async def running(directory: Path, **settings: object) -> AsyncGenerator[TorchEngine]:
    usual = Settings(model=str(directory), threads=1)
    engine = TorchEngine(msgspec.structs.replace(usual, **settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
