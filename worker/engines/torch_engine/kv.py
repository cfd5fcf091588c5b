"""Keys and values of the rows under way: one tensor `[rows, heads, tokens, dim]` a layer, each row left-aligned.

Every row has a position of its own. Rows 0 .. n - 1 are live; whoever retires a row moves the last one into the hole.
The tensors grow with use and stay within `budget_tokens` (rows x tokens), which the schedule sees to.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

_FIRST_TOKENS = 256


class SlotKV(Cache):
    """What a Hugging Face model takes as its cache while it forwards tokens of live rows."""

    def __init__(self, like: DynamicCache, slots: int, budget_tokens: int) -> None:
        """For at most `slots` rows, with the layers, shapes and type of the cache `like`, which a prefill filled."""
        super().__init__(layers=[])
        self._slots = slots
        self.budget_tokens = budget_tokens
        """Most rows x tokens."""
        layers = [states for one in range(len(like)) for states in layer_states(like, one)]
        self._tensors = [
            states.new_zeros(0, states.shape[1], 0, states.shape[3]) for states in layers
        ]
        self._rows = self._tokens = 0
        self._row_index = torch.arange(slots, device=layers[0].device)
        self._first_row = self._length = 0
        self._positions = self._row_index[:, None]

    @property
    def token_bytes(self) -> int:
        """Memory of one token of one row, over all layers."""
        return sum(one.shape[1] * one.shape[3] * one.element_size() for one in self._tensors)

    def reserve(self, rows: int, tokens: int, longest: int) -> None:
        """Make room for `rows` rows of `tokens`, where no row will grow beyond `longest`."""
        if rows <= self._rows and tokens <= self._tokens:
            return
        wide = max(rows, self._rows if rows <= self._rows else min(2 * rows, self._slots))
        needed = min(max(_FIRST_TOKENS, 1 << (tokens - 1).bit_length()), longest)
        long = max(needed, self._tokens)
        if wide * long > self.budget_tokens:
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

    def copy_in(self, row: int, prompt: DynamicCache, line: int, tokens: int) -> None:
        """Begin `row` with the first `tokens` of a prefilled prompt, `line` in its batch."""
        for one in range(len(prompt)):
            for which, states in enumerate(layer_states(prompt, one)):
                self._tensors[2 * one + which][row, :, :tokens] = states[line, :, :tokens]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy `tokens` of row `source` over row `target`."""
        for states in self._tensors:
            states[target, :, :tokens] = states[source, :, :tokens]

    def clear(self, row: int) -> None:
        """Forget a row that may hold what is no number, which a mask would not hide from its next user."""
        for states in self._tensors:
            states[row].zero_()

    def release(self) -> None:
        """Forget all rows and give their memory back."""
        self._resize(0, 0)

    def _write(self, which: int, states: Tensor) -> Tensor:
        tensor = self._tensors[which]
        rows = slice(self._first_row, self._first_row + states.shape[0])
        tensor[self._row_index[rows, None], :, self._positions] = states.transpose(1, 2)
        return tensor[rows, :, : self._length]

    def _resize(self, rows: int, tokens: int) -> None:
        kept_rows, kept_tokens = min(rows, self._rows), min(tokens, self._tokens)
        for which, old in enumerate(self._tensors):
            # zeros: what a mask hides must still be a number
            new = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
            new[:kept_rows, :, :kept_tokens] = old[:kept_rows, :, :kept_tokens]
            self._tensors[which] = new
        self._rows, self._tokens = rows, tokens


def layer_states(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer: `[batch, heads, tokens, dim]` each."""
    states: Any = cache.layers[layer]  # of whatever class the model needs
    keys, values = states.keys, states.values
    if keys is None or values is None:
        raise TypeError(f"layer {layer} keeps no keys and values")
    return keys, values
