"""Which models the torch engine runs, and which it refuses at the start."""

import asyncio
from pathlib import Path

import pytest
from transformers import (
    BloomConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from protocols.errors import ConfigError
from tests.architectures import ARCHITECTURES
from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import VOCABULARY, altered, save_tiny_model, sized
from tests.torch_engine_calls import running, say
from worker.engines.torch_engine import Settings, TorchEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


GENERATED = {
    "llama": sized(LlamaConfig),
    "qwen2 with windows in one of two layers": sized(
        Qwen2Config, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    **ARCHITECTURES,
}


@pytest.mark.parametrize("name", GENERATED)
async def test_architectures_generate_as_in_transformers(name: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", GENERATED[name])
    plain = PlainModel(directory)
    prompts = [list(range(7, 7 + length)) for length in (1, 9, 30, 14)]
    async with running(directory, slots=3, prefill_chunk_tokens=16, context_tokens=100) as engine:
        said = await asyncio.gather(
            *(say(engine, prompt, temperature=0, max_tokens=20) for prompt in prompts)
        )
    for prompt, (one,) in zip(prompts, said, strict=True):
        assert [one.ids] == plain.greedy([prompt], 20, end=0)
        (expected,) = plain.logprobs([prompt], [one.ids])
        assert one.logprobs == pytest.approx(of_tokens(expected, one.ids), abs=1e-4)


@pytest.mark.parametrize(
    "refused",
    [
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        sized(Lfm2Config, layer_types=["conv", "full_attention"]),
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=lambda one: type(one).__name__,
)
async def test_an_architecture_that_keeps_another_state_is_refused(
    refused: PreTrainedConfig, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "model", refused)
    with pytest.raises(ConfigError, match="cannot run this model"):
        await TorchEngine(Settings(model=str(directory), context_tokens=64)).start()


async def test_a_model_without_all_its_weights_is_refused(model: Path, tmp_path: Path) -> None:
    partial = altered(model, tmp_path / "partial", lambda all_: all_.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match="lack 1 of the weights"):
        await TorchEngine(Settings(model=str(partial))).start()


async def test_a_broken_file_of_weights_is_refused(model: Path, tmp_path: Path) -> None:
    broken = altered(model, tmp_path / "broken", lambda _: None)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        await TorchEngine(Settings(model=str(broken))).start()
    assert str(tmp_path) not in caught.value.message
