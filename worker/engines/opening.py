"""What the end of a prompt says of the thinking of its response."""

from collections.abc import Sequence
from typing import Literal

from worker.engines.base import Tokenizer

END_TOKENS = 32
"""A prompt that opens or closes the thinking ends with that, within so many tokens."""
Opening = Literal["opened", "closed", "unsaid"]


def opening_of(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> Opening:
    """Whether the prompt has begun the thinking, has ended it, or leaves it to the response."""
    if tokenizer.markup.thinking is None:
        return "unsaid"
    opens, closes = [mark.strip().encode() for mark in tokenizer.markup.thinking]
    end, wanted = b"", max(len(opens), len(closes))
    for token_id in reversed(prompt_ids[-END_TOKENS:]):
        end = (tokenizer.token_bytes(token_id) + end).rstrip()
        if len(end) >= wanted:
            break
    if end.endswith(opens):
        return "opened"
    return "closed" if end.endswith(closes) else "unsaid"
