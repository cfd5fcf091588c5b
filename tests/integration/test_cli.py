"""The command against a real server and a scripted worker."""

import io
import json
import signal
from functools import reduce
from operator import getitem

import pytest

from producer_sdk.cli import FAILED, GOOD, UNREACHABLE, USAGE
from protocols.queue.keys import Keys
from tests.command import Rolloutq
from tests.job_body import Body, chat, claude, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve

DEAD_URL = "redis://127.0.0.1:1/0"


@pytest.fixture
def served(rolloutq: Rolloutq, standing: str) -> Rolloutq:
    """Run a command on a pool that has a worker."""
    return lambda *words: rolloutq(*words, "--pool", standing)


def test_submit_prints_the_text_of_the_answer(served: Rolloutq) -> None:
    assert served("submit", "--prompt", "good morning") == (GOOD, "good morning\n", "")


@pytest.mark.parametrize(
    ("protocol", "body", "path"),
    [
        ("openai.chat", chat("hi"), ("choices", 0, "message", "content")),
        ("claude.messages", claude("hi"), ("content", 0, "text")),
        ("generate", {"prompt": "hi"}, ("samples", 0, "text")),
    ],
)
def test_submit_speaks_every_dialect(
    served: Rolloutq, protocol: str, body: Body, path: tuple[str | int, ...]
) -> None:
    ran = served("submit", json.dumps(body), "--protocol", protocol, "--json")
    assert ran.code == GOOD
    assert reduce(getitem, path, ran.json["response"]) == "hi"
    assert ran.json["samples"][0]["text"] == "hi"


