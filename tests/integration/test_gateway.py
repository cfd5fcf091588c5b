"""A gateway as a process: its address, keys, limits, views and commands, its end, and a second one beside it."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from producer_sdk import Client
from tests.command import Rolloutq
from tests.http_door import GatewayDoor, GatewayProcess
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import StartServer

LIMIT_S = 60
HELLO: Any = [{"role": "user", "content": "hello"}]
BODY: dict[str, Any] = {"messages": HELLO}
SLOW: dict[str, Any] = BODY | {"rollout": {"script": {"text": "x" * 3000, "ms_per_token": 20}}}
CLAUDE: dict[str, Any] = {"messages": HELLO, "max_tokens": 9}
USER, ADMIN = "user-key-of-16-and-more", "admin-key-of-16-and-more"
KEYS = {
    "ROLLOUTQ_GATEWAY_KEYS": f"other-key-of-16-more,{USER}",
    "ROLLOUTQ_GATEWAY_ADMIN_KEYS": ADMIN,
}

StartGateway = Callable[..., GatewayProcess]


@pytest.fixture
def start_gateway(url: str, pool: str, tmp_path: Path) -> Iterator[StartGateway]:
    """Start gateways of the test's pool; they are killed when it ends, and a failed test shows their output."""
    started: list[GatewayProcess] = []

    def start(*flags: str, at: str = url, wait: bool = True, **environment: str) -> GatewayProcess:
        folder = tmp_path / f"gateway-{len(started)}"
        folder.mkdir()
        started.append(GatewayProcess(folder, at, pool, *flags, environment=environment))
        if wait:
            started[-1].wait_ready()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        print(f"--- gateway\n{process.output}")  # noqa: T201 - pytest shows it


def http(gateway: GatewayProcess, key: str = "", **headers: str) -> httpx2.Client:
    told = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(base_url=gateway.url, headers=told | headers, timeout=LIMIT_S)


# where it listens


def test_a_port_that_is_taken_is_said_and_not_replaced(rolloutq: Rolloutq) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = rolloutq("gateway", "--port", str(port))
    assert ran.code == 2
    assert f"port {port} on 127.0.0.1 cannot be had" in ran.err


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_strangers_are_not_let_in_without_keys(rolloutq: Rolloutq, host: str) -> None:
    ran = rolloutq("gateway", "--host", host)
    assert ran.code == 2
    assert "ROLLOUTQ_GATEWAY_KEYS" in ran.err


