"""The error tree: one class a cause, each with a `code`, an HTTP status and whether a retry can help.

    RolloutError
    ├── RequestError            the job itself is at fault; a retry gives the same answer
    │   ├── InvalidRequest          400  a field is wrong
    │   ├── UnsupportedOption       400  a field that this fleet cannot honour
    │   ├── UnknownProtocol         400  no dialect of that name
    │   ├── ContextLengthExceeded   400  the prompt leaves no room in the context
    │   ├── ModelNotFound           404  the pool serves another model
    │   ├── JobConflict             409  the job id belongs to another body
    │   └── BodyTooLarge            413  more bytes than a job may have
    ├── JobError                the job was accepted and ended without its answer
    │   ├── Cancelled               499  somebody cancelled it
    │   ├── Aborted                 503  a pause in mode `abort` ended it
    │   ├── DeadlineExceeded        504  its deadline passed
    │   ├── StalenessExceeded       410  its tokens fell too far behind the wanted policy version
    │   ├── SessionReleased         410  its tokens go on from a turn that its session has no more
    │   ├── EngineFailed            500  the engine raised while it generated
    │   └── WorkerLost              500  its workers died too often
    ├── QueueError              the queue did not take or find the job
    │   ├── QueueFull               429  the backlog limit is reached
    │   ├── NoLiveWorker            503  nobody serves this pool
    │   ├── JobNotFound             404  no reply key of that id
    │   ├── PoolNotPrepared         503  the pool has no function library and this user may not load it
    │   └── ServerUnavailable       503  Redis does not answer or refuses
    ├── ControlError            a command to a fleet was not obeyed
    │   ├── InvalidCommand          400  its words are none
    │   ├── ControlRefused          409  it is not its time; the message names what comes first
    │   ├── ControlBusy             503  a worker is about to be ready for it
    │   └── ControlIncomplete       504  a worker refused, or said nothing
    ├── EngineError             the engine did not do what it was told; it is as it was before
    │   ├── WeightsRefused          409  these weights are not loaded; the old ones stay
    │   ├── EngineBusy              409  a generation is under way
    │   └── OutOfMemory             503  the device has no room for the weights
    ├── HttpError               the HTTP front did not take the request
    │   ├── KeyMissing              401  no key, or an unknown one
    │   ├── KeyRefused              403  the key is for something else
    │   ├── RouteNotFound           404  no such path
    │   ├── MethodNotAllowed        405  the path takes another method
    │   ├── RequestTooSlow          408  its body did not arrive in time
    │   └── HeadTooLarge            431  its path or headers are too long
    ├── ResultTimeout           504  the wait ended, the job goes on
    └── ConfigError             400  a setting is wrong

A message says what was wrong, why, and what to do. It travels to clients: it never carries a
secret, a path or a traceback. Every error can be pickled.
"""

import re
from typing import ClassVar

_LOGIN = re.compile(r"(?<=//)[^/\s]*@|(?<=[?&]username=)[^&\s]*|(?<=[?&]password=)[^&\s]*")


def without_login(text: str) -> str:
    """The text with users and passwords of URLs left out, for what others say of a command line."""
    return _LOGIN.sub("", text)


class RolloutError(Exception):
    """Base of all errors of this project.

    `param` names the field at fault, as in OpenAI's error body. `retry_after_s` is set where
    waiting helps.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(RolloutError):
    """The job itself is at fault."""

    http_status = 400


class InvalidRequest(RequestError):
    """A field of the body or of the job is wrong."""

    code = "invalid_request"


class UnsupportedOption(RequestError):
    """An option that the dialect or the engine cannot honour."""

    code = "unsupported_option"


class UnknownProtocol(RequestError):
    """No dialect has that name."""

    code = "unknown_protocol"


class ContextLengthExceeded(RequestError):
    """The prompt, with the tokens asked for, does not fit into the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """The pool serves another model than the body names."""

    code = "model_not_found"
    http_status = 404


class JobConflict(RequestError):
    """The job id was accepted before with another body."""

    code = "job_conflict"
    http_status = 409


class BodyTooLarge(RequestError):
    """The body has more bytes than a job may have."""

    code = "body_too_large"
    http_status = 413


class JobError(RolloutError):
    """The job was accepted and ended without its answer."""


