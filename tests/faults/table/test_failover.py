"""A replica takes over after a partition: what it had acknowledged is not lost."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from producer_sdk import Client, Future, Reply
from protocols import codec
from protocols.job import Job, JobStatus
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from tests.faults.harness import record, script
from tests.faults.harness.failover import Pair
from tests.faults.harness.fork import StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.pool_look import wait_until
from tests.servers import StartServer

BATCH = 40
TOKENS = 12
PARTITION_S = 1.0
LEASE_S = 2.0


@pytest.fixture
def pair(fresh_server: StartServer) -> Iterator[Pair]:
    """Two servers of the test's own."""
    with Pair(fresh_server) as made:
        yield made


@pytest.fixture
def url(pair: Pair) -> str:
    """Its URL stands for the shared one."""
    return pair.url


class Producer:
    """Enqueues batches one after another and forgets them: what is accepted is the server's business."""

    def __init__(self, url: str, pool: str, name: str, *, wait_replicas: int) -> None:
        self._link = Link(url, name=name)
        self._broker = Broker(self._link, pool)
        self._name, self._wait_replicas = name, wait_replicas
        self._grown = asyncio.Condition()
        self.accepted: list[str] = []
        self.longest_s = 0.0
        """The longest that one batch was under way."""

    async def produce(self, seed: int, count: int) -> None:
        """Until so many are accepted."""
        while len(self.accepted) < count:
            await self.batch(seed)

    async def close(self) -> None:
        """Disconnect."""
        await self._link.close()

    async def until_accepted(self, count: int) -> None:
        """Return when so many are."""
        async with self._grown:
            await self._grown.wait_for(lambda: len(self.accepted) >= count)

    async def batch(self, seed: int) -> None:
        """One batch."""
        ids = [f"{self._name}-{len(self.accepted) + number}" for number in range(BATCH)]
        bodies = [codec.encode_json(script.body(script.text_of(seed, i, TOKENS))) for i in ids]
        jobs = [Job(id=job_id, body=body) for job_id, body in zip(ids, bodies, strict=True)]
        began_s = time.monotonic()
        answers = await self._broker.enqueue(jobs, wait_replicas=self._wait_replicas)
        self.longest_s = max(self.longest_s, time.monotonic() - began_s)
        async with self._grown:
            self.accepted += [
                i for i, answer in zip(ids, answers, strict=True) if isinstance(answer, JobStatus)
            ]
            self._grown.notify_all()


@pytest.mark.timeout(300)
async def test_what_a_replica_acknowledged_outlives_a_failover(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    pair: Pair,
    fork: StartFork,
    pool: str,
    url: str,
) -> None:
    line = row("replica promoted after a partition, wait_replicas=1")
    count, rounds = (12_000, 3) if full else (2_000, 1)
    for _ in range(2):
        fork(slots=32, lease_s=LEASE_S)
    sure = Producer(url, pool, "sure", wait_replicas=1)
    hasty = Producer(url, pool, "hasty", wait_replicas=0)
    producing = asyncio.create_task(sure.produce(seed, count))
    line.recovery_s = 0.0
    names = [f"client-{number}" for number in range(300)]
    with Client(url, pool=pool, wait_replicas=1) as client:
        futures: list[tuple[str, Future[Reply]]] = []
        for number in range(rounds):
            await sure.until_accepted((number + 1) * count // (rounds + 2))
            await hasty.batch(seed)
            pair.partition()
            before = len(hasty.accepted)
            for name in names[number::rounds]:
                body = script.body(script.text_of(seed, name, TOKENS))
                futures.append((name, client.submit(body, job_id=name)))
            until_s = time.monotonic() + PARTITION_S
            while time.monotonic() < until_s:
                await hasty.batch(seed)
            gone = hasty.accepted[before:]
            stuck, led_s = len(sure.accepted), await asyncio.to_thread(pair.promote)
            line.tried += 1
            line.happened += await _any_unknown(pair, pool, gone)
            await sure.until_accepted(stuck + 1)
            line.recovery_s = max(line.recovery_s, time.monotonic() - led_s)
        await producing
        replies = [(name, await asyncio.wait_for(future, 120)) for name, future in futures]
    for link in (sure, hasty, broker.link):
        await link.close()
    await asyncio.to_thread(_until_all_have_ended, pair, pool, sure.accepted)
    pair.primary.stop()

    seen = record.read_record(pair.primary.folder, pool)
    ends = {job_id: fields[0] for (job_id, _), fields in seen.ends.items()}
    line.lost = sum(
        not script.right(reply.state, script.text_of(seed, name, TOKENS)) for name, reply in replies
    ) + sum(not _right(ends.get(job_id, {}), seed, job_id) for job_id in sure.accepted)
    line.double = seen.double
    vanished = sum(job_id not in ends for job_id in hasty.accepted)
    line.note = (
        f"{len(sure.accepted) + len(replies):,} accepted; without wait_replicas {vanished} of "
        f"{len(hasty.accepted)} were lost"
    )
    assert line.happened == rounds
    assert sure.longest_s >= PARTITION_S / 2, "nothing waited for the replica"
    assert vanished > 0
    assert line.lost == 0
    assert line.double == 0


async def _any_unknown(pair: Pair, pool: str, job_ids: list[str]) -> bool:
    """Whether the new primary lacks some of these: the failover lost what the old one had accepted."""
    look = Watch(pair.primary.url, pool)
    unknown = look.statuses(job_ids).get(None, 0)
    look.close()
    return unknown > 0


def _until_all_have_ended(pair: Pair, pool: str, job_ids: list[str]) -> None:
    look = Watch(pair.primary.url, pool)
    wait_until(lambda: not look.left(), "all jobs have ended", timeout_s=120)
    look.close()


def _right(end: dict[bytes, bytes], seed: int, job_id: str) -> bool:
    states = codec.unpack_states(end[b"state"]) if b"state" in end else ()
    return len(states) == 1 and script.right(states[0], script.text_of(seed, job_id, TOKENS))
