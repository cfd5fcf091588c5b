"""Waiting for a call, in an event loop or blocking: a whole answer, or frames that end in time.

`finished` is true before the last frame is handed out: OpenAI's client stops reading at `[DONE]` and closes, and that
must not look like somebody who hangs up.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator

from producer_sdk.exchange.call import Call
from producer_sdk.exchange.response import Response
from producer_sdk.stream import Stream
from protocols.errors import ResultTimeout, RolloutError


class _Way:
    """What is the same whoever reads."""

    def __init__(self, call: Call, stream: Stream) -> None:
        self.call = call
        self.finished = False
        self._frames, self._reply = stream.frames(), stream.reply
        self._first = b""
        limit_s = call.limit_s
        self._until_s = None if limit_s is None else time.monotonic() + limit_s

    def _instead(self) -> Response | None:
        """The answer in place of frames, where the job has ended without its own."""
        if not self._reply.done():
            return None
        error = self._reply.exception()
        if isinstance(error, RolloutError):
            return self.call.failed(error)
        reply = self._reply.result()
        return self.call.answer(reply) if reply.code >= 400 else None

    def _look_for_end(self) -> None:
        """Before a frame is handed out: whether it is the last."""
        self.finished = self._frames.ended
        if self.finished and self._reply.done():
            self.call.left_behind(self._reply.exception())


class Frames(_Way):
    """For `async for`, after `start`."""

    def __init__(self, call: Call, stream: Stream) -> None:
        super().__init__(call, stream)
        self._items = aiter(self._frames)

    async def start(self) -> Response | None:
        """Wait for the first frame; a Response where the job ends without one. Raises TimeoutError at the limit."""
        self._first = await self._next()
        return self._instead()

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        """Every frame; the last may be an error's."""
        frame = self._first
        while frame:
            self._look_for_end()
            yield frame
            if self.finished:
                return
            try:
                frame = await self._next()
            except TimeoutError:
                self.finished = True
                yield self.call.last_frame(self.call.late())
                return
        self.finished = True

    async def _next(self) -> bytes:
        """The next frame; nothing after the last."""
        left_s = None if self._until_s is None else max(0.0, self._until_s - time.monotonic())
        async with asyncio.timeout(left_s):
            return await anext(self._items, b"")


class BlockingFrames(_Way):
    """For `for`, after `start`. The limit is the job's own deadline, which its worker keeps."""

    def __init__(self, call: Call, stream: Stream) -> None:
        super().__init__(call, stream)
        self._items = iter(self._frames)

    def start(self) -> Response | None:
        """Wait for the first frame; a Response where the job ends without one."""
        self._first = next(self._items, b"")
        return self._instead()

    def __iter__(self) -> Generator[bytes]:
        """Every frame; the last may be an error's."""
        frame = self._first
        while frame:
            self._look_for_end()
            yield frame
            if self.finished:
                return
            frame = next(self._items, b"")
        self.finished = True


async def answered(call: Call) -> Response | Frames:
    """What goes back, once it is whole or has begun. Whoever cancels this gives up the call too."""
    try:
        if call.stream is not None:
            frames = Frames(call, call.stream)
            return await frames.start() or frames
        async with asyncio.timeout(call.limit_s):
            value = await call.pending
        return call.answer(value)
    except RolloutError as error:
        return call.failed(error)
    except TimeoutError:
        return call.failed(call.late())


def answered_blocking(call: Call) -> Response | BlockingFrames:
    """As `answered`."""
    try:
        if call.stream is not None:
            frames = BlockingFrames(call, call.stream)
            return frames.start() or frames
        return call.answer(call.pending.result(call.limit_s))
    except ResultTimeout:
        return call.failed(call.late())
    except RolloutError as error:
        return call.failed(error)
