"""The real functions against a model of the promise, under any order of steps.

Whatever workers, clients and faults do: a job has at most one accepted reply, which never changes;
it is never lost; and when all have ended nothing is left.
"""

import asyncio
import itertools
import uuid
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from protocols.errors import JobConflict
from protocols.job import Job, JobStatus, Reply
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from protocols.queue.rows import Ending, Failure, Hold, Lease
from tests.pool_look import Look
from tests.servers import both_servers

CRASH_LIMIT = FAIL_LIMIT = 3
WORKERS = ("w1", "w2")
IDS = ("a", "b")
BODIES = (b'{"body": 1}', b'{"body": 2}')
LANES = st.sampled_from(["high", "normal", "low"])
EXAMPLES, STEPS = 60, 40

Value = TypeVar("Value")


@dataclass
class Expected:
    """What the model knows of a job."""

    body: bytes
    status: str = "queued"
    fence: str = ""
    attempts: int = 0
    crashes: int = 0
    fails: int = 0
    cancel: bool = False
    delayed: bool = False
    reply: bytes | None = None
    """Of a finish that was accepted."""


@dataclass
class Held:
    """A lease as its holder has it, lost or not."""

    lease: Lease
    finished: bool | None = None
    """What the server said to its finish."""


@dataclass
class Setting:
    """What all examples share."""

    url: str
    runner: asyncio.Runner
    link: Link = field(init=False)

    def __post_init__(self) -> None:
        self.link = Link(self.url, name="machine")


