"""What every engine promises of its weights: replaced, offloaded and brought back, by the same orders."""

import hashlib
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from protocols.errors import EngineBusy, EngineFailed, InvalidRequest, WeightsRefused
from tests.lasting_calls import lasting
from tests.tiny_model import altered
from tests.torch_engine_calls import drain, say
from tests.trained_weights import of_file, to_file
from worker.engines.base import Engine, Weights


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under another path."""
    directory = tmp_path_factory.mktemp("weights") / "other"
    return altered(model, directory, lambda _: None) / "model.safetensors"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def by_the_shell(directory: Path) -> str:
    command = f"LC_ALL=C; cd '{directory}' && cat *.safetensors | sha256sum"
    return subprocess.check_output(command, shell=True, text=True).split()[0]


async def versions(engine: Engine) -> set[int]:
    (said,) = await say(engine, max_tokens=4)
    return set(said.versions)


@pytest.mark.needs("update_weights")
async def test_from_an_update_on_tokens_bear_its_version(engine: Engine, other: Path) -> None:
    assert await versions(engine) == {0}
    for version, path in ((7, other), (3, other.parent), (0, None)):
        await engine.update_weights(Weights(version, None if path is None else str(path)))
        assert (engine.policy_version, await versions(engine)) == (version, {version})


@pytest.mark.needs("update_weights")
async def test_a_checksum_is_that_of_the_file(engine: Engine, other: Path) -> None:
    right = sha256(other)
    wrong = hashlib.sha256(b"other").hexdigest()
    for path in (other, other.parent):
        await engine.update_weights(Weights(1, str(path), right))
        with pytest.raises(WeightsRefused, match=f"SHA-256 is {right}, and {wrong} was told"):
            await engine.update_weights(Weights(2, str(path), wrong))
        assert (engine.policy_version, await versions(engine)) == (1, {1})


@pytest.mark.needs("update_weights")
async def test_a_checksum_is_that_of_all_files_in_order_of_name(
    engine: Engine, other: Path, tmp_path: Path
) -> None:
    weights = of_file(other)
    names = sorted(weights)
    for file, part in (("b", names[::2]), ("a", names[1::2])):
        to_file({one: weights[one] for one in part}, tmp_path / f"{file}.safetensors")
    await engine.update_weights(Weights(1, str(tmp_path), by_the_shell(tmp_path)))
    assert await versions(engine) == {1}
    with pytest.raises(WeightsRefused, match="SHA-256"):
        await engine.update_weights(Weights(2, str(tmp_path), sha256(tmp_path / "a.safetensors")))


@pytest.mark.needs("update_weights")
@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (Weights(1, "/nowhere/absent.safetensors"), "absent.safetensors: no such file"),
        (Weights(1, "nul\0"), "no such file"),
        (Weights(1, "/" + "x" * 300), "File name too long"),
        (Weights(1), "without a path only version 0"),
        (Weights(0, None, "ab" * 32), "a checksum belongs to a path"),
    ],
    ids=["absent", "nul", "too long", "no path", "checksum of nothing"],
)
async def test_what_cannot_be_loaded_is_refused_and_the_old_weights_stay(
    engine: Engine, weights: Weights, reason: str
) -> None:
    with pytest.raises(WeightsRefused, match=reason) as caught:
        await engine.update_weights(weights)
    assert caught.value.message.startswith(f"version {weights.version} is not loaded")
    assert caught.value.message.endswith("version 0 goes on serving")
    assert "nowhere/" not in caught.value.message
    assert (caught.value.code, caught.value.http_status) == ("weights_refused", 409)
    assert (engine.policy_version, await versions(engine)) == (0, {0})


@pytest.mark.needs("update_weights")
async def test_an_empty_directory_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / ".hidden.safetensors").touch()
    with pytest.raises(WeightsRefused, match=r"without a file \*\.safetensors"):
        await engine.update_weights(Weights(1, str(tmp_path)))


async def test_offloaded_weights_do_not_generate_and_come_back(engine: Engine) -> None:
    (before,) = await say(engine, temperature=0)
    await engine.offload(1)
    assert engine.memory == "offloaded"
    with pytest.raises(EngineFailed, match="offloaded") as caught:
        engine.generate(lasting(engine, 12))
    assert caught.value.retryable
    await engine.onload()
    assert engine.memory == "loaded"
    (after,) = await say(engine, temperature=0)
    assert (after.ids, set(after.versions)) == (before.ids, {0})


@pytest.mark.needs("update_weights")
async def test_only_loaded_weights_are_replaced(engine: Engine, other: Path) -> None:
    for level, back in ((1, "loaded"), (2, "stale")):
        await engine.offload(level)
        assert engine.memory == {1: "offloaded", 2: "discarded"}[level]
        with pytest.raises(EngineFailed, match=engine.memory):
            engine.generate(lasting(engine, 12))
        with pytest.raises(WeightsRefused, match=f"memory is {engine.memory}; onload first"):
            await engine.update_weights(Weights(1, str(other)))
        await engine.onload()
        assert engine.memory == back
    with pytest.raises(EngineFailed, match="stale"):
        engine.generate(lasting(engine, 12))
    with pytest.raises(WeightsRefused, match="the engine's memory stays stale"):
        await engine.update_weights(Weights(1, "absent"))
    assert (engine.memory, engine.policy_version) == ("stale", 0)
    await engine.update_weights(Weights(1, str(other)))
    assert (engine.memory, await versions(engine)) == ("loaded", {1})


async def test_orders_that_are_carried_out_already_change_nothing(engine: Engine) -> None:
    await engine.onload()
    assert engine.memory == "loaded"
    for _ in range(2):
        await engine.offload(1)
        assert engine.memory == "offloaded"
    for _ in range(2):
        await engine.onload()
        assert engine.memory == "loaded"
    assert await versions(engine) == {0}


@pytest.mark.needs("update_weights")
async def test_discarded_weights_stay_so_until_they_are_replaced(engine: Engine) -> None:
    for level, memory in ((1, "offloaded"), (2, "discarded"), (2, "discarded"), (1, "discarded")):
        await engine.offload(level)
        assert engine.memory == memory
    for _ in range(2):
        await engine.onload()
        assert engine.memory == "stale"
    await engine.offload(1)
    assert engine.memory == "discarded"  # there was nothing to be kept
    await engine.onload()
    await engine.update_weights(Weights(0))
    assert await versions(engine) == {0}


async def test_a_level_that_there_is_not_is_refused(engine: Engine) -> None:
    for level in (0, 3):
        with pytest.raises(InvalidRequest, match=f"level: {level}"):
            await engine.offload(level)
    assert await versions(engine) == {0}


Order = Callable[[Engine, Path], Awaitable[None]]
ORDERS: dict[str, Order] = {
    "update_weights": lambda engine, path: engine.update_weights(Weights(1, str(path))),
    "offload 1": lambda engine, _: engine.offload(1),
    "offload 2": lambda engine, _: engine.offload(2),
}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(
            order, marks=[] if name == "offload 1" else pytest.mark.needs("update_weights")
        )
        for name, order in ORDERS.items()
    ],
    ids=list(ORDERS),
)
async def test_weights_do_not_change_below_a_generation(
    engine: Engine, other: Path, order: Order
) -> None:
    generation = engine.generate(lasting(engine, 200, n=3))
    with pytest.raises(EngineBusy, match="3 samples are under way"):
        await order(engine, other)
    assert (engine.memory, engine.policy_version) == ("loaded", 0)
    await anext(aiter(generation))
    generation.close()
    await order(engine, other)
    assert (engine.memory, engine.policy_version) != ("loaded", 0)


@pytest.mark.parametrize("level", [1, pytest.param(2, marks=pytest.mark.needs("update_weights"))])
async def test_what_was_closed_a_moment_ago_does_not_hold_an_order_up(
    engine: Engine, level: int
) -> None:
    # of three samples on two slots one still waits
    generation = engine.generate(lasting(engine, 200, n=3))
    await anext(aiter(generation))
    generation.close()
    await drain(generation)
    await engine.offload(level)
    assert engine.memory == {1: "offloaded", 2: "discarded"}[level]
    counters = engine.counters()
    assert (counters["running_samples"], counters["waiting_samples"]) == (0, 0)
