"""`rolloutq batch run`: in the foreground, until all rows are answered."""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from producer_sdk.batch.finish import finish
from producer_sdk.batch.journal import Files, Journal, locked, opened
from producer_sdk.batch.manifest import Format, Parameters
from producer_sdk.batch.parquet import library
from producer_sdk.batch.row import Rows
from producer_sdk.batch.runner import Order, Runner, Wish
from producer_sdk.batch.survey import Problem, Survey, survey
from producer_sdk.cli import FAILED, GOOD, INTERRUPTED, USAGE
from producer_sdk.cli.batch_screen import Screen, show_result, summary
from producer_sdk.cli.screen import AsJson, print_json, say
from producer_sdk.cli.where import Where
from producer_sdk.client import Client
from protocols import codec
from protocols.errors import ConfigError, InvalidRequest, QueueError

SHOWN_PROBLEMS = 20
_params = msgspec.json.Decoder(dict[str, msgspec.Raw])


def run(
    input: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    format: Format = "batch",
    protocol: str | None = None,
    n: Annotated[int | None, Parameter(validator=Number(gte=1, lte=128))] = None,
    params: str = "{}",
    limit: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    check: Annotated[bool, Parameter(negative=())] = False,
    skip_invalid: Annotated[bool, Parameter(negative=())] = False,
    ordered: Annotated[bool, Parameter(negative=())] = False,
    retry_errors: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
    no_worker_s: Annotated[float, Parameter(env_var="ROLLOUTQ_NO_WORKER_S")] = 60.0,
    as_json: AsJson = False,
    where: Where = Where(),  # noqa: B008 - frozen
) -> int:
    """Answer every row of a file; the same command again goes on where it was.

    The first Ctrl-C waits for what is in flight, the second leaves it to the workers, the third cancels it.

    Args:
        input: OpenAI's or Claude's batch lines, or bare requests, one a line; `-` is standard input.
        output: The answers, one line a row as they come; `.parquet` with --format rollouts.
        format: `batch`: lines in the shape of the row's family. `rollouts`: one a sample, with token ids.
        protocol: The dialect of bare requests.
        n: Samples of each row.
        params: Fields that are set in every request, a JSON object; they win over the row's own.
        limit: Only so many rows, from the start.
        check: Read the input, tell every problem, and send nothing.
        skip_invalid: Do the good rows where some are bad.
        ordered: Put the output into the order of the input when all is done.
        retry_errors: Do the rows that failed again.
        force: Begin anew, over what is there.
        no_worker_s: How long to wait while the pool has no live worker.
        as_json: Print the result as JSON.
        where: Server and pool.
    """
    given = Parameters(format, protocol, _given(params, n))
    rows = Rows(protocol=protocol, params=given.params)
    with _readable(input) as path:
        if check:
            return _check(survey(path, rows, limit=limit, report=_tell), as_json=as_json)
        files = Files.of(path, _checked_output(output, given))
        with locked(files):
            surveyed = _surveyed(path, rows, limit, skip_invalid=skip_invalid)
            journal = opened(files, surveyed, given, force=force, retry_errors=retry_errors)
            order = Order()
            done = _run(journal, rows, order, where, no_worker_s)
            if done:
                finish(journal, ordered=ordered)
            if as_json:
                print_json(summary(journal))
            else:
                show_result(journal)
    return _code(journal, order, done)


def _run(journal: Journal, rows: Rows, order: Order, where: Where, no_worker_s: float) -> bool:
    resume = f"to go on: the same command again ({_command()})"
    with (
        contextlib.closing(journal),
        Client(where.url, pool=where.pool, no_worker_s=no_worker_s, auto_collect=False) as client,
        Screen() as screen,
        _wishes(order, screen),
    ):
        try:
            done = Runner(client, journal, rows, order=order, watch=screen.show).run()
        except QueueError:
            screen.say(resume)
            raise
        if not done:
            screen.say(resume)
        return done


def _command() -> str:
    return (
        " ".join(["rolloutq", *sys.argv[1:]]).replace(" --force", "").replace(" --retry-errors", "")
    )


def _code(journal: Journal, order: Order, done: bool) -> int:
    if not done and order.wish:
        return INTERRUPTED
    return FAILED if journal.tally.failed or journal.invalid else GOOD


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


def _given(params: str, n: int | None) -> dict[str, msgspec.Raw]:
    try:
        told = codec.parse_json(_params, params.encode())
    except InvalidRequest as error:
        raise ConfigError(f"--params: {error.message}", param="params") from None
    kept = {name: msgspec.Raw(bytes(value)) for name, value in sorted(told.items())}
    return kept | ({} if n is None else {"n": msgspec.Raw(str(n).encode())})


def _checked_output(output: Path | None, given: Parameters) -> Path:
    if output is None:
        raise ConfigError("-o: where shall the answers go?", param="output")
    if output.suffix == ".parquet" and given.format != "rollouts":
        raise ConfigError("-o: Parquet holds rollouts: --format rollouts", param="output")
    if output.suffix == ".parquet":
        library()
    return output


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


def _surveyed(path: Path, rows: Rows, limit: int | None, *, skip_invalid: bool) -> Survey:
    problems: list[Problem] = []

    def report(problem: Problem) -> None:
        if len(problems) < SHOWN_PROBLEMS:
            problems.append(problem)

    surveyed = survey(path, rows, limit=limit, report=report)
    for problem in problems:
        _tell(problem)
    if surveyed.invalid > len(problems):
        say(f"… and {surveyed.invalid - len(problems)} more; --check shows all")
    if surveyed.invalid and not skip_invalid:
        raise InvalidRequest(
            f"{surveyed.invalid} of {surveyed.rows} rows are bad, so none is sent; mend them, or do the good "
            "ones with --skip-invalid"
        )
    return surveyed


def _tell(problem: Problem) -> None:
    say(f"line {problem.line}: {problem.message} ({problem.code})")


def _check(surveyed: Survey, *, as_json: bool) -> int:
    if as_json:
        print_json({"rows": surveyed.rows, "invalid": surveyed.invalid, "sha256": surveyed.sha256})
    else:
        say(f"{surveyed.rows} rows, {surveyed.invalid} of them bad")
    return USAGE if surveyed.invalid else GOOD
