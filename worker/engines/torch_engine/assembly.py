"""From settings to a runner that could generate: the slow part of the start, run outside the event loop."""

import logging
import os
from collections.abc import Callable
from functools import partial

import msgspec
import torch
from torch import Tensor

from protocols.errors import ConfigError
from worker.engines.base import Call, Weights
from worker.engines.guide import Guides
from worker.engines.hf_tokenizer import HFTokenizer

from .checkpoint import locate
from .host_memory import trim
from .model import DTYPES, LanguageModel, load
from .parameters import Parameters
from .prefix_kv import PrefixKV
from .probe import probe
from .runner import Runner
from .schedule import Request, Schedule
from .settings import Settings
from .weights import stage

LEAST_CONTEXT_TOKENS = 16

logger = logging.getLogger(__name__)


class Parts(msgspec.Struct, frozen=True):
    """What the engine needs."""

    tokenizer: HFTokenizer
    runner: Runner
    context_tokens: int
    vocabulary: int
    stop_ids: frozenset[int]
    """Token ids that end a response: the model's own and the tokenizer's."""
    guides: Guides
    parameters: Parameters
    reload: Callable[[], LanguageModel]
    """The model that the engine started with, once more, in host memory."""

    def request(self, call: Call) -> Request:
        """A call as the runner takes it."""
        return Request(call, self.context_tokens, self.stop_ids)

    def stage(self, weights: Weights) -> list[Tensor]:
        """New weights, checked, in host memory; raises WeightsRefused. Takes as long as reading takes."""
        return stage(weights, self.parameters, self.reload)

    def give_back_memory(self) -> None:
        """Return what was freed to the device and to the system."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        trim()


def assemble(settings: Settings) -> Parts:
    """Load and warm up; raises ConfigError where a setting, the model or the memory is not enough."""
    directory = locate(settings.model)
    dtype = _dtype(settings)
    torch.set_num_threads(settings.threads or _threads())
    tokenizer = HFTokenizer(directory)
    model = load(directory, dtype, settings.device)
    like = probe(model)
    budget_tokens = settings.kv_memory_bytes // like.token_bytes
    context_tokens = _context_tokens(settings, model, budget_tokens)
    chunk_tokens = min(settings.prefill_chunk_tokens, context_tokens)
    stop_ids = model.stop_ids | tokenizer.stop_ids
    # prompts are forwarded outside the rows, in the room of one context; a quarter at most keeps prefixes
    spare_tokens = min(budget_tokens // 4, budget_tokens - 2 * context_tokens)
    kept_tokens = spare_tokens if settings.prefix_caching else 0
    rows_tokens = budget_tokens - context_tokens - kept_tokens
    return Parts(
        tokenizer=tokenizer,
        runner=Runner(
            model,
            like.fresh(settings.slots, rows_tokens),
            PrefixKV(like, kept_tokens),
            Schedule(settings.slots, rows_tokens, chunk_tokens, context_tokens),
            chunk_tokens,
        ),
        context_tokens=context_tokens,
        vocabulary=model.vocabulary,
        stop_ids=stop_ids,
        guides=Guides(tokenizer, model.vocabulary, stop_ids),
        parameters=model.parameters(),
        reload=partial(load, directory, dtype, "cpu"),
    )


def _dtype(settings: Settings) -> torch.dtype:
    if settings.device not in {"cpu", "cuda"}:
        raise ConfigError(
            f"device {settings.device!r} is not known; use `cpu` or `cuda`", param="device"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device `cuda`: torch sees no GPU here; use `cpu`", param="device")
    name = settings.dtype or ("float32" if settings.device == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise ConfigError(
            f"dtype {name!r} is not known; use one of {', '.join(DTYPES)}", param="dtype"
        )
    return DTYPES[name]


def _threads() -> int:
    """What torch chooses, at most the cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    return min(torch.get_num_threads(), cores)


def _context_tokens(settings: Settings, model: LanguageModel, budget_tokens: int) -> int:
    """The context that the model, the settings and the memory allow: a prompt and its row must fit together."""
    known = model.context_tokens
    wanted = settings.context_tokens or known
    if wanted is None:
        raise ConfigError(
            "the model does not tell its context; set `context_tokens`", param="context_tokens"
        )
    if known is not None and wanted > known:
        raise ConfigError(
            f"context_tokens {wanted} is more than the {known} that the model was made for",
            param="context_tokens",
        )
    possible = min(wanted, budget_tokens // 2)
    if possible < LEAST_CONTEXT_TOKENS:
        raise ConfigError(
            f"kv_memory_bytes {settings.kv_memory_bytes} holds {budget_tokens} tokens, and at least "
            f"{2 * LEAST_CONTEXT_TOKENS} are needed; raise it",
            param="kv_memory_bytes",
        )
    if possible < wanted:
        logger.warning(
            "kv_memory_bytes allows a context of %d tokens instead of %d", possible, wanted
        )
    return possible
