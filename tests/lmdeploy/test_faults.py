"""What breaks below lmdeploy becomes an error of ours, and every job gets its answer all the same."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from producer_sdk import Client, JobStatus
from protocols.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    RolloutError,
    WeightsRefused,
)
from protocols.queue.broker import Broker
from tests.lmdeploy import cpu_shim
from tests.lmdeploy.stub_engine import POISON, Fault, install
from tests.queue_fixtures import broker, client
from tests.tiny_model import save_tiny_model
from tests.torch_engine_calls import LIMIT_S, Said, call, read
from worker.config import Config
from worker.engines.base import Weights
from worker.engines.lmdeploy_engine import LMDeployEngine, Settings
from worker.service import Service

__all__ = ["broker", "client"]

BAD = [POISON, 5, 6]
GOOD = [5, 6, 7]
STALL_S = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def made(model: Path, *, routed_experts: bool = False) -> LMDeployEngine:
    return LMDeployEngine(
        Settings(model=str(model), slots=4, stall_s=STALL_S, routed_experts=routed_experts)
    )


@asynccontextmanager
async def running(model: Path, *, routed_experts: bool = False) -> AsyncGenerator[LMDeployEngine]:
    engine = made(model, routed_experts=routed_experts)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        ("error", EngineFailed, "failed while it generated"),
        ("out of memory", EngineFailed, "ran out of memory"),
        ("stopped", EngineFailed, "failed while it generated"),
        ("no logprobs", EngineFailed, "without their log-probabilities"),
        ("too long", ContextLengthExceeded, "lmdeploy refuses the request"),
    ],
)
async def test_a_fault_is_classified_and_spares_the_others(
    model: Path,
    fault: Fault,
    error: type[RolloutError],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, fault)
    async with running(model) as engine:
        bad, good = await asyncio.gather(
            read(engine.generate(call(BAD))),
            read(engine.generate(call(GOOD))),
            return_exceptions=True,
        )
        (after,) = await read(engine.generate(call(GOOD)))
    assert isinstance(bad, error)
    assert reason in str(bad)
    assert "0xdeadbeef" not in str(bad)
    assert not isinstance(good, BaseException)
    assert good[0].ids == after.ids == list(range(10, 22))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("death", "The loop of the stub has stopped"), ("stall", "scheduler_tick has not advanced")],
)
async def test_an_engine_that_has_ended_says_so_and_draws_nothing_more(
    model: Path, fault: Fault, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fault)
    async with running(model) as engine:
        bad = asyncio.create_task(read(engine.generate(call(BAD))))
        async with asyncio.timeout(LIMIT_S):
            failure = await engine.breakdown()
            with pytest.raises(EngineFailed):
                await bad
        assert reason in failure.message
        assert "must be restarted" in failure.message
        with pytest.raises(EngineFailed, match=reason):
            engine.generate(call(GOOD))


async def test_a_step_of_the_real_engine_that_breaks_ends_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB at 0xdeadbeef")

    cpu_shim.install()
    async with running(model) as engine:
        await read(engine.generate(call(GOOD)))
        processor = "lmdeploy.pytorch.engine.logits_process.FusedLogitsProcessor.sampling"
        monkeypatch.setattr(processor, sample)
        open_ones = [asyncio.create_task(read(engine.generate(call(GOOD)))) for _ in range(6)]
        async with asyncio.timeout(LIMIT_S):
            failure = await engine.breakdown()
            failures = await asyncio.gather(*open_ones, return_exceptions=True)
    assert "(OutOfMemoryError) Its worker must be restarted" in failure.message
    assert "0xdeadbeef" not in failure.message
    assert {type(one) for one in failures} == {EngineFailed}


async def test_an_engine_on_several_gpus_keeps_its_weights(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    engine = LMDeployEngine(Settings(model=str(model), tp=2))
    await engine.start()
    with pytest.raises(InvalidRequest, match="must not be discarded"):
        await engine.offload(2)
    with pytest.raises(WeightsRefused, match="one GPU alone"):
        await engine.update_weights(Weights(1, str(model)))
    await engine.close()


async def test_an_abort_that_is_lost_is_repeated(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "deaf")
    async with running(model) as engine:
        generation = engine.generate(call(BAD, max_tokens=200))
        said = Said()
        async with asyncio.timeout(LIMIT_S):
            async for segment in generation:
                said.add(segment)
                if len(said.ids) == 5:
                    generation.close()
        (after,) = await read(engine.generate(call(GOOD)))
        assert after.finish_reason == "length"
        assert engine.counters()["generated_tokens"] < 100
    assert 5 <= len(said.ids) < 20


def body(prompt: list[int]) -> dict[str, object]:
    return {"input_ids": prompt, "sample_params": {"max_tokens": 12}}


@asynccontextmanager
async def serving(
    model: Path, url: str, pool: str, worker_id: str, *, routed_experts: bool = False
) -> AsyncGenerator["asyncio.Task[None]"]:
    config = Config(
        url=url,
        pool=pool,
        worker_id=worker_id,
        engine="lmdeploy",
        fail_limit=2,
        backoff_s=0,
        grace_s=0,
        slots=4,
    )
    service = Service(config, made(model, routed_experts=routed_experts))
    task = asyncio.create_task(service.run())
    try:
        yield task
    finally:
        service.stop()
        await asyncio.wait([task], timeout=LIMIT_S)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("error", "engine_failed"),
        ("out of memory", "engine_failed"),
        ("too long", "context_length_exceeded"),
    ],
)
async def test_a_job_that_always_fails_is_answered(
    model: Path,
    url: str,
    pool: str,
    broker: Broker,
    client: Client,
    fault: Fault,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, fault)
    async with serving(model, url, pool, "faulty"):
        bad = client.submit(body(BAD), protocol="generate")
        good = client.submit(body(GOOD), protocol="generate")
        failed = await asyncio.to_thread(bad.result, LIMIT_S)
        answered = await asyncio.to_thread(good.result, LIMIT_S)
    assert failed.status is JobStatus.FAILED
    assert isinstance(error := failed.exception(), RolloutError)
    assert error.code == code
    assert failed.attempts == (1 if code == "context_length_exceeded" else 2)
    assert [*answered.states[0].response_ids] == list(range(10, 22))


@pytest.mark.parametrize("fault", ["stall", "death"])
async def test_the_worker_leaves_and_another_one_answers(
    model: Path,
    url: str,
    pool: str,
    broker: Broker,
    client: Client,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(monkeypatch, fault)
    async with serving(model, url, pool, "dying") as dying:
        future = client.submit(body(BAD), protocol="generate")
        with pytest.raises(EngineFailed, match="lmdeploy is broken"):
            async with asyncio.timeout(LIMIT_S):
                await dying
    assert "worker dying leaves: lmdeploy is broken" in caplog.text
    install(monkeypatch, None)
    async with serving(model, url, pool, "heir"):
        reply = await asyncio.to_thread(future.result, LIMIT_S)
    assert (reply.worker, reply.status) == ("heir", JobStatus.COMPLETED)
    assert [*reply.states[0].response_ids] == list(range(10, 22))
