"""Frames of a call whose stream has begun, and how their end is told to the queue."""

from functools import partial
from typing import Any

import pytest

from producer_sdk.exchange.call import Call
from producer_sdk.exchange.frames import BlockingFrames, answered, answered_blocking
from producer_sdk.exchange.frames import Frames as AsyncFrames
from producer_sdk.exchange.response import of_reply
from producer_sdk.future import Future, Pending
from producer_sdk.promise import Promise
from producer_sdk.stream import Batch, Source, Stream
from protocols.errors import NoLiveWorker, RolloutError, ServerUnavailable
from protocols.job import Reply, Segment
from protocols.rollout_state import Logprobs, TokenIds

FRAME = b"data: {}\n\n"
SEGMENT = Segment(
    index=0,
    start=0,
    token_ids=TokenIds([1]),
    logprobs=Logprobs([0.0]),
    top_ids=TokenIds(),
    top_logprobs=Logprobs(),
    finish_reason=None,
    policy_version=0,
    frames=FRAME,
)


class Courier:
    """Hands out one segment; then the wait ends in an error."""

    def __init__(self, inner: Promise[Reply], error: RolloutError) -> None:
        self._inner, self._error = inner, error
        self._batches: list[Batch] = [[SEGMENT]]

    def pull(self, _: object, *, again: bool) -> Promise[Batch]:
        pulled: Promise[Any] = Promise()
        if not again and not self._batches and not self._inner.done():
            self._inner.set_exception(self._error)
        pulled.set_result(self._batches.pop() if self._batches else [])
        return pulled

    def leave(self, _: object) -> None:
        pass


def call(error: RolloutError, cancelled: list[str], *, lasting: bool = False) -> Call:
    """A call whose stream begins, and then ends in this error."""

    def cancel(job_id: str) -> Pending[int]:
        cancelled.append(job_id)
        return Pending(Promise(), "cancel")

    inner: Promise[Reply] = Promise()
    protocol: Promise[str | None] = Promise()
    protocol.set_result("openai.chat")
    courier: Any = Courier(inner, error)
    reply = Future(inner, "j", cancel)
    return Call(
        reply,
        partial(of_reply, protocol="openai.chat"),
        request_id="j",
        shape="openai.chat",
        limit_s=60,
        job=reply,
        lasting=lasting,
        stream=Stream(Source(courier, reply, inner, Pending(protocol, "protocol"))),
    )


@pytest.mark.parametrize(
    ("error", "lasting", "orders"),
    [
        (NoLiveWorker("x"), False, ["j"]),
        (NoLiveWorker("x"), True, []),
        (ServerUnavailable("x"), False, []),
    ],
)
async def test_a_stream_that_no_worker_goes_on_with_cancels_its_job(
    error: RolloutError, lasting: bool, orders: list[str]
) -> None:
    cancelled: list[str] = []
    frames = await answered(call(error, cancelled, lasting=lasting))
    assert isinstance(frames, AsyncFrames)
    came = [frame async for frame in frames]
    assert (len(came), frames.finished, cancelled) == (2, True, orders)

    cancelled.clear()
    blocking = answered_blocking(call(error, cancelled, lasting=lasting))
    assert isinstance(blocking, BlockingFrames)
    assert (len(list(blocking)), cancelled) == (2, orders)
