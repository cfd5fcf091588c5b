"""Streams on real servers: seen while they are generated, by whoever follows, from the start."""

import itertools

import pytest

from producer_sdk import Client
from tests.job_body import scripted
from tests.servers import both_servers
from tests.sse import chat_text

pytestmark = both_servers

TEXT = "".join(itertools.islice(itertools.cycle("Grüße, 世界! "), 60))


@pytest.fixture
def pool(standing: str) -> str:
    return standing


def test_a_follower_sees_tokens_before_the_job_ends(client: Client) -> None:
    stream = client.stream(scripted(TEXT, ms_per_token=10))
    frames: list[bytes] = []
    done: list[bool] = []
    for frame in stream.frames():
        frames.append(frame)
        done.append(stream.reply.done())
    assert not any(done[:-3])
    assert len(frames) > 5
    assert chat_text(frames) == TEXT == stream.reply.result(5).states[0].text
