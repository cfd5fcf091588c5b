"""`rolloutq demo`: a fleet on this machine answers every job although one of its workers is killed."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Never

from producer_sdk.cli.demo_jobs import SAMPLES, STORY, Sent, send_all
from producer_sdk.cli.demo_report import answers, continued, verdict
from producer_sdk.cli.process import ended_by_signals
from producer_sdk.cli.screen import say, show
from producer_sdk.cli.server import free_port
from producer_sdk.cli.stack import Plan, Stack, threads_each
from producer_sdk.cli.where import ask
from producer_sdk.client import Client
from producer_sdk.progress import Progress
from protocols.errors import RolloutError
from protocols.job import JobStatus, Reply
from protocols.queue import overview
from protocols.queue.broker import Broker

READY_LIMIT_S = 300.0
ANSWER_LIMIT_S = 180.0
STRIKE_LIMIT_S = 60.0
STRUCK_TOKENS = 32
"""Of the story are kept before the blow, so that it is seen that they are not generated again."""
STRIKE_POLL_S = 0.05
WORKERS = ("anna", "bert")
FLAGS = {"slots": "8", "lease-s": "4", "grace-s": "1", "checkpoint-tokens": str(STRUCK_TOKENS)}
"""With a checkpoint as soon as there are so many tokens, the shorter jobs are still under way at the blow."""


@dataclass(frozen=True)
class Fault:
    """A worker that was killed, and the jobs whose leases it took with it."""

    worker: str
    held: frozenset[str]
    kept_tokens: int
    """Of the story, checkpointed by then."""


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
    flags = {"engine": engine, "model": "smollm2", **FLAGS, **threads_each(len(WORKERS))}
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
    took_s = time.monotonic() - began
    show(
        *answers(sent, replies, fault.held),
        continued(replies, STORY, fault.kept_tokens),
        verdict(replies, fault.worker, fault.held, took_s),
    )
    check(replies, fault)


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
    """Once a job is answered and enough of the story is kept, kill the worker that generates the story."""
    give_up_at = time.monotonic() + STRIKE_LIMIT_S
    while time.monotonic() < give_up_at:
        jobs = _look(stack, job_ids)
        victim = jobs[STORY].get("worker", "")
        if _answered(jobs) and _kept(jobs) >= STRUCK_TOKENS and STORY in _held(jobs, victim):
            stack.workers[victim].kill()
            jobs = _look(stack, job_ids)
            return Fault(victim, _held(jobs, victim), _kept(jobs))
        if "finished_ms" in jobs[STORY]:
            break
        time.sleep(STRIKE_POLL_S)
    raise RolloutError("no worker could be killed between the story's checkpoints and its end")


def _look(stack: Stack, job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """What the reply keys say, by job."""

    async def read(broker: Broker) -> dict[str, dict[str, str]]:
        return {job_id: await overview.history(broker, job_id) for job_id in job_ids}

    return ask(stack.where, read)


def _answered(jobs: dict[str, dict[str, str]]) -> int:
    return sum("finished_ms" in told for told in jobs.values())


def _kept(jobs: dict[str, dict[str, str]]) -> int:
    """Tokens of the story that the server has."""
    return int(jobs[STORY].get("kept:0", 0))


def _held(jobs: dict[str, dict[str, str]], worker: str) -> frozenset[str]:
    """The jobs that it holds leases of; of a dead one, until they run out."""
    return frozenset(
        job_id
        for job_id, told in jobs.items()
        if told.get("status") == JobStatus.RUNNING and told.get("worker") == worker
    )


def check(replies: Sequence[Reply], fault: Fault) -> None:
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
    if STORY not in fault.held or not fault.kept_tokens:
        raise RolloutError(
            f"worker {fault.worker} held no checkpoint of the story any more when it was killed"
        )


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