class Cancelled(JobError):
    """Somebody cancelled the job."""

    code = "cancelled"
    http_status = 499


class Aborted(JobError):
    """A pause in mode `abort` ended the job."""

    code = "aborted"
    http_status = 503


class DeadlineExceeded(JobError):
    """The job's deadline passed."""

    code = "deadline_exceeded"
    http_status = 504


class StalenessExceeded(JobError):
    """The job's tokens fell behind the wanted policy version by more than its `max_staleness`."""

    code = "staleness_exceeded"
    http_status = 410


class SessionReleased(JobError):
    """Earlier attempts' tokens go on from a turn that its session has no more."""

    code = "session_released"
    http_status = 410


class EngineFailed(JobError):
    """The engine raised while it generated."""

    code = "engine_failed"
    retryable = True


class WorkerLost(JobError):
    """The workers that held the job died too often."""

    code = "worker_lost"


class QueueError(RolloutError):
    """The queue did not take or find the job."""

    http_status = 503


class QueueFull(QueueError):
    """The pool's backlog limit is reached."""

    code = "rate_limit_exceeded"
    http_status = 429
    retryable = True


class NoLiveWorker(QueueError):
    """No worker serves the pool."""

    code = "no_live_worker"
    retryable = True


class JobNotFound(QueueError):
    """No job of that id is known, or its reply has expired."""

    code = "job_not_found"
    http_status = 404


class PoolNotPrepared(QueueError):
    """The server lacks the pool's function library or groups, and this user may not make them."""

    code = "pool_not_prepared"


class ServerUnavailable(QueueError):
    """Redis does not answer, or refuses."""

    code = "server_unavailable"
    retryable = True


class ControlError(RolloutError):
    """A command to a fleet was not obeyed."""


class InvalidCommand(ControlError):
    """The words of a command are none."""

    code = "invalid_command"
    http_status = 400


class ControlRefused(ControlError):
    """A command came out of order; the message names what has to come first."""

    code = "control_refused"
    http_status = 409


class ControlBusy(ControlError):
    """A worker is about to be ready for this command."""

    code = "control_busy"
    http_status = 503
    retryable = True


class ControlIncomplete(ControlError):
    """A worker refused a command, or has said nothing for as long as the caller waited."""

    code = "control_incomplete"
    http_status = 504


class EngineError(RolloutError):
    """The engine did not do what it was told, and is as it was before."""


class WeightsRefused(EngineError):
    """These weights are not loaded; the old ones and their version stay."""

    code = "weights_refused"
    http_status = 409


class EngineBusy(EngineError):
    """A generation is under way, and the weights may not change below it."""

    code = "engine_busy"
    http_status = 409
    retryable = True


class OutOfMemory(EngineError):
    """The device has no room for the weights."""

    code = "out_of_memory"
    http_status = 503
    retryable = True


class HttpError(RolloutError):
    """The HTTP front did not take the request."""


class KeyMissing(HttpError):
    """It carries no key, or one that is not known."""

    code = "invalid_api_key"
    http_status = 401


class KeyRefused(HttpError):
    """Its key is not for this route."""

    code = "permission_denied"
    http_status = 403


class RouteNotFound(HttpError):
    """There is no such path."""

    code = "route_not_found"
    http_status = 404


class MethodNotAllowed(HttpError):
    """The path takes another method."""

    code = "method_not_allowed"
    http_status = 405


class RequestTooSlow(HttpError):
    """Its body did not arrive in time."""

    code = "request_too_slow"
    http_status = 408


class HeadTooLarge(HttpError):
    """Its path or its headers are too long."""

    code = "head_too_large"
    http_status = 431


class ResultTimeout(RolloutError, TimeoutError):
    """A wait for a result ended; the job goes on."""

    code = "result_timeout"
    http_status = 504


class ConfigError(RolloutError):
    """A setting is wrong."""

    code = "config_error"
    http_status = 400


def _tree(base: type[RolloutError]) -> dict[str, type[RolloutError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found = _tree(child) | found
    return found


def error_of(code: str, message: str) -> RolloutError:
    """The error that a reply's `error` field names; an unknown code gives the base class."""
    return _tree(RolloutError).get(code, RolloutError)(message)
