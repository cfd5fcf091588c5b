"""Replacing the torch engine's weights: what is loaded is what transformers computes with, or nothing is."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
)

from protocols.errors import EngineFailed, OutOfMemory, WeightsRefused
from tests.plain_model import PlainModel, of_tokens
from tests.tiny_model import VOCABULARY, altered, save_tiny_model, sized
from tests.torch_engine_calls import PROMPT, Said, running, say
from tests.trained_weights import (
    answer,
    assert_refused,
    cut,
    disturb,
    engine,
    model,
    of_file,
    to_file,
    trained,
)
from worker.engines.base import Weights
from worker.engines.torch_engine import TorchEngine
from worker.engines.weight_files import INDEX

NORM = "model.norm.weight"
HEAD = "lm_head.weight"


__all__ = ["engine", "model", "trained"]


def assert_is_of(said: Said, directory: Path, tolerated: float = 1e-4) -> None:
    """The log-probabilities are those of transformers alone with the weights in `directory`."""
    (expected,) = PlainModel(directory).logprobs([PROMPT], [said.ids])
    assert said.logprobs == pytest.approx(of_tokens(expected, said.ids), abs=tolerated)


async def test_after_an_update_the_engine_computes_with_the_new_weights(
    engine: TorchEngine, model: Path, trained: Path
) -> None:
    before = await answer(engine)
    await engine.update_weights(Weights(1, str(trained)))
    after = await answer(engine)
    assert (set(before.versions), set(after.versions)) == ({0}, {1})
    assert_is_of(before, model)
    assert_is_of(after, trained)
    (old,) = PlainModel(model).logprobs([PROMPT], [after.ids])
    apart = [abs(a - b) for a, b in zip(after.logprobs, of_tokens(old, after.ids), strict=True)]
    assert max(apart) > 1e-2
    await engine.update_weights(Weights(0))
    again = await answer(engine)
    assert again.ids == before.ids
    # the first ones lay in a mapped file, aligned otherwise, and products were rounded otherwise
    assert again.logprobs == pytest.approx(before.logprobs, abs=1e-5)


def in_two_shards(weights: dict[str, Tensor], directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        to_file({name: weights[name] for name in part}, directory / shard)
        index.update(dict.fromkeys(part, shard))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


async def test_a_directory_of_shards_is_loaded_by_its_index(
    engine: TorchEngine, trained: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    in_two_shards(of_file(trained), shards)
    to_file({"of": torch.ones(3)}, shards / "adapter.safetensors")  # the index does not name it
    await engine.update_weights(Weights(1, str(shards)))
    assert_is_of(await answer(engine), trained)
    (shards / INDEX).write_text('{"weight_map": {"x": "model-00003-of-00003.safetensors"}}')
    with pytest.raises(WeightsRefused, match="lacks: model-00003-of"):
        await engine.update_weights(Weights(2, str(shards)))
    (shards / INDEX).write_text("[]")
    with pytest.raises(WeightsRefused, match=f"{INDEX} is garbled"):
        await engine.update_weights(Weights(2, str(shards)))


async def test_a_directory_without_an_index_is_loaded_whole(
    engine: TorchEngine, trained: Path, tmp_path: Path
) -> None:
    in_two_shards(of_file(trained), tmp_path)
    (tmp_path / INDEX).unlink()
    await engine.update_weights(Weights(1, str(tmp_path)))
    assert_is_of(await answer(engine), trained)
    to_file({NORM: torch.ones(32)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsRefused, match=rf"there twice: 1 \({NORM}\)"):
        await engine.update_weights(Weights(2, str(tmp_path)))


async def test_tied_weights_are_taken_under_one_name_or_all(tmp_path: Path) -> None:
    tied = save_tiny_model(tmp_path / "tied", sized(LlamaConfig, tie_word_embeddings=True))
    trained = altered(tied, tmp_path / "trained", disturb)
    weights = of_file(trained)
    assert HEAD not in weights
    embedding = weights.pop("model.embed_tokens.weight")
    forms = {
        "embedding": {**weights, "model.embed_tokens.weight": embedding},
        "head": {**weights, HEAD: embedding},
        "both": {**weights, "model.embed_tokens.weight": embedding, HEAD: embedding.clone()},
    }
    async with running(tied) as engine:
        for version, (name, form) in enumerate(forms.items(), start=1):
            await engine.update_weights(Weights(version, str(to_file(form, tmp_path / name))))
            assert_is_of(await answer(engine), trained)
            await engine.update_weights(Weights(0))
            assert_is_of(await answer(engine), tied)
        parted = {**forms["both"], HEAD: embedding + 1}
        file = to_file(parted, tmp_path / "parted")
        await assert_refused(engine, file, "is one with another tensor of this model")
        await assert_refused(
            engine, to_file(weights, tmp_path / "neither"), "model.embed_tokens.weight"
        )


async def test_weights_of_another_type_become_the_engines(
    model: Path, trained: Path, tmp_path: Path
) -> None:
    halves = altered(
        trained,
        tmp_path / "halves",
        lambda weights: weights.update({k: v.bfloat16() for k, v in weights.items()}),
    )
    async with running(model) as engine, running(model, dtype="bfloat16") as half:
        await engine.update_weights(Weights(1, str(halves)))
        assert_is_of(await answer(engine), halves)
        for version, path in enumerate((trained, halves)):
            await half.update_weights(Weights(version, str(path)))
            assert_is_of(await answer(half), halves, tolerated=0.2)


OTHERS = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "gemma2": sized(Gemma2Config, head_dim=8, sliding_window=6),
    "gemma3": sized(Gemma3TextConfig, head_dim=8, sliding_window=6),
    "mpt": MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
}


@pytest.mark.parametrize("name", OTHERS)
async def test_weights_of_other_architectures_are_replaced(name: str, tmp_path: Path) -> None:
    config: PreTrainedConfig = OTHERS[name]
    first = save_tiny_model(tmp_path / "first", config)
    trained = altered(first, tmp_path / "trained", disturb)
    async with running(first, context_tokens=100) as engine:
        await engine.update_weights(Weights(1, str(trained)))
        assert_is_of(await answer(engine), trained)
        await engine.offload(2)
        await engine.onload()
        await engine.update_weights(Weights(0))
        assert_is_of(await answer(engine), first)


async def test_offloaded_weights_come_back_as_they_were(engine: TorchEngine, trained: Path) -> None:
    await engine.update_weights(Weights(1, str(trained)))
    before = await answer(engine)
    await engine.offload(1)
    await engine.onload()
    after = await answer(engine)
    assert (after.ids, after.logprobs, after.versions) == (
        before.ids,
        before.logprobs,
        before.versions,
    )


async def test_a_file_that_is_shortened_later_does_no_harm(
    engine: TorchEngine, trained: Path, tmp_path: Path
) -> None:
    file = to_file(of_file(trained), tmp_path / "w.safetensors")
    await engine.update_weights(Weights(1, str(file)))
    cut(0)(file)
    assert_is_of(await answer(engine), trained)


async def test_an_update_that_is_cancelled_while_it_reads_changes_nothing(
    engine: TorchEngine, trained: Path
) -> None:
    before = await answer(engine)
    update = asyncio.create_task(engine.update_weights(Weights(1, str(trained))))
    await asyncio.sleep(0)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    after = await answer(engine)
    assert (after.logprobs, engine.policy_version) == (before.logprobs, 0)
    await engine.update_weights(Weights(2, str(trained)))
    assert set((await answer(engine)).versions) == {2}


async def test_a_device_without_room_leaves_all_as_it_was(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await answer(engine)
    await engine.offload(1)
    with monkeypatch.context() as patched:

        def refuse(*_: object, **__: object) -> Tensor:
            raise torch.OutOfMemoryError("no room")

        patched.setattr(Tensor, "to", refuse)
        with pytest.raises(OutOfMemory):
            await engine.onload()
    assert engine.memory == "offloaded"
    await engine.onload()
    assert (await answer(engine)).logprobs == before.logprobs


async def test_a_change_that_breaks_off_ends_the_engine(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr("worker.engines.torch_engine.parameters.Place.hold", break_down)
    with pytest.raises(EngineFailed, match="while its weights were changed"):
        await engine.update_weights(Weights(1, str(trained)))
    assert engine.policy_version == 0
    with pytest.raises(EngineFailed, match="restarted"):
        await say(engine)
    with pytest.raises(EngineFailed, match="restarted"):
        await engine.offload(1)


async def test_an_engine_that_is_not_running_has_no_weights_to_change(model: Path) -> None:
    async with running(model) as engine:
        await engine.offload(1)
    for order in (engine.update_weights(Weights(0)), engine.offload(2), engine.onload()):
        with pytest.raises(EngineFailed, match="not running"):
            await order
