"""An agent on a real model, over Anthropic's own client: what is exported is what the engine saw and drew, and no
token goes through the model twice.

In the full form it takes twenty turns.
"""

import asyncio
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import pytest

from producer_sdk import Client, RolloutState, anthropic_client
from protocols.rollout_state import TokenIds
from tests.form import FULL
from tests.worker_process import StartWorker
from worker.engines.hf_tokenizer import HFTokenizer
from worker.engines.torch_engine.checkpoint import locate

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(1200)]

TURNS = 20 if FULL else 6
ANSWER_S = 240
SESSION = "agent"
TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL_ONCE = {"type": "any", "disable_parallel_tool_use": True}
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


def environment(content: list[Any], turn: int) -> list[dict[str, Any]]:
    """What the world says to an answer: results of its calls, and another question."""
    ids = [block.id for block in content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": one, "content": f"{turn} degrees, wind 3"}
        for one in ids
    ]
    question = f"And what about {CITIES[turn % len(CITIES)]}? Call the tool."
    return [*results, {"type": "text", "text": question}]


async def converse(
    client: Client, pool: str, turns: int, most_tokens: int
) -> AsyncGenerator[RolloutState]:
    """The engine's own states, turn by turn, of what an agent says through Anthropic's client."""
    messages = list(USED)
    async with anthropic_client(client, timeout_s=ANSWER_S) as claude:
        create: Any = claude.messages.create
        for turn in range(turns):
            message = await create(
                model=pool,
                messages=messages,
                max_tokens=most_tokens if turn % 2 else most_tokens // 2,
                tools=[TOOL],
                tool_choice=CALL_ONCE if turn % 2 else {"type": "auto"},
                # the id gives the seed: every run draws the same
                extra_headers={"X-Session-ID": SESSION, "x-rollout-job-id": f"turn-{turn}"},
                extra_body={"temperature": 0.9},
            )
            reply = await client.get(message._request_id)
            assert reply.state is not None
            assert message.rollout["token_ids"] == list(reply.state.response_ids)
            yield reply.state
            messages += [
                {"role": "assistant", "content": message.content},
                {"role": "user", "content": environment(message.content, turn)},
            ]


@pytest.fixture
async def client(url: str, pool: str, start_worker: StartWorker) -> AsyncGenerator[Client]:
    """Of a pool whose worker has the model."""
    worker = start_worker(url, pool, engine="torch", slots=2, threads=1)
    await asyncio.to_thread(worker.wait_ready, 240)
    async with Client(url, pool=pool) as made:
        yield made


async def test_a_session_of_many_turns_is_exported_without_one_token_of_drift(
    client: Client, pool: str
) -> None:
    states = [state async for state in converse(client, pool, TURNS, 48)]
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
    assert await _forwarded(client, len(drawn)) == len(whole) - 1
    _report(whole, states, drift)


async def _forwarded(client: Client, drawn: int) -> int:
    """How many positions the engine has forwarded, once its worker tells of so many tokens drawn."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            (worker,) = (await client.fleet()).workers.values()
            if int(worker["generated_tokens"]) == drawn:
                return int(worker["forwarded_tokens"])
            await asyncio.sleep(0.2)


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
