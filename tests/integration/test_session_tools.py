"""Sessions of agents: calls of tools, thinking that clients drop, arguments that they spell anew, streams."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from producer_sdk import Client, RolloutState
from protocols.rollout_state import TokenIds
from tests.queue_fixtures import Serve

LIMIT_S = 60
SESSION = "agent"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}}
Messages = list[dict[str, Any]]
Turn = Callable[[Client, Messages, str], RolloutState]


def spoken(turn: int) -> str:
    """Thinking, text and a call whose arguments no client would write like that."""
    call = f'{{"name": "add", "arguments": {{ "b" : {turn}.0,\n"a": {turn} }}}}'
    return f"<think>turn {turn}</think>I add.\n<tool_call>\n{call}\n</tool_call>"


def claude_turn(client: Client, messages: Messages, text: str) -> RolloutState:
    tool = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
    script = {"script": {"text": text}}
    body = {"messages": messages, "max_tokens": 256, "tools": [tool], "rollout": script}
    reply = client.submit(body, protocol="claude.messages", session=SESSION).result(LIMIT_S)
    content = reply.raise_for_status().response["content"]
    said = [block for block in content if block["type"] != "thinking"]
    calls = [block for block in said if block["type"] == "tool_use"]
    for call in calls:
        call["input"] = dict(sorted(call["input"].items()))
    results = [{"type": "tool_result", "tool_use_id": c["id"], "content": "7"} for c in calls]
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": results}]
    assert reply.state is not None
    return reply.state


def openai_turn(client: Client, messages: Messages, text: str) -> RolloutState:
    function = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
    tools = [{"type": "function", "function": function}]
    body = {"messages": messages, "tools": tools, "rollout": {"script": {"text": text}}}
    reply = client.submit(body, session=SESSION).result(LIMIT_S)
    message = reply.raise_for_status().response["choices"][0]["message"]
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        call["function"]["arguments"] = json.dumps(arguments, sort_keys=True)
    kept = {name: message[name] for name in ("role", "content", "tool_calls")}
    ids = [call["id"] for call in message["tool_calls"]]
    messages += [kept, *({"role": "tool", "tool_call_id": i, "content": "7"} for i in ids)]
    assert reply.state is not None
    return reply.state


def whole(state: RolloutState) -> TokenIds:
    return TokenIds([*state.prompt_ids, *state.response_ids])


@pytest.mark.parametrize("turn", [claude_turn, openai_turn])
def test_twenty_calls_of_a_tool_are_one_sample_although_the_client_loses_and_respells(
    client: Client, serve: Serve, turn: Turn
) -> None:
    serve()
    messages: Messages = [{"role": "user", "content": "Add up."}]
    states = [turn(client, messages, spoken(number)) for number in range(20)]
    assert {state.finish_reason for state in states} == {"tool_calls"}
    for earlier, later in pairwise(states):
        assert later.session is not None
        assert later.session.parent == earlier.rollout_id
        assert later.prompt_ids[: later.session.reused_tokens] == whole(earlier)
    (sample,) = client.session(SESSION).samples().result(LIMIT_S)
    assert [*sample.prompt_ids, *sample.response_ids] == list(whole(states[-1]))
    drawn = [token for state in states for token in state.response_ids]
    trained = zip(sample.response_ids, sample.response_mask, strict=True)
    assert [token for token, mask in trained if mask] == drawn


def test_a_conversation_goes_from_one_dialect_to_the_other(client: Client, serve: Serve) -> None:
    serve()
    messages: Messages = [{"role": "user", "content": "Add up."}]
    first = openai_turn(client, messages, spoken(1))
    call = messages[1]["tool_calls"][0]
    use = {
        "type": "tool_use",
        "id": "toolu_other",
        "name": "add",
        "input": json.loads(call["function"]["arguments"]),
    }
    result = {"type": "tool_result", "tool_use_id": "toolu_other", "content": "7"}
    content = [{"type": "text", "text": messages[1]["content"]}, use]
    messages[1:] = [
        {"role": "assistant", "content": content},
        {"role": "user", "content": [result]},
    ]
    second = claude_turn(client, messages, spoken(2))
    assert second.session is not None
    assert second.session.parent == first.rollout_id


def test_a_turn_that_may_call_no_tool_is_told_of_none_and_begins_a_branch(
    client: Client, serve: Serve
) -> None:
    serve()
    messages: Messages = [{"role": "user", "content": "Add up."}]
    claude_turn(client, messages, spoken(1))
    script = {"script": {"text": "Seven."}}
    body = {"messages": messages, "max_tokens": 64, "rollout": script}
    reply = client.submit(body, protocol="claude.messages", session=SESSION).result(LIMIT_S)
    assert "branch" in reply.raise_for_status().response["rollout"]["session"]


def test_a_streamed_turn_is_kept_like_any_other(client: Client, serve: Serve) -> None:
    serve()
    messages: Messages = [{"role": "user", "content": "one"}]
    body = {"messages": messages, "rollout": {"script": {"text": "first"}}}
    stream = client.stream(body, session=SESSION)
    frames = b"".join(stream.frames())
    first = stream.reply.result(LIMIT_S)
    assert f'"session":{{"id":"{SESSION}"}}'.encode() in frames
    messages += [{"role": "assistant", "content": "first"}, {"role": "user", "content": "two"}]
    reply = client.submit(body, session=SESSION).result(LIMIT_S)
    assert first.state is not None
    assert (
        reply.raise_for_status().response["rollout"]["session"]["parent"] == first.state.rollout_id
    )


def test_counting_tokens_counts_those_of_the_session_and_leaves_no_turn(
    client: Client, serve: Serve
) -> None:
    serve()
    messages: Messages = [{"role": "user", "content": "Add up."}]
    claude_turn(client, messages, spoken(1))
    tool = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
    asked = {"messages": messages, "tools": [tool]}
    counted = client.submit(asked, protocol="claude.count_tokens", session=SESSION).result(LIMIT_S)
    state = claude_turn(client, list(messages), spoken(2))
    assert counted.raise_for_status().response["input_tokens"] == len(state.prompt_ids)
    assert len(client.session(SESSION).turns().result(LIMIT_S)) == 2
