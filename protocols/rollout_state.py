"""The normal form that all dialects meet in: messages as blocks, sampling parameters, token ids, log-probabilities.

Field names are XTuner's where it has the field (`RolloutState`, `SampleParams`, `Status` of its
`rl_data`), so that a trainer maps one to the other field by field. Engine token ids are the truth;
text is a view of them.
"""

import sys
from array import array
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import msgspec

from protocols.message import Block, Guide, Message, Reasoning, Tool, ToolChoice

if TYPE_CHECKING:
    Ints, Floats = array[int], array[float]
else:  # subscriptable at run time from Python 3.12 on
    Ints = Floats = array


class TokenIds(Ints):
    """Token ids, unsigned 32 bit; `numpy.frombuffer(ids, "<u4")` sees them without a copy."""

    def __new__(cls, ids: Iterable[int] = ()) -> Self:
        """Copy `ids`; raises OverflowError outside 0 .. 2**32 - 1."""
        if isinstance(ids, (bytes, bytearray)):  # an array would take them for its memory
            ids = iter(ids)
        return Ints.__new__(cls, "I", ids)  # pyright: ignore[reportReturnType]

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> Self:
        """From little-endian u32, as on the wire."""
        return _from_bytes(cls(), data)


class Logprobs(Floats):
    """Natural-log probabilities, 32-bit floats; `numpy.frombuffer(values, "<f4")` sees them without a copy."""

    def __new__(cls, values: Iterable[float] = ()) -> Self:
        """Copy `values`, rounded to 32 bits."""
        return Floats.__new__(cls, "f", values)  # pyright: ignore[reportReturnType]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """From little-endian f32, as on the wire."""
        return _from_bytes(cls(), data)


class RoutedExperts(msgspec.Struct, frozen=True):
    """Which experts each position went to, for a trainer that replays the routing.

    `numpy.frombuffer(ids, "<u2").reshape(shape)` sees them without a copy.
    """

    shape: tuple[int, int, int]
    """`(positions, layers, experts of a token)`; positions are those of prompt and response but the last, which the
    model has drawn and not seen."""
    ids: bytes
    """Little-endian u16."""


Numbers = TypeVar("Numbers", bound="array[int] | array[float]")


def _from_bytes(empty: Numbers, data: bytes | bytearray) -> Numbers:
    empty.frombytes(data)
    if sys.byteorder == "big":
        empty.byteswap()
    return empty


class SampleParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to sample. Names and meanings are XTuner's; the neutral values are the defaults."""

    n: int = 1
    """Samples of the prompt; sample `i` draws with seed `sampling_seed + i`."""
    max_tokens: int | None = None
    """Most tokens a sample may have; None: what is left of the context."""
    min_tokens: int = 0
    """Stop tokens are not drawn, and stop strings not looked for, before this many tokens."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    repetition_penalty: float = 1.0
    """Over prompt and response, as in Hugging Face's generate."""
    presence_penalty: float = 0.0
    """Over the response only, as OpenAI defines it."""
    frequency_penalty: float = 0.0
    """Over the response only, as OpenAI defines it."""
    stops: tuple[str, ...] = ()
    """Strings that end a sample, wherever token borders fall."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sample, beside the model's own."""
    include_stop_str_in_output: bool = False
    """Whether the text keeps the stop string; the token ids always keep it."""
    skip_special_tokens: bool = True
    """Whether the text leaves out special tokens; the token ids always keep them."""
    return_logprob: bool = True
    """Whether the dialect's response shows log-probabilities; the rollout state always has them."""
    top_logprobs: int = 0
    """Alternatives recorded for each token."""
    return_routed_experts: bool = False
    """Whether the rollout state has them; of a model that is a mixture of experts."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """`(token id, bias)`: added to the logits before anything else, -100 .. 100."""
    guide: Guide | None = None
    """What the tokens are constrained to."""
    sampling_seed: int | None = None
    """None: a seed made from the job id, so that a second attempt draws as the first did."""


class Status(StrEnum):
    """What became of a rollout; XTuner's words."""

    INIT = "init"
    COMPLETED = "completed"
    ABORTED = "aborted"
    EXPIRED = "expired"
    FAILED = "failed"
    FILTERED = "filtered"
    ARCHIVED = "archived"


FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
"""Why a sample ended. `stop`: a stop token or string; `length`: the token limit or the context."""


class SessionPlace(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where in its session a response stands."""

    id: str
    turn: int = 1
    """1 for a root of the session's tree."""
    parent: str | None = None
    """The rollout id of the turn that it goes on from."""
    reused_tokens: int = 0
    """How many of `prompt_ids` are earlier turns', as the engine saw and drew them."""
    branch: str | None = None
    """Why it goes on from no earlier turn, although the session has some."""


class RolloutState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sample of one prompt, from request to response."""

    rollout_id: str = ""
    """`<job id>/<index>`."""
    group_id: str | None = None
    """Shared by the samples that a trainer compares; the job id unless the job names a group."""
    session_id: str | None = None
    session: SessionPlace | None = None
    """Set where `session_id` is."""
    index: int = 0
    """Which of the job's `n` samples this is."""
    message: tuple[Message, ...] = ()
    """The prompt as a conversation; empty where the job brought text or token ids."""
    prompt: str | None = None
    """The prompt as plain text, not put into a chat template."""
    tools: tuple[Tool, ...] = ()
    """What the chat template is told of."""
    tool_choice: ToolChoice = ToolChoice()
    reasoning: Reasoning = Reasoning()
    prompt_ids: TokenIds = msgspec.field(default_factory=TokenIds)
    """The prompt as the engine saw it."""
    sample_params: SampleParams = SampleParams()
    response: str | None = None
    """The text of `response_ids`, without the stop string unless it was asked for."""
    output: tuple[Block, ...] = ()
    """The response as blocks: text, thinking, tool calls. A view of `response_ids`, as `response` is."""
    parse_error: str | None = None
    """Why markup of the response stayed text; nothing is repaired."""
    response_ids: TokenIds = msgspec.field(default_factory=TokenIds)
    """Every generated token, the stop token included."""
    logprobs: Logprobs = msgspec.field(default_factory=Logprobs)
    """`[response tokens]`, under the policy as it is: before temperature, penalties and truncation."""
    top_ids: TokenIds = msgspec.field(default_factory=TokenIds)
    """`[response tokens x top_logprobs]`, likeliest first."""
    top_logprobs: Logprobs = msgspec.field(default_factory=Logprobs)
    """Log-probabilities of `top_ids`."""
    routed_experts: RoutedExperts | None = None
    """Where they were asked for; None where the sample was cut off, or was whole when an earlier attempt ended."""
    policy_versions: tuple[tuple[int, int], ...] = ()
    """`(version, start)` spans: the tokens from `start` on were produced by that policy version."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the token id of `stop_token_ids`, that ended the sample."""
    status: Status = Status.INIT
    error_msg: str | None = None

    @property
    def token_ids(self) -> TokenIds:
        """`response_ids`."""
        return self.response_ids

    @property
    def text(self) -> str:
        """`response`, or the empty string where there is none."""
        return self.response or ""

    @property
    def response_mask(self) -> list[int]:
        """`[response tokens]`, the loss mask: 1 where the policy produced the token."""
        return [1] * len(self.response_ids)

    @property
    def response_model_steps(self) -> list[int]:
        """`[response tokens]`, the policy version of each token."""
        ends = [start for _, start in self.policy_versions[1:]] + [len(self.response_ids)]
        spans = zip(self.policy_versions, ends, strict=True) if self.policy_versions else ()
        return [version for (version, start), end in spans for _ in range(start, end)]
