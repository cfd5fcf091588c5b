"""The engine `lmdeploy-server` with lmdeploy's own api_server: the other tests' wire is the real one.

Below the api_server a stub runs a tiny model on the CPU; what it draws is compared with plain forward passes.
"""

import asyncio
import json
import urllib.request
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from producer_sdk import Client
from protocols.errors import ConfigError, EngineFailed, RolloutError
from protocols.rollout_state import TokenIds
from tests.lmdeploy_server.api_server import ApiServer
from tests.lmdeploy_server.conftest import StartApiServer
from tests.plain_model import PlainModel, listed, of_tokens
from tests.tiny_model import VOCABULARY
from tests.torch_engine_calls import PROMPT, Said, call, drain, read, say
from tests.worker_process import StartWorker
from worker.engines.base import Call
from worker.engines.lmdeploy_server.engine import LMDeployServerEngine
from worker.engines.lmdeploy_server.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOLERATED = 1e-4
WAIT_S = 60
NEVER = TokenIds([7, 8, 9])
"""A prompt that the stub breaks on."""


@asynccontextmanager
async def connected(
    server: ApiServer, model: Path, **settings: object
) -> AsyncGenerator[LMDeployServerEngine]:
    usual = Settings(url=server.url, model=str(model), slots=32)
    engine = LMDeployServerEngine(msgspec.structs.replace(usual, **settings))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 - what it waits for is another task's plain state
            await asyncio.sleep(0.01)


async def broken(engine: LMDeployServerEngine) -> tuple[Said, RolloutError]:
    """What a call drew before it broke, and how."""
    said = Said()
    try:
        async for segment in engine.generate(call(NEVER, temperature=0.0)):
            said.add(segment)
    except RolloutError as error:
        return said, error
    pytest.fail("it did not break")


def post(server: ApiServer, path: str) -> None:
    request = urllib.request.Request(
        f"{server.url}{path}", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


async def test_tokens_and_log_probabilities_are_those_of_the_model(
    api_server: StartApiServer, model: Path
) -> None:
    plain = PlainModel(model)
    async with connected(api_server(), model) as engine:
        assert (engine.context_tokens, engine.vocabulary) == (256, VOCABULARY)
        (greedy,) = await say(engine, temperature=0.0, max_tokens=12)
        drawn = await say(engine, n=6, max_tokens=12, temperature=0.7)
    assert greedy.ids == plain.greedy([PROMPT], 12, 0)[0]
    for said in (greedy, *drawn):
        (reference,) = plain.logprobs([PROMPT], [said.ids])
        assert said.logprobs == pytest.approx(of_tokens(reference, said.ids), abs=TOLERATED)
        assert said.finish_reason in {"length", "stop"}
        assert len(said.ids) == 12 or said.ids[-1] == 0
    assert len({tuple(said.ids) for said in drawn}) > 1


async def test_alternatives_are_the_likeliest(api_server: StartApiServer, model: Path) -> None:
    plain = PlainModel(model)
    async with connected(api_server(), model) as engine:
        ids: list[int] = []
        tops: list[int] = []
        values: list[float] = []
        async for segment in engine.generate(call(max_tokens=8, top_logprobs=5)):
            ids += segment.token_ids
            tops += segment.top_ids
            values += segment.top_logprobs
    (reference,) = plain.logprobs([PROMPT], [ids])
    best = reference.topk(5)
    assert tops == listed(best.indices.flatten())
    assert values == pytest.approx(listed(best.values.flatten()), abs=TOLERATED)


async def test_a_stop_token_is_kept_with_its_log_probability(
    api_server: StartApiServer, model: Path
) -> None:
    async with connected(api_server(), model) as engine:
        (free,) = await say(engine, temperature=0.0, max_tokens=12)
        stop_id = free.ids[3]
        end = free.ids.index(stop_id) + 1
        (said,) = await say(engine, temperature=0.0, max_tokens=12, stop_token_ids=(stop_id,))
    assert (said.ids, said.finish_reason) == (free.ids[:end], "stop")
    assert said.logprobs == pytest.approx(free.logprobs[:end], abs=TOLERATED)


async def test_a_sample_goes_on_after_what_is_kept(api_server: StartApiServer, model: Path) -> None:
    async with connected(api_server(), model) as engine:
        (whole,) = await say(engine, temperature=0.0, max_tokens=12)
        params = call(temperature=0.0, max_tokens=12).params
        resumed = Call(PROMPT, params, kept=(TokenIds(whole.ids[:5]),))
        got = [one async for one in engine.generate(resumed)]
    assert (got[0].start, got[-1].finish_reason) == (5, whole.finish_reason)
    assert [i for one in got for i in one.token_ids] == whole.ids[5:]


@pytest.mark.parametrize("abort", [True, False], ids=["by session", "by the closed connection"])
async def test_an_ended_sample_frees_its_place(
    api_server: StartApiServer, model: Path, abort: bool
) -> None:
    server = api_server(abort=abort, max_batch_size=2, pace_s=0.5)
    async with connected(server, model) as engine:
        long = engine.generate(call(n=2, max_tokens=200, temperature=0.0))  # 100 s, both handles
        reading = asyncio.create_task(drain(long))
        await until(lambda: engine.counters()["generated_tokens"] >= 2)
        long.close()
        await reading
        async with asyncio.timeout(20):
            (said,) = await say(engine, max_tokens=2)
        assert len(said.ids) in {1, 2}
        await until(lambda: engine.counters()["running_samples"] == 0)


async def test_a_fault_in_the_midst_keeps_the_tokens(
    api_server: StartApiServer, model: Path
) -> None:
    async with connected(api_server(), model) as engine:
        said, error = await broken(engine)
        assert (len(said.ids), isinstance(error, EngineFailed)) == (2, True)
        assert "500" in error.message
        (after,) = await say(engine, max_tokens=3)
        assert after.ids


async def test_weights_sleep_and_wake(api_server: StartApiServer, model: Path) -> None:
    async with connected(api_server(), model) as engine:
        (before,) = await say(engine, temperature=0.0)
        await engine.offload(1)
        assert engine.memory == "offloaded"
        await engine.onload()
        (after,) = await say(engine, temperature=0.0)
    assert (engine.memory, after.ids) == ("loaded", before.ids)


async def test_a_server_that_somebody_else_put_to_sleep_is_waited_for(
    api_server: StartApiServer, model: Path
) -> None:
    server = api_server()
    async with connected(server, model) as engine:
        await asyncio.to_thread(post, server, "/sleep?level=1")
        reading = asyncio.create_task(read(engine.generate(call(max_tokens=3))))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(reading), 1)
        await asyncio.to_thread(post, server, "/wakeup")
        (said,) = await reading
    assert said.ids


