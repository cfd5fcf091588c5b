"""From a response's text to its regions: thinking, text, tool calls, as they are marked.

A text may come in any parts: joined, what was said after some prefix of it depends on that prefix alone. White space
beside markup belongs to no block. A call is said when it is whole; what does not parse stays text, as it was written.
"""

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from protocols.dialects.base import Piece
from worker.engines.base import Markup
from worker.stops import SPACE, begins_with, may_begin

_STRING = re.compile(r'["\n]|\\.', re.DOTALL)
"""What ends a JSON string, or breaks it (none holds a line's end), and what is escaped in it."""


class Reading(msgspec.Struct, frozen=True):
    """What is looked for in a response beside text."""

    markup: Markup = Markup()
    thinking: bool = False
    """Whether the prompt has opened the thinking."""


PLAIN = Reading()
Kind = Literal["text", "thinking"]


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class Regions:
    """Of one response."""

    def __init__(self, reading: Reading, call_id: Callable[[int], str]) -> None:
        """`call_id` names the call of that number."""
        self._thought_open, self._thought_close = reading.markup.thinking or ("", None)
        self._call_open, self._call_close = reading.markup.call or (None, "")
        close = re.escape(self._call_close)
        self._json_mark, self._plain_mark = re.compile(f'"|{close}'), re.compile(close)
        self._mark = self._json_mark
        self._call_id, self._calls = call_id, 0
        self._step: Callable[[], bool] = self._text
        if self._thought_close is not None:
            self._step = self._thinking if reading.thinking else self._lead
        self._rest = ""
        self._space: list[str] = []
        """White space that belongs to the block if more of it comes."""
        self._body: list[str] = []
        self._fresh = reading.thinking
        """Whether markup has just ended: white space counts for nothing."""
        self._block = ""
        self._said: list[Piece] = []
        self.parse_error: str | None = None
        """Why the first markup that stayed text did not parse."""

    def feed(self, text: str) -> list[Piece]:
        """What more there is beyond doubt."""
        self._rest += text
        while self._step():
            pass
        said, self._said = self._said, []
        return said

    def end(self) -> list[Piece]:
        """What was held back, for nothing more comes."""
        rest = "".join(self._space) + "".join(self._body) + self._rest
        if self._step == self._within:
            self._fail("it is not closed")
        if self._step == self._thinking:
            self._say("thinking", rest.rstrip(SPACE))
        else:
            self._say("text", rest)
        self._rest, self._space, self._body = "", [], []
        said, self._said = self._said, []
        return said

    def _lead(self) -> bool:
        """Before it is known whether thinking comes first."""
        begun = begins_with(self._rest, self._thought_open, SPACE)
        if begun is None:
            return False
        if begun:
            self._rest = self._rest.lstrip(SPACE)[len(self._thought_open) :]
        self._fresh, self._step = begun, self._thinking if begun else self._text
        return True

    def _thinking(self) -> bool:
        if not self._take("thinking", self._thought_close):
            return False
        self._space, self._block, self._fresh, self._step = [], "", True, self._text
        return True

    def _text(self) -> bool:
        if not self._take("text", self._call_open):
            return False
        self._calls += 1
        self._body, self._mark = [self._call_open or ""], self._json_mark
        self._step = self._within
        return True

    def _take(self, kind: Kind, mark: str | None) -> bool:
        """Say what comes before `mark`; returns whether it was found, and is behind."""
        if self._fresh:
            self._rest = self._rest.lstrip(SPACE)
            self._fresh = not self._rest
        if mark is None:
            self._say(kind, self._rest)
            self._rest = ""
            return False
        at = self._rest.find(mark)
        found = at >= 0
        end = at if found else len(self._rest) - may_begin(self._rest, (mark,))
        text, self._rest = self._rest[:end], self._rest[end + found * len(mark) :]
        solid = text.rstrip(SPACE)
        if solid:
            self._say(kind, "".join(self._space) + solid)
            self._space = []
        self._space.append(text[len(solid) :])
        return found

    def _within(self) -> bool:
        """In a call: up to its closing mark, unless that stands in a JSON string."""
        rest, at = self._rest, 0
        while mark := self._mark.search(rest, at):
            at = mark.end()
            match mark[0]:
                case '"':
                    self._mark = self._json_mark if self._mark is _STRING else _STRING
                case "\n":
                    self._mark = self._plain_mark
                case self._call_close:
                    self._body.append(rest[:at])
                    self._rest = rest[at:]
                    self._closed()
                    return True
                case _:
                    pass
        quoted, tail = self._mark is _STRING, rest[at:]
        held = tail.endswith("\\") if quoted else may_begin(tail, (self._call_close,))
        self._body.append(rest[: len(rest) - held])
        self._rest = rest[len(rest) - held :]
        return False

    def _closed(self) -> None:
        whole = "".join(self._body)
        try:
            call = _parsed(whole[len(self._call_open or "") : -len(self._call_close)])
        except ValueError as error:
            self._fail(str(error))
            self._say("text", "".join(self._space) + whole)
        else:
            piece = Piece(
                "tool_use",
                bytes(call.arguments).decode(),
                opens=True,
                id=self._call_id(self._calls),
                name=call.name,
            )
            self._said.append(piece)
            self._block, self._fresh = "tool_use", True
        self._space, self._body, self._step = [], [], self._text

    def _fail(self, why: str) -> None:
        self.parse_error = self.parse_error or f"tool call {self._calls} stays text: {why}"

    def _say(self, kind: Kind, text: str) -> None:
        if text:
            self._said.append(Piece(kind, text, opens=kind != self._block))
            self._block = kind


def _parsed(body: str) -> _Call:
    """Raises ValueError, which says what is wrong."""
    try:
        call = msgspec.json.decode(body, type=_Call)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    if not call.name:
        raise ValueError("it has no name")
    return call
