"""Fixtures that every test may use: real servers, a pool of one's own, worker processes."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.servers import Server, ServerKind, StartServer
from tests.worker_process import StartWorker, WorkerProcess

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may fetch a model
SLOW = [HealthCheck.too_slow]  # a busy machine is no fault of the code
settings.register_profile("default", deadline=None, suppress_health_check=SLOW)
settings.register_profile(
    "ci", deadline=None, suppress_health_check=SLOW, derandomize=True, print_blob=True
)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


@pytest.fixture(scope="session")
def shared_servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[ServerKind], Server]]:
    """One server of each kind for the whole run, started when first asked for."""
    running: dict[ServerKind, Server] = {}

    def shared(kind: ServerKind) -> Server:
        if kind not in running:
            server = Server(kind, tmp_path_factory.mktemp(kind))
            server.start()
            running[kind] = server
        return running[kind]

    yield shared
    for server in running.values():
        server.kill()


@pytest.fixture
def server_kind() -> ServerKind:
    """`valkey`, unless the test is marked with `tests.servers.both_servers`."""
    return "valkey"


@pytest.fixture
def redis_server(shared_servers: Callable[[ServerKind], Server], server_kind: ServerKind) -> Server:
    """A running server that other tests use too: keep to your `pool`; never flush or stop it."""
    return shared_servers(server_kind)


@pytest.fixture
def url(redis_server: Server) -> str:
    """Where `redis_server` listens."""
    return redis_server.url


@pytest.fixture
def pool() -> str:
    """The name of a pool that no other test uses."""
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def fresh_server(tmp_path: Path, server_kind: ServerKind) -> Iterator[StartServer]:
    """Start servers of the test's own, to flush, kill or restart; arguments are server options."""
    started: list[Server] = []

    def fresh(*options: str) -> Server:
        folder = tmp_path / f"server-{len(started)}"
        folder.mkdir()
        server = Server(server_kind, folder, options)
        server.start()
        started.append(server)
        return server

    yield fresh
    for server in started:
        server.kill()


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Start workers; they are killed when the test ends, and a failed test shows their output."""
    started: list[WorkerProcess] = []

    def start(
        url: str,
        pool: str,
        *,
        engine: str = "scripted",
        module: str = "worker",
        **flags: str | float,
    ) -> WorkerProcess:
        worker_id = f"w{len(started)}-{uuid.uuid4().hex[:6]}"
        told = {name.replace("_", "-"): str(value) for name, value in flags.items()}
        log = tmp_path / f"{worker_id}.log"
        told["engine"] = engine
        started.append(WorkerProcess(url, pool, worker_id, told, log, module))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        print(f"--- worker {process.worker_id}\n{process.log_tail()}")  # noqa: T201 - pytest shows it
