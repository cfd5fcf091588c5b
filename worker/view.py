"""What a response says, as blocks, from its tokens: a view of them, whole or piece by piece.

Tokens may come in any segments: joined, the pieces after some tokens depend on these tokens alone. Held back is what
the next token may change: an incomplete character, what could begin a stop string or markup, a call until it is whole.
"""

import codecs
import hashlib
from collections import deque
from collections.abc import Sequence

from protocols.dialects.base import Piece
from protocols.message import Block, Text, Thinking, ToolUse
from protocols.rollout_state import SampleParams
from worker.engines.base import Tokenizer
from worker.regions import PLAIN, Reading, Regions
from worker.stops import StopSearch


class View:
    """Of one sample."""

    def __init__(
        self,
        params: SampleParams,
        tokenizer: Tokenizer,
        reading: Reading = PLAIN,
        *,
        rollout_id: str = "",
        plain: bool = False,
    ) -> None:
        """`rollout_id`, `<job id>/<index>`, makes the ids of calls: every attempt gives them the same.

        A plain one sees nothing but text; it ends where `reading` lets the sample end all the same.
        """
        shown = PLAIN if plain else reading
        markup = shown.markup
        self._params, self._tokenizer = params, tokenizer
        self._marks = {
            mark.encode() for pair in (markup.thinking, markup.call) for mark in pair or ()
        }
        self._search = StopSearch(
            params, tokenizer, reading.markup.thinking, begun=reading.thinking
        )
        self._waiting: deque[tuple[bytes, bool]] = deque()
        """Bytes of tokens, and whether they are shown, that could belong to a stop string."""
        self._released_bytes = 0
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._regions = Regions(shown, lambda call: _call_id(rollout_id, call))
        self._begun = False
        self._blocks: list[tuple[Piece, list[str]]] = []

    @property
    def parse_error(self) -> str | None:
        """Why markup stayed text."""
        return self._regions.parse_error

    def feed(self, token_ids: Sequence[int]) -> list[Piece]:
        """What these tokens add; nothing after a stop string."""
        if self._search.stop is not None:
            return []
        shown = self._sure(token_ids) if self._params.stops else self._shown(token_ids)
        return self._keep(self._regions.feed(self._characters.decode(shown)))

    def end(self) -> list[Piece]:
        """What was held back; no more tokens come."""
        until = self._search.drawn_bytes if self._search.stop is None else self._released_bytes
        text = self._characters.decode(self._release(until), final=True)
        return self._keep([*self._regions.feed(text), *self._regions.end()])

    def blocks(self) -> tuple[Block, ...]:
        """What was said so far."""
        return tuple(_block(first, "".join(texts)) for first, texts in self._blocks)

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if piece.opens:
                self._blocks.append((piece, []))
            self._blocks[-1][1].append(piece.text)
        return pieces

    def _shown(self, token_ids: Sequence[int]) -> bytes:
        return b"".join([self._piece(token_id) for token_id in token_ids])

    def _piece(self, token_id: int) -> bytes:
        """What is shown of a token: nothing of a special one, unless it is markup or was asked for."""
        piece = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.special_ids and self._params.skip_special_tokens:
            return piece if piece in self._marks else b""
        if self._begun:
            return piece
        self._begun = True
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        # some decoders drop the space that a response's first word begins with
        return piece[1:] if piece[:1] == b" " != text[:1].encode() else piece

    def _sure(self, token_ids: Sequence[int]) -> bytes:
        """What is shown and cannot be part of a stop string any more."""
        search = self._search
        for token_id in token_ids[: search.kept(token_ids)]:
            piece, shown = self._tokenizer.token_bytes(token_id), self._piece(token_id)
            self._waiting.append((piece[: len(piece) - len(shown)], False))
            self._waiting.append((shown, True))
        if search.stop is None:
            return self._release(search.drawn_bytes - search.held_bytes())
        whole = self._params.include_stop_str_in_output
        return self._release(search.start_byte + whole * len(search.stop.encode()))

    def _release(self, until_byte: int) -> bytes:
        """What is shown of the waiting bytes up to this one."""
        shown: list[bytes] = []
        while self._waiting and self._released_bytes < until_byte:
            piece, is_shown = self._waiting.popleft()
            room = until_byte - self._released_bytes
            if len(piece) > room:
                self._waiting.appendleft((piece[room:], is_shown))
            shown.append(piece[:room] if is_shown else b"")
            self._released_bytes += min(room, len(piece))
        return b"".join(shown)


def _block(first: Piece, text: str) -> Block:
    match first.kind:
        case "text":
            return Text(text)
        case "thinking":
            return Thinking(text)
        case "tool_use":
            return ToolUse(first.id, first.name, text)


def _call_id(rollout_id: str, call: int) -> str:
    """Without a prefix, which the dialects put before it."""
    return hashlib.blake2b(f"{rollout_id}/{call}".encode(), digest_size=12).hexdigest()
