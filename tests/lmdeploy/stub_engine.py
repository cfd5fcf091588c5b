# pyright: basic, reportMissingImports=false
"""Test equipment: what stands below lmdeploy's `AsyncEngine`, without a model, and with faults on demand.

`AsyncEngine` looks the name `lmdeploy.pytorch.engine.Engine` up when it is made, so `install` replaces that name.
Tokenizer, sessions, handles, health and errors are lmdeploy's own. Behind a prompt of
three tokens a sample draws the ids 10, 11, 12, …
"""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lmdeploy.messages import EngineOutput, RequestMetrics, ResponseType, ScheduleMetrics
from lmdeploy.pytorch.engine.base import EngineBase, EngineInstanceBase

Fault = Literal[
    "error", "out of memory", "too long", "stopped", "stall", "death", "deaf", "no logprobs"
]
AT_TOKEN = 3
POISON = 300
"""Faults are of prompts that begin with this id."""
PROMPT_TOKENS = 3
LAYERS, EXPERTS = 2, 3


def experts(positions: int) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    """Where so many positions went, all other numbers: `[positions, LAYERS, EXPERTS]`."""
    size = positions * LAYERS * EXPERTS
    return np.arange(300, 300 + size, dtype=np.uint16).reshape(positions, LAYERS, EXPERTS)


def install(monkeypatch: pytest.MonkeyPatch, fault: Fault | None) -> None:
    """Let every `AsyncEngine` made from now on stand on the stub, with this fault."""

    class Faulty(StubEngine):
        pass

    Faulty.fault = fault
    monkeypatch.setattr("lmdeploy.pytorch.engine.Engine", Faulty)


class StubEngine(EngineBase):
    """What `AsyncEngine` calls of an engine."""

    fault: Fault | None = None

    def __init__(self, engine_config: Any) -> None:  # noqa: ANN401
        self.engine_config = engine_config
        self.executor = SimpleNamespace(model_agent=SimpleNamespace())
        self.active: set[int] = set()
        self.cancelled: set[int] = set()
        self.cancels_heard = 0
        self.steps = 0
        self.alive = True

    @classmethod
    def from_pretrained(cls, _path: str, *, engine_config: Any, **_: object) -> "StubEngine":  # noqa: ANN401
        return cls(engine_config)

    def create_instance(self, cuda_stream_id: int = 0) -> "StubInstance":
        return StubInstance(self)

    def start_loop(self) -> bool:
        return True

    def close(self) -> None: ...

    def get_schedule_metrics(self) -> ScheduleMetrics:
        return ScheduleMetrics(active_seqs=len(self.active), scheduler_tick=self.steps)

    async def get_health_status(self) -> dict[str, Any]:
        return {
            "alive": self.alive,
            "message": "" if self.alive else "The loop of the stub has stopped.",
            "schedule_metrics": self.get_schedule_metrics(),
        }

    def fault_of(self, input_ids: list[int]) -> Fault | None:
        return self.fault if input_ids[0] == POISON else None


class StubInstance(EngineInstanceBase):
    """One handle."""

    def __init__(self, engine: StubEngine) -> None:
        self.engine = engine

    async def async_cancel(self, session_id: int) -> None:
        self.engine.cancels_heard += 1
        if self.engine.fault != "deaf" or self.engine.cancels_heard > 1:
            self.engine.cancelled.add(session_id)

    async def async_end(self, session_id: int) -> None:
        self.engine.active.discard(session_id)

    async def async_stream_infer(
        self,
        session_id: int,
        input_ids: list[int],
        gen_config: Any,  # noqa: ANN401
        **_: object,
    ) -> AsyncIterator[EngineOutput]:
        engine, fault = self.engine, self.engine.fault_of(input_ids)
        engine.active.add(session_id)
        try:
            first = 10 + len(input_ids) - PROMPT_TOKENS
            for drawn in range(gen_config.max_new_tokens):
                await asyncio.sleep(0.005)
                if session_id in engine.cancelled:
                    yield EngineOutput(ResponseType.CANCEL, [])
                    return
                if drawn == AT_TOKEN and fault not in {None, "deaf", "no logprobs"}:
                    status = await self._break(fault)
                    yield EngineOutput(status, [])
                    return
                engine.steps += 1
                last = drawn + 1 == gen_config.max_new_tokens
                yield EngineOutput(
                    ResponseType.FINISH if last else ResponseType.SUCCESS,
                    [first + drawn],
                    logprobs=None if fault == "no logprobs" else [{first + drawn: -1.0}],
                    req_metrics=RequestMetrics(),
                    routed_experts=(
                        experts(len(input_ids) + drawn)
                        if last and gen_config.return_routed_experts
                        else None
                    ),
                )
        finally:
            await self.async_end(session_id)

    async def _break(self, fault: Fault | None) -> ResponseType:
        match fault:
            case "error":
                raise RuntimeError("illegal memory access at 0xdeadbeef")
            case "out of memory":
                raise torch.OutOfMemoryError("tried to allocate 20 GiB at 0xdeadbeef")
            case "too long":
                return ResponseType.INPUT_LENGTH_ERROR
            case "death":
                self.engine.alive = False
                return ResponseType.ENGINE_STOP_ERROR
            case "stall":
                await asyncio.Event().wait()
        return ResponseType.INTERNAL_ENGINE_ERROR
