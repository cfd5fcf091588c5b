"""Unmodified clients of OpenAI and Anthropic, over the transport and over a gateway: whole answers, errors, ends."""

import asyncio
import json
import secrets
import time
from typing import Any

import anthropic
import anyio
import openai
import pytest
from anthropic import beta_tool

from producer_sdk import Client, anthropic_client, openai_client
from tests.http_door import Door
from tests.pool_look import Look, wait_until
from tests.servers import both_servers

LIMIT_S = 60
HELLO: Any = [{"role": "user", "content": "hello"}]
SLOW: dict[str, Any] = {"rollout": {"script": {"text": "x" * 3000, "ms_per_token": 20}}}
"""A minute of tokens, should nobody end it."""
BOTH = pytest.mark.parametrize("kind", ["openai", "anthropic"])
ERRORS: Any = (openai.APIStatusError, anthropic.APIStatusError)


@pytest.fixture
def pool(standing: str) -> str:
    return standing


def ask(
    door: Door,
    kind: str,
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 30,
    **extra: object,
) -> Any:  # noqa: ANN401 - of either client
    """One whole answer from the sync client of that kind."""
    made: Any = door.openai() if kind == "openai" else door.anthropic()
    with made:
        create = made.chat.completions.create if kind == "openai" else made.messages.create
        return create(
            model="scripted",
            max_tokens=4000,
            messages=HELLO,
            timeout=timeout,
            extra_headers=headers,
            extra_body=extra or None,
        )


async def ask_async(door: Door, kind: str, **extra: object) -> Any:  # noqa: ANN401
    made: Any = door.async_openai() if kind == "openai" else door.async_anthropic()
    async with made:
        create = made.chat.completions.create if kind == "openai" else made.messages.create
        return await create(
            model="scripted", max_tokens=4000, messages=HELLO, timeout=30, extra_body=extra or None
        )


def text_of(answer: Any) -> str:  # noqa: ANN401
    return (
        answer.choices[0].message.content if hasattr(answer, "choices") else answer.content[0].text
    )


class NewJobs:
    """The jobs that came since this was made."""

    def __init__(self, look: Look) -> None:
        self._look, self._before = look, look.job_ids()

    def ids(self) -> list[str]:
        return sorted(self._look.job_ids() - self._before)

    def statuses(self) -> list[str]:
        return [self._look.reply(job_id)["status"] for job_id in self.ids()]

    def wait_for(self, *statuses: str) -> None:
        wait_until(lambda: self.statuses() == [*statuses], f"new jobs are {statuses}")


@pytest.fixture
def new_jobs(standing: str, look: Look) -> NewJobs:
    return NewJobs(look)


@both_servers
@BOTH
def test_a_sync_client_gets_its_answer_with_tokens_and_the_job_s_id(
    door: Door, kind: str, look: Look
) -> None:
    answer = ask(door, kind)
    assert text_of(answer) == "hello"
    assert answer.rollout["token_ids"] == [*b"hello", 256]
    assert len(answer.rollout["logprobs"]) == 6
    assert look.reply(answer._request_id)["status"] == "completed"
    assert answer.id.endswith(answer._request_id)


@BOTH
async def test_an_async_client_gets_its_answer(door: Door, kind: str) -> None:
    answers = await asyncio.gather(*(ask_async(door, kind) for _ in range(20)))
    assert [text_of(answer) for answer in answers] == ["hello"] * 20
    assert len({answer._request_id for answer in answers}) == 20


def test_the_models_are_listed_in_either_shape(door: Door) -> None:
    with door.openai() as openai_made, door.anthropic() as claude:
        assert [model.id for model in openai_made.models.list()] == ["scripted"]
        assert openai_made.models.retrieve("scripted").object == "model"
        listed = claude.models.list()
        assert [(model.id, model.type) for model in listed] == [("scripted", "model")]
        assert claude.models.retrieve("scripted").display_name == "scripted"
        with pytest.raises(openai.NotFoundError) as missing:
            openai_made.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"


