"""A turn of a session: its prompt goes on from the very tokens of the turns before it.

The chat template is asked for text only after the last answer that the session knows. What it would
write before that, were it asked again, is compared with itself, never with the tokens: these are the truth.
"""

import asyncio
from collections.abc import Awaitable, Callable, Container, Sequence

import msgspec
from msgspec.structs import replace

from protocols import codec
from protocols.errors import InvalidRequest, SessionReleased
from protocols.message import Block, Message, Reasoning, Text, Tool, ToolUse
from protocols.queue.rows import Lease
from protocols.rollout_state import RolloutState, SessionPlace, TokenIds
from protocols.session import (
    SESSION_BYTES,
    SESSION_TURNS,
    NewTurn,
    Node,
    Recalled,
    follow,
    trail,
)
from worker.outcome import Completed

UNKNOWN = "no answer of the session begins this conversation"
REWRITTEN = "the template rewrote history"
ANSWER = "[the answer goes here]"

Recall = Callable[[Lease, str, Sequence[str]], Awaitable[Recalled]]
"""`Broker.recall`."""
Write = Callable[[Sequence[Message], Reasoning, bool], str]
"""A conversation as text by the chat template; whether up to where the assistant speaks. Raises InvalidRequest."""
Encode = Callable[[str], TokenIds]
"""Token ids of a template's text."""


class Thread(msgspec.Struct, frozen=True):
    """What a job's session knows of its conversation."""

    session: str
    marks: tuple[str, ...]
    """Of the conversation's beginnings; empty where the prompt is none."""
    known: Recalled


async def no_sessions(_lease: Lease, _session: str, _marks: Sequence[str]) -> Recalled:
    """A `Recall` that knows nothing."""
    return Recalled()


async def thread_of(
    lease: Lease, session: str | None, state: RolloutState, recall: Recall
) -> Thread | None:
    """Look the conversation of a job that has a session up.

    Raises InvalidRequest where the session takes no more, SessionReleased where the prompt of kept tokens is gone.
    """
    if session is None:
        return None
    marks: tuple[str, ...] = ()
    if state.message:
        marks = await asyncio.to_thread(trail, state.message, shown_tools(state))
    ends = [i for i, message in enumerate(state.message[:-1], 1) if message.role == "assistant"]
    known = await recall(lease, session, [marks[end] for end in reversed(ends)])
    if known.gone:
        raise SessionReleased(
            f"session {session[:80]!r} was released while job {lease.job_id} was generated, and its tokens go on from "
            "a turn that is gone; submit it under another id",
            param="session",
        )
    if known.full and not lease.kept:  # what was begun in time is kept
        raise InvalidRequest(
            f"`session`: {session[:80]!r} has {known.turns} turns of {known.bytes} bytes, and takes at most "
            f"{SESSION_TURNS} of {SESSION_BYTES}; release it, or go on in another",
            param="session",
        )
    return Thread(session, marks, known)


def shown_tools(state: RolloutState) -> Sequence[Tool]:
    """The tools that the template is told of: none where the model may not call any."""
    return () if state.tool_choice.mode == "none" else state.tools


def placed(
    thread: Thread, state: RolloutState, write: Write, encode: Encode, special: Container[int]
) -> tuple[SessionPlace, TokenIds]:
    """The place in the session, and the prompt; no ids where it is to be tokenized afresh."""
    path = thread.known.path
    if not path:
        return _root(thread, UNKNOWN if thread.known.turns else None)
    added = _added(state, [node for _, node in path], write)
    if added is None:
        return _root(thread, REWRITTEN)
    prompt_ids = TokenIds()
    for _, node in path:
        prompt_ids.extend(node.prompt_ids)
        prompt_ids.extend(node.response_ids)
    place = SessionPlace(
        thread.session, turn=len(path) + 1, parent=path[-1][0], reused_tokens=len(prompt_ids)
    )
    prompt_ids.extend(_next_ids(prompt_ids[-1], *added, encode, special))
    return place, prompt_ids


def _root(thread: Thread, branch: str | None) -> tuple[SessionPlace, TokenIds]:
    return SessionPlace(thread.session, branch=branch), TokenIds()


def _next_ids(
    last: int, closing: str, rest: str, encode: Encode, special: Container[int]
) -> TokenIds:
    """Of what follows an answer whose last token is `last`; without the closing token, if it is that already."""
    bare = closing.lstrip()
    ids = encode(bare + rest)
    ends_both = bool(bare) and last in special and bool(ids) and ids[0] in special
    if ends_both or (ids and ids[0] == last):
        return TokenIds(ids[1:])
    return encode(closing + rest)


def kept_in(thread: Thread | None, states: Sequence[RolloutState], answer: Completed) -> Completed:
    """The outcome with what the session keeps of it: one turn a sample."""
    if thread is None:
        return answer
    turns = tuple(_new_turn(thread, state) for state in states)
    return replace(answer, session=thread.session, turns=turns)


def _new_turn(thread: Thread, state: RolloutState) -> NewTurn:
    place = state.session or SessionPlace(thread.session)
    output = state.output or (Text(state.text),)
    answer = Message("assistant", output)
    node = Node(
        prompt_ids=TokenIds(state.prompt_ids[place.reused_tokens :]),
        response_ids=state.response_ids,
        logprobs=state.logprobs,
        policy_versions=state.policy_versions,
        finish_reason=state.finish_reason,
        output=output,
        messages=len(state.message),
        reasoning=state.reasoning,
        branch=place.branch,
    )
    mark = follow(thread.marks[-1], answer) if thread.marks else ""
    return NewTurn(state.rollout_id, place.parent or "", mark, codec.pack_node(node))


def _added(state: RolloutState, path: Sequence[Node], write: Write) -> tuple[str, str] | None:
    """How the template closes the last answer of `path`, and what comes then; None where it rewrites history."""
    messages = list(state.message)
    for node in path:
        messages[node.messages] = _own(messages[node.messages], node.output)
    end, before = path[-1].messages, path[-1].reasoning
    whole = write(messages, state.reasoning, True)
    blank = [*messages[:end], Message("assistant", (Text(ANSWER),))]
    try:
        history = write(messages[: end + 1], state.reasoning, False)
        closing = write(blank, state.reasoning, False)
        then = history if before == state.reasoning else write(messages[: end + 1], before, False)
    except InvalidRequest:  # a template that takes no conversation which ends in an answer
        return None
    if not whole.startswith(history) or then != history or ANSWER not in closing:
        return None
    return closing.rpartition(ANSWER)[2], whole[len(history) :]


def _own(told: Message, output: Sequence[Block]) -> Message:
    """The answer as the policy gave it, with the ids of its calls as the client has them."""
    ids = iter([block.id for block in told.content if isinstance(block, ToolUse)])
    return Message(
        "assistant",
        tuple(
            replace(block, id=next(ids, block.id)) if isinstance(block, ToolUse) else block
            for block in output
        ),
    )
