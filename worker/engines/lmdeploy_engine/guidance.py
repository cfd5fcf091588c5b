"""Guides inside lmdeploy: in place of its own manager of grammars, which cannot begin behind tokens that were kept."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worker.engines.guide import Matcher, masked, words_of

GUIDED = {"type": "json_object"}
"""What tells lmdeploy that a request is guided; which guide it is, the session's id tells."""


class Guidance:
    """`GuidedDecodingManager`, as lmdeploy's sampling calls it: `fill_bitmap` and `accept_token` in a thread."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._matchers: dict[int, Matcher] = {}

    def begin(self, session_id: int, matcher: Matcher) -> None:
        """Guide what is drawn in a session."""
        self._matchers[session_id] = matcher

    def end(self, session_id: int) -> None:
        """Forget a session; again if need be."""
        self._matchers.pop(session_id, None)

    def get_processors(
        self, session_ctx: Sequence[Mapping[str, int]], response_formats: Sequence[object]
    ) -> dict[int, Matcher]:
        """The matchers of a batch, by row."""
        ids = [one["session_id"] for one in session_ctx]
        return {
            row: self._matchers[session_id]
            for row, (session_id, wanted) in enumerate(zip(ids, response_formats, strict=True))
            if wanted and session_id in self._matchers
        }

    def allocate_batched_bitmap(self, batch_size: int) -> Tensor:
        """Everything allowed: int32 `[batch, words]`."""
        with torch.inference_mode(mode=False):  # the thread that writes into it is in no such mode
            return torch.full((batch_size, words_of(self._vocabulary)), -1, dtype=torch.int32)

    def is_terminated(self, matcher: Matcher) -> bool:
        """Whether the sample has ended, or cannot go on; then nothing is masked or counted."""
        return matcher.ended or matcher.failure is not None

    def fill_bitmap(self, matcher: Matcher, words: Tensor, row: int) -> None:
        """Write what may come next in a row; anything where the matcher failed, since the sample is given up."""
        matcher.fill(words[row])
        if matcher.failure is not None:
            words[row].fill_(-1)

    def apply_batched_bitmap(self, logits: Tensor, words: Tensor) -> None:
        """Mask the rows that have a guide, in place."""
        guided = (words != -1).any(-1).nonzero()[:, 0]
        if len(guided):
            here = guided.to(logits.device)
            logits[here] = masked(logits[here], words[guided])

    def accept_token(self, matcher: Matcher, token_id: int) -> None:
        """What was drawn."""
        matcher.advance(token_id)

    def remove_processor(self, session_id: int) -> None:
        """Of a session that lmdeploy has ended."""
        self.end(session_id)

    def clear(self) -> None:
        """At its end."""
        self._matchers.clear()
