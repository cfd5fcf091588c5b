"""`rolloutq control`: a command to the workers, and what each said to it."""

import contextlib
from datetime import datetime
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

from producer_sdk.cli import FAILED, GOOD
from producer_sdk.cli.screen import AsJson, print_json, show
from producer_sdk.cli.where import Where, ask
from producer_sdk.control import watch, who
from producer_sdk.fleet import no_live_worker
from protocols.control import Ack, Issued
from protocols.errors import NoLiveWorker
from protocols.queue.broker import Broker
from protocols.queue.control import Answers, Logged, audit, issue
from protocols.queue.keys import Keys

AUDIT_MOST = 20
FEW = 3
"""Facts of so many names stand in columns of their own."""

_COLUMNS = ("worker", "result", "state", "version", "running", "held", "ms", "why")
_RIGHT = ("version", "running", "held", "ms")


def control(
    *words: str,
    wait: Annotated[float, Parameter(validator=Number(gte=0, lte=86_400))] = 10.0,
    as_json: AsJson = False,
    where: Where = Where(),  # noqa: B008 - frozen
) -> int:
    """Command the workers, and show what each answered; without words, the newest commands.

    Exit code 1 where a worker refused or said nothing, 2 where the words are no command, 3 where no worker lives.

    Args:
        words: A verb and its options, as in `pause mode=drain` or `shutdown worker=w1`; a wrong one lists the verbs.
        wait: Seconds until all have to have answered; 0 only issues the command.
        as_json: Print it as JSON.
        where: Server and pool.
    """
    if not words:
        _show_audit(ask(where, lambda broker: audit(broker, most=AUDIT_MOST)), where, as_json)
        return GOOD
    if wait == 0:
        _show_issued(ask(where, lambda broker: issue(broker, words, by=who())), where, as_json)
        return GOOD
    answered = ask(where, lambda broker: _answered(broker, words, wait))
    command = answered.command
    if as_json:
        print_json(_facts(answered))
    else:
        show(*_parts(answered))
    if not command.workers and command.verb != "cancel":
        raise NoLiveWorker(no_live_worker(where.pool))
    return FAILED if answered.unmet else GOOD


async def _answered(broker: Broker, words: tuple[str, ...], wait_s: float) -> Answers:
    """What has been answered by the end of the wait."""
    async with contextlib.aclosing(watch(broker, words, by=who(), wait_s=wait_s)) as growing:
        return [answered async for answered in growing][-1]


def _show_issued(command: Issued, where: Where, as_json: bool) -> None:
    if as_json:
        print_json(_command(command))
        return
    keys = Keys(where.pool)
    show(
        f"{_heading(command)}, {len(command.workers)} live workers; what they answer:",
        f"  redis-cli HGETALL '{keys.acks(command.id)}'",
    )


def _parts(answered: Answers) -> list[Table | str]:
    """The answers for people: facts of few names as columns, those of many below."""
    command, acks = answered.command, answered.acks
    if not command.workers:
        stands = "" if command.generation is None else "; the order stands for workers that come"
        return [_heading(command) + stands]
    names = list(dict.fromkeys(name for ack in acks.values() for name in ack.facts))
    columns = names if len(names) <= FEW else []
    table = Table()
    for name in (*_COLUMNS[:-1], *columns, *_COLUMNS[-1:]):
        table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for worker in command.workers:
        table.add_row(worker, *_cells(acks.get(worker), columns))
    told = [] if columns else [_told(worker, ack) for worker, ack in sorted(acks.items())]
    return [_heading(command), table, *(part for part in told if part)]


def _cells(ack: Ack | None, columns: list[str]) -> list[str]:
    if ack is None:
        return ["silent"]
    version = "?" if ack.version is None else str(ack.version)
    facts = [str(ack.facts.get(name, "")) for name in columns]
    numbers = [version, str(ack.running), str(ack.held), str(ack.ms)]
    return [ack.result, ack.state, *numbers, *facts, ack.why]


def _told(worker: str, ack: Ack) -> str:
    facts = [f"  {name}: {value}" for name, value in ack.facts.items() if value != ""]
    return "\n".join([f"{worker}:", *facts]) if facts else ""


def _heading(command: Issued) -> str:
    order = "" if command.generation is None else f", generation {command.generation}"
    counts = [f"{count} {name}" for name, count in command.counts.items() if count]
    counted = f": {', '.join(counts) or 'no job to cancel'}" if command.counts else ""
    return f"command {command.id}: {command.said}{order}{counted}"


def _facts(answered: Answers) -> dict[str, Any]:
    silent: dict[str, Any] = {"result": "silent"}
    told = {worker: msgspec.to_builtins(ack) for worker, ack in answered.acks.items()}
    asked = {worker: told.get(worker, silent) for worker in answered.asked}
    return _command(answered.command) | {"workers": asked}


def _command(command: Issued) -> dict[str, Any]:
    return msgspec.to_builtins(command)


def _show_audit(entries: list[Logged], where: Where, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(entries))
        return
    table = Table("at", "who", "said", "generation", "refused", box=None, pad_edge=False)
    for entry in entries:
        at = datetime.fromtimestamp(entry.at_ms / 1000).astimezone().isoformat(" ", "seconds")
        generation = "" if entry.generation is None else str(entry.generation)
        table.add_row(at, entry.by, entry.said, generation, entry.refused)
    show(table if entries else f"no commands yet in pool {where.pool}; see docs/control.md")
