"""A sample as it is drawn: stop strings wherever token borders fall, text, versions, reasons."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.job import Segment
from protocols.message import Text, Thinking, ToolUse
from protocols.rollout_state import FinishReason, Logprobs, RolloutState, SampleParams, TokenIds
from tests.piece_tokenizer import PieceTokenizer
from worker.engines.scripted import END, ByteTokenizer
from worker.parse import Sample
from worker.regions import Reading


def segment(
    ids: Sequence[int], start: int = 0, *, reason: FinishReason | None = None, version: int = 0
) -> Segment:
    return Segment(
        index=0,
        start=start,
        token_ids=TokenIds(ids),
        logprobs=Logprobs(-float(start + at) - 1 for at in range(len(ids))),
        top_ids=TokenIds(),
        top_logprobs=Logprobs(),
        policy_version=version,
        finish_reason=reason,
    )


def spoken(text: str, params: SampleParams) -> Sample:
    """A sample of the scripted tokenizer, drawn at once."""
    sample = Sample(params, ByteTokenizer())
    sample.add(segment([*text.encode(), END], reason="stop"))
    return sample


@pytest.mark.parametrize(
    ("stops", "text", "stop"),
    [
        (("lo",), "hel", "lo"),
        (("o", "lo"), "hel", "lo"),  # of those that end in one token, the one that begins first
        (("h",), "", "h"),
        (("zz",), "hello", None),
        (("hello",), "", "hello"),
        (("lo", "llo"), "he", "llo"),
        (("l",), "he", "l"),
    ],
)
def test_the_first_stop_string_ends_the_text(
    stops: tuple[str, ...], text: str, stop: str | None
) -> None:
    sample = spoken("hello", SampleParams(stops=stops))
    assert (sample.text(), sample.stop_reason, sample.finish_reason) == (text, stop, "stop")


def test_the_tokens_keep_the_stop_string_and_nothing_after_it() -> None:
    sample = spoken("hello", SampleParams(stops=("ll",)))
    assert sample.ids.tolist() == list(b"hell")
    assert len(sample.logprobs) == 4


def test_the_text_keeps_the_stop_string_where_that_is_asked_for() -> None:
    params = SampleParams(stops=("ll",), include_stop_str_in_output=True)
    assert spoken("hello", params).text() == "hell"


def test_a_stop_string_within_a_token_cuts_the_text_and_not_the_token() -> None:
    tokenizer = PieceTokenizer([b"ab", b"cdXef", b"g"])
    for keep, text in ((False, "abcd"), (True, "abcdX")):
        sample = Sample(SampleParams(stops=("X",), include_stop_str_in_output=keep), tokenizer)
        assert sample.add(segment([0, 1, 2]))
        assert (sample.ids.tolist(), sample.text()) == ([0, 1], text)


def test_a_stop_string_of_many_bytes_is_found_over_token_borders() -> None:
    text = "ein Grüßle 世界 und mehr"
    sample = spoken(text, SampleParams(stops=("世界",)))
    assert sample.text() == "ein Grüßle "
    assert bytes(iter(sample.ids)) == "ein Grüßle 世界".encode()


def test_no_stop_string_is_looked_for_before_min_tokens() -> None:
    sample = spoken("aXaXa", SampleParams(stops=("a",), min_tokens=3))
    assert (sample.text(), sample.ids.tolist()) == ("aX", list(b"aXa"))


def test_a_stop_string_seen_before_min_tokens_does_not_count_later() -> None:
    sample = spoken("abcdef", SampleParams(stops=("a", "xxxxxxxx"), min_tokens=3))
    assert (sample.text(), sample.stop_reason) == ("abcdef", None)


def test_a_stop_string_that_ends_at_min_tokens_counts() -> None:
    sample = spoken("abcdef", SampleParams(stops=("abc",), min_tokens=3))
    assert (sample.text(), sample.stop_reason) == ("", "abc")


def test_an_ended_sample_takes_no_more() -> None:
    sample = Sample(SampleParams(stops=("b",)), ByteTokenizer())
    assert sample.add(segment(list(b"ab")))
    assert not sample.add(segment(list(b"cd"), 2, reason="length"))
    assert (sample.ids.tolist(), sample.finish_reason) == (list(b"ab"), "stop")


def test_a_stop_string_in_the_last_token_wins_over_the_length() -> None:
    sample = Sample(SampleParams(stops=("b",)), ByteTokenizer())
    sample.add(segment(list(b"ab"), reason="length"))
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "b")


def test_the_stop_token_asked_for_is_the_reason_and_the_own_one_of_the_model_is_none() -> None:
    asked = Sample(SampleParams(stop_token_ids=(98,)), ByteTokenizer())
    asked.add(segment(list(b"ab"), reason="stop"))
    assert asked.stop_reason == 98
    own = Sample(SampleParams(stop_token_ids=(98,)), ByteTokenizer())
    own.add(segment([*b"a", END], reason="stop"))
    assert own.stop_reason is None


def test_special_tokens_are_left_out_of_the_text_or_kept() -> None:
    for skip, text in ((True, "hi"), (False, "hi<|end|>")):
        assert spoken("hi", SampleParams(skip_special_tokens=skip)).text() == text


def test_an_incomplete_character_at_the_end_is_shown_as_one() -> None:
    sample = Sample(SampleParams(), ByteTokenizer())
    sample.add(segment(list("aß".encode()[:2]), reason="length"))
    assert sample.text() == "a\ufffd"


def test_versions_are_spans_of_tokens() -> None:
    sample = Sample(SampleParams(), ByteTokenizer())
    for start, version in ((0, 3), (2, 3), (4, 5), (6, 7)):
        sample.add(segment(list(b"ab"), start, version=version))
    assert sample.versions == [(3, 0), (5, 4), (7, 6)]
    state = sample.state(RolloutState(), "j", 0)
    assert state.response_model_steps == [3, 3, 3, 3, 5, 5, 7, 7]


def test_a_version_without_tokens_leaves_no_span() -> None:
    sample = Sample(SampleParams(), ByteTokenizer())
    sample.add(segment(list(b"a"), version=1))
    sample.add(segment([], 1, version=2, reason="stop"))
    assert sample.versions == [(1, 0)]


def test_the_state_says_what_was_drawn() -> None:
    prompt = RolloutState(prompt_ids=TokenIds([1, 2]), group_id="g")
    state = spoken("hello", SampleParams(stops=("l",))).state(prompt, "j", 3)
    assert (state.rollout_id, state.index, state.group_id) == ("j/3", 3, "g")
    assert (state.text, state.response_ids.tolist()) == ("he", list(b"hel"))
    assert (state.finish_reason, state.stop_reason, state.status) == ("stop", "l", "completed")
    assert state.prompt_ids.tolist() == [1, 2]


def test_top_logprobs_are_cut_with_the_tokens() -> None:
    sample = Sample(SampleParams(stops=("b",), top_logprobs=2), ByteTokenizer())
    wide = Segment(
        index=0,
        start=0,
        token_ids=TokenIds(b"abc"),
        logprobs=Logprobs([-1, -2, -3]),
        top_ids=TokenIds([1, 2, 3, 4, 5, 6]),
        top_logprobs=Logprobs([-1, -2, -3, -4, -5, -6]),
        policy_version=0,
    )
    sample.add(wide)
    assert sample.top_ids.tolist() == [1, 2, 3, 4]
    assert sample.top_logprobs.tolist() == [-1, -2, -3, -4]


READING = Reading(ByteTokenizer.markup)
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "reason", "finish"),
    [(CALL, "stop", "tool_calls"), (CALL, "length", "length"), ("no", "stop", "stop")],
)
def test_a_sample_that_ends_with_calls_says_so(
    text: str, reason: FinishReason, finish: str
) -> None:
    sample = Sample(SampleParams(), ByteTokenizer(), READING)
    sample.add(segment([*text.encode(), END], reason=reason))
    assert sample.finish_reason == reason
    assert sample.state(RolloutState(), "j", 0).finish_reason == finish


def test_the_state_has_the_response_as_blocks_and_as_raw_text() -> None:
    sample = Sample(SampleParams(), ByteTokenizer(), READING)
    text = f"<think>a</think>b{CALL}<tool_call>c"
    sample.add(segment([*text.encode(), END], reason="stop"))
    state = sample.state(RolloutState(), "j", 0)
    assert state.text == text
    thinking, said, call, rest = state.output
    assert (thinking, said, rest) == (Thinking("a"), Text("b"), Text("<tool_call>c"))
    assert isinstance(call, ToolUse)
    assert state.parse_error == "tool call 2 stays text: it is not closed"


def test_a_stop_string_within_thinking_does_not_end_the_sample() -> None:
    for text, kept in (("<think>aXb</think>cXd", "<think>aXb</think>cX"), ("aXb", "aX")):
        sample = Sample(SampleParams(stops=("X",)), ByteTokenizer(), READING)
        sample.add(segment([*text.encode(), END], reason="stop"))
        assert bytes(iter(sample.ids)) == kept.encode()
        assert sample.text() == kept[:-1]


def naive(
    pieces: Sequence[bytes], stops: Sequence[str], min_tokens: int
) -> tuple[int, str | None, bytes]:
    """Tokens kept, the stop string, and the bytes before it: looked up anew after every token."""
    for count in range(1, len(pieces) + 1):
        if count < min_tokens:
            continue
        whole, before = b"".join(pieces[:count]), b"".join(pieces[: count - 1])
        found = [
            (at, index)
            for index, stop in enumerate(stops)
            for at in range(len(whole))
            if whole.startswith(stop.encode(), at) and at + len(stop.encode()) > len(before)
        ]
        if found:
            at, index = min(found)
            return count, stops[index], whole[:at]
    return len(pieces), None, b"".join(pieces)


LETTERS = st.sampled_from(["a", "b", "ß", "世", "\x00"])
WORDS = st.text(LETTERS, min_size=1, max_size=4)


@st.composite
def cut_texts(draw: st.DrawFn) -> list[bytes]:
    """The bytes of a text, cut anywhere, also within characters."""
    data = draw(st.text(LETTERS, max_size=20)).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=20)))
    borders = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    pairs = pairwise(borders)
    return [data[start:end] for start, end in pairs if start < end]


@given(
    pieces=cut_texts(),
    stops=st.lists(WORDS, max_size=3),
    min_tokens=st.integers(0, 6),
    cut_at=st.sets(st.integers(0, 20)),
)
def test_any_text_is_stopped_where_a_naive_search_stops_it(
    pieces: list[bytes], stops: list[str], min_tokens: int, cut_at: set[int]
) -> None:
    params = SampleParams(stops=tuple(stops), min_tokens=min_tokens)
    sample = Sample(params, PieceTokenizer(pieces or [b"-"]))
    borders = [0, *sorted(cut for cut in cut_at if cut < len(pieces)), len(pieces)]
    for start, end in pairwise(borders):
        if sample.add(segment(range(start, end), start)):
            break
    kept, stop, before = naive(pieces, stops, min_tokens)
    assert (sample.ids.tolist(), sample.stop_reason) == (list(range(kept)), stop)
    assert sample.text() == before.decode(errors="replace")
    assert len(sample.logprobs) == kept
