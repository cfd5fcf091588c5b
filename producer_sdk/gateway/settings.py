"""Where a gateway listens, who may ask it, and what it takes."""

import ipaddress
from typing import Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from protocols.errors import ConfigError

KEY_CHARS = 16
"""A shorter key can be guessed."""
PREFIX = "ROLLOUTQ_GATEWAY_"


class Settings(BaseSettings):
    """By flag, then by environment: `ROLLOUTQ_GATEWAY_KEYS` and so on."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    keys: SecretStr = SecretStr("")
    """Of role inference, between commas; from the environment alone, for flags show in `ps`."""
    admin_keys: SecretStr = SecretStr("")
    """Of role admin."""
    control_url: str | None = Field(None, repr=False)
    """Redis as a user who may command workers; without one, the URL of the jobs."""
    timeout_s: float = Field(600.0, gt=0, le=30 * 24 * 3600)
    """The deadline of a job whose request names none."""
    grace_s: float = Field(20.0, ge=0, le=3600)
    """How long open requests may go on after SIGTERM."""
    most_requests: int = Field(10_000, ge=1, le=1_000_000)
    """Requests open at once."""
    most_body_mb: int = Field(1024, ge=16)
    """Of the bodies of all open requests."""
    arrival_s: float = Field(30.0, gt=0)
    """Within which a head has to have arrived, and then its body."""

    @model_validator(mode="after")
    def _judge(self) -> Self:
        keys = [*split(self.keys), *split(self.admin_keys)]
        if any(len(key) < KEY_CHARS for key in keys):
            raise ValueError(
                f"keys: at least {KEY_CHARS} characters; `openssl rand -hex 32` makes one"
            )
        if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ValueError("keys: printable ASCII without blanks")
        if len(set(keys)) < len(keys):
            raise ValueError("keys: the same key stands there twice; a key has one role")
        if not keys and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is more than this machine, and whoever reaches it could ask: set "
                f"{PREFIX}KEYS and {PREFIX}ADMIN_KEYS, or listen on 127.0.0.1"
            )
        return self


def settings(**given: object) -> Settings:
    """Read them; raises ConfigError, which names the setting and never a key."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None


def split(keys: SecretStr) -> list[str]:
    """The keys that stand between commas."""
    return [key.strip() for key in keys.get_secret_value().split(",") if key.strip()]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