@pytest.mark.parametrize(
    "words", [["--port", "0"], ["--port", "70000"], ["--host", "no.such.host.invalid"]]
)
def test_an_address_that_is_none_is_a_matter_of_usage(
    rolloutq: Rolloutq, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUTQ_GATEWAY_KEYS", USER)
    assert rolloutq("gateway", *words).code == 2


def test_a_gateway_without_a_redis_says_so_and_lives(start_gateway: StartGateway) -> None:
    gateway = start_gateway("--no-worker-s", "1", at="redis://127.0.0.1:1/0", wait=False)
    gateway.wait_for("is at http://")
    with http(gateway) as ask:
        assert ask.get("/healthz").status_code == ask.get("/readyz").status_code == 503
        refused = ask.post("/v1/messages", json=CLAUDE)
        assert "rolloutq_gateway_redis_up 0" in ask.get("/metrics").text
    assert refused.status_code == 529
    assert refused.json()["error"]["type"] == "overloaded_error"


# who may ask


def test_keys_open_what_they_are_for(serve: Serve, start_gateway: StartGateway) -> None:
    serve()
    gateway = start_gateway(**KEYS)
    with http(gateway) as stranger, http(gateway, USER) as user, http(gateway, ADMIN) as admin:
        assert stranger.get("/healthz").status_code == stranger.get("/readyz").status_code == 200
        for path in ("/v1/models", "/metadata", "/metrics", "/nothing"):
            assert stranger.get(path).status_code == 401
        assert user.get("/v1/models").status_code == admin.get("/v1/models").status_code == 200
        assert user.post("/pause").status_code == 403
        assert user.post("/v1/chat/completions", json=BODY).status_code == 200
        assert admin.post("/v1/chat/completions", json=BODY).status_code == 200
        assert admin.post("/pause").status_code == admin.post("/continue").status_code == 200


def test_a_named_job_is_told_to_whoever_sends_its_very_body_and_nothing_of_it_to_others(
    serve: Serve, start_gateway: StartGateway
) -> None:
    serve()
    gateway = start_gateway(**KEYS)
    with http(gateway, USER) as one, http(gateway, "other-key-of-16-more") as other:

        def ask(who: httpx2.Client, said: str, **headers: str) -> httpx2.Response:
            body = {"messages": [{"role": "user", "content": said}]}
            return who.post("/v1/chat/completions", json=body, headers=headers)

        named = {"x-rollout-job-id": "mine"}
        first = ask(one, "the secret", **named)
        assert ask(other, "the secret", **named).content == first.content
        refused = ask(other, "another body", **named)
        assert (refused.status_code, "secret" in refused.text) == (409, False)
        key = {"idempotency-key": "1"}
        ids = {ask(who, "hello", **key).headers["x-request-id"] for who in (one, one, other)}
        assert len(ids) == 2


def test_a_missing_key_is_told_in_the_shape_of_the_route(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**KEYS)
    with http(gateway, "wrong-key-of-16-letters") as ask:
        chat, claude = (
            ask.post("/v1/chat/completions", json=BODY),
            ask.post("/v1/messages", json=CLAUDE),
        )
    assert chat.json()["error"]["code"] == "invalid_api_key"
    assert claude.json()["error"]["type"] == "authentication_error"
    assert chat.headers["x-request-id"] == chat.headers["request-id"]
    made = GatewayDoor(gateway.url, "wrong-key-of-16-letters").openai()
    with made, pytest.raises(openai.AuthenticationError):
        made.models.list()


def test_a_web_page_may_not_ask_a_gateway_without_keys(start_gateway: StartGateway) -> None:
    with http(start_gateway(), origin="https://example.org") as page:
        assert page.post("/shutdown", content=b"{}").status_code == 403
        assert page.get("/metadata").status_code == 403


def test_no_key_is_in_anything_that_is_said(start_gateway: StartGateway) -> None:
    gateway = start_gateway(**KEYS)
    with http(gateway, USER) as user:
        said = [user.get(path).text for path in ("/metadata", "/metrics", "/nothing", "/readyz")]
        said += [user.post("/pause").text]
    gateway.signal(signal.SIGTERM)
    assert gateway.wait() == 0
    assert not any(key in text for key in (USER, ADMIN) for text in (*said, gateway.output))


# what it says of itself


def test_ready_is_whether_it_would_serve(
    serve: Serve, start_gateway: StartGateway, client: Client, look: Look
) -> None:
    gateway = start_gateway()
    with http(gateway) as ask:
        unready = ask.get("/readyz")
        assert (unready.status_code, "no live worker" in unready.json()["ready"]) == (503, True)
        assert ask.get("/healthz").status_code == 200
        serve()
        wait_until(lambda: ask.get("/readyz").status_code == 200, "it is ready")
        assert client.control("pause").result(LIMIT_S)
        wait_until(lambda: "closed" in ask.get("/readyz").text, "the gate is closed")
        assert ask.get("/readyz").status_code == 503
        assert ask.get("/healthz").json() == {"health": "ok"}


def test_metadata_says_where_it_is_and_what_is_served_and_no_secret(
    serve: Serve, start_gateway: StartGateway, pool: str
) -> None:
    worker = serve()
    gateway = start_gateway()
    with http(gateway) as ask:
        told = ask.get("/metadata").json()
    assert told["address"] == gateway.url
    assert (told["pool"], told["gate"], told["models"]) == (pool, "open", ["scripted"])
    assert told["workers"][worker.worker_id]["state"] == "serving"
    assert not {"host", "pid", "url", "keys"} & set(told["workers"][worker.worker_id])


def test_metrics_count_requests_by_route_and_status(
    serve: Serve, start_gateway: StartGateway
) -> None:
    serve()
    with http(start_gateway()) as ask:
        for _ in range(3):
            assert ask.post("/v1/chat/completions", json=BODY).status_code == 200
        ask.post("/v1/chat/completions", json={})
        ask.get("/somebody/typed/this")
        page = ask.get("/metrics").text
    for line in (
        'rolloutq_gateway_requests_total{route="/v1/chat/completions",status="200"} 3',
        'rolloutq_gateway_requests_total{route="/v1/chat/completions",status="400"} 1',
        'rolloutq_gateway_requests_total{route="other",status="404"} 1',
        'rolloutq_gateway_request_seconds_count{route="/v1/chat/completions"} 4',
        "rolloutq_gateway_open_requests 1",
        "rolloutq_gateway_open_body_bytes 0",
        "rolloutq_gateway_redis_up 1",
        "rolloutq_live_workers 1",
        "rolloutq_gate_open 1",
    ):
        assert f"{line}\n" in page, line
    assert "typed" not in page


# commands


def test_commands_are_answered_per_worker_and_refused_with_the_right_order(
    serve: Serve, start_gateway: StartGateway
) -> None:
    workers = {serve().worker_id, serve().worker_id}
    with http(start_gateway()) as ask:
        refused = ask.post("/offload")
        assert refused.status_code == 409
        assert "pause" in refused.json()["error"]["message"]
        for verb, body in (
            ("pause", {"mode": "drain"}),
            ("offload", {"level": 1}),
            ("onload", {}),
            ("continue", None),
        ):
            answer = ask.post(f"/{verb}", json=body) if body is not None else ask.post(f"/{verb}")
            assert answer.status_code == 200, answer.text
            acks = answer.json()["workers"]
            assert set(acks) == workers
            assert {ack["result"] for ack in acks.values()} == {"applied"}
        assert ask.post("/pause", json={"mode": "gently"}).status_code == 400
        assert ask.post("/pause", content=b"[1]").status_code == 400
        assert ask.post("/pause", json={"wait_s": "long"}).json()["error"]["param"] == "wait_s"
        assert ask.get("/pause").status_code == 405


def test_shutdown_ends_the_workers_and_not_the_gateway(
    serve: Serve, start_gateway: StartGateway
) -> None:
    worker = serve()
    with http(start_gateway()) as ask:
        assert ask.post("/shutdown", json={"worker": worker.worker_id}).status_code == 200
        assert worker.wait() == 0
        assert ask.get("/healthz").status_code == 200


# what is too much


def test_a_pool_without_a_worker_is_a_503_a_529_and_no_job_is_left(
    start_gateway: StartGateway, broker: object, look: Look
) -> None:
    with http(start_gateway("--no-worker-s", "1")) as ask:
        chat = ask.post("/v1/chat/completions", json=BODY)
        claude = ask.post("/v1/messages", json=CLAUDE)
    assert (chat.status_code, claude.status_code) == (503, 529)
    assert chat.json()["error"]["code"] == "overloaded"
    assert all(answer.headers["retry-after"] == "1" for answer in (chat, claude))
    wait_until(lambda: not look.left(), "both jobs are cancelled")


def test_a_full_backlog_is_a_429_that_says_when(
    start_gateway: StartGateway, broker: object, look: Look, client: Client
) -> None:
    look("HSET", look.keys.prefix, "backlog", 1)
    first = client.submit(BODY)
    wait_until(lambda: look.reply(first.job_id), "the first is in the queue")
    with http(start_gateway()) as ask:
        chat = ask.post("/v1/chat/completions", json=BODY)
        claude = ask.post("/v1/messages", json=CLAUDE)
    assert chat.status_code == claude.status_code == 429
    assert chat.json()["error"]["code"] == "rate_limit_exceeded"
    assert claude.json()["error"]["type"] == "rate_limit_error"
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in (chat, claude))
    assert "x-should-retry" not in chat.headers


