"""`rolloutq batch run`: in the foreground, until all rows are answered."""

import contextlib
import shlex
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from producer_sdk.batch.runner import Order, Wish
from producer_sdk.batch.survey import survey
from producer_sdk.batch.work import Summary, Task, work
from producer_sdk.cli import FAILED, GOOD, INTERRUPTED, USAGE
from producer_sdk.cli.batch_screen import Screen, show_result
from producer_sdk.cli.batch_task import What
from producer_sdk.cli.screen import AsJson, print_json, say
from producer_sdk.cli.where import Where
from protocols.errors import QueueError, without_login

ONCE = ("--force", "--retry-errors")
GOES_ON = "the same command goes on from here: "


def run(
    input: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    what: What = What(),  # noqa: B008 - frozen
    check: Annotated[bool, Parameter(negative=())] = False,
    retry_errors: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
    no_worker_s: Annotated[float, Parameter(env_var="ROLLOUTQ_NO_WORKER_S")] = 60.0,
    as_json: AsJson = False,
    where: Where = Where(),  # noqa: B008 - frozen
) -> int:
    """Answer every row of a file; the same command again goes on where it was.

    Args:
        input: OpenAI's or Claude's batch lines, or bare requests, one a line; `-` is standard input.
        output: The answers, one line a row as they come; `.parquet` with --format rollouts.
        what: The batch's parameters.
        check: Read the input, tell every problem, and send nothing.
        retry_errors: Do the rows that failed again.
        force: Begin anew, over what is there.
        no_worker_s: How long to wait while the pool has no live worker.
        as_json: Print the result as JSON.
        where: Server and pool.
    """
    with _readable(input) as path:
        if check:
            return _check(path, what, as_json=as_json)
        task = what.task(path, output, retry_errors=retry_errors, force=force)
        summary = _worked(task, where, no_worker_s)
    if as_json:
        print_json(summary)
    else:
        show_result(summary)
    if summary.interrupted:
        return INTERRUPTED
    return GOOD if summary.good else FAILED


def _worked(task: Task, where: Where, no_worker_s: float) -> Summary:
    order = Order()
    with Screen() as screen, _wishes(order, screen):
        try:
            summary = work(
                task,
                where.url,
                where.pool,
                no_worker_s=no_worker_s,
                order=order,
                watch=screen.show,
                say=screen.say,
            )
        except QueueError:
            screen.say(GOES_ON + _command())
            raise
        if summary.interrupted:
            cancelled = order.wish == Wish.CANCEL and "cancelled" in summary.failures
            screen.say(GOES_ON + _command(retry_errors=cancelled))
        return summary


def _command(*, retry_errors: bool = False) -> str:
    """What to paste; what cancelled rows need is among it."""
    words = [without_login(word) for word in sys.argv[1:] if word not in ONCE]
    return shlex.join(["rolloutq", *words, *(["--retry-errors"] if retry_errors else [])])


@contextlib.contextmanager
def _wishes(order: Order, screen: Screen) -> Generator[None]:
    """Ctrl-C wishes more each time; SIGTERM and SIGHUP wish to detach."""
    words = {
        Wish.DRAIN: "waiting for what is in flight; again: leave it to the workers",
        Wish.DETACH: "leaving what is in flight to the workers; again at once: cancel it",
        Wish.CANCEL: "cancelling what is in flight",
    }

    def more(number: int, frame: FrameType | None) -> None:
        screen.say(words[order.more()])

    def detach(number: int, frame: FrameType | None) -> None:
        order.at_least(Wish.DETACH)

    wanted = {signal.SIGINT: more, signal.SIGTERM: detach, signal.SIGHUP: detach}
    before = {number: signal.signal(number, call) for number, call in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _readable(input: Path) -> Generator[Path]:
    """A file that can be read more than once."""
    if str(input) != "-":
        yield input
        return
    with tempfile.NamedTemporaryFile(prefix="rolloutq-", suffix=".jsonl") as file:
        while piece := sys.stdin.buffer.read(1 << 20):
            file.write(piece)
        file.flush()
        yield Path(file.name)


def _check(path: Path, what: What, *, as_json: bool) -> int:
    surveyed = survey(path, what.rows(), limit=what.limit, report=lambda problem: say(problem.told))
    if as_json:
        print_json({"rows": surveyed.rows, "invalid": surveyed.invalid, "sha256": surveyed.sha256})
    else:
        say(f"{surveyed.rows} rows, {surveyed.invalid} of them bad")
    return USAGE if surveyed.invalid else GOOD
