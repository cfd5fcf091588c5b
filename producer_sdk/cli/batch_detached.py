"""`rolloutq batch submit | list | status | attach | cancel | worker`: batches that a batch worker runs."""

import logging
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

from producer_sdk.batch.chores import serve
from producer_sdk.batch.registry import Batch, Registry
from producer_sdk.cli import FAILED, GOOD, USAGE
from producer_sdk.cli.batch_screen import Screen, show_result, told
from producer_sdk.cli.batch_task import What
from producer_sdk.cli.screen import AsJson, print_json, say, show
from producer_sdk.cli.where import Where, ask
from protocols.errors import ConfigError

POLL_S = 1.0
DAY_S = 24 * 3600.0


def submit(
    input: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    what: What = What(),  # noqa: B008 - frozen
    as_json: AsJson = False,
    where: Where = Where(),  # noqa: B008
) -> int:
    """Leave a batch to the batch workers, and print its id.

    Args:
        input: As `rolloutq batch run` takes it; its path is the same for the batch workers.
        output: The answers, likewise.
        what: The batch's parameters.
        as_json: Print it as JSON.
        where: Server and pool.
    """
    if not input.is_file():
        raise ConfigError(f"{input}: no file, and a batch worker has no standard input")
    task = what.task(input.absolute(), output and output.absolute())
    batch = ask(where, lambda broker: Registry(broker).submit(task))
    if as_json:
        print_json({"batch": batch})
    else:
        show(batch)
    return GOOD


def list_batches(*, as_json: AsJson = False, where: Where = Where()) -> int:  # noqa: B008
    """List the batches that were left to batch workers.

    Args:
        as_json: Print them as JSON.
        where: Server and pool.
    """
    batches = ask(where, lambda broker: Registry(broker).all())
    if as_json:
        print_json(batches)
        return GOOD
    table = Table(box=None, pad_edge=False)
    for name in ("batch", "state", "rows", "failed", "at", "since", "output"):
        table.add_column(name)
    for batch in batches:
        since = datetime.fromtimestamp(batch.created_ms / 1000).astimezone()
        ended = f"{batch.ended_rows}/{batch.rows}" if batch.rows else ""
        table.add_row(
            batch.id,
            batch.state,
            ended,
            str(batch.failed or ""),
            batch.owner or "",
            f"{since:%d %b %H:%M}",
            batch.task.output,
        )
    show(table if batches else f"no batches in pool {where.pool}")
    return GOOD


def status(batch: str, /, *, as_json: AsJson = False, where: Where = Where()) -> int:  # noqa: B008
    """Show how a batch stands, from any machine.

    Args:
        batch: Its id.
        as_json: Print it as JSON.
        where: Server and pool.
    """
    found = ask(where, lambda broker: Registry(broker).get(batch))
    if as_json:
        print_json(found)
    else:
        _show(found)
    return GOOD


def attach(batch: str, /, *, as_json: AsJson = False, where: Where = Where()) -> int:  # noqa: B008
    """Watch a batch until it has ended; Ctrl-C only ends the watching.

    Exit code 1 where rows have no answer or it was cancelled, 2 where it could not be begun.

    Args:
        batch: Its id.
        as_json: Print its end as JSON.
        where: Server and pool.
    """
    look = partial(ask, where, lambda broker: Registry(broker).get(batch))
    found: Batch = look()
    with Screen() as screen:
        while not found.ended:
            if found.look is not None:
                screen.show(found.look)
            time.sleep(POLL_S)
            found = look()
    if as_json:
        print_json(found)
    else:
        _show(found)
    if found.state == "failed":
        return USAGE
    return GOOD if found.summary is not None and found.summary.good else FAILED


def cancel(batch: str, /, *, as_json: AsJson = False, where: Where = Where()) -> int:  # noqa: B008
    """Cancel a batch and what its runner has in flight; what is done stays, what an earlier one left goes on.

    Args:
        batch: Its id.
        as_json: Print it as JSON.
        where: Server and pool.
    """
    found = ask(where, lambda broker: Registry(broker).cancel(batch))
    if as_json:
        print_json(found)
    else:
        show(f"{found.id}: {found.state}" + ("" if found.ended else ", and about to be cancelled"))
    return GOOD


def worker(
    *,
    directory: Annotated[Path, Parameter(name="--dir")] = Path(),
    batches: Annotated[int, Parameter(validator=Number(gte=1, lte=64))] = 4,
    keep_days: Annotated[float, Parameter(validator=Number(gte=0))] = 7.0,
    where: Where = Where(),  # noqa: B008
) -> int:
    """Run the batches that were left to batch workers, until SIGTERM; another goes on with them.

    Args:
        directory: It reads and writes files below this alone; without it, below where it is started.
        batches: The most at once.
        keep_days: How long ended ones are remembered; their files stay.
        where: Server and pool.
    """
    ask(where, lambda broker: Registry(broker).all())  # whether the server is there at all
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("arq").setLevel(logging.WARNING)
    logging.getLogger("rolloutq").setLevel(logging.INFO)
    say(f"running batches of pool {where.pool}")
    serve(where.url, where.pool, directory, batches=batches, keep_s=keep_days * DAY_S)
    return GOOD


def _show(batch: Batch) -> None:
    show(f"{batch.id}: {batch.state}" + (f", {batch.error}" if batch.error else ""))
    if batch.summary is not None:
        show_result(batch.summary)
    elif batch.look is not None:
        show(f"{batch.ended_rows}/{batch.rows} rows, {told(batch.look)}")
