"""The engine: calls become one request a sample, orders become the server's."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2

from protocols.errors import ConfigError, EngineFailed, InvalidRequest, WeightsRefused
from worker.engines.base import Call, Counters, Generation, Memory, Tokenizer, Weights
from worker.engines.lmdeploy_engine.request import Room, ended_by, kept_of
from worker.engines.stream import SegmentStream
from worker.engines.weights import after_offload, after_onload, busy, not_loaded

from .probe import context_of, warm_up
from .reader import Reader, Sample, Totals
from .server import Server
from .settings import Settings
from .wire import CAPABILITIES

if TYPE_CHECKING:
    from .local import LocalModel


class LMDeployServerEngine:
    """An Engine over a remote api_server. `tokenizer`, `context_tokens` and `vocabulary` are there once it has started.

    Tokens bear the version that the settings name: the server cannot tell of its weights.
    """

    tokenizer: Tokenizer
    context_tokens: int
    vocabulary: int

    def __init__(
        self, settings: Settings, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        """`transport` takes the place of the network."""
        self._settings = settings
        self.name = "lmdeploy-server"
        self.model = settings.served_name or Path(settings.model).resolve().name
        self.capabilities = CAPABILITIES
        self.policy_version = settings.policy_version
        self.memory: Memory = "loaded"
        self._server = Server(settings, transport)
        self._slots = asyncio.Semaphore(settings.slots)
        self._readers: dict[asyncio.Task[None], Reader] = {}
        self._totals = Totals()
        self._one_order = asyncio.Lock()
        self._room: Room | None = None

    async def start(self) -> None:
        """Wait until the server is there, compare its model with this one, wake it and let it draw a token.

        Raises ConfigError where they do not fit together.
        """
        settings, server = self._settings, self._server
        local = await asyncio.to_thread(_read, settings.model)
        await server.wait_until_healthy(settings.start_limit_s)
        try:
            self._compare(await server.models())
            if await server.asleep():
                await server.wake()
            self.context_tokens = await context_of(server, local, settings)
            await warm_up(server, settings)
        except EngineFailed as error:
            raise ConfigError(f"--engine-url: {error.message}", param="engine-url") from None
        self.tokenizer, self.vocabulary = local.tokenizer, local.vocabulary
        self._room = Room(self.context_tokens, local.vocabulary, local.stop_ids)

    async def close(self) -> None:
        """Give up what is under way and close the connections; the server stays as it is.

        Open generations raise EngineFailed.
        """
        self._room = None
        for reader in self._readers.values():
            reader.break_off(_not_running())
        if self._readers:
            await asyncio.wait(self._readers, timeout=self._settings.abort_limit_s)
        for task in self._readers:
            task.cancel()
        await self._server.close()

    async def breakdown(self) -> EngineFailed:
        """Never: a server that is away may come back."""
        return await asyncio.get_running_loop().create_future()

    def generate(self, call: Call) -> Generation:
        """Begin a call; its samples wait here while all slots are in use, and while the server is away.

        Raises EngineFailed where the engine is not running or its weights are not loaded, RequestError for a prompt
        that it cannot take.
        """
        room = self._room
        if room is None:
            raise _not_running()
        if self._one_order.locked():
            raise EngineFailed("the engine's weights are being moved; try again")
        if self.memory != "loaded":
            raise not_loaded(self.memory)
        room.check(call)
        readers = {sample.index: self._reader(sample) for sample in _samples(call, room)}

        def given_up(indices: Sequence[int]) -> None:
            for index in indices:
                if index in readers:
                    readers[index].give_up()

        stream = SegmentStream(call.params.n, given_up)
        for index in call.ended:
            stream.stop(index)
        for reader in readers.values():
            task = reader.start(stream)
            self._readers[task] = reader
            task.add_done_callback(lambda task: self._readers.pop(task, None))
        return stream

    async def update_weights(self, weights: Weights) -> None:
        """Refused, always: see the package."""
        raise WeightsRefused(
            f"version {weights.version} is not loaded: the engine lmdeploy-server cannot replace its server's weights, "
            "because the server un-pickles what it is sent; start the server with the new weights and the worker with "
            f"--policy-version {weights.version}, or use the engine lmdeploy; version {self.policy_version} stays"
        )

    async def offload(self, level: int) -> None:
        """Let the server sleep; only level 1: discarded weights could not be brought back."""
        if level == 2:
            raise InvalidRequest(
                "level: 2; the engine lmdeploy-server cannot load weights into its server again, so they must be kept: "
                "use level 1",
                param="level",
            )
        await self._move(after_offload(self.memory, level))

    async def onload(self) -> None:
        """Wake the server."""
        await self._move(after_onload(self.memory))

    def counters(self) -> Counters:
        """Its load and its totals; positions that the server had in its prefix cache count as forwarded."""
        readers = [reader for reader in self._readers.values() if not reader.ended]
        running = sum(reader.running for reader in readers)
        return Counters(
            running_samples=running,
            waiting_samples=len(readers) - running,
            forwarded_tokens=self._totals.forwarded_tokens,
            generated_tokens=self._totals.generated_tokens,
        )

    async def _move(self, memory: Memory) -> None:
        async with self._one_order:
            if memory == self.memory:
                return
            await self._come_to_rest()
            asleep = memory == "offloaded"
            if await self._server.asleep() != asleep:
                await (self._server.sleep() if asleep else self._server.wake())
            if await self._server.asleep() != asleep:
                raise EngineFailed(
                    f"the server did not {'go to sleep' if asleep else 'wake up'}; its log tells why"
                )
            self.memory = memory

    async def _come_to_rest(self) -> None:
        """Wait for connections of ended samples that are closing; raises EngineBusy for samples under way."""
        under_way = sum(not reader.ended for reader in self._readers.values())
        if under_way:
            raise busy(under_way)
        if self._readers:
            await asyncio.wait(self._readers, timeout=2 * self._settings.abort_limit_s)

    def _reader(self, sample: Sample) -> Reader:
        version = self.policy_version
        return Reader(
            sample, self._server, self._settings, self._slots, self._totals, lambda: version
        )

    def _compare(self, served: Sequence[str]) -> None:
        """Refuse a server of another model: `served` are names, or paths that end in one."""
        wanted = {self.model, Path(self._settings.model).resolve().name}
        if wanted.isdisjoint({name.rstrip("/").rsplit("/")[-1] for name in served}.union(served)):
            raise ConfigError(
                f"--model: {self.model!r} is not what the server serves ({', '.join(served)[:200]}); give the same "
                "model's directory by --model, or the server's name for it by --served-model",
                param="model",
            )


def _samples(call: Call, room: Room) -> list[Sample]:
    """Those of a call that have not ended."""
    return [
        Sample(
            index=index,
            input_ids=[*call.prompt_ids, *ids],
            start=len(ids),
            most=room.limit(call) - len(ids),
            whole=ended_by(ids, call, room),
            params=call.params,
            stop_ids=room.stop_ids,
            vocabulary=room.vocabulary,
        )
        for index, ids in enumerate(kept_of(call))
        if index not in call.ended
    ]


def _not_running() -> EngineFailed:
    return EngineFailed("the engine is not running; another worker can take the job")


def _read(model: str) -> "LocalModel":
    # transformers takes seconds to import: not in the event loop, and only where it is wanted
    from .local import read

    return read(model)
