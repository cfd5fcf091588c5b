"""`rolloutq submit`: one job from the command line."""

import secrets
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from producer_sdk.cli import FAILED, GOOD
from producer_sdk.cli.answer import failure, fields, texts
from producer_sdk.cli.request import asking, read_body
from producer_sdk.cli.screen import AsJson, print_json, say
from producer_sdk.cli.where import Where, ask
from producer_sdk.client import Client, JobOptions
from producer_sdk.fleet import SEEN_MS
from producer_sdk.future import Future
from protocols import codec
from protocols.errors import InvalidRequest, NoLiveWorker, RolloutError
from protocols.job import Job, JobStatus, Lane, Reply
from protocols.queue import overview
from protocols.queue.broker import Broker
from protocols.queue.rows import check_job

MOST_S = 1e9


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class How:
    """What a job carries beside its body."""

    protocol: str = "openai.chat"
    """The dialect: openai.chat, claude.messages or generate."""
    job_id: Annotated[str | None, Parameter(name="--id")] = None
    """Its id; sent again with the same body, it is the same job."""
    lane: Lane = "normal"
    """How soon it is read."""
    run: Annotated[str | None, Parameter(env_var="ROLLOUTQ_RUN")] = None
    """The run that it belongs to."""
    timeout_s: Annotated[float | None, Parameter(validator=Number(gt=0, lte=MOST_S))] = None
    """Its deadline, in seconds from now; it then ends as expired."""


def submit(
    body: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    prompt: str | None = None,
    max_tokens: int = 256,
    how: How = How(),
    wait: bool = True,
    no_worker_s: Annotated[float, Parameter(env_var="ROLLOUTQ_NO_WORKER_S")] = 5.0,
    as_json: AsJson = False,
    where: Where = Where(),  # noqa: B008 - frozen
) -> int:
    """Send a job.

    Args:
        body: A request body, JSON; `-` reads it from standard input, `@file` from a file.
        prompt: Instead of a body, what one user says.
        max_tokens: With a prompt, the most tokens of the answer.
        how: What the job carries beside its body.
        wait: Wait for the answer, or only say that the job is accepted.
        no_worker_s: How long to wait while the pool has no live worker.
        as_json: Print the whole reply.
        where: Server and pool.
    """
    request = _request(body, prompt, how.protocol, max_tokens)
    job = check_job(_job(request, how))
    if not wait:
        status = ask(where, partial(_enqueue, job=job))
        if as_json:
            print_json({"job_id": job.id, "status": status})
        else:
            print(job.id)
        return GOOD
    if not ask(where, partial(overview.live_workers, seen_ms=SEEN_MS)):
        say(f"no live worker for pool {where.pool} yet")
    options = JobOptions(job_id=job.id, lane=how.lane)
    if how.timeout_s is not None:
        options["timeout_s"] = how.timeout_s
    with Client(where.url, pool=where.pool, run=how.run, no_worker_s=no_worker_s) as client:
        reply = _await(client.submit(request, protocol=how.protocol, **options))
    return _print_reply(reply, as_json=as_json)


def _job(request: dict[str, Any], how: How) -> Job:
    return Job(
        id=how.job_id or f"job-{secrets.token_hex(6)}",
        body=codec.encode_json(request),
        protocol=how.protocol,
        lane=how.lane,
        run=how.run,
        timeout_ms=None if how.timeout_s is None else max(1, int(how.timeout_s * 1000)),
    )


def _request(
    body: str | None, prompt: str | None, protocol: str, max_tokens: int
) -> dict[str, Any]:
    if prompt is not None and body is None:
        return asking(prompt, protocol, max_tokens=max_tokens)
    if body is not None and prompt is None:
        return read_body(body)
    raise InvalidRequest("give either a body (JSON, `-` or `@file`) or --prompt 'some text'")


async def _enqueue(broker: Broker, job: Job) -> JobStatus:
    (answer,) = await broker.enqueue([job])
    if isinstance(answer, RolloutError):
        raise answer
    return answer


def _await(future: Future[Reply]) -> Reply:
    try:
        return future.result()
    except (NoLiveWorker, KeyboardInterrupt):
        say(f"job {future.job_id} stays; ask for it with `rolloutq job {future.job_id}`")
        raise


def _print_reply(reply: Reply, *, as_json: bool) -> int:
    failed = failure(reply)
    if as_json:
        print_json(fields(reply))
    elif failed is None:
        print(*texts(reply), sep="\n")
    if failed is not None:
        say(f"rolloutq: {failed}")
    return GOOD if failed is None else FAILED
