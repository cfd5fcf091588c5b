"""The step `enqueue`: one id is one job, whoever brings it and however often."""

from typing import Any, cast

import pytest

from protocols.errors import InvalidRequest, JobConflict, QueueFull, RolloutError
from protocols.job import JobStatus
from protocols.queue.broker import Broker
from protocols.queue.rows import body_hash
from tests.job_body import ending, job
from tests.pool_look import Look
from tests.queue_fixtures import Take
from tests.servers import both_servers

pytestmark = both_servers


async def test_second_enqueue_of_a_body_is_the_first_job(broker: Broker, look: Look) -> None:
    assert await broker.enqueue([job("a")]) == [JobStatus.QUEUED]
    assert await broker.enqueue([job("a"), job("a")]) == [JobStatus.QUEUED] * 2
    assert look.length("normal") == 1


async def test_second_enqueue_tells_how_far_the_job_is(
    broker: Broker, look: Look, take: Take
) -> None:
    await broker.enqueue([job("a")])
    (lease,) = await take()
    assert await broker.enqueue([job("a")]) == [JobStatus.RUNNING]
    await broker.finish([ending(lease)])
    assert await broker.enqueue([job("a")]) == [JobStatus.COMPLETED]
    assert look.left() == []


async def test_another_body_under_an_id_is_refused(broker: Broker, look: Look) -> None:
    await broker.enqueue([job("a")])
    (answer,) = await broker.enqueue([job("a", "another")])
    assert isinstance(answer, JobConflict)
    assert (answer.param, answer.http_status) == ("id", 409)
    assert "job id a" in answer.message
    assert look.length("normal") == 1


async def test_the_same_bytes_in_another_protocol_are_another_body(broker: Broker) -> None:
    await broker.enqueue([job("a")])
    (answer,) = await broker.enqueue([job("a", protocol="claude.messages")])
    assert isinstance(answer, JobConflict)


async def test_one_batch_is_judged_job_by_job(broker: Broker, look: Look) -> None:
    jobs = [job("a"), job("a"), job("a", "another"), job("not an id"), job("b")]
    answers = await broker.enqueue(jobs)
    assert [type(answer) for answer in answers] == [
        JobStatus,
        JobStatus,
        JobConflict,
        InvalidRequest,
        JobStatus,
    ]
    assert look.length("normal") == 2


@pytest.mark.parametrize("job_id", ["", "a b", "a/b", "ä", "a\n", "x" * 129])
async def test_an_odd_id_is_refused(broker: Broker, look: Look, job_id: str) -> None:
    (answer,) = await broker.enqueue([job(job_id)])
    assert isinstance(answer, InvalidRequest)
    assert answer.param == "id"
    assert "1 to 128" in answer.message
    assert look.left() == []


@pytest.mark.parametrize("job_id", ["a", "A.b_c:d~e-9", "x" * 128])
async def test_a_good_id_is_accepted(broker: Broker, job_id: str) -> None:
    assert await broker.enqueue([job(job_id)]) == [JobStatus.QUEUED]


@pytest.mark.parametrize("lane", ["resume", "urgent"])
async def test_only_the_three_lanes_are_open(broker: Broker, look: Look, lane: str) -> None:
    (answer,) = await broker.enqueue([job("a", lane=cast("Any", lane))])
    assert isinstance(answer, InvalidRequest)
    assert look.left() == []


async def test_backlog_limit_refuses_new_jobs_and_knows_the_old(broker: Broker, look: Look) -> None:
    look("HSET", broker.keys.prefix, "backlog", 2)
    answers = await broker.enqueue([job("a"), job("b"), job("c")])
    assert answers[:2] == [JobStatus.QUEUED] * 2
    assert isinstance(answers[2], QueueFull)
    assert answers[2].retry_after_s
    assert await broker.enqueue([job("b")]) == [JobStatus.QUEUED]


async def test_running_jobs_are_no_backlog(broker: Broker, look: Look, take: Take) -> None:
    look("HSET", broker.keys.prefix, "backlog", 1)
    await broker.enqueue([job("a")])
    assert isinstance((await broker.enqueue([job("b")]))[0], RolloutError)
    await take()
    assert await broker.enqueue([job("b")]) == [JobStatus.QUEUED]


async def test_a_job_keeps_its_hash_its_run_and_its_deadline(broker: Broker, look: Look) -> None:
    queued = job("a", run="r1", inbox="c1", timeout_ms=60_000)
    before_ms = look.now_ms()
    await broker.enqueue([queued])
    kept = look.reply("a")
    assert kept["sha"] == body_hash(queued.protocol, queued.body)
    assert (kept["status"], kept["run"], kept["inbox"]) == ("queued", "r1", "c1")
    assert before_ms + 60_000 <= int(kept["deadline_ms"]) <= look.now_ms() + 60_000
    assert await broker.run_ids("r1") == ["a"]
