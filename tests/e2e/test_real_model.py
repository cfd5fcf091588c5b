"""The main job on a real model: one conversation in three dialects, and a job of redis-cli alone."""

import asyncio
import json
from typing import Any

import pytest
from anthropic.types import Message
from openai.types.chat import ChatCompletion

from producer_sdk import Client, SampleParams
from tests.control_look import redis_cli
from tests.worker_process import StartWorker

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "What is the capital of France?"}]
BODY = {"messages": QUESTION, "max_tokens": 16, "temperature": 0}
ANSWER_S = 120


async def test_three_dialects_give_one_answer_and_redis_cli_gets_it_too(
    url: str, pool: str, start_worker: StartWorker
) -> None:
    worker = start_worker(url, pool, engine="torch", slots=4, threads=1)
    await asyncio.to_thread(worker.wait_ready, 240)
    async with Client(url, pool=pool) as client:
        chat = await client.submit(BODY)
        claude = await client.submit(BODY, protocol="claude.messages")
        assert chat.state is not None
        assert claude.state is not None
        prompt_ids = chat.state.prompt_ids
        group = await client.sample(prompt_ids, params=SampleParams(max_tokens=16, temperature=0))
    answers = [chat.state.response_ids, claude.state.response_ids, group.samples[0].response_ids]
    assert answers[0] == answers[1] == answers[2]
    assert prompt_ids == claude.state.prompt_ids == group.prompt_ids
    completion = ChatCompletion.model_validate(chat.response, strict=True)
    message = Message.model_validate(claude.response, strict=True)
    assert "Paris" in str(completion.choices[0].message.content)
    assert completion.choices[0].message.content == message.content[0].text  # type: ignore[union-attr]
    assert group.samples[0].text == completion.choices[0].message.content
    assert "Paris" in await asyncio.to_thread(_by_redis_cli, url, pool)


def _by_redis_cli(url: str, pool: str) -> str:
    """The text that `redis-cli` alone sends for and reads."""
    prefix, body = f"rollout:{{{pool}}}", json.dumps(BODY)
    redis_cli(url, "XADD", f"{prefix}:jobs:normal", "*", "id", "hello", "body", body)
    for _ in range(ANSWER_S):
        if redis_cli(url, "HGET", f"{prefix}:reply:hello", "status") == "completed":
            break
        redis_cli(url, "BLPOP", f"{prefix}:nothing", "1")
    found = json.loads(redis_cli(url, "HGET", f"{prefix}:reply:hello", "body"))
    return str(found["choices"][0]["message"]["content"])
