"""lmdeploy's own api_server over a stub; the tests are left out where lmdeploy is not installed."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lmdeploy_server.api_server import ApiServer
from tests.servers import ServerKind
from tests.tiny_model import save_tiny_model

if importlib.util.find_spec("lmdeploy") is None:
    collect_ignore_glob = ["*.py"]

StartApiServer = Callable[..., ApiServer]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def api_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartApiServer]:
    """Start one with these options; those that were asked for before are used again."""
    running: dict[str, ApiServer] = {}
    with ExitStack() as ends:

        def start(**options: object) -> ApiServer:
            told = json.dumps(options, sort_keys=True)
            if told not in running:
                log = tmp_path_factory.mktemp("api_server") / "log"
                server = running[told] = ApiServer(model, log, options)
                ends.callback(server.kill)
                server.wait_healthy()
            return running[told]

        yield start


@pytest.fixture
def server_kind() -> ServerKind:
    """Redis: the environment that has lmdeploy may lack the wheel of Valkey."""
    return "redis"
