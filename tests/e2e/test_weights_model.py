"""Weights of SmolLM2 replaced and offloaded: what the engine computes with, and what memory comes back."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from tests.plain_model import PlainModel, of_tokens
from tests.torch_engine_calls import Said, say
from tests.trained_weights import disturb, of_file, to_file
from worker.engines.base import Turn, Weights
from worker.engines.torch_engine import Settings, TorchEngine
from worker.engines.torch_engine.checkpoint import locate

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the first run converts the model, on a machine that may be busy
]
in_one_loop = pytest.mark.asyncio(loop_scope="module")

TOLERATED = 1e-4
LONGEST_STALL_S = 1.0
MEGABYTE = 10**6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[TorchEngine]:
    made = TorchEngine(Settings(slots=4, threads=1))
    await made.start()
    yield made
    await made.close()


@pytest.fixture(scope="module")
def trained(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with other weights; after the engine, which converts them."""
    assert engine.model == "smollm2"
    directory = tmp_path_factory.mktemp("models")
    weights = of_file(locate("smollm2"))
    disturb(weights, by=2e-3)
    to_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_bytes((locate("smollm2") / "config.json").read_bytes())
    return directory


async def answer(engine: TorchEngine) -> tuple[list[int], Said]:
    prompt_ids = list(engine.tokenizer.render([Turn(role="user", content="Name a river.")]))
    (said,) = await say(engine, prompt_ids, temperature=0, max_tokens=24, min_tokens=24)
    return prompt_ids, said


@in_one_loop
async def test_weights_are_replaced_beside_a_running_event_loop(
    engine: TorchEngine, trained: Path
) -> None:
    prompt_ids, before = await answer(engine)
    stalls_s: list[float] = []
    ticking = asyncio.create_task(tick(stalls_s))
    await engine.update_weights(Weights(1, str(trained)))
    ticking.cancel()
    _, after = await answer(engine)
    assert (set(before.versions), set(after.versions)) == ({0}, {1})
    assert len(stalls_s) > 5
    assert max(stalls_s) < LONGEST_STALL_S
    old, new = PlainModel(locate("smollm2")), PlainModel(trained)
    ((by_old,), (by_new,)) = (one.logprobs([prompt_ids], [after.ids]) for one in (old, new))
    assert after.logprobs == pytest.approx(of_tokens(by_new, after.ids), abs=TOLERATED)
    apart = zip(after.logprobs, of_tokens(by_old, after.ids), strict=True)
    assert max(abs(a - b) for a, b in apart) > 1e-2


async def tick(stalls_s: list[float]) -> None:
    """Note how long the event loop let a turn wait, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        asked_s = clock()
        await asyncio.sleep(0.005)
        stalls_s.append(clock() - asked_s)


@in_one_loop
async def test_offloaded_and_first_weights_come_back_as_they_were(
    engine: TorchEngine, trained: Path
) -> None:
    await engine.update_weights(Weights(0))
    _, first = await answer(engine)
    await engine.offload(1)
    await engine.onload()
    _, onloaded = await answer(engine)
    await engine.update_weights(Weights(1, str(trained)))
    await engine.offload(2)
    await engine.onload()
    await engine.update_weights(Weights(0))
    _, again = await answer(engine)
    for said in (onloaded, again):
        assert (said.ids, said.logprobs) == (first.ids, first.logprobs)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep freed memory resident")
def test_offloading_gives_memory_back(trained: Path) -> None:
    program = [sys.executable, "-m", "tests.offload_memory", str(trained / "model.safetensors")]
    told = subprocess.run(program, capture_output=True, check=True, timeout=600)
    found = msgspec.json.decode(told.stdout, type=dict[str, int])
    weights_bytes = (trained / "model.safetensors").stat().st_size
    print({name: f"{size / MEGABYTE:.0f} MB" for name, size in found.items()})  # noqa: T201
    kv_bytes = 8 * 400 * 2 * 30 * 3 * 64 * 4
    assert found["generated"] - found["level 1"] > 0.6 * kv_bytes
    assert found["level 1"] - found["level 2"] > 0.8 * weights_bytes
    for before in ("loaded", "generated"):
        after = found["loaded again" if before == "loaded" else "generated again"]
        assert after == pytest.approx(found[before], rel=0.15)
