"""What the compose file would start, started as processes: the same commands, users, order and health checks."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from producer_sdk import Client
from protocols.errors import RolloutError
from tests.deploy.compose_file import ROOT, Compose, Service, compose, example
from tests.servers import ServerKind, both_servers, free_port, server_binary

LIMIT_S = 240.0
PASSWORDS = {
    f"{name}_PASSWORD": f"{name.lower()}0" * 4
    for name in ("TRAINER", "WORKER", "OPERATOR", "VIEWER", "ADMIN")
}
CPU_WORKERS = ("worker-1", "worker-2")
KEYS = {"GATEWAY_KEYS": "user-key-of-16-letters", "GATEWAY_ADMIN_KEYS": "admin-key-of-16-letters"}
ROLLOUTQ = "import sys; from producer_sdk.cli import main; sys.exit(main())"


class Stack:
    """The services as processes; a container's paths are folders of the test."""

    def __init__(self, folder: Path, read: Compose, port: int) -> None:
        self.folder, self.read, self.port = folder, read, port
        self.gateway_port = free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start a service; what it depends on must be healthy, as it asks."""
        service = self.read.services[name]
        for needed, how in service.depends_on.items():
            assert how.condition == "service_healthy"
            assert self.healthy(needed), f"{needed} was to be healthy before {name}"
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                self._words(service, service.command),
                env=self._environment(name),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )

    def healthy(self, name: str) -> bool:
        """What its health check says, once."""
        service = self.read.services[name]
        kind, *words = service.healthcheck.test
        command = ["sh", "-c", words[0]] if kind == "CMD-SHELL" else self._words(service, words[1:])
        ended = subprocess.run(
            command,
            env=self._environment(name),
            cwd=self.folder,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return ended.returncode == 0

    def wait_healthy(self, name: str) -> None:
        give_up_at = time.monotonic() + LIMIT_S
        while not self.healthy(name):
            if self.running[name].poll() is not None or time.monotonic() > give_up_at:
                pytest.fail(f"{name} is not healthy:\n{self.log(name)}")
            time.sleep(0.1)

    def wait_for(self, name: str, text: str) -> None:
        give_up_at = time.monotonic() + LIMIT_S
        while text not in self.log(name):
            if self.running[name].poll() is not None or time.monotonic() > give_up_at:
                pytest.fail(f"{name} never said {text!r}:\n{self.log(name)}")
            time.sleep(0.1)

    def stop(self, name: str) -> int:
        """As `docker compose stop` does; the exit code."""
        process = self.running.pop(name)
        process.terminate()
        return process.wait(float(self.read.services[name].stop_grace_period.removesuffix("s")))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait(30)

    def url(self, user: str) -> str:
        name = user.rsplit("-")[-1].upper()
        return f"redis://{user}:{PASSWORDS[f'{name}_PASSWORD']}@127.0.0.1:{self.port}/0"

    def _words(self, service: Service, words: Sequence[str]) -> list[str]:
        told = [self._path(service, word) for word in words]
        return told if told[0] == "sh" else [sys.executable, "-P", "-c", ROLLOUTQ, *told]

    def _environment(self, name: str) -> Mapping[str, str]:
        service = self.read.services[name]
        kept = {name: text for name, text in os.environ.items() if not name.startswith("ROLLOUTQ_")}
        told = {name: self._path(service, value) for name, value in service.env.items()}
        told = {
            name: value.replace("@redis:6379", f"@127.0.0.1:{self.port}")
            for name, value in told.items()
        }
        if "REDIS_PORT" in told:
            told["REDIS_PORT"] = str(self.port)
        if name in CPU_WORKERS:  # by its host name a container's health check finds its worker
            told["ROLLOUTQ_WORKER_ID"] = name
        if "ROLLOUTQ_GATEWAY_PORT" in told:
            told["ROLLOUTQ_GATEWAY_PORT"] = str(self.gateway_port)
        return kept | {"PYTHONPATH": str(ROOT), **self._machine()} | told

    def _machine(self) -> dict[str, str]:
        """The server of this test comes first; what its start leaves goes with the test."""
        return {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "TMPDIR": str(self.folder)}

    def _path(self, service: Service, word: str) -> str:
        """A path in the container as one of this machine, by the service's volumes."""
        for volume in service.volumes:
            source, target, *_ = volume.split(":")
            if word == target or word.startswith(f"{target}/"):
                base = (
                    ROOT / source if source.startswith("./") else self.folder / f"volume-{source}"
                )
                base = Path(source) if source.startswith("/") else base
                base.mkdir(exist_ok=True)
                return str(base) + word.removeprefix(target)
        return word


@pytest.fixture
def server_kind() -> ServerKind:
    """The image's, unless a test is for both."""
    return "redis"


@pytest.fixture
def cpu() -> dict[str, str]:
    """What a test chooses for the CPU workers, where the example is not to be taken."""
    return {"CPU_ENGINE": "scripted"}


@pytest.fixture
def stack(tmp_path: Path, server_kind: ServerKind, cpu: dict[str, str]) -> Iterator[Stack]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/redis-server").symlink_to(server_binary(server_kind))
    (tmp_path / "models/tiny").mkdir(parents=True)
    chosen = {
        "GPU_ENGINE": "scripted",
        "GPUS": "0-1",
        "MODELS_DIR": str(tmp_path / "models"),
        "GPU_MODEL": "tiny",
        "REDIS_MAXMEMORY": "256mb",
    }
    with ExitStack() as ends:
        made = Stack(tmp_path, compose(example() | PASSWORDS | KEYS | chosen | cpu), free_port())
        ends.callback(made.kill)
        yield made


