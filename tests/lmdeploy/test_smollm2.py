"""lmdeploy's own engine on SmolLM2-135M-Instruct: its log-probabilities are those of transformers."""

import asyncio

import pytest
import torch

from tests import engines
from tests.lmdeploy.cpu_shim import install_once
from tests.plain_model import PlainModel, of_tokens
from tests.torch_engine_calls import call, read
from worker.engines.base import Turn
from worker.engines.torch_engine.checkpoint import locate

MEMORY_BYTES = 2 * 1024**3


def room(_device: object = None) -> tuple[int, int]:
    """What the device says to have: free, and in all."""
    return MEMORY_BYTES, MEMORY_BYTES


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)  # the first run converts the model, on a machine that may be busy
async def test_log_probabilities_of_a_real_model_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_once()
    monkeypatch.setattr(torch.cuda, "mem_get_info", room)
    directory = await asyncio.to_thread(locate, "smollm2")
    questions = ["What is the capital of France?", "Tell me about the sea. " * 12]
    async with engines.running("lmdeploy", directory, slots=4) as engine:
        prompts = [engine.tokenizer.render([Turn(role="user", content=one)]) for one in questions]
        greedy = call(prompts[0], temperature=0, max_tokens=12)
        drawn = call(prompts[1], n=3, max_tokens=16, min_tokens=16)
        (likeliest,), samples = await asyncio.gather(
            read(engine.generate(greedy)), read(engine.generate(drawn), 3)
        )
        text = engine.tokenizer.decode(likeliest.ids, skip_special_tokens=True)
    print(text)  # noqa: T201 - pytest shows it
    assert "Paris" in text
    plain = PlainModel(directory)
    assert likeliest.ids == plain.greedy([prompts[0]], 12, likeliest.ids[-1])[0]
    said = [likeliest, *samples]
    asked = [prompts[0], *[prompts[1]] * 3]
    logprobs = plain.logprobs(asked, [one.ids for one in said])
    for one, expected in zip(said, logprobs, strict=True):
        assert one.logprobs == pytest.approx(of_tokens(expected, one.ids), abs=1e-4)
