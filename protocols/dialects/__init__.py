"""The wire shapes of jobs, by the name in a job's `protocol` field."""

from collections.abc import Mapping

from protocols.dialects.base import Dialect
from protocols.dialects.claude_count_tokens import ClaudeCountTokens
from protocols.dialects.claude_messages import ClaudeMessages
from protocols.dialects.generate import Generate
from protocols.dialects.openai_chat import OpenAIChat
from protocols.dialects.openai_completions import OpenAICompletions
from protocols.errors import RolloutError, UnknownProtocol

_all: tuple[Dialect, ...] = (
    OpenAIChat(),
    OpenAICompletions(),
    ClaudeMessages(),
    ClaudeCountTokens(),
    Generate(),
)

DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in _all}


def dialect_of(name: str) -> Dialect:
    """The dialect of that name; raises UnknownProtocol, which lists the names."""
    dialect = DIALECTS.get(name)
    if dialect is None:
        raise UnknownProtocol(
            f"`protocol`: {name[:64]!r} is unknown; known are {', '.join(DIALECTS)}",
            param="protocol",
        )
    return dialect


def error_body(name: str, error: RolloutError, job_id: str) -> bytes:
    """The error body of a job of that protocol; of an unknown one, OpenAI's."""
    return DIALECTS.get(name, _all[0]).error(error, job_id)


def http_status(name: str, status: int) -> int:
    """The HTTP status that clients of that protocol know, for one of ours."""
    return DIALECTS.get(name, _all[0]).http_status(status)
