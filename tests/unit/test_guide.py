"""What a guide lets through, token by token, on a vocabulary without a model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from protocols.errors import EngineFailed, InvalidRequest, UnsupportedOption
from protocols.message import CallGuide, Guide, JsonGuide, Tool
from protocols.rollout_state import SampleParams, TokenIds
from tests.plain_model import listed
from tests.tiny_model import END, VOCABULARY, save_tokenizer, tiny_tokenizer
from worker.engines.base import Call, Markup
from worker.engines.grammar import MOST_CHARACTERS
from worker.engines.guide import Guides, Matcher, words_of
from worker.engines.hf_tokenizer import HFTokenizer

OTHER_END, SPECIAL, WIDTH = VOCABULARY, VOCABULARY + 1, VOCABULARY + 5
"""Ids behind the tiny vocabulary, and logits that are wider than it."""
POINT = JsonGuide(
    '{"type":"object","properties":{"x":{"type":"integer","minimum":3,"maximum":40},"on":{"type":"boolean"}},'
    '"required":["x","on"],"additionalProperties":false}'
)
WEATHER = Tool(
    "get_weather", parameters='{"properties":{"city":{"enum":["Rom","Bern"]}},"required":["city"]}'
)
MOVE = Tool("move", parameters='{"type":"object","properties":{},"additionalProperties":false}')
ROM = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom"}}\n</tool_call>'
MOVED = '<tool_call>\n{"name": "move", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    backend = tiny_tokenizer()
    return with_special(backend, "<|other end|>", "<|strange|>")


def with_special(backend: Tokenizer, *written: str) -> Tokenizer:
    add = cast("Any", backend).add_special_tokens  # its types are partial
    add([AddedToken(one, special=True) for one in written])
    return backend


@pytest.fixture
def tokenizer(backend: Tokenizer, tmp_path: Path) -> HFTokenizer:
    save_tokenizer(tmp_path, backend)
    return HFTokenizer(tmp_path)


@pytest.fixture
def guides(tokenizer: HFTokenizer) -> Guides:
    return Guides(tokenizer, WIDTH, [0, OTHER_END, 10**6])


def call(
    guide: Guide, *, prompt: Sequence[int] = (5,), kept: Sequence[int] = (), **params: object
) -> Call:
    made = SampleParams(guide=guide, **params)  # pyright: ignore[reportArgumentType]
    return Call(TokenIds(prompt), made, kept=(TokenIds(kept),) if kept else ())


def allowed(matcher: Matcher) -> set[int]:
    words = torch.empty(words_of(WIDTH), dtype=torch.int32)
    matcher.fill(words)
    bits: list[list[int]] = listed(words[:, None] >> torch.arange(32) & 1)
    return {32 * i + j for i, word in enumerate(bits) for j, bit in enumerate(word) if bit}


def follows(matcher: Matcher, ids: Sequence[int]) -> bool:
    for token_id in ids:
        if token_id not in allowed(matcher):
            return False
        matcher.advance(token_id)
    return True


async def takes(guides: Guides, guide: Guide, tokenizer: HFTokenizer, text: str) -> bool:
    """Whether the text is a whole answer: every token is allowed, and then an end."""
    return follows(await guides.matcher(call(guide), 0), [*tokenizer.encode(text), 0])


async def test_only_what_the_schema_allows_gets_through(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    for good in ('{"x":3,"on":true}', '{"x": 40, "on": false}'):
        assert await takes(guides, POINT, tokenizer, good)
    for bad in (
        '{"x":2,"on":true}',
        '{"x":41,"on":true}',
        '{"x":4}',
        '{"x":4,"on":true,"y":1}',
        "[]",
        "",
    ):
        assert not await takes(guides, POINT, tokenizer, bad)


async def test_white_space_is_one_space_at_most(guides: Guides, tokenizer: HFTokenizer) -> None:
    for bad in (
        '{"x":  3,"on":true}',
        '{ "x":3,"on":true}',
        ' {"x":3,"on":true}',
        '{"x":3,\n"on":true}',
    ):
        assert not await takes(guides, POINT, tokenizer, bad)


async def test_behind_the_last_byte_only_end_tokens_are_allowed(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    matcher = await guides.matcher(call(POINT), 0)
    assert follows(matcher, tokenizer.encode('{"x":3,"on":true}'))
    assert allowed(matcher) == {0, OTHER_END}


async def test_no_token_is_allowed_that_stands_for_nothing_or_is_special(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    matcher = await guides.matcher(call(JsonGuide('{"type":"string"}')), 0)
    assert follows(matcher, tokenizer.encode('"a'))
    assert not allowed(matcher) & {0, OTHER_END, SPECIAL, *range(SPECIAL + 1, 10 * 32)} - set(
        range(1, VOCABULARY)
    )
    assert follows(matcher, tokenizer.encode(' <|strange b"'))


async def test_a_call_is_one_of_the_tools_in_the_markup_of_the_model(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    guide = CallGuide((WEATHER, MOVE), parallel=False)
    assert await takes(guides, guide, tokenizer, ROM)
    assert await takes(guides, guide, tokenizer, MOVED)
    assert await takes(guides, guide, tokenizer, MOVED.replace("\n", ""))
    for bad in (
        "hello",
        f"{ROM}\n{ROM}",
        ROM.replace("Rom", "Oslo"),
        ROM.replace("get_weather", "move"),
    ):
        assert not await takes(guides, guide, tokenizer, bad)


async def test_several_calls_only_where_they_may_be_parallel(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    guide = CallGuide((WEATHER, MOVE))
    assert await takes(guides, guide, tokenizer, f"{ROM}\n{MOVED}{ROM}")
    assert not await takes(guides, guide, tokenizer, "\n".join([MOVED] * 33))


async def test_arguments_are_an_object_whatever_the_schema_leaves_open(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    guide = CallGuide((Tool("f", parameters="{}"),))
    assert not await takes(
        guides, guide, tokenizer, '<tool_call>\n{"name": "f", "arguments": 3}\n</tool_call>'
    )
    assert await takes(
        guides, guide, tokenizer, '<tool_call>\n{"name": "f", "arguments": {"a": []}}\n</tool_call>'
    )


async def test_thinking_that_the_prompt_has_begun_is_free_until_it_is_closed(
    tokenizer: HFTokenizer,
) -> None:
    tokenizer.markup = Markup(thinking=("<think>", "</think>"), call=("<c>", "</c>"))
    guides = Guides(tokenizer, WIDTH, [0])
    prompt = tokenizer.encode("assistant: <think>\n")
    thought = "so { é </thin> 😀\n\n</think>\n\n"
    matcher = await guides.matcher(call(POINT, prompt=prompt), 0)
    assert follows(matcher, [*tokenizer.encode(thought + '{"x":3,"on":true}'), 0])
    matcher = await guides.matcher(call(POINT, prompt=prompt), 0)
    assert follows(matcher, tokenizer.encode("so "))
    assert not allowed(matcher) & {0, OTHER_END}
    matcher = await guides.matcher(call(POINT, prompt=prompt), 0)
    assert not follows(matcher, tokenizer.encode("so </think> x"))


async def test_a_model_that_thinks_may_and_must_not(backend: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, with_special(Tokenizer.from_str(backend.to_str()), "<think>"))
    tokenizer = HFTokenizer(tmp_path)
    tokenizer.markup = Markup(thinking=("<think>\n", "\n</think>"), call=("<c>", "</c>"))
    guides = Guides(tokenizer, WIDTH, [0])
    answer = '{"x":3,"on":true}'
    assert await takes(guides, POINT, tokenizer, answer)
    assert await takes(guides, POINT, tokenizer, f"<think>\nhm\n</think>\n\n{answer}")
    closed = tokenizer.encode("<think>\n\n</think>\n\n")
    matcher = await guides.matcher(call(POINT, prompt=closed), 0)
    assert not follows(matcher, tokenizer.encode("<think>"))
    matcher = await guides.matcher(call(CallGuide((MOVE,))), 0)
    assert follows(matcher, [*tokenizer.encode('<c>{"name": "move", "arguments": {}}</c>'), 0])


async def test_markup_that_is_one_special_token_may_be_written(
    backend: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, with_special(Tokenizer.from_str(backend.to_str()), "<tool_call>"))
    tokenizer = HFTokenizer(tmp_path)
    guides = Guides(tokenizer, WIDTH, [0])
    ids = tokenizer.encode(MOVED)
    assert tokenizer.token_bytes(ids[0]) == b"<tool_call>"
    assert follows(await guides.matcher(call(CallGuide((MOVE,))), 0), [*ids, 0])


async def test_what_was_kept_is_gone_through_first(guides: Guides, tokenizer: HFTokenizer) -> None:
    ids = [*tokenizer.encode('{"x": 12, "on": false}'), 0]
    for cut in range(len(ids)):
        whole = await guides.matcher(call(POINT), 0)
        resumed = await guides.matcher(call(POINT, kept=ids[:cut]), 0)
        assert follows(whole, ids[:cut])
        assert allowed(whole) == allowed(resumed)
        assert follows(resumed, ids[cut:])


async def test_kept_tokens_that_do_not_follow_the_guide_are_an_engine_failure(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    with pytest.raises(EngineFailed, match="earlier attempt"):
        await guides.matcher(call(POINT, kept=tokenizer.encode("hello")), 0)


async def test_min_tokens_keeps_it_from_ending_where_more_may_come(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    guide, ids = CallGuide((MOVE,)), tokenizer.encode(MOVED)
    matcher = await guides.matcher(call(guide, min_tokens=len(ids) + 1), 0)
    assert follows(matcher, ids)
    more = allowed(matcher)
    assert more
    assert not more & {0, OTHER_END}
    alone = await guides.matcher(call(CallGuide((MOVE,), parallel=False), min_tokens=1000), 0)
    assert follows(alone, ids)
    assert allowed(alone) == {0, OTHER_END}


async def test_a_stop_token_of_the_job_ends_the_sample(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    (comma,) = tokenizer.encode(",")
    matcher = await guides.matcher(call(POINT, stop_token_ids=(comma,)), 0)
    assert follows(matcher, tokenizer.encode('{"x":12,'))
    assert matcher.ended
    assert len(allowed(matcher)) == 32 * words_of(WIDTH)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ('{"$ref":"https://example.com/schema.json"}', "example.com"),
        ('{"$ref":"#/nowhere"}', "nowhere"),
        ('{"not":{"type":"string"}}', "not"),
        ('{"type":"array","uniqueItems":true}', "uniqueItems"),
        ('{"type":"strange"}', "strange"),
        ('{"type":"string","pattern":"(?=a)"}', "look-around"),
        ('{"enum":[]}', "Unsatisfiable"),
        ("false", "no value"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"maximum":1e999}', "cannot be read"),
        ('{"items":' * 100_000 + "true" + "}" * 100_000, "schema"),
        ('{"items":' * 300 + "true" + "}" * 300, "schema"),
        (f'{{"title":"{"x" * MOST_CHARACTERS}"}}', "at most"),
    ],
)
async def test_a_schema_that_cannot_be_followed_is_refused_by_the_name_of_its_field(
    guides: Guides, schema: str, why: str
) -> None:
    wrong: list[tuple[str, Guide]] = [
        ("response_format", JsonGuide(schema)),
        ("tools", CallGuide((WEATHER, Tool("f", parameters=schema)))),
    ]
    for field, guide in wrong:
        with pytest.raises(InvalidRequest, match=f"(?s)`{field}`.*{why}") as caught:
            await guides.matcher(call(guide), 0)
        assert caught.value.param == field
        assert len(caught.value.message) < 500


async def test_a_schema_may_say_anything_is_right(guides: Guides, tokenizer: HFTokenizer) -> None:
    for schema in ("true", "{}", '{"x-guidance":{"whitespace_flexible":true}}'):
        assert await takes(guides, JsonGuide(schema), tokenizer, '[1, {"a":null}]')
        assert not await takes(guides, JsonGuide(schema), tokenizer, "[  1]")


async def test_a_model_without_an_end_token_takes_no_guide(tokenizer: HFTokenizer) -> None:
    with pytest.raises(UnsupportedOption, match="response_format"):
        await Guides(tokenizer, WIDTH, []).matcher(call(POINT), 0)


async def test_names_are_written_as_json_has_them(guides: Guides, tokenizer: HFTokenizer) -> None:
    name = 'a"\\\n/é%{}'
    guide = CallGuide((Tool(name, parameters=MOVE.parameters),))
    said = json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)
    assert await takes(guides, guide, tokenizer, f"<tool_call>\n{said}\n</tool_call>")


def test_the_tiny_vocabulary_ends_with_its_first_token(tokenizer: HFTokenizer) -> None:
    assert tokenizer.token_bytes(0) == END.encode()


async def test_a_model_without_a_token_for_it_is_not_led_into_thinking(
    guides: Guides, tokenizer: HFTokenizer
) -> None:
    tokenizer.markup = Markup(thinking=("<think>", "</think>"))
    matcher = await guides.matcher(call(POINT), 0)
    assert not follows(matcher, tokenizer.encode("<think>"))
