"""Policy versions on a real model: each token bears the version that drew it, as a plain forward pass shows."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from redis.exceptions import ResponseError
from torch import Tensor

from producer_sdk import Client
from protocols.job import Reply
from protocols.rollout_state import RolloutState
from tests.control_look import acks, fact, obeyed, order
from tests.plain_model import PlainModel, of_tokens
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import broker, client, look
from tests.tiny_model import altered
from tests.worker_process import StartWorker, WorkerProcess
from worker.engines.torch_engine.checkpoint import locate

__all__ = ["broker", "client", "look"]

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]

LOAD_S, ANSWER_S = 240.0, 240.0
TOLERATED, APART = 1e-4, 1e-2
QUESTION = [{"role": "user", "content": "Tell me about lighthouses."}]
LONG_TOKENS = 200


class Trained(NamedTuple):
    """Weights of each version: where they are, and transformers' own model over them."""

    files: dict[int, Path]
    plain: dict[int, PlainModel]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The model as it comes, version 0, and two that were trained a little, so to speak."""
    folder = tmp_path_factory.mktemp("trained")
    model = locate("smollm2")
    models = {0: model}
    for version in (11, 12):
        models[version] = altered(model, folder / f"v{version}", _perturbing(version))
    return Trained(
        {version: where / "model.safetensors" for version, where in models.items()},
        {version: PlainModel(where) for version, where in models.items()},
    )


def _perturbing(seed: int) -> Any:  # noqa: ANN401 - a change as `altered` takes it
    generator = torch.Generator().manual_seed(seed)

    def change(weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if tensor.dim() > 1:
                noise = torch.randn(tensor.shape, generator=generator)
                weights[name] = (tensor + 0.02 * tensor.float().std() * noise).to(tensor.dtype)

    return change


def ask(client: Client, tokens: int) -> Any:  # noqa: ANN401 - a future
    params = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 1.0, "sampling_seed": 5}
    return client.submit({"messages": QUESTION, "sample_params": params}, protocol="generate")


def state_of(reply: Reply) -> RolloutState:
    reply.raise_for_status()
    assert reply.state is not None
    return reply.state


def drawn_by(state: RolloutState, plain: PlainModel) -> list[float]:
    """The log-probabilities that these weights give to a sample's tokens."""
    (found,) = plain.logprobs([state.prompt_ids], [state.response_ids])
    return of_tokens(found, state.response_ids)


def farthest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_every_token_bears_the_version_that_drew_it(
    client: Client,
    broker: object,
    start_worker: StartWorker,
    look: Look,
    trained: Trained,
    url: str,
    pool: str,
    tmp_path: Path,
) -> None:
    """One worker, because its start takes long: weights that are wrong, the whole flow, an update underway."""
    worker = start_worker(url, pool, engine="torch", slots=4, threads=2, lease_s=6)
    worker.wait_ready(LOAD_S)
    before = state_of(ask(client, 24).result(ANSWER_S))
    _refuse_what_is_wrong(look, trained.files[11], tmp_path)
    again = state_of(ask(client, 24).result(ANSWER_S))
    assert again.response_ids == before.response_ids
    assert farthest(again.logprobs, before.logprobs) <= TOLERATED
    _update_by_the_flow(look, worker, trained.files[11])
    after = state_of(ask(client, 24).result(ANSWER_S))
    assert (before.policy_versions, after.policy_versions) == (((0, 0),), ((11, 0),))
    for state, version, other in ((before, 0, 11), (after, 11, 0)):
        assert farthest(state.logprobs, drawn_by(state, trained.plain[version])) <= TOLERATED
        assert farthest(state.logprobs, drawn_by(state, trained.plain[other])) > APART
    _check_spans(_update_underway(client, look, trained.files[12]), trained)
    logged = json.loads(fact(look, worker.worker_id, "updates"))
    assert [(update["before"], update["version"]) for update in logged] == [(0, 11), (11, 12)]


def _refuse_what_is_wrong(look: Look, good: Path, folder: Path) -> None:
    for number, (words, told) in enumerate(_wrong(good, folder), start=1):
        issued = order(look, "update_weights", f"version={number}", *words)
        wait_until(lambda i=issued: acks(look, i["command"]), "it answers", timeout_s=ANSWER_S)
        (answer,) = acks(look, issued["command"]).values()
        assert (answer["result"], answer["state"]) == ("refused", "serving"), words
        assert told in answer["why"], answer["why"]
        assert str(folder) not in answer["why"]


def _update_by_the_flow(look: Look, worker: WorkerProcess, file: Path) -> None:
    obeyed(look, "pause")
    assert obeyed(look, "offload", "level=2")[worker.worker_id]["state"] == "offloaded"
    assert obeyed(look, "onload")[worker.worker_id]["state"] == "stale"
    with pytest.raises(ResponseError, match="first update_weights"):
        order(look, "continue")
    obeyed(look, "update_weights", "version=11", f"uri={file}", timeout_s=ANSWER_S)
    obeyed(look, "continue")


def _update_underway(client: Client, look: Look, file: Path) -> RolloutState:
    """A long generation, with new weights in the middle of it."""
    future = ask(client, LONG_TOKENS)
    key = look.keys.reply(future.job_id)
    wait_until(lambda: look("HGET", key, "kept:0"), "some tokens are there", timeout_s=ANSWER_S)
    obeyed(look, "update_weights", "version=12", f"uri={file}", timeout_s=ANSWER_S)
    reply = future.result(ANSWER_S)
    assert reply.attempts == 1
    return state_of(reply)


def _check_spans(state: RolloutState, trained: Trained) -> None:
    (old, start), (new, cut) = state.policy_versions
    assert (old, start, new) == (11, 0, 12)
    assert 0 < cut < LONG_TOKENS == len(state.response_ids)
    by = {version: drawn_by(state, trained.plain[version]) for version in (11, 12)}
    assert farthest(state.logprobs[:cut], by[11][:cut]) <= TOLERATED
    assert farthest(state.logprobs[cut:], by[12][cut:]) <= TOLERATED
    assert farthest(state.logprobs[cut:], by[11][cut:]) > APART


def _wrong(good: Path, folder: Path) -> Iterator[tuple[list[str], str]]:
    """What may be wrong with weights, and a word that the answer must have."""
    yield [f"uri={folder}/nowhere.safetensors"], "nowhere.safetensors"
    garbled = folder / "garbled.safetensors"
    garbled.write_bytes(b"\xff" * 4096)
    yield [f"uri={garbled}"], "garbled.safetensors"
    truncated = folder / "truncated.safetensors"
    shutil.copyfile(good, truncated)
    with truncated.open("r+b") as file:
        file.truncate(good.stat().st_size - 1000)
    yield [f"uri={truncated}"], "truncated.safetensors"
    yield [f"uri={good}", f"sha256={'0' * 64}"], "SHA-256"

    def reshape(weights: dict[str, Tensor]) -> None:
        name = next(name for name, tensor in weights.items() if tensor.dim() == 2)
        weights[name] = weights[name][:-1].clone()

    yield [f"uri={altered(good.parent, folder / 'shape', reshape) / 'model.safetensors'}"], "shape"
