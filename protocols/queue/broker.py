"""The steps of the function library as typed calls, for both sides; overview.py, control.py and dead.py build on it."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from redis.exceptions import ResponseError

from protocols.control import default_desired
from protocols.errors import (
    InvalidRequest,
    JobConflict,
    PoolNotPrepared,
    QueueFull,
    RolloutError,
    ServerUnavailable,
)
from protocols.job import Job, JobStatus, Reply
from protocols.queue.keys import BELL, GROUP, LANES, Keys
from protocols.queue.link import Argument, Command, ConnectionGone, Link
from protocols.queue.refusals import FULL_RETRY_S, lacks_preparation, refusal
from protocols.queue.rows import (
    REPLY_FIELDS,
    STATUS,
    Beaten,
    Ending,
    Entry,
    Failure,
    Hold,
    Lease,
    Renewal,
    Retrial,
    Swept,
    Taken,
    body_hash,
    ending_args,
    entry_of,
    fields_of,
    hold_args,
    recalled_of,
    reply_of,
    taken_of,
    texts,
    turns_of,
)
from protocols.session import Recalled, SessionTurn

SCHEMA = 1
COPY_WAIT_S = 0.5
EARLY_S = 0.02
MARKS_MOST = 4096
COLLECT_MOST = 1000
SCAN_MOST = 256
FROM_NOW = "$"
"""The last command seen, for who has seen none: it hears of the next."""
_PARTS = ("functions", "take", "lease", "sweep", "control")
LIBRARY = "".join((files("protocols.queue") / f"{part}.lua").read_text() for part in _PARTS)
LIBRARY_VERSION = int(LIBRARY.partition("local VERSION = ")[2].partition("\n")[0])


class Broker:
    """The queue of one pool, over one link for short calls."""

    def __init__(self, link: Link, pool: str) -> None:
        self.link = link
        self.keys = Keys(pool)

    async def prepare(self) -> None:
        """Load the function library and make groups and pool hash where they are missing.

        Never replaces a newer library. Raises PoolNotPrepared where this user may not.
        """
        try:
            await self._load_library()
            commands: list[list[Argument]] = [
                ["XGROUP", "CREATE", self.keys.jobs(lane), group, "0", "MKSTREAM"]
                for lane in LANES
                for group in (GROUP, BELL)
            ]
            answers = await self.link.calls(commands)
            for answer in answers:
                if isinstance(answer, ResponseError) and not str(answer).startswith("BUSYGROUP"):
                    raise answer
            await self.link.call("HSETNX", self.keys.prefix, "schema", SCHEMA)
        except (ResponseError, ServerUnavailable) as error:
            if not isinstance(error.__cause__ or error, ResponseError):
                raise  # nobody answers, or nobody is let in, whoever asks
            raise PoolNotPrepared(
                f"pool {self.keys.pool} at {self.link.address} cannot be prepared: {error}; "
                "start a worker (rolloutq worker) or `rolloutq up`, whose user may do it"
            ) from None

    async def open(self) -> None:
        """Prepare the pool and let jobs flow: write the default desired state where there is none."""
        await self.prepare()
        fresh = f"{self.keys.desired}:{secrets.token_hex(4)}"
        fields = [part for pair in default_desired().items() for part in pair]
        answers = (
            await self.link.calls(  # a rename, because it comes into being whole or not at all
                [["HSET", fresh, *fields], ["RENAMENX", fresh, self.keys.desired], ["DEL", fresh]]
            )
        )
        if isinstance(answers[0], ResponseError):
            raise refusal(answers[0], self.link.address)

    async def _load_library(self) -> None:
        try:
            there = await self.link.call("FCALL", "rolloutq_version", 1, self.keys.prefix)
        except ResponseError as error:
            if not lacks_preparation(error):
                raise
            there = 0
        if there < LIBRARY_VERSION:
            await self.link.call("FUNCTION", "LOAD", "REPLACE", LIBRARY)

    async def step(self, name: str, *args: Argument, only: int | None = None) -> Any:  # noqa: ANN401
        """The answer of the step `rolloutq_<name>`, as it came; prepares a server that lacks the library."""
        step = self._fcall(name, args)
        try:
            return await self.link.call(*step, only=only)
        except ResponseError as error:
            if not lacks_preparation(error):
                raise refusal(error, self.link.address) from None
        await self.prepare()
        return await self.link.call(*step, only=only)

    def _fcall(self, name: str, args: Sequence[Argument]) -> Command:
        return ("FCALL", f"rolloutq_{name}", 1, self.keys.prefix, *args)

    async def _copied_step(self, replicas: int, name: str, *args: Argument) -> Any:  # noqa: ANN401
        """A step that counts only once so many replicas have it; repeated until then.

        Step and WAIT travel together: after a break, a WAIT alone would ask another connection.
        """
        step = self._fcall(name, args)
        wait: Command = ("WAIT", replicas, int(COPY_WAIT_S * 1000))
        began_s = time.monotonic()
        while True:
            answer, copies = await self.link.calls([step, wait], block_s=COPY_WAIT_S)
            if isinstance(answer, ResponseError):
                if not lacks_preparation(answer):
                    raise refusal(answer, self.link.address)
                await self.prepare()
            elif isinstance(copies, int) and copies >= replicas:
                return answer
            if time.monotonic() - began_s >= self.link.outage_s:
                raise ServerUnavailable(
                    f"fewer than {replicas} replicas of Redis at {self.link.address} acknowledge; "
                    "bring one back, or submit with fewer wait_replicas",
                    retry_after_s=FULL_RETRY_S,
                )

    # what producers call

    async def enqueue(
        self, jobs: Sequence[Job], *, wait_replicas: int = 0
    ) -> list[JobStatus | RolloutError]:
        """For each job its status, or why it was not accepted.

        Returns once `wait_replicas` replicas have the jobs too: a failover to one of them loses
        none. Raises ServerUnavailable where they do not answer for as long as an outage may last.
        """
        args: list[Argument] = []
        for job in jobs:
            fields = list(fields_of(job))
            args += (job.id, job.lane, body_hash(job.protocol, job.body), len(fields), *fields)
        if wait_replicas:
            answers = await self._copied_step(wait_replicas, "enqueue", *args)
        else:
            answers = await self.step("enqueue", *args)
        return [self._accepted(job, answer) for job, answer in zip(jobs, answers, strict=True)]

    def _accepted(self, job: Job, answer: bytes) -> JobStatus | RolloutError:
        if answer == b"conflict":
            return JobConflict(
                f"job id {job.id} was accepted before with another body; choose another id",
                param="id",
            )
        if answer.startswith(b"full"):
            return QueueFull(
                f"pool {self.keys.pool} has reached its backlog limit; wait and submit again",
                retry_after_s=int(answer.split()[1]) / 1000,
            )
        if answer == b"invalid":
            return InvalidRequest("`id`: 1 to 128 of A-Z a-z 0-9 . _ : ~ -", param="id")
        return STATUS[answer]

    async def cancel(self, job_ids: Sequence[str]) -> list[str]:
        """For each: `cancelled`, `stopping`, the terminal status it has, or `unknown`."""
        return [answer.decode() for answer in await self.step("cancel", *job_ids)]

    async def replies(self, job_ids: Sequence[str]) -> list[Reply | JobStatus | None]:
        """For each its terminal reply, its status while it has none, or None where it is unknown."""
        commands = [["HMGET", self.keys.reply(job_id), *REPLY_FIELDS] for job_id in job_ids]
        answers = self._granted(await self.link.calls(commands))
        return [reply_of(job_id, row) for job_id, row in zip(job_ids, answers, strict=True)]

    async def collected(self, ends: Sequence[tuple[str, int]]) -> None:
        """Say that their owner has the replies of these jobs, which ended at that server time in ms.

        Ten minutes later only tombstones are kept.
        """
        for start in range(0, len(ends), COLLECT_MOST):
            some = ends[start : start + COLLECT_MOST]
            await self.step("collect", *[mark for end in some for mark in end])

    async def news(self, inbox: str, *, most: int, block_s: float) -> list[str]:
        """Ids of finished jobs, and with a `+` before them of jobs with new frames, as soon as there are any.

        Holds the link for as long as `block_s`.
        """
        found = await self.link.call(
            "BLMPOP", block_s, 1, self.keys.inbox(inbox), "LEFT", "COUNT", most, block_s=block_s
        )
        return [raw.decode() for raw in found[1]] if found else []

    async def progress(self, places: Sequence[tuple[str, str]], *, most: int) -> list[list[Entry]]:
        """For each job id and entry id, up to `most` entries of its progress stream after that; `0` is before all."""
        commands: list[Command] = [
            ("XRANGE", self.keys.progress(job_id), f"({after}", "+", "COUNT", most)
            for job_id, after in places
        ]
        answers = self._granted(await self.link.calls(commands))
        return [[entry_of(raw) for raw in rows] for rows in answers]

    def _granted(self, answers: list[Any]) -> list[Any]:
        """Answers, none of which is a refusal."""
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise refusal(answer, self.link.address)
        return answers

    async def protocol(self, job_id: str) -> str | None:
        """The dialect of a job; None where the job is unknown."""
        (name,) = await self.link.call("HMGET", self.keys.reply(job_id), "protocol")
        return None if name is None else name.decode()

    async def run_ids(self, run: str) -> list[str]:
        """A run's job ids in the order of their acceptance."""
        return [raw.decode() for raw in await self.link.call("ZRANGE", self.keys.run(run), 0, -1)]

    async def turns(self, session: str) -> list[SessionTurn]:
        """A session's turns in the order of their acceptance; empty where it is unknown."""
        found: dict[bytes, bytes] = {}
        cursor = b"0"
        while True:
            key = self.keys.session(session)
            cursor, flat = await self.link.call("HSCAN", key, cursor, "COUNT", SCAN_MOST)
            found.update(zip(flat[::2], flat[1::2], strict=True))
            if cursor in (b"0", 0):
                return turns_of(found)

    async def forget(self, session: str) -> bool:
        """Delete a session; whether there was one."""
        return await self.link.call("UNLINK", self.keys.session(session)) == 1

    # what workers call

    async def take(
        self,
        worker: str,
        nonce: str,
        slots: int,
        *,
        lease_ms: int,
        policy_version: int,
        holding: int = 0,
        bell_s: float = 0.0,
    ) -> Taken:
        """Read up to `slots` jobs and begin them, for a worker that holds `holding` already.

        With `bell_s` only once a job has arrived in any lane, or after so long; that holds the link.
        Then it gives new jobs, or none where others wait to go on, for the worker may be frozen by now.
        The same nonce gives the same jobs again.
        """
        args = (worker, nonce, slots, lease_ms, policy_version, holding)
        if not bell_s:
            return taken_of(await self.step("take", *args))
        row = await self._take_when_rung(bell_s, args)
        if row is not None:
            return taken_of(row)
        return taken_of(await self.step("take", *args))._replace(again=True)

    async def _take_when_rung(self, bell_s: float, args: Sequence[Argument]) -> list[Any] | None:
        """The answer to a take that travels behind the wait for the bell: between them the server asks nobody.

        None where it is to be asked again, without a wait: it may have begun jobs.
        """
        streams = [self.keys.jobs(lane) for lane in LANES]
        group: Command = ("GROUP", BELL, BELL, "COUNT", 1, "BLOCK", int(bell_s * 1000), "NOACK")
        bell: Command = ("XREADGROUP", *group, "STREAMS", *streams, *(">" for _ in streams))
        began_s = time.monotonic()
        try:
            answers = await self.link.calls(
                [bell, self._fcall("take", (*args, 1))], block_s=bell_s, only=self.link.opened
            )
        except ConnectionGone:
            return None
        rung, row = answers
        refusals = [answer for answer in answers if isinstance(answer, ResponseError)]
        # whatever the bell has said, jobs that were begun count
        if refusals and (row is refusals[-1] or not row[1]):
            if not lacks_preparation(refusals[-1]):
                raise refusal(refusals[-1], self.link.address)
            await self.prepare()
            return None
        if not (rung or row[1]) and time.monotonic() - began_s < EARLY_S:
            await asyncio.sleep(EARLY_S)  # a wait that somebody ended early shall not become a spin
        return row

    async def give_up_take(self, worker: str, nonce: str) -> list[Lease]:
        """What a take has begun whose answer was not waited for; should it come after this, it begins nothing."""
        return taken_of(await self.step("take", worker, nonce, 0, 0, 0, 0)).leases

    async def renew(self, holds: Sequence[Hold], *, lease_ms: int) -> list[Renewal]:
        """Extend leases and write down what was generated."""
        args = [arg for hold in holds for arg in hold_args(hold)]
        return [answer.decode() for answer in await self.step("renew", lease_ms, *args)]

    async def finish(self, endings: Sequence[Ending]) -> list[bool]:
        """For each whether its reply was accepted; False: the lease was lost, nothing was written.

        A completed job whose deadline has passed, or which is too stale by now, gets an `expired` reply
        with its state instead. The turns of an accepted answer are in its session with its reply, or not at all.
        """
        args = [arg for end in endings for arg in ending_args(end)]
        return [answer == 1 for answer in await self.step("finish", *args)]

    async def recall(self, lease: Lease, session: str, marks: Sequence[str]) -> Recalled:
        """The turns of a session up to the longest of these beginnings that it knows; the longest come first.

        A job that has tokens stays with the turn that they go on from.
        """
        args = (lease.job_id, lease.fence, session, *marks[:MARKS_MOST])
        return recalled_of(await self.step("recall", *args))

    async def fail(self, failures: Sequence[Failure], *, limit: int) -> list[Retrial]:
        """For each whether it will run again, has become a dead letter, or was lost."""
        args: list[Argument] = [limit]
        for failure in failures:
            args += (*hold_args(failure.hold), failure.delay_ms, failure.message)
        return [answer.decode() for answer in await self.step("fail", *args)]

    async def release(self, holds: Sequence[Hold]) -> list[bool]:
        """Hand jobs back with what was generated; for each whether the lease was still held."""
        args = [arg for hold in holds for arg in hold_args(hold)]
        return [answer == 1 for answer in await self.step("release", *args)]

    async def sweep(
        self,
        *,
        most: int,
        crash_limit: int,
        reclaim: bool,
        orphan_ms: int,
        only: int | None = None,
    ) -> Swept:
        """Reclaim, promote, expire and tidy up to `most` jobs each; `orphan_ms` 0 looks for no orphans.

        `only` names the connection on which `reclaim` was found right, as in `Link.calls`: the step
        must not reach a server that has just come back.
        """
        args = (most, crash_limit, int(reclaim), orphan_ms)
        return Swept(*await self.step("sweep", *args, only=only))

    async def beat(
        self,
        worker: str,
        facts: Mapping[str, str | int],
        *,
        ttl_ms: int,
        desired: Mapping[str, str] | None = None,
        seen: str = FROM_NOW,
        acks: Mapping[str, bytes] | None = None,
    ) -> Beaten:
        """Say that a worker lives, bring its answers to commands (by command id), and hear of new ones.

        `desired` is written where the server has none, or an older one. `seen` is the last command that the worker
        has heard of.
        """
        wanted = _flat(desired or {})
        answered = _flat(acks or {})
        now_ms, flat, seen_now, rows = await self.step(
            "beat",
            worker,
            ttl_ms,
            seen,
            len(wanted),
            *wanted,
            len(answered),
            *answered,
            *_flat(facts),
        )
        return Beaten(now_ms, texts(flat), seen_now.decode(), rows)

    async def leave(self, worker: str) -> None:
        """Say that a worker is gone for good; a sweep forgets it with what the groups know of it."""
        await self.link.calls(
            [["ZADD", self.keys.workers, 0, worker], ["DEL", self.keys.worker(worker)]]
        )


def _flat(fields: Mapping[str, str | int | bytes]) -> list[Argument]:
    return [part for pair in fields.items() for part in pair]
