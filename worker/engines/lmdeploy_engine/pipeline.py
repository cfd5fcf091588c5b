"""The edge to lmdeploy: what the engine does with it, and its errors turned into ours."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
import torch
from torch import Tensor

from protocols.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    OutOfMemory,
    RolloutError,
    UnsupportedOption,
)
from protocols.rollout_state import RoutedExperts

from .guidance import GUIDED, Guidance
from .request import Wanted
from .settings import Settings
from .surface import AsyncEngine, Out, Tag, messages, open_engine

if TYPE_CHECKING:
    from worker.engines.guide import Matcher

    from .penalty import LogitBias, RepetitionPenalty

CLOSE_LIMIT_S = 30.0
"""Longest wait for lmdeploy's loop to end."""
_AT_FAULT: dict[str, type[RolloutError]] = {
    "invalid_request": InvalidRequest,
    "preprocess_failed": InvalidRequest,
    "unsupported_feature": UnsupportedOption,
    "context_length_exceeded": ContextLengthExceeded,
}
"""lmdeploy's codes for what is the job's fault; the others are the engine's."""


class Drawn(msgspec.Struct, frozen=True):
    """What one step gave of a sample."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]
    """`[token_ids]`: the token's, and at least as many of the likeliest as were asked for."""
    finish_reason: Literal["stop", "length"] | None
    cached_tokens: int
    """Of the prompt, found in the prefix cache."""
    routed_experts: RoutedExperts | None = None
    """Of the whole sample, with its finish reason."""


class Pipeline:
    """One `AsyncEngine`, its model loaded, in the event loop in which it was made."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        """Load the model and begin; blocks. Raises ConfigError where lmdeploy cannot."""
        self._settings = settings
        self._engine = open_engine(settings, directory)
        self._guidance = Guidance(self.vocabulary)
        if settings.guides:
            agent: Any = self._engine.engine.executor.model_agent
            agent.guided_decoding_manager = self._guidance
        self._engine.start_loop(asyncio.get_running_loop(), use_async_api=True)

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and response, as the settings and the memory for keys and values allow."""
        held = getattr(self._engine.engine, "max_session_len", self._engine.session_len)
        return min(self._engine.session_len, int(held))

    @property
    def shares(self) -> bool:
        """Whether keys and values of common beginnings are shared."""
        return self._settings.prefix_caching

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        config: Any = self._engine.hf_cfg
        return int(getattr(config, "text_config", config).vocab_size)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head has the embedding's weights."""
        return bool(getattr(self._engine.hf_cfg, "tie_word_embeddings", False))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response: the configuration's, and those of lmdeploy's chat template."""
        named = (
            self._engine.hf_gen_cfg.get("eos_token_id"),
            getattr(self._engine.hf_cfg, "eos_token_id", None),
            self._engine.stop_words,
        )
        return frozenset(one for ids in named for one in _ids(ids))

    def session(self) -> "Session":
        """A place for one sample."""
        return Session(self._engine, self._guidance)

    async def sleep(self, level: int) -> None:
        """Free the GPU's memory: 1 keeps the weights in host memory. The prefix cache is emptied."""
        await self._engine.sleep(level)
        backend = self._engine.engine
        backend.scheduler.block_trie.evict(backend.cache_config.num_gpu_blocks)

    def wake(self, *tags: Tag) -> None:
        """Take memory again; raises OutOfMemory."""
        try:
            self._engine.wakeup(list(tags))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "the GPU has no room for the weights and the cache; free memory there, or wait until others do, and "
                "try again"
            ) from error

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put these tensors in place of those with the same names; the model's memory is awake, its cache is not."""
        agent: Any = self._engine.engine.executor.model_agent
        with torch.inference_mode(), agent.all_context():
            agent._load_updated_weight_bucket(list(weights), "update_weights")
            agent._finalize_updated_weights()

    async def ailment(self) -> str | None:
        """What keeps it from generating for good; None while it is well or asleep."""
        found = await self._engine.health_probe(self._settings.stall_s)
        if found["status"] != "unhealthy":
            return None
        task = getattr(self._engine.engine, "_loop_main", None)
        broken = task.exception() if task and task.done() and not task.cancelled() else None
        return found["message"] + (f" ({type(broken).__name__})" if broken else "")

    async def close(self) -> None:
        """End its loop and free what it holds."""
        backend = self._engine.engine
        task = getattr(backend, "_loop_main", None)
        self._engine.close()
        if task is not None:
            backend.req_manager.stop_loop()
            await asyncio.wait([task], timeout=CLOSE_LIMIT_S)


