"""Streams of unmodified clients, over the transport and over a gateway: order, ends, time limits, and who hangs up."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anthropic
import anyio
import httpx2
import openai
import pytest

from producer_sdk import Client
from tests.http_door import Door, GatewayDoor, TransportDoor
from tests.pool_look import Look, wait_until
from tests.servers import ServerKind

HELLO: Any = [{"role": "user", "content": "hello"}]
TEXT = "".join(f"{number} " for number in range(100))
SLOW: dict[str, Any] = {"rollout": {"script": {"text": "x" * 3000, "ms_per_token": 20}}}
"""A minute of tokens, should nobody end it."""
BOTH = pytest.mark.parametrize("kind", ["openai", "anthropic"])
ERRORS: Any = (openai.APIError, anthropic.APIError)


@pytest.fixture
def pool(standing: str) -> str:
    return standing


class NewJobs:
    """The jobs that came since this was made."""

    def __init__(self, look: Look) -> None:
        self._look, self._before = look, look.job_ids()

    def statuses(self) -> list[str]:
        return [
            self._look.reply(job_id)["status"]
            for job_id in sorted(self._look.job_ids() - self._before)
        ]

    def wait_for(self, *statuses: str) -> None:
        wait_until(lambda: self.statuses() == [*statuses], f"new jobs are {statuses}")


@pytest.fixture
def new_jobs(standing: str, look: Look) -> NewJobs:
    return NewJobs(look)


def wanted(timeout: float, extra: dict[str, object]) -> dict[str, Any]:
    return {
        "model": "scripted",
        "max_tokens": 4000,
        "messages": HELLO,
        "stream": True,
        "timeout": timeout,
        "extra_body": extra or None,
    }


def create_of(made: Any) -> Any:  # noqa: ANN401 - of either client
    return made.chat.completions.create if hasattr(made, "chat") else made.messages.create


@contextmanager
def opened(door: Door, kind: str, *, timeout: float = 30, **extra: object) -> Generator[Any]:
    """A stream of the sync client of that kind, which is closed after it."""
    made: Any = door.openai() if kind == "openai" else door.anthropic()
    with made:
        yield create_of(made)(**wanted(timeout, extra))


@asynccontextmanager
async def opened_async(
    door: Door,
    kind: str,
    *,
    timeout: float = 30,  # noqa: ASYNC109 - the client's own
    **extra: object,
) -> AsyncGenerator[Any]:
    """A stream of the async client of that kind, which is closed after it."""
    made: Any = door.async_openai() if kind == "openai" else door.async_anthropic()
    async with made:
        yield await create_of(made)(**wanted(timeout, extra))


def text_in(chunk: Any) -> str:  # noqa: ANN401
    if hasattr(chunk, "choices"):
        return (chunk.choices[0].delta.content or "") if chunk.choices else ""
    return getattr(getattr(chunk, "delta", None), "text", "")


async def _all(stream: Any) -> list[Any]:  # noqa: ANN401
    return [chunk async for chunk in stream]


def script(text: str, **more: object) -> dict[str, object]:
    return {"script": {"text": text, **more}}


@BOTH
def test_a_sync_stream_is_whole(door: Door, kind: str, new_jobs: NewJobs) -> None:
    with opened(door, kind, rollout=script(TEXT)) as stream:
        chunks = list(stream)
    assert "".join(map(text_in, chunks)) == TEXT
    if kind == "openai":
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert (chunks[0].type, chunks[-1].type) == ("message_start", "message_stop")
    new_jobs.wait_for("completed")


@BOTH
async def test_many_async_streams_are_whole(door: Door, kind: str) -> None:
    async def one(number: int) -> str:
        async with opened_async(door, kind, rollout=script(f"{number}:{TEXT}")) as stream:
            return "".join([text_in(chunk) async for chunk in stream])

    texts = await asyncio.gather(*(one(number) for number in range(20)))
    assert texts == [f"{number}:{TEXT}" for number in range(20)]


async def test_a_stream_that_says_done_returns_at_once_and_cancels_nothing(
    door: Door, new_jobs: NewJobs
) -> None:
    """OpenAI's client closes the body as soon as it has read `[DONE]`."""
    for _ in range(5):
        ended_s = 0.0
        async with opened_async(door, "openai", rollout=script(TEXT)) as stream:
            async for chunk in stream:
                if chunk.choices[0].finish_reason:
                    ended_s = time.monotonic()
            assert time.monotonic() - ended_s < 0.08
    assert new_jobs.statuses() == ["completed"] * 5


