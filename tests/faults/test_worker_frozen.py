"""A worker freezes beyond its lease and wakes up: what it then writes is refused, and each job has one reply."""

import signal
import time
from collections.abc import Callable

from producer_sdk import Client
from tests.faults.conftest import Report
from tests.job_body import chat, scripted
from tests.monitor import Monitor
from tests.pool_look import Look, expire_lease, wait_until
from tests.queue_fixtures import Serve
from tests.servers import both_servers

LIMIT_S = 60
JOBS = 16
WRITES = ("renew", "finish")
"""Steps by which an attempt writes: a checkpoint with its renewal, a reply."""


@both_servers
def test_what_a_frozen_worker_writes_late_is_refused(
    client: Client,
    url: str,
    pool: str,
    serve: Serve,
    look: Look,
    nothing_left: Callable[[], None],
    report: Report,
) -> None:
    frozen = serve(slots=JOBS, lease_s=60)  # long, so that it tries to write before it hears
    futures = [client.submit(scripted(f"job {i}", ms_per_token=100)) for i in range(JOBS)]
    ids = [future.job_id for future in futures]
    wait_until(lambda: look("ZCARD", look.keys.leases) == JOBS, "it holds the leases")
    frozen.signal(signal.SIGSTOP)
    frozen_s = time.monotonic()
    fences = [look.reply(job_id)["fence"] for job_id in ids]
    other = serve(slots=JOBS, lease_s=1.2)
    with Monitor(url, kept_bytes=100_000) as monitor:
        expire_lease(look, *ids)
        replies = [future.result(LIMIT_S) for future in futures]
        recovery_s = time.monotonic() - frozen_s
        frozen.signal(signal.SIGCONT)
        wait_until(
            lambda: frozen.log_tail().count("of attempt 1:") == JOBS,
            "all that it held has ended there",
        )
        nothing_left()
        written = monitor.replies_written(pool)
        refused = [
            job_id
            for job_id, fence in zip(ids, fences, strict=True)
            if any(monitor.called(step, job_id, fence) for step in WRITES)
        ]
    report(
        "SIGSTOP beyond the lease, then SIGCONT",
        tried=JOBS,
        happened=len(refused),
        lost=0,
        double=sum(count > 1 for count in written.values()),
        recovery_s=recovery_s,
    )
    assert len(refused) == JOBS
    assert written == dict.fromkeys(ids, 1)
    assert [reply.states[0].text for reply in replies] == [f"job {i}" for i in range(JOBS)]
    assert {(reply.worker, reply.attempts) for reply in replies} == {(other.worker_id, 2)}
    assert [client.get(job_id).result(LIMIT_S) for job_id in ids] == replies


def test_a_frozen_worker_goes_on_to_serve(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    """It wakes with free slots, and may take once more what it still works on."""
    frozen = serve(slots=8, lease_s=1.2)
    other = serve(slots=8, lease_s=1.2)
    futures = [client.submit(scripted(f"job {i}", ms_per_token=400)) for i in range(8)]
    wait_until(lambda: look("ZCARD", look.keys.leases) == 8, "all run")
    frozen.signal(signal.SIGSTOP)
    other.signal(signal.SIGSTOP)
    late_ms = look.now_ms() + 2000
    wait_until(lambda: look.now_ms() > late_ms, "every lease has run out")
    frozen.signal(signal.SIGCONT)
    other.signal(signal.SIGCONT)
    texts = [future.result(LIMIT_S).states[0].text for future in futures]
    assert texts == [f"job {i}" for i in range(8)]
    nothing_left()
    other.kill()
    assert client.submit(chat("after")).result(LIMIT_S).worker == frozen.worker_id
    nothing_left()
