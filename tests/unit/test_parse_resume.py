"""A sample that goes on behind kept segments becomes what it would have been in one go."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.job import Segment
from protocols.rollout_state import FinishReason, Logprobs, SampleParams, TokenIds
from worker.checkpoint import Checkpoint
from worker.engines.scripted import END, ByteTokenizer
from worker.parse import Sample

TOKENIZER = ByteTokenizer()


def segment(ids: Iterable[int], start: int, finish_reason: FinishReason | None = None) -> Segment:
    token_ids = TokenIds(ids)
    return Segment(
        index=0,
        start=start,
        token_ids=token_ids,
        logprobs=Logprobs(-start - at for at in range(len(token_ids))),
        top_ids=TokenIds(),
        top_logprobs=Logprobs(),
        policy_version=0,
        finish_reason=finish_reason,
    )


def said(ids: TokenIds, params: SampleParams, *cuts: int) -> Sample:
    """A sample of segments that end at `cuts`, as an engine says them, the last whole one with a reason."""
    sample = Sample(params, TOKENIZER)
    borders = [0, *cuts, len(ids)]
    for start, end in pairwise(borders):
        sample.add(segment(ids[start:end], start, "length" if end == len(ids) else None))
    return sample


def resumed(ids: TokenIds, params: SampleParams, cut: int) -> Sample:
    """What one attempt said up to `cut` goes through its checkpoint into the next attempt, which says the rest."""
    first, second = Sample(params, TOKENIZER), Sample(params, TOKENIZER)
    checkpoint = Checkpoint([first])
    first.add(segment(ids[:cut], 0))
    for kept in checkpoint.segments():
        second.add(kept)
    if second.finish_reason is None:
        second.add(segment(ids[len(second.ids) :], len(second.ids), "length"))
    return second


def looks(sample: Sample) -> tuple[object, ...]:
    return (
        sample.ids,
        sample.logprobs,
        sample.versions,
        sample.finish_reason,
        sample.stop_reason,
        sample.text(),
    )


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_across_the_border_ends_the_sample(cut: int) -> None:
    ids = TOKENIZER.encode("abSTOPcd")
    sample = resumed(ids, SampleParams(stops=("STOP",)), cut)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "STOP")
    assert sample.ids == ids[:6]
    assert sample.text() == "ab"


def test_a_stop_string_completed_by_the_kept_tokens_needs_nothing_more() -> None:
    kept = segment(TOKENIZER.encode("abSTOP"), 0)
    sample = Sample(SampleParams(stops=("STOP",)), TOKENIZER)
    assert sample.add(kept)
    assert (sample.finish_reason, sample.text()) == ("stop", "ab")


def test_a_stop_string_before_min_tokens_is_none_on_either_side_of_the_border() -> None:
    ids = TOKENIZER.encode("xx--xx--")
    params = SampleParams(stops=("--",), min_tokens=6)
    for cut in range(1, 8):
        sample = resumed(ids, params, cut)
        assert (len(sample.ids), sample.finish_reason) == (8, "stop")


def test_an_end_without_another_token_gives_its_reason() -> None:
    sample = Sample(SampleParams(stop_token_ids=(END,)), TOKENIZER)
    sample.add(segment(TokenIds([65, END]), 0))
    assert not sample.add(segment(TokenIds(), 2, "stop"))
    assert (sample.finish_reason, sample.stop_reason, len(sample.ids)) == ("stop", END, 2)
    full = Sample(SampleParams(), TOKENIZER)
    full.add(segment(TokenIds([65]), 0))
    full.add(segment(TokenIds(), 1, "length"))
    assert (full.finish_reason, full.versions) == ("length", [(0, 0)])


@given(
    text=st.text(alphabet="abé", min_size=1, max_size=20),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 6),
    data=st.data(),
)
def test_wherever_it_is_cut_it_becomes_the_same(
    text: str, stops: list[str], min_tokens: int, data: st.DataObject
) -> None:
    ids = TOKENIZER.encode(text)
    params = SampleParams(stops=tuple(stops), min_tokens=min_tokens)
    cut = data.draw(st.integers(1, len(ids)))
    whole = said(ids, params)
    assert looks(resumed(ids, params, cut)) == looks(whole)
    assert looks(said(ids, params, cut)) == looks(whole)
