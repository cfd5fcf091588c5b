"""Clients across processes: pickled, restarted, forked."""

import pickle
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from producer_sdk import Client
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until

LIMIT_S = 60
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pool(standing: str) -> str:
    return standing


def run_python(program: str, *, told: bytes = b"", words: tuple[str, ...] = ()) -> list[str]:
    """The lines that a program of another process prints; its errors fail the test."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program, *words],
        input=told,
        capture_output=True,
        timeout=LIMIT_S,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


READ_PICKLED = """
import pickle, sys
with pickle.load(sys.stdin.buffer) as client:
    for job_id in sys.argv[1:]:
        reply = client.get(job_id).result(30)
        print(reply.response["choices"][0]["message"]["content"], reply.states[0].text)
"""


def test_a_pickled_client_reads_replies_in_another_process(client: Client) -> None:
    quick = client.submit(chat("quick"))
    quick.result(LIMIT_S)
    slow = client.submit(scripted("slow", ms_per_token=100))
    lines = run_python(READ_PICKLED, told=pickle.dumps(client), words=(quick.job_id, slow.job_id))
    assert lines == ["quick quick", "slow slow"]


def test_a_pickled_client_is_small_and_keeps_its_settings(url: str, pool: str) -> None:
    with Client(url, pool=pool, run="r", no_worker_s=5) as client:
        client.submit(chat("x")).result(LIMIT_S)
        packed = pickle.dumps(client)
    with pickle.loads(packed) as again:
        assert again.settings == client.settings
    assert len(packed) < 2000


RESTARTED = """
import os, sys
from producer_sdk import Client
run, url, pool, when = sys.argv[1:]
client = Client(url, pool=pool, run=run)
futures = [
    client.submit(
        {"messages": [{"role": "user", "content": "?"}],
         "rollout": {"script": {"text": f"answer {i}", "ms_per_token": 5}}},
        job_id=f"{run}-{i}",
    )
    for i in range(50)
]
if when == "die":
    futures[-1].result(30)
    os._exit(0)
for future in futures:
    print(future.result(30).raise_for_status().states[0].text)
client.close()
"""


def test_a_restarted_trainer_gets_its_results_by_job_id(
    url: str, pool: str, look: Look, client: Client
) -> None:
    run = f"run-{secrets.token_hex(4)}"
    assert run_python(RESTARTED, words=(run, url, pool, "die")) == []
    entries = look("XINFO", "STREAM", look.keys.jobs("normal"))
    before = {f"{run}-{i}": look.reply(f"{run}-{i}") for i in range(50)}
    assert all(before.values())
    lines = run_python(RESTARTED, words=(run, url, pool, "wait"))
    assert lines == [f"answer {i}" for i in range(50)]
    after = {job_id: look.reply(job_id) for job_id in before}
    assert {reply["attempts"] for reply in after.values()} == {"1"}
    assert entries is not None
    texts = sorted(reply.states[0].text for reply in client.attach(run))
    assert texts == sorted(lines)


FORKED = """
import os, sys
from producer_sdk import Client
url, pool = sys.argv[1:]
client = Client(url, pool=pool)
def ask(text):
    reply = client.submit({"messages": [{"role": "user", "content": text}]}).result(30)
    return reply.job_id, reply.states[0].text
before = ask("parent before")
pid = os.fork()
if pid == 0:
    print(*ask("child"), flush=True)
    client.close()
    os._exit(0)
after = ask("parent after")
_, status = os.waitpid(pid, 0)
print(*before, flush=True)
print(*after, flush=True)
client.close()
sys.exit(status)
"""


def test_a_client_works_on_both_sides_of_a_fork(url: str, pool: str) -> None:
    lines = run_python(
        f"import warnings; warnings.simplefilter('ignore')\n{FORKED}", words=(url, pool)
    )
    ids = [line.split(" ", 1)[0] for line in lines]
    assert sorted(line.split(" ", 1)[1] for line in lines) == [
        "child",
        "parent after",
        "parent before",
    ]
    assert len(set(ids)) == 3


UNUSED = """
import os, sys
from producer_sdk import Client
client = Client(sys.argv[1], pool=sys.argv[2])
for child in ("one", "two"):
    pid = os.fork()
    if pid == 0:
        body = {"messages": [{"role": "user", "content": child}]}
        future = client.submit(body)
        content = future.result(30).response["choices"][0]["message"]["content"]
        print(future.job_id, content, flush=True)
        client.close()
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_children_of_a_client_that_was_never_used_have_job_ids_of_their_own(
    url: str, pool: str
) -> None:
    lines = run_python(
        f"import warnings; warnings.simplefilter('ignore')\n{UNUSED}", words=(url, pool)
    )
    (first, said), (second, too) = (line.split(" ", 1) for line in lines)
    assert (said, too) == ("one", "two")
    assert first != second


def test_a_process_that_forgets_to_close_its_client_still_ends(url: str, pool: str) -> None:
    program = """
import sys
from producer_sdk import Client
client = Client(sys.argv[1], pool=sys.argv[2])
print(client.submit({"messages": [{"role": "user", "content": "x"}]}).result(30).status)
"""
    assert run_python(program, words=(url, pool)) == ["completed"]


def test_submitted_jobs_are_sent_before_a_client_closes(url: str, pool: str, look: Look) -> None:
    with Client(url, pool=pool) as client:
        futures = [client.submit(chat(f"t{i}")) for i in range(500)]
    ids = [future.job_id for future in futures]
    wait_until(
        lambda: all(look.reply(job_id).get("status") == "completed" for job_id in ids),
        "all are answered",
    )
