"""Tokens are drawn from a row's own logits, by noise of its own; the reference is Hugging Face's processors."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from protocols.rollout_state import SampleParams
from tests.plain_model import listed
from worker.engines.torch_engine import noise
from worker.engines.torch_engine.sampling import (
    NUCLEUS_FIRST_LOOK,
    Draws,
    adjusted,
    draw,
    truncated,
)

CPU = torch.device("cpu")
PROMPT = (3, 5, 5)
STOPS = frozenset({1, 2})
VOCABULARY = 40
NOTHING: list[list[int]] = [[]]


def row(seed: int = 0, **params: float) -> Draws:
    return Draws(msgspec.structs.replace(SampleParams(), **params), seed, PROMPT, STOPS)


def logits(rows: int = 1, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def kept(scores: Tensor) -> list[list[int]]:
    return [listed(line.isfinite().nonzero()[:, 0]) for line in scores]


def processed(processor: object, ids: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
    """By one of transformers' processors."""
    process = cast("Any", processor)
    return process(torch.tensor(ids, dtype=torch.long), scores.clone())


params = st.builds(
    SampleParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, VOCABULARY, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    min_tokens=st.integers(0, 3),
    top_logprobs=st.integers(0, 3),
)
samples = st.tuples(params, st.integers(0, 2**64 - 1), st.integers(0, 5))


@given(one=samples, others=st.lists(samples, max_size=4), place=st.integers(0, 4))
def test_a_token_depends_on_nothing_but_its_own_row(
    one: tuple[SampleParams, int, int],
    others: list[tuple[SampleParams, int, int]],
    place: int,
) -> None:
    def of(sample: tuple[SampleParams, int, int]) -> Draws:
        wanted, seed, drawn = sample
        draws = Draws(wanted, seed, PROMPT, STOPS)
        for token_id in range(drawn):
            draw(torch.eye(VOCABULARY)[token_id][None] * 1e4, [draws])
        return draws

    place = min(place, len(others))
    batch = [*others[:place], one, *others[place:]]
    scores = logits(len(batch))
    together = draw(scores, [of(sample) for sample in batch])
    alone = draw(scores[place : place + 1], [of(one)])
    assert together.token_ids[place] == alone.token_ids[0]
    assert together.logprobs[place] == pytest.approx(alone.logprobs[0], abs=1e-5)
    assert together.top_ids[place] == alone.top_ids[0]


@given(wanted=params, seed=st.integers(0, 2**64 - 1), cut=st.integers(1, 5))
def test_a_sample_with_kept_tokens_draws_as_one_that_drew_them(
    wanted: SampleParams, seed: int, cut: int
) -> None:
    undisturbed = Draws(wanted, seed, PROMPT, STOPS)
    drawn = [draw(logits(seed=step), [undisturbed]).token_ids[0] for step in range(cut)]
    resumed = Draws(wanted, seed, PROMPT, STOPS, drawn)
    assert resumed.tokens == undisturbed.tokens == cut
    for step in range(cut, cut + 3):
        scores = logits(seed=step)
        assert torch.equal(adjusted(scores, [resumed]), adjusted(scores, [undisturbed]))
        assert draw(scores, [resumed]) == draw(scores, [undisturbed])


def test_noise_belongs_to_seed_and_position() -> None:
    keys = [noise.key(seed, position) for seed in (0, 1, 2**64 - 1) for position in (0, 1, 2**20)]
    assert len(set(keys)) == len(keys)
    together = noise.exponential(keys, 50, CPU)
    for line, key in zip(together, keys, strict=True):
        assert torch.equal(line, noise.exponential([key], 50, CPU)[0])
        assert torch.equal(line[:20], noise.exponential([key], 20, CPU)[0])


