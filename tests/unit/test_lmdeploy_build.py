"""The engine lmdeploy as far as it goes without lmdeploy."""

import importlib.metadata
import subprocess
import sys

import pytest

from protocols.errors import ConfigError, EngineFailed, UnsupportedOption
from protocols.rollout_state import SampleParams, TokenIds
from worker.config import Config
from worker.engines import build
from worker.engines.base import Call
from worker.engines.lmdeploy_engine import VERSION, LMDeployEngine, Settings
from worker.engines.lmdeploy_engine.engine import SAMPLING, capabilities


@pytest.mark.parametrize("found", [None, "0.17.0"])
def test_another_lmdeploy_or_none_is_refused_at_the_start(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ConfigError, match=rf"{VERSION} exactly, and {found or 'none'}.*pip install"
    ):
        build(Config(engine="lmdeploy", model="smollm2"))


def test_settings_come_from_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: VERSION)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    engine = build(Config(engine="lmdeploy", served_model="m", tp=2, policy_version=4))
    assert (engine.name, engine.model, engine.policy_version) == ("lmdeploy", "m", 4)
    assert "update_weights" not in engine.capabilities


def test_penalties_that_lmdeploy_lacks_are_no_capabilities() -> None:
    assert not {"presence_penalty", "frequency_penalty", "script"} & SAMPLING


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(model="m"), SAMPLING | {"logit_bias", "guide", "offload", "update_weights"}),
        (Settings(model="m", tp=2), SAMPLING | {"logit_bias", "offload"}),
        (Settings(model="m", ep=2), SAMPLING | {"logit_bias", "offload"}),
        (Settings(model="m", backend="turbomind"), SAMPLING - {"repetition_penalty"}),
    ],
)
def test_what_it_can_do_depends_on_backend_and_gpus(
    settings: Settings, expected: frozenset[str]
) -> None:
    assert capabilities(settings) == expected


async def test_an_engine_that_was_not_started_generates_nothing() -> None:
    engine = LMDeployEngine(Settings(model="m"))
    assert engine.counters()["running_samples"] == 0
    with pytest.raises(EngineFailed, match="not running"):
        engine.generate(Call(TokenIds([1]), SampleParams()))
    await engine.close()


async def test_the_weights_of_turbomind_stay_where_they_are() -> None:
    engine = LMDeployEngine(Settings(model="m", backend="turbomind"))
    with pytest.raises(UnsupportedOption, match="TurboMind"):
        await engine.offload(1)


def test_to_name_the_engine_imports_neither_lmdeploy_nor_torch() -> None:
    program = (
        "import sys, worker.service, worker.engines.lmdeploy_engine as one;"
        "one.LMDeployEngine(one.Settings(model='m'));"
        "sys.exit(bool({'lmdeploy', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