def test_options_travel_in_headers(door: Door, look: Look, client: Client) -> None:
    job_id = f"mine-{secrets.token_hex(4)}"
    answer = ask(
        door,
        "openai",
        headers={
            "x-rollout-job-id": job_id,
            "X-Session-ID": "s-1",
            "x-rollout-group": "g-1",
            "x-rollout-lane": "high",
        },
    )
    assert answer._request_id == job_id
    reply = client.get(job_id).result(LIMIT_S)
    assert reply.state is not None
    assert (reply.state.session_id, reply.state.group_id) == ("s-1", "g-1")


def test_the_same_request_under_one_idempotency_key_is_one_job(
    door: Door, new_jobs: NewJobs
) -> None:
    headers = {"idempotency-key": secrets.token_hex(8)}
    first, second = (ask(door, "openai", headers=headers) for _ in range(2))
    assert first._request_id == second._request_id
    assert first.rollout == second.rollout
    assert new_jobs.ids() == [first._request_id]


def test_another_request_under_the_key_is_refused(door: Door, new_jobs: NewJobs) -> None:
    headers = {"idempotency-key": secrets.token_hex(8)}
    ask(door, "openai", headers=headers)
    with pytest.raises(openai.ConflictError) as refused:
        ask(door, "openai", headers=headers, seed=1)
    assert refused.value.code == "job_conflict"
    assert len(new_jobs.ids()) == 1


@pytest.mark.parametrize(
    ("kind", "error", "wrong", "told"),
    [
        (
            "openai",
            openai.BadRequestError,
            {"temperature": 9},
            ("invalid_request_error", "temperature"),
        ),
        ("openai", openai.NotFoundError, {"model": "gpt-9"}, ("invalid_request_error", "model")),
        ("anthropic", anthropic.BadRequestError, {"top_p": 9}, ("invalid_request_error", "top_p")),
        ("anthropic", anthropic.NotFoundError, {"model": "gpt-9"}, ("not_found_error", "model")),
    ],
)
def test_a_wrong_request_is_answered_in_the_client_s_own_shape(
    door: Door,
    kind: str,
    error: type[Exception],
    wrong: dict[str, Any],
    told: tuple[str, str],
    new_jobs: NewJobs,
) -> None:
    with pytest.raises(error) as refused:
        ask(door, kind, **wrong)
    caught: Any = refused.value
    assert caught.type == told[0]
    assert told[1] in caught.message
    assert new_jobs.ids() == [caught.request_id]
    assert caught.response.headers["x-should-retry"] == "false"


