"""The engines that this environment has, and what the suite of all engines asks of each."""

import gc
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import pytest

from protocols.rollout_state import SampleParams
from worker.engines.base import Call, Engine
from worker.engines.scripted import ScriptedEngine
from worker.engines.table import declared

LMDEPLOY = find_spec("lmdeploy") is not None
"""lmdeploy has an environment of its own, where its two engines alone are tested."""
WITH_A_MODEL = ["lmdeploy", "lmdeploy-server"] if LMDEPLOY else ["torch"]
ALL = WITH_A_MODEL if LMDEPLOY else ["scripted", *WITH_A_MODEL]

_SAMPLES = {"n", "max_tokens", "temperature", "top_p", "top_k", "stops", "stop_token_ids"}
_TOLD = {"return_logprob", "top_logprobs"}
_WEIGHTS = {"offload", "update_weights"}
_ALL_FIELDS = frozenset(SampleParams.__struct_fields__) - {"return_routed_experts"}
"""Experts are of some models only: lmdeploy passes them through, tests/lmdeploy/test_routed_experts.py."""

MINIMUM = {
    "scripted": _ALL_FIELDS | _WEIGHTS | {"script"},
    "torch": _ALL_FIELDS | _WEIGHTS,
    "lmdeploy": _SAMPLES
    | _TOLD
    | _WEIGHTS
    | {"min_tokens", "repetition_penalty", "sampling_seed", "guide", "logit_bias"}
    | {"include_stop_str_in_output", "skip_special_tokens"},
    "lmdeploy-server": _SAMPLES | _TOLD | {"offload"},
}
"""What an engine must be able to do: a case that needs more is skipped, a case that needs some of this never.

Cancel, resume, pause and version spans have no name here: the interface asks them of every engine, so that no case may
say that it needs them. To discard weights (offload level 2) takes `offload` and `update_weights`.
"""

_EVERYWHERE = _ALL_FIELDS.intersection(*declared().values())


@asynccontextmanager
async def running(
    name: str, model: Path, url: str | None = None, *, slots: int = 2
) -> AsyncGenerator[Engine]:
    """An engine that has started; `model` is a directory, `url` that of an api_server with it."""
    engine = made(name, model, url, slots=slots)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()
        if name == "lmdeploy":
            # it leaves coroutines that hold torch's inference mode: ended only within the warm-up of
            # the next engine, they would switch off that one's
            gc.collect()


class Running(Protocol):
    """`running` of an engine that is chosen already."""

    def __call__(self, *, slots: int = 2) -> AbstractAsyncContextManager[Engine]:
        """One more of its kind."""
        ...


def made(name: str, model: Path, url: str | None = None, *, slots: int = 2) -> Engine:
    """An engine that has not started."""
    if name == "scripted":
        return ScriptedEngine()
    if name == "torch":
        from worker.engines.torch_engine import Settings as TorchSettings
        from worker.engines.torch_engine import TorchEngine

        return TorchEngine(TorchSettings(model=str(model), slots=slots, threads=1))
    if name == "lmdeploy":
        from tests.lmdeploy.cpu_shim import install
        from worker.engines.lmdeploy_engine import LMDeployEngine
        from worker.engines.lmdeploy_engine import Settings as LMDeploySettings

        install()
        return LMDeployEngine(LMDeploySettings(model=str(model), slots=slots))
    from worker.engines.lmdeploy_server.engine import LMDeployServerEngine
    from worker.engines.lmdeploy_server.settings import Settings as ServerSettings

    assert name == "lmdeploy-server"
    assert url is not None
    return LMDeployServerEngine(ServerSettings(url=url, model=str(model), slots=slots))


def require(engine: Engine, needed: Iterable[str]) -> None:
    """Leave a case out that the engine need not pass; fail one that it must, and cannot."""
    lacking = frozenset(needed) - engine.capabilities
    missing = lacking & MINIMUM[engine.name]
    if missing:
        pytest.fail(f"{engine.name} must be able to do {', '.join(sorted(missing))}, and is not")
    if lacking:
        pytest.skip(f"{engine.name} need not be able to do {', '.join(sorted(lacking))}")


def undeclared(call: Call, needed: Iterable[str]) -> set[str]:
    """What a call asks for that not every engine does, and that its case does not say it needs.

    A seed is no such thing: every call has one, and engines that cannot honour it do not look at it.
    """
    usual = SampleParams()
    asked = {name for name in _ALL_FIELDS if getattr(call.params, name) != getattr(usual, name)}
    return asked - _EVERYWHERE - frozenset(needed) - {"sampling_seed"}
