"""What a response says, from its tokens: text, thinking and calls, and what is held back meanwhile."""

import re
import time
from collections.abc import Sequence

import pytest

from protocols.dialects.base import Piece
from protocols.message import Block, Text, Thinking, ToolUse
from protocols.rollout_state import SampleParams
from tests.piece_tokenizer import PieceTokenizer
from worker.engines.base import Markup
from worker.engines.scripted import END, ByteTokenizer
from worker.regions import PLAIN, Reading
from worker.view import View

TOKENIZER = ByteTokenizer()
ALL = Reading(TOKENIZER.markup)
CALL = '<tool_call>\n{"name": "look", "arguments": {"at":  "it"}}\n</tool_call>'


def view(params: SampleParams | None = None, reading: Reading = ALL) -> View:
    return View(params or SampleParams(), TOKENIZER, reading, rollout_id="j/0")


def read(
    text: str, params: SampleParams | None = None, reading: Reading = ALL
) -> tuple[Block, ...]:
    made = view(params, reading)
    made.feed([*text.encode(), END])
    made.end()
    return made.blocks()


def shape(blocks: Sequence[Block]) -> list[tuple[str, ...]]:
    """Blocks without the ids of calls."""
    return [
        (block.name, block.arguments)
        if isinstance(block, ToolUse)
        else (block.text if isinstance(block, Text | Thinking) else "",)
        for block in blocks
    ]


def texts(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("text", ["", "plain", " \n led by space, and ended by it \n", "<", "<thi"])
@pytest.mark.parametrize("reading", [PLAIN, ALL])
def test_text_without_markup_is_one_block_as_it_was_written(text: str, reading: Reading) -> None:
    assert read(text, reading=reading) == ((Text(text),) if text else ())


def test_thinking_comes_first_and_space_beside_marks_belongs_to_nothing() -> None:
    blocks = read("\n<think>\nfirst this\n\n</think>\n\nthen that\n")
    assert blocks == (Thinking("first this"), Text("then that\n"))


def test_thinking_is_marked_at_the_beginning_alone() -> None:
    for text in ("so: <think>no</think>", " " * 65 + "<think>no</think>"):
        assert read(text) == (Text(text),)


def test_thinking_that_the_prompt_opened_needs_no_mark() -> None:
    opened = Reading(TOKENIZER.markup, thinking=True)
    assert read("\nhm\n</think>yes", reading=opened) == (Thinking("hm"), Text("yes"))


def test_thinking_that_never_closes_is_thinking() -> None:
    assert read("<think>on and on</thin") == (Thinking("on and on</thin"),)


def test_empty_thinking_is_no_block() -> None:
    assert read("<think>\n\n</think>\n\nyes") == (Text("yes"),)


def test_calls_keep_their_order_their_raw_arguments_and_have_ids_of_their_own() -> None:
    found = read(f"look:\n{CALL}\n{CALL}\nand?")
    assert shape(found) == [("look:",), *[("look", '{"at":  "it"}')] * 2, ("and?",)]
    ids = [block.id for block in found if isinstance(block, ToolUse)]
    assert len(set(ids)) == 2
    assert ids == [b.id for b in read(f"{CALL}{CALL}") if isinstance(b, ToolUse)]
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in ids)


def test_another_sample_has_other_ids() -> None:
    other = View(SampleParams(), TOKENIZER, ALL, rollout_id="j/1")
    pieces = [*other.feed(CALL.encode()), *other.end()]
    (call,) = read(CALL)
    assert isinstance(call, ToolUse)
    assert pieces[0].id != call.id


def test_a_closing_mark_within_a_string_closes_nothing() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "\\"</tool_call>"}}</tool_call>'
    assert shape(read(text)) == [("f", '{"x": "\\"</tool_call>"}')]


