"""Models of a few thousand random weights, with a tokenizer and a chat template: real in every respect but their size.

Every test that needs the torch engine and not the answers of a real model uses one of these.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}"
    "{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
VOCABULARY = 320
CONTEXT_TOKENS = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Of a configuration in Llama's naming."""
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Keys and values of one token: layers x 2 x heads x head size x float32."""


def sized(kind: type[PreTrainedConfig], **fields: object) -> PreTrainedConfig:
    """A configuration of a family with Llama's names, tiny."""
    make = cast("Any", kind)
    return make(**{**SIZES, **fields})


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE, 256 bytes and some merges; id 0 ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the rain in Spain stays mainly in the plain"] * 9, trainer)
    return tokenizer


def save_tokenizer(
    directory: Path, tokenizer: Tokenizer, chat_template: str | None = CHAT_TEMPLATE
) -> None:
    """Write a tokenizer as a model directory has it."""
    wrap = cast("Any", PreTrainedTokenizerFast)
    wrapped = wrap(tokenizer_object=tokenizer, eos_token=END)
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(directory)


def save_tiny_model(directory: Path, config: PreTrainedConfig | None = None) -> Path:
    """Write a model of random weights, a small Llama unless `config` says otherwise; returns `directory`."""
    generator = torch.Generator().manual_seed(0)
    loader = cast("Any", AutoModelForCausalLM)
    model = loader.from_config(config or sized(LlamaConfig))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.2, generator=generator)
    model.save_pretrained(directory)
    save_tokenizer(directory, tiny_tokenizer())
    return directory


def never_ending(weights: dict[str, Tensor]) -> None:
    """A change after which the token 0, which ends a turn, is not drawn: the first channel is the same everywhere,
    and speaks against it.
    """
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    weights["model.embed_tokens.weight"][:, 0] = 1
    weights["lm_head.weight"][0] = 0
    weights["lm_head.weight"][0, 0] = -40


def altered(model: Path, copy: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model, its weights changed."""
    shutil.copytree(model, copy)
    files = cast("Any", safetensors.torch)  # its types are partial
    weights = files.load_file(copy / "model.safetensors")
    change(weights)
    files.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
