"""Tiny models of the families that differ where the torch engine could go wrong: positions, windows, attention."""

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    MptConfig,
    PreTrainedConfig,
)

from tests.tiny_model import CONTEXT_TOKENS, VOCABULARY, sized

ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "gpt2, which has an embedding for each position of its context": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "mistral with a window": sized(MistralConfig, sliding_window=6),
    "gemma3 with windows in one of two layers": sized(
        Gemma3TextConfig,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma2, whose attention is not torch's": sized(Gemma2Config, head_dim=8, sliding_window=6),
    "mpt, whose positions are slopes": MptConfig(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT_TOKENS
    ),
}
