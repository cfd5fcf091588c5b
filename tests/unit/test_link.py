"""A link: one connection, opened again when it breaks, given up with a message that shows no secret."""

import asyncio
import logging

import pytest
from redis.exceptions import ResponseError

from protocols.errors import ConfigError, ServerUnavailable
from protocols.queue import link as link_module
from protocols.queue import wire as wire_module
from protocols.queue.link import Link, Listener, address_of, check_url
from tests.told_server import HANG_UP, LIMIT_S, OK, SILENCE, linked


async def test_a_connection_is_made_when_first_used_and_kept() -> None:
    async with linked(b"+A\r\n", b":2\r\n") as (server, link):
        assert (server.connections, link.opened) == (0, 0)
        assert [await link.call("A"), await link.call("B")] == [b"A", 2]
        assert (server.connections, link.opened) == (1, 1)


async def test_a_call_whose_connection_breaks_is_made_again_on_another() -> None:
    async with linked(OK, HANG_UP, HANG_UP, b"$1\r\nx\r\n") as (server, link):
        await link.call("PING")
        assert await link.call("STEP", "argument") == b"x"
        assert server.requests == ["PING", "STEP", "STEP", "STEP"]
        assert (server.connections, link.opened) == (3, 3)


async def test_a_half_answer_is_no_answer() -> None:
    async with linked(b"$5\r\nhal") as (server, link):
        reading = asyncio.create_task(link.call("GET"))
        await server.asked()
        await server.stop()
        server.steps = [b"$5\r\nwhole\r\n"]
        await server.start()
        assert await reading == b"whole"


async def test_all_of_several_commands_are_sent_again_together() -> None:
    async with linked(b":1\r\n", HANG_UP, b":1\r\n", b":2\r\n", b":3\r\n") as (server, link):
        assert await link.calls([["A"], ["B"], ["C"]]) == [1, 2, 3]
        assert server.requests[-3:] == ["A", "B", "C"]


async def test_a_silent_server_is_given_up_and_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "ANSWER_S", 0.2)
    async with linked(SILENCE, b"+late\r\n") as (server, link):
        assert await link.call("GET") == b"late"
        assert server.connections == 2


async def test_a_server_may_hold_an_answer_back_as_long_as_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "ANSWER_S", 0.1)
    async with linked(SILENCE) as (_, link):
        waiting = asyncio.create_task(link.call("BLPOP", block_s=LIMIT_S))
        await asyncio.sleep(0.4)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_one_refusal_that_passes_is_waited_for_with_all_that_came_with_it() -> None:
    busy = b"-BUSY Redis is busy running a script.\r\n"
    async with linked(b":1\r\n", busy, b":3\r\n", b":4\r\n") as (server, link):
        assert await link.calls([["A"], ["B"]]) == [3, 4]
        assert server.requests == ["A", "B", "A", "B"]


@pytest.mark.parametrize(
    "refusal",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-MASTERDOWN Link with MASTER is down\r\n",
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-BUSY Redis is busy running a script.\r\n",
        b"-UNBLOCKED force unblock from blocking operation, instance state changed\r\n",
    ],
    ids=lambda refusal: refusal[1:8].decode(),
)
async def test_a_refusal_that_passes_is_waited_for(refusal: bytes) -> None:
    async with linked(refusal, refusal, b"+done\r\n") as (_, link):
        assert await link.call("STEP") == b"done"


async def test_a_refusal_that_stays_is_raised_and_not_repeated() -> None:
    async with linked(b"-ERR Function not found\r\n") as (server, link):
        with pytest.raises(ResponseError, match="Function not found"):
            await link.call("FCALL")
        assert server.requests == ["FCALL"]
        assert await link.call("PING") == b"OK"
        assert server.connections == 1


async def test_a_refused_command_among_several_is_an_answer_of_its_own() -> None:
    async with linked(b":1\r\n", b"-BUSYGROUP exists\r\n", b":3\r\n") as (_, link):
        first, refused, third = await link.calls([["A"], ["B"], ["C"]])
        assert (first, third) == (1, 3)
        assert isinstance(refused, ResponseError)


@pytest.mark.parametrize("code", ["NOPERM this user has no permissions", "NOAUTH needed"])
async def test_missing_rights_are_told_at_once(code: str) -> None:
    async with linked(f"-{code}\r\n".encode()) as (server, link):
        with pytest.raises(ServerUnavailable) as refused:
            await link.call("FCALL")
        assert f"Redis at 127.0.0.1:{server.port} refuses this user" in refused.value.message
        assert "in the URL" in refused.value.message
        assert refused.value.retry_after_s is None
        assert server.requests == ["FCALL"]


async def test_a_server_that_was_never_there_is_given_up_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "FIRST_CONTACT_S", 0.2)
    async with linked() as (server, _):
        await server.stop()
        url = f"redis://me:s3cret@127.0.0.1:{server.port}/0"
        with pytest.raises(ServerUnavailable) as gone:
            await Link(url, name="x", outage_s=60).call("PING")
    assert f"no Redis at 127.0.0.1:{server.port} for 0.2 s" in gone.value.message
    assert "is the URL right?" in gone.value.message
    assert gone.value.retry_after_s
    assert "s3cret" not in str(gone.value)
    assert "me:" not in str(gone.value)


async def test_a_server_that_was_there_is_waited_for_as_long_as_an_outage_may_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "FIRST_CONTACT_S", 0.1)
    async with linked(outage_s=0.6) as (server, link):
        await link.call("PING")
        await server.stop()
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        with pytest.raises(ServerUnavailable, match=r"for 0\.6 s"):
            await link.call("PING")
        assert loop.time() - begun_s >= 0.6
        await server.start()
        assert await link.call("PING") == b"OK"


