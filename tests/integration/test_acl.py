"""Who may what: deploy/redis/users.acl on both servers, command by command and through the SDK, worker and command."""

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis.exceptions import NoPermissionError, ResponseError

from producer_sdk import Cancelled, Client, PoolNotPrepared, SampleParams, ServerUnavailable
from producer_sdk.cli import GOOD, UNREACHABLE, run
from protocols.job import JobStatus
from protocols.queue.broker import Broker
from protocols.queue.link import Link
from tests.acl_matrix import Case, cases
from tests.guarded_server import ROOT, USERS, GuardedServer
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.servers import ServerKind, both_servers, server_binary
from tests.worker_process import WorkerProcess

pytestmark = both_servers

POOL = "default"
LIMIT_S = 60
LEAST_CASES = 40
SCRIPTS_DENIED = ("ACL failure in script", "The user executing the script can't")


class Served(NamedTuple):
    """A guarded server whose pool has a worker that is the user `worker`."""

    guarded: GuardedServer
    worker: WorkerProcess

    def url(self, user: str) -> str:
        """The server's URL with the user's login."""
        return self.guarded.url(user)


@pytest.fixture(scope="module")
def served_servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[ServerKind], Served]]:
    """One of each kind for the module, started when first asked for."""
    running: dict[ServerKind, Served] = {}

    def served(kind: ServerKind) -> Served:
        if kind not in running:
            folder = tmp_path_factory.mktemp(f"guarded-{kind}")
            guarded = GuardedServer(kind, folder)
            flags = {"engine": "scripted", "lease-s": "3", "backoff-s": "0", "fail-limit": "2"}
            url = guarded.url("worker")
            worker = WorkerProcess(url, POOL, f"w-{kind}", flags, folder / "worker.log")
            running[kind] = Served(guarded, worker)
            worker.wait_ready()
            look = Look(guarded.url("admin"), POOL)
            wait_until(lambda: look("HGET", look.keys.desired, "gate"), "the gate is open")
            look.close()
        return running[kind]

    yield served
    for one in running.values():
        one.worker.kill()
        one.guarded.stop()


@pytest.fixture
def served(served_servers: Callable[[ServerKind], Served], server_kind: ServerKind) -> Served:
    return served_servers(server_kind)


@pytest.fixture
def admin(served: Served) -> Iterator[Look]:
    look = Look(served.url("admin"), POOL)
    yield look
    look.close()


@pytest.fixture
def trainer(served: Served) -> Iterator[Client]:
    with Client(served.url("trainer"), pool=POOL, run="acl") as client:
        yield client


# command by command


def outcome(served: Served, case: Case) -> str:
    """`allowed`, `denied`, or what else the server said."""
    look = Look(served.url(case.user), POOL)
    try:
        look(*case.words)
    except NoPermissionError:
        return "denied"
    except ResponseError as error:
        if any(sign in str(error) for sign in SCRIPTS_DENIED):
            return "denied"
        return "allowed" if str(error).startswith("BUSYGROUP") else str(error)
    finally:
        look.close()
    return "allowed"


def wanted(case: Case) -> str:
    return "denied" if case.verdict == "may not" else "allowed"


@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(served: Served, case: Case) -> None:
    assert outcome(served, case) == wanted(case)


def test_the_matrix_is_wide_and_has_no_surprise(served: Served, server_kind: ServerKind) -> None:
    found = {case: outcome(served, case) for case in cases()}
    surprises = [f"{case}: {told}" for case, told in found.items() if told != wanted(case)]
    kinds = [case.verdict for case in found]
    counts = {kind: kinds.count(kind) for kind in ("may", "may not", "known")}
    report = f"{server_kind}: {len(found)} cases, {counts}, {len(surprises)} unexpected"
    print(report, *surprises, sep="\n")  # noqa: T201 - the matrix in short
    assert not surprises
    assert len(found) >= LEAST_CASES
    assert {case.user for case in found} == set(USERS)


