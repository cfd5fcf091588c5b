"""Carries the rows of a batch to the pool and the replies to its journal.

In flight are never more rows, nor more bytes, than the live workers' slots ask for. Replies come by callback into one
queue; a block of them is on disk before the server is told that it need not keep them.
"""

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum

import msgspec

from producer_sdk.batch.answer import answer_line, refusal_reply, seen_in_reply
from producer_sdk.batch.journal import Journal
from producer_sdk.batch.rollout import rollout_lines
from producer_sdk.batch.row import Row, Rows
from producer_sdk.batch.survey import WAITING, lines_of
from producer_sdk.client import Client
from producer_sdk.fleet import Fleet
from producer_sdk.future import Future, Pending
from protocols.dialects import error_body
from protocols.errors import ConfigError, JobError, RequestError, RolloutError
from protocols.job import JobStatus, Reply

JOBS_PER_SLOT = 4
FEWEST_IN_FLIGHT, MOST_IN_FLIGHT = 16, 8192
MOST_BYTES_IN_FLIGHT = 64 << 20
BLOCK_BYTES, BLOCK_S = 1 << 20, 1.0
LOOK_S, FLEET_S, POLL_S = 0.25, 2.0, 0.1
SETTLED_MOST = 64
REPLY_TTL_S = 24 * 3600.0
"""How long a runner may be down before what it had in flight is generated again."""
PACE_S = 30.0
"""Over how long tokens a second are measured."""
DETACH_S = 2.0
"""Between a wish to detach and the end: time to wish for more."""
CANCEL_LIMIT_S = 15.0
GOODBYE_S = 5.0


class Wish(IntEnum):
    """What somebody wants of a runner; it only grows."""

    RUN = 0
    DRAIN = 1
    """Send nothing more, and wait for what is in flight."""
    DETACH = 2
    """Leave what is in flight to the workers, and go."""
    CANCEL = 3
    """Cancel what is in flight, and go."""


class Order:
    """A wish, told from a signal or another thread."""

    def __init__(self) -> None:
        self.wish = Wish.RUN

    def more(self) -> Wish:
        """The next wish, as each Ctrl-C has it."""
        self.wish = Wish(min(self.wish + 1, Wish.CANCEL))
        return self.wish

    def at_least(self, wish: Wish) -> None:
        """Wish this, unless more is wished already."""
        self.wish = max(self.wish, wish)


class Look(msgspec.Struct, frozen=True):
    """How a batch stands."""

    rows: int
    done: int
    failed: int
    invalid: int
    faults: dict[str, int]
    in_flight: int
    most_in_flight: int
    oldest_s: float
    """Age of the job that is in flight for longest."""
    workers: int
    response_tokens: int
    tokens_per_s: float
    rows_per_s: float
    """Both of this run."""
    eta_s: float | None
    """By tokens: what the rows that are left will take, if they are as long as those that are done."""
    wish: str


class _Flight(msgspec.Struct, frozen=True, gc=False):
    number: int
    row: Row
    since_s: float


