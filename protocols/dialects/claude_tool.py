"""Claude's tools, tool choice, thinking and output format, in the normal form."""

from collections.abc import Collection
from typing import Annotated, Literal

import msgspec

from protocols.codec import fitted, json_text
from protocols.dialects.choice import Offer, ToolCount, ToolName, offer_of
from protocols.dialects.field import Report, Verdicts, chosen, ignored, path
from protocols.errors import InvalidRequest
from protocols.message import JsonGuide, Reasoning, Tool, ToolChoice

Effort = Literal["low", "medium", "high", "xhigh", "max"]
MODES: dict[str, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "none": "none",
    "any": "required",
    "tool": "required",
}


class CustomTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool that the client runs."""

    name: ToolName
    input_schema: dict[str, object]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    input_examples: list[dict[str, object]] | None = None
    defer_loading: bool | None = None
    cache_control: object = None
    """Accepted in silence."""
    allowed_callers: Annotated[object, ignored(["direct"])] = None
    eager_input_streaming: Annotated[object, ignored(False)] = None


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[object, ignored()] = None
    display: Annotated[object, ignored("summarized")] = None
    """Thinking is always shown."""


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schema of the answer."""

    type: Literal["json_schema"]
    schema: dict[str, object]
    name: Annotated[object, ignored()] = None
    description: Annotated[object, ignored()] = None


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: Effort | None = None
    task_budget: Annotated[object, ignored()] = None


Tools = Annotated[list[dict[str, object]], ToolCount]
"""Open, so that a tool of Anthropic's servers is a refused one and not one with unknown fields."""

_tool = Verdicts(CustomTool)
_thinking = Verdicts(ThinkingConfig)
_format = Verdicts(OutputFormat)
_config = Verdicts(OutputConfig)


def offer(
    given: Tools | None, choice: Choice | None, referred: Collection[str], report: Report
) -> Offer:
    """The tools and which of them may or must be called.

    A tool with `defer_loading` is offered once a tool result refers to it, or the choice names it.
    """
    customs = _customs(given or [], report)
    wanted = choice.name if choice else None
    shown = [
        (at, tool)
        for at, tool in customs
        if not tool.defer_loading or tool.name in referred or tool.name == wanted
    ]
    chosen = _choice(choice)
    return offer_of(
        tuple([_plain(tool, at) for at, tool in shown]),
        chosen,
        (
            *(path("tools", at, "strict") for at, tool in shown if tool.strict),
            *(["tool_choice.disable_parallel_tool_use"] if not chosen.parallel else ()),
        ),
        report,
    )


def _customs(given: Tools, report: Report) -> list[tuple[int, CustomTool]]:
    found: list[tuple[int, CustomTool]] = []
    for at, fields in enumerate(given):
        if fields.get("type") in (None, "custom"):
            tool = fitted(fields, CustomTool, path("tools", at))
            _tool.check(tool, report, "tools", at)
            found.append((at, tool))
        else:
            report.refuse(
                path("tools", at, "type"),
                "only tools of type 'custom' are supported, which you run",
            )
    return found


def _plain(tool: CustomTool, at: int) -> Tool:
    """Examples of the input stand in its schema, under JSON schema's own word for them."""
    schema = dict(tool.input_schema)
    if tool.input_examples:
        schema["examples"] = tool.input_examples
    return Tool(tool.name, tool.description, json_text(schema, path("tools", at, "input_schema")))


def _choice(given: Choice | None) -> ToolChoice:
    if given is None:
        return ToolChoice()
    if (given.name is None) == (given.type == "tool"):
        raise InvalidRequest(
            "`tool_choice.name`: needed with type 'tool', and with no other",
            param="tool_choice.name",
        )
    return ToolChoice(MODES[given.type], given.name, not given.disable_parallel_tool_use)


def reasoning(
    thinking: ThinkingConfig | None, config: OutputConfig | None, report: Report
) -> Reasoning:
    """Whether and how much the model shall think."""
    if thinking:
        _thinking.check(thinking, report, "thinking")
    enabled = None if thinking is None else thinking.type != "disabled"
    return Reasoning(enabled=enabled, effort=config.effort if config else None)


def format_of(
    config: OutputConfig | None, older: OutputFormat | None, report: Report
) -> tuple[JsonGuide | None, str]:
    """The format of the answer, and the field that asks for it."""
    if config:
        _config.check(config, report, "output_config")
    newer = config.format if config else None
    field = "output_config.format" if newer else "output_format"
    wanted = chosen(report, "", None, **{"output_config.format": newer, "output_format": older})
    if wanted is None:
        return None, field
    _format.check(wanted, report, field)
    return JsonGuide(json_text(wanted.schema, f"{field}.schema")), field
