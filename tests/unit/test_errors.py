"""The error tree."""

import pickle
from collections import Counter

import pytest

from protocols import errors
from protocols.errors import RolloutError, error_of


def leaves(base: type[RolloutError]) -> list[type[RolloutError]]:
    """Classes without subclasses: those that are raised."""
    below = base.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [base]


LEAVES = [kind for kind in leaves(RolloutError) if kind.__module__ == errors.__name__]
each_error = pytest.mark.parametrize("kind", [RolloutError, *LEAVES], ids=lambda kind: kind.code)


def test_codes_are_unique() -> None:
    counts = Counter(kind.code for kind in [RolloutError, *LEAVES])
    assert set(counts.values()) == {1}


@each_error
def test_error_is_found_by_its_code(kind: type[RolloutError]) -> None:
    found = error_of(kind.code, "told")
    assert type(found) is kind
    assert found.message == str(found) == "told"


def test_unknown_code_gives_the_base() -> None:
    assert type(error_of("of_tomorrow", "told")) is RolloutError


@each_error
def test_error_can_be_pickled(kind: type[RolloutError]) -> None:
    error = kind("told", param="n", retry_after_s=1.5)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (back.message, back.param, back.retry_after_s) == ("told", "n", 1.5)
    assert str(back) == "told"


@each_error
def test_error_has_an_http_status_and_is_in_the_tree_of_the_docstring(
    kind: type[RolloutError],
) -> None:
    assert 400 <= kind.http_status < 600
    assert f"{kind.__name__} " in (errors.__doc__ or "") or kind is RolloutError


@each_error
def test_docstring_tells_the_http_status(kind: type[RolloutError]) -> None:
    rows = [row.split() for row in (errors.__doc__ or "").splitlines()]
    told = {row[row.index(kind.__name__) + 1] for row in rows if kind.__name__ in row[:-1]}
    assert told == {str(kind.http_status)} or kind is RolloutError


def test_result_timeout_is_a_timeout_error() -> None:
    assert issubclass(errors.ResultTimeout, TimeoutError)
