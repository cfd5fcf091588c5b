"""Any Hugging Face causal language model on the CPU or one GPU: a slot loop with continuous batching.

One thread moves all samples on, step by step (`loop`, `runner`): a chunk of waiting prompts is
forwarded, samples whose prompt is there take free rows, and every row gets one token. `schedule`
decides which, and `prefix_tree` what is known already, with integers alone; `model`, `prompt`, `kv`,
`prefix_kv` and `sampling` hold the tensors; `assembly` makes all that from the settings; `engine` is
the event loop's side.
"""

from importlib.util import find_spec

from protocols.errors import ConfigError
from worker.config import Config

from .engine import TorchEngine
from .settings import Settings

__all__ = ["Settings", "TorchEngine", "build"]

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "jinja2", "llguidance")


def build(config: Config) -> TorchEngine:
    """The engine that a worker's configuration asks for, not started; raises ConfigError where packages are missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the engine `torch` needs {', '.join(missing)}; run `pip install 'rolloutq[torch]'`, or "
            "choose another engine"
        )
    return TorchEngine(
        Settings(
            model=config.model,
            served_name=config.served_model,
            device=config.device,
            dtype=config.dtype,
            slots=config.slots,
            threads=config.threads,
            kv_memory_bytes=config.kv_memory_bytes,
            context_tokens=config.context_tokens,
            prefix_caching=config.prefix_caching,
            policy_version=config.policy_version,
        )
    )
