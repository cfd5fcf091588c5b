"""`rolloutq worker --gpus …`: a process for each group of GPUs, as real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from producer_sdk import Client
from tests.command import ROOT, CommandProcess
from tests.job_body import chat, scripted

pytestmark = pytest.mark.timeout(180)
IDS = {"box-0", "box-1"}
LONG = {**scripted("x" * 2000, ms_per_token=20), "max_tokens": 2000}
"""Forty seconds of work, which a worker can tell beforehand: within a grace of minutes it lets the job end."""


@pytest.fixture
def redis(url: str) -> Iterator[Redis]:
    with Redis.from_url(url, protocol=2, decode_responses=True) as redis:  # pyright: ignore[reportUnknownMemberType]
        yield redis


def launched(folder: Path, url: str, pool: str, *words: str) -> CommandProcess:
    told = ("--url", url, "--pool", pool, "--engine", "scripted", "--worker-id", "box")
    return CommandProcess(folder, "worker", *told, *words)


def workers(launcher: CommandProcess) -> dict[str, psutil.Process]:
    """The worker processes, by id."""
    found: dict[str, psutil.Process] = {}
    for child in launcher.children():
        words = child.cmdline()
        if words:
            found[words[-1]] = child
    return found


def states(redis: Redis, pool: str, *ids: str) -> list[object]:
    return [redis.hget(f"rollout:{{{pool}}}:worker:{name}", "state") for name in ids]


def test_each_group_has_a_worker_that_sees_its_gpus_alone(
    tmp_path: Path, url: str, pool: str, redis: Redis
) -> None:
    with launched(tmp_path, url, pool, "--gpus", "0-3", "--tp", "2") as launcher:
        launcher.wait_for("ready: 2 workers")
        assert states(redis, pool, *IDS) == ["serving", "serving"]
        seen = {
            name: child.environ()["CUDA_VISIBLE_DEVICES"]
            for name, child in workers(launcher).items()
        }
        assert seen == {"box-0": "0,1", "box-1": "2,3"}
        with Client(url, pool=pool) as client:
            assert client.submit(chat("hi")).result(timeout=30).status == "completed"


def test_a_probe_asks_for_all_workers_of_the_launcher(tmp_path: Path, url: str, pool: str) -> None:
    def probe(gpus: str) -> tuple[int, str]:
        words = ("--probe", "health", "--url", url, "--pool", pool, "--gpus", gpus)
        done = subprocess.run(
            [sys.executable, "-m", "worker", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout.strip()

    with launched(tmp_path, url, pool, "--gpus", "0-1") as launcher:
        launcher.wait_for("ready: 2 workers")
        assert probe("0-1") == (0, "2 of 2 workers: health: ok")
        assert probe("0-2") == (1, "2 of 3 workers: health: ok")


def test_a_worker_that_dies_is_replaced_and_the_other_goes_on(
    tmp_path: Path, url: str, pool: str, redis: Redis
) -> None:
    with launched(tmp_path, url, pool, "--gpus", "0-1") as launcher:
        launcher.wait_for("ready: 2 workers")
        before = workers(launcher)
        os.kill(before["box-0"].pid, signal.SIGKILL)
        launcher.wait_for("worker box-0 was ended by SIGKILL; another starts in 0.5 s")
        launcher.wait_until(
            lambda: states(redis, pool, "box-0.2") == ["serving"], "a second worker on GPU 0"
        )
        after = workers(launcher)
        assert set(after) == {"box-0.2", "box-1"}
        assert after["box-1"].pid == before["box-1"].pid
        assert after["box-0.2"].environ()["CUDA_VISIBLE_DEVICES"] == "0"


def test_sigterm_lets_all_drain(tmp_path: Path, url: str, pool: str, redis: Redis) -> None:
    body = {**scripted("x" * 99, ms_per_token=30), "max_tokens": 99}
    told = ("--grace-s", "60", "--checkpoint-tokens", "1", "--checkpoint-s", "0.1")
    with launched(tmp_path, url, pool, "--gpus", "0-1", *told) as launcher:
        launcher.wait_for("ready: 2 workers")
        with Client(url, pool=pool) as client:
            futures = [client.submit(body) for _ in range(4)]
            kept = [f"rollout:{{{pool}}}:progress:{one.job_id}" for one in futures]
            launcher.wait_until(lambda: all(map(redis.exists, kept)), "tokens of every job")
            launcher.signal(signal.SIGTERM)
            assert [one.result(timeout=60).status for one in futures] == ["completed"] * 4
        assert launcher.wait() == 0
        assert launcher.left() == []
    assert states(redis, pool, *IDS) == [None, None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_hands_everything_back_at_once(
    tmp_path: Path, url: str, pool: str, redis: Redis, number: int
) -> None:
    with launched(tmp_path, url, pool, "--gpus", "0-1", "--grace-s", "600") as launcher:
        launcher.wait_for("ready: 2 workers")
        with Client(url, pool=pool) as client:
            job = client.submit(LONG)
            key = f"rollout:{{{pool}}}:reply:{job.job_id}"
            launcher.wait_until(lambda: redis.hget(key, "status") == "running", "the job under way")
            launcher.signal(number)
            launcher.wait_until(lambda: None in states(redis, pool, *IDS), "the idle worker gone")
            assert redis.hget(key, "status") == "running"
            launcher.signal(number)
            assert launcher.wait() == 0
            assert redis.hget(key, "status") == "queued"
            assert redis.zcard(f"rollout:{{{pool}}}:leases") == 0
        assert launcher.left() == []


def test_a_third_signal_kills_even_a_worker_that_is_frozen(
    tmp_path: Path, url: str, pool: str, redis: Redis
) -> None:
    with launched(tmp_path, url, pool, "--gpus", "0-1", "--grace-s", "600") as launcher:
        launcher.wait_for("ready: 2 workers")
        with Client(url, pool=pool) as client:
            job = client.submit(LONG)
            key = f"rollout:{{{pool}}}:reply:{job.job_id}"
            launcher.wait_until(lambda: redis.hget(key, "status") == "running", "the job under way")
            busy = str(redis.hget(key, "worker"))
            (idle,) = IDS - {busy}
            frozen = workers(launcher)[idle]
            frozen.suspend()

            launcher.signal(signal.SIGTERM)
            launcher.wait_until(
                lambda: states(redis, pool, busy) == ["draining"], "a worker draining"
            )
            assert redis.hget(key, "status") == "running"

            launcher.signal(signal.SIGTERM)
            launcher.wait_until(lambda: states(redis, pool, busy) == [None], "the busy worker gone")
            assert redis.hget(key, "status") == "queued"
            assert frozen.status() == psutil.STATUS_STOPPED

            launcher.signal(signal.SIGTERM)
            assert launcher.wait() == 128 + signal.SIGKILL
        assert launcher.left() == []


def test_a_shutdown_ends_all_workers_and_the_launcher(
    tmp_path: Path, url: str, pool: str, redis: Redis
) -> None:
    with launched(tmp_path, url, pool, "--gpus", "0-1") as launcher:
        launcher.wait_for("ready: 2 workers")
        launcher.children()
        redis.fcall("rolloutq_control", 1, f"rollout:{{{pool}}}", "shutdown")  # pyright: ignore[reportUnknownMemberType]
        assert launcher.wait() == 0
        assert launcher.left() == []
        assert "another starts" not in launcher.output


def test_wrong_settings_end_the_launcher_with_2(tmp_path: Path, url: str, pool: str) -> None:
    with launched(tmp_path, url, pool, "--gpus", "0-2", "--tp", "2") as launcher:
        assert launcher.wait() == 2
        assert "not whole groups of --tp 2" in launcher.output
    with launched(tmp_path, url, pool, "--gpus", "0-1", "--engine", "lmdeploy-server") as launcher:
        assert launcher.wait() == 2
        assert "--engine-url" in launcher.output
        assert "another starts" not in launcher.output
        assert launcher.left() == []
