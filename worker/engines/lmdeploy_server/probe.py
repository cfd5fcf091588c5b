"""What a server is asked before it is used: how long its context is, and one token to see that all is in order."""

import asyncio
import logging
import re
import secrets
from typing import TYPE_CHECKING

from protocols.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from protocols.rollout_state import SampleParams

from .server import Away, Server
from .settings import Settings
from .wire import Ask, ask

if TYPE_CHECKING:
    from .local import LocalModel

_TOLD = re.compile(r"model context length \((\d+)\)")

log = logging.getLogger("rolloutq.engine")


async def context_of(server: Server, local: "LocalModel", settings: Settings) -> int:
    """Most tokens of prompt and response together: what the settings, the model and the server all allow."""
    known = [size for size in (settings.context_tokens, local.context_tokens) if size is not None]
    if not known:
        raise ConfigError(
            "the model does not tell its context; set --context-tokens", param="context-tokens"
        )
    wanted = min(known)
    # a prompt that fills the context is refused without work, with the context's true size in the refusal
    told = await _refusal(server, max(known), settings.first_token_limit_s)
    found = _TOLD.search(told)
    if found is None or int(found[1]) >= wanted:
        return wanted
    if settings.context_tokens is not None:
        raise ConfigError(
            f"--context-tokens: {wanted}, and the server's context (its --session-len) is {found[1]}",
            param="context-tokens",
        )
    log.info("the server's context is %s tokens, less than the model's %d", found[1], wanted)
    return int(found[1])


async def warm_up(server: Server, settings: Settings) -> None:
    """Let it draw a token with its log-probability; raises ConfigError where it cannot."""
    told = await _refusal(server, 1, settings.first_token_limit_s)
    if "logprobs_mode" in told:
        raise ConfigError(
            "--engine-url: the server tells no log-probabilities; start it with --logprobs-mode raw_logprobs",
            param="engine-url",
        )
    if told:
        raise ConfigError(f"--engine-url: {told}", param="engine-url")


async def _refusal(server: Server, prompt_tokens: int, limit_s: float) -> str:
    """What the server has against a prompt of so many tokens; empty where it would draw."""
    try:
        async with asyncio.timeout(limit_s), server.stream(_ask(prompt_tokens)) as answer:
            async for _ in answer:
                return ""
    except (ContextLengthExceeded, InvalidRequest) as error:
        return error.message
    except Away:
        raise ConfigError(
            "--engine-url: the server went away, or to sleep, while it was asked for a first token",
            param="engine-url",
        ) from None
    except TimeoutError:
        pass
    return "the server drew no token"


def _ask(prompt_tokens: int) -> Ask:
    session_id = 2**48 + secrets.randbelow(2**52)
    return ask(SampleParams(), session_id, [0] * prompt_tokens, 1, frozenset())
