"""A pool as its server has it, many jobs at a time: who holds which lease, how far each job is."""

from collections.abc import Iterable, Sequence
from typing import Any

from tests.pool_look import Look

Leases = dict[str, str]
"""Job id -> fence."""


class Watch(Look):
    """A look at many jobs in one round trip."""

    def many(self, commands: Iterable[Sequence[str]]) -> list[Any]:
        """The answers to several commands."""
        pipe = self._redis.pipeline(transaction=False)  # pyright: ignore[reportUnknownMemberType]
        for command in commands:
            pipe.execute_command(*command)  # pyright: ignore[reportUnknownMemberType]
        return pipe.execute()

    def rows(self, job_ids: Iterable[str], *fields: str) -> list[list[str | None]]:
        """Fields of every job's reply hash."""
        found = self.many(["HMGET", self.keys.reply(job_id), *fields] for job_id in job_ids)
        return [[None if cell is None else cell.decode() for cell in row] for row in found]

    def held(self) -> dict[str, Leases]:
        """The leases of every worker that holds any."""
        ids = [raw.decode() for raw in self("ZRANGE", self.keys.leases, 0, -1)]
        found: dict[str, Leases] = {}
        rows = self.rows(ids, "status", "worker", "fence")
        for job_id, (status, worker, fence) in zip(ids, rows, strict=True):
            if status == "running" and worker and fence:
                found.setdefault(worker, {})[job_id] = fence
        return found

    def reclaimed(self, leases: Leases) -> list[str]:
        """The jobs among these whose lease was taken from its holder."""
        rows = zip(leases.items(), self.rows(leases, "fence"), strict=True)
        return [job_id for (job_id, fence), (now,) in rows if now != fence]

    def begun_again(self, leases: Leases) -> bool:
        """Whether each of these jobs runs under another lease, or has ended under one."""
        rows = zip(leases.values(), self.rows(leases, "fence", "status"), strict=True)
        return all(now is not None and now != then and is_ != "queued" for then, (now, is_) in rows)

    def statuses(self, job_ids: Iterable[str]) -> dict[str | None, int]:
        """How many of these jobs are in each status."""
        counts: dict[str | None, int] = {}
        for (status,) in self.rows(job_ids, "status"):
            counts[status] = counts.get(status, 0) + 1
        return counts

    def numbers(self, job_ids: Iterable[str], field: str) -> list[int]:
        """A number of every job's reply hash, 0 where it has none."""
        return [int(cell or 0) for (cell,) in self.rows(job_ids, field)]

    def dead_letters(self) -> int:
        """How many there are."""
        return int(self("XLEN", self.keys.dead))

    def left(self) -> list[str]:
        """As for any look, and the quarantine."""
        alone = self("ZRANGE", f"{self.keys.prefix}:alone", 0, 4)
        return super().left() + ([f"alone of {alone}"] if alone else [])