def test_submit_reads_standard_input(served: Rolloutq, monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.TextIOWrapper(io.BytesIO(json.dumps(chat("from a pipe")).encode()))
    monkeypatch.setattr("sys.stdin", told)
    assert served("submit", "-").out == "from a pipe\n"


@pytest.mark.parametrize(
    ("body", "protocol", "named"),
    [
        ('{"messages":[]}', "openai.chat", "`messages`"),
        ('{"messages":[{"role":"user","content":"x"}],"n":0}', "openai.chat", "`n`"),
        ('{"messages":[{"role":"user","content":"x"}]}', "claude.messages", "`max_tokens`"),
        ('{"prompt":"x","messages":[]}', "generate", "`messages`"),
        ("{}", "morse", "`protocol`"),
    ],
)
def test_refused_job_exits_1_and_names_the_field(
    served: Rolloutq, body: str, protocol: str, named: str
) -> None:
    ran = served("submit", body, "--protocol", protocol)
    assert ran.code == FAILED
    assert ran.out == ""
    assert named in ran.err
    assert ran.err.count("\n") == 1


def test_refused_job_is_whole_as_json(served: Rolloutq) -> None:
    ran = served("submit", '{"messages":[]}', "--json")
    assert ran.code == FAILED
    assert (ran.json["status"], ran.json["code"]) == ("failed", 400)
    assert ran.json["response"]["error"]["param"] == "messages"


def test_deadline_of_the_command_line_ends_the_job(served: Rolloutq) -> None:
    body = json.dumps(scripted("slow", ms_per_token=20_000))
    ran = served("submit", body, "--timeout-s", "0.3")
    assert ran.code == FAILED
    assert "expired" in ran.err


def test_same_id_with_another_body_is_bad_input(served: Rolloutq, pool: str) -> None:
    served("submit", "--prompt", "one", "--id", pool)
    assert served("submit", "--prompt", "one", "--id", pool).out == "one\n"
    ran = served("submit", "--prompt", "two", "--id", pool)
    assert ran.code == USAGE
    assert "another body" in ran.err


def test_job_without_waiting_is_found_by_its_id(served: Rolloutq, pool: str) -> None:
    assert served("submit", "--prompt", "later", "--no-wait", "--id", pool).out == f"{pool}\n"
    wait_until(lambda: "completed" in served("job", pool).out, "the job's end")
    shown = served("job", pool).out
    assert "later" in shown
    assert "mean log-probability" in shown
    assert served("job", pool, "--json").json["response"]["object"] == "chat.completion"


def test_job_tells_how_earlier_attempts_ended(rolloutq: Rolloutq, serve: Serve) -> None:
    first = serve(lease_s=1)
    rolloutq("submit", json.dumps(scripted("ok", ms_per_token=500)), "--no-wait", "--id", "j")
    wait_until(lambda: "running" in rolloutq("job", "j").out, "an attempt")
    first.signal(signal.SIGKILL)
    second = serve(lease_s=1)
    wait_until(lambda: "completed" in rolloutq("job", "j").out, "the second attempt's end")
    told = rolloutq("job", "j", "--json").json
    assert (told["attempts"], told["fails"]) == (2, 0)
    events = [event["what"] for event in told["timeline"]]
    assert events[0] == "enqueued"
    assert events[1].startswith("taken by w0")
    assert events[2].startswith("lost after")
    assert events[3].startswith("taken by w1")
    assert events[-1] == "answered: completed"
    assert told["worker"] == second.worker_id


def test_unknown_job_is_one_clear_line(rolloutq: Rolloutq) -> None:
    for command in ("job", "cancel"):
        ran = rolloutq(command, "nonesuch")
        assert ran.code == FAILED
        assert "no job nonesuch in pool" in ran.err
        assert ran.err.count("\n") == 1


def test_queued_job_is_cancelled(rolloutq: Rolloutq) -> None:
    rolloutq("submit", "--prompt", "never", "--no-wait", "--id", "j")
    assert rolloutq("cancel", "j") == (GOOD, "job j is cancelled\n", "")
    assert "cancelled" in rolloutq("job", "j").out
    assert rolloutq("cancel", "j") == (GOOD, "job j is cancelled\n", "")


def test_completed_job_cannot_be_cancelled(served: Rolloutq, pool: str) -> None:
    served("submit", "--prompt", "done", "--id", pool)
    assert served("cancel", pool).out == f"job {pool} had ended already: completed\n"


def test_running_job_is_cancelled(served: Rolloutq, pool: str) -> None:
    body = json.dumps(scripted("slow", ms_per_token=20_000))
    served("submit", body, "--no-wait", "--id", pool)
    wait_until(lambda: "running" in served("job", pool).out, "an attempt")
    assert "its worker ends it" in served("cancel", pool).out
    wait_until(lambda: "cancelled" in served("job", pool).out, "the end")


def test_jobs_of_a_run_are_cancelled_together(rolloutq: Rolloutq) -> None:
    for _ in range(2):
        rolloutq("submit", "--prompt", "x", "--run", "grpo-7", "--no-wait")
    rolloutq("submit", "--prompt", "x", "--run", "grpo-8", "--no-wait")
    assert rolloutq("cancel", "--run", "grpo-7").out == "cancelled 2 jobs of run grpo-7\n"


def test_dead_fleet_is_visible_to_submit(rolloutq: Rolloutq, pool: str) -> None:
    ran = rolloutq("submit", "--prompt", "hi", "--id", "j", "--no-worker-s", "0.1")
    assert ran.code == UNREACHABLE
    assert f"no live worker for pool {pool}; start one with" in ran.err
    assert "rolloutq job j" in ran.err
    assert rolloutq("job", "j", "--json").json["status"] == "queued"


def test_dead_fleet_is_visible_in_status(rolloutq: Rolloutq, pool: str) -> None:
    ran = rolloutq("status", "--json")
    assert ran.code == UNREACHABLE
    assert ran.json["workers"] == {}
    assert f"no live worker for pool {pool}" in ran.err


def test_status_shows_workers_and_depth(served: Rolloutq, standing: str) -> None:
    ran = served("status", "--json")
    assert ran.code == GOOD
    (worker,) = ran.json["workers"].values()
    assert (worker["state"], worker["engine"], worker["slots"]) == ("serving", "scripted", "64")
    shown = served("status").out
    assert f"pool {standing}, gate open" in shown
    assert "scripted" in shown


def test_status_counts_what_waits(rolloutq: Rolloutq) -> None:
    for lane in ("high", "low", "low"):
        rolloutq("submit", "--prompt", "x", "--no-wait", "--lane", lane)
    told = rolloutq("status", "--json").json
    assert (told["waiting_jobs"], told["depth"]["high"], told["depth"]["low"]) == (3, 1, 2)


def test_a_parked_job_is_shown_with_what_it_waits_for(
    served: Rolloutq, pool: str, standing: str, look: Look
) -> None:
    lane = Keys(standing).jobs("normal")
    look("XADD", lane, "*", "id", pool, "body", json.dumps(chat("x")), "min_version", 5)
    wait_until(lambda: "parked for policy version 5" in served("job", pool).out, "it is parked")
    told = served("job", pool, "--json").json
    assert [event["what"] for event in told["timeline"]] == [
        "enqueued",
        "parked for policy version 5",
    ]
    assert (told["status"], told["attempts"]) == ("queued", 0)
    assert served("status", "--json").json["depth"]["parked"] == 1
    assert "parked" in served("status").out
    assert served("cancel", pool).out == f"job {pool} is cancelled\n"


@pytest.mark.parametrize(
    "words", [["status"], ["job", "j"], ["cancel", "j"], ["submit", "--prompt", "hi"]], ids=" ".join
)
def test_missing_server_is_one_line_and_exit_3(rolloutq: Rolloutq, words: list[str]) -> None:
    ran = rolloutq(*words, "--url", DEAD_URL)
    assert ran.code == UNREACHABLE
    assert ran.err.startswith("rolloutq: no Redis at 127.0.0.1:1 ")
    assert ran.err.count("\n") == 1


def test_raw_entry_is_unknown_until_it_is_read(rolloutq: Rolloutq, look: Look) -> None:
    look("XADD", look.keys.jobs("normal"), "*", "id", "raw", "body", "{}")
    ran = rolloutq("job", "raw")
    assert ran.code == FAILED
    assert "no worker has read it yet" in ran.err
