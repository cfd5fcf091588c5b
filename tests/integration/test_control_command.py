"""`rolloutq control` and PUBLISH against real servers and workers that are processes."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from producer_sdk import Client, JobStatus
from producer_sdk.cli import FAILED, GOOD, UNREACHABLE, USAGE
from producer_sdk.control import who
from tests.command import Rolloutq
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import StartServer, both_servers
from tests.worker_process import StartWorker, WorkerProcess

pytestmark = both_servers

LIMIT_S = 60.0
Three = tuple[WorkerProcess, WorkerProcess, WorkerProcess]


@pytest.fixture
def three(start_worker: StartWorker, url: str, pool: str, serve: Serve) -> Three:
    """Workers of the test's pool that serve."""
    started = start_worker(url, pool), start_worker(url, pool), serve()
    for worker in started:
        worker.wait_ready()
    return started


@pytest.fixture
def states(look: Look) -> Callable[..., list[str]]:
    """The states of workers, as their heartbeats tell."""

    def told(*workers: WorkerProcess) -> list[str]:
        keys = [look.keys.worker(worker.worker_id) for worker in workers]
        return [(look("HGET", key, "state") or b"gone").decode() for key in keys]

    return told


def row(shown: str, worker: WorkerProcess) -> list[str]:
    """A worker's cells in a table."""
    (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {worker.worker_id} ")]
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


def commands(look: Look) -> list[dict[bytes, bytes]]:
    """The audit, oldest first."""
    return [fields for _, fields in look("XRANGE", look.keys.commands, "-", "+")]


def test_control_shows_a_row_for_every_worker(rolloutq: Rolloutq, three: Three) -> None:
    ran = rolloutq("control", "pause", "mode=drain")
    assert ran.code == GOOD, ran
    assert "pause mode=drain, generation 1" in ran.out
    for worker in three:
        result, state, version, running, held, ms, why = row(ran.out, worker)
        assert (result, state, version, running, held, why) == (
            "applied",
            "paused",
            "0",
            "0",
            "0",
            "",
        )
        assert int(ms) < 5000
    shown = rolloutq("status")
    assert "gate closed (drain), generation 1" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 140
    assert row(shown.out, three[0])[:3] == ["paused", "ok", "no"]
    asked = rolloutq("control", "ready").out
    assert "it is paused" in row(asked, three[0])
    told = rolloutq("control", "continue", "--json").json
    assert (told["said"], told["generation"]) == ("continue", 2)
    assert {w: a["state"] for w, a in told["workers"].items()} == {
        worker.worker_id: "serving" for worker in three
    }


def test_a_typo_lists_the_verbs_and_changes_nothing(
    rolloutq: Rolloutq, serve: Serve, look: Look
) -> None:
    serve()
    ran = rolloutq("control", "pauze")
    assert (ran.code, ran.out) == (USAGE, "")
    assert "no verb 'pauze'; one of: cancel continue health metadata offload" in ran.err
    assert rolloutq("control", "pause", "mood=drain").code == USAGE
    assert look("HGET", look.keys.desired, "generation") == b"0"


def test_what_comes_too_early_is_refused_with_what_comes_first(
    rolloutq: Rolloutq, serve: Serve
) -> None:
    serve()
    ran = rolloutq("control", "offload")
    assert ran.code == FAILED
    assert "first pause" in ran.err


def test_a_workers_refusal_is_a_row_and_exit_code_1(
    rolloutq: Rolloutq,
    serve: Serve,
    client: Client,
    look: Look,
    states: Callable[..., list[str]],
) -> None:
    worker = serve()
    job = client.submit(scripted("abcdef", ms_per_token=1500))
    wait_until(lambda: look.lease_ms(job.job_id), "the job runs")
    assert rolloutq("control", "pause", "mode=drain").code == GOOD
    ran = rolloutq("control", "offload", "timeout_s=1")
    assert ran.code == FAILED
    result, *_, why = row(ran.out, worker)
    assert (result, why) == ("refused", "not done in time; 1 jobs are still running")
    assert job.result(LIMIT_S).status is JobStatus.COMPLETED
    wait_until(lambda: states(worker) == ["offloaded"], "the order stands")


def test_a_silent_worker_is_a_row_and_exit_code_1(
    rolloutq: Rolloutq, three: Three, states: Callable[..., list[str]]
) -> None:
    awake, frozen, other = three
    frozen.signal(signal.SIGSTOP)
    ran = rolloutq("control", "pause", "--wait", "2")
    assert ran.code == FAILED
    assert row(ran.out, frozen)[0] == "silent"
    assert row(ran.out, awake)[0] == row(ran.out, other)[0] == "applied"
    told = rolloutq("control", "ping", "--wait", "1", "--json")
    assert told.code == FAILED
    assert told.json["workers"][frozen.worker_id] == {"result": "silent"}
    frozen.signal(signal.SIGCONT)
    wait_until(lambda: states(*three) == ["paused"] * 3, "the sleeper has followed")
    assert rolloutq("control", "continue").code == GOOD
    assert states(*three) == ["serving"] * 3


def test_an_order_to_one_worker_leaves_the_others_alone(
    rolloutq: Rolloutq, three: Three, states: Callable[..., list[str]]
) -> None:
    one, *others = three
    ran = rolloutq("control", "pause", f"worker={one.worker_id}")
    assert ran.code == GOOD
    assert others[0].worker_id not in ran.out
    assert states(*three) == ["paused", "serving", "serving"]
    assert f"{one.worker_id}: told alone: " in rolloutq("status").out
    unknown = rolloutq("control", "pause", "worker=nobody")
    assert unknown.code == FAILED
    assert "no live worker nobody; live are: " in unknown.err
    assert rolloutq("control", "continue").code == GOOD
    assert states(*three) == ["serving"] * 3


def test_every_command_is_audited(rolloutq: Rolloutq, serve: Serve) -> None:
    serve()
    assert "no commands yet" in rolloutq("control").out
    rolloutq("control", "pause", "mode=keep")
    rolloutq("control", "pauze")
    rolloutq("control", "continue", "by=ops")
    newest, typo, oldest = rolloutq("control", "--json").json
    assert (newest["said"], newest["by"], newest["generation"]) == ("continue", "ops", 2)
    assert (typo["said"], typo["by"], typo["generation"]) == ("pauze", who(), None)
    assert typo["refused"].startswith("INVALID no verb")
    assert (oldest["said"], oldest["refused"]) == ("pause mode=keep", "")
    assert "pause mode=keep" in rolloutq("control").out


@pytest.mark.usefixtures("broker")
def test_an_order_without_a_live_worker_stands_and_exits_3(
    rolloutq: Rolloutq, pool: str, start_worker: StartWorker, url: str, look: Look
) -> None:
    ran = rolloutq("control", "pause")
    assert ran.code == UNREACHABLE
    assert "the order stands" in ran.out
    assert f"no live worker for pool {pool}" in ran.err
    late = start_worker(url, pool)
    wait_until(
        lambda: look("HGET", look.keys.worker(late.worker_id), "state") == b"paused",
        "who comes later obeys",
    )


def test_without_waiting_a_command_is_only_issued(rolloutq: Rolloutq, serve: Serve) -> None:
    worker = serve()
    ran = rolloutq("control", "pause", "--wait", "0")
    assert ran.code == GOOD
    assert "redis-cli HGETALL" in ran.out
    told = rolloutq("control", "continue", "--wait", "0", "--json").json
    assert told["workers"] == [worker.worker_id]


@pytest.mark.parametrize("message", ["pause mode=keep", '{"verb": "pause", "mode": "keep"}'])
def test_what_is_published_is_one_command_however_many_hear_it(
    three: Three, look: Look, states: Callable[..., list[str]], message: str
) -> None:
    assert look("PUBLISH", look.keys.control, message) == 3
    wait_until(lambda: states(*three) == ["paused"] * 3, "all obey")
    assert look("PUBLISH", look.keys.control, "ping") == 3
    wait_until(lambda: len(commands(look)) == 2, "the next command")
    paused, pinged = commands(look)
    assert (paused[b"said"], paused[b"by"]) == (b"pause mode=keep", b"channel")
    assert pinged[b"said"] == b"ping"
    wait_until(lambda: len(answered(look)) == 3, "all have answered the ping")
    assert len(commands(look)) == 2


def answered(look: Look) -> list[bytes]:
    """Who has answered the newest command."""
    ((entry, _),) = look("XREVRANGE", look.keys.commands, "+", "-", "COUNT", 1)
    acks = look("HKEYS", f"{look.keys.prefix}:acks:{entry.decode()}")
    return [name for name in acks if not name.startswith(b"@")]


def test_a_published_typo_is_noted(serve: Serve, look: Look) -> None:
    serve()
    assert look("PUBLISH", look.keys.control, "pauze") == 1
    wait_until(lambda: commands(look), "it is noted")
    (noted,) = commands(look)
    assert noted[b"refused"].startswith(b"INVALID no verb 'pauze'")
    assert look("HGET", look.keys.desired, "gate") == b"open"


def test_a_lagging_worker_ends_where_the_last_of_quick_commands_leads(
    three: Three, look: Look, states: Callable[..., list[str]], rolloutq: Rolloutq
) -> None:
    frozen = three[1]
    frozen.signal(signal.SIGSTOP)
    for verb in ("pause", "continue", "pause"):
        look("PUBLISH", look.keys.control, verb)
    awake = [three[0], three[2]]
    wait_until(lambda: len(commands(look)) == 3, "three commands")
    wait_until(lambda: states(*awake) == ["paused"] * 2, "those awake are paused")
    frozen.signal(signal.SIGCONT)
    wait_until(lambda: states(*three) == ["paused"] * 3, "the sleeper is paused")
    assert rolloutq("control", "ping").code == GOOD  # whatever the sleeper still heard has come in
    said = [command[b"said"].decode() for command in commands(look)]
    assert said == ["pause", "continue", "pause", "ping"]
    assert states(*three) == ["paused"] * 3


def test_continue_is_only_told_to_wait_while_workers_are_on_their_way(
    three: Three, look: Look, states: Callable[..., list[str]], tmp_path: Path
) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"the scripted engine reads none of it")

    def order(*words: str) -> str:
        try:
            look("FCALL", "rolloutq_control", 1, look.keys.prefix, *words)
        except ResponseError as refused:
            return str(refused).split()[0]
        return "accepted"

    def go_on() -> str:
        heard = [order("continue")]
        wait_until(lambda: heard[-1] != "NOTYET" or heard.append(order("continue")), "an answer")
        return heard[-1]

    for version in range(1, 21):
        assert order("pause") == "accepted"
        assert order("offload", "level=2") == "accepted"
        assert order("onload") == "accepted"
        assert order("update_weights", f"version={version}", f"uri={weights}") == "accepted"
        assert go_on() == "accepted"
    wait_until(lambda: states(*three) == ["serving"] * 3, "all serve")
    keys = [look.keys.worker(worker.worker_id) for worker in three]
    assert [look("HGET", key, "policy_version") for key in keys] == [b"20"] * 3


