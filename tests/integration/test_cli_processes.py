"""`rolloutq worker` and `rolloutq up` as processes."""

import signal
import socket
from pathlib import Path

import pytest

from producer_sdk import Client
from producer_sdk.cli import GOOD, INTERRUPTED, UNREACHABLE, USAGE, run
from producer_sdk.cli.server import free_port
from tests.command import CommandProcess
from tests.job_body import chat
from tests.pool_look import Look

ANSWER_S = 60.0


def up(folder: Path, port: int, *words: str) -> CommandProcess:
    flags = ("--port", str(port), "--engine", "scripted", *words)
    return CommandProcess(folder, "up", *flags)


def answer(port: int, text: str, **options: str) -> str | None:
    with Client(f"redis://127.0.0.1:{port}/0", pool="default", no_worker_s=ANSWER_S) as client:
        reply = client.submit(chat(text), job_id=options.get("job_id", text)).result(ANSWER_S)
    return reply.state.response if reply.state else None


def kill_child(process: CommandProcess, word: str) -> None:
    (child,) = [child for child in process.children() if word in " ".join(child.cmdline())]
    child.kill()


def test_worker_replaces_the_command(tmp_path: Path, url: str, pool: str, look: Look) -> None:
    flags = ("--url", url, "--pool", pool, "--engine", "scripted", "--worker-id", "w")
    with CommandProcess(tmp_path, "worker", *flags) as worker:
        worker.wait_until(
            lambda: look("HGET", look.keys.worker("w"), "state") == b"serving", "a worker"
        )
        assert int(look("HGET", look.keys.worker("w"), "pid")) == worker.pid
        worker.signal(signal.SIGTERM)
        assert worker.wait() == GOOD


def test_workers_help_is_shown_even_beside_a_users_own_worker(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit('the wrong worker')")
    with CommandProcess(tmp_path, "worker", "--help") as worker:
        assert worker.wait() == GOOD
        assert "--lease-s" in worker.output


def test_wrong_flag_of_worker_is_bad_input(tmp_path: Path) -> None:
    with CommandProcess(tmp_path, "worker", "--slots", "0") as worker:
        assert worker.wait() == USAGE
        assert "--slots" in worker.output
        assert "Traceback" not in worker.output


def test_up_replaces_a_dead_worker_and_ends_cleanly(tmp_path: Path) -> None:
    port = free_port()
    with up(tmp_path, port, "--workers", "2") as process:
        process.wait_for("ready.")
        assert f"redis-cli -p {port} XADD 'rollout:{{default}}:jobs:normal'" in process.output
        assert answer(port, "before") == "before"
        kill_child(process, "--worker-id w1")
        process.wait_for("worker w1 was ended by SIGKILL")
        process.wait_for("worker w1.2 serves pool default")
        assert answer(port, "after") == "after"
        process.signal(signal.SIGTERM)
        assert process.wait() == GOOD
        assert process.left() == []


def test_up_lets_go_who_was_told_to_leave_and_ends_with_the_last(tmp_path: Path) -> None:
    port = free_port()
    with up(tmp_path, port, "--workers", "2") as process:
        process.wait_for("ready.")
        with Client(f"redis://127.0.0.1:{port}/0", pool="default") as client:
            client.control("shutdown", worker="w1").result(ANSWER_S)
            process.wait_for("worker w1 has left as it was told to; no other takes its place")
            assert list(client.fleet().result(ANSWER_S).workers) == ["w2"]
            client.control("shutdown", now=True).result(ANSWER_S)
        assert process.wait() == GOOD
        assert "all workers have left, ending" in process.output
        assert "another starts" not in process.output
        assert process.left() == []


def test_interrupted_up_leaves_nothing_running(tmp_path: Path) -> None:
    with up(tmp_path, free_port()) as process:
        process.wait_for("serving pool default")
        process.signal(signal.SIGINT)
        assert process.wait() == INTERRUPTED
        assert process.left() == []
        assert "Traceback" not in process.output


def test_up_finds_again_what_it_kept_in_its_folder(tmp_path: Path) -> None:
    port, data = free_port(), tmp_path / "data"
    for start in range(2):
        folder = tmp_path / f"start-{start}"
        folder.mkdir()
        with up(folder, port, "--dir", str(data)) as process:
            process.wait_for("ready.")
            with Client(f"redis://127.0.0.1:{port}/0", pool="default") as client:
                if start == 0:
                    client.submit(chat("kept"), job_id="j").result(ANSWER_S)
                reply = client.get("j").result(ANSWER_S)
            assert reply.state is not None
            assert reply.state.response == "kept"
            process.signal(signal.SIGTERM)
            assert process.wait() == GOOD


def test_up_without_its_server_ends_with_an_error(tmp_path: Path) -> None:
    with up(tmp_path, free_port()) as process:
        process.wait_for("ready.")
        kill_child(process, "valkey-server")
        assert process.wait() == UNREACHABLE
        assert "the server was ended by SIGKILL" in process.output
        assert process.left() == []


def test_worker_that_cannot_start_ends_up(tmp_path: Path) -> None:
    flags = ("--port", str(free_port()), "--model", "./nonesuch")
    with CommandProcess(tmp_path, "up", *flags) as process:
        assert process.wait() == USAGE
        assert "no directory ./nonesuch" in process.output
        assert "Traceback" not in process.output


def test_up_on_a_taken_port_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["up", "--port", str(port)]) == USAGE
    err = capsys.readouterr().err
    assert f"port {port} is taken" in err
    assert err.count("\n") == 1
