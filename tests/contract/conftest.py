"""The suite of all engines: the engine of a case, once it is known that it must pass it."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import engines
from tests.tiny_model import altered, never_ending, save_tiny_model
from worker.engines.base import Call, Engine, Generation


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers do not end by themselves, so that a case knows how long they are."""
    folder = tmp_path_factory.mktemp("models")
    return altered(save_tiny_model(folder / "usual"), folder / "tiny-llama", never_ending)


@pytest.fixture(scope="session")
def server_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """lmdeploy's own api_server with its own engine; one for all cases, for it takes long to start."""
    from tests.lmdeploy_server.api_server import ApiServer

    server = ApiServer(model, tmp_path_factory.mktemp("api_server") / "log")
    try:
        server.wait_healthy()
        yield server.url
    finally:
        server.kill()


@pytest.fixture(params=engines.ALL)
def engine_name(request: pytest.FixtureRequest) -> str:
    """A module may say that it is for fewer engines."""
    return request.param


@pytest.fixture
def engine_url(engine_name: str, request: pytest.FixtureRequest) -> str | None:
    """Where the engine's server is, if it has one."""
    if engine_name != "lmdeploy-server":
        return None
    url: str = request.getfixturevalue("server_url")
    return url


@pytest.fixture
def running(engine_name: str, engine_url: str | None, model: Path) -> engines.Running:
    """Start engines of the case's kind."""
    return partial(engines.running, engine_name, model, engine_url)


@pytest.fixture
async def engine(
    running: engines.Running, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    """One with two slots, if it has what the case says it needs; a call that asks for more fails the case."""
    needed = {one for mark in request.node.iter_markers("needs") for one in mark.args}
    async with running() as started:
        engines.require(started, needed)
        monkeypatch.setattr(started, "generate", _watched(started.generate, needed))
        yield started


def _watched(
    generate: Callable[[Call], Generation], needed: set[str]
) -> Callable[[Call], Generation]:
    def watched(call: Call) -> Generation:
        forgotten = engines.undeclared(call, needed)
        assert not forgotten, f"mark this case with needs({forgotten}): not every engine has that"
        return generate(call)

    return watched
