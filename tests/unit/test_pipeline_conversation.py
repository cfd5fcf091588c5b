"""A conversation with tools through the whole pipeline, whatever the dialect: what is drawn, counted and read."""

from typing import cast

import pytest
from msgspec.structs import replace

from protocols.codec import encode_json, unpack_states
from protocols.dialects import dialect_of
from protocols.dialects.base import Answer, Dialect, Normal, Options, Script
from protocols.errors import RolloutError
from protocols.message import CallGuide, Message, Reasoning, Text, Thinking, Tool, ToolUse
from protocols.queue.rows import Lease
from protocols.rollout_state import RolloutState, SampleParams, Status
from worker import pipeline
from worker.engines.base import Call, Template
from worker.engines.scripted import ScriptedEngine, ScriptedGeneration
from worker.outcome import Completed, Ended, Outcome
from worker.pipeline import Attempt, run_job

LOOK = Tool("look", parameters='{"required":["at"],"properties":{"at":{"type":"integer"}}}')
HELLO = [{"role": "user", "content": "hi"}]
STATE = RolloutState(message=(Message("user", (Text("hi"),)),), tools=(LOOK,))


class Given:
    """A dialect of one body, whose answers are those that it was asked for."""

    name = "given"

    def __init__(self, normal: Normal) -> None:
        self.normal, self.answers = normal, list[Answer]()

    def normalize(self, body: bytes) -> Normal:
        return self.normal

    def respond(self, answer: Answer) -> bytes:
        self.answers.append(answer)
        return b"{}"

    def error(self, error: RolloutError, job_id: str) -> bytes:
        return b"{}"


class Counting(ScriptedEngine):
    calls = 0

    def generate(self, call: Call) -> ScriptedGeneration:
        self.calls += 1
        return super().generate(call)


async def outcome_of(
    normal: Normal, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> tuple[Outcome, list[Answer]]:
    dialect = Given(normal)

    def dialect_of(name: str) -> Dialect:
        return cast("Dialect", dialect)

    monkeypatch.setattr(pipeline, "dialect_of", dialect_of)
    lease = Lease(job_id="j", fence="1:n", lane="normal", left_ms=None, fields={b"body": b"{}"})
    return await run_job(Attempt(lease), engine, "pool"), dialect.answers


async def test_the_answer_has_thinking_text_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '<think>hm</think>so<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    normal = Normal(STATE, options=Options(script=Script(text=text)))
    outcome, (answer,) = await outcome_of(normal, ScriptedEngine(), monkeypatch)
    assert isinstance(outcome, Completed)
    (state,) = answer.states
    thinking, said, call = state.output
    assert (thinking, said) == (Thinking("hm"), Text("so"))
    assert isinstance(call, ToolUse)
    assert (call.name, call.arguments, state.finish_reason) == ("look", "{}", "tool_calls")
    assert (state.text, unpack_states(outcome.state)) == (text, (state,))


async def test_a_guide_to_call_is_a_call_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SampleParams(guide=CallGuide((LOOK,)))
    normal = Normal(replace(STATE, sample_params=params))
    _, (answer,) = await outcome_of(normal, ScriptedEngine(), monkeypatch)
    (call,) = answer.states[0].output
    assert isinstance(call, ToolUse)
    assert (call.name, call.arguments) == ("look", '{"at":0}')


async def test_tokens_are_counted_without_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counting(policy_version=3)
    outcome, (answer,) = await outcome_of(Normal(STATE, counts=True), engine, monkeypatch)
    drawn, (whole,) = await outcome_of(Normal(STATE), Counting(), monkeypatch)
    assert isinstance(outcome, Completed)
    assert isinstance(drawn, Completed)
    assert (engine.calls, outcome.policy_version) == (0, 3)
    (state,) = answer.states
    assert (state.rollout_id, state.status) == ("j/0", Status.COMPLETED)
    assert state.prompt_ids == whole.states[0].prompt_ids
    assert not state.response_ids


async def test_reasoning_without_a_switch_is_told_as_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.template = Template(tools=True)
    normal = Normal(replace(STATE, reasoning=Reasoning(enabled=True)), ignored=("x",))
    _, (answer,) = await outcome_of(normal, engine, monkeypatch)
    assert answer.ignored == ("x", "reasoning")


async def test_what_the_template_refuses_is_the_jobs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(LOOK, parameters="{")
    outcome, _ = await outcome_of(
        Normal(replace(STATE, tools=(broken,))), ScriptedEngine(), monkeypatch
    )
    assert isinstance(outcome, Ended)
    assert (outcome.error.http_status, outcome.error.code) == (400, "invalid_request")


@pytest.mark.parametrize(
    "name", ["openai.chat", "openai.completions", "claude.messages", "generate"]
)
async def test_a_streamed_answer_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dialect, answers = dialect_of(name), list[Answer]()
    respond = dialect.respond

    def counted(_: Dialect, answer: Answer) -> bytes:
        answers.append(answer)
        return respond(answer)

    monkeypatch.setattr(type(dialect), "respond", counted)
    asked = {"max_tokens": 9, "stream": True}
    said = {"prompt": "hi"} if name in ("openai.completions", "generate") else {"messages": HELLO}
    body = {**said, "stream": True} if name == "generate" else {**said, **asked}
    fields = {b"body": encode_json(body), b"protocol": name.encode()}
    lease = Lease(job_id="j", fence="1:n", lane="normal", left_ms=None, fields=fields)
    outcome = await run_job(Attempt(lease), ScriptedEngine(), "pool")
    assert isinstance(outcome, Completed)
    assert outcome.frames
    assert len(answers) == 1