@BOTH
def test_a_job_that_the_queue_has_retried_is_not_retried_by_the_client(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    script = {"script": {"text": "never", "fail": "error", "at_token": 1}}
    with pytest.raises(ERRORS) as failed:
        ask(door, kind, rollout=script)
    assert failed.value.status_code == 500
    assert failed.value.response.headers["x-should-retry"] == "false"
    assert new_jobs.ids() == [failed.value.request_id]


@BOTH
def test_a_client_s_time_limit_is_the_job_s_deadline(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    began_s = time.monotonic()
    with pytest.raises(ERRORS) as late:
        ask(door, kind, timeout=1.0, **SLOW)
    assert time.monotonic() - began_s < 5
    assert late.value.status_code == 504
    assert late.value.type == ("server_error" if kind == "openai" else "timeout_error")
    assert late.value.response.headers["x-should-retry"] == "false"
    new_jobs.wait_for("expired")


@BOTH
async def test_a_cancelled_task_s_job_is_cancelled(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    task = asyncio.create_task(ask_async(door, kind, **SLOW))
    await asyncio.to_thread(new_jobs.wait_for, "running")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(new_jobs.wait_for, "cancelled")


@BOTH
async def test_a_cancelled_scope_s_job_is_cancelled(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: ask_async(door, kind, **SLOW))
        await asyncio.to_thread(new_jobs.wait_for, "running")
        group.cancel_scope.cancel()
    await asyncio.to_thread(new_jobs.wait_for, "cancelled")


async def test_a_job_that_is_cancelled_before_it_arrives_does_not_run(
    door: Door, new_jobs: NewJobs
) -> None:
    tasks = [asyncio.create_task(ask_async(door, "openai", **SLOW)) for _ in range(20)]
    await asyncio.to_thread(wait_until, new_jobs.ids, "the first has arrived")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(
        wait_until, lambda: set(new_jobs.statuses()) == {"cancelled"}, "all are cancelled"
    )


async def test_a_request_with_a_key_is_not_ended_by_whoever_hangs_up(
    door: Door, new_jobs: NewJobs
) -> None:
    headers = {"idempotency-key": secrets.token_hex(8)}
    body = {"rollout": {"script": {"text": "kept", "ms_per_token": 300}}}
    async with door.async_openai() as made:

        async def asked() -> Any:  # noqa: ANN401
            return await made.chat.completions.create(
                model="scripted", messages=HELLO, timeout=30, extra_headers=headers, extra_body=body
            )

        task = asyncio.create_task(asked())
        await asyncio.to_thread(new_jobs.wait_for, "running")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert text_of(await asked()) == "kept"
    assert new_jobs.statuses() == ["completed"]


def test_unknown_paths_methods_and_options_are_refused_in_openai_s_shape(door: Door) -> None:
    with door.http() as http:
        missing = http.post("/v1/responses", json={})
        wrong = http.get("/v1/chat/completions")
        odd = http.post("/v1/chat/completions", json={}, headers={"x-rollout-lane": "fast"})
        late = http.post("/v1/chat/completions", json={}, headers={"x-rollout-timeout-s": "nan"})
    assert [answer.status_code for answer in (missing, wrong, odd, late)] == [404, 405, 400, 400]
    codes = [answer.json()["error"]["code"] for answer in (missing, wrong, odd, late)]
    assert codes == ["route_not_found", "method_not_allowed", "invalid_request", "invalid_request"]
    assert odd.json()["error"]["param"] == "x-rollout-lane"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/generate"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'{"messages":"\xff"}', b"[" * 100_000, b'{"stream":"yes"}'],
    ids=["empty", "cut", "null", "list", "no utf-8", "deep", "odd stream"],
)
def test_what_is_no_request_is_a_400_of_that_route(door: Door, path: str, body: bytes) -> None:
    with door.http() as http:
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert told.get("type") == ("error" if path == "/v1/messages" else None)
    assert told["error"]["message"]
    assert answer.headers["x-request-id"] == answer.headers["request-id"]


def test_a_query_does_not_matter(door: Door) -> None:
    with door.http() as http:
        body = {"max_tokens": 9, "messages": HELLO}
        assert http.post("/v1/messages?beta=true", json=body).json()["type"] == "message"


def test_fields_without_effect_are_named_in_a_header(door: Door) -> None:
    with door.http() as http:
        answer = http.post(
            "/v1/chat/completions", json={"messages": HELLO, "user": "me", "store": True}
        )
    assert set(answer.headers["x-rollout-ignored"].split(",")) >= {"store"}


@BOTH
def test_a_body_that_is_too_large_is_refused(door: Door, kind: str, new_jobs: NewJobs) -> None:
    with pytest.raises(ERRORS) as refused:
        ask(door, kind, filler="x" * (16 * 1024 * 1024 + 1))
    assert refused.value.status_code == 413
    assert new_jobs.ids() == []


def test_our_own_builders_make_clients_that_wait_and_do_not_retry(client: Client) -> None:
    with openai_client(client, sync=True) as made, anthropic_client(client, sync=True) as claude:
        assert (made.max_retries, claude.max_retries) == (0, 0)
        assert made.timeout == claude.timeout == 600
        created = claude.messages.create(model="scripted", max_tokens=30_000, messages=HELLO)
        assert created.content[0].type == "text"
        assert made.chat.completions.create(model="scripted", messages=HELLO).choices
    assert client.submit({"messages": HELLO}).result(LIMIT_S).status == "completed"


async def test_closing_an_official_client_leaves_the_queue_s_client_open(client: Client) -> None:
    async with openai_client(client) as made, anthropic_client(client) as claude:
        assert (await made.chat.completions.create(model="scripted", messages=HELLO)).choices
        assert (
            await claude.messages.create(model="scripted", max_tokens=9, messages=HELLO)
        ).content
    assert (await client.submit({"messages": HELLO})).status == "completed"


def test_a_plain_completion_takes_text_or_token_ids(door: Door) -> None:
    with door.openai() as made:
        text = made.completions.create(model="scripted", prompt="hello", max_tokens=9)
        ids = made.completions.create(model="scripted", prompt=[*b"hello"], max_tokens=9)
    assert text.object == ids.object == "text_completion"
    assert text.usage == ids.usage


def test_tokens_are_counted_as_the_answer_s_usage_counts_them(door: Door) -> None:
    with door.anthropic() as made:
        counted = made.messages.count_tokens(model="scripted", messages=HELLO, system="Be brief")
        answer = made.messages.create(
            model="scripted", messages=HELLO, system="Be brief", max_tokens=9
        )
    assert counted.input_tokens == answer.usage.input_tokens


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


def test_a_tool_that_is_asked_for_is_called_and_its_result_is_taken(door: Door) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    with door.openai() as made:
        asked = made.chat.completions.create(
            model="scripted", messages=HELLO, tools=tools, tool_choice="required"
        )
        (call,) = asked.choices[0].message.tool_calls or []
        assert asked.choices[0].finish_reason == "tool_calls"
        assert call.type == "function"
        assert "city" in json.loads(call.function.arguments)
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        turn: Any = asked.choices[0].message.model_dump(exclude_none=True)
        answered = made.chat.completions.create(
            model="scripted", messages=[*HELLO, turn, result], tools=tools, tool_choice="none"
        )
    assert answered.choices[0].finish_reason == "stop"


def test_anthropic_s_client_calls_a_tool_as_well(door: Door) -> None:
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    with door.anthropic() as made:
        asked = made.messages.create(
            model="scripted",
            messages=HELLO,
            max_tokens=400,
            tools=tools,
            tool_choice={"type": "any"},
        )
        assert asked.stop_reason == "tool_use"
        call: Any = asked.content[-1]
        assert (call.type, call.name) == ("tool_use", "weather")
        turn: Any = {
            "role": "assistant",
            "content": [block.model_dump() for block in asked.content],
        }
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        answered = made.messages.create(
            model="scripted",
            messages=[*HELLO, turn, {"role": "user", "content": [result]}],
            max_tokens=400,
            tools=tools,
            tool_choice={"type": "none"},
        )
    assert answered.stop_reason == "end_turn"


def test_anthropic_s_tool_runner_learns_that_there_are_no_threads_and_runs(
    door: Door, new_jobs: NewJobs
) -> None:
    asked: list[str] = []

    @beta_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "sunny"

    with door.anthropic() as made:
        runner = made.beta.messages.tool_runner(
            model="scripted",
            messages=HELLO,
            max_tokens=400,
            tools=[weather],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            max_iterations=2,
        )
        turns = list(runner)
    assert [turn.stop_reason for turn in turns] == ["tool_use", "tool_use"]
    assert turns[1].usage.input_tokens > turns[0].usage.input_tokens
    assert len(asked) >= 1
    assert sorted(new_jobs.statuses()) == ["completed", "completed", "failed"]


def test_a_generate_request_is_answered_over_either_door(door: Door) -> None:
    with door.http() as http:
        answer = http.post("/generate", json={"prompt": "hello", "sample_params": {"n": 2}})
    assert [sample["index"] for sample in answer.json()["samples"]] == [0, 1]
