"""`rolloutq dead`: jobs that ended because their attempts did."""

from datetime import datetime

from cyclopts import App
from rich.table import Table

from producer_sdk.cli.screen import AsJson, print_json, show
from producer_sdk.cli.where import Where, ask
from protocols.errors import ConfigError, JobNotFound
from protocols.queue import dead as buried
from protocols.queue.broker import Broker
from protocols.queue.dead import DeadLetter

LISTED = 100
SEARCHED = 10_000

dead = App(name="dead", help="List, show, requeue or purge dead letters.")


@dead.command(name="list")
def list_letters(*, as_json: AsJson = False, where: Where = Where()) -> None:  # noqa: B008 - frozen
    """List the newest dead letters.

    Args:
        as_json: Print them as JSON.
        where: Server and pool.
    """
    letters = ask(where, lambda broker: buried.dead_letters(broker, most=LISTED))
    if as_json:
        print_json([_facts(letter) for letter in letters])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("job", "reason", "attempts", "error", "at"):
        table.add_column(name)
    for letter in letters:
        table.add_row(
            letter.job_id, letter.reason, str(letter.attempts), letter.error, _clock(letter)
        )
    show(table if letters else f"no dead letters in pool {where.pool}")


@dead.command(name="show")
def show_letter(job_id: str, /, *, as_json: AsJson = False, where: Where = Where()) -> None:  # noqa: B008
    """Show a dead letter with its history.

    Args:
        job_id: The job.
        as_json: Print it as JSON.
        where: Server and pool.
    """
    letter = _found(where, job_id)
    if as_json:
        print_json(_facts(letter))
        return
    lines = [f"{name}: {value}" for name, value in _facts(letter).items() if name != "events"]
    show(*lines, *(f"  {event}" for event in letter.events))


@dead.command
def requeue(job_id: str, /, *, where: Where = Where()) -> None:  # noqa: B008 - frozen
    """Try a dead letter again, as the new job `<id>~2`.

    Args:
        job_id: The job.
        where: Server and pool.
    """
    letter = _found(where, job_id)
    again = ask(where, lambda broker: buried.requeue(broker, letter))
    print(f"queued as {again}; see it with: rolloutq job {again}")


@dead.command
def purge(job_id: str | None = None, /, *, every: bool = False, where: Where = Where()) -> None:  # noqa: B008
    """Forget a dead letter, or all of them.

    Args:
        job_id: The job.
        every: All of the pool.
        where: Server and pool.
    """
    if (job_id is None) == (not every):
        raise ConfigError("give either a job's id or --every")
    letters = [_found(where, job_id)] if job_id else ask(where, _all)
    ask(where, lambda broker: buried.purge(broker, letters))
    print(f"purged {len(letters)} dead letters")


async def _all(broker: Broker) -> list[DeadLetter]:
    return await buried.dead_letters(broker, most=SEARCHED)


def _found(where: Where, job_id: str) -> DeadLetter:
    for letter in ask(where, _all):
        if letter.job_id == job_id:
            return letter
    raise JobNotFound(f"no dead letter {job_id} in pool {where.pool}; see: rolloutq dead list")


def _facts(letter: DeadLetter) -> dict[str, object]:
    return {
        "job": letter.job_id,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "error": letter.error,
        "lane": letter.lane,
        "events": list(letter.events),
    }


def _clock(letter: DeadLetter) -> str:
    at_ms = int(letter.entry.partition("-")[0])
    return datetime.fromtimestamp(at_ms / 1000).astimezone().isoformat(" ", "seconds")
