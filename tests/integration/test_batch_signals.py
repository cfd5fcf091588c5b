"""`rolloutq batch run` as a process: Ctrl-C once, twice, three times, SIGTERM, and a second runner."""

import signal
from pathlib import Path

import pytest

from producer_sdk.cli import GOOD, INTERRUPTED, USAGE
from tests.batch_files import answers, read_lines, scripted_row, write_lines
from tests.command import CommandProcess
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve

ROWS = 48
LONG = range(4, 20)
"""Rows that take 7 s together, far longer than a runner stays to say that it leaves."""


class Batch:
    """A batch of slow rows, four slots for them, and its command; `LONG` ones among them where told so."""

    def __init__(self, tmp_path: Path, url: str, pool: str, look: Look, *, long: bool) -> None:
        self.folder, self.look = tmp_path, look
        self.output = tmp_path / "out.jsonl"
        rows = (
            scripted_row(number, ms_per_token=100 if long and number in LONG else 15)
            for number in range(ROWS)
        )
        source = write_lines(tmp_path / "in.jsonl", rows)
        self.words = ["batch", "run", str(source), "-o", str(self.output)]
        self.words += ["--url", url, "--pool", pool]

    def start(self) -> CommandProcess:
        """Run it."""
        return CommandProcess(self.folder, *self.words)

    def under_way(self, runner: CommandProcess) -> None:
        """Wait until rows are done and others in flight."""
        runner.wait_until(lambda: self.output.exists() and self.output.stat().st_size, "a block")
        runner.wait_until(lambda: self.look.length("low"), "a row in flight")

    def finish(self) -> None:
        """The same command again does the rest."""
        with self.start() as runner:
            assert runner.wait() == GOOD, runner.output
        assert answers(self.output) == {f"row-{n}": f"answer {n:09d}" for n in range(ROWS)}


@pytest.fixture
def batch(serve: Serve, tmp_path: Path, url: str, pool: str, look: Look) -> Batch:
    serve(slots=4)
    return Batch(tmp_path, url, pool, look, long=False)


@pytest.fixture
def long_batch(serve: Serve, tmp_path: Path, url: str, pool: str, look: Look) -> Batch:
    serve(slots=4)
    return Batch(tmp_path, url, pool, look, long=True)


def test_the_first_ctrl_c_waits_for_what_is_in_flight(batch: Batch) -> None:
    with batch.start() as runner:
        batch.under_way(runner)
        runner.signal(signal.SIGINT)
        assert runner.wait() == INTERRUPTED
        assert "the same command goes on from here: rolloutq batch run" in runner.output
    done = len(read_lines(batch.output))
    assert len(batch.look.job_ids()) == done < ROWS, "what was sent is done"
    batch.finish()


def test_the_second_leaves_it_to_the_workers(long_batch: Batch) -> None:
    batch = long_batch
    with batch.start() as runner:
        batch.under_way(runner)
        runner.signal(signal.SIGSTOP)
        rest = batch.look.job_ids()
        runner.signal(signal.SIGCONT)
        runner.signal(signal.SIGINT)
        runner.wait_for("waiting for what is in flight")
        runner.signal(signal.SIGINT)
        assert runner.wait() == INTERRUPTED
    assert batch.look.left(), "rows were left to the workers"
    wait_until(lambda: not batch.look.left(), "the workers have done it")
    assert all(batch.look.reply(job_id)["status"] != "cancelled" for job_id in rest)
    batch.finish()


@pytest.mark.parametrize("limit", [(), ("--limit", "16")])  # with it, no row waits to be sent
def test_the_third_cancels_it(long_batch: Batch, limit: tuple[str, ...]) -> None:
    batch, words = long_batch, list(long_batch.words)
    batch.words += limit
    with batch.start() as runner:
        batch.under_way(runner)
        for told in ("waiting for", "leaving", "cancelling"):
            runner.signal(signal.SIGINT)
            runner.wait_for(told)
        assert runner.wait() == INTERRUPTED
        assert (
            runner.output.split("goes on from here: ")[1].split("\n")[0].endswith(" --retry-errors")
        )
    lines = read_lines(batch.output)
    cancelled = [line for line in lines if line["error"]]
    assert cancelled
    assert {line["error"]["code"] for line in cancelled} == {"cancelled"}
    assert not batch.look.left()
    errors = read_lines(batch.output.with_suffix(".errors.jsonl"))
    assert {line["custom_id"] for line in errors} == {line["custom_id"] for line in cancelled}
    batch.words = [*words, "--retry-errors"]
    batch.finish()


def test_sigterm_leaves_at_once_and_nothing_is_lost(long_batch: Batch) -> None:
    batch = long_batch
    with batch.start() as runner:
        batch.under_way(runner)
        runner.signal(signal.SIGTERM)
        assert runner.wait() == INTERRUPTED
    assert batch.look.left(), "rows were left to the workers"
    batch.finish()


def test_a_second_runner_of_the_same_batch_is_refused(batch: Batch, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with batch.start() as runner:
        batch.under_way(runner)
        runner.signal(signal.SIGSTOP)
        with CommandProcess(other, *batch.words) as second:
            assert second.wait() == USAGE
            assert "another process is at this batch" in second.output
        runner.signal(signal.SIGCONT)
        assert runner.wait() == GOOD
    batch.finish()
