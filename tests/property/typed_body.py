"""Strategies for the request types of the official clients, which are TypedDicts of what JSON can say."""

import types
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from hypothesis import strategies as st

MAX_OPTIONAL = 3
"""More fields at once would nearly always meet one that is refused."""
Json = st.SearchStrategy[Any]

words = st.text(max_size=6) | st.sampled_from(
    ["user", "assistant", "tool", "f", "https://a", "{", "{}", "\x00", "é"]
)
numbers = st.sampled_from([0, 1, -1, 2, 1024, 2**31, 2**63, 2**70])
scalars: Json = st.none() | st.booleans() | numbers | words
values: Json = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
)
PLAIN: dict[object, Json] = {
    str: words,
    int: numbers,
    float: st.floats(allow_nan=False, allow_infinity=False) | numbers,
    bool: st.booleans(),
    type(None): st.none(),
    object: values,
    Any: values,
}


@cache
def strategy_of(hint: object) -> Json:
    """What JSON values of a type look like; of a type that JSON has no values of, text."""
    if hasattr(
        hint, "__required_keys__"
    ):  # `is_typeddict` does not know those of typing_extensions
        return st.deferred(lambda: _typed_dict(hint))
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Required, NotRequired, Annotated):
        return strategy_of(args[0])
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([strategy_of(arg) for arg in args])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(words, strategy_of(args[1]), max_size=3)
    if _is_sequence(hint):
        return st.lists(strategy_of(args[0]), max_size=3)
    return PLAIN.get(hint, words)


def _is_sequence(hint: object) -> bool:
    origin = get_origin(hint)
    if not isinstance(origin, type):
        return False
    return issubclass(origin, Iterable | Sequence) or origin.__name__ == "SequenceNotStr"


def _typed_dict(hint: Any) -> Json:  # noqa: ANN401
    hints = get_type_hints(hint, include_extras=True)
    required = [name for name, kind in hints.items() if get_origin(kind) is Required]
    optional = [name for name in hints if name not in required]

    @st.composite
    def drawn(draw: st.DrawFn) -> dict[str, Any]:
        extra = st.lists(st.sampled_from(optional), max_size=MAX_OPTIONAL, unique=True)
        names = required + (draw(extra) if optional else [])
        return {name: draw(strategy_of(hints[name])) for name in names}

    return drawn()
