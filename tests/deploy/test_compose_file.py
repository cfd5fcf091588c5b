"""The compose file, the images and the settings fit together; no container engine is needed to see it."""

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import App

from producer_sdk.cli.gateway import gateway
from producer_sdk.gateway.settings import settings
from protocols.errors import ConfigError
from tests.deploy.compose_file import ROOT, Compose, compose, example, template, variables
from worker.config import Config

PASSWORDS = {f"{name}_PASSWORD" for name in ("TRAINER", "WORKER", "OPERATOR", "VIEWER", "ADMIN")}
GATEWAY_KEYS = {"GATEWAY_KEYS", "GATEWAY_ADMIN_KEYS"}
WORKERS = ("worker-1", "worker-2", "gpu-worker")


@pytest.fixture
def read() -> Compose:
    keys = {name: f"p4ssw0rd-of-{name}" for name in GATEWAY_KEYS}
    return compose(example() | dict.fromkeys(PASSWORDS, "p4ssw0rd") | keys)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    for name in Config.model_fields:
        monkeypatch.delenv(f"ROLLOUTQ_{name.upper()}", raising=False)


def test_it_has_redis_two_cpu_workers_a_gateway_and_gpu_workers_by_a_profile(read: Compose) -> None:
    assert list(read.services) == ["redis", "worker-1", "worker-2", "gateway", "gpu-worker"]
    assert {name: one.profiles for name, one in read.services.items() if one.profiles} == {
        "gpu-worker": ["gpu"]
    }
    gpus = read.services["gpu-worker"].deploy
    assert gpus is not None
    assert gpus.resources.reservations.devices[0].capabilities == ["gpu"]


def test_every_variable_is_in_the_example_and_every_one_there_is_used() -> None:
    assert variables(template()) == set(example())
    assert {name for name, value in example().items() if not value} == PASSWORDS | GATEWAY_KEYS


def test_no_secret_is_in_a_command_or_in_the_example(read: Compose) -> None:
    for service in read.services.values():
        assert "p4ssw0rd" not in " ".join([*service.command, *service.healthcheck.test])
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_redis_keeps_its_data_and_evicts_nothing(read: Compose) -> None:
    start = (ROOT / "deploy/redis/start.sh").read_text()
    for option in ("--appendonly yes", "--maxmemory-policy noeviction", "--aclfile"):
        assert option in start
    assert read.services["redis"].command[-4::2] == ["--dir", "--maxmemory"]
    assert "redis:/data" in read.services["redis"].volumes
    assert read.services["redis"].ports == ["127.0.0.1:6379:6379"]


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_s_command_and_healthcheck_are_what_the_command_line_takes(
    read: Compose, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = read.services[name]
    command, (kind, program, *probe) = service.command, service.healthcheck.test
    assert (command[0], kind, program, probe[0]) == ("worker", "CMD", "rolloutq", "worker")
    for variable, value in service.env.items():
        monkeypatch.setenv(variable, value.replace("/models/Qwen3-8B", str(tmp_path)))
    serving = Config.from_command(command[1:])
    assert serving.url.startswith(("redis://worker:", "redis://gpu-worker:"))
    assert serving.probe is None
    assert Config.from_command(probe[1:]).probe == "health"
    assert (serving.gpus, serving.tp) == (
        ("", 1) if serving.pool == "default" else ("0-7", serving.tp)
    )


def test_the_gateway_s_command_and_settings_are_what_it_takes(
    read: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = read.services["gateway"]
    for variable, value in service.env.items():
        monkeypatch.setenv(variable, value)
    app = App(name="rolloutq")
    app.command(gateway)
    for words in (service.command, service.healthcheck.test[2:]):
        app.parse_args(words, exit_on_error=False, print_error=False)
    chosen = settings(grace_s=float(service.command[-1]))
    assert (chosen.host, chosen.port) == ("0.0.0.0", 8000)
    assert float(service.stop_grace_period.removesuffix("s")) >= chosen.grace_s + 10
    assert service.env["ROLLOUTQ_URL"].startswith("redis://trainer:")
    assert service.env["ROLLOUTQ_GATEWAY_CONTROL_URL"].startswith("redis://operator:")
    assert service.ports == ["127.0.0.1:8000:8000"]
    for key in GATEWAY_KEYS:
        monkeypatch.setenv(f"ROLLOUTQ_{key}", "")
    with pytest.raises(ConfigError, match="ROLLOUTQ_GATEWAY_KEYS"):
        settings()


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_waits_for_redis_and_has_time_to_drain(read: Compose, name: str) -> None:
    service = read.services[name]
    assert service.depends_on["redis"].condition == "service_healthy"
    grace_s = float(service.command[service.command.index("--grace-s") + 1])
    assert float(service.stop_grace_period.removesuffix("s")) >= grace_s + 10


def test_every_service_runs_without_rights_it_does_not_need(read: Compose) -> None:
    for name, service in read.services.items():
        assert service.cap_drop == ["ALL"]
        assert service.security_opt == ["no-new-privileges:true"]
        assert service.user == "redis" or service.build is not None, name
        if service.build is not None:
            assert "\nUSER rolloutq\n" in (ROOT / service.build.dockerfile).read_text()


def test_every_path_exists_and_every_volume_is_declared(read: Compose) -> None:
    for service in read.services.values():
        for volume in service.volumes:
            source, target, *_ = volume.split(":")
            assert target.startswith("/")
            if source.startswith("./deploy"):
                assert (ROOT / source).exists()
            elif not source.startswith("."):
                assert source in read.volumes
        if service.build is not None:
            assert (ROOT / service.build.context / service.build.dockerfile).is_file()
    assert (ROOT / "deploy/redis/start.sh").is_file()
    used = {
        volume.split(":")[0] for service in read.services.values() for volume in service.volumes
    }
    assert set(read.volumes) <= used


def test_images_are_pinned_and_copy_what_is_there() -> None:
    ignored = (ROOT / ".dockerignore").read_text()
    for path in (ROOT / "deploy/Dockerfile", ROOT / "deploy/Dockerfile.lmdeploy"):
        text = path.read_text()
        stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
        for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            assert image in stages or re.search(r":\d+\.\d+\.\d+", image), image
        for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
            for source in shlex.split(line)[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}\n" in ignored, source
    assert re.search(r":\d+\.\d+\.\d+", compose(example()).services["redis"].image)


@pytest.mark.parametrize("name", ["worker-1", "gateway"])
def test_the_stage_that_compose_asks_for_is_there(read: Compose, name: str) -> None:
    build = read.services[name].build
    assert build is not None
    assert f"AS {build.target}\n" in (ROOT / build.dockerfile).read_text()


def test_lmdeploy_is_the_version_that_the_engine_takes() -> None:
    pinned = "lmdeploy==0.18.0"
    assert pinned in (ROOT / "deploy/Dockerfile.lmdeploy").read_text()
    assert f'"{pinned}"]' in (ROOT / "pyproject.toml").read_text()
