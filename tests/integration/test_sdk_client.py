"""The client, sync and async: futures, samples, iteration, waits that end early, cancels."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from producer_sdk import (
    Client,
    Future,
    Group,
    InvalidRequest,
    JobConflict,
    JobNotFound,
    JobStatus,
    Reply,
    ResultTimeout,
    RolloutError,
    SampleParams,
    Status,
    TokenIds,
)
from protocols.errors import Cancelled, ConfigError, DeadlineExceeded
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import open_pool
from tests.servers import both_servers

pytestmark = both_servers

LIMIT_S = 60
LONG = scripted("x" * 3000, ms_per_token=20)
"""A minute of tokens, should nobody end it."""
SHORT = {"script": {"text": "ok"}}


@pytest.fixture
def pool(standing: str) -> str:
    return standing


@pytest.fixture
def fresh_id() -> str:
    return f"id-{secrets.token_hex(6)}"


@pytest.fixture
def running(client: Client, look: Look) -> Iterator[Future[Reply]]:
    """A job that runs until it is cancelled."""
    future = client.submit(LONG)
    wait_until(lambda: look.reply(future.job_id).get("status") == "running", "the job runs")
    yield future
    client.cancel(job_id=future.job_id).result(LIMIT_S)
    future.result(LIMIT_S)


def answer_of(reply: Reply) -> str:
    return reply.raise_for_status().response["choices"][0]["message"]["content"]


def test_a_result_is_the_same_however_often_it_is_asked_for(client: Client) -> None:
    future = client.submit(chat("hello"))
    reply = future.result(LIMIT_S)
    assert answer_of(reply) == "hello"
    assert future.done()
    assert future.result() is reply
    assert future.exception() is None


async def test_a_future_can_be_awaited_again_and_again(client: Client) -> None:
    future = client.submit(chat("hello"))
    reply = await future
    assert await future is reply
    assert await asyncio.gather(*(client.submit(chat(f"t{i}")) for i in range(20)))


async def test_awaiting_does_not_block_the_event_loop(
    client: Client, running: Future[Reply]
) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    await client.submit(scripted("slow", ms_per_token=40))
    ticking.cancel()
    assert ticks >= 5
    assert not running.done()


def test_one_future_serves_many_event_loops(client: Client) -> None:
    future = client.submit(scripted("slow", ms_per_token=20))

    async def wait() -> Reply:
        return await future

    found: list[Reply] = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(wait()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert found == [future.result(LIMIT_S)] * 4


def test_a_client_serves_many_threads(client: Client) -> None:
    answers: dict[str, str] = {}

    def ask(who: int) -> None:
        futures = {f"{who}-{i}": client.submit(chat(f"{who}-{i}")) for i in range(40)}
        answers.update({text: answer_of(f.result(LIMIT_S)) for text, f in futures.items()})

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(answers) == 320
    assert all(text == answer for text, answer in answers.items())


def test_a_wait_that_ends_early_leaves_the_job_alone(
    client: Client, running: Future[Reply], look: Look
) -> None:
    with pytest.raises(ResultTimeout) as late:
        running.result(0.05)
    assert running.job_id in late.value.message
    assert "it goes on" in late.value.message
    assert isinstance(late.value, TimeoutError)
    with pytest.raises(ResultTimeout):
        running.exception(0.05)
    assert look.reply(running.job_id)["status"] == "running"


async def test_wait_for_gives_up_the_wait_and_not_the_job(
    client: Client, running: Future[Reply], look: Look
) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.ensure_future(_awaited(running)), 0.1)
    assert look.reply(running.job_id)["status"] == "running"
    short = client.submit(scripted("slow", ms_per_token=50))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await short
    assert answer_of(await short) == "slow"


async def _awaited(future: Future[Reply]) -> Reply:
    return await future


def test_the_same_id_and_body_is_the_same_job(client: Client, fresh_id: str) -> None:
    first = client.submit(chat("hello"), job_id=fresh_id)
    second = client.submit(chat("hello"), job_id=fresh_id)
    assert first.result(LIMIT_S) == second.result(LIMIT_S)
    assert client.submit(chat("hello"), job_id=fresh_id).result(LIMIT_S) == first.result()


def test_the_same_id_with_another_body_is_refused(client: Client, fresh_id: str) -> None:
    first = client.submit(chat("hello"), job_id=fresh_id)
    with pytest.raises(JobConflict):
        client.submit(chat("another"), job_id=fresh_id).result(LIMIT_S)
    assert answer_of(first.result(LIMIT_S)) == "hello"


def test_answers_come_as_they_complete(client: Client) -> None:
    slow = client.submit(scripted("slow", ms_per_token=100))
    quick = client.submit(scripted("quick"))
    results = client.as_completed([slow, quick], timeout=LIMIT_S)
    assert len(results) == 2
    assert [answer_of(reply) for reply in results] == ["quick", "slow"]


async def test_answers_come_as_they_complete_in_an_event_loop(client: Client) -> None:
    slow = client.submit(scripted("slow", ms_per_token=100))
    quick = client.submit(scripted("quick"))
    results = client.as_completed([slow, quick], timeout=LIMIT_S)
    assert [answer_of(reply) async for reply in results] == ["quick", "slow"]


def test_iterating_gives_up_after_its_timeout(client: Client, running: Future[Reply]) -> None:
    quick = client.submit(chat("quick"))
    quick.result(LIMIT_S)
    seen: list[str] = []
    with pytest.raises(ResultTimeout, match=r"1 of 2 answers within 0\.3 s; the others go on"):
        seen += [answer_of(r) for r in client.as_completed([running, quick], timeout=0.3)]
    assert not running.done()


async def test_iterating_in_an_event_loop_gives_up_after_its_timeout(
    client: Client, running: Future[Reply]
) -> None:
    with pytest.raises(ResultTimeout, match=r"0 of 1 answers within 0\.2 s"):
        async for _ in client.as_completed([running], timeout=0.2):
            pass
    assert not running.done()


def test_progress_is_told_on_standard_error(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    list(client.as_completed([client.submit(chat("x")) for _ in range(3)], progress=True))
    list(client.map(["a", "b"], progress=True))
    told = capsys.readouterr()
    assert told.out == ""
    assert "jobs: 3/3" in told.err
    assert "prompts: 2/2" in told.err


def test_mapped_groups_come_in_the_order_of_their_prompts(client: Client) -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    groups = list(client.map(prompts, n=2, window=8))
    assert [group.samples[0].text for group in groups] == prompts
    assert {len(group.samples) for group in groups} == {2}


def test_mapping_takes_no_more_prompts_than_its_window(client: Client) -> None:
    drawn = 0

    def prompts() -> Iterator[str]:
        nonlocal drawn
        for i in range(20):
            drawn += 1
            yield f"p{i}"

    groups = client.map(prompts(), window=4)
    next(groups)
    assert drawn <= 5
    assert len(list(groups)) == 19


def test_samples_of_text_ids_and_messages(client: Client) -> None:
    params = SampleParams(max_tokens=4)
    by_text = client.sample("Hello", n=3, params=params).result(LIMIT_S)
    assert isinstance(by_text, Group)
    assert by_text.raise_for_status() is by_text
    assert [sample.text for sample in by_text.samples] == ["Hell"] * 3
    assert by_text.prompt_ids.tolist() == list(b"Hello")
    sample = by_text.samples[1]
    assert (sample.index, sample.finish_reason, sample.status) == (1, "length", Status.COMPLETED)
    assert sample.token_ids.tolist() == list(b"Hell")
    assert len(sample.logprobs) == 4
    assert sample.policy_versions == ((0, 0),)
    assert sample.response_model_steps == [0] * 4
    by_ids = client.sample(TokenIds(b"Hello"), params=params).result(LIMIT_S)
    assert by_ids.samples[0].text == "Hell"
    by_messages = client.sample(chat("Hello")["messages"], params=params).result(LIMIT_S)
    assert by_messages.samples[0].text == "Hell"


def test_a_group_that_failed_has_samples_that_say_so(client: Client) -> None:
    group = client.sample("Hello", n=2, params=SampleParams(max_tokens=10**7)).result(LIMIT_S)
    assert group.status is JobStatus.FAILED
    assert [sample.status for sample in group.samples] == [Status.FAILED] * 2
    assert all("max_tokens" in (sample.error_msg or "") for sample in group.samples)
    assert all(sample.finish_reason == "error" for sample in group.samples)
    with pytest.raises(InvalidRequest):
        group.raise_for_status()


def test_a_failed_reply_raises_only_when_asked_to(client: Client) -> None:
    reply = client.submit(chat("x", n=1000)).result(LIMIT_S)
    assert (reply.status, reply.code, reply.error) == (JobStatus.FAILED, 400, "invalid_request")
    with pytest.raises(InvalidRequest, match="`n`"):
        reply.raise_for_status()


def test_a_job_on_its_way_is_found_by_its_id(client: Client) -> None:
    heavy = [client.submit(chat("x" * 50_000, rollout=SHORT)) for _ in range(200)]
    last = client.submit(chat("the last"))
    assert client.get(last.job_id).result(LIMIT_S).status is JobStatus.COMPLETED
    assert [one.result(LIMIT_S).status for one in heavy] == [JobStatus.COMPLETED] * 200


def test_replies_are_collected_when_the_client_says_so_and_kept_as_long_as_the_job_says(
    url: str, pool: str, look: Look, fresh_id: str
) -> None:
    with Client(url, pool=pool, auto_collect=False) as client:
        future = client.submit(chat("hi"), job_id=fresh_id, reply_ttl_s=3600)
        reply = future.result(LIMIT_S)
    assert look("ZSCORE", look.keys.collected, fresh_id) is None, "not even at its end"
    assert 3_500_000 < look("PTTL", look.keys.reply(fresh_id)) <= 3_600_000
    with Client(url, pool=pool, auto_collect=False) as client:
        client.collected([reply]).result(LIMIT_S)
    assert look("ZSCORE", look.keys.collected, fresh_id) is not None


def test_a_reply_is_found_by_its_id(client: Client, url: str, pool: str) -> None:
    future = client.submit(chat("hello"))
    reply = future.result(LIMIT_S)
    with Client(url, pool=pool) as another:
        assert another.get(future.job_id).result(LIMIT_S) == reply


def test_an_unknown_id_is_an_error(client: Client) -> None:
    with pytest.raises(JobNotFound, match="no job nobody"):
        client.get("nobody").result(LIMIT_S)
    with pytest.raises(InvalidRequest, match="job_id"):
        client.get("not an id")


def test_a_run_can_be_attached_to(url: str, pool: str, fresh_id: str) -> None:
    with Client(url, pool=pool, run=fresh_id) as client:
        futures = [client.submit(scripted(f"t{i}", ms_per_token=20)) for i in range(10)]
        wait_until(lambda: futures[0].done(), "all are accepted")
    with Client(url, pool=pool) as restarted:
        texts = {answer_of(reply) for reply in restarted.attach(fresh_id)}
    assert texts == {f"t{i}" for i in range(10)}


def test_a_running_job_can_be_cancelled(
    client: Client, running: Future[Reply], nothing_left: Callable[[], None]
) -> None:
    assert running.cancel().result(LIMIT_S) == 1
    reply = running.result(LIMIT_S)
    assert (reply.status, reply.code, reply.error) == (JobStatus.CANCELLED, 499, "cancelled")
    with pytest.raises(Cancelled, match=running.job_id):
        reply.raise_for_status()
    nothing_left()


def test_a_run_can_be_cancelled(
    url: str, pool: str, fresh_id: str, look: Look, nothing_left: Callable[[], None]
) -> None:
    with Client(url, pool=pool, run=fresh_id) as client:
        futures = [client.submit(LONG) for _ in range(100)]  # the worker has 64 slots
        wait_until(lambda: look.reply(futures[99].job_id).get("status"), "the last job is accepted")
        assert client.cancel(run=fresh_id).result(LIMIT_S) == 100
        statuses = {future.result(LIMIT_S).status for future in futures}
    assert statuses == {JobStatus.CANCELLED}
    nothing_left()


def test_a_cancel_names_one_thing(client: Client) -> None:
    with pytest.raises(InvalidRequest):
        client.cancel()
    with pytest.raises(InvalidRequest):
        client.cancel(job_id="a", run="b")


def test_a_deadline_ends_a_generation_and_says_so(
    client: Client, nothing_left: Callable[[], None]
) -> None:
    begun_s = time.monotonic()
    reply = client.submit(LONG, timeout_s=0.5).result(LIMIT_S)
    assert time.monotonic() - begun_s >= 0.4
    assert (reply.status, reply.code) == (JobStatus.EXPIRED, 504)
    with pytest.raises(DeadlineExceeded, match="deadline"):
        reply.raise_for_status()
    nothing_left()


def test_a_fleet_shows_its_workers_and_what_waits(client: Client, running: Future[Reply]) -> None:
    wait_until(
        lambda: [
            worker
            for worker in client.fleet().result(LIMIT_S).workers.values()
            if worker["running_jobs"] == "1"
        ],
        "a heartbeat shows the running job",
    )
    fleet = client.fleet().result(LIMIT_S)
    assert fleet.gate == "open"
    (worker,) = fleet.workers.values()
    assert (worker["state"], worker["engine"], worker["slots"]) == ("serving", "scripted", "64")
    assert (fleet.depth["leases"], fleet.waiting_jobs) == (1, 0)


def test_a_closed_client_ends_the_waits_of_its_futures(
    url: str, pool: str, look: Look, client: Client
) -> None:
    closing = Client(url, pool=pool)
    future = closing.submit(LONG)
    closing.close()
    with pytest.raises(RolloutError, match="closed"):
        future.result(LIMIT_S)
    assert look.reply(future.job_id)["status"] in ("queued", "running")  # it was sent, and goes on
    client.cancel(job_id=future.job_id).result(LIMIT_S)
    assert client.get(future.job_id).result(LIMIT_S).status is JobStatus.CANCELLED


def test_what_is_no_json_is_refused_at_once(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="body: not JSON"):
        client.submit({"messages": object()})


@pytest.mark.parametrize("lane", ["resume", "urgent"])
def test_an_unknown_lane_is_refused_at_once(client: Client, lane: str) -> None:
    with pytest.raises(ConfigError, match="lane"):
        client.submit(chat("x"), lane=lane)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("lane", ["high", "normal", "low"])
def test_every_lane_is_served(client: Client, lane: str) -> None:
    reply = client.submit(chat("x"), lane=lane).result(LIMIT_S)  # pyright: ignore[reportArgumentType]
    assert answer_of(reply) == "x"


def test_a_cancel_overtakes_no_job_that_is_on_its_way(client: Client) -> None:
    futures = [client.submit(LONG) for _ in range(50)]
    orders = [future.cancel() for future in futures]
    assert sum(order.result(LIMIT_S) for order in orders) == 50
    assert {future.result(LIMIT_S).status for future in futures} == {JobStatus.CANCELLED}


def test_a_job_that_waits_for_room_can_be_cancelled(url: str, pool: str) -> None:
    fresh = f"{pool[:40]}-full"
    with Client(url, pool=fresh) as full:
        asyncio.run(open_pool(url, fresh))
        room = Look(url, fresh)
        room("HSET", room.keys.prefix, "backlog", 1)
        first = full.submit(LONG)
        wait_until(lambda: room.reply(first.job_id), "the first is in the queue")
        second = full.submit(LONG)
        wait_until(lambda: second.cancel().result(LIMIT_S), "it waits for room, and is dropped")
        with pytest.raises(Cancelled):
            second.result(LIMIT_S)
        assert first.cancel().result(LIMIT_S) == 1
        assert not room.reply(second.job_id)
        room.close()
