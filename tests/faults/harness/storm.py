"""Kills and freezes among a pool's workers while it works, each at a time that the work itself sets."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.faults.harness.fork import ForkedWorker
from tests.faults.harness.watch import Leases, Watch

MOST_FROZEN = 2
MOST_CRASHES = 2
LONGEST_FREEZE_S = 20.0


@dataclass
class _Frozen:
    worker: ForkedWorker
    leases: Leases
    since_s: float


@dataclass
class Storm:
    """Keeps a number of workers going and brings faults among them."""

    start: Callable[[], ForkedWorker]
    look: Watch
    rng: Random
    kills: int = 0
    """Of a worker that held a lease when it was gone."""
    freezes: int = 0
    """That ended after a lease of the frozen worker had been reclaimed."""
    tried: int = 0
    spared: set[str] = field(default_factory=set[str])
    """Jobs whose worker was left alone."""
    reclaimed_after_s: list[float] = field(default_factory=list[float])
    """From a freeze to the first of its leases reclaimed."""
    workers: dict[str, ForkedWorker] = field(default_factory=dict[str, ForkedWorker])
    started: list[ForkedWorker] = field(default_factory=list[ForkedWorker])
    """All that there ever were."""
    _frozen: list[_Frozen] = field(default_factory=list[_Frozen])

    def add(self) -> None:
        """Start a worker."""
        worker = self.start()
        self.workers[worker.worker_id] = worker
        self.started.append(worker)

    def blow(self, kills_due: int, freezes_due: int) -> None:
        """Wake whom it is time to wake; kill or freeze one worker if so many are due by now."""
        for frozen in self._frozen[:]:
            self._wake_if_reclaimed(frozen)
        if self.kills < kills_due:
            self._kill()
        if self.freezes + len(self._frozen) < freezes_due and len(self._frozen) < MOST_FROZEN:
            self._freeze()

    def calm(self) -> None:
        """Wake all."""
        for frozen in self._frozen:
            frozen.worker.wake()
        self._frozen.clear()

    def _victim(self) -> ForkedWorker | None:
        """A worker that holds a lease, but none of a job that was lost twice in a row: a third loss rightly ends it."""
        held = self.look.held()
        for frozen in self._frozen:
            held.pop(frozen.worker.worker_id, None)
        able: list[str] = []
        for name in sorted(held.keys() & self.workers.keys()):
            crashes = zip(held[name], self.look.numbers(held[name], "crashes"), strict=True)
            suspects = [job_id for job_id, lost in crashes if lost >= MOST_CRASHES]
            self.spared.update(suspects)
            if not suspects:
                able.append(name)
        return self.workers[self.rng.choice(able)] if able else None

    def _kill(self) -> None:
        victim = self._victim()
        if victim is None:
            return
        self.tried += 1
        victim.kill()
        self.kills += victim.worker_id in self.look.held()
        del self.workers[victim.worker_id]
        self.add()

    def _freeze(self) -> None:
        victim = self._victim()
        if victim is None:
            return
        self.tried += 1
        victim.freeze()
        leases = self.look.held().get(victim.worker_id, {})
        if leases:
            self._frozen.append(_Frozen(victim, leases, time.monotonic()))
        else:
            victim.wake()

    def _wake_if_reclaimed(self, frozen: _Frozen) -> None:
        lasted_s = time.monotonic() - frozen.since_s
        assert lasted_s < LONGEST_FREEZE_S, f"nobody reclaimed {frozen.leases}"
        if self.look.reclaimed(frozen.leases):
            self.freezes += 1
            self.reclaimed_after_s.append(lasted_s)
            frozen.worker.wake()
            self._frozen.remove(frozen)
