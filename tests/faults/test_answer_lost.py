"""The server executes a step and its answer is lost: the step is repeated, and takes effect once."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from producer_sdk import Client, Future, Reply
from tests.cutting_proxy import CuttingProxy
from tests.faults.conftest import Report
from tests.job_body import scripted
from tests.monitor import Monitor
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import open_pool
from tests.servers import both_servers
from tests.worker_process import StartWorker

LIMIT_S = 60
CUTS = 3


@pytest.fixture
def proxy(url: str, pool: str) -> Iterator[CuttingProxy]:
    asyncio.run(open_pool(url, pool))
    with CuttingProxy(url) as made:
        yield made


@both_servers
@pytest.mark.parametrize(
    ("step", "jobs", "ms_per_token"),
    [("enqueue", 300, 2), ("take", 300, 2), ("finish", 300, 2), ("renew", 128, 150)],
)
def test_a_lost_answer_makes_no_second_effect(
    proxy: CuttingProxy,
    url: str,
    pool: str,
    start_worker: StartWorker,
    look: Look,
    nothing_left: Callable[[], None],
    report: Report,
    step: str,
    jobs: int,
    ms_per_token: float,
) -> None:
    lease_s = 3 if step == "renew" else 15  # short enough to be renewed meanwhile
    start_worker(proxy.url, pool, slots=32, lease_s=lease_s).wait_ready()
    name = f"rolloutq_{step}"
    with Monitor(url) as monitor, Client(proxy.url, pool=pool) as client:
        proxy.cut(name, CUTS)
        begun_s = time.monotonic()
        futures: list[Future[Reply]] = []
        for i in range(jobs):
            futures.append(client.submit(scripted(f"job {i}", ms_per_token=ms_per_token)))
            if i % 64 == 63:
                futures[-1].result(LIMIT_S)
        replies = [future.result(LIMIT_S) for future in futures]
        wait_until(lambda: proxy.happened[name] == CUTS, f"{CUTS} answers of {step} are lost")
        nothing_left()
        written = monitor.replies_written(pool)
    wrong = [i for i, reply in enumerate(replies) if reply.states[0].text != f"job {i}"]
    double = sum(count > 1 for count in written.values())
    report(
        f"the answer to {step} is lost",
        tried=CUTS,
        happened=proxy.happened[name],
        lost=len(wrong),
        double=double,
        recovery_s=time.monotonic() - begun_s,
    )
    assert (wrong, double) == ([], 0)
    assert len(written) == jobs
    assert {reply.attempts for reply in replies} == {1}  # repeated, not begun again


@both_servers
@pytest.mark.parametrize("step", ["fail", "release", "cancel"])
def test_a_lost_answer_counts_nothing_twice(
    proxy: CuttingProxy,
    pool: str,
    start_worker: StartWorker,
    look: Look,
    nothing_left: Callable[[], None],
    step: str,
) -> None:
    proxy.cut(f"rolloutq_{step}", 1)
    worker = start_worker(proxy.url, pool, lease_s=6, grace_s=0, fail_limit=2, backoff_s=0)
    worker.wait_ready()
    with Client(proxy.url, pool=pool) as client:
        bodies = {
            "fail": scripted("abc", fail="error", at_token=1),
            "release": scripted("x" * 500, ms_per_token=50),
            "cancel": scripted("x" * 500, ms_per_token=50),
        }
        future = client.submit(bodies[step])
        if step == "fail":
            assert future.result(LIMIT_S).error == "engine_failed"
            assert look.reply(future.job_id)["fails"] == "2"
            assert look("XLEN", look.keys.dead) == 1
        else:
            wait_until(lambda: look.reply(future.job_id).get("status") == "running", "it runs")
        if step == "release":
            worker.terminate()
            assert worker.wait() == 0
            assert look.reply(future.job_id)["handbacks"] == "1"
        if step != "fail":
            assert client.cancel(job_id=future.job_id).result(LIMIT_S) == 1
            assert future.result(LIMIT_S).error == "cancelled"
    assert proxy.happened[f"rolloutq_{step}"] == 1
    nothing_left()


def test_a_signal_in_the_middle_of_a_take_hands_its_jobs_back(
    proxy: CuttingProxy, pool: str, start_worker: StartWorker, look: Look, client: Client
) -> None:
    worker = start_worker(proxy.url, pool, lease_s=30, grace_s=0)
    worker.wait_ready()
    future = client.submit(scripted("x" * 500, ms_per_token=50))
    proxy.hold("rolloutq_take", 0.4)
    assert proxy.held.wait(LIMIT_S)
    wait_until(lambda: look.reply(future.job_id).get("status") == "running", "it was begun")
    worker.terminate()
    assert worker.wait() == 0
    kept = look.reply(future.job_id)
    assert (kept["status"], kept["lane"], kept.get("handbacks")) == ("queued", "resume", "1")
    client.cancel(job_id=future.job_id).result(LIMIT_S)
