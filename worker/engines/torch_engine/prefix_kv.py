"""Keys and values that outlive their samples, for later prompts that begin alike.

They are copies: a row never shares memory with what is kept, so neither has to wait for the other.
The memory grows with use and is given back when all is forgotten.
"""

from array import array  # noqa: TC003 - stands in quotes: not subscriptable at run time before 3.12

import torch

from .kv import SlotKV
from .prefix_tree import PrefixTree

_FIRST_TOKENS = 256


class PrefixKV:
    """What is kept, at most `capacity_tokens` of it."""

    def __init__(self, like: SlotKV, capacity_tokens: int) -> None:
        """Empty; keys and values as `like` has them."""
        self._capacity_tokens = capacity_tokens
        self._tree = PrefixTree(capacity_tokens)
        self._tensors = [one.new_empty(0, one.shape[1], one.shape[3]) for one in like.tensors]
        """One a layer and kind: `[places, heads, dim]`."""

    def known(self, ids: "array[int]") -> int:
        """How many tokens of `ids` are kept, from the first on."""
        return self._tree.known(ids)

    def copy_out(self, ids: "array[int]", kv: SlotKV, row: int, start: int = 0) -> int:
        """Fill a row from position `start` on with what is kept of `ids`; returns the position it then comes to."""
        places = self._tree.find(ids)[start:]
        if places:
            index = torch.tensor(places, device=self._tensors[0].device)
            for target, kept in zip(kv.tensors, self._tensors, strict=True):
                target[row, :, start : start + len(places)] = kept[index].transpose(0, 1)
        return start + len(places)

    def keep(self, ids: "array[int]", kv: SlotKV, row: int) -> None:
        """Keep what a row has of `ids`, which it holds from position 0 on."""
        added = self._tree.add(ids)
        if not added.places:
            return
        self._grow(max(added.places) + 1)
        index = torch.tensor(added.places, device=self._tensors[0].device)
        end = added.start + len(added.places)
        for kept, source in zip(self._tensors, kv.tensors, strict=True):
            kept[index] = source[row, :, added.start : end].transpose(0, 1)

    def clear(self) -> None:
        """Forget all and give the memory back."""
        self._tree.clear()
        self._tensors = [one.new_empty(0, *one.shape[1:]) for one in self._tensors]

    def _grow(self, places: int) -> None:
        held = len(self._tensors[0])
        if places <= held:
            return
        wide = min(max(_FIRST_TOKENS, places, 2 * held), self._capacity_tokens)
        for which, old in enumerate(self._tensors):
            new = old.new_empty(wide, *old.shape[1:])
            new[:held] = old
            self._tensors[which] = new