async def test_the_server_s_shorter_context_is_found(
    api_server: StartApiServer, model: Path
) -> None:
    async with connected(api_server(session_len=100), model) as engine:
        assert engine.context_tokens == 100
        (said,) = await say(engine, range(5, 95), max_tokens=10)
        assert said.ids


async def test_what_does_not_fit_is_told_at_the_start(
    api_server: StartApiServer, model: Path
) -> None:
    with pytest.raises(ConfigError, match="--logprobs-mode raw_logprobs"):
        async with connected(api_server(logprobs_mode=None), model):
            pass
    guarded = api_server(keys=["k1"])
    with pytest.raises(ConfigError, match="ROLLOUTQ_ENGINE_KEY"):
        async with connected(guarded, model, key=SecretStr("zz")):
            pass
    async with connected(guarded, model, key=SecretStr("k1")) as engine:
        (said,) = await say(engine, max_tokens=3)
        assert said.ids


def test_jobs_from_redis_are_answered_through_an_api_server(
    api_server: StartApiServer, model: Path, url: str, pool: str, start_worker: StartWorker
) -> None:
    worker = start_worker(
        url, pool, engine="lmdeploy-server", engine_url=api_server().url, model=str(model)
    )
    worker.wait_ready(120)
    plain = PlainModel(model)
    with Client(url, pool=pool) as client:
        messages = [{"role": "user", "content": "the rain"}]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": True}
        claude = {"messages": messages, "max_tokens": 8, "model": "tiny-llama"}
        futures = [
            client.submit({**body, "n": 2}, protocol="openai.chat"),
            client.submit(claude, protocol="claude.messages"),
        ]
        replies = [future.result(timeout=60) for future in futures]
        refused = client.submit({**body, "seed": 5}).result(timeout=60)
    assert [reply.status for reply in replies] == ["completed", "completed"]
    for reply in replies:
        for state in reply.states:
            (reference,) = plain.logprobs([state.prompt_ids], [state.response_ids])
            expected = of_tokens(reference, state.response_ids)
            assert list(state.logprobs) == pytest.approx(expected, abs=TOLERATED)
    assert refused.status == "failed"
    assert "sampling_seed" in json.dumps(refused.response)
