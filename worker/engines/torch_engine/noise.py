"""Randomness without a state: noise that depends on nothing but a sample's seed and a token's position.

A counter-based hash takes the place of a generator, so that a token is drawn alike whatever else is in the batch, and
alike when a generation is resumed in another process.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_64 = 2**64 - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B9 - 2**32
_FIRST_32 = 0x7FEB352D
_SECOND_32 = 0x846CA68B - 2**32
_TO_UNIT = 2.0**-31 * (1 - 2.0**-24)
"""From 31 bits to below 1 even where a float rounds up: 1 would make the noise infinite."""


def key(seed: int, position: int) -> int:
    """64 mixed bits of a seed (0 .. 2**64 - 1) and a position."""
    return _mix_64(_mix_64(seed) + position * _GOLDEN_64)


def exponential(keys: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Exponentially distributed noise with mean 1: float32 `[keys, width]`, one row a key, above 0 and finite.

    31 random bits lie below each value, and small values keep their precision: they decide who wins a race.
    """
    low, high = _halves(keys, device)
    bits = torch.arange(width, device=device, dtype=torch.int32).mul_(_GOLDEN_32) + low
    shifted = torch.empty_like(bits)
    _xor_shifted(bits, shifted, 16).mul_(_FIRST_32).add_(high)
    _xor_shifted(bits, shifted, 15).mul_(_SECOND_32)
    _xor_shifted(bits, shifted, 16).bitwise_and_(0x7FFFFFFF)
    return bits.float().add_(0.5).mul_(_TO_UNIT).neg_().log1p_().neg_()


def _mix_64(value: int) -> int:
    """The finaliser of splitmix64."""
    value &= _MASK_64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


def _halves(keys: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The lower and the upper 32 bits of each key: int32 `[keys, 1]` each."""
    packed = b"".join(one.to_bytes(8, "little") for one in keys)
    words = torch.frombuffer(bytearray(packed), dtype=torch.int32).view(-1, 2).to(device)
    return words[:, :1], words[:, 1:]


def _xor_shifted(bits: Tensor, shifted: Tensor, by: int) -> Tensor:
    """`bits ^= bits >> by`, unsigned, in place; `shifted` is scratch memory."""
    torch.bitwise_right_shift(bits, by, out=shifted)
    return bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - by)) - 1))
