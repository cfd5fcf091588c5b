"""What the request bodies of OpenAI's chat and plain completions have in common."""

from typing import Annotated

import msgspec

from protocols.dialects.base import Name, Options
from protocols.dialects.field import Report, Verdicts, ignored, refused, withheld
from protocols.dialects.openai_tool import Format
from protocols.dialects.sampling import Sampling, Seed, Stop, Stops, Tokens

TOKEN_IDS = "token_ids"
"""In `asked`: `return_token_ids`, vLLM's `prompt_token_ids` and `token_ids` beside our own."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[object, ignored(False)] = None
    continuous_usage_stats: Annotated[object, withheld(False)] = None


class Body(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The common fields, those of vLLM, SGLang and lmdeploy included."""

    model: Name | None = None
    rollout: Options | None = None
    max_tokens: Tokens | None = None
    stop: Stop | Stops | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Format | None = None
    return_token_ids: bool | None = None

    user: Annotated[object, ignored()] = None
    priority: Annotated[object, ignored(0)] = None
    cache_salt: Annotated[object, ignored()] = None
    request_id: Annotated[object, ignored()] = None
    rid: Annotated[object, ignored()] = None
    return_prompt_token_ids: Annotated[object, ignored(True)] = None
    """SGLang's; they are always returned under `rollout`, as is what the next one asks for."""
    return_logprob: Annotated[object, ignored(True)] = None
    return_meta_info: Annotated[object, ignored(False)] = None

    prompt_logprobs: Annotated[object, withheld()] = None
    logprob_token_ids: Annotated[object, withheld([])] = None
    return_tokens_as_token_ids: Annotated[object, withheld(False)] = None
    return_hidden_states: Annotated[object, withheld(False)] = None

    min_p: Annotated[object, refused(0)] = None
    ignore_eos: Annotated[object, refused(False)] = None
    allowed_token_ids: Annotated[object, refused([])] = None
    bad_words: Annotated[object, refused([])] = None
    best_of: Annotated[object, refused(1)] = None
    use_beam_search: Annotated[object, refused(False)] = None
    length_penalty: Annotated[object, refused(1)] = None
    truncate_prompt_tokens: Annotated[object, refused()] = None
    echo: Annotated[object, refused(False)] = None
    structured_outputs: Annotated[object, refused({})] = None
    guided_json: Annotated[object, refused()] = None
    guided_regex: Annotated[object, refused()] = None
    guided_choice: Annotated[object, refused()] = None
    guided_grammar: Annotated[object, refused()] = None
    regex: Annotated[object, refused()] = None
    ebnf: Annotated[object, refused()] = None
    json_schema: Annotated[object, refused()] = None
    logits_processors: Annotated[object, refused([])] = None


_stream = Verdicts(StreamOptions)


def stops_of(body: Body) -> tuple[str, ...]:
    """`stop`, one or several."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def wants_usage(body: Body, report: Report) -> bool:
    """Whether a stream shall end with its usage."""
    if body.stream_options is None:
        return False
    _stream.check(body.stream_options, report, "stream_options")
    return bool(body.stream_options.include_usage)


def asked_of(body: Body) -> tuple[str, ...]:
    """What the answer has to show beside the usual."""
    return (TOKEN_IDS,) if body.return_token_ids else ()
