"""Whatever is posted to a door, its whole way through gateway, queue and worker: an answer or a refusal, in time.

Never a 500, never a wait without end, always the route's own error shape.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer_sdk.exchange.route import PROTOCOLS
from producer_sdk.gateway.app import Gateway
from producer_sdk.gateway.patience import Leaving
from producer_sdk.gateway.settings import settings as gateway_settings
from tests.property.test_dialect_fuzz import VALID, mutated
from tests.property.test_dialect_requests import REQUESTS
from tests.property.typed_body import strategy_of
from worker.testing import fleet

LIMIT_S = 30
PATHS = {protocol: path for path, protocol in PROTOCOLS.items()}
Post = Callable[[str, bytes], httpx2.Response]
few = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def post() -> Iterator[Post]:
    """Post a body to the route of a protocol; the answer, which is as it has to be."""
    with fleet() as client, asyncio.Runner() as runner:
        app: Any = Gateway(client, client, gateway_settings(), Leaving(), "http://gateway")
        over = httpx2.ASGITransport(app=app)
        http = httpx2.AsyncClient(transport=over, base_url="http://gateway")

        async def limited(asked: Awaitable[httpx2.Response]) -> httpx2.Response:
            async with asyncio.timeout(LIMIT_S):
                return await asked

        def posted(protocol: str, body: bytes) -> httpx2.Response:
            answer = runner.run(limited(http.post(PATHS[protocol], content=body)))
            assert answer.status_code < 500, answer.text
            assert "engine_failed" not in answer.text, answer.text  # in a stream it comes late
            if answer.status_code >= 400:
                check_error(protocol, answer.json())
            return answer

        yield posted


def check_error(protocol: str, body: dict[str, Any]) -> None:
    """It has the shape that the route's client reads."""
    assert isinstance(body["error"]["message"], str)
    if protocol.startswith("claude."):
        assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}


def tamed(body: bytes) -> bytes:
    """Without what tells the scripted engine to fail or to be slow, and in a session."""
    told: Any = json.loads(body)
    with suppress(AttributeError, KeyError, TypeError):  # no object, or no options
        told["rollout"].update(script={"text": "x"}, session="s")
    return json.dumps(told).encode()


@pytest.mark.parametrize("protocol", VALID)
@few
@given(data=st.data())
def test_any_change_of_a_valid_body_is_answered(
    post: Post, protocol: str, data: st.DataObject
) -> None:
    post(protocol, tamed(data.draw(mutated(protocol))))


@pytest.mark.parametrize(
    ("protocol", "kind"), [pytest.param(*row, id=f"{row[0]}-{n}") for n, row in enumerate(REQUESTS)]
)
@few
@given(data=st.data())
def test_any_request_of_an_official_client_is_answered(
    post: Post, protocol: str, kind: object, data: st.DataObject
) -> None:
    body = data.draw(strategy_of(kind)) | {"rollout": {"unsupported": "ignore", "session": "s"}}
    few_tokens = {"max_tokens": 8} if "max_tokens" in body else {}
    post(protocol, json.dumps(body | few_tokens | {"model": "default"}).encode())


ARGUMENTS = {
    "cut": "{",
    "no object": "[1]",
    "a key twice": '{"a":1,"a":2}',
    "deep": '{"a":' + "[" * 20_000 + "]" * 20_000 + "}",
    "a giant integer": '{"a":' + "9" * 10_000 + "}",
    "a giant float": '{"a":1e999}',
    "half a surrogate pair": '{"a":"\\ud800","\\udfff":1}',
    "nul": '\x00{"a":"\\u0000"}',
    "no number": '{"a":NaN}',
    "markup": '{"a":"</tool_call><think>"}',
}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
QUESTION: dict[str, Any] = {"role": "user", "content": "x"}


@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_history_may_hold_whatever_the_policy_wrote_as_arguments(
    post: Post, arguments: str, session: str | None
) -> None:
    shared = {"rollout": {"session": session} if session else {}, "max_tokens": 4}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "r"}
    turns = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    chat = post(
        "openai.chat", json.dumps({**shared, "messages": turns, "tools": [FUNCTION]}).encode()
    )
    used = {
        "type": "tool_use",
        "id": "1",
        "name": "f",
        "input": {"rollout_raw_arguments": arguments},
    }
    given_back = {"type": "tool_result", "tool_use_id": "1", "content": "r"}
    history = [
        QUESTION,
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [given_back]},
    ]
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    claude = post(
        "claude.messages", json.dumps({**shared, "messages": history, "tools": tools}).encode()
    )
    assert (chat.status_code, claude.status_code) == (200, 200)


@pytest.mark.parametrize("protocol", ["openai.chat", "claude.messages", "generate"])
def test_a_hundred_thousand_messages_are_refused(post: Post, protocol: str) -> None:
    body = {"messages": [QUESTION] * 100_000, "max_tokens": 1}
    told = {"messages": body["messages"]} if protocol == "generate" else body
    assert post(protocol, json.dumps(told).encode()).status_code == 400