def test_a_body_is_refused_while_it_arrives(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    sent_bytes = 0
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=LIMIT_S) as wire:
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        wire.setblocking(False)
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        answer = b""
        while not answer and sent_bytes < 64 * len(chunk):
            wire.settimeout(LIMIT_S)
            wire.sendall(chunk)
            sent_bytes += len(chunk)
            wire.settimeout(0.02)
            try:
                answer = wire.recv(65_536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent_bytes < 40 * len(chunk)


def test_heads_that_are_too_long_are_refused(start_gateway: StartGateway) -> None:
    with http(start_gateway()) as ask:
        assert ask.post(f"/v1/messages?{'x' * 5000}", json=CLAUDE).json()["type"] == "error"
        assert ask.get("/metadata", headers={"x": "y" * 40_000}).status_code == 431
        assert ask.get("/metadata", headers={"x": "y" * 100_000}).status_code in (400, 431)


def wired(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=LIMIT_S)


def status_over(wire: socket.socket, sent: bytes) -> int:
    """The status of the answer to what is sent; the answer is read to its end."""
    wire.sendall(sent)
    with HTTPResponse(wire) as answer:
        answer.begin()
        answer.read()
        return answer.status


def dripped(wire: socket.socket) -> bytes:
    """All that comes back while a byte is sent now and then, until the other side closes."""
    answer = b""
    wire.settimeout(0.2)
    give_up_s = time.monotonic() + LIMIT_S
    while time.monotonic() < give_up_s:
        try:
            wire.sendall(b"x")
            part = wire.recv(65_536)
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
        if not part:
            return answer
        answer += part
    raise AssertionError("the connection is still open")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /v1/messages HTTP/1.1\r\nhost: ", 408),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /healthz HTTP/1.1\r\nx: ", 408),
        (b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n{", 408),
        (b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n{", 404),
    ],
    ids=["a head", "a second head", "a body", "a body that nobody wants"],
)
def test_what_drips_in_is_not_waited_for(
    start_gateway: StartGateway, sent: bytes, status: int
) -> None:
    with wired(start_gateway(ROLLOUTQ_GATEWAY_ARRIVAL_S="1")) as wire:
        wire.sendall(sent)
        answers = dripped(wire).split(b"HTTP/1.1 ")
    assert int(answers[-1][:3]) == status


def test_a_connection_that_says_nothing_is_closed_and_one_that_is_kept_alive_is_not(
    start_gateway: StartGateway,
) -> None:
    gateway = start_gateway(ROLLOUTQ_GATEWAY_ARRIVAL_S="1")
    head = b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n"
    with wired(gateway) as kept, wired(gateway) as silent:
        assert status_over(kept, head) == 404
        assert silent.recv(1) == b""
        assert status_over(kept, head) == 404


def test_an_answer_may_take_longer_than_its_request(
    serve: Serve, start_gateway: StartGateway
) -> None:
    serve()
    body = {"prompt": "x", "rollout": {"script": {"text": "x" * 20, "ms_per_token": 100}}}
    with http(start_gateway(ROLLOUTQ_GATEWAY_ARRIVAL_S="0.5")) as ask:
        assert ask.post("/generate", json=body).status_code == 200


def test_bodies_that_are_still_arriving_count(start_gateway: StartGateway) -> None:
    gateway = start_gateway("--no-worker-s", "1", ROLLOUTQ_GATEWAY_MOST_BODY_MB="16")
    with http(gateway) as ask:

        def held() -> int:
            lines = ask.get("/metrics").text.splitlines()
            name = "rolloutq_gateway_open_body_bytes "
            return next(int(line.removeprefix(name)) for line in lines if line.startswith(name))

        with wired(gateway) as wire:
            head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 16000000\r\n\r\n"
            wire.sendall(head + b"x" * 15_500_000)
            wait_until(lambda: held() >= 15_500_000, "half a body is held")
            assert ask.post("/generate", content=b"x" * 1_000_000).status_code == 429
        wait_until(lambda: held() == 0, "nothing is held")
        assert ask.post("/generate", content=b"x" * 1_000_000).status_code != 429


def test_more_requests_than_it_may_hold_are_refused(
    serve: Serve, start_gateway: StartGateway, look: Look
) -> None:
    serve()
    gateway = start_gateway(ROLLOUTQ_GATEWAY_MOST_REQUESTS="1")
    with http(gateway) as one, http(gateway) as other:
        body = {"prompt": "x", "rollout": SLOW["rollout"]}
        limit = {"x-rollout-timeout-s": "3"}
        slow = threading.Thread(target=lambda: one.post("/generate", json=body, headers=limit))
        slow.start()
        wait_until(look.job_ids, "the first is taken")
        refused = other.post("/generate", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert other.get("/healthz").status_code == 200
        slow.join(LIMIT_S)


# its end


async def test_what_is_open_may_end_after_sigterm(
    serve: Serve, start_gateway: StartGateway, look: Look
) -> None:
    serve()
    gateway = start_gateway()
    body = BODY | {"rollout": {"script": {"text": "in the end", "ms_per_token": 100}}}
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=LIMIT_S) as ask:
        asked = asyncio.create_task(ask.post("/v1/chat/completions", json=body))
        await asyncio.to_thread(wait_until, look.job_ids, "it is taken")
        gateway.signal(signal.SIGTERM)
        answer = await asked
    assert answer.json()["choices"][0]["message"]["content"] == "in the end"
    assert await asyncio.to_thread(gateway.wait) == 0


async def test_what_does_not_end_within_the_grace_hears_so_and_is_cancelled(
    serve: Serve, start_gateway: StartGateway, look: Look
) -> None:
    serve(lease_s=3)
    gateway = start_gateway("--grace-s", "0.5")
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=LIMIT_S) as ask:
        asked = asyncio.create_task(ask.post("/v1/chat/completions", json=SLOW))
        await asyncio.to_thread(wait_until, look.job_ids, "it is taken")
        gateway.signal(signal.SIGTERM)
        answer = await asked
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "shutting down" in answer.json()["error"]["message"]
    assert await asyncio.to_thread(gateway.wait) == 0
    (job_id,) = look.job_ids()
    await asyncio.to_thread(
        wait_until, lambda: look.reply(job_id)["status"] == "cancelled", "it is cancelled"
    )


def test_ctrl_c_is_130(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    gateway.signal(signal.SIGINT)
    assert gateway.wait() == 130


# a second one


def test_a_request_goes_on_at_another_gateway_when_the_first_is_killed(
    serve: Serve, start_gateway: StartGateway, look: Look
) -> None:
    serve()
    first, second = start_gateway(), start_gateway()
    body = BODY | {"rollout": {"script": {"text": "kept", "ms_per_token": 200}}}
    headers = {"idempotency-key": "one-key"}

    def asked() -> None:
        with http(first) as ask, pytest.raises(httpx2.TransportError):
            ask.post("/v1/chat/completions", json=body, headers=headers)

    waiting = threading.Thread(target=asked)
    waiting.start()
    wait_until(look.job_ids, "the first has taken it")
    first.kill()
    waiting.join(LIMIT_S)
    with http(second) as ask:
        answer = ask.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.json()["choices"][0]["message"]["content"] == "kept"
    assert len(look.job_ids()) == 1


def test_a_server_that_was_restarted_is_found_again(
    fresh_server: StartServer, start_gateway: StartGateway
) -> None:
    server = fresh_server()
    gateway = start_gateway(at=server.url)
    server.kill()
    with http(gateway) as ask:
        wait_until(lambda: ask.get("/healthz").status_code == 503, "it says that Redis is gone")
        server.start()
        wait_until(lambda: ask.get("/healthz").status_code == 200, "it is healthy again")
