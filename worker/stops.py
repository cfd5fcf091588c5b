"""Where a stop string ends a sample: a function of its tokens alone, however they come."""

from collections.abc import Sequence
from typing import AnyStr

from protocols.rollout_state import SampleParams
from worker.engines.base import Tokenizer

LEAD_CHARS = 64
"""After more white space than this a response has begun with text, not with thinking."""
SPACE = " \t\r\n"


def begins_with(lead: AnyStr, mark: AnyStr, space: AnyStr) -> bool | None:
    """Whether a response that begins with `lead` opens with `mark`, after white space; None: not to be told yet."""
    text = lead.lstrip(space)
    if len(lead) - len(text) > LEAD_CHARS:
        return False
    if text[: len(mark)] == mark:
        return True
    return None if mark[: len(text)] == text else False


def may_begin(text: str, marks: Sequence[str]) -> int:
    """How much of the end of `text` could be the beginning of one of `marks`, and not all of it."""
    return max((_begun(text, mark) for mark in marks), default=0)


def _begun(text: str, mark: str) -> int:
    at = text.find(mark[:1], max(0, len(text) - len(mark) + 1))
    while at >= 0:
        if mark[: len(text) - at] == text[at:]:
            return len(text) - at
        at = text.find(mark[:1], at + 1)
    return 0


class StopSearch:
    """Of one sample. Stop strings are not looked for within thinking, which comes first if at all."""

    def __init__(
        self,
        params: SampleParams,
        tokenizer: Tokenizer,
        thinking: tuple[str, str] | None = None,
        *,
        begun: bool = False,
    ) -> None:
        """`thinking` is what opens and closes it; `begun`: the prompt has opened it."""
        self._params, self._tokenizer = params, tokenizer
        self._stops = [stop.encode() for stop in params.stops]
        self._reach = max(map(len, self._stops), default=0)
        self._open, self._close = (mark.encode() for mark in thinking or ("", ""))
        self._lead: bytes | None = b"" if thinking and not begun else None
        self._thinking = thinking is not None and begun
        self._thought = b""
        self._tail = b""
        self._tokens = 0
        self.drawn_bytes = 0
        """Of all tokens so far, special ones included."""
        self.stop: str | None = None
        """The stop string that has ended the sample."""
        self.start_byte = 0
        """Where it begins."""

    def kept(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens belong to the sample: up to the one that completes a stop string."""
        for count, token_id in enumerate(token_ids, 1):
            self._add(self._tokenizer.token_bytes(token_id))
            if self.stop is not None:
                return count
        return len(token_ids)

    def held_bytes(self) -> int:
        """How many of the last bytes could be the beginning of a stop string."""
        return may_begin(_spelled(self._tail), [_spelled(stop) for stop in self._stops])

    def _add(self, piece: bytes) -> None:
        self._tokens += 1
        self.drawn_bytes += len(piece)
        piece = self._outside(piece)
        window = self._tail + piece
        self._tail = window[-(self._reach - 1) :] if self._reach > 1 else b""
        if self._tokens < self._params.min_tokens:
            return
        old = len(window) - len(piece)  # a match must end in this token
        found = [
            (at, index)
            for index, stop in enumerate(self._stops)
            if (at := window.find(stop, max(0, old - len(stop) + 1))) >= 0
        ]
        if found:
            at, index = min(found)
            self.stop = self._params.stops[index]
            self.start_byte = self.drawn_bytes - len(window) + at

    def _outside(self, piece: bytes) -> bytes:
        """What of a piece is no thinking."""
        if self._lead is not None:
            self._lead += piece
            opened = begins_with(self._lead, self._open, SPACE.encode())
            if not opened:
                self._lead = self._lead if opened is None else None
                return piece
            piece = self._lead.lstrip(SPACE.encode())[len(self._open) :]
            self._lead, self._thinking, self._tail = None, True, b""
        if not self._thinking:
            return piece
        self._thought += piece
        at = self._thought.find(self._close)
        if at < 0:
            self._thought = self._thought[-(len(self._close) - 1) :]
            return b""
        self._thinking = False
        return self._thought[at + len(self._close) :]


def _spelled(data: bytes) -> str:
    """A character for each byte."""
    return data.decode("latin-1")
