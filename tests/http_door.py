"""Both ways in for unmodified official clients: the transport, and a gateway as a process of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import httpx2
from anthropic import Anthropic, AsyncAnthropic
from openai import AsyncOpenAI, OpenAI

from producer_sdk import Client
from tests.command import CommandProcess
from tests.servers import free_port

READY_S = 60.0


class Door(Protocol):
    """Where clients lead."""

    name: str

    def openai(self) -> OpenAI: ...
    def async_openai(self) -> AsyncOpenAI: ...
    def anthropic(self) -> Anthropic: ...
    def async_anthropic(self) -> AsyncAnthropic: ...
    def http(self) -> httpx2.Client: ...


class TransportDoor:
    """Over Redis, from this process."""

    name = "transport"

    def __init__(self, client: Client) -> None:
        self._client = client

    def openai(self) -> OpenAI:
        over = httpx2.Client(transport=self._client.sync_transport())
        return OpenAI(api_key="-", base_url="http://rollout/v1", http_client=over)

    def async_openai(self) -> AsyncOpenAI:
        over = httpx2.AsyncClient(transport=self._client.transport())
        return AsyncOpenAI(api_key="-", base_url="http://rollout/v1", http_client=over)

    def anthropic(self) -> Anthropic:
        over = httpx2.Client(transport=self._client.sync_transport())
        return Anthropic(api_key="-", base_url="http://rollout", http_client=over)

    def async_anthropic(self) -> AsyncAnthropic:
        over = httpx2.AsyncClient(transport=self._client.transport())
        return AsyncAnthropic(api_key="-", base_url="http://rollout", http_client=over)

    def http(self) -> httpx2.Client:
        return httpx2.Client(transport=self._client.sync_transport(), base_url="http://rollout")


class GatewayDoor:
    """Over HTTP."""

    name = "gateway"

    def __init__(self, url: str, key: str = "none") -> None:
        self.url, self._key = url, key

    def openai(self) -> OpenAI:
        return OpenAI(api_key=self._key, base_url=f"{self.url}/v1")

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(api_key=self._key, base_url=f"{self.url}/v1")

    def anthropic(self) -> Anthropic:
        return Anthropic(api_key=self._key, base_url=self.url)

    def async_anthropic(self) -> AsyncAnthropic:
        return AsyncAnthropic(api_key=self._key, base_url=self.url)

    def http(self, **headers: str) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers=headers)


class GatewayProcess(CommandProcess):
    """A running `rolloutq gateway`; it ends with the block."""

    def __init__(
        self,
        folder: Path,
        url: str,
        pool: str,
        *flags: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        words = ("gateway", "--port", str(self.port), "--url", url, "--pool", pool, *flags)
        super().__init__(folder, *words, environment=environment)

    def wait_ready(self) -> None:
        """Return when it answers."""

        def answers() -> bool:
            try:
                return httpx2.get(f"{self.url}/healthz", timeout=5).status_code == 200
            except httpx2.TransportError:
                return False

        self.wait_until(answers, "a healthy gateway", READY_S)
