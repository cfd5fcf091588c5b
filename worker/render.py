"""From the normal form to what an engine takes: token ids, and parameters without open ends."""

import asyncio
import hashlib
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from protocols.dialects.base import Normal
from protocols.dialects.field import Report
from protocols.dialects.sampling import NEUTRAL
from protocols.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, UnsupportedOption
from protocols.job import Job
from protocols.message import Block, Image, Message, Reasoning, Text, Thinking, ToolResult, ToolUse
from protocols.rollout_state import RolloutState, SampleParams, SessionPlace, TokenIds
from worker.engines.base import Call, Engine, Tokenizer, Turn, TurnTool
from worker.engines.opening import opening_of
from worker.regions import PLAIN, Reading
from worker.session import Thread, placed, shown_tools
from worker.turns import images_of, options_of, tools_of, turns_of

THREAD_BYTES = 64 * 1024
"""A longer prompt is tokenized beside the event loop."""
_PARAMS = SampleParams.__struct_fields__


def check(normal: Normal, engine: Engine, pool: str) -> None:
    """Refuse what this engine cannot honour, before any work."""
    if normal.model not in (None, "", engine.model, pool):
        raise ModelNotFound(
            f"`model`: {normal.model[:80]!r} is not served here; pool {pool} serves {engine.model!r}",
            param="model",
        )
    _check_blocks(normal.state, engine)
    params = normal.state.sample_params
    for name in _PARAMS:
        if name not in engine.capabilities and getattr(params, name) != getattr(NEUTRAL, name):
            raise UnsupportedOption(f"`{name}`: engine {engine.name} cannot honour it", param=name)
    if normal.options.script and "script" not in engine.capabilities:
        raise UnsupportedOption(
            f"`rollout.script`: engine {engine.name} runs no scripts; the scripted engine does",
            param="rollout.script",
        )
    if params.max_tokens is not None and params.max_tokens > engine.context_tokens:
        raise InvalidRequest(
            f"`max_tokens`: {params.max_tokens}; the model's context is {engine.context_tokens} tokens",
            param="max_tokens",
        )
    ids = {"input_ids": normal.state.prompt_ids, "stop_token_ids": params.stop_token_ids}
    for field, token_ids in ids.items():
        if max(token_ids, default=0) >= engine.vocabulary:
            raise InvalidRequest(
                f"`{field}`: {max(token_ids)}; the vocabulary ends at {engine.vocabulary - 1}",
                param=field,
            )


def heard(normal: Normal, engine: Engine) -> Normal:
    """With `ignored` as it is for this engine: a chat template may have no switch for thinking.

    Raises UnsupportedOption where the request wants to know.
    """
    wanted = options_of(normal.state.reasoning)
    if not wanted or not wanted.keys().isdisjoint(engine.tokenizer.template.options):
        return normal
    report = Report(normal.options.unsupported)
    report.ignore("reasoning", "the chat template of this model has no switch for it")
    return replace(normal, ignored=(*normal.ignored, *report.noted))


async def render(
    normal: Normal, job: Job, engine: Engine, thread: Thread | None = None
) -> tuple[RolloutState, Call]:
    """The rollout state with its prompt as token ids, and the call.

    `thread` is what the job's session knows: the prompt goes on from its tokens where it can.
    Raises ContextLengthExceeded, unless tokens are only counted; InvalidRequest for what the chat template refuses.
    """
    state, context = normal.state, engine.context_tokens
    size = _text_bytes(state)
    if size > context * engine.tokenizer.longest_token_bytes and not normal.counts:
        raise _too_long(state, f"{size} bytes", context)
    tokenize = partial(_prompt_ids, state, engine, thread)
    place, prompt_ids = await asyncio.to_thread(tokenize) if size > THREAD_BYTES else tokenize()
    room = context - len(prompt_ids)
    if room <= 0 and not normal.counts:
        raise _too_long(state, f"{len(prompt_ids)} tokens", context)
    if not prompt_ids:
        raise InvalidRequest("`prompt`: it has no tokens", param="prompt")
    params = state.sample_params
    seed = seed_of(job.id) if params.sampling_seed is None else params.sampling_seed
    most = max(0, room if params.max_tokens is None else min(params.max_tokens, room))
    params = replace(params, max_tokens=most, sampling_seed=seed)
    state = replace(
        state,
        prompt_ids=prompt_ids,
        sample_params=params,
        group_id=job.group or normal.options.group or job.id,
        session_id=job.session or normal.options.session,
        session=place,
    )
    return state, Call(prompt_ids=prompt_ids, params=params, script=normal.options.script)


