"""Batches left to a batch worker: from submission to the end, through its death. Needs arq, and so redis-py 5."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from producer_sdk.batch.journal import Files, locked
from producer_sdk.cli import FAILED, GOOD, USAGE
from tests.batch_files import TOKENS, answers, kill_in_flight, of_workers, scripted_row, write_lines
from tests.command import CommandProcess, Rolloutq
from tests.form import FULL_BATCHES
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve

pytest.importorskip("arq")

KILLS, ROWS = (20, 6000) if FULL_BATCHES else (2, 1200)
END_S = 300.0


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """One for each process that a test starts."""
    made = [tmp_path / f"process-{number}" for number in range(4)]
    for folder in made:
        folder.mkdir()
    return made


def batch_worker(folder: Path, url: str, pool: str, *words: str) -> CommandProcess:
    where = ("--url", url, "--pool", pool, "--dir", str(folder.parent))
    return CommandProcess(folder, "batch", "worker", *where, *words)


def state_of(rolloutq: Rolloutq, batch: str) -> dict[str, Any]:
    return rolloutq("batch", "status", batch, "--json").json


def submitted(rolloutq: Rolloutq, source: Path, output: Path, *words: str) -> str:
    return rolloutq("batch", "submit", str(source), "-o", str(output), *words).out.strip()


def test_a_batch_is_left_to_a_worker_and_watched_from_anywhere(
    serve: Serve, rolloutq: Rolloutq, tmp_path: Path, folders: list[Path], url: str, pool: str
) -> None:
    serve(slots=8)
    sources = [
        write_lines(tmp_path / f"in-{n}.jsonl", map(scripted_row, range(n, n + 50))) for n in (0, 1)
    ]
    outputs = [tmp_path / f"out-{n}.jsonl" for n in (0, 1)]
    bad = write_lines(tmp_path / "bad.jsonl", [b"{"])
    files = [
        *zip(sources, outputs, strict=True),
        (bad, tmp_path / "x.jsonl"),
        (bad, tmp_path / "../out.jsonl"),
        (bad, tmp_path / "y.jsonl"),
    ]
    (tmp_path / "y.errors.jsonl").symlink_to(tmp_path / "../errors.jsonl")
    batches = [submitted(rolloutq, source, output) for source, output in files]
    assert [one["state"] for one in rolloutq("batch", "list", "--json").json] == ["waiting"] * 5
    with batch_worker(folders[0], url, pool) as worker:
        codes = [rolloutq("batch", "attach", batch).code for batch in batches]
        assert codes == [GOOD, GOOD, USAGE, USAGE, USAGE]
        assert "1 of 1 rows are bad" in rolloutq("batch", "status", batches[2]).out
        for batch in batches[3:]:
            assert "below its --dir" in rolloutq("batch", "status", batch).out
        assert len(answers(outputs[0])) == len(answers(outputs[1])) == 50
        worker.signal(signal.SIGTERM)
        assert worker.wait() == GOOD
    assert "done" in rolloutq("batch", "list").out
    with batch_worker(folders[1], url, pool, "--keep-days", "0") as worker:
        wait_until(lambda: rolloutq("batch", "list", "--json").json == [], "all are forgotten")
        worker.kill()


def test_a_batch_is_cancelled_whether_or_not_somebody_is_at_it(
    serve: Serve,
    rolloutq: Rolloutq,
    look: Look,
    tmp_path: Path,
    folders: list[Path],
    url: str,
    pool: str,
) -> None:
    serve(slots=4)
    rows = (scripted_row(number, ms_per_token=40) for number in range(200))
    source = write_lines(tmp_path / "in.jsonl", rows)
    idle, output = tmp_path / "idle.jsonl", tmp_path / "out.jsonl"
    waiting = submitted(rolloutq, source, idle)
    assert rolloutq("batch", "cancel", waiting, "--json").json["state"] == "cancelled"
    running = submitted(rolloutq, source, output)
    with batch_worker(folders[0], url, pool):
        wait_until(lambda: look.length("low"), "rows in flight")
        assert rolloutq("batch", "cancel", running).code == GOOD
        assert rolloutq("batch", "attach", running).code == FAILED
    ended = state_of(rolloutq, running)
    assert ended["state"] == "cancelled"
    assert ended["summary"]["failures"]["cancelled"] > 0
    assert ended["summary"]["waiting"] > 0
    assert not look.left()
    assert not idle.exists()


def test_a_batch_that_another_process_holds_is_taken_up_when_it_lets_go(
    serve: Serve, rolloutq: Rolloutq, tmp_path: Path, folders: list[Path], url: str, pool: str
) -> None:
    serve(slots=8)
    source = write_lines(tmp_path / "in.jsonl", map(scripted_row, range(20)))
    output = tmp_path / "out.jsonl"
    with batch_worker(folders[0], url, pool) as worker:
        with locked(Files.of(source, output)):
            batch = submitted(rolloutq, source, output)
            worker.wait_for("another process is at this batch")
        assert rolloutq("batch", "attach", batch).code == GOOD
    assert len(answers(output)) == 20


def test_a_worker_that_is_told_twice_to_leave_hands_its_batch_over(
    serve: Serve,
    rolloutq: Rolloutq,
    look: Look,
    tmp_path: Path,
    folders: list[Path],
    url: str,
    pool: str,
) -> None:
    serve(slots=4)
    rows = (scripted_row(number, ms_per_token=100) for number in range(20))
    batch = submitted(rolloutq, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    with batch_worker(folders[0], url, pool) as worker:
        wait_until(lambda: look.length("low"), "rows in flight")
        worker.signal(signal.SIGTERM)
        worker.wait_for("leaving: ")
        assert "left, for" not in worker.output  # its runner takes 2 s to leave
        worker.signal(signal.SIGTERM)
        worker.wait()
        assert f"{batch}: left, for this worker leaves" in worker.output
        assert "InvalidStateError" not in worker.output
    assert state_of(rolloutq, batch)["owner"] is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_batch_worker_is_followed_by_the_next_and_no_row_is_generated_twice(
    serve: Serve,
    rolloutq: Rolloutq,
    look: Look,
    tmp_path: Path,
    folders: list[Path],
    url: str,
    pool: str,
) -> None:
    for _ in range(2):
        serve(slots=16)
    rows = (scripted_row(number, ms_per_token=16) for number in range(ROWS))
    output = tmp_path / "out.jsonl"
    batch = submitted(rolloutq, write_lines(tmp_path / "in.jsonl", rows), output)
    happened, began_s = 0, time.monotonic()
    for kill in range(KILLS):
        with batch_worker(folders[0], url, pool) as worker:
            kill_in_flight(worker, look)
        happened += look.length("low") > 0
        if kill and not FULL_BATCHES:
            look("DEL", look.keys.batch_owner(batch))  # as after its 15 s
    assert happened == KILLS, "rows were in flight at every kill"
    with batch_worker(folders[0], url, pool) as worker:
        wait_until(lambda: state_of(rolloutq, batch)["state"] == "done", "the end", timeout_s=END_S)
    assert answers(output) == {f"row-{n}": f"answer {n:09d}" for n in range(ROWS)}
    wait_until(lambda: of_workers(look, "finished_jobs") >= ROWS, "all heartbeats")
    assert of_workers(look, "generated_tokens") == TOKENS * ROWS
    assert state_of(rolloutq, batch)["attempts"] == KILLS + 1
    told = {"kills": KILLS, "in flight": happened, "double": 0, "s": time.monotonic() - began_s}
    print(json.dumps(told))  # noqa: T201 - shown with -s
