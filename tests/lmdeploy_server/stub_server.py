"""Test equipment: lmdeploy 0.18's own api_server over a small CPU engine.

Only the lowest layer, `lmdeploy.pytorch.engine.Engine`, is replaced, by a loop over a transformers model. Sessions,
limits, abort, sleep, keys, routes and the stream are lmdeploy's own.

    python -m tests.lmdeploy_server.stub_server MODEL PORT '{"session_len": 128, "abort": true, ...}'
"""

# pyright: basic, reportMissingImports=false
# lmdeploy has an environment of its own

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import lmdeploy.pytorch.engine as engines
import torch
from lmdeploy.messages import (
    EngineEvent,
    EngineOutput,
    EventType,
    PytorchEngineConfig,
    RequestMetrics,
    ResponseType,
    ScheduleMetrics,
)
from lmdeploy.pytorch.engine.base import EngineBase, EngineInstanceBase
from lmdeploy.serve.openai import api_server
from transformers import AutoModelForCausalLM

BREAKS_AT = 7
"""A prompt that begins with this token breaks at its third token."""
PACE_S = 0.0
TAGS = {"weights", "kv_cache"}


class StubEngine(EngineBase):
    """What lmdeploy's serving layer asks of an engine."""

    def __init__(self, model: str, config: Any) -> None:  # noqa: ANN401 - lmdeploy's own
        self.engine_config = config
        config.max_batch_size = config.max_batch_size or 4
        loader = cast("Any", AutoModelForCausalLM)
        self.model = loader.from_pretrained(model, dtype=torch.float32).eval()
        self.cancelled: set[int] = set()
        self.active: set[int] = set()
        self.steps = 0

    @classmethod
    def from_pretrained(cls, path: str, engine_config: Any = None, **_: Any) -> "StubEngine":  # noqa: ANN401
        return cls(path, engine_config)

    def create_instance(self, cuda_stream_id: int = 0) -> "StubInstance":
        return StubInstance(self)

    def start_loop(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def get_schedule_metrics(self) -> ScheduleMetrics:
        return ScheduleMetrics(active_seqs=len(self.active), scheduler_tick=self.steps)

    async def get_health_status(self) -> dict[str, object]:
        return {"alive": True, "message": "", "schedule_metrics": self.get_schedule_metrics()}

    async def sleep(self, level: int = 1) -> None:
        pass

    def wakeup(self, tags: list[str] | None = None) -> None:
        pass


class StubInstance(EngineInstanceBase):
    """One of lmdeploy's handles: a request at a time."""

    def __init__(self, engine: StubEngine) -> None:
        self.engine = engine

    async def async_cancel(self, session_id: int) -> None:
        if session_id in self.engine.active:
            self.engine.cancelled.add(session_id)

    async def async_end(self, session_id: int) -> None:
        self.engine.active.discard(session_id)

    async def async_stream_infer(
        self,
        session_id: int,
        input_ids: list[int],
        gen_config: Any = None,  # noqa: ANN401 - lmdeploy's own
        **_: Any,  # noqa: ANN401
    ) -> AsyncIterator[EngineOutput]:
        engine, config = self.engine, gen_config
        engine.active.add(session_id)
        stop_ids = set(config.stop_token_ids or [])
        ids, past, drawn, metrics = torch.tensor([input_ids]), None, 0, _first_metrics()
        try:
            while True:
                past, logits = await asyncio.to_thread(self._forward, ids, past)
                engine.steps += 1
                await asyncio.sleep(PACE_S)
                if session_id in engine.cancelled:
                    yield EngineOutput(ResponseType.CANCEL, [], req_metrics=metrics)
                    return
                if input_ids[0] == BREAKS_AT and drawn == 2:
                    raise RuntimeError("the stub breaks here")
                token = _sample(logits, config)
                drawn += 1
                done = token in stop_ids or drawn >= config.max_new_tokens
                status = ResponseType.FINISH if done else ResponseType.SUCCESS
                row = None if config.logprobs is None else [_row(logits, token, config.logprobs)]
                yield EngineOutput(status, [token], logprobs=row, req_metrics=metrics)
                if done:
                    return
                ids, metrics = torch.tensor([[token]]), RequestMetrics(token_timestamp=time.time())
        finally:
            engine.cancelled.discard(session_id)
            await self.async_end(session_id)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, past: object) -> tuple[object, torch.Tensor]:
        out = self.engine.model(input_ids=ids, past_key_values=past, use_cache=True)
        return out.past_key_values, out.logits[0, -1].float()


def _first_metrics() -> RequestMetrics:
    now = time.time()
    kinds = (EventType.QUEUED, EventType.SCHEDULED)
    return RequestMetrics(
        token_timestamp=now, engine_events=[EngineEvent.new_event(kind, now) for kind in kinds]
    )


def _row(logits: torch.Tensor, token: int, wide: int) -> dict[int, float]:
    raw = torch.log_softmax(logits, -1)
    values, ids = torch.topk(raw, max(wide, 1))
    return dict(zip(ids.tolist(), values.tolist(), strict=True)) | {token: float(raw[token])}


def _sample(logits: torch.Tensor, config: Any) -> int:  # noqa: ANN401 - lmdeploy's own
    if config.top_k == 1:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / config.temperature, -1), 1))


def main(model: str, port: int, options: dict[str, Any]) -> None:
    """Serve until it is ended."""
    global PACE_S  # once, before anything runs
    PACE_S = options.get("pace_s", 0.002)
    torch.set_num_threads(1)
    cast("Any", engines).Engine = StubEngine  # imported by name when an AsyncEngine is made
    api_server.serve(
        model,
        backend="pytorch",
        backend_config=PytorchEngineConfig(
            logprobs_mode=options.get("logprobs_mode", "raw_logprobs"),
            session_len=options.get("session_len"),
            max_batch_size=options.get("max_batch_size", 4),
            language_model_only=True,
        ),
        server_name="127.0.0.1",
        server_port=port,
        enable_abort_handling=options.get("abort", True),
        api_keys=options.get("keys"),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
