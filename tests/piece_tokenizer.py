"""A tokenizer of given pieces, for what depends on where tokens end."""

from collections.abc import Iterable, Mapping, Sequence

from protocols.rollout_state import TokenIds
from worker.engines.base import NO_OPTIONS, Markup, Template, Turn, TurnTool


class PieceTokenizer:
    """Token `i` stands for `pieces[i]`."""

    def __init__(self, pieces: Sequence[bytes], special_ids: Iterable[int] = ()) -> None:
        self.pieces = pieces
        self.longest_token_bytes = max(map(len, pieces))
        self.special_ids = frozenset(special_ids)
        self.markup, self.template = Markup(), Template()

    def encode(self, text: str) -> TokenIds:
        raise NotImplementedError

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
    ) -> TokenIds:
        raise NotImplementedError

    def write(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
        *,
        opens: bool = True,
    ) -> str:
        raise NotImplementedError

    def encode_written(self, text: str) -> TokenIds:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        shown = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(self.pieces[i] for i in shown).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]
