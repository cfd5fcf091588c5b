"""Which token sequences have keys and values kept, and where: a radix tree, integers only.

Every token kept has a place of its own, an index below `capacity_tokens`. Room is made at the end of
the sequence that was used longest ago, token by token.
"""

from array import array  # noqa: TC003 - stands in quotes: not subscriptable at run time before 3.12
from collections.abc import Sequence

import msgspec

from protocols.rollout_state import TokenIds


class Added(msgspec.Struct, frozen=True):
    """Tokens that were not kept before."""

    start: int
    """Position of the first in its sequence."""
    places: list[int]
    """One a token; whatever lay there is to be overwritten."""


class _Node:
    """A run of tokens without a fork."""

    __slots__ = ("children", "ids", "parent", "places")

    def __init__(self, ids: "array[int]", places: list[int], parent: "_Node | None") -> None:
        self.ids = ids
        self.places = places
        self.parent = parent
        self.children: dict[int, _Node] = {}
        """By their first token."""


class PrefixTree:
    """The sequences kept."""

    def __init__(self, capacity_tokens: int) -> None:
        """Empty."""
        self._capacity_tokens = capacity_tokens
        self.clear()

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return self._used - len(self._free)

    def clear(self) -> None:
        """Forget all."""
        self._root = _Node(TokenIds(), [], None)
        self._free: list[int] = []
        self._used = 0
        """Places below this are in use or free again."""
        self._by_age: dict[_Node, None] = {}
        """Used longest ago first; a node never comes before what goes on behind it, so the first has nothing behind."""

    def known(self, ids: "array[int]") -> int:
        """How many tokens of `ids` are kept, from the first on."""
        path, last = self._walk(ids)
        return sum(len(node.ids) for node in path[:-1]) + last

    def find(self, ids: "array[int]") -> list[int]:
        """The places of those tokens; they count as used now."""
        path, last = self._walk(ids)
        self._touch(path)
        return [place for node in path[:-1] for place in node.places] + path[-1].places[:last]

    def add(self, ids: "array[int]") -> Added:
        """Keep a sequence, or as much of its beginning as there is room for."""
        path, last = self._walk(ids)
        self._touch(path)
        start = sum(len(node.ids) for node in path[:-1]) + last
        if start == len(ids):
            return Added(start, [])
        end = path[-1] if last == len(path[-1].ids) else self._split(path[-1], last)
        places = self._take_places(len(ids) - start, end)
        if places:
            new = _Node(ids[start : start + len(places)], places, end)
            end.children[ids[start]] = new
            self._touch([*_line_of(end), new])
        return Added(start, places)

    def _walk(self, ids: "array[int]") -> tuple[list[_Node], int]:
        """The nodes along a sequence, the root first, and how many tokens of the last one agree."""
        path, at = [self._root], 0
        while at < len(ids):
            child = path[-1].children.get(ids[at])
            if child is None:
                break
            path.append(child)
            agreeing = _agreeing(child.ids, ids, at)
            at += agreeing
            if agreeing < len(child.ids):
                return path, agreeing
        return path, len(path[-1].ids)

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path[1:]):
            self._by_age.pop(node, None)
            self._by_age[node] = None

    def _split(self, node: _Node, at: int) -> _Node:
        """Part a node before its token `at`; returns the upper part, which is the newer one."""
        parent = node.parent
        if parent is None:
            raise ValueError("the root cannot be parted")
        upper = _Node(node.ids[:at], node.places[:at], parent)
        upper.children[node.ids[at]] = node
        parent.children[node.ids[0]] = upper
        node.ids, node.places, node.parent = node.ids[at:], node.places[at:], upper
        self._touch(_line_of(upper))
        return upper

    def _take_places(self, wanted: int, end: _Node) -> list[int]:
        """At most `wanted` places, without those of the line that leads to `end`."""
        room = self._capacity_tokens - self.tokens
        while room < wanted:
            oldest = next(iter(self._by_age), end)
            if oldest is end:
                break
            room += self._cut(oldest, wanted - room)
        taken = min(wanted, room)
        again = [self._free.pop() for _ in range(min(taken, len(self._free)))]
        fresh = range(self._used, self._used + taken - len(again))
        self._used += len(fresh)
        return [*again, *fresh]

    def _cut(self, node: _Node, tokens: int) -> int:
        """Forget the last tokens of a node with nothing behind it, at most all; returns how many."""
        kept = max(0, len(node.ids) - tokens)
        dropped = node.places[kept:]
        self._free += dropped
        if not kept and node.parent is not None:
            del node.parent.children[node.ids[0]]
            del self._by_age[node]
        node.ids, node.places = node.ids[:kept], node.places[:kept]
        return len(dropped)


def _line_of(node: _Node) -> list[_Node]:
    """The nodes from the root to this one."""
    line = [node]
    while line[-1].parent is not None:
        line.append(line[-1].parent)
    return line[::-1]


def _agreeing(run: "array[int]", ids: "array[int]", start: int) -> int:
    """How many tokens of `run` stand in `ids` from `start` on."""
    low, high = 0, min(len(run), len(ids) - start)
    # whole slices are compared much faster than tokens one by one
    while low < high:
        middle = (low + high + 1) // 2
        if run[low:middle] == ids[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low