def test_noise_is_exponential_and_uncorrelated() -> None:
    keys = [noise.key(seed, position) for seed in range(10) for position in range(20)]
    values = noise.exponential(keys, 20_000, CPU).double()
    assert values.min() > 0
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(1, abs=0.003)
    cells = torch.histc((-values).exp(), 500, 0, 1)
    expected = values.numel() / 500
    # chi-square over its degrees of freedom: 1 +- 0.06
    assert ((cells - expected) ** 2 / expected).sum().item() / 499 == pytest.approx(1, abs=0.25)
    across = torch.corrcoef(values).fill_diagonal_(0).abs().max().item()
    assert across < 6 / math.sqrt(20_000)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    scores = logits(vocabulary=12)
    rows = [row(seed, temperature=temperature) for seed in range(20_000)]
    drawn = draw(scores.expand(len(rows), -1), rows)
    found = torch.bincount(torch.tensor(drawn.token_ids), minlength=12).double()
    expected = (scores[0] / temperature).softmax(-1).double() * len(rows)
    often = expected > 5
    # 11 degrees of freedom: 40 is exceeded once in 30,000
    assert ((found - expected)[often] ** 2 / expected[often]).sum() < 40


def test_positions_of_one_seed_are_drawn_independently() -> None:
    draws = row(7)
    drawn = [draw(torch.zeros(1, VOCABULARY), [draws]).token_ids[0] for _ in range(4000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY)
    assert ((counts - 100) ** 2 / 100).sum() < 85  # 39 degrees of freedom
    assert sum(a == b for a, b in itertools.pairwise(drawn)) < 160  # about 100


def test_resuming_behind_some_tokens_draws_the_same() -> None:
    whole = row(9)
    scores = logits(6)
    drawn = [draw(line[None], [whole]).token_ids[0] for line in scores]
    resumed = Draws(SampleParams(), 9, (*PROMPT, *drawn[:4]), STOPS)
    assert [draw(line[None], [resumed]).token_ids[0] for line in scores[4:]] == drawn[4:]


@pytest.mark.parametrize("top_k", [1, 2, 7, 39])
def test_top_k_keeps_what_transformers_keeps(top_k: int) -> None:
    scores = logits(5)
    ours = truncated(scores, [row(top_k=top_k)] * 5)
    theirs = processed(TopKLogitsWarper(top_k), NOTHING, scores)
    assert kept(ours) == kept(theirs)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    scores = logits(5)
    ours = truncated(scores, [row(top_p=top_p)] * 5)
    theirs = processed(TopPLogitsWarper(top_p), NOTHING, scores)
    assert kept(ours) == kept(theirs)


def test_top_p_counts_only_what_top_k_left() -> None:
    scores = logits(5)
    ours = truncated(scores, [row(top_k=6, top_p=0.8)] * 5)
    left = processed(TopKLogitsWarper(6), NOTHING, scores)
    theirs = processed(TopPLogitsWarper(0.8), NOTHING, left)
    assert kept(ours) == kept(theirs)


def test_rows_of_different_truncation_do_not_touch_each_other() -> None:
    scores = logits(4)
    rows = [row(top_k=3), row(top_p=0.5), row(top_k=1), row(top_k=20, top_p=0.99)]
    together = truncated(scores, rows)
    for i, one in enumerate(rows):
        assert kept(together[i : i + 1]) == kept(truncated(scores[i : i + 1], [one]))


def test_a_nucleus_wider_than_the_first_look_is_found_whole() -> None:
    vocabulary = 4 * NUCLEUS_FIRST_LOOK
    scores = 0.1 * logits(2, vocabulary=vocabulary)
    ours = truncated(scores, [row(top_p=0.9), row(top_k=3)])
    theirs = processed(TopPLogitsWarper(0.9), NOTHING, scores)
    assert len(kept(ours)[0]) > NUCLEUS_FIRST_LOOK
    assert (
        abs(len(kept(ours)[0]) - len(kept(theirs)[0])) <= 2
    )  # sums of 4,000 float32 differ in the last bits
    assert len(kept(ours)[1]) == 3


def test_top_k_alone_drops_nothing_that_is_merely_unlikely() -> None:
    scores = torch.tensor([[50.0, 1.0, 0.0, -1.0]])
    assert kept(truncated(scores, [row(top_k=3)])) == [[0, 1, 2]]


def test_truncated_tokens_are_never_drawn() -> None:
    scores = logits(1)
    allowed: set[int] = set(listed(scores[0].topk(3).indices))
    rows = [row(seed, top_k=3, temperature=3) for seed in range(500)]
    assert set(draw(scores.expand(500, -1), rows).token_ids) == allowed


def test_repetition_is_penalised_over_prompt_and_response_as_in_transformers() -> None:
    draws = row(repetition_penalty=1.7, temperature=0)
    first = draw(logits(1, seed=1), [draws]).token_ids[0]
    scores = logits(1, seed=2)
    theirs = processed(RepetitionPenaltyLogitsProcessor(1.7), [[*PROMPT, first]], scores)
    torch.testing.assert_close(adjusted(scores, [draws]), theirs)


def test_presence_and_frequency_are_penalised_over_the_response_alone() -> None:
    draws = row(presence_penalty=0.5, frequency_penalty=0.25, temperature=0)
    for token_id in (7, 7, 9):
        assert draw(torch.eye(VOCABULARY)[token_id][None] * 100, [draws]).token_ids == [token_id]
    changed = adjusted(torch.zeros(1, VOCABULARY), [draws])[0]
    assert changed[7].item() == -0.5 - 2 * 0.25
    assert changed[9].item() == -0.5 - 0.25
    assert changed[5].item() == 0
    assert changed.count_nonzero() == 2


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    scores = logits(1)
    draws = row(min_tokens=2, temperature=0)
    shortest = MinLengthLogitsProcessor(len(PROMPT) + 1, list(STOPS), device="cpu")
    theirs = processed(shortest, [PROMPT], scores)
    assert torch.equal(adjusted(scores, [draws]), theirs)
    certain = torch.eye(VOCABULARY)[1][None] * 100
    drawn = [draw(certain, [draws]).token_ids[0] for _ in range(3)]
    assert drawn[0] not in STOPS
    assert drawn[1] not in STOPS
    assert drawn[2] == 1


def test_stop_ids_beyond_the_vocabulary_do_no_harm() -> None:
    scores = logits(1)
    draws = Draws(SampleParams(min_tokens=1), 0, PROMPT, frozenset({VOCABULARY, 10**6}))
    assert torch.equal(adjusted(scores, [draws]), scores)


def test_nothing_is_copied_where_no_row_asks_for_a_change() -> None:
    scores = logits(2)
    assert adjusted(scores, [row(), row(temperature=0)]) is scores


def test_no_temperature_takes_the_likeliest() -> None:
    scores = logits(4)
    drawn = draw(scores, [row(seed, temperature=0, top_p=0.1) for seed in range(4)])
    assert drawn.token_ids == listed(scores.argmax(-1))


def test_log_probabilities_are_the_untouched_policys() -> None:
    scores = logits(2)
    untouched = scores.clone()
    rows = [
        row(temperature=2, top_k=5, repetition_penalty=2, top_logprobs=3),
        row(temperature=0, presence_penalty=2, min_tokens=1),
    ]
    drawn = draw(scores, rows)
    expected = untouched.log_softmax(-1)
    assert torch.equal(scores, untouched)
    for i, token_id in enumerate(drawn.token_ids):
        assert drawn.logprobs[i] == pytest.approx(expected[i, token_id].item(), abs=1e-5)
    best = expected[0].topk(3)
    assert drawn.top_ids == [listed(best.indices), []]
    assert drawn.top_logprobs[0] == pytest.approx(listed(best.values), abs=1e-5)
    assert drawn.top_logprobs[1] == []


def test_logits_that_are_no_numbers_show_in_the_log_probability_of_their_row_alone() -> None:
    scores = logits(2)
    scores[0, 4] = torch.nan
    drawn = draw(scores, [row(top_k=3, top_p=0.5), row()])
    assert math.isnan(drawn.logprobs[0])
    assert math.isfinite(drawn.logprobs[1])
