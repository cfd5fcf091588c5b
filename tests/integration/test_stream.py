"""Streams on real servers: seen while they are generated, by whoever follows, from the start."""

import asyncio
import itertools
import json
import threading
from collections.abc import Iterable

import pytest

from producer_sdk import Client, DeadlineExceeded, JobNotFound, RolloutError
from protocols.job import Segment
from tests.job_body import Body, claude, scripted
from tests.pool_look import Look, wait_until
from tests.servers import both_servers
from tests.sse import TEXT_OF, chat_text, events

pytestmark = both_servers

TEXT = "".join(itertools.islice(itertools.cycle("Grüße, 世界! "), 60))
SCRIPT = {"script": {"text": TEXT, "ms_per_token": 5}}
LIMIT_S = 30


@pytest.fixture
def pool(standing: str) -> str:
    return standing


def ids_of(segments: Iterable[Segment]) -> list[int]:
    """Token ids of one sample; its segments must follow each other."""
    ids: list[int] = []
    for segment in segments:
        assert segment.start == len(ids)
        ids += segment.token_ids
    return ids


def test_a_follower_sees_tokens_before_the_job_ends(client: Client) -> None:
    stream = client.stream(scripted(TEXT, ms_per_token=10))
    frames: list[bytes] = []
    done: list[bool] = []
    for frame in stream.frames():
        frames.append(frame)
        done.append(stream.reply.done())
    assert len(frames) > 5
    assert not any(done[: len(done) // 2])
    assert chat_text(frames) == TEXT == stream.reply.result(LIMIT_S).states[0].text


def test_every_dialect_streams_what_its_reply_says(client: Client) -> None:
    messages = claude("hi", rollout=SCRIPT)
    bodies: dict[str, Body] = {
        "openai.chat": {**messages, "n": 2, "logprobs": True, "top_logprobs": 2},
        "openai.completions": {"prompt": "hi", "rollout": SCRIPT, "logprobs": 1},
        "claude.messages": messages,
        "generate": {"prompt": "hi", "rollout": SCRIPT},
    }
    streams = {name: client.stream(body, protocol=name) for name, body in bodies.items()}
    for name, stream in streams.items():
        assert TEXT_OF[name](list(stream.frames())) == TEXT, name
        assert stream.reply.result(LIMIT_S).state.text == TEXT  # pyright: ignore[reportOptionalMemberAccess]


def test_a_body_that_asks_for_a_stream_gets_one_however_it_was_sent(
    client: Client, look: Look, pool: str
) -> None:
    body = json.dumps({**scripted(TEXT, ms_per_token=5), "stream": True})
    look("XADD", look.keys.jobs("normal"), "*", "id", f"raw-{pool}", "body", body)
    field = json.dumps(scripted(TEXT, ms_per_token=5))
    look("XADD", look.keys.jobs("normal"), "*", "id", f"field-{pool}", "body", field, "stream", "1")
    for job_id in (f"raw-{pool}", f"field-{pool}"):
        wait_until(
            lambda job_id=job_id: look("EXISTS", look.keys.reply(job_id)) == 1, "it is taken"
        )
        frames = list(client.follow(job_id).frames())
        assert len(frames) > 2
        assert chat_text(frames) == TEXT


def test_a_late_joiner_gets_the_same_bytes_from_the_start(
    client: Client, url: str, pool: str
) -> None:
    stream = client.stream(scripted(TEXT, ms_per_token=10))
    first = iter(stream.frames())
    begun = [next(first) for _ in range(5)]
    with Client(url, pool=pool) as other:
        follower = other.follow(stream.job_id)
        whole = b"".join(follower.frames())
        assert follower.reply.result(LIMIT_S).status == "completed"
        again = b"".join(other.follow(stream.job_id).frames())
    assert b"".join([*begun, *first]) == whole == again
    assert chat_text(whole) == TEXT


def test_segments_have_every_token_once_with_its_logprob_and_version(client: Client) -> None:
    stream = client.stream(scripted(TEXT, ms_per_token=3))
    segments = list(stream)
    state = stream.reply.result(LIMIT_S).states[0]
    assert len(segments) > 3
    assert ids_of(segments) == list(state.response_ids)
    assert [value for one in segments for value in one.logprobs] == list(state.logprobs)
    assert {segment.policy_version for segment in segments} == {0}


def test_a_job_that_is_not_streamed_can_be_followed(
    client: Client, url: str, pool: str, look: Look
) -> None:
    future = client.submit(scripted(TEXT, ms_per_token=5))
    wait_until(lambda: future.job_id in look.job_ids(), "the job is accepted")
    with Client(url, pool=pool) as other:
        stream = other.follow(future.job_id)
        segments = ids_of(stream)
        frames = list(stream.frames())
    assert segments == list(future.result(LIMIT_S).states[0].response_ids)
    assert chat_text(frames) == TEXT


async def test_many_are_followed_at_once_in_an_event_loop(client: Client) -> None:
    async def read(number: int) -> str:
        stream = client.stream(scripted(f"{number} {TEXT}", ms_per_token=2))
        return chat_text([frame async for frame in stream.frames()])

    texts = await asyncio.gather(*(read(number) for number in range(50)))
    assert texts == [f"{number} {TEXT}" for number in range(50)]


def test_a_cancelled_stream_ends_in_the_error_frame(client: Client) -> None:
    body = claude("hi", rollout={"script": {"text": TEXT * 9, "ms_per_token": 20}})
    stream = client.stream(body, protocol="claude.messages")
    reading = iter(stream.frames())
    frames = [next(reading) for _ in range(3)]
    assert stream.cancel().result(LIMIT_S) == 1
    frames += reading
    last = list(events(frames))[-1]
    assert last.name == "error"
    assert "was cancelled" in last.data["error"]["message"]
    assert stream.reply.result(LIMIT_S).status == "cancelled"


def test_an_expired_stream_ends_in_the_error_frame_and_segments_raise(client: Client) -> None:
    stream = client.stream(scripted(TEXT * 9, ms_per_token=20), timeout_s=1)
    last = list(events(stream.frames()))[-1]
    assert last.data["error"]["code"] == "deadline_exceeded"
    seen: list[Segment] = []
    with pytest.raises(DeadlineExceeded):
        seen.extend(stream)
    state = stream.reply.result(LIMIT_S).state
    assert state is not None
    assert ids_of(seen) == list(state.response_ids) != []


def test_the_stream_of_a_dead_letter_ends_in_the_error_frame(client: Client) -> None:
    stream = client.stream(scripted(TEXT, fail="error", at_token=7))
    told = list(events(stream.frames()))
    assert told[-1].data["error"]["code"] == "engine_failed"
    content = [e.data["choices"][0]["delta"].get("content") or "" for e in told[:-1]]
    assert "".join(content) == "Grüße"


def test_a_refused_job_has_an_error_frame_and_nothing_else(client: Client) -> None:
    (only,) = events(client.stream({"messages": "none"}).frames())
    assert "messages" in only.data["error"]["message"]


def test_a_closed_client_ends_its_streams(url: str, pool: str) -> None:
    client = Client(url, pool=pool)
    stream = client.stream(scripted(TEXT * 9, ms_per_token=20))
    reading, frames = iter(stream.frames()), list[bytes]()
    frames.append(next(reading))
    closing = threading.Timer(0.2, client.close)
    closing.start()
    frames += reading
    closing.join()
    assert "closed" in list(events(frames))[-1].data["error"]["message"]
    with pytest.raises(RolloutError, match="closed"):
        list(stream)


def test_an_unknown_job_cannot_be_followed(client: Client) -> None:
    stream = client.follow("nobody-knows-it")
    with pytest.raises(JobNotFound):
        list(stream)
    (only,) = events(stream.frames())
    assert "nobody-knows-it" in only.data["error"]["message"]


def test_who_does_not_read_is_sent_nothing_and_misses_nothing(client: Client, look: Look) -> None:
    stream = client.stream(scripted(TEXT * 5, ms_per_token=1))
    reading = iter(stream.frames())
    frames = [next(reading)]
    stream.reply.result(LIMIT_S)
    before = look.calls("xrange")
    other = client.stream(
        scripted(TEXT, ms_per_token=1)
    )  # the client is busy with another meanwhile
    assert chat_text(other.frames()) == TEXT
    spent = look.calls("xrange") - before
    frames += reading
    assert chat_text(frames) == TEXT * 5
    assert spent < 5 * len(TEXT.encode())


def test_frames_are_replayed_once_the_progress_is_gone(client: Client, look: Look) -> None:
    stream = client.stream(scripted(TEXT))
    assert chat_text(stream.frames()) == TEXT
    look("DEL", look.keys.progress(stream.job_id))
    assert chat_text(client.follow(stream.job_id).frames()) == TEXT
    assert ids_of(client.follow(stream.job_id)) == list(
        stream.reply.result(5).states[0].response_ids
    )
