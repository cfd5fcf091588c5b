"""A take that waits for the bell: two calls on one connection, either of which may fail."""

import time

import pytest

from protocols.errors import ServerUnavailable
from protocols.queue.broker import EARLY_S, Broker
from protocols.queue.link import Link
from protocols.queue.rows import Taken
from tests.told_server import HANG_UP, OK, linked

TAKEN = (
    b"*3\r\n$4\r\nopen\r\n*1\r\n*8\r\n$3\r\n1-1\r\n$1\r\nj\r\n$3\r\n1:n\r\n$6\r\nnormal\r\n$0\r\n\r\n"
    b"*2\r\n$4\r\nbody\r\n$2\r\n{}\r\n*0\r\n$1\r\n5\r\n:0\r\n"
)
NOTHING, NOT_RUNG = b"*3\r\n$4\r\nopen\r\n*0\r\n:0\r\n", b"*-1\r\n"


async def waited(link: Link) -> Taken:
    """A take behind the bell."""
    await link.call("PING")
    return await Broker(link, "p").take("w", "n", 1, lease_ms=1, policy_version=0, bell_s=1)


async def test_jobs_that_were_begun_count_whatever_the_bell_has_said() -> None:
    async with linked(OK, b"-NOGROUP of that name\r\n", TAKEN) as (server, link):
        assert [lease.job_id for lease in (await waited(link)).leases] == ["j"]
        assert server.requests == ["PING", "XREADGROUP", "FCALL"]


async def test_who_may_not_hear_the_bell_is_told_so() -> None:
    async with linked(OK, b"-NOPERM to run XREADGROUP\r\n", NOTHING) as (_, link):
        with pytest.raises(ServerUnavailable, match="XREADGROUP"):
            await waited(link)


async def test_a_wait_that_breaks_is_asked_again_without_a_wait() -> None:
    async with linked(OK, HANG_UP, TAKEN) as (server, link):
        taken = await waited(link)
        assert [lease.job_id for lease in taken.leases] == ["j"]
        assert taken.again  # what the lost answer has said of others is not known
        assert server.requests == ["PING", "XREADGROUP", "FCALL"]
        assert server.connections == 2


async def test_a_wait_that_somebody_ends_early_is_no_spin() -> None:
    async with linked(OK, NOT_RUNG, NOTHING) as (_, link):
        began_s = time.monotonic()
        assert (await waited(link)).leases == []
        assert time.monotonic() - began_s >= EARLY_S
