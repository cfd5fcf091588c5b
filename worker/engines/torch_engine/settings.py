"""What a user may set."""

import msgspec

from .checkpoint import EMBEDDED


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one torch engine."""

    model: str = EMBEDDED
    """A directory in Hugging Face's layout, or `smollm2`."""
    served_name: str | None = None
    """What jobs call the model; None: the directory's name."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`; None: float32 on the CPU, else bfloat16. Only in float32 are the tokens of a
    seed the same whatever else is in the batch."""
    slots: int = 8
    """Samples that generate at once."""
    threads: int | None = None
    """CPU threads of torch; None: what torch chooses, at most the cores that this process may use."""
    kv_memory_bytes: int = 4 * 1024**3
    """Most memory for keys and values; it is taken as it is needed. Samples wait while all of it is spoken for."""
    context_tokens: int | None = None
    """Most tokens of prompt and response together; None: what the model was made for."""
    prefill_chunk_tokens: int = 512
    """Most positions of prompts or kept tokens forwarded between two steps of the samples under way."""
    prefix_caching: bool = True
    """Whether up to a quarter of `kv_memory_bytes` keeps keys and values for later prompts that begin alike."""
    policy_version: int = 0
    """Of the weights that it starts with."""
