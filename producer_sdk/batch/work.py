"""One run of a batch from its first look at the input to its last step, wherever it runs."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

import msgspec

from producer_sdk.batch.finish import finish
from producer_sdk.batch.journal import Files, Journal, locked, opened
from producer_sdk.batch.manifest import Parameters
from producer_sdk.batch.row import Rows
from producer_sdk.batch.runner import Look, Order, Runner
from producer_sdk.batch.survey import Problem, Survey, survey
from producer_sdk.batch.tally import Lengths
from producer_sdk.client import Client
from protocols.errors import InvalidRequest, RolloutError

SHOWN_PROBLEMS = 20


class Task(msgspec.Struct, frozen=True):
    """What somebody wants done."""

    input: str
    output: str
    parameters: Parameters = Parameters()
    limit: int | None = None
    """Of rows, from the start."""
    skip_invalid: bool = False
    ordered: bool = False
    retry_errors: bool = False
    force: bool = False


class Summary(msgspec.Struct, frozen=True):
    """What a batch has come to, earlier runs included."""

    batch: str
    output: str
    errors: str | None
    """Where the lines that failed or are none stand."""
    rows: int
    done: int
    failed: int
    invalid: int
    waiting: int
    failures: dict[str, int]
    """Failed rows by the code of their error."""
    prompt_tokens: int
    response_tokens: int
    finish_reasons: dict[str, int]
    lengths: Lengths
    interrupted: bool = False
    """Whether the run that told this left rows waiting, or cancelled some."""

    @property
    def good(self) -> bool:
        """Whether every row has its answer."""
        return self.done == self.rows

    @classmethod
    def of(cls, journal: Journal, *, interrupted: bool) -> "Summary":
        """Of what is written."""
        tally = journal.tally
        return cls(
            batch=journal.manifest.batch,
            output=str(journal.files.output),
            errors=str(journal.files.errors) if tally.failed or journal.invalid else None,
            rows=journal.rows,
            done=tally.done,
            failed=tally.failed,
            invalid=journal.invalid,
            waiting=journal.waiting,
            failures=dict(tally.faults),
            prompt_tokens=tally.prompt_tokens,
            response_tokens=tally.response_tokens,
            finish_reasons=dict(tally.reasons),
            lengths=tally.lengths(),
            interrupted=interrupted,
        )


def work(
    task: Task,
    url: str,
    pool: str,
    *,
    no_worker_s: float,
    order: Order,
    watch: Callable[[Look], None],
    say: Callable[[str], None],
) -> Summary:
    """Do a batch, or go on with it, until it is done or somebody wishes otherwise.

    Raises ConfigError and InvalidRequest before anything is sent, QueueError where the server does not answer or no
    worker has lived for `no_worker_s`, RolloutError where a file cannot be written.
    """
    parameters = task.parameters
    rows = Rows(protocol=parameters.protocol, params=parameters.params)
    files = Files.of(Path(task.input), Path(task.output))
    with _files_told(files), locked(files):
        surveyed = _good(task, rows, say)
        journal = opened(
            files, surveyed, parameters, force=task.force, retry_errors=task.retry_errors
        )
        client = Client(url, pool=pool, no_worker_s=no_worker_s, on_full="wait", auto_collect=False)
        with contextlib.closing(journal), client:
            done = Runner(client, journal, rows, order=order, watch=watch).run()
        if done:
            finish(journal, ordered=task.ordered)
    return Summary.of(journal, interrupted=not done)


@contextlib.contextmanager
def _files_told(files: Files) -> Generator[None]:
    try:
        yield
    except RolloutError:  # one of them is a TimeoutError, and so an OSError
        raise
    except OSError as error:
        path = error.filename2 or error.filename or files.output
        raise RolloutError(f"{path}: {error.strerror}; mend that, and run it again") from error


def _good(task: Task, rows: Rows, say: Callable[[str], None]) -> Survey:
    """The input, if it may be begun."""
    problems: list[Problem] = []

    def report(problem: Problem) -> None:
        if len(problems) < SHOWN_PROBLEMS:
            problems.append(problem)

    surveyed = survey(Path(task.input), rows, limit=task.limit, report=report)
    for problem in problems:
        say(problem.told)
    if surveyed.invalid > len(problems):
        say(f"… and {surveyed.invalid - len(problems)} more; --check shows all")
    if surveyed.invalid and not task.skip_invalid:
        raise InvalidRequest(
            f"{surveyed.invalid} of {surveyed.rows} rows are bad, so none is sent; mend them, or do the good "
            "ones with --skip-invalid"
        )
    return surveyed
