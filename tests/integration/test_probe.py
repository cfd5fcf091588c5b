"""`rolloutq worker --probe`: what a supervisor sees of a worker."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from producer_sdk.cli import FAILED, GOOD, UNREACHABLE, USAGE
from tests.command import ROOT, Rolloutq
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import both_servers
from worker.probe import SEEN_MS

LIMIT_S = 60.0
_MODULES = """
import runpy, sys
try:
    runpy.run_module("worker", run_name="__main__", alter_sys=True)
finally:
    print("loaded:", *(name for name in ("torch", "transformers", "worker.engines") if name in sys.modules))
"""


class Told(NamedTuple):
    """What a probe said, and its exit code."""

    code: int
    line: str


Probe = Callable[..., Told]


@pytest.fixture
def probe(url: str, pool: str, tmp_path: Path) -> Probe:
    """Run a probe as a supervisor would."""

    def run(question: str, *words: str, environment: dict[str, str] | None = None) -> Told:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("ROLLOUTQ_")}
        told = {"ROLLOUTQ_URL": url, "ROLLOUTQ_POOL": pool, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "worker", "--probe", question, *words],
            env=kept | told | (environment or {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        lines = (done.stdout + done.stderr).splitlines()
        assert len(lines) == 1 or question == "fine", lines
        return Told(done.returncode, lines[0])

    return run


@both_servers
def test_health_and_ready_are_two_answers(probe: Probe, serve: Serve, rolloutq: Rolloutq) -> None:
    worker = serve()
    named = ("--worker-id", worker.worker_id)
    assert probe("health", *named) == Told(GOOD, f"{worker.worker_id}: health: ok")
    assert probe("ready", *named) == Told(GOOD, f"{worker.worker_id}: ready: ok")
    assert rolloutq("control", "pause").code == GOOD
    assert probe("health", *named).code == GOOD
    assert probe("ready", *named) == Told(FAILED, f"{worker.worker_id}: ready: it is paused")


def test_a_worker_without_a_heartbeat_is_not_healthy(
    probe: Probe, serve: Serve, look: Look
) -> None:
    worker = serve()
    worker.signal(signal.SIGSTOP)
    long_ago_ms = look.now_ms() - SEEN_MS - 1
    look("ZADD", look.keys.workers, "XX", long_ago_ms, worker.worker_id)
    for question in ("health", "ready"):
        told = probe(question, "--worker-id", worker.worker_id)
        assert told == Told(FAILED, f"{worker.worker_id}: {question}: no heartbeat within 10 s")
    worker.signal(signal.SIGCONT)
    wait_until(lambda: probe("health", "--worker-id", worker.worker_id).code == GOOD, "it is back")


def test_a_stuck_event_loop_is_not_healthy(probe: Probe, serve: Serve, look: Look) -> None:
    worker = serve()
    why = "its event loop has been stuck for 7 s"
    worker.signal(signal.SIGSTOP)
    look("HSET", look.keys.worker(worker.worker_id), "health", why, "ready", why)
    assert probe("health", "--worker-id", worker.worker_id) == Told(
        FAILED, f"{worker.worker_id}: health: {why}"
    )


def test_the_only_worker_of_this_host_needs_no_name(probe: Probe, serve: Serve) -> None:
    assert probe("health").code == FAILED
    first = serve()
    assert probe("health") == Told(GOOD, f"{first.worker_id}: health: ok")
    second = serve()
    told = probe("health")
    assert told.code == USAGE
    assert "--worker-id" in told.line
    assert f"{first.worker_id}, {second.worker_id}" in told.line


def test_a_probe_needs_no_model_and_loads_no_engine(
    url: str, pool: str, serve: Serve, tmp_path: Path
) -> None:
    worker = serve()
    flags = ["--probe", "health", "--worker-id", worker.worker_id, "--url", url, "--pool", pool]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _MODULES, *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ROLLOUTQ_MODEL": "./nonesuch"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == GOOD, done.stderr
    assert done.stdout.splitlines() == [f"{worker.worker_id}: health: ok", "loaded:"]


def test_a_probe_without_a_server_is_one_line_and_exit_3(probe: Probe) -> None:
    told = probe("health", "--url", "redis://127.0.0.1:1/0")
    assert told.code == UNREACHABLE
    assert "no Redis at 127.0.0.1:1" in told.line


def test_an_unknown_question_is_bad_input(probe: Probe) -> None:
    told = probe("fine")
    assert told.code == USAGE
    assert "--probe" in told.line
