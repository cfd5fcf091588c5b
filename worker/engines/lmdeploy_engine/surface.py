"""What of lmdeploy is used: its names, typed, and how one `AsyncEngine` is made.

Beside the documented calls these are the scheduler's prefix tree, the model agent's loading of weights and the loop's
task, as they are in the version that the package pins.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from protocols.errors import ConfigError

from .settings import Settings

Tag = Literal["weights", "kv_cache"]


class Out(Protocol):
    """What `generate` yields."""

    token_ids: list[int] | None
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None
    cached_tokens: int
    routed_experts: Any
    """`[positions, layers, experts of a token]`, a numpy array of u16, on the last."""


class EngineSession(Protocol):
    """One request inside."""

    session_id: int
    epoch: int | None

    async def async_abort(self) -> None:
        """End it, if it has begun."""
        ...


class Sessions(Protocol):
    """`session_mgr`."""

    def get(self) -> EngineSession:
        """A new one."""
        ...

    def remove(self, session: EngineSession) -> None:
        """Forget it; again if need be."""
        ...


class PrefixTree(Protocol):
    """`block_trie`: which blocks of the cache hold which beginnings."""

    def evict(self, max_num_blocks: int) -> int:
        """Forget blocks that no request holds."""
        ...


class Scheduler(Protocol):
    """Of the PyTorch engine."""

    block_trie: PrefixTree


class Cache(Protocol):
    """`cache_config`."""

    num_gpu_blocks: int


class Requests(Protocol):
    """`req_manager`."""

    def stop_loop(self) -> None:
        """Cancel its tasks."""
        ...


class Backend(Protocol):
    """The PyTorch engine; TurboMind has none of this."""

    scheduler: Scheduler
    cache_config: Cache
    req_manager: Requests
    max_session_len: int
    executor: Any
    """On one GPU its `model_agent` has `all_context`, `_load_updated_weight_bucket` and `_finalize_updated_weights`."""
    _loop_main: "asyncio.Task[None] | None"


class AsyncEngine(Protocol):
    """lmdeploy's own class of that name."""

    engine: Backend
    session_mgr: Sessions
    session_len: int
    epoch: int
    hf_cfg: object
    hf_gen_cfg: dict[str, Any]
    stop_words: list[int] | None

    def start_loop(self, loop: asyncio.AbstractEventLoop, *, use_async_api: bool) -> object:
        """Begin."""
        ...

    async def preprocess(
        self,
        messages: None,
        session_id: EngineSession,
        *,
        gen_config: object,
        input_ids: list[int],
    ) -> object:
        """A request for `generate`."""
        ...

    def generate(self, request: object) -> AsyncIterator[Out]:
        """What it draws, step by step."""
        ...

    async def sleep(self, level: int) -> None:
        """Free the GPU's memory."""
        ...

    def wakeup(self, tags: list[Tag]) -> None:
        """Take memory again."""
        ...

    async def health_probe(self, scheduler_stall_timeout: float) -> dict[str, str]:
        """`status` and `message`."""
        ...

    def close(self) -> None:
        """End."""
        ...


def messages() -> Any:  # noqa: ANN401 - lmdeploy has no types
    """The module with lmdeploy's configurations."""
    return import_module("lmdeploy.messages")


def open_engine(settings: Settings, directory: Path) -> AsyncEngine:
    """Load the model; blocks. Raises ConfigError where lmdeploy cannot."""
    common = {
        "dtype": settings.dtype,
        "tp": settings.tp,
        "ep": settings.ep,
        "session_len": settings.context_tokens,
        "max_batch_size": settings.slots,
        "cache_max_entry_count": settings.cache_ratio,
        "enable_prefix_caching": settings.prefix_caching,
        "enable_metrics": False,
    }
    try:
        named, serving = messages(), import_module("lmdeploy.serve.core.async_engine")
        # below that it tells of every step, prompts included
        logging.getLogger("lmdeploy").setLevel(logging.WARNING)
        if settings.backend == "pytorch":
            config = named.PytorchEngineConfig(
                **common,
                logprobs_mode="raw_logprobs",
                enable_return_routed_experts=settings.routed_experts,
            )
        else:
            config = named.TurbomindEngineConfig(**common)
        made = cast("Any", serving).AsyncEngine(
            str(directory),
            model_name=directory.name,
            backend=settings.backend,
            backend_config=config,
        )
    except Exception as error:
        # lmdeploy checks settings, model and device by assertions and errors of any kind
        reason = (str(error) or type(error).__name__).replace(str(directory), directory.name)
        raise ConfigError(
            f"lmdeploy cannot load the model {directory.name!r} with its backend {settings.backend}: "
            f"{reason.splitlines()[0]}"
        ) from error
    return made
