# pyright: basic, reportMissingImports=false
"""Test equipment, never a product feature: lmdeploy's own PyTorch engine on a machine without a GPU.

Everything of lmdeploy 0.18.0 is as it comes (scheduler, paged cache, prefix tree, continuous batching, sampling, sleep,
loading of weights), but for what asks for a device: `torch.cuda` says what a GPU would, tensors for it are made on the
CPU, and the operations that lmdeploy has only as GPU kernels (paged attention, the seeded draw) are written in plain
torch. Weights are computed with in float32, so that numbers can be compared with transformers'.

`install` is called before lmdeploy is imported, in the thread that will run it.
"""

import contextlib
import os
import time
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

VERSION = "0.18.0"
MEMORY_BYTES = 256 * 1024**2
MEMORY_VARIABLE = "CPU_SHIM_BYTES"
"""What the GPU that is not there says to have free; a real model needs more than a tiny one, so it can be said."""
BLOCK_TOKENS = 64


@cache
def install() -> None:
    """Let lmdeploy run here; again, it does nothing."""
    torch.set_num_threads(1)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["LMDEPLOY_SKIP_WARMUP"] = "1"
    _pretend_cuda(int(os.environ.get(MEMORY_VARIABLE, MEMORY_BYTES)))
    CudaMeansCpu().__enter__()
    _replace_kernels()
    _replace_choices()


class _Stream:
    def __init__(self, *_: object, **__: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, **_: object) -> None:
        self._at_s = 0.0

    def record(self, _stream: object = None) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, _stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return (other._at_s - self._at_s) * 1e3


