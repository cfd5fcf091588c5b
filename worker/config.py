"""A worker's settings: flags of `rolloutq worker`, then `ROLLOUTQ_*` of the environment, then these defaults."""

import os
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliSuppress,
    SettingsConfigDict,
    SettingsError,
)

from protocols.errors import ConfigError, without_login
from protocols.queue.keys import Keys
from protocols.queue.link import check_url

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _default_id() -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(2)}"


class Config(BaseSettings):
    """Take jobs from a pool and generate, until SIGTERM."""

    model_config = SettingsConfigDict(
        env_prefix="ROLLOUTQ_",
        cli_prog_name="rolloutq worker",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        cli_exit_on_error=False,
    )

    probe: Literal["health", "ready"] | None = Field(
        default=None,
        description="serve nothing: tell whether the worker of --worker-id is healthy, or ready, "
        "and exit with 0 or 1",
    )
    url: str = Field(default="redis://localhost:6379/0", description="the Redis server", repr=False)
    pool: str = Field(default="default", description="the pool to serve")
    engine: Literal["torch", "lmdeploy", "lmdeploy-server", "scripted"] = Field(
        default="torch", description="what generates"
    )
    model: str = Field(
        default="smollm2", description="a directory in Hugging Face's layout, or smollm2"
    )
    served_model: str | None = Field(
        default=None, description="the name that a body's `model` may give"
    )
    worker_id: str = Field(default_factory=_default_id, description="unique in the pool")
    slots: int = Field(
        default=8, ge=1, le=1024, description="jobs, and samples of the engine, at once"
    )
    lease_s: float = Field(
        default=15.0, ge=0.3, le=3600, description="a silent worker's jobs are reclaimed after it"
    )
    checkpoint_tokens: int = Field(
        default=64, ge=1, le=10**6, description="so many new tokens of a job are kept on the server"
    )
    checkpoint_s: float = Field(
        default=2.0,
        ge=0.01,
        le=3600,
        description="new tokens are kept there after it at the latest",
    )
    grace_s: float = Field(
        default=10.0, ge=0, le=3600, description="after SIGTERM, time for jobs to end"
    )
    crash_limit: int = Field(
        default=3, ge=1, le=100, description="deaths in a row that make a dead letter"
    )
    fail_limit: int = Field(default=5, ge=1, le=100, description="failures that make a dead letter")
    backoff_s: float = Field(
        default=1.0, ge=0, le=60, description="first wait after a failure, doubled each time"
    )
    policy_version: int = Field(
        default=0, ge=0, description="of the weights that the worker starts with"
    )
    context_tokens: int | None = Field(
        default=None, ge=16, description="less than the model's own context"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="torch: of weights and KV"
    )
    device: str = Field(default="cpu", description="torch: cpu or cuda")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="torch: CPU threads; default all cores"
    )
    kv_memory_bytes: int = Field(
        default=4 * 1024**3, ge=2**20, description="torch: most memory for KV"
    )
    backend: Literal["pytorch", "turbomind"] = Field(
        default="pytorch", description="lmdeploy: its engine"
    )
    tp: int = Field(default=1, ge=1, le=1024, description="lmdeploy: GPUs that share each layer")
    ep: int = Field(default=1, ge=1, le=1024, description="lmdeploy: GPUs that share the experts")
    cache_ratio: float = Field(
        default=0.8, gt=0, lt=1, description="lmdeploy: share of the free GPU memory for KV"
    )
    prefix_caching: bool = Field(
        default=True, description="torch, lmdeploy: keep the KV of common beginnings"
    )
    routed_experts: bool = Field(
        default=False, description="lmdeploy: let jobs ask which experts each position went to"
    )
    gpus: str = Field(
        default="", description="as 0-7: one worker process for each --tp of these GPUs"
    )
    engine_url: str | None = Field(
        default=None, description="lmdeploy-server: the api_server, as http://gpu-1:23333"
    )
    engine_key: CliSuppress[SecretStr | None] = Field(
        default=None, description="lmdeploy-server: its API key; ROLLOUTQ_ENGINE_KEY, not a flag"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("url")
    @classmethod
    def _is_redis_url(cls, url: str) -> str:
        return _checked(url, check_url)

    @field_validator("engine_url")
    @classmethod
    def _is_http_url(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "http://none")
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username:
            raise ValueError("http://host:port or https://host:port, without a user or password")
        return url

    @field_validator("pool")
    @classmethod
    def _is_pool(cls, pool: str) -> str:
        return _checked(pool, Keys)

    @field_validator("worker_id")
    @classmethod
    def _is_id(cls, worker_id: str) -> str:
        if not _ID.fullmatch(worker_id):
            raise ValueError("1 to 64 of A-Z a-z 0-9 . _ -")
        return worker_id

    @field_validator("model")
    @classmethod
    def _is_model(cls, model: str, info: ValidationInfo) -> str:
        if info.data.get("probe"):
            return model
        if model != "smollm2" and ("/" in model or "\\" in model) and not Path(model).is_dir():
            raise ValueError(f"no directory {model}")
        return model

    @classmethod
    def from_command(cls, argv: list[str]) -> Self:
        """From flags and environment; raises ConfigError that names the flag."""
        try:
            source = CliSettingsSource[Config](cls, cli_parse_args=argv)
            return cls(_cli_settings_source=source)  # pyright: ignore[reportCallIssue]
        except ValidationError as error:
            problems = [
                f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise ConfigError("; ".join(problems)) from None
        except SettingsError as error:
            raise ConfigError(f"{without_login(str(error))}; see rolloutq worker --help") from None


def _checked(value: str, check: Callable[[str], object]) -> str:
    try:
        check(value)
    except ConfigError as error:
        raise ValueError(error.message) from None
    return value
