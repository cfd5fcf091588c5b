"""Verdicts on request fields: a body's struct names every field and says what becomes of it.

A field without a verdict is honoured. The others are `Annotated[object, ignored()]`, `withheld()` or
`refused()`, and the request's `rollout.unsupported` decides whether such a field is reported as
ignored or a 400 that names it:

    rollout.unsupported    absent      warn        ignore      error
    ignored                reported    reported    reported    400
    withheld               400         reported    reported    400
    refused                400         400         reported    400

Neutral values, null among them, mean what happens anyway and are accepted in silence. Fields that
the struct lacks are unknown, and refused by the decoder.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar, get_type_hints

import msgspec

from protocols.codec import encode_json
from protocols.dialects.base import Unsupported
from protocols.errors import InvalidRequest, UnsupportedOption

Value = TypeVar("Value")
_INDEX = re.compile(r"\[\d+\]")

IGNORED: frozenset[Unsupported | None] = frozenset({None, "warn", "ignore"})
WITHHELD: frozenset[Unsupported | None] = frozenset({"warn", "ignore"})
REFUSED: frozenset[Unsupported | None] = frozenset({"ignore"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a field that is not honoured."""

    tolerated: frozenset[Unsupported | None]
    """The values of `rollout.unsupported` under which it is reported; under the others it is a 400."""
    neutral: tuple[object, ...]
    """Values that mean what happens anyway."""


def ignored(*neutral: object) -> Verdict:
    """Harmless: it changes neither the tokens nor what is told of them."""
    return Verdict(IGNORED, (None, *neutral))


def withheld(*neutral: object) -> Verdict:
    """It asks for more than is told here, and changes no token."""
    return Verdict(WITHHELD, (None, *neutral))


def refused(*neutral: object) -> Verdict:
    """It would change the tokens."""
    return Verdict(REFUSED, (None, *neutral))


class Report:
    """What becomes of the fields of one request that are not honoured: noted here, or refused."""

    def __init__(self, unsupported: Unsupported | None) -> None:
        self._unsupported = unsupported
        self._noted: dict[str, None] = {}

    @property
    def noted(self) -> tuple[str, ...]:
        """Fields without effect, each once: indices are left out, as in `messages[].name`."""
        return tuple(self._noted)

    def ignore(self, field: str, why: str = "it has no effect here") -> None:
        """Note a harmless field; raises UnsupportedOption where the request wants to know."""
        self.judge(IGNORED, field, why)

    def refuse(self, field: str, why: str) -> None:
        """Raise UnsupportedOption, unless the request wants such fields to be ignored."""
        self.judge(REFUSED, field, why)

    def judge(self, tolerated: frozenset[Unsupported | None], field: str, why: str) -> None:
        """Note a field or refuse it, as the request wants it."""
        if self._unsupported not in tolerated:
            raise UnsupportedOption(f"`{field}`: {why}", param=field)
        self._noted[_INDEX.sub("[]", field)] = None


class Verdicts:
    """The fields of one struct that have a verdict."""

    def __init__(self, kind: type[msgspec.Struct]) -> None:
        hints = get_type_hints(kind, include_extras=True)
        self.by_field: dict[str, Verdict] = {
            name: verdict
            for name, hint in hints.items()
            for verdict in getattr(hint, "__metadata__", ())
            if isinstance(verdict, Verdict)
        }
        self._values = _getter(*self.by_field)

    def check(self, value: msgspec.Struct, report: Report, *at: str | int) -> None:
        """Report or refuse fields of `value`, which lies at path `at`; raises UnsupportedOption."""
        values = self._values(value)
        if values.count(None) == len(values):
            return
        for (name, verdict), given in zip(self.by_field.items(), values, strict=True):
            if given not in verdict.neutral:
                report.judge(verdict.tolerated, path(*at, name), _why(verdict))


def _getter(*names: str) -> Callable[[msgspec.Struct], tuple[object, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


def _why(verdict: Verdict) -> str:
    accepted = ", ".join(encode_json(neutral).decode() for neutral in verdict.neutral)
    return f"not supported; leave it out, or send one of: {accepted}"


def wrong(why: str, *at: str | int) -> InvalidRequest:
    """The error of a field that is not as its protocol has it."""
    field = path(*at)
    return InvalidRequest(f"`{field}`: {why}", param=field)


def path(*at: str | int) -> str:
    """`messages[3].content`, as in the decoder's own errors."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".")


def chosen(report: Report, at: str, default: Value, **aliases: Value | None) -> Value:
    """The first alias that is given, else `default`; others below path `at` that differ are reported."""
    winner, won = "", None
    for name, value in aliases.items():
        if value is None:
            continue
        if won is None:
            winner, won = name, value
        elif value != won:
            report.ignore(at + name, f"`{at}{winner}` says otherwise, and wins; send one of them")
    return default if won is None else won
