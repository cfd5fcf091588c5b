"""Jobs from Redis, answered by lmdeploy's own engine in worker processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from redis.exceptions import ResponseError
from transformers import LlamaConfig

from producer_sdk import Client, Future, JobStatus
from protocols.job import Reply
from protocols.rollout_state import RolloutState
from tests.control_look import fact, obeyed, order
from tests.job_body import chat, claude
from tests.lmdeploy.summary import Show, told
from tests.plain_model import PlainModel, of_tokens
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import broker, client, look, nothing_left
from tests.tiny_model import altered, save_tiny_model, sized
from tests.trained_weights import disturb
from tests.worker_process import StartWorker, WorkerProcess

__all__ = ["broker", "client", "look", "nothing_left"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(800)]

LOAD_S, ANSWER_S = 240.0, 240.0
TOLERATED, APART = 1e-4, 1e-2
PROMPT = list(range(5, 25))
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


def apart(state: RolloutState, weights: Path) -> list[float]:
    """How far each of a sample's log-probabilities is from what transformers makes of it with these weights."""
    drawn = drawn_by(state, weights)
    return [abs(a - b) for a, b in zip(state.logprobs, drawn, strict=True)]


def long(client: Client) -> Future[Reply]:
    """A job whose end a test need not fear."""
    params = {"max_tokens": LONG_TOKENS, "min_tokens": LONG_TOKENS, "sampling_seed": 5}
    body = {"input_ids": PROMPT, "sample_params": params}
    return client.submit(body, protocol="generate")


def wait_kept(look: Look, job_id: str) -> None:
    key = look.keys.reply(job_id)
    wait_until(lambda: look("HGET", key, "kept:0"), "some tokens are kept", timeout_s=60)


def test_jobs_of_both_shapes_are_answered(
    start: Start, client: Client, model: Path, show: Show, nothing_left: Callable[[], None]
) -> None:
    worker = start()
    worker.wait_ready(LOAD_S)

    asked = chat("rain", max_tokens=12, n=3, logprobs=True, top_logprobs=2, seed=7)
    reply = client.submit(asked, protocol="openai.chat").result(ANSWER_S)
    reply.raise_for_status()
    for choice, state in zip(reply.response["choices"], reply.states, strict=True):
        entries = choice["logprobs"]["content"]
        assert [one["logprob"] for one in entries] == pytest.approx(list(state.logprobs))
        assert all(len(one["top_logprobs"]) == 2 for one in entries)
        assert choice["rollout"]["token_ids"] == list(state.response_ids)
        farthest = max(apart(state, model))
        assert farthest <= TOLERATED
        show(told(f"openai.chat, choice {state.index}", state, farthest))
    assert len({bytes(state.response_ids) for state in reply.states}) == 3

    asked = claude("rain", max_tokens=12)
    reply = client.submit(asked, protocol="claude.messages").result(ANSWER_S)
    state = state_of(reply)
    assert reply.response["type"] == "message"
    assert reply.response["rollout"]["token_ids"] == list(state.response_ids)
    farthest = max(apart(state, model))
    assert farthest <= TOLERATED
    show(told("claude.messages", state, farthest))

    free = state_of(client.submit(chat("rain", max_tokens=60, seed=3)).result(ANSWER_S))
    pairs = [free.text[i : i + 2] for i in range(4, len(free.text) - 1)]
    stop = next(pair for pair in pairs if pair.isascii())
    stopped = state_of(client.submit(chat("rain", max_tokens=60, seed=3, stop=[stop])).result(60))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    ended = len(stopped.response_ids)
    assert list(stopped.response_ids) == list(free.response_ids)[:ended]
    assert ended < len(free.response_ids)

    refused = client.submit(chat("rain", presence_penalty=0.5)).result(ANSWER_S)
    assert (refused.status, refused.code) == (JobStatus.FAILED, 400)

    nothing_left()
    worker.terminate()
    assert worker.wait() == 0


