"""From the normal form to what an engine takes: token ids, and parameters without open ends."""

import asyncio
import hashlib
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from protocols.dialects.base import Normal
from protocols.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, UnsupportedOption
from protocols.job import Job
from protocols.message import Message, Reasoning
from protocols.rollout_state import RolloutState, SampleParams, SessionPlace, TokenIds
from worker.engines.base import Call, Engine, Turn
from worker.session import Thread, placed

THREAD_BYTES = 64 * 1024
"""A longer prompt is tokenized beside the event loop."""
_NEUTRAL = SampleParams()


def check(normal: Normal, engine: Engine, pool: str) -> None:
    """Refuse what this engine cannot honour, before any work."""
    if normal.model not in (None, "", engine.model, pool):
        raise ModelNotFound(
            f"`model`: {normal.model[:80]!r} is not served here; pool {pool} serves {engine.model!r}",
            param="model",
        )
    params = normal.state.sample_params
    for name in SampleParams.__struct_fields__:
        if getattr(params, name) != getattr(_NEUTRAL, name) and name not in engine.capabilities:
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


async def render(
    normal: Normal, job: Job, engine: Engine, thread: Thread | None = None
) -> tuple[RolloutState, Call]:
    """The rollout state with its prompt as token ids, and the call; raises ContextLengthExceeded.

    `thread` is what the job's session knows: the prompt goes on from its tokens where it can.
    """
    state, context = normal.state, engine.context_tokens
    size = _text_bytes(state)
    if size > context * engine.tokenizer.longest_token_bytes:
        raise _too_long(state, f"{size} bytes", context)
    tokenize = partial(_prompt_ids, state, engine, thread)
    place, prompt_ids = await asyncio.to_thread(tokenize) if size > THREAD_BYTES else tokenize()
    room = context - len(prompt_ids)
    if room <= 0:
        raise _too_long(state, f"{len(prompt_ids)} tokens", context)
    if not prompt_ids:
        raise InvalidRequest("`prompt`: it has no tokens", param="prompt")
    params = state.sample_params
    seed = seed_of(job.id) if params.sampling_seed is None else params.sampling_seed
    params = replace(params, max_tokens=min(params.max_tokens or room, room), sampling_seed=seed)
    state = replace(
        state,
        prompt_ids=prompt_ids,
        sample_params=params,
        group_id=job.group or normal.options.group or job.id,
        session_id=job.session or normal.options.session,
        session=place,
    )
    return state, Call(prompt_ids=prompt_ids, params=params, script=normal.options.script)


def seed_of(job_id: str) -> int:
    """A seed of 63 bits for a job that names none: every attempt draws the same."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=8).digest()) >> 1


def _prompt_ids(
    state: RolloutState, engine: Engine, thread: Thread | None
) -> tuple[SessionPlace | None, TokenIds]:
    if thread is None:
        return None, _fresh_ids(state, engine)
    tokenizer = engine.tokenizer

    def write(messages: Sequence[Message], _: Reasoning, opens: bool) -> str:
        return tokenizer.write(_turns(messages), opens=opens)

    place, ids = placed(thread, state, write, tokenizer.encode_written, tokenizer.special_ids)
    return place, ids or _fresh_ids(state, engine)


def _turns(messages: Sequence[Message]) -> list[Turn]:
    return [Turn(role=m.role, content="".join(b.text for b in m.content)) for m in messages]


def _fresh_ids(state: RolloutState, engine: Engine) -> TokenIds:
    if state.prompt_ids:
        return state.prompt_ids
    if state.prompt is not None:
        return engine.tokenizer.encode(state.prompt)
    return engine.tokenizer.render(_turns(state.message))


def _text_bytes(state: RolloutState) -> int:
    texts = [block.text for message in state.message for block in message.content]
    return sum(map(len, texts)) + len(state.prompt or "")


def _too_long(state: RolloutState, size: str, context: int) -> ContextLengthExceeded:
    field = "messages" if state.message else "input_ids" if state.prompt is None else "prompt"
    return ContextLengthExceeded(
        f"`{field}`: {size}; the model's context of {context} tokens leaves no room for an answer",
        param=field,
    )
