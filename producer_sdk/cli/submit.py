"""`rolloutq submit`: one job from the command line."""

import os
import secrets
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from producer_sdk.cli import FAILED, GOOD
from producer_sdk.cli.answer import failure, fields, texts
from producer_sdk.cli.screen import AsJson, print_json, say
from producer_sdk.cli.where import Where, ask
from producer_sdk.client import Client, JobOptions
from producer_sdk.fleet import SEEN_MS
from producer_sdk.future import Future
from protocols import codec
from protocols.errors import InvalidRequest, NoLiveWorker, RolloutError
from protocols.job import Job, JobStatus, Lane, Reply
from protocols.queue.broker import Broker
from protocols.queue.rows import check_job

_body_decoder = msgspec.json.Decoder(dict[str, Any])


def submit(
    body: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    prompt: str | None = None,
    max_tokens: int = 256,
    protocol: str = "openai.chat",
    job_id: Annotated[str | None, Parameter(name="--id")] = None,
    lane: Lane = "normal",
    timeout_s: float | None = None,
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
        protocol: The dialect: openai.chat, claude.messages or generate.
        job_id: Its id; sent again with the same body, it is the same job.
        lane: How soon it is read.
        timeout_s: Its deadline, in seconds from now; it then ends as expired.
        wait: Wait for the answer, or only say that the job is accepted.
        no_worker_s: How long to wait while the pool has no live worker.
        as_json: Print the whole reply.
        where: Server and pool.
    """
    request = _body_of(body, prompt, protocol, max_tokens)
    job_id = job_id or f"job-{secrets.token_hex(6)}"
    if not wait:
        timeout_ms = None if timeout_s is None else max(1, int(timeout_s * 1000))
        job = Job(job_id, codec.encode_json(request), protocol, lane, timeout_ms=timeout_ms)
        status = ask(where, partial(_enqueue, job=check_job(job)))
        if as_json:
            print_json({"job_id": job_id, "status": status})
        else:
            print(job_id)
        return GOOD
    if not ask(where, partial(Broker.live_workers, seen_ms=SEEN_MS)):
        say(f"no live worker for pool {where.pool} yet")
    options = JobOptions(job_id=job_id, lane=lane)
    if timeout_s is not None:
        options["timeout_s"] = timeout_s
    with Client(where.url, pool=where.pool, no_worker_s=no_worker_s) as client:
        reply = _await(client.submit(request, protocol=protocol, **options))
    return _print_reply(reply, as_json=as_json)


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


def _body_of(
    body: str | None, prompt: str | None, protocol: str, max_tokens: int
) -> Mapping[str, Any]:
    if (body is None) == (prompt is None):
        raise InvalidRequest("give either a body (JSON, `-` or `@file`) or --prompt 'some text'")
    if prompt is not None:
        turns = {"messages": [{"role": "user", "content": prompt}]}
        limit = {"max_tokens": max_tokens}
        return turns | ({"sample_params": limit} if protocol == "generate" else limit)
    return codec.parse_json(_body_decoder, _read(str(body)))


def _read(body: str) -> bytes:
    if body == "-":
        return sys.stdin.buffer.read()
    if not body.startswith("@"):
        return os.fsencode(body)
    try:
        return Path(body[1:]).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{body}: {error.strerror}", param="body") from None
