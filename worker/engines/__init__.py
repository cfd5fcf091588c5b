"""Engines by name; each is imported only when it is asked for."""

from worker.config import Config
from worker.engines.base import Engine


def build(config: Config) -> Engine:
    """The engine that a configuration names, not started; raises ConfigError where its packages are missing."""
    if config.engine == "scripted":
        from worker.engines.scripted import ScriptedEngine

        return ScriptedEngine(policy_version=config.policy_version)
    if config.engine == "lmdeploy":
        from worker.engines.lmdeploy_engine import build as build_lmdeploy

        return build_lmdeploy(config)
    if config.engine == "lmdeploy-server":
        from worker.engines.lmdeploy_server import build as build_lmdeploy_server

        return build_lmdeploy_server(config)
    from worker.engines.torch_engine import build as build_torch

    return build_torch(config)
