"""Promise 8: a dead fleet is visible, and a living one is waited for."""

import time

import pytest

from producer_sdk import Client, JobStatus, NoLiveWorker
from producer_sdk.fleet import SEEN_MS
from tests.job_body import chat, scripted
from tests.pool_look import Look
from tests.queue_fixtures import Serve

LIMIT_S = 60


def test_promise_8_a_dead_fleet_is_visible(url: str, pool: str, serve: Serve, look: Look) -> None:
    worker = serve()
    with Client(url, pool=pool, no_worker_s=1) as client:
        assert client.submit(chat("x")).result(LIMIT_S).status is JobStatus.COMPLETED
        worker.kill()
        long_ago_ms = look.now_ms() - SEEN_MS - 1
        look("ZADD", look.keys.workers, "XX", long_ago_ms, worker.worker_id)
        begun_s = time.monotonic()
        waiting = client.submit(chat("y"))
        with pytest.raises(NoLiveWorker, match=f"no live worker for pool {pool}"):
            waiting.result(LIMIT_S)
        assert time.monotonic() - begun_s < 20
        fleet = client.fleet().result(LIMIT_S)
        assert (fleet.workers, fleet.waiting_jobs) == ({}, 1)


def test_promise_8_a_living_fleet_is_waited_for(url: str, pool: str, serve: Serve) -> None:
    serve(slots=1)
    with Client(url, pool=pool, no_worker_s=0.2) as client:
        first = client.submit(scripted("abcdefghij", ms_per_token=350))
        second = client.submit(chat("x"))
        assert second.result(LIMIT_S).status is JobStatus.COMPLETED
        assert first.result().status is JobStatus.COMPLETED
