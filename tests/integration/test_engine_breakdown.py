"""An engine that has broken for good takes its worker with it; the jobs go on elsewhere."""

import asyncio

import pytest

from producer_sdk import Client
from protocols.errors import EngineFailed
from protocols.queue.broker import Broker
from tests.job_body import scripted
from tests.pool_look import Look, until
from tests.queue_fixtures import Serve
from worker.config import Config
from worker.engines.base import Call
from worker.engines.breakdown import Breakdown
from worker.engines.scripted import ScriptedEngine, ScriptedGeneration
from worker.service import Service

LIMIT_S = 60


class Mortal(ScriptedEngine):
    """Breaks when it is told to, and draws nothing then."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = Breakdown()

    async def breakdown(self) -> EngineFailed:
        return await self.broken.wait()

    def generate(self, call: Call) -> ScriptedGeneration:
        if self.broken.failure is not None:
            raise self.broken.failure
        return super().generate(call)


async def test_a_worker_leaves_with_its_engine_and_its_jobs_go_on_elsewhere(
    broker: Broker,
    client: Client,
    look: Look,
    serve: Serve,
    url: str,
    pool: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Mortal()
    config = Config(url=url, pool=pool, engine="scripted", worker_id="mortal", grace_s=0)
    dying = asyncio.create_task(Service(config, engine).run())
    future = client.submit(scripted("a long answer", ms_per_token=200))
    await until(lambda: look("ZCARD", look.keys.leases) == 1, "the job runs")
    engine.broken.tell(EngineFailed("the device is gone"))
    with pytest.raises(EngineFailed, match="the device is gone"):
        async with asyncio.timeout(LIMIT_S):
            await dying
    assert "worker mortal leaves: the device is gone" in caplog.text
    assert look("ZCARD", look.keys.leases) == 0
    heir = await asyncio.to_thread(serve)
    reply = await asyncio.to_thread(future.result, LIMIT_S)
    assert (reply.worker, reply.states[0].text) == (heir.worker_id, "a long answer")


async def test_only_the_first_breakdown_counts() -> None:
    broken = Breakdown()
    waiting = asyncio.create_task(broken.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    for what in ("first", "second"):
        broken.tell(EngineFailed(what))
    assert (await waiting).message == (await broken.wait()).message == "first"
