"""An agent on a real model, in the full form for twenty turns: what is exported is what the engine saw and drew,
and no token goes through the model twice.
"""

import asyncio
from itertools import pairwise
from typing import Any, cast

import pytest
from redis import Redis

from producer_sdk import Client, RolloutState
from protocols.rollout_state import TokenIds
from tests.form import FULL
from tests.pool_look import wait_until
from tests.worker_process import StartWorker, WorkerProcess
from worker.engines.hf_tokenizer import HFTokenizer
from worker.engines.torch_engine.checkpoint import locate

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1200)]

TURNS = 20 if FULL else 6
ANSWER_S = 240
SESSION = "agent"
TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CITIES = ("Paris", "Rome", "Oslo", "Bern", "Riga")
USED: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Lima?"},
    {
        "role": "assistant",
        "content": [
            {"type": "tool_use", "id": "toolu_0", "name": "get_weather", "input": {"city": "Lima"}}
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "toolu_0", "content": "18 degrees"}],
    },
]
"""A call and its result before the model's first answer."""


def environment(content: list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    """What the world says to an answer: results of its calls, and another question."""
    ids = [block["id"] for block in content if block["type"] == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": one, "content": f"{turn} degrees, wind 3"}
        for one in ids
    ]
    question = f"And what about {CITIES[turn % len(CITIES)]}? Call the tool."
    return [*results, {"type": "text", "text": question}]


async def test_a_session_of_many_turns_is_exported_without_one_token_of_drift(
    url: str, pool: str, start_worker: StartWorker
) -> None:
    worker = start_worker(url, pool, engine="torch", slots=2, threads=1)
    await asyncio.to_thread(worker.wait_ready, 240)
    states: list[RolloutState] = []
    messages = list(USED)
    async with Client(url, pool=pool) as client:
        for turn in range(TURNS):
            body = {
                "messages": messages,
                "max_tokens": 48 if turn % 2 else 24,
                "tools": [TOOL],
                "tool_choice": {"type": "any" if turn % 2 else "auto"},
                "temperature": 0.9,
            }
            options: dict[str, Any] = {"protocol": "claude.messages", "session": SESSION}
            reply = (await client.submit(body, timeout_s=ANSWER_S, **options)).raise_for_status()
            assert reply.state is not None
            states.append(reply.state)
            content = reply.response["content"]
            messages += [
                {"role": "assistant", "content": content},
                {"role": "user", "content": environment(content, turn)},
            ]
        samples = await client.session(SESSION).samples()
        assert await client.session(SESSION).release()
    assert sum(state.finish_reason == "tool_calls" for state in states) >= TURNS // 4
    (sample,) = samples
    whole = [*sample.prompt_ids, *sample.response_ids]
    engines_own = [TokenIds([*state.prompt_ids, *state.response_ids]) for state in states]
    drift = sum(one != other for one, other in zip(whole, engines_own[-1], strict=True))
    assert drift == 0
    for earlier, later in pairwise(engines_own):
        assert later[: len(earlier)] == earlier
    drawn = [token for state in states for token in state.response_ids]
    trained = zip(sample.response_ids, sample.response_mask, strict=True)
    assert [token for token, mask in trained if mask] == drawn
    kept = zip(sample.logprobs, sample.response_mask, strict=True)
    assert [p for p, mask in kept if mask] == [p for state in states for p in state.logprobs]
    # each turn forwards what is new and the token before, whose like was the only one of the last turn not forwarded
    assert (
        _forwarded_tokens(worker, sum(len(state.response_ids) for state in states))
        == len(whole) - 1
    )
    _report(whole, states, drift)


def _forwarded_tokens(worker: WorkerProcess, drawn: int) -> int:
    """By the engine's own count, once a heartbeat has told of all that was drawn."""
    told: dict[str, int] = {}
    with Redis.from_url(worker.url, protocol=2) as redis:  # pyright: ignore[reportUnknownMemberType]

        def all_told() -> bool:
            key, fields = (
                f"rollout:{{{worker.pool}}}:worker:{worker.worker_id}",
                ["forwarded_tokens", "generated_tokens"],
            )
            told.update(zip(fields, map(int, cast("Any", redis).hmget(key, fields)), strict=True))
            return told["generated_tokens"] >= drawn

        wait_until(all_told, "a heartbeat with the end")
    return told["forwarded_tokens"]


def _report(whole: list[int], states: list[RolloutState], drift: int) -> None:
    """How many tokens would have drifted, had the conversation been tokenized again from its text."""
    tokenizer = HFTokenizer(locate("smollm2"))
    anew = [tokenizer.encode(state.text) for state in states]
    drawn = [TokenIds([i for i in state.response_ids if i > 2]) for state in states]
    differ = sum(one != other for one, other in zip(anew, drawn, strict=True))
    calls = sum(state.finish_reason == "tool_calls" for state in states)
    print(  # noqa: T201 - the figures
        f"{len(states)} turns, {calls} with calls, {len(whole)} tokens, {drift} differ; "
        f"{differ} of {len(anew)} answers would be tokenized otherwise from their text"
    )
