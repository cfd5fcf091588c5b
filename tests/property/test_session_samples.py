"""Samples of random session trees: each response is in the mask of exactly one of them."""

from hypothesis import given
from hypothesis import strategies as st

from producer_sdk.session import samples_of
from protocols.rollout_state import Logprobs, TokenIds
from protocols.session import Node, SessionTurn

STRIDE = 100
"""Token ids tell their turn: turn `i` has those from `i * STRIDE` on, its prompt's first."""


def turn(number: int, parent: int | None, added: int, drawn: int, version: int) -> SessionTurn:
    first = number * STRIDE
    ids = TokenIds(range(first + added, first + added + drawn))
    node = Node(
        prompt_ids=TokenIds(range(first, first + added)),
        response_ids=ids,
        logprobs=Logprobs(-float(i + 1) for i in ids),
        policy_versions=((version, 0), (version + 1, drawn - 1)) if drawn > 1 else ((version, 0),),
        finish_reason="stop",
    )
    return SessionTurn(f"{number}", None if parent is None else f"{parent}", number, node)


@st.composite
def trees(draw: st.DrawFn) -> list[SessionTurn]:
    """In the order of acceptance: parents come first."""
    turns: list[SessionTurn] = []
    for number in range(draw(st.integers(0, 12))):
        parents = st.none() | st.integers(0, number - 1) if number else st.none()
        size = st.integers(1, 4)
        turns.append(turn(number, draw(parents), draw(size), draw(size), draw(st.integers(0, 2))))
    return turns


@given(trees())
def test_each_response_is_exported_once_and_each_path_is_whole(turns: list[SessionTurn]) -> None:
    by_id = {one.rollout_id: one for one in turns}
    trained: list[int] = []
    for sample in samples_of("s", turns):
        path = [by_id[rollout_id] for rollout_id in sample.rollout_ids]
        whole = [i for one in path for i in (*one.node.prompt_ids, *one.node.response_ids)]
        assert [*sample.prompt_ids, *sample.response_ids] == whole
        assert sample.prompt_ids == path[0].node.prompt_ids
        assert [one.parent for one in path] == [None, *sample.rollout_ids[:-1]]
        parts = (sample.response_mask, sample.logprobs, sample.response_model_steps)
        assert {len(part) for part in parts} == {len(sample.response_ids)}
        drawn = {i for one in path for i in one.node.response_ids}
        versions = {
            token: (version, -float(token + 1))
            for one in path
            for token, version in zip(one.node.response_ids, _steps(one.node), strict=True)
        }
        for token, logprob, mask, version in zip(
            sample.response_ids, sample.logprobs, *(parts[0], parts[2]), strict=True
        ):
            assert mask == 0 or token in drawn
            assert (version, logprob) == versions[token] if token in drawn else logprob == 0.0
        trained += [
            token
            for token, mask in zip(sample.response_ids, sample.response_mask, strict=True)
            if mask
        ]
    assert sorted(trained) == sorted(i for one in turns for i in one.node.response_ids)


@given(trees())
def test_samples_are_the_same_whenever_they_are_made(turns: list[SessionTurn]) -> None:
    assert samples_of("s", turns) == samples_of("s", list(turns))


def test_a_session_of_four_thousand_turns_has_its_sample() -> None:
    turns = [turn(i, i - 1 if i else None, 1, 2, 0) for i in range(4096)]
    (sample,) = samples_of("s", turns)
    assert sum(sample.response_mask) == 2 * 4096


def _steps(node: Node) -> list[int]:
    ends = [start for _, start in node.policy_versions[1:]] + [len(node.response_ids)]
    return [
        version
        for (version, start), end in zip(node.policy_versions, ends, strict=True)
        for _ in range(start, end)
    ]