# what each user is for


def test_a_trainer_submits_and_collects(trainer: Client) -> None:
    future = trainer.submit(chat("hello"))
    assert future.result(LIMIT_S).states[0].text == "hello"
    assert trainer.get(future.job_id).result(LIMIT_S).states[0].text == "hello"
    group = trainer.sample("two", n=2, params=SampleParams(max_tokens=8)).result(LIMIT_S)
    assert [sample.text for sample in group.samples] == ["two", "two"]
    assert future.job_id in [reply.job_id for reply in trainer.attach("acl")]


def test_a_trainer_cancels_what_waits_and_what_runs(trainer: Client, admin: Look) -> None:
    waiting = trainer.submit(chat("later"), min_version=7)
    wait_until(lambda: admin.reply(waiting.job_id), "it is accepted")
    assert waiting.cancel().result(LIMIT_S) == 1
    running = trainer.submit(scripted("x" * 1000, ms_per_token=50), timeout_s=600)
    wait_until(lambda: admin.reply(running.job_id).get("status") == "running", "it runs")
    assert trainer.cancel(run="acl").result(LIMIT_S) >= 1
    for future in (waiting, running):
        with pytest.raises(Cancelled):
            future.result(LIMIT_S).raise_for_status()


def test_a_trainer_sees_the_fleet(served: Served, trainer: Client) -> None:
    fleet = trainer.fleet().result(LIMIT_S)
    assert fleet.gate == "open"
    assert fleet.workers[served.worker.worker_id]["state"] == "serving"


