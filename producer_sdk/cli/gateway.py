"""`rolloutq gateway`: the HTTP front of a pool, until Ctrl-C or SIGTERM."""

import importlib
from typing import Annotated

from cyclopts import Parameter

from producer_sdk.cli import GOOD, INTERRUPTED
from producer_sdk.cli.screen import say
from producer_sdk.cli.where import Where
from producer_sdk.client import Client
from protocols.errors import ConfigError


def gateway(
    *,
    host: str | None = None,
    port: int | None = None,
    timeout_s: float | None = None,
    grace_s: float | None = None,
    no_worker_s: Annotated[float | None, Parameter(env_var="ROLLOUTQ_NO_WORKER_S")] = None,
    where: Where = Where(),  # noqa: B008 - frozen
) -> int:
    """Answer OpenAI's and Anthropic's HTTP as jobs of a pool.

    Keys come from the environment: `ROLLOUTQ_GATEWAY_KEYS` may ask models, `ROLLOUTQ_GATEWAY_ADMIN_KEYS` may command
    workers as well. Without any, only this machine may ask. docs/gateway.md has routes and settings.

    Args:
        host: The address to listen at, 127.0.0.1; another one needs keys.
        port: The port, 8000.
        timeout_s: The deadline of a job whose request names none, 600.
        grace_s: How long open requests may go on after SIGTERM, 20.
        no_worker_s: How long requests wait for a pool that has no live worker, 60.
        where: Server and pool.
    """
    try:
        serving = importlib.import_module("producer_sdk.gateway.serve")
    except ImportError:
        raise ConfigError(
            "the gateway needs starlette and uvicorn: pip install 'rolloutq[gateway]'"
        ) from None
    from producer_sdk.gateway.settings import settings

    chosen = settings(host=host, port=port, timeout_s=timeout_s, grace_s=grace_s)
    control_url = chosen.control_url or where.url
    with (
        Client(where.url, pool=where.pool, no_worker_s=no_worker_s, on_full="raise") as client,
        Client(control_url, pool=where.pool) as control,
    ):
        listening = serving.bound(chosen)
        say(f"pool {where.pool} is at {serving.address_of(chosen)}")
        return INTERRUPTED if serving.serve(client, control, chosen, listening) else GOOD