async def test_an_outage_is_logged_once_and_without_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with linked(HANG_UP, HANG_UP, HANG_UP, b"+back\r\n") as (server, _):
        secret = Link(f"redis://me:s3cret@127.0.0.1:{server.port}/0", name="x")
        with caplog.at_level(logging.DEBUG):
            assert await secret.call("PING") == b"back"
        await secret.close()
    told = [record.getMessage() for record in caplog.records if record.name == "rolloutq.link"]
    assert len(told) == 1
    assert f"no Redis at 127.0.0.1:{server.port}" in told[0]
    assert "s3cret" not in caplog.text


async def test_calls_of_many_tasks_take_turns() -> None:
    async with linked(*(f":{i}\r\n".encode() for i in range(50))) as (server, link):
        answers = await asyncio.gather(*(link.call("GET") for _ in range(50)))
        assert answers == list(range(50))
        assert server.connections == 1


async def test_a_cancelled_call_never_leaves_its_answer_to_the_next() -> None:
    async with linked(SILENCE) as (server, link):
        waiting = asyncio.create_task(link.call("SLOW"))
        await server.asked()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        server.steps = [b"+mine\r\n"]
        assert await link.call("GET") == b"mine"
        assert server.connections == 2


async def test_a_closed_link_opens_again_when_used() -> None:
    async with linked() as (_, link):
        await link.call("PING")
        await link.close()
        await link.call("PING")
        assert link.opened == 2


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://localhost", "localhost:6379"),
        ("redis://me:s3cret@host.example:7000/3", "host.example:7000"),
        ("rediss://:s3cret@host", "host:6379"),
        ("unix://me:s3cret@/run/redis.sock", "/run/redis.sock"),
    ],
)
def test_an_address_shows_where_and_not_who(url: str, address: str) -> None:
    assert address_of(url) == address


NO_URLS = [
    *("", "localhost", "http://me:s3cret@host", "redis//host"),
    *("redis://me:12/s3cret@host", "redis://me:12#s3cret@host", "redis://me:12?s3cret@host"),
]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_url(url)
    assert refused.value.param == "url"
    assert "s3cret" not in str(refused.value)
    assert "redis://host:6379/0" in str(refused.value)


def test_an_option_that_is_none_is_refused_and_not_dropped() -> None:
    with pytest.raises(
        ConfigError, match="unknown option after `\\?`; there are db, username, password"
    ):
        check_url("redis://host?socket_timeout=5")
    assert check_url("redis://host?db=2")["db"] == 2


async def test_a_channel_that_is_forbidden_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    refusal = b"-NOPERM No permissions to access a channel\r\n"
    async with linked(refusal, refusal, refusal, SILENCE) as (server, _):
        listener = Listener(f"redis://127.0.0.1:{server.port}/0", ["bell"], name="x")
        listening = asyncio.create_task(_first(listener))
        while server.connections < 4:
            await server.asked()
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        await listener.close()
    told = [record.getMessage() for record in caplog.records if record.name == "rolloutq.link"]
    assert len(told) == 1
    assert "no bell: No permissions" in told[0]


async def _first(listener: Listener) -> tuple[str, str] | None:
    async for message in listener:
        return message
    return None


async def test_what_nobody_takes_is_left_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "UNREAD_MOST", 4)
    said = b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nx\r\n"
    async with linked(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n" + 9 * said) as (_, link):
        heard = link.subscribed(["c"])
        assert await anext(heard) == ("", "")
        wire = link._wire  # pyright: ignore[reportPrivateUsage]
        assert isinstance(wire, wire_module.SocketWire)
        while wire._transport.is_reading():  # noqa: ASYNC110 # pyright: ignore[reportPrivateUsage]
            await asyncio.sleep(0)
        assert [await anext(heard) for _ in range(9)] == 9 * [("c", "x")]
        assert wire._transport.is_reading()  # pyright: ignore[reportPrivateUsage]


async def test_a_call_does_not_wait_for_the_answer_to_the_one_before() -> None:
    async with linked(OK, SILENCE) as (server, link):
        await link.call("PING")
        first = asyncio.create_task(link.call("SLOW"))
        second = asyncio.create_task(link.call("QUICK"))
        wire = link._wire  # pyright: ignore[reportPrivateUsage]
        assert isinstance(wire, wire_module.SocketWire)
        while "SLOW" not in server.requests:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert len(wire._waiting) == 2  # pyright: ignore[reportPrivateUsage]
        await server.stop()
        await server.start()
        assert [await first, await second] == [b"OK", b"OK"]
        assert server.connections == 2


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 1000])
def test_a_command_of_any_length_is_packed_as_redis_has_it(count: int) -> None:
    packed = wire_module._packed  # pyright: ignore[reportPrivateUsage]
    command = ["SET", *(b"\r\n$" * i for i in range(count - 1))]
    words = [word.encode() if isinstance(word, str) else word for word in command]
    told = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
    assert packed(command) == b"*%d\r\n%b" % (count, told)


async def test_an_answer_of_any_length_is_read_whole() -> None:
    sizes = [0, 1, wire_module.FEED_BYTES - 1, wire_module.FEED_BYTES, 10 * wire_module.FEED_BYTES]
    answers = [b"$%d\r\n%b\r\n" % (size, size * b"x") for size in sizes]
    async with linked(b"".join(answers)) as (server, link):
        found = await link.calls([["GET", "x"] for _ in sizes])
        assert [len(one) for one in found] == sizes
        assert server.connections == 1
