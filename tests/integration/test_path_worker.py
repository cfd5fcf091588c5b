"""The worker as a process: how it begins, how it ends, and what it says."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from producer_sdk import Client, JobStatus
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve, open_pool
from tests.servers import StartServer, both_servers
from tests.worker_process import StartWorker

LIMIT_S = 60
ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cret-9f2"
ALL_RIGHTS = ("~*", "&*", "+@all")


def run_worker(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A worker that is expected to end by itself."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ROLLOUTQ_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "worker", "--engine", "scripted", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


def running_jobs(look: Look, count: int) -> None:
    wait_until(lambda: look("ZCARD", look.keys.leases) == count, f"{count} jobs run")


def test_sigterm_lets_short_jobs_end(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    worker = serve(slots=4)
    futures = [client.submit(scripted(f"t{i}", ms_per_token=100)) for i in range(4)]
    running_jobs(look, 4)
    worker.terminate()
    assert [future.result(LIMIT_S).states[0].text for future in futures] == ["t0", "t1", "t2", "t3"]
    assert worker.wait() == 0
    assert {look.reply(future.job_id)["attempts"] for future in futures} == {"1"}
    nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_hands_long_jobs_back(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None], number: int
) -> None:
    first = serve(slots=4, grace_s=0.2)
    futures = [client.submit(scripted("abcdef", ms_per_token=250)) for _ in range(4)]
    running_jobs(look, 4)
    first.signal(number)
    begun_s = time.monotonic()
    assert first.wait() == 0
    assert time.monotonic() - begun_s < 10
    for future in futures:
        kept = look.reply(future.job_id)
        assert (kept["status"], kept["lane"], kept["handbacks"]) == ("queued", "resume", "1")
        assert "crashes" not in kept
    assert look("ZCARD", look.keys.leases) == 0
    serve()
    assert {future.result(LIMIT_S).states[0].text for future in futures} == {"abcdef"}
    nothing_left()


def test_an_idle_worker_leaves_at_once_and_is_not_shown_any_more(
    client: Client, serve: Serve
) -> None:
    worker = serve()
    assert list(client.fleet().result(LIMIT_S).workers) == [worker.worker_id]
    worker.terminate()
    assert worker.wait(10) == 0
    assert client.fleet().result(LIMIT_S).workers == {}


def test_a_worker_opens_a_fresh_pool_by_itself(
    url: str, pool: str, start_worker: StartWorker, client: Client
) -> None:
    start_worker(url, pool)
    assert client.submit(chat("hello")).result(LIMIT_S).states[0].text == "hello"
    assert client.fleet().result(LIMIT_S).gate == "open"


def test_a_worker_takes_no_more_jobs_than_its_slots(
    client: Client, serve: Serve, look: Look
) -> None:
    serve(slots=3)
    futures = [client.submit(scripted("abcd", ms_per_token=40)) for _ in range(12)]
    most = 0
    while not all(future.done() for future in futures):
        most = max(most, look("ZCARD", look.keys.leases))
    assert most == 3
    assert {future.result().status for future in futures} == {JobStatus.COMPLETED}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--slots", "abc"], "--slots"),
        (["--slots", "0"], "--slots"),
        (["--lease-s", "0.1"], "--lease-s"),
        (["--pool", "A_B"], "--pool"),
        (["--url", "http://x"], "--url"),
        (["--engine", "warp"], "--engine"),
        (["--worker-id", "a/b"], "--worker-id"),
        (["--engine", "torch", "--model", "/no/such/model"], "--model"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_flag_ends_a_worker_with_2_and_is_named(words: list[str], named: str) -> None:
    done = run_worker(*words)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_wrong_variable_of_the_environment_is_named_by_its_flag() -> None:
    done = run_worker(ROLLOUTQ_BACKOFF_S="-1")
    assert done.returncode == 2
    assert "--backoff-s" in done.stderr


def test_a_worker_without_a_server_ends_with_3_and_one_line() -> None:
    begun_s = time.monotonic()
    done = run_worker("--url", f"redis://u:{SECRET}@127.0.0.1:1/0", "--log-level", "debug")
    assert time.monotonic() - begun_s < 30
    assert done.returncode == 3
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("rolloutq worker:")]
    assert last == done.stderr.splitlines()[-1]
    assert "no Redis at 127.0.0.1:1" in last
    assert "is the URL right" in last
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr + done.stdout


@both_servers
def test_a_wrong_password_ends_a_worker_with_3_and_is_not_shown(fresh_server: StartServer) -> None:
    server = fresh_server("--user", "w", "on", ">another", *ALL_RIGHTS)
    url = server.url.replace("redis://", f"redis://w:{SECRET}@")
    done = run_worker("--url", url, "--log-level", "debug")
    assert done.returncode == 3
    assert "refuses this user" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr + done.stdout


async def test_the_password_of_the_url_is_shown_nowhere(
    fresh_server: StartServer, start_worker: StartWorker, pool: str
) -> None:
    server = fresh_server("--user", "w", "on", f">{SECRET}", *ALL_RIGHTS)
    url = server.url.replace("redis://", f"redis://w:{SECRET}@")
    await open_pool(url, pool)
    worker = start_worker(url, pool, log_level="debug", lease_s=1.2, backoff_s=0)
    worker.wait_ready()
    with Client(url, pool=pool) as client:
        await client.submit(chat("x"))
        await client.submit(scripted(fail="error"))
        shown = str(client.fleet().result(LIMIT_S))
    server.kill()
    wait_until(lambda: "no Redis at" in worker.log_tail(), "the worker notices")
    server.start()
    look = Look(url, pool)
    wait_until(lambda: look("EXISTS", look.keys.worker(worker.worker_id)), "it is back")
    keys = [key for key in look("KEYS", "*") if look("TYPE", key) == b"hash"]
    shown += str([look("HGETALL", key) for key in keys])
    look.close()
    worker.terminate()
    assert worker.wait() == 0
    assert SECRET not in worker.log.read_text() + shown
