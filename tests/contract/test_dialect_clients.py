"""The official clients, whose requests are normalized and whose answers are ours; no network."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import anthropic
import httpx2
import msgspec
import openai
import pytest

from protocols.dialects import dialect_of, http_status
from protocols.dialects.base import Answer
from protocols.errors import NoLiveWorker, QueueFull, RolloutError, UnsupportedOption
from protocols.message import Block, Message, Text, Thinking, ToolResult, ToolUse
from protocols.rollout_state import Logprobs, Status, TokenIds

if TYPE_CHECKING:
    from anthropic.types import MessageParam, ToolParam, ToolResultBlockParam
    from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

CALL = (
    Thinking("A call."),
    Text("I look."),
    ToolUse("job-1-0", "weather", '{"city": "Bern"}'),
    ToolUse("job-1-1", "weather", "{}"),
)
Respond = Callable[[bytes], httpx2.Response]
TEXT = "Grüezi"
JSON = {"content-type": "application/json"}


def answering(protocol: str, output: tuple[Block, ...] = ()) -> Respond:
    """Answers every sample with TEXT, one token a byte, or with what is seen in it."""

    def respond(body: bytes) -> httpx2.Response:
        dialect = dialect_of(protocol)
        normal = dialect.normalize(body)
        ids = TokenIds(TEXT.encode())
        states = tuple(
            msgspec.structs.replace(
                normal.state,
                index=index,
                prompt_ids=TokenIds([1, 2]),
                response=TEXT,
                output=output,
                response_ids=ids,
                logprobs=Logprobs([-0.5] * len(ids)),
                policy_versions=((0, 0),),
                finish_reason="tool_calls" if output else "stop",
                status=Status.COMPLETED,
            )
            for index in range(normal.state.sample_params.n)
        )
        answer = Answer(
            "job-1",
            "m",
            7,
            states,
            normal.ignored,
            1,
            99,
            lambda token_id: bytes([token_id]),
            normal.asked,
        )
        return httpx2.Response(200, content=dialect.respond(answer), headers=JSON)

    return respond


def failing(protocol: str, error: RolloutError) -> Respond:
    def respond(body: bytes) -> httpx2.Response:
        content = dialect_of(protocol).error(error, "job-1")
        return httpx2.Response(
            http_status(protocol, error.http_status), content=content, headers=JSON
        )

    return respond


def http_client(respond: Respond) -> httpx2.Client:
    return httpx2.Client(transport=httpx2.MockTransport(lambda request: respond(request.content)))


def openai_client(respond: Respond) -> openai.OpenAI:
    return openai.OpenAI(
        api_key="-", base_url="http://rollout/v1", max_retries=0, http_client=http_client(respond)
    )


def anthropic_client(respond: Respond) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        api_key="-", base_url="http://rollout", max_retries=0, http_client=http_client(respond)
    )


def test_openai_client_reads_what_it_asked_for() -> None:
    with openai_client(answering("openai.chat")) as client:
        completion = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            n=2,
            logprobs=True,
            max_completion_tokens=8,
            user="ann",
            extra_body={"top_k": 3, "rollout": {"group": "g"}},
        )
    assert [choice.message.content for choice in completion.choices] == [TEXT, TEXT]
    assert completion.id == "chatcmpl-job-1"
    logprobs = completion.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    spelled = b"".join(bytes(token.bytes or ()) for token in logprobs.content)
    assert spelled.decode() == TEXT
    assert completion.model_extra is not None
    assert completion.model_extra["rollout"]["ignored"] == ["user"]


def test_openai_client_may_send_an_answer_back() -> None:
    with openai_client(answering("openai.chat")) as client:
        first = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}]
        )
        echo = first.choices[0].message.model_dump()
        second = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}, echo, {"role": "user", "content": "?"}],  # type: ignore[list-item]
        )
    assert second.choices[0].message.content == TEXT


def test_anthropic_client_reads_what_it_asked_for() -> None:
    with anthropic_client(answering("claude.messages")) as client:
        first = client.messages.create(
            model="m",
            max_tokens=8,
            messages=[{"role": "user", "content": "Hi"}],
            metadata={"user_id": "ann"},
            extra_body={"temperature": 0.5},
        )
        second = client.messages.create(
            model="m",
            max_tokens=8,
            messages=[
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": first.content},
                {"role": "user", "content": "?"},
            ],
        )
    assert (first.id, first.stop_reason) == ("msg_job-1", "end_turn")
    assert first.usage.output_tokens == len(TEXT.encode())
    block = second.content[0]
    assert block.type == "text"
    assert block.text == TEXT


def remembering(seen: list[tuple[Message, ...]], protocol: str) -> Respond:
    """As `answering`, with CALL; what was asked goes to `seen`."""
    respond = answering(protocol, CALL)

    def remember(body: bytes) -> httpx2.Response:
        seen.append(dialect_of(protocol).normalize(body).state.message)
        return respond(body)

    return remember


def test_openai_client_reads_calls_and_sends_them_back() -> None:
    seen: list[tuple[Message, ...]] = []
    tool: ChatCompletionToolParam = {"type": "function", "function": {"name": "weather"}}
    asked: ChatCompletionMessageParam = {"role": "user", "content": "Hi"}
    with openai_client(remembering(seen, "openai.chat")) as client:
        first = client.chat.completions.create(model="m", messages=[asked], tools=[tool])
        choice = first.choices[0]
        calls = choice.message.tool_calls or []
        results: list[ChatCompletionMessageParam] = [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls
        ]
        echo = choice.message.model_dump(exclude_none=True)
        client.chat.completions.create(
            model="m",
            messages=[asked, echo, *results],  # type: ignore[list-item]
            tools=[tool],
        )
    assert choice.finish_reason == "tool_calls"
    assert [call.id for call in calls] == ["call_job-1-0", "call_job-1-1"]
    assert seen[1][1].content == (
        *CALL[:2],
        ToolUse("call_job-1-0", "weather", '{"city": "Bern"}'),
        ToolUse("call_job-1-1", "weather", "{}"),
    )
    assert seen[1][2].content == (
        ToolResult("call_job-1-0", (Text("rain"),)),
        ToolResult("call_job-1-1", (Text("rain"),)),
    )


def test_anthropic_client_reads_calls_and_sends_them_back() -> None:
    seen: list[tuple[Message, ...]] = []
    tool: ToolParam = {"name": "weather", "input_schema": {"type": "object"}}
    asked: MessageParam = {"role": "user", "content": "Hi"}
    with anthropic_client(remembering(seen, "claude.messages")) as client:
        first = client.messages.create(model="m", max_tokens=8, messages=[asked], tools=[tool])
        calls = [block for block in first.content if block.type == "tool_use"]
        results: list[ToolResultBlockParam] = [
            {"type": "tool_result", "tool_use_id": call.id, "content": "rain", "is_error": True}
            for call in calls
        ]
        client.messages.create(
            model="m",
            max_tokens=8,
            messages=[asked, first.to_param(), {"role": "user", "content": results}],
            tools=[tool],
        )
    assert first.stop_reason == "tool_use"
    assert [(call.id, call.input) for call in calls] == [
        ("toolu_job-1-0", {"city": "Bern"}),
        ("toolu_job-1-1", {}),
    ]
    assert seen[1][1].content == (
        *CALL[:2],
        ToolUse("toolu_job-1-0", "weather", '{"city":"Bern"}'),
        ToolUse("toolu_job-1-1", "weather", "{}"),
    )
    assert seen[1][2].content == (
        ToolResult("toolu_job-1-0", (Text("rain"),), is_error=True),
        ToolResult("toolu_job-1-1", (Text("rain"),), is_error=True),
    )


def test_openai_client_reads_plain_completions() -> None:
    with openai_client(answering("openai.completions")) as client:
        completion = client.completions.create(
            model="m", prompt=[1, 2], n=2, logprobs=0, extra_body={"return_token_ids": True}
        )
    assert [choice.text for choice in completion.choices] == [TEXT, TEXT]
    assert completion.id == "cmpl-job-1"
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 1, 2, 2, 3, 4, 5]
    assert completion.choices[0].model_extra is not None
    assert completion.choices[0].model_extra["token_ids"] == list(TEXT.encode())


def test_anthropic_client_counts_tokens() -> None:
    with anthropic_client(answering("claude.count_tokens")) as client:
        count = client.messages.count_tokens(
            model="m", messages=[{"role": "user", "content": "Hi"}], system="S"
        )
    assert count.input_tokens == 2


def test_openai_client_raises_its_own_errors() -> None:
    refusal = UnsupportedOption("`tools`: not supported", param="tools")
    with (
        openai_client(failing("openai.chat", refusal)) as client,
        pytest.raises(openai.BadRequestError, match="`tools`: not supported") as caught,
    ):
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.code, caught.value.param) == ("unsupported_option", "tools")
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "raised", "kind"),
    [
        (QueueFull("full"), anthropic.RateLimitError, "rate_limit_error"),
        (NoLiveWorker("none"), anthropic.OverloadedError, "overloaded_error"),
    ],
)
def test_anthropic_client_raises_its_own_errors(
    error: RolloutError, raised: type[anthropic.APIStatusError], kind: str
) -> None:
    with (
        anthropic_client(failing("claude.messages", error)) as client,
        pytest.raises(raised) as caught,
    ):
        client.messages.create(
            model="m", max_tokens=8, messages=[{"role": "user", "content": "Hi"}]
        )
    assert caught.value.body == {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": "job-1",
    }
