"""Both ways in for unmodified official clients: the transport, and a gateway as a process of its own."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx2
from anthropic import Anthropic, AsyncAnthropic
from openai import AsyncOpenAI, OpenAI

from producer_sdk import Client
from tests.command import CommandProcess
from tests.servers import free_port

READY_S = 60.0
Fields = Mapping[str, Any]


class Door(Protocol):
    """Where clients lead; `more` are options of the client's constructor."""

    name: str

    def openai(self, **more: Any) -> OpenAI: ...  # noqa: ANN401
    def async_openai(self, **more: Any) -> AsyncOpenAI: ...  # noqa: ANN401
    def anthropic(self, **more: Any) -> Anthropic: ...  # noqa: ANN401
    def async_anthropic(self, **more: Any) -> AsyncAnthropic: ...  # noqa: ANN401
    def http(self) -> httpx2.Client: ...


class TransportDoor:
    """Over Redis, from this process."""

    name = "transport"

    def __init__(self, client: Client) -> None:
        self._client = client

    def openai(self, **more: Any) -> OpenAI:  # noqa: ANN401
        over = httpx2.Client(transport=self._client.sync_transport())
        return OpenAI(
            **{"api_key": "-", "base_url": "http://rollout/v1", "http_client": over, **more}
        )

    def async_openai(self, **more: Any) -> AsyncOpenAI:  # noqa: ANN401
        over = httpx2.AsyncClient(transport=self._client.transport())
        return AsyncOpenAI(
            **{"api_key": "-", "base_url": "http://rollout/v1", "http_client": over, **more}
        )

    def anthropic(self, **more: Any) -> Anthropic:  # noqa: ANN401
        over = httpx2.Client(transport=self._client.sync_transport())
        return Anthropic(
            **{"api_key": "-", "base_url": "http://rollout", "http_client": over, **more}
        )

    def async_anthropic(self, **more: Any) -> AsyncAnthropic:  # noqa: ANN401
        over = httpx2.AsyncClient(transport=self._client.transport())
        return AsyncAnthropic(
            **{"api_key": "-", "base_url": "http://rollout", "http_client": over, **more}
        )

    def http(self) -> httpx2.Client:
        return httpx2.Client(transport=self._client.sync_transport(), base_url="http://rollout")


class GatewayDoor:
    """Over HTTP."""

    name = "gateway"

    def __init__(self, url: str, key: str = "none") -> None:
        self.url, self._key = url, key

    def openai(self, **more: Any) -> OpenAI:  # noqa: ANN401
        return OpenAI(**{"api_key": self._key, "base_url": f"{self.url}/v1", **more})

    def async_openai(self, **more: Any) -> AsyncOpenAI:  # noqa: ANN401
        return AsyncOpenAI(**{"api_key": self._key, "base_url": f"{self.url}/v1", **more})

    def anthropic(self, **more: Any) -> Anthropic:  # noqa: ANN401
        return Anthropic(**{"api_key": self._key, "base_url": self.url, **more})

    def async_anthropic(self, **more: Any) -> AsyncAnthropic:  # noqa: ANN401
        return AsyncAnthropic(**{"api_key": self._key, "base_url": self.url, **more})

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


def ended(process: CommandProcess, limit_s: float = 60.0) -> int | None:
    """The exit code, or None while it still runs."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
