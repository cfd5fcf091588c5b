"""What an engine is: token ids in, segments out.

An engine draws tokens and says which policy version drew them. It knows nothing of queues, dialects
or text stop strings: the pipeline watches the text and tells the engine when a sample has ended.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NotRequired, Protocol, TypedDict

import msgspec

from protocols.control import Memory
from protocols.dialects.base import Script
from protocols.errors import EngineFailed
from protocols.job import Segment
from protocols.rollout_state import SampleParams, TokenIds


class Call(msgspec.Struct, frozen=True):
    """What one job asks of an engine."""

    prompt_ids: TokenIds
    params: SampleParams
    """`max_tokens` and `sampling_seed` are set; prompt and `max_tokens` together fit the context."""
    script: Script | None = None
    kept: tuple[TokenIds, ...] = ()
    """What earlier attempts drew of each sample; empty, or one a sample. They count as its response."""
    ended: frozenset[int] = frozenset()
    """Samples that are whole already: nothing is drawn for them."""


class Weights(msgspec.Struct, frozen=True):
    """Weights to be loaded."""

    version: int
    """The policy version that their tokens bear."""
    path: str | None = None
    """A safetensors file, or a directory of them; None: those that the engine starts with."""
    sha256: str | None = None
    """Lower-case hex, of the file, or of all `*.safetensors` of the directory, one after another in order of name:
    `LC_ALL=C; cat *.safetensors | sha256sum`."""


class Counters(TypedDict):
    """What an engine has done and has to do; totals since it started."""

    running_samples: int
    waiting_samples: int
    forwarded_tokens: int
    """Positions that went through the model, prompts included; 0 where there is no model."""
    generated_tokens: int


class Markup(msgspec.Struct, frozen=True):
    """How a model writes what is not plain text: what opens and closes it. None: it has no such thing."""

    thinking: tuple[str, str] | None = None
    call: tuple[str, str] | None = None
    """Around JSON of an object with `name` and `arguments`."""


NO_OPTIONS: Mapping[str, bool | str] = MappingProxyType({})


class Function(TypedDict):
    """A call as a chat template wants it."""

    name: str
    arguments: dict[str, object] | str
    """An object; the raw text where that is no JSON of one."""


class TurnCall(TypedDict):
    """A call in a turn of the assistant."""

    id: str
    type: Literal["function"]
    function: Function


class Turn(TypedDict):
    """One message as a chat template wants it."""

    role: str
    """system, user, assistant or tool."""
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[TurnCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Declared(TypedDict):
    """A tool as a chat template wants it."""

    name: str
    description: NotRequired[str]
    parameters: object


class TurnTool(TypedDict):
    """A tool, as OpenAI writes it."""

    type: Literal["function"]
    function: Declared


class Template(msgspec.Struct, frozen=True):
    """What a model's chat template can show. What it cannot is told in words of ours, or in another turn."""

    tools: bool = False
    """Tools, calls of them, and results in turns of role tool."""
    system: bool = True
    """A system turn at the beginning."""
    late_system: bool = False
    """One anywhere."""
    neighbours: bool = True
    """Two turns of one role beside each other."""
    options: frozenset[str] = frozenset()
    """Its switches of `OPTIONS`."""


OPTIONS = ("enable_thinking", "thinking", "reasoning_effort")
"""Variables by which chat templates are told whether and how much to think."""


class Tokenizer(Protocol):
    """Text to and from token ids, as the model was trained."""

    longest_token_bytes: int
    """No token stands for more bytes, so `bytes / longest` is a lower bound of a text's tokens."""
    special_ids: frozenset[int]
    """Tokens that `skip_special_tokens` leaves out of a text."""
    markup: Markup
    """How the model thinks and calls tools."""
    template: Template

    def encode(self, text: str) -> TokenIds:
        """Token ids of a text, without special tokens around it."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of some token ids; an incomplete character at the end is U+FFFD."""
        ...

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[TurnTool] = (),
        options: Mapping[str, bool | str] = NO_OPTIONS,
    ) -> TokenIds:
        """A conversation in the model's chat template, up to where the assistant speaks.

        Raises InvalidRequest where the template refuses it.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token id stands for."""
        ...


class Generation(Protocol):
    """One call under way: iterate over its segments, each sample's in order, samples interleaved.

    Segments begin after what was kept. The iteration ends after the last segment of the last
    sample. It raises EngineFailed where the engine broke, RequestError where a remote one refuses the call.
    """

    def __aiter__(self) -> AsyncIterator[Segment]:
        """The segments."""
        ...

    def stop(self, index: int) -> None:
        """End one sample here; segments of it that are under way may still come."""
        ...

    def close(self) -> None:
        """Give up every sample that has not ended; what it drew before still comes. May be called again."""
        ...


class Engine(Protocol):
    """What generates."""

    name: str
    model: str
    """The served name, which a body's `model` is compared with."""
    tokenizer: Tokenizer
    context_tokens: int
    """Most tokens of prompt and response together."""
    vocabulary: int
    """Token ids are below this."""
    capabilities: frozenset[str]
    """Fields of SampleParams that it honours, and `script`; any other than neutral value is refused before work.
    Beside them `offload` and `update_weights`: what may be done with its weights."""
    policy_version: int
    """Of the weights that it holds now."""
    memory: Memory
    """Only `loaded` generates."""

    async def start(self) -> None:
        """Load the weights; return when it could generate."""
        ...

    async def close(self) -> None:
        """Stop, and free what it holds."""
        ...

    async def breakdown(self) -> EngineFailed:
        """What broke the engine for good, as soon as something has; its process cannot generate any more."""
        ...

    def generate(self, call: Call) -> Generation:
        """Begin a call; it waits inside the engine while all slots are in use.

        Raises EngineFailed where the engine could not draw a token: it is not running, or its weights are not loaded.
        """
        ...

    async def update_weights(self, weights: Weights) -> None:
        """Replace all weights or none; with loaded ones or stale room. From then on tokens bear the new version.

        This and the two below are for an engine without a generation under way, and raise EngineBusy for any other.
        Raises WeightsRefused, which says what is wrong; then the old weights and their version stay.
        """
        ...

    async def offload(self, level: int) -> None:
        """Free the device's memory, caches included: 1 keeps the weights in host memory, 2 does not keep them."""
        ...

    async def onload(self) -> None:
        """Take the memory again: offloaded weights are loaded, discarded ones leave stale room.

        Raises OutOfMemory where the device has none; then all is as before.
        """
        ...

    def counters(self) -> Counters:
        """Its load and its totals."""
        ...
