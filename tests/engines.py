"""The engines that this environment has, for the suite that all of them pass."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

from worker.engines.base import Engine
from worker.engines.scripted import ScriptedEngine

LMDEPLOY = find_spec("lmdeploy") is not None
"""lmdeploy has an environment of its own, where its engine alone is tested."""
WITH_A_MODEL = ["lmdeploy"] if LMDEPLOY else ["torch"]
ALL = WITH_A_MODEL if LMDEPLOY else ["scripted", *WITH_A_MODEL]


@asynccontextmanager
async def running(name: str, model: Path, *, slots: int = 2) -> AsyncGenerator[Engine]:
    """An engine that has started; `model` is a directory."""
    engine = _made(name, model, slots)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def _made(name: str, model: Path, slots: int) -> Engine:
    if name == "scripted":
        return ScriptedEngine()
    if name == "torch":
        from worker.engines.torch_engine import Settings, TorchEngine

        return TorchEngine(Settings(model=str(model), slots=slots, threads=1))
    from tests.lmdeploy.cpu_shim import install
    from worker.engines.lmdeploy_engine import LMDeployEngine
    from worker.engines.lmdeploy_engine import Settings as LMDeploySettings

    install()
    return LMDeployEngine(LMDeploySettings(model=str(model), slots=slots))
