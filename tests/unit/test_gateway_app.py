"""The gateway's application in this process, asked without a socket, before a fleet in memory."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.types import Message, Scope

from producer_sdk.client import Client
from producer_sdk.future import Pending
from producer_sdk.gateway import jobs
from producer_sdk.gateway.app import Gateway
from producer_sdk.gateway.look import Look
from producer_sdk.gateway.metrics import Metrics
from producer_sdk.gateway.patience import Leaving
from producer_sdk.gateway.settings import settings
from producer_sdk.promise import Promise
from protocols.codec import encode_json
from protocols.errors import ServerUnavailable
from worker.testing import fleet

LIMIT_S = 60


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with fleet() as made:
        yield made


async def asked(client: Client, method: str, path: str, **more: Any) -> httpx2.Response:  # noqa: ANN401
    gateway: Any = Gateway(client, client, settings(), Leaving(), "http://gateway")
    door = httpx2.ASGITransport(app=gateway)
    async with httpx2.AsyncClient(transport=door, base_url="http://gateway") as ask:
        async with asyncio.timeout(LIMIT_S):
            return await ask.request(method, path, **more)


@pytest.mark.parametrize("option", ["verb", "self", "client", "options", "", "mode x"])
async def test_an_option_that_no_command_has_is_refused(client: Client, option: str) -> None:
    refused = await asked(client, "POST", "/pause", json={option: "x"})
    assert refused.status_code == 400, refused.text


@pytest.mark.parametrize("wait_s", ["1", True, None, 0, -1, 1e9])
async def test_a_wait_that_is_none_is_refused(client: Client, wait_s: object) -> None:
    refused = await asked(client, "POST", "/pause", json={"wait_s": wait_s})
    assert (refused.status_code, "wait_s" in refused.text) == (400, True)


async def test_a_model_s_name_may_be_percent_encoded(client: Client) -> None:
    told = await asked(client, "GET", "/v1/models/no%20such%2Fmodel%3Fa%23b")
    assert told.status_code == 404
    assert "no such/model?a#b" in told.json()["error"]["message"]


async def test_a_reader_who_stops_reading_is_let_go_after_the_limit(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "STUCK_S", 0.1)
    slow = {"script": {"text": "x" * 3000, "ms_per_token": 20}}
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "rollout": slow}
    came: list[Message] = [{"type": "http.request", "body": encode_json(body), "more_body": False}]
    sent: list[Message] = []
    never = asyncio.Event()

    async def receive() -> Message:
        if not came:
            await never.wait()
        return came.pop()

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) > 1:
            await never.wait()

    path = "/v1/chat/completions"
    headers = [(b"x-rollout-timeout-s", b"1")]
    scope: Scope = {"type": "http", "method": "POST", "path": path, "query_string": b""}
    gateway = Gateway(client, client, settings(), Leaving(), "http://gateway")
    async with asyncio.timeout(LIMIT_S / 4):
        await gateway(scope | {"headers": headers}, receive, send)
    assert [message["type"] for message in sent[:2]] == [
        "http.response.start",
        "http.response.body",
    ]


async def test_probes_do_not_queue_up_while_redis_is_away(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def away(_: Client) -> Pending[Any]:
        nonlocal looks
        looks += 1
        inner: Promise[Any] = Promise()
        inner.set_exception(ServerUnavailable("away"))
        return Pending(inner, "fleet")

    monkeypatch.setattr(Client, "fleet", away)
    look = Look(client, Metrics(), Leaving(), "http://gateway")
    request: Any = None
    answers = await asyncio.gather(*(look.healthz(request) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {503}
    assert looks == 1
