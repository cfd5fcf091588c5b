"""`claude.count_tokens`: how many tokens the prompt of a message would have; nothing is drawn."""

from typing import Annotated, NoReturn

import msgspec
from msgspec import Raw

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import Answer, Normal, Options, Streamed
from protocols.dialects.claude_error import ClaudeErrors
from protocols.dialects.claude_request import Conversation, understood
from protocols.dialects.field import Report, Verdicts, ignored
from protocols.dialects.result import Result
from protocols.dialects.sse import event
from protocols.errors import UnsupportedOption


class Request(Conversation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""

    max_tokens: Annotated[object, ignored()] = None


class TokenCount(msgspec.Struct, frozen=True):
    """A response body."""

    input_tokens: int
    rollout: Result


_decoder = msgspec.json.Decoder(Request)
_request = Verdicts(Request)


class ClaudeCountTokens(ClaudeErrors):
    """The dialect."""

    name = "claude.count_tokens"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        options = request.rollout or Options()
        report = Report(options.unsupported)
        _request.check(request, report)
        state, _ = understood(request, report)
        return Normal(state, request.model, options, ignored=report.noted, counts=True)

    def respond(self, answer: Answer) -> bytes:
        """The count: of `prompt_ids`, whatever the sample's end."""
        count = len(answer.states[0].prompt_ids)
        return encode_json(TokenCount(count, Result(answer.attempts, answer.ignored)))

    def stream(self, streamed: Streamed) -> NoReturn:
        """Never asked for: such a job draws nothing."""
        raise UnsupportedOption("`stream`: a count has no stream", param="stream")

    def replay(self, body: bytes) -> bytes:
        """The count, as one event."""
        return event("message", Raw(body))
