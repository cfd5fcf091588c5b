"""OpenAI's usage, which `generate` shows too."""

import msgspec
from msgspec import UNSET, UnsetType

from protocols.dialects.base import Answer
from protocols.dialects.result import completion_tokens, thinking_tokens


class CompletionDetails(msgspec.Struct, frozen=True, gc=False):
    """Of which kind the generated tokens are."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of the prompt, counted once, and of all samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | UnsetType = UNSET
    """Where the answer holds thinking."""


def usage_of(answer: Answer) -> Usage:
    """OpenAI's usage."""
    prompt, completion = len(answer.states[0].prompt_ids), completion_tokens(answer)
    thought = thinking_tokens(answer)
    details = UNSET if thought is None else CompletionDetails(thought)
    return Usage(prompt, completion, prompt + completion, details)
