"""`Client.control` against a whole fleet in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from producer_sdk import (
    Client,
    ControlBusy,
    ControlIncomplete,
    ControlRefused,
    InvalidCommand,
    JobStatus,
)
from producer_sdk.control import who
from protocols.queue.broker import Broker
from protocols.queue.control import Logged, audit
from protocols.queue.link import Link
from tests.job_body import chat
from tests.pool_look import until
from worker.testing import fleet

LIMIT_S = 60.0


@pytest.fixture
def client() -> Iterator[Client]:
    with fleet(workers=2) as made:
        yield made


async def asked(client: Client, *command: str | int) -> Any:  # noqa: ANN401 - the server's answer
    link = Link(client.settings.url, name="test")
    try:
        return await link.call(*command)
    finally:
        await link.close()


async def logged(client: Client) -> list[Logged]:
    link = Link(client.settings.url, name="test")
    try:
        return await audit(Broker(link, client.settings.pool), most=50)
    finally:
        await link.close()


def test_a_pause_is_answered_by_every_worker(client: Client) -> None:
    answers = client.control("pause", mode="drain", worker=None).result(LIMIT_S)
    assert answers.asked == ("test-0", "test-1")
    assert (answers.silent, answers.unmet) == ((), {})
    assert {ack.result for ack in answers.acks.values()} == {"applied"}
    assert {ack.state for ack in answers.acks.values()} == {"paused"}
    assert answers.command.said == "pause mode=drain"


def test_paused_jobs_wait_for_continue(client: Client) -> None:
    client.control("pause").result(LIMIT_S)
    waiting = client.submit(chat("later"))
    client.control("ping").result(LIMIT_S)
    assert not waiting.done()
    client.control("continue").result(LIMIT_S)
    assert waiting.result(LIMIT_S).status is JobStatus.COMPLETED


async def test_control_can_be_awaited(client: Client) -> None:
    answers = await client.control("ping")
    assert set(answers.acks) == {"test-0", "test-1"}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A file as the scripted engine wants it: it reads none of it."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    return str(file)


def test_the_whole_flow_of_an_update(client: Client, weights: str) -> None:
    client.control("pause", mode="drain").result(LIMIT_S)
    client.control("offload", level=2).result(LIMIT_S)
    client.control("onload").result(LIMIT_S)
    client.control("update_weights", version=7, uri=weights).result(LIMIT_S)
    client.control("continue").result(LIMIT_S)
    reply = client.submit(chat("new")).result(LIMIT_S)
    assert reply.policy_version == 7
    told = client.fleet().result(LIMIT_S)
    assert (told.gate, told.mode, told.weights, told.generation) == ("open", "", 7, 5)


def test_one_worker_alone_is_asked(client: Client) -> None:
    assert client.control("pause", worker="test-1").result(LIMIT_S).asked == ("test-1",)
    told = client.fleet().result(LIMIT_S)
    assert told.alone == {"test-1": {"gate": "closed", "mode": "release"}}
    assert {w: f["state"] for w, f in told.workers.items()} == {
        "test-0": "serving",
        "test-1": "paused",
    }


def test_a_wrong_word_is_refused_at_once_with_the_right_ones(client: Client) -> None:
    with pytest.raises(InvalidCommand, match=r"no verb 'pauze'; one of: .*pause"):
        client.control("pauze").result(LIMIT_S)
    with pytest.raises(InvalidCommand, match="release, drain, keep or abort"):
        client.control("pause", mode="sleep").result(LIMIT_S)
    with pytest.raises(InvalidCommand, match="a whole number"):
        client.control("update_weights", version="03").result(LIMIT_S)


def test_a_wrong_order_is_refused_at_once_with_what_comes_first(client: Client) -> None:
    with pytest.raises(ControlRefused, match="first pause"):
        client.control("offload").result(LIMIT_S)
    client.control("pause").result(LIMIT_S)
    client.control("offload", level=2).result(LIMIT_S)
    client.control("onload").result(LIMIT_S)
    with pytest.raises(ControlRefused, match="first update_weights"):
        client.control("continue").result(LIMIT_S)


async def test_continue_waits_for_a_worker_that_is_loading(client: Client, weights: str) -> None:
    client.control("pause").result(LIMIT_S)
    loading = ("rollout:{default}:worker:late", "state", "paused", "memory", "loaded")
    now = await asked(client, "TIME")
    beaten_ms = int(now[0]) * 1000
    client.control("update_weights", version=3, uri=weights).result(LIMIT_S)
    await asked(client, "HSET", *loading, "policy_version", 0, "doing", "update_weights")
    await asked(client, "ZADD", "rollout:{default}:workers", beaten_ms, "late")
    with pytest.raises(ControlBusy, match="worker late is at update_weights"):
        await client.control("continue", wait_s=0.3)
    going = client.control("continue", id="go", wait_s=LIMIT_S)
    ack = {"result": "applied", "state": "serving", "running": 0}
    await asked(client, "HSET", "rollout:{default}:acks:go", "late", json.dumps(ack))
    assert not going.done()
    await asked(client, "HSET", "rollout:{default}:worker:late", "policy_version", 3, "doing", "")
    assert set((await going).acks) == {"test-0", "test-1", "late"}


async def test_the_same_refusal_in_a_row_is_noted_once(client: Client) -> None:
    for _ in range(3):
        with pytest.raises(ControlRefused):
            await client.control("offload")
    refused = [entry for entry in await logged(client) if entry.refused]
    assert [(entry.said, entry.by) for entry in refused] == [("offload", who())]


async def test_a_silent_worker_is_named_when_the_wait_is_over(client: Client) -> None:
    now = await asked(client, "TIME")
    await asked(client, "ZADD", "rollout:{default}:workers", int(now[0]) * 1000, "frozen")
    with pytest.raises(
        ControlIncomplete, match="2 of 3 workers have done it; frozen: silent; the order stands"
    ):
        await client.control("pause", wait_s=0.5)


async def test_a_refusing_worker_is_named_without_waiting_for_the_others(client: Client) -> None:
    now = await asked(client, "TIME")
    await asked(client, "ZADD", "rollout:{default}:workers", int(now[0]) * 1000, "frozen")
    client.control("pause", worker="test-0").result(LIMIT_S)
    pending = client.control("pause", mode="keep", id="mine", wait_s=LIMIT_S)
    ack = {"result": "refused", "state": "paused", "running": 0, "why": "it will not"}
    await asked(client, "HSET", "rollout:{default}:acks:mine", "frozen", json.dumps(ack))
    with pytest.raises(ControlIncomplete, match="frozen: refused: it will not"):
        await pending


async def test_an_order_without_a_live_worker_stands_for_those_that_come(client: Client) -> None:
    await asked(client, "DEL", "rollout:{nobody}:desired")
    link = Link(client.settings.url, name="test")
    await Broker(link, "nobody").open()
    await link.close()
    with Client(client.settings.url, pool="nobody") as alone:
        answers = await alone.control("pause", mode="keep")
        assert (answers.asked, answers.unmet, answers.command.generation) == ((), {}, 1)
        assert (await alone.fleet()).gate == "closed"


async def test_a_long_cancel_is_repeated_until_no_job_is_left(client: Client) -> None:
    client.control("pause").result(LIMIT_S)
    with Client(client.settings.url, run="r") as trainer:
        jobs = [trainer.submit(chat("x")) for _ in range(1201)]
        await until(
            lambda: trainer.fleet().result(LIMIT_S).waiting_jobs == len(jobs), "all are queued"
        )
        counts = (await trainer.control("cancel", run="r")).command.counts
        assert counts == {"cancelled": 1201, "stopping": 0, "ended": 0, "unknown": 0, "left": 0}
        assert {job.result(LIMIT_S).status for job in jobs} == {JobStatus.CANCELLED}


async def test_every_command_is_noted_with_who_gave_it(client: Client) -> None:
    await client.control("pause", mode="keep")
    await client.control("continue", by="ops/7")
    newest, before, *_ = await logged(client)
    assert (newest.said, newest.by, newest.generation, newest.refused) == (
        "continue",
        "ops/7",
        2,
        "",
    )
    assert (before.said, before.by) == ("pause mode=keep", who())


def test_a_patient_wait_is_told_to_the_workers(client: Client) -> None:
    answers = client.control("pause", wait_s=300).result(LIMIT_S)
    assert answers.command.said == "pause timeout_s=300"
