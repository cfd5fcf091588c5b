"""`rolloutq status`: a pool's live workers and what waits for them."""

import msgspec
from rich.table import Table

from producer_sdk.cli.screen import AsJson, print_json, show
from producer_sdk.cli.where import Where, ask
from producer_sdk.fleet import Fleet, look, no_live_worker
from protocols.errors import NoLiveWorker

_COLUMNS = {
    "state": "state",
    "health": "health",
    "ready": "ready",
    "engine": "engine",
    "model": "model",
    "version": "policy_version",
    "slots": "slots",
    "running": "running_jobs",
    "held": "held_jobs",
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
        show(_wanted(fleet), _depth(fleet))
        if fleet.workers:
            show(_workers(fleet), *_remarks(fleet))
    if not fleet.workers:
        raise NoLiveWorker(no_live_worker(fleet.pool))


def _wanted(fleet: Fleet) -> str:
    """What the pool shall do."""
    mode = f" ({fleet.mode})" if fleet.mode else ""
    memory = f", weights {fleet.memory}" if fleet.memory not in ("", "loaded") else ""
    version = "" if fleet.weights is None else f", version {fleet.weights} wanted"
    return f"pool {fleet.pool}, gate {fleet.gate}{mode}{memory}{version}, generation {fleet.generation}"


def _workers(fleet: Fleet) -> Table:
    table = Table("worker", *_COLUMNS)
    for worker_id, told in sorted(fleet.workers.items()):
        cells = {field: told.get(field, "?") for field in _COLUMNS.values()}
        cells["policy_version"] = _version(fleet, told)
        cells |= {name: "ok" if told.get(name) == "ok" else "no" for name in ("health", "ready")}
        table.add_row(worker_id, *cells.values())
    return table


def _version(fleet: Fleet, told: dict[str, str]) -> str:
    """A worker's policy version, marked where another one is wanted."""
    holds = told.get("policy_version", "?")
    return holds if fleet.weights is None or holds == str(fleet.weights) else f"{holds} (wrong)"


def _remarks(fleet: Fleet) -> list[str]:
    """What is under way, what is in the way, why one is not well, and what it alone was told."""
    lines: list[str] = []
    for worker_id, told in sorted(fleet.workers.items()):
        ill = {name: why for name, why in told.items() if name == "health" and why != "ok"}
        told_now = {name: told.get(name, "") for name in ("doing", "trouble")} | ill
        remarks = [f"{name}: {text}" for name, text in told_now.items() if text]
        alone = fleet.alone.get(worker_id, {})
        remarks += (
            [f"told alone: {' '.join(f'{n} {v}' for n, v in alone.items())}"] if alone else []
        )
        lines += [f"{worker_id}: {'; '.join(remarks)}"] if remarks else []
    return lines


def _depth(fleet: Fleet) -> Table:
    table = Table("waiting", *(name if name != "leases" else "running" for name in fleet.depth))
    table.add_row(str(fleet.waiting_jobs), *(str(count) for count in fleet.depth.values()))
    return table
