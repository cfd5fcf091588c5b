"""What `/generate` takes and tells, as lmdeploy 0.18.0 has it, and which error an answer means.

A stream is server-sent events of `{text, output_ids, meta_info}`, each with the tokens since the last one; the last of
them bears the finish reason, and `[DONE]` follows. A fault within a stream is an event `{"error": …}`.
"""

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec

from protocols.errors import ContextLengthExceeded, EngineFailed, InvalidRequest, RequestError
from protocols.rollout_state import FinishReason, Logprobs, SampleParams, TokenIds

CAPABILITIES = frozenset(
    {
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stops",
        "stop_token_ids",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "return_logprob",
        "top_logprobs",
        "offload",
    }
)
"""`/generate` has no seed, min_tokens, presence_penalty or frequency_penalty. Its repetition_penalty counts neither the
prompt nor what is kept, and counts padding, so it is refused too."""

SAID_CHARS = 300
"""So much of what a server says is passed on."""
DONE = b"[DONE]"

_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_Chance = tuple[float, _TokenId]
"""A log-probability and its token id."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a request. Every parameter is told: what is left out, the server's own defaults would fill."""

    session_id: int
    input_ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: list[int]
    top_logprobs_num: int
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0
    ignore_eos: bool = False
    return_logprob: bool = True
    include_stop_str_in_output: bool = True
    """Else the token that ended the sample would be missing from its ids."""
    skip_special_tokens: bool = False
    stream: bool = True


def ask(
    params: SampleParams, session_id: int, input_ids: list[int], most: int, stop_ids: frozenset[int]
) -> Ask:
    """A request for at most `most` tokens after `input_ids`; `stop_ids` are the model's own."""
    greedy = params.temperature == 0
    return Ask(
        session_id=session_id,
        input_ids=input_ids,
        max_tokens=most,
        temperature=1.0 if greedy else params.temperature,
        top_p=1.0 if greedy else params.top_p,
        top_k=1 if greedy else params.top_k,
        stop_token_ids=sorted(stop_ids.union(params.stop_token_ids)),
        top_logprobs_num=params.top_logprobs,
    )


class Drawn(msgspec.Struct, frozen=True):
    """One event: the tokens since the last one."""

    token_ids: TokenIds = msgspec.field(default_factory=TokenIds)
    logprobs: Logprobs = msgspec.field(default_factory=Logprobs)
    top_ids: TokenIds = msgspec.field(default_factory=TokenIds)
    top_logprobs: Logprobs = msgspec.field(default_factory=Logprobs)
    finish_reason: FinishReason | None = None


class _Finish(msgspec.Struct, frozen=True):
    type: str


class _Meta(msgspec.Struct, frozen=True):
    finish_reason: _Finish | None = None
    output_token_logprobs: list[_Chance] | None = None
    output_top_logprobs: list[list[_Chance]] | None = None


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    code: int = 500


class _Event(msgspec.Struct, frozen=True):
    output_ids: list[_TokenId] = []
    meta_info: _Meta = _Meta()
    error: _Error | None = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_error = msgspec.json.Decoder(_Error).decode


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event of a stream, but of the last one, `DONE`.

    Only a line feed ends a line: the text of a token may be another of Unicode's ends of lines, as it is.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != DONE:
                yield data


def read_event(data: bytes, top_logprobs: int, vocabulary: int) -> Drawn:
    """One event of a stream; raises EngineFailed where it is not one, RolloutError where it tells of a fault."""
    try:
        event = _decode_event(data)
    except msgspec.MsgspecError as error:
        raise EngineFailed(f"the server's stream is garbled: {error}") from None
    if event.error is not None:
        raise error_of(event.error.code, event.error.message)
    meta, ids = event.meta_info, event.output_ids
    chances, tops = meta.output_token_logprobs or [], meta.output_top_logprobs or []
    if [token_id for _, token_id in chances] != ids:
        raise EngineFailed("the server's log-probabilities are not those of its tokens")
    if top_logprobs and [len(top) for top in tops] != [top_logprobs] * len(ids):
        raise EngineFailed(f"the server told other than {top_logprobs} alternatives of a token")
    if max(ids, default=0) >= vocabulary:
        raise EngineFailed(
            f"the server drew token {max(ids)}, and this model's are below {vocabulary}: it serves another model"
        )
    flat = [chance for top in tops for chance in top] if top_logprobs else []
    return Drawn(
        token_ids=TokenIds(ids),
        logprobs=Logprobs(value for value, _ in chances),
        top_ids=TokenIds(token_id for _, token_id in flat),
        top_logprobs=Logprobs(value for value, _ in flat),
        finish_reason=_reason(meta.finish_reason),
    )


def _reason(finish: _Finish | None) -> FinishReason | None:
    """Why a sample ended; raises EngineFailed where the server gave it up."""
    match finish.type if finish else None:
        case None:
            return None
        case "stop":
            return "stop"
        case "length":
            return "length"
        case other:
            raise EngineFailed(f"the server ended a sample without its end: {other}"[:SAID_CHARS])


def message_of(body: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        said = _decode_error(body).message
    except msgspec.MsgspecError:
        said = body.decode(errors="replace")
    return " ".join(said.split())[:SAID_CHARS]


def error_of(status: int, message: str) -> EngineFailed | RequestError:
    """The error that a status means: the request's own fault, or one that another attempt may not meet."""
    said = message[:SAID_CHARS]
    if status in {401, 403}:
        return EngineFailed(
            f"the server refuses this worker's key ({status}); set ROLLOUTQ_ENGINE_KEY to one of its --api-keys"
        )
    if status in {400, 413, 422} and "context length" in said:
        return ContextLengthExceeded(f"the server refuses the prompt: {said}")
    if status in {400, 413, 422}:
        return InvalidRequest(f"the server refuses the request: {said}")
    return EngineFailed(f"the server answers {status}: {said}")
