"""A guide as a grammar in llguidance's dialect of Lark, over the bytes of a response.

Objects and arrays are written on one line, at most one space behind each `,` and `:`, so that nothing can spin in white
space. Property order is the schema's.
"""

import json
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocols.errors import InvalidRequest
from protocols.message import CallGuide, Guide, JsonGuide, Tool
from worker.engines.base import Markup

MOST_CHARACTERS = 512 * 1024
"""Of the schemas of one guide together; so much compiles within a second or two."""
MOST_CALLS = 32
"""That one response may make."""
_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LINE_END = r"/\n?/"
"""Between calls, and around the JSON in them: models differ."""

Thinking = Literal["none", "may", "open"]
"""Whether the response may begin with thinking, or the prompt has begun it."""


def field_of(guide: Guide) -> str:
    """The field of a request that is at fault where a guide is."""
    return "response_format" if isinstance(guide, JsonGuide) else "tools"


def grammar_of(guide: Guide, markup: Markup, thinking: Thinking) -> str:
    """The grammar's text; raises InvalidRequest, which names `response_format` or `tools`.

    What the schemas themselves mean is looked at when the grammar is compiled.
    """
    field = field_of(guide)
    size = len(guide.schema) if isinstance(guide, JsonGuide) else sum(map(_size, guide.tools))
    if size > MOST_CHARACTERS:
        raise InvalidRequest(
            f"`{field}`: its schemas have {size} characters, and {MOST_CHARACTERS} are taken at most",
            param=field,
        )
    answer = _value(guide) if isinstance(guide, JsonGuide) else _calls(guide, markup)
    return "\n".join([_start(markup, thinking), *answer, ""])


def _start(markup: Markup, thinking: Thinking) -> str:
    if thinking == "none" or markup.thinking is None:
        return "start: answer"
    opens, closes = (_literal(one.strip()) for one in markup.thinking)
    begun = "thinking" if thinking == "open" else f"({opens} thinking)?"
    return f"start: {begun} answer\nthinking: thought /[ \\n]{{0,2}}/\nthought[suffix={closes}]: /(?s:.*)/"


def _value(guide: JsonGuide) -> list[str]:
    return [f"answer: %json {_schema(guide.schema, 'response_format')}"]


def _calls(guide: CallGuide, markup: Markup) -> list[str]:
    if markup.call is None:
        raise InvalidRequest("`tools`: this model has no way to write a call", param="tools")
    if not guide.tools:
        raise InvalidRequest("`tools`: a call is required, and there is no tool", param="tools")
    more = f" ({_LINE_END} call){{0,{MOST_CALLS - 1}}}" if guide.parallel else ""
    names = " | ".join(f"tool{i}" for i in range(len(guide.tools)))
    return [f"answer: call{more}", f"call: {names}", *_tools(guide.tools, *markup.call)]


def _tools(tools: Sequence[Tool], opens: str, closes: str) -> list[str]:
    lines = [
        f"opens: {_literal(opens.strip())} {_LINE_END}",
        f"closes: {_LINE_END} {_literal(closes.strip())}",
    ]
    for i, tool in enumerate(tools):
        head = f'{{"name": {_literal(tool.name)}, "arguments": '
        schema = _schema(tool.parameters, "tools", of=f" of {tool.name[:80]!r}", kind="object")
        lines.append(f'tool{i}: opens {_literal(head)} arguments{i} "}}" closes')
        lines.append(f"arguments{i}: %json {schema}")
    return lines


def _schema(text: str, field: str, *, of: str = "", kind: str | None = None) -> str:
    """The schema with our white space; `kind`: the type of a value whose schema leaves it open."""
    try:
        schema: dict[str, object] | bool = msgspec.json.decode(text, type=dict[str, object] | bool)
        if schema is False:
            raise InvalidRequest(f"`{field}`: the schema{of} allows no value", param=field)
        said = {} if schema is True else schema
        usual = {"type": kind} if kind else {}
        return json.dumps({**usual, **said, "x-guidance": _LINE}, allow_nan=False)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise InvalidRequest(
            f"`{field}`: the schema{of} cannot be read: {str(error)[:120]}", param=field
        ) from None


def _size(tool: Tool) -> int:
    return len(tool.name) + len(tool.parameters)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
