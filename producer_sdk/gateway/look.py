"""What a gateway says of itself and its pool: is it alive, would it serve, what is there."""

import asyncio
import time

from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse, PlainTextResponse, Response

from producer_sdk.client import Client
from producer_sdk.fleet import Fleet, no_live_worker
from producer_sdk.gateway.metrics import TEXT, Metrics
from producer_sdk.gateway.patience import Leaving
from protocols.errors import RolloutError, ServerUnavailable

LOOK_S = 3.0
HEALTH, READY = "health", "ready"
KEPT_S = 0.5
"""A look so old still holds, failed or not, so that many who ask cost Redis one question, and wait no longer."""
SHOWN = ("engine", "model", "state", "policy_version", "slots", "running_jobs", "ready")
"""Of each worker; hosts, processes and the rest are for `rolloutq status`."""


class Look:
    """The endpoints that only look."""

    def __init__(self, client: Client, metrics: Metrics, leaving: Leaving, address: str) -> None:
        """`address`: where this gateway listens."""
        self._client, self._metrics, self._leaving = client, metrics, leaving
        self._address = address
        self._turn = asyncio.Lock()
        self._seen: tuple[float, Fleet | RolloutError] | None = None

    async def healthz(self, _: Incoming) -> Response:
        """200 while the process and its link to Redis are alive."""
        try:
            await self._fleet()
        except RolloutError:
            return _no(HEALTH, "no answer from Redis")
        return JSONResponse({HEALTH: "ok"})

    async def readyz(self, _: Incoming) -> Response:
        """200 if a job sent now would be served: the gate is open, and a worker lives."""
        if self._leaving.begun:
            return _no(READY, "this gateway is shutting down")
        try:
            fleet = await self._fleet()
        except RolloutError:
            return _no(READY, "no answer from Redis")
        if fleet.gate != "open":
            return _no(READY, f"the gate of pool {fleet.pool} is {fleet.gate}; `continue` opens it")
        if not any(worker.get("state") == "serving" for worker in fleet.workers.values()):
            return _no(READY, no_live_worker(fleet.pool))
        return JSONResponse({READY: "ok"})

    async def metadata(self, _: Incoming) -> Response:
        """What is served here, by whom, and where this is."""
        fleet = await self._fleet()
        workers = {
            name: {field: told[field] for field in SHOWN if field in told}
            for name, told in sorted(fleet.workers.items())
        }
        return JSONResponse(
            {
                "address": self._address,
                "pool": fleet.pool,
                "gate": fleet.gate,
                "memory": fleet.memory,
                "policy_version": fleet.weights,
                "generation": fleet.generation,
                "waiting_jobs": fleet.waiting_jobs,
                "models": sorted(
                    {told["model"] for told in fleet.workers.values() if "model" in told}
                ),
                "workers": workers,
            }
        )

    async def metrics(self, _: Incoming) -> Response:
        """For Prometheus."""
        try:
            fleet = await self._fleet()
        except RolloutError:
            fleet = None
        return PlainTextResponse(self._metrics.page(fleet), media_type=TEXT)

    async def _fleet(self) -> Fleet:
        async with self._turn:
            if self._seen is None or time.monotonic() - self._seen[0] > KEPT_S:
                found = await self._look()
                self._seen = (time.monotonic(), found)
            seen = self._seen[1]
        if isinstance(seen, RolloutError):
            raise seen.with_traceback(None)  # of each who asks, not of all before
        return seen

    async def _look(self) -> Fleet | RolloutError:
        try:
            async with asyncio.timeout(LOOK_S):
                return await self._client.fleet()
        except TimeoutError:
            return ServerUnavailable("Redis does not answer", retry_after_s=1)
        except RolloutError as error:
            return error


def _no(question: str, why: str) -> Response:
    return JSONResponse({question: why}, status_code=503, headers={"retry-after": "1"})
