"""The event loop's side of the torch engine."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from protocols.cancellation import cancel
from protocols.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, RolloutError
from worker.engines.base import Call, Counters, Generation, Memory, Tokenizer, Weights
from worker.engines.bias import check_bias
from worker.engines.breakdown import Breakdown
from worker.engines.weights import (
    after_offload,
    after_onload,
    check_order,
    meanwhile,
    not_loaded,
    refusing,
)

from .checkpoint import stay_offline
from .settings import Settings

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .assembly import Parts
    from .loop import SlotLoop
    from .schedule import Request

CLOSE_LIMIT_S = 30.0
"""Longest wait for the step under way when the engine closes."""

REST_LIMIT_S = 60.0
"""Longest wait for the step under way and for moving the weights."""

CAPABILITIES = frozenset(
    {
        "n",
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "stops",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "return_logprob",
        "top_logprobs",
        "sampling_seed",
        "logit_bias",
        "guide",
        "offload",
        "update_weights",
    }
)


class TorchEngine:
    """An Engine over a Hugging Face causal language model in this process.

    `tokenizer`, `context_tokens` and `vocabulary` are there once it has started.
    """

    tokenizer: Tokenizer
    context_tokens: int
    vocabulary: int

    def __init__(self, settings: Settings | None = None) -> None:
        """Nothing is loaded before `start`."""
        self._settings = settings or Settings()
        self.name = "torch"
        self.model = self._settings.served_name or Path(self._settings.model).resolve().name
        self.capabilities = CAPABILITIES
        self.policy_version = self._settings.policy_version
        self.memory: Memory = "loaded"
        self._parts: Parts | None = None
        self._loop: SlotLoop | None = None
        self._one_order = asyncio.Lock()
        self._moving: Future[None] | None = None
        self._guiding: set[asyncio.Task[None]] = set()
        self._broken = Breakdown()

    async def start(self) -> None:
        """Load the weights and run them once; raises ConfigError where that cannot be."""
        stay_offline()
        self._parts = parts = await asyncio.to_thread(self._assemble)
        self.tokenizer = parts.tokenizer
        self.context_tokens = parts.context_tokens
        self.vocabulary = parts.vocabulary
        self._loop = self._begin_loop(parts)

    async def close(self) -> None:
        """End the slot loop and free the weights; open generations raise EngineFailed."""
        await cancel(*self._guiding)
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close, CLOSE_LIMIT_S)
        self._parts = self._loop = None

    async def breakdown(self) -> EngineFailed:
        """What ended the slot loop."""
        return await self._broken.wait()

    def generate(self, call: Call) -> Generation:
        """Begin a call; it waits inside the engine while all slots or all memory for keys and values are in use.

        Raises EngineFailed where the engine is not running or its weights are not loaded, RequestError for a prompt
        that it cannot take. A guide that cannot be followed is told by the generation.
        """
        parts, loop = self._ready()
        self._check(call)
        request = parts.request(call)
        if call.params.guide is None:
            loop.submit(request)
        else:
            task = asyncio.create_task(self._guide(call, request))
            self._guiding.add(task)
            task.add_done_callback(self._guiding.discard)
        return request.stream

    async def update_weights(self, weights: Weights) -> None:
        """Replace all weights or none; see `Engine`. Reads and checks beside the event loop and the running weights."""
        async with self._one_order:
            parts, _ = self._started()
            with refusing(weights.version, meanwhile(self.memory, self.policy_version)):
                check_order(weights, self.memory, self._settings.policy_version)
                staged = await asyncio.to_thread(parts.stage, weights)

            def fill() -> None:
                parts.parameters.fill(staged)
                self.policy_version = weights.version

            await self._move(fill, "loaded")

    async def offload(self, level: int) -> None:
        """Free the device's memory; see `Engine`. On the CPU level 1 frees keys, values and working memory."""
        async with self._one_order:
            parts, _ = self._started()
            memory = after_offload(self.memory, level)
            act = parts.parameters.to_host if memory == "offloaded" else parts.parameters.discard
            if memory != self.memory:
                await self._move(act, memory)

    async def onload(self) -> None:
        """Take the memory again; see `Engine`."""
        async with self._one_order:
            parts, _ = self._started()
            memory = after_onload(self.memory)
            act = parts.parameters.to_device if memory == "loaded" else parts.parameters.make_room
            if memory != self.memory:
                await self._move(act, memory)

    def counters(self) -> Counters:
        """Its load and its totals, as of the last step."""
        if self._loop is None:
            return Counters(
                running_samples=0, waiting_samples=0, forwarded_tokens=0, generated_tokens=0
            )
        return self._loop.counters

    def _started(self) -> "tuple[Parts, SlotLoop]":
        if self._parts is None or self._loop is None:
            raise EngineFailed("the torch engine is not running; another worker can take the job")
        return self._parts, self._loop

    def _ready(self) -> "tuple[Parts, SlotLoop]":
        started = self._started()
        if self._moving is not None and not self._moving.done():
            raise EngineFailed("the engine's weights are being moved; try again")
        if self.memory != "loaded":
            raise not_loaded(self.memory)
        return started

    async def _guide(self, call: Call, request: "Request") -> None:
        """Submit a request as soon as its guide is compiled."""
        failure: RolloutError = EngineFailed(
            "the engine ended before the sample's guide was compiled; another worker can take the job"
        )
        submitted = False
        try:
            parts, _ = self._started()
            waiting = (parts.guides.matcher(call, index) for index in range(call.params.n))
            request.guide(await asyncio.gather(*waiting))
            _, loop = self._ready()
            loop.submit(request)
            submitted = True
        except RolloutError as error:
            failure = error
        finally:
            if not submitted:
                request.end()
                request.stream.fail(failure)

    async def _move(self, act: Callable[[], None], memory: Memory) -> None:
        """Change the weights by `act` between two steps; then the memory is `memory`."""
        parts, loop = self._started()

        def move() -> None:
            act()
            self.memory = memory

        self._moving = loop.at_rest(move)
        try:
            async with asyncio.timeout(REST_LIMIT_S):
                await asyncio.wrap_future(self._moving)
        except TimeoutError:
            raise EngineFailed(
                f"the engine did not come to rest within {REST_LIMIT_S:.0f} s; its worker must be restarted"
            ) from None
        await asyncio.to_thread(parts.give_back_memory)

    def _assemble(self) -> "Parts":
        # torch and transformers take seconds to import: not in the event loop, and only where they are wanted
        from .assembly import assemble

        return assemble(self._settings)

    def _begin_loop(self, parts: "Parts") -> "SlotLoop":
        from .loop import SlotLoop

        readers, version = asyncio.get_running_loop(), lambda: self.policy_version
        return SlotLoop(parts.runner, readers, version, self._broken.tell)

    def _check(self, call: Call) -> None:
        if not call.prompt_ids:
            raise InvalidRequest("the prompt has no tokens; send at least one")
        if len(call.prompt_ids) >= self.context_tokens:
            raise ContextLengthExceeded(
                f"the prompt has {len(call.prompt_ids)} tokens and the context {self.context_tokens}: no room is left "
                "for an answer; shorten it"
            )
        largest = max(map(max, filter(None, (call.prompt_ids, *call.kept))))
        if largest >= self.vocabulary:
            raise InvalidRequest(
                f"the prompt, or what is kept of an earlier attempt, has the token id {largest}, and this model's "
                f"are below {self.vocabulary}"
            )
        check_bias(call.params, self.vocabulary)