def test_from_an_update_on_every_token_is_that_of_the_new_weights(
    start: Start, client: Client, look: Look, model: Path, trained: Path, show: Show
) -> None:
    worker = start()
    worker.wait_ready(LOAD_S)
    future = long(client)
    wait_kept(look, future.job_id)

    obeyed(look, "pause")
    assert obeyed(look, "offload", "level=2")[worker.worker_id]["state"] == "offloaded"
    assert obeyed(look, "onload")[worker.worker_id]["state"] == "stale"
    with pytest.raises(ResponseError, match="first update_weights"):
        order(look, "continue")
    obeyed(look, "update_weights", "version=1", f"uri={trained / 'model.safetensors'}")
    obeyed(look, "continue")

    state = state_of(future.result(ANSWER_S))
    (old, first), (new, cut) = state.policy_versions
    assert (old, first, new) == (0, 0, 1)
    assert 0 < cut < LONG_TOKENS == len(state.response_ids)
    by_old, by_new = apart(state, model), apart(state, trained)
    assert max(by_old[:cut]) <= TOLERATED
    assert max(by_new[cut:]) <= TOLERATED
    told_apart = sum(one > APART for one in by_old[cut:])
    assert told_apart > (LONG_TOKENS - cut) / 2
    show(
        "a job under way at pause, offload 2, onload, update_weights, continue:\n"
        f"  {cut} tokens of version 0, within {max(by_old[:cut]):.1e} of transformers on the old weights\n"
        f"  {LONG_TOKENS - cut} tokens of version 1, within {max(by_new[cut:]):.1e} of transformers on the new ones\n"
        f"  {told_apart} of these differ by more than {APART:g} from the old ones, by {max(by_old[cut:]):.2f} at most"
    )

    after = state_of(
        client.submit(claude("rain", max_tokens=12), protocol="claude.messages").result(ANSWER_S)
    )
    assert after.policy_versions == ((1, 0),)
    farthest = max(apart(after, trained))
    assert farthest <= TOLERATED
    assert max(apart(after, model)) > APART
    show(told("claude.messages, after the update", after, farthest))


def test_a_killed_worker_s_job_goes_on_from_its_kept_tokens(
    start: Start, client: Client, look: Look, model: Path, show: Show
) -> None:
    workers = [start(), start()]
    for worker in workers:
        worker.wait_ready(LOAD_S)
    future = long(client)
    wait_kept(look, future.job_id)
    holder = look("HGET", look.keys.reply(future.job_id), "worker").decode()
    (victim,) = [one for one in workers if one.worker_id == holder]
    (heir,) = [one for one in workers if one.worker_id != holder]
    victim.kill()

    reply = future.result(ANSWER_S)
    state = state_of(reply)
    assert (reply.worker, reply.attempts) == (heir.worker_id, 2)
    assert (len(state.response_ids), state.finish_reason) == (LONG_TOKENS, "length")
    farthest = max(apart(state, model))
    assert farthest <= TOLERATED

    events = look.reply(future.job_id)["events"]
    kept = int(events.partition("lost after ")[2].split()[0])
    rest = LONG_TOKENS - kept
    assert 0 < kept < LONG_TOKENS

    def counted(what: str) -> int:
        return int(fact(look, heir.worker_id, f"{what}_tokens"))

    wait_until(lambda: counted("generated") >= rest, "a heartbeat tells")
    # each position once: the prompt and what was kept together, then one a token; the last is not forwarded
    assert counted("generated") == rest
    assert counted("forwarded") == len(PROMPT) + LONG_TOKENS - 1
    show(
        f"a worker killed by SIGKILL: {kept} of {LONG_TOKENS} tokens were kept; the heir drew {counted('generated')}\n"
        f"  and forwarded {counted('forwarded')} positions ({len(PROMPT)} + {LONG_TOKENS} - 1); "
        f"all within {farthest:.1e} of transformers"
    )
