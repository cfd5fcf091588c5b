"""Which tools a request offers, whether one must be called, and what the tokens are constrained to.

Every dialect reads these from fields of its own and brings them together here.
"""

from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta

from protocols.dialects.base import MAX_TOOLS
from protocols.dialects.field import Report
from protocols.errors import InvalidRequest
from protocols.message import CallGuide, Guide, JsonGuide, Tool, ToolChoice

ToolName = Annotated[str, Meta(min_length=1, max_length=128)]
ToolCount = Meta(max_length=MAX_TOOLS)


class Offer(msgspec.Struct, frozen=True):
    """The tools of a request."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()


def offer_of(
    tools: tuple[Tool, ...], choice: ToolChoice, strict: tuple[str, ...], report: Report
) -> Offer:
    """The tools, once they are known to be told apart and to have the one that must be called.

    `strict` says where the request demands what only the guide of a required call gives: arguments that follow their
    schema, a single call. Raises RequestError.
    """
    if not tools and choice.mode != "required":
        return Offer()
    names = Counter(tool.name for tool in tools)
    for name, count in names.items():
        if count > 1:
            raise InvalidRequest(f"`tools`: {count} of them are named {name!r}", param="tools")
    if not tools and choice.mode == "required":
        raise InvalidRequest(
            "`tool_choice`: demands a call, but there is no tool", param="tool_choice"
        )
    if choice.name is not None and choice.name not in names:
        raise InvalidRequest(
            f"`tool_choice`: no tool is named {choice.name!r}; name one of `tools`",
            param="tool_choice",
        )
    if choice.mode != "required":
        for field in strict:
            report.ignore(field, "held only where a call is required")
    return Offer(tools, choice)


def guide_of(offer: Offer, wanted: JsonGuide | None, field: str, report: Report) -> Guide | None:
    """What the tokens are constrained to: the call that must come, else the format wanted by `field`."""
    choice = offer.choice
    if choice.mode == "required":
        if wanted is not None:
            report.ignore(field, "the answer is a call, which `tool_choice` requires")
        callable_ = tuple(tool for tool in offer.tools if choice.name in (None, tool.name))
        return CallGuide(callable_, choice.parallel)
    if wanted is not None and offer.tools and choice.mode == "auto":
        report.refuse(
            field,
            "not together with tools that may be called; forbid or require a call by `tool_choice`",
        )
        return None
    return wanted
