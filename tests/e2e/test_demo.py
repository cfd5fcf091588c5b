"""`rolloutq demo`, with the engine that needs no model; `make demo` runs it with one."""

import re
import signal
from pathlib import Path

import pytest

from producer_sdk.cli import GOOD, INTERRUPTED
from tests.command import CommandProcess

JOBS = 12


@pytest.mark.slow
def test_demo_answers_every_job_although_a_worker_with_leases_is_killed(tmp_path: Path) -> None:
    with CommandProcess(tmp_path, "demo", "--engine", "scripted") as demo:
        demo.wait_for("killed")
        demo.children()
        assert demo.wait() == GOOD
        assert demo.left() == []
        held = re.search(r"killed (\w+) \(SIGKILL\), which held leases of (\d+) jobs", demo.output)
        assert held is not None
        assert int(held[2]) >= 2
        assert (
            f"{JOBS} of {JOBS} jobs answered, {held[2]} were on the killed worker {held[1]}"
            in demo.output
        )
        told = re.search(
            r"^story: continued by (\w+) from token (\d+) of 160$", demo.output, re.MULTILINE
        )
        assert told is not None
        assert told[1] != held[1]
        assert 1 < int(told[2]) <= 160
        again = re.findall(r"^\S+ +\S+ +\d+ +-[\d.]+ +\w+ +2$", demo.output, re.MULTILINE)
        assert len(again) == int(held[2])


def test_interrupted_demo_leaves_nothing_running(tmp_path: Path) -> None:
    with CommandProcess(tmp_path, "demo", "--engine", "scripted") as demo:
        demo.wait_for("killed")
        demo.signal(signal.SIGINT)
        assert demo.wait() == INTERRUPTED
        assert demo.left() == []
        assert "Traceback" not in demo.output
