"""The connection to an api_server. Orders have connections of their own: they never queue behind generation."""

import asyncio
import logging
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx2
import msgspec

from protocols.errors import ConfigError, EngineFailed

from .settings import Settings
from .wire import Ask, error_of, events, message_of

CONNECT_LIMIT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
ERROR_BYTES = 64 * 1024
"""So much of an error's body is read."""

log = logging.getLogger("rolloutq.engine")


class Away(Exception):
    """The server does not answer, or is asleep: it took nothing of this request."""


class _Card(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Card]


class _Sleeping(msgspec.Struct, frozen=True):
    is_sleeping: bool


_Answer = TypeVar("_Answer", _Models, _Sleeping)


class Server:
    """One api_server; belongs to the event loop in which it is first used."""

    def __init__(
        self, settings: Settings, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self._settings = settings
        # a stream's waits are limited by its reader, the number of streams by the engine's slots
        self._drawing = _client(settings, httpx2.Timeout(None, connect=CONNECT_LIMIT_S), transport)
        ask = httpx2.Timeout(settings.ask_limit_s, connect=CONNECT_LIMIT_S)
        self._ordering = _client(settings, ask, transport)
        self._up = False
        self._one_looks = asyncio.Lock()
        self._aborts = True

    async def close(self) -> None:
        """Close every connection."""
        await self._drawing.aclose()
        await self._ordering.aclose()

    async def wait_until_up(self, limit_s: float) -> None:
        """Return when the server would generate; raises EngineFailed after `limit_s`."""
        try:
            async with asyncio.timeout(limit_s), self._one_looks:
                pause_s = FIRST_PAUSE_S
                while not self._up:
                    self._up = await self._would_generate()
                    if not self._up:
                        await asyncio.sleep(random.uniform(pause_s / 2, pause_s))
                        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            raise EngineFailed(
                f"the engine's server has not answered, or has slept, for {limit_s:g} s; try again"
            ) from None

    async def wait_until_healthy(self, limit_s: float) -> None:
        """Return when it has loaded its model, asleep or not; raises ConfigError after `limit_s`."""
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(limit_s):
                while not await self._healthy():
                    await asyncio.sleep(random.uniform(pause_s / 2, pause_s))
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            raise ConfigError(
                f"--engine-url: no healthy server there within {limit_s:g} s; start `lmdeploy serve api_server`, or "
                "name the right one",
                param="engine-url",
            ) from None

    async def models(self) -> list[str]:
        """The names that it serves."""
        return [card.id for card in (await self._get("/v1/models", _Models)).data]

    async def asleep(self) -> bool:
        """Whether its weights are off the device."""
        return (await self._get("/is_sleeping", _Sleeping)).is_sleeping

    async def sleep(self) -> None:
        """Free the device's memory; the weights stay in its host's."""
        self._up = False
        await self._order("/sleep", {"level": "1"})

    async def wake(self) -> None:
        """Take the memory again, weights and cache."""
        await self._order("/wakeup", {})

    async def abort(self, session_id: int) -> None:
        """End a request by its session, if the server can; no error where it is not there any more."""
        if not self._aborts:
            return
        try:
            answer = await self._ordering.post("/abort_request", json={"session_id": session_id})
        except httpx2.HTTPError:
            return  # its connection is closed next
        if answer.status_code == 501:
            self._aborts = False
            log.warning(
                "the server cannot abort requests, so ended samples are known to it by their closed connections only; "
                "start it with --enable-abort-handling"
            )

    @asynccontextmanager
    async def stream(self, body: Ask) -> AsyncGenerator[AsyncIterator[bytes]]:
        """The events of an answer under way.

        Raises Away where the server took nothing of the request, RequestError where it refuses it, EngineFailed where
        anything else broke, within the block too.
        """
        request = self._drawing.build_request(
            "POST",
            "/generate",
            content=msgspec.json.encode(body),
            headers={"Content-Type": "application/json"},
        )
        try:
            response = await self._drawing.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            self._up = False
            raise Away from None
        except httpx2.HTTPError as error:
            raise _broken(error) from None
        try:
            await self._check(response)
            yield events(response.aiter_bytes())
        except httpx2.HTTPError as error:
            raise _broken(error) from None
        finally:
            await response.aclose()

    async def _check(self, response: httpx2.Response) -> None:
        if response.status_code == 200:
            return
        if response.status_code == 503:
            self._up = False
            raise Away
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > ERROR_BYTES:
                break
        raise error_of(response.status_code, message_of(body))

    async def _would_generate(self) -> bool:
        try:
            return await self._healthy() and not await self.asleep()
        except EngineFailed as error:
            log.warning("%s", error.message)
            return False

    async def _healthy(self) -> bool:
        try:
            answer = await self._ordering.get("/health")
        except httpx2.HTTPError:
            return False
        return answer.status_code == 200

    async def _get(self, path: str, kind: type[_Answer]) -> _Answer:
        try:
            answer = await self._ordering.get(path)
        except httpx2.HTTPError as error:
            raise _broken(error) from None
        if answer.status_code != 200:
            raise error_of(answer.status_code, message_of(answer.content))
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.MsgspecError as error:
            raise EngineFailed(f"the server's answer to {path} is garbled: {error}") from None

    async def _order(self, path: str, query: Mapping[str, str]) -> None:
        limit_s = self._settings.order_limit_s
        try:
            answer = await self._ordering.post(path, params=query, json={}, timeout=limit_s)
        except httpx2.HTTPError as error:
            raise _broken(error) from None
        if answer.status_code != 200:
            raise error_of(answer.status_code, message_of(answer.content))


def _client(
    settings: Settings, timeout: httpx2.Timeout, transport: httpx2.AsyncBaseTransport | None
) -> httpx2.AsyncClient:
    key = settings.key
    return httpx2.AsyncClient(
        base_url=settings.url,
        headers={} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
        timeout=timeout,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
        verify=ssl.create_default_context() if settings.url.startswith("https") else True,
        trust_env=False,  # neither a proxy nor a netrc file of this machine comes between
        transport=transport,
    )


def _broken(error: httpx2.HTTPError) -> EngineFailed:
    # only the kind: its text may name addresses
    return EngineFailed(f"the connection to the engine's server broke: {type(error).__name__}")
