"""Whether a model generates the same through rows as in one plain forward pass: looked at before it serves.

Architectures are many; this replaces a list of those that keep their state where the slot loop expects it.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from protocols.errors import ConfigError

from .kv import SlotKV, all_states
from .model import LanguageModel

_TOKENS = 8
_TOLERATED = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Mean deviation over the spread of the logits. A wrong mask or position gives about 1."""


def probe(model: LanguageModel) -> SlotKV:
    """Compare, which warms the model up too; returns rows like those that the model needs.

    Raises ConfigError where the two differ or the model cannot be run so at all.
    """
    try:
        with torch.inference_mode():
            kv, deviation = _compare(model)
    except (
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"the torch engine cannot run this model: its forward pass does not work with one position a row "
            f"({type(error).__name__}); use another engine or model"
        ) from error
    if not deviation < 1:
        raise ConfigError(
            "the torch engine cannot run this model: with one position a row it gives other logits than in a plain "
            "forward pass; use another engine or model"
        )
    return kv


def _compare(model: LanguageModel) -> tuple[SlotKV, float]:
    """The rows, and the largest deviation over the tolerated one."""
    ids = torch.arange(_TOKENS, device=model.device) * 7 % model.vocabulary
    cache = DynamicCache()
    plain = model.forward(ids, cache)
    prompt, two_rows = (SlotKV(all_states(cache), rows, 2 * _TOKENS) for rows in (1, 2))
    prompt.reserve(1, _TOKENS, _TOKENS)
    two_rows.reserve(2, _TOKENS, _TOKENS)
    first = torch.arange(3, device=model.device)[None]
    forwarded = model.decode(ids[first], first, 3, prompt)[0]
    two_rows.copy_in(0, prompt, 0, 3)
    two_rows.copy_in(1, prompt, 0, 3)
    between = torch.tensor([[3, 4]], device=model.device)
    extended = model.decode(ids[between], between, 5, two_rows, 1)[0]
    at = torch.tensor([[3], [5]], device=model.device)
    decoded = model.decode(ids[at], at, 6, two_rows)
    found = [(forwarded, plain[2]), (extended, plain[4])]
    found += [(decoded[0], plain[3]), (decoded[1], plain[5])]
    tolerated = _TOLERATED[model.dtype]
    deviation = max(_deviation(got, expected) for got, expected in found) / tolerated
    return two_rows, deviation


def _deviation(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().mean() / expected.std()).item()
