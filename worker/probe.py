"""`rolloutq worker --probe health|ready`: how a worker is, for a supervisor, from its last heartbeat."""

import socket
from typing import Literal

from protocols.errors import ConfigError
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from worker.config import Config

SEEN_MS = 10_000
"""A worker whose last heartbeat is older is not live."""
OUTAGE_S = 3.0
GOOD, BAD = 0, 1

Question = Literal["health", "ready"]


async def probe(config: Config, question: Question) -> int:
    """Print one line about a worker and return 0, or 1 where it is not well.

    Without `--worker-id` it is the only live one of this host. Raises ConfigError where that is not clear, and
    ServerUnavailable where no server tells.
    """
    link = Link(config.url, name="rolloutq-probe", outage_s=OUTAGE_S)
    try:
        workers = await Broker(link, config.pool).workers(seen_ms=SEEN_MS)
    finally:
        await link.close()
    named = "worker_id" in config.model_fields_set
    worker = config.worker_id if named else _only_one(workers, config.pool)
    told = workers.get(worker, {}).get(question, f"no heartbeat within {SEEN_MS // 1000} s")
    print(f"{worker}: {question}: {told}")
    return GOOD if told == "ok" else BAD


def _only_one(workers: dict[str, dict[str, str]], pool: str) -> str:
    """The worker of this host; without one, words in its place that have no heartbeat."""
    host = socket.gethostname()
    here = sorted(name for name, told in workers.items() if told.get("host") == host)
    if not here:
        return f"any worker of pool {pool} on host {host}"
    if len(here) == 1:
        return here[0]
    raise ConfigError(
        f"--worker-id: say which; live workers of pool {pool} on this host: {', '.join(here)}",
        param="worker_id",
    )
