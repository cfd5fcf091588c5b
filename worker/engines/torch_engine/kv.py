"""Keys and values of the rows under way: one tensor `[rows, heads, tokens, dim]` a layer, each row left-aligned.

Every row has a position of its own. Rows 0 .. n - 1 are live; whoever retires a row moves the last one into the hole.
The tensors grow with use and stay within `budget_tokens` (rows x tokens), which the schedule sees to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

_FIRST_TOKENS = 256


class SlotKV(Cache):
    """What a Hugging Face model takes as its cache while it forwards tokens of live rows."""

    def __init__(self, like: Sequence[Tensor], slots: int, budget_tokens: int) -> None:
        """For at most `slots` rows, with layers, shapes and type of `like`: keys and values of each layer in turn."""
        super().__init__(layers=[])
        self._slots = slots
        self._budget_tokens = budget_tokens
        """Most rows x tokens."""
        self.tensors = [states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in like]
        self._rows = self._tokens = 0
        self._row_index = torch.arange(slots, device=like[0].device)
        self._first_row = self._length = 0
        self._positions = self._row_index[:, None]

    @property
    def token_bytes(self) -> int:
        """Memory of one token of one row, over all layers."""
        return sum(one.shape[1] * one.shape[3] * one.element_size() for one in self.tensors)

    def fresh(self, rows: int, budget_tokens: int) -> "SlotKV":
        """Another of the same layers, empty."""
        return SlotKV(self.tensors, rows, budget_tokens)

    def reserve(self, rows: int, tokens: int, longest: int) -> None:
        """Make room for `rows` rows of `tokens`, where no row will grow beyond `longest`."""
        if rows <= self._rows and tokens <= self._tokens:
            return
        wide = max(rows, self._rows if rows <= self._rows else min(2 * rows, self._slots))
        needed = min(max(_FIRST_TOKENS, 1 << (tokens - 1).bit_length()), longest)
        long = max(needed, self._tokens)
        if wide * long > self._budget_tokens:
            wide, long = rows, needed
        self._resize(wide, long)

    def begin_step(self, first_row: int, positions: Tensor, length: int) -> None:
        """Let each layer's next `update` write row `first_row + i` at `positions[i]` and show all below `length`."""
        self._first_row = first_row
        self._positions = positions
        self._length = length

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Add states `[rows, heads, width, dim]`; return all that the rows have."""
        keys = self._write(2 * layer_idx, key_states)
        return keys, self._write(2 * layer_idx + 1, value_states)

    def copy_in(self, row: int, source: "SlotKV", line: int, tokens: int) -> None:
        """Begin `row` with the first `tokens` of the row `line` of another."""
        for target, states in zip(self.tensors, source.tensors, strict=True):
            target[row, :, :tokens] = states[line, :, :tokens]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy `tokens` of row `source` over row `target`."""
        for states in self.tensors:
            states[target, :, :tokens] = states[source, :, :tokens]

    def clear(self, row: int) -> None:
        """Forget a row that may hold what is no number, which a mask would not hide from its next user."""
        for states in self.tensors:
            states[row].zero_()

    def release(self) -> None:
        """Forget all rows and give their memory back."""
        self._resize(0, 0)

    def _write(self, which: int, states: Tensor) -> Tensor:
        tensor = self.tensors[which]
        rows = slice(self._first_row, self._first_row + states.shape[0])
        tensor[self._row_index[rows, None], :, self._positions] = states.transpose(1, 2)
        return tensor[rows, :, : self._length]

    def _resize(self, rows: int, tokens: int) -> None:
        kept_rows, kept_tokens = min(rows, self._rows), min(tokens, self._tokens)
        for which, old in enumerate(self.tensors):
            # zeros: what a mask hides must still be a number
            new = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
            new[:kept_rows, :, :kept_tokens] = old[:kept_rows, :, :kept_tokens]
            self.tensors[which] = new
        self._rows, self._tokens = rows, tokens


def all_states(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of each layer in turn: `[batch, heads, tokens, dim]` each."""
    found: list[Tensor] = []
    for number in range(len(cache)):
        layer: Any = cache.layers[number]  # of whatever class the model needs
        if layer.keys is None or layer.values is None:
            raise TypeError(f"layer {number} keeps no keys and values")
        found += layer.keys, layer.values
    return found