class CudaMeansCpu(TorchFunctionMode):
    """Every device `cuda` becomes `cpu`, and nothing is pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name == "cuda":
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if name == "to":
            args = tuple(_cpu(one) if _is_device(one) else one for one in args)
        return func(*args, **kwargs)


def _is_device(one: object) -> bool:
    return isinstance(one, torch.device) or (isinstance(one, str) and one.startswith("cuda"))


def _cpu(device: Any) -> Any:  # noqa: ANN401
    if device is None:
        return None
    return torch.device("cpu") if torch.device(device).type == "cuda" else device


def _always(value: object) -> Any:  # noqa: ANN401
    # a new function for each name: dynamo's table of rules refuses shared ones
    return lambda *_, **__: value


def _pretend_cuda(memory_bytes: int) -> None:
    stream, cuda = _Stream(), torch.cuda
    told = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": _always(None),
        "empty_cache": _always(None),
        "set_device": _always(None),
        "current_device": _always(torch.device("cpu")),
        "device_count": _always(1),
        "mem_get_info": _always((memory_bytes, memory_bytes)),
        "get_device_properties": _always(
            SimpleNamespace(
                major=8,
                minor=0,
                name="cpu",
                total_memory=memory_bytes,
                multi_processor_count=1,
                uuid="cpu",
            )
        ),
        "get_device_capability": _always((8, 0)),
        "is_bf16_supported": _always(True),
    }
    for name, value in told.items():
        setattr(cuda, name, value)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    # needs a C++ compiler otherwise
    torch.compile = lambda model=None, **_: model if model is not None else (lambda one: one)


def _replace_kernels() -> None:  # noqa: C901 - the classes derive from what may be imported only now
    from lmdeploy.pytorch.backends import selector
    from lmdeploy.pytorch.backends.attention import (
        AttentionImpl,
        AttentionMetadata,
        PagedAttentionBuildSpec,
    )
    from lmdeploy.pytorch.backends.default import DefaultOpsBackend
    from lmdeploy.pytorch.backends.multinomial_sampling import (
        MultinomialSamplingBuildSpec,
        MultinomialSamplingImpl,
    )

    class PagedAttention(AttentionImpl):
        def forward(
            self,
            query: Any,  # noqa: ANN401
            key: Any,  # noqa: ANN401
            value: Any,  # noqa: ANN401
            k_cache: Any,  # noqa: ANN401
            v_cache: Any,  # noqa: ANN401
            attn_metadata: Any,  # noqa: ANN401
            **_: object,
        ) -> Any:  # noqa: ANN401
            out = query.new_empty(*query.shape[:-1], self.v_head_size)
            lengths = zip(
                attn_metadata.q_seqlens.tolist(), attn_metadata.kv_seqlens.tolist(), strict=True
            )
            start, block_tokens = 0, k_cache.size(1)
            for row, (new, length) in enumerate(lengths):
                here = slice(start, start + new)
                at = torch.arange(length)
                # the cache is a strided view of a packed pool: index it, for `flatten` would copy
                block = attn_metadata.block_offsets[row].long()[at // block_tokens]
                place = at % block_tokens
                fresh = slice(length - new, length)
                k_cache[block[fresh], place[fresh]] = key[here].to(k_cache.dtype)
                v_cache[block[fresh], place[fresh]] = value[here].to(v_cache.dtype)
                keys, values = k_cache[block, place], v_cache[block, place]
                attended = scaled_dot_product_attention(
                    query[here].transpose(0, 1)[None],
                    keys.transpose(0, 1)[None].to(query.dtype),
                    values.transpose(0, 1)[None].to(query.dtype),
                    attn_mask=at[None, :] <= at[fresh, None],
                    scale=self.scale,
                    enable_gqa=True,
                )
                out[here] = attended[0].transpose(0, 1)
                start += new
            return out

    class SeededDraw(MultinomialSamplingImpl):
        """The likeliest after Gumbel noise that (seed, position) alone decides."""

        def forward(self, scores: Any, seeds: Any, offsets: Any, indices: Any = None) -> Any:  # noqa: ANN401
            picks = []
            for row, seed, offset in zip(scores, seeds.tolist(), offsets.tolist(), strict=True):
                generator = torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)
                noise = torch.rand(row.numel(), generator=generator).clamp_min(1e-20)
                picks.append(int((row.float().log() - (-noise.log()).log()).argmax()))
            drawn = torch.tensor(picks)[:, None]
            return (drawn if indices is None else torch.gather(indices, 1, drawn)).view(-1)

    class PlainTorch(DefaultOpsBackend):
        @staticmethod
        def get_name() -> str:
            return "cpu"

        @classmethod
        def build_op(cls, spec: Any, *, enable_deterministic: bool = False) -> Any:  # noqa: ANN401
            if isinstance(spec, PagedAttentionBuildSpec):
                return PagedAttention(
                    num_heads=spec.num_heads,
                    head_size=spec.head_dim,
                    scale=spec.scale,
                    num_kv_heads=spec.num_kv_heads,
                    v_head_size=spec.v_head_dim,
                    causal=spec.causal,
                )
            if isinstance(spec, MultinomialSamplingBuildSpec):
                return SeededDraw()
            return super().build_op(spec, enable_deterministic=enable_deterministic)

        @staticmethod
        def get_attention_metadata_cls() -> Any:  # noqa: ANN401
            return AttentionMetadata

        @classmethod
        def update_step_context(cls, context: Any) -> Any:  # noqa: ANN401
            context.attn_metadata = AttentionMetadata(
                context.is_decoding,
                context.block_offsets.int(),
                q_start_loc=context.q_start_loc,
                q_seqlens=context.q_seqlens.int(),
                kv_seqlens=context.kv_seqlens.int(),
                cu_seqlens_q=pad(torch.cumsum(context.q_seqlens, 0), (1, 0)).int(),
                cu_seqlens_k=pad(torch.cumsum(context.kv_seqlens, 0), (1, 0)).int(),
            )
            return context

        @staticmethod
        def device_count() -> int:
            return 1

    selector._get_backend = lambda: PlainTorch


def _replace_choices() -> None:
    """What the engine would choose for a GPU, and no check for one."""
    from lmdeploy.pytorch.engine import engine

    engine.EngineChecker = lambda **_: SimpleNamespace(handle=lambda: None)
    usual = engine.Engine.from_pretrained.__func__

    def from_pretrained(kind: Any, path: str, engine_config: Any = None, **rest: Any) -> Any:  # noqa: ANN401
        engine_config.dtype = "float32"  # refused by the constructor alone
        engine_config.eager_mode = True
        engine_config.block_size = engine_config.kernel_block_size = BLOCK_TOKENS
        return usual(kind, path, engine_config=engine_config, **rest)

    engine.Engine.from_pretrained = classmethod(from_pretrained)
