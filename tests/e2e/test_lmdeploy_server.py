"""Jobs from Redis through the engine `lmdeploy-server`: workers as processes, a server that speaks lmdeploy's wire."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis import Redis

from producer_sdk import Client
from tests.lmdeploy_wire import LmdeployWire, lmdeploy_wire, token_at
from tests.tiny_model import save_tiny_model
from tests.worker_process import StartWorker, WorkerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

PROMPT = list(range(5, 25))
TOKENS = 100
LIMIT_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
async def wire() -> AsyncIterator[LmdeployWire]:
    async with lmdeploy_wire() as server:
        server.pace_s = 0.05
        yield server


async def started(
    start_worker: StartWorker, url: str, pool: str, wire: LmdeployWire, model: Path
) -> WorkerProcess:
    worker = start_worker(
        url,
        pool,
        engine="lmdeploy-server",
        engine_url=wire.url,
        model=str(model),
        lease_s=3,
        checkpoint_tokens=5,
        checkpoint_s=0.2,
    )
    await asyncio.to_thread(worker.wait_ready, 120)
    return worker


async def kept_tokens(url: str, pool: str, job_id: str) -> None:
    """Return when a checkpoint of the job is on the server."""
    with Redis.from_url(url, protocol=2) as redis:  # pyright: ignore[reportUnknownMemberType]
        async with asyncio.timeout(LIMIT_S):
            while not redis.exists(f"rollout:{{{pool}}}:progress:{job_id}"):  # noqa: ASYNC110 - a server's state
                await asyncio.sleep(0.05)


async def test_a_killed_worker_s_job_goes_on_from_the_kept_tokens(
    wire: LmdeployWire, model: Path, url: str, pool: str, start_worker: StartWorker
) -> None:
    first = await started(start_worker, url, pool, wire, model)
    with Client(url, pool=pool) as client:
        job = client.submit(
            {"input_ids": PROMPT, "sample_params": {"max_tokens": TOKENS}}, protocol="generate"
        )
        await kept_tokens(url, pool, job.job_id)
        first.kill()
        await started(start_worker, url, pool, wire, model)
        reply = await asyncio.to_thread(job.result, LIMIT_S)
    assert (reply.status, reply.attempts) == ("completed", 2)
    assert reply.state is not None
    assert list(reply.state.response_ids) == [token_at(len(PROMPT) + at) for at in range(TOKENS)]
    last = wire.bodies[-1]
    kept = last["input_ids"][len(PROMPT) :]
    assert 0 < len(kept) < TOKENS
    assert kept == list(reply.state.response_ids[: len(kept)])
    assert last["max_tokens"] == TOKENS - len(kept)


async def test_a_cancelled_job_is_aborted_on_the_server_and_keeps_its_tokens(
    wire: LmdeployWire, model: Path, url: str, pool: str, start_worker: StartWorker
) -> None:
    await started(start_worker, url, pool, wire, model)
    with Client(url, pool=pool) as client:
        body = {"messages": [{"role": "user", "content": "the rain"}], "max_tokens": 200}
        job = client.submit(body)
        await kept_tokens(url, pool, job.job_id)
        await asyncio.to_thread(client.cancel(job_id=job.job_id).result, LIMIT_S)
        reply = await asyncio.to_thread(job.result, LIMIT_S)
    assert reply.status == "cancelled"
    assert reply.state is not None
    assert 0 < len(reply.state.response_ids) < 200
    assert wire.aborted == [wire.bodies[-1]["session_id"]]


async def test_what_the_server_lacks_is_refused_before_it_is_asked(
    wire: LmdeployWire, model: Path, url: str, pool: str, start_worker: StartWorker
) -> None:
    await started(start_worker, url, pool, wire, model)
    asked = len(wire.bodies)
    with Client(url, pool=pool) as client:
        body = {"messages": [{"role": "user", "content": "the rain"}], "max_tokens": 5, "seed": 3}
        reply = await asyncio.to_thread(client.submit(body).result, LIMIT_S)
    assert (reply.status, reply.response["error"]["code"]) == ("failed", "unsupported_option")
    assert len(wire.bodies) == asked
