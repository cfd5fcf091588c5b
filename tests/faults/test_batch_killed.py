"""A runner that is killed while rows are in flight: its successor goes on, and no row is generated twice."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.batch_files import TOKENS, answers, kill_in_flight, of_workers, scripted_row, write_lines
from tests.command import CommandProcess
from tests.form import FULL_BATCHES
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve

KILLS, ROWS = (20, 6000) if FULL_BATCHES else (4, 1400)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_runner_goes_on_and_no_row_is_generated_twice(
    serve: Serve, look: Look, url: str, pool: str, tmp_path: Path, report: Callable[..., None]
) -> None:
    for _ in range(2):
        serve(slots=16)
    source = write_lines(
        tmp_path / "in.jsonl", (scripted_row(n, ms_per_token=16) for n in range(ROWS))
    )
    output = tmp_path / "out.jsonl"
    words = ("batch", "run", str(source), "-o", str(output), "--url", url, "--pool", pool)
    happened, began_s = 0, time.monotonic()
    for _ in range(KILLS):
        with CommandProcess(tmp_path, *words) as runner:
            kill_in_flight(runner, look)
        happened += look.length("low") > 0
    assert happened == KILLS, "rows were in flight at every kill"
    with CommandProcess(tmp_path, *words) as runner:
        assert runner.wait(300) == 0, runner.output
    assert answers(output) == {f"row-{n}": f"answer {n:09d}" for n in range(ROWS)}
    wait_until(lambda: of_workers(look, "finished_jobs") >= ROWS, "all heartbeats")
    generated = of_workers(look, "generated_tokens")
    report(
        "batch runner killed",
        tried=KILLS,
        happened=happened,
        lost=0,
        double=(generated - TOKENS * ROWS) // TOKENS,
        recovery_s=time.monotonic() - began_s,
    )
    assert generated == TOKENS * ROWS
    assert of_workers(look, "finished_jobs") == ROWS
