"""`claude.messages`: Anthropic's messages.

Beyond the current API: `temperature` (to 2), `top_p` and `top_k` are accepted at top level, and
`model` may be left out.
"""

from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from protocols.codec import encode_json, parse_json
from protocols.dialects.base import Answer, Normal, Options, Streamed
from protocols.dialects.claude_error import ClaudeErrors
from protocols.dialects.claude_request import Conversation, understood
from protocols.dialects.claude_response import message_of
from protocols.dialects.claude_stream import MessageStream, replay
from protocols.dialects.field import Report, Verdicts, ignored, refused, withheld
from protocols.dialects.sampling import NEUTRAL, Stops, Temperature, TopK, TopP
from protocols.message import Guide
from protocols.rollout_state import SampleParams


class Request(Conversation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request body."""

    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    """0: only the prompt is looked at, and the answer is empty."""
    stop_sequences: Stops | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stream: bool | None = None

    metadata: Annotated[object, ignored({})] = None
    service_tier: Annotated[object, ignored("auto", "standard_only")] = None
    inference_geo: Annotated[object, ignored()] = None
    diagnostics: Annotated[object, ignored({})] = None

    fallbacks: Annotated[object, withheld([])] = None
    fallback_credit_token: Annotated[object, withheld()] = None
    container: Annotated[object, refused()] = None


_decoder = msgspec.json.Decoder(Request)
_request = Verdicts(Request)


class ClaudeMessages(ClaudeErrors):
    """The dialect."""

    name = "claude.messages"

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        request = parse_json(_decoder, body)
        options = request.rollout or Options()
        report = Report(options.unsupported)
        _request.check(request, report)
        state, guide = understood(request, report)
        return Normal(
            replace(state, sample_params=_params_of(request, guide)),
            request.model,
            options,
            stream=bool(request.stream),
            ignored=report.noted,
        )

    def respond(self, answer: Answer) -> bytes:
        """A message; raises RolloutError where the sample did not come to its end."""
        return encode_json(message_of(answer))

    def stream(self, streamed: Streamed) -> MessageStream:
        """The frames of a job that begins."""
        return MessageStream(streamed)

    def replay(self, body: bytes) -> bytes:
        """The frames of a whole response."""
        return replay(body)


def _params_of(request: Request, guide: Guide | None) -> SampleParams:
    return SampleParams(
        max_tokens=request.max_tokens,
        temperature=NEUTRAL.temperature if request.temperature is None else request.temperature,
        top_p=request.top_p or NEUTRAL.top_p,
        top_k=max(request.top_k or 0, 0),
        stops=tuple(request.stop_sequences or ()),
        return_logprob=False,
        guide=guide,
    )
