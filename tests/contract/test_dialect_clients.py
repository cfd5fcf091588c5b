"""The official clients, whose requests are normalized and whose answers are ours; no network."""

from collections.abc import Callable

import anthropic
import httpx2
import msgspec
import openai
import pytest

from protocols.dialects import dialect_of
from protocols.dialects.base import Answer
from protocols.errors import NoLiveWorker, QueueFull, RolloutError, UnsupportedOption
from protocols.rollout_state import Logprobs, Status, TokenIds

Respond = Callable[[bytes], httpx2.Response]
TEXT = "Grüezi"
JSON = {"content-type": "application/json"}


def answering(protocol: str) -> Respond:
    """Answers every sample with TEXT, one token a byte."""

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
                response_ids=ids,
                logprobs=Logprobs([-0.5] * len(ids)),
                policy_versions=((0, 0),),
                finish_reason="stop",
                status=Status.COMPLETED,
            )
            for index in range(normal.state.sample_params.n)
        )
        answer = Answer(
            "job-1", "m", 7, states, normal.ignored, 1, 99, lambda token_id: bytes([token_id])
        )
        return httpx2.Response(200, content=dialect.respond(answer), headers=JSON)

    return respond


def failing(protocol: str, error: RolloutError) -> Respond:
    def respond(body: bytes) -> httpx2.Response:
        content = dialect_of(protocol).error(error, "job-1")
        return httpx2.Response(error.http_status, content=content, headers=JSON)

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
        (NoLiveWorker("none"), anthropic.InternalServerError, "overloaded_error"),
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