def test_an_operator_runs_the_commands(
    served: Served, admin: Look, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--url", served.url("operator"), "--pool", POOL)
    with Client(served.url("trainer"), pool=POOL, run="op") as trainer:
        job_id = trainer.submit(scripted(fail="error")).result(LIMIT_S).job_id
        assert run(["status", *where]) == GOOD
        assert run(["job", job_id, *where]) == GOOD
        assert run(["dead", "show", job_id, *where]) == GOOD
        capsys.readouterr()
        assert run(["dead", "list", *where]) == GOOD
        assert job_id in capsys.readouterr().out
        assert run(["dead", "requeue", job_id, *where]) == GOOD
        trainer.get(f"{job_id}~2").result(LIMIT_S)
        assert run(["dead", "purge", f"{job_id}~2", *where]) == GOOD
        slow = trainer.submit(scripted("x" * 1000, ms_per_token=50))
        wait_until(lambda: admin.reply(slow.job_id).get("status") == "running", "it runs")
        assert run(["cancel", "--run", "op", *where]) == GOOD
        assert slow.result(LIMIT_S).status is JobStatus.CANCELLED


def test_a_viewer_looks_and_changes_nothing(
    served: Served, trainer: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--url", served.url("viewer"), "--pool", POOL)
    job_id = trainer.submit(scripted(fail="error")).result(LIMIT_S).job_id
    for look in (("status",), ("job", job_id), ("dead", "list"), ("dead", "show", job_id)):
        assert run([*look, *where]) == GOOD
    for change in (
        ("cancel", job_id),
        ("dead", "requeue", job_id),
        ("dead", "purge", job_id),
        ("submit", "--prompt", "x", "--no-wait"),
    ):
        capsys.readouterr()
        assert run([*change, *where]) == UNREACHABLE
        assert "refuses this user a command" in capsys.readouterr().err


async def test_the_worker_may_take_every_step_of_a_sweep(served: Served, admin: Look) -> None:
    admin("ZADD", admin.keys.workers, 1, "ghost")
    link = Link(served.url("worker"), name="sweeper", outage_s=5)
    broker = Broker(link, POOL)
    await broker.open()
    await broker.sweep(most=10, crash_limit=3, reclaim=True, orphan_ms=60_000)
    await broker.take("ghost", "n", 1, lease_ms=1000, policy_version=0, bell_s=0.05)
    await broker.leave("ghost")
    await link.close()
    assert served.worker.running


def test_nothing_that_is_done_in_earnest_is_denied(
    served: Served, admin: Look, trainer: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wake-ups are rung with pcall: where they were forbidden, only the server's log would tell."""
    admin("ACL", "LOG", "RESET")
    test_a_trainer_submits_and_collects(trainer)
    test_a_trainer_cancels_what_waits_and_what_runs(trainer, admin)
    test_an_operator_runs_the_commands(served, admin, capsys)
    asyncio.run(test_the_worker_may_take_every_step_of_a_sweep(served, admin))
    assert denied(admin) == []
    admin("ACL", "LOG", "RESET")
    with Client(served.url("viewer"), pool=POOL) as viewer, pytest.raises(ServerUnavailable):
        viewer.cancel(job_id="x").result(LIMIT_S)
    assert denied(admin)


def denied(admin: Look) -> list[dict[str, Any]]:
    """The entries of the server's ACL log that are not of this test's own unnamed connections."""
    entries: list[dict[str, Any]] = admin("ACL LOG")
    return [entry for entry in entries if entry["client-info"]["name"]]


# what goes wrong


@pytest.fixture
def unprepared(tmp_path: Path, server_kind: ServerKind) -> Iterator[GuardedServer]:
    guarded = GuardedServer(server_kind, tmp_path)
    yield guarded
    guarded.stop()


def test_a_trainer_of_a_pool_without_library_is_told_who_prepares_it(
    unprepared: GuardedServer,
) -> None:
    with Client(unprepared.url("trainer"), pool=POOL) as client:
        with pytest.raises(PoolNotPrepared) as refused:
            client.submit(chat("x")).result(LIMIT_S)
        assert "function|load" in refused.value.message
        assert "start a worker" in refused.value.message
        asyncio.run(opened(unprepared.url("worker"), POOL))
        job_id = client.submit(chat("x")).job_id
        wait_until(lambda: client.fleet().result(LIMIT_S).depth["normal"] == 1, "it is accepted")
        assert client.cancel(job_id=job_id).result(LIMIT_S) == 1


async def opened(url: str, pool: str) -> None:
    link = Link(url, name="opener")
    await Broker(link, pool).open()
    await link.close()


def test_nobody_comes_in_without_a_login(unprepared: GuardedServer) -> None:
    with Client(unprepared.server.url, pool=POOL) as client:
        began_s = time.monotonic()
        with pytest.raises(ServerUnavailable, match="refuses this user"):
            client.submit(chat("x")).result(LIMIT_S)
        assert time.monotonic() - began_s < 5


def test_the_file_loads_only_with_passwords_in_it(server_kind: ServerKind, tmp_path: Path) -> None:
    words = [server_binary(server_kind), "--port", "0", "--unixsocket", str(tmp_path / "socket")]
    ran = subprocess.run(
        [*words, "--aclfile", str(ROOT / "deploy/redis/users.acl")],
        cwd=tmp_path,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ran.returncode != 0
    assert ran.stdout.count(b"password hash must be exactly 64") == len(USERS)


def test_the_documented_change_gives_the_users_another_pool(
    tmp_path: Path, server_kind: ServerKind
) -> None:
    guarded = GuardedServer(server_kind, tmp_path, pool="math")
    lines = (tmp_path / "users.acl").read_text().splitlines()
    assert [line.split()[:3] for line in lines if "default" in line] == [["user", "default", "off"]]
    asyncio.run(opened(guarded.url("worker"), "math"))
    for user in USERS:
        look = Look(guarded.url(user), "math")
        assert look("XLEN", "rollout:{math}:dead") == 0
        with pytest.raises(NoPermissionError):
            look("XLEN", "rollout:{default}:dead")
        look.close()
    guarded.stop()
