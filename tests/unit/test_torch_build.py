"""From a worker's configuration to the torch engine."""

import pytest

from protocols.errors import ConfigError
from worker.config import Config
from worker.engines.torch_engine import TorchEngine, build


def test_the_configuration_names_the_model() -> None:
    assert build(Config.from_command(["--engine", "torch"])).model == "smollm2"
    flags = ["--engine", "torch", "--served-model", "mine", "--policy-version", "7"]
    engine = build(Config.from_command(flags))
    assert isinstance(engine, TorchEngine)
    assert (engine.name, engine.model, engine.policy_version) == ("torch", "mine", 7)


def test_without_its_packages_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_but_jinja(name: str) -> object:
        return name if name == "jinja2" else None

    monkeypatch.setattr("worker.engines.torch_engine.find_spec", none_but_jinja)
    with pytest.raises(
        ConfigError, match=r"torch, transformers, .*pip install 'rolloutq\[torch\]'"
    ):
        build(Config.from_command(["--engine", "torch"]))
