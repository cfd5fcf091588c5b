"""Jobs from Redis, answered by lmdeploy's own engine on SmolLM2-135M-Instruct as transformers would."""

import pytest

from producer_sdk import Client
from tests.job_body import chat, claude
from tests.lmdeploy.cpu_shim import MEMORY_VARIABLE
from tests.lmdeploy.summary import Show, told
from tests.plain_model import PlainModel, of_tokens
from tests.queue_fixtures import broker, client
from tests.worker_process import StartWorker
from worker.engines.torch_engine.checkpoint import locate

__all__ = ["broker", "client"]

LOAD_S, ANSWER_S = 600.0, 200.0
TOLERATED = 1e-4
QUESTION = "What is the capital of France?"
LONG_QUESTION = "Tell me about the sea. " * 12


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)  # the first run converts the model, on a machine that may be busy
def test_answers_and_log_probabilities_of_a_real_model_are_those_of_transformers(
    url: str,
    pool: str,
    broker: object,
    client: Client,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
    show: Show,
) -> None:
    monkeypatch.setenv(MEMORY_VARIABLE, str(2 * 1024**3))
    directory = locate("smollm2")
    worker = start_worker(
        url,
        pool,
        engine="lmdeploy",
        module="tests.lmdeploy.cpu_worker",
        model=str(directory),
        slots=4,
    )
    worker.wait_ready(LOAD_S)
    futures = [
        client.submit(chat(QUESTION, temperature=0, max_tokens=12, logprobs=True)),
        client.submit(chat(LONG_QUESTION, n=3, max_tokens=16, seed=1, logprobs=True)),
        client.submit(
            claude(QUESTION, temperature=0) | {"max_tokens": 12}, protocol="claude.messages"
        ),
    ]
    replies = [one.result(ANSWER_S) for one in futures]
    for reply in replies:
        reply.raise_for_status()
    by_openai, _, by_claude = replies
    texts = [
        by_openai.response["choices"][0]["message"]["content"],
        by_claude.response["content"][0]["text"],
    ]
    assert "Paris" in texts[0]
    assert texts[0] == texts[1]

    plain = PlainModel(directory)
    (likeliest,), (by_claude_too,) = by_openai.states, by_claude.states
    greedy = plain.greedy([likeliest.prompt_ids], 12, likeliest.response_ids[-1])[0]
    assert list(likeliest.response_ids) == list(by_claude_too.response_ids) == greedy

    names = ["openai.chat, greedy", *["openai.chat, drawn"] * 3, "claude.messages, greedy"]
    states = [state for reply in replies for state in reply.states]
    expected = plain.logprobs(
        [one.prompt_ids for one in states], [one.response_ids for one in states]
    )
    for name, state, drawn in zip(names, states, expected, strict=True):
        own = of_tokens(drawn, state.response_ids)
        farthest = max(abs(a - b) for a, b in zip(state.logprobs, own, strict=True))
        show(told(f"SmolLM2, {name}, {state.text!r}", state, farthest))
        assert farthest <= TOLERATED
