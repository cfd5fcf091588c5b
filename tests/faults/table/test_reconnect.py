"""Many clients lose their server at the same moment and come back; nobody who called them hears of it."""

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from producer_sdk import Client, Future, Reply
from protocols.queue.broker import Broker
from tests.faults.harness import record, script
from tests.faults.harness.fork import StartFork
from tests.faults.harness.row import Row
from tests.faults.harness.watch import Watch
from tests.servers import Server, StartServer

JOBS = 4
"""Of every client in every round, half of them under way when the server goes."""


@pytest.fixture
def server(fresh_server: StartServer) -> Server:
    """A server that keeps its data."""
    return fresh_server(*record.OPTIONS)


@pytest.fixture
def url(server: Server) -> str:
    """Its URL stands for the shared one."""
    return server.url


@pytest.mark.timeout(200)
def test_no_error_reaches_a_caller_when_all_clients_reconnect_at_once(
    row: Callable[[str], Row],
    full: bool,
    seed: int,
    broker: Broker,
    fork: StartFork,
    look: Watch,
    server: Server,
    url: str,
    pool: str,
    nothing_left: Callable[[], None],
) -> None:
    clients, rounds = (200, 4) if full else (100, 1)
    line = row(f"{clients} clients reconnecting at once")
    for _ in range(2):
        fork(slots=64, lease_s=5).wait_ready(look)
    line.recovery_s = 0.0
    with ExitStack() as stack:
        made = [stack.enter_context(Client(url, pool=pool)) for _ in range(clients)]
        for number in range(rounds):
            before = [_submit(client, seed, f"{i}-{number}-a") for i, client in enumerate(made)]
            for client in made:
                client.fleet().result(30)  # everybody is connected
            server.kill()
            line.tried += 1
            under_way = sum(not future.done() for futures in before for future, _ in futures)
            during = [_submit(client, seed, f"{i}-{number}-b") for i, client in enumerate(made)]
            server.start()
            back_s = time.monotonic()
            for futures in during:
                futures[0][0].result(30)
            line.recovery_s = max(line.recovery_s, time.monotonic() - back_s)
            answers = [pair for futures in (*before, *during) for pair in futures]
            line.lost += sum(not script.right(f.result(60).state, text) for f, text in answers)
            line.happened += under_way > 0 and _connections(look) >= 2 * clients
        line.note = f"{2 * JOBS // 2 * clients * rounds} jobs, no error"
        nothing_left()
    assert line.happened == rounds
    assert line.lost == 0


def _submit(client: Client, seed: int, name: str) -> list[tuple[Future[Reply], str]]:
    texts = [script.text_of(seed, f"{name}-{number}", 12) for number in range(JOBS // 2)]
    return [(client.submit(script.body(text, ms_per_token=60)), text) for text in texts]


def _connections(look: Watch) -> int:
    """How many connections the server has accepted since it started."""
    return int(look("INFO", "stats")["total_connections_received"])
