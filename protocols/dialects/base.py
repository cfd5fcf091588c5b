"""What a dialect is: one wire shape of a job, converted to the normal form and back.

A dialect is the only place that knows its protocol. It refuses what it cannot honour (RequestError
with the field's name), reports what it accepts and does not act on (`ignored`), and never drops a
field silently.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol

import msgspec

from protocols.errors import RolloutError
from protocols.job import Segment
from protocols.rollout_state import RolloutState

MAX_SAMPLES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 1024

Unsupported = Literal["ignore", "warn", "error"]
"""What becomes of fields that have no effect here; `Report` in field.py has the meaning of each."""
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the scripted engine shall do; every other engine refuses it."""

    text: str | None = None
    """The answer; absent: the last user text."""
    ms_per_token: Annotated[float, msgspec.Meta(ge=0, le=60_000)] = 0
    fail: Literal["error", "crash", "hang"] | None = None
    """Raise, kill the worker's process, or never go on."""
    at_token: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How many tokens come before `fail`."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `rollout` object of a request: what no public protocol has a field for."""

    group: Name | None = None
    """As the stream field, which wins."""
    session: Name | None = None
    """As the stream field, which wins."""
    script: Script | None = None
    unsupported: Unsupported | None = None


class Normal(msgspec.Struct, frozen=True):
    """What a dialect understood of a body."""

    state: RolloutState
    """In status init, with `message`, `prompt` or `prompt_ids` set, and the sampling parameters."""
    model: str | None = None
    """The model that the body names."""
    options: Options = Options()
    ignored: tuple[str, ...] = ()
    """Fields that were accepted without effect."""
    stream: bool = False
    """Whether the body asks for frames while the answer is generated."""
    stream_usage: bool = False
    """Whether the frames end with the usage, where the protocol leaves that to the request."""
    counts: bool = False
    """Whether only the prompt's tokens are asked for, and nothing is to be drawn."""
    asked: tuple[str, ...] = ()
    """What the dialect remembers of the request until it answers; for nobody else."""


class Answer(msgspec.Struct, frozen=True):
    """What a dialect's response is made of."""

    job_id: str
    model: str
    created_s: int
    states: tuple[RolloutState, ...]
    """One a sample, in status completed."""
    ignored: tuple[str, ...]
    attempts: int
    context_tokens: int
    """The model's context; a sample that fills it ends as `length`."""
    token_bytes: Callable[[int], bytes]
    """The bytes that a token id stands for."""
    asked: tuple[str, ...] = ()
    """`Normal.asked`."""


class Piece(msgspec.Struct, frozen=True):
    """What a segment adds to the view of one sample: the beginning of a block, or more of it.

    Pieces follow from the tokens so far alone, however these were cut into segments, so that another attempt goes on
    with the very next piece.
    """

    kind: Literal["text", "thinking", "tool_use"]
    text: str
    """More of the block; of a tool call, of its arguments."""
    opens: bool = False
    """Whether a new block begins here; the one before it, if any, has ended."""
    id: str = ""
    name: str = ""
    """Id and name of a tool call, where it opens."""


class Streamed(msgspec.Struct, frozen=True):
    """What is known when a stream begins."""

    job_id: str
    model: str
    created_s: int
    states: tuple[RolloutState, ...]
    """One a sample: prompt and parameters, nothing drawn yet."""
    usage: bool
    """`Normal.stream_usage`."""
    ignored: tuple[str, ...]
    token_bytes: Callable[[int], bytes]
    asked: tuple[str, ...] = ()
    """`Normal.asked`."""


class Stream(Protocol):
    """The frames of one job in its protocol's own shape, as bytes of server-sent events."""

    plain: bool
    """Whether its pieces are the text as it stands, markup and thinking included, as in `RolloutState.response`."""

    def begin(self) -> bytes:
        """What comes before the first token."""
        ...

    def add(self, segment: Segment, pieces: Sequence[Piece]) -> bytes:
        """What a segment adds; empty where it adds nothing that is shown yet."""
        ...

    def end(self, body: bytes, rest: Sequence[Sequence[Piece]]) -> bytes:
        """What comes after the last segment: `rest`, held back by each sample's view, then reasons and usage.

        These are taken from `body`, the whole response.
        """
        ...


class Dialect(Protocol):
    """One wire shape."""

    name: str
    """The job's `protocol` field."""

    def normalize(self, body: bytes) -> Normal:
        """The normal form of a request body; raises RequestError."""
        ...

    def respond(self, answer: Answer) -> bytes:
        """The response body, JSON."""
        ...

    def error(self, error: RolloutError, job_id: str) -> bytes:
        """The error body, JSON."""
        ...

    def http_status(self, status: int) -> int:
        """The HTTP status that clients of this protocol know, for one of ours."""
        ...

    def stream(self, streamed: Streamed) -> Stream:
        """The frames of a job that begins."""
        ...

    def replay(self, body: bytes) -> bytes:
        """The frames of a response that is whole, for a reader who comes when the segments are gone."""
        ...

    def error_frame(self, body: bytes) -> bytes:
        """The frame that ends a stream which cannot go on; `body` is the error body."""
        ...