def test_shutdown_ends_the_worker_that_it_names_and_only_that(
    rolloutq: Rolloutq, three: Three, states: Callable[..., list[str]]
) -> None:
    one, *others = three
    ran = rolloutq("control", "shutdown", f"worker={one.worker_id}")
    assert ran.code == GOOD
    assert row(ran.out, one)[0] == "applied"
    assert one.wait() == 0
    assert states(*three) == ["gone", "serving", "serving"]
    assert rolloutq("control", "shutdown", "now=true").code == GOOD
    assert [other.wait() for other in others] == [0, 0]


def test_a_shutdown_is_answered_before_the_worker_is_gone(
    rolloutq: Rolloutq, start_worker: StartWorker, url: str, pool: str, serve: Serve
) -> None:
    workers = [serve(), *(start_worker(url, pool) for _ in range(3))]
    for worker in workers:
        worker.wait_ready()
    for worker in workers:
        ran = rolloutq("control", "shutdown", f"worker={worker.worker_id}", "now=true")
        assert ran.code == GOOD, ran.out
        assert worker.wait() == 0


def test_a_leaving_worker_refuses_orders(
    rolloutq: Rolloutq, serve: Serve, client: Client, look: Look
) -> None:
    worker = serve(grace_s=60)
    job = client.submit({**scripted("x" * 30, ms_per_token=250), "max_tokens": 30})
    wait_until(lambda: look.lease_ms(job.job_id), "the job runs")
    worker.terminate()
    key = look.keys.worker(worker.worker_id)
    wait_until(lambda: look("HGET", key, "state") == b"draining", "it leaves")
    ran = rolloutq("control", "pause")
    assert ran.code == FAILED
    assert row(ran.out, worker)[0] == "refused"
    assert "it is draining" in ran.out
    assert job.result(LIMIT_S).status is JobStatus.COMPLETED


