"""Which experts each position went to comes from lmdeploy to the trainer as it is."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest

from producer_sdk import Client, JobStatus
from protocols.errors import UnsupportedOption
from protocols.queue.broker import Broker
from protocols.rollout_state import TokenIds
from tests.lmdeploy.stub_engine import EXPERTS, LAYERS, experts, install
from tests.lmdeploy.test_faults import GOOD, running, serving
from tests.queue_fixtures import broker, client
from tests.tiny_model import save_tiny_model
from tests.torch_engine_calls import LIMIT_S, call

__all__ = ["broker", "client"]

TOKENS = 5
POSITIONS = len(GOOD) + TOKENS - 1
"""The last token is drawn, and not forwarded."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


async def test_a_sample_s_experts_are_in_its_rollout_state(
    model: Path,
    url: str,
    pool: str,
    broker: Broker,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)
    async with serving(model, url, pool, "keeping", routed_experts=True):
        wanted = {"max_tokens": TOKENS, "n": 2, "return_routed_experts": True}
        future = client.submit({"input_ids": GOOD, "sample_params": wanted}, protocol="generate")
        plain = {"input_ids": GOOD, "sample_params": {"max_tokens": TOKENS}}
        without = client.submit(plain, protocol="generate")
        replies = [await asyncio.to_thread(one.result, LIMIT_S) for one in (future, without)]
    asked, unasked = (reply.states for reply in replies)
    for state in asked:
        found = state.routed_experts
        assert found is not None
        assert found.shape == (POSITIONS, LAYERS, EXPERTS)
        seen = np.frombuffer(found.ids, "<u2").reshape(found.shape)
        np.testing.assert_array_equal(seen, experts(POSITIONS))
    assert unasked[0].routed_experts is None


async def test_a_worker_that_keeps_none_refuses_to_be_asked(
    model: Path,
    url: str,
    pool: str,
    broker: Broker,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)
    async with serving(model, url, pool, "plain"):
        body = {"input_ids": GOOD, "sample_params": {"return_routed_experts": True}}
        future = client.submit(body, protocol="generate")
        reply = await asyncio.to_thread(future.result, LIMIT_S)
    assert (reply.status, reply.code) == (JobStatus.FAILED, 400)
    assert "return_routed_experts" in reply.exception().message


async def test_after_kept_tokens_the_experts_are_those_of_the_whole_sample(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    asked = call(GOOD, max_tokens=TOKENS, return_routed_experts=True)
    resumed = msgspec.structs.replace(asked, kept=(TokenIds([10, 11]),))
    async with running(model, routed_experts=True) as engine:
        segments = [segment async for segment in engine.generate(resumed)]
    assert segments[0].start == 2
    found = segments[-1].routed_experts
    assert found is not None
    assert found.shape == (POSITIONS, LAYERS, EXPERTS)


async def test_stop_strings_beside_them_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    async with running(model, routed_experts=True) as engine:
        with pytest.raises(UnsupportedOption, match="stop_token_ids"):
            engine.generate(call(GOOD, return_routed_experts=True, stops=("x",)))
