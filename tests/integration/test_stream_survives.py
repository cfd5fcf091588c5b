"""A stream goes on where it was, whatever dies under it; one that cannot ends in an error."""

import signal
import threading

import pytest

from producer_sdk import Client
from tests.job_body import claude, scripted
from tests.pool_look import Look, wait_until
from tests.queue_fixtures import Serve
from tests.servers import StartServer, both_servers
from tests.sse import chat_text, claude_text, events
from tests.worker_process import StartWorker

pytestmark = both_servers

TEXT = "Es war einmal, 从前有座山, once upon a time: "
LEASE_S = 0.9
LIMIT_S = 30


class Reading:
    """Frames of one stream, read in a thread."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.frames: list[bytes] = []
        self._stream = client.follow(job_id)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for frame in self._stream.frames():
            self.frames.append(frame)

    def whole(self) -> bytes:
        """Once it has ended."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()
        return b"".join(self.frames)


def kept(look: Look, job_id: str) -> int:
    """Tokens of the first sample that the server has."""
    return int(look.reply(job_id).get("kept:0", 0))


@pytest.mark.parametrize("at_token", [1, 7, 12, 20, 45])
def test_a_stream_whose_worker_is_killed_goes_on_with_the_very_next_byte(
    client: Client, serve: Serve, look: Look, at_token: int
) -> None:
    body = claude("hi", rollout={"script": {"text": TEXT, "ms_per_token": 25}})
    victim = serve(lease_s=LEASE_S, slots=1)
    stream = client.stream(body, protocol="claude.messages")
    reading = Reading(client, stream.job_id)
    wait_until(lambda: kept(look, stream.job_id) >= at_token, "so many tokens are shown")
    victim.kill()
    before = b"".join(reading.frames)
    serve(lease_s=LEASE_S, slots=1)
    frames = reading.whole()
    assert stream.reply.result(LIMIT_S).attempts == 2
    assert kept(look, stream.job_id) > at_token
    assert frames.startswith(before)
    assert claude_text(frames) == TEXT
    assert b"".join(stream.frames()) == frames
    undisturbed = client.stream(body, protocol="claude.messages")
    assert claude_text(undisturbed.frames()) == TEXT


def test_a_worker_that_wakes_up_after_its_lease_adds_nothing(
    client: Client, serve: Serve, look: Look
) -> None:
    frozen = serve(lease_s=LEASE_S, slots=1)
    stream = client.stream(scripted(TEXT, ms_per_token=25))
    reading = Reading(client, stream.job_id)
    wait_until(lambda: kept(look, stream.job_id) >= 5, "it has begun")
    frozen.signal(signal.SIGSTOP)
    serve(lease_s=LEASE_S, slots=1)
    wait_until(lambda: look.reply(stream.job_id)["attempts"] == "2", "another has it")
    frozen.signal(signal.SIGCONT)
    assert chat_text(reading.whole()) == TEXT
    assert stream.reply.result(LIMIT_S).attempts == 2


def test_a_stream_goes_on_after_the_server_has_lost_everything(
    fresh_server: StartServer, start_worker: StartWorker, pool: str
) -> None:
    server = fresh_server()
    look = Look(server.url, pool)
    with Client(server.url, pool=pool) as client:
        from_the_start = scripted(TEXT, ms_per_token=40)
        worker = start_worker(server.url, pool, lease_s=LEASE_S)
        wait_until(lambda: look("EXISTS", look.keys.desired), "the pool is open")
        worker.wait_ready()
        stream = client.stream(from_the_start)
        reading = iter(stream.frames())
        frames = [next(reading) for _ in range(8)]
        shown = kept(look, stream.job_id)
        look("FLUSHALL")
        frames += reading
        assert shown >= 7
        assert chat_text(frames) == TEXT
        assert stream.reply.result(LIMIT_S).status == "completed"
    look.close()


def test_a_stream_that_would_have_to_take_back_what_it_showed_ends_in_the_error_frame(
    client: Client, look: Look, serve: Serve
) -> None:
    serve(lease_s=LEASE_S)
    stream = client.stream(scripted(TEXT, ms_per_token=40))
    reading = iter(stream.frames())
    frames = [next(reading) for _ in range(5)]
    progress = look.keys.progress(stream.job_id)
    (_, first), *_ = look("XRANGE", progress, "-", "+")
    fields = {**first, b"t": b"\xff\x00\x00\x00" * (len(first[b"t"]) // 4)}
    look("XADD", progress, "*", *(part for pair in fields.items() for part in pair))
    frames += reading
    last = list(events(frames))[-1]
    assert last.data["error"]["message"].startswith("the server has lost a part of the stream")
