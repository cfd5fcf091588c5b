"""`rolloutq gateway`: the HTTP front of a pool, until Ctrl-C or SIGTERM."""

import importlib
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from cyclopts import Parameter

from producer_sdk.cli import GOOD, INTERRUPTED, UNREACHABLE
from producer_sdk.cli.screen import say
from producer_sdk.cli.where import Where
from producer_sdk.client import Client
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from producer_sdk.gateway.settings import Settings

PROBE_S = 5.0


def gateway(
    *,
    host: str | None = None,
    port: int | None = None,
    timeout_s: float | None = None,
    grace_s: float | None = None,
    no_worker_s: Annotated[float | None, Parameter(env_var="ROLLOUTQ_NO_WORKER_S")] = None,
    probe: Literal["health", "ready"] | None = None,
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
        probe: Ask the gateway of this address instead: exit code 0 if it is alive, or would serve, else 3.
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
    if probe is not None:
        return _probed(chosen, probe)
    control_url = chosen.control_url or where.url
    with (
        Client(where.url, pool=where.pool, no_worker_s=no_worker_s, on_full="raise") as client,
        Client(control_url, pool=where.pool) as control,
    ):
        listening = serving.bound(chosen)
        say(f"pool {where.pool} is at {serving.address_of(chosen)}")
        return INTERRUPTED if serving.serve(client, control, chosen, listening) else GOOD


def _probed(chosen: "Settings", probe: str) -> int:
    """What the gateway says, told by the exit code; an address of all means this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(chosen.host, chosen.host)
    try:
        with build_opener(ProxyHandler({})).open(
            f"http://{host}:{chosen.port}/{probe}z", timeout=PROBE_S
        ):
            return GOOD
    except (URLError, OSError) as error:
        say(f"{probe}: {error}")
        return UNREACHABLE
