"""One request under way: what is waited for, and what every end of the wait answers.

Waiting itself is the caller's, blocking or in an event loop. A request that nobody can come back for ends with its
caller: `give_up` cancels its job. One that carries an idempotency key lives on to its deadline, and a retry finds it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from producer_sdk.client import Client, JobOptions
from producer_sdk.exchange.models import models_of
from producer_sdk.exchange.request import Request, job_id_of, lasting, options_of, wants_frames
from producer_sdk.exchange.response import Response, of_error, of_reply
from producer_sdk.exchange.route import WHOLE, allow, is_models, protocol_of, shape_of
from producer_sdk.future import Future, Pending
from producer_sdk.stream import Stream
from protocols.dialects import dialect_of, error_body
from protocols.errors import DeadlineExceeded, NoLiveWorker, RolloutError
from protocols.job import Reply

LOOK_S = 10.0
"""A look at the fleet takes no longer."""


class Call:
    """A request under way."""

    def __init__(
        self,
        pending: Pending[Any],
        answer: Callable[[Any], Response],
        *,
        request_id: str,
        shape: str,
        limit_s: float | None,
        job: Future[Reply] | None = None,
        lasting: bool = False,
        stream: Stream | None = None,
    ) -> None:
        """`job`: what `give_up` cancels, unless it is `lasting`; `stream`: where frames are asked for."""
        self.pending, self.answer, self.stream = pending, answer, stream
        self.request_id, self.shape, self.limit_s = request_id, shape, limit_s
        self._job, self._lasting = job, lasting

    def give_up(self) -> Pending[int] | None:
        """Cancel the job, if it is nobody's any more; the order is on its way at once, waited for or not."""
        if self._job is None or self._lasting or self._has_ended(self._job):
            return None
        return self._job.cancel()

    def left_behind(self, error: BaseException | None) -> None:
        """Give up where the wait has ended in this error and the job has not: it is queued, nobody would hear of it."""
        if isinstance(error, NoLiveWorker):
            self.give_up()

    @staticmethod
    def _has_ended(job: Future[Reply]) -> bool:
        return job.done() and not isinstance(job.exception(), NoLiveWorker)

    def late(self) -> DeadlineExceeded:
        """What to say when the wait is over: the job's own deadline passes in the same moment."""
        return DeadlineExceeded(
            f"not answered within {self.limit_s or 0:g} s, the time limit of the request; give it more, or fewer tokens"
        )

    def last_frame(self, error: RolloutError) -> bytes:
        """The frame that ends a stream in this error."""
        return dialect_of(self.shape).error_frame(error_body(self.shape, error, self.request_id))

    def failed(self, error: RolloutError, *, again: bool | None = None) -> Response:
        """What to say of an error that stands for the answer; `again` as in `of_error`."""
        self.left_behind(error)
        if self._lasting or self._job is None:
            again = True
        return of_error(error, self.shape, self.request_id, again=again)


def begin(client: Client, request: Request) -> Call | Response:
    """Send what the request asks for; a Response where it is refused at once."""
    shape = shape_of(request.path, claude=request.speaks_claude)
    request_id = "none"
    try:
        request_id = job_id_of(request)
        if is_models(request.path):
            return _models(client, request, request_id, shape)
        return _job(client, request, request_id)
    except RolloutError as error:
        return of_error(error, shape, request_id)


def _models(client: Client, request: Request, request_id: str, shape: str) -> Call:
    allow(request.method, "GET", request.path)
    answer = partial(models_of, request=request, request_id=request_id)
    return Call(client.fleet(), answer, request_id=request_id, shape=shape, limit_s=LOOK_S)


def _job(client: Client, request: Request, job_id: str) -> Call:
    protocol = protocol_of(request.method, request.path)
    options: JobOptions = {**options_of(request), "job_id": job_id}
    stream = None
    if protocol not in WHOLE and wants_frames(request.body):
        stream = client.stream(request.body, protocol=protocol, **options)
    job = stream.reply if stream else client.submit(request.body, protocol=protocol, **options)
    return Call(
        job,
        partial(of_reply, protocol=protocol),
        request_id=job_id,
        shape=protocol,
        limit_s=options.get("timeout_s"),
        job=job,
        lasting=lasting(request),
        stream=stream,
    )
