"""The client's one thread of input and output: what is submitted goes out, what is finished comes in.

It has an event loop and two connections: one for short calls, one that waits on the client's inbox.
The inbox is only a wake-up; the reply key is the truth, so whatever is outstanding is also read
again every few seconds and after a break.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from producer_sdk.fleet import SEEN_MS, no_live_worker
from producer_sdk.following import Batch, Feed, Followers
from producer_sdk.promise import Promise
from protocols.cancellation import cancel
from protocols.errors import (
    Cancelled,
    JobNotFound,
    NoLiveWorker,
    QueueError,
    QueueFull,
    RolloutError,
    ServerUnavailable,
)
from protocols.job import Job, JobStatus, Reply
from protocols.queue import overview
from protocols.queue.broker import Broker
from protocols.queue.coalesce import Coalescer
from protocols.queue.link import Link

if TYPE_CHECKING:
    import concurrent.futures

INBOX_BLOCK_S = 2.0
INBOX_MOST = 1000
READ_MOST = 64
WATCH_S = 2.5
REREAD_MOST = 1000
FOLLOW_S = 0.25
"""How often jobs of other clients that are followed here are looked at."""
QUIET_S = 10.0
"""After so long without a wake-up a stream that is followed is looked at once: wake-ups may be lost."""
CLOSE_S = 10.0
LAST_SENT_S = 6.0
"""How long a client that closes tries to reach a server that is away; with pauses and goodbye less than CLOSE_S."""
GOODBYE_S = 1.0
REFUSED_PAUSE_S = 2.0
ARRIVAL_POLL_S = 0.005
CLOSED = "the client was closed; client.get(job_id) asks again"

Value = TypeVar("Value")
ReplyPromise = Promise[Reply]
Acceptance = JobStatus | RolloutError | Exception
Found = Reply | JobStatus | Exception | None

log = logging.getLogger("rolloutq.client")


class Outstanding:
    """A job that somebody waits for."""

    __slots__ = ("job", "waiters")

    def __init__(self) -> None:
        self.job: Job | None = None
        """Kept until its result, to be submitted again should the server lose it."""
        self.waiters: list[ReplyPromise] = []

    def answer(self, reply: Reply) -> None:
        """Give everybody the reply."""
        for waiter in self.waiters:
            waiter.set_result(reply)

    def fail(self, error: Exception) -> None:
        """Give everybody the error."""
        for waiter in self.waiters:
            waiter.set_exception(error)


class Courier:
    """Carries jobs and replies of one client in one process."""

    def __init__(
        self,
        url: str,
        pool: str,
        *,
        no_worker_s: float,
        wait_replicas: int = 0,
        wait_when_full: bool = True,
        auto_collect: bool = True,
    ) -> None:
        self._pool, self._no_worker_s, self._auto_collect = pool, no_worker_s, auto_collect
        self._wait_replicas, self._wait_when_full = wait_replicas, wait_when_full
        self.pid = os.getpid()
        self.inbox = f"{self.pid}-{secrets.token_hex(6)}"
        self._outstanding: dict[str, Outstanding] = {}
        self._refused: dict[ReplyPromise, tuple[str, Callable[[], None]]] = {}
        """Jobs that wait for room in the backlog: their id, and how to send them again."""
        self._sending: dict[str, bool] = {}
        """Jobs on their way to the server; whether one was heard to have ended meanwhile."""
        self._arriving: deque[tuple[Job | str, ReplyPromise]] = deque()
        self._woken = False
        """Whether the thread will take in what arrives: it was woken, or has jobs to send and looks before it does."""
        self._closing = self._closed = False
        self._alone_since: float | None = None
        self._collected: list[tuple[str, int]] = []
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stopped: asyncio.Event
        self._broker: Broker
        self._enqueue: Coalescer[Job, JobStatus | RolloutError]
        self._read: Coalescer[str, Reply | JobStatus | None]
        self._followers: Followers
        self._pulls: set[Batch] = set()
        self._thread = threading.Thread(target=self._run, name="rolloutq-client", daemon=True)
        self._thread.start()
        self._started.wait()

    # called from any thread

    def submit(self, job: Job) -> ReplyPromise:
        """Send a job; the future gets its reply."""
        return self._arrive(job)

    def get(self, job_id: str) -> ReplyPromise:
        """The reply of a job that this or another process submitted."""
        return self._arrive(job_id)

    def pull(self, feed: Feed, *, again: bool = False) -> Batch:
        """The next entries of a job's progress stream, or the first `again`; none once it has ended without more."""
        batch: Batch = Promise()
        self._pulls.add(batch)
        batch.add_done_callback(self._pulls.discard)
        try:
            self._loop.call_soon_threadsafe(self._pull, feed, batch, again)
        except RuntimeError:  # the client is closed
            self._abandon_pulls()
        return batch

    def leave(self, feed: Feed) -> None:
        """Nobody reads this feed any more."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the feed with it
            self._loop.call_soon_threadsafe(self._followers.leave, feed)

    def ask(self, question: Callable[[Broker], Awaitable[Value]]) -> Promise[Value]:
        """Run a short question on the client's connection."""
        answer: Promise[Value] = Promise()

        async def asked() -> Value:
            self._take_in()
            return await question(self._broker)

        def told(done: "concurrent.futures.Future[Value]") -> None:
            error = RolloutError(CLOSED) if done.cancelled() else done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(error)

        asking = asked()
        try:
            asyncio.run_coroutine_threadsafe(asking, self._loop).add_done_callback(told)
        except RuntimeError:  # the loop has ended meanwhile
            asking.close()
            raise RolloutError(CLOSED) from None
        return answer

    def close(self) -> None:
        """Send what was submitted, then end; jobs go on, their futures fail."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(CLOSE_S)

    def _arrive(self, wanted: Job | str) -> ReplyPromise:
        future: ReplyPromise = Promise()
        if self._closing:
            raise RolloutError("this client is closed; make a new one")
        self._arriving.append((wanted, future))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._take_in)
            except RuntimeError:  # the loop has ended meanwhile
                raise RolloutError(CLOSED) from None
        return future

    # in the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._carry())
        finally:  # the loop has ended: what came too late for it, or what it broke on
            self._closing = self._closed = True
            self._woken = False  # whoever comes later finds the loop closed
            self._take_arrived()
            self._fail_all(RolloutError(CLOSED))
            self._abandon_pulls()

    def _abandon_pulls(self) -> None:
        """Give nothing to who still waits for entries; in any thread, each once."""
        while self._pulls:
            with contextlib.suppress(KeyError):  # another thread was first
                self._pulls.pop().set_result([])

    async def _carry(self) -> None:
        self._stopped = asyncio.Event()
        writing = Link(self._url, name=f"client:{self.inbox}")
        waiting = Link(self._url, name=f"client:{self.inbox}:inbox")
        self._broker = Broker(writing, self._pool)
        self._enqueue = Coalescer(
            partial(self._broker.enqueue, wait_replicas=self._wait_replicas),
            size=lambda job: len(job.body),
            gather=self._take_in,
        )
        self._read = Coalescer(self._broker.replies, size=lambda _: 0, most=READ_MOST)
        self._followers = Followers(self._broker, self._hears_of)
        self._started.set()
        tasks = [
            asyncio.create_task(self._collecting(Broker(waiting, self._pool))),
            asyncio.create_task(self._watching()),
            asyncio.create_task(self._following()),
        ]
        await self._stopped.wait()
        writing.outage_s = LAST_SENT_S
        self._take_in()
        await cancel(*tasks)
        await self._enqueue.close()
        # nothing may be awaited in between: what is put into the coalescer now is nobody's any more
        self._closed = True
        self._fail_all(RolloutError(CLOSED))
        self._followers.close()
        with contextlib.suppress(QueueError, TimeoutError):  # it only saves memory
            async with asyncio.timeout(GOODBYE_S):
                await self._tell_collected()
        # questions and reads under way: to them the end of their connection would look like that of the server
        await cancel(*asyncio.all_tasks() - {asyncio.current_task()})
        await writing.close()
        await waiting.close()

    def _take_in(self) -> None:
        """Take what has arrived. While jobs wait to be sent nobody wakes the thread: before each call it looks again.

        To wake it takes a system call, after which the two threads compete for the interpreter.
        """
        self._take_arrived()
        if not self._enqueue.waiting:
            self._woken = False
            self._take_arrived()  # what came before that was seen

    def _take_arrived(self) -> None:
        while self._arriving:
            wanted, future = self._arriving.popleft()
            if self._closed:
                future.set_exception(RolloutError(CLOSED))
            elif isinstance(wanted, Job):
                self._send(wanted, future)
            else:
                self._expect(wanted, future)
                self._look(wanted)

    def _send(self, job: Job, future: ReplyPromise, *, accepted_before: bool = False) -> None:
        self._sending.setdefault(job.id, False)
        self._enqueue.put(job, partial(self._told, job, future, accepted_before))

    def _told(
        self, job: Job, future: ReplyPromise, accepted_before: bool, answer: Acceptance
    ) -> None:
        """What became of a submission."""
        ended = self._sending.pop(job.id, False)
        if not isinstance(answer, Exception):
            self._expect(job.id, future).job = job
            if answer.terminal or ended:
                self._look(job.id)
            self._followers.woken(job.id)
        elif isinstance(answer, self._patience(accepted_before)) and not self._closing:
            again = partial(self._send, job, future, accepted_before=accepted_before)
            self._refused[future] = (job.id, again)
            self._loop.call_later(answer.retry_after_s or 1.0, self._send_again, future)
        else:
            future.set_exception(answer)

    def _patience(
        self, accepted_before: bool
    ) -> tuple[type[QueueFull] | type[ServerUnavailable], ...]:
        """After which refusals a job is sent again; one that was accepted before is owed its reply."""
        if accepted_before:
            return QueueFull, ServerUnavailable
        return (QueueFull,) if self._wait_when_full else ()

    def _send_again(self, future: ReplyPromise) -> None:
        """Send what was refused for now, unless its waiter has been told something else."""
        _, send = self._refused.pop(future, ("", None))
        if send is not None:
            send()

    async def withdraw(self, job_ids: Collection[str]) -> int:
        """Let jobs that are on their way arrive, and drop those that wait for room; how many were dropped.

        In the client's own thread. An order to cancel them, sent after this, overtakes none.
        """
        self._take_in()
        while any(job_id in self._sending for job_id in job_ids):  # noqa: ASYNC110 - rare, and soon over
            await asyncio.sleep(ARRIVAL_POLL_S)
        dropped = {
            future: job_id for future, (job_id, _) in self._refused.items() if job_id in job_ids
        }
        for future, job_id in dropped.items():
            del self._refused[future]
            future.set_exception(Cancelled(f"job {job_id} was cancelled before it was accepted"))
        return len(dropped)

    def _expect(self, job_id: str, future: ReplyPromise) -> Outstanding:
        entry = self._outstanding.get(job_id)
        if entry is None:
            entry = self._outstanding[job_id] = Outstanding()
        entry.waiters.append(future)
        return entry

    def _look(self, job_id: str) -> None:
        """Read a job's reply key, and act on what it says."""
        self._read.put(job_id, partial(self._found, job_id))

    def _found(self, job_id: str, found: Found) -> None:
        entry = self._outstanding.get(job_id)
        if entry is None or isinstance(found, JobStatus):
            return
        if found is None and entry.job is not None:
            self._submit_again(job_id, entry)
            return
        if found is None and job_id in self._sending:
            return  # this has overtaken it; its acceptance finds who waits here
        del self._outstanding[job_id]
        if isinstance(found, Reply):
            if entry.job is not None and self._auto_collect:
                self._collected.append((job_id, found.finished_ms))
            entry.answer(found)
        elif found is None:
            entry.fail(
                JobNotFound(f"no job {job_id} in pool {self._pool}, or its reply has expired")
            )
        else:
            entry.fail(found)

    def _submit_again(self, job_id: str, entry: Outstanding) -> None:
        log.warning("the server has lost job %s; submitting it again", job_id)
        del self._outstanding[job_id]
        assert entry.job is not None
        job = replace(entry.job, cuts=self._followers.lost(job_id))
        for waiter in entry.waiters:
            self._send(job, waiter, accepted_before=True)

    def _pull(self, feed: Feed, batch: Batch, again: bool) -> None:
        self._take_in()
        if again:
            self._followers.rewind(feed)
        self._followers.pull(feed, batch)

    def _hears_of(self, job_id: str) -> bool:
        """Whether the inbox tells of this job."""
        entry = self._outstanding.get(job_id)
        return job_id in self._sending or (entry is not None and entry.job is not None)

    async def _following(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            self._take_in()  # Ctrl-C in the middle of a submission may have cost its wake-up
            self._followers.tick()

    async def _collecting(self, broker: Broker) -> None:
        while True:
            opened = broker.link.opened
            try:
                finished = await broker.news(self.inbox, most=INBOX_MOST, block_s=INBOX_BLOCK_S)
            except ServerUnavailable as error:
                self._fail_all(error)
                await asyncio.sleep(REFUSED_PAUSE_S)  # a refusal comes at once, and again
                continue
            for job_id in finished:
                self._followers.woken(job_id.removeprefix("+"))
                if job_id in self._outstanding:
                    self._look(job_id)
                elif job_id in self._sending:  # it has overtaken the answer to its submission
                    self._sending[job_id] = True
            if broker.link.opened != opened:
                self._look_again(len(self._outstanding))
                self._followers.look_again(0.0, REREAD_MOST)

    async def _watching(self) -> None:
        """Read outstanding replies again, and notice a dead fleet."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self._tell_collected()
                if not self._outstanding and not self._refused:
                    self._alone_since = None
                    continue
                self._look_again(REREAD_MOST)
                self._followers.look_again(QUIET_S, REREAD_MOST)
                await self._notice_dead_fleet()
            except QueueError:
                log.warning("no answer from the server while jobs are outstanding")

    async def _tell_collected(self) -> None:
        """Say which replies have arrived, so that the server need not keep them whole."""
        collected, self._collected = self._collected, []
        await self._broker.collected(collected)

    def _look_again(self, most: int) -> None:
        """Look at the outstanding jobs that were not looked at for longest."""
        for job_id in list(self._outstanding)[:most]:
            self._outstanding[job_id] = self._outstanding.pop(job_id)
            self._look(job_id)

    async def _notice_dead_fleet(self) -> None:
        if await overview.live_workers(self._broker, seen_ms=SEEN_MS):
            self._alone_since = None
            return
        now = time.monotonic()
        if self._alone_since is None:
            self._alone_since = now
            log.warning("%s", no_live_worker(self._pool))
        if now - self._alone_since >= self._no_worker_s:
            self._fail_all(NoLiveWorker(no_live_worker(self._pool)))

    def _fail_all(self, error: Exception) -> None:
        outstanding, self._outstanding = self._outstanding, {}
        refused, self._refused = self._refused, {}
        for entry in outstanding.values():
            entry.fail(error)
        for future in refused:
            future.set_exception(error)
