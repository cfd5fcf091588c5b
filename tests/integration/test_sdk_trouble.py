"""The client in trouble: no server, no worker, a full pool, lost data, wrong settings. No wait is without end."""

import asyncio
import os
import signal
import time

import pytest

from producer_sdk import (
    Client,
    ConfigError,
    NoLiveWorker,
    QueueFull,
    RolloutError,
    ServerUnavailable,
)
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve, open_pool
from tests.servers import Server, StartServer, both_servers
from tests.worker_process import StartWorker

LIMIT_S = 60
NOWHERE = "redis://user:s3cret@127.0.0.1:1/0"


def test_a_wrong_url_is_told_within_ten_seconds() -> None:
    begun_s = time.monotonic()
    with Client(NOWHERE) as client:
        futures = [client.submit(chat("x")), client.get("y")]
        errors = [future.exception(30) for future in futures]
        assert time.monotonic() - begun_s < 12
    for error in errors:
        assert isinstance(error, ServerUnavailable)
        assert "127.0.0.1:1" in error.message
        assert "is the URL right" in error.message
        assert "s3cret" not in error.message
        assert error.retry_after_s


@pytest.mark.parametrize("bad", ["localhost:6379", "http://localhost", "redis//x", ""])
def test_what_is_no_url_is_refused_by_the_constructor(bad: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Client(bad)
    assert refused.value.param == "url"
    assert "redis://host:6379/0" in refused.value.message


@pytest.mark.parametrize("bad", ["", "Default", "a_b", "a b", "x" * 65, "ä"])
def test_a_wrong_pool_is_refused_by_the_constructor(bad: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Client("redis://localhost:6379/0", pool=bad)
    assert refused.value.param == "pool"
    assert "1 to 64 of a-z, 0-9 and '-'" in refused.value.message


def test_a_setting_of_the_wrong_type_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUTQ_NO_WORKER_S", "soon")
    with pytest.raises(ConfigError, match="no_worker_s"):
        Client("redis://localhost:6379/0")
    with pytest.raises(ConfigError, match="no_worker_s"):
        Client("redis://localhost:6379/0", no_worker_s="soon")  # pyright: ignore[reportArgumentType]
    monkeypatch.delenv("ROLLOUTQ_NO_WORKER_S")
    with pytest.raises(ConfigError, match=r"on_full: .*ROLLOUTQ_ON_FULL"):
        Client("redis://localhost:6379/0", on_full="drop")  # pyright: ignore[reportArgumentType]


def test_settings_come_from_arguments_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUTQ_URL", "redis://one:1/0")
    monkeypatch.setenv("ROLLOUTQ_POOL", "one")
    monkeypatch.setenv("ROLLOUTQ_RUN", "r1")
    settings = Client(pool="two").settings
    assert (settings.url, settings.pool, settings.run) == ("redis://one:1/0", "two", "r1")


def test_a_pool_without_a_worker_says_so_and_keeps_its_jobs(
    url: str, pool: str, serve: Serve
) -> None:
    with Client(url, pool=pool, no_worker_s=1) as client:
        future = client.submit(chat("hello"))
        begun_s = time.monotonic()
        with pytest.raises(NoLiveWorker) as alone:
            future.result(LIMIT_S)
        assert time.monotonic() - begun_s < 20
        assert f"no live worker for pool {pool}" in alone.value.message
        assert f"rolloutq worker --pool {pool}" in alone.value.message
        serve()
        assert client.get(future.job_id).result(LIMIT_S).states[0].text == "hello"


def test_a_full_pool_is_waited_for(
    url: str, pool: str, look: Look, serve: Serve, client: Client
) -> None:
    look("HSET", look.keys.prefix, "backlog", 2)
    futures = [client.submit(chat(f"t{i}")) for i in range(6)]
    wait_until(lambda: look.length("normal") == 2, "the pool is full")
    serve()
    assert [future.result(LIMIT_S).states[0].text for future in futures] == [
        f"t{i}" for i in range(6)
    ]


@pytest.mark.usefixtures("broker")
def test_a_full_pool_without_a_worker_says_so(url: str, pool: str, look: Look) -> None:
    look("HSET", look.keys.prefix, "backlog", 0)
    with (
        Client(url, pool=pool, no_worker_s=0.5) as client,
        pytest.raises(NoLiveWorker, match=pool),
    ):
        client.submit(chat("x")).result(LIMIT_S)


@pytest.mark.usefixtures("broker")
def test_closing_ends_the_wait_for_a_full_pool(url: str, pool: str, look: Look) -> None:
    look("HSET", look.keys.prefix, "backlog", 1)
    client = Client(url, pool=pool)
    futures = [client.submit(chat("x")) for _ in range(3)]
    wait_until(lambda: look.length("normal") == 1, "the pool is full")
    client.close()
    errors = [future.exception(LIMIT_S) for future in futures]
    assert all(isinstance(error, RolloutError) for error in errors)
    assert not any(isinstance(error, QueueFull) and not error.retry_after_s for error in errors)


@pytest.mark.usefixtures("broker")
def test_a_full_pool_is_told_at_once_where_it_was_asked_for(
    url: str, pool: str, look: Look, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUTQ_ON_FULL", "raise")
    look("HSET", look.keys.prefix, "backlog", 1)
    with Client(url, pool=pool) as client:
        first = client.submit(chat("first"))
        wait_until(lambda: look.length("normal") == 1, "the pool is full")
        with pytest.raises(QueueFull, match="backlog") as refused:
            client.submit(chat("second")).result(LIMIT_S)
        assert refused.value.retry_after_s
        again = client.submit(
            chat("first"), job_id=first.job_id
        )  # it is known, so it needs no room
        serve()
        assert first.result(LIMIT_S).states[0].text == "first"
        assert again.result(LIMIT_S).body == first.result().body
        assert client.submit(chat("third")).result(LIMIT_S).states[0].text == "third"


@pytest.mark.usefixtures("broker")
def test_a_lost_job_is_sent_again_patiently_even_where_a_full_pool_shall_raise(
    url: str, pool: str, look: Look, serve: Serve, client: Client
) -> None:
    look("HSET", look.keys.prefix, "backlog", 1)
    with Client(url, pool=pool, on_full="raise") as hasty:
        lost = hasty.submit(chat("lost"), job_id="lost")
        wait_until(lambda: look.reply("lost"), "it is accepted")
        look("DEL", look.keys.reply("lost"))
        look("XTRIM", look.keys.jobs("normal"), "MAXLEN", 0)
        other = client.submit(chat("other"))
        wait_until(lambda: look.length("normal") == 1, "the pool is full")
        calls = int(look("HGET", look.keys.prefix, "enqueues"))
        wait_until(
            lambda: int(look("HGET", look.keys.prefix, "enqueues")) > calls + 1,
            "it was sent again, refused, and sent again",
        )
        assert not lost.done()
        serve()
        texts = [future.result(LIMIT_S).states[0].text for future in (lost, other)]
        assert texts == ["lost", "other"]


@both_servers
def test_jobs_survive_a_server_that_forgets_everything(
    fresh_server: StartServer, start_worker: StartWorker, pool: str
) -> None:
    server = fresh_server()
    asyncio.run(open_pool(server.url, pool))
    worker = start_worker(server.url, pool, lease_s=1.2)
    worker.wait_ready()
    look = Look(server.url, pool)
    with Client(server.url, pool=pool) as client:
        futures = [client.submit(scripted(f"t{i}", ms_per_token=300)) for i in range(20)]
        wait_until(lambda: look.reply(futures[19].job_id), "all are accepted")
        look("FLUSHALL")
        assert not look.reply(futures[19].job_id)
        texts = [future.result(LIMIT_S).raise_for_status().states[0].text for future in futures]
    assert texts == [f"t{i}" for i in range(20)]
    assert worker.running
    wait_until(lambda: not look.left(), "nothing is left")
    look.close()


def test_jobs_survive_a_server_that_restarts_empty(
    fresh_server: StartServer, start_worker: StartWorker, pool: str
) -> None:
    server = fresh_server()
    asyncio.run(open_pool(server.url, pool))
    worker = start_worker(server.url, pool, lease_s=1.2)
    worker.wait_ready()
    with Client(server.url, pool=pool) as client:
        assert client.submit(chat("before")).result(LIMIT_S).states[0].text == "before"
        slow = client.submit(scripted("slow", ms_per_token=300))
        wait_until(lambda: client.fleet().result(LIMIT_S).depth["leases"] == 1, "it runs")
        server.kill()
        server.start()
        assert slow.result(LIMIT_S).states[0].text == "slow"
        assert client.submit(chat("after")).result(LIMIT_S).states[0].text == "after"
    assert worker.running


@pytest.fixture
def served(fresh_server: StartServer, start_worker: StartWorker, pool: str) -> Server:
    """A server of its own, with a worker."""
    server = fresh_server()
    asyncio.run(open_pool(server.url, pool))
    start_worker(server.url, pool).wait_ready()
    return server


def test_a_server_that_dies_does_not_hold_a_closing_client(served: Server, pool: str) -> None:
    client = Client(served.url, pool=pool)
    client.submit(chat("collected")).result(LIMIT_S)
    running = client.submit(scripted("x" * 1000, ms_per_token=100))
    wait_until(lambda: client.fleet().result(LIMIT_S).depth["leases"] == 1, "it runs")
    served.kill()
    begun_s = time.monotonic()
    client.close()
    assert time.monotonic() - begun_s < 8
    assert isinstance(running.exception(1), RolloutError)


def test_a_stream_ends_with_its_client_even_where_a_job_waits_for_a_dead_server(
    served: Server, pool: str
) -> None:
    client = Client(served.url, pool=pool)
    segments = iter(client.stream(scripted("x" * 1000, ms_per_token=100)))
    next(segments)
    served.kill()
    unsent = client.submit(chat("x"))
    client.close()
    closed_s = time.monotonic()
    with pytest.raises(RolloutError):
        list(segments)
    assert isinstance(unsent.exception(LIMIT_S), RolloutError)
    assert time.monotonic() - closed_s < 10


def test_a_client_that_closes_does_not_wait_long_for_replicas(served: Server, pool: str) -> None:
    client = Client(served.url, pool=pool, wait_replicas=1)
    look = Look(served.url, pool)
    uncopied = client.submit(chat("x"))
    wait_until(lambda: look.reply(uncopied.job_id), "the server has it, and no replica")
    look.close()
    client.close()
    assert isinstance(uncopied.exception(5), RolloutError)


async def test_an_iteration_that_was_given_up_troubles_nobody(
    client: Client, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    serve()
    future = client.submit(scripted("slow", ms_per_token=100))

    async def give_up() -> None:
        async for _ in client.as_completed([future], timeout=0.05):
            pass

    def in_a_loop_of_its_own() -> None:
        with pytest.raises(TimeoutError):
            asyncio.run(give_up())

    await asyncio.to_thread(in_a_loop_of_its_own)
    assert (await future).states[0].text == "slow"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_callback_is_called_once_with_the_future(client: Client, serve: Serve) -> None:
    serve()
    called: list[object] = []
    future = client.submit(chat("x"))
    future.add_done_callback(called.append)
    future.result(LIMIT_S)
    future.add_done_callback(called.append)
    wait_until(lambda: len(called) == 2, "both were called")
    assert called == [future, future]


def test_a_question_that_is_cut_off_by_the_clients_end_is_no_lost_server(
    fresh_server: StartServer, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = fresh_server()
    asyncio.run(open_pool(server.url, pool))
    client = Client(server.url, pool=pool)
    client.fleet().result(LIMIT_S)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        asked = client.fleet()
        client.close()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    with pytest.raises(RolloutError, match="closed"):
        asked.result(LIMIT_S)
    assert "no Redis" not in caplog.text
