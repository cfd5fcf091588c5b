"""Batches that are left to batch workers, as the server knows them: what is to be done, who is at it, how it stands.

A batch that is not owned and not ended is taken up by the next worker that looks. An owner says every few seconds that
it lives; two that both believe they own a batch are told apart by the lock beside its output.
"""

import secrets
from typing import Literal

import msgspec

from producer_sdk.batch.runner import Look
from producer_sdk.batch.work import Summary, Task
from protocols import codec
from protocols.errors import JobNotFound
from protocols.queue.broker import Broker

OWNER_S = 15
State = Literal["waiting", "running", "done", "failed", "cancelled"]
"""`failed`: it could not be begun, or its files are in the way; `error` says why."""


class Batch(msgspec.Struct, frozen=True):
    """A batch as the server knows it."""

    id: str
    task: Task
    state: State
    created_ms: int
    owner: str | None = None
    """The process that is at it now."""
    attempts: int = 0
    """How often it was taken up."""
    look: Look | None = None
    """The last that its runner said."""
    summary: Summary | None = None
    """What it came to, where it has ended or was left."""
    error: str | None = None
    wish: str | None = None
    """`cancel`, where somebody wants that."""
    ended_ms: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nobody will take it up any more."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def rows(self) -> int:
        """Of the input that can be done; 0 while nobody knows."""
        known = self.summary or self.look
        return known.rows - known.invalid if known else 0

    @property
    def failed(self) -> int:
        """Failed rows."""
        known = self.summary or self.look
        return known.failed if known else 0

    @property
    def ended_rows(self) -> int:
        """Rows that are done or failed."""
        known = self.summary or self.look
        return known.done + known.failed if known else 0


class Registry:
    """The batches of one pool."""

    def __init__(self, broker: Broker) -> None:
        self._link, self._keys = broker.link, broker.keys

    async def submit(self, task: Task) -> str:
        """Leave a batch to whoever takes it up; its id."""
        batch = f"batch-{secrets.token_hex(4)}"
        now_ms = await self._now_ms()
        fields = ("task", codec.encode_json(task), "state", "waiting", "created_ms", now_ms)
        await self._link.calls(
            [
                ["HSET", self._keys.batch(batch), *fields],
                ["ZADD", self._keys.batches, now_ms, batch],
            ]
        )
        return batch

    async def all(self) -> list[Batch]:
        """All that are known, oldest first."""
        ids = await self._link.call("ZRANGE", self._keys.batches, 0, -1)
        found = [await self._find(raw.decode()) for raw in ids]
        return [batch for batch in found if batch is not None]

    async def get(self, batch: str) -> Batch:
        """One; raises JobNotFound."""
        found = await self._find(batch)
        if found is None:
            raise JobNotFound(
                f"no batch {batch} in pool {self._keys.pool}; `rolloutq batch list` shows all"
            )
        return found

    async def cancel(self, batch: str) -> Batch:
        """Wish it cancelled: at once where nobody is at it, else within some seconds."""
        found = await self.get(batch)
        if not found.ended:
            fields: list[str | int] = ["wish", "cancel"]
            if found.owner is None:
                fields += ("state", "cancelled", "ended_ms", await self._now_ms())
            await self._link.call("HSET", self._keys.batch(batch), *fields)
        return await self.get(batch)

    # what a batch worker calls

    async def claim(self, batch: str, owner: str) -> bool:
        """Take it up; whether nobody else is at it."""
        key = self._keys.batch_owner(batch)
        if not await self._link.call("SET", key, owner, "NX", "EX", OWNER_S):
            return False
        await self._link.calls(
            [
                ["HINCRBY", self._keys.batch(batch), "attempts", 1],
                ["HSET", self._keys.batch(batch), "state", "running"],
            ]
        )
        return True

    async def keep(self, batch: str, owner: str, look: Look | None) -> str | None:
        """Say that the owner lives, and how it stands; what is wished, or `lost` where another owns it."""
        key = self._keys.batch_owner(batch)
        if await self._link.call("GET", key) != owner.encode():
            return "lost"
        await self._link.call("SET", key, owner, "XX", "EX", OWNER_S)
        if look is not None:
            await self._link.call("HSET", self._keys.batch(batch), "look", codec.encode_json(look))
        wish = await self._link.call("HGET", self._keys.batch(batch), "wish")
        return None if wish is None else wish.decode()

    async def leave(self, batch: str, owner: str, error: str = "") -> None:
        """Let another take it up."""
        await self._link.call("HSET", self._keys.batch(batch), "error", error)
        await self._let_go(batch, owner)

    async def end(
        self, batch: str, owner: str, state: State, summary: Summary | None, error: str = ""
    ) -> None:
        """Nobody shall take it up any more."""
        told = b"" if summary is None else codec.encode_json(summary)
        fields = ("state", state, "summary", told, "error", error, "ended_ms", await self._now_ms())
        await self._link.call("HSET", self._keys.batch(batch), *fields)
        await self._let_go(batch, owner)

    async def _let_go(self, batch: str, owner: str) -> None:
        key = self._keys.batch_owner(batch)
        if await self._link.call("GET", key) == owner.encode():
            await self._link.call("DEL", key)

    async def sweep(self, keep_s: float) -> int:
        """Forget what ended longer ago; how many. Their files stay."""
        before_ms = await self._now_ms() - int(1000 * keep_s)
        old = [one.id for one in await self.all() if one.ended and (one.ended_ms or 0) < before_ms]
        for batch in old:
            await self._link.calls(
                [["DEL", self._keys.batch(batch)], ["ZREM", self._keys.batches, batch]]
            )
        return len(old)

    async def _find(self, batch: str) -> Batch | None:
        flat, owner = await self._link.calls(
            [["HGETALL", self._keys.batch(batch)], ["GET", self._keys.batch_owner(batch)]]
        )
        fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))
        if b"task" not in fields:
            return None
        look, summary = fields.get(b"look"), fields.get(b"summary")
        error, wish = fields.get(b"error"), fields.get(b"wish")
        return Batch(
            id=batch,
            task=_task(fields[b"task"]),
            state=msgspec.convert(fields[b"state"].decode(), State),
            created_ms=int(fields[b"created_ms"]),
            owner=None if owner is None else owner.decode(),
            attempts=int(fields.get(b"attempts", 0)),
            look=_look(look) if look else None,
            summary=_summary(summary) if summary else None,
            error=error.decode() if error else None,
            wish=wish.decode() if wish else None,
            ended_ms=int(fields[b"ended_ms"]) if b"ended_ms" in fields else None,
        )

    async def _now_ms(self) -> int:
        seconds, micros = await self._link.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000


_task = msgspec.json.Decoder(Task).decode
_look = msgspec.json.Decoder(Look).decode
_summary = msgspec.json.Decoder(Summary).decode