class Machine(RuleBasedStateMachine):
    """Two workers, some clients, and whatever can go wrong between them."""

    leases: "Bundle[Held]" = Bundle("leases")

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._runner = setting.runner
        pool = f"m-{uuid.uuid4().hex[:10]}"
        self.broker = Broker(setting.link, pool)
        self.look = Look(setting.url, pool)
        self.jobs: dict[str, Expected] = {}
        self.last_take: dict[str, tuple[str, list[Held]]] = {}
        self.count = itertools.count()
        self.run(self.broker.open())

    def run(self, call: Coroutine[Any, Any, Value]) -> Value:
        return self._runner.run(call)

    # clients

    @rule(job_id=st.sampled_from(IDS), body=st.sampled_from(BODIES), lane=LANES)
    def enqueue(self, job_id: str, body: bytes, lane: Any) -> None:  # noqa: ANN401
        known = self.jobs.get(job_id)
        (answer,) = self.run(self.broker.enqueue([Job(id=job_id, body=body, lane=lane)]))
        if known is None:
            self.jobs[job_id] = Expected(body)
            assert answer is JobStatus.QUEUED
        elif known.body == body:
            assert answer == known.status
        else:
            assert isinstance(answer, JobConflict)

    @rule(lane=LANES)
    def add_raw(self, lane: str) -> None:
        job_id = f"raw-{next(self.count)}"
        self.look("XADD", self.broker.keys.jobs(lane), "*", "id", job_id, "body", BODIES[0])
        self.jobs[job_id] = Expected(BODIES[0], status="unborn")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), lane=LANES)
    def add_raw_copy(self, data: st.DataObject, lane: str) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        body = self.jobs[job_id].body
        self.look("XADD", self.broker.keys.jobs(lane), "*", "id", job_id, "body", body)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        (answer,) = self.run(self.broker.cancel([job_id]))
        if job.status == "queued":
            job.status, job.delayed = "cancelled", False
            assert answer == "cancelled"
        elif job.status == "running":
            job.cancel = True
            assert answer == "stopping"
        else:
            assert answer == ("unknown" if job.status == "unborn" else job.status)

    # workers

    @rule(target=leases, worker=st.sampled_from(WORKERS), slots=st.integers(1, 3))
    def take(self, worker: str, slots: int) -> MultipleResults[Held]:
        nonce = f"n{next(self.count)}"
        taken = self._take(worker, nonce, slots)
        assert len(taken) <= slots
        held = [self._begun(lease, nonce) for lease in taken]
        self.last_take[worker] = (nonce, held)
        return multiple(*held)

    def _take(self, worker: str, nonce: str, slots: int) -> list[Lease]:
        call = self.broker.take(worker, nonce, slots, lease_ms=3600_000, policy_version=0)
        return self.run(call).leases

    def _begun(self, lease: Lease, nonce: str) -> Held:
        job = self.jobs[lease.job_id]
        assert job.status in ("queued", "unborn")
        assert not job.delayed
        job.attempts += 1
        assert lease.fence == f"{job.attempts}:{nonce}"
        assert lease.fields[b"body"] == job.body
        job.status, job.fence = "running", lease.fence
        return Held(lease)

    @rule(worker=st.sampled_from(WORKERS))
    def take_again_after_a_lost_answer(self, worker: str) -> None:
        if worker not in self.last_take:
            return
        nonce, held = self.last_take[worker]
        again = self._take(worker, nonce, 3) if held else []
        assert again == [one.lease for one in held if self._holds(one)]

    def _holds(self, held: Held) -> bool:
        job = self.jobs[held.lease.job_id]
        return job.status == "running" and job.fence == held.lease.fence

    @rule(held=leases)
    def renew(self, held: Held) -> None:
        hold = Hold(held.lease.job_id, held.lease.fence)
        (answer,) = self.run(self.broker.renew([hold], lease_ms=3600_000))
        wish = "cancel" if self.jobs[held.lease.job_id].cancel else "held"
        assert answer == (wish if self._holds(held) else "lost")

    @rule(held=leases)
    def finish(self, held: Held) -> None:
        job = self.jobs[held.lease.job_id]
        accepted = self._holds(held) or held.finished is True
        answer = f"answer {next(self.count)}".encode()  # a second finish would be seen
        ending = Ending(held.lease.job_id, held.lease.fence, JobStatus.COMPLETED, 200, answer)
        assert self.run(self.broker.finish([ending])) == [accepted]
        if self._holds(held):
            assert job.reply is None
            job.status, job.reply = "completed", answer
        held.finished = accepted

    @rule(held=consumes(leases), delay_ms=st.sampled_from([0, 3600_000]), repeat=st.booleans())
    def fail(self, held: Held, delay_ms: int, repeat: bool) -> None:
        job = self.jobs[held.lease.job_id]
        failure = Failure(Hold(held.lease.job_id, held.lease.fence), delay_ms, "broke")
        expected = "lost"
        if self._holds(held) and job.cancel:
            expected, job.status = "dead", "cancelled"
        elif self._holds(held):
            job.fails += 1
            expected = "dead" if job.fails >= FAIL_LIMIT else "retry"
            job.status = "failed" if expected == "dead" else "queued"
            job.delayed = expected == "retry"
        elif held.finished:
            return  # its holder is done with it
        for _ in range(1 + repeat):
            assert self.run(self.broker.fail([failure], limit=FAIL_LIMIT)) == [expected]

    @rule(held=consumes(leases), repeat=st.booleans())
    def release(self, held: Held, repeat: bool) -> None:
        if held.finished:
            return
        holds = self._holds(held)
        if holds:
            job = self.jobs[held.lease.job_id]
            job.status = "cancelled" if job.cancel else "queued"
        hold = Hold(held.lease.job_id, held.lease.fence)
        for _ in range(1 + repeat):
            assert self.run(self.broker.release([hold])) == [holds]

    # faults and time

    @precondition(lambda self: any(job.status == "running" for job in self.jobs.values()))
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        running = sorted(i for i, job in self.jobs.items() if job.status == "running")
        job_id = data.draw(st.sampled_from(running))
        job = self.jobs[job_id]
        self.look("ZADD", self.broker.keys.leases, 1, job_id)
        swept = self._sweep()
        job.crashes, job.fence = job.crashes + 1, ""
        dead = job.crashes >= CRASH_LIMIT and not job.cancel
        job.status = "cancelled" if job.cancel else "failed" if dead else "queued"
        assert (swept["reclaimed"], swept["dead"]) == (0 if dead else 1, 1 if dead else 0)

    @rule()
    def sweep(self) -> None:
        swept = self._sweep()
        assert (swept["reclaimed"], swept["dead"], swept["expired"]) == (0, 0, 0)

    @rule()
    def wait_for_the_delayed(self) -> None:
        for job_id, job in self.jobs.items():
            if job.delayed:
                self.look("ZADD", self.broker.keys.delayed, "XX", 1, job_id)
        self._sweep()

    def _sweep(self) -> dict[str, int]:
        due = self.look("ZRANGEBYSCORE", self.broker.keys.delayed, "-inf", self.look.now_ms())
        call = self.broker.sweep(most=200, crash_limit=CRASH_LIMIT, reclaim=True, orphan_ms=0)
        swept = self.run(call)._asdict()
        assert swept["promoted"] >= len(due)
        waiting = {raw.decode() for raw in self.look("ZRANGE", self.broker.keys.delayed, 0, -1)}
        for job_id, job in self.jobs.items():
            job.delayed = job_id in waiting
        return swept

    # what always holds

    @invariant()
    def the_server_agrees(self) -> None:
        for job_id, job in self.jobs.items():
            kept = self.look.reply(job_id)
            assert kept.get("status", "unborn") == job.status
            assert job.reply is None or kept["body"] == job.reply.decode()
            assert (self.look.lease_ms(job_id) is not None) == (job.status == "running")

    def teardown(self) -> None:
        try:
            self._end_all()
            assert self.look.left() == []
            assert len(self.look("KEYS", self.broker.keys.reply("*"))) == len(self.jobs)
            replies = self.run(self.broker.replies(list(self.jobs)))
            for (job_id, job), reply in zip(self.jobs.items(), replies, strict=True):
                assert isinstance(reply, Reply), f"{job_id} has no reply"
                assert reply.status == job.status
                assert job.reply is None or reply.body == job.reply
        finally:
            self.look.close()

    def _end_all(self) -> None:
        """A worker that lives: it takes and answers all that is waiting; the leases of the others run out."""
        for _ in range(2 * CRASH_LIMIT + FAIL_LIMIT + 3):
            for job_id, job in self.jobs.items():
                if job.status == "running":
                    self.look("ZADD", self.broker.keys.leases, 1, job_id)
            swept = self._sweep()
            self.wait_for_the_delayed()
            for job_id, job in self.jobs.items():
                job.status = self.look.reply(job_id).get("status", job.status)
            if not swept["reclaimed"] and not self._answer_all():
                return

    def _answer_all(self) -> int:
        count = 0
        while leases := self._take("last", nonce := f"n{next(self.count)}", 50):
            for held in [self._begun(lease, nonce) for lease in leases]:
                self.finish(held)
                count += 1
        return count


@pytest.fixture
def setting(url: str) -> Iterator[Setting]:
    with asyncio.Runner() as runner:
        made = Setting(url, runner)
        yield made
        runner.run(made.link.close())


@both_servers
def test_any_order_of_steps_keeps_the_promise(setting: Setting) -> None:
    run_state_machine_as_test(
        cast("type[Machine]", lambda: Machine(setting)),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
