"""Conversations with tools in the chat template of a real model, which shows none of itself, and the way back."""

from pathlib import Path

import pytest

from protocols.dialects.base import Normal
from protocols.job import Job
from protocols.message import Message, Text, Thinking, Tool, ToolChoice, ToolResult, ToolUse
from protocols.rollout_state import RolloutState, SampleParams
from worker.engines.base import Markup, Template
from worker.engines.hf_tokenizer import HFTokenizer
from worker.engines.scripted import ScriptedEngine
from worker.engines.torch_engine.checkpoint import locate
from worker.regions import Reading
from worker.render import reading_of, render
from worker.view import View

pytestmark = pytest.mark.model
LOOK = Tool("look", "Looks.", '{"type":"object","properties":{"at":{"type":"string"}}}')
CALL = ToolUse("call_1", "look", '{"at": "the rain"}')
MESSAGES = (
    Message("system", (Text("Be brief."),)),
    Message("user", (Text("Look!"),)),
    Message("assistant", (Text("I look."), CALL)),
    Message("user", (ToolResult("call_1", (Text("wet"),), is_error=True), Text("And?"))),
)
RENDERED = """<|im_start|>system
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": \
{"type": "object", "properties": {"at": {"type": "string"}}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Look!<|im_end|>
<|im_start|>assistant
I look.
<tool_call>
{"name": "look", "arguments": {"at": "the rain"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
[tool error] wet
</tool_response>
And?<|im_end|>
<|im_start|>assistant
"""


@pytest.fixture(scope="module")
def smollm2() -> HFTokenizer:
    return HFTokenizer(Path(locate("smollm2")))


def engine_of(tokenizer: HFTokenizer) -> ScriptedEngine:
    """Only its tokenizer counts here."""
    engine = ScriptedEngine()
    engine.tokenizer, engine.context_tokens = tokenizer, 2048
    return engine


def test_what_its_template_shows(smollm2: HFTokenizer) -> None:
    assert smollm2.template == Template(late_system=True)
    usual = Markup(thinking=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"))
    assert smollm2.markup == usual
    shown = {smollm2.token_bytes(one).decode() for one in smollm2.special_ids}
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= shown


async def test_a_conversation_with_tools_is_told_in_words(smollm2: HFTokenizer) -> None:
    normal = Normal(RolloutState(message=MESSAGES, tools=(LOOK,)))
    state, _ = await render(normal, Job(id="j", body=b"{}"), engine_of(smollm2))
    assert smollm2.decode(state.prompt_ids, skip_special_tokens=False) == RENDERED
    assert reading_of(state, smollm2) == Reading(smollm2.markup)


async def test_a_model_that_may_not_call_a_tool_is_not_told_of_any(smollm2: HFTokenizer) -> None:
    state = RolloutState(message=MESSAGES[:2], tools=(LOOK,), tool_choice=ToolChoice("none"))
    state, _ = await render(Normal(state), Job(id="j", body=b"{}"), engine_of(smollm2))
    assert b"look" not in b"".join(map(smollm2.token_bytes, state.prompt_ids))
    assert reading_of(state, smollm2).markup.call is None


def test_what_it_would_say_is_read_token_by_token(smollm2: HFTokenizer) -> None:
    called = f'{{"name": "look", "arguments": {CALL.arguments}}}'
    text = f"<think>\nhm 世\n</think>\n\nI look.\n<tool_call>\n{called}\n</tool_call><|im_end|>"
    view = View(SampleParams(), smollm2, Reading(smollm2.markup))
    for token_id in smollm2.encode(text):
        view.feed([token_id])
    view.end()
    thinking, said, call = view.blocks()
    assert (thinking, said) == (Thinking("hm 世"), Text("I look."))
    assert isinstance(call, ToolUse)
    assert (call.name, call.arguments) == ("look", CALL.arguments)
