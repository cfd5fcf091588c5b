"""What a reader of a stream makes of entries that do not fit what it has shown."""

from typing import TYPE_CHECKING, TypeVar, cast

import pytest

from producer_sdk import ServerUnavailable
from producer_sdk.future import Future, Pending
from producer_sdk.promise import Promise
from producer_sdk.stream import Batch, Source, Stream
from protocols.job import JobStatus, Reply, Segment
from protocols.queue.rows import End
from protocols.rollout_state import Logprobs, TokenIds

if TYPE_CHECKING:
    from producer_sdk.courier import Courier

Value = TypeVar("Value")
Answers = list[Batch | Exception]


class CannedCourier:
    """Answers each pull in turn."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def pull(self, _feed: object, *, again: bool) -> Promise[Batch]:
        future: Promise[Batch] = Promise()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def leave(self, _feed: object) -> None:
        pass


def done(value: Value) -> Promise[Value]:
    future: Promise[Value] = Promise()
    future.set_result(value)
    return future


def stream(*answers: Batch | Exception, protocol: str = "openai.chat") -> Stream:
    known: Promise[str | None] = done(protocol)
    reply = done(Reply("j", JobStatus.COMPLETED, 200, b"{}"))
    courier = cast("Courier", CannedCourier(list(answers)))
    future: Future[Reply] = Future(reply, "j", lambda _: Pending(done(0), "cancel"))
    return Stream(Source(courier, future, reply, Pending(known, "protocol")))


def segment(start: int, end: int) -> Segment:
    ids, frames = TokenIds(range(start, end)), f"{start}-{end};".encode()
    logprobs = Logprobs([-1.0] * (end - start))
    return Segment(0, start, ids, logprobs, TokenIds(), Logprobs(), 0, None, frames)


def test_frames_that_were_cut_otherwise_end_in_an_error_and_skip_nothing() -> None:
    cut_anew: Batch = [segment(0, 8), segment(8, 10), End(JobStatus.COMPLETED, b"end", 10)]
    frames = list(stream([segment(0, 5)], cut_anew).frames())
    assert frames[0] == b"0-5;"
    assert b'"error"' in frames[-1]
    assert not any(shown in (b"8-10;", b"end") for shown in frames)


@pytest.mark.parametrize(
    ("protocol", "mark"),
    [("openai.chat", b'data: {"error"'), ("claude.messages", b"event: error")],
)
def test_a_server_that_is_lost_ends_the_frames_in_the_protocols_error(
    protocol: str, mark: bytes
) -> None:
    lost = ServerUnavailable("the server does not answer")
    frames = list(stream([segment(0, 5)], lost, protocol=protocol).frames())
    assert frames[0] == b"0-5;"
    assert frames[-1].startswith(mark)


def test_a_server_that_is_lost_is_raised_where_segments_are_read() -> None:
    reading = iter(stream([segment(0, 5)], ServerUnavailable("the server does not answer")))
    assert next(reading).token_ids == TokenIds(range(5))
    with pytest.raises(ServerUnavailable):
        next(reading)
