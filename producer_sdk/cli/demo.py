"""`rolloutq demo`: a fleet on this machine answers every job although one of its workers is killed."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Never

from producer_sdk.cli.demo_jobs import SAMPLES, Sent, send_all
from producer_sdk.cli.demo_report import table, verdict
from producer_sdk.cli.process import ended_by_signals
from producer_sdk.cli.screen import say, show
from producer_sdk.cli.server import free_port
from producer_sdk.cli.stack import Plan, Stack, threads_each
from producer_sdk.cli.where import ask
from producer_sdk.client import Client
from producer_sdk.progress import Progress
from protocols.errors import RolloutError
from protocols.job import JobStatus, Reply
from protocols.queue.broker import Broker

READY_LIMIT_S = 300.0
ANSWER_LIMIT_S = 180.0
STRIKE_LIMIT_S = 60.0
STRIKE_POLL_S = 0.1
STRIKE_JOBS, STRIKE_TOKENS = 2, 40
"""The worker is killed when it holds so many jobs and has generated so many tokens."""
WORKERS = ("anna", "bert")
FLAGS = {"slots": "8", "lease-s": "4", "grace-s": "1"}


@dataclass(frozen=True)
class Fault:
    """A worker that was killed, and the jobs whose leases it took with it."""

    worker: str
    held: frozenset[str]


def demo(*, engine: Literal["torch", "scripted"] = "torch", keep: bool = False) -> None:
    """Show that nothing is lost: a worker is killed in the middle, and every job is answered.

    Args:
        engine: torch generates with SmolLM2-135M-Instruct on the CPU; scripted needs no model.
        keep: Keep the server and the other worker running afterwards, until Ctrl-C.
    """
    with (
        ended_by_signals(),
        tempfile.TemporaryDirectory(prefix="rolloutq-", ignore_cleanup_errors=True) as folder,
        Stack(_plan(Path(folder), engine)) as stack,
    ):
        try:
            _perform(stack, scripted=engine == "scripted")
        except RolloutError as error:
            say(stack.logs())
            raise type(error)(f"{error.message}\n{_what_next(engine)}") from None
        if keep:
            _keep(stack)


def _plan(folder: Path, engine: str) -> Plan:
    flags = {"engine": engine, **FLAGS, **threads_each(len(WORKERS))}
    return Plan(free_port(), "demo", folder, False, WORKERS, flags, worker_logs=True)


def _perform(stack: Stack, *, scripted: bool) -> None:
    say(f"an embedded server at {stack.where.url}; the workers {' and '.join(WORKERS)} load")
    if not scripted:
        say("SmolLM2-135M-Instruct, fp32 on the CPU (converted once, which takes up to a minute)")
    loading_since = time.monotonic()
    stack.wait_until_serving(READY_LIMIT_S)
    began = time.monotonic()
    say(f"ready after {began - loading_since:.1f} s")
    with Client(stack.where.url, pool=stack.where.pool) as client:
        sent = send_all(client, scripted=scripted)
        fault, replies = _see_through(stack, sent)
    show(
        table(sent, replies, fault.held),
        verdict(replies, fault.worker, fault.held, time.monotonic() - began),
    )
    _check(replies, fault)


def _see_through(stack: Stack, sent: Sequence[Sent]) -> tuple[Fault, list[Reply]]:
    """The replies in the order of the jobs, with a worker killed in between."""
    with Progress(len(sent), shown=True) as bar:
        bar.say(f"{len(sent)} jobs in three dialects, one of them a group of {SAMPLES} samples")
        for job in sent:
            job.answer.add_done_callback(lambda _: bar.advance())
        fault = _strike(stack, [job.job_id for job in sent])
        bar.say(f"killed {fault.worker} (SIGKILL), which held leases of {len(fault.held)} jobs")
        give_up_at = time.monotonic() + ANSWER_LIMIT_S
        return fault, [job.reply(max(0.0, give_up_at - time.monotonic())) for job in sent]


def _strike(stack: Stack, job_ids: Sequence[str]) -> Fault:
    """Kill the worker that holds most, once it is in the middle of them."""
    give_up_at = time.monotonic() + STRIKE_LIMIT_S
    while time.monotonic() < give_up_at:
        held = _held(stack, job_ids)
        victim = max(stack.workers, key=lambda name: len(held[name]))
        tokens = stack.fleet().workers.get(victim, {}).get("generated_tokens", "0")
        if len(held[victim]) >= STRIKE_JOBS and int(tokens) >= STRIKE_TOKENS:
            stack.workers[victim].kill()
            return Fault(victim, frozenset(_held(stack, job_ids)[victim]))
        time.sleep(STRIKE_POLL_S)
    raise RolloutError("no worker could be killed in the middle of its jobs: they ended too soon")


def _held(stack: Stack, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """By worker, the jobs that it holds leases of; of a dead one, until they run out."""

    async def read(broker: Broker) -> list[dict[str, str]]:
        return [await broker.history(job_id) for job_id in job_ids]

    held: dict[str, list[str]] = {name: [] for name in stack.workers}
    for job_id, told in zip(job_ids, ask(stack.where, read), strict=True):
        if told.get("status") == JobStatus.RUNNING:
            held[told["worker"]].append(job_id)
    return held


def _check(replies: Sequence[Reply], fault: Fault) -> None:
    """Raises RolloutError unless every job completed and the fault was one."""
    for reply in replies:
        if reply.status is not JobStatus.COMPLETED:
            raise RolloutError(f"job {reply.job_id} {reply.status}: {reply.exception()}")
        again = reply.attempts > 1 and reply.worker != fault.worker
        if again != (reply.job_id in fault.held):
            raise RolloutError(
                f"job {reply.job_id}: attempt {reply.attempts} on {reply.worker} answered it, "
                f"which does not fit what the killed {fault.worker} held"
            )
    if not fault.held:
        raise RolloutError(f"worker {fault.worker} held nothing any more when it was killed")


def _what_next(engine: str) -> str:
    if engine == "scripted":
        return "next: look at the lines above; `rolloutq up` runs the same fleet in the foreground"
    return "next: `rolloutq demo --engine scripted` shows the same without a model"


def _keep(stack: Stack) -> Never:
    url, pool = stack.where.url, stack.where.pool
    say(f"still running; try `rolloutq status --url {url} --pool {pool}`. Ctrl-C ends it.")
    while True:
        stack.check_server()
        time.sleep(1)
