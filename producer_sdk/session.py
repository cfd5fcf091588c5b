"""A session seen by its owner: the turns of a conversation, and the training samples that they make."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import msgspec

from producer_sdk.future import Pending
from protocols.queue.broker import Broker
from protocols.rollout_state import FinishReason, Logprobs, TokenIds
from protocols.session import SessionTurn

Value = TypeVar("Value")


class SessionSample(msgspec.Struct, frozen=True):
    """One path through a session, from the first turn to an answer that nothing goes on from."""

    session_id: str
    rollout_ids: tuple[str, ...]
    """Of the responses, in their order."""
    prompt_ids: TokenIds
    """Of the first turn."""
    response_ids: TokenIds
    """All after it: the responses, and between them what the environment said."""
    response_mask: list[int]
    """`[response tokens]`: 1 where the policy produced the token and no earlier sample has it."""
    logprobs: Logprobs
    """`[response tokens]`; 0.0 where the policy did not produce the token."""
    policy_versions: tuple[tuple[int, int], ...]
    """`(version, start)` spans; the environment's tokens count to the response before them."""
    finish_reason: FinishReason | None
    """Of the last response."""
    branch: str | None = None
    """Why the path begins where it does, although the session had turns before."""

    @property
    def response_model_steps(self) -> list[int]:
        """`[response tokens]`, the policy version of each token."""
        ends = [start for _, start in self.policy_versions[1:]] + [len(self.response_ids)]
        spans = zip(self.policy_versions, ends, strict=True)
        return [version for (version, start), end in spans for _ in range(start, end)]


class Ask(Protocol):
    """A question to the pool's server."""

    def __call__(
        self, question: Callable[[Broker], Awaitable[Value]], what: str, /
    ) -> Pending[Value]:
        """Its answer."""
        ...


class Session:
    """One session of a pool. It comes to be with its first answer, and is kept for 6 h after its last."""

    def __init__(self, session_id: str, ask: Ask) -> None:
        self.session_id = session_id
        self._ask = ask

    def turns(self) -> Pending[list[SessionTurn]]:
        """Every response of the session, in the order of their acceptance; empty where there is none."""
        return self._ask(lambda broker: broker.turns(self.session_id), self._what("turns"))

    def samples(self) -> Pending[list[SessionSample]]:
        """One training sample for each path of the tree; each response is in the mask of exactly one."""

        async def made(broker: Broker) -> list[SessionSample]:
            return samples_of(self.session_id, await broker.turns(self.session_id))

        return self._ask(made, self._what("samples"))

    def release(self) -> Pending[bool]:
        """Delete the session; whether there was one. An answer under way that goes on from it is not kept."""
        return self._ask(lambda broker: broker.forget(self.session_id), self._what("release"))

    def _what(self, question: str) -> str:
        return f"{question} of session {self.session_id[:80]}"

    def __repr__(self) -> str:
        return f"<Session {self.session_id[:80]!r}>"


def samples_of(session_id: str, turns: Sequence[SessionTurn]) -> list[SessionSample]:
    """One sample for each turn that nothing goes on from, in the order of `turns`, where parents come first."""
    by_id = {turn.rollout_id: turn for turn in turns}
    parents = {turn.parent for turn in turns}
    exported: set[str] = set()
    return [
        _sample(session_id, path, exported)
        for leaf in turns
        if leaf.rollout_id not in parents
        for path in [list(_path(leaf, by_id))[::-1]]
    ]


def _path(leaf: SessionTurn, by_id: dict[str, SessionTurn]) -> Iterator[SessionTurn]:
    """From the leaf to its root."""
    turn: SessionTurn | None = leaf
    while turn is not None:
        yield turn
        turn = None if turn.parent is None else by_id[turn.parent]


def _sample(session_id: str, path: Sequence[SessionTurn], exported: set[str]) -> SessionSample:
    """Adds the path's rollout ids to `exported`."""
    ids, logprobs, mask = TokenIds(), Logprobs(), list[int]()
    versions: list[tuple[int, int]] = []
    for at, turn in enumerate(path):
        node = turn.node
        if at > 0:
            ids.extend(node.prompt_ids)
            mask += [0] * len(node.prompt_ids)
            logprobs.extend([0.0] * len(node.prompt_ids))
        for version, start in node.policy_versions:
            if not versions:
                versions.append((version, 0))
            elif versions[-1][0] != version:
                versions.append((version, len(ids) + start))
        ids.extend(node.response_ids)
        logprobs.extend(node.logprobs)
        mask += [int(turn.rollout_id not in exported)] * len(node.response_ids)
    exported.update(turn.rollout_id for turn in path)
    return SessionSample(
        session_id=session_id,
        rollout_ids=tuple(turn.rollout_id for turn in path),
        prompt_ids=path[0].node.prompt_ids,
        response_ids=ids,
        response_mask=mask,
        logprobs=logprobs,
        policy_versions=tuple(versions),
        finish_reason=path[-1].node.finish_reason,
        branch=path[0].node.branch,
    )
