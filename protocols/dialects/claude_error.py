"""Anthropic's error body and HTTP statuses."""

import msgspec
from msgspec import UNSET, Raw, UnsetType

from protocols.codec import encode_json
from protocols.dialects.sse import event
from protocols.errors import RolloutError, UnsupportedOption

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status of ours to Anthropic's `type`; any other is an `api_error`."""
OVERLOADED = 529


class Details(msgspec.Struct, frozen=True):
    """What Anthropic's client acts on."""

    error_code: str
    unsupported: tuple[str, ...]


NO_THREADS = Details("thread_unsupported_request", ("thread",))
"""Its tool runner then sends the whole conversation, as it is wanted here."""


class Error(msgspec.Struct, frozen=True):
    """What is under `error`."""

    type: str
    message: str
    details: Details | UnsetType = UNSET


class ErrorBody(msgspec.Struct, frozen=True, tag="error"):
    """An error body."""

    error: Error
    request_id: str


class ClaudeErrors:
    """How the dialects of this family say what went wrong."""

    def error(self, error: RolloutError, job_id: str) -> bytes:
        """`{"type": "error", "error": {type, message}, "request_id"}`, with `details` of a thread."""
        kind = ERROR_TYPES.get(error.http_status, "api_error")
        threads = isinstance(error, UnsupportedOption) and error.param == "thread"
        told = Error(kind, error.message, NO_THREADS if threads else UNSET)
        return encode_json(ErrorBody(told, job_id))

    def error_frame(self, body: bytes) -> bytes:
        """The event that ends a stream which cannot go on."""
        return event("error", Raw(body))

    def http_status(self, status: int) -> int:
        """Anthropic's HTTP status for one of ours."""
        return OVERLOADED if status == 503 else status
