"""A pause in each mode, with jobs in flight: what was generated is never generated again, and nothing is lost."""

from collections.abc import Callable

import pytest
from redis.exceptions import ResponseError

from producer_sdk import Client, JobStatus
from tests.control_look import acks, fact, obeyed, order
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import both_servers
from tests.worker_process import WorkerProcess

LIMIT_S = 60
JOBS = 6
TEXT = "a text that takes a while to say"
TOKENS = len(TEXT) + 1
MS_PER_TOKEN = 40

pytestmark = both_servers


def submit_slow(client: Client, look: Look) -> list[str]:
    """Jobs that are generating, some tokens each."""
    body = scripted(TEXT, ms_per_token=MS_PER_TOKEN)
    ids = [client.submit(body).job_id for _ in range(JOBS)]
    keys = [look.keys.reply(job_id) for job_id in ids]
    wait_until(lambda: all(look("HGET", key, "kept:0") for key in keys), "each has a checkpoint")
    return ids


def drawn(look: Look, worker: WorkerProcess) -> int:
    """Tokens that the worker's engine has drawn, by its next heartbeat but one: that began after now."""
    for _ in range(2):
        seen = fact(look, worker.worker_id, "beat_ms")
        wait_until(lambda seen=seen: fact(look, worker.worker_id, "beat_ms") != seen, "a heartbeat")
    return int(fact(look, worker.worker_id, "generated_tokens"))


