"""A Hugging Face causal LM behind one typed call, `decode`: the next tokens of some rows.

Models call their attention masks and caches alike; the differences that matter here (sliding windows, which logits can
be left out, the size of the context) are read from the configuration.
"""

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from protocols.errors import ConfigError

from .kv import SlotKV
from .parameters import Parameters, places

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WINDOWED = "sliding_attention"
_KNOWN_LAYERS = {"full_attention", _WINDOWED}


class LanguageModel:
    """Weights on one device, ready to run."""

    def __init__(self, network: PreTrainedModel) -> None:
        """Raises ConfigError for a model whose layers keep more than keys and values."""
        # transformers' types are partial, and configurations declare their fields model by model
        self._network: Any = network
        self._config: Any = self._network.config.get_text_config(decoder=True)
        self._layer_types: set[str] = set(getattr(self._config, "layer_types", None) or ())
        self._window = cast("int | None", getattr(self._config, "sliding_window", None))
        # only torch's own attention takes masks of booleans; the others add them to the scores
        self._adds_masks = self._network.config._attn_implementation != "sdpa"
        self._keeps_logits = "logits_to_keep" in inspect.signature(network.forward).parameters
        if self._layer_types - _KNOWN_LAYERS:
            strange = ", ".join(sorted(self._layer_types - _KNOWN_LAYERS))
            raise ConfigError(
                f"the torch engine cannot run this model: it has layers of type {strange}, and only full and "
                "sliding-window attention are supported; use another engine or model"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast("torch.device", self._network.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return cast("torch.dtype", self._network.dtype)

    @property
    def context_tokens(self) -> int | None:
        """Most positions that the model was made for, where its configuration says so."""
        return cast("int | None", getattr(self._config, "max_position_embeddings", None))

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self._config.vocab_size)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        generation = self._network.generation_config
        of_chat = _ids(generation.eos_token_id) if generation else []
        return frozenset([*_ids(getattr(self._config, "eos_token_id", None)), *of_chat])

    def parameters(self) -> Parameters:
        """Its weights, to be replaced or moved."""
        state: dict[str, Tensor] = self._network.state_dict(keep_vars=True)
        buffers = {name for name, _ in self._network.named_buffers()}
        return Parameters(places(state), frozenset(buffers - state.keys()))

    def forward(self, token_ids: Tensor, cache: DynamicCache) -> Tensor:
        """One plain pass over a prompt `[width]`, which fills `cache`: float32 logits `[width, vocabulary]`."""
        return self._forward(input_ids=token_ids[None], past_key_values=cache)[0].float()

    def decode(
        self, token_ids: Tensor, positions: Tensor, length: int, kv: SlotKV, first_row: int = 0
    ) -> Tensor:
        """Forward the next tokens of live rows, `[rows, width]` as their `positions`, which are below `length`.

        Returns float32 logits after the last column: `[rows, vocabulary]`.
        """
        kv.begin_step(first_row, positions, length)
        logits = self._forward(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=self._mask(positions, length),
            past_key_values=kv,
            **({"logits_to_keep": 1} if self._keeps_logits else {}),
        )
        return logits[:, -1].float()

    def _forward(self, **inputs: object) -> Tensor:
        return cast("Tensor", self._network(use_cache=True, **inputs).logits)

    def _mask(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Which tokens each position sees: `[rows, 1, width, length]`, or one for each kind of layer."""
        columns = torch.arange(length, device=positions.device)
        past = columns <= positions[..., None]
        full = self._as_taken(past)
        if self._window is None:
            return full
        windowed = self._as_taken(past & (columns > positions[..., None] - self._window))
        if _WINDOWED in self._layer_types:
            return {"full_attention": full, _WINDOWED: windowed}
        return full if self._layer_types else windowed

    def _as_taken(self, seen: Tensor) -> Tensor:
        mask = seen[:, None]
        if not self._adds_masks:
            return mask
        return (~mask).to(self.dtype) * torch.finfo(self.dtype).min


def load(directory: Path, dtype: torch.dtype, device: str) -> LanguageModel:
    """The model in a directory of Hugging Face's layout; raises ConfigError where there is none."""
    transformers_logging.disable_progress_bar()
    loader = cast("Any", AutoModelForCausalLM)
    try:
        network, report = loader.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = str(error).replace(str(directory), directory.name).splitlines()[0]
        raise ConfigError(
            f"the model {directory.name!r} cannot be loaded: {reason}; its directory must hold config.json and the "
            "safetensors of a causal language model that transformers knows"
        ) from error
    if report["missing_keys"]:
        raise ConfigError(
            f"the model {directory.name!r} is not whole: its safetensors lack {len(report['missing_keys'])} of the "
            "weights that its config.json asks for"
        )
    return LanguageModel(network.to(device).eval())


def _ids(named: int | list[int] | None) -> list[int]:
    if named is None:
        return []
    return named if isinstance(named, list) else [named]
