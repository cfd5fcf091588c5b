"""What goes wrong while lmdeploy's weights are moved; the suite of all engines has what goes right."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from protocols.errors import EngineFailed, OutOfMemory, WeightsRefused
from tests.lmdeploy.cpu_shim import install
from tests.tiny_model import altered, save_tiny_model
from tests.torch_engine_calls import LIMIT_S, call, drain, say
from tests.trained_weights import cut, disturb, of_file, to_file
from worker.engines.base import Weights
from worker.engines.lmdeploy_engine import LMDeployEngine, Settings
from worker.engines.lmdeploy_engine.pipeline import Pipeline

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def trained(model: Path) -> Path:
    return altered(model, model.with_name("trained"), disturb)


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[LMDeployEngine]:
    install()
    made = LMDeployEngine(Settings(model=str(model), slots=2))
    await made.start()
    yield made
    await made.close()


async def answer(engine: LMDeployEngine) -> tuple[list[int], set[int]]:
    (said,) = await say(engine, temperature=0, max_tokens=12, min_tokens=12)
    return said.ids, set(said.versions)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", rf"tensors are missing: 1 \({NORM}\)"),
        ("unknown", r"tensors are unknown to the model: 1 \(strange\)"),
        ("shape", r"has the shape \[31\], and the model's is \[32\]"),
        ("not finite", "not finite"),
        ("cut off", "cut off"),
    ],
)
async def test_files_that_are_not_the_model_s_are_refused_untouched(
    engine: LMDeployEngine, trained: Path, tmp_path: Path, fault: str, reason: str
) -> None:
    weights = of_file(trained)
    match fault:
        case "missing":
            del weights[NORM]
        case "unknown":
            weights["strange"] = torch.ones(2)
        case "shape":
            weights[NORM] = weights[NORM][:-1].clone()
        case _:
            weights[NORM][3] = torch.nan if fault == "not finite" else 1.0
    file = to_file(weights, tmp_path / "new.safetensors")
    if fault == "cut off":
        cut(0.9)(file)
    before = await answer(engine)
    with pytest.raises(WeightsRefused, match=reason):
        await engine.update_weights(Weights(1, str(file)))
    assert await answer(engine) == before == (before[0], {0})


async def test_weights_of_another_precision_are_taken(
    engine: LMDeployEngine, trained: Path, tmp_path: Path
) -> None:
    halved = {name: one.to(torch.bfloat16) for name, one in of_file(trained).items()}
    old, _ = await answer(engine)
    await engine.update_weights(Weights(1, str(to_file(halved, tmp_path / "half.safetensors"))))
    ids, versions = await answer(engine)
    assert versions == {1}
    assert ids != old


@pytest.mark.parametrize(
    ("step", "error"),
    [("load", RuntimeError("at 0xdeadbeef")), ("wake", OutOfMemory("at 0xdeadbeef"))],
)
async def test_should_lmdeploy_fail_in_the_middle_the_engine_is_broken(
    engine: LMDeployEngine,
    trained: Path,
    step: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, step, fail)
    with pytest.raises(EngineFailed, match="while its weights were moved"):
        await engine.update_weights(Weights(1, str(trained)))
    async with asyncio.timeout(LIMIT_S):
        failure = await engine.breakdown()
    assert "0xdeadbeef" not in failure.message
    with pytest.raises(EngineFailed, match="must be restarted"):
        engine.generate(call())
    assert engine.policy_version == 0


async def test_an_order_that_is_given_up_in_the_middle_breaks_the_engine(
    engine: LMDeployEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = asyncio.Event()

    async def hang(*_: object) -> None:
        asleep.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Pipeline, "sleep", hang)
    order = asyncio.create_task(engine.offload(1))
    async with asyncio.timeout(LIMIT_S):
        await asleep.wait()
        order.cancel()
        with pytest.raises(asyncio.CancelledError):
            await order
        assert "(CancelledError)" in (await engine.breakdown()).message
    with pytest.raises(EngineFailed, match="must be restarted"):
        engine.generate(call())


@pytest.mark.parametrize("level", [1, 2])
async def test_without_room_on_the_device_all_is_as_before_and_can_be_tried_again(
    engine: LMDeployEngine, trained: Path, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.offload(level)
    asleep = engine.memory

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("lmdeploy.pytorch.engine.engine.Engine.wakeup", fail)
        with pytest.raises(OutOfMemory, match="no room"):
            await engine.onload()
    assert engine.memory == asleep
    await engine.onload()
    await engine.update_weights(Weights(1, str(trained)))
    assert (await answer(engine))[1] == {1}


async def test_while_the_weights_move_calls_are_refused(
    engine: LMDeployEngine, trained: Path
) -> None:
    generation = engine.generate(call(max_tokens=200, min_tokens=200))
    await anext(aiter(generation))
    generation.close()
    moving = asyncio.create_task(engine.update_weights(Weights(1, str(trained))))
    refusals = 0
    while not moving.done():
        try:
            engine.generate(call()).close()
        except EngineFailed as error:
            refusals += "being moved" in error.message
        await asyncio.sleep(0)
    await drain(generation)
    try:
        await moving
    except EngineFailed:
        pytest.fail("what was closed held the order up")
    assert refusals > 0
    assert (await answer(engine))[1] == {1}