def test_jobs_of_a_run_are_cancelled_by_a_command(
    rolloutq: Rolloutq, serve: Serve, client: Client
) -> None:
    serve()
    rolloutq("control", "pause")
    job = client.submit(chat("never"))
    wait_until(lambda: client.fleet().result(LIMIT_S).waiting_jobs == 1, "it waits")
    ran = rolloutq("control", "cancel", "run=test")
    assert ran.code == GOOD
    assert "cancel run=test: 1 cancelled" in ran.out
    assert job.result(LIMIT_S).status is JobStatus.CANCELLED
    assert "no job to cancel" in rolloutq("control", "cancel", "run=test").out


def test_no_secret_is_told(
    fresh_server: StartServer, start_worker: StartWorker, rolloutq: Rolloutq, pool: str
) -> None:
    server = fresh_server()
    look = Look(server.url, pool)
    look("CONFIG", "SET", "requirepass", "s3cret")
    look("AUTH", "s3cret")
    url = f"redis://:s3cret@127.0.0.1:{server.port}/0"
    worker = start_worker(url, pool)
    worker.wait_ready()
    for verb in ("metadata", "status", "health"):
        ran = rolloutq("control", verb, "--json", "--url", url)
        assert ran.code == GOOD
        (ack,) = ran.json["workers"].values()
        assert ack["facts"]
        assert "s3cret" not in ran.out
        assert str(server.port) not in json.dumps(ack["facts"])
    assert "s3cret" not in rolloutq("status", "--json", "--url", url).out
    assert "s3cret" not in worker.log_tail()
    look.close()
