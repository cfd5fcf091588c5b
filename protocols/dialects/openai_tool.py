"""OpenAI's tools, tool choice, reasoning and response format, in the normal form. `generate` has them too."""

from typing import Annotated, Literal

import msgspec

from protocols.codec import MAX_NAMED_CHARS, fitted, json_text
from protocols.dialects.choice import Offer, ToolCount, ToolName, guide_of, offer_of
from protocols.dialects.field import Report, Verdicts, chosen, ignored, path
from protocols.errors import InvalidRequest
from protocols.message import Guide, JsonGuide, Reasoning, Tool, ToolChoice

Mode = Literal["none", "auto", "required"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that may be called."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class ToolItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of `tools`."""

    type: str
    function: Function | None = None
    custom: object = None


class Named(msgspec.Struct, frozen=True):
    """A function by its name; the rest of its definition may stand beside it."""

    name: ToolName


class NamedItem(msgspec.Struct, frozen=True):
    """A tool by its name."""

    type: Literal["function"]
    function: Named


class Allowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedItem], ToolCount]


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tool_choice` where it is an object."""

    type: str
    function: Named | None = None
    allowed_tools: Allowed | None = None
    custom: object = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schema with its name."""

    name: str | None = None
    schema: dict[str, object] | None = None
    strict: bool | None = None
    """The answer follows the schema either way."""
    description: Annotated[object, ignored("")] = None


class Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`response_format`."""

    type: str
    json_schema: JsonSchema | None = None


class TemplateKwargs(msgspec.Struct, frozen=True):
    """What may be told to the chat template."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    """DeepSeek's name for it."""
    reasoning_effort: Effort | None = None


Tools = Annotated[list[ToolItem], ToolCount]

_schema = Verdicts(JsonSchema)


def offer(
    tools: list[ToolItem] | None,
    choice: Mode | Choice | None,
    parallel: bool | None,
    report: Report,
) -> Offer:
    """The tools and which of them may or must be called; raises RequestError."""
    if tools is None and choice is None and parallel is None:
        return Offer()
    items = [
        (at, item.function)
        for at, item in enumerate(tools or ())
        if _is_function(item, at, report) and item.function
    ]
    plain, allowed = _choice(choice, parallel is not False, report)
    chosen_items = [item for item in items if allowed is None or item[1].name in allowed]
    if allowed and (unknown := allowed - {function.name for _, function in items}):
        raise InvalidRequest(
            f"`tool_choice.allowed_tools`: no tool is named {min(unknown)!r}", param="tool_choice"
        )
    return offer_of(
        tuple([_tool(function, at) for at, function in chosen_items]),
        plain,
        (
            *(path("tools", at, "function", "strict") for at, f in chosen_items if f.strict),
            *(["parallel_tool_calls"] if parallel is False else ()),
        ),
        report,
    )


def _is_function(item: ToolItem, at: int, report: Report) -> bool:
    if item.type == "function" and item.function is None:
        field = path("tools", at, "function")
        raise InvalidRequest(f"`{field}`: required", param=field)
    if item.type != "function":
        report.refuse(path("tools", at, "type"), "only tools of type 'function' are supported")
    return item.type == "function"


def _tool(function: Function, at: int) -> Tool:
    if function.parameters is None:
        return Tool(function.name, function.description)
    text = json_text(function.parameters, path("tools", at, "function", "parameters"))
    return Tool(function.name, function.description, text)


def _choice(
    choice: Mode | Choice | None, parallel: bool, report: Report
) -> tuple[ToolChoice, frozenset[str] | None]:
    """The choice, and the names of the tools that it narrows the offer to."""
    if choice is None or isinstance(choice, str):
        return ToolChoice(choice or "auto", parallel=parallel), None
    if choice.type == "function" and choice.function:
        return ToolChoice("required", choice.function.name, parallel), None
    if choice.type == "allowed_tools" and choice.allowed_tools:
        names = frozenset(item.function.name for item in choice.allowed_tools.tools)
        return ToolChoice(choice.allowed_tools.mode, parallel=parallel), names
    if choice.type in ("function", "allowed_tools"):
        field = f"tool_choice.{choice.type}"
        raise InvalidRequest(f"`{field}`: required", param=field)
    report.refuse("tool_choice.type", "'function' and 'allowed_tools' are supported")
    return ToolChoice(parallel=parallel), None


def format_guide(offered: Offer, given: Format | None, field: str, report: Report) -> Guide | None:
    """What `response_format`, which lies at `field`, and the tools constrain the tokens to."""
    return guide_of(offered, _json_guide(given, field, report), field, report)


def _json_guide(given: Format | None, field: str, report: Report) -> JsonGuide | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return JsonGuide()
    if given.type != "json_schema":
        report.refuse(f"{field}.type", "one of text, json_object, json_schema is supported")
        return None
    if given.json_schema is None:
        raise InvalidRequest(f"`{field}.json_schema`: required", param=f"{field}.json_schema")
    _schema.check(given.json_schema, report, field, "json_schema")
    schema = given.json_schema.schema
    text = json_text(schema, f"{field}.json_schema.schema") if schema is not None else None
    return JsonGuide() if text is None else JsonGuide(text)


def reasoning(
    effort: Effort | None, enabled: bool | None, kwargs: dict[str, object] | None, report: Report
) -> Reasoning:
    """Whether and how much the model shall think; raises RequestError."""
    if effort is None and enabled is None and not kwargs:
        return Reasoning()
    at = "chat_template_kwargs"
    known = TemplateKwargs.__struct_fields__
    for name in kwargs or ():
        if name not in known:
            why = f"one of {', '.join(known)} is supported"
            report.refuse(f"{at}.{name[:MAX_NAMED_CHARS]}", why)
    told = fitted(kwargs or {}, TemplateKwargs, at)
    switches = {
        "enable_thinking": enabled,
        f"{at}.enable_thinking": told.enable_thinking,
        f"{at}.thinking": told.thinking,
    }
    efforts = {"reasoning_effort": effort, f"{at}.reasoning_effort": told.reasoning_effort}
    thinks, much = chosen(report, "", None, **switches), chosen(report, "", None, **efforts)
    if much == "none":
        return Reasoning(enabled=bool(thinks))
    return Reasoning(enabled=True if thinks is None and much else thinks, effort=much)
