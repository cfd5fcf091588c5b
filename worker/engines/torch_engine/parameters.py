"""The weights of a network as places: filled anew, moved to host memory, emptied. Belongs to the slot loop's thread.

Each change is made whole or not at all: new memory is taken for everything before anything is let go.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from protocols.errors import OutOfMemory


class Place:
    """One tensor of the network, under all the names that it is tied to."""

    def __init__(self, names: Sequence[str], holders: Sequence[Tensor]) -> None:
        """`holders`: the network's own tensor objects, which have the same memory."""
        self.names = names
        self.shape = holders[0].shape
        self.dtype = holders[0].dtype
        self.device = holders[0].device
        self._holders = holders

    @property
    def tensor(self) -> Tensor:
        """What it holds now."""
        return self._holders[0].data

    def hold(self, tensor: Tensor) -> None:
        """Hold another tensor; the memory of the former is free once nobody else has it."""
        for holder in self._holders:
            holder.data = tensor


class Parameters:
    """All places of a network."""

    def __init__(self, places: Sequence[Place], ignored: frozenset[str]) -> None:
        """`ignored`: names of what the network computes itself."""
        self.ignored = ignored
        self.places = places

    def fill(self, staged: list[Tensor]) -> None:
        """Take over host tensors, one a place, of its shape and type; `staged` is emptied."""
        for place in reversed(self.places):
            new = staged.pop()
            if place.device.type == "cpu":
                place.hold(new)
            else:
                # into the memory that is there: twice the weights might not fit the device
                place.tensor.copy_(new)

    def to_host(self) -> None:
        """Keep the weights in host memory only; on the CPU they are there."""
        self._hold_all(lambda place: place.tensor.cpu())

    def to_device(self) -> None:
        """Bring back what is in host memory; raises OutOfMemory."""
        self._hold_all(lambda place: place.tensor.to(place.device))

    def discard(self) -> None:
        """Let the weights go."""
        self._hold_all(lambda place: torch.empty(0, dtype=place.dtype, device=place.device))

    def make_room(self) -> None:
        """Take memory for weights, with nothing in it; raises OutOfMemory."""
        self._hold_all(
            lambda place: torch.empty(place.shape, dtype=place.dtype, device=place.device)
        )

    def _hold_all(self, made: Callable[[Place], Tensor]) -> None:
        try:
            tensors = [made(place) for place in self.places]
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "the device has no room for the weights; free memory there, or wait until others do, and try again"
            ) from error
        for place, tensor in zip(self.places, tensors, strict=True):
            place.hold(tensor)


def places(state: Mapping[str, Tensor]) -> list[Place]:
    """Of a network's own tensor objects by name; those with the same memory are one place."""
    groups: dict[object, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        groups.setdefault(key, {})[name] = tensor
    return [Place(list(group), list(group.values())) for group in groups.values()]