def test_usage_comes_last_where_it_is_asked_for(door: Door) -> None:
    with opened(door, "openai", stream_options={"include_usage": True}) as stream:
        *_, last = stream
    assert last.choices == []
    assert last.usage.completion_tokens == 6


@BOTH
def test_a_refusal_comes_with_its_status_before_any_frame(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    with pytest.raises(ERRORS) as refused, opened(door, kind, model="gpt-9"):
        pass
    assert refused.value.status_code == 404
    assert new_jobs.statuses() == ["failed"]


@BOTH
def test_what_fails_in_the_middle_ends_in_an_error_that_the_client_raises(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    told = script("x" * 300, ms_per_token=5, fail="error", at_token=200)
    seen: list[str] = []
    with opened(door, kind, rollout=told) as stream, pytest.raises(ERRORS):
        seen.extend(text_in(chunk) for chunk in stream)
    assert len("".join(seen)) <= 200
    assert new_jobs.statuses() == ["failed"]


@BOTH
async def test_a_time_limit_in_the_middle_ends_in_the_deadline_s_error(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    began_s = time.monotonic()
    async with opened_async(door, kind, timeout=5.0, **SLOW) as stream:
        await anext(stream)
        with pytest.raises(ERRORS) as late:
            await _all(stream)
    assert time.monotonic() - began_s < 8
    assert "time limit" in str(late.value)
    await asyncio.to_thread(new_jobs.wait_for, "expired")


def test_a_sync_stream_ends_by_its_job_s_deadline(door: Door, new_jobs: NewJobs) -> None:
    with opened(door, "openai", timeout=5.0, **SLOW) as stream, pytest.raises(ERRORS) as late:
        list(stream)
    assert late.value.code == "deadline_exceeded"
    new_jobs.wait_for("expired")


@BOTH
def test_leaving_a_sync_stream_cancels_its_job(door: Door, kind: str, new_jobs: NewJobs) -> None:
    with opened(door, kind, **SLOW) as stream, stream:
        next(iter(stream))
        stream.close()
        new_jobs.wait_for("cancelled")
    new_jobs.wait_for("cancelled")


@BOTH
async def test_closing_an_async_stream_cancels_its_job(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    async with opened_async(door, kind, **SLOW) as stream:
        await anext(aiter(stream))
        await stream.close()
        await asyncio.to_thread(new_jobs.wait_for, "cancelled")


@BOTH
async def test_cancelling_the_task_that_reads_cancels_the_job(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async with opened_async(door, kind, **SLOW) as stream, stream:
            async for _ in stream:
                begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.to_thread(new_jobs.wait_for, "cancelled")


@BOTH
async def test_a_scope_that_ends_in_the_middle_cancels_the_job(
    door: Door, kind: str, new_jobs: NewJobs
) -> None:
    with anyio.move_on_after(60) as scope:
        async with opened_async(door, kind, **SLOW) as stream, stream:
            async for _ in stream:
                scope.cancel()
    await asyncio.to_thread(new_jobs.wait_for, "cancelled")


async def test_a_stream_that_waits_for_its_first_token_can_be_left(
    door: Door, new_jobs: NewJobs
) -> None:
    slow = script("x" * 10, ms_per_token=30_000)

    async def wait() -> None:
        async with opened_async(door, "openai", rollout=slow) as stream:
            await _all(stream)

    task = asyncio.create_task(wait())
    await asyncio.to_thread(new_jobs.wait_for, "running")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.to_thread(new_jobs.wait_for, "cancelled")


def test_the_frames_come_as_events_with_the_job_s_id(door: Door) -> None:
    body = {"messages": HELLO, "stream": True}
    with door.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"] == answer.headers["request-id"]
        events = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in events)
    assert events[-1] == "data: [DONE]"
    assert answer.headers["x-request-id"] in events[0]


def test_both_doors_give_the_same_text(
    client: Client, standing_gateways: Callable[[ServerKind], str], server_kind: ServerKind
) -> None:
    doors = TransportDoor(client), GatewayDoor(standing_gateways(server_kind))
    body = {"messages": HELLO, "stream": True, "seed": 7, "rollout": script(TEXT)}
    said: list[bytes] = []
    for door in doors:
        with door.http() as http:
            answer = http.post("/v1/chat/completions", json=body, timeout=httpx2.Timeout(30))
            told = answer.content.replace(answer.headers["request-id"].encode(), b"ID")
            said.append(told)
    first, second = (_texts(frames) for frames in said)
    assert first == second == TEXT


def _texts(frames: bytes) -> str:
    """The text that the events carry, however they were cut."""
    events = [part.removeprefix("data: ") for part in frames.decode().split("\n\n") if part]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
