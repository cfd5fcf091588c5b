"""The promise: accepted once, generated at least once, answered exactly once; a test for each that follows.

Promise 3 (a dead worker's job goes on) and 7 (control) are kept by parts with tests of their own.
"""

import asyncio
from collections.abc import Callable

import pytest

from producer_sdk import (
    Client,
    JobConflict,
    JobStatus,
    ResultTimeout,
    SampleParams,
    StalenessExceeded,
    Status,
)
from protocols.codec import encode_json
from protocols.queue.broker import Broker
from tests.job_body import chat, claude, scripted
from tests.monitor import Monitor
from tests.pool_look import Look, expire_lease, sweep, until, wait_until
from tests.queue_fixtures import Serve
from tests.servers import both_servers

LIMIT_S = 60


def generated_tokens(client: Client) -> int:
    """By the engines' own counters."""
    workers = client.fleet().result(LIMIT_S).workers.values()
    return sum(int(worker["generated_tokens"]) for worker in workers)


@both_servers
def test_promise_1_one_job_id_one_accepted_reply(
    client: Client, url: str, pool: str, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    serve(lease_s=0.9)
    body = scripted("twelve bytes", ms_per_token=20)
    with Monitor(url) as monitor, Client(url, pool=pool) as another:
        futures = [c.submit(body, job_id="one") for c in (client, another) for _ in range(10)]
        for _ in range(5):
            look("XADD", look.keys.jobs("normal"), "*", "id", "one", "body", encode_json(body))
        with pytest.raises(JobConflict):
            client.submit(chat("another"), job_id="one").result(LIMIT_S)
        replies = [future.result(LIMIT_S) for future in futures]
        replies += [client.submit(body, job_id="one").result(LIMIT_S)]
        nothing_left()
        assert monitor.replies_written(pool) == {"one": 1}
    assert len(set(replies)) == 1
    assert replies[0].states[0].text == "twelve bytes"
    drawn = len("twelve bytes") + 1
    wait_until(lambda: generated_tokens(client) >= drawn, "a heartbeat tells of the tokens")
    assert generated_tokens(client) == drawn


@both_servers
async def test_promise_1_a_worker_that_lost_its_lease_writes_nothing(
    client: Client,
    url: str,
    pool: str,
    broker: Broker,
    serve: Serve,
    look: Look,
    nothing_left: Callable[[], None],
) -> None:
    """A worker that is thought dead goes on with its job, and takes it once more beside."""
    worker = serve(slots=2, lease_s=60)
    future = client.submit(scripted("slow answer", ms_per_token=60))
    await until(lambda: look.reply(future.job_id).get("status") == "running", "it runs")
    fence = look.reply(future.job_id)["fence"]
    with Monitor(url) as monitor:

        def writes() -> int:
            return sum(monitor.called(step, future.job_id, fence) for step in ("renew", "finish"))

        expire_lease(look, future.job_id)
        assert await sweep(broker) == {"reclaimed": 1}
        before = writes()
        reply = await future
        assert (reply.attempts, reply.states[0].text) == (2, "slow answer")
        await until(lambda: "lease of attempt 1:" in worker.log_tail(), "the first was refused")
        assert monitor.replies_written(pool) == {future.job_id: 1}
        assert writes() > before, "the first attempt tried to write after it had lost its lease"
    nothing_left()
    assert (await client.submit(chat("next"))).attempts == 1


async def test_promise_2_no_client_timeout_ends_a_generation(client: Client, serve: Serve) -> None:
    serve()
    future = client.submit(scripted("0123456789", ms_per_token=60))
    with pytest.raises(ResultTimeout):
        await asyncio.to_thread(future.result, 0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await future
    with pytest.raises(ResultTimeout):
        async for _ in client.as_completed([future], timeout=0.05):
            pass
    reply = await future
    assert (reply.status, reply.attempts) == (JobStatus.COMPLETED, 1)
    assert reply.states[0].text == "0123456789"


def test_promise_2_no_client_that_goes_away_ends_a_generation(
    url: str, pool: str, client: Client, serve: Serve
) -> None:
    serve()
    with Client(url, pool=pool) as gone:
        future = gone.submit(scripted("0123456789", ms_per_token=60))
    assert client.get(future.job_id).result(LIMIT_S).states[0].text == "0123456789"


def test_promise_2_a_deadline_or_a_cancel_ends_it_and_the_reply_says_so(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    serve(lease_s=0.9)
    body = scripted("x" * 1000, ms_per_token=100)
    late = client.submit(body, timeout_s=0.3)
    unwanted = client.submit(body)
    wait_until(lambda: look.reply(unwanted.job_id).get("status") == "running", "it runs")
    assert unwanted.cancel().result(LIMIT_S) == 1
    ends = [(f.result(LIMIT_S).status, f.result().code, f.result().error) for f in (late, unwanted)]
    assert ends == [
        (JobStatus.EXPIRED, 504, "deadline_exceeded"),
        (JobStatus.CANCELLED, 499, "cancelled"),
    ]
    nothing_left()


def test_a_job_that_falls_behind_the_wanted_weights_ends_expired_with_its_tokens(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    serve(lease_s=1.2)
    future = client.submit(scripted("x" * 5000, ms_per_token=10), max_staleness=1)
    patient = client.submit(scripted("x" * 100, ms_per_token=10))
    wait_until(lambda: "oldest_version" in look.reply(future.job_id), "a checkpoint")
    look("HSET", look.keys.desired, "weights", 2)
    reply = future.result(LIMIT_S)
    assert (reply.status, reply.code, reply.error) == (JobStatus.EXPIRED, 410, "staleness_exceeded")
    assert 0 < len(reply.states[0].response_ids) < 5000
    with pytest.raises(StalenessExceeded, match="max_staleness while it was generated"):
        reply.raise_for_status()
    assert patient.result(LIMIT_S).status is JobStatus.COMPLETED
    nothing_left()


@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate"])
def test_promise_4_a_failure_is_a_reply_with_status_and_error(
    client: Client, serve: Serve, nothing_left: Callable[[], None], protocol: str
) -> None:
    serve(fail_limit=2, backoff_s=0)
    broken = {"script": {"text": "abc", "fail": "error", "at_token": 2}}
    plain = claude("x") if protocol == "claude.messages" else chat("x")
    futures = [
        client.submit(plain | {"rollout": broken}, protocol=protocol),
        client.submit(plain | {"model": "other"}, protocol=protocol),
        client.submit({}, protocol=protocol),
    ]
    for future, error in zip(
        futures, ("engine_failed", "model_not_found", "invalid_request"), strict=True
    ):
        reply = future.result(LIMIT_S)
        assert (reply.status, reply.error) == (JobStatus.FAILED, error)
        assert reply.code >= 400
        assert reply.response["error"]["message"]
        assert (reply.states, reply.state) == ((), None)
        assert {"choices", "content", "samples"}.isdisjoint(reply.response)
    nothing_left()


def test_promise_4_a_failed_sample_never_looks_like_an_answer(client: Client, serve: Serve) -> None:
    serve()
    group = client.sample("x", n=3, params=SampleParams(temperature=9)).result(LIMIT_S)
    assert [sample.status for sample in group.samples] == [Status.FAILED] * 3
    assert all(sample.response is None and sample.error_msg for sample in group.samples)
    assert all(sample.finish_reason == "error" for sample in group.samples)


def test_promise_5_no_option_is_dropped_silently(client: Client, serve: Serve) -> None:
    """Refused by name, or reported under `ignored`, or honoured: here all three, and the unknown."""
    serve()
    refused = client.submit(chat("x", functions=[{"name": "f"}])).result(LIMIT_S)
    assert (refused.code, refused.error) == (400, "unsupported_option")
    assert "`functions`" in refused.response["error"]["message"]
    unknown = client.submit(chat("x", no_such_option=1)).result(LIMIT_S)
    assert "`no_such_option`: unknown field" in unknown.response["error"]["message"]
    ignored = client.submit(chat("xyz", user="me", priority=3, max_tokens=2)).result(LIMIT_S)
    assert ignored.response["rollout"]["ignored"] == ["user", "priority"]
    assert ignored.states[0].text == "xy"


def test_promise_5_what_is_refused_costs_no_generation(client: Client, serve: Serve) -> None:
    serve(lease_s=0.6)
    bodies = [chat("x" * 50, functions=[{"name": "f"}]), chat("x" * 50, model="other")]
    for body in bodies:
        assert client.submit(body).result(LIMIT_S).status is JobStatus.FAILED
    assert client.submit(chat("abc")).result(LIMIT_S).status is JobStatus.COMPLETED
    wait_until(lambda: generated_tokens(client) >= 4, "a heartbeat tells of the tokens")
    assert generated_tokens(client) == 4


@both_servers
def test_promise_6_every_token_carries_logprob_and_version(client: Client, serve: Serve) -> None:
    serve(policy_version=41)
    futures = [
        client.submit(chat("héllo", n=3)),
        client.submit(claude("héllo"), protocol="claude.messages"),
        client.submit({"prompt": "héllo"}, protocol="generate"),
        client.submit(chat("héllo", max_tokens=3)),
        client.submit(chat("héllo", stop=["l"])),
    ]
    for future in futures:
        reply = future.result(LIMIT_S).raise_for_status()
        assert reply.policy_version == 41
        for state in reply.states:
            tokens = len(state.response_ids)
            assert tokens > 0
            assert len(state.logprobs) == tokens == len(state.response_mask)
            assert state.response_model_steps == [41] * tokens
            assert state.policy_versions == ((41, 0),)