def test_release_hands_jobs_back_with_all_their_tokens(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    first = serve(checkpoint_tokens=2, slots=JOBS)
    ids = submit_slow(client, look)
    answers = obeyed(look, "pause")
    assert answers[first.worker_id]["running"] == answers[first.worker_id]["held"] == 0
    assert {look.reply(job_id)["status"] for job_id in ids} == {"queued"}
    assert all(int(look.reply(job_id)["kept:0"]) > 0 for job_id in ids)
    obeyed(look, "continue")
    replies = [client.get(job_id).result(LIMIT_S) for job_id in ids]
    assert [reply.states[0].text for reply in replies] == [TEXT] * JOBS
    assert {reply.attempts for reply in replies} == {2}
    assert drawn(look, first) == JOBS * TOKENS  # no token was drawn twice
    nothing_left()


def test_keep_holds_jobs_with_their_leases_and_goes_on(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    worker = serve(checkpoint_tokens=2, slots=JOBS, lease_s=1.2)
    ids = submit_slow(client, look)
    answer = obeyed(look, "pause", "mode=keep")[worker.worker_id]
    assert answer["running"] + answer["held"] == JOBS
    wait_until(lambda: fact(look, worker.worker_id, "held_jobs") == str(JOBS), "all are held")
    before = drawn(look, worker)
    held_until_ms = look.now_ms() + 2000
    wait_until(lambda: look.now_ms() > held_until_ms, "longer than a lease")
    assert {look.reply(job_id)["status"] for job_id in ids} == {"running"}
    assert drawn(look, worker) == before  # nothing is drawn while it is paused
    obeyed(look, "continue")
    replies = [client.get(job_id).result(LIMIT_S) for job_id in ids]
    assert [reply.states[0].text for reply in replies] == [TEXT] * JOBS
    assert {reply.attempts for reply in replies} == {1}
    assert drawn(look, worker) == JOBS * TOKENS
    nothing_left()


def test_drain_lets_jobs_end_and_takes_no_more(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    worker = serve(checkpoint_tokens=2, slots=JOBS)
    ids = submit_slow(client, look)
    answer = obeyed(look, "pause", "mode=drain")[worker.worker_id]
    assert (answer["running"], answer["state"]) == (JOBS, "paused")
    later = client.submit(chat("later"))
    replies = [client.get(job_id).result(LIMIT_S) for job_id in ids]
    assert {(reply.status, reply.attempts) for reply in replies} == {(JobStatus.COMPLETED, 1)}
    assert look.reply(later.job_id)["status"] == "queued"
    obeyed(look, "continue")
    assert later.result(LIMIT_S).status is JobStatus.COMPLETED
    nothing_left()


def test_abort_answers_with_the_tokens_so_far(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    worker = serve(checkpoint_tokens=2, slots=JOBS)
    ids = submit_slow(client, look)
    assert obeyed(look, "pause", "mode=abort")[worker.worker_id]["running"] == 0
    replies = [client.get(job_id).result(LIMIT_S) for job_id in ids]
    assert {(reply.status, reply.code, reply.error) for reply in replies} == {
        (JobStatus.ABORTED, 503, "aborted")
    }
    texts = [reply.states[0].text for reply in replies]
    assert all(0 < len(text) < len(TEXT) and TEXT.startswith(text) for text in texts)
    assert drawn(look, worker) == sum(map(len, texts))  # every token that was drawn is in a reply
    obeyed(look, "continue")
    nothing_left()


def test_a_drain_may_be_hurried(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    serve(checkpoint_tokens=2, slots=JOBS)
    ids = submit_slow(client, look)
    obeyed(look, "pause", "mode=drain")
    obeyed(look, "pause", "mode=keep")
    obeyed(look, "pause", "mode=abort")
    assert {client.get(job_id).result(LIMIT_S).status for job_id in ids} == {JobStatus.ABORTED}
    nothing_left()


def test_a_held_job_can_be_cancelled_and_expires(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    worker = serve(checkpoint_tokens=2, slots=JOBS)
    body = scripted(TEXT, ms_per_token=MS_PER_TOKEN)
    late = client.submit(body, timeout_s=2.0)
    ids = [client.submit(body).job_id]
    wait_until(lambda: look("ZCARD", look.keys.leases) == 2, "both run")
    obeyed(look, "pause", "mode=keep")
    assert client.cancel(job_id=ids[0]).result(LIMIT_S) == 1
    assert client.get(ids[0]).result(LIMIT_S).status is JobStatus.CANCELLED
    assert late.result(LIMIT_S).status is JobStatus.EXPIRED
    wait_until(lambda: fact(look, worker.worker_id, "held_jobs") == "0", "it holds nothing")
    nothing_left()


def test_sigterm_hands_held_jobs_back(client: Client, serve: Serve, look: Look) -> None:
    worker = serve(checkpoint_tokens=2, slots=JOBS)
    ids = submit_slow(client, look)
    obeyed(look, "pause", "mode=keep")
    worker.terminate()
    assert worker.wait() == 0
    assert {look.reply(job_id)["status"] for job_id in ids} == {"queued"}
    assert all(int(look.reply(job_id)["kept:0"]) > 0 for job_id in ids)


def test_an_order_to_one_worker_leaves_the_others_alone(
    client: Client, serve: Serve, look: Look, nothing_left: Callable[[], None]
) -> None:
    stopped, going = serve(slots=2), serve(slots=2)
    assert list(obeyed(look, "pause", f"worker={stopped.worker_id}")) == [stopped.worker_id]
    replies = [client.submit(chat(f"j{i}")) for i in range(20)]
    assert {future.result(LIMIT_S).worker for future in replies} == {going.worker_id}
    assert set(obeyed(look, "pause")) == {stopped.worker_id, going.worker_id}
    obeyed(look, "continue", f"worker={stopped.worker_id}")
    assert client.submit(chat("again")).result(LIMIT_S).worker == stopped.worker_id
    obeyed(look, "continue")
    assert f"gate@{stopped.worker_id}".encode() not in look("HGETALL", look.keys.desired)
    nothing_left()


def test_a_wrong_order_is_refused_with_the_right_one(serve: Serve, look: Look) -> None:
    serve()
    refusals = {
        ("offload",): "first pause",
        ("puase",): "one of: cancel continue health metadata offload onload pause",
        ("pause", "mode=hard"): "release, drain, keep or abort",
        ("pause", "level=1"): "pause has no option level; its options: mode worker",
        ("pause", "worker=nobody"): "no live worker nobody",
        ("pause", "now"): "write name=value",
        ("update_weights", "uri=/x"): "say version=",
        ("cancel",): "either job= or run=",
        ("continue", "worker="): "is no option",
    }
    for words, told in refusals.items():
        with pytest.raises(ResponseError, match=told):
            order(look, *words)
    entries = look("XRANGE", look.keys.commands, "-", "+")
    assert sum(b"refused" in fields for _, fields in entries) == len(refusals)


def test_memory_and_versions_have_their_order(serve: Serve, look: Look) -> None:
    worker = serve()

    def refused(*words: str) -> str:
        with pytest.raises(ResponseError) as told:
            order(look, *words)
        return str(told.value)

    obeyed(look, "pause")
    assert obeyed(look, "offload", "level=2")[worker.worker_id]["state"] == "offloaded"
    assert "first onload" in refused("continue")
    assert "first onload" in refused("update_weights", "version=1")
    assert "discarded already" in refused("offload", "level=1")
    assert obeyed(look, "onload")[worker.worker_id]["state"] == "stale"
    assert "first update_weights" in refused("continue")
    missing = order(look, "update_weights", "version=3", "uri=/nowhere/w.safetensors")
    wait_until(lambda: acks(look, missing["command"]), "it answers")
    (answer,) = acks(look, missing["command"]).values()
    assert (answer["result"], answer["state"]) == ("refused", "stale")
    assert "w.safetensors" in answer["why"]
    told = refused("continue")
    assert "stale" in told
    assert "w.safetensors" in told
    obeyed(look, "update_weights", "version=0")
    obeyed(look, "continue")
    assert fact(look, worker.worker_id, "state") == "serving"


def test_the_same_command_id_is_the_same_command(serve: Serve, look: Look) -> None:
    serve()
    once = order(look, "pause", "id=mine")
    obeyed(look, "continue")
    assert order(look, "pause", "id=mine") == once
    assert look("HGET", look.keys.desired, "gate") == b"open"


def test_a_pause_is_obeyed_by_a_worker_that_could_not_load(serve: Serve, look: Look) -> None:
    worker = serve()
    missing = order(look, "update_weights", "version=3", "uri=/nowhere/w.safetensors")
    wait_until(lambda: acks(look, missing["command"]), "it answers")
    (answer,) = acks(look, missing["command"]).values()
    assert (answer["result"], answer["state"]) == ("refused", "serving")
    obeyed(look, "pause")
    with pytest.raises(ResponseError, match=r"holds version 0, not 3 .*w\.safetensors"):
        order(look, "continue")
    obeyed(look, "update_weights", "version=0")
    obeyed(look, "continue")
    assert fact(look, worker.worker_id, "trouble") == ""
