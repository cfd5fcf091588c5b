"""`rolloutq cancel`: end jobs that nobody wants any more."""

from producer_sdk.cli.where import Where, ask
from producer_sdk.client import Client
from protocols.errors import ConfigError, JobNotFound

ANSWER_S = 60.0


def cancel(
    job_id: str | None = None,
    /,
    *,
    run: str | None = None,
    where: Where = Where(),  # noqa: B008 - frozen
) -> None:
    """Cancel a job, or all jobs of a run.

    Args:
        job_id: The job.
        run: The run.
        where: Server and pool.
    """
    if run is not None and job_id is None:
        with Client(where.url, pool=where.pool) as client:
            print(f"cancelled {client.cancel(run=run).result(ANSWER_S)} jobs of run {run}")
    elif job_id is not None and run is None:
        print(_cancel_one(where, job_id))
    else:
        raise ConfigError("give either a job's id or --run RUN")


def _cancel_one(where: Where, job_id: str) -> str:
    (answer,) = ask(where, lambda broker: broker.cancel([job_id]))
    if answer == "unknown":
        raise JobNotFound(f"no job {job_id} in pool {where.pool}, or its reply has expired")
    if answer == "cancelled":
        return f"job {job_id} is cancelled"
    if answer == "stopping":
        return f"job {job_id} is running; its worker ends it"
    return f"job {job_id} had ended already: {answer}"
