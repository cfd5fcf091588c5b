"""What a user may set, and how long the engine waits for what."""

import msgspec
from pydantic import SecretStr


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one engine `lmdeploy-server`."""

    url: str
    """Of the api_server, without a user or password in it."""
    key: SecretStr | None = None
    """Sent as `Authorization: Bearer`; never shown."""
    model: str
    """A directory with the model's config.json and tokenizer: the one that the server serves."""
    served_name: str | None = None
    """What jobs call the model; None: the directory's name."""
    slots: int = 8
    """Samples that the server is asked for at once; further ones wait here."""
    context_tokens: int | None = None
    """Less than the server's own context; None: all of it."""
    policy_version: int = 0
    """Of the weights that the server holds."""
    start_limit_s: float = 900.0
    """Longest wait at the start for a server that loads its model."""
    away_limit_s: float = 120.0
    """Longest that a sample waits for a server that does not answer, or is asleep, before its attempt fails."""
    first_token_limit_s: float = 600.0
    """Longest wait for the first token: the server may have others before."""
    stall_limit_s: float = 120.0
    """Longest wait between two tokens."""
    order_limit_s: float = 100.0
    """Longest that the server may take to move its weights."""
    abort_limit_s: float = 5.0
    """Longest wait until an ended sample's request is aborted; then its connection is closed."""
    ask_limit_s: float = 10.0
    """Longest wait for any other answer."""
