"""A model's chat template: what it can show, how the model marks what is no text, and a conversation in it.

What a template can show is tried once, on conversations of a few words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2

from protocols.errors import InvalidRequest
from worker.engines.base import NO_OPTIONS, OPTIONS, Markup, Template, Turn, TurnTool

_DEFAULT = Markup(thinking=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"))
_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_OTHER_CALLS = ("<function=", "<arg_key>", "<parameter=")
"""What is no JSON between the default marks."""

_FIRST, _SECOND, _LATE = "first-probe", "second-probe", "late-probe"
_USER, _ANSWER = Turn(role="user", content=_FIRST), Turn(role="assistant", content=_SECOND)
_LATE_SYSTEM, _LATE_USER = Turn(role="system", content=_LATE), Turn(role="user", content=_LATE)
_LATE_ANSWER = Turn(role="assistant", content=_LATE)
_TOOL = TurnTool(
    type="function",
    function={"name": "tool_probe", "description": "-", "parameters": {"type": "object"}},
)
_CALL = Turn(
    role="assistant",
    content="",
    tool_calls=[
        {
            "id": "123456789",  # some templates want just so many characters
            "type": "function",
            "function": {"name": "tool_probe", "arguments": {"key_probe": "value_probe"}},
        }
    ],
)
_RESULT = Turn(role="tool", content=_SECOND, tool_call_id="123456789", name="tool_probe")


class ChatTemplate:
    """Of one tokenizer, which is one of transformers."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401  (transformers' types are partial)
        self._tokenizer = tokenizer
        self._source = str(tokenizer.chat_template or "")
        self.shows = self._tried()
        # transformers below 5.23 leaves it among the fields that it does not know
        known: object = tokenizer.init_kwargs.get("response_template")
        declared = getattr(tokenizer, "response_template", known)
        self.markup = _markup(self._source, declared, tools=self.shows.tools)

    def text(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
    ) -> str:
        """A conversation, up to where the assistant speaks.

        Raises InvalidRequest where the template refuses it or the model has none.
        """
        if not self._source:
            raise InvalidRequest(
                "messages: this model has no chat template; send a prompt or token ids",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **options,
            )
        # a template is a program of the model's: it refuses by raising, or breaks on what it did not expect
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from None
        return cast("str", text)

    def _tried(self) -> Template:
        return Template(
            tools=self._shows(
                [_USER, _CALL, _RESULT, _LATE_USER],
                ("tool_probe", "key_probe", "value_probe", _SECOND),
                tools=[_TOOL],
            )
            and self._shows([_USER], ("tool_probe",), tools=[_TOOL]),
            system=self._shows([_LATE_SYSTEM, _USER], (_LATE, _FIRST)),
            late_system=self._shows(
                [_USER, _ANSWER, _LATE_SYSTEM, _USER], (_SECOND, _LATE, _FIRST)
            ),
            neighbours=self._shows([_USER, _LATE_USER], (_FIRST, _LATE))
            and self._shows([_USER, _ANSWER, _LATE_ANSWER, _USER], (_SECOND, _LATE)),
            options=frozenset(OPTIONS).intersection(re.findall(r"\w+", self._source)),
        )

    def _shows(
        self, turns: Sequence[Turn], words: Sequence[str], tools: Sequence[TurnTool] = ()
    ) -> bool:
        """Whether a conversation is rendered with these words in this order."""
        try:
            text = self.text(turns, tools)
        except InvalidRequest:
            return False
        at = 0
        for word in words:
            at = text.find(word, at) + 1
            if at == 0:
                return False
        return True


def _markup(source: str, declared: object, *, tools: bool) -> Markup:
    """What the model's own response template declares; else what its chat template shows; else the usual."""
    fields = _fields(declared)
    thinking = _marks(fields, "thinking") or _marks(fields, "reasoning_content")
    if thinking is None:
        thinking = next((pair for pair in _THINKING if pair[0] in source), _DEFAULT.thinking)
    calls = fields.get("tool_calls")
    if isinstance(calls, dict):
        return Markup(thinking, _json_marks(cast("dict[str, object]", calls), fields))
    return Markup(thinking, _shown_marks(source) if tools else _DEFAULT.call)


def _fields(declared: object) -> dict[str, object]:
    """Of a response template, as transformers has them."""
    fields = cast("dict[str, object]", declared).get("fields") if isinstance(declared, dict) else 0
    return cast("dict[str, object]", fields) if isinstance(fields, dict) else {}


def _marks(fields: Mapping[str, object], name: str) -> tuple[str, str] | None:
    """What opens and closes a region, where both are plain text."""
    region = fields.get(name)
    if not isinstance(region, dict):
        return None
    opens, closes = (cast("dict[str, object]", region).get(key) for key in ("open", "close"))
    if isinstance(opens, str) and isinstance(closes, str):
        return opens, closes
    return None


def _json_marks(
    calls: Mapping[str, object], fields: Mapping[str, object]
) -> tuple[str, str] | None:
    plain = calls.get("content") == "json" and "parameters" not in str(calls.get("transform"))
    return _marks(fields, "tool_calls") if plain else None


def _shown_marks(source: str) -> tuple[str, str] | None:
    """None where the model calls tools in another way."""
    usual = "<tool_call>" in source and not any(mark in source for mark in _OTHER_CALLS)
    return _DEFAULT.call if usual else None