def reading_of(state: RolloutState, tokenizer: Tokenizer) -> Reading:
    """What the response of a prompt is read for: markup in a conversation, calls where there are tools."""
    markup = tokenizer.markup
    if not state.message:
        return PLAIN
    if not state.tools or state.tool_choice.mode == "none":
        markup = replace(markup, call=None)
    return Reading(markup, thinking=opening_of(state.prompt_ids, tokenizer) == "opened")


def _check_blocks(state: RolloutState, engine: Engine) -> None:
    for number, _ in images_of(state.message):
        raise UnsupportedOption(
            f"`messages[{number}].content`: engine {engine.name} takes no images",
            param=f"messages[{number}].content",
        )
    if state.tools and engine.tokenizer.markup.call is None:
        raise UnsupportedOption(
            f"`tools`: how the model {engine.model} marks a call of a tool is not known here",
            param="tools",
        )


def seed_of(job_id: str) -> int:
    """A seed of 63 bits for a job that names none: every attempt draws the same."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=8).digest()) >> 1


def _prompt_ids(
    state: RolloutState, engine: Engine, thread: Thread | None
) -> tuple[SessionPlace | None, TokenIds]:
    tokenizer = engine.tokenizer
    if thread is None:
        return None, _fresh_ids(state, tokenizer)

    def write(messages: Sequence[Message], reasoning: Reasoning, opens: bool) -> str:
        said = _conversation(messages, state, tokenizer)
        return tokenizer.write(*said, options_of(reasoning), opens=opens)

    place, ids = placed(thread, state, write, tokenizer.encode_written, tokenizer.special_ids)
    return place, ids or _fresh_ids(state, tokenizer)


def _fresh_ids(state: RolloutState, tokenizer: Tokenizer) -> TokenIds:
    if state.prompt_ids:
        return state.prompt_ids
    if state.prompt is not None:
        return tokenizer.encode(state.prompt)
    said = _conversation(state.message, state, tokenizer)
    return tokenizer.render(*said, options_of(state.reasoning))


def _conversation(
    messages: Sequence[Message], state: RolloutState, tokenizer: Tokenizer
) -> tuple[list[Turn], list[TurnTool]]:
    """Turns and tools as the template is told of them."""
    tools = tools_of(shown_tools(state))
    turns = turns_of(messages, tools, tokenizer.template, tokenizer.markup.call or ("", ""))
    return turns, tools if tokenizer.template.tools else []


def _text_bytes(state: RolloutState) -> int:
    blocks = [block for message in state.message for block in message.content]
    texts = [_length(block) for block in blocks]
    tools = [len(tool.parameters) for tool in state.tools]
    return sum(texts) + sum(tools) + len(state.prompt or "")


def _length(block: Block) -> int:
    match block:
        case Text() | Thinking():
            return len(block.text)
        case ToolUse():
            return len(block.arguments)
        case ToolResult():
            return sum(map(_length, block.content))
        case Image():
            return 0


def _too_long(state: RolloutState, size: str, context: int) -> ContextLengthExceeded:
    field = "messages" if state.message else "input_ids" if state.prompt is None else "prompt"
    return ContextLengthExceeded(
        f"`{field}`: {size}; the model's context of {context} tokens leaves no room for an answer",
        param=field,
    )
