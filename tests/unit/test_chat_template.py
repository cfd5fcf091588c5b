"""What a chat template can show, and how its model marks what is no text."""

from pathlib import Path

import msgspec
import pytest

from protocols.errors import InvalidRequest
from tests.tiny_model import CHAT_TEMPLATE, save_tokenizer, tiny_tokenizer
from worker.engines.base import Markup, Template, Turn
from worker.engines.hf_tokenizer import HFTokenizer

USUAL = Markup(thinking=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"))
CHATML = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TOOLS = """
{%- if tools %}{{ 'system: ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role + ': ' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- OPEN + call.function.name + (call.function.arguments | tojson) }}
{%- endfor %}{% endfor %}
{%- if enable_thinking %}<think>{% endif %}"""
ALTERNATING = """
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- m.role + ': ' + m.content }}{% endfor %}"""


def load(directory: Path, template: str | None, **fields: object) -> HFTokenizer:
    save_tokenizer(directory, tiny_tokenizer(), chat_template=template)
    if fields:
        path = directory / "tokenizer_config.json"
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        path.write_bytes(msgspec.json.encode({**config, **fields}))
    return HFTokenizer(directory)


@pytest.mark.parametrize(
    ("source", "shows"),
    [
        (CHAT_TEMPLATE, Template()),
        (CHATML, Template(late_system=True)),
        (
            TOOLS.replace("OPEN", "'<tool_call>'"),
            Template(tools=True, late_system=True, options=frozenset({"enable_thinking"})),
        ),
        (ALTERNATING, Template(system=False, neighbours=False)),
        (None, Template(system=False, neighbours=False)),
        ("{{ oops( }}", Template(system=False, neighbours=False)),
    ],
)
def test_what_a_template_can_show_is_tried(
    tmp_path: Path, source: str | None, shows: Template
) -> None:
    assert load(tmp_path, source).template == shows


@pytest.mark.parametrize(
    ("source", "markup"),
    [
        (CHATML, USUAL),
        (None, USUAL),
        (CHATML + "{# [THINK] #}", Markup(thinking=("[THINK]", "[/THINK]"), call=USUAL.call)),
        (TOOLS.replace("OPEN", "'<tool_call>'"), USUAL),
        (TOOLS.replace("OPEN", "'[TOOL_CALLS]'"), Markup(thinking=USUAL.thinking)),
        (TOOLS.replace("OPEN", "'<tool_call><function='"), Markup(thinking=USUAL.thinking)),
    ],
)
def test_markup_is_that_of_the_template_and_else_the_usual(
    tmp_path: Path, source: str | None, markup: Markup
) -> None:
    assert load(tmp_path, source).markup == markup


@pytest.mark.parametrize(
    ("calls", "call"),
    [
        ({"open": "<<", "close": ">>", "content": "json"}, ("<<", ">>")),
        ({"open": ["<<", "<"], "close": ">>", "content": "json"}, None),
        ({"open_pattern": "<+", "close": ">>", "content": "json"}, None),
        ({"open": "<<", "close": ">>", "content": "xml-inline"}, None),
    ],
)
def test_a_response_template_of_the_model_declares_the_markup(
    tmp_path: Path, calls: dict[str, object], call: tuple[str, str] | None
) -> None:
    thinking = {"open": "{", "close": "}", "content": "text"}
    declared = {"fields": {"thinking": thinking, "tool_calls": calls}}
    tokenizer = load(tmp_path, CHATML, response_template=declared)
    assert tokenizer.markup == Markup(thinking=("{", "}"), call=call)


@pytest.mark.parametrize(
    "breaking",
    ["messages[0].content.x.y", "1 / 0", "messages[0].content + 1", "messages[7].content"],
)
def test_a_template_that_breaks_refuses(tmp_path: Path, breaking: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        load(tmp_path, "{{ " + breaking + " }}").render([Turn(role="user", content="a")])


def test_tools_and_options_reach_the_template(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, TOOLS.replace("OPEN", "'<tool_call>'"))
    ids = tokenizer.render(
        [Turn(role="user", content="hi")],
        [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        {"enable_thinking": True},
    )
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert '"name": "look"' in text
    assert text.endswith("user: hi<think>")
