"""OpenAI's error body, which `generate` and jobs of unknown protocols get as well."""

import msgspec

from protocols.codec import encode_json
from protocols.dialects.sse import raw_data
from protocols.errors import NoLiveWorker, RolloutError

TYPES = {429: "rate_limit_error"}
"""HTTP status to OpenAI's `type`; the rest follows from who is at fault."""
_CLIENT_S = (400, 401, 403, 404, 405, 408, 409, 413, 431)
"""Statuses that say that the request is at fault."""
CODES = {NoLiveWorker.code: "overloaded"}
"""Where OpenAI's `code` is another than ours."""


class Error(msgspec.Struct, frozen=True):
    """What is under `error`."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    """The whole body."""

    error: Error


class OpenAIErrors:
    """How the dialects of this family say what went wrong."""

    def error(self, error: RolloutError, job_id: str) -> bytes:
        """`{"error": {message, type, param, code}}`."""
        code = CODES.get(error.code, error.code)
        return encode_json(ErrorBody(Error(error.message, _type_of(error), error.param, code)))

    def error_frame(self, body: bytes) -> bytes:
        """The event that ends a stream which cannot go on: clients raise what they find under `error`."""
        return raw_data(body)

    def http_status(self, status: int) -> int:
        """OpenAI's HTTP statuses are ours."""
        return status


def _type_of(error: RolloutError) -> str:
    status = error.http_status
    by_blame = "invalid_request_error" if status in _CLIENT_S else "server_error"
    return TYPES.get(status, by_blame)
