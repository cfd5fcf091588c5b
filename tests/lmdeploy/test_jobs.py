"""Jobs from Redis, answered by lmdeploy's own engine in worker processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from redis.exceptions import ResponseError
from transformers import LlamaConfig

from producer_sdk import Client, JobStatus
from protocols.job import Reply
from protocols.rollout_state import RolloutState
from tests.control_look import fact, obeyed, order
from tests.job_body import chat, claude
from tests.plain_model import PlainModel, of_tokens
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import broker, client, look, nothing_left
from tests.tiny_model import altered, save_tiny_model, sized
from tests.trained_weights import disturb
from tests.worker_process import StartWorker, WorkerProcess

__all__ = ["broker", "client", "look", "nothing_left"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LOAD_S, ANSWER_S = 200.0, 120.0
TOLERATED, APART = 1e-4, 1e-2
LONG_TOKENS = 1500
CONTEXT_TOKENS = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = sized(LlamaConfig, max_position_embeddings=CONTEXT_TOKENS)
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", config)


@pytest.fixture(scope="module")
def trained(model: Path) -> Path:
    return altered(model, model.with_name("trained"), disturb)


Start = Callable[[], WorkerProcess]


@pytest.fixture
def start(url: str, pool: str, broker: object, model: Path, start_worker: StartWorker) -> Start:
    def begin() -> WorkerProcess:
        return start_worker(
            url,
            pool,
            engine="lmdeploy",
            module="tests.lmdeploy.cpu_worker",
            model=str(model),
            slots=4,
            lease_s=4,
            checkpoint_tokens=32,
        )

    return begin


def state_of(reply: Reply) -> RolloutState:
    reply.raise_for_status()
    assert reply.state is not None
    return reply.state


def drawn_by(state: RolloutState, weights: Path) -> list[float]:
    """The log-probabilities that transformers gives to a sample's tokens with these weights."""
    (found,) = PlainModel(weights).logprobs([state.prompt_ids], [state.response_ids])
    return of_tokens(found, state.response_ids)


def farthest(state: RolloutState, weights: Path) -> float:
    own = drawn_by(state, weights)
    return max(abs(a - b) for a, b in zip(state.logprobs, own, strict=True))


def show(name: str, state: RolloutState) -> None:
    shown = [f"{one:.4f}" for one in state.logprobs]
    print(name, state.finish_reason, list(state.response_ids), " ".join(shown))  # noqa: T201 - pytest shows it


def test_jobs_of_both_shapes_and_an_update_of_the_weights(
    start: Start,
    client: Client,
    look: Look,
    model: Path,
    trained: Path,
    nothing_left: Callable[[], None],
) -> None:
    worker = start()
    worker.wait_ready(LOAD_S)

    asked = chat("rain", max_tokens=12, n=3, logprobs=True, top_logprobs=2, seed=7)
    reply = client.submit(asked, protocol="openai.chat").result(ANSWER_S)
    reply.raise_for_status()
    for choice, state in zip(reply.response["choices"], reply.states, strict=True):
        show("openai.chat", state)
        entries = choice["logprobs"]["content"]
        assert [one["logprob"] for one in entries] == pytest.approx(list(state.logprobs))
        assert all(len(one["top_logprobs"]) == 2 for one in entries)
        assert choice["rollout"]["token_ids"] == list(state.response_ids)
        assert farthest(state, model) <= TOLERATED
    assert len({bytes(state.response_ids) for state in reply.states}) == 3

    reply = client.submit(claude("rain", max_tokens=12), protocol="claude.messages").result(
        ANSWER_S
    )
    before = state_of(reply)
    show("claude.messages", before)
    assert reply.response["type"] == "message"
    assert reply.response["rollout"]["token_ids"] == list(before.response_ids)
    assert farthest(before, model) <= TOLERATED

    free = state_of(client.submit(chat("rain", max_tokens=60, seed=3)).result(ANSWER_S))
    pairs = [free.text[i : i + 2] for i in range(4, len(free.text) - 1)]
    stop = next(pair for pair in pairs if pair.isascii())
    stopped = state_of(client.submit(chat("rain", max_tokens=60, seed=3, stop=[stop])).result(60))
    show("stopped by a string", stopped)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    ended = len(stopped.response_ids)
    assert list(stopped.response_ids) == list(free.response_ids)[:ended]
    assert ended < len(free.response_ids)

    refused = client.submit(chat("rain", presence_penalty=0.5)).result(ANSWER_S)
    assert (refused.status, refused.code) == (JobStatus.FAILED, 400)

    obeyed(look, "pause")
    assert obeyed(look, "offload", "level=2")[worker.worker_id]["state"] == "offloaded"
    assert obeyed(look, "onload")[worker.worker_id]["state"] == "stale"
    with pytest.raises(ResponseError, match="first update_weights"):
        order(look, "continue")
    obeyed(look, "update_weights", "version=1", f"uri={trained / 'model.safetensors'}")
    obeyed(look, "continue")
    after = state_of(
        client.submit(claude("rain", max_tokens=12), protocol="claude.messages").result(60)
    )
    show("after the update", after)
    assert (before.policy_versions, after.policy_versions) == (((0, 0),), ((1, 0),))
    assert farthest(after, trained) <= TOLERATED
    assert farthest(after, model) > APART

    nothing_left()
    worker.terminate()
    assert worker.wait() == 0


def test_a_killed_worker_s_job_goes_on_from_its_kept_tokens(
    start: Start, client: Client, look: Look, model: Path
) -> None:
    workers = [start(), start()]
    for worker in workers:
        worker.wait_ready(LOAD_S)
    params = {"max_tokens": LONG_TOKENS, "min_tokens": LONG_TOKENS, "sampling_seed": 5}
    future = client.submit(
        {"input_ids": list(range(5, 25)), "sample_params": params}, protocol="generate"
    )
    reply_key = look.keys.reply(future.job_id)
    wait_until(lambda: look("HGET", reply_key, "kept:0"), "some tokens are kept", timeout_s=60)
    holder = look("HGET", reply_key, "worker").decode()
    (victim,) = [one for one in workers if one.worker_id == holder]
    (heir,) = [one for one in workers if one.worker_id != holder]
    victim.kill()

    reply = future.result(ANSWER_S)
    state = state_of(reply)
    assert (reply.worker, reply.attempts) == (heir.worker_id, 2)
    assert (len(state.response_ids), state.finish_reason) == (LONG_TOKENS, "length")
    assert farthest(state, model) <= TOLERATED

    events = look.reply(future.job_id)["events"]
    kept = int(events.partition("lost after ")[2].split()[0])
    rest = LONG_TOKENS - kept
    print(f"{kept} tokens were kept, {rest} drawn after them")  # noqa: T201 - pytest shows it
    assert 0 < kept < LONG_TOKENS
    wait_until(
        lambda: int(fact(look, heir.worker_id, "generated_tokens")) >= rest, "a heartbeat tells"
    )
    told = [fact(look, heir.worker_id, f"{what}_tokens") for what in ("generated", "forwarded")]
    assert told == [str(rest), str(20 + LONG_TOKENS - 1)]
