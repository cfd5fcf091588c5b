"""Verdicts on request fields: a body's struct names every field and says what becomes of it.

A field without a verdict is honoured. `Annotated[object, ignored()]` is accepted without effect and
reported; `Annotated[object, refused()]` is a 400 that names it. Neutral values, null among them,
mean what happens anyway and are accepted in silence. Fields that the struct lacks are unknown, and
refused by the decoder.
"""

import re
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar, get_type_hints

import msgspec

from protocols.codec import encode_json
from protocols.errors import UnsupportedOption

Value = TypeVar("Value")
_INDEX = re.compile(r"\[\d+\]")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a field that is not honoured."""

    refuse: bool
    neutral: tuple[object, ...]
    """Values that mean what happens anyway."""


def ignored(*neutral: object) -> Verdict:
    """Accepted without effect, and reported."""
    return Verdict(refuse=False, neutral=(None, *neutral))


def refused(*neutral: object) -> Verdict:
    """A 400 that names the field and its neutral values."""
    return Verdict(refuse=True, neutral=(None, *neutral))


class Verdicts:
    """The fields of one struct that have a verdict: two at least."""

    def __init__(self, kind: type[msgspec.Struct]) -> None:
        hints = get_type_hints(kind, include_extras=True)
        self.by_field: dict[str, Verdict] = {
            name: verdict
            for name, hint in hints.items()
            for verdict in getattr(hint, "__metadata__", ())
            if isinstance(verdict, Verdict)
        }
        self._values = attrgetter(*self.by_field)

    def check(self, value: msgspec.Struct, *at: str | int) -> list[str]:
        """Fields of `value` at path `at` that have no effect; raises UnsupportedOption.

        Indices are left out, so that `messages[].name` is reported once for all messages.
        """
        values = self._values(value)
        if values.count(None) == len(values):
            return []
        given = zip(self.by_field, values, strict=True)
        reported = [path(*at, name) for name, said in given if self._reports(name, said, at)]
        return [_INDEX.sub("[]", field) for field in reported]

    def _reports(self, name: str, value: object, at: tuple[str | int, ...]) -> bool:
        verdict = self.by_field[name]
        if value in verdict.neutral:
            return False
        if not verdict.refuse:
            return True
        field = path(*at, name)
        accepted = ", ".join(encode_json(neutral).decode() for neutral in verdict.neutral)
        raise UnsupportedOption(
            f"`{field}`: not supported; leave it out, or send one of: {accepted}", param=field
        )


def path(*at: str | int) -> str:
    """`messages[3].content`, as in the decoder's own errors."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".")


def chosen(unused: list[str], default: Value, **aliases: Value | None) -> Value:
    """The first alias that is given, else `default`; others that differ are added to `unused`."""
    given = {name: value for name, value in aliases.items() if value is not None}
    if not given:
        return default
    winner = next(iter(given.values()))
    unused += [name for name, value in given.items() if value != winner]
    return winner
