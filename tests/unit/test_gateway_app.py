"""The gateway's application in this process, asked without a socket, before a fleet in memory."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from producer_sdk.client import Client
from producer_sdk.gateway.app import Gateway
from producer_sdk.gateway.patience import Leaving
from producer_sdk.gateway.settings import settings
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
