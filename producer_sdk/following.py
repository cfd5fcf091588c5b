"""The courier's part in streams: who reads which job, and when to look at the server.

A feed is one reader's place in a job's progress stream. It asks for the next entries when its reader wants some and is
given them once there are some. So a slow reader costs nothing here: the progress stream is the buffer. Feeds of jobs
of this client are woken by its inbox, those of other jobs look on a tick that all share; whatever looks at the same
time looks in one call.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from producer_sdk.promise import Promise
from protocols.job import Reply, Segment
from protocols.queue.broker import Broker
from protocols.queue.coalesce import Coalescer
from protocols.queue.rows import End, Entry

PORTION = 32
"""Most entries that a feed is given at once."""
READ_MOST = 64
START = "0"

Batch = Promise[list[Segment | End]]


class Feed:
    """One reader's place in the progress stream of one job; changed in the courier's thread alone."""

    def __init__(self, job_id: str, reply: Promise[Reply]) -> None:
        self.job_id, self.reply = job_id, reply
        self.after = START
        """The last entry that the reader was given."""
        self.given: dict[int, int] = {}
        """How many tokens of each sample these had."""
        self.waiter: Batch | None = None
        self.reading = False
        self.stale = True
        """Whether there may be more than what was read."""
        self.looked_s = 0.0


class Followers:
    """All feeds of one client."""

    def __init__(self, broker: Broker, owns: Callable[[str], bool]) -> None:
        """`owns` tells whether this client's inbox hears of a job."""
        self._owns, self._closed = owns, False
        self._feeds: dict[str, set[Feed]] = {}

        async def read(feeds: Sequence[Feed]) -> Sequence[list[Entry]]:
            places = [(feed.job_id, feed.after) for feed in feeds]
            return await broker.progress(places, most=PORTION)

        self._reads: Coalescer[Feed, list[Entry]] = Coalescer(
            read, size=lambda _: 0, most=READ_MOST
        )

    def pull(self, feed: Feed, waiter: Batch) -> None:
        """Give the reader the next entries, as soon as there are some; none once the job has ended without more."""
        if self._closed:
            waiter.set_result([])
            return
        feeds = self._feeds.setdefault(feed.job_id, set())
        feed.waiter = waiter
        if feed not in feeds:
            feeds.add(feed)
            feed.reply.add_done_callback(lambda _: self._wake(feed))
        if feed.stale:
            self._read(feed)

    def rewind(self, feed: Feed) -> None:
        """Read from the start again; the reader knows what it has."""
        feed.after, feed.stale = START, True

    def leave(self, feed: Feed) -> None:
        """Its reader wants no more."""
        feeds = self._feeds.get(feed.job_id, set())
        feeds.discard(feed)
        if not feeds:
            self._feeds.pop(feed.job_id, None)

    def woken(self, job_id: str) -> None:
        """There may be more of this job."""
        for feed in self._feeds.get(job_id, ()):
            self._wake(feed)

    def lost(self, job_id: str) -> str | None:
        """The server has lost the job: everybody reads from the start. Returns where its segments should be cut."""
        feeds = self._feeds.get(job_id, ())
        for feed in feeds:
            self.rewind(feed)
            self._wake(feed)
        cuts = {f"{index}:{tokens}" for feed in feeds for index, tokens in feed.given.items()}
        return " ".join(sorted(cuts)) or None

    def close(self) -> None:
        """End every wait."""
        self._closed = True
        for feed in self._waiting():
            assert feed.waiter is not None
            feed.waiter.set_result([])
            feed.waiter = None

    def tick(self) -> None:
        """Look at the jobs that nobody wakes this client for."""
        for feed in self._waiting():
            if not self._owns(feed.job_id):
                self._wake(feed)

    def look_again(self, quiet_s: float, most: int) -> None:
        """Look at those that were quiet for so long: a wake-up may be lost."""
        now = time.monotonic()
        quiet = [feed for feed in self._waiting() if now - feed.looked_s >= quiet_s]
        for feed in sorted(quiet, key=lambda feed: feed.looked_s)[:most]:
            self._wake(feed)

    def _waiting(self) -> Iterable[Feed]:
        return [feed for feeds in self._feeds.values() for feed in feeds if feed.waiter is not None]

    def _wake(self, feed: Feed) -> None:
        feed.stale = True
        if feed.waiter is not None:
            self._read(feed)

    def _read(self, feed: Feed) -> None:
        if feed.reading:
            return
        feed.reading, feed.stale, feed.looked_s = True, False, time.monotonic()
        after, ended = feed.after, feed.reply.done()

        def told(entries: list[Entry] | Exception) -> None:
            feed.reading = False
            waiter = feed.waiter
            if waiter is None or feed.after != after:  # it was sent back to the start meanwhile
                self._wake(feed)
            elif isinstance(entries, Exception):
                feed.waiter = None
                waiter.set_exception(entries)
            elif entries or ended:
                self._give(feed, waiter, entries)
            elif feed.stale:
                self._read(feed)

        self._reads.put(feed, told)

    def _give(self, feed: Feed, waiter: Batch, entries: list[Entry]) -> None:
        feed.waiter = None
        if entries:
            feed.after = entries[-1][0]
            feed.stale = feed.stale or len(entries) == PORTION or feed.reply.done()
        told = [entry for _, entry in entries]
        for entry in told:
            if isinstance(entry, Segment):
                reached = entry.start + len(entry.token_ids)
                feed.given[entry.index] = max(reached, feed.given.get(entry.index, 0))
        waiter.set_result(told)
