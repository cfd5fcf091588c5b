"""However tokens are cut into segments: what is said after some tokens is the same."""

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from protocols.dialects.base import Piece
from protocols.job import Segment
from protocols.message import Text
from protocols.rollout_state import Logprobs, RolloutState, SampleParams, TokenIds
from tests.piece_tokenizer import PieceTokenizer
from worker.engines.base import Markup
from worker.parse import Sample
from worker.regions import PLAIN, Reading
from worker.view import View

MARKUP = Markup(thinking=("<think>", "</think>"), call=("<tool_call>", "</tool_call>"))
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "\\"世\\\\"}}\n</tool_call>'
SPECIAL = [b"<think>", b"</think>", b"<tool_call>", b"</tool_call>", b"<eos>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, '{"name": "f"}', '"', "\\"]
PARTS = st.sampled_from([*MARKS, "<", "a", "世", " ", "\n", "STOP", "ST", "tool", "\x00"])
READINGS = [PLAIN, Reading(MARKUP), Reading(MARKUP, thinking=True)]


@st.composite
def pieces(draw: st.DrawFn) -> list[bytes]:
    """A response of text and markup, cut into tokens anywhere; some of them may be special."""
    data = "".join(draw(st.lists(PARTS, max_size=12))).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=30)))
    borders = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    tokens = [data[start:end] for start, end in pairwise(borders) if start < end]
    for at in sorted(draw(st.sets(st.integers(0, len(tokens)), max_size=3)), reverse=True):
        tokens.insert(at, draw(st.sampled_from(SPECIAL)))
    return tokens


PARAMS = st.builds(
    SampleParams,
    stops=st.sampled_from([(), ("STOP",), ("STOP", "ST世", "\n"), ("<tool_call>",)]),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    min_tokens=st.integers(0, 4),
)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces of one block as one."""
    whole: list[Piece] = []
    for piece in pieces:
        if piece.opens or not whole:
            whole.append(piece)
        else:
            last = whole.pop()
            whole.append(Piece(last.kind, last.text + piece.text, last.opens, last.id, last.name))
    return whole


def special(tokens: Sequence[bytes]) -> set[int]:
    return {at for at, token in enumerate(tokens) if token in SPECIAL}


@given(
    tokens=pieces(),
    params=PARAMS,
    reading=st.sampled_from(READINGS),
    cuts=st.sets(st.integers(0, 40)),
)
def test_pieces_depend_on_the_tokens_so_far_alone(
    tokens: list[bytes], params: SampleParams, reading: Reading, cuts: set[int]
) -> None:
    tokenizer = PieceTokenizer(tokens or [b"-"], special(tokens))
    one_by_one, said = View(params, tokenizer, reading), [list[Piece]()]
    for token_id in range(len(tokens)):
        said.append([*said[-1], *one_by_one.feed([token_id])])
    view, pieces = View(params, tokenizer, reading), list[Piece]()
    for start, end in pairwise([0, *sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]):
        pieces += view.feed(range(start, end))
        assert joined(pieces) == joined(said[end])
    assert joined([*pieces, *view.end()]) == joined([*said[-1], *one_by_one.end()])
    assert view.blocks() == one_by_one.blocks()
    assert view.parse_error == one_by_one.parse_error


@given(tokens=pieces(), params=PARAMS)
def test_a_response_that_is_not_read_for_markup_is_its_text(
    tokens: list[bytes], params: SampleParams
) -> None:
    state = sampled(tokens, params, PLAIN)
    assert "".join(b.text for b in state.output if isinstance(b, Text)) == state.text


@given(tokens=pieces(), params=PARAMS, reading=st.sampled_from(READINGS))
def test_every_piece_opens_or_goes_on_with_the_block_before_it(
    tokens: list[bytes], params: SampleParams, reading: Reading
) -> None:
    view = View(params, PieceTokenizer(tokens or [b"-"], special(tokens)), reading)
    said = [piece for at in range(len(tokens)) for piece in view.feed([at])] + view.end()
    for before, piece in pairwise([Piece("thinking", ""), *said]):
        assert piece.opens or piece.kind == before.kind != "tool_use"
        assert piece.text
        assert bool(piece.id and piece.name) == (piece.kind == "tool_use")


@example(tokens=[b"</think>"], params=SampleParams(), reading=Reading(MARKUP))
@given(tokens=pieces(), params=PARAMS, reading=st.sampled_from(READINGS))
def test_the_sample_ends_where_its_view_does(
    tokens: list[bytes], params: SampleParams, reading: Reading
) -> None:
    """Tokens after a stop string change neither."""
    state = sampled(tokens, params, reading)
    view = View(
        params, PieceTokenizer(tokens or [b"-"], special(tokens)), reading, rollout_id="j/0"
    )
    view.feed(range(len(tokens)))
    view.end()
    assert view.blocks() == state.output


def sampled(tokens: Sequence[bytes], params: SampleParams, reading: Reading) -> RolloutState:
    sample = Sample(params, PieceTokenizer(tokens or [b"-"], special(tokens)), reading)
    segment = Segment(
        index=0,
        start=0,
        token_ids=TokenIds(range(len(tokens))),
        logprobs=Logprobs([0.0] * len(tokens)),
        top_ids=TokenIds(),
        top_logprobs=Logprobs(),
        policy_version=0,
        finish_reason="length",
    )
    sample.add(segment)
    return sample.state(RolloutState(), "j", 0)