class Runner:
    """One run of one batch."""

    def __init__(
        self,
        client: Client,
        journal: Journal,
        rows: Rows,
        *,
        order: Order,
        watch: Callable[[Look], None] = lambda _: None,
    ) -> None:
        """The client has `auto_collect=False` and `on_full="wait"`."""
        self._client, self._journal, self._rows = client, journal, rows
        self._order, self._watch = order, watch
        self._come: queue.SimpleQueue[Pending[Reply]] = queue.SimpleQueue()
        self._flights: dict[str, _Flight] = {}
        self._flying_bytes = 0
        self._most = FEWEST_IN_FLIGHT
        self._workers = 0
        self._fleet: Fleet | None = None
        """The newest that was seen, until it is taken in."""
        self._kept: list[Reply] = []
        """Replies in the journal's block."""
        self._questions: deque[Pending[None] | Pending[Fleet]] = deque(maxlen=2)
        """The newest to the server beside the jobs; those before it have been answered, for they are in order."""
        self._gone: dict[int, int] = {}
        """Lines whose replies were collected and are not in the output: how many ids they have used up."""
        self._cancelled = False
        """Whether a row was, as somebody wished."""
        self._blocked_s = self._looked_s = self._asked_s = time.monotonic()
        self._paces: deque[tuple[float, int, int]] = deque()
        """Time, tokens and rows, over the last `PACE_S`."""
        self._rollouts = journal.manifest.parameters.format == "rollouts"
        self._stem = journal.manifest.batch
        self._round = f".{journal.manifest.round}" if journal.manifest.round else ""

    def run(self) -> bool:
        """Until all rows are done, or somebody wishes otherwise; whether all are, and none was cancelled.

        Raises QueueError where the server does not answer or no worker lives, ConfigError where the input has lost
        rows meanwhile. Whatever happens, what has come is written.
        """
        if not self._journal.waiting:
            return True
        try:
            self._fleet = self._client.fleet().result()
            self._tick()
            while self._order.wish == Wish.RUN and self._journal.waiting:
                if not self._pass():
                    raise ConfigError(
                        f"{self._journal.files.input} has changed since it was checked: {self._journal.waiting} "
                        "rows are gone; bring them back, and run it again",
                        param="input",
                    )
            self._leave()
        finally:
            self._block()
            for question in self._questions:  # closing would cut them off
                with contextlib.suppress(RolloutError):
                    question.exception(GOODBYE_S)
        return not self._journal.waiting and not self._cancelled

    def _pass(self) -> int:
        """Send every row that waits, and take in what comes, until none is in flight; how many were sent."""
        states, sent = self._journal.states, 0
        for number, line in lines_of(self._journal.files.input, len(states)):
            if states[number] != WAITING:
                continue
            self._send(number, line)
            sent += 1
            self._take_in(
                0, most=1
            )  # one for one, so that workers have work while many replies wait here
            while self._full() and self._order.wish <= Wish.DRAIN:
                self._take_in(POLL_S)
            if self._order.wish:
                break
        while self._flights and self._order.wish <= Wish.DRAIN:
            self._take_in(POLL_S)
        return sent

    def _leave(self) -> None:
        """What is still in flight goes on, unless somebody wants it cancelled."""
        until_s = time.monotonic() + DETACH_S
        while self._flights and self._order.wish == Wish.DETACH and time.monotonic() < until_s:
            self._take_in(POLL_S)
        if self._order.wish == Wish.CANCEL:
            for job_id in self._flights:
                self._client.cancel(job_id=job_id)
            until_s = time.monotonic() + CANCEL_LIMIT_S
            while self._flights and time.monotonic() < until_s:
                self._take_in(POLL_S)

    def _full(self) -> bool:
        return len(self._flights) >= self._most or self._flying_bytes >= MOST_BYTES_IN_FLIGHT

    def _send(self, number: int, line: bytes) -> None:
        row = self._rows.row(line, number)
        gone = f"~{self._gone[number] + 1}" if number in self._gone else ""
        job_id = f"{self._stem}-{number}{self._round}{gone}"
        self._flights[job_id] = _Flight(number, row, time.monotonic())
        self._flying_bytes += len(row.body)
        try:
            self._client.submit(
                row.body,
                protocol=row.protocol,
                job_id=job_id,
                lane="low",
                reply_ttl_s=REPLY_TTL_S,
            ).add_done_callback(self._come.put)
        except RequestError as error:
            self._settle(job_id, self._refused(job_id, row, error))

    def _refused(self, job_id: str, row: Row, error: RolloutError) -> Reply:
        return refusal_reply(job_id, error_body(row.protocol, error, job_id), error)

    def _take_in(self, wait_s: float, most: int = SETTLED_MOST) -> None:
        """Settle some of what has come, and wait so long for the first."""
        with contextlib.suppress(queue.Empty):
            self._land(self._come.get(timeout=wait_s) if wait_s else self._come.get_nowait())
            for _ in range(most - 1):
                self._land(self._come.get_nowait())
        self._tick()

    def _land(self, future: Pending[Reply]) -> None:
        assert isinstance(future, Future)
        job_id = future.job_id
        try:
            reply = future.result()
        except (RequestError, JobError) as error:
            reply = self._refused(job_id, self._flights[job_id].row, error)
        self._settle(job_id, reply)

    def _settle(self, job_id: str, reply: Reply) -> None:
        flight = self._flights.pop(job_id)
        self._flying_bytes -= len(flight.row.body)
        if reply.tombstone:
            self._gone[flight.number] = self._gone.get(flight.number, 0) + 1
            return
        row_id = f"{self._stem}-{flight.number}"
        if self._rollouts:
            lines = rollout_lines(row_id, flight.row.custom_id, reply)
        else:
            lines = answer_line(row_id, flight.row.custom_id, flight.row.protocol, reply)
        if reply.status is JobStatus.CANCELLED and self._order.wish == Wish.CANCEL:
            self._cancelled = True
        self._journal.add(flight.number, lines, seen_in_reply(reply))
        self._kept.append(reply)
        if self._journal.unsaved_bytes >= BLOCK_BYTES:
            self._block()

    def _block(self) -> None:
        """Write a block, and let the server forget what is in it."""
        self._journal.flush()
        self._blocked_s = time.monotonic()
        kept, self._kept = [reply for reply in self._kept if reply.finished_ms], []
        if kept:
            self._questions.append(self._client.collected(kept))

    def _tick(self) -> None:
        now = time.monotonic()
        if self._fleet is not None:
            self._workers = len(self._fleet.workers)
            slots = sum(int(told.get("slots", 0)) for told in self._fleet.workers.values())
            self._most = min(max(JOBS_PER_SLOT * slots, FEWEST_IN_FLIGHT), MOST_IN_FLIGHT)
            self._fleet = None
        if now - self._blocked_s >= BLOCK_S:
            self._block()
        if now - self._asked_s >= FLEET_S:
            self._asked_s = now
            asked = self._client.fleet()
            asked.add_done_callback(self._fleet_seen)
            self._questions.append(asked)
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self._watch(self.look())

    def _fleet_seen(self, fleet: Pending[Fleet]) -> None:
        if fleet.exception() is None:
            self._fleet = fleet.result()

    def look(self) -> Look:
        """How it stands now."""
        journal, tally, now = self._journal, self._journal.tally, time.monotonic()
        tokens_per_s, rows_per_s = self._pace(now)
        oldest = next(iter(self._flights.values()), None)
        return Look(
            rows=journal.rows,
            done=tally.done,
            failed=tally.failed,
            invalid=journal.invalid,
            faults=dict(tally.faults),
            in_flight=len(self._flights),
            most_in_flight=self._most,
            oldest_s=now - oldest.since_s if oldest else 0.0,
            workers=self._workers,
            response_tokens=tally.response_tokens,
            tokens_per_s=tokens_per_s,
            rows_per_s=rows_per_s,
            eta_s=self._eta_s(tokens_per_s, rows_per_s),
            wish=self._order.wish.name.lower(),
        )

    def _pace(self, now: float) -> tuple[float, float]:
        """Tokens and rows a second."""
        tally, paces = self._journal.tally, self._paces
        paces.append((now, tally.response_tokens, tally.done + tally.failed))
        while now - paces[0][0] > PACE_S:
            paces.popleft()
        since_s, tokens, rows = paces[0]
        took_s = max(now - since_s, 1e-9)
        return (paces[-1][1] - tokens) / took_s, (paces[-1][2] - rows) / took_s

    def _eta_s(self, tokens_per_s: float, rows_per_s: float) -> float | None:
        tally, waiting = self._journal.tally, self._journal.waiting
        if tokens_per_s > 0:
            return waiting * tally.response_tokens / tally.done / tokens_per_s
        return waiting / rows_per_s if rows_per_s > 0 else None
