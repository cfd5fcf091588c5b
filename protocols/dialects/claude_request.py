"""What requests for a message and requests for its token count have in common."""

from typing import Annotated

import msgspec
from msgspec import Meta

from protocols.dialects.base import MAX_MESSAGES, Name, Options
from protocols.dialects.choice import guide_of
from protocols.dialects.claude_block import TextBlock, Turn
from protocols.dialects.claude_message import messages_of, references
from protocols.dialects.claude_tool import (
    Choice,
    OutputConfig,
    OutputFormat,
    ThinkingConfig,
    Tools,
    format_of,
    offer,
    reasoning,
)
from protocols.dialects.field import Report, ignored, refused, withheld
from protocols.message import Guide
from protocols.rollout_state import RolloutState


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said, and with which tools."""

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: Name | None = None
    rollout: Options | None = None
    system: str | list[TextBlock] | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """An older name for `output_config.format`."""
    cache_control: object = None
    """Accepted in silence."""

    speed: Annotated[object, ignored("standard")] = None
    betas: Annotated[object, ignored([])] = None
    user_profile_id: Annotated[object, ignored()] = None
    workspace_id: Annotated[object, ignored()] = None

    mcp_servers: Annotated[object, refused([])] = None
    context_management: Annotated[object, refused({})] = None
    compaction: Annotated[object, refused()] = None
    thread: Annotated[object, refused()] = None
    billing_policy: Annotated[object, withheld()] = None


def understood(request: Conversation, report: Report) -> tuple[RolloutState, Guide | None]:
    """The conversation with its tools, and what the answer is constrained to; raises RequestError."""
    offered = offer(request.tools, request.tool_choice, references(request.messages), report)
    wanted, field = format_of(request.output_config, request.output_format, report)
    state = RolloutState(
        message=messages_of(request.messages, request.system, report),
        tools=offered.tools,
        tool_choice=offered.choice,
        reasoning=reasoning(request.thinking, request.output_config, report),
    )
    return state, guide_of(offered, wanted, field, report)
