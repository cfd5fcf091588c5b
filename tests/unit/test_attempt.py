"""An attempt that is held, rested and let go on, in one event loop."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protocols.codec import decode_json, encode_json
from protocols.queue.rows import Lease
from tests.job_body import scripted
from tests.pool_look import until
from worker.engines.scripted import ScriptedEngine
from worker.outcome import Completed, Outcome
from worker.pipeline import Attempt, run_job

LIMIT_S = 20
TEXT = "x" * 40
PACE_MS = 5
LONG_ENOUGH_S = 4 * PACE_MS / 1000
"""What draws has drawn some tokens by then."""


class Running:
    """An attempt under way, a token every few milliseconds."""

    def __init__(self) -> None:
        body = encode_json(scripted(TEXT, ms_per_token=PACE_MS))
        fields = {b"body": body}
        lease = Lease(job_id="j", fence="1:n", lane="normal", left_ms=None, fields=fields)
        self.attempt = Attempt(lease)
        self.task: asyncio.Task[Outcome] | None = None

    @property
    def drawn(self) -> int:
        return sum(len(sample.ids) for sample in self.attempt.samples)

    async def begin(self) -> None:
        self.task = asyncio.create_task(run_job(self.attempt, ScriptedEngine(), "p"))
        await until(lambda: self.drawn, "a token")

    async def says_all(self) -> None:
        assert self.task is not None
        outcome = await self.task
        assert isinstance(outcome, Completed)
        assert decode_json(outcome.body)["choices"][0]["message"]["content"] == TEXT


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with asyncio.timeout(LIMIT_S):
        yield Running()


async def test_what_is_held_draws_nothing_until_it_may_go_on(running: Running) -> None:
    await running.begin()
    await running.attempt.rest()
    drawn = running.drawn
    assert running.attempt.held
    assert not running.attempt.generating
    await asyncio.sleep(LONG_ENOUGH_S)
    assert running.drawn == drawn
    running.attempt.go_on()
    await running.says_all()


async def test_who_is_held_again_at_once_draws_nothing(running: Running) -> None:
    await running.begin()
    await running.attempt.rest()
    drawn = running.drawn
    running.attempt.go_on()
    running.attempt.hold()
    await asyncio.sleep(LONG_ENOUGH_S)
    assert (running.drawn, running.attempt.generating) == (drawn, False)
    running.attempt.go_on()
    await running.says_all()


async def test_two_may_wait_for_the_same_rest(running: Running) -> None:
    await running.begin()
    await asyncio.gather(running.attempt.rest(), running.attempt.rest())
    assert not running.attempt.generating
    running.attempt.go_on()
    await running.says_all()


async def test_what_rests_before_it_has_begun_waits_with_its_first_token(running: Running) -> None:
    await running.attempt.rest()
    begun = asyncio.create_task(running.begin())
    await asyncio.sleep(LONG_ENOUGH_S)
    assert (running.drawn, running.attempt.generating) == (0, False)
    running.attempt.go_on()
    await begun
    await running.says_all()
