"""No event loop of a client or worker is held for long, however large bodies and answers are.

What counts is the CPU time of one callback's own thread, so that neither a busy machine nor another thread can make a
test fail.
"""

import asyncio
import threading
import time
from asyncio.events import Handle
from collections.abc import Iterator

import pytest

from producer_sdk import Client
from tests.job_body import Body, chat
from tests.queue_fixtures import open_pool
from worker.config import Config
from worker.service import Service

MOST_S = 0.05
LIMIT_S = 120
TEN_MB = 10_000_000
LONG = "x" * 8000
"""The scripted engine answers with it: 8,000 tokens."""


class Watch:
    """The longest callback of each thread's event loop."""

    def __init__(self) -> None:
        self.longest: dict[str, tuple[float, str]] = {}

    def saw(self, seconds: float, handle: Handle) -> None:
        name = threading.current_thread().name
        if seconds > self.longest.get(name, (0.0, ""))[0]:
            self.longest[name] = (seconds, repr(handle))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, run = Watch(), Handle._run  # pyright: ignore[reportPrivateUsage]

    def watched(handle: Handle) -> None:
        began_s = time.thread_time()
        run(handle)
        watch.saw(time.thread_time() - began_s, handle)

    monkeypatch.setattr(Handle, "_run", watched)
    return watch


@pytest.fixture
def client(url: str, pool: str) -> Iterator[Client]:
    """Beside a worker in this process."""
    asyncio.run(open_pool(url, pool))
    loop = asyncio.new_event_loop()
    config = Config(url=url, pool=pool, engine="scripted", worker_id="held", slots=64, grace_s=0)
    service = Service(config)
    thread = threading.Thread(target=loop.run_until_complete, args=[service.run()], name="worker")
    thread.start()
    try:
        with Client(url, pool=pool) as client:
            client.submit(chat("begin")).result(LIMIT_S)
            yield client
    finally:
        loop.call_soon_threadsafe(service.stop)
        thread.join(LIMIT_S)
        loop.close()


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        ("openai.chat", chat("x" * TEN_MB)),
        ("openai.chat", chat("short", metadata={"note": "x" * TEN_MB})),
        ("generate", {"input_ids": [65] * (TEN_MB // 3)}),
        ("openai.chat", chat(LONG, logprobs=True)),
        ("openai.chat", chat(LONG, logprobs=True, top_logprobs=20)),
        ("openai.completions", {"prompt": LONG, "logprobs": 5, "max_tokens": 8000}),
        ("generate", {"input_ids": [65] * 32_000, "sample_params": {"max_tokens": 8000}}),
    ],
    ids=["text", "unread", "ids", "logprobs", "top", "completions", "generate"],
)
def test_no_loop_is_held_by_a_large_body_or_answer(
    client: Client, watch: Watch, protocol: str, body: Body
) -> None:
    reply = client.submit(body, protocol=protocol).result(LIMIT_S)
    assert len(reply.body) > 100
    assert watch.longest.keys() >= {"worker", "rolloutq-client"}
    assert all(seconds < MOST_S for seconds, _ in watch.longest.values()), watch.longest


def test_no_loop_is_held_by_a_long_stream(client: Client, watch: Watch) -> None:
    assert sum(len(s.token_ids) for s in client.stream(chat(LONG, logprobs=True))) == len(LONG) + 1
    assert all(seconds < MOST_S for seconds, _ in watch.longest.values()), watch.longest


def test_the_watch_sees_a_loop_that_is_held(watch: Watch) -> None:
    async def hold() -> None:
        until_s = time.thread_time() + MOST_S
        while time.thread_time() < until_s:
            pass

    asyncio.run(hold())
    assert watch.longest["MainThread"][0] >= MOST_S
