"""The official clients of OpenAI and Anthropic over the queue, as they are, with settings that fit it.

A retry is the queue's, so they make none of their own; a time limit is always set, for it becomes the job's deadline.
"""

from typing import TYPE_CHECKING, Literal, overload

from producer_sdk.client import Client
from protocols.errors import ConfigError

if TYPE_CHECKING:
    import anthropic
    import openai

TIMEOUT_S = 600.0
BASE_URL = "http://rollout"
"""Leads nowhere: no name is looked up, and nothing is dialled."""
NO_KEY = "-"


@overload
def openai_client(
    client: Client, *, sync: Literal[False] = False, timeout_s: float = TIMEOUT_S
) -> "openai.AsyncOpenAI": ...
@overload
def openai_client(
    client: Client, *, sync: Literal[True], timeout_s: float = TIMEOUT_S
) -> "openai.OpenAI": ...
def openai_client(
    client: Client, *, sync: bool = False, timeout_s: float = TIMEOUT_S
) -> "openai.AsyncOpenAI | openai.OpenAI":
    """OpenAI's client over `client`, which stays open when this one is closed; it needs the package `openai`."""
    try:
        import httpx2
        import openai
    except ImportError:
        raise _missing("openai") from None
    url = f"{BASE_URL}/v1"
    if sync:
        over = httpx2.Client(transport=client.sync_transport())
        return openai.OpenAI(
            api_key=NO_KEY, base_url=url, max_retries=0, timeout=timeout_s, http_client=over
        )
    return openai.AsyncOpenAI(
        api_key=NO_KEY,
        base_url=url,
        max_retries=0,
        timeout=timeout_s,
        http_client=httpx2.AsyncClient(transport=client.transport()),
    )


@overload
def anthropic_client(
    client: Client, *, sync: Literal[False] = False, timeout_s: float = TIMEOUT_S
) -> "anthropic.AsyncAnthropic": ...
@overload
def anthropic_client(
    client: Client, *, sync: Literal[True], timeout_s: float = TIMEOUT_S
) -> "anthropic.Anthropic": ...
def anthropic_client(
    client: Client, *, sync: bool = False, timeout_s: float = TIMEOUT_S
) -> "anthropic.AsyncAnthropic | anthropic.Anthropic":
    """Anthropic's client over `client`, which stays open when this one is closed; it needs the package `anthropic`."""
    try:
        import anthropic
        import httpx2
    except ImportError:
        raise _missing("anthropic") from None
    if sync:
        over = httpx2.Client(transport=client.sync_transport())
        return anthropic.Anthropic(
            api_key=NO_KEY, base_url=BASE_URL, max_retries=0, timeout=timeout_s, http_client=over
        )
    return anthropic.AsyncAnthropic(
        api_key=NO_KEY,
        base_url=BASE_URL,
        max_retries=0,
        timeout=timeout_s,
        http_client=httpx2.AsyncClient(transport=client.transport()),
    )


def _missing(package: str) -> ConfigError:
    return ConfigError(f"this needs more: pip install 'rolloutq[transport]' {package}")
