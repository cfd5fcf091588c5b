"""A worker dies while it holds leases: every job is answered, none twice, nothing is left."""

import time
from collections import Counter
from collections.abc import Callable

import pytest

from producer_sdk import Client, Future, JobStatus, Reply
from tests.faults.conftest import Report
from tests.job_body import scripted
from tests.monitor import Monitor
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import both_servers

JOBS = 5_000
AT_LEAST_HELD = 32
LEASE_S = 2.5
LIMIT_S = 100

HOLDERS = """
local held = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1] .. ':leases', 0, -1)) do
  held[#held + 1] = redis.call('HGET', KEYS[1] .. ':reply:' .. id, 'worker')
end
return held
"""


def leases_by_worker(look: Look) -> Counter[str]:
    """What each worker holds, by the server's own data at one moment."""
    held: list[bytes] = look("EVAL", HOLDERS, 1, look.keys.prefix)
    return Counter(worker.decode() for worker in held)


def judge(
    futures: dict[str, Future[Reply]], written: dict[str, int], told: Callable[[Reply], str]
) -> tuple[int, int]:
    """Jobs without their right reply, and jobs with more than one."""
    lost = [
        text
        for text, future in futures.items()
        if not future.done()
        or future.result().status is not JobStatus.COMPLETED
        or told(future.result()) != text
    ]
    ids = {future.job_id for future in futures.values()}
    assert set(written) == ids
    return len(lost), sum(count > 1 for count in written.values())


def text_of(reply: Reply) -> str:
    assert reply.response["choices"][0]["message"]["content"] == reply.states[0].text
    return reply.states[0].text


@both_servers
@pytest.mark.timeout(240)
def test_5000_jobs_survive_a_worker_killed_with_32_leases(
    client: Client,
    url: str,
    pool: str,
    serve: Serve,
    look: Look,
    nothing_left: Callable[[], None],
    report: Report,
) -> None:
    victim, survivor = (serve(slots=128, lease_s=LEASE_S) for _ in range(2))
    with Monitor(url) as monitor:
        futures = {
            f"answer {i}": client.submit(scripted(f"answer {i}", ms_per_token=30))
            for i in range(JOBS)
        }
        wait_until(
            lambda: monitor.statuses["completed"] >= JOBS // 5, "a fifth is done", timeout_s=LIMIT_S
        )
        wait_until(
            lambda: leases_by_worker(look)[victim.worker_id] >= 2 * AT_LEAST_HELD, "it holds many"
        )
        victim.kill()
        killed_s = time.monotonic()
        wait_until(lambda: not look.is_connected(victim.worker_id), "its last words are executed")
        held = leases_by_worker(look)[victim.worker_id]
        done_before = monitor.statuses["completed"]
        assert held >= AT_LEAST_HELD
        assert done_before < JOBS - held
        wait_until(
            lambda: not leases_by_worker(look)[victim.worker_id],
            "nobody waits for the dead",
            timeout_s=LIMIT_S,
        )
        recovery_s = time.monotonic() - killed_s
        for _ in client.as_completed(futures.values(), timeout=LIMIT_S):
            pass
        nothing_left()
        lost, double = judge(futures, monitor.replies_written(pool), text_of)
    report(
        f"SIGKILL with {held} leases of {JOBS} jobs",
        tried=1,
        happened=1,
        lost=lost,
        double=double,
        recovery_s=recovery_s,
    )
    assert (lost, double) == (0, 0)
    attempts = Counter(future.result().attempts for future in futures.values())
    assert attempts[2] >= held  # its jobs were begun again, and by nobody else than the survivor
    assert set(attempts) == {1, 2}
    again = [f.result().worker for f in futures.values() if f.result().attempts == 2]
    assert set(again) == {survivor.worker_id}
    assert recovery_s <= LEASE_S + 5


def test_a_job_of_a_killed_worker_goes_on_though_the_queue_is_idle(
    client: Client,
    url: str,
    pool: str,
    serve: Serve,
    look: Look,
    nothing_left: Callable[[], None],
    report: Report,
) -> None:
    victim = serve(slots=4, lease_s=1.5)
    futures = {f"job {i}": client.submit(scripted(f"job {i}", ms_per_token=300)) for i in range(4)}
    wait_until(lambda: leases_by_worker(look)[victim.worker_id] == 4, "it holds four leases")
    survivor = serve(slots=4, lease_s=1.5)
    with Monitor(url) as monitor:
        victim.kill()
        killed_s = time.monotonic()
        wait_until(
            lambda: leases_by_worker(look) == {survivor.worker_id: 4}, "the other has them all"
        )
        recovery_s = time.monotonic() - killed_s
        replies = [future.result(LIMIT_S) for future in futures.values()]
        nothing_left()
        lost, double = judge(futures, monitor.replies_written(pool), text_of)
    report(
        "SIGKILL with 4 leases, idle queue",
        tried=1,
        happened=1,
        lost=lost,
        double=double,
        recovery_s=recovery_s,
    )
    assert (lost, double) == (0, 0)
    assert {reply.attempts for reply in replies} == {2}
    assert recovery_s <= 1.5 + 5


def test_a_job_that_kills_its_workers_becomes_a_dead_letter_with_a_reply(
    client: Client,
    serve: Serve,
    look: Look,
    nothing_left: Callable[[], None],
    report: Report,
) -> None:
    begun_s = time.monotonic()
    workers = [serve(slots=1, lease_s=0.9) for _ in range(4)]
    poison = client.submit(scripted("poison", fail="crash", at_token=3))
    good = [client.submit(scripted(f"good {i}", ms_per_token=20)) for i in range(20)]
    reply = poison.result(LIMIT_S)
    texts = [future.result(LIMIT_S).states[0].text for future in good]
    died = sum(not worker.running for worker in workers)
    report(
        "a poison job among 20",
        tried=1,
        happened=died,
        lost=20 - len(texts),
        double=0,
        recovery_s=time.monotonic() - begun_s,
    )
    assert (reply.status, reply.error, reply.attempts) == (JobStatus.FAILED, "worker_lost", 3)
    assert "lost with its worker 3 times" in str(reply.exception())
    assert texts == [f"good {i}" for i in range(20)]
    assert died == 3
    ((_, letter),) = look("XRANGE", look.keys.dead, "-", "+")
    assert (letter[b"job"], letter[b"reason"]) == (poison.job_id.encode(), b"crashes")
    nothing_left()
