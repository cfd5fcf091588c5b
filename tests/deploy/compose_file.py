"""docker-compose.yml as a container engine would read it, with the paths of this machine in place of a container's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\$\$|\$\{([A-Z][A-Z0-9_]*)\}")


class Healthcheck(msgspec.Struct, forbid_unknown_fields=True):
    test: list[str]
    interval: str
    timeout: str
    retries: int
    start_period: str = "0s"


class Build(msgspec.Struct, forbid_unknown_fields=True):
    context: str
    dockerfile: str
    target: str | None = None


class Condition(msgspec.Struct, forbid_unknown_fields=True):
    condition: str


class Device(msgspec.Struct, forbid_unknown_fields=True):
    driver: str
    count: str | int
    capabilities: list[str]


class Reservations(msgspec.Struct, forbid_unknown_fields=True):
    devices: list[Device]


class Resources(msgspec.Struct, forbid_unknown_fields=True):
    reservations: Reservations


class Deploy(msgspec.Struct, forbid_unknown_fields=True):
    resources: Resources


class Service(msgspec.Struct, forbid_unknown_fields=True):
    """Those parts of the compose specification that the file uses, with their types."""

    image: str
    command: list[str]
    environment: dict[str, str | int]
    healthcheck: Healthcheck
    restart: str
    init: bool
    read_only: bool
    tmpfs: list[str]
    cap_drop: list[str]
    security_opt: list[str]
    stop_grace_period: str
    build: Build | None = None
    user: str | None = None
    ports: list[str] = []
    volumes: list[str] = []
    profiles: list[str] = []
    depends_on: dict[str, Condition] = {}
    shm_size: str | None = None
    ulimits: dict[str, int] = {}
    deploy: Deploy | None = None

    @property
    def env(self) -> dict[str, str]:
        """Its environment, all text."""
        return {name: str(value) for name, value in self.environment.items()}


class Compose(msgspec.Struct):
    name: str
    services: dict[str, Service]
    volumes: dict[str, None]


def template() -> str:
    return (ROOT / "docker-compose.yml").read_text()


def variables(text: str) -> set[str]:
    """Every `${NAME}`."""
    return {found[1] for found in VARIABLE.finditer(text) if found[1]}


def example() -> dict[str, str]:
    """What .env.example says."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    told = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {name: value for name, value in told}  # noqa: C416 - of lists of two


def compose(values: Mapping[str, str]) -> Compose:
    """The file with these values of its variables; raises ValidationError for a part that is none of ours."""

    def fill(found: re.Match[str]) -> str:
        return values[found[1]] if found[1] else "$"

    def filled(node: Any) -> Any:  # noqa: ANN401 - a tree of YAML
        if isinstance(node, str):
            return VARIABLE.sub(fill, node)
        if isinstance(node, list):
            return [filled(one) for one in node]  # pyright: ignore[reportUnknownVariableType]
        if isinstance(node, dict):
            return {name: filled(one) for name, one in node.items()}  # pyright: ignore[reportUnknownVariableType]
        return node

    return msgspec.convert(filled(yaml.safe_load(template())), Compose)
