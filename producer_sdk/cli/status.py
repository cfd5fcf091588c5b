"""`rolloutq status`: a pool's live workers and what waits for them."""

import msgspec
from rich.table import Table

from producer_sdk.cli.screen import AsJson, print_json, show
from producer_sdk.cli.where import Where, ask
from producer_sdk.fleet import Fleet, look, no_live_worker
from protocols.errors import NoLiveWorker

_COLUMNS = {
    "state": "state",
    "engine": "engine",
    "model": "model",
    "version": "policy_version",
    "slots": "slots",
    "running": "running_jobs",
    "finished": "finished_jobs",
    "tokens": "generated_tokens",
}


def status(*, as_json: AsJson = False, where: Where = Where()) -> None:  # noqa: B008 - frozen
    """Show a pool; exit code 3 where no worker lives.

    Args:
        as_json: Print everything that the workers say of themselves.
        where: Server and pool.
    """
    fleet = ask(where, look)
    if as_json:
        print_json(msgspec.to_builtins(fleet) | {"waiting_jobs": fleet.waiting_jobs})
    else:
        show(f"pool {fleet.pool}, gate {fleet.gate}", _depth(fleet))
        if fleet.workers:
            show(_workers(fleet))
    if not fleet.workers:
        raise NoLiveWorker(no_live_worker(fleet.pool))


def _workers(fleet: Fleet) -> Table:
    table = Table("worker", *_COLUMNS)
    for worker_id, told in sorted(fleet.workers.items()):
        table.add_row(worker_id, *(told.get(field, "?") for field in _COLUMNS.values()))
    return table


def _depth(fleet: Fleet) -> Table:
    table = Table("waiting", *(name if name != "leases" else "running" for name in fleet.depth))
    table.add_row(str(fleet.waiting_jobs), *(str(count) for count in fleet.depth.values()))
    return table