class Session:
    """One sample inside lmdeploy."""

    def __init__(self, engine: AsyncEngine, guidance: Guidance) -> None:
        self._engine = engine
        self._guidance = guidance
        self._session = engine.session_mgr.get()
        # without it, lmdeploy could not drop what still waits inside when it is told to stop everything
        self._session.epoch = engine.epoch

    async def draw(
        self,
        input_ids: list[int],
        wanted: Wanted,
        processors: "Sequence[LogitBias | RepetitionPenalty]",
        matcher: "Matcher | None",
    ) -> AsyncIterator[Drawn]:
        """What is drawn, step by step; without a finish reason where it was aborted.

        `processors` change the logits, and the `matcher` of a guide says which tokens may come.

        Raises RequestError where lmdeploy finds fault with the request, EngineFailed for everything else.
        """
        exceptions: Any = import_module("lmdeploy.serve.core.exceptions")
        try:
            config = messages().GenerationConfig(
                **msgspec.structs.asdict(wanted),
                logits_processors=list(processors) or None,
                response_format=GUIDED if matcher else None,
            )
            if matcher is not None:
                self._guidance.begin(self._session.session_id, matcher)
            request = await self._engine.preprocess(
                None, self._session, gen_config=config, input_ids=input_ids
            )
            async for out in self._engine.generate(request):
                drawn = _drawn(out)
                if drawn.token_ids or drawn.finish_reason:
                    yield drawn
        except exceptions.RequestError as error:
            raise _classified(error) from error
        finally:
            self._guidance.end(self._session.session_id)
            self._engine.session_mgr.remove(self._session)

    async def abort(self) -> None:
        """End it; one that comes before lmdeploy has begun is lost."""
        await self._session.async_abort()


def _drawn(out: Out) -> Drawn:
    token_ids = out.token_ids or []
    logprobs = out.logprobs or []
    if len(logprobs) != len(token_ids):
        raise EngineFailed("lmdeploy gave tokens without their log-probabilities")
    reason = out.finish_reason
    finish_reason = reason if reason in {"stop", "length"} else None
    return Drawn(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=cast("Literal['stop', 'length'] | None", finish_reason),
        cached_tokens=out.cached_tokens,
        routed_experts=_experts(out.routed_experts) if finish_reason else None,
    )


def _experts(found: Any) -> RoutedExperts | None:  # noqa: ANN401 - a numpy array
    if found is None:
        return None
    positions, layers, each = found.shape
    return RoutedExperts((positions, layers, each), found.astype("<u2", copy=False).tobytes())


def _classified(error: Any) -> RolloutError:  # noqa: ANN401 - lmdeploy's RequestError
    code = str(error.code.value)
    if code in _AT_FAULT:
        return _AT_FAULT[code](f"lmdeploy refuses the request: {error.message}")
    if isinstance(error.__cause__, torch.OutOfMemoryError):
        return EngineFailed("lmdeploy ran out of memory while it generated; another worker may not")
    return EngineFailed(
        f"lmdeploy failed while it generated ({code}); another worker can take the job"
    )


def _ids(named: int | list[int] | None) -> list[int]:
    if named is None:
        return []
    return named if isinstance(named, list) else [named]
