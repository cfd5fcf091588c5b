"""What every engine promises behind a worker: a pause in each mode, cancelling, stop strings."""

import asyncio
from asyncio import to_thread
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from producer_sdk import Client, Future, JobStatus
from protocols.job import Reply
from protocols.queue.broker import Broker
from protocols.rollout_state import RolloutState
from tests import engines
from tests.control_look import obeyed
from tests.pool_look import Look
from tests.queue_fixtures import broker, client, look
from tests.servers import ServerKind
from tests.torch_engine_calls import PROMPT
from worker.config import Config
from worker.engines.base import Engine
from worker.service import Service

__all__ = ["broker", "client", "look"]

LIMIT_S = 100.0
MS_PER_TOKEN = 5
TOKENS = 230
"""Of a job that is still generating when an order comes: nearly all that the context of the tiny model holds."""


@pytest.fixture
def server_kind() -> ServerKind:
    """Redis: the environment that has lmdeploy may lack the wheel of Valkey."""
    return "redis"


@pytest.fixture
async def engine(
    engine_name: str, engine_url: str | None, model: Path, url: str, pool: str, broker: Broker
) -> AsyncIterator[Engine]:
    """The engine of a worker that serves the pool, in this process."""
    config = Config(url=url, pool=pool, worker_id="w", slots=2, grace_s=0, checkpoint_tokens=8)
    service = Service(config, engines.made(engine_name, model, engine_url))
    serving = asyncio.create_task(service.run())
    await until(lambda: service.state == "serving" or serving.done())
    yield service.engine
    service.stop()
    await serving


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110 - what it waits for is another task's plain state
            await asyncio.sleep(0.002)


def submit(client: Client, engine: Engine, **params: object) -> Future[Reply]:
    """A job of the likeliest tokens."""
    body: dict[str, object] = {
        "input_ids": list(PROMPT),
        "sample_params": {"temperature": 0, "max_tokens": TOKENS, **params},
    }
    if "script" in engine.capabilities:
        body["rollout"] = {"script": {"text": "0123456789" * 23, "ms_per_token": MS_PER_TOKEN}}
    return client.submit(body, protocol="generate")


async def begun(client: Client, engine: Engine) -> Future[Reply]:
    """A job that has some tokens and lacks most."""
    before = engine.counters()["generated_tokens"]
    future = await to_thread(submit, client, engine)
    await until(lambda: engine.counters()["generated_tokens"] >= before + 5)
    return future


async def state_of(future: Future[Reply]) -> RolloutState:
    reply = await to_thread(future.result, LIMIT_S)
    reply.raise_for_status()
    (state,) = reply.states
    return state


@pytest.mark.parametrize(("mode", "attempts"), [("release", 2), ("keep", 1)])
async def test_a_job_goes_on_after_a_pause_that_moved_the_weights(
    client: Client, engine: Engine, look: Look, mode: str, attempts: int
) -> None:
    future = await begun(client, engine)
    await to_thread(obeyed, look, "pause", f"mode={mode}")
    await until(lambda: engine.counters()["running_samples"] == 0)
    if mode == "release":  # what is held is in flight, and weights do not move below it
        await to_thread(obeyed, look, "offload")
        assert engine.memory == "offloaded"
        await to_thread(obeyed, look, "onload")
    assert look.reply(future.job_id)["status"] in {"queued", "running"}
    before = engine.counters()["generated_tokens"]
    await to_thread(obeyed, look, "continue")
    state = await state_of(future)
    assert len(state.response_ids) == len(state.logprobs) == TOKENS
    assert 0 < engine.counters()["generated_tokens"] - before < TOKENS
    assert (await to_thread(future.result, LIMIT_S)).attempts == attempts
    undisturbed = await state_of(await to_thread(submit, client, engine))
    assert state.response_ids == undisturbed.response_ids


async def test_a_job_ends_in_a_pause_that_drains(
    client: Client, engine: Engine, look: Look
) -> None:
    future = await begun(client, engine)
    await to_thread(obeyed, look, "pause", "mode=drain")
    assert len((await state_of(future)).response_ids) == TOKENS
    await to_thread(obeyed, look, "offload")
    assert engine.memory == "offloaded"


async def test_a_job_is_answered_with_its_tokens_by_a_pause_that_aborts(
    client: Client, engine: Engine, look: Look
) -> None:
    future = await begun(client, engine)
    await to_thread(obeyed, look, "pause", "mode=abort")
    reply = await to_thread(future.result, LIMIT_S)
    assert reply.status is JobStatus.ABORTED
    assert 5 <= len(reply.states[0].response_ids) < TOKENS
    await until(lambda: engine.counters()["running_samples"] == 0)


async def test_a_cancelled_job_generates_no_more(client: Client, engine: Engine) -> None:
    future = await begun(client, engine)
    cancelled = await to_thread(client.cancel, job_id=future.job_id)
    assert await to_thread(cancelled.result, LIMIT_S) == 1
    assert (await to_thread(future.result, LIMIT_S)).status is JobStatus.CANCELLED
    await until(lambda: engine.counters()["running_samples"] == 0)
    assert engine.counters()["generated_tokens"] < TOKENS


async def test_a_stop_string_ends_each_sample(client: Client, engine: Engine) -> None:
    free = (await state_of(await to_thread(submit, client, engine, max_tokens=40))).response or ""
    stop = next(one for one in free[2:] if one != "\ufffd")  # which half a character is shown as
    future = await to_thread(submit, client, engine, n=2, max_tokens=40, stops=[stop])
    reply = await to_thread(future.result, LIMIT_S)
    reply.raise_for_status()
    for state in reply.states:
        assert state.response == free[: free.index(stop)]
        assert (state.finish_reason, state.stop_reason) == ("stop", stop)
