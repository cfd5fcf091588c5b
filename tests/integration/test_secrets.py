"""A login in the URL, and everything that is shown: the password must stand nowhere."""

import logging
import pickle
import time
import urllib.parse
from collections.abc import Iterator

import pytest

from producer_sdk import Client, ServerUnavailable
from producer_sdk.cli import UNREACHABLE, USAGE, run
from producer_sdk.cli.where import Where
from tests.job_body import chat, scripted
from tests.pool_look import Look, wait_until
from tests.servers import StartServer, both_servers
from tests.worker_process import StartWorker
from worker.config import Config

LIMIT_S = 60
TOLD_WITHIN_S = 10
PASSWORD = "s3cret/p@ss:word"
QUOTED = urllib.parse.quote(PASSWORD, safe="")
SHOWN = (PASSWORD, QUOTED, "s3cret")

pytestmark = both_servers


@pytest.fixture
def address(fresh_server: StartServer) -> str:
    """Host, port and database of a server that wants a login."""
    server = fresh_server("--requirepass", "of-the-test")
    look = Look(server.url.replace("redis://", "redis://:of-the-test@"), "any")
    look("ACL", "SETUSER", "anna", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    look.close()
    return server.url.removeprefix("redis://")


@pytest.fixture
def url(address: str) -> str:
    return f"redis://anna:{QUOTED}@{address}"


@pytest.fixture
def wrong_url(address: str) -> str:
    return f"redis://anna:{QUOTED}x@{address}"


@pytest.fixture
def admin(address: str, pool: str) -> Iterator[Look]:
    look = Look(f"redis://:of-the-test@{address}", pool)
    yield look
    look.close()


def clean(text: object) -> str:
    """The text, in which the password must not be."""
    found = text if isinstance(text, str) else repr(text)
    assert not [secret for secret in SHOWN if secret in found], found
    return found


def test_no_password_in_what_is_logged_shown_or_kept(
    url: str,
    pool: str,
    start_worker: StartWorker,
    admin: Look,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    worker = start_worker(url, pool, log_level="debug", backoff_s=0, fail_limit=2)
    worker.wait_ready()
    with Client(url, pool=pool) as client:
        assert client.submit(chat("hi")).result(LIMIT_S).states[0].text == "hi"
        failed = client.submit(scripted(fail="error")).result(LIMIT_S)
        clean(str(failed.exception()))
        clean(repr(client) + repr(client.settings) + str(client.settings))
        clean(repr(client.fleet().result(LIMIT_S)))
        clean(admin("CLIENT", "LIST").decode())
        clean(repr(admin("HGETALL", admin.keys.worker(worker.worker_id))))
        admin("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert client.submit(chat("again")).result(LIMIT_S).states[0].text == "again"
    worker.terminate()
    assert worker.wait() == 0
    assert "serves pool" in clean(worker.log.read_text())
    clean(caplog.text)
    for key in admin("KEYS", "*"):
        clean(repr(admin("DUMP", key)))


def test_a_wrong_password_is_told_within_seconds_and_tried_seldom(
    wrong_url: str, pool: str, admin: Look, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    admin("CONFIG", "RESETSTAT")
    began_s = time.monotonic()
    with Client(wrong_url, pool=pool) as client:
        for question in (client.submit(chat("x")), client.get("x"), client.fleet()):
            with pytest.raises(ServerUnavailable) as refused:
                question.result(LIMIT_S)
            assert "refuses this user" in clean(refused.value.message)
            assert "password in the URL" in refused.value.message
            clean(repr(refused.value) + repr(pickle.loads(pickle.dumps(refused.value))))
        assert time.monotonic() - began_s < TOLD_WITHIN_S
        attempts = connections(admin)
        wait_until(lambda: connections(admin) > attempts, "it looks again at its inbox")
        seconds = time.monotonic() - began_s
        assert connections(admin) < 10 + 2 * seconds
    clean(caplog.text)


def connections(admin: Look) -> int:
    return int(admin("INFO", "stats")["total_connections_received"])


def test_a_worker_with_a_wrong_password_ends_at_once(
    wrong_url: str, pool: str, start_worker: StartWorker
) -> None:
    worker = start_worker(wrong_url, pool, log_level="debug")
    assert worker.wait(LIMIT_S) == UNREACHABLE
    told = clean(worker.log.read_text())
    assert "refuses this user" in told
    assert "password in the URL" in told
    assert "Traceback" not in told


def test_commands_and_settings_show_no_password(
    url: str, wrong_url: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", "--url", wrong_url, "--pool", pool]) == UNREACHABLE
    assert run(["status", url]) == USAGE
    assert run(["status", "--url", url.replace("redis", "http")]) == USAGE
    captured = capsys.readouterr()
    clean(captured.out + captured.err)
    clean(repr(Where(url)) + repr(Config(url=url)) + str(Config(url=url)))
    with pytest.raises(ValueError, match="not a Redis URL") as refused:
        Config(url=url.replace("redis", "http"))
    clean(str(refused.value))


def test_a_pickled_client_still_knows_its_url(url: str, pool: str) -> None:
    client = pickle.loads(pickle.dumps(Client(url, pool=pool)))
    assert client.settings.url == url
