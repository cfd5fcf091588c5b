"""`rolloutq worker --probe health|ready`: how a worker is, for a supervisor, from its last heartbeat."""

import socket
from typing import Literal

from protocols.errors import ConfigError
from protocols.queue import overview
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from worker.config import Config
from worker.launcher import groups

SEEN_MS = 10_000
"""A worker whose last heartbeat is older is not live."""
OUTAGE_S = 3.0
GOOD, BAD = 0, 1

Question = Literal["health", "ready"]


async def probe(config: Config, question: Question) -> int:
    """Print one line about a worker and return 0, or 1 where it is not well.

    Without `--worker-id` it is the only live one of this host, with `--gpus` all that there shall be. Raises
    ConfigError where that is not clear, and ServerUnavailable where no server tells.
    """
    link = Link(config.url, name="rolloutq-probe", outage_s=OUTAGE_S)
    try:
        workers = await overview.workers(Broker(link, config.pool), seen_ms=SEEN_MS)
    finally:
        await link.close()
    named = "worker_id" in config.model_fields_set
    if config.gpus and not named:
        return _all(workers, question, len(groups(config.gpus, config.tp)))
    worker = config.worker_id if named else _only_one(workers, config.pool)
    told = workers.get(worker, {}).get(question, f"no heartbeat within {SEEN_MS // 1000} s")
    print(f"{worker}: {question}: {told}")
    return GOOD if told == "ok" else BAD


def _all(workers: dict[str, dict[str, str]], question: Question, expected: int) -> int:
    """Whether so many of this host are well."""
    here = {name: workers[name] for name in _of_this_host(workers)}
    ill = [
        f"{name}: {told.get(question)}" for name, told in here.items() if told.get(question) != "ok"
    ]
    told = ", ".join(ill) or "ok"
    print(f"{len(here)} of {expected} workers: {question}: {told}")
    return GOOD if len(here) >= expected and not ill else BAD


def _of_this_host(workers: dict[str, dict[str, str]]) -> list[str]:
    host = socket.gethostname()
    return sorted(name for name, told in workers.items() if told.get("host") == host)


def _only_one(workers: dict[str, dict[str, str]], pool: str) -> str:
    """The worker of this host; without one, words in its place that have no heartbeat."""
    here = _of_this_host(workers)
    if not here:
        return f"any worker of pool {pool} on host {socket.gethostname()}"
    if len(here) == 1:
        return here[0]
    raise ConfigError(
        f"--worker-id: say which; live workers of pool {pool} on this host: {', '.join(here)}",
        param="worker_id",
    )