@pytest.mark.parametrize(
    "arguments", ['"text"', "[1]", "1e999", '{"a": 1, "a": 2}', '{"é": "\\u00e9"}']
)
def test_arguments_are_what_the_model_wrote(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert shape(read(text)) == [("f", arguments)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('{"name": "f", "arguments": {', "truncated"),
        ("", "truncated"),
        ('{"arguments": {}}', "name"),
        ('{"name": "", "arguments": {}}', "no name"),
        ('{"name": 3}', "name"),
        ("[1]", "object"),
        ("{'name': 'f'}", "malformed"),
        ('{"name": "f", "arguments": {"x": "line\nbreak"}}', "malformed"),
        ('{"name": "f"} and more', "malformed"),
        ('{"name": "\\ud800"}', "truncated|surrogate|malformed"),
        ("[" * 100_000, "object"),
        ('{"name": "f", "arguments": ' + "[" * 100_000, "deep|truncated"),
    ],
)
def test_a_call_that_does_not_parse_stays_text_and_the_next_one_is_read(
    body: str, why: str
) -> None:
    made = view()
    text = f"see \n<tool_call>{body}</tool_call> and\n"
    made.feed([*f"{text}{CALL}".encode(), END])
    made.end()
    assert shape(made.blocks()) == [(text.rstrip(),), ("look", '{"at":  "it"}')]
    assert made.parse_error
    assert made.parse_error.startswith("tool call 1 stays text: ")
    assert any(word in made.parse_error.lower() for word in why.split("|"))


def test_a_call_without_its_end_stays_text() -> None:
    made = view()
    text = f"see \n{CALL[:-3]}"
    made.feed(text.encode())
    assert shape(made.blocks()) == [("see",)]
    made.end()
    assert made.blocks() == (Text(text),)
    assert made.parse_error == "tool call 1 stays text: it is not closed"


def test_calls_are_not_read_where_there_are_no_tools() -> None:
    reading = Reading(Markup(thinking=TOKENIZER.markup.thinking))
    assert read(CALL, reading=reading) == (Text(CALL),)


def test_an_incomplete_character_is_held_back_until_it_is_whole_or_can_not_be() -> None:
    made = view()
    first, last = "世".encode()[:2], "世".encode()[2:]
    assert texts(made.feed([*b"a", *first])) == "a"
    assert texts(made.feed(last)) == "世"
    made.feed(first)
    assert texts(made.end()) == "\ufffd"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    made = view(SampleParams(stops=("END", "DONE")), PLAIN)
    assert texts(made.feed(b"the E")) == "the "
    assert texts(made.feed(b"N")) == ""
    assert texts(made.feed(b"T")) == "ENT"
    assert texts(made.feed(b" DONE")) == " "
    assert texts(made.feed(b"more")) == ""
    assert texts(made.end()) == ""


@pytest.mark.parametrize(("keep", "text"), [(False, "abcd"), (True, "abcdX")])
def test_a_stop_string_within_a_token_cuts_it(keep: bool, text: str) -> None:
    tokenizer = PieceTokenizer([b"ab", b"cdXef", b"g"])
    params = SampleParams(stops=("X",), include_stop_str_in_output=keep)
    made = View(params, tokenizer)
    assert texts([*made.feed([0, 1, 2]), *made.end()]) == text


def test_stop_strings_count_after_thinking_alone() -> None:
    params = SampleParams(stops=("X",))
    assert read("<think>aXb</think>cXd", params) == (Thinking("aXb"), Text("c"))
    assert read("<think>aXb", params, PLAIN) == (Text("<think>a"),)


def test_special_tokens_are_left_out_but_for_markup() -> None:
    pieces = [b"<tool_call>", b"</tool_call>", b"<eos>", b'{"name": "f"}', b"hi"]
    tokenizer = PieceTokenizer(pieces, special_ids={0, 1, 2})
    for skip, last in ((True, []), (False, [("<eos>",)])):
        made = View(SampleParams(skip_special_tokens=skip), tokenizer, ALL)
        made.feed([4, 0, 3, 1, 2])
        made.end()
        assert shape(made.blocks()) == [("hi",), ("f", "{}"), *last]


@pytest.mark.parametrize("unit", ["a", "\n", "<tool_call>", '<tool_call>"y\\"', "<think>", "a <"])
def test_time_is_linear_in_tokens(unit: str) -> None:
    def seconds(size: int) -> float:
        made = view(SampleParams(stops=("<never>",)))
        tokens = (unit * (size // len(unit))).encode()
        begun_s = time.process_time()
        for token_id in tokens:
            made.feed((token_id,))
        made.end()
        return time.process_time() - begun_s

    seconds(1000)
    assert seconds(32_000) < 10 * seconds(8_000)  # 4 when linear, 16 if not