def command(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", ROLLOUTQ, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ROLLOUTQ_URL": url},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def wait_for_two(url: str, pool: str) -> None:
    """Return when a viewer sees two workers that serve."""
    give_up_at = time.monotonic() + LIMIT_S
    while (shown := command(url, "status", "--json", "--pool", pool)).stdout.count('"serving"') < 2:
        if time.monotonic() > give_up_at:
            pytest.fail(f"two workers of pool {pool} never served: {shown}")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_services_start_in_order_and_every_user_can_do_its_work(stack: Stack) -> None:
    stack.start("redis")
    stack.wait_healthy("redis")
    for name in ("worker-1", "worker-2", "gpu-worker"):
        stack.start(name)
    for name in ("worker-1", "worker-2", "gpu-worker"):
        stack.wait_healthy(name)
    for pool, prefix in (("default", ""), ("gpu", "gpu-")):
        body = {"messages": [{"role": "user", "content": "hello"}]}
        with Client(stack.url(f"{prefix}trainer"), pool=pool) as client:
            assert client.submit(body).result(timeout=60).status == "completed"
        wait_for_two(stack.url(f"{prefix}viewer"), pool)
        for verb in ("pause", "continue"):
            told = command(stack.url(f"{prefix}operator"), "control", verb, "--pool", pool)
            assert told.returncode == 0, told
    for name in ("worker-2", "worker-1", "gpu-worker", "redis"):
        assert stack.stop(name) == 0, stack.log(name)
    assert (stack.folder / "volume-redis").is_dir()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize("cpu", [{"CPU_THREADS": "1"}], ids=["as the example has it"])
def test_the_cpu_workers_answer_with_the_real_model(stack: Stack) -> None:
    chosen = [stack.read.services[name].env for name in CPU_WORKERS]
    assert {(env["ROLLOUTQ_ENGINE"], env["ROLLOUTQ_MODEL"]) for env in chosen} == {
        ("torch", "smollm2")
    }
    stack.start("redis")
    stack.wait_healthy("redis")
    for name in CPU_WORKERS:
        stack.start(name)
    for name in CPU_WORKERS:
        stack.wait_healthy(name)
        stack.wait_for(name, "serves pool")
    question = {"role": "user", "content": "What is the capital of France?"}
    with Client(stack.url("trainer")) as client:
        body = {"messages": [question], "max_tokens": 16, "temperature": 0}
        reply = client.submit(body).result(timeout=LIMIT_S)
        reply.raise_for_status()
    assert reply.worker in CPU_WORKERS
    assert "Paris" in reply.response["choices"][0]["message"]["content"]
    for name in (*reversed(CPU_WORKERS), "redis"):
        assert stack.stop(name) == 0, stack.log(name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_gateway_answers_with_the_rights_of_its_users(stack: Stack) -> None:
    stack.start("redis")
    stack.wait_healthy("redis")
    for name in ("worker-1", "gateway"):
        stack.start(name)
    stack.wait_for("worker-1", "serves pool")
    stack.wait_healthy("gateway")
    user, admin = ({"x-api-key": key} for key in KEYS.values())
    body = {"messages": [{"role": "user", "content": "hello"}]}
    with httpx2.Client(base_url=f"http://127.0.0.1:{stack.gateway_port}", timeout=60) as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 401
        answer = http.post("/v1/chat/completions", json=body, headers=user)
        assert answer.json()["choices"][0]["message"]["content"] == "hello"
        streamed = http.post("/v1/chat/completions", json=body | {"stream": True}, headers=user)
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert http.get("/v1/models", headers=user).json()["data"][0]["id"] == "scripted"
        assert http.post("/pause", headers=user).status_code == 403
        for verb in ("pause", "continue"):
            told = http.post(f"/{verb}", headers=admin)
            assert told.status_code == 200, told.text
    assert stack.stop("gateway") == 0, stack.log("gateway")
    assert not any(key in stack.log("gateway") for key in (*KEYS.values(), *PASSWORDS.values()))


@pytest.mark.slow
@pytest.mark.timeout(300)
@both_servers
def test_what_redis_was_told_is_there_after_it_has_been_started_again(stack: Stack) -> None:
    stack.start("redis")
    stack.wait_healthy("redis")
    stack.start("worker-1")
    stack.wait_for("worker-1", "serves pool")
    with Client(stack.url("trainer")) as client:
        reply = client.submit({"messages": [{"role": "user", "content": "kept"}]}, job_id="kept")
        assert reply.result(timeout=60).status == "completed"
    assert stack.stop("worker-1") == 0
    assert stack.stop("redis") == 0
    stack.start("redis")
    stack.wait_healthy("redis")
    with Client(stack.url("trainer")) as client:
        assert client.get("kept").result(timeout=60).status == "completed"


@pytest.mark.timeout(120)
def test_nobody_gets_in_without_a_password_or_into_another_pool(stack: Stack) -> None:
    stack.start("redis")
    stack.wait_healthy("redis")
    for url in (
        f"redis://127.0.0.1:{stack.port}/0",
        f"redis://worker:wrong@127.0.0.1:{stack.port}/0",
    ):
        ended = command(url, "status")
        assert ended.returncode != 0
    ended = command(stack.url("viewer"), "status", "--pool", "gpu")
    assert ended.returncode not in {0, 3} or "permission" in ended.stderr.lower(), ended
    with Client(stack.url("trainer"), pool="gpu") as client, pytest.raises(RolloutError):
        client.submit({"messages": [{"role": "user", "content": "x"}]}).result(timeout=30)


def test_redis_does_not_start_without_passwords(tmp_path: Path) -> None:
    server_binary("redis")
    empty = dict.fromkeys(PASSWORDS, "")
    ended = subprocess.run(
        ["sh", str(ROOT / "deploy/redis/start.sh"), "--dir", str(tmp_path)],
        env=os.environ | empty,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert "a password is empty" in ended.stderr
