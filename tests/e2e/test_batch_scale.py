"""A long batch: every row once, in memory that does not grow with their number."""

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.batch_files import write_lines
from tests.command import CommandProcess
from tests.form import FULL_BATCHES
from tests.worker_process import StartWorker

ROWS = 200_000 if FULL_BATCHES else 6000
MOST_MB, GROWTH_MB = 300, 25


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_and_every_row_is_done_once(
    start_worker: StartWorker, tmp_path: Path, url: str, pool: str
) -> None:
    start_worker(url, pool, slots=256).wait_ready()
    rows = (
        {
            "custom_id": f"row-{number}",
            "messages": [{"role": "user", "content": f"prompt {number}"}],
            "max_tokens": 16,
        }
        for number in range(ROWS)
    )
    source, output = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = ("batch", "run", str(source), "-o", str(output), "--url", url, "--pool", pool)
    used_mb: list[float] = []
    with CommandProcess(tmp_path, *words) as runner:
        process, until_s = psutil.Process(runner.pid), time.monotonic() + 1500
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until_s
            if output.exists() and output.stat().st_size:
                used_mb.append(process.memory_info().rss / 1e6)
            time.sleep(0.2)
        assert runner.wait() == 0, runner.output
        print(runner.output)  # noqa: T201 - shown with -s
    seen = bytearray(ROWS)
    with output.open("rb") as lines:
        for line in lines:
            seen[int(json.loads(line)["custom_id"].removeprefix("row-"))] += 1
    assert seen == bytearray([1]) * ROWS
    half = len(used_mb) // 2
    early_mb, late_mb = max(used_mb[:half]), max(used_mb[half:])
    print(f"{ROWS} rows, memory {early_mb:.0f} MB, then {late_mb:.0f} MB")  # noqa: T201
    assert late_mb <= MOST_MB
    assert late_mb - early_mb <= GROWTH_MB
