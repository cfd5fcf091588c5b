"""The worker's side of lmdeploy."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from protocols.cancellation import cancel
from protocols.errors import (
    EngineFailed,
    InvalidRequest,
    OutOfMemory,
    UnsupportedOption,
    WeightsRefused,
)
from worker.engines.base import Call, Counters, Generation, Memory, Tokenizer, Weights
from worker.engines.breakdown import Breakdown
from worker.engines.torch_engine.checkpoint import locate, stay_offline
from worker.engines.weights import (
    after_offload,
    after_onload,
    check_order,
    meanwhile,
    not_loaded,
    refusing,
)

from .request import Room
from .settings import Settings

if TYPE_CHECKING:
    from .drawing import Drawer
    from .pipeline import Pipeline
    from .weights import ModelFiles

REST_LIMIT_S = 60.0
"""Longest wait until what was given up has left lmdeploy."""
LOOK_S = 1.0
"""How often lmdeploy is asked whether it is well."""

SAMPLING = frozenset(
    {
        "n",
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "stops",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "return_logprob",
        "top_logprobs",
        "sampling_seed",
    }
)
CAPABILITIES = SAMPLING | {
    "logit_bias",
    "guide",
    "return_routed_experts",
    "offload",
    "update_weights",
}
"""Of the PyTorch backend on one GPU, told to keep routed experts; `capabilities` says what other settings leave."""


class _Running(msgspec.Struct, frozen=True):
    pipeline: "Pipeline"
    drawer: "Drawer"
    room: Room
    files: "ModelFiles"


class LMDeployEngine:
    """An Engine over lmdeploy in this process.

    `tokenizer`, `context_tokens` and `vocabulary` are there once it has started.
    """

    tokenizer: Tokenizer
    context_tokens: int
    vocabulary: int

    def __init__(self, settings: Settings) -> None:
        """Nothing is loaded before `start`."""
        self._settings = settings
        self.name = "lmdeploy"
        self.model = settings.served_name or Path(settings.model).resolve().name
        self.capabilities = capabilities(settings)
        self.policy_version = settings.policy_version
        self.memory: Memory = "loaded"
        self._running: _Running | None = None
        self._broken = Breakdown()
        self._one_order = asyncio.Lock()
        self._moving = False
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the weights; raises ConfigError where that cannot be. Blocks the event loop while lmdeploy loads."""
        stay_offline()
        directory = await asyncio.to_thread(locate, self._settings.model)
        running = self._running = self._open(directory)
        self.context_tokens = running.room.context_tokens
        self.vocabulary = running.room.vocabulary
        self._watching = asyncio.create_task(self._watch(running.drawer))

    async def close(self) -> None:
        """End lmdeploy and free the weights; open generations raise EngineFailed."""
        if self._watching is not None:
            await cancel(self._watching)
        running, self._running = self._running, None
        if running is not None:
            await running.drawer.close()
            await running.pipeline.close()

    async def breakdown(self) -> EngineFailed:
        """What broke lmdeploy."""
        return await self._broken.wait()

    def generate(self, call: Call) -> Generation:
        """Begin a call; see `Engine`. Raises RequestError for one that it cannot take."""
        running = self._started()
        if self._moving:
            raise EngineFailed("the engine's weights are being moved; try again")
        if self.memory != "loaded":
            raise not_loaded(self.memory)
        running.room.check(call)
        return running.drawer.begin(call, running.room)

    async def update_weights(self, weights: Weights) -> None:
        """Replace all weights; see `Engine`. What the files tell is checked beside the running weights.

        Should lmdeploy itself fail after that, the old weights are gone: then the engine is broken.
        """
        async with self._one_order:
            running = self._started()
            with refusing(weights.version, meanwhile(self.memory, self.policy_version)):
                check_order(weights, self.memory, self._settings.policy_version)
                if "update_weights" not in self.capabilities:
                    raise WeightsRefused(
                        "lmdeploy's weights can be replaced on its PyTorch backend and one GPU alone; start workers "
                        "anew with the new ones"
                    )
                staged = await asyncio.to_thread(running.files.stage, weights)

            async def fill() -> None:
                if self.memory == "loaded":
                    await running.pipeline.sleep(1)
                    running.pipeline.wake("weights")
                running.pipeline.load(staged)
                running.pipeline.wake("kv_cache")
                self.policy_version = weights.version

            await self._move(running, fill, "loaded")

    async def offload(self, level: int) -> None:
        """Free the GPU's memory; see `Engine`. Raises UnsupportedOption on TurboMind."""
        if "offload" not in self.capabilities:
            raise UnsupportedOption(
                "offload: TurboMind's weights cannot be moved; the PyTorch backend's can"
            )
        async with self._one_order:
            running = self._started()
            memory = after_offload(self.memory, level)
            if memory == "discarded" and "update_weights" not in self.capabilities:
                raise InvalidRequest(
                    f"level: {level}; this engine's weights cannot be replaced, so they must not be discarded: 1 keeps "
                    "them",
                    param="level",
                )
            if memory != self.memory:
                await self._move(running, lambda: running.pipeline.sleep(level), memory)

    async def onload(self) -> None:
        """Take the memory again; see `Engine`."""
        async with self._one_order:
            running = self._started()
            memory = after_onload(self.memory)
            level = 1 if self.memory == "offloaded" else 2

            async def wake() -> None:
                try:
                    running.pipeline.wake("weights")
                    if memory == "loaded":
                        running.pipeline.wake("kv_cache")
                except OutOfMemory:
                    await running.pipeline.sleep(level)
                    raise

            if memory != self.memory:
                await self._move(running, wake, memory, undone=(OutOfMemory,))

    def counters(self) -> Counters:
        """Its load and its totals."""
        if self._running is None:
            return Counters(
                running_samples=0, waiting_samples=0, forwarded_tokens=0, generated_tokens=0
            )
        return self._running.drawer.counters()

    def _started(self) -> _Running:
        if self._broken.failure is not None:
            raise self._broken.failure
        if self._running is None:
            raise EngineFailed(
                "the lmdeploy engine is not running; another worker can take the job"
            )
        return self._running

    def _open(self, directory: Path) -> _Running:
        # lmdeploy takes many seconds to import, and only this engine wants it
        from worker.engines.guide import Guides
        from worker.engines.hf_tokenizer import HFTokenizer

        from .drawing import Drawer
        from .pipeline import Pipeline
        from .weights import ModelFiles

        tokenizer = HFTokenizer(directory)
        pipeline = Pipeline(self._settings, directory)
        self.tokenizer = tokenizer
        stop_ids = pipeline.stop_ids | tokenizer.stop_ids
        guides = Guides(tokenizer, pipeline.vocabulary, stop_ids)
        return _Running(
            pipeline,
            Drawer(pipeline, guides, self._settings.slots, lambda: self.policy_version, self._look),
            Room(pipeline.context_tokens, pipeline.vocabulary, stop_ids),
            ModelFiles(directory, ties_embeddings=pipeline.ties_embeddings),
        )

    async def _move(
        self,
        running: _Running,
        act: Callable[[], Awaitable[None]],
        memory: Memory,
        undone: tuple[type[Exception], ...] = (),
    ) -> None:
        """Change the weights by `act` while nothing is drawn; then the memory is `memory`.

        `undone`: errors after which all is as before; any other breaks the engine.
        """
        self._moving = True
        try:
            await running.drawer.rest(REST_LIMIT_S)
            await self._act(act, undone)
            self.memory = memory
        finally:
            self._moving = False

    async def _act(
        self, act: Callable[[], Awaitable[None]], undone: tuple[type[Exception], ...]
    ) -> None:
        try:
            await act()
        except undone:
            raise
        except BaseException as error:
            # whatever broke it, a cancellation included, nobody knows which weights are there now
            failure = EngineFailed(
                f"lmdeploy failed while its weights were moved ({type(error).__name__}); its worker must be restarted"
            )
            self._broken.tell(failure)
            if isinstance(error, Exception):
                raise failure from error
            raise

    async def _watch(self, drawer: "Drawer") -> None:
        """Look after lmdeploy; once it is broken, what is open fails."""
        while self._broken.failure is None:
            await asyncio.sleep(LOOK_S)
            await self._look()
        await drawer.close()

    async def _look(self) -> None:
        """Tell if lmdeploy has ended, or takes no step any more."""
        if self._running is None or self._moving:
            return
        ailment = await self._running.pipeline.ailment()
        if ailment is not None:
            self._broken.tell(
                EngineFailed(f"lmdeploy is broken: {ailment} Its worker must be restarted")
            )


def capabilities(settings: Settings) -> frozenset[str]:
    """What lmdeploy honours with these settings."""
    if settings.backend != "pytorch":
        return SAMPLING - {"repetition_penalty"}
    unkept = frozenset[str]() if settings.routed_experts else {"return_routed_experts"}
    unshared = {"update_weights", "guide"} if settings.several_gpus else frozenset[str]()
    return CAPABILITIES - unkept - unshared
