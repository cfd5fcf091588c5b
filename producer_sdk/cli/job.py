"""`rolloutq job`: what the reply key says of a job."""

from datetime import datetime

from rich.table import Table

from producer_sdk.cli.answer import fields, mean_logprob
from producer_sdk.cli.screen import AsJson, print_json, show
from producer_sdk.cli.where import Where, ask
from protocols.codec import JOB_ID
from protocols.errors import InvalidRequest, JobNotFound
from protocols.job import JobStatus, Reply
from protocols.queue import overview
from protocols.queue.broker import Broker

_TIMES = ("queued_ms", "started_ms", "finished_ms", "deadline_ms")
_COUNTS = ("attempts", "crashes", "fails", "handbacks")
_TEXTS = ("status", "protocol", "lane", "run", "worker", "code", "error", "policy_version")


def job(job_id: str, /, *, as_json: AsJson = False, where: Where = Where()) -> None:  # noqa: B008
    """Tell what became of a job.

    Args:
        job_id: The job's id.
        as_json: Print all of it, the response included.
        where: Server and pool.
    """
    if not JOB_ID.fullmatch(job_id):
        raise InvalidRequest(f"job id {job_id[:80]!r}: 1 to 128 of A-Z a-z 0-9 . _ : ~ -")
    history, reply = ask(where, lambda broker: _look(broker, job_id))
    if not history:
        raise JobNotFound(
            f"no job {job_id} in pool {where.pool}: it was never accepted, no worker has read it "
            "yet (a raw XADD), or its reply has expired"
        )
    if as_json:
        timeline = [{"at_ms": at_ms, "what": what} for at_ms, what in _timeline(history)]
        answer = fields(reply) if reply else {"job_id": job_id}
        print_json(_facts(history) | {"timeline": timeline} | answer)
    else:
        show(_table(job_id, history, reply), *(_answers(reply) if reply else ()))


async def _look(broker: Broker, job_id: str) -> tuple[dict[str, str], Reply | None]:
    history = await overview.history(broker, job_id)
    (found,) = await broker.replies([job_id])
    return history, found if isinstance(found, Reply) else None


def _facts(history: dict[str, str]) -> dict[str, str | int]:
    numbers = {name: int(history.get(name, 0)) for name in _COUNTS}
    times = {name: int(history[name]) for name in _TIMES if name in history}
    return {name: history[name] for name in _TEXTS if name in history} | numbers | times


def _table(job_id: str, history: dict[str, str], reply: Reply | None) -> Table:
    facts = _facts(history)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("job", job_id)
    for name in _TEXTS:
        if name in facts:
            table.add_row(name, str(facts[name]))
    for name in _COUNTS:
        if facts[name] or name == "attempts":
            table.add_row(name, str(facts[name]))
    for at_ms, what in _timeline(history):
        table.add_row(_clock(at_ms), what)
    if reply is not None and reply.status is not JobStatus.COMPLETED:
        table.add_row("why", str(reply.exception()))
    return table


def _timeline(history: dict[str, str]) -> list[tuple[int, str]]:
    """What happened when, by the server's clock."""
    events: list[tuple[int, str]] = []
    if "queued_ms" in history:
        events.append((int(history["queued_ms"]), "enqueued"))
    for event in filter(None, history.get("events", "").split(";")):
        at_ms, _, what = event.partition(" ")
        events.append((int(at_ms), what))
    kept = sum(int(count) for name, count in history.items() if name.startswith("kept:"))
    started_ms = int(history.get("started_ms", 0))
    noted = f"{started_ms} taken by" in history.get("events", "")
    if started_ms and not noted:
        events.append((started_ms, f"taken by {history['worker']}"))
    if kept:
        events.append((started_ms, f"{kept} tokens in {history['checkpoints']} checkpoints"))
    if "deadline_ms" in history:
        events.append((int(history["deadline_ms"]), "deadline"))
    if "finished_ms" in history:
        events.append((int(history["finished_ms"]), f"answered: {history['status']}"))
    return sorted(events, key=lambda event: event[0])


def _answers(reply: Reply) -> list[str]:
    if not reply.response:
        return ["", "its owner has collected the answer; only this is kept of it"]
    lines: list[str] = []
    for state in reply.states:
        lines += [
            "",
            f"sample {state.index}: {len(state.response_ids)} tokens, "
            f"mean log-probability {mean_logprob(state):.3f}, {state.finish_reason}",
            state.text,
        ]
    return lines


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000).astimezone().isoformat(" ", "milliseconds")
