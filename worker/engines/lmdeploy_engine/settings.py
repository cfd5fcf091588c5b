"""What a user may set."""

from typing import Literal

import msgspec


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one lmdeploy engine."""

    model: str
    """A directory in Hugging Face's layout, or `smollm2`."""
    served_name: str | None = None
    """What jobs call the model; None: the directory's name."""
    backend: Literal["pytorch", "turbomind"] = "pytorch"
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """`auto`: lmdeploy's choice, float16 for a model in float32."""
    slots: int = 8
    """Samples that generate at once."""
    tp: int = 1
    """GPUs that share each layer; passed through."""
    ep: int = 1
    """GPUs that share the experts; passed through."""
    context_tokens: int | None = None
    """Most tokens of prompt and response together; None: what the model was made for."""
    cache_ratio: float = 0.8
    """Of the GPU memory that the weights leave, the share for keys and values."""
    prefix_caching: bool = True
    """Whether the keys and values of common beginnings are kept and shared."""
    routed_experts: bool = False
    """Whether jobs may ask which experts each position went to; lmdeploy keeps them then."""
    policy_version: int = 0
    """Of the weights that it starts with."""
    stall_s: float = 120.0
    """An engine that has work and takes no step for so long counts as broken."""

    @property
    def several_gpus(self) -> bool:
        """Whether the model runs in other processes than this one."""
        return self.tp > 1 or self.ep > 1

    @property
    def guides(self) -> bool:
        """Whether a guide can be followed: lmdeploy's sampling is in this process."""
        return self.backend == "pytorch" and not self.several_gpus
