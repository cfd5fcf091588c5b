"""The gateway without a server: who may listen where, whose key opens what, how much is read."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from starlette.requests import Request as Incoming
from starlette.types import Message, Scope

from producer_sdk.exchange.request import Request, job_id_of, options_of, wants_frames
from producer_sdk.exchange.response import of_error, of_reply
from producer_sdk.exchange.route import PROTOCOLS, protocol_of
from producer_sdk.gateway.intake import Intake, headers_of
from producer_sdk.gateway.keys import Keyring, Role
from producer_sdk.gateway.metrics import Metrics
from producer_sdk.gateway.patience import Leaving, Patience
from producer_sdk.gateway.settings import Settings, settings
from protocols.codec import encode_json
from protocols.errors import (
    BodyTooLarge,
    ConfigError,
    HeadTooLarge,
    InvalidRequest,
    KeyMissing,
    KeyRefused,
    MethodNotAllowed,
    NoLiveWorker,
    QueueFull,
    RequestTooSlow,
    RolloutError,
    RouteNotFound,
    ServerUnavailable,
)
from protocols.job import MAX_BODY_BYTES, JobStatus, Reply

USER, ADMIN, OTHER = "u" * 16, "a" * 16, "o" * 16


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ROLLOUTQ_GATEWAY_{name.upper()}", raising=False)
    return iter(())


def keyring(keys: str = "", admin_keys: str = "") -> Keyring:
    return Keyring(settings(keys=keys, admin_keys=admin_keys))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# where it listens


def test_it_listens_on_this_machine_alone_by_default() -> None:
    assert (settings().host, settings().port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_loopback_address_needs_no_keys(host: str) -> None:
    assert settings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_any_other_address_is_refused_without_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="ROLLOUTQ_GATEWAY_KEYS"):
        settings(host=host)
    assert settings(host=host, keys=USER).host == host


@pytest.mark.parametrize(
    "keys", ["short", f"{USER},short", f"{USER},{USER}", "with blanks in it", "ключ" * 8]
)
def test_keys_that_are_none_are_refused_without_being_shown(keys: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(keys=keys)
    assert keys not in str(refused.value)
    assert USER not in repr(settings(keys=USER))


def test_one_key_has_one_role() -> None:
    with pytest.raises(ConfigError, match="twice"):
        settings(keys=USER, admin_keys=USER)


# whose key opens what


def test_without_keys_this_machine_may_everything_and_a_web_page_nothing() -> None:
    assert keyring().check({}, Role.ADMIN) == ""
    with pytest.raises(KeyRefused, match="web page"):
        keyring().check({"origin": "https://example.org"}, Role.INFERENCE)


@pytest.mark.parametrize(
    "headers", [bearer(USER), {"x-api-key": USER}, {"authorization": f"bearer {USER}"}]
)
def test_a_key_is_taken_as_either_client_sends_it(headers: dict[str, str]) -> None:
    assert keyring(keys=f"{OTHER},{USER}").check(headers, Role.INFERENCE)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("x" * 16),
        bearer(USER[:-1]),
        {"authorization": f"Basic {USER}"},
        bearer(""),
        {"x-api-key": "é"},
    ],
)
def test_a_stranger_is_told_that_the_key_is_missing(headers: dict[str, str]) -> None:
    with pytest.raises(KeyMissing):
        keyring(keys=USER).check(headers, Role.INFERENCE)


def test_roles_are_kept_apart() -> None:
    ring = keyring(keys=USER, admin_keys=ADMIN)
    assert ring.check(bearer(ADMIN), Role.ADMIN) == ring.check(bearer(ADMIN), Role.INFERENCE)
    with pytest.raises(KeyRefused):
        ring.check(bearer(USER), Role.ADMIN)


def test_without_admin_keys_nobody_commands() -> None:
    with pytest.raises(KeyRefused, match="ADMIN_KEYS"):
        keyring(keys=USER).check(bearer(USER), Role.ADMIN)


def test_probes_need_no_key() -> None:
    assert keyring(keys=USER).check({}, Role.NOBODY) == ""


def test_every_key_is_compared_whoever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, _: bytes) -> bool:
        compared.append(one)
        return True

    ring = keyring(keys=f"{USER},{OTHER}", admin_keys=ADMIN)
    monkeypatch.setattr("hmac.compare_digest", compare)
    ring.check(bearer(USER), Role.ADMIN)
    assert len(set(compared)) == 3
    assert {len(one) for one in compared} == {32}


# what is read


class Wire:
    """What arrives, message by message; then nothing more."""

    def __init__(self, *parts: bytes) -> None:
        self.left = list(parts)
        self.read = 0
        self.more = False
        """Whether more is announced than comes."""

    async def __call__(self) -> Message:
        if not self.left:
            await asyncio.Event().wait()
        self.read += 1
        body = self.left.pop(0)
        return {"type": "http.request", "body": body, "more_body": self.more or bool(self.left)}


class Arriving:
    """A request whose body is on its way to a gateway, which holds it."""

    def __init__(self, wire: Wire, headers: dict[str, str] | None = None, **given: object) -> None:
        told = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope: Scope = {"type": "http", "headers": told, "state": {}}
        self.metrics = Metrics()
        self.intake = Intake(settings(**given), self.metrics)
        self._incoming = Incoming(self.scope, wire)

    async def read(self) -> bytes:
        return await self.intake.read(self._incoming)


async def test_a_body_is_read_in_parts() -> None:
    assert await Arriving(Wire(b"a", b"", b"b")).read() == b"ab"


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    wire = Wire(b"x")
    with pytest.raises(BodyTooLarge):
        await Arriving(wire, {"content-length": str(MAX_BODY_BYTES + 1)}).read()
    assert wire.read == 0


async def test_a_body_that_turns_out_too_large_is_read_no_further() -> None:
    wire = Wire(*[b"x" * (MAX_BODY_BYTES // 4)] * 9)
    with pytest.raises(BodyTooLarge):
        await Arriving(wire).read()
    assert wire.read == 5


async def test_a_body_that_does_not_come_is_given_up() -> None:
    with pytest.raises(RequestTooSlow):
        await Arriving(Wire(), arrival_s=0.01).read()


async def test_a_body_counts_while_it_arrives_and_until_its_request_has_ended() -> None:
    whole, stops = Wire(b"x" * 300, b"x" * 300), Wire(b"x" * 600)
    stops.more = True
    read, stopped = Arriving(whole), Arriving(stops, arrival_s=0.05)
    await read.read()
    with pytest.raises(RequestTooSlow):
        await stopped.read()
    for one in (read, stopped):
        assert one.metrics.open_body_bytes == 600
        one.intake.let_go(one.scope)
        assert one.metrics.open_body_bytes == 0


async def test_a_body_for_which_there_is_no_room_is_read_no_further() -> None:
    wire = Wire(*[b"x" * 4_000_000] * 4)
    arriving = Arriving(wire, most_body_mb=16)
    arriving.metrics.open_body_bytes = 7_000_000
    with pytest.raises(QueueFull):
        await arriving.read()
    arriving.intake.let_go(arriving.scope)
    assert (wire.read, arriving.metrics.open_body_bytes) == (3, 7_000_000)


def test_long_paths_and_headers_are_refused() -> None:
    scope: dict[str, Any] = {"raw_path": b"/", "query_string": b"", "headers": []}
    assert headers_of(scope) == {}
    with pytest.raises(HeadTooLarge, match="path"):
        headers_of(scope | {"query_string": b"x" * 5000})
    with pytest.raises(HeadTooLarge, match="headers"):
        headers_of(scope | {"headers": [(b"x", b"y" * 40_000)]})


# what a request means


def request(**more: Any) -> Request:  # noqa: ANN401
    return replace(Request("POST", "/v1/messages", {}), **more)


def test_a_path_names_a_protocol() -> None:
    assert protocol_of("POST", "/v1/messages/count_tokens") == "claude.count_tokens"
    assert {protocol_of("POST", path) for path in PROTOCOLS} == set(PROTOCOLS.values())
    with pytest.raises(MethodNotAllowed):
        protocol_of("PUT", "/generate")
    with pytest.raises(RouteNotFound):
        protocol_of("POST", "/v1/messages/")


def test_an_idempotency_key_gives_one_id_by_path_and_caller() -> None:
    one = {"idempotency-key": "k"}
    same = job_id_of(request(headers=one))
    assert same == job_id_of(request(headers=one))
    others = [
        request(headers=one, caller="c"),
        request(headers=one, path="/generate"),
        request(headers={"idempotency-key": "l"}),
        request(),
        request(),
    ]
    assert len({same, *(job_id_of(other) for other in others)}) == 6


def test_headers_become_options() -> None:
    headers = {
        "x-session-id": "s",
        "x-rollout-lane": "low",
        "x-rollout-min-version": "3",
        "x-rollout-timeout-s": "1.5",
    }
    found = options_of(request(headers=headers, timeout_s=600.0))
    assert found == {"session": "s", "lane": "low", "min_version": 3, "timeout_s": 1.5}


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-rollout-lane", "fast"),
        ("x-rollout-min-version", "-1"),
        ("x-rollout-max-staleness", "٣"),
        ("x-rollout-timeout-s", "inf"),
        ("x-rollout-timeout-s", "0"),
        ("x-session-id", ""),
        ("x-rollout-group", "g" * 300),
    ],
)
def test_an_option_that_is_none_is_refused_by_the_header_s_name(header: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        options_of(request(headers={header: value}))
    assert refused.value.param == header


@pytest.mark.parametrize("told", ["bad id", "", "x" * 129])
def test_a_job_id_that_is_none_is_refused(told: str) -> None:
    with pytest.raises(InvalidRequest):
        job_id_of(request(headers={"x-rollout-job-id": told}))


@pytest.mark.parametrize(
    ("body", "streams"),
    [
        (b'{"stream":true}', True),
        (b'{"stream":false}', False),
        (b'{"stream":null}', False),
        (b'{"a":{"stream":true}}', False),
        (b'{"stream":1}', False),
        (b"{", False),
        (b"", False),
        (b"[" * 100_000, False),
        (b'{"a":"\xff"}', False),
    ],
)
def test_only_a_plain_wish_for_a_stream_is_one(body: bytes, streams: bool) -> None:
    assert wants_frames(body) is streams


# what is answered


@pytest.mark.parametrize(
    ("error", "protocol", "status", "advice"),
    [
        (QueueFull("x", retry_after_s=0.2), "openai.chat", 429, ("1", "200")),
        (QueueFull("x", retry_after_s=2), "claude.messages", 429, ("2", "2000")),
        (NoLiveWorker("x"), "openai.chat", 503, ("1", "1000")),
        (NoLiveWorker("x"), "claude.messages", 529, ("1", "1000")),
        (NoLiveWorker("x"), "claude.count_tokens", 529, ("1", "1000")),
        (ServerUnavailable("x"), "generate", 503, None),
        (InvalidRequest("x"), "openai.chat", 400, None),
        (RolloutError("x"), "openai.chat", 500, None),
    ],
)
def test_only_what_leaves_no_job_behind_may_be_asked_again(
    error: RolloutError, protocol: str, status: int, advice: tuple[str, str] | None
) -> None:
    answer = of_error(error, protocol, "j")
    assert answer.status == status
    told = (answer.headers.get("retry-after", ""), answer.headers.get("retry-after-ms", ""))
    assert told == (advice or ("", ""))
    assert ("x-should-retry" in answer.headers) is (advice is None)


def test_under_a_key_an_unreachable_server_may_be_asked_again() -> None:
    answer = of_error(ServerUnavailable("x"), "openai.chat", "j", again=True)
    assert answer.headers["retry-after"] == "1"


def test_an_answer_that_was_collected_long_ago_is_an_error() -> None:
    reply = Reply("j", JobStatus.COMPLETED, 200, b"{}")
    assert of_reply(reply, "openai.chat").status == 404


def test_a_reply_of_an_aborted_job_is_an_overload_to_anthropic_s_client() -> None:
    reply = Reply("j", JobStatus.ABORTED, 503, b'{"error":{}}', error="aborted")
    assert of_reply(reply, "claude.messages").status == 529
    assert of_reply(reply, "openai.chat").headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("chat_template_kwargs.x y", "chat_template_kwargs.x%20y"),
        ("a\r\nset-cookie: x", "a%0D%0Aset-cookie:%20x"),
        ("ключ", "%D0%BA%D0%BB%D1%8E%D1%87"),
        ("50%,\x7f", "50%25%2C%7F"),
        ("n" * 9000, "n" * 2045 + "..."),
    ],
)
def test_a_name_of_the_caller_s_is_one_short_word_in_a_header(name: str, told: str) -> None:
    body = encode_json({"rollout": {"ignored": [name]}})
    answer = of_reply(Reply("j", JobStatus.COMPLETED, 200, body), "openai.chat")
    assert answer.headers["x-rollout-ignored"] == told


# how long it waits


async def test_a_caller_who_hangs_up_ends_the_wait() -> None:
    patience = Patience()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    with pytest.raises(TimeoutError):
        async with Leaving().wait(patience, receive, 60):
            await asyncio.Event().wait()
    assert (patience.gone, patience.leaving) == (True, False)


async def test_a_gateway_that_has_to_go_ends_every_wait() -> None:
    leaving, patience = Leaving(), Patience()
    asyncio.get_running_loop().call_soon(leaving.end)
    with pytest.raises(TimeoutError):
        async with leaving.wait(patience, Wire(), 60):
            await asyncio.Event().wait()
    assert (patience.gone, patience.leaving) == (False, True)
    late = Patience()
    with pytest.raises(TimeoutError):
        async with leaving.wait(late, Wire(), 60):
            await asyncio.Event().wait()
    assert late.leaving


async def test_a_wait_that_has_its_answer_is_not_ended() -> None:
    leaving, patience = Leaving(), Patience()
    async with leaving.wait(patience, Wire(), 60):
        pass
    leaving.end()
    patience.end()


# what is counted


def test_the_histogram_is_cumulative() -> None:
    metrics = Metrics()
    for took_s in (0.001, 0.02, 0.02, 1000):
        metrics.answered("/generate", 200, took_s)
    page = metrics.page(None)
    assert 'rolloutq_gateway_requests_total{route="/generate",status="200"} 4' in page
    for le, count in (("0.005", 1), ("0.025", 3), ("600", 3), ("+Inf", 4)):
        assert f'_bucket{{route="/generate",le="{le}"}} {count}\n' in page
    assert "rolloutq_gateway_redis_up 0" in page


# what it needs


def test_a_trainer_s_import_needs_no_http_library() -> None:
    asked = (
        "import sys, producer_sdk, producer_sdk.cli.gateway; "
        "print({'httpx2', 'openai', 'anthropic', 'starlette', 'uvicorn', 'anyio'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == "set()\n"


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("httpx2", "Client('redis://x').transport()", "rolloutq[transport]"),
        ("openai", "openai_client(Client('redis://x'))", "openai"),
        ("anthropic", "anthropic_client(Client('redis://x'))", "anthropic"),
        ("starlette", "sys.exit(run(['gateway']))", "rolloutq[gateway]"),
    ],
)
def test_what_is_not_installed_is_named(module: str, call: str, extra: str) -> None:
    asked = (
        f"import sys; sys.modules[{module!r}] = None; from producer_sdk.cli import run; "
        f"from producer_sdk import Client, openai_client, anthropic_client; {call}"
    )
    ran = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0
    assert extra in ran.stderr.splitlines()[-1]
