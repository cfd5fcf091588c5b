"""From a call to what lmdeploy is asked for; and the repetition penalty that it is given."""

import msgspec
import pytest
import torch

from protocols.errors import ContextLengthExceeded, InvalidRequest, UnsupportedOption
from protocols.rollout_state import SampleParams, TokenIds
from worker.engines.base import Call
from worker.engines.lmdeploy_engine.penalty import RepetitionPenalty
from worker.engines.lmdeploy_engine.request import Room, ended_by, kept_of, wanted

ROOM = Room(context_tokens=100, vocabulary=50, stop_ids=frozenset({2}))
PROMPT = TokenIds(range(10, 30))


def call(prompt: TokenIds = PROMPT, **params: object) -> Call:
    usual = SampleParams(max_tokens=40, sampling_seed=7)
    return Call(prompt, msgspec.structs.replace(usual, **params))


def test_every_parameter_that_lmdeploy_would_choose_is_set() -> None:
    told = msgspec.structs.asdict(wanted(call(), 0, 0, ROOM))
    assert told == {
        "n": 1,
        "max_new_tokens": 40,
        "min_new_tokens": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "random_seed": 7,
        "logprobs": 1,
        "stop_token_ids": [2],
        "ignore_eos": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_routed_experts": False,
        "include_stop_str_in_output": True,
    }


def test_what_was_kept_is_taken_off_the_budget() -> None:
    told = wanted(call(min_tokens=25), 2, 30, ROOM)
    assert (told.max_new_tokens, told.min_new_tokens, told.random_seed) == (10, 0, 9)
    assert wanted(call(min_tokens=25), 0, 20, ROOM).min_new_tokens == 5


def test_the_context_bounds_both_limits() -> None:
    told = wanted(call(max_tokens=None, min_tokens=1000), 0, 30, ROOM)
    assert (told.max_new_tokens, told.min_new_tokens) == (50, 50)


def test_no_temperature_takes_the_likeliest() -> None:
    told = wanted(call(temperature=0, top_k=40, top_p=0.5), 0, 0, ROOM)
    assert (told.temperature, told.top_k, told.top_p, told.do_sample) == (1.0, 1, 1.0, True)


def test_seeds_wrap_around() -> None:
    assert wanted(call(sampling_seed=2**64 - 1), 3, 0, ROOM).random_seed == 2


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ([], None),
        ([5, 2], "stop"),
        ([5, 9], "stop"),
        ([9, 5], None),
        ([5] * 40, "length"),
        ([5] * 39, None),
    ],
)
def test_why_a_sample_is_whole_already(kept: list[int], reason: str | None) -> None:
    assert ended_by(TokenIds(kept), call(stop_token_ids=(9,)), ROOM) == reason


def test_without_kept_tokens_every_sample_begins_at_its_start() -> None:
    assert [len(one) for one in kept_of(call(n=3))] == [0, 0, 0]


@pytest.mark.parametrize(
    ("asked", "error", "reason"),
    [
        (call(TokenIds()), InvalidRequest, "no tokens"),
        (call(TokenIds([1] * 100)), ContextLengthExceeded, "100 tokens and the context 100"),
        (call(TokenIds([50])), InvalidRequest, "token id 50"),
        (call(temperature=2.5), UnsupportedOption, "`temperature`: 2.5; lmdeploy takes at most 2"),
    ],
    ids=["empty", "long", "strange", "hot"],
)
def test_what_it_cannot_take_is_refused(asked: Call, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        ROOM.check(asked)


def test_the_penalty_sees_through_padding_and_what_is_kept() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, -2.0, 4.0, 8.0])
    prompt, drawn = [3, 3, 1], [4, 3]
    expected = torch.tensor([1.0, -2.0, 2.0, -4.0, 2.0, 8.0])
    penalty = RepetitionPenalty(2.0, prompt)
    for padding in ([], [0, 0], [5]):
        given = penalty(torch.tensor([*padding, *prompt, *drawn]), logits.clone())
        assert torch.equal(given, expected)


def test_a_padding_token_that_was_drawn_counts() -> None:
    given = RepetitionPenalty(2.0, [1])(torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, 1.0, 1.0]))
    assert torch.equal(given, torch.tensor([0.5, 0.5, 1.0]))
